"""Boxes of stored slices, read straight into tensors where their memory lies alike, else through a stage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from everstep.chain.reader import Target
from everstep.format.manifest import StoredSlice
from everstep.state.leaves import Fill

STAGE_BYTES = 64 * 1024 * 1024
"""What cannot be read in place is read through so much memory."""

RUN_BYTES = 64 * 1024
"""Shorter runs are not worth a target of their own: what lies between them is read too."""


@dataclass(frozen=True)
class Wanted:
    """A box of a stored slice, and the tensor that takes it, which has its shape; `begin` is where the box
    begins in the slice."""

    part: StoredSlice
    dtype: torch.dtype
    begin: tuple[int, ...]
    tensor: torch.Tensor


def read(fill: Fill, wanted: Sequence[Wanted]) -> list[tuple[int, int, int]]:
    """Read all of them. Blocks until it is there. Raises Damaged: some tensors are overwritten then.

    Returns:
        What was read, as (region, offset, size in bytes).
    """
    direct: list[Target] = []
    staged: list[_Staged] = []
    for one in wanted:
        if not one.tensor.numel():
            continue
        runs = _in_place(one)
        if runs is None:
            staged += _stages(one.tensor, one.begin, one.part.extent, one.dtype, one.part)
        else:
            direct += runs
    touched = [(one.region, one.offset, len(one.buffer)) for one in direct]
    if direct:
        fill((one.region, one.offset, one.buffer) for one in direct)
    for load in _loads(staged):
        touched += [(one.part.region, one.offset, one.size_bytes) for one in load]
        _bring(fill, load)
    return touched


# -- in place ----------------------------------------------------------------------------------------------


def _in_place(one: Wanted) -> list[Target] | None:
    """Where the box's bytes go, run by run; None where they have to take another way."""
    tensor, extent = one.tensor, one.part.extent
    if tensor.device.type != "cpu" or tensor.dtype != one.dtype or tensor.layout is not torch.strided:
        return None
    if tensor.is_conj() or tensor.is_neg():
        return None
    outer = _outer(tensor.shape, extent)
    inner = tensor.shape[outer:]
    run_bytes = math.prod(inner) * one.dtype.itemsize
    runs = math.prod(tensor.shape[:outer])
    if runs > 1 and run_bytes < RUN_BYTES:
        return None
    if not _contiguous(inner, tensor.stride()[outer:]):
        return None
    strides = _strides(extent)
    targets = []
    for index in _indices(tensor.shape[:outer]):
        here = tensor[index] if index else tensor
        begin = sum(
            (at + (index[number] if number < outer else 0)) * strides[number]
            for number, at in enumerate(one.begin)
        )
        targets.append(
            Target(one.part.region, one.part.offset + begin * one.dtype.itemsize, _memory(here, inner))
        )
    return targets


def _outer(shape: Sequence[int], extent: Sequence[int]) -> int:
    """So many of the first dimensions have to be gone through: below, a box lies without a gap."""
    outer = len(shape)
    while outer and shape[outer - 1] == extent[outer - 1]:
        outer -= 1
    return max(outer - 1, 0)


def _contiguous(shape: Sequence[int], stride: Sequence[int]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _strides(extent: Sequence[int]) -> list[int]:
    strides = [1] * len(extent)
    for number in range(len(extent) - 1, 0, -1):
        strides[number - 1] = strides[number] * extent[number]
    return strides


def _indices(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    if not shape:
        yield ()
        return
    for first in range(shape[0]):
        for rest in _indices(shape[1:]):
            yield (first, *rest)


def _memory(tensor: torch.Tensor, shape: Sequence[int]) -> memoryview:
    flat = tensor.detach().as_strided((math.prod(shape),), (1,))
    memory: memoryview = flat.view(torch.uint8).numpy().data
    return memory


# -- through a stage ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Staged:
    """A range of a slice that holds a part of a box, and the tensor that takes that part."""

    tensor: torch.Tensor
    extent: tuple[int, ...]
    dtype: torch.dtype
    part: StoredSlice
    offset: int
    size_bytes: int

    def carry(self, stage: torch.Tensor) -> None:
        flat = stage[: self.size_bytes].view(self.dtype)
        self.tensor.copy_(flat.as_strided(self.tensor.shape, _strides(self.extent)))


def _stages(
    tensor: torch.Tensor,
    begin: tuple[int, ...],
    extent: tuple[int, ...],
    dtype: torch.dtype,
    part: StoredSlice,
    before: int = 0,
) -> Iterator[_Staged]:
    """A box in ranges of `STAGE_BYTES` at most; `before` is so many elements from the slice's beginning."""
    strides = _strides(extent)
    first = before + sum(at * stride for at, stride in zip(begin, strides, strict=True))
    pairs = list(zip(tensor.shape, strides, strict=True))
    inner = sum((size - 1) * stride for size, stride in pairs[1:]) + 1
    row = strides[0] if strides else 1
    rows = (STAGE_BYTES // dtype.itemsize - inner) // row + 1 if row else 1
    if not pairs or tensor.shape[0] <= rows:
        count = inner + ((tensor.shape[0] - 1) * row if pairs else 0)
        offset = part.offset + first * dtype.itemsize
        yield _Staged(tensor, extent, dtype, part, offset, count * dtype.itemsize)
    elif rows >= 1:
        for start in range(0, tensor.shape[0], rows):
            at = (begin[0] + start, *begin[1:])
            yield from _stages(tensor[start : start + rows], at, extent, dtype, part, before)
    else:
        for start in range(tensor.shape[0]):
            under = before + (begin[0] + start) * row
            yield from _stages(tensor[start], begin[1:], extent[1:], dtype, part, under)


def _loads(staged: Sequence[_Staged]) -> Iterator[list[_Staged]]:
    """What goes through the stage together, in the order in which it is stored."""
    load: list[_Staged] = []
    room = STAGE_BYTES
    for one in sorted(staged, key=lambda one: (one.part.region, one.offset)):
        if load and _spaced(one.size_bytes) > room:
            yield load
            load, room = [], STAGE_BYTES
        load.append(one)
        room -= _spaced(one.size_bytes)
    if load:
        yield load


def _spaced(size_bytes: int) -> int:
    return -(-size_bytes // 64) * 64


def _bring(fill: Fill, load: Sequence[_Staged]) -> None:
    stage = torch.empty(sum(_spaced(one.size_bytes) for one in load), dtype=torch.uint8)
    memory: memoryview = stage.numpy().data
    at = 0
    starts, targets = [], []
    for one in load:
        starts.append(at)
        targets.append((one.part.region, one.offset, memory[at : at + one.size_bytes]))
        at += _spaced(one.size_bytes)
    fill(targets)
    with torch.no_grad():
        for start, one in zip(starts, load, strict=True):
            one.carry(stage[start:])
