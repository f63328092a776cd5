"""A seat: what a keeper process does for one rank of a run, and the processes that come and go there."""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from everstep.chain.history import Chain
from everstep.chain.siblings import Siblings
from everstep.keeper import protocol
from everstep.keeper.base import Terms
from everstep.keeper.following import Following
from everstep.keeper.protocol import Connection, Message
from everstep.keeper.work import Work


class Caller:
    """A process that has connected.

    Attributes:
        life: a descriptor that tells of its death.
        greeted: whether it is of this version.
        heir: whether it has asked what is held, and so may want to be the next trainer.
        rank, ranks: whose, once it has.
        waits: whether it was not told yet.
        unclaimed: descriptors that came with its messages and that nobody has taken.
    """

    def __init__(self, connection: Connection, pid: int) -> None:
        self.connection = connection
        self.pid = pid
        self.life: int | None = None
        self.greeted = self.heir = self.waits = False
        self.rank, self.ranks = 0, 1
        self.unclaimed: list[int] = []

    def tell(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Only in the thread that serves."""
        self.connection.send(message, descriptors)


@dataclass(frozen=True)
class _Telling:
    """How the threads of a `Work` reach its trainer: what the socket does not take at once is left to the
    service, which watches it."""

    caller: Caller
    wake: Callable[[], None]

    @property
    def lives(self) -> bool:
        if self.caller.life is None:
            return not self.caller.connection.ended
        poll = select.poll()
        poll.register(self.caller.life, select.POLLIN)
        return not poll.poll(0)

    def tell(self, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        self.caller.connection.send(message, descriptors)
        if self.caller.connection.unsent_bytes:
            self.wake()

    def drain(self) -> None:
        self.caller.connection.drain()


class Seat:
    """One rank's. All is called by the thread that serves, and nothing blocks but `close`.

    Args:
        chain: where to.
        caller: the trainer that has the seat now.
        terms: the trainer's.
        siblings: what it has in common with the other seats.
        wake: called when something has changed that the service may wait for.
        linger_s: how long to wait for the next trainer after one was killed.
        clock: in seconds.
        earlier: the seat that an earlier trainer of this rank has left.
        after: what followed for an earlier trainer of rank 0, and was stopped.

    Attributes:
        trainer: whose it is; None when that is gone.
        finished: whether nothing more is to be done for the last trainer.
        leaving: whether the trainer has all it wanted, so that nobody is to come after it.
    """

    def __init__(
        self,
        chain: Chain,
        caller: Caller,
        terms: Terms,
        siblings: Siblings,
        wake: Callable[[], None],
        linger_s: float,
        clock: Callable[[], float],
        earlier: Seat | None = None,
        after: Following | None = None,
    ) -> None:
        self.rank = terms.rank
        self.trainer: Caller | None = caller
        self.finished = False
        self.leaving = False
        self._linger_s = linger_s
        self._clock = clock
        self._due = 0.0
        self._given_up_at = 0.0
        """When nothing has been sent to a replica for so long that it is left to the next run."""
        self._progress = 0
        spare = earlier.work.close() if earlier is not None else []
        self.work: Work = Work(chain, terms, _Telling(caller, wake), wake, spare, after, siblings)

    @property
    def at_work(self) -> bool:
        """Whether there is a trainer, or something that one has handed over and that is not done."""
        return self.trainer is not None or not self.finished

    @property
    def held(self) -> tuple[str, ...]:
        """What lies in memory for the next trainer."""
        return tuple(name for name, _ in self.work.held) if self.finished else ()

    # -- when the trainer is gone ---------------------------------------------------------------------------

    def let_go(self, died: bool) -> None:
        """The trainer is gone, or has all it wanted."""
        self.trainer = None
        self.leaving = not died
        self.work.orphan(died)

    def look_around(self, hurried: bool) -> None:
        """Whether all is done that a trainer which is gone had handed over.

        Args:
            hurried: nobody is to come after it.
        """
        if self.trainer is not None or self.finished or not self.work.idle:
            return
        self.finished = True
        self.work.rest(keep=not (self.leaving or hurried))
        if self.work.following is not None:
            self._given_up_at = self._clock() + self._linger_s
            self.work.following.finish()
        self.linger_anew()

    def linger_at_most(self, seconds: float) -> None:
        """Other ranks are back: the next trainer comes soon, or is on another machine now."""
        self._due = min(self._due, self._clock() + seconds)

    def linger_anew(self) -> None:
        useful = bool(self.work.held) or self.work.unfinished
        self._due = self._clock() + (self._linger_s if useful else 0.0)

    def lingers(self) -> bool:
        """Whether there is something to stay for, now that all is done."""
        return self._clock() < self._due or self._sends()

    def patience_s(self) -> float:
        """So long it lingers at least."""
        until = max(self._due, self._given_up_at) if self._sends() else self._due
        return max(until - self._clock(), 0.0)

    def _sends(self) -> bool:
        """Whether a replica still gets something: as long as it takes, but not while nothing can be sent."""
        following = self.work.following
        if following is None or not following.sending:
            return False
        if following.progress != self._progress:
            self._progress = following.progress
            self._given_up_at = self._clock() + self._linger_s
        return self._clock() < self._given_up_at

    def close(self) -> Following | None:
        """Give all memory back; returns what still sends to replicas."""
        for arena in self.work.close():
            arena.close()
        return self.work.following

    # -- the next trainer -----------------------------------------------------------------------------------

    def hurry(self) -> None:
        """Somebody waits until all is done that an earlier trainer had handed over; what has failed of it is
        tried once more."""
        if self.trainer is not None:
            return
        if self.finished and self.work.unfinished:
            self.finished = False
            self.work.try_again()
        self.work.hurry()

    def settled(self) -> tuple[protocol.Settled, tuple[int, ...]]:
        """What is held of the earlier trainer, and the descriptors that go with it."""
        held = [(name, arena.descriptor) for name, arena in self.work.held if arena.descriptor is not None]
        descriptors = tuple(descriptor for _, descriptor in held)
        names = tuple(name for name, _ in held)
        if self.work.ranks > 1:
            return protocol.Settled("", names), descriptors
        return protocol.Settled(names[0] if names else ""), descriptors

    def status(self) -> protocol.Seated:
        return protocol.Seated(
            rank=self.rank,
            trainer=self.trainer.pid if self.trainer is not None else 0,
            jobs=self.work.jobs(),
            arenas=self.work.arena_bytes(),
            held=self.held,
        )
