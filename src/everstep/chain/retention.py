"""Which snapshots stay, and why: a pure function of what is listed, what is tagged, and what time it is.

A policy is rules with commas between them; a snapshot stays that any rule names. Each rule looks at one
branch at a time.

| rule | what it keeps |
|---|---|
| `last 3` | the newest three |
| `hourly 24` | the newest of each of the last 24 hours that have any; so `daily`, `weekly` |
| `every 1000 steps` | the first at or after each multiple of 1000 steps |
| `best val_loss 2`, `best acc:max 1` | the two with the lowest `val_loss`; the one with the highest `acc` |
| `tags` | what is tagged, which stays anyway |
| `all` | all |

Whatever the policy: the head of a branch, what a tag names, what another branch began with, and what is
younger than the window asked for stay.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Protocol

from everstep.errors import Mismatch
from everstep.format.record import Number

EXAMPLE = "last 3, hourly 24, daily 7, weekly 4, every 1000 steps, best val_loss 2, tags"

_LAST = re.compile(r"last ([1-9]\d{0,8})")
_SPANS = re.compile(r"(hourly|daily|weekly) ([1-9]\d{0,8})")
_EVERY = re.compile(r"every ([1-9]\d{0,17}) steps?")
_BEST = re.compile(r"best ([^\s:,]+)(?::(min|max))?(?: ([1-9]\d{0,8}))?")


@dataclass(frozen=True)
class Listed:
    """A snapshot as a branch lists it.

    `taken_at` is the record's own time, `listed_at` when its newest head record was put, by the store's clock
    in seconds since 1970. `parents` are ids. What is not known of it (`step` -1, `metrics` None) is taken to
    be what a rule looks for: it stays.
    """

    id: str
    step: int
    taken_at: str = ""
    listed_at: float = 0.0
    metrics: Mapping[str, Number] | None = None
    parents: tuple[str, ...] = ()


Line = Sequence[Listed]
"""What a branch lists: newest first, each snapshot once."""


class Rule(Protocol):
    """A rule is written as `str` gives it, and picks from one branch."""

    def picks(self, line: Line) -> Iterable[Listed]: ...


@dataclass(frozen=True)
class Last:
    count: int

    def __str__(self) -> str:
        return f"last {self.count}"

    def picks(self, line: Line) -> Iterable[Listed]:
        return line[: self.count]


@dataclass(frozen=True)
class Spans:
    """The newest of each of the last `count` hours, days or weeks (of UTC) that have any. What has no time
    that can be read stays: nobody can tell when it was."""

    span: str
    count: int

    def __str__(self) -> str:
        return f"{self.span} {self.count}"

    def picks(self, line: Line) -> Iterable[Listed]:
        newest: dict[tuple[int, ...], tuple[datetime, Listed]] = {}
        for one in line:
            moment = _moment(one.taken_at)
            if moment is None:
                yield one
                continue
            span = _span_of(moment, self.span)
            if span not in newest or moment > newest[span][0]:
                newest[span] = (moment, one)
        for span in sorted(newest, reverse=True)[: self.count]:
            yield newest[span][1]


@dataclass(frozen=True)
class Every:
    """The first at or after each multiple of so many steps. Where a step was trained again, the newest."""

    steps: int

    def __str__(self) -> str:
        return f"every {self.steps} steps"

    def picks(self, line: Line) -> Iterable[Listed]:
        first: dict[int, Listed] = {}
        for one in line:
            multiple = one.step // self.steps
            if one.step < 0:
                yield one
            elif multiple and (multiple not in first or one.step < first[multiple].step):
                first[multiple] = one
        yield from first.values()


@dataclass(frozen=True)
class Best:
    """Those with the lowest value of a metric, or the highest; of equal ones the newest. nan is no value."""

    metric: str
    highest: bool
    count: int

    def __str__(self) -> str:
        return f"best {self.metric}{':max' if self.highest else ''} {self.count}"

    def picks(self, line: Line) -> Iterable[Listed]:
        rated = [(value, one) for one in line if (value := self._value(one)) is not None]
        rated.sort(key=lambda pair: pair[0])
        unknown = [one for one in line if one.metrics is None]
        return [*unknown, *(one for _, one in rated[: self.count])]

    def _value(self, one: Listed) -> float | None:
        try:
            value = float((one.metrics or {})[self.metric])
        except (KeyError, ValueError):
            return None
        return None if math.isnan(value) else -value if self.highest else value


@dataclass(frozen=True)
class Keep:
    """A policy. `everything`: nothing goes."""

    rules: tuple[Rule, ...] = ()
    everything: bool = False

    @classmethod
    def parse(cls, text: str) -> Keep:
        """From `"last 3"`, `"last 3, hourly 24, best val_loss 2"` or `"all"`. Raises Mismatch."""
        parts = [" ".join(part.split()) for part in text.split(",")]
        if "all" in parts and set(parts) <= {"all", "tags"}:
            return cls(everything=True)
        return cls(tuple(rule for part in parts if part != "tags" for rule in [_rule(part, text)]))

    def __str__(self) -> str:
        return "all" if self.everything else ", ".join(map(str, self.rules)) or "tags"


def _rule(part: str, text: str) -> Rule:
    if match := _LAST.fullmatch(part):
        return Last(int(match[1]))
    if match := _SPANS.fullmatch(part):
        return Spans(match[1], int(match[2]))
    if match := _EVERY.fullmatch(part):
        return Every(int(match[1]))
    if match := _BEST.fullmatch(part):
        return Best(match[1], match[2] == "max", int(match[3] or 1))
    what = f"keep={text!r} is not understood" + (f" ({part!r})" if part != text else "")
    raise Mismatch(what, kept="nothing was touched", next=f"keep='last 3', 'all', or several: {EXAMPLE!r}")


def staying(
    lines: Mapping[str, Line],
    keep: Keep,
    *,
    tags: Mapping[str, str],
    now: float,
    window_s: float = 0.0,
    branches: Collection[str] | None = None,
) -> dict[str, tuple[str, ...]]:
    """The ids that stay, each with all reasons for it; what is not named goes.

    Args:
        lines: by branch, what it lists.
        tags: the id that each tag names, listed or not.
        now: by the store's clock, as `Listed.listed_at`.
        window_s: what was listed so short a time ago stays.
        branches: the policy is for these only, and all of the others stays; None: for all.
    """
    reasons: dict[str, list[str]] = defaultdict(list)
    for branch, line in lines.items():
        for one in line[:1]:
            reasons[one.id].append(f"head of {branch}")
        if branches is not None and branch not in branches:
            for one in line:
                reasons[one.id].append(f"on branch {branch}")
            continue
        for one in line:
            if keep.everything:
                reasons[one.id].append("all")
            if window_s > 0 and now - one.listed_at < window_s:
                reasons[one.id].append(f"younger than {_shown(window_s)}")
        for rule in keep.rules:
            for one in rule.picks(line):
                reasons[one.id].append(str(rule))
    for tag, id in tags.items():
        reasons[id].append(f"tag {tag}")
    _add_branch_points(lines, reasons)
    return {id: tuple(dict.fromkeys(why)) for id, why in reasons.items()}


def _add_branch_points(lines: Mapping[str, Line], reasons: dict[str, list[str]]) -> None:
    """Add what another branch began with: one that it lists too, or that one of its snapshots follows on, if
    that one stays."""
    on: dict[str, set[str]] = defaultdict(set)
    for branch, line in lines.items():
        for one in line:
            on[one.id].add(branch)
    begun = [
        (branch, one.id, parent)
        for branch, line in lines.items()
        for one in line
        for parent in one.parents
        if parent in on and branch not in on[parent]
    ]
    for id, branches in on.items():
        if len(branches) > 1:
            reasons[id] += [f"start of {branch}" for branch in sorted(branches)]
    added = True
    while added:
        added = False
        for branch, child, parent in begun:
            why = f"start of {branch}"
            if child in reasons and why not in reasons.get(parent, ()):
                reasons[parent].append(why)
                added = True


def _moment(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).astimezone(timezone.utc)
    except (ValueError, OverflowError):
        return None


def _span_of(moment: datetime, span: str) -> tuple[int, ...]:
    if span == "weekly":
        return moment.isocalendar()[:2]
    day = (moment.year, moment.month, moment.day)
    return (*day, moment.hour) if span == "hourly" else day


def _shown(seconds: float) -> str:
    return f"{seconds / 3600:g} h" if seconds >= 3600 else f"{seconds:g} s"
