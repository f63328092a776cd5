"""From what a plan has a rank write to waves of memory: a layout, and the tensors' bytes in it, a part after
the other, so that saving takes little memory beside the tensors themselves."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from everstep.chain.packing import Wave
from everstep.errors import Mismatch
from everstep.format.layout import Layout, Slice
from everstep.state.tree import Tensorlike, flatten, torch_dtype

WAVE_BYTES = 256 * 1024 * 1024
"""So much memory is taken, and less where there is less to write."""


@dataclass(frozen=True)
class Source:
    """A slice, and where its tensor comes from; on whatever device, in whatever order."""

    slice: Slice
    resolve: Callable[[], Tensorlike]


class Waves:
    """The waves of a layout; each is filled when it is asked for, into the same memory.

    Args:
        layout: of the slices of `sources`, in their order.
    """

    def __init__(
        self, layout: Layout, sources: Sequence[Source], grid_bytes: int, limit_bytes: int = WAVE_BYTES
    ) -> None:
        self._ranges = layout.waves(limit_bytes, grid_bytes)
        starts = (layout.regions[region].offset + offset for region, offset in layout.places)
        pairs = zip(starts, sources, strict=True)
        self._placed = sorted((pair for pair in pairs if pair[1].slice.size_bytes), key=lambda pair: pair[0])
        self._cut: tuple[Source, torch.Tensor] | None = None

    def __iter__(self) -> Iterator[Wave]:
        if not self._ranges:
            # Of nothing, too, it is to be told that it is there.
            yield Wave(0, memoryview(bytearray()))
            return
        size = max(end - begin for begin, end in self._ranges)
        memory = memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        bytes_of = torch.frombuffer(memory, dtype=torch.uint8)
        next_one = 0
        for begin, end in self._ranges:
            next_one = self._fill(bytes_of[: end - begin], begin, end, next_one)
            yield Wave(begin, memory[: end - begin])
        self._cut = None

    def _fill(self, memory: torch.Tensor, begin: int, end: int, number: int) -> int:
        """Fill a wave from the source of this number on; returns the first of the next wave."""
        filled = 0
        with torch.no_grad():
            while number < len(self._placed):
                start, source = self._placed[number]
                if start >= end:
                    break
                first, last = max(start, begin), min(start + source.slice.size_bytes, end)
                memory[filled : first - begin].zero_()
                self._copy(memory[first - begin : last - begin], source, first - start, last - start)
                filled = last - begin
                if start + source.slice.size_bytes > end:
                    break
                number += 1
            memory[filled:].zero_()
        return number

    def _copy(self, memory: torch.Tensor, source: Source, begin: int, end: int) -> None:
        dtype = _dtype_of(source)
        if end - begin == source.slice.size_bytes:
            tensor = _resolved(source)
            memory.view(dtype).view(tensor.shape).copy_(tensor)
            return
        # A large one that does not fit: it is looked up, and brought in order, once for all of its waves.
        if self._cut is None or self._cut[0] is not source:
            self._cut = (source, _resolved(source).contiguous().view(-1))
        flat = self._cut[1]
        memory.view(dtype).copy_(flat[begin // dtype.itemsize : end // dtype.itemsize])


def _dtype_of(source: Source) -> torch.dtype:
    """Arrays are bytes."""
    name = source.slice.dtype
    return torch.uint8 if name.startswith("numpy:") else torch_dtype(name)


def _resolved(source: Source) -> torch.Tensor:
    """Raises Mismatch where a tensor is not what the plan says, and copying it would lose something."""
    resolved = source.resolve()
    if isinstance(resolved, np.ndarray):
        return torch.from_numpy(np.require(resolved, requirements=["C", "W"]).reshape(-1).view(np.uint8))
    # Refused by name where it is nothing to store: sparse, or without data.
    flatten(source.slice.name, resolved, {})
    tensor = resolved.detach()
    dtype, extent = _dtype_of(source), source.slice.extent
    if tuple(tensor.shape) != extent:
        raise Mismatch(
            f"{source.slice.name} has shape {list(tensor.shape)}, by its planner's plan {list(extent)}",
            kept="no snapshot was taken",
            next="everstep.dcp.SavePlanner(), or a planner whose plan and data agree",
        )
    if tensor.dtype != dtype and torch.promote_types(tensor.dtype, dtype) != dtype:
        raise Mismatch(
            f"{source.slice.name} is {tensor.dtype}, by its planner's plan {dtype}, which would lose bits",
            kept="no snapshot was taken",
            next="set tensor_data.properties.dtype in the planner's plan",
        )
    return tensor
