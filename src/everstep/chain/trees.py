"""Where two trees of plain values differ, path by path, and how a value is shown to a person."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from everstep.format.chunk import digest
from everstep.format.values import Leaf, Scalar, Symbol, Value, encode

FEW = 16
"""Where more items of one list differ, the list differs as a whole: nobody reads a thousand lines."""

SHOWN_CHARACTERS = 60
_LISTED = 6
"""So many items of a list are shown one by one."""

_CODES = {"b1": "?", "i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I", "i8": "q", "u8": "Q",
          "f2": "e", "f4": "f", "f8": "d"}  # fmt: skip


class _Absent:
    """Stands where the other tree has something and this one nothing."""

    def __repr__(self) -> str:
        return "-"


ABSENT = _Absent()

Items: TypeAlias = list[tuple[object, Value]]


@dataclass(frozen=True)
class ValueChange:
    """A value that differs. `before` or `after` is `ABSENT` where there is none."""

    path: str
    before: Value
    after: Value


def differences(before: Value, after: Value, path: str = "") -> Iterator[ValueChange]:
    """What differs between two trees, the order of `before` first. Where both have a leaf there is no
    difference here: leaves are compared by their bytes."""
    if all(isinstance(one, Leaf | _Absent) for one in (before, after)):
        return
    if _maps(before, after):
        yield from _in_mappings(before, after, path)
    elif _lists(before, after):
        yield from _in_sequences(before, after, path)
    elif not _same(before, after):
        yield ValueChange(path, before, after)


def join(path: str, key: object) -> str:
    """The path of what lies under `key` at `path`."""
    return f"{path}/{key}" if path else str(key)


def _maps(before: Value, after: Value) -> bool:
    """Whether both have keys; what is absent has none, unless the other has none either."""
    sides = [one for one in (before, after) if one is not ABSENT]
    return all(isinstance(one, Mapping) for one in sides) and any(sides)


def _lists(before: Value, after: Value) -> bool:
    return (
        isinstance(before, list | tuple | deque) and type(before) is type(after) and len(before) == len(after)
    )


def _in_mappings(before: Value, after: Value, path: str) -> Iterator[ValueChange]:
    old: Mapping[Any, Value] = {} if before is ABSENT else before
    new: Mapping[Any, Value] = {} if after is ABSENT else after
    for key in [*old, *(key for key in new if key not in old)]:
        yield from differences(old.get(key, ABSENT), new.get(key, ABSENT), join(path, key))


def _in_sequences(before: Sequence[Value], after: Sequence[Value], path: str) -> Iterator[ValueChange]:
    found: list[ValueChange] = []
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        found += differences(old, new, join(path, number))
        if len(found) > FEW:
            yield ValueChange(path, before, after)
            return
    yield from found


def _same(before: Value, after: Value) -> bool:
    """Bit for bit: nan is nan, and 1 is not 1.0."""
    if before is ABSENT or after is ABSENT:
        return before is after
    return before is after or encode(before) == encode(after)


# -- for people and for programs ---------------------------------------------------------------------------


def shown(value: Value) -> str:
    """A value in a few characters; of what is long, how long it is."""
    if isinstance(value, str):
        text = value if value else "''"
    elif isinstance(value, bytes):
        text = f"{len(value)} bytes {digest(value)[:8]}"
    elif isinstance(value, Leaf):
        text = "a tensor"
    elif isinstance(value, Scalar):
        text = str(number_of(value))
    elif isinstance(value, Symbol):
        text = f"{value.kind.removesuffix('.dtype').removesuffix('.device')}.{value.value}"
    elif isinstance(value, Mapping) and len(value) > 0:
        text = f"{len(value)} entries"
    elif isinstance(value, list | tuple | deque | set | frozenset) and len(value) > _LISTED:
        text = f"{len(value)} items"
    else:
        text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def plain(value: Value) -> object:
    """A value as JSON has it: None, a truth, a number or a text, else what `shown` makes of it. What is
    absent is None."""
    if isinstance(value, Scalar):
        value = number_of(value)
    if value is ABSENT:
        return None
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    return value if value is None or isinstance(value, bool | int | str) else shown(value)


def number_of(scalar: Scalar) -> int | float | bool | str:
    """The number that a numpy scalar is, without numpy; a text where it is none."""
    code = _CODES.get(scalar.dtype[1:])
    order = ">" if scalar.dtype[:1] == ">" else "<"
    if code is None or len(scalar.data) != struct.calcsize(order + code):
        return f"numpy {scalar.dtype} {scalar.data[:16].hex()}"
    (number,) = struct.unpack(order + code, scalar.data)
    return number  # type: ignore[no-any-return]
