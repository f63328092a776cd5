"""From waves of memory to packs in a store: digest, leave out what is there already, encode, pack, put.

Chunks are digested and encoded ahead in a few lanes, and taken in their own order: the same state gives the
same packs, but for how its chunks are encoded. Two are put while the next is filled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from everstep.chain.common import Common, Found
from everstep.chain.encoding import Base, Encoder, Fresh, Stored, base_of
from everstep.chain.lanes import AT_ONCE, Air, Lanes, Putter
from everstep.format import pack
from everstep.format.chunk import ALIGNMENT_BYTES, Encoding, aligned, digest, grid
from everstep.format.layout import Layout, Region
from everstep.format.manifest import Manifest, Place, StoredChunk

PACK_BYTES = 64 * 1024 * 1024
"""A pack is closed when it has grown to this size."""

HELD_BYTES = 32 * 1024 * 1024
"""Or when it holds so much memory of its own, for encoded chunks."""

PACKS_AT_ONCE = AT_ONCE + 2
"""One is filled, one waits, the others are put."""

LANES_FROM_BYTES = 16 * 1024 * 1024
"""Smaller states are digested in the calling thread before another has come to work."""

Extent: TypeAlias = tuple[int, int, int]
"""A slice's region, its offset there, and its size."""


@dataclass(frozen=True)
class Wave:
    """A range of a layout's address space, and the memory in which its bytes lie.

    `memory` starts with the byte at `begin`. Waves follow one another without a gap, and cut no chunk and no
    region of several slices. `unchanged` are the numbers of regions whose bytes are the same as when this
    memory was last handed over, with the whole of the same layout; a claim about any other time breaks the
    snapshot. It is no promise: such regions are still read where they are needed.

    A wave may be handed over while it is still being filled: `arrived` is called before the bytes up to an
    address are looked at, and blocks until they are there; what it raises ends the snapshot. `is_full` says
    whether it will not block any more.
    """

    begin: int
    memory: memoryview
    unchanged: frozenset[int] = frozenset()
    arrived: Callable[[int], None] = field(default=lambda end: None, compare=False)
    is_full: Callable[[], bool] = field(default=lambda: True, compare=False)


@dataclass
class Draft:
    """A snapshot under way. `digests` are those of each region's chunks, `slices` those of slices that share
    a region with others; `made` names the packs that were put for it, and were not there before; times are in
    seconds."""

    layout: Layout
    digests: list[list[str]] = field(default_factory=list)
    slices: dict[Extent, list[str]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    packs: dict[str, int] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    stored: list[int] = field(default_factory=list)
    seen_bytes: int = 0
    new_bytes: int = 0
    digest_s: float = 0.0
    encode_s: float = 0.0
    write_s: float = 0.0
    cpu_s: float = 0.0

    def found(self, name: str) -> Found:
        """A chunk that was put, as another writer points to it."""
        line = []
        packs = {}
        while name:
            place = self.places[name]
            line.append((StoredChunk(name, self.sizes[name]), place))
            packs[place.pack] = self.packs[place.pack]
            name = place.base
        return Found(tuple(line), packs)

    def costs(self) -> dict[str, float]:
        """In milliseconds: what the threads computed to `digest` and to `encode` (choosing how included), the
        time in which packs were being put (`write`), and all that the writer's threads computed
        (`cpu_writer`)."""
        seconds = {
            "digest": self.digest_s,
            "encode": self.encode_s,
            "write": self.write_s,
            "cpu_writer": self.cpu_s,
        }
        return {name: cost * 1e3 for name, cost in seconds.items()}


@dataclass(frozen=True)
class _Chunk:
    """A chunk: its bytes, and its place in its region. `padded` goes on with zeros up to the alignment where
    those are at hand; `claimed` is its digest if it is said not to have changed, or ""."""

    raw: memoryview
    padded: memoryview
    region: int
    offset: int
    word_bytes: int
    claimed: str


@dataclass(frozen=True)
class _Digested:
    """A chunk and its name. `stored` is None where it is to be found elsewhere: in an earlier snapshot, or
    `common`, with another writer of this process."""

    chunk: _Chunk
    name: str
    stored: Stored | None
    digest_s: float
    encode_s: float
    common: bool = False


@dataclass(frozen=True)
class Before:
    """What is known of earlier states: manifests whose chunks are good, newest last; digests by region of
    what this memory held before, if it is known; and of what other memory may still hold, with its
    manifest."""

    recent: Sequence[Manifest]
    here: list[list[str]] | None = None
    there: tuple[Manifest, list[list[str]], memoryview] | None = None


@dataclass(frozen=True)
class Shares:
    """What a writer has for itself where several of one process store at the same instant.

    Attributes:
        lanes: how many threads may digest and encode, the calling one included.
        held_bytes: what a pack may hold of encoded chunks.
        core: to be had while a thread computes.
        air: where packs are put.
        common: the chunks of all of them.
        done: to be called when all is stored, or has failed.
    """

    lanes: int
    held_bytes: int = HELD_BYTES
    core: Callable[[], AbstractContextManager[None]] = nullcontext
    air: Air = field(default_factory=Air)
    common: Common | None = None
    done: Callable[[], None] = lambda: None


class Packing:
    """Stores the chunks of one state.

    Args:
        draft: takes the facts.
        shared: the slices of each region that is shared, by its number.
        put: stores a pack and adds its facts to the draft.
        clock: measures how long packs take to be put.
        thread_clock: the calling thread's own, measures digests.
        shares: what is this writer's.
    """

    def __init__(
        self,
        draft: Draft,
        shared: dict[int, list[Extent]],
        before: Before,
        encoder: Encoder,
        put: Callable[[pack.Builder], None],
        grid_bytes: int,
        clock: Callable[[], float],
        thread_clock: Callable[[], float],
        shares: Shares,
    ) -> None:
        self._draft = draft
        self._shared = shared
        self._before = before
        self._encoder = encoder
        self._grid_bytes = grid_bytes
        self._clock = thread_clock
        self._builder = pack.Builder()
        self._held_bytes = 0
        self._frozen = False
        self._region = self._offset = 0
        self._putter = putter = Putter(put, clock, encoder.encodings.put, shares.air)
        self._lanes = Lanes(shares.lanes, lambda: draft.seen_bytes >= LANES_FROM_BYTES and putter.idle)
        self._shares = shares
        self._common = shares.common
        self._claims: Callable[[], bool] = lambda: False
        """Whether others may count on what this one is about to store."""
        self._elsewhere: list[_Digested] = []

    def store(self, waves: Iterable[Wave]) -> None:
        """Blocks until all is put; then, and when it fails, no memory of the waves is used any more."""
        try:
            end = 0
            for wave in waves:
                end = self._store_wave(wave, end)
            if end < self._draft.layout.arena_bytes:
                raise ValueError(f"waves end at {end} of {self._draft.layout.arena_bytes} bytes")
        finally:
            self._lanes.close()
            self._putter.close()
            if self._common is not None:
                self._common.leave(self)
            self._shares.done()
            self._draft.write_s = self._putter.busy_s
            self._draft.cpu_s += self._lanes.cpu_s + self._putter.cpu_s

    def _store_wave(self, wave: Wave, begin: int) -> int:
        """Returns where the next one begins."""
        if wave.begin != begin:
            raise ValueError(f"a wave begins at {wave.begin} where the one before ended at {begin}")
        # Who waits for the next wave, or for this one to be filled, is not to be waited for.
        whole = len(wave.memory) >= self._draft.layout.arena_bytes
        self._claims = wave.is_full if whole else lambda: False
        calls = (partial(self._digest, chunk) for chunk in self._chunks(wave))
        for digested in self._lanes.results(calls):
            self._take(digested)
        self._close_pack(last=True)
        self._putter.drain()
        while self._elsewhere:
            self._find_elsewhere()
        return min(begin + len(wave.memory), self._draft.layout.arena_bytes)

    # -- in the lanes -------------------------------------------------------------------------------------

    def _digest(self, chunk: _Chunk) -> _Digested:
        with self._shares.core():
            return self._digested(chunk)

    def _digested(self, chunk: _Chunk) -> _Digested:
        if chunk.claimed and self._manifest_with(chunk.claimed):
            return _Digested(chunk, chunk.claimed, None, 0.0, 0.0)
        begun = self._clock()
        name = digest(chunk.raw)
        digested = self._clock()
        self._encoder.encodings.digested(len(chunk.raw), digested - begun)
        if name in self._draft.sizes or self._manifest_with(name):
            return _Digested(chunk, name, None, digested - begun, 0.0)
        if self._is_common(name):
            return _Digested(chunk, name, None, digested - begun, 0.0, common=True)
        fresh = Fresh(chunk.raw, chunk.region, chunk.word_bytes, self._base(chunk))
        stored = self._encoder.encode(fresh, self._lanes.limit)
        return _Digested(chunk, name, stored, digested - begun, self._clock() - digested)

    def _is_common(self, name: str) -> bool:
        """Whether another writer of this process stores it, or has."""
        if self._common is None:
            return False
        if self._claims():
            return not self._common.claim(name, self)
        return self._common.find(name) is not None

    def _base(self, chunk: _Chunk) -> Base | None:
        there = self._before.there
        if there is None:
            return None
        manifest, digests, memory = there
        at = self._draft.layout.regions[chunk.region].offset + chunk.offset
        name = digests[chunk.region][chunk.offset // self._grid_bytes]
        return base_of(manifest, name, memory[at : at + len(chunk.raw)])

    # -- in the calling thread ----------------------------------------------------------------------------

    def _chunks(self, wave: Wave) -> Iterator[_Chunk]:
        """The chunks that lie in a wave; and on the way, digests of the slices in shared regions."""
        layout = self._draft.layout
        end = wave.begin + len(wave.memory)
        while self._region < len(layout.regions):
            region = layout.regions[self._region]
            if self._offset == 0:
                if region.offset >= end and region.size_bytes:
                    return
                self._draft.digests.append([])
                self._digest_slices(region, wave)
            for start, size in grid(region.size_bytes, self._grid_bytes)[self._offset // self._grid_bytes :]:
                if region.offset + start >= end:
                    return
                yield self._chunk(region, start, size, wave)
                self._offset = start + size
            self._region, self._offset = self._region + 1, 0

    def _chunk(self, region: Region, start: int, size: int, wave: Wave) -> _Chunk:
        raw = _view(wave, region.offset + start, size)
        # Only a region's end is followed by zeros; they fill its last page, which a chunk may share.
        padded = raw
        if start + size == region.size_bytes and start % ALIGNMENT_BYTES == 0:
            padded = _view(wave, region.offset + start, aligned(size))
        claimed = ""
        if self._before.here is not None and self._region in wave.unchanged:
            claimed = self._before.here[self._region][start // self._grid_bytes]
        self._draft.seen_bytes += size
        return _Chunk(raw, padded, self._region, start, region.word_bytes, claimed)

    def _digest_slices(self, region: Region, wave: Wave) -> None:
        for place in self._shared.get(self._region, ()):
            _, offset, size_bytes = place
            data = _view(wave, region.offset + offset, size_bytes)
            self._draft.slices[place] = slice_digests(data, self._grid_bytes)

    def _take(self, digested: _Digested) -> None:
        """A chunk's turn: point to where it is already, or add it to the pack that is being filled."""
        draft, chunk, name = self._draft, digested.chunk, digested.name
        draft.digest_s += digested.digest_s
        draft.encode_s += digested.encode_s
        frozen = draft.layout.regions[chunk.region].kin == "frozen"
        if self._frozen and not frozen:
            # Frozen parameters have packs of their own, which live on whole when the rest is pruned.
            self._close_pack()
        self._frozen = frozen
        draft.digests[chunk.region].append(name)
        self._store(digested)

    def _store(self, digested: _Digested) -> None:
        draft, chunk, name, stored = self._draft, digested.chunk, digested.name, digested.stored
        if name in draft.sizes:
            return
        if digested.common:
            self._elsewhere.append(digested)
            return
        manifest = self._manifest_with(name)
        if manifest is not None:
            self._place(manifest, name)
            return
        assert stored is not None
        draft.sizes[name] = len(chunk.raw)
        draft.new_bytes += len(chunk.raw)
        if stored.base:
            assert self._before.there is not None
            self._place(self._before.there[0], stored.base)
        self._add(chunk, name, stored)

    def _add(self, chunk: _Chunk, name: str, stored: Stored) -> None:
        size = len(chunk.raw)
        if stored.data is None:
            self._builder.add(name, size, chunk.padded, size, Encoding.RAW, "")
        else:
            self._builder.add(name, size, stored.data, len(stored.data), stored.encoding, stored.base)
            self._held_bytes += len(stored.data)
        if self._builder.end >= PACK_BYTES or self._held_bytes >= self._shares.held_bytes:
            self._close_pack()

    def _find_elsewhere(self) -> None:
        """Point to the chunks that other writers have stored, which may take them a while; store those that
        they could not, after all. All that this one has claimed is put by now."""
        assert self._common is not None
        elsewhere, self._elsewhere = self._elsewhere, []
        missing = []
        for one in elsewhere:
            found = self._common.wait(one.name)
            if found is None:
                missing.append(one)
            elif one.name not in self._draft.sizes:
                self._point(found)
        # They are claimed anew, so nothing is waited for before they are put.
        for one in missing:
            self._store(self._digest(one.chunk))
        self._close_pack(last=True)
        self._putter.drain()

    def _point(self, found: Found) -> None:
        for chunk, place in found.line:
            self._draft.sizes.setdefault(chunk.digest, chunk.size_bytes)
            if self._draft.places.setdefault(chunk.digest, place) is place:
                self._draft.packs[place.pack] = found.packs[place.pack]

    def _close_pack(self, last: bool = False) -> None:
        if self._builder.entries:
            self._putter.put(self._builder, last)
            self._builder = pack.Builder()
            self._held_bytes = 0

    def _manifest_with(self, name: str) -> Manifest | None:
        """The newest of the recent manifests that has the chunk."""
        return next((one for one in reversed(self._before.recent) if name in one.place_of), None)

    def _place(self, manifest: Manifest, name: str) -> None:
        """Point to a chunk where another snapshot has it; what it builds on comes along."""
        draft = self._draft
        while name and name not in draft.places:
            chunk, place = manifest.place_of[name]
            draft.sizes[name] = chunk.size_bytes
            draft.places[name] = place
            draft.packs[place.pack] = manifest.packs[place.pack]
            name = place.base


def _view(wave: Wave, at: int, size_bytes: int) -> memoryview:
    wave.arrived(at + size_bytes)
    start = at - wave.begin
    if size_bytes and not 0 <= start <= start + size_bytes <= len(wave.memory):
        raise ValueError(f"a wave of {len(wave.memory)} bytes from {wave.begin} on cuts what lies at {at}")
    return wave.memory[max(start, 0) : max(start, 0) + size_bytes]


def slice_digests(data: memoryview, grid_bytes: int) -> list[str]:
    """The digests of a slice's bytes, cut on the grid from its own start."""
    if 0 < len(data) <= grid_bytes:
        return [digest(data)]
    return [digest(data[start : start + size]) for start, size in grid(len(data), grid_bytes)]
