"""Writers of several ranks in one process: equal chunks once, no more cores than are idle, bounded packs."""

from __future__ import annotations

import mmap
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from making import GRID_BYTES

from everstep.chain import lanes, packing
from everstep.chain.encoding import Always
from everstep.chain.history import Chain
from everstep.chain.lanes import Air
from everstep.chain.lease import Lease
from everstep.chain.packing import HELD_BYTES, PACKS_AT_ONCE, Shares, Wave
from everstep.chain.parts import Part
from everstep.chain.reader import Reader, Target
from everstep.chain.siblings import AIR_BYTES, Siblings
from everstep.chain.writer import Captured, Facts, Writer
from everstep.errors import Unavailable
from everstep.format import keys, values
from everstep.format.chunk import Encoding, aligned
from everstep.format.layout import Layout, Slice, lay_out
from everstep.format.manifest import Manifest
from everstep.store.base import Buffer
from everstep.store.memory import MemoryStore

DEADLINE_S = 60.0
RANKS = 4
FLOATS = 66 * GRID_BYTES // 4
"""Just large enough for a region."""


def laid(rank: int) -> Layout:
    """Two leaves of the rank's own, each with a region to itself."""
    names = [f"~rank/{rank}/own", f"~rank/{rank}/same"]
    return lay_out([Slice(name, "float32", (FLOATS,), (0,), (FLOATS,)) for name in names])


def content(rank: int, seed: int = 0) -> bytearray:
    """The bytes: one leaf is the same on all ranks."""
    layout = laid(rank)
    made = bytearray(layout.arena_bytes)
    for one, (number, offset) in zip(layout.slices, layout.places, strict=True):
        start = layout.regions[number].offset + offset
        what = f"{seed}" if one.name.endswith("same") else f"{seed} {rank}"
        made[start : start + one.size_bytes] = random.Random(what).randbytes(one.size_bytes)
    return made


def captured(rank: int, seed: int = 0) -> Captured:
    return Captured.whole(laid(rank), memoryview(content(rank, seed)), values.encode({}))


class Meeting(MemoryStore):
    """A store in which packs are put only when all ranks have come to it, or have failed."""

    def __init__(self, fails: Callable[[str], bool] = lambda thread: False) -> None:
        super().__init__()
        self._fails = fails
        self._barrier = threading.Barrier(RANKS)
        self._first: set[str] = set()
        self.packs = 0

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        name = threading.current_thread().name
        if key.startswith(keys.PACKS) and name not in self._first:
            self._first.add(name)
            self._barrier.wait(DEADLINE_S)
        if key.startswith(keys.PACKS) and self._fails(name):
            raise Unavailable("there is no room", key=key)
        return super().put(key, parts)


def look() -> None:
    """Nobody waits."""


def store_all(
    store: MemoryStore, state: Callable[[int], Captured], siblings: Siblings | None = None
) -> dict[int, Part | Exception]:
    """All ranks at once, each in a thread that is called by its rank."""
    Chain.create(store, GRID_BYTES)
    siblings = siblings or Siblings(lambda ours: RANKS)
    found: dict[int, Part | Exception] = {}

    def work(rank: int) -> None:
        writer = Writer(Chain(store), Lease(store, 1), encodings=Always(Encoding.RAW))
        siblings.enter(look)
        try:
            found[rank] = writer.store_part(state(rank), rank, RANKS, partial(siblings.shares, "take 1"))
        except Exception as error:
            found[rank] = error
        finally:
            siblings.leave(look)

    threads = [threading.Thread(target=work, args=(rank,), name=str(rank)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    return found


def read_back(store: MemoryStore, manifest: Manifest) -> bytes:
    made = bytearray(sum(aligned(region.size_bytes) for region in manifest.regions))
    targets, at = [], 0
    for number, region in enumerate(manifest.regions):
        targets.append(Target(number, 0, memoryview(made)[at : at + region.size_bytes]))
        at += aligned(region.size_bytes)
    assert Reader(store).fill(manifest, targets) == []
    return bytes(made)


def assert_whole(store: MemoryStore, part: Part | Exception) -> None:
    assert isinstance(part, Part), part
    manifest = Chain(store).part_named(part.manifest, part.rank, part.ranks)
    assert read_back(store, manifest) == content(part.rank)


def stored_bytes(store: MemoryStore) -> int:
    return sum(entry.size_bytes for entry in store.list(keys.PACKS))


def test_equal_chunks_of_ranks_are_stored_once() -> None:
    store = Meeting()
    parts = store_all(store, captured)
    for part in parts.values():
        assert_whole(store, part)
    own, once = FLOATS * 4 * RANKS, FLOATS * 4
    new_bytes = [part.new_bytes for part in parts.values() if isinstance(part, Part)]
    assert sum(new_bytes) == own + once
    assert own + once <= stored_bytes(store) < own + once + RANKS * 64 * 1024
    # Rank 0 is told what the others rely on, so that it can look whether it is still there.
    packs = {entry.key.rpartition("/")[2] for entry in store.list(keys.PACKS)}
    relies = {name for part in parts.values() if isinstance(part, Part) for name in part.relies}
    assert relies
    assert relies <= packs


@pytest.mark.parametrize("failing", ["0", "3", "12"])
def test_what_one_could_not_store_the_others_do(failing: str) -> None:
    store = Meeting(lambda thread: thread in failing)
    parts = store_all(store, captured)
    for rank, part in parts.items():
        if str(rank) in failing:
            assert isinstance(part, Unavailable)
        else:
            assert_whole(store, part)


class _Waves(list[Wave]):
    """A state in two waves: before the second, something else happens."""

    def __init__(self, rank: int, between: Callable[[], object]) -> None:
        memory = memoryview(content(rank))
        half = laid(rank).regions[1].offset
        super().__init__([Wave(0, memory[:half]), Wave(half, memory[half:])])
        self._between = between

    def __iter__(self) -> Iterator[Wave]:
        yield self[0]
        self._between()
        yield self[1]


def test_nobody_waits_for_one_whose_waves_are_still_to_come() -> None:
    """Its trainer may be frozen: what it has put is shared, what it is about to put is not."""
    store = MemoryStore()
    stored = threading.Event()

    def state(rank: int) -> Captured:
        if rank == 0:
            return Captured(laid(0), values.encode({}), _Waves(0, lambda: stored.wait(DEADLINE_S)))
        return captured(rank)

    class Counting(Siblings):
        left = RANKS - 1

        def leave(self, look: Callable[[], None]) -> None:
            self.left -= 1
            if not self.left:
                stored.set()

    parts = store_all(store, state, Counting(lambda ours: RANKS))
    assert stored.is_set()
    for part in parts.values():
        assert_whole(store, part)


def test_nobody_waits_for_one_whose_memory_is_still_being_filled() -> None:
    store = MemoryStore()
    Chain.create(store, GRID_BYTES)
    siblings = Siblings(lambda ours: 4)
    layout = laid(0)
    stuck, filled = threading.Event(), threading.Event()
    last = layout.regions[-1].offset + layout.regions[-1].size_bytes

    def arrived(end: int) -> None:
        if end >= last:
            stuck.set()
            assert filled.wait(DEADLINE_S)

    slow = Captured(
        layout, values.encode({}), [Wave(0, memoryview(content(0)), frozenset(), arrived, filled.is_set)]
    )
    found: dict[int, Part] = {}

    def store_part(rank: int, state: Captured) -> None:
        writer = Writer(Chain(store), Lease(store, 1), encodings=Always(Encoding.RAW))
        found[rank] = writer.store_part(state, rank, 2, partial(siblings.shares, 1))

    threads = [
        threading.Thread(target=store_part, args=(rank, state), daemon=True)
        for rank, state in enumerate((slow, captured(1)))
    ]
    threads[0].start()
    # All of the leaf that both have is there, but for its end; and none of it is put yet.
    assert stuck.wait(DEADLINE_S)
    threads[1].start()
    threads[1].join(DEADLINE_S)
    assert found.keys() == {1}
    filled.set()
    threads[0].join(DEADLINE_S)
    for part in found.values():
        assert_whole(store, part)


def test_what_builds_on_something_is_pointed_to_with_what_it_builds_on() -> None:
    store = MemoryStore()
    Chain.create(store, GRID_BYTES)
    siblings = Siblings(lambda ours: 2)
    memories = [memoryview(mmap.mmap(-1, laid(0).arena_bytes)) for _ in range(2)]
    first, near = bytes(content(0)), content(0)
    near[5] ^= 1
    writer = Writer(Chain(store), Lease(store, 1), encodings=Always(Encoding.RAW))
    for take, data in enumerate((first, near)):
        memories[take][:] = data
        state = Captured.whole(laid(0), memories[take], values.encode({}))
        writer.store_part(state, 0, 2, partial(siblings.shares, take))
        writer.encodings = Always(Encoding.XOR_SHUFFLE_ZSTD)
    other = Writer(Chain(store), Lease(store, 1))
    part = other.store_part(
        Captured.whole(laid(1), memoryview(near), values.encode({})), 1, 2, partial(siblings.shares, 1)
    )
    manifest = Chain(store).part_named(part.manifest, 1, 2)
    assert [bool(place.base) for place in manifest.places].count(True) == 1
    # The rest lies in packs of the take before.
    assert 0 < part.new_bytes < len(near)
    assert read_back(store, manifest) == near


def test_another_take_shares_nothing() -> None:
    siblings = Siblings(lambda ours: 1)
    first = siblings.shares(1).common
    assert siblings.shares(1).common is first
    assert siblings.shares(2).common is not first
    siblings.shares(3)
    assert siblings.shares(1).common is not first


# -- cores and memory --------------------------------------------------------------------------------------


def test_no_more_threads_compute_than_cores_are_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    computing, most = [0], [0]
    lock = threading.Lock()
    both = threading.Event()
    real = packing.digest

    def digest(data: memoryview) -> str:
        with lock:
            computing[0] += 1
            most[0] = max(most[0], computing[0])
            if computing[0] == 2:
                both.set()
        both.wait(DEADLINE_S)
        name = real(data)
        with lock:
            computing[0] -= 1
        return name

    monkeypatch.setattr(packing, "digest", digest)
    monkeypatch.setattr(packing, "LANES_FROM_BYTES", 0)
    store = MemoryStore()
    # What the first computes on is not idle for those who come: on two cores, nothing. Who comes when all
    # others have stored has one.
    idle = iter([2, 0, 0, 0])
    parts = store_all(store, captured, Siblings(lambda ours: max(next(idle) + ours, 1)))
    assert most[0] == 2
    for part in parts.values():
        assert_whole(store, part)


def test_cores_on_which_siblings_compute_are_not_lost_to_those_who_come() -> None:
    idle = [3]
    siblings = Siblings(lambda ours: idle[0] + ours)
    first = siblings.shares(1)
    assert first.lanes == 3
    with first.core(), first.core():
        idle[0] = 2
        second = siblings.shares(1)
        assert second.lanes == 4
    # That none computes at this instant means nothing, as long as somebody stores.
    idle[0] = 1
    third = siblings.shares(1)
    assert third.lanes == 4
    for one in (first, second, third):
        one.done()
    assert siblings.shares(1).lanes == 1


def test_packs_under_way_are_bounded_for_all_together() -> None:
    siblings = Siblings(lambda ours: 1)
    siblings.enter(look)
    assert siblings.shares(1).held_bytes == HELD_BYTES
    for _ in range(15):
        siblings.enter(look)
    assert siblings.shares(1).held_bytes * PACKS_AT_ONCE * 16 <= AIR_BYTES
    for _ in range(15):
        siblings.leave(look)
    assert siblings.shares(1).held_bytes == HELD_BYTES


def test_packs_that_are_put_at_a_time_are_bounded_for_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PACK_BYTES", GRID_BYTES)
    monkeypatch.setattr(lanes, "SMALL_BYTES", 0)
    monkeypatch.setattr("everstep.chain.siblings.AIR_PACKS", 1)
    put: list[bool] = []
    putting = threading.Lock()

    class Asking(MemoryStore):
        def put(self, key: str, parts: Sequence[Buffer]) -> bool:
            if not key.startswith(keys.PACKS):
                return super().put(key, parts)
            put.append(putting.acquire(blocking=False))
            try:
                return super().put(key, parts)
            finally:
                putting.release()

    parts = store_all(Asking(), captured)
    assert len(put) > RANKS * FLOATS * 4 // GRID_BYTES
    assert all(put)
    assert all(isinstance(part, Part) for part in parts.values())


def test_how_fast_the_store_is_each_is_told_for_all_of_them() -> None:
    """Else each would take it for slow, and compute on encodings for which there is no time."""
    now = [0.0]
    both = threading.Barrier(2, lambda: now.__setitem__(0, 8.0))
    air = Air(lambda: now[0], 2)
    with ThreadPoolExecutor(2) as pool:
        shares = [pool.submit(air.put, lambda: both.wait(DEADLINE_S)) for _ in range(2)]
        assert [share.result() for share in shares] == [4.0, 4.0]
    siblings = Siblings(lambda ours: 1)
    assert siblings.shares(1).air is siblings.shares(2).air


def test_a_pack_is_closed_when_it_holds_its_share() -> None:
    store = MemoryStore()
    Chain.create(store, GRID_BYTES)
    writer = Writer(Chain(store), Lease(store, 1), encodings=Always(Encoding.ZSTD))
    data = bytearray(laid(0).arena_bytes)
    for at in range(0, len(data), GRID_BYTES):
        data[at] = at // GRID_BYTES + 1
    state = Captured.whole(laid(0), memoryview(data), values.encode({}))
    part = writer.store_part(state, 0, 1, lambda: Shares(1, held_bytes=1, common=None))
    assert len(list(store.list(keys.PACKS))) == 2 * FLOATS * 4 // GRID_BYTES
    assert part.new_bytes == FLOATS * 8


def test_who_waits_is_told_when_all_have_told_of_their_part() -> None:
    siblings = Siblings(lambda ours: 1)
    told: list[int] = []
    first, second = (lambda: told.append(1)), (lambda: told.append(2))
    siblings.enter(first)
    siblings.enter(second)
    siblings.finished("take 1")
    siblings.finished("take 2")
    assert told == []
    siblings.finished("take 1")
    assert told == [1, 2]
    siblings.leave(second)
    siblings.finished("take 3")
    assert told == [1, 2, 1]


def test_a_single_writer_shares_with_nobody() -> None:
    store = MemoryStore()
    Chain.create(store, GRID_BYTES)
    writer = Writer(Chain(store), Lease.take(store))
    snapshot = writer.write(captured(0), Facts(step=1))
    assert read_back(store, Chain(store).manifest(snapshot)) == content(0)
