"""Several manifests read as one: leaves united box by box, chunks and packs once each, values merged
(FORMAT.md, "Several ranks")."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence

from everstep.errors import Damaged
from everstep.format import values
from everstep.format.layout import Box
from everstep.format.manifest import (
    OBJECTS,
    RUN,
    SEVERAL,
    Manifest,
    Place,
    Shape,
    StoredChunk,
    StoredLeaf,
    StoredRegion,
    StoredSlice,
    state_of_parts,
)
from everstep.format.values import Value

MAX_CUT_DIMENSIONS = 8
"""In no more dimensions may the slices of a leaf be shorter than the leaf: what a box has to be checked for
doubles with each."""


def join(parts: Sequence[Manifest]) -> Manifest:
    """The whole state that the manifests of a snapshot are parts of, as one manifest. Of one, that one.

    In what is made of several `rank` is 0 and `ranks` how many they are; `state` is the snapshot's state
    digest. Each leaf has its slices once, in order; one that is whole somewhere has just that slice. Regions
    are those of the parts, one part's after another's. It is made to be read, and may be larger than a
    manifest that is stored can be.

    Takes time and memory by the number of slices and chunks in all parts; values are decoded once for each
    different state of the objects. Not for parts that `decode` has not checked.

    Raises:
        Damaged: they are no parts of one snapshot, or leave a leaf with a hole or an overlap.
    """
    if not parts:
        raise Damaged("a snapshot has no manifests")
    first = parts[0]
    for rank, part in enumerate(parts):
        if (part.rank, part.ranks) != (rank, len(parts)):
            raise Damaged(
                f"the manifest of rank {rank} of {len(parts)} says that it is of rank "
                f"{part.rank} of {part.ranks}"
            )
        if part.grid_bytes != first.grid_bytes:
            raise Damaged(f"the manifests of ranks 0 and {rank} have different grids")
    if len(parts) == 1:
        if first.format >= SEVERAL:
            for leaf in first.leaves:
                _refuse_uncovered(leaf.name, leaf.shape, [part.box for part in leaf.slices])
        return first
    chunks, places = _chunks(parts)
    numbers = {chunk.digest: number for number, chunk in enumerate(chunks)}
    return Manifest(
        format=SEVERAL,
        grid_bytes=first.grid_bytes,
        leaves=tuple(_leaves(parts)),
        regions=tuple(_regions(parts, numbers)),
        chunks=chunks,
        places=places,
        packs=_packs(parts),
        values=_values(parts),
        state=state_of_parts([part.state for part in parts]),
        rank=0,
        ranks=len(parts),
    )


# -- leaves ------------------------------------------------------------------------------------------------


def _leaves(parts: Sequence[Manifest]) -> Iterator[StoredLeaf]:
    """Those of the lowest rank first, each with its slices of all ranks."""
    kinds: dict[str, tuple[str, Shape]] = {}
    found: dict[str, dict[Box, StoredSlice]] = {}
    begin = 0
    for part in parts:
        for leaf in part.leaves:
            kind = leaf.dtype, leaf.shape
            if kinds.setdefault(leaf.name, kind) != kind:
                raise Damaged(f"leaf {leaf.name!r} has another dtype or shape in rank {part.rank}'s manifest")
            slices = found.setdefault(leaf.name, {})
            for one in leaf.slices:
                if one.box not in slices:
                    moved = StoredSlice(one.at, one.extent, one.region + begin, one.offset)
                    slices[one.box] = moved
        begin += len(part.regions)
    for name, slices in found.items():
        dtype, shape = kinds[name]
        _refuse_uncovered(name, shape, list(slices))
        yield StoredLeaf(name, dtype, shape, _wanted(shape, slices))


def _wanted(shape: Shape, slices: dict[Box, StoredSlice]) -> tuple[StoredSlice, ...]:
    """In order, without those that hold nothing. Of a leaf that holds nothing: one that is all of it."""
    if len(slices) > 1:
        slices = {box: one for box, one in sorted(slices.items()) if 0 not in box[1]} or slices
    if 0 in shape:
        one = next(iter(slices.values()))
        return (StoredSlice((0,) * len(shape), shape, one.region, one.offset),)
    return tuple(slices.values())


def _refuse_uncovered(name: str, shape: Shape, boxes: Sequence[Box]) -> None:
    """Raises Damaged unless `boxes`, which are all different, cover a leaf exactly."""
    if len(boxes) > 1:
        boxes = [box for box in boxes if 0 not in box[1]]
    if 0 not in shape and not covers(shape, boxes):
        raise Damaged(f"the slices of leaf {name!r} leave a hole in it, or overlap")


def covers(shape: Shape, boxes: Sequence[Box]) -> bool:
    """Whether each element of a leaf that has some lies in exactly one of `boxes`, none of which is empty or
    reaches beyond it. False, too, where they are cut in more than `MAX_CUT_DIMENSIONS`.

    How often an element is covered is the sum over boxes of functions that are 1 inside and 0 outside; and
    such a sum is known by its corners, where it changes in all dimensions at once. So the corners of the
    boxes, with their signs, must add up to those of the leaf: that is exact, and takes no look at pairs.
    """
    if len(boxes) == 1:
        return boxes[0][1] == shape
    cut = [number for number, size in enumerate(shape) if any(extent[number] != size for _, extent in boxes)]
    if not boxes or len(cut) > MAX_CUT_DIMENSIONS:
        return False
    if len(cut) == 1:
        return _covers_in_one(cut[0], shape, boxes)
    corners: dict[tuple[int, ...], int] = defaultdict(int)
    whole: Box = ((0,) * len(shape), shape)
    signs = [-1 if sum(ends) % 2 else 1 for ends in itertools.product((0, 1), repeat=len(cut))]
    for (at, extent), times in itertools.chain(((box, 1) for box in boxes), [(whole, -1)]):
        ends = [(at[number], at[number] + extent[number]) for number in cut]
        for corner, sign in zip(itertools.product(*ends), signs, strict=True):
            corners[corner] += sign * times
    return not any(corners.values())


def _covers_in_one(number: int, shape: Shape, boxes: Sequence[Box]) -> bool:
    end = 0
    for at, size in sorted((at[number], extent[number]) for at, extent in boxes):
        if at != end:
            return False
        end += size
    return end == shape[number]


# -- chunks ------------------------------------------------------------------------------------------------


def _chunks(parts: Sequence[Manifest]) -> tuple[tuple[StoredChunk, ...], tuple[Place, ...]]:
    """Each chunk once, where the fewest lie below it. What builds on a chunk in one manifest has more below
    it there than that, and so than where that is placed: there are never more than there may be, nor a ring.
    """
    found: dict[str, tuple[StoredChunk, Place, Manifest]] = {}
    for part in parts:
        for chunk, place in zip(part.chunks, part.places, strict=True):
            other = found.get(chunk.digest)
            if other is None:
                found[chunk.digest] = chunk, place, part
                continue
            if other[0].size_bytes != chunk.size_bytes:
                raise Damaged(f"chunk {chunk.digest[:12]} has another size in rank {part.rank}'s manifest")
            if other[1].base and _depth(part, place) < _depth(other[2], other[1]):
                found[chunk.digest] = chunk, place, part
    return tuple(one[0] for one in found.values()), tuple(one[1] for one in found.values())


def _depth(part: Manifest, place: Place) -> int:
    depth = 0
    while place.base:
        place = part.place_of[place.base][1]
        depth += 1
    return depth


def _regions(parts: Sequence[Manifest], numbers: dict[str, int]) -> Iterator[StoredRegion]:
    for part in parts:
        joined = [numbers[chunk.digest] for chunk in part.chunks]
        for region in part.regions:
            yield StoredRegion(region.size_bytes, tuple(joined[number] for number in region.chunks))


def _packs(parts: Sequence[Manifest]) -> dict[str, int]:
    packs: dict[str, int] = {}
    for part in parts:
        for name, size_bytes in part.packs.items():
            if packs.setdefault(name, size_bytes) != size_bytes:
                raise Damaged(f"pack {name[:12]} has another size in rank {part.rank}'s manifest")
    return packs


# -- values ------------------------------------------------------------------------------------------------


def _values(parts: Sequence[Manifest]) -> bytes:
    """The merged values. Ranks whose objects have the same values as another's are not decoded."""
    trees: list[Value] = []
    known: list[bytes] = []
    for part in parts:
        if any(part.values.startswith(begin) for begin in known):
            continue
        trees.append(part.tree)
        known.append(_until_run(part))
    return parts[0].values if len(trees) == 1 else values.encode(merge(trees))


def _until_run(part: Manifest) -> bytes:
    """What the values begin with that is not the run's own, which counts only where it is the first; or all
    of them, where they do not lie like that."""
    tree = part.tree
    if type(tree) is dict and list(tree) == [OBJECTS, RUN]:
        begin = values.encode({OBJECTS: tree[OBJECTS], RUN: None})[:-1]
        if part.values.startswith(begin):
            return begin
    return part.values


def merge(trees: Sequence[Value], *, run: str = RUN) -> Value:
    """Dicts key by key; else, and for what is under the outermost key `run`, the first. Nothing that is in
    `trees` is changed, but what is made shares parts with them."""
    first = trees[0]
    if len(trees) == 1 or any(type(tree) is not dict for tree in trees):
        return first
    found: dict[Value, list[Value]] = {}
    for tree in trees:
        for key, value in tree.items():
            found.setdefault(key, []).append(value)
    return {key: of_all[0] if key == run else merge(of_all, run="") for key, of_all in found.items()}
