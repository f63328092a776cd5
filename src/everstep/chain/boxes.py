"""Leaves in the order of their elements, out of the slices that they are stored in: window after window, each
read at once and put together in memory. Needs neither torch nor numpy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from everstep.chain.reader import Reader, Target
from everstep.format.layout import Box, item_bytes
from everstep.format.manifest import Manifest, StoredLeaf, StoredSlice

_FORMATS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
"""How elements of these sizes are copied one by one, where they do not lie together."""


@dataclass(frozen=True)
class Window:
    """A box of a leaf whose elements lie together in it, and writable memory for their bytes."""

    leaf: StoredLeaf
    box: Box
    buffer: memoryview


def windows(shape: Sequence[int], item: int, limit_bytes: int) -> Iterator[Box]:
    """Boxes of a leaf that follow one another in its bytes and together are all of it, of `limit_bytes` at
    most, or one element. `item` is an element's size in bytes. None where there are no elements."""
    if 0 in shape or not item:
        return
    # All of the dimensions after this one fit, so a window is a few of its steps.
    depth = 0
    while depth < len(shape) - 1 and math.prod(shape[depth + 1 :]) * item > limit_bytes:
        depth += 1
    if not shape:
        yield (), ()
        return
    inner = tuple(shape[depth + 1 :])
    steps = max(limit_bytes // (math.prod(inner) * item), 1)
    for outer in itertools.product(*map(range, shape[:depth])):
        for begin in range(0, shape[depth], steps):
            count = min(steps, shape[depth] - begin)
            yield (*outer, begin, *(0,) * len(inner)), (*(1,) * depth, count, *inner)


def gather(reader: Reader, manifest: Manifest, wanted: Iterable[Window]) -> list[str]:
    """Fill windows with their leaves' bytes: all of them with one `Reader.fill`, which gets each chunk once.
    Takes as much memory again for what does not lie together in its slice. Returns and raises what that
    does."""
    targets: list[Target] = []
    loose: list[tuple[memoryview, memoryview, _Within]] = []
    for window in wanted:
        for part in window.leaf.slices:
            common = intersection(window.box, part.box)
            if common is None:
                continue
            item = item_bytes(window.leaf.dtype)
            offset = part.offset + _offset(common, part) * item
            within = _Within.of(common, window.box, item)
            if within.together:
                buffer = window.buffer[within.begin : within.begin + within.size_bytes]
            else:
                buffer = memoryview(bytearray(within.size_bytes))
                loose.append((window.buffer, buffer, within))
            targets.append(Target(part.region, offset, buffer))
    remarks = reader.fill(manifest, targets)
    for whole, piece, within in loose:
        within.scatter(whole, piece)
    return remarks


def intersection(one: Box, other: Box) -> Box | None:
    """What two boxes have in common, or None."""
    at = tuple(map(max, one[0], other[0]))
    ends = (min(a + e, b + f) for a, e, b, f in zip(one[0], one[1], other[0], other[1], strict=True))
    extent = tuple(end - begin for begin, end in zip(at, ends, strict=True))
    return (at, extent) if all(size > 0 for size in extent) else None


def _offset(common: Box, part: StoredSlice) -> int:
    """Where in a slice its part `common` begins, in elements. It lies together there, for it is a part of a
    window, too: behind the first dimension that a window has several steps of, that has all of the leaf."""
    offset = 0
    for at, start, size in zip(common[0], part.at, part.extent, strict=True):
        offset = offset * size + at - start
    return offset


@dataclass(frozen=True)
class _Within:
    """Where a box lies in a larger one: in rows of `run` elements, `period` apart, `rows` of them; and those
    again at each of `begins`, all in elements."""

    begins: tuple[int, ...]
    rows: int
    run: int
    period: int
    item: int

    @classmethod
    def of(cls, box: Box, within: Box, item: int) -> _Within:
        at = [one - start for one, start in zip(box[0], within[0], strict=True)]
        extent, shape = list(box[1]), list(within[1])
        run = period = 1
        # Dimensions that are whole belong to the run, and so does the first that is not.
        while shape:
            size, whole = extent.pop(), shape.pop()
            run, period = run * size, period * whole
            if size != whole:
                break
        inner = period
        rows = 1
        if shape:
            rows = extent.pop()
            period_of_rows = period * shape.pop()
        else:
            period_of_rows = period
        begin = 0
        for one, size in zip(at, within[1], strict=True):
            begin = begin * size + one
        strides = []
        stride = period_of_rows
        for size in reversed(shape):
            strides.append(stride)
            stride *= size
        steps = (
            range(0, size * stride, stride) for size, stride in zip(extent, reversed(strides), strict=True)
        )
        begins = tuple(begin + sum(one) for one in itertools.product(*steps))
        return cls(begins, rows, run, inner, item)

    @property
    def together(self) -> bool:
        return len(self.begins) == 1 and (self.rows == 1 or self.run == self.period)

    @property
    def begin(self) -> int:
        """In bytes."""
        return self.begins[0] * self.item

    @property
    def size_bytes(self) -> int:
        return len(self.begins) * self.rows * self.run * self.item

    def scatter(self, whole: memoryview, piece: memoryview) -> None:
        """Copy the box's bytes, which lie together in `piece`, to where they belong in `whole`. By rows, or
        where those are many and short by columns: what is done in Python is the fewer of the two."""
        step = self.item if self.item in _FORMATS else 1
        to: Any = whole.cast(_FORMATS[step])
        source: Any = piece.cast(_FORMATS[step])
        scale = self.item // step
        run, period = self.run * scale, self.period * scale
        at = 0
        for begin in self.begins:
            start, end = begin * scale, begin * scale + (self.rows - 1) * period + 1
            taken = self.rows * run
            if self.rows <= run:
                for row in range(self.rows):
                    to[start + row * period : start + row * period + run] = source[
                        at + row * run : at + (row + 1) * run
                    ]
            else:
                for column in range(run):
                    to[start + column : end + column : period] = source[at + column : at + taken : run]
            at += taken
