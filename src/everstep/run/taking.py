"""Taking snapshots while a loop runs: from a state to a job of the keeper, and what becomes of it."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeAlias

from everstep.chain.steplog import EndedJournal
from everstep.chain.writer import Facts
from everstep.errors import Damaged, Unavailable
from everstep.events import Away, Back, Failed, Missed, Sink, Taken, Unsent, Warned, size
from everstep.format.record import Number
from everstep.format.values import encode
from everstep.keeper.arena import Arena
from everstep.keeper.base import ARENAS, Job, Keeper, Outcome, Pending, Standings
from everstep.state.capture import Arrived, Capture, Capturer
from everstep.state.collecting import Collected
from everstep.state.copying import copy_range

Collect = Callable[[], Collected]


Agree: TypeAlias = Callable[[bytes, Callable[[str], None]], None]


@dataclass(frozen=True)
class Occasion:
    """Why and of what a snapshot is taken.

    Attributes:
        facts: what the record says besides the state; `begun` is when the loop began to wait for it.
        collect: looks at the state.
        journals: ends the step log here and gives it away.
        metrics: those of the step. May wait for an accelerator, so it is called beside the loop.
        pending: of somebody who waits for it, and for room too; None for a trigger, which is skipped.
        overlap: what only an optimizer's step changes may be copied beside the loop.
        number: that of the take, where several ranks have agreed on it; else 0.
        agree: of several ranks, is given a sample of what was captured, and tells, now or later and in
            whatever thread, why nothing may be made of it; "" where it may.
    """

    facts: Facts
    collect: Collect
    journals: Callable[[], list[EndedJournal]]
    metrics: Callable[[], Mapping[str, Number]]
    pending: Pending | None
    overlap: bool
    number: int = 0
    agree: Agree = lambda sample, then: then("")


class Taking:
    """Takes the snapshots of one run, one after the other.

    Args:
        keeper: makes them durable.
        emit: is told what happens, from several threads.
        arena_limit: what all arenas together may take, in bytes; asked once, when the state's size is known.
            A state that needs more is streamed through them.
        grid_bytes: the chain's.
        paranoid: compare each capture with the state once more, right before the optimizer's step.
        standings: how the replicas stand to what is taken.
        new_pending: what says of a snapshot that nobody waits for what became of it.
    """

    def __init__(
        self,
        keeper: Keeper,
        emit: Sink,
        arena_limit: Callable[[], int],
        grid_bytes: int,
        paranoid: bool,
        standings: Standings,
        new_pending: Callable[[], Pending] = Pending,
    ) -> None:
        self.errors: deque[tuple[Pending, BaseException]] = deque()
        self.taken_step: int | None = None
        """The step of the newest snapshot that was taken and has not failed."""
        self.look = False
        """Of several ranks: whether the take before the next was not committed."""
        self.again = False
        """Whether a snapshot was lost that is to be taken as soon as a step ends."""
        self._keeper = keeper
        self._emit = emit
        self._arena_limit = arena_limit
        self._grid_bytes = grid_bytes
        self._paranoid = paranoid
        self._standings = standings
        self._new_pending = new_pending
        self._capturer = Capturer()
        self._capture: Capture | None = None
        """The one that was not passed on yet."""
        self._unfenced: Capture | None = None
        """The one that the next optimizer's step has to wait for."""
        self._overlap = True
        self._streamed = False
        self._missed = 0
        self._unstored: list[tuple[Pending, Unavailable]] = []
        """Snapshots that a store which is away did not take, until it has taken a newer one."""
        self._journals: deque[EndedJournal] = deque()
        self._memory: dict[Job, memoryview] = {}
        self._useless: deque[memoryview] = deque()
        self._ahead_of: set[Job] = set()
        """What the keeper was handed and is not copied yet."""
        self._dropped: set[Job] = set()
        """Of what is to become nothing, and that was told: until the keeper has let go of it."""

    def prepare(self, collected: Collected) -> None:
        """Have arenas made for such a state, in the background. Does not block."""
        self._keeper.prepare(min(self._capturer.layout(collected).arena_bytes, self._arena_bytes))

    @cached_property
    def _arena_bytes(self) -> int:
        """What one may take."""
        return self._arena_limit() // ARENAS

    # -- taking -------------------------------------------------------------------------------------------

    def take(self, occasion: Occasion) -> bool:
        """Take a snapshot of the state now. False: there was no room, and nobody who waits for it; or, of
        several ranks, it has to be found out first who holds what.

        Blocks while what may change any time is copied; without overlap while all is.

        Raises:
            Unsupported: something cannot be stored; the message names it.
        """
        if not self._has_room(occasion):
            self._miss(occasion.facts)
            return False
        with _no_garbage_collection():
            worked = time.thread_time()
            collected = occasion.collect()
            if not collected.fits:
                return False
            layout = self._capturer.layout(collected)
            job = Job(layout, occasion.facts, pending=occasion.pending or self._new_pending())
            job.take, job.look = occasion.number, self.look
            if layout.arena_bytes > self._arena_bytes:
                self._stream(job, occasion, collected)
                return True
            arena = self._keeper.arena(layout.arena_bytes, wait=True)
            assert arena is not None
            self._started(job, occasion)
            while self._useless:
                self._capturer.forget(self._useless.popleft())
            try:
                self._capture = self._unfenced = self._capturer.begin(
                    collected,
                    layout,
                    arena.memory,
                    overlap=occasion.overlap and self._overlap,
                    then=partial(self._captured, job, arena, occasion, (time.thread_time() - worked) * 1e3),
                    ahead=partial(self._ahead, job, arena, occasion),
                )
            except BaseException:
                self._keeper.give_back(arena)
                raise
        return True

    @property
    def has_room(self) -> bool:
        """Whether a snapshot could be taken without waiting. From any thread."""
        capture = self._capture
        return (capture is None or capture.done.is_set()) and self._keeper.has_room()

    def withdraw(self, occasion: Occasion) -> None:
        """Let the other ranks know that this one has no part in a take that they have agreed on."""
        job = Job(self._capturer.layout(occasion.collect()), occasion.facts)
        job.take = occasion.number
        self._dropped.add(job)
        self._keeper.submit(job)
        self._keeper.drop(job)

    def _has_room(self, occasion: Occasion) -> bool:
        """Whether the last capture is over and an arena is free, after a wait if somebody waits anyway."""
        wait = occasion.pending is not None
        if self._capture is not None and not self._capture.done.is_set():
            if not wait:
                return False
            self._capture.done.wait()
        return wait or self._keeper.has_room()

    def _miss(self, facts: Facts) -> None:
        self._missed += 1
        if self._missed.bit_count() == 1:  # 1, 2, 4, 8, ...: fast steps would fill the screen.
            self._emit(Missed(facts.step, facts.trigger, self._missed))

    def _started(self, job: Job, occasion: Occasion) -> None:
        """The state is being copied: from now on this snapshot is the newest."""
        job.pending.begun = True
        job.pending.standings = self._standings
        job.journals = [*self._unsealed(), *occasion.journals()]
        self.taken_step = job.facts.step
        self.again = False

    def _ahead(self, job: Job, arena: Arena, occasion: Occasion, capture: Capture) -> Arrived:
        """A large copy begins: the keeper may digest and write what of it is there. Runs in the capture's
        thread where there is one."""
        self._describe(job, occasion, capture)
        self._hand_over(job, arena, capture, filled=0)
        self._ahead_of.add(job)
        return partial(self._keeper.arrived, job)

    def _describe(self, job: Job, occasion: Occasion, capture: Capture) -> None:
        job.values = capture.values
        job.facts = replace(job.facts, metrics=dict(occasion.metrics()), costs={})

    def _hand_over(self, job: Job, arena: Arena, capture: Capture, filled: int | None = None) -> None:
        self._memory[job] = arena.memory
        self._keeper.submit(job)
        self._keeper.wave(job, arena, 0, job.layout.arena_bytes, capture.unchanged, filled)

    def _captured(
        self, job: Job, arena: Arena, occasion: Occasion, worked_ms: float, capture: Capture
    ) -> None:
        """All is copied: it becomes a snapshot. Runs where `_ahead` does."""
        job.pending.release()
        ahead = job in self._ahead_of
        self._ahead_of.discard(job)
        if not ahead and capture.is_of_use:
            try:
                self._describe(job, occasion, capture)
            except BaseException as error:
                capture.error = error
        if not capture.is_of_use:
            if ahead:
                self._drop(job)
            else:
                self._keeper.give_back(arena)
            self._lost(job, capture)
            return
        for remark in capture.remarks:
            self._emit(Warned(remark))
        for leaf in capture.stale:
            self._emit(Warned(f"{leaf} is frozen, and changed all the same: it is captured as it is now"))
        begun = job.facts.begun or time.monotonic()
        job.facts.costs.update(
            {
                "stall": (capture.handed_at - begun) * 1e3 + capture.fence_ms,
                "capture": capture.copy_ms,
                "fence": capture.fence_ms,
                "cpu_trainer": worked_ms + capture.cpu_ms,
                "arena_bytes": arena.size_bytes * ARENAS,
            }
        )
        if not ahead:
            self._hand_over(job, arena, capture)
        self._conclude(job, occasion, capture.sample)

    def _conclude(self, job: Job, occasion: Occasion, sample: bytes) -> None:
        """All of it is there: it may become a snapshot, or nothing."""
        occasion.agree(sample, partial(self._agreed, job))

    def _agreed(self, job: Job, why: str) -> None:
        if not why:
            self._keeper.end(job)
            return
        self._emit(Failed(job.facts.step, why))
        if self.taken_step == job.facts.step:
            self.taken_step = None
        self.again = True
        self._drop(job)

    def _drop(self, job: Job) -> None:
        """What the keeper was handed may become nothing. The caller tells why."""
        self._take_back_journals(job)
        self._dropped.add(job)
        self._keeper.drop(job)

    def _lost(self, job: Job, capture: Capture) -> None:
        """The capture is of no use."""
        self._take_back_journals(job)
        self.taken_step = None
        self.again = True
        error = capture.error
        if error is None:
            self._overlap = False
            names = _shown(capture.changed)
            problem = f"{names} changed by something else than an optimizer's step while it was copied"
            next = "everstep.open(..., overlap=False), as this run goes on now"
            error = Unavailable(problem, kept="the next step's end takes a snapshot", next=next)
        self._emit(Failed(job.facts.step, str(error)))
        if capture.error is not None:
            self.errors.append((job.pending, error))
        job.pending.finish(None, error)

    # -- in waves -----------------------------------------------------------------------------------------

    def _stream(self, job: Job, occasion: Occasion, collected: Collected) -> None:
        """A state that is larger than the arenas goes through them in waves, while the loop waits."""
        waves = job.layout.waves(self._arena_bytes, self._grid_bytes)
        if not self._streamed:
            self._streamed = True
            of, limit = size(job.layout.arena_bytes), size(self._arena_bytes * ARENAS)
            text = f"two copies of a state of {of} are more than the {limit} that arenas may take"
            self._emit(Warned(f"{text}: snapshots stream through them in waves while the loop waits"))
        worked, begun = time.thread_time(), time.monotonic()
        self._started(job, occasion)
        job.values = encode(collected.tree)
        job.facts = replace(job.facts, metrics=dict(occasion.metrics()))
        self._keeper.submit(job)
        try:
            sources = list(collected.leaves.values())
            for first, last in waves:
                arena = self._keeper.arena(last - first, wait=True)
                assert arena is not None
                copy_range(job.layout, sources, first, last, arena.memory)
                self._keeper.wave(job, arena, first, last, frozenset())
        except BaseException:
            self._keeper.drop(job)
            raise
        now = time.monotonic()
        job.facts.costs.update(
            stall=(now - (job.facts.begun or begun)) * 1e3,
            capture=(now - begun) * 1e3,
            cpu_trainer=(time.thread_time() - worked) * 1e3,
            arena_bytes=self._arena_bytes * ARENAS,
        )
        self._conclude(job, occasion, collected.watch.now())

    # -- the fence ----------------------------------------------------------------------------------------

    def fence(self) -> None:
        """Before an optimizer's step: wait until the state may change.

        Raises:
            Damaged: (paranoid) what was captured is not the state.
        """
        if self._capture is not None and self._capture.done.is_set():
            self._capture = None
        capture, self._unfenced = self._unfenced, None
        if capture is None:
            return
        capture.fence()
        different = capture.differences() if self._paranoid else []
        if different:
            raise Damaged(
                f"{_shown(different)} before the optimizer's step: not what was captured at the tick",
                kept="the snapshots before the newest are not touched by this",
                next="everstep.open(..., overlap=False)",
            )

    # -- what becomes of it -------------------------------------------------------------------------------

    def outcome(self, outcome: Outcome) -> None:
        """To be told by the keeper, in its thread, before the job's `Pending` is."""
        job = outcome.job
        memory = self._memory.pop(job, None)
        if job in self._dropped:
            self._dropped.discard(job)
            if memory is not None:
                self._useless.append(memory)
            return
        if outcome.snapshot is None and outcome.error is None:
            return  # A rank's part of one: rank 0 says what becomes of it.
        if outcome.snapshot is None:
            assert outcome.error is not None
            if memory is not None:
                self._useless.append(memory)
            self._take_back_journals(job)
            if isinstance(outcome.error, Unavailable) and outcome.error.away:
                self._kept_from_storing(job, outcome.error)
                return
            self._emit(Failed(job.facts.step, str(outcome.error)))
            if outcome.again:
                self.again = True
            else:
                self.errors.append((job.pending, outcome.error))
            if self.taken_step == job.facts.step:
                self.taken_step = None  # The next occasion, `close` at the latest, tries again.
            return
        taken = outcome.snapshot.record
        self._standings.took(outcome.snapshot)
        if self._unstored:
            self._emit(Back(taken.step, len(self._unstored)))
            self._unstored = []
        self._emit(
            Taken(
                snapshot=outcome.snapshot.id,
                step=taken.step,
                trigger=taken.trigger,
                new_bytes=taken.new_bytes,
                logical_bytes=taken.logical_bytes,
                stall_ms=taken.costs.get("stall", 0.0),
                durable_ms=outcome.durable_ms,
                behind=self._standings.behind(taken.step),
            )
        )

    def _kept_from_storing(self, job: Job, error: Unavailable) -> None:
        """The store was tried for long enough. The newest state is handed over in this one's place."""
        if not self._unstored:
            self._emit(Away(job.facts.step, error.problem))
        self._unstored.append((job.pending, error))
        if self.taken_step == job.facts.step:
            self.taken_step = None
            self.again = True

    def raise_background(self, *, unstored: bool = False) -> None:
        """Raise what failed in the background, unless somebody who waited was told.

        Args:
            unstored: also where the store is away, for which training need not stop.
        """
        while self.errors:
            pending, error = self.errors.popleft()
            if not pending.told:
                raise error
        if unstored and self._unstored:
            pending, away = self._unstored[-1]
            self._unstored = []
            if not pending.told:
                raise away

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all that was taken is durable or has failed."""
        begun = time.monotonic()
        if self._capture is not None:
            if not self._capture.done.wait(timeout):
                return False
            self._capture = None
        left = None if timeout is None else max(0.0, timeout - (time.monotonic() - begun))
        return self._keeper.wait(left)

    def close(self, replica_wait_s: float = 0.0) -> list[EndedJournal]:
        """Wait for all, and for replicas so many seconds at most, and let go of the keeper; returns the step
        log that no snapshot took along."""
        self.wait()
        self._standings.settle(replica_wait_s)
        for replica, behind in self._standings.unsent().items():
            self._emit(Unsent(replica, behind, self._keeper.outlives))
        self._unfenced = None
        self._capturer.close()
        self._keeper.close()
        return self._unsealed()

    def abandon(self) -> None:
        """Let go of the keeper, which goes on with what it was handed over."""
        self._unfenced = None
        self._capturer.close()
        self._keeper.abandon()

    def _take_back_journals(self, job: Job) -> None:
        """Of a snapshot that there will not be."""
        self._journals.extend(job.journals)
        job.journals = ()

    def _unsealed(self) -> list[EndedJournal]:
        """The journals of snapshots that failed; they are the caller's now."""
        found = []
        while self._journals:
            found.append(self._journals.popleft())
        return found


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """The many small objects of a capture would set off a collection of everything that torch has made, which
    takes longer than the capture and finds nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
