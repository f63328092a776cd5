from __future__ import annotations

import random
import threading
from collections.abc import Sequence

import pytest
from making import GRID_BYTES, compressible, content, started, whole, written, xor_chain

from everstep.chain import reader as readers
from everstep.chain.reader import Reader, Target
from everstep.chain.verify import verify
from everstep.errors import Damaged, Unavailable
from everstep.format import keys, pack
from everstep.format.chunk import MAX_XOR_DEPTH, Encoding, aligned, digest, encode
from everstep.format.layout import lay_out
from everstep.format.manifest import Manifest, Place, StoredChunk, StoredRegion
from everstep.store.base import Buffer
from everstep.store.memory import MemoryStore
from everstep.testing.faults import READS, FaultyStore


class Counting(MemoryStore):
    """Notes the ranges that are read into buffers, and those that are got."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[str, int, int]] = []
        self.gets: list[tuple[str, int]] = []

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        self.gets.append((key, start))
        return super().get(key, start, size_bytes)

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        self.reads.append((key, start, sum(map(len, buffers))))
        return super().read_into(key, start, buffers)


LAYOUT = lay_out([whole("big", "uint8", (2_000_000,)), whole("small", "float32", (100,), "frozen")])
BIG = next(number for number, region in enumerate(LAYOUT.regions) if region.size_bytes == 2_000_000)


def made(encoding: Encoding = Encoding.RAW) -> tuple[Counting, Manifest, bytes]:
    """A store with one snapshot, its manifest, and the bytes of its large leaf."""
    store = Counting()
    writer = started(store, encoding=encoding)
    one = (content if encoding is Encoding.RAW else compressible)(1, LAYOUT)
    (snapshot,) = written(writer, [one])
    return store, writer.chain.manifest(snapshot), one.leaves["big"]


def filled(store: MemoryStore, manifest: Manifest, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    buffers = [bytearray(size) for _, size in ranges]
    targets = [
        Target(BIG, start, memoryview(buffer)) for (start, _), buffer in zip(ranges, buffers, strict=True)
    ]
    assert Reader(store).fill(manifest, targets) == []
    return [bytes(buffer) for buffer in buffers]


def test_neighbours_are_read_with_one_call() -> None:
    store, manifest, data = made()
    assert filled(store, manifest, [(0, len(data))]) == [data]
    assert len(manifest.regions[BIG].chunks) > 100
    assert [size for _, _, size in store.reads] == [aligned(len(data))]


@pytest.mark.parametrize(
    ("name", "encoding"), [("STRAIGHT_BYTES", Encoding.RAW), ("SPAN_BYTES", Encoding.SHUFFLE_ZSTD)]
)
def test_a_span_has_a_limit(monkeypatch: pytest.MonkeyPatch, name: str, encoding: Encoding) -> None:
    """A larger one where the chunks are read to where they belong."""
    monkeypatch.setattr(readers, name, 4 * GRID_BYTES)
    store, manifest, data = made(encoding)
    assert filled(store, manifest, [(0, len(data))]) == [data]
    assert max(size for _, _, size in store.reads) <= 4 * GRID_BYTES
    assert len(store.reads) <= -(-len(manifest.regions[BIG].chunks) // 4)


@pytest.mark.parametrize("encoding", [Encoding.RAW, Encoding.SHUFFLE_ZSTD])
def test_targets_may_cut_chunks_and_share_them(encoding: Encoding) -> None:
    store, manifest, data = made(encoding)
    rng = random.Random(4)
    ranges = [
        (0, 1),
        (GRID_BYTES - 1, 2),
        (GRID_BYTES, GRID_BYTES),
        (len(data) - 1, 1),
        (5, 0),
        (7, 100),
        (7, 100),
    ]
    ranges += [(start := rng.randrange(len(data)), rng.randrange(len(data) - start)) for _ in range(20)]
    assert filled(store, manifest, ranges) == [data[start : start + size] for start, size in ranges]


def test_a_chunk_that_several_targets_need_is_read_once() -> None:
    store, manifest, data = made()
    halves = [(0, GRID_BYTES // 2), (GRID_BYTES // 2, GRID_BYTES // 2), (0, GRID_BYTES)]
    assert filled(store, manifest, halves) == [data[start : start + size] for start, size in halves]
    assert [size for _, _, size in store.reads] == [GRID_BYTES]


def test_nothing_is_read_for_nothing() -> None:
    store, manifest, _ = made()
    assert Reader(store).fill(manifest, []) == []
    assert store.reads == []


def test_a_part_is_read_without_the_rest() -> None:
    store, manifest, data = made()
    assert filled(store, manifest, [(3 * GRID_BYTES, 10)]) == [data[3 * GRID_BYTES :][:10]]
    assert sum(size for _, _, size in store.reads) == GRID_BYTES


def test_windows_look_at_a_packs_end_once() -> None:
    store, manifest, data = made()
    reader = Reader(store)
    store.gets.clear()
    buffer = memoryview(bytearray(GRID_BYTES))
    for start in range(0, 10 * GRID_BYTES, GRID_BYTES):
        assert reader.fill(manifest, [Target(BIG, start, buffer)]) == []
        assert buffer == data[start : start + GRID_BYTES]
    last = max(place.offset for place in manifest.places)
    assert len([start for _, start in store.gets if start > last]) == 2


@pytest.mark.parametrize("encoding", [Encoding.RAW, Encoding.ZSTD, Encoding.SHUFFLE_ZSTD])
def test_several_threads_may_fill_at_once(encoding: Encoding) -> None:
    store, manifest, data = made(encoding)
    reader = Reader(store)
    buffers = [memoryview(bytearray(len(data))) for _ in range(4)]
    fills = [
        threading.Thread(target=reader.fill, args=(manifest, [Target(BIG, 0, buffer)])) for buffer in buffers
    ]
    for one in fills:
        one.start()
    for one in fills:
        one.join()
    assert [buffer == data for buffer in buffers] == [True] * 4


def test_scratch_is_one_piece_of_memory_that_grows() -> None:
    scratch = readers.Scratch()
    small = scratch.take(1000)
    small[:] = bytes([7]) * 1000
    assert scratch.take(500) == bytes([7]) * 500
    assert len(scratch.take(100_000)) == 100_000


# -- damage ----------------------------------------------------------------------------------------------


def test_a_missing_pack_is_damage_and_names_itself() -> None:
    store, manifest, data = made()
    key = keys.pack(manifest.places[manifest.regions[BIG].chunks[0]].pack)
    store.delete(key)
    with pytest.raises(Damaged, match="is missing") as caught:
        filled(store, manifest, [(0, len(data))])
    assert caught.value.key == key
    with pytest.raises(Damaged, match="is missing"):
        Reader(store).chunk(manifest, manifest.chunks[manifest.regions[BIG].chunks[0]].digest)


@pytest.mark.parametrize("encoding", [Encoding.RAW, Encoding.SHUFFLE_ZSTD])
def test_a_cut_pack_is_damage_where_it_is_cut(encoding: Encoding) -> None:
    store, manifest, data = made(encoding)
    key = keys.pack(manifest.places[manifest.regions[BIG].chunks[0]].pack)
    half = bytes(store.get(key))[: len(data) // 4]
    store.delete(key)
    store.put(key, [half])
    with pytest.raises(Damaged, match="cut short"):
        filled(store, manifest, [(0, len(data))])
    # What lies before the cut can be had, and the cut is told.
    buffer = memoryview(bytearray(GRID_BYTES))
    (remark,) = Reader(store).fill(manifest, [Target(BIG, 0, buffer)])
    assert key in remark
    assert buffer == data[:GRID_BYTES]


@pytest.mark.parametrize("place", ["padding", "footer", "magic", "version", "more"])
def test_damage_that_touches_no_chunk_is_told(place: str) -> None:
    store = MemoryStore()
    layout = lay_out([whole("odd", "uint8", (5056,))])
    writer = started(store)
    one = content(1, layout)
    (snapshot,) = written(writer, [one])
    manifest = writer.chain.manifest(snapshot)
    (name,) = manifest.packs
    key = keys.pack(name)
    good = bytes(store.get(key))
    data = bytearray(good)
    trailer = pack.decode_trailer(good[-pack.TRAILER_BYTES :], len(good))
    at = {"padding": 5057, "footer": trailer.footer_offset + 40, "magic": -64, "version": -55, "more": -1}[
        place
    ]
    if place == "more":
        data += b"\0"
    else:
        data[at] ^= 1
    store.delete(key)
    store.put(key, [bytes(data)])
    buffer = memoryview(bytearray(5056))
    (remark,) = Reader(store).fill(manifest, [Target(0, 0, buffer)])
    assert key in remark
    assert buffer == one.leaves["odd"]
    assert [finding.key for finding in verify(writer.chain).findings] == [key]


def test_a_store_that_is_away_is_not_damage() -> None:
    inner, manifest, data = made()
    for number in range(3):  # One span, and the pack's end in two reads.
        store = FaultyStore(inner, number, lambda: Unavailable("away"), verbs=READS)
        with pytest.raises(Unavailable):
            Reader(store).fill(manifest, [Target(BIG, 0, memoryview(bytearray(len(data))))])


def test_the_first_error_of_several_threads_is_raised_when_all_have_stopped() -> None:
    store, manifest, data = made()
    for name in manifest.packs:
        store.delete(keys.pack(name))
    with pytest.raises(Damaged):
        filled(store, manifest, [(0, len(data))] * 3)


# -- chunks that build on others -------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, MAX_XOR_DEPTH])
def test_xor_chunks_are_built_up_from_their_bases(depth: int) -> None:
    chain, _, data = xor_chain(depth)
    head = chain.head()
    assert head is not None
    made = chain.manifest(head)
    buffer = memoryview(bytearray(len(data)))
    assert Reader(chain.store).fill(made, [Target(0, 0, buffer)]) == []
    assert buffer == data
    part = memoryview(bytearray(100))
    Reader(chain.store).fill(made, [Target(0, 50, part)])
    assert part == data[50:150]
    assert verify(chain).findings == []


def test_xor_chunks_may_not_build_on_more_than_allowed() -> None:
    chain, made, data = xor_chain(MAX_XOR_DEPTH + 1)
    head = chain.head()
    assert head is not None
    with pytest.raises(Damaged, match="without an end"):
        chain.manifest(head)
    with pytest.raises(Damaged, match="builds on more than"):
        Reader(chain.store).fill(made, [Target(0, 0, memoryview(bytearray(len(data))))])


def family(children: int) -> tuple[Counting, Manifest, list[bytes]]:
    """A snapshot of `children` leaves of a chunk each, which build on one chunk that is in none of them."""
    rng = random.Random(children)
    base = rng.randbytes(GRID_BYTES)
    raws = [rng.randbytes(GRID_BYTES) for _ in range(children)]
    encoded = [encode(raw, Encoding.XOR_SHUFFLE_ZSTD, word_bytes=4, base=base) for raw in raws]
    builder = pack.Builder()
    builder.add(digest(base), len(base), base, len(base), Encoding.RAW, "")
    for raw, stored in zip(raws, encoded, strict=True):
        builder.add(digest(raw), len(raw), stored, len(stored), Encoding.XOR_SHUFFLE_ZSTD, digest(base))
    entries = builder.entries
    name, parts = builder.finish()
    store = Counting()
    store.put(keys.pack(name), parts)
    manifest = Manifest(
        format=1,
        grid_bytes=GRID_BYTES,
        leaves=(),
        regions=tuple(StoredRegion(GRID_BYTES, (1 + number,)) for number in range(children)),
        chunks=tuple(StoredChunk(one.digest, one.size_bytes) for one in entries),
        places=tuple(Place(name, one.offset, one.stored_bytes, one.encoding, one.base) for one in entries),
        packs={name: sum(map(len, parts))},
        values=b"",
        state="0" * 64,
    )
    return store, manifest, raws


def base_reads(store: Counting) -> int:
    return [start for _, start in store.gets].count(0)


def test_a_base_that_several_build_on_is_read_once() -> None:
    store, manifest, raws = family(20)
    buffers = [memoryview(bytearray(GRID_BYTES)) for _ in raws]
    assert Reader(store).fill(manifest, [Target(number, 0, one) for number, one in enumerate(buffers)]) == []
    assert list(map(bytes, buffers)) == raws
    assert base_reads(store) == 1


def test_bases_that_are_far_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BASES_BYTES", GRID_BYTES - 1)
    monkeypatch.setattr(readers, "SPAN_BYTES", 1)
    store, manifest, raws = family(5)
    buffers = [memoryview(bytearray(GRID_BYTES)) for _ in raws]
    assert Reader(store).fill(manifest, [Target(number, 0, one) for number, one in enumerate(buffers)]) == []
    assert list(map(bytes, buffers)) == raws
    assert base_reads(store) == 5


@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("how", ["flip", "delete"])
def test_a_damaged_base_damages_all_that_build_on_it(level: int, how: str) -> None:
    chain, _, data = xor_chain(3)
    head = chain.head()
    assert head is not None
    made = chain.manifest(head)
    place = made.places[level]
    key = keys.pack(place.pack)
    bad = bytearray(chain.store.get(key))
    bad[place.stored_bytes // 2] ^= 1
    chain.store.delete(key)
    if how == "flip":
        chain.store.put(key, [bytes(bad)])
    with pytest.raises(Damaged):
        Reader(chain.store).fill(made, [Target(0, 0, memoryview(bytearray(len(data))))])
    found = [finding for finding in verify(chain).findings if finding.key == key]
    assert head.id in found[0].snapshots
    assert verify(chain).whole == (1 if level else 0)
