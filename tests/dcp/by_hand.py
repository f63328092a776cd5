"""Saves and loads of several ranks, in one process and without a process group: what torch's own `save` and
`load` call, in their order, with what they would send pickled on the way.

`Boxed` is a tensor of which a rank has some boxes; torch's planners know such by three methods.
"""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlanner,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from everstep import dcp
from everstep.format.layout import Box

State = dict[str, Any]


def sent(thing: Any) -> Any:
    """As it comes out of a collective."""
    return pickle.loads(pickle.dumps(thing))


def save(
    states: Sequence[State],
    writers: Sequence[dcp.Writer],
    planner: Callable[[], SavePlanner] = DefaultSavePlanner,
) -> Metadata:
    """Save the states of all ranks as one."""
    planners = [planner() for _ in states]
    plans = []
    for rank, (state, mine, writer) in enumerate(zip(states, planners, writers, strict=True)):
        mine.set_up_planner(state, writer.storage_meta(), rank == 0)
        writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=True)
        plans.append(sent(writer.prepare_local_plan(mine.create_local_plan())))
    plans, metadata = planners[0].create_global_plan(plans)
    plans = sent(writers[0].prepare_global_plan(plans))
    results = [
        sent(writer.write_data(mine.finish_plan(plan), mine).wait())
        for plan, mine, writer in zip(plans, planners, writers, strict=True)
    ]
    writers[0].finish(metadata, results)
    return metadata


def load(
    states: Sequence[State],
    readers: Sequence[dcp.Reader],
    planner: Callable[[], LoadPlanner] = DefaultLoadPlanner,
) -> None:
    """Load into the states of all ranks, in place."""
    planners = [planner() for _ in states]
    plans = []
    for rank, (state, mine, reader) in enumerate(zip(states, planners, readers, strict=True)):
        metadata = reader.read_metadata()
        mine.set_up_planner(state, metadata, rank == 0)
        reader.set_up_storage_reader(metadata, rank == 0, rank=rank, use_collectives=True)
        plans.append(sent(reader.prepare_local_plan(mine.create_local_plan())))
    plans = sent(readers[0].prepare_global_plan(planners[0].create_global_plan(plans)))
    for plan, mine, reader in zip(plans, planners, readers, strict=True):
        reader.read_data(mine.finish_plan(plan), mine).wait()


class Boxed(torch.Tensor):
    """Boxes of a tensor, as a rank has them. `whole` gives the contents."""

    boxes: list[Box]
    parts: list[torch.Tensor]

    @staticmethod
    def of(whole: torch.Tensor, boxes: Sequence[Box]) -> Boxed:
        made = whole.detach().as_subclass(Boxed)
        made.boxes = list(boxes)
        made.parts = [_cut(whole, box).clone() for box in boxes]
        return made

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=self.dtype), self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(at), torch.Size(extent)) for at, extent in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self.parts[[at for at, _ in self.boxes].index(tuple(index.offset))]


def _cut(whole: torch.Tensor, box: Box) -> torch.Tensor:
    at, extent = box
    return whole.as_subclass(torch.Tensor)[tuple(slice(a, a + e) for a, e in zip(at, extent, strict=True))]


def mesh(shape: Sequence[int], cuts: Sequence[Sequence[int]], ranks: int) -> list[list[Box]]:
    """A tensor cut at these places of each dimension, and its boxes dealt to ranks in turn."""
    edges = [[0, *sorted(set(places)), size] for places, size in zip(cuts, shape, strict=True)]
    ranges = [[(a, b) for a, b in itertools.pairwise(one) if b > a] for one in edges]
    boxes = [(tuple(a for a, _ in box), tuple(b - a for a, b in box)) for box in itertools.product(*ranges)]
    return [boxes[rank::ranks] for rank in range(ranks)]


def numbered(shape: Sequence[int], dtype: torch.dtype = torch.float32, first: int = 1) -> torch.Tensor:
    """A tensor of which no two elements are the same."""
    return torch.arange(first, first + math.prod(shape)).reshape(shape).to(dtype)
