"""References: how a person names a snapshot. Pure: a text becomes what it says, and no store is asked.

head, latest            the newest snapshot of the branch that is meant
NAME                    a branch's newest snapshot, what a tag names, or the beginning of an id
tag:NAME                what a tag names
step:500                the newest one at this step
best:loss, best:acc:max the one with the lowest or highest metric
@{2}                    where the branch's head was two advances ago
NAME@REF                one of these on another branch: main@step:500, main@{1}
REF~, REF~3             its parent; three back
"""

from __future__ import annotations

import re
from typing import TypeAlias

import msgspec

_NAME = "[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"
_BACK = re.compile(r"(.+)~(\d{0,18})", re.DOTALL)
_ADVANCE = re.compile(rf"({_NAME})?@\{{(\d{{1,18}})\}}")
_ON_BRANCH = re.compile(rf"({_NAME})@(.+)")
_STEP = re.compile(r"step:(\d{1,18})")
_TAG = re.compile(rf"tag:({_NAME})")
_BEST = re.compile(r"best:(.+?)(?::(min|max))?")

HEADS = ("head", "latest")
"""Words for the newest snapshot of a branch, which can name nothing else."""


# Structs, which are made faster than dataclasses: each command of the command line imports these.


class Head(msgspec.Struct, frozen=True):
    branch: str


class Advance(msgspec.Struct, frozen=True):
    """Where the head of the branch was `count` advances ago."""

    branch: str
    count: int


class Step(msgspec.Struct, frozen=True):
    branch: str
    step: int


class Best(msgspec.Struct, frozen=True):
    branch: str
    metric: str
    highest: bool


class Tag(msgspec.Struct, frozen=True):
    name: str


class Name(msgspec.Struct, frozen=True):
    """A branch, a tag, or the beginning of an id; or nothing at all."""

    text: str


Base: TypeAlias = Head | Advance | Step | Best | Tag | Name


class Ref(msgspec.Struct, frozen=True):
    """What `base` means, and from there so many parents back."""

    base: Base
    back: int = 0


def parse(text: str, branch: str) -> Ref:
    """What a reference says, where it names no branch itself of this one. Raises nothing: what cannot be a
    reference is a `Name` that nothing has."""
    back = 0
    rest = text
    while match := _BACK.fullmatch(rest):
        rest, back = match[1], back + int(match[2] or 1)
    return Ref(_base(rest, branch), back)


def _base(text: str, branch: str) -> Base:
    advance = _ADVANCE.fullmatch(text)
    if advance:
        return Advance(advance[1] or branch, int(advance[2]))
    on = _ON_BRANCH.fullmatch(text)
    return _on(text, branch) or (_on(on[2], on[1]) if on else None) or Name(text)


def _on(text: str, branch: str) -> Base | None:
    """What speaks of a branch, or of a tag."""
    if text in HEADS:
        return Head(branch)
    if step := _STEP.fullmatch(text):
        return Step(branch, int(step[1]))
    if best := _BEST.fullmatch(text):
        return Best(branch, best[1], best[2] == "max")
    if tag := _TAG.fullmatch(text):
        return Tag(tag[1])
    return None


def split(text: str) -> tuple[str, str]:
    """A place and the reference after the first '@' of its last part, "" where there is none:
    `runs/gpt@step:500`, `runs/gpt@try@{1}`. What has a '/' after the '@' is all place: no reference has one
    (but for `best:` with a metric that has)."""
    metric = re.fullmatch(rf"(.+?)@((?:{_NAME}@)?best:.+)", text)
    if metric:
        return metric[1], metric[2]
    directory, slash, last = text.rpartition("/")
    name, at, ref = last.partition("@")
    return (directory + slash + name, ref) if at and name else (text, "")
