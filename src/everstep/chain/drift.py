"""What differs between the circumstances of two states, and what that means for the steps that follow.

Circumstances are what a snapshot record holds under `environment`: versions and devices, the program and its
arguments, and what the program handed over (`optimizer.lr`, `data.batch_size`). They are texts: compared,
shown, never computed with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from everstep.chain.trees import differences, shown
from everstep.format.manifest import CONFIG
from everstep.format.values import Value

Class: TypeAlias = Literal["safe", "changes the trajectory", "breaks exactness"]

SAFE: Class = "safe"
TRAJECTORY: Class = "changes the trajectory"
EXACTNESS: Class = "breaks exactness"
CLASSES: tuple[Class, ...] = (EXACTNESS, TRAJECTORY, SAFE)
"""The gravest first."""

NONE = "none"
"""What is shown where one side lacks a fact and is known to have looked for it."""

_FACTS: dict[str, tuple[Class, str]] = {
    "torch": (EXACTNESS, "torch"),
    "cuda": (EXACTNESS, "CUDA"),
    "cudnn": (EXACTNESS, "cuDNN"),
    "cpu": (EXACTNESS, "CPU capability"),
    "threads": (EXACTNESS, "torch threads"),
    "device": (EXACTNESS, "device"),
    "deterministic": (EXACTNESS, "deterministic algorithms"),
    "arguments": (TRAJECTORY, "arguments"),
    "commit": (TRAJECTORY, "git commit"),
    "script": (TRAJECTORY, "script"),
    "python": (SAFE, "python"),
    "host": (SAFE, "host"),
    "system": (SAFE, "system"),
}
"""What a difference in each fact means, and how a person calls it. Facts not listed are safe."""

_COMMIT_DIGITS = 9
_SHOWN_CHARACTERS = 120


@dataclass(frozen=True)
class Drift:
    """A circumstance that differs. `fact` is its key in the record, `name` what it is called."""

    kind: Class
    fact: str
    name: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.name} {self.before} -> {self.after}"


def drift(before: Mapping[str, str], after: Mapping[str, str]) -> list[Drift]:
    """What differs between two environments, the gravest first. A fact that only one of them has is no
    difference (an older version did not record it), unless both have others of the same group, which is what
    stands before the last dot."""
    found = [_judged(fact, *both) for fact, both in _pairs(before, after) if both[0] != both[1]]
    return sorted(found, key=lambda one: CLASSES.index(one.kind))


def config_drift(before: Value, after: Value) -> list[Drift]:
    """What differs between two trees of the user's own plain values; nothing where there is but one."""
    if before is None or after is None:
        return []
    return [
        Drift(TRAJECTORY, one.path, one.path, shown(one.before), shown(one.after))
        for one in differences(before, after, CONFIG)
    ]


def _pairs(before: Mapping[str, str], after: Mapping[str, str]) -> Iterable[tuple[str, tuple[str, str]]]:
    groups = _groups(before) & _groups(after)
    for fact in [*before, *(fact for fact in after if fact not in before)]:
        if (fact in before and fact in after) or fact.rpartition(".")[0] in groups:
            yield fact, (before.get(fact, NONE), after.get(fact, NONE))


def _groups(facts: Mapping[str, str]) -> set[str]:
    return {fact.rpartition(".")[0] for fact in facts if "." in fact}


def _judged(fact: str, before: str, after: str) -> Drift:
    kind, name = _FACTS.get(fact, (TRAJECTORY if "." in fact else SAFE, fact))
    if fact == "arguments":
        # The same script, called by another path, is the same: what it is has a digest of its own.
        if before.split(" ")[1:] == after.split(" ")[1:]:
            kind = SAFE
        before, after = _without_common(before, after)
    if fact == "commit":
        before, after = _short(before), _short(after)
    return Drift(kind, fact, name, _cut(before), _cut(after))


def _without_common(before: str, after: str) -> tuple[str, str]:
    """Two command lines without the words that they begin and end with alike."""
    old, new = before.split(" "), after.split(" ")
    while old and new and old[0] == new[0]:
        del old[0], new[0]
    while old and new and old[-1] == new[-1]:
        del old[-1], new[-1]
    return " ".join(old) or NONE, " ".join(new) or NONE


def _short(commit: str) -> str:
    """A commit as people know it, with the mark of a tree that has changes."""
    name, mark, rest = commit.partition("-")
    return name[:_COMMIT_DIGITS] + mark + rest


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
