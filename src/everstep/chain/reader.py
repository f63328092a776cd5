"""From a manifest back to bytes: parallel ranged reads, each chunk checked against its digest."""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias, TypeVar

import msgspec

from everstep.chain.relocations import Relocations
from everstep.errors import Damaged, EverstepError, NotFound, Unavailable, Unsupported
from everstep.format import keys, pack
from everstep.format.chunk import ALIGNMENT_BYTES, MAX_XOR_DEPTH, Buffer, Encoding, aligned, decode, digest
from everstep.format.manifest import Manifest, Place, StoredChunk
from everstep.store import parallel
from everstep.store.base import Store
from everstep.store.reads import copy
from everstep.store.replicated import copies_of

Result = TypeVar("Result")

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = min(CORES + 4, 12)
"""Some wait for the store while others digest."""

SPAN_BYTES = 16 * 1024 * 1024
"""Neighbours in a pack are read with one call, up to this size: so much memory each thread takes."""

STRAIGHT_BYTES = 4 * SPAN_BYTES
"""The same for those that are read straight to where they belong, which takes no memory."""

BASES_BYTES = 32 * 1024 * 1024
"""So much of what xor encodings build on is kept while a fill lasts, for others that build on it too."""


@dataclass(frozen=True)
class Target:
    """Writable memory for the bytes of region number `region` from `offset` on."""

    region: int
    offset: int
    buffer: memoryview


@dataclass(frozen=True)
class Piece:
    """Where a part of a chunk goes: `buffer` takes the chunk's bytes from `start` on."""

    start: int
    buffer: memoryview


@dataclass(frozen=True)
class Job:
    """A chunk to get, and where its parts go. `region` and `offset` are one place in the state where it
    lies; there may be others. `home` is where the manifest places it, `place` where it is now."""

    chunk: StoredChunk
    home: Place
    place: Place
    region: int
    offset: int
    pieces: tuple[Piece, ...]

    @property
    def whole(self) -> memoryview | None:
        """The memory that takes all of the chunk, where there is such."""
        first = self.pieces[0]
        return first.buffer if first.start == 0 and len(first.buffer) == self.chunk.size_bytes else None

    @property
    def in_place(self) -> bool:
        """Whether the chunk's stored bytes can be read straight to where they belong."""
        raw = self.place.encoding == Encoding.RAW and self.place.stored_bytes == self.chunk.size_bytes
        return raw and self.whole is not None

    def scatter(self, raw: Buffer) -> None:
        """Copy the chunk's bytes to where they belong, unless they are there already."""
        for piece in self.pieces[1 if self.whole is raw else 0 :]:
            copy(piece.buffer, memoryview(raw)[piece.start : piece.start + len(piece.buffer)])

    def targets(self) -> list[Target]:
        return [Target(self.region, self.offset + piece.start, piece.buffer) for piece in self.pieces]


class Scratch:
    """Page-aligned memory of one thread that grows to what is asked for and is used again."""

    def __init__(self) -> None:
        self._memory = memoryview(b"")

    def take(self, size_bytes: int) -> memoryview:
        """The same memory each time, undefined contents."""
        if len(self._memory) < size_bytes:
            self._memory = memoryview(
                mmap.mmap(-1, aligned(size_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            )
        return self._memory[:size_bytes]


Task: TypeAlias = Callable[[Scratch], Result]


class _Gone(Exception):
    """There is no such pack."""


class Reader:
    """Reads the bytes of snapshots out of a store, wherever they have been relocated to. Where the store has
    several copies of an object, one that is missing or damaged is got round, and a remark says so.

    Attributes:
        got_round: whether that was needed: then the first copy is not one to build on.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.got_round = False
        self._seen: set[str] = set()
        self._relocations = Relocations(store)
        self._missed: set[str] = set()
        """Packs that were not there once: what was relocated out of them is looked for there first."""

        self._elsewhere: set[str] = set()
        """Those that were relocated to nowhere: other copies of them are read."""

    def fill(self, manifest: Manifest, targets: Iterable[Target]) -> list[str]:
        """Fill memory with the bytes of a snapshot, straight from the store where they are stored raw.

        Blocks until all is read. Every byte was checked against its chunk's digest when this returns. May be
        called from several threads at once.

        Returns:
            Damage that was seen and does not touch the bytes asked for (a pack's footer or padding), a
            sentence each, once in a reader's life. Whoever calls tells the user.

        Raises:
            Damaged: a chunk is missing or is not the one that was written; the buffers' contents are then
                undefined.
        """
        bases = _Bases(partial(self.chunk, manifest, depth=1))
        remarks: set[str] = set()
        gone: set[str] = set()
        left = jobs_of(manifest, targets)
        while left:
            places = self._where([job.home for job in left], gone)
            placed = [replace(job, place=place) for job, place in zip(left, places, strict=True)]
            left = []
            for found in self._read_placed(manifest, placed, bases):
                remarks.update(found.remarks)
                left += found.left
                gone.update(job.place.pack for job in found.left)
        return sorted(remarks)

    def _read_placed(self, manifest: Manifest, jobs: Iterable[Job], bases: _Bases) -> list[_Found]:
        by_pack: dict[str, list[Job]] = defaultdict(list)
        for job in jobs:
            by_pack[job.place.pack].append(job)
        tasks: list[Task[_Found]] = [
            partial(self._read_span, span, bases)
            for name in sorted(by_pack)
            for span in _spans(by_pack[name])
        ]
        fresh = sorted(by_pack.keys() - self._seen)
        self._seen.update(fresh)
        sizes = {**self._relocations.table.targets, **manifest.packs}
        # Of one whose record has just been pruned the size is not known any more.
        tasks += [partial(self._check_tail, name, sizes[name]) for name in fresh if name in sizes]
        return in_parallel(tasks, THREADS)

    def chunk(self, manifest: Manifest, name: str, depth: int = 0) -> Buffer:
        """The raw bytes of one chunk, verified. Raises Damaged."""
        if depth > MAX_XOR_DEPTH:
            raise Damaged(f"chunk {name[:12]} builds on more than {MAX_XOR_DEPTH} others")
        chunk, home = manifest.place_of[name]
        gone: set[str] = set()
        while True:
            (place,) = self._where([home], gone)
            try:
                return self._from_any(place.pack, partial(self._chunk_of, manifest, chunk, place, depth))[0]
            except _Gone:
                gone.add(place.pack)

    def _chunk_of(
        self, manifest: Manifest, chunk: StoredChunk, place: Place, depth: int, store: Store
    ) -> Buffer:
        stored = _get(store, keys.pack(place.pack), place.offset, place.stored_bytes)
        return _decoded(chunk, place, stored, lambda base: self.chunk(manifest, base, depth + 1))

    def _from_any(self, name: str, read: Callable[[Store], Result]) -> tuple[Result, list[str]]:
        """What `read` makes of the first copy of a pack that is good, and a remark where that was not the
        first. Raises _Gone where there is none in the first and it was not looked for among what was
        relocated, which comes before other copies."""
        first: EverstepError | None = None
        copies = copies_of(self.store)
        for store in copies:
            try:
                done = read(store)
            except _Gone:
                if name not in self._elsewhere:
                    raise
                first = first or Damaged(f"{keys.pack(name)} is missing", key=keys.pack(name))
                continue
            except (Damaged, Unavailable) as error:
                if len(copies) == 1:
                    raise
                first = first or error
                continue
            if first is None:
                return done, []
            self.got_round = True
            return done, [f"{first.problem}; {store.url} has it"]
        assert first is not None
        raise first

    def _where(self, homes: Sequence[Place], gone: set[str]) -> list[Place]:
        """Where the chunks are that a manifest places there, other than in packs that are gone. Who misses a
        pack looks for relocations; once, as long as those tell of another place for it. What was relocated to
        nowhere is where it was in another copy, if there are any."""
        self._missed |= gone
        found = [self._place(home, gone) for home in homes]
        if None in found:
            self._relocations.look()
            found = [self._place(home, gone) for home in homes]
        places, lost = [], set[str]()
        for home, place in zip(homes, found, strict=True):
            if place is None:
                if home.pack in self._elsewhere or len(copies_of(self.store)) == 1:
                    damage = next(iter(self._relocations.damaged.values()), None)
                    why = (
                        "" if damage is None else f", and where it has gone cannot be read ({damage.problem})"
                    )
                    raise Damaged(f"{keys.pack(home.pack)} is missing{why}", key=keys.pack(home.pack))
                lost.add(home.pack)
                place = home
            places.append(place)
        self._elsewhere |= lost
        return places

    def _place(self, home: Place, gone: set[str]) -> Place | None:
        """The first where it may be: where the manifest says, unless that pack was missed before."""
        moved = [
            msgspec.structs.replace(home, pack=one.pack, offset=one.offset)
            for one in self._relocations.table.moved(home.pack, home.offset)
        ]
        places = [*moved, home] if home.pack in self._missed else [home, *moved]
        return next((place for place in places if place.pack not in gone), None)

    def _read_span(self, span: Sequence[Job], bases: _Bases, scratch: Scratch) -> _Found:
        name = span[0].place.pack
        try:
            remarks, more = self._from_any(name, partial(_span_of, span, bases, scratch))
        except _Gone:
            return _Found(left=tuple(span))
        return _Found((*remarks, *more))

    def _check_tail(self, name: str, pack_bytes: int, scratch: Scratch) -> _Found:
        """The end of a pack is not needed to read it, but who reads it should say that it is damaged."""
        key = keys.pack(name)
        try:
            if pack_bytes < pack.TRAILER_BYTES:
                raise Damaged("a pack is too short to have a trailer")
            # One byte more than there should be: a pack that has grown is damaged too.
            end = self.store.get(key, pack_bytes - pack.TRAILER_BYTES, pack.TRAILER_BYTES + 1)
            trailer = pack.decode_trailer(end, pack_bytes)
            tail = _get(self.store, key, trailer.footer_offset, trailer.tail_bytes)
            pack.decode_tail(tail, pack_bytes, name)
        except (NotFound, _Gone):
            pass  # Who reads its chunks finds that, too, and where they are.
        except (Damaged, Unsupported) as error:
            # Unsupported too: a bit flipped in the version's place makes a pack look newer than it is.
            return _Found((f"{key}: {error.problem}",))
        return _Found()


@dataclass(frozen=True)
class _Found:
    """What came of a read: sentences about damage that does no harm, and jobs whose pack is not there."""

    remarks: tuple[str, ...] = ()
    left: tuple[Job, ...] = ()


def _get(store: Store, key: str, start: int, size_bytes: int) -> Buffer:
    try:
        data = store.get(key, start, size_bytes)
    except NotFound as error:
        raise _Gone from error
    if len(data) != size_bytes:
        raise Damaged(f"{key} is cut short", key=key)
    return data


def _span_of(span: Sequence[Job], bases: _Bases, scratch: Scratch, store: Store) -> list[str]:
    """Read chunks that lie one after the other, with the padding between them, in one call."""
    key = keys.pack(span[0].place.pack)
    stored, gaps, buffers = _memory_for(span, scratch)
    try:
        count = store.read_into(key, span[0].place.offset, buffers)
    except NotFound as error:
        raise _Gone from error
    if count != sum(map(len, buffers)):
        raise Damaged(f"{key} is cut short", key=key)
    for job, data in zip(span, stored, strict=True):
        job.scatter(_decoded(job.chunk, job.place, data, bases.get, job.whole))
    if any(bytes(gap).strip(b"\0") for gap in gaps):
        return [f"{key} has padding that is not zero"]
    return []


class _Bases:
    """The chunks that xor encodings build on, each read once while it is near: `BASES_BYTES` of them stay."""

    def __init__(self, read: Callable[[str], Buffer]) -> None:
        self._read = read
        self._near: OrderedDict[str, Buffer] = OrderedDict()
        self._size_bytes = 0
        self._reading: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> Buffer:
        """A chunk's raw bytes, verified. Blocks while another thread reads the same one. Raises Damaged."""
        with self._lock:
            reading = self._reading.setdefault(name, threading.Lock())
        with reading:
            found = self._near.get(name)
            if found is None:
                found = self._read(name)
                self._keep(name, found)
            return found

    def _keep(self, name: str, raw: Buffer) -> None:
        with self._lock:
            self._near[name] = raw
            self._size_bytes += len(raw)
            while self._size_bytes > BASES_BYTES:
                self._size_bytes -= len(self._near.popitem(last=False)[1])


def _memory_for(
    span: Sequence[Job], scratch: Scratch
) -> tuple[list[memoryview], list[memoryview], list[memoryview]]:
    """The memory for the stored bytes of each chunk of a span, that for the padding after each, and all of it
    in the order of the pack."""
    free = scratch.take(
        sum(aligned(job.place.stored_bytes) for job in span if not job.in_place) + ALIGNMENT_BYTES * len(span)
    )
    stored, gaps, buffers = [], [], []
    for job in span:
        size = job.place.stored_bytes
        padding = aligned(size) - size
        whole = job.whole if job.in_place else None
        if whole is not None:
            stored.append(whole)
            gaps.append(free[:padding])
            buffers += [whole, gaps[-1]]
            free = free[ALIGNMENT_BYTES:]
        else:
            # In one piece, which begins and ends on a page: that is read without a detour.
            buffers.append(free[: aligned(size)])
            stored.append(buffers[-1][:size])
            gaps.append(buffers[-1][size:])
            free = free[aligned(size) :]
    return stored, gaps, buffers


def _decoded(
    chunk: StoredChunk,
    place: Place,
    stored: Buffer,
    base_of: Callable[[str], Buffer],
    into: memoryview | None = None,
) -> Buffer:
    """The raw bytes of a chunk, verified: `stored` itself where it is stored raw, else `into` where given."""
    key = keys.pack(place.pack)
    base = (lambda: base_of(place.base)) if place.base else None
    try:
        raw = decode(stored, place.encoding, chunk.size_bytes, base=base, into=into)
    except EverstepError as error:
        error.key = error.key or key
        raise
    if len(raw) != chunk.size_bytes or digest(raw) != chunk.digest:
        raise Damaged(f"chunk {chunk.digest[:12]} in {key} is not the one that was written", key=key)
    return raw


def jobs_of(manifest: Manifest, targets: Iterable[Target]) -> list[Job]:
    """Which chunks to get, and where their parts go; a chunk that several targets need is got once."""
    pieces: dict[int, list[Piece]] = defaultdict(list)
    lies: dict[int, tuple[int, int]] = {}
    grid = manifest.grid_bytes
    for target in targets:
        region = manifest.regions[target.region]
        done = 0
        while done < len(target.buffer):
            at = target.offset + done
            number, start = region.chunks[at // grid], at % grid
            size = min(manifest.chunks[number].size_bytes - start, len(target.buffer) - done)
            pieces[number].append(Piece(start, target.buffer[done : done + size]))
            lies[number] = (target.region, at - start)
            done += size
    jobs = []
    for number, wanted in pieces.items():
        # The piece that takes the chunk whole comes first: the chunk is read straight into it.
        wanted.sort(key=lambda piece: -len(piece.buffer))
        home = manifest.places[number]
        jobs.append(Job(manifest.chunks[number], home, home, *lies[number], tuple(wanted)))
    return jobs


def _spans(jobs: list[Job]) -> list[list[Job]]:
    """Jobs of one pack, those that lie one after the other and are read alike together."""
    spans: list[list[Job]] = []
    end = size = 0
    for job in sorted(jobs, key=lambda job: job.place.offset):
        stored = aligned(job.place.stored_bytes)
        alike = spans and spans[-1][-1].in_place == job.in_place
        limit = STRAIGHT_BYTES if job.in_place else SPAN_BYTES
        if alike and job.place.offset == end and size + stored <= limit:
            spans[-1].append(job)
            size += stored
        else:
            spans.append([job])
            size = stored
        end = job.place.offset + stored
    return spans


def in_parallel(tasks: Sequence[Task[Result]], threads: int) -> list[Result]:
    """Run all tasks, each with the scratch memory of its thread; the first error is raised when no task is at
    work any more."""

    def worker() -> Callable[[Task[Result]], Result]:
        scratch = Scratch()
        return lambda task: task(scratch)

    return parallel.in_parallel(tasks, threads, worker)
