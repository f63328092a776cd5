"""How a new chunk is stored: as it is, or smaller where that does not make the snapshot durable later.

A chunk's *way* is an encoding and its word size. `Encodings` choose one; an `Encoder` goes it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Protocol

from blake3 import blake3

from everstep.chain.reader import Scratch
from everstep.errors import Damaged, NotFound
from everstep.format import keys
from everstep.format.chunk import Buffer, Encoding, decode, encode_shuffled, grid, xor
from everstep.format.chunk import encode as encode_raw
from everstep.format.manifest import Manifest, Place
from everstep.store.base import Store
from everstep.store.reads import copy

MAX_DEPTH = 3
"""A chunk builds on so many others at most: a restore has to read, decode and digest them all."""

_WAY_BACK = 0.25
"""What lies between a chunk and the first in its line may be so large a share of it, stored: it has to be
read, and the new chunk will differ from the first at least in so much."""

SMALL_BYTES = 16 * 1024
"""Chunks below this size are stored as they are: they take a page or four anyway."""


@dataclass(frozen=True)
class Way:
    encoding: Encoding
    word_bytes: int = 1


RAW = Way(Encoding.RAW)


@dataclass(frozen=True)
class Base:
    """What a chunk may build on: the chunk named `digest`.

    `memory` should hold the chunk that the parent snapshot had in this place. It may be written to at any
    time, so nothing that was made of it counts before it is checked. `links` are the places of chunks that
    lie between the two, each an XOR with the next; none where `memory` holds the base itself.
    """

    digest: str
    memory: memoryview
    links: tuple[Place, ...] = ()


@dataclass(frozen=True)
class Fresh:
    """A chunk that is not in the chain yet: its bytes, where it lies, and the size of the elements in it."""

    raw: memoryview
    region: int
    word_bytes: int
    base: Base | None = None


@dataclass(frozen=True)
class Stored:
    """What goes into a pack for a chunk. `data` of a raw chunk is None: its own bytes."""

    encoding: Encoding = Encoding.RAW
    data: Buffer | None = None
    base: str = ""


class Encodings(Protocol):
    """Chooses how new chunks are stored, and is told how it went. Called from several threads at once."""

    def choose(self, fresh: Fresh, threads: int) -> Way:
        """The way to store a chunk, when so many threads digest and encode. An XOR only with a base."""

    def encoded(self, fresh: Fresh, way: Way, stored_bytes: int, seconds: float) -> None:
        """So long a thread computed to go a way, the check of the base included."""

    def digested(self, size_bytes: int, seconds: float) -> None:
        """So long a thread computed to digest a chunk."""

    def put(self, size_bytes: int, seconds: float) -> None:
        """So long it took to put a pack."""


@dataclass(frozen=True)
class Always:
    """One encoding for all chunks; raw where an XOR has no base."""

    encoding: Encoding = Encoding.RAW

    def choose(self, fresh: Fresh, threads: int) -> Way:
        if self.encoding is Encoding.XOR_SHUFFLE_ZSTD and fresh.base is None:
            return RAW
        return Way(self.encoding, fresh.word_bytes)

    def encoded(self, fresh: Fresh, way: Way, stored_bytes: int, seconds: float) -> None:
        return None

    def digested(self, size_bytes: int, seconds: float) -> None:
        return None

    def put(self, size_bytes: int, seconds: float) -> None:
        return None


# -- by measurement ---------------------------------------------------------------------------------------

_REUSES = 16
"""A judgement holds for so many chunks of its region, then it is made again."""

_PIECES = 4
_PIECE_BYTES = 32 * 1024

_WORTH = 0.95
"""What does not become smaller than this share stays raw: decoding it would cost more than reading it."""

_SPARSE = 0.1
_HASTE = 0.8
_PATIENCE = 3.0
"""Digesting and encoding may take this share of the time that the store takes for the raw bytes: less than
all of it, since that is only predicted. Where a chunk shrinks to a tenth it may be more than all, on a fast
disk beside a busy trainer: what is stored is also read, kept and copied later."""

_HOPELESS = 1.25
"""A way that is so many times slower than it may be is tried on every 32nd occasion only: a large model has
hundreds of regions, and trying them all would be most of what is computed besides digests."""

_BLOCK_BYTES = 256 * 1024

_CHANGES = Way(Encoding.XOR_SHUFFLE_ZSTD)
"""For a chunk of which most is as it was: its elements have little in common where all but a few are zero."""


class _Rate:
    """Seconds per byte: the median of the last few observations. Now and then one is many times what it
    should be, because of a page that was not there or a disk that had other things to do."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=9)

    def saw(self, size_bytes: int, seconds: float) -> None:
        self._seen.append(max(seconds, 1e-9) / size_bytes)

    @property
    def s_per_byte(self) -> float | None:
        """None before the first observation."""
        return median(self._seen) if self._seen else None

    @property
    def settled(self) -> bool:
        return len(self._seen) >= 5


@dataclass
class _Judgement:
    """How much smaller chunks of a region become, by way; ways that are not worth it are not in it."""

    ratios: dict[Way, float] = field(default_factory=dict)
    uses: int = 0


class Measured:
    """Encodes what the pipeline of digesting, encoding and putting is not slowed down by.

    What becomes of a chunk is tried on a few pieces of it, once in a while for each region; how fast the
    encoders and the store are is measured all along. Before the first pack of some size was put, all is raw.

    Args:
        clock: the calling thread's time in seconds: what it computed, not how long that took. How much a
            busy trainer leaves of a core changes from one instant to the next, and with it the choice would.
    """

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._store = _Rate()
        self._digest = _Rate()
        self._encode: dict[Way, _Rate] = {}
        self._judgements: dict[tuple[int, bool], _Judgement] = {}
        self._occasions = 0

    # -- what it is told ----------------------------------------------------------------------------------

    def put(self, size_bytes: int, seconds: float) -> None:
        # A small object's time says how long the way is, not how wide.
        if size_bytes >= 1024 * 1024:
            with self._lock:
                self._store.saw(size_bytes, seconds)

    def digested(self, size_bytes: int, seconds: float) -> None:
        with self._lock:
            self._digest.saw(size_bytes, seconds)

    def encoded(self, fresh: Fresh, way: Way, stored_bytes: int, seconds: float) -> None:
        size_bytes = len(fresh.raw)
        with self._lock:
            self._encode.setdefault(way, _Rate()).saw(size_bytes, seconds)
            judgement = self._judgements.get(_key(fresh))
            if judgement is not None and way in judgement.ratios:
                judgement.ratios[way] = stored_bytes / size_bytes

    # -- what it chooses ----------------------------------------------------------------------------------

    def choose(self, fresh: Fresh, threads: int) -> Way:
        if len(fresh.raw) < SMALL_BYTES or self._store.s_per_byte is None:
            return RAW
        with self._lock:
            judgement = self._judgements.get(_key(fresh))
            if judgement is not None:
                judgement.uses += 1
        if judgement is None or judgement.uses > _REUSES:
            judgement = self._judge(fresh, threads)
        paying = [(way, ratio) for way, ratio in judgement.ratios.items() if self._pays(way, ratio, threads)]
        return min(paying, key=_preference, default=(RAW, 1.0))[0]

    def _pays(self, way: Way, ratio: float, threads: int) -> bool:
        """Whether chunks that go this way are durable in time."""
        limit = _PATIENCE if ratio <= _SPARSE else _HASTE
        return ratio <= _WORTH and self._slowness(way, threads) <= limit

    def _is_hopeless(self, way: Way, threads: int) -> bool:
        """Whether this way is by far too slow, however small chunks become, but for sparse changes."""
        with self._lock:
            rate = self._encode.get(way)
            if way == _CHANGES or rate is None or not rate.settled:
                return False
            self._occasions += 1
            again = self._occasions % 32 == 0
        return not again and self._slowness(way, threads) > _HASTE * _HOPELESS

    def _slowness(self, way: Way, threads: int) -> float:
        """How long digesting and encoding take, in times of what the pipeline takes for the raw bytes; zero
        where it was never tried."""
        with self._lock:
            rate = self._encode.get(way)
            encode = rate.s_per_byte if rate else None
            digest = self._digest.s_per_byte or 0.0
            store = self._store.s_per_byte or 0.0
        if encode is None:
            return 0.0
        return (encode + digest) / threads / max(store, digest / threads)

    def _judge(self, fresh: Fresh, threads: int) -> _Judgement:
        """Try the ways that may pay on pieces of a chunk."""
        judgement = _Judgement()
        sample = _Sample(fresh)
        for way in sample.ways(fresh):
            if self._is_hopeless(way, threads):
                continue
            begun = self._clock()
            stored_bytes = sample.encode(way)
            seconds = self._clock() - begun
            with self._lock:
                self._encode.setdefault(way, _Rate()).saw(sample.size_bytes, seconds)
            judgement.ratios[way] = stored_bytes / sample.size_bytes
        with self._lock:
            self._judgements[_key(fresh)] = judgement
        return judgement


def _key(fresh: Fresh) -> tuple[int, bool]:
    return fresh.region, fresh.base is not None


def _preference(choice: tuple[Way, float]) -> float:
    """The smaller the better; a base has to be worth what it costs at a restore."""
    way, ratio = choice
    return ratio + 0.03 * (way.encoding is Encoding.XOR_SHUFFLE_ZSTD)


class _Sample:
    """A few pieces of a chunk, one after the other, and the same pieces of its base."""

    def __init__(self, fresh: Fresh) -> None:
        self._raw = _pieces(fresh.raw, fresh.word_bytes)
        self._base = _pieces(fresh.base.memory, fresh.word_bytes) if fresh.base else None
        self._scratch = bytearray(_PIECE_BYTES)
        self.size_bytes = len(self._raw)

    def ways(self, fresh: Fresh) -> list[Way]:
        word_bytes = fresh.word_bytes
        plain = Way(Encoding.SHUFFLE_ZSTD, word_bytes) if word_bytes > 1 else Way(Encoding.ZSTD)
        if self._base is None:
            return [plain]
        if self._same() >= 0.25:
            return [_CHANGES]
        return [Way(Encoding.XOR_SHUFFLE_ZSTD, word_bytes), plain]

    def _same(self) -> float:
        """The share that is as it was in the base, by eight bytes."""
        import numpy as np

        assert self._base is not None
        whole = self.size_bytes // 8 * 8
        raw, base = np.frombuffer(self._raw[:whole], np.uint64), np.frombuffer(self._base[:whole], np.uint64)
        return float((raw == base).mean())

    def encode(self, way: Way) -> int:
        """The size of the encoded pieces, made just as a chunk's would be."""
        if way.encoding is not Encoding.XOR_SHUFFLE_ZSTD:
            return len(encode_raw(self._raw, way.encoding, word_bytes=way.word_bytes))
        assert self._base is not None
        difference = memoryview(bytearray(self.size_bytes))
        _copy_and_xor(memoryview(self._raw), memoryview(self._base), difference, memoryview(self._scratch))
        return len(encode_shuffled(difference, way.word_bytes))


def _pieces(raw: memoryview, word_bytes: int) -> bytes:
    if len(raw) <= _PIECES * _PIECE_BYTES:
        return bytes(raw)
    # At whole words, and away from the ends, where padding may be.
    step = len(raw) // _PIECES // word_bytes * word_bytes
    middle = (step - _PIECE_BYTES) // 2 // word_bytes * word_bytes
    size = _PIECE_BYTES // word_bytes * word_bytes
    return b"".join(raw[at : at + size] for at in range(middle, _PIECES * step, step))


# -- the encoder ------------------------------------------------------------------------------------------


class Encoder:
    """Encodes chunks as `encodings` choose. May be used from several threads at once.

    Args:
        store: where the links between a chunk and its base are read, if there are any.
        clock: the calling thread's time in seconds.
    """

    def __init__(self, encodings: Encodings, store: Store, clock: Callable[[], float]) -> None:
        self.encodings = encodings
        self._store = store
        self._clock = clock
        self._desks: list[_Desk] = []

    def encode(self, fresh: Fresh, threads: int) -> Stored:
        """What to store for a chunk; raw where nothing else is smaller."""
        way = self.encodings.choose(fresh, threads)
        if way.encoding is Encoding.RAW:
            return Stored()
        begun = self._clock()
        if way.encoding is not Encoding.XOR_SHUFFLE_ZSTD:
            data: bytes | None = encode_raw(fresh.raw, way.encoding, word_bytes=way.word_bytes)
            base = ""
        else:
            assert fresh.base is not None
            data, base = self._difference(fresh, fresh.base, way.word_bytes), fresh.base.digest
        if data is None:
            return self.encode(replace(fresh, base=None), threads)
        self.encodings.encoded(fresh, way, len(data), self._clock() - begun)
        if len(data) >= len(fresh.raw):
            return Stored()
        return Stored(way.encoding, data, base)

    def _difference(self, fresh: Fresh, base: Base, word_bytes: int) -> bytes | None:
        """A chunk XORed with its base and encoded; None where the base is not there any more."""
        with self._desk() as desk:
            difference = desk.difference.take(len(fresh.raw))
            block = desk.block.take(_BLOCK_BYTES)
            if not base.links:
                name = _copy_and_xor(fresh.raw, base.memory, difference, block)
            else:
                xor(fresh.raw, base.memory, difference)
                if not self._follow(base.links, difference, desk.link.take(len(fresh.raw))):
                    return None
                name = _digest_of_xor(fresh.raw, difference, block)
            # The memory may have been written to, and what the links gave is no better than their disk: what
            # was XORed is the base if it has the base's digest.
            return encode_shuffled(difference, word_bytes) if name == base.digest else None

    def _follow(self, links: tuple[Place, ...], difference: memoryview, memory: memoryview) -> bool:
        """XOR what lies between a chunk and its base into `difference`; False where that cannot be read."""
        for place in links:
            try:
                stored = self._store.get(keys.pack(place.pack), place.offset, place.stored_bytes)
                # Without its base, an XOR is a chunk that was only shuffled: the difference itself.
                link = decode(stored, Encoding.SHUFFLE_ZSTD, len(memory), into=memory)
            except (Damaged, NotFound):
                return False
            xor(difference, link, difference)
        return True

    @contextmanager
    def _desk(self) -> Iterator[_Desk]:
        """One that nobody else works at."""
        desk = self._desks.pop() if self._desks else _Desk()
        yield desk
        self._desks.append(desk)


@dataclass
class _Desk:
    """Memory to work in, which is used again: fresh memory takes longer to come than what is done in it."""

    difference: Scratch = field(default_factory=Scratch)
    link: Scratch = field(default_factory=Scratch)
    block: Scratch = field(default_factory=Scratch)


def _copy_and_xor(raw: memoryview, base: memoryview, difference: memoryview, block: memoryview) -> str:
    """Fill `difference` with the XOR of a chunk and its base; returns the digest of what was the base.

    Block by block, each copied first, so that what is digested is what is XORed, in the processor's cache.
    """
    hasher = blake3()
    for start, size in grid(len(raw), len(block)):
        part, end = block[:size], start + size
        copy(part, base[start:end])
        hasher.update(part)
        xor(raw[start:end], part, difference[start:end])
    return hasher.hexdigest()


def _digest_of_xor(raw: memoryview, difference: memoryview, block: memoryview) -> str:
    """The digest of what a chunk differs from."""
    hasher = blake3()
    for start, size in grid(len(raw), len(block)):
        hasher.update(xor(raw[start : start + size], difference[start : start + size], block[:size]))
    return hasher.hexdigest()


def base_of(manifest: Manifest, name: str, memory: memoryview) -> Base | None:
    """What a chunk may build on where the parent snapshot's chunk `name` should lie in `memory`.

    That chunk; or where it would become too deep, the first in its line; or where the way back there is too
    long, None.
    """
    links: list[Place] = []
    first = name
    while (place := manifest.place_of[first][1]).base:
        links.append(place)
        first = place.base
    if len(links) < MAX_DEPTH:
        return Base(name, memory)
    if sum(link.stored_bytes for link in links) > _WAY_BACK * len(memory):
        return None
    return Base(first, memory, tuple(links))
