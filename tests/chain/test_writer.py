from __future__ import annotations

import io
import mmap
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import (
    GRID_BYTES,
    LAYOUT,
    Content,
    Slots,
    assert_restores,
    compressible,
    content,
    restored,
    started,
    written,
)

from everstep.chain import lanes, lease, packing
from everstep.chain.encoding import Always, Fresh, Way
from everstep.chain.history import Chain
from everstep.chain.lease import Lease
from everstep.chain.verify import verify
from everstep.chain.writer import Captured, Facts, Wave, Writer
from everstep.errors import Conflict, Damaged, EverstepError, Fenced, Mismatch, NotFound, Unavailable
from everstep.format import chunk, keys, record
from everstep.format import layout as layouts
from everstep.format.chunk import Encoding
from everstep.format.layout import lay_out
from everstep.format.record import HeadRecord
from everstep.store.base import Buffer, Store
from everstep.store.local import LocalStore
from everstep.store.memory import MemoryStore
from everstep.testing.faults import FaultyStore
from examples import examples


def packs(store: MemoryStore) -> list[str]:
    return [entry.key for entry in store.list(keys.PACKS)]


def flip(store: MemoryStore, key: str, at: int = 10) -> None:
    data = bytearray(store.get(key))
    data[at] ^= 4
    store.delete(key)
    assert store.put(key, [bytes(data)])


def assert_clean(chain: Chain) -> None:
    assert verify(chain).findings == []


# -- what is stored --------------------------------------------------------------------------------------


def test_a_snapshot_restores_and_says_what_it_cost() -> None:
    store = MemoryStore()
    writer = started(store)
    one = content(1)
    facts = Facts(
        step=7, epoch=2, trigger="take", note="why", metrics={"loss": 0.5}, approximate=("so",),
        environment={"torch": "2"}, costs={"stall": 1.23456},
    )  # fmt: skip
    snapshot = writer.write(one.captured(), facts)
    assert_restores(writer.chain, snapshot, one)
    kept = snapshot.record
    assert (kept.step, kept.epoch, kept.trigger, kept.note) == (7, 2, "take", "why")
    assert (kept.metrics, kept.approximate, kept.environment) == ({"loss": 0.5}, ("so",), {"torch": "2"})
    assert kept.costs["stall"] == 1.235
    assert kept.costs.keys() == {"stall", "store", "manifest", "digest", "encode", "write", "cpu_writer"}
    assert kept.logical_bytes == kept.new_bytes == LAYOUT.logical_bytes
    assert kept.stored_bytes == sum(entry.size_bytes for entry in store.list(keys.PACKS))
    assert (kept.branch, kept.writer, kept.parents) == ("main", 1, ())
    assert writer.chain.head() == snapshot
    assert_clean(writer.chain)


def test_an_identical_state_stores_no_pack_and_has_the_same_digest() -> None:
    store = MemoryStore()
    writer = started(store)
    first, second = written(writer, [content(1), content(1)])
    assert first.id != second.id
    assert (first.record.state, first.record.manifests) == (second.record.state, second.record.manifests)
    assert (second.record.new_bytes, second.record.stored_bytes) == (0, 0)
    assert second.record.parents == (first.id,)
    assert len(packs(store)) == len(writer.chain.manifest(first).packs)
    assert_clean(writer.chain)


def test_only_what_changed_is_stored() -> None:
    store = MemoryStore()
    writer = started(store)
    one = content(1)
    (first,) = written(writer, [one])
    # One byte of the second of the chunks of `dense`.
    two = Content(LAYOUT, dict(one.leaves), one.value)
    data = bytearray(two.leaves["dense"])
    data[GRID_BYTES + 5] ^= 1
    two.leaves["dense"] = bytes(data)
    (second,) = written(writer, [two], 2)
    assert second.record.new_bytes == GRID_BYTES
    new = set(writer.chain.manifest(second).packs) - set(writer.chain.manifest(first).packs)
    assert len(new) == 1
    for snapshot, wanted in ((first, one), (second, two)):
        assert_restores(writer.chain, snapshot, wanted)


def test_frozen_chunks_have_packs_of_their_own() -> None:
    store = MemoryStore()
    writer = started(store)
    (snapshot,) = written(writer, [content(1)])
    manifest = writer.chain.manifest(snapshot)
    packs_of: dict[str, set[str]] = {}
    for region, kind in zip(manifest.regions, LAYOUT.regions, strict=True):
        found = packs_of.setdefault(kind.kin, set())
        found |= {manifest.places[number].pack for number in region.chunks}
    assert packs_of["frozen"]
    assert packs_of["frozen"].isdisjoint(packs_of["moving"] | packs_of["buffer"])


def test_equal_chunks_of_one_state_are_stored_once() -> None:
    store = MemoryStore()
    writer = started(store)
    one = content(1)
    one.leaves["frozen"] = bytes(40_000)
    one.leaves["dense"] = bytes(36 * 1024)
    (snapshot,) = written(writer, [one])
    assert_restores(writer.chain, snapshot, one)
    zeros = [chunk for chunk in writer.chain.manifest(snapshot).chunks if chunk.size_bytes == GRID_BYTES]
    assert len(zeros) < 2 + len(one.leaves["moment"]) // GRID_BYTES + 2


def test_a_grid_that_is_no_multiple_of_a_page() -> None:
    store = MemoryStore()
    chain = Chain.create(store, 5001)
    writer = Writer(chain, Lease.take(store))
    (snapshot,) = written(writer, [content(1)])
    assert_restores(chain, snapshot, content(1))
    assert_clean(chain)


def test_large_packs_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PACK_BYTES", 2 * GRID_BYTES)
    store = MemoryStore()
    writer = started(store)
    one = content(1)
    (snapshot,) = written(writer, [one])
    assert len(packs(store)) >= 4
    assert_restores(writer.chain, snapshot, one)
    assert_clean(writer.chain)


@pytest.mark.parametrize("encoding", [Encoding.ZSTD, Encoding.SHUFFLE_ZSTD])
def test_encoded_chunks_are_smaller_and_raw_where_they_would_not_be(encoding: Encoding) -> None:
    store = MemoryStore()
    writer = started(store, encoding=encoding)
    soft, hard = compressible(1), content(2)
    first, second = written(writer, [soft, hard])
    assert first.record.stored_bytes < 0.8 * first.record.new_bytes
    dense = writer.chain.manifest(second).place_of
    assert {place.encoding for one, place in dense.values() if one.size_bytes == GRID_BYTES} == {Encoding.RAW}
    assert_restores(writer.chain, first, soft)
    assert_restores(writer.chain, second, hard)
    # An encoding is no part of what a chunk is: the same state has the same digest.
    (raw,) = written(started(MemoryStore()), [soft])
    assert raw.record.state == first.record.state
    assert_clean(writer.chain)


def test_changing_the_encoding_shares_chunks_all_the_same() -> None:
    store = MemoryStore()
    writer = started(store)
    one = compressible(1)
    written(writer, [one])
    writer.encodings = Always(Encoding.SHUFFLE_ZSTD)
    (second,) = written(writer, [one.changed(random.Random(1), "dense")], 2)
    assert 0 < second.record.new_bytes < LAYOUT.logical_bytes
    assert_clean(writer.chain)


# -- what is shared with earlier snapshots ---------------------------------------------------------------


def test_a_fresh_writer_shares_only_what_it_is_told_is_good() -> None:
    store = MemoryStore()
    first_writer = started(store)
    one = content(1)
    (first,) = written(first_writer, [one])
    first_writer.lease.release()

    told = started(store, parent=first.id)
    told.build_on(told.chain.manifest(first))
    (second,) = written(told, [one], 2)
    assert second.record.new_bytes == 0
    told.lease.release()

    untold = started(store, parent=second.id)
    (third,) = written(untold, [one], 3)
    assert third.record.new_bytes == LAYOUT.logical_bytes
    # It found the packs there, byte for byte, and so stored nothing twice.
    assert set(untold.chain.manifest(third).packs) == set(untold.chain.manifest(first).packs)
    assert len(packs(store)) == len(untold.chain.manifest(first).packs)


def test_forgotten_packs_are_written_again() -> None:
    store = MemoryStore()
    writer = started(store)
    one = content(1)
    (first,) = written(writer, [one])
    names = set(writer.chain.manifest(first).packs)
    writer.forget_packs(names)
    for key in packs(store):
        store.delete(key)
    (second,) = written(writer, [one], 2)
    assert set(packs(store)) == {keys.pack(name) for name in names}
    assert_restores(writer.chain, second, one)


def test_chunks_are_shared_with_the_last_four_snapshots() -> None:
    writer = started(MemoryStore())
    written(writer, [content(number) for number in range(4)])
    (back,) = written(writer, [content(0)], 5)
    assert back.record.new_bytes == 0
    written(writer, [content(number) for number in range(10, 14)], 6)
    (late,) = written(writer, [content(0)], 10)
    assert late.record.new_bytes == LAYOUT.logical_bytes


# -- waves ------------------------------------------------------------------------------------------------


with pytest.MonkeyPatch.context() as patched:
    patched.setattr(layouts, "SMALL_BYTES", 4096)
    WIDE = lay_out(LAYOUT.slices)
    """The same leaves, the larger ones in regions of their own."""


def in_waves(one: Content, ranges: Sequence[tuple[int, int]], memory: bytearray) -> Iterator[Wave]:
    """A state that goes through one piece of memory, which is spoiled before it is used again."""
    arena = one.arena()
    for begin, end in ranges:
        memory[:] = random.Random(begin).randbytes(len(memory))
        memory[: end - begin] = arena[begin:end]
        yield Wave(begin, memoryview(memory)[: end - begin])
    memory[:] = bytes(len(memory))


def streamed(one: Content, limit_bytes: int) -> Captured:
    ranges = one.layout.waves(limit_bytes, GRID_BYTES)
    return Captured(one.layout, one.encoded_values(), in_waves(one, ranges, bytearray(limit_bytes)))


@settings(max_examples=examples(40), deadline=None, derandomize=True)
@given(
    pages=st.integers(4, 30),
    seed=st.integers(0, 3),
    kind=st.sampled_from(list(Encoding)),
    cores=st.integers(1, 3),
)
def test_a_state_in_waves_is_the_same_state(pages: int, seed: int, kind: Encoding, cores: int) -> None:
    one = compressible(seed, WIDE)
    one.leaves["moment"] = one.leaves["dense"][: len(one.leaves["moment"])]
    writer = started(MemoryStore(), encoding=kind)
    (at_once,) = written(writer, [one])
    other = on_cores(cores)
    other.encodings = Always(kind)
    snapshot = other.write(streamed(one, pages * 4096), Facts(step=1))
    assert snapshot.record.state == at_once.record.state
    assert_restores(other.chain, snapshot, one)
    waves, whole = other.chain.manifest(snapshot), writer.chain.manifest(at_once)
    assert (waves.leaves, waves.regions, waves.chunks) == (whole.leaves, whole.regions, whole.chunks)
    assert_clean(other.chain)
    # And it shares its chunks with the next, however that one comes.
    (again,) = written(other, [one], 2)
    assert again.record.new_bytes == 0


def test_all_of_a_wave_is_put_before_the_next_is_asked_for() -> None:
    store = MemoryStore()
    writer = started(store)
    one = content(1, WIDE)
    ranges = WIDE.waves(5 * 4096, GRID_BYTES)
    assert len(ranges) >= 4
    stored = []

    def waves() -> Iterator[Wave]:
        for wave in in_waves(one, ranges, bytearray(5 * 4096)):
            stored.append(sum(entry.size_bytes for entry in store.list(keys.PACKS)))
            yield wave

    writer.write(Captured(WIDE, one.encoded_values(), waves()), Facts(step=1))
    for (begin, _), there in zip(ranges, stored, strict=True):
        assert there >= begin


@pytest.mark.parametrize(
    ("ranges", "problem"),
    [
        ([(0, GRID_BYTES)], "end at 16384"),
        ([], "end at 0"),
        ([(4096, WIDE.arena_bytes)], "begins at 4096"),
        ([(0, 2 * GRID_BYTES), (GRID_BYTES, WIDE.arena_bytes)], "begins at"),
        ([(0, 4096), (4096, WIDE.arena_bytes)], "cuts"),
        ([(0, WIDE.arena_bytes - 4096)], "end at"),
    ],
)
def test_waves_that_leave_something_out_are_refused(ranges: list[tuple[int, int]], problem: str) -> None:
    writer = started(MemoryStore())
    waves = in_waves(content(1, WIDE), ranges, bytearray(WIDE.arena_bytes))
    with pytest.raises(ValueError, match=problem):
        writer.write(Captured(WIDE, content(1, WIDE).encoded_values(), waves), Facts(step=1))
    assert writer.chain.head() is None


def test_a_capture_that_fails_between_waves_leaves_nothing() -> None:
    writer = started(MemoryStore())
    one = content(1, WIDE)

    def waves() -> Iterator[Wave]:
        yield next(in_waves(one, [(0, GRID_BYTES)], bytearray(GRID_BYTES)))
        raise RuntimeError("the trainer is gone")

    with pytest.raises(RuntimeError, match="gone"):
        writer.write(Captured(WIDE, one.encoded_values(), waves()), Facts(step=1))
    assert writer.chain.head() is None
    (snapshot,) = written(writer, [one])
    assert_restores(writer.chain, snapshot, one)
    assert_clean(writer.chain)


# -- what has not changed ---------------------------------------------------------------------------------

FROZEN = frozenset(number for number, region in enumerate(LAYOUT.regions) if region.kin == "frozen")


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of chunks that were digested."""
    sizes: list[int] = []

    def digest(data: memoryview) -> str:
        sizes.append(len(data))
        return chunk.digest(data)

    monkeypatch.setattr(packing, "digest", digest)
    return sizes


def test_regions_that_have_not_changed_are_not_digested_again(digested: list[int]) -> None:
    writer, slots = started(MemoryStore()), Slots()
    one = content(1)
    for step in range(1, 7):
        digested.clear()
        one = one.changed(random.Random(step), "dense", "moment")
        captured = one.captured(slots.next(), FROZEN if step > 2 else ())
        snapshot = writer.write(captured, Facts(step=step))
        frozen = sum(LAYOUT.regions[number].size_bytes for number in FROZEN)
        assert sum(digested) >= LAYOUT.logical_bytes - frozen * (step > 2)
        assert (40_000 % GRID_BYTES in digested) is (step <= 2)
        assert_restores(writer.chain, snapshot, one)
    assert_clean(writer.chain)


def claims(writer: Writer, one: Content, memory: memoryview, digested: list[int]) -> bool:
    """Whether the writer believes that what is frozen has not changed in this memory."""
    digested.clear()
    snapshot = writer.write(one.captured(memory, FROZEN), Facts(step=9))
    assert_restores(writer.chain, snapshot, one)
    return 40_000 % GRID_BYTES not in digested


def test_a_claim_counts_only_for_memory_that_the_writer_knows(digested: list[int]) -> None:
    writer, slots = started(MemoryStore()), Slots()
    one = content(1)
    first, second = slots.next(), slots.next()
    assert not claims(writer, one, first, digested)
    assert not claims(writer, one, second, digested)
    assert claims(writer, one, first, digested)
    assert not claims(writer, one, memoryview(mmap.mmap(-1, LAYOUT.arena_bytes)), digested)
    # A bytearray may be gone and another lie where it was.
    plain = memoryview(bytearray(LAYOUT.arena_bytes))
    assert not claims(writer, one, plain, digested)
    assert not claims(writer, one, plain, digested)


def test_a_claim_does_not_outlive_a_snapshot_that_failed(digested: list[int]) -> None:
    """What the memory holds now is not what was last digested."""
    store = FaultyStore(MemoryStore(), fault=lambda: Unavailable("away"))
    writer, slots = started(store), Slots()
    memory = slots.next()
    one = content(1)
    assert not claims(writer, one, memory, digested)
    other = one.changed(random.Random(1), "frozen")
    store.at = store.count
    with pytest.raises(Unavailable):
        writer.write(other.captured(memory), Facts(step=2))
    assert not claims(writer, other, memory, digested)
    assert claims(writer, other, memory, digested)


def test_a_claim_needs_the_chunk_to_be_there(digested: list[int]) -> None:
    store = MemoryStore()
    writer, slots = started(store), Slots()
    memory = slots.next()
    one = content(1)
    claims(writer, one, memory, digested)
    names = {name.rpartition("/")[2] for name in packs(store)}
    writer.forget_packs(names)
    for key in packs(store):
        store.delete(key)
    assert not claims(writer, one, memory, digested)
    assert_clean_but_for_the_first(writer.chain)


def assert_clean_but_for_the_first(chain: Chain) -> None:
    head = chain.head()
    assert head is not None
    assert not any(head.id in finding.snapshots for finding in verify(chain).findings)


# -- threads ----------------------------------------------------------------------------------------------


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that were started."""
    names: list[str] = []
    start = threading.Thread.start

    def recorded(self: threading.Thread) -> None:
        names.append(self.name)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", recorded)
    return names


@pytest.fixture
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small states are taken for large ones."""
    monkeypatch.setattr(packing, "LANES_FROM_BYTES", 0)
    monkeypatch.setattr(packing, "PACK_BYTES", 2 * GRID_BYTES)
    monkeypatch.setattr(lanes, "SMALL_BYTES", 0)


def on_cores(cores: int, store: Store | None = None) -> Writer:
    chain = Chain.create(store or MemoryStore(), GRID_BYTES)
    return Writer(chain, Lease.take(chain.store), encodings=Always(Encoding.ZSTD), cores=lambda: cores)


def test_a_small_state_starts_no_thread(threads: list[str]) -> None:
    written(on_cores(4), [content(1), content(2)])
    assert threads == []


@pytest.mark.usefixtures("_eager")
def test_a_large_state_starts_a_few_threads_and_ends_them(threads: list[str]) -> None:
    before = threading.active_count()
    written(on_cores(4), [compressible(1)])
    assert "everstep-put" in threads
    assert 1 <= threads.count("everstep-digest") <= 3
    assert threading.active_count() == before
    threads.clear()
    written(on_cores(1), [compressible(1)])
    assert threads == ["everstep-put"]


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("make", [content, compressible])
def test_the_same_state_gives_the_same_packs_on_any_number_of_cores(make: Callable[[int], Content]) -> None:
    one = make(1)
    one.leaves["moment"] = one.leaves["dense"][: len(one.leaves["moment"])]
    made = []
    for cores in (1, 2, 4, 4):
        store = MemoryStore()
        (snapshot,) = written(on_cores(cores, store), [one])
        made.append((packs(store), snapshot.record.manifests, snapshot.record.new_bytes))
        names = list(Chain(store).manifest(snapshot).packs)
        assert names == sorted(names), "which pack is put first is chance"
    assert made[1:] == made[:-1]


@pytest.mark.usefixtures("_eager")
def test_an_interpreter_that_starts_no_threads_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", start)
    writer = on_cores(4)
    (snapshot,) = written(writer, [compressible(1)])
    monkeypatch.undo()
    assert_restores(writer.chain, snapshot, compressible(1))


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("cores", [1, 4])
def test_an_error_while_digesting_comes_out_of_write(monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    writer = on_cores(cores)
    before = threading.active_count()

    class Failing(Always):
        def choose(self, fresh: Fresh, threads: int) -> Way:
            if fresh.region == 2:
                raise MemoryError("no more")
            return super().choose(fresh, threads)

    writer.encodings = Failing(Encoding.ZSTD)
    with pytest.raises(MemoryError, match="no more"):
        written(writer, [content(1)])
    assert threading.active_count() == before
    assert writer.chain.head() is None
    writer.encodings = Always()
    (snapshot,) = written(writer, [content(1)])
    assert_restores(writer.chain, snapshot, content(1))


@pytest.mark.usefixtures("_eager")
def test_memory_can_be_given_back_after_a_write() -> None:
    for cores in (1, 4):
        writer, slots = on_cores(cores), Slots()
        for step in (1, 2, 3):
            slots.write(writer, content(step), step)
        for mapping in slots.mappings:
            mapping.close()  # BufferError where somebody still looks at it.


def test_cores_that_others_keep_busy_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for running, idle in (("1/99", 8), ("3/99", 6), ("8/99", 1), ("30/99", 1), ("0/99", 8), ("x", 4)):
        text = f"0.1 0.2 0.3 {running} 1234\n"
        monkeypatch.setattr(lanes, "open", lambda path, text=text: io.StringIO(text), raising=False)
        assert lanes.idle_cores() == idle
    monkeypatch.setattr(lanes, "open", lambda path: io.StringIO("0 0 0 11/99 1"), raising=False)
    assert [lanes.idle_cores(ours) for ours in (0, 2, 3, 5, 20)] == [1, 1, 1, 3, 8]


# -- costs ------------------------------------------------------------------------------------------------


def test_costs_are_looked_at_when_the_record_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(MemoryStore):
        def put(self, key: str, parts: Sequence[Buffer]) -> bool:
            if key.startswith(keys.MANIFESTS):
                facts.costs["fence"] = 0.25
            return super().put(key, parts)

    begun = time.monotonic() - 5
    facts = Facts(step=1, costs={"stall": 2.0}, begun=begun)
    snapshot = started(Late()).write(content(1).captured(), facts)
    costs = snapshot.record.costs
    assert (costs["stall"], costs["fence"]) == (2.0, 0.25)
    assert 5000 <= costs["durable"] <= (time.monotonic() - begun) * 1e3
    assert costs["digest"] > 0
    assert costs["cpu_writer"] > 0


# -- what is already there, and damaged ------------------------------------------------------------------


@pytest.mark.parametrize("at", [10, -1])
def test_a_damaged_pack_of_the_same_name_is_not_built_on(at: int) -> None:
    store = MemoryStore()
    one = content(1)
    first_writer = started(store)
    (first,) = written(first_writer, [one])
    first_writer.lease.release()
    damaged = packs(store)
    for key in damaged:
        flip(store, key, at)

    writer = started(store, parent=first.id)
    (second,) = written(writer, [one], 2)
    assert_restores(writer.chain, second, one)
    assert {one.key for one in verify(writer.chain).findings} == set(damaged)
    assert not any(second.id in finding.snapshots for finding in verify(writer.chain).findings)
    assert second.record.state == first.record.state
    assert second.record.manifests != first.record.manifests
    assert len(packs(store)) == 2 * len(damaged)


def test_a_damaged_manifest_of_the_same_name_is_not_built_on() -> None:
    store = MemoryStore()
    one = content(1)
    writer = started(store)
    (first,) = written(writer, [one])
    key = keys.manifest(first.record.manifests[0])
    flip(store, key)
    (second,) = written(writer, [one], 2)
    assert_restores(writer.chain, second, one)
    assert writer.chain.manifest(second).salt
    (finding,) = verify(writer.chain).findings
    assert (finding.key, finding.snapshots) == (key, (first.id,))


class Unreadable(MemoryStore):
    """A store some of whose objects cannot be read, or are gone when they are asked for."""

    error: type[EverstepError] = Damaged
    bad: frozenset[str] = frozenset()

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        if key in self.bad:
            raise self.error(f"{key} cannot be read", key=key)
        return super().get(key, start, size_bytes)


@pytest.mark.parametrize("error", [Damaged, NotFound])
def test_a_pack_that_the_disk_cannot_read_is_not_built_on(error: type[EverstepError]) -> None:
    store = Unreadable()
    one = content(1)
    first_writer = started(store)
    written(first_writer, [one])
    first_writer.lease.release()
    store.error, store.bad = error, frozenset(packs(store))
    writer = started(store)
    (second,) = written(writer, [one], 2)
    assert_restores(writer.chain, second, one)


# -- two writers -----------------------------------------------------------------------------------------


def rival_takes(monkeypatch: pytest.MonkeyPatch, store: MemoryStore) -> Lease:
    """A writer of another machine, which is not asked whether the first one lives."""
    with monkeypatch.context() as patched:
        patched.setattr(lease, "_lives", lambda holder: False)
        return Lease.take(store)


def test_a_writer_that_lost_its_lease_is_fenced_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    writer = started(store)
    (first,) = written(writer, [content(1)])
    rival_takes(monkeypatch, store)
    with pytest.raises(Fenced, match=r"writer 2 has taken .* from this one, writer 1") as caught:
        written(writer, [content(2)], 2)
    assert caught.value.kept
    assert caught.value.next
    assert writer.chain.head() == first
    assert writer.parent == first.id
    assert_clean(writer.chain)


class Interrupted(MemoryStore):
    """Runs something once, right before or after a certain operation."""

    before: tuple[str, str] = ("", "")
    then: list[Callable[[], object]]

    def _interrupt(self, verb: str, key: str) -> None:
        wanted, prefix = self.before
        if verb == wanted and key.startswith(prefix) and self.then:
            self.then.pop()()

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        self._interrupt("put", key)
        return super().put(key, parts)

    def list(self, prefix: str = "", limit: int | None = None):  # type: ignore[no-untyped-def]
        self._interrupt("list", prefix)
        return super().list(prefix, limit)


@pytest.mark.parametrize("instant", [("put", keys.PACKS), ("put", keys.SNAPSHOTS), ("list", keys.LEASES),
                                     ("list", keys.HEADS), ("put", keys.HEADS)])  # fmt: skip
def test_the_head_of_a_later_writer_is_never_followed_by_one_of_an_earlier(
    monkeypatch: pytest.MonkeyPatch, instant: tuple[str, str]
) -> None:
    """The later writer takes over and commits at any instant of the earlier one's commit."""
    monkeypatch.setattr(lease, "_lives", lambda holder: False)
    store = Interrupted()
    store.then = []
    old = started(store)
    (first,) = written(old, [content(1)])

    def take_over() -> None:
        written(Writer(old.chain, Lease.take(store), parent=first.id), [content(9)], 9)

    store.before, store.then = instant, [take_over]
    with pytest.raises(Fenced):
        written(old, [content(2)], 2)
    assert not store.then
    points = list(old.chain.points())
    assert [point.head.writer for point in points if point.head] == [2, 1]
    assert_restores(old.chain, points[0].snapshot, content(9))  # type: ignore[arg-type]
    assert_clean(old.chain)


def test_a_head_that_another_put_first_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The earlier writer's head slips in before the later writer's first: both stay, in this order."""
    monkeypatch.setattr(lease, "_lives", lambda holder: False)
    store = MemoryStore()
    old = started(store)
    new = Writer(old.chain, Lease.take(store))
    late = HeadRecord("ab" * 32, 1, old.lease.number, "0" * 16, "now", "main", number=1)
    asked: list[int] = []
    real = new.chain.head_number

    def head_number(branch: str = "main") -> int:
        number = real(branch)
        if not asked:
            asked.append(store.put(late.key, [record.seal(late)]))
        return number

    monkeypatch.setattr(new.chain, "head_number", head_number)
    (snapshot,) = written(new, [content(1)])
    assert asked == [True]
    # The later one has put a fence between them.
    assert [point.number for point in new.chain.points()] == [3, 1]
    assert new.chain.head() == snapshot


def test_two_writers_of_one_lease_on_one_branch_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    writer = started(store)
    twin = Writer(writer.chain, writer.lease)
    monkeypatch.setattr(twin.chain, "head_number", lambda branch="main": 0)
    mine = HeadRecord("ab" * 32, 1, 1, "x", "now", "main", number=1)
    assert store.put(mine.key, [record.seal(mine)])
    with pytest.raises(Conflict, match="advanced by itself"):
        written(twin, [content(1)])


def test_foreign_files_beside_the_heads_do_not_confuse_a_writer() -> None:
    store = MemoryStore()
    for prefix in (keys.LEASES, keys.head("main")):
        assert store.put(f"{prefix}00notes.txt", [b"x"])
    # A chain is created only in an empty place; it was there before the files.
    store.put(keys.CHAIN, [record.seal(record.ChainRecord("c", "now", grid_bytes=GRID_BYTES))])
    writer = started(store)
    first, second = written(writer, [content(1), content(2)])
    assert [point.number for point in writer.chain.points()] == [2, 1]
    assert writer.lease.number == 1
    assert writer.chain.head() == second
    assert first.step == 1


# -- lost answers ----------------------------------------------------------------------------------------


def puts_of_a_snapshot() -> int:
    """How many objects a second snapshot puts."""
    store = FaultyStore(MemoryStore())
    writer = started(store)
    written(writer, [content(1)])
    before = store.count
    written(writer, [content(2)], 2)
    return store.count - before


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("number", range(puts_of_a_snapshot()))
def test_an_unavailable_store_costs_nothing_but_a_retry(number: int, done: bool) -> None:
    """The store fails at one put, having done it or not; the caller tries again."""
    inner = MemoryStore()
    store = FaultyStore(inner, fault=lambda: Unavailable("the store is away"), done=done)
    writer = started(store)
    (first,) = written(writer, [content(1)])
    store.at = store.count + number
    with pytest.raises(Unavailable, match="away"):
        written(writer, [content(2)], 2)
    listed = [snapshot.id for snapshot in writer.chain.snapshots()]
    assert listed[-1] == first.id
    (again,) = written(writer, [content(2)], 2)
    assert writer.chain.head() == again
    assert_restores(writer.chain, again, content(2))
    for snapshot in writer.chain.snapshots():
        assert_restores(writer.chain, snapshot, content(snapshot.step))
    assert_clean(writer.chain)


class Retrying(MemoryStore):
    """Loses the answer of one put, and asks again by itself, as clients of object stores do."""

    lose = ""

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        created = super().put(key, parts)
        if created and self.lose and key.startswith(self.lose):
            self.lose = ""
            return super().put(key, parts)
        return created


@pytest.mark.parametrize("kind", [keys.PACKS, keys.MANIFESTS, keys.SNAPSHOTS, keys.HEADS])
def test_an_answer_lost_inside_the_store_is_settled_by_reading_back(kind: str) -> None:
    store = Retrying()
    writer = started(store)
    store.lose = kind
    (snapshot,) = written(writer, [content(1)])
    assert not store.lose
    assert [point.number for point in writer.chain.points()] == [1]
    assert_restores(writer.chain, snapshot, content(1))
    names = writer.chain.manifest(snapshot).packs
    assert len(packs(store)) == len(names)
    assert_clean(writer.chain)


def test_two_packs_are_put_at_a_time_and_each_is_told_its_share() -> None:
    now = [0.0]
    gates = {"one": threading.Event(), "two": threading.Event(), "three": threading.Event()}
    begun: list[str] = []
    putting = threading.Semaphore(0)
    took: list[tuple[int, float]] = []

    def put(builder: Any) -> None:
        begun.append(builder.name)
        putting.release()
        assert gates[builder.name].wait(60)

    def pack_of(name: str, size_bytes: int) -> Any:
        return SimpleNamespace(name=name, end=size_bytes * lanes.SMALL_BYTES)

    def clock() -> float:
        return now[0]

    putter = lanes.Putter(put, clock, lambda *told: took.append(told), lanes.Air(clock))
    putter.put(pack_of("one", 1))
    assert putting.acquire(timeout=60)
    now[0] = 1.0
    putter.put(pack_of("two", 2))
    assert putting.acquire(timeout=60)
    putter.put(pack_of("three", 3))  # It waits: two are being put.
    assert sorted(begun) == ["one", "two"]
    now[0] = 3.0
    gates["one"].set()  # Alone for 1 s, one of two for 2 s.
    assert putting.acquire(timeout=60)
    assert begun == ["one", "two", "three"]
    now[0] = 4.0
    gates["two"].set()
    gates["three"].set()
    putter.drain()
    putter.close()
    assert took[0] == (lanes.SMALL_BYTES, 2.0)
    assert sum(share for _, share in took) == pytest.approx(4.0)
    assert putter.busy_s == 4.0


def test_an_error_in_the_thread_that_puts_packs_comes_out_of_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PACK_BYTES", GRID_BYTES)
    monkeypatch.setattr(lanes, "SMALL_BYTES", 0)
    store = FaultyStore(MemoryStore(), fault=lambda: Unavailable("no room"))
    writer = started(store)
    store.at = store.count + 1
    with pytest.raises(Unavailable, match="no room"):
        written(writer, [content(1)])
    assert writer.chain.head() is None
    written(writer, [content(1)])
    assert_clean(writer.chain)


# -- creation --------------------------------------------------------------------------------------------


def test_a_chain_is_not_created_where_something_else_is(tmp_path) -> None:  # type: ignore[no-untyped-def]
    place = tmp_path / "runs"
    place.mkdir()
    (place / "weights.pt").write_bytes(b"x")
    with pytest.raises(
        Mismatch, match=r"not an Everstep chain and not empty either \(it holds weights.pt\)"
    ) as caught:
        Chain.create(str(place))
    assert caught.value.next
    assert [path.name for path in place.iterdir()] == ["weights.pt"]
    with pytest.raises(Mismatch, match="is a file"):
        Chain.create(str(place / "weights.pt"))
    assert (place / "weights.pt").read_bytes() == b"x"

    store = MemoryStore()
    store.put("model/weights", [b"x"])
    with pytest.raises(Mismatch, match="not empty"):
        Chain.create(store)
    assert [entry.key for entry in store.list()] == ["model/weights"]


def test_what_a_killed_creation_left_is_no_obstacle(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "c" / "tmp").mkdir(parents=True)
    (tmp_path / "c" / "tmp" / "1-abc").write_bytes(b"half")
    made = Chain.create(str(tmp_path / "c"), GRID_BYTES)
    assert Chain.create(str(tmp_path / "c")).about == made.about
    assert LocalStore(tmp_path / "c").sweep() == 4


def test_two_that_create_a_chain_at_once_have_the_same_one() -> None:
    class Racing(MemoryStore):
        def put(self, key: str, parts: Sequence[Buffer]) -> bool:
            if key == keys.CHAIN and not any(self.list(keys.CHAIN)):
                winner = record.ChainRecord("winner", "now", grid_bytes=GRID_BYTES)
                super().put(key, [record.seal(winner)])
            return super().put(key, parts)

    assert Chain.create(Racing()).about.chain == "winner"


def test_restored_reports_what_it_restores() -> None:
    """The oracle of these tests does not see equality where there is none."""
    writer = started(MemoryStore())
    (snapshot,) = written(writer, [content(1)])
    got, _ = restored(writer.chain, snapshot)
    assert got == content(1)
    assert got != content(2)
