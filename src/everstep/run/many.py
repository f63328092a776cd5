"""A run of several ranks, seen from one of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

from everstep.chain.history import Chain, Snapshot
from everstep.errors import Damaged, EverstepError, Mismatch, NotFound, Unavailable
from everstep.events import Failed, Missed, Sink, Warned, default_sink
from everstep.format import record
from everstep.format.record import SnapshotRecord
from everstep.keeper.base import Held, Outcome, Pending, Terms
from everstep.run import resume
from everstep.run.ranks.agreement import Declined, Due
from everstep.run.ranks.link import job_of_many
from everstep.run.ranks.messages import MAX_TEXT, Became, Wish
from everstep.run.ranks.together import FAILING_S, Patience, Together
from everstep.run.session import Clock, Run
from everstep.run.settings import Settings
from everstep.run.signals import EXIT_STATUS
from everstep.run.starting import Return, Start
from everstep.run.taking import Agree
from everstep.state import rng
from everstep.state.collecting import Collected
from everstep.state.sharing import have_parted
from everstep.state.workers import let_workers_end_with_the_process
from everstep.state.world import World

PAUSE_S, LONGEST_PAUSE_S = 5.0, 300.0
"""After a rank did not answer, triggers rest for so long; twice as long each time."""

PARTED = "what several ranks held alike is not alike any more; the next snapshot keeps each rank's own"

LEAVE_S = 20.0
"""A rank that was asked to stop waits no longer than this for the others to agree on a last snapshot."""


def open_with_others(settings: Settings) -> Callable[..., RunOfMany] | None:
    """What opens a run of these settings in a job of several ranks; None where this process is alone.

    Raises:
        Mismatch: there are several, and no way for them to reach each other.
    """
    job = job_of_many()
    if job is None:
        return None
    place = settings.repo if isinstance(settings.repo, str) else settings.repo.url
    patience = Patience(settings.ranks_wait, settings.ranks_hold, settings.ranks_parts)
    return partial(RunOfMany, ranks=Together(job, f"{place}@{settings.branch}", patience))


class RunOfMany(Run):
    """All ranks open it, train, and close it. What it does besides a run of one rank: agree with the others.

    No step waits for another rank, but for a decision that this rank has promised to wait for, which takes
    milliseconds and is bounded (`EVERSTEP_RANKS_HOLD`). Rank 0 has the lease and the step log, and its
    triggers count; `take` and signals count on any rank.
    """

    def __init__(
        self,
        settings: Settings,
        objects: Mapping[str, object],
        loader: Iterable[Any] | None = None,
        *,
        ranks: Together,
        config: Mapping[str, Any] | None = None,
        sink: Sink | None = None,
        clock: Clock = time.monotonic,
        chains: type[Chain] = Chain,
    ) -> None:
        self._together = ranks
        self._wanted: Pending | None = None
        """Of who waits for a snapshot that is not agreed on yet."""
        self._takes: dict[int, Pending] = {}
        self._asked_step = 0
        """The last step that was asked for because a trigger will fire there."""
        self._asked_time = False
        self._rests_until = 0.0
        self._pause_s = PAUSE_S
        self._stop_asked_at: float | None = None
        self._last: Due | None = None
        self._fits = False
        """Whether all ranks have found out who holds what, and this one still holds the same."""
        self._anew = ""
        """Under which key they do it now."""
        self._lacking = False
        """Whether the take before did not become a snapshot."""
        self._skipped = 0
        self._failing = False
        """Whether it ends because of an error, so that other ranks may be dead."""
        ranks.meet()
        sink = sink or _of_rank(ranks.rank, default_sink())
        super().__init__(
            settings,
            objects,
            loader,
            config=config,
            sink=sink,
            clock=clock,
            chains=chains,
            ranks=ranks,
            world=World(ranks.rank, ranks.ranks, ranks),
        )

    # -- opening ------------------------------------------------------------------------------------------

    def _resumption(self, restored: resume.Restore) -> resume.Resumption | None:
        """Rank 0 says from which snapshot, as it would alone; where one rank finds it damaged, none takes
        it."""
        ranks = self._together
        if not ranks.leads:
            return self._follow(restored)
        known = False

        def on_all(chain: Chain, snapshot: Snapshot) -> resume.Resumption:
            nonlocal known
            stored = len(snapshot.record.manifests)
            ranks.tell(f"{snapshot.id} {stored}".encode())
            self._compare_generators(stored)
            try:
                return ranks.all_of("the state", lambda: restored(chain, snapshot))
            except (Damaged, NotFound):
                raise
            except BaseException:
                known = True
                raise

        try:
            found = super()._resumption(on_all)
        except BaseException as error:
            if not known:
                ranks.tell_error(error)
            raise
        if found is None:
            ranks.tell(b"")
        return found

    def _follow(self, restored: resume.Restore) -> resume.Resumption | None:
        chain = self._readable()
        while told := self._together.told().decode():
            id, _, stored = told.partition(" ")
            self._compare_generators(int(stored))
            try:
                return self._together.all_of("the state", partial(_restored_of, restored, chain, id))
            except (Damaged, NotFound):
                continue  # Rank 0 looks for another.
        return None

    def _compare_generators(self, stored: int) -> None:
        """Before a snapshot of another number of ranks is read: which of these have alike generators."""
        world = self._world
        if stored != world.ranks and not world.alike:
            mine = rng.described(self._objects)
            alike = rng.alike(self._together.link.share("generators", mine), world.rank)
            self._world = replace(world, alike=alike)

    def _terms_of_rank(self, terms: Terms) -> Terms:
        ranks = self._together
        return replace(terms, rank=ranks.rank, ranks=ranks.ranks, deadline_s=ranks.patience.parts_s)

    def _begin(self, held: list[Held], start: Start | Return | None) -> None:
        super()._begin(held, start)
        self._fits = False
        self._together.start(
            self._steps, lambda: self._taking.has_room, lambda: self._fits, self._became, self._warn
        )

    # -- the loop -----------------------------------------------------------------------------------------

    def _act(self) -> None:
        due = self._together.passed(self._steps)
        for one in self._together.news():
            self._not_taken(one)
        if due is not None:
            self._take_due(due)
        if self._signals.received is not None:
            self._ask_to_stop(self._signals.received)
        elif self._together.leads:
            self._ask_for_triggers()
        self._prepare()

    def _take_due(self, due: Due) -> None:
        wish = due.wish
        pending, self._wanted = self._wanted, None
        if pending is None and (wish.wait or wish.stop):
            pending = self._new_pending()  # Somebody waits on another rank, so room is waited for here.
        if pending is not None:
            self._takes[due.number] = pending
        self._asked_time = False
        self._pause_s = PAUSE_S
        self._take_of_all(due, pending)
        if wish.stop:
            self._leave(wish.trigger)

    def _take_of_all(self, due: Due, pending: Pending | None) -> None:
        """This rank's part of what all take now."""
        wish, self._anew = due.wish, f"take {due.number}" if due.anew else ""
        self._taking.look, self._lacking = self._lacking, False
        try:
            taken = self._take(wish.trigger, wish.note, pending, overlap=not wish.stop, number=due.number)
        except Unavailable as error:  # Other ranks did not come to find out who holds what.
            taken = False
            self._emit(Warned(f"no snapshot of step {self._steps}: {error}"))
        finally:
            self._anew = ""
        if not taken:
            self._withdraw(due.number, wish)

    def _withdraw(self, number: int, wish: Wish) -> None:
        self._lacking = True
        self._taking.withdraw(self._occasion(wish.trigger, wish.note, None, False, number))

    def _collect(self, anew: str = "") -> Collected:
        collected = super()._collect(anew or self._anew)
        self._fits = collected.fits
        return collected

    def _prepare(self) -> None:
        """Ranks come here when the same step is over, and find out then who holds what."""
        ready = not self._prepared and self._has_optimizer_state
        if ready and not self._fits:
            try:
                self._collect("the first step")
            except Unavailable as error:
                self._emit(Warned(f"the ranks do not know yet who holds what: {error}"))
        super()._prepare()

    def _agree_of(self, number: int) -> Agree:
        """Rank 0 waits for what the others captured, in a thread of its own, and makes nothing of it where
        they part; the others leave that to it."""

        def agree(sample: bytes, then: Callable[[str], None]) -> None:
            if not self._together.leads:
                self._together.samples(number, sample)
                then("")
                return
            thread = threading.Thread(
                target=lambda: then(self._parted(number, sample)), name="everstep-agree", daemon=True
            )
            thread.start()

        return agree

    def _parted(self, number: int, sample: bytes) -> str:
        try:
            parted = have_parted(self._together.samples(number, sample))
        except Unavailable as error:
            return error.problem
        if not parted:
            return ""
        self._together.became(Became(number, problem=PARTED, parted=True))
        return PARTED

    def _not_taken(self, one: Declined) -> None:
        self._asked_time = False
        self._skipped += 1
        if one.missed:
            self._emit(Warned(f"no part of snapshot {one.number}: {one.problem}"))
            self._withdraw(one.number, one.wish)
        elif one.busy:
            self._skip(one)
        elif self._together.leads:
            self._emit(
                Warned(
                    f"no snapshot for {one.wish.trigger!r} ({self._skipped} skipped so far): {one.problem}"
                )
            )
            self._rests_until = self._clock() + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        if one.wish.wait and self._wanted is not None:
            self._ask_for_wanted("")

    def _skip(self, one: Declined) -> None:
        """As a run of one rank skips what it has no room for."""
        if self._together.leads and self._skipped.bit_count() == 1:
            self._emit(Missed(one.wish.at or self._steps, one.wish.trigger, self._skipped))

    def _ask_for_triggers(self) -> None:
        now = self._clock()
        if now < self._rests_until:
            return
        ahead = self._together.ahead
        for trigger in self._triggers:
            step = trigger.following(max(self._steps, self._asked_step))
            while 0 < step <= self._steps + ahead:
                self._asked_step = step
                self._together.ask(Wish(str(trigger), at=step))
                step = trigger.following(step)
            if not step and not self._asked_time and trigger.due(self._steps, now):
                self._asked_time = True
                self._together.ask(Wish(str(trigger)))
        if self._taking.again and not self._asked_time:
            self._asked_time = True
            self._together.ask(Wish("again"))

    # -- stopping -----------------------------------------------------------------------------------------

    def _ask_to_stop(self, signal: str) -> None:
        """All ranks are to take a last snapshot of the same step, and to leave."""
        now = time.monotonic()
        if self._stop_asked_at is None:
            let_workers_end_with_the_process()
            self._stop_asked_at = now
            self._together.ask(Wish(signal, wait=True, stop=True))
        elif now - self._stop_asked_at > LEAVE_S:
            self._emit(
                Failed(self._steps, f"the other ranks did not agree on a last snapshot for {LEAVE_S:.0f} s")
            )
            self._fail()
            raise SystemExit(EXIT_STATUS)

    def _leave(self, signal: str) -> NoReturn:
        let_workers_end_with_the_process()
        try:
            self._taking.wait()
            self._end(last=False)
        except EverstepError as error:
            self._emit(Failed(self._steps, str(error)))
        raise SystemExit(EXIT_STATUS)

    # -- snapshots ----------------------------------------------------------------------------------------

    def take(self, note: str = "") -> Pending:
        """Have a snapshot taken of the step under way, or the next: of one that all ranks can take. It is one
        snapshot, whether one rank asks for it or all do.

        Does not block.

        Args:
            note: a text that is kept with it; that of the lowest rank that gives one.
        """
        self._check_open()
        self._taking.raise_background()
        if self._wanted is None:
            self._wanted = self._new_pending()
            self._ask_for_wanted(note)
        return self._wanted

    def _ask_for_wanted(self, note: str) -> None:
        self._together.ask(Wish("take", note, at=self._steps + 1, wait=True))

    def _new_pending(self) -> Pending:
        return Pending()

    def _outcome(self, outcome: Outcome) -> None:
        """In the keeper's thread."""
        super()._outcome(outcome)
        if self._together.leads:
            self._together.became(_told(outcome))

    def _became(self, became: Became) -> None:
        """In the thread that hears rank 0."""
        self._fits = self._fits and not became.parted
        self._lacking = self._lacking or bool(became.problem)
        pending = self._takes.pop(became.number, None)
        if became.problem and not self._together.leads:
            self._taking.taken_step = None
        if pending is None or pending.settled(0):
            return
        if became.problem:
            kept = "the snapshots before it are intact"
            pending.finish(None, Unavailable(f"rank 0: {became.problem}", kept=kept))
        elif not self._together.leads:  # There its keeper says so.
            pending.finish(Snapshot(became.snapshot, record.decode(became.record, SnapshotRecord)))

    # -- ending -------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Take a last snapshot if steps were finished since the last, wait until it is durable, and let go of
        the chain. All ranks have to come here; one that does not costs the others a minute and the last
        snapshot. Does nothing the second time.

        Raises:
            EverstepError: a snapshot has failed; those before it are intact.
        """
        if self._closed:
            return
        self._taking.wait()
        wanted = not self._inside_a_step() and self._steps > 0 and self._taking.taken_step != self._steps
        try:
            self._last = self._together.last(self._steps, wanted or self._wanted is not None)
        except Unavailable as error:
            self._emit(Failed(self._steps, f"no last snapshot: {error}"))
        self._end(last=self._last is not None)

    def _take_last(self) -> None:
        assert self._last is not None
        pending, self._wanted = self._wanted or self._new_pending(), None
        self._takes[self._last.number] = pending
        self._take_of_all(self._last, pending)

    def _fail(self) -> None:
        """Other ranks may be dead, whose parts rank 0's keeper waits for: nothing that takes long is waited
        for here, so that the job can be started again."""
        self._failing = True
        if self._taking.wait(FAILING_S):
            super()._fail()
            return
        self._closed = True
        self._emit(
            Warned("this process leaves before all snapshots are durable: its keeper goes on with them")
        )
        self._taking.abandon()
        self._detach()
        self._together.end(failing=True)
        self._give_up_wanted()

    def _end(self, last: bool, replica_wait_s: float | None = None) -> None:
        try:
            super()._end(last, replica_wait_s)
        finally:
            self._hear_of_last()
            self._together.end(failing=self._failing)
            self._give_up_wanted()

    def _give_up_wanted(self) -> None:
        pending, self._wanted = self._wanted, None
        if pending is not None:
            pending.finish(None, Mismatch("the run was closed before the ranks had agreed on a step"))

    def _hear_of_last(self) -> None:
        """Wait until rank 0 has said what became of what it was given."""
        pending = self._takes.get(self._last.number) if self._last is not None else None
        if pending is not None and not self._together.leads:
            pending.settled(self._together.patience.parts_s)


def _restored_of(restored: resume.Restore, chain: Chain, id: str) -> resume.Resumption:
    return restored(chain, chain.snapshot(id))


def _told(outcome: Outcome) -> Became:
    if outcome.snapshot is not None:
        return Became(outcome.job.take, outcome.snapshot.id, record.encode(outcome.snapshot.record))
    problem = outcome.error.problem if isinstance(outcome.error, EverstepError) else repr(outcome.error)
    return Became(outcome.job.take, problem=problem[:MAX_TEXT] or "it failed")


def _of_rank(rank: int, sink: Sink) -> Sink:
    """What is told on every rank is told once, by rank 0; what is wrong with another by that one."""
    if rank == 0:
        return sink

    def emit(event: object) -> None:
        if isinstance(event, Warned):
            sink(Warned(f"rank {rank}: {event.what}"))
        elif isinstance(event, Failed):
            sink(Failed(event.step, f"rank {rank}: {event.why}"))

    return emit
