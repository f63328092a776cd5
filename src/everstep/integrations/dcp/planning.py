"""Planners that keep values out of pickle, and spread what several ranks hold over them by bytes."""

from __future__ import annotations

import dataclasses
import io
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem, WriteItemType

from everstep.integrations.dcp.names import Path

CUT_BYTES = 4 * 1024 * 1024
"""What several ranks hold and is smaller is written by one of them; larger ones are cut."""


class SavePlanner(DefaultSavePlanner):
    """As `DefaultSavePlanner`, but what several ranks hold is written by all of them: large tensors are cut
    along their first dimension, so that each rank writes about as many bytes; small ones whole, by whoever
    has the least to write. With `dedup_save_to_lowest_rank` it is the lowest rank, as there.

    Works with any storage writer. With `everstep.dcp.Writer` values that are no tensors are never pickled,
    whatever planner is used.
    """

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self._own: dict[str, list[WriteItem]] = defaultdict(list)
        # With a cache of plans what is returned may be empty; this has all.
        for item in self.plan.items:
            self._own[item.index.fqn].append(item)
        return plan

    def _dedup_save_plans(self, all_plans: list[SavePlan]) -> list[SavePlan]:
        if self.dedup_save_to_lowest_rank:
            return super()._dedup_save_plans(all_plans)
        return spread(all_plans)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        if not hasattr(DefaultSavePlanner, "_dedup_save_plans") and not self.dedup_save_to_lowest_rank:
            # Before torch 2.8 there was no such method, and no cache: what is spread has no duplicates.
            all_plans = spread(all_plans)
        return super().create_global_plan(all_plans)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        data = write_item.tensor_data
        if data is not None and data.chunk is not None:
            for own in self._own.get(write_item.index.fqn, ()):
                within = _within(own, data.chunk)
                if within is not None:
                    whole = super().resolve_data(own)
                    assert isinstance(whole, torch.Tensor)
                    return _narrowed(whole, within, data.chunk.sizes)
        return super().resolve_data(write_item)


class LoadPlanner(DefaultLoadPlanner):
    """As `DefaultLoadPlanner`, but values that are no tensors come as they are, without pickle; and one that
    was stored under the number 0, which planners know as "0", goes back to 0."""

    def load_value(self, read_item: ReadItem, value: object) -> None:
        """Put a value where it belongs; `everstep.dcp.Reader` calls it in the place of `load_bytes`."""
        name = read_item.dest_index.fqn
        if self.flatten_state_dict:
            _set(self.original_state_dict, self.mappings[name], value)
        else:
            self.state_dict[name] = value


def _set(state_dict: Any, path: Path, value: object) -> None:
    here = state_dict
    for part in path[:-1]:
        here = here[_key(here, part)]
    here[_key(here, path[-1])] = value


def _key(here: Any, part: str | int) -> Any:
    """The key that a planner calls `part`: it is the text of a key."""
    if isinstance(part, str) and part not in here:
        return next((key for key in here if str(key) == part), part)
    return part


# -- spreading ---------------------------------------------------------------------------------------------


def spread(plans: Sequence[SavePlan]) -> list[SavePlan]:
    """The plans of all ranks, with each item that several have written once, over them by bytes.

    Pure: the same plans give the same result, so that a rank finds the chunks of its last save again.
    """
    holders: dict[MetadataIndex, list[int]] = defaultdict(list)
    found: dict[MetadataIndex, WriteItem] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            found.setdefault(item.index, item)
            if rank not in holders[item.index]:
                holders[item.index].append(rank)
    load = [0] * len(plans)
    for index, ranks in holders.items():
        if len(ranks) == 1:
            load[ranks[0]] += _size_bytes(found[index])
    pieces: list[dict[MetadataIndex, list[WriteItem]]] = [{} for _ in plans]
    for index, ranks in holders.items():
        if len(ranks) == 1:
            pieces[ranks[0]][index] = [found[index]]
            continue
        for piece in _cut(found[index], len(ranks)):
            rank = min(ranks, key=lambda rank: load[rank])
            load[rank] += _size_bytes(piece)
            pieces[rank].setdefault(index, []).append(piece)
    return [
        dataclasses.replace(plan, items=[one for index in _order(plan) for one in mine.get(index, ())])
        for plan, mine in zip(plans, pieces, strict=True)
    ]


def _order(plan: SavePlan) -> Iterator[MetadataIndex]:
    """The indices of a plan, each once."""
    yield from dict.fromkeys(item.index for item in plan.items)


def _size_bytes(item: WriteItem) -> int:
    """Of what is no tensor it is not known, but it is something."""
    data = item.tensor_data
    if data is None or data.chunk is None:
        return 1
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


def _cut(item: WriteItem, parts: int) -> list[WriteItem]:
    """An item in so many pieces at most, along the first dimension that is longer than 1."""
    data = item.tensor_data
    if data is None or data.chunk is None or _size_bytes(item) < CUT_BYTES:
        return [item]
    sizes, offsets = data.chunk.sizes, data.chunk.offsets
    along = next(number for number, size in enumerate(sizes) if size > 1)
    pieces = []
    for number in range(min(parts, sizes[along])):
        begin, end = (sizes[along] * n // min(parts, sizes[along]) for n in (number, number + 1))
        at = torch.Size([*offsets[:along], offsets[along] + begin, *offsets[along + 1 :]])
        size = torch.Size([*sizes[:along], end - begin, *sizes[along + 1 :]])
        chunk = ChunkStorageMetadata(offsets=at, sizes=size)
        pieces.append(
            WriteItem(
                index=MetadataIndex(item.index.fqn, at),
                type=WriteItemType.SHARD,
                tensor_data=dataclasses.replace(data, chunk=chunk),
            )
        )
    return pieces


def _within(own: WriteItem, chunk: ChunkStorageMetadata) -> list[int] | None:
    """Where a chunk lies in what this rank has; None where it does not, or is all of it."""
    data = own.tensor_data
    if data is None or data.chunk is None or data.chunk.sizes == chunk.sizes:
        return None
    at = [begin - start for begin, start in zip(chunk.offsets, data.chunk.offsets, strict=True)]
    fits = all(
        0 <= begin and begin + size <= length
        for begin, size, length in zip(at, chunk.sizes, data.chunk.sizes, strict=True)
    )
    return at if fits else None


def _narrowed(tensor: torch.Tensor, at: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    for dimension, (begin, size) in enumerate(zip(at, sizes, strict=True)):
        if size != tensor.shape[dimension]:
            tensor = tensor.narrow(dimension, begin, size)
    return tensor
