"""Snapshots of several ranks: each stores its part, rank 0 commits; nothing less than all is a snapshot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec
import pytest
from making import content, started
from ranked import SHAPES, World, assert_restores, state

from everstep.chain import parts
from everstep.chain.history import Chain
from everstep.chain.lease import Lease
from everstep.chain.parts import Part, Take
from everstep.chain.reader import Reader
from everstep.chain.states import rehearse, state_of
from everstep.chain.writer import Facts
from everstep.errors import Conflict, Damaged, Fenced, Mismatch, Unavailable
from everstep.format import keys, record
from everstep.format import manifest as manifests
from everstep.format.chunk import Buffer, Encoding, digest
from everstep.format.record import HeadRecord, SnapshotRecord
from everstep.store.base import Entry
from everstep.store.memory import MemoryStore


class Counting(MemoryStore):
    """Counts requests by verb and by what the key begins with."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def _count(self, verb: str, key: str) -> None:
        self.asked[f"{verb} {key.partition('/')[0]}"] += 1

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        self._count("put", key)
        return super().put(key, parts)

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        self._count("get", key)
        return super().get(key, start, size_bytes)

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[Entry]:
        self._count("list", prefix)
        return super().list(prefix, limit)

    def delete(self, key: str) -> None:
        self._count("delete", key)
        super().delete(key)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("encoding", [Encoding.RAW, Encoding.XOR_SHUFFLE_ZSTD])
def test_what_ranks_store_comes_back(ranks: int, encoding: Encoding) -> None:
    world = World(MemoryStore(), ranks, encoding)
    first = state(1, ranks)
    states = [first, first.changed(2, "sharded", "bias"), first.changed(3, "count")]
    for step, one in enumerate(states, 1):
        snapshot = world.take(one, step)
        assert_restores(world.chain, snapshot, one)
        assert len(snapshot.record.manifests) == ranks
        assert snapshot.record.format == (3 if ranks > 1 else 1)
        done = rehearse(world.chain, snapshot)
        assert done.leaves == len(SHAPES) + ranks
        found = world.chain.manifests(snapshot)
        assert state_of(Reader(world.chain.store), found) == snapshot.record.state
        assert world.chain.manifest(snapshot).state == snapshot.record.state
    assert [one.step for one in Chain(world.chain.store).snapshots()] == [3, 2, 1]
    assert not list(world.chain.store.list(keys.PARTS))


def test_the_records_of_several_ranks_are_of_format_3() -> None:
    world = World(MemoryStore(), 2)
    world.take(state(1, 2), 1)
    key = keys.numbered(keys.head("main"), 1)
    assert record.unseal(world.chain.store.get(key), HeadRecord, key).format == 3


def test_one_rank_writes_as_ever() -> None:
    """Bytes and requests; by its part and by `write`."""
    stores = [Counting(), Counting()]
    one = content(3)
    facts = Facts(step=1, taken_at="now")
    writers = []
    for store in stores:
        writer = started(store, encoding=Encoding.RAW)
        writer._clock = writer._thread_clock = lambda: 0.0
        writers.append(writer)
        store.asked.clear()
    snapshot = writers[0].write(one.captured(), facts)
    part = writers[1].store_part(one.captured(), 0, 1)
    assert writers[1].commit([part], facts) == snapshot
    assert stores[0].asked == stores[1].asked
    assert stores[0].asked == {
        "put packs": 2,
        "put manifests": 1,
        "put snapshots": 1,
        "list prunes": 2,
        "list leases": 4,
        "list heads": 4,
        "put heads": 1,
    }
    manifest = writers[0].chain.manifest(snapshot)
    assert (manifest.format, snapshot.record.format) == (1, 1)


def test_a_rank_asks_for_three_things() -> None:
    store = Counting()
    world = World(store, 4)
    for step in range(1, 4):
        one = state(step, 4)
        take = world.begin()
        for rank in range(4):
            store.asked.clear()
            world.store(take, one, [rank])
            assert store.asked == {"put packs": 1 + (rank == 3), "put manifests": 1, "put parts": 1}
        store.asked.clear()
        world.commit(take, step)
        assert store.asked["get parts"] == store.asked["delete parts"] == 4
        assert store.asked["list packs"] == 0
        assert store.asked.total() <= 4 + 4 + 14


def test_chunks_are_shared_with_the_last_part() -> None:
    world = World(MemoryStore(), 3)
    first = state(1, 3)
    world.take(first, 1)
    again = world.take(first.changed(2, "count"), 2)
    assert again.record.new_bytes < again.record.logical_bytes / 4
    assert again.record.stored_bytes < again.record.logical_bytes
    world.lease.release()
    other = World(world.chain.store, 3)
    assert other.take(first.changed(3, "count"), 3).record.new_bytes < 30_000, "also after a resume"


# -- what is no snapshot -----------------------------------------------------------------------------------


def test_parts_that_are_not_those_of_all_ranks() -> None:
    world = World(MemoryStore(), 3)
    found = world.store(world.begin(), state(1, 3))
    other = World(MemoryStore(), 2)
    others = other.store(other.begin(), state(1, 2))
    for some in (found[:2], [*found, found[0]], [*found[:2], others[0]], []):
        with pytest.raises(Mismatch, match="parts of all ranks"):
            world.writers[0].commit(some, Facts(step=1))
    assert world.chain.head() is None


def test_a_writer_that_was_replaced_commits_nothing() -> None:
    world = World(MemoryStore(), 2)
    take = world.begin()
    world.store(take, state(1, 2))
    Lease(world.chain.store, world.lease.number).release()
    World(world.chain.store, 2)
    with pytest.raises(Fenced):
        world.commit(take, 1)
    assert world.chain.head() is None


@pytest.mark.parametrize("swap", [(1, 0), (0, 0), (0,), (0, 1, 1)])
def test_a_record_that_names_manifests_of_other_ranks(swap: tuple[int, ...]) -> None:
    world = World(MemoryStore(), 2)
    snapshot = world.take(state(1, 2), 1)
    names = tuple(snapshot.record.manifests[number] for number in swap)
    data = record.encode(msgspec.structs.replace(snapshot.record, manifests=names))
    world.chain.store.put(keys.snapshot(digest(data)), [data])
    with pytest.raises(Damaged):
        world.chain.manifest(world.chain.snapshot(digest(data)))


def test_a_manifest_of_another_snapshot() -> None:
    world = World(MemoryStore(), 2)
    one, two = world.take(state(1, 2), 1), world.take(state(2, 2), 2)
    mixed = msgspec.structs.replace(one.record, manifests=(one.record.manifests[0], two.record.manifests[1]))
    data = record.encode(mixed)
    world.chain.store.put(keys.snapshot(digest(data)), [data])
    with pytest.raises(Damaged, match="name different states"):
        world.chain.manifest(world.chain.snapshot(digest(data)))


def test_a_manifest_that_is_missing() -> None:
    world = World(MemoryStore(), 3)
    snapshot = world.take(state(1, 3), 1)
    world.chain.store.delete(keys.manifest(snapshot.record.manifests[1]))
    with pytest.raises(Damaged, match="missing") as caught:
        world.chain.manifest(snapshot)
    assert caught.value.key == keys.manifest(snapshot.record.manifests[1])


# -- telling of parts --------------------------------------------------------------------------------------


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []
        self.events: list[tuple[float, object]] = []

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        assert seconds >= 0
        self.waits.append(seconds)
        self.now += seconds
        while self.events and self.events[0][0] <= self.now:
            self.events.pop(0)[1]()  # type: ignore[operator]


def a_part(rank: int, ranks: int = 4) -> Part:
    return Part(rank, ranks, "ab" * 32, "cd" * 32, 10, 5, 4096, ("why",), ("ef" * 32,))


def test_parts_are_gathered_as_they_come() -> None:
    chain = Chain.create(store := Counting())
    take = Take("main", 1, 5)
    clock = Clock()
    for rank in range(4):
        clock.events.append((10.0 ** (rank - 1), lambda rank=rank: parts.announce(chain, take, a_part(rank))))
    parts.announce(chain, Take("main", 1, 4), a_part(0))
    store.asked.clear()
    found = parts.gather(chain, take, 4, 600.0, clock, clock.wait)
    assert found == [a_part(rank) for rank in range(4)]
    assert store.asked["get parts"] == 4, "each is read once"
    assert store.asked["list parts"] < 120
    assert clock.now < 100 * 1.06, "the last is seen soon"


def test_ranks_that_are_late_are_named() -> None:
    chain = Chain.create(MemoryStore())
    take = Take("main", 1, 5)
    clock = Clock()
    parts.announce(chain, take, a_part(2))
    with pytest.raises(Unavailable, match=r"of 4 ranks 3 had not stored .* after 60 s \(0, 1, 3\)"):
        parts.gather(chain, take, 4, 60.0, clock, clock.wait)
    assert clock.now == 60.0
    with pytest.raises(Unavailable, match="and 92 others"):
        parts.gather(chain, Take("main", 1, 6), 100, 60.0, clock, clock.wait)


def test_a_rank_that_gives_up_is_not_waited_for() -> None:
    chain = Chain.create(MemoryStore())
    take = Take("main", 1, 5)
    clock = Clock()
    parts.withdraw(chain, take, 3, "no space left")
    with pytest.raises(Unavailable, match="rank 3 could not store its part of the snapshot: no space left"):
        parts.gather(chain, take, 4, 60.0, clock, clock.wait)
    assert not clock.waits
    with pytest.raises(Conflict, match="given take 5"):
        parts.announce(chain, take, a_part(3))
    parts.announce(chain, take, a_part(0))
    parts.withdraw(chain, take, 0, "too late")
    assert parts.announce(chain, take, a_part(0)) == a_part(0)


def test_a_rank_that_tells_twice_has_told_once() -> None:
    """A keeper that died after its put does it all again; what it makes then may have another name."""
    chain = Chain.create(MemoryStore())
    take = Take("main", 1, 5)
    parts.announce(chain, take, a_part(0, 1))
    other = Part(0, 1, "12" * 32, "cd" * 32, 10, 5, 4096)
    assert parts.announce(chain, take, other) == a_part(0, 1)
    assert parts.gather(chain, take, 1, 0.0) == [a_part(0, 1)]


def test_a_store_that_is_away_is_asked_again() -> None:
    class Away(MemoryStore):
        away = False

        def list(self, prefix: str = "", limit: int | None = None) -> Iterator[Entry]:
            if self.away:
                raise Unavailable("it does not answer", away=True)
            return super().list(prefix, limit)

    chain = Chain.create(store := Away())
    take = Take("main", 1, 5)
    parts.announce(chain, take, a_part(0, 1))
    clock = Clock()
    store.away = True
    clock.events.append((30.0, lambda: setattr(store, "away", False)))
    assert parts.gather(chain, take, 1, 60.0, clock, clock.wait) == [a_part(0, 1)]
    store.away = True
    with pytest.raises(Unavailable, match="had not stored") as caught:
        parts.gather(chain, take, 1, 60.0, clock, clock.wait)
    assert "does not answer" in str(caught.value.__cause__)


def test_a_part_record_of_another_number_of_ranks() -> None:
    chain = Chain.create(MemoryStore())
    take = Take("main", 1, 5)
    parts.announce(chain, take, a_part(0, 2))
    with pytest.raises(Damaged, match="of rank 0 of 2, not of 4"):
        parts.gather(chain, take, 4, 60.0)


def test_records_of_what_is_over_are_taken_away() -> None:
    chain = Chain.create(MemoryStore())
    for lease, number in ((1, 9), (2, 1), (2, 2), (2, 3), (3, 1)):
        parts.announce(chain, Take("main", lease, number), a_part(0))
    parts.announce(chain, Take("other", 1, 1), a_part(0))
    parts.clear(chain, Take("main", 2, 2))
    left = [entry.key for entry in chain.store.list(keys.PARTS)]
    assert left == [
        keys.part("main", 2, 3, 0),
        keys.part("main", 3, 1, 0),
        keys.part("other", 1, 1, 0),
    ]


def test_a_snapshot_of_many_ranks_fits_its_record() -> None:
    many = tuple(digest(str(number).encode()) for number in range(manifests.MAX_RANKS))
    made = SnapshotRecord(3, 1, 0, "ab" * 32, many, "now", "main", 1)
    assert len(record.encode(made)) < record.MAX_RECORD_BYTES
