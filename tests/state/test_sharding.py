"""DTensors: from any mesh and placement to any other, bit for bit, without a process for each rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meshes import Placements, Replicate, Shard, _StridedShard, coordinates, cut, mesh_of, nobody, sharded
from stored import Stored, joined
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from everstep.errors import Unsupported
from everstep.format.layout import Box
from everstep.format.manifest import StoredLeaf, StoredSlice
from everstep.state import leaves, spreading
from everstep.state.lazy import LazyState
from everstep.state.sharding import boxes_of, elements, overlap, spec_of, table, views, whole
from ranks import Ranks


@pytest.fixture(autouse=True)
def _world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tensors are cut and coalesced as large ones are."""
    monkeypatch.setattr(spreading, "SMALL_BYTES", 64)
    monkeypatch.setattr(spreading, "SLIVER_BYTES", 8)
    monkeypatch.setattr(leaves, "STRETCH_BYTES", 40)
    monkeypatch.setattr(leaves, "STAGE_BYTES", 256)
    with nobody():
        yield


@dataclass(frozen=True)
class Way:
    """How a tensor is spread."""

    mesh: tuple[int, ...]
    placements: Placements
    fsdp: bool = False

    @property
    def ranks(self) -> int:
        return math.prod(self.mesh)

    def made(self) -> DeviceMesh:
        return mesh_of(self.mesh)


MESHES = [(1,), (2,), (3,), (5,), (2, 2), (2, 3), (3, 2), (1, 4), (2, 2, 2), (2, 1, 3), (3, 2, 2)]


@st.composite
def ways(draw: st.DrawFn, dims: int) -> Way:
    mesh = draw(st.sampled_from(MESHES))
    one: st.SearchStrategy[Any] = st.just(Replicate())
    if dims:
        dim = st.integers(0, dims - 1)
        one |= st.builds(Shard, dim)
        one |= st.builds(lambda at, pieces: _StridedShard(at, split_factor=pieces), dim, st.integers(2, 3))
    placements = [draw(one) for _ in mesh]
    if dims and draw(st.booleans()):
        # FSDP over tensor parallelism: in its own dimension of the mesh it cuts what is cut further right.
        placements = [draw(st.sampled_from([Replicate(), *map(Shard, range(dims))])) for _ in mesh]
        at = draw(st.integers(0, dims - 1))
        pieces = pieces_of(mesh, placements, 0, at)
        placements[0] = _StridedShard(at, split_factor=pieces) if pieces > 1 else Shard(at)
    strided = [n for n, one in enumerate(placements) if isinstance(one, _StridedShard)]
    fsdp = all(
        placements[n].split_factor == pieces_of(mesh, placements, n, placements[n].dim) for n in strided
    )
    return Way(mesh, tuple(placements), bool(strided) and fsdp)


def pieces_of(mesh: Sequence[int], placements: Sequence[Any], at: int, dim: int) -> int:
    """In how many pieces a dimension is cut further right in the mesh."""
    later = zip(mesh[at + 1 :], placements[at + 1 :], strict=True)
    return math.prod(size for size, one in later if not isinstance(one, Replicate) and one.dim == dim)


SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)


class Holder(nn.Module):
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def objects(wholes: list[torch.Tensor], of: list[Way], rank: int) -> dict[str, object]:
    """A module with a tensor for each way. All ways have as many ranks."""
    tensors: dict[str, torch.Tensor] = {
        f"t{number}": sharded(one, way.made(), way.placements, rank, fsdp=way.fsdp)
        for number, (one, way) in enumerate(zip(wholes, of, strict=True))
    }
    return {"model": Holder(tensors)}


def slices_of(name: str, parts: list[Stored]) -> list[tuple[StoredLeaf, StoredSlice]]:
    """What all ranks have written of a tensor."""
    leaves_of = [leaf for part in parts for leaf in part.manifest.leaves if leaf.name == f"model/{name}"]
    return [(leaf, one) for leaf in leaves_of for one in leaf.slices]


def as_many(one: Way, other: Way) -> bool:
    return one.ranks == other.ranks


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[Way], list[Way]]:
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=3))
    both = []
    for _ in range(2):
        first = draw(ways(len(shapes[0])))
        same = partial(as_many, first)
        both.append([first, *(draw(ways(len(shape)).filter(same)) for shape in shapes[1:])])
    return shapes, both[0], both[1]


@settings(deadline=None, max_examples=40)
@given(case=cases())
def test_from_any_way_to_any_other(case: tuple[list[tuple[int, ...]], list[Way], list[Way]]) -> None:
    shapes, before, now = case
    wholes = [
        torch.arange(math.prod(shape), dtype=torch.int16).view(shape) + 100 * number
        for number, shape in enumerate(shapes)
    ]
    blanks = [torch.zeros_like(one) - 1 for one in wholes]
    saved = [objects(wholes, before, rank) for rank in range(before[0].ranks)]
    parts = Ranks(saved).stored()
    live = [objects(blanks, now, rank) for rank in range(now[0].ranks)]
    Ranks(live).restore(parts)
    for rank, found in enumerate(live):
        module: Any = found["model"]
        for number, (one, way) in enumerate(zip(wholes, now, strict=True)):
            own = getattr(module, f"t{number}").to_local()
            expected = cut(one, way.made(), way.placements, rank, fsdp=way.fsdp)
            assert torch.equal(own, expected), (rank, number)
    # And each element was written once, and is there in one piece for who looks into it.
    whole_state = joined(parts)
    lazy = LazyState(whole_state.manifest, whole_state.fill, torch.device("cpu"))
    for number, one in enumerate(wholes):
        found_whole = lazy[f"model/t{number}"]
        assert isinstance(found_whole, torch.Tensor)
        assert torch.equal(found_whole, one)
        written = slices_of(f"t{number}", parts)
        assert sum(math.prod(place.extent) for _, place in written) == one.numel()


@settings(deadline=None, max_examples=100)
@given(shape=SHAPES, data=st.data())
def test_boxes_are_what_torch_cuts(shape: tuple[int, ...], data: st.DataObject) -> None:
    way = data.draw(ways(len(shape)))
    mesh = way.made()
    one = torch.arange(math.prod(shape)).view(shape)
    for rank, where in coordinates(mesh).items():
        tensor = sharded(one, mesh, way.placements, rank, fsdp=way.fsdp)
        spec = spec_of("t", tensor, rank)
        boxes = boxes_of(shape, spec, rank)
        own = tensor.to_local()
        if 0 in shape:
            assert boxes == (whole(shape),)
            continue
        for box, view in zip(boxes, views(own, boxes), strict=True):
            expected = one[tuple(slice(at, at + size) for at, size in zip(*box, strict=True))]
            assert torch.equal(view, expected)
        assert sum(map(elements, boxes)) == own.numel()
        if not way.fsdp and len(boxes) == 1:
            theirs = _compute_local_shape_and_global_offset(shape, way.mesh, list(where), way.placements)
            assert (boxes[0][1], boxes[0][0]) == (tuple(theirs[0]), tuple(theirs[1]))


@settings(deadline=None, max_examples=100)
@given(shape=SHAPES, data=st.data())
def test_all_boxes_together_are_the_tensor(shape: tuple[int, ...], data: st.DataObject) -> None:
    way = data.draw(ways(len(shape)))
    tensor = sharded(torch.zeros(shape), way.made(), way.placements, 0, fsdp=way.fsdp)
    holders = table(shape, spec_of("t", tensor, 0))
    assert sum(map(elements, holders)) == math.prod(shape)
    boxes: list[Box] = list(holders)
    assert not any(overlap(one, other) for n, one in enumerate(boxes) for other in boxes[:n])
    assert {rank for ranks in holders.values() for rank in ranks} <= set(range(way.ranks))


def test_fsdp_over_uneven_tensor_parallelism() -> None:
    """38 rows, cut in 4 and then each in 4: what the placements say is not what lies there, and in one place
    that is not even of another size."""
    way = Way((4, 4), (_StridedShard(0, split_factor=4), Shard(0)), fsdp=True)
    one = torch.arange(38)
    for rank, where in coordinates(way.made()).items():
        tensor = sharded(one, way.made(), way.placements, rank, fsdp=True)
        ((at, extent),) = boxes_of((38,), spec_of("t", tensor, rank), rank) or [((0,), (0,))]
        assert torch.equal(tensor.to_local(), one[at[0] : at[0] + extent[0]]), where


def test_a_sum_that_was_not_added_up_is_refused() -> None:
    mesh = mesh_of((2,))
    tensor = sharded(torch.zeros(4), mesh, (Replicate(),), 0)
    tensor._spec = type(tensor._spec)(mesh, (Partial(),), tensor._spec.tensor_meta)
    ranks = Ranks([{"model": {"w": tensor}}, {"model": {"w": tensor}}])
    with pytest.raises(Unsupported, match=r"model/w is a part of a sum that was not added up yet"):
        ranks.collect()


def test_a_local_tensor_of_another_size_is_refused() -> None:
    mesh = mesh_of((2,))
    tensor = sharded(torch.zeros(5, 3), mesh, (Shard(0),), 0)
    tensor._local_tensor = torch.zeros(1, 3)
    with pytest.raises(Unsupported, match=r"model/w .* shape \[5, 3\] of which rank 0 holds \[1, 3\]"):
        spec_of("model/w", tensor, 0)


def test_a_mesh_of_some_ranks_only() -> None:
    """Tensor parallelism within two groups that have the same weights: each box is written by one of them."""
    one = torch.arange(64, dtype=torch.int64).view(8, 8)

    def made(rank: int, add: int = 0) -> dict[str, Any]:
        group = [0, 1] if rank < 2 else [2, 3]
        return {"w": sharded(one + add, mesh_of((2,), group), (Shard(0),), rank)}

    def written(parts: list[Stored]) -> int:
        found = [leaf for part in parts for leaf in part.manifest.leaves if leaf.name.endswith("w")]
        return sum(leaf.size_bytes(place) for leaf in found for place in leaf.slices)

    parts = Ranks([made(rank) for rank in range(4)]).stored()
    assert written(parts) == one.nbytes
    # With other weights in each they are not one tensor: each rank gets its own back.
    parts = Ranks([made(rank, rank // 2) for rank in range(4)]).stored()
    assert written(parts) == 2 * one.nbytes
    live = [made(rank, 7) for rank in range(4)]
    Ranks(live).restore(parts)
    for rank, found in enumerate(live):
        half = one[:4] if rank % 2 == 0 else one[4:]
        assert torch.equal(found["w"].to_local(), half + rank // 2)


def test_columns_of_rows_are_read_in_bounded_stages() -> None:
    """Rows stored, columns wanted: each chunk is read about once, and no more at once than a stage holds."""
    one = torch.arange(128 * 64, dtype=torch.int32).view(128, 64)
    rows = [{"model": Holder({"w": sharded(one, mesh_of((4,)), (Shard(0),), rank)})} for rank in range(4)]
    parts = Ranks(rows).stored()
    for rank in range(8):
        snapshot = joined(parts)
        columns = sharded(one * 0, mesh_of((8,)), (Shard(1),), rank)
        leaves.read(snapshot.manifest, snapshot.fill, {"model/w": columns}, rank=rank)
        assert torch.equal(columns.to_local(), one[:, rank * 8 : rank * 8 + 8])
        assert max(size for _, _, size in snapshot.reads) <= snapshot.manifest.grid_bytes
        assert snapshot.read_bytes <= one.nbytes
        assert len(snapshot.reads) <= 2 * one.nbytes // snapshot.manifest.grid_bytes
    # What lies in long stretches is read by itself: nothing but what is wanted.
    snapshot = joined(parts)
    halves = sharded(one * 0, mesh_of((2,)), (Shard(1),), 1)
    leaves.read(snapshot.manifest, snapshot.fill, {"model/w": halves}, rank=1)
    assert torch.equal(halves.to_local(), one[:, 32:])
    assert snapshot.read_bytes == halves.to_local().nbytes
