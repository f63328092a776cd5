"""From other programs' files into memory: any range of a tensor's bytes, whichever parts it is in and in
whatever order they lie.
"""

from __future__ import annotations

import math
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from everstep.errors import Damaged
from everstep.format.layout import item_bytes
from everstep.integrations.checkpoint import Box, Source, Tensor, common, contiguous

_OPEN_FILES = 64

_WORDS = {1: "u1", 2: "u2", 4: "u4", 8: "u8"}


class Files:
    """Reads tensors out of files, of which a few are open at a time. To be closed."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, BinaryIO] = OrderedDict()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def fill(self, memory: memoryview, tensor: Tensor, begin: int) -> None:
        """Fill memory with the tensor's bytes, laid out contiguously, from byte `begin` on. Blocks on I/O.

        What lies in the order it is wanted in is read straight into the memory. Else the part of the file is
        mapped meanwhile: its pages are the system's, which takes them back when it needs them.

        Raises:
            Damaged: a file is shorter than it was, or cannot be read any more.
        """
        size = item_bytes(tensor.dtype)
        (first, *others) = tensor.boxes
        if not others and first.source.strides == contiguous(tensor.shape):
            self._read(first.source, begin, memory)
            return
        if begin % size or len(memory) % size:
            raise ValueError(f"a range of a tensor cuts its elements of {size} bytes")
        elements = np.frombuffer(memory, _word(size))
        done = 0
        for at, extent in ranges(tensor.shape, begin // size, (begin + len(memory)) // size):
            count = math.prod(extent)
            here = Box(at, extent, first.source)
            target = elements[done : done + count].reshape(extent)
            for box in tensor.boxes:
                if common(box, here):
                    self._copy(target, here, box, size)
            done += count

    def _copy(self, target: np.ndarray[Any, Any], here: Box, box: Box, size: int) -> None:
        """Copy what a box of a file and a box of memory have in common."""
        low = [max(a, b) for a, b in zip(here.at, box.at, strict=True)]
        high = [
            min(a + n, b + m) for a, n, b, m in zip(here.at, here.extent, box.at, box.extent, strict=True)
        ]
        into = target[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, here.at, strict=True))]
        strides = box.source.strides
        skipped = sum((a - o) * s for a, o, s in zip(low, box.at, strides, strict=True))
        source = Source(box.source.path, box.source.offset + skipped * size, strides, box.source.data)
        if into.flags.c_contiguous and _is_contiguous(into.shape, strides):
            self._read(source, 0, into.reshape(-1).view("u1").data)
            return
        reach = sum((n - 1) * s for n, s in zip(into.shape, strides, strict=True)) + 1
        if source.path is None:
            data = np.frombuffer(source.data, "u1")[source.offset :]
            _copy_strided(into, data, 0, strides, size)
            return
        aligned = source.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        ahead = source.offset - aligned
        try:
            mapped = mmap.mmap(
                self._file(source.path).fileno(),
                ahead + reach * size,
                access=mmap.ACCESS_READ,
                offset=aligned,
            )
        except (OSError, ValueError) as error:
            raise _shorter(source.path) from error
        _copy_strided(into, np.frombuffer(mapped, "u1"), ahead, strides, size)

    def _read(self, source: Source, begin: int, memory: memoryview) -> None:
        if source.path is None:
            at = source.offset + begin
            memory[:] = source.data[at : at + len(memory)]
            return
        file, at = self._file(source.path), 0
        while at < len(memory):
            try:
                count = os.preadv(file.fileno(), [memory[at:]], source.offset + begin + at)
            except OSError as error:
                raise _shorter(source.path) from error
            if not count:
                raise _shorter(source.path)
            at += count

    def _file(self, path: Path) -> BinaryIO:
        file = self._open.pop(path, None)
        if file is None:
            while len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            try:
                file = path.open("rb", buffering=0)
            except OSError as error:
                raise _shorter(path) from error
        assert file is not None
        self._open[path] = file
        return file


def _copy_strided(
    into: np.ndarray[Any, Any], data: np.ndarray[Any, Any], offset: int, strides: tuple[int, ...], size: int
) -> None:
    """numpy itself holds what the strides reach against the data."""
    in_bytes = tuple(one * size for one in strides)
    into[...] = np.ndarray(into.shape, _word(size), data.data, offset, in_bytes)


def _word(size: int) -> str:
    return _WORDS.get(size, f"V{size}")


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    wanted = contiguous(shape)
    return all(n == 1 or a == b for n, a, b in zip(shape, strides, wanted, strict=True))


def _shorter(path: Path) -> Damaged:
    return Damaged(
        f"{path} has changed while it was read, or cannot be read any more",
        kept="nothing was imported",
        next="the same again, when nothing writes to it",
    )


def ranges(shape: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The boxes (begin, extent) that elements `begin` to `end` of a tensor are, in their order."""
    if begin >= end:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = begin // row, (end - 1) // row
    if len(shape) == 1:
        yield (begin,), (end - begin,)
    elif first == last:
        yield from _within(shape, first, begin - first * row, end - first * row)
    else:
        if begin % row:
            yield from _within(shape, first, begin % row, row)
            first += 1
        whole = end // row
        if whole > first:
            yield (first, *(0,) * (len(shape) - 1)), (whole - first, *shape[1:])
        if end % row:
            yield from _within(shape, whole, 0, end % row)


def _within(
    shape: tuple[int, ...], row: int, begin: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for at, extent in ranges(shape[1:], begin, end):
        yield (row, *at), (1, *extent)
