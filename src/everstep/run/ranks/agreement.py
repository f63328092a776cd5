"""One rank's side of agreeing on the step that is taken."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from everstep.run.ranks.messages import Ask, Decide, Promise, Propose, Request, Wish

AHEAD_S = 0.05
"""A promise leaves so much time to hear the decision before it makes a rank wait, or one step."""

MAX_AHEAD_STEPS = 1024

PACE_S = 4 * AHEAD_S
"""How fast steps are is measured over so much time or more."""

HOLD_S = 2.0
"""A rank waits no longer than this at the end of a step for a decision. EVERSTEP_RANKS_HOLD."""


@dataclass(frozen=True)
class Due:
    """Take `number` is to be taken now. `anew`: all find out first who holds what."""

    number: int
    wish: Wish
    anew: bool = False


@dataclass(frozen=True)
class Declined:
    """Take `number` is not taken: by nobody (`busy`: for want of room), or (`missed`) not by this rank, so
    that it must be withdrawn."""

    number: int
    wish: Wish
    problem: str
    missed: bool = False
    busy: bool = False


class Agreement:
    """Two threads use it: the trainer's, with `ask`, `passed` and `news`, and the one that hears the hub,
    with `proposed` and `decided`.

    Args:
        rank: whose it is.
        step: how many steps are finished.
        post: sends a request to the hub. Must not block.
        room: whether a snapshot could be taken without waiting. Must not block.
        fits: whether it is known which other ranks hold what this one holds. Must not block.
        hold_s: see `HOLD_S`.
    """

    def __init__(
        self,
        rank: int,
        step: int,
        post: Callable[[Request], None],
        room: Callable[[], bool],
        fits: Callable[[], bool] = lambda: True,
        hold_s: float = HOLD_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rank = rank
        self._post = post
        self._room = room
        self._fits = fits
        self._hold_s = hold_s
        self._clock = clock
        self._changed = threading.Condition()
        self._step = step
        self._promised: tuple[int, int] | None = None
        """The take that was promised for and is not decided on, and the step that is not to be passed."""
        self._dues: deque[tuple[int, Due]] = deque()
        self._news: deque[Declined] = deque()
        self._pace = (step, clock())
        self._ahead = 1
        self.held_s = 0.0
        """For how long this rank has waited in all."""
        self.newest = 0
        """The number of the newest take that was proposed."""

    @property
    def ahead(self) -> int:
        """How many steps ahead of a step that is wished for it should be asked for, to be had exactly."""
        return 2 * self._ahead + 2

    # -- the trainer's ------------------------------------------------------------------------------------

    def ask(self, wish: Wish) -> None:
        """Wish for a snapshot of the step that is finished, or of a later one. Does not block."""
        self._post(Ask(self.rank, self._step, wish))

    def passed(self, step: int) -> Due | None:
        """So many steps are finished; returns what is to be taken of this one.

        Blocks only where this step was promised not to be passed and the decision has not come yet, and no
        longer than `hold_s`.
        """
        with self._changed:
            if self.arrives(step):
                begun = self._clock()
                self._changed.wait_for(lambda: self._promised is None, self._hold_s)
                self.held_s += self._clock() - begun
            return self.leaves(step)

    def arrives(self, step: int) -> bool:
        """At the end of a step; returns whether it has to be waited for a decision."""
        self._step = step
        return self._promised is not None and step >= self._promised[1]

    def leaves(self, step: int) -> Due | None:
        """From the end of a step, whether it was decided meanwhile or took too long."""
        if self._promised is not None and step >= self._promised[1]:
            self._promised = None  # What is decided on now comes too late for this rank.
        while self._dues and self._dues[0][0] < step:
            late, due = self._dues.popleft()
            self._news.append(_missed(due.number, due.wish, late))
        if self._dues and self._dues[0][0] == step:
            return self._dues.popleft()[1]
        return None

    def news(self) -> list[Declined]:
        """What was declined or missed since this was asked last."""
        if not self._news:
            return []
        with self._changed:
            found = list(self._news)
            self._news.clear()
        return found

    # -- the listener's -----------------------------------------------------------------------------------

    def proposed(self, propose: Propose) -> None:
        with self._changed:
            self._measure()
            last = self._dues[-1][0] if self._dues else 0
            limit = max(self._step + self._ahead, last + 1)
            self._promised = (propose.number, limit)
            self.newest = propose.number
        self._post(Promise(self.rank, propose.number, limit, self._room(), self._fits()))

    def decided(self, decide: Decide) -> None:
        with self._changed:
            held = self._promised is not None and self._promised[0] == decide.number
            at_limit = held and self._step >= self._promised[1]  # type: ignore[index]
            if held:
                self._promised = None
            if decide.problem:
                self._news.append(Declined(decide.number, decide.wish, decide.problem, busy=decide.busy))
            elif decide.step > self._step or (decide.step == self._step and at_limit):
                self._dues.append((decide.step, Due(decide.number, decide.wish, decide.anew)))
            else:
                self._news.append(_missed(decide.number, decide.wish, decide.step))
            self._changed.notify_all()

    def _measure(self) -> None:
        before, then = self._pace
        now = self._clock()
        if now - then < PACE_S:
            return
        wanted = math.ceil((self._step - before) / (now - then) * AHEAD_S)
        self._ahead = min(max(wanted, 1), MAX_AHEAD_STEPS)
        self._pace = (self._step, now)


def _missed(number: int, wish: Wish, step: int) -> Declined:
    return Declined(number, wish, f"step {step} was over before this rank heard of it", missed=True)
