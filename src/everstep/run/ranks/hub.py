"""Which step is taken: the decisions of rank 0, as a pure state machine.

No rank waits for another to take part in anything. A snapshot is wished for; every rank promises a step that
it will not go past before it has heard more; the largest of these is one that all ranks can still take, and
is told to all. A rank that is slow to promise, or dead, costs that snapshot and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable

from everstep.run.ranks.messages import (
    Ask,
    Became,
    Decide,
    End,
    Late,
    Lost,
    Message,
    Promise,
    Propose,
    Request,
    Wish,
)

SHOWN = 8
"""So many ranks are named where several are meant."""


class Hub:
    """Hears what ranks ask and promise, one request after the other, and says what is to be told to all.

    Args:
        ranks: how many there are.
        first: the number of the first take.

    Attributes:
        number: that of the take that is agreed upon now, or next.
    """

    def __init__(self, ranks: int, first: int = 1) -> None:
        self.ranks = ranks
        self.number = first
        self._wish: Wish | None = None
        """While a take is agreed upon: why."""
        self._promises: dict[int, Promise] = {}
        self._later: list[Ask] = []
        """What was wished for meanwhile and is not had by that."""
        self._decided_step = -1
        """The step of the last take that was decided on."""
        self._stops = False

    @property
    def gathers(self) -> bool:
        """Whether promises are being waited for."""
        return self._wish is not None

    def hear(self, request: Request) -> list[Message]:
        """What is to be told to all ranks, in this order."""
        match request:
            case Ask():
                return self._asked(request)
            case Promise():
                return self._promised(request)
            case Late():
                return self._late(request)
            case Became():
                return [request]
            case End():
                return [request]
            case Lost():
                return []

    def _asked(self, ask: Ask) -> list[Message]:
        if self._stops or self._is_had(ask):
            return []
        if self._wish is None:
            self._wish = ask.wish
            self._promises.clear()
            return [Propose(self.number)]
        if ask.wish.stop or ask.wish.at <= self._wish.at:
            self._wish = self._wish.and_also(ask.wish)
        else:
            self._later.append(ask)
        return []

    def _is_had(self, ask: Ask) -> bool:
        """Whether what was decided on is the step that is asked for, or a later one."""
        return not ask.wish.stop and max(ask.step, ask.wish.at) <= self._decided_step

    def _promised(self, promise: Promise) -> list[Message]:
        if self._wish is None or promise.number != self.number:
            return []  # Too late: it was decided without.
        self._promises[promise.rank] = promise
        if len(self._promises) < self.ranks:
            return []
        full = [rank for rank, one in self._promises.items() if not one.room]
        if full and not self._wish.wait and not self._wish.stop:
            still = "is" if len(full) == 1 else "are"
            return self._decide(-1, f"{named(full)} {still} still busy with an earlier one", busy=True)
        return self._decide(max(self._wish.at, *(one.step for one in self._promises.values())), "")

    def _late(self, late: Late) -> list[Message]:
        if self._wish is None or late.number != self.number:
            return []
        silent = [rank for rank in range(self.ranks) if rank not in self._promises]
        return self._decide(-1, f"{named(silent)} did not answer in time")

    def _decide(self, step: int, problem: str, busy: bool = False) -> list[Message]:
        wish, self._wish = self._wish, None
        assert wish is not None
        anew = not problem and not all(one.fits for one in self._promises.values())
        decided = Decide(self.number, max(step, 0), wish, problem, anew, busy)
        self.number += 1
        if not problem:
            self._decided_step = max(step, self._decided_step)
            self._stops = self._stops or wish.stop
        later, self._later = self._later, []
        again = [said for ask in sorted(later, key=lambda ask: ask.wish.at) for said in self._asked(ask)]
        return [decided, *again]


def named(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 1, 2 and 40 more`."""
    found = sorted(ranks)
    text = ", ".join(map(str, found[:SHOWN]))
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"rank{'s' if len(found) > 1 else ''} {text}{more}"
