"""What several ranks hold is spread over them: each element once, and about as much to each."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.format.joining import covers
from everstep.format.layout import SMALL_BYTES, Box
from everstep.state.sharding import elements, whole
from everstep.state.spreading import SLIVER_BYTES, level, spread

MB = 1024 * 1024
ITEMS = st.lists(
    st.tuples(
        st.lists(st.sampled_from([1, 2, 3, 64, 700, 1024, 3000]), max_size=3).map(tuple),
        st.sampled_from([1, 2, 4, 8]),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=100)
@given(items=ITEMS, ranks=st.integers(1, 9))
def test_each_element_is_written_once_and_each_rank_writes_as_much(
    items: list[tuple[tuple[int, ...], int]], ranks: int
) -> None:
    boxes = [(whole(shape), item) for shape, item in items]
    sizes = [elements(box) * item for box, item in boxes]
    shares = level({}, {tuple(range(ranks)): sum(sizes)})[tuple(range(ranks))]
    assert math.isclose(sum(shares.values()), sum(sizes))
    found = spread(boxes, shares)
    assert found == spread(boxes, shares)
    written = dict.fromkeys(range(ranks), 0)
    rows = [SMALL_BYTES]
    for (shape, item), parts, size in zip(items, found, sizes, strict=True):
        assert covers(shape, [box for _, box in parts])
        if size < SMALL_BYTES:
            assert len(parts) == 1
        else:
            rows.append(size // next((one for one in shape if one > 1), 1))
        for rank, box in parts:
            written[rank] += elements(box) * item
    if ranks > 1:
        assert max(written.values()) - min(written.values()) <= 2 * max(rows)


def test_many_small_ones_are_dealt_evenly() -> None:
    items: list[tuple[Box, int]] = [(whole((number % 50 + 1, 100)), 4) for number in range(4000)]
    total = sum(elements(box) * item for box, item in items)
    shares = level({}, {tuple(range(8)): total})[tuple(range(8))]
    written = dict.fromkeys(range(8), 0)
    for (_, item), ((rank, box),) in zip(items, spread(items, shares), strict=True):
        written[rank] += elements(box) * item
    assert max(written.values()) - min(written.values()) <= 50 * 100 * 4


def test_a_large_one_is_cut_along_its_first_dimension_that_can_be() -> None:
    (parts,) = spread([(whole((1, 12, 1024, 256)), 4)], dict.fromkeys(range(4), 3.0 * MB))
    assert [rank for rank, _ in parts] == [0, 1, 2, 3]
    assert [box[1] for _, box in parts] == [(1, 3, 1024, 256)] * 4
    assert [box[0][1] for _, box in parts] == [0, 3, 6, 9]


def test_what_rows_do_not_divide_does_not_add_up() -> None:
    shares = dict.fromkeys(range(7), 62_720_000 / 7)
    (parts,) = spread([(whole((64, 700, 700)), 2)], shares)
    assert [box[1][0] for _, box in parts] == [9, 9, 9, 10, 9, 9, 9]


def test_no_slivers() -> None:
    item = [(whole((10 * MB,)), 1)]
    (parts,) = spread(item, {0: 5.0 * MB - 10, 1: 5.0 * MB + 5, 2: 5.0})
    assert all(elements(box) >= SLIVER_BYTES for _, box in parts)
    assert [rank for rank, _ in parts] == [0, 1]


@settings(deadline=None)
@given(
    loads=st.dictionaries(st.integers(0, 7), st.integers(0, 100).map(float)),
    groups=st.dictionaries(
        st.sets(st.integers(0, 7), min_size=1).map(lambda ranks: tuple(sorted(ranks))), st.integers(0, 1000)
    ),
)
def test_the_least_loaded_get_most(loads: dict[int, float], groups: dict[tuple[int, ...], int]) -> None:
    shares = level(loads, groups)
    for holders, total in groups.items():
        assert math.isclose(sum(shares[holders].values()), total, abs_tol=1e-6)
        assert all(share >= 0 for share in shares[holders].values())
    order = sorted(groups, key=lambda holders: (len(holders), holders))
    if order:
        # Of the last group: who gets anything ends at one level, below which nobody is left.
        ends = {rank: loads.get(rank, 0.0) for rank in range(8)}
        for holders in order:
            for rank, share in shares[holders].items():
                ends[rank] += share
        filled = [ends[rank] for rank, share in shares[order[-1]].items() if share > 1e-6]
        assert all(math.isclose(one, other, abs_tol=1e-6) for one, other in pairwise(filled))
        assert not filled or min(ends[rank] for rank in order[-1]) >= filled[0] - 1e-6


@pytest.mark.parametrize("ranks", [1, 3])
def test_nothing_is_spread_too(ranks: int) -> None:
    shares = level({}, {tuple(range(ranks)): 0})[tuple(range(ranks))]
    assert spread([], shares) == []
    assert spread([(whole((0, 4)), 2)], shares) == [[(0, whole((0, 4)))]]
