"""Where leaves lie: slices in regions, regions in an arena.

A *region* is contiguous bytes that are cut into chunks on the grid. A large slice has a region of its own;
small ones share a region with their like, so that thousands of tiny tensors cost a few chunks. A `Layout` is
all that capture (which has tensors) and the keeper (which has none) need to agree on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from everstep.errors import Unsupported
from everstep.format.chunk import MAX_WORD_BYTES, aligned

SMALL_BYTES = 1024 * 1024
"""Slices below this size share a region."""

SHARED_BYTES = 64 * 1024 * 1024
"""A shared region grows to this size, then the next one begins: a region of several slices is captured in one
piece."""

SLICE_ALIGNMENT_BYTES = 64
"""Slices start on this boundary in a shared region, so that any dtype can be viewed in place."""

Kin: TypeAlias = Literal["frozen", "buffer", "moving"]
"""Which slices are likely to change together, and so may share a chunk."""

_KINS: tuple[Kin, ...] = ("frozen", "buffer", "moving")

_ITEM_BYTES = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2,
    "uint32": 4, "int32": 4, "uint64": 8, "int64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex32": 4, "complex64": 8, "complex128": 16,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
}  # fmt: skip
_NUMPY_DTYPE = re.compile(
    r"numpy:[<>|=](?:"
    r"b(1)|[iu]([1248])|f(2|4|8|12|16)|c(8|16|24|32)|S(\d{1,6})|U(\d{1,6})"
    r"|[mM](8)(?:\[\d{0,6}(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?)"
)


def item_bytes(dtype: str) -> int:
    """Size in bytes of one element.

    Args:
        dtype: torch's name without the module (`bfloat16`), or `numpy:` and numpy's own notation
            (`numpy:<f8`).

    Raises:
        Unsupported: the name is not known.
    """
    if dtype in _ITEM_BYTES:
        return _ITEM_BYTES[dtype]
    match = _NUMPY_DTYPE.fullmatch(dtype)
    if not match:
        raise Unsupported(f"the dtype {dtype[:60]!r} cannot be stored")
    if match[6]:
        return 4 * int(match[6])
    return int(next(size for size in match.groups() if size))


Box: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""(at, extent): so many elements from so many on, in each dimension of a leaf."""


@dataclass(frozen=True)
class Slice:
    """A box of a leaf that a rank stores; of one leaf there may be several.

    `shape` is the whole leaf's; `at` and `extent` say where the box lies in it and how large it is (for a
    whole leaf: zeros and `shape`). `alias` names the leaf whose bytes these are too (tied weights): those of
    its slice with the same box.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    at: tuple[int, ...]
    extent: tuple[int, ...]
    kin: Kin = "moving"
    alias: str | None = None

    @cached_property
    def size_bytes(self) -> int:
        return math.prod(self.extent) * item_bytes(self.dtype)

    @property
    def box(self) -> Box:
        return self.at, self.extent


@dataclass(frozen=True)
class Region:
    """`size_bytes` contiguous bytes at `offset` (a multiple of 4096) of the arena; what follows up to the
    next multiple is zero. `word_bytes` is the size of the elements in it, for encodings that shuffle (1
    where they are larger than a word can be)."""

    offset: int
    size_bytes: int
    word_bytes: int
    kin: Kin


@dataclass(frozen=True)
class Layout:
    """`places[i]` is the (region, offset in the region) of `slices[i]`."""

    slices: tuple[Slice, ...]
    places: tuple[tuple[int, int], ...]
    regions: tuple[Region, ...]

    @cached_property
    def arena_bytes(self) -> int:
        """Size of an arena that holds it all, a multiple of 4096."""
        return sum(aligned(region.size_bytes) for region in self.regions)

    @cached_property
    def logical_bytes(self) -> int:
        """Size of the state, each byte counted once (with the few between small slices)."""
        return sum(region.size_bytes for region in self.regions)

    def waves(self, limit_bytes: int, grid_bytes: int) -> list[tuple[int, int]]:
        """The (begin, end) of ranges of the arena, one after the other, of `limit_bytes` at most each.

        They part between regions, or inside a region of one slice at a multiple of the grid, so that each
        range can be digested by itself.

        Raises:
            Unsupported: a chunk or a region of several slices is larger than the limit.
        """
        waves: list[tuple[int, int]] = []
        begin = end = 0
        for start, size_bytes in self._pieces(grid_bytes):
            if size_bytes > limit_bytes:
                needed = max(size for _, size in self._pieces(grid_bytes))
                raise Unsupported(
                    f"a snapshot in waves of {limit_bytes:,} bytes cannot be taken: "
                    f"this state needs waves of {needed:,}",
                    kept="nothing was touched",
                    next=f"max_arena_bytes={2 * needed:,} or more".replace(",", "_"),
                )
            if start + size_bytes - begin > limit_bytes:
                waves.append((begin, end))
                begin = start
            end = start + size_bytes
        return [*waves, (begin, end)] if end > begin else waves

    def _pieces(self, grid_bytes: int) -> Iterator[tuple[int, int]]:
        """What must not be cut: the begin and size of each, padding included."""
        whole = {
            region
            for one, (region, _) in zip(self.slices, self.places, strict=True)
            if one.size_bytes and one.size_bytes == self.regions[region].size_bytes
        }
        for number, region in enumerate(self.regions):
            padded = aligned(region.size_bytes)
            if number not in whole:
                yield region.offset, padded
                continue
            for start in range(0, region.size_bytes, grid_bytes):
                last = start + grid_bytes >= region.size_bytes
                yield region.offset + start, (padded - start if last else grid_bytes)


def lay_out(slices: Sequence[Slice]) -> Layout:
    """Give each slice its place. The same slices in the same order always give the same layout.

    Raises:
        KeyError: there is no slice with the bytes of an alias.
        ValueError: a box of a leaf is there twice.
    """
    regions: list[Region] = []
    places: dict[tuple[str, Box], tuple[int, int]] = {}
    end = 0

    def add_region(size_bytes: int, word_bytes: int, kin: Kin) -> int:
        nonlocal end
        regions.append(Region(end, size_bytes, word_bytes, kin))
        end += aligned(size_bytes)
        return len(regions) - 1

    for kin in _KINS:
        kindred = [one for one in slices if one.kin == kin and one.alias is None]
        for one in kindred:
            if one.size_bytes >= SMALL_BYTES:
                places[one.name, one.box] = (add_region(one.size_bytes, _word_bytes(one.dtype), kin), 0)
        small = [one for one in kindred if one.size_bytes < SMALL_BYTES]
        offset = 0
        for one in small:
            size_bytes = -(-one.size_bytes // SLICE_ALIGNMENT_BYTES) * SLICE_ALIGNMENT_BYTES
            if offset + size_bytes > SHARED_BYTES:
                add_region(offset, 4, kin)
                offset = 0
            places[one.name, one.box] = (len(regions), offset)
            offset += size_bytes
        if small:
            add_region(offset, 4, kin)
    if len({(one.name, one.box) for one in slices}) < len(slices):
        raise ValueError("a box of a leaf is there twice")
    ordered = tuple(places[one.alias or one.name, one.box] for one in slices)
    return Layout(tuple(slices), ordered, tuple(regions))


def _word_bytes(dtype: str) -> int:
    size_bytes = item_bytes(dtype)
    return size_bytes if size_bytes <= MAX_WORD_BYTES else 1
