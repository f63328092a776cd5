"""Leaves out of their slices: whatever boxes they are stored in, windows of any size give their bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranked import where

from everstep.chain.boxes import Window, _Within, gather, intersection, windows
from everstep.chain.reader import Target
from everstep.format.layout import Box
from everstep.format.manifest import StoredLeaf, StoredSlice

shapes = st.lists(st.integers(1, 6), max_size=4).map(tuple)


@settings(deadline=None)
@given(shapes, st.integers(1, 8), st.integers(1, 200))
def test_windows_follow_one_another(shape: tuple[int, ...], item: int, limit: int) -> None:
    array = np.arange(math.prod(shape)).reshape(shape)
    found = []
    for box in windows(shape, item, limit):
        part = array[where(box)]
        assert part.size * item <= max(limit, item)
        found += part.ravel().tolist()
    assert found == list(range(array.size))


def test_nothing_has_no_windows() -> None:
    assert list(windows((3, 0), 4, 100)) == []
    assert list(windows((), 4, 1)) == [((), ())]


@st.composite
def boxes_within(draw: st.DrawFn) -> tuple[Box, Box]:
    shape = draw(st.lists(st.integers(1, 5), max_size=4).map(tuple))
    at, extent = [], []
    for size in shape:
        at.append(draw(st.integers(0, size - 1)))
        extent.append(draw(st.integers(1, size - at[-1])))
    start = tuple(draw(st.integers(0, 3)) for _ in shape)
    moved = tuple(a + b for a, b in zip(at, start, strict=True))
    return (moved, tuple(extent)), (start, shape)


@settings(deadline=None)
@given(boxes_within(), st.sampled_from(["u1", "<u2", "<f4", "<f8", "<c16", "S3"]))
def test_a_box_is_put_where_it_belongs(boxes: tuple[Box, Box], dtype: str) -> None:
    box, whole = boxes
    array = np.zeros(whole[1], dtype)
    rng = np.random.default_rng(1)
    part = np.frombuffer(rng.bytes(math.prod(box[1]) * array.itemsize), dtype).reshape(box[1])
    within = _Within.of(box, whole, array.itemsize)
    assert within.size_bytes == part.nbytes
    memory = bytearray(array.nbytes)
    within.scatter(memoryview(memory), memoryview(part.tobytes()))
    inside = tuple(slice(a - s, a - s + e) for a, e, s in zip(*box, whole[0], strict=True))
    array[inside] = part
    assert bytes(memory) == array.tobytes()
    flat = np.zeros(whole[1], bool)
    flat[inside] = True
    (found,) = np.nonzero(flat.ravel())
    assert within.together == (found[-1] - found[0] == len(found) - 1)


class FromArrays:
    """A reader whose regions are arrays."""

    def __init__(self, regions: list[bytes]) -> None:
        self.regions = regions

    def fill(self, manifest: object, targets: list[Target]) -> list[str]:
        for one in targets:
            one.buffer[:] = self.regions[one.region][one.offset : one.offset + len(one.buffer)]
        return []


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_gathered_windows_are_the_leaf(data: Any) -> None:
    """Slices that cut dimension after dimension, and windows of any size."""
    shape = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple))
    array = np.random.default_rng(2).integers(0, 1 << 30, shape, np.uint32)
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(data.draw(st.integers(0, 6))):
        at, extent = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        number = data.draw(st.integers(0, len(shape) - 1))
        cut = data.draw(st.integers(0, extent[number]))
        for start, size in ((0, cut), (cut, extent[number] - cut)):
            if size:
                boxes.append(
                    (
                        (*at[:number], at[number] + start, *at[number + 1 :]),
                        (*extent[:number], size, *extent[number + 1 :]),
                    )
                )
    regions, slices = [], []
    for number, box in enumerate(boxes):
        pad = bytes(8 * number)
        regions.append(pad + array[where(box)].tobytes())
        slices.append(StoredSlice(*box, number, len(pad)))
    leaf = StoredLeaf("a", "uint32", shape, tuple(slices))
    reader: Any = FromArrays(regions)
    got = b""
    for box in windows(shape, 4, data.draw(st.integers(1, 4 * array.size + 4))):
        memory = memoryview(bytearray(4 * math.prod(box[1])))
        gather(reader, None, [Window(leaf, box, memory)])  # type: ignore[arg-type]
        got += memory
    assert got == array.tobytes()


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        (((0,), (4,)), ((2,), (4,)), ((2,), (2,))),
        (((0,), (2,)), ((2,), (4,)), None),
        (((), ()), ((), ()), ((), ())),
    ],
)
def test_intersections(one: Box, other: Box, common: Box | None) -> None:
    assert intersection(one, other) == common
