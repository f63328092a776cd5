"""Layouts: every slice has a place of its own, and the same slices always have the same places."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hostile import same_every_time
from hypothesis import given
from hypothesis import strategies as st

from everstep.errors import Unsupported
from everstep.format.chunk import MAX_WORD_BYTES
from everstep.format.layout import (
    SHARED_BYTES,
    SLICE_ALIGNMENT_BYTES,
    SMALL_BYTES,
    Slice,
    item_bytes,
    lay_out,
)

KINS = ("frozen", "buffer", "moving")


def made(
    name: str, size: int, dtype: str = "float32", kin: Any = "moving", alias: str | None = None
) -> Slice:
    return Slice(name, dtype, (size,), (0,), (size,), kin, alias)


@st.composite
def slice_lists(draw: st.DrawFn) -> list[Slice]:
    count = draw(st.integers(0, 12))
    found = []
    for number in range(count):
        dtype = draw(
            st.sampled_from(["float32", "bfloat16", "bool", "complex128", "numpy:<U7", "numpy:|S300"])
        )
        edge = SMALL_BYTES // item_bytes(dtype)
        size = draw(st.integers(0, 40) | st.integers(edge - 1, edge + 1) | st.integers(0, 3 * edge))
        alias = f"leaf{draw(st.integers(0, number - 1))}" if number and draw(st.integers(0, 4)) == 0 else None
        if alias and found[int(alias[4:])].alias:
            alias = None
        if alias:
            same = found[int(alias[4:])]
            found.append(
                Slice(f"leaf{number}", same.dtype, same.shape, same.at, same.extent, same.kin, alias)
            )
        else:
            found.append(made(f"leaf{number}", size, dtype, draw(st.sampled_from(KINS))))
    return found


@same_every_time
@given(slice_lists())
def test_places(slices: list[Slice]) -> None:
    layout = lay_out(slices)
    assert layout.slices == tuple(slices)
    assert len(layout.places) == len(slices)
    taken: dict[int, list[tuple[int, int]]] = {number: [] for number in range(len(layout.regions))}
    for one, (number, offset) in zip(slices, layout.places, strict=True):
        region = layout.regions[number]
        assert offset % SLICE_ALIGNMENT_BYTES == 0
        assert offset + one.size_bytes <= region.size_bytes
        assert region.kin == one.kin, "what changes at other times shares no chunk"
        if one.alias is None:
            taken[number].append((offset, one.size_bytes))
        else:
            original = next(other for other in slices if other.name == one.alias)
            assert layout.places[slices.index(original)] == (number, offset)
    for pieces in taken.values():
        end = 0
        for offset, size in sorted(pieces):
            assert offset >= end, "two slices overlap"
            end = offset + size


@same_every_time
@given(slice_lists())
def test_regions(slices: list[Slice]) -> None:
    layout = lay_out(slices)
    end = 0
    for region in layout.regions:
        assert region.offset == end
        assert region.offset % 4096 == 0
        assert 1 <= region.word_bytes <= MAX_WORD_BYTES, "a chunk's encoding could not say more"
        end += -(-region.size_bytes // 4096) * 4096
    assert layout.arena_bytes == end
    assert layout.logical_bytes == sum(region.size_bytes for region in layout.regions)
    for one, (number, offset) in zip(slices, layout.places, strict=True):
        if one.alias is None and one.size_bytes >= SMALL_BYTES:
            assert (offset, layout.regions[number].size_bytes) == (0, one.size_bytes)


@same_every_time
@given(slice_lists())
def test_the_same_slices_have_the_same_places(slices: list[Slice]) -> None:
    """In every process: what captures and what writes must agree."""
    assert lay_out(slices) == lay_out(list(slices))


def test_thousands_of_small_slices_share_a_region() -> None:
    layout = lay_out([made(f"leaf{number}", 10) for number in range(4000)])
    assert len(layout.regions) == 1
    assert layout.regions[0].size_bytes == 4000 * SLICE_ALIGNMENT_BYTES


def test_a_step_of_training_touches_no_frozen_region() -> None:
    slices = [made(f"{kin}{number}", 100, kin=kin) for number in range(5) for kin in KINS]
    layout = lay_out(slices)
    assert [region.kin for region in layout.regions] == list(KINS)


def test_nothing_at_all() -> None:
    layout = lay_out([])
    assert (layout.places, layout.regions, layout.arena_bytes, layout.logical_bytes) == ((), (), 0, 0)


def test_empty_slices() -> None:
    layout = lay_out([made("a", 0), made("b", 0), Slice("scalar", "int64", (), (), ())])
    assert layout.slices[2].size_bytes == 8
    assert layout.logical_bytes == SLICE_ALIGNMENT_BYTES


# -- waves ------------------------------------------------------------------------------------------------


def test_a_shared_region_grows_to_64_mib() -> None:
    slices = [made(f"leaf{number}", 1000_003, "uint8") for number in range(150)]
    layout = lay_out(slices)
    each = -(-1000_003 // SLICE_ALIGNMENT_BYTES) * SLICE_ALIGNMENT_BYTES
    full = SHARED_BYTES // each * each
    assert [region.size_bytes for region in layout.regions] == [full, full, 150 * each - 2 * full]
    assert layout.regions[0].size_bytes <= SHARED_BYTES < layout.regions[0].size_bytes + each


@same_every_time
@given(slice_lists(), st.integers(4096, 3 * SMALL_BYTES), st.integers(1, 20 * SMALL_BYTES))
def test_waves(slices: list[Slice], grid_bytes: int, limit_bytes: int) -> None:
    layout = lay_out(slices)
    try:
        waves = layout.waves(limit_bytes, grid_bytes)
    except Unsupported as error:
        needed = int(re.search(r"max_arena_bytes=(\S+) or", error.next)[1].replace("_", "")) // 2  # type: ignore[index]
        assert limit_bytes < needed
        assert layout.waves(needed, grid_bytes)
        with pytest.raises(Unsupported):
            layout.waves(needed - 1, grid_bytes)
        return
    assert [begin for begin, _ in waves] == [0, *(end for _, end in waves)][: len(waves)]
    assert (waves[-1][1] if waves else 0) == layout.arena_bytes
    assert all(0 < end - begin <= limit_bytes for begin, end in waves)
    edges = {begin for begin, _ in waves}
    for number, region in enumerate(layout.regions):
        inside = [edge - region.offset for edge in edges if 0 < edge - region.offset < region.size_bytes]
        assert all(at % grid_bytes == 0 for at in inside)
        alone = [
            one
            for one, place in zip(slices, layout.places, strict=True)
            if place[0] == number and not one.alias
        ]
        assert not inside or len([one for one in alone if one.size_bytes]) == 1


def test_waves_are_as_large_as_they_may_be() -> None:
    layout = lay_out([made("a", 5 * SMALL_BYTES, "uint8"), made("b", 3 * SMALL_BYTES, "uint8"), made("c", 9)])
    mib = SMALL_BYTES
    assert layout.waves(3 * mib, mib) == [(0, 3 * mib), (3 * mib, 6 * mib), (6 * mib, 8 * mib + 4096)]
    assert layout.waves(9 * mib, mib) == [(0, 8 * mib + 4096)]
    assert layout.waves(2 * mib, 2 * mib) == [
        (0, 2 * mib), (2 * mib, 4 * mib), (4 * mib, 5 * mib), (5 * mib, 7 * mib), (7 * mib, 8 * mib + 4096)
    ]  # fmt: skip
    with pytest.raises(Unsupported, match="2,097,152") as caught:
        layout.waves(2 * mib - 1, 2 * mib)
    assert "max_arena_bytes=4_194_304" in caught.value.next
    assert lay_out([]).waves(1, 4096) == []


# -- dtypes -----------------------------------------------------------------------------------------------

KINDS = [
    "b1",
    "i1",
    "i2",
    "i4",
    "i8",
    "u1",
    "u2",
    "u4",
    "u8",
    "f2",
    "f4",
    "f8",
    "c8",
    "c16",
    "S1",
    "S77",
    "U1",
    "U33",
]
UNITS = ["Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns", "ps", "fs", "as", "25s", "7D"]


@pytest.mark.parametrize(
    "kind", [*KINDS, "m8", "M8", "f12", "f16", "c24", "c32", *(f"M8[{unit}]" for unit in UNITS)]
)
@pytest.mark.parametrize("order", "<>")
def test_numpy_dtypes_are_as_large_as_numpy_says(kind: str, order: str) -> None:
    try:
        dtype = np.dtype(order + kind)
    except TypeError:
        assert kind in ("f12", "f16", "c24", "c32"), "only long doubles differ from machine to machine"
        assert item_bytes(f"numpy:{order}{kind}") == int(kind[1:])
        return
    assert item_bytes(f"numpy:{dtype.str}") == dtype.itemsize


@pytest.mark.parametrize(
    "name",
    [
        "", "float", "float33", "torch.float32", "Float32", "float32 ", "quint8",
        "numpy:", "numpy:f4", "numpy:<f3", "numpy:<i3", "numpy:<b2", "numpy:|O8", "numpy:|V8",
        "numpy:<f4,<f4",
        "numpy:<M8[x]", "numpy:<M4", "numpy:<M8[]", "numpy:<U", "numpy:<U9999999", "numpy:<f8\n",
        "float4_e2m1fn_x2", "numpy:<c4",
    ],
)  # fmt: skip
def test_other_dtypes_are_unsupported(name: str) -> None:
    with pytest.raises(Unsupported, match="dtype"):
        item_bytes(name)
