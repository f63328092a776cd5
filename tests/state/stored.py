"""Snapshots of objects without a chain: a manifest, and its bytes in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from everstep.errors import Damaged
from everstep.format import values
from everstep.format.chunk import digest, grid
from everstep.format.joining import join
from everstep.format.layout import lay_out
from everstep.format.manifest import (
    SEVERAL,
    Manifest,
    Place,
    StoredChunk,
    StoredLeaf,
    StoredRegion,
    StoredSlice,
    decode,
    encode,
)
from everstep.state.collecting import Collected, Collector
from everstep.state.tree import Tensorlike

GRID_BYTES = 4096


@dataclass
class Stored:
    """`fill` reads as a restore wants it, and notes what: (region, offset, size). `fails_at` is the number of
    the call that finds damage."""

    manifest: Manifest
    regions: list[bytes]
    reads: list[tuple[int, int, int]] = field(default_factory=list)
    calls: int = 0
    fails_at: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    on_fill: Callable[[], object] = lambda: None

    def fill(self, targets: Iterable[tuple[int, int, memoryview]]) -> None:
        wanted = list(targets)
        with self.lock:
            self.calls += 1
            self.reads += [(region, offset, len(buffer)) for region, offset, buffer in wanted]
            fails = self.calls == self.fails_at
        self.on_fill()
        if fails:
            raise Damaged("a chunk is not the one that was written")
        for region, offset, buffer in wanted:
            assert offset + len(buffer) <= len(self.regions[region])
            buffer[:] = self.regions[region][offset : offset + len(buffer)]

    @property
    def read_bytes(self) -> int:
        return sum(size for _, _, size in self.reads)


def stored(objects: Mapping[str, object], grid_bytes: int = GRID_BYTES) -> Stored:
    """A snapshot of these objects at step 7."""
    collected = Collector().collect(objects, position=None, progress={"step": 7, "epoch": 1})
    return part_of(collected, grid_bytes=grid_bytes)


def part_of(collected: Collected, rank: int = 0, ranks: int = 1, grid_bytes: int = GRID_BYTES) -> Stored:
    """What a rank stores of what it has collected."""
    layout = lay_out(collected.slices(collected.rows()))
    sources = list(collected.leaves.values())
    regions = [bytearray(region.size_bytes) for region in layout.regions]
    for one, source, (number, offset) in zip(layout.slices, sources, layout.places, strict=True):
        regions[number][offset : offset + one.size_bytes] = bytes_of(source)
    chunks: dict[str, StoredChunk] = {}
    numbers: dict[str, int] = {}
    made = []
    for region in regions:
        of_region = []
        for start, size in grid(len(region), grid_bytes):
            chunk = StoredChunk(digest(region[start : start + size]), size)
            chunks.setdefault(chunk.digest, chunk)
            of_region.append(numbers.setdefault(chunk.digest, len(numbers)))
        made.append(StoredRegion(len(region), tuple(of_region)))
    slices: dict[str, list[StoredSlice]] = {}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for one, place in zip(layout.slices, layout.places, strict=True):
        kinds[one.name] = one.dtype, one.shape
        slices.setdefault(one.name, []).append(StoredSlice(one.at, one.extent, *place))
    leaves = tuple(
        StoredLeaf(name, *kinds[name], tuple(sorted(found, key=lambda place: place.box)))
        for name, found in slices.items()
    )
    manifest = Manifest(
        format=1 if ranks == 1 else SEVERAL,
        grid_bytes=grid_bytes,
        leaves=leaves,
        regions=tuple(made),
        chunks=tuple(chunks.values()),
        places=tuple(Place("0" * 64, 0, one.size_bytes) for one in chunks.values()),
        packs={"0" * 64: 1 << 30} if ranks > 1 else {},
        values=values.encode(collected.tree),
        state="0" * 64,
        rank=rank,
        ranks=ranks,
    )
    return Stored(decode(encode(manifest)) if ranks > 1 else manifest, list(map(bytes, regions)))


def joined(parts: Sequence[Stored]) -> Stored:
    """A snapshot of several ranks."""
    return Stored(join([one.manifest for one in parts]), [region for one in parts for region in one.regions])


def bytes_of(tensor: Tensorlike) -> bytes:
    if isinstance(tensor, np.ndarray):
        return tensor.tobytes()
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bits that the dtype can have."""
    kind: torch.dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(seed)
    count = int(np.prod(shape, dtype=np.int64))
    high = 2 if dtype == "bool" else 256
    raw = torch.randint(0, high, (count * kind.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(kind).view(shape) if count else torch.empty(shape, dtype=kind)
