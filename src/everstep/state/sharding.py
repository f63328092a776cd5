"""Which part of a tensor a rank holds, as boxes.

A box is so many elements from so many on, in each dimension. What a rank holds of a DTensor is mostly one
box; a placement that interleaves (`_StridedShard`) may leave it rows that do not follow on each other, and
so several.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import torch

from everstep.errors import Unsupported
from everstep.format.layout import Box

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_MODULE = "torch.distributed.tensor"

Shape: TypeAlias = "tuple[int, ...]"

Run: TypeAlias = "tuple[int, int]"
"""Where elements of a dimension begin that follow on each other, and how many they are."""


@dataclass(frozen=True)
class Placement:
    """How a tensor lies along one dimension of a mesh: replicated where `dim` is None, else cut along that
    dimension of its own; where `interleaved` is above 1 each of so many pieces is cut by itself."""

    dim: int | None = None
    interleaved: int = 1


@dataclass(frozen=True)
class Spec:
    """How a tensor is spread over ranks: those of a mesh in row-major order, and the mesh's shape.

    `inner_first`: what is interleaved is cut last, in plain pieces. So FSDP cuts what is cut for tensor
    parallelism already; its placements say the same unless the pieces are uneven.
    """

    ranks: tuple[int, ...]
    mesh: Shape
    placements: tuple[Placement, ...]
    inner_first: bool = False

    def __hash__(self) -> int:
        # Not of all its ranks, of which there may be thousands: it is asked for each leaf.
        return hash((len(self.ranks), self.ranks[:2], self.mesh, self.placements, self.inner_first))

    def coordinate(self, rank: int) -> Shape | None:
        """Where a rank is in the mesh; None: nowhere."""
        number = _numbers(self.ranks).get(rank)
        if number is None:
            return None
        left, found = number, []
        for size in reversed(self.mesh):
            found.append(left % size)
            left //= size
        return tuple(reversed(found))


@lru_cache(maxsize=64)
def _numbers(ranks: tuple[int, ...]) -> dict[int, int]:
    return {rank: number for number, rank in enumerate(ranks)}


def may_be_sharded() -> bool:
    """Whether there can be DTensors at all: nobody has made one without importing what takes a second to."""
    return _MODULE in sys.modules


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether it is a DTensor."""
    module = sys.modules.get(_MODULE)
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """What this rank holds of a tensor or array: memory of its own, without a history."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local().detach()


def sharded_like(own: torch.Tensor, like: DTensor) -> DTensor:
    """A DTensor of which this rank holds `own`, placed like another of the same shape. Nobody is asked."""
    made: DTensor = type(like).from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return made


def spec_of(path: str, tensor: DTensor, rank: int) -> Spec:
    """How a DTensor is spread, of which this process, `rank`, holds a part.

    Raises:
        Unsupported: some of it is still to be added up, or it lies in a way that is not known; the message
            names `path`.
    """
    placements = tuple(_placement(path, one) for one in tensor.placements)
    mesh = tensor.device_mesh
    spec = Spec(_ranks_of(mesh), tuple(mesh.shape), placements)
    held, where = tuple(local(tensor).shape), spec.coordinate(rank)
    if where is None:
        return spec
    ways = (replace(spec, inner_first=True), spec) if _is_of_fsdp(spec) else (spec,)
    for one in ways:
        if tuple(sum(size for _, size in runs) for runs in runs_of(tuple(tensor.shape), one, where)) == held:
            return one
    placements_text = ", ".join(map(str, tensor.placements))
    raise Unsupported(
        f"{path} is a DTensor of shape {list(tensor.shape)} of which rank {rank} holds {list(held)}; "
        f"its placements {placements_text} say otherwise",
        kept="no snapshot was taken, and the state is untouched",
        next="distribute_tensor(), which cuts as they say",
    )


def _is_of_fsdp(spec: Spec) -> bool:
    """Whether pieces are interleaved as many times as the same dimension is cut further right in the mesh."""
    placed = list(zip(spec.placements, spec.mesh, strict=True))
    return any(one.interleaved > 1 for one in spec.placements) and all(
        one.interleaved
        in (1, math.prod(size for other, size in placed[number + 1 :] if other.dim == one.dim))
        for number, one in enumerate(spec.placements)
    )


@lru_cache(maxsize=64)
def _ranks_of(mesh: Any) -> tuple[int, ...]:
    return tuple(mesh.mesh.flatten().tolist())


def _placement(path: str, placement: Any) -> Placement:
    name = type(placement).__name__
    if placement.is_replicate():
        return Placement()
    if name == "_StridedShard":
        return Placement(placement.dim, int(placement.split_factor))
    if name == "Shard":
        return Placement(placement.dim)
    what = "a part of a sum that was not added up yet" if placement.is_partial() else f"placed as {placement}"
    raise Unsupported(
        f"{path} is {what} and cannot be stored",
        kept="no snapshot was taken, and the state is untouched",
        next="redistribute() it to Shard or Replicate, or leave it out",
    )


@lru_cache(maxsize=65536)
def boxes_of(shape: Shape, spec: Spec | None, rank: int) -> tuple[Box, ...]:
    """The boxes that a rank holds of a tensor, in the order in which they lie in its local tensor; without
    those that hold nothing. Where `spec` is None that is all of it, even if it holds nothing."""
    if spec is None:
        return (whole(shape),)
    where = spec.coordinate(rank)
    if where is None:
        return ()
    return tuple(_product(runs_of(shape, spec, where))) if 0 not in shape else (whole(shape),)


@lru_cache(maxsize=4096)
def table(shape: Shape, spec: Spec) -> dict[Box, tuple[int, ...]]:
    """The boxes of a tensor, and the ranks that hold each, in ascending order; without those that hold
    nothing, unless all of it does."""
    if 0 in shape:
        return {whole(shape): tuple(sorted(spec.ranks))}
    held: dict[Box, list[int]] = {}
    for rank, where in zip(spec.ranks, itertools.product(*map(range, spec.mesh)), strict=True):
        for box in _product(runs_of(shape, spec, where)):
            held.setdefault(box, []).append(rank)
    return {box: tuple(sorted(ranks)) for box, ranks in held.items()}


def runs_of(shape: Shape, spec: Spec, where: Shape) -> list[list[Run]]:
    """What lies at `where` in the mesh, in each dimension of a tensor."""
    runs: list[list[Run]] = [[(0, size)] if size else [] for size in shape]
    order = list(zip(spec.placements, spec.mesh, where, strict=True))
    if spec.inner_first:
        last = [one for one in order if one[0].interleaved > 1]
        order = [one for one in order if one[0].interleaved == 1] + last[::-1]
    for placement, parts, number in order:
        dim = placement.dim
        if dim is None:
            continue
        pieces = 1 if spec.inner_first else placement.interleaved
        cut = (_chunk(_chunk(runs[dim], pieces, piece), parts, number) for piece in range(pieces))
        runs[dim] = _merged(itertools.chain.from_iterable(cut))
    return runs


def _chunk(runs: Sequence[Run], parts: int, number: int) -> list[Run]:
    """Chunk `number` of `parts`, as `torch.chunk` cuts."""
    total = sum(size for _, size in runs)
    size = -(-total // parts)
    first, last = min(number * size, total), min((number + 1) * size, total)
    found, passed = [], 0
    for at, length in runs:
        begin, end = max(first - passed, 0), min(last - passed, length)
        if begin < end:
            found.append((at + begin, end - begin))
        passed += length
    return found


def _merged(runs: Iterable[Run]) -> list[Run]:
    found: list[Run] = []
    for at, size in runs:
        if found and sum(found[-1]) == at:
            found[-1] = (found[-1][0], found[-1][1] + size)
        else:
            found.append((at, size))
    return found


def _product(runs: Sequence[Sequence[Run]]) -> Iterator[Box]:
    for one in itertools.product(*runs):
        yield tuple(at for at, _ in one), tuple(size for _, size in one)


def views(tensor: Any, boxes: Sequence[Box]) -> list[Any]:
    """The part of a local tensor that lies in each of its boxes (all that `boxes_of` says, in that order)."""
    if len(boxes) == 1:
        return [tensor]
    starts = [
        _starts({box[0][dim]: box[1][dim] for box in boxes})
        for dim in range(len(boxes[0][0]) if boxes else 0)
    ]
    found = []
    for at, extent in boxes:
        view = tensor
        for dim, (begin, size) in enumerate(zip(at, extent, strict=True)):
            view = view.narrow(dim, starts[dim][begin], size)
        found.append(view)
    return found


def _starts(sizes: dict[int, int]) -> dict[int, int]:
    """Where the runs of one dimension begin in the local tensor, given their sizes in its order."""
    return dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))


def within(view: Any, box: Box, part: Box) -> Any:
    """The `part` of a box, of whose elements `view` consists."""
    for dim, (begin, size) in enumerate(zip(*part, strict=True)):
        if (begin, size) != (box[0][dim], box[1][dim]):
            view = view[(slice(None),) * dim + (slice(begin - box[0][dim], begin - box[0][dim] + size),)]
    return view


def overlap(one: Box, other: Box) -> Box | None:
    """What two boxes have in common; None: nothing."""
    at = tuple(map(max, one[0], other[0]))
    ends = (min(a + b, c + d) for a, b, c, d in zip(*one, *other, strict=True))
    extent = tuple(end - begin for end, begin in zip(ends, at, strict=True))
    return (at, extent) if all(size > 0 for size in extent) else None


def whole(shape: Sequence[int]) -> Box:
    return (0,) * len(shape), tuple(shape)


def elements(box: Box) -> int:
    return math.prod(box[1])
