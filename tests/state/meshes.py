"""DTensors of many ranks in one process: a mesh whose ranks are nobody, and the local tensor of each made
by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

Placements: TypeAlias = "tuple[Any, ...]"
MOST_RANKS = 16


@contextmanager
def nobody() -> Iterator[None]:
    """A process group of which this process is the only living member."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=MOST_RANKS)
    try:
        yield
    finally:
        dist.destroy_process_group()


def mesh_of(shape: Sequence[int], ranks: Sequence[int] | None = None) -> DeviceMesh:
    count = torch.Size(shape).numel()
    numbers = torch.tensor(list(ranks) if ranks is not None else range(count)).view(*shape)
    return DeviceMesh("cpu", numbers, _init_backend=False)


def coordinates(mesh: DeviceMesh) -> dict[int, tuple[int, ...]]:
    """Where each rank is."""
    places = itertools.product(*map(range, mesh.shape))
    return dict(zip(mesh.mesh.flatten().tolist(), places, strict=True))


def cut(
    whole: torch.Tensor, mesh: DeviceMesh, placements: Placements, rank: int, *, fsdp: bool
) -> torch.Tensor:
    """What a rank holds, as torch cuts it; with `fsdp` as FSDP cuts what is cut for tensor parallelism."""
    where = coordinates(mesh)[rank]
    held = whole
    order = sorted(
        range(len(placements)), key=lambda dim: fsdp and isinstance(placements[dim], _StridedShard)
    )
    for dim in order:
        placement = placements[dim]
        if isinstance(placement, Replicate):
            continue
        if fsdp:
            placement = Shard(placement.dim)
        pieces, _ = placement._split_tensor(held, mesh.shape[dim], with_padding=False, contiguous=True)
        held = pieces[where[dim]]
    return held.clone()


def sharded(
    whole: torch.Tensor, mesh: DeviceMesh, placements: Placements, rank: int, *, fsdp: bool = False
) -> DTensor:
    """The DTensor of a rank."""
    own = cut(whole, mesh, placements, rank, fsdp=fsdp)
    spec = DTensorSpec(mesh, placements, TensorMeta(whole.shape, whole.stride(), whole.dtype))
    return DTensor(own, spec, requires_grad=False)


__all__ = [
    "MOST_RANKS",
    "Placements",
    "Replicate",
    "Shard",
    "_StridedShard",
    "cut",
    "mesh_of",
    "nobody",
    "sharded",
]
