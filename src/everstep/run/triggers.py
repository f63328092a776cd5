"""When to take a snapshot: `"100 steps"`, `"10m"`, and several of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from everstep.errors import Mismatch

_STEPS = re.compile(r"(\d+)\s*steps?")
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d)")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Trigger(Protocol):
    """Says at the end of a step whether it is time for a snapshot."""

    def due(self, step: int, now_s: float) -> bool:
        """Whether a snapshot is due after `step` finished steps at the time `now_s` (monotonic)."""

    def taken(self, step: int, now_s: float) -> None:
        """A snapshot was taken (or the run opened): count from here."""

    def following(self, step: int) -> int:
        """The next step after `step` at which it is sure to be due; 0 where nobody can know."""


@dataclass
class EverySteps:
    """At each multiple of `steps`, whatever snapshots were taken in between."""

    steps: int

    def due(self, step: int, now_s: float) -> bool:
        return step % self.steps == 0

    def taken(self, step: int, now_s: float) -> None:
        return None

    def following(self, step: int) -> int:
        return (step // self.steps + 1) * self.steps

    def __str__(self) -> str:
        return f"{self.steps} steps"


@dataclass
class EverySeconds:
    """When so many seconds have gone since the last snapshot."""

    seconds: float
    text: str
    last_s: float = 0.0

    def due(self, step: int, now_s: float) -> bool:
        return now_s - self.last_s >= self.seconds

    def taken(self, step: int, now_s: float) -> None:
        self.last_s = now_s

    def following(self, step: int) -> int:
        return 0

    def __str__(self) -> str:
        return self.text


def parse(every: str | Sequence[str] | None) -> list[Trigger]:
    """The triggers that `every` means: texts like `"100 steps"`, `"30s"`, `"10m"`, `"2h"`, one or several, in
    a sequence or with commas between them; None or `"never"`: none.

    Raises:
        Mismatch: a part is not understood.
    """
    if every is None:
        return []
    parts = every.split(",") if isinstance(every, str) else list(every)
    return [_one(part.strip()) for part in parts if part.strip() != "never"]


def _one(text: str) -> Trigger:
    steps = _STEPS.fullmatch(text)
    if steps and int(steps[1]) > 0:
        return EverySteps(int(steps[1]))
    time = _TIME.fullmatch(text)
    if time and float(time[1]) > 0:
        return EverySeconds(float(time[1]) * _SECONDS[time[2]], time[1] + time[2])
    raise Mismatch(
        f"every={text!r} is not understood",
        kept="nothing was touched",
        next="every='100 steps', '30s', '10m', '2h', or several: '10m, 500 steps'",
    )
