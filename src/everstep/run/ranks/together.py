"""What a run does together with the other ranks of its job: begin, agree on what is taken, and end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec

from everstep import errors
from everstep.errors import EverstepError, Unavailable
from everstep.keeper.base import DEADLINE_S
from everstep.run.ranks import link as links
from everstep.run.ranks.agreement import HOLD_S, Agreement, Declined, Due
from everstep.run.ranks.link import OPENED, WAIT_S, Job, Link, Talk, unique
from everstep.run.ranks.messages import Became, Decide, Message, Propose, Wish

Result = TypeVar("Result")

_SOFT = ("Damaged", "NotFound")

END_S = 60.0
"""A rank that trains, or ends, waits no longer for the others: they may have failed."""

FAILING_S = 1.0
"""And no longer than this for rank 0 when this one leaves because something failed."""

LATE_OF_HOLD = 0.75
"""The hub gives up on a promise before ranks give up on its decision."""


class Verdict(msgspec.Struct, frozen=True, omit_defaults=True):
    """What came of something that one rank did: `data`, or an error."""

    data: bytes = b""
    kind: str = ""
    problem: str = ""
    kept: str = ""
    next: str = ""

    @classmethod
    def of(cls, error: BaseException) -> Verdict:
        if isinstance(error, EverstepError):
            return cls(b"", type(error).__name__, error.problem, error.kept, error.next)
        return cls(b"", "Unavailable", f"{type(error).__name__}: {error}")

    def error(self, rank: int) -> EverstepError:
        kind = getattr(errors, self.kind, Unavailable)
        kind = kind if isinstance(kind, type) and issubclass(kind, EverstepError) else Unavailable
        return kind(f"rank {rank}: {self.problem}", kept=self.kept, next=self.next)


class _AtEnd(msgspec.Struct, frozen=True, array_like=True):
    """How a rank is when no more steps follow."""

    step: int
    newest: int
    wanted: bool
    fits: bool


@dataclass(frozen=True)
class Patience:
    """For how long ranks wait for each other, in seconds: to begin and to end (`wait_s`), at the end of a
    step (`hold_s`), and rank 0's keeper for the others' parts of a snapshot (`parts_s`)."""

    wait_s: float = WAIT_S
    hold_s: float = HOLD_S
    parts_s: float = DEADLINE_S


class Ranks(Protocol):
    """What there is of ranks, seen from one of them.

    Attributes:
        rank, ranks: which of how many.
        leads: whether it is rank 0, which has the lease and commits.
    """

    @property
    def rank(self) -> int: ...
    @property
    def ranks(self) -> int: ...
    @property
    def leads(self) -> bool: ...

    def led(self, action: Callable[[], bytes]) -> bytes:
        """What rank 0's `action` gives; the others wait for it. An error of it is raised on all ranks."""

    def all_of(self, what: str, action: Callable[[], Result]) -> Result:
        """Do something on every rank; returns when all have done it, and raises on all where one cannot: its
        own error on that one. Of several the lowest rank's is raised."""


class Alone:
    """A run of one rank."""

    rank, ranks, leads = 0, 1, True

    def led(self, action: Callable[[], bytes]) -> bytes:
        return action()

    def all_of(self, what: str, action: Callable[[], Result]) -> Result:
        return action()


class Together:
    """One of several ranks. What blocks here waits for the others no longer than `patience` says.

    Args:
        job: this rank's place.
        name: the run's: what all its ranks call it, such as the address of the chain and the branch.
    """

    def __init__(self, job: Job, name: str, patience: Patience) -> None:
        self.rank, self.ranks = job.rank, job.ranks
        self.patience = patience
        self.link = Link(job, unique(name, OPENED), patience.wait_s)
        self._talk: Talk | None = None
        self._agreement: Agreement | None = None
        self._outcomes: Callable[[Became], None] = lambda became: None
        self._warn: Callable[[str], None] = lambda text: None
        self._rounds = 0
        self._fits: Callable[[], bool] = lambda: False

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which has the lease and commits."""
        return self.rank == 0

    # -- beginning and ending ------------------------------------------------------------------------------

    def meet(self) -> None:
        """Find the other ranks. Blocks until all have come; before that there is nothing else to be done
        here. Raises Unavailable where some do not come in time."""
        self.link.meet()

    def led(self, action: Callable[[], bytes]) -> bytes:
        if not self.leads:
            return self.told()
        try:
            data = action()
        except BaseException as error:
            self.tell_error(error)
            raise
        self.tell(data)
        return data

    def tell(self, data: bytes) -> None:
        """Rank 0 says something to the others, who hear it by `told`."""
        self.link.tell(msgspec.msgpack.encode(Verdict(data)))

    def tell_error(self, error: BaseException) -> None:
        """Rank 0 says why it cannot go on, so that the others cannot either."""
        self.link.tell(msgspec.msgpack.encode(Verdict.of(error)))

    def told(self) -> bytes:
        """What rank 0 says next. Blocks until it does. Raises its error where it cannot go on."""
        verdict = msgspec.msgpack.decode(self.link.told(), type=Verdict)
        if verdict.kind:
            raise verdict.error(0)
        return verdict.data

    def all_of(self, what: str, action: Callable[[], Result]) -> Result:
        result: Result | None = None
        failed: BaseException | None = None
        try:
            result = action()
        except BaseException as error:
            failed = error
        mine = Verdict() if failed is None else Verdict.of(failed)
        verdicts = [
            msgspec.msgpack.decode(data, type=Verdict)
            for data in self.link.share(what, msgspec.msgpack.encode(mine))
        ]
        wrong = {rank: verdict for rank, verdict in enumerate(verdicts) if verdict.kind}
        if wrong:
            # Where another snapshot could be tried all ranks have to say so, or none.
            worst = min(wrong, key=lambda rank: (wrong[rank].kind in _SOFT, rank))
            if failed is not None and mine.kind == wrong[worst].kind:
                raise failed
            raise wrong[worst].error(worst) from failed
        return result  # type: ignore[return-value]

    # -- training ------------------------------------------------------------------------------------------

    def start(
        self,
        step: int,
        room: Callable[[], bool],
        fits: Callable[[], bool],
        on_outcome: Callable[[Became], None],
        warn: Callable[[str], None],
    ) -> None:
        """From now on snapshots are agreed upon. `on_outcome` is called in a thread, on every rank."""
        self._rounds += 1
        self._outcomes = on_outcome
        self._warn = warn
        hold_s = self.patience.hold_s
        self._fits = fits
        self._agreement = Agreement(self.rank, step, self._post, room, fits, hold_s)
        self._talk = self.link.talk(self._rounds, self._hear, self._broken, hold_s * LATE_OF_HOLD)
        self._talk.begin()  # What is heard at once is answered through it.

    def ask(self, wish: Wish) -> None:
        assert self._agreement is not None
        self._agreement.ask(wish)

    def passed(self, step: int) -> Due | None:
        assert self._agreement is not None
        return self._agreement.passed(step)

    def news(self) -> list[Declined]:
        assert self._agreement is not None
        return self._agreement.news()

    @property
    def ahead(self) -> int:
        assert self._agreement is not None
        return self._agreement.ahead

    def became(self, became: Became) -> None:
        """Rank 0 tells all what became of a take. Does not block."""
        self._post(became)

    def last(self, step: int, wanted: bool) -> Due | None:
        """When no more steps follow: the take that all ranks take now; None where none of them wants one, or
        they are not at the same step. Blocks until all ranks have come here.

        Raises:
            Unavailable: some have not.
        """
        assert self._agreement is not None
        mine = msgspec.msgpack.encode(_AtEnd(step, self._agreement.newest, wanted, self._fits()))
        shared = self.link.share("end", mine, min(self.patience.wait_s, END_S))
        found = [msgspec.msgpack.decode(one, type=_AtEnd) for one in shared]
        if any(one.step != step for one in found) or not any(one.wanted for one in found):
            return None
        number = LAST + max(one.newest for one in found)
        return Due(number, Wish("close", wait=True), not all(one.fits for one in found))

    def share(self, key: str, mine: bytes) -> list[bytes]:
        """What each rank gives while it trains, in order (`state.world.Exchange`). Blocks until all have, a
        minute at most. Raises Unavailable where some have not."""
        return self.link.share(key, mine, min(self.patience.wait_s, END_S))

    def samples(self, number: int, mine: bytes) -> list[bytes]:
        """What all ranks say of take `number`, for rank 0, which blocks until they have; the others get only
        their own, at once. Raises Unavailable where some have not in time."""
        if self._talk is None:
            raise Unavailable("the run is over")
        if self.leads:
            return self._talk.gather(number, mine, min(self.patience.parts_s, self.patience.wait_s, END_S))
        self._talk.give(number, mine)
        return [mine]

    def end(self, *, failing: bool = False) -> None:
        """No more is agreed upon. Blocks until rank 0 ends it, which may take a while where that stores what
        it has; `failing`: not long, for it may be dead."""
        if self._talk is not None:
            self._talk.end(FAILING_S if failing else links.END_S)
            self._talk = None

    def _post(self, request: object) -> None:
        if self._talk is not None:
            self._talk.post(request)  # type: ignore[arg-type]

    def _hear(self, message: Message) -> None:
        assert self._agreement is not None
        match message:
            case Propose():
                self._agreement.proposed(message)
            case Decide():
                self._agreement.decided(message)
            case Became():
                self._outcomes(message)

    def _broken(self, why: str) -> None:
        self._warn(
            f"the other ranks cannot be heard any more ({why}): no more snapshots are taken, training goes on"
        )


LAST = 1 << 32
"""Takes that were not agreed upon by the hub have numbers above its own."""
