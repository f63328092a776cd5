"""What a keeper does with what it is given, in whatever process it runs: commit, seal the step log, prune."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from everstep.chain import parts, prune
from everstep.chain.census import Census
from everstep.chain.history import Chain, Snapshot
from everstep.chain.lease import Lease
from everstep.chain.packing import Shares
from everstep.chain.parts import Part, Take
from everstep.chain.siblings import Siblings
from everstep.chain.steplog import EndedJournal, StepLog
from everstep.chain.writer import Captured, Facts, Wave, Writer
from everstep.errors import Conflict, Damaged, EverstepError, NotFound, Unavailable
from everstep.keeper.arena import Arena
from everstep.keeper.base import Job, Outcome, Terms
from everstep.keeper.following import Following
from everstep.keeper.joining import Joining
from everstep.keeper.scrubbing import Scrubbing

ARRIVING, WAITING, STORING, JOINING, TIDYING = "arriving", "waiting", "storing", "joining", "tidying"
"""What becomes of a job, one after the other (a job may be stored while it arrives; with rank 0 of several it
waits for the parts of the others, which is joining)."""

Then: TypeAlias = Callable[[Outcome], None]


class Dropped(Exception):
    """The trainer could not complete a snapshot; it knows."""


@dataclass(frozen=True)
class _Filled:
    arena: Arena
    wave: Wave
    whole: bool


class Given:
    """A job on its way through a keeper: one thread hands its waves over, another stores them. A wave that
    holds all of the state may be stored while it is still being filled.

    Args:
        job: what is to be stored.
        free: is told of each arena that is not needed any more.
        measure: asked, when all waves are stored, for costs to be recorded.

    Attributes:
        phase: what is being done with it.
        ended: whether all its waves are there.
        dropped: whether it ended before its layout did.
    """

    def __init__(
        self,
        job: Job,
        free: Callable[[Arena], None],
        measure: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self.job = job
        self.phase = ARRIVING
        self.ended = False
        self._free = free
        self._measure = measure
        self.dropped = False
        self._waves: queue.SimpleQueue[_Filled | None] = queue.SimpleQueue()
        self._current: _Filled | None = None
        self._arrived = 0
        self._arrives = threading.Condition()

    def wave(
        self, arena: Arena, begin: int, end: int, unchanged: frozenset[int], filled: int | None = None
    ) -> None:
        """An arena for the addresses `begin` to `end`; see `base.Keeper.wave`."""
        if begin == end:
            self._free(arena)
            return
        self.arrived(end if filled is None else filled)
        memory = arena.first(end - begin)
        wave = Wave(begin, memory, unchanged, self._wait_for, lambda: self._arrived >= end)
        self._waves.put(_Filled(arena, wave, (begin, end) == (0, self.job.layout.arena_bytes)))

    def arrived(self, end: int) -> None:
        """What lies up to an address is there."""
        with self._arrives:
            self._arrived = end
            self._arrives.notify_all()

    def _wait_for(self, end: int) -> None:
        if self._arrived >= end:
            return
        with self._arrives:
            self._arrives.wait_for(lambda: self._arrived >= end or self.dropped)
            if self._arrived < end:
                raise Dropped

    def end(self) -> None:
        """No more waves come, and all is there."""
        self.ended = True
        if self.phase == ARRIVING:
            self.phase = WAITING
        self._waves.put(None)

    def drop(self) -> None:
        """It cannot be completed."""
        with self._arrives:
            self.dropped = True
            self._arrives.notify_all()
        self.end()

    @property
    def arena(self) -> Arena | None:
        """The one that holds all of the state, once it is there."""
        return self._current.arena if self._current is not None and self._current.whole else None

    def captured(self) -> Captured:
        return Captured(self.job.layout, self.job.values, self._stored())

    def _stored(self) -> Iterator[Wave]:
        """Each wave as it comes. One is over when the next is asked for, but a whole state is kept until
        `finish`: the next trainer may want it."""
        while (filled := self._waves.get()) is not None:
            self._current = filled
            yield filled.wave
            if not filled.whole:
                self._free_current()
        if self.dropped:
            raise Dropped
        self.job.facts.costs.update(self._measure())

    def finish(self) -> None:
        """Free what it still has; where it failed, waits for the waves that are still to come. What holds all
        of the state may be written to until then."""
        if self._current is not None and not self._current.whole:
            self._free_current()
        while not self.ended or not self._waves.empty():
            filled = self._waves.get()
            if filled is not None and filled.whole:
                self._current = filled
            elif filled is not None:
                self._free(filled.arena)
        self._free_current()

    def _free_current(self) -> None:
        if self._current is not None:
            self._free(self._current.arena)
            self._current = None

    @property
    def is_whole(self) -> bool:
        """Whether all of the state is there, so that it could be stored once more."""
        return self.arena is not None and self.ended and not self.dropped

    def again(self) -> None:
        """Be as it was when it was handed over; only where it is whole."""
        self._waves = queue.SimpleQueue()
        self._waves.put(self._current)
        self._waves.put(None)


class Keeping:
    """The writer's side of one rank of a run. Making one reads the manifest that it goes on from.

    A rank that is not the first stores its parts and announces them, and does nothing else: it holds no
    lease, commits, seals and prunes nothing.

    Args:
        chain: where to.
        terms: the run's.
        warn: is told, a sentence each, what failed and did no harm.
        following: the replicas, which are told of what is new, and may tell that the run must stop.
        scrubbing: what reads the chain meanwhile, and waits while there is something to do.
        siblings: what it has in common with the keepings of other ranks in this process.
    """

    def __init__(
        self,
        chain: Chain,
        terms: Terms,
        warn: Callable[[str], None],
        following: Following | None = None,
        scrubbing: Scrubbing | None = None,
        siblings: Siblings | None = None,
    ) -> None:
        self.chain = chain
        self._terms = terms
        self._siblings = siblings
        self._warn = warn
        self._following = following
        self._scrubbing = scrubbing
        self._keep = prune.Keep.parse(terms.keep)
        self._census = Census(chain)
        self._lease = Lease(chain.store, terms.lease, terms.branch)
        self._log = StepLog(chain, terms.branch, terms.lease)
        self._writer = Writer(chain, self._lease, terms.branch, terms.parent)
        self._writing = threading.Lock()
        """Held by who uses the writer: where parts are waited for there are two who do."""
        self._joining = Joining(chain, terms.ranks, terms.deadline_s)
        if terms.part or (terms.parent and not terms.fresh):
            self._build_on(terms.parent)
        if siblings is not None:
            siblings.enter(self._joining.look)

    def _build_on(self, snapshot: str) -> None:
        """The run has just restored it, so its chunks are good. Or this rank has stored a part meanwhile."""
        rank, ranks = self._terms.rank, self._terms.ranks
        try:
            if self._terms.part:
                self._writer.build_on(self.chain.part_named(self._terms.part, rank, ranks))
                return
            record = self.chain.snapshot(snapshot)
            if ranks == 1:
                self._writer.build_on(self.chain.manifest(record))
            elif len(record.record.manifests) == ranks:
                self._writer.build_on(self.chain.part(record, rank))
        except (Damaged, NotFound):
            # Then nothing is shared with it, and the next snapshot is a full one.
            return

    def store(self, given: Given, then: Then) -> None:
        """Make a job durable, or find that it cannot be: then nothing of it is in the chain. Blocks; also
        where a job failed and its waves still come.

        Args:
            then: is told what became of it, once: before this returns; or, with rank 0 of several, by another
                thread, when the other ranks' parts are there too or it has waited in vain. So what is stored
                next does not wait for them.
        """
        job = given.job
        given.phase = STORING
        snapshot: Snapshot | None = None
        part: Part | None = None
        error: BaseException | None = None
        self._busy(True)
        try:
            self._refuse_fenced()
            if self._terms.ranks == 1:
                snapshot = self._writer.write(given.captured(), job.facts)
            else:
                part = self._store_part(given)
        except Dropped:
            error = Unavailable("the snapshot could not be completed", kept="those before it are intact")
        except BaseException as raised:
            error = raised
        finally:
            self._busy(False)
            if self._following is not None:
                self._following.storing(False)
        if part is not None and not self._terms.rank:
            given.phase = JOINING
            self._joining.put(self._take(job), partial(self._commit, given, then, time.monotonic()))
        else:
            then(Outcome(job, snapshot, error, since_ms(job.facts.begun), part=part))

    # -- with other ranks -----------------------------------------------------------------------------------

    def _take(self, job: Job) -> Take:
        return Take(self._terms.branch, self._terms.lease, job.take)

    def _shares(self, job: Job) -> Callable[[], Shares] | None:
        return None if self._siblings is None else partial(self._siblings.shares, self._take(job))

    def _store_part(self, given: Given) -> Part:
        job, rank, ranks = given.job, self._terms.rank, self._terms.ranks
        try:
            with self._writing:
                if job.look:
                    self._writer.look_again()
                part = self._writer.store_part(given.captured(), rank, ranks, self._shares(job))
            return self._announce(job, replace(part, approximate=job.facts.approximate))
        except BaseException as error:
            if rank:
                self._withdraw(job, error)
            raise
        finally:
            if self._siblings is not None:
                self._siblings.finished(self._take(job))

    def _announce(self, job: Job, part: Part) -> Part:
        try:
            return parts.announce(self.chain, self._take(job), part)
        except (Conflict, Damaged) as error:
            # It has withdrawn before, or what it told is of no use: a snapshot is lost, and no more.
            raise Unavailable(
                error.problem, kept="the snapshots before it are intact", key=error.key, away=True
            ) from error

    def _withdraw(self, job: Job, error: BaseException) -> None:
        """The other ranks need not wait for this one."""
        why = error.problem if isinstance(error, EverstepError) else f"{type(error).__name__}: {error}"
        try:
            parts.withdraw(self.chain, self._take(job), self._terms.rank, why)
        except Exception as raised:
            self._warn(
                f"rank {self._terms.rank} has no part of the snapshot of step {job.facts.step}, and cannot "
                f"tell the others, which wait for it ({type(raised).__name__}: {raised})"
            )

    def _commit(
        self, given: Given, then: Then, begun: float, found: list[Part], error: BaseException | None
    ) -> None:
        """In the thread that joins: all parts are there, or there is an error."""
        job = given.job
        snapshot: Snapshot | None = None
        job.facts.costs["join"] = (time.monotonic() - begun) * 1e3
        if error is None:
            given.phase = STORING
            try:
                with self._writing:
                    snapshot = self._writer.commit(found, job.facts)
            except BaseException as raised:
                error = raised
            else:
                self._clear(self._take(job))
        then(Outcome(job, snapshot, error, since_ms(job.facts.begun)))

    def _clear(self, take: Take) -> None:
        """What the ranks have told of a take that is committed is of no use any more."""
        try:
            parts.clear(self.chain, take)
        except Exception as error:
            self._warn(f"what the ranks told of a take stays for now ({type(error).__name__}: {error})")

    def hurry(self) -> None:
        """Somebody waits until all is done."""
        self._joining.hurry()

    def close(self) -> None:
        """End. Only when nothing is under way."""
        self._joining.close()
        if self._siblings is not None:
            self._siblings.leave(self._joining.look)

    # -- before and after -----------------------------------------------------------------------------------

    def _refuse_fenced(self) -> None:
        if self._following is not None:
            if self._following.fenced is not None:
                raise self._following.fenced
            self._following.storing(True)

    def _busy(self, begins: bool) -> None:
        if self._scrubbing is not None:
            self._scrubbing.storing(begins)

    def stored_before(self, job: Job) -> Outcome | None:
        """What became of a job that a keeper of the same run may have stored, if it has: that was killed
        before it could say so."""
        if self._terms.rank:
            part = parts.told(self.chain, self._take(job), self._terms.rank)
            return None if part is None else Outcome(job, None, None, since_ms(job.facts.begun), part=part)
        head = self._head_if(job.facts)
        return None if head is None else Outcome(job, head, None, head.record.costs.get("durable", 0.0))

    def _head_if(self, facts: Facts) -> Snapshot | None:
        """The branch's head, if it is just this snapshot."""
        head = self.chain.head(self._writer.branch)
        if head is None:
            return None
        record = head.record
        mine = (record.writer, record.step, record.taken_at)
        if mine != (self._lease.number, facts.step, facts.taken_at):
            return None
        self._writer.parent = head.id
        self._build_on(head.id)
        return head

    def tidy(self, journals: Sequence[EndedJournal]) -> None:
        """After a commit: seal the records up to it, drop what is not to stay of this branch. A failure is
        told, and the snapshot stands. Then the replicas follow."""
        self._busy(True)
        try:
            self._tidy(journals)
        finally:
            self._busy(False)
            if self._following is not None:
                self._following.news()

    def _tidy(self, journals: Sequence[EndedJournal]) -> None:
        try:
            self._log.seal(journals)
            with self._writing:
                self._prune()
        except EverstepError as error:
            self._warn(str(error))
        except Exception as error:
            self._warn(f"the chain could not be tidied ({type(error).__name__}: {error})")

    def _prune(self) -> None:
        branches = [self._writer.branch]
        plan = prune.plan(self.chain, self._keep, branches=branches, mine=self._lease, census=self._census)
        if plan is not None:
            self._writer.forget_packs(set(plan.packs))
            self._writer.has_pruned(prune.execute(self.chain, plan).records)


def since_ms(begun: float | None) -> float:
    """Milliseconds since `begun`, a value of `time.monotonic()` in any process of this machine."""
    return 0.0 if begun is None else (time.monotonic() - begun) * 1e3
