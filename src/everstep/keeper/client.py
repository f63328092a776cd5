"""The trainer's side of a keeper process: starts one where there is none, and another when it dies.

All that a keeper knows of this trainer the trainer knows too: terms, arenas, jobs. So a dead keeper's work is
handed to another, and nothing is lost; what it had made durable already is found and not stored twice.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from everstep.chain.history import MAIN, Chain
from everstep.chain.replicas import address_of
from everstep.errors import EverstepError, Unavailable, Unsupported
from everstep.format.layout import Layout
from everstep.keeper import protocol
from everstep.keeper.arena import Arena
from everstep.keeper.base import ARENAS, Followed, Held, Job, Outcome, Terms
from everstep.keeper.keeping import since_ms
from everstep.keeper.places import address, environment, environments, living_places, places
from everstep.keeper.protocol import Connection, Identify, Message, Status
from everstep.keeper.reading import Range, SharedReads
from everstep.keeper.start import Link, Starter
from everstep.store.base import Store

MAX_DEATHS = 3
"""So many keepers in a row that die before they have stored anything: then it is not by accident."""

MOMENTS_S = 1.0
"""A wait that takes longer is worth a sentence."""

LEAVE_S = 60.0
ASK_S = 5.0
FETCH_S = 60.0
"""What the keeper has not read by then is read from the store; it may be slow for all."""


@dataclass(eq=False)
class _Lent:
    """An arena of this trainer, and how the keeper calls it."""

    number: int
    arena: Arena


@dataclass(eq=False)
class _Filled:
    lent: _Lent
    begin: int
    end: int
    unchanged: frozenset[int]
    filled: int
    freed: bool = False


@dataclass(eq=False)
class _Open:
    """A job that the keeper has not done with.

    `again`: a keeper that died may have stored it. `told`: its outcome was passed on. `tidied`: nothing more
    comes.
    """

    number: int
    job: Job
    waves: list[_Filled] = field(default_factory=list)
    ended: bool = False
    dropped: bool = False
    again: bool = False
    outcome: Outcome | None = None
    told: bool = False
    tidied: bool = False

    @property
    def torn(self) -> bool:
        """Whether it cannot be handed to another keeper: its bytes are not all there any more."""
        return self.outcome is None and any(filled.freed for filled in self.waves)


class ProcessKeeper:
    """See `keeper.base.Keeper`. Made at once; the process is reached, or started, in the background.

    One thread talks to the process. It calls `on_outcome` and `warn`, which must not wait for this object.

    Args:
        chain: where to.
        on_outcome: called after each job, before its `Pending` says so.
        warn: is told, a sentence each, what failed and did no harm.
        branch: whose keeper it is: runs that write different branches of a chain have one each.
        rank, ranks: all ranks of a run on this machine have the same process, and a seat each.
        replicas: where the chain is followed, by the keeper of rank 0.
        on_followed: is told how each replica stands.
        identify: who is at the other end of a socket.

    Attributes:
        deaths: how many keepers have died while they worked for this trainer.

    Raises:
        Unsupported: this chain, or this system, cannot be served by another process.
    """

    outlives = True

    def __init__(
        self,
        chain: Chain,
        on_outcome: Callable[[Outcome], None],
        warn: Callable[[str], None],
        *,
        branch: str = MAIN,
        rank: int = 0,
        ranks: int = 1,
        replicas: Sequence[Store] = (),
        on_followed: Callable[[Followed], None] = lambda followed: None,
        identify: Identify = protocol.peer,
    ) -> None:
        self.deaths = 0
        self._rank, self._ranks = rank, ranks
        self._replicas = tuple((store.url, address_of(store)) for store in replicas if not rank)
        self._on_followed = on_followed
        self._behind: set[str] = set()
        """The replicas that are known to lack something, or of which nothing is known."""
        self._on_outcome = on_outcome
        self._warn = warn
        needed = {**environment(chain), **environments(replicas)}
        self._starter = Starter(chain.about.chain, address(chain), places(chain, branch), identify, needed)
        self._changed = threading.Condition()
        # All that follows is looked at and changed under it.
        self._terms: Terms | None = None
        self._link: Link | None = None
        self._earlier: bool | None = None
        """Whether a keeper was there before this trainer; None as long as that is not known."""
        self._settled = False
        self._busy_step = 0
        self._held: list[tuple[str, Arena]] = []
        """By the snapshot's id, or of many ranks by the part's manifest."""
        self._trouble: EverstepError | None = None
        """Why there is no keeper, or no arena, until somebody was told."""
        self._needed = True
        """Whether there is something to reach a keeper for."""
        self._closing = self._abandoned = self._over = False
        self._failures = 0
        self._numbers = 0
        self._wanted_bytes = 0
        self._reads: set[int] = set()
        """Asked for, and not answered."""
        self._got: dict[int, Arena] = {}
        self._making: dict[int, int] = {}
        self._lent: dict[Arena, _Lent] = {}
        self._free: deque[_Lent] = deque()
        self._open: dict[Job, _Open] = {}
        self._layout: Layout | None = None
        """That of the last job that was said over this link."""
        self._woken, self._waking = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        _of_this_process.add(self)
        self._thread = threading.Thread(target=self._work, name="everstep-keeper", daemon=True)
        self._thread.start()

    # -- beginning ------------------------------------------------------------------------------------------

    def held(self) -> list[Held]:
        with self._changed:
            if not self._changed.wait_for(self._knows_held, MOMENTS_S):
                what = f"step {self._busy_step} of" if self._busy_step else "what it has of"
                self._warn(f"waiting for the keeper to store {what} an earlier process of this run")
                self._changed.wait_for(self._knows_held)
            if self._trouble is not None:
                raise self._trouble
            return [self._held_as(name, arena) for name, arena in self._held]

    def _held_as(self, name: str, arena: Arena) -> Held:
        return Held("", arena.memory, name) if self._ranks > 1 else Held(name, arena.memory)

    def _close_held(self) -> None:
        while self._held:
            self._held.pop()[1].close()

    def _knows_held(self) -> bool:
        return self._settled or self._trouble is not None or self._earlier is False

    def begin(self, terms: Terms) -> None:
        if (terms.rank, terms.ranks) != (self._rank, self._ranks):
            raise ValueError(f"this is the keeper of rank {self._rank} of {self._ranks}")
        with self._changed:
            self._terms = replace(terms, replicas=self._replicas)
            self._behind = {name for name, _ in self._replicas}
            self._close_held()
            if self._link is not None and self._settled:
                self._hand_over(self._link)
            self._need()

    def reading(self, store: Store) -> Store:
        if self._ranks == 1:
            return store
        return SharedReads(store, self._fetch)

    def _fetch(self, wanted: Range) -> Arena | None:
        """From several threads at once."""
        with self._changed:
            link = self._link
            if link is None or not self._settled or self._terms is not None:
                return None
            number = self._number()
            self._reads.add(number)
            link.connection.send(protocol.Read(number, wanted.key, wanted.start, wanted.size_bytes))
            if link.connection.unsent_bytes:
                self._wake()
            self._changed.wait_for(lambda: number not in self._reads or self._link is not link, FETCH_S)
            self._reads.discard(number)
            return self._got.pop(number, None)

    # -- memory ---------------------------------------------------------------------------------------------

    def prepare(self, size_bytes: int) -> None:
        with self._changed:
            if size_bytes <= self._wanted_bytes:
                return
            self._wanted_bytes = size_bytes
            self._discard_small()
            for _ in range(ARENAS):
                number = self._number()
                self._making[number] = size_bytes
                self._say(protocol.Prepare(number, size_bytes))
            self._need()

    def has_room(self) -> bool:
        with self._changed:
            return not self._lent or self._fitting(self._wanted_bytes) is not None

    def arena(self, size_bytes: int, wait: bool) -> Arena | None:
        with self._changed:
            self.prepare(size_bytes)
            while (lent := self._fitting(size_bytes)) is None:
                if not self._making:
                    if all(arena.size_bytes < size_bytes for arena in self._lent):
                        raise self._no_memory()
                    if not wait:
                        return None
                self._changed.wait()
            self._free.remove(lent)
            return lent.arena

    def _fitting(self, size_bytes: int) -> _Lent | None:
        """The one that was free longest: the other holds the newest snapshot."""
        return next((lent for lent in self._free if lent.arena.size_bytes >= size_bytes), None)

    def _no_memory(self) -> EverstepError:
        """Why there is no arena; who asks once more makes the keeper try once more."""
        self._wanted_bytes = 0
        trouble, self._trouble = self._trouble, None
        return trouble or Unavailable("the keeper has no memory for an arena", kept="training goes on")

    def give_back(self, arena: Arena) -> None:
        with self._changed:
            lent = self._lent.get(arena)
            if lent is not None:
                self._free.appendleft(lent)
                self._discard_small()
                self._changed.notify_all()

    def _set_free(self, lent: _Lent) -> None:
        self._free.append(lent)
        self._discard_small()
        self._changed.notify_all()

    def _discard_small(self) -> None:
        """Let go of arenas that are free, and by now too small."""
        for lent in list(self._free):
            if lent.arena.size_bytes < self._wanted_bytes:
                self._free.remove(lent)
                del self._lent[lent.arena]
                self._say(protocol.Discard(lent.number))
                lent.arena.close()

    # -- jobs -----------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        with self._changed:
            opened = self._open[job] = _Open(self._number(), job)
            if self._link is not None and self._link.begun:
                self._say_submit(opened, more=True)
            else:
                self._need()

    def wave(
        self,
        job: Job,
        arena: Arena,
        begin: int,
        end: int,
        unchanged: frozenset[int],
        filled: int | None = None,
    ) -> None:
        with self._changed:
            opened, lent = self._open[job], self._lent[arena]
            if filled is None and (begin == end or opened.tidied):
                self._set_free(lent)
                return
            filled = end if filled is None else filled
            opened.waves.append(_Filled(lent, begin, end, unchanged, filled))
            if not opened.tidied:
                # After one that is all of the state, and all there, `end` follows at once; but of several
                # ranks only when they have agreed.
                whole = (begin, filled) == (0, job.layout.arena_bytes)
                self._say_wave(opened, opened.waves[-1], more=whole and self._ranks == 1)

    def arrived(self, job: Job, end: int) -> None:
        with self._changed:
            opened = self._open[job]
            opened.waves[-1].filled = end
            if not opened.tidied:
                self._say(protocol.Arrived(opened.number, end))

    def end(self, job: Job) -> None:
        self._end(self._open[job])

    def drop(self, job: Job) -> None:
        self._end(self._open[job], dropped=True)

    def _end(self, opened: _Open, dropped: bool = False) -> None:
        with self._changed:
            opened.ended, opened.dropped = True, dropped
            if opened.tidied:
                self._set_free_all(opened)
            else:
                self._say_end(opened)
            self._forget_if_over(opened)

    def wait(self, timeout: float | None = None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout)

    def close(self) -> None:
        self.wait()
        self._let_go()

    def abandon(self) -> None:
        with self._changed:
            self._abandoned = True
            jobs = list(self._open)
            self._open.clear()
        self._let_go()
        for job in jobs:
            error = Unavailable(
                "this process left before the snapshot was durable",
                kept="the keeper goes on storing it, and the snapshots before it are intact",
                next="everstep log",
            )
            job.pending.finish(None, error)

    def _let_go(self) -> None:
        with self._changed:
            self._closing = True
            self._need()
            if not self._changed.wait_for(lambda: self._over, 2 * LEAVE_S):
                self._warn("the keeper does not end; all that was handed over is durable, or was told")
            arenas = list(self._lent)
            self._lent.clear()
            self._free.clear()
            self._close_held()
        for arena in arenas:
            arena.close()
        _of_this_process.discard(self)

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _forget_if_over(self, opened: _Open) -> None:
        if opened.ended and opened.told and opened.tidied:
            self._open.pop(opened.job, None)
            self._changed.notify_all()

    # -- what is said, when somebody is there to hear it ----------------------------------------------------

    def _need(self) -> None:
        """There is something for the thread that talks to the keeper."""
        self._needed = True
        self._changed.notify_all()
        self._wake()

    def _wake(self) -> None:
        if self._waking >= 0:
            with suppress(BlockingIOError):
                os.write(self._waking, b"\0")

    def _say(self, message: Message, descriptors: tuple[int, ...] = (), *, more: bool = False) -> None:
        """`more`: another follows at once, and one call sends both."""
        if self._link is not None and self._link.begun:
            self._link.connection.send(message, descriptors, more=more)
            if not more and self._link.connection.unsent_bytes:
                self._wake()

    def _say_submit(self, opened: _Open, *, more: bool = False) -> None:
        job = opened.job
        message = protocol.Submit(
            job=opened.number,
            facts=protocol.Said.of(job.facts),
            values=job.values,
            journals=protocol.Cut.all_of(job.journals),
            slices=None if job.layout is self._layout else protocol.pieces(job.layout),
            again=opened.again,
            take=job.take,
            look=job.look,
        )
        opened.again = True
        try:
            self._say(message, more=more)
        except Unsupported as error:
            self._settle_without(opened, error)
            return
        self._layout = job.layout

    def _say_wave(self, opened: _Open, filled: _Filled, *, more: bool = False) -> None:
        unchanged = tuple(sorted(filled.unchanged))
        lent = filled.lent.number
        message = protocol.Fill(opened.number, lent, filled.begin, filled.end, unchanged, filled.filled)
        self._say(message, more=more)

    def _say_end(self, opened: _Open) -> None:
        costs = {name: float(cost) for name, cost in opened.job.facts.costs.items()}
        ending = protocol.Drop(opened.number) if opened.dropped else protocol.End(opened.number, costs)
        self._say(ending)

    def _hand_over(self, link: Link) -> None:
        """Tell a keeper, which knows nothing of this trainer, all that there is."""
        assert self._terms is not None
        link.begun = True
        self._layout = None
        self._say(protocol.Begin.under(self._terms))
        for lent in self._lent.values():
            assert lent.arena.descriptor is not None
            self._say(protocol.Bring(lent.number), (lent.arena.descriptor,))
        for number, size_bytes in self._making.items():
            self._say(protocol.Prepare(number, size_bytes))
        for opened in list(self._open.values()):
            self._hand_over_job(opened)

    def _hand_over_job(self, opened: _Open) -> None:
        if opened.tidied:
            return
        if opened.outcome is not None:
            self._set_free_all(opened)
            self._say(protocol.Tidy(opened.number, protocol.Cut.all_of(opened.job.journals)))
            return
        self._say_submit(opened)
        for filled in opened.waves:
            self._say_wave(opened, filled)
        if opened.ended:
            self._say_end(opened)

    # -- in the thread that talks to the keeper -------------------------------------------------------------

    def _work(self) -> None:
        while self._has_work():
            try:
                self._talk(self._starter.reach(self._learn))
            except EverstepError as error:
                self._give_up(error)
            except Exception as error:
                self._give_up(
                    EverstepError(f"the keeper cannot be reached ({type(error).__name__}: {error})")
                )
            self._pass_on()
        with self._changed:
            self._over = True
            self._close_pipe()
            self._changed.notify_all()

    def _close_pipe(self) -> None:
        for descriptor in (self._woken, self._waking):
            os.close(descriptor)
        self._woken = self._waking = -1

    def _has_work(self) -> bool:
        """Wait until there is something to reach a keeper for; False when there will not be any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._needed)
            return not self._closing or bool(self._open)

    def _learn(self, earlier: bool) -> None:
        with self._changed:
            if self._earlier is None or not earlier:
                self._earlier = earlier
            self._changed.notify_all()

    def _talk(self, link: Link) -> None:
        """Work with a keeper until it was told goodbye, or is gone."""
        try:
            if not self._listen(link):
                self._lose(link)
        finally:
            link.close()

    def _listen(self, link: Link) -> bool:
        """Whether it was told goodbye."""
        with self._changed:
            self._link, self._settled = link, False
        try:
            link.connection.send(protocol.Settle(self._rank, self._ranks))
            while not link.connection.ended:
                for message, descriptors in link.receive(self._woken):
                    self._hear(link, message, descriptors)
                self._pass_on()
                if self._may_leave():
                    self._leave(link)
                    return True
        except EverstepError as error:
            if not link.begun:
                raise
            link.refusal = error.problem
        finally:
            with self._changed:
                self._link = None
                self._changed.notify_all()
        return False

    def _may_leave(self) -> bool:
        with self._changed:
            return self._closing and not self._open

    def _leave(self, link: Link) -> None:
        if self._abandoned:
            link.connection.close()
        elif link.begun:
            self._say(protocol.Goodbye())
            if self._behind:
                # It goes on sending, and nobody waits for that.
                link.connection.drain()
            elif self._ranks > 1:
                # It may go on, for the other ranks.
                link.wait_until_gone(MOMENTS_S)
            elif not link.wait_until_gone(LEAVE_S):
                self._warn(f"the keeper, process {link.pid}, takes long to end; all is durable")
        else:
            # It may be another trainer's by now; if it is nobody's, it ends at once.
            link.connection.close()
            link.wait_until_gone(MOMENTS_S)

    # -- deaths ---------------------------------------------------------------------------------------------

    def _lose(self, link: Link) -> None:
        """A keeper has let go of this trainer, most likely by dying."""
        if not link.begun:
            self._count_failure(link, "it left")
            return
        how = link.make_sure_it_is_dead()
        with self._changed:
            self.deaths += 1
            for opened in list(self._open.values()):
                if opened.torn:
                    self._settle_without(opened, _torn(opened), again=True)
                elif opened.outcome is not None and opened.outcome.snapshot is None:
                    self._set_over(opened)
        self._count_failure(link, how)
        self._warn(f"the keeper died ({how}); another takes over, and nothing is lost")

    def _count_failure(self, link: Link, how: str) -> None:
        self._failures += 1
        if self._failures >= MAX_DEATHS:
            said = link.last_words()
            raise Unavailable(
                f"{self._failures} keepers in a row ended before they had stored anything ({how}"
                + (f"; the last one's log ends with: {said})" if said else ")"),
                kept="what was committed before is intact",
                next="EVERSTEP_KEEPER=thread, to do without a process of its own",
            )

    def _give_up(self, error: EverstepError) -> None:
        """There is no keeper: nothing is tried until something new is asked for."""
        with self._changed:
            self._failures = 0
            self._needed = False
            self._trouble = error
            self._making.clear()
            for opened in list(self._open.values()):
                if not opened.tidied:
                    self._settle_without(opened, error)
            self._changed.notify_all()

    def _settle_without(self, opened: _Open, error: EverstepError, again: bool = False) -> None:
        """No keeper will say what becomes of a job; it has failed, unless that is known otherwise."""
        if opened.outcome is None:
            opened.outcome = Outcome(opened.job, None, error, since_ms(opened.job.facts.begun), again)
        self._set_over(opened)

    def _set_over(self, opened: _Open) -> None:
        opened.tidied = True
        self._set_free_all(opened)
        self._forget_if_over(opened)
        self._wake()

    def _set_free_all(self, opened: _Open) -> None:
        """But for an arena that is still being filled: that waits for the job's end."""
        for filled in opened.waves:
            if not filled.freed and (opened.ended or filled.filled == filled.end):
                filled.freed = True
                self._set_free(filled.lent)

    # -- what the keeper says -------------------------------------------------------------------------------

    def _hear(self, link: Link, message: Message, descriptors: list[int]) -> None:
        match message:
            case protocol.Settled():
                self._settle(link, message, descriptors)
            case protocol.Got():
                self._get(message.number, descriptors)
            case protocol.Lent():
                self._take(message.arena, descriptors.pop())
            case protocol.Done():
                self._done(message)
            case protocol.Warned():
                self._warn(message.text)
            case protocol.Stands():
                self._stands(message.followed())
            case protocol.Refused():
                raise message.problem.error()
            case _:
                with self._changed:
                    self._note(message)
                    self._changed.notify_all()

    def _stands(self, followed: Followed) -> None:
        with self._changed:
            self._behind.discard(followed.replica)
            if followed.behind or followed.problem:
                self._behind.add(followed.replica)
        self._on_followed(followed)

    def _note(self, message: Message) -> None:
        match message:
            case protocol.Busy():
                self._busy_step = message.step
            case protocol.Freed():
                for filled in self._filled():
                    if filled.lent.number == message.arena and not filled.freed:
                        filled.freed = True
                        self._set_free(filled.lent)
            case protocol.Tidied():
                for opened in list(self._open.values()):
                    if opened.number == message.job:
                        self._set_over(opened)
            case protocol.NoMemory():
                self._making.pop(message.arena, None)
                self._trouble = message.problem.error()

    def _filled(self) -> list[_Filled]:
        return [filled for opened in self._open.values() for filled in opened.waves]

    def _settle(self, link: Link, message: protocol.Settled, descriptors: list[int]) -> None:
        names = [message.snapshot] if message.snapshot else message.parts
        held = [(name, Arena.opened(descriptor)) for name, descriptor in zip(names, descriptors, strict=True)]
        with self._changed:
            self._settled = True
            self._trouble = None
            if self._terms is not None:
                self._hand_over(link)
            else:
                self._held, held = held, []
            self._changed.notify_all()
        for _, arena in held:
            arena.close()

    def _get(self, number: int, descriptors: list[int]) -> None:
        arena = Arena.mapped(descriptors.pop()) if descriptors else None
        with self._changed:
            if number in self._reads and arena is not None:
                self._got[number], arena = arena, None
            self._reads.discard(number)
            self._changed.notify_all()
        if arena is not None:
            arena.close()  # Who asked has not waited for it.

    def _take(self, number: int, descriptor: int) -> None:
        try:
            arena = Arena.opened(descriptor)
        except EverstepError as error:
            with self._changed:
                self._making.pop(number, None)
                self._trouble = error
                self._changed.notify_all()
            return
        with self._changed:
            if self._making.pop(number, None) is None:
                self._say(protocol.Discard(number))
                arena.close()
                return
            lent = self._lent[arena] = _Lent(number, arena)
            self._set_free(lent)

    def _done(self, message: protocol.Done) -> None:
        with self._changed:
            self._behind = {name for name, _ in self._replicas}
            for opened in self._open.values():
                if opened.number == message.job and opened.outcome is None:
                    opened.outcome = outcome = message.outcome(opened.job)
                    self._failures = 0
                    if outcome.snapshot is not None and self._terms is not None:
                        self._terms = replace(self._terms, parent=outcome.snapshot.id)
                    if outcome.part is not None and self._terms is not None:
                        self._terms = replace(self._terms, part=outcome.part.manifest)

    def _pass_on(self) -> None:
        """Tell of the jobs that have an outcome since the last time."""
        while True:
            with self._changed:
                opened = next((one for one in self._open.values() if one.outcome and not one.told), None)
            if opened is None:
                return
            assert opened.outcome is not None
            outcome, error = opened.outcome, opened.outcome.error
            try:
                self._on_outcome(outcome)
            except BaseException as raised:
                error = error or raised
            if outcome.part is None or error is not None:
                opened.job.pending.finish(outcome.snapshot, error)
            with self._changed:
                opened.told = True
                self._forget_if_over(opened)

    # -- after a fork ---------------------------------------------------------------------------------------

    def disown(self) -> None:
        """In a forked child, which is no trainer: close what it has of the keeper's, so that the trainer's
        death is noticed and its memory is given back."""
        arenas = [*self._lent, *(arena for _, arena in self._held)]
        if self._link is not None:
            self._link.disown()
        for arena in arenas:
            arena.disown()
        if not self._over:
            self._close_pipe()
        # Whoever asks here gets an answer: there is nothing, and nothing is waited for.
        self._changed = threading.Condition()
        self._link, self._held, self._over = None, [], True
        self._lent, self._free, self._open = {}, deque(), {}


def _torn(opened: _Open) -> Unavailable:
    return Unavailable(
        f"the keeper died while the snapshot of step {opened.job.facts.step} went through it in waves",
        kept="those before it are intact",
        next="nothing: the run takes another",
    )


_of_this_process: weakref.WeakSet[ProcessKeeper] = weakref.WeakSet()


def _disown_all() -> None:
    for keeper in list(_of_this_process):
        keeper.disown()
    _of_this_process.clear()


os.register_at_fork(after_in_child=_disown_all)


# -- for whoever wants to know -----------------------------------------------------------------------------


def living(identify: Identify = protocol.peer) -> list[Status]:
    """What the living keepers of this user are doing, on this machine. Blocks for moments; a keeper that does
    not answer in time is left out."""
    found = []
    for place in living_places():
        sock = place.connect()
        if sock is None:
            continue
        who = identify(sock)
        link = Link(Connection(sock, protocol.TO_TRAINER), place, who.pid, None)
        try:
            if who.uid == os.geteuid():
                status = link.ask(protocol.Ask(), ASK_S)
                found += [status] if isinstance(status, Status) else []
        except EverstepError:
            continue
        finally:
            link.close()
    return found
