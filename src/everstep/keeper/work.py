"""What one trainer has handed over to a keeper process, and the threads that see to it."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from everstep.chain import parts
from everstep.chain.history import Chain
from everstep.chain.parts import Take
from everstep.chain.siblings import Siblings
from everstep.errors import Damaged, EverstepError, Unavailable
from everstep.format.layout import Layout
from everstep.keeper import memory, protocol
from everstep.keeper.arena import Arena, allocated
from everstep.keeper.base import Job, Outcome, Terms
from everstep.keeper.following import Following, Target
from everstep.keeper.keeping import JOINING, TIDYING, Given, Keeping
from everstep.keeper.protocol import MAX_HELD, Message
from everstep.keeper.scrubbing import Scrubbing
from everstep.store.urls import open_store

MAX_ARENAS = 64
MAX_JOBS = 1024
"""More than any trainer needs; a confused one is refused before it takes all memory."""


class Telling(Protocol):
    """How to reach the trainer, from any thread; where it is gone nothing happens."""

    def tell(self, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        """Does not block."""

    @property
    def lives(self) -> bool:
        """Whether it can still hear it."""

    def drain(self) -> None:
        """Wait until all that was told will reach it, whatever becomes of this process."""


class Work:
    """The jobs of one trainer and the arenas that it was lent.

    One thread stores the jobs, another makes arenas; all methods are called by a third, and none blocks.

    Args:
        chain: where to.
        terms: the trainer's.
        trainer: to be told what becomes of its jobs.
        wake: called when something has changed that the caller may wait for.
        spare: arenas of an earlier trainer that are not needed any more.
        after: what followed for an earlier trainer, and was stopped.
        siblings: what it has in common with the other trainers of its run on this machine.
    """

    def __init__(
        self,
        chain: Chain,
        terms: Terms,
        trainer: Telling,
        wake: Callable[[], None],
        spare: Sequence[Arena] = (),
        after: Following | None = None,
        siblings: Siblings | None = None,
    ) -> None:
        self._chain = chain
        self._terms = terms
        self._trainer = trainer
        self._tell = trainer.tell
        self._wake = wake
        self._spare = list(spare)
        self._siblings = siblings if terms.ranks > 1 else None
        self._keeping: Keeping | None = None
        self.following = self._follow(after) if terms.replicas and not terms.rank else None
        """The replicas, as long as there is something for them."""
        rate = 0 if terms.rank else terms.scrub_bytes_per_s
        self._scrubbing = Scrubbing(chain, rate, self._warn) if rate else None
        self._layout: Layout | None = None
        self._arenas: dict[int, Arena] = {}
        self._jobs: dict[int, _Held] = {}
        self._kept: deque[tuple[str, Arena]] = deque(maxlen=MAX_HELD if terms.ranks > 1 else 1)
        self._failed: _Held | None = None
        self._orphaned = False
        self._hurried = False
        self._withdrawing = False
        self._take = 0
        """The last."""
        self._lock = threading.Lock()
        self._tidying: dict[int, protocol.Tidy] = {}
        self._given: queue.SimpleQueue[_Held | protocol.Tidy | _Withdraw | None] = queue.SimpleQueue()
        self._wanted: queue.SimpleQueue[protocol.Prepare | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=target, name=f"everstep-{name}", daemon=True)
            for name, target in (("store", self._store_all), ("memory", self._make_all))
        ]
        for thread in self._threads:
            thread.start()

    # -- what there is --------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether all jobs are done, and the chain tidied."""
        return not self._jobs and not self._tidying and not self._withdrawing

    @property
    def ranks(self) -> int:
        """How many the run has."""
        return self._terms.ranks

    @property
    def next_step(self) -> int:
        """The step of a job that is not done; 0 for none."""
        return min((held.given.job.facts.step for held in list(self._jobs.values())), default=0)

    def jobs(self) -> tuple[protocol.Open, ...]:
        return tuple(held.open() for held in list(self._jobs.values()))

    def arena_bytes(self) -> tuple[int, ...]:
        return tuple(arena.size_bytes for arena in list(self._arenas.values()))

    @property
    def held(self) -> tuple[tuple[str, Arena], ...]:
        """The newest snapshot that is durable, and the arena that holds it. Where there are many ranks, the
        newest parts: of the last it is not known here whether it has become a snapshot."""
        with self._lock:
            return tuple(self._kept)

    @property
    def unfinished(self) -> bool:
        """Whether the last job has failed and could be tried once more."""
        return self._failed is not None

    def _follow(self, after: Following | None) -> Following:
        terms = self._terms
        targets = []
        for name, address in terms.replicas:
            try:
                targets.append(Target(name, open_store(address)))
            except EverstepError as error:
                self._warn(f"the replica {name} cannot be opened by the keeper: {error.problem}")
        return Following(
            self._chain,
            terms.branch,
            terms.lease,
            terms.keep,
            targets,
            lambda followed: self._tell(protocol.Stands.of(followed)),
            self._warn,
            self._wake,
            after,
        )

    # -- memory ---------------------------------------------------------------------------------------------

    def prepare(self, wanted: protocol.Prepare) -> None:
        self._refuse_too_many(wanted.arena)
        self._wanted.put(wanted)

    def bring(self, number: int, descriptor: int) -> None:
        """Take an arena over that an earlier keeper has lent."""
        arena = Arena.mapped(descriptor)
        self._refuse_too_many(number)
        self._arenas[number] = arena

    def discard(self, number: int) -> None:
        arena = self._arenas.pop(number, None)
        if arena is not None:
            self._forget(arena)
            arena.close()

    def _refuse_too_many(self, number: int) -> None:
        if len(self._arenas) >= MAX_ARENAS or number in self._arenas:
            raise Damaged(f"arena {number} was asked for twice, or there are too many")

    def _make_all(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            try:
                arena = self._made(wanted.size_bytes)
            except Exception as error:
                self._tell(protocol.NoMemory(wanted.arena, protocol.Problem.of(error)))
                continue
            with self._lock:
                if not self._orphaned:
                    self._arenas[wanted.arena] = arena
                    assert arena.descriptor is not None
                    self._tell(protocol.Lent(wanted.arena), (arena.descriptor,))
                    continue
            arena.close()

    def _made(self, size_bytes: int) -> Arena:
        while (spare := self._a_spare()) is not None:
            if size_bytes <= spare.size_bytes <= 2 * size_bytes:
                return spare
            spare.close()
        return Arena.mapped(allocated(size_bytes))

    def _a_spare(self) -> Arena | None:
        with self._lock:
            return self._spare.pop() if self._spare else None

    def _forget(self, arena: Arena) -> None:
        """The arena is about to hold something else than it did."""
        with self._lock:
            for one in list(self._kept):
                if one[1] is arena:
                    self._kept.remove(one)

    # -- jobs -----------------------------------------------------------------------------------------------

    def submit(self, message: protocol.Submit) -> None:
        if message.job in self._jobs or len(self._jobs) >= MAX_JOBS:
            raise Damaged(f"job {message.job} was handed over twice, or there are too many")
        if message.slices is not None:
            self._layout = protocol.layout(message.slices)
        if self._layout is None:
            raise Damaged(f"job {message.job} has no layout")
        journals = tuple(cut.journal() for cut in message.journals)
        facts, take, look = message.facts.facts(), message.take, message.look
        job = Job(self._layout, facts, message.values, journals, take=take, look=look)
        self._take = max(self._take, message.take)
        held = self._jobs[message.job] = _Held(message.job, job, message.again, self._free)
        self._given.put(held)

    def fill(self, message: protocol.Fill) -> None:
        arena = self._arenas.get(message.arena)
        if arena is None:
            raise Damaged(f"there is no arena {message.arena}")
        self._forget(arena)
        self._job(message.job).fill(arena, message)

    def arrived(self, message: protocol.Arrived) -> None:
        self._job(message.job).arrived(message.end)

    def end(self, message: protocol.End) -> None:
        self._job(message.job).end(message.costs)

    def drop(self, number: int) -> None:
        self._job(number).given.drop()

    def tidy(self, message: protocol.Tidy) -> None:
        if message.job in self._tidying or len(self._tidying) >= MAX_JOBS:
            raise Damaged(f"job {message.job} is to be tidied twice, or there are too many")
        self._tidying[message.job] = message
        self._given.put(message)

    def _job(self, number: int) -> _Held:
        held = self._jobs.get(number)
        if held is None or held.given.ended:
            raise Damaged(f"there is no job {number}, or it has ended")
        return held

    def _free(self, arena: Arena) -> None:
        for number, one in list(self._arenas.items()):
            if one is arena:
                self._tell(protocol.Freed(number))

    # -- in the storing thread ------------------------------------------------------------------------------

    def _store_all(self) -> None:
        while (one := self._given.get()) is not None:
            match one:
                case _Held():
                    self._store(one)
                case protocol.Tidy():
                    self._tidy(one)
                    del self._tidying[one.job]
                case _Withdraw():
                    self._withdraw(one)
                    self._withdrawing = False
            del one
            self._wake()

    def _store(self, held: _Held) -> None:
        given = held.given
        held.measure()
        try:
            keeping = self._kept_up()
            before = keeping.stored_before(given.job) if held.again else None
        except Exception as error:
            if self._terms.rank:
                self._withdraw(_Withdraw(given.job.take, f"its keeper failed ({error})"))
            self._done(held, Outcome(given.job, None, error, 0.0))
            return
        if before is not None:
            self._done(held, before)
        else:
            keeping.store(given, partial(self._done, held))

    def _done(self, held: _Held, outcome: Outcome) -> None:
        """In the storing thread, or in the one that joins."""
        given = held.given
        if outcome.error is not None:
            traceback.print_exception(outcome.error)
        with self._lock:
            self._remember(held, outcome)
            kept = self._failed is held
        self._tell(protocol.Done.of(held.number, outcome))
        # Never two jobs that the trainer does not know of: if this process dies, just the head is in doubt.
        self._trainer.drain()
        if not kept:
            given.finish()
        if outcome.snapshot is not None and self._keeping is not None:
            given.phase = TIDYING
            self._keeping.tidy(given.job.journals)
        self._tell(protocol.Tidied(held.number))
        self._trainer.drain()
        del self._jobs[held.number]
        self._wake()

    def _tidy(self, message: protocol.Tidy) -> None:
        try:
            self._kept_up().tidy([cut.journal() for cut in message.journals])
        except Exception as error:
            self._warn(f"the chain could not be tidied ({type(error).__name__}: {error})")
        self._tell(protocol.Tidied(message.job))
        self._trainer.drain()

    def _kept_up(self) -> Keeping:
        if self._keeping is None:
            self._keeping = Keeping(
                self._chain, self._terms, self._warn, self.following, self._scrubbing, self._siblings
            )
            if self._hurried:
                self._keeping.hurry()
        return self._keeping

    def _withdraw(self, one: _Withdraw) -> None:
        """This rank has no part in a take: the others need not wait for it."""
        terms = self._terms
        try:
            take = Take(terms.branch, terms.lease, one.take)
            parts.withdraw(self._chain, take, terms.rank, one.why)
        except Exception as error:
            self._warn(f"the other ranks wait for rank {terms.rank} ({type(error).__name__}: {error})")

    def _remember(self, held: _Held, outcome: Outcome) -> None:
        if outcome.snapshot is not None:
            self._terms = replace(self._terms, parent=outcome.snapshot.id)
            self._failed = None
            manifest = outcome.snapshot.record.manifests[0]
            self._keep(manifest if self.ranks > 1 else outcome.snapshot.id, held)
        elif outcome.part is not None:
            self._terms = replace(self._terms, part=outcome.part.manifest)
            self._keep(outcome.part.manifest, held)
        elif isinstance(outcome.error, Unavailable) and self._may_be_tried_again(held):
            # Nobody else has this state any more, and nobody changes it: the next trainer may have made room.
            self._failed = held

    def _keep(self, name: str, held: _Held) -> None:
        if held.given.arena is not None:
            self._kept.appendleft((name, held.given.arena))

    def _may_be_tried_again(self, held: _Held) -> bool:
        """A rank that could not store has withdrawn, and for parts that did not come rank 0 has waited."""
        alone = not self._terms.rank and held.given.phase != JOINING
        return alone and held.given.is_whole and self._is_orphan()

    def _is_orphan(self) -> bool:
        return self._orphaned or not self._trainer.lives

    def _warn(self, text: str) -> None:
        self._tell(protocol.Warned(text[: protocol.MAX_TEXT]))

    # -- when the trainer is gone ---------------------------------------------------------------------------

    def orphan(self, died: bool = True) -> None:
        """The trainer is gone: what it handed over is finished, what it did not is not.

        Args:
            died: it did not say goodbye.
        """
        with self._lock:
            self._orphaned = True
        if self._scrubbing is not None:
            self._scrubbing.stop()  # There is nobody to be told.
        for held in list(self._jobs.values()):
            if not held.given.ended:
                held.given.drop()
        if died and self._terms.ranks > 1 and self._terms.rank:
            self._withdrawing = True
            # Which the others may be taking, and this one takes no part in.
            self._given.put(_Withdraw(self._take + 1, "its process died"))

    def hurry(self) -> None:
        """Somebody waits until all is done that is left of a trainer which is gone."""
        self._hurried = True
        if self._keeping is not None:
            self._keeping.hurry()

    def try_again(self) -> None:
        """Store the last job once more, if it has failed."""
        held, self._failed = self._failed, None
        if held is not None:
            held.given.again()
            held.again = True  # It may be durable, and only the store's answer was lost.
            self._jobs[held.number] = held
            self._given.put(held)

    def rest(self, keep: bool = True) -> None:
        """Keep the memory of the newest snapshot (and of a job that may be tried once more), unless nobody
        comes for it, and give all other back. Only when idle."""
        if self._keeping is not None:
            self._keeping.close()
        self._keeping = None  # It looks at arenas, to compare.
        if not keep:
            self._failed = None
            self._kept.clear()
        kept = [arena for _, arena in self._kept]
        if self._failed is not None and self._failed.given.arena is not None:
            kept.append(self._failed.given.arena)
        for number, arena in list(self._arenas.items()):
            if arena not in kept:
                del self._arenas[number]
                arena.close()
        while (spare := self._a_spare()) is not None:
            spare.close()

    def end_threads(self) -> None:
        """Only when idle."""
        self._given.put(None)
        self._wanted.put(None)

    def close(self) -> list[Arena]:
        """End, and give all memory back but what is held, which is returned. Only when idle."""
        self.end_threads()
        self._failed = None
        self.rest()
        return [arena for _, arena in self._kept]


@dataclass(frozen=True)
class _Withdraw:
    take: int
    why: str


class _Held:
    """A job as this process has it."""

    def __init__(self, number: int, job: Job, again: bool, free: Callable[[Arena], None]) -> None:
        self.number = number
        self.again = again
        self.given = Given(job, free, self._measured)
        self._end = self._arrived = 0
        self._cpu_s = 0.0

    def fill(self, arena: Arena, message: protocol.Fill) -> None:
        size = message.end - message.begin
        if message.begin != self._end or not 0 < size <= arena.size_bytes:
            raise Damaged(f"a wave of job {self.number} does not follow on the one before")
        if message.end > self.given.job.layout.arena_bytes:
            raise Damaged(f"a wave of job {self.number} goes past its layout")
        whole = (message.begin, message.end) == (0, self.given.job.layout.arena_bytes)
        filled = message.end if message.filled is None else message.filled
        if not message.begin <= filled <= message.end or (filled < message.end and not whole):
            raise Damaged(f"a wave of job {self.number} cannot be filled up to {filled}")
        self._end, self._arrived = message.end, filled
        self.given.wave(arena, message.begin, message.end, frozenset(message.unchanged), filled)

    def arrived(self, end: int) -> None:
        if not self._arrived <= end <= self._end:
            raise Damaged(f"job {self.number} cannot have arrived up to {end}")
        self._arrived = end
        self.given.arrived(end)

    def end(self, costs: dict[str, float]) -> None:
        if self._arrived != self.given.job.layout.arena_bytes:
            raise Damaged(f"job {self.number} ends before its layout does")
        self.given.job.facts.costs.update(costs)
        self.given.end()

    def open(self) -> protocol.Open:
        return protocol.Open(self.given.job.facts.step, self.given.phase, self.given.job.layout.arena_bytes)

    def measure(self) -> None:
        """From now on."""
        self._cpu_s = time.process_time()
        memory.forget_peak()

    def _measured(self) -> dict[str, float]:
        return {
            "cpu_keeper": (time.process_time() - self._cpu_s) * 1e3,
            "keeper_bytes": float(memory.peak_private_bytes()),
        }
