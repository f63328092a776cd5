"""How long a store over a network is tried before it counts as away."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Patience:
    """Times in seconds.

    Attributes:
        deadline_s: how long one verb may take with all its tries; the last try may end later.
        first_wait_s: the pause after the first try, which doubles with each.
        longest_wait_s: no pause is longer.
        request_s: a single request, its body included, that takes longer has failed.
        connect_s: and one that has no connection by then.
    """

    deadline_s: float = 300.0
    first_wait_s: float = 0.1
    longest_wait_s: float = 10.0
    request_s: float = 60.0
    connect_s: float = 5.0

    def pause(self, tries: int, share: float) -> float:
        """How long to wait after so many tries; `share`, from 0 to 1, keeps many from coming back at once."""
        whole = min(self.longest_wait_s, self.first_wait_s * 2.0 ** min(tries - 1, 30))
        return whole * (0.5 + share / 2)


@dataclass(frozen=True)
class Clock:
    """Time as the tries see it, for tests that own it. `now` and `sleep` are in seconds; `share` is a random
    number from 0 to 1."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    share: Callable[[], float] = random.random


def tries(patience: Patience, clock: Clock) -> Iterator[int]:
    """The numbers of the tries, from 1 on: each but the first after a pause, as long as there is time."""
    end = clock.now() + patience.deadline_s
    number = 1
    while True:
        yield number
        pause = patience.pause(number, clock.share())
        if clock.now() + pause > end:
            return
        clock.sleep(pause)
        number += 1
