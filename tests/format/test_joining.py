"""Joined manifests: what several ranks stored of a state is that state; what does not fit is damage."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hostile import same_every_time
from hypothesis import given
from hypothesis import strategies as st

from everstep.errors import Damaged
from everstep.format import joining, manifest, values
from everstep.format.chunk import digest, grid
from everstep.format.joining import covers, join
from everstep.format.layout import Box
from everstep.format.manifest import (
    Manifest,
    Place,
    StoredChunk,
    StoredLeaf,
    StoredRegion,
    StoredSlice,
    state_of_parts,
)
from everstep.format.values import Leaf

GRID_BYTES = 4096


@st.composite
def tilings(draw: st.DrawFn, dimensions: int = 3, size: int = 7) -> tuple[tuple[int, ...], list[Box]]:
    """A shape and boxes that cover it, by cutting boxes again and again."""
    shape = tuple(draw(st.lists(st.integers(1, size), min_size=1, max_size=dimensions)))
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        at, extent = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        number = draw(st.integers(0, len(shape) - 1))
        if extent[number] < 2:
            boxes.append((at, extent))
            continue
        cut = draw(st.integers(1, extent[number] - 1))
        low = (*extent[:number], cut, *extent[number + 1 :])
        high = (*extent[:number], extent[number] - cut, *extent[number + 1 :])
        boxes += [(at, low), ((*at[:number], at[number] + cut, *at[number + 1 :]), high)]
    return shape, draw(st.permutations(boxes))


def counted(shape: Sequence[int], boxes: Sequence[Box]) -> np.ndarray[Any, Any]:
    """How often each element is covered."""
    times = np.zeros(shape, int)
    for at, extent in boxes:
        times[tuple(slice(a, a + e) for a, e in zip(at, extent, strict=True))] += 1
    return times


@same_every_time
@given(tilings(), st.randoms(use_true_random=False))
def test_boxes_cover_a_leaf_or_not(tiling: tuple[tuple[int, ...], list[Box]], rng: random.Random) -> None:
    """Against counting each element; also where a box is left out, shifted, or there twice."""
    shape, boxes = tiling
    assert covers(shape, boxes)
    changed = list(boxes)
    _at, extent = changed.pop(rng.randrange(len(changed)))
    if rng.random() < 0.7:
        moved = tuple(rng.randint(0, size - part) for size, part in zip(shape, extent, strict=True))
        changed.append((moved, extent))
    if rng.random() < 0.3:
        changed.append(rng.choice(boxes))
    assert covers(shape, changed) == bool((counted(shape, changed) == 1).all())


def test_a_pinwheel_covers_a_leaf() -> None:
    """No cut goes through all of it."""
    boxes = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    assert covers((3, 3), boxes)
    assert not covers((3, 3), boxes[:-1])


def test_boxes_of_many_dimensions_are_not_looked_at_for_ever() -> None:
    """A corner for each subset of dimensions: hostile boxes could keep a reader busy for years."""
    shape = (2,) * 40
    boxes = [((0,) * number + (1,) + (0,) * (39 - number), (1,) * 40) for number in range(40)]
    assert not covers(shape, boxes)


# -- parts -------------------------------------------------------------------------------------------------


def parted(
    leaves: dict[str, np.ndarray[Any, Any]], holders: dict[str, list[tuple[int, Box]]], trees: Sequence[Any]
) -> list[Manifest]:
    """Manifests of ranks that hold these boxes, each in a region of its own, all chunks in one pack."""
    return [_part(rank, len(trees), leaves, holders, trees[rank])[0] for rank in range(len(trees))]


def _part(
    rank: int,
    ranks: int,
    leaves: dict[str, np.ndarray[Any, Any]],
    holders: dict[str, list[tuple[int, Box]]],
    tree: Any,
) -> tuple[Manifest, dict[str, bytes]]:
    rows, regions = [], []
    chunks: dict[str, bytes] = {}
    digested = []
    for name, array in leaves.items():
        slices, parts = [], []
        for at, extent in sorted(box for holder, box in holders[name] if holder == rank):
            data = array[tuple(slice(a, a + e) for a, e in zip(at, extent, strict=True))].tobytes()
            names = []
            for start, size in grid(len(data), GRID_BYTES):
                piece = data[start : start + size]
                chunks[digest(piece)] = piece
                names.append(digest(piece))
            slices.append(StoredSlice(at, extent, len(regions), 0))
            regions.append((len(data), names))
            parts.append((at, extent, names))
        if slices:
            rows.append(StoredLeaf(name, "float32", array.shape, tuple(slices)))
            digested.append((name, "float32", array.shape, parts))
    numbers = {name: number for number, name in enumerate(chunks)}
    places, end = [], 0
    for data in chunks.values():
        places.append(Place("ab" * 32, end, len(data)))
        end += -(-len(data) // 4096) * 4096
    encoded = values.encode(tree)
    made = Manifest(
        format=3,
        grid_bytes=GRID_BYTES,
        leaves=tuple(rows),
        regions=tuple(StoredRegion(size, tuple(numbers[one] for one in names)) for size, names in regions),
        chunks=tuple(StoredChunk(name, len(data)) for name, data in chunks.items()),
        places=tuple(places),
        packs={"ab" * 32: 1 << 40} if chunks else {},
        values=encoded,
        state=manifest.state_digest(digested, encoded),
        rank=rank,
        ranks=ranks,
    )
    return manifest.decode(manifest.encode(made)), chunks


@st.composite
def spread(draw: st.DrawFn) -> tuple[dict[str, np.ndarray[Any, Any]], list[Manifest], dict[str, bytes]]:
    """Leaves, the parts of ranks that share them in some way, and all chunks' bytes."""
    ranks = draw(st.integers(1, 5))
    leaves, holders = {}, {}
    for number in range(draw(st.integers(0, 4))):
        shape, boxes = draw(tilings(size=30))
        name = f"leaf{number}"
        rng = np.random.default_rng(number)
        leaves[name] = rng.random(shape, np.float32)
        found = [(draw(st.integers(0, ranks - 1)), box) for box in boxes]
        # Some are held twice.
        more = {(rank, box) for _, box in found if draw(st.integers(0, 3)) == 0 for rank in range(ranks)}
        holders[name] = list({*found, *more})
    trees = [{"objects": {"a": {str(rank % 2): rank % 2}}, "run": {"rng": rank}} for rank in range(ranks)]
    parts, bytes_of = [], {}
    for rank, tree in enumerate(trees):
        part, chunks = _part(rank, ranks, leaves, holders, tree)
        parts.append(part)
        bytes_of.update(chunks)
    return leaves, parts, bytes_of


@same_every_time
@given(spread())
def test_joined_parts_are_the_state(
    made: tuple[dict[str, np.ndarray[Any, Any]], list[Manifest], dict[str, bytes]],
) -> None:
    leaves, parts, chunks = made
    joined = join(parts)
    assert joined.state == state_of_parts([part.state for part in parts])
    assert set(joined.by_name) == set(leaves)
    for name, array in leaves.items():
        got = np.full_like(array, np.nan)
        leaf = joined.by_name[name]
        assert [one.box for one in leaf.slices] == sorted(one.box for one in leaf.slices)
        for one in leaf.slices:
            region = joined.regions[one.region]
            data = b"".join(chunks[joined.chunks[number].digest] for number in region.chunks)
            data = data[one.offset : one.offset + leaf.size_bytes(one)]
            where = tuple(slice(a, a + e) for a, e in zip(one.at, one.extent, strict=True))
            got[where] = np.frombuffer(data, np.float32).reshape(one.extent)
        assert got.tobytes() == array.tobytes()
    # It is as sound as one that is read, but for the number of its rank.
    manifest._check(joined)


def two_ranks(**changed: Any) -> list[Manifest]:
    """Of 6 floats rank 0 holds the first 4, and rank 1 the others."""
    array = np.arange(6, dtype=np.float32)
    boxes: dict[str, Any] = {"a": [(0, ((0,), (4,))), (1, ((4,), (2,)))], **changed}
    return parted(dict.fromkeys(boxes, array), boxes, [{"x": 0}, {"x": 1}])


@pytest.mark.parametrize(
    "boxes",
    [
        [(0, ((0,), (4,)))],
        [(0, ((0,), (4,))), (1, ((3,), (3,)))],
        [(0, ((0,), (6,))), (1, ((4,), (2,)))],
        [(0, ((0,), (2,))), (1, ((4,), (2,)))],
        [(0, ((0,), (0,))), (1, ((4,), (2,)))],
    ],
    ids=["missing", "overlap", "twice", "hole", "nothing"],
)
def test_boxes_that_do_not_cover_a_leaf_are_damage(boxes: list[tuple[int, Box]]) -> None:
    with pytest.raises(Damaged, match="leaf 'b'"):
        join(two_ranks(b=boxes))


def test_equal_boxes_count_once() -> None:
    joined = join(two_ranks(b=[(0, ((0,), (4,))), (1, ((0,), (4,))), (1, ((4,), (2,)))]))
    assert [one.box for one in joined.by_name["b"].slices] == [((0,), (4,)), ((4,), (2,))]
    assert joined.by_name["b"].slices[0].region < len(two_ranks()[0].regions) + 1, "that of the lowest rank"


def test_a_leaf_that_is_whole_somewhere_has_one_slice() -> None:
    joined = join(two_ranks(b=[(0, ((2,), (0,))), (1, ((0,), (6,)))]))
    assert joined.by_name["b"].whole is not None


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"rank": 0}, "of rank 0 of 2"),
        ({"ranks": 3}, "of rank 1 of 3"),
        ({"grid_bytes": 8192}, "grids"),
        ({"packs": {"ab" * 32: 1 << 39}}, "another size"),
    ],
)
def test_manifests_that_are_no_parts_of_one_snapshot(changed: dict[str, Any], what: str) -> None:
    first, second = two_ranks()
    with pytest.raises(Damaged, match=what):
        join([first, msgspec.structs.replace(second, **changed)])


def test_parts_that_disagree_about_a_leaf() -> None:
    first, second = two_ranks()
    (leaf,) = second.leaves
    for changed in ({"dtype": "int32"}, {"shape": (7,)}):
        other = msgspec.structs.replace(leaf, **changed)
        with pytest.raises(Damaged, match="dtype or shape"):
            join([first, msgspec.structs.replace(second, leaves=(other,))])
    with pytest.raises(Damaged, match="of rank 0 of 2"):
        join([first])
    with pytest.raises(Damaged, match="rank"):
        join([second, first])


def test_a_manifest_by_itself_must_cover_its_leaves_too() -> None:
    alone = [msgspec.structs.replace(one, rank=0, ranks=1) for one in two_ranks()]
    for one in alone:
        with pytest.raises(Damaged, match="hole"):
            join([one])
    array = np.arange(6, dtype=np.float32)
    halves = [(0, ((0,), (4,))), (0, ((4,), (2,)))]
    (both,) = parted({"a": array}, {"a": halves}, [{}])
    assert join([both]) is both


# -- chunks ------------------------------------------------------------------------------------------------


def stacked(rank: int, ranks: int, order: Sequence[int]) -> Manifest:
    """A manifest in which each chunk builds on the one before it in `order`."""
    names = [digest(bytes([number])) for number in range(len(order))]
    base = {above: below for below, above in itertools.pairwise(order)}
    return Manifest(
        format=3,
        grid_bytes=GRID_BYTES,
        leaves=(),
        regions=(),
        chunks=tuple(StoredChunk(name, 1) for name in names),
        places=tuple(
            Place("ab" * 32, 4096 * (rank * 20 + n), 9, 3, names[base[n]])
            if n in base
            else Place("ab" * 32, 4096 * (rank * 20 + n), 1)
            for n in range(len(order))
        ),
        packs={"ab" * 32: 1 << 40},
        values=values.encode({}),
        state="cd" * 32,
        rank=rank,
        ranks=ranks,
    )


@same_every_time
@given(st.lists(st.permutations(range(9)), min_size=2, max_size=5))
def test_no_chunk_builds_on_more_than_it_may(orders: list[list[int]]) -> None:
    """Though each part has another idea of what builds on what, in rings when they are taken together."""
    parts = [stacked(rank, len(orders), order) for rank, order in enumerate(orders)]
    joined = join(parts)
    manifest._check(joined)
    for one in joined.places:
        depth = joining._depth(joined, one)
        assert depth <= 8


# -- values ------------------------------------------------------------------------------------------------


def test_values_are_merged() -> None:
    first = {
        "objects": {"model": {"a": Leaf("a"), "n": 1}, "lists": [1]},
        "run": {"progress": {"step": 3}, "rng": Leaf("~rank/0/rng")},
    }
    second = {
        "objects": {"model": {"b": Leaf("b"), "n": 2}, "lists": [2, 3], "more": None},
        "run": {"progress": {"step": 3}, "rng": Leaf("~rank/1/rng"), "only": 1},
    }
    parts = parted({}, {}, [first, second])
    assert join(parts).tree == {
        "objects": {"model": {"a": Leaf("a"), "n": 1, "b": Leaf("b")}, "lists": [1], "more": None},
        "run": {"progress": {"step": 3}, "rng": Leaf("~rank/0/rng")},
    }
    assert [part.tree for part in parts] == [first, second], "they are theirs"


def test_equal_objects_are_not_decoded_again() -> None:
    same = {"objects": {"model": {str(number): number for number in range(50)}}}
    parts = parted({}, {}, [{**same, "run": {"rng": rank}} for rank in range(4)])
    joined = join(parts)
    assert joined.tree == {**same, "run": {"rng": 0}}
    assert ["tree" in part.__dict__ for part in parts] == [True, False, False, False]
