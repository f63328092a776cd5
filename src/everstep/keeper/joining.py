"""Rank 0's second half of a snapshot of many ranks: it waits for the parts of the others, in a thread that
holds nothing else up.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from everstep.chain import parts
from everstep.chain.history import Chain
from everstep.chain.parts import Part, Take
from everstep.errors import Damaged, Unavailable

HURRY_S = 60.0
"""So long at most other ranks are waited for when somebody waits for this one. What they had been handed over
is being stored meanwhile; what died with them does not come however long one waits."""

Then: TypeAlias = Callable[[list[Part], Exception | None], None]


@dataclass(frozen=True)
class _Wanted:
    take: Take
    then: Then


class Joining:
    """Gathers the parts of takes, one take after the other.

    Args:
        chain: where they are.
        ranks: of so many ranks.
        deadline_s: so long each take is waited for.
        clock: in seconds.
    """

    def __init__(
        self, chain: Chain, ranks: int, deadline_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._chain = chain
        self._ranks = ranks
        self._deadline_s = deadline_s
        self._clock = clock
        self._hurried = False
        self._until = 0.0
        self._look = threading.Event()
        self._wanted: queue.SimpleQueue[_Wanted | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, take: Take, then: Then) -> None:
        """Wait for the parts of a take. `then` is called in the thread that waits, with those of all ranks in
        order, or with none and an error: `Unavailable` that is `away` where some did not come."""
        self._wanted.put(_Wanted(take, then))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="everstep-join", daemon=True)
            self._thread.start()

    def hurry(self) -> None:
        """Somebody waits for this rank: from now on the others are not waited for as long as usual."""
        if not self._hurried:
            self._until = self._clock() + HURRY_S
            self._hurried = True
            self._look.set()

    def look(self) -> None:
        """Look for parts now: those of this machine are there."""
        self._look.set()

    def close(self) -> None:
        """End. Only when nothing is waited for any more."""
        self._wanted.put(None)

    # -- in the thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            found: list[Part] = []
            failed: Exception | None = None
            try:
                clock = _Clock(self)
                found = parts.gather(
                    self._chain, wanted.take, self._ranks, self._deadline_s, clock.now, self._wait
                )
            except Unavailable as error:
                error.away = True
                failed = error
            except Damaged as error:
                failed = Unavailable(
                    f"what another rank told of its part of the snapshot cannot be read: {error.problem}",
                    kept="the snapshots before it are intact",
                    key=error.key,
                    away=True,
                )
            except Exception as error:
                failed = error
            wanted.then(found, failed)
            del wanted, found, failed

    @property
    def _is_over(self) -> bool:
        """Whether there was hurry for long enough."""
        return self._hurried and self._clock() >= self._until

    def _wait(self, seconds: float) -> None:
        if self._hurried:
            seconds = min(seconds, max(self._until - self._clock(), 0.0))
        if self._look.wait(seconds):
            self._look.clear()


class _Clock:
    """A take's: the deadline has passed all of a sudden when there was hurry for long enough, whether that
    began before the take is waited for or later."""

    def __init__(self, joining: Joining) -> None:
        self._joining = joining
        self._begun: float | None = None

    def now(self) -> float:
        now = self._joining._clock()
        if self._begun is None:
            self._begun = now
            return now
        return max(now, self._begun + self._joining._deadline_s) if self._joining._is_over else now
