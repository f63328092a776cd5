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

from everstep.format.layout import Box
from everstep.integrations.dcp.names import Path
from everstep.state import spreading


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
            # Older releases of torch have no such method, and no cache: what is spread has no duplicates.
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
    ranks: dict[MetadataIndex, list[int]] = defaultdict(list)
    found: dict[MetadataIndex, WriteItem] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            first = found.setdefault(item.index, item)
            # Of what has only the name in common one is written, as by torch's planner: the lowest rank's.
            same = (_box(first), _item_bytes(first)) == (_box(item), _item_bytes(item))
            if same and rank not in ranks[item.index]:
                ranks[item.index].append(rank)
    groups: dict[tuple[int, ...], list[WriteItem]] = defaultdict(list)
    for index, mine in ranks.items():
        groups[tuple(mine)].append(found[index])
    sizes = {holders: sum(map(_size_bytes, shared)) for holders, shared in groups.items()}
    alone = {holders[0]: float(size) for holders, size in sizes.items() if len(holders) == 1}
    several = {holders: size for holders, size in sizes.items() if len(holders) > 1}
    shares = spreading.level(alone, several)
    pieces: list[dict[MetadataIndex, list[WriteItem]]] = [defaultdict(list) for _ in plans]
    for holders, shared in groups.items():
        for rank, index, piece in _dealt(holders, shared, shares.get(holders, {})):
            pieces[rank][index].append(piece)
    return [
        dataclasses.replace(plan, items=[one for index in _order(plan) for one in its.get(index, ())])
        for plan, its in zip(plans, pieces, strict=True)
    ]


def _dealt(
    holders: tuple[int, ...], items: Sequence[WriteItem], shares: dict[int, float]
) -> Iterator[tuple[int, MetadataIndex, WriteItem]]:
    """Who of the holders writes what of items that all of them have: (rank, the item's index, a piece)."""
    boxes = [(_box(item), _item_bytes(item)) for item in items]
    if len(holders) == 1:
        parts = [[(holders[0], box)] for box, _ in boxes]
    else:
        parts = spreading.spread(boxes, shares)
    for item, (whole, _), own in zip(items, boxes, parts, strict=True):
        for rank, box in own:
            yield rank, item.index, item if box == whole else _piece(item, box)


def _order(plan: SavePlan) -> Iterator[MetadataIndex]:
    """The indices of a plan, each once."""
    yield from dict.fromkeys(item.index for item in plan.items)


def _box(item: WriteItem) -> Box:
    """What is no tensor is something whole, of which the size is not known."""
    data = item.tensor_data
    return ((), ()) if data is None else (tuple(data.chunk.offsets), tuple(data.chunk.sizes))


def _item_bytes(item: WriteItem) -> int:
    return 1 if item.tensor_data is None else item.tensor_data.properties.dtype.itemsize


def _size_bytes(item: WriteItem) -> int:
    return math.prod(_box(item)[1]) * _item_bytes(item)


def _piece(item: WriteItem, box: Box) -> WriteItem:
    data = item.tensor_data
    assert data is not None
    at, extent = map(torch.Size, box)
    return WriteItem(
        index=MetadataIndex(item.index.fqn, at),
        type=WriteItemType.SHARD,
        tensor_data=dataclasses.replace(data, chunk=ChunkStorageMetadata(offsets=at, sizes=extent)),
    )


def _within(own: WriteItem, chunk: ChunkStorageMetadata) -> list[int] | None:
    """Where a chunk lies in what this rank has; None where it does not, or is all of it."""
    data = own.tensor_data
    if data is None or data.chunk is None or data.chunk.sizes == chunk.sizes:
        return None
    at = [begin - start for begin, start in zip(chunk.offsets, data.chunk.offsets, strict=True)]
    fits = all(
        begin >= 0 and begin + size <= length
        for begin, size, length in zip(at, chunk.sizes, data.chunk.sizes, strict=True)
    )
    return at if fits else None


def _narrowed(tensor: torch.Tensor, at: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    for dimension, (begin, size) in enumerate(zip(at, sizes, strict=True)):
        if size != tensor.shape[dimension]:
            tensor = tensor.narrow(dimension, begin, size)
    return tensor
