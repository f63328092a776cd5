"""Whose writer a run becomes in all its stores, and what its own lacks."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

import pytest
from making import GRID_BYTES, Content, assert_restores, content

from everstep.chain import lease as leases
from everstep.chain.adoption import Replicas, ask_all
from everstep.chain.history import Chain
from everstep.chain.mirror import Mirror
from everstep.chain.replicas import remember, remembered
from everstep.chain.verify import verify
from everstep.chain.writer import Facts, Writer
from everstep.errors import Conflict, Damaged, Fenced, Mismatch, Unavailable
from everstep.events import BroughtBack, Event, Skipped, Warned
from everstep.format import keys, record
from everstep.store.base import Store
from everstep.store.local import LocalStore
from everstep.store.memory import MemoryStore
from everstep.testing.faults import READS, Died, FaultyStore


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of the machine, to be changed: processes of another one cannot be asked whether they live."""
    names = ["a"]
    monkeypatch.setattr(leases.socket, "gethostname", lambda: names[0])
    return names


def contents(count: int) -> list[Content]:
    made = [content(1)]
    while len(made) < count:
        made.append(made[-1].changed(random.Random(len(made)), "dense", "count"))
    return made


class Host:
    """A run on one machine: its own store, and replicas."""

    def __init__(self, first: Store, replicas: Sequence[Store], branch: str = "main") -> None:
        self.events: list[Event] = []
        self.branch = branch
        self.replicas = Replicas(replicas, self.events.append, within_s=5)
        about = self.replicas.chain_record() if not list(first.list(keys.CHAIN)) else None
        self.chain = Chain.create(first, GRID_BYTES) if about is None else Chain.create_as(first, about)
        self.lease = self.replicas.take(self.chain, branch)
        self.replicas.adopt(self.chain, branch, self.lease)
        head = self.chain.head(branch)
        self.writer = Writer(self.chain, self.lease, branch, "" if head is None else head.id)

    def commit(self, one: Content, step: int) -> None:
        self.writer.write(one.captured(), Facts(step=step))

    def follow(self) -> None:
        for store in self.replicas.stores:
            Mirror(self.chain, store, self.branch, self.lease.number).bring_up()

    def close(self) -> None:
        self.lease.release()
        self.replicas.let_go(self.chain, self.branch, self.lease, ())

    def told(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


def steps(store: Store) -> list[int]:
    return [head.step for head in Chain(store).heads()]


def assert_whole(store: Store) -> Chain:
    chain = Chain(store)
    report = verify(chain)
    assert report.findings == []
    assert report.whole == report.snapshots
    return chain


def test_a_run_whose_disk_is_lost_goes_on_from_its_replica(host: list[str]) -> None:
    replica = MemoryStore("replica")
    made = contents(4)
    one = Host(MemoryStore("one"), [replica])
    for step in (1, 2, 3):
        one.commit(made[step - 1], step)
    one.follow()
    host[0] = "b"
    other = Host(MemoryStore("two"), [replica])
    assert other.chain.about == one.chain.about
    (back,) = other.told(BroughtBack)
    assert isinstance(back, BroughtBack)
    assert (back.replica, back.step) == ("memory://replica", 3)
    chain = assert_whole(other.chain.store)
    assert_restores(chain, chain.find("head"), made[2])
    assert steps(other.chain.store) == [3], "the newest alone is got"
    other.commit(made[3], 4)
    other.follow()
    assert steps(replica) == [4, 3, 2, 1]
    assert_whole(replica)
    # Who wrote before finds out before he lists anything more.
    one.commit(made[0], 4)
    with pytest.raises(Fenced, match="by way of memory://replica"):
        one.follow()
    assert steps(replica) == [4, 3, 2, 1]


def test_the_lease_has_one_number_above_all() -> None:
    first, near, far = MemoryStore("first"), MemoryStore("near"), MemoryStore("far")
    one = Host(first, [near, far])
    one.commit(content(1), 1)
    one.follow()
    one.close()
    for number in range(3, 8):
        record_of = leases._owner(0, number, "main")
        far.put(record_of.key, [record.seal(record_of)])
    two = Host(first, [near, far])
    assert two.lease.number == 8
    assert [leases.newest(store) for store in (first, near, far)] == [8, 8, 8]
    two.close()
    assert [leases.newest(store) for store in (first, near, far)] == [9, 9, 9]


def test_of_several_replicas_the_newest_counts(host: list[str]) -> None:
    old, new = MemoryStore("old"), MemoryStore("new")
    made = contents(3)
    one = Host(MemoryStore("one"), [old, new])
    one.commit(made[0], 1)
    one.follow()
    one.commit(made[1], 2)
    Mirror(one.chain, new, "main", one.lease.number).bring_up()
    host[0] = "b"
    two = Host(MemoryStore("two"), [old, new])
    assert steps(two.chain.store) == [2]
    two.commit(made[2], 3)
    two.follow()
    for store in (old, new):
        assert steps(store) == [3, 2, 1]
        assert_restores(Chain(store), Chain(store).find("head"), made[2])
        assert_whole(store)


def test_a_first_store_that_is_behind_is_brought_up(host: list[str]) -> None:
    """As after a disk was put back out of an older backup."""
    first, replica = MemoryStore("first"), MemoryStore("replica")
    made = contents(4)
    one = Host(first, [replica])
    one.commit(made[0], 1)
    one.follow()
    backup = {entry.key: bytes(first.get(entry.key)) for entry in first.list()}
    one.commit(made[1], 2)
    one.commit(made[2], 3)
    one.follow()
    restored = MemoryStore("restored")
    for key, data in backup.items():
        restored.put(key, [data])
    host[0] = "b"
    two = Host(restored, [replica])
    assert steps(restored) == [3, 1]
    assert_whole(restored)
    two.commit(made[3], 4)
    two.follow()
    assert steps(replica) == [4, 3, 2, 1]


def test_what_somebody_put_at_the_last_moment_is_not_overlooked(host: list[str]) -> None:
    """A writer that was replaced right before its put has passed all checks: a fence has its number."""
    replica = MemoryStore("replica")
    made = contents(3)
    one = Host(MemoryStore("one"), [replica])
    one.commit(made[0], 1)
    one.follow()
    one.commit(made[1], 2)
    host[0] = "b"
    two = Host(MemoryStore("two"), [replica])
    late = keys.numbered(keys.head("main"), 2)
    assert not replica.put(late, [one.chain.store.get(late)])
    two.commit(made[2], 3)
    two.follow()
    assert steps(replica) == [3, 1]
    assert_whole(replica)


def test_two_that_went_on_differently_are_refused_and_both_are_kept(host: list[str]) -> None:
    first, replica = MemoryStore("first"), MemoryStore("replica")
    made = contents(4)
    one = Host(first, [replica])
    one.commit(made[0], 1)
    one.follow()
    one.commit(made[1], 2)  # It does not come to the replica.
    host[0] = "b"
    two = Host(MemoryStore("two"), [replica])
    two.commit(made[2], 3)
    two.follow()
    two.close()
    host[0] = "a"
    one.lease.release()
    before = [[entry.key for entry in store.list("heads")] for store in (first, replica)]
    with pytest.raises(Conflict, match="has gone on differently in memory://first and in memory://replica"):
        Host(first, [replica])
    assert [[entry.key for entry in store.list("heads")] for store in (first, replica)] == before


def test_a_living_writer_is_not_replaced_through_a_replica() -> None:
    replica = MemoryStore("replica")
    one = Host(MemoryStore("one"), [replica])
    one.commit(content(1), 1)
    one.follow()
    two = MemoryStore("two")
    with pytest.raises(Conflict, match="is being written by process"):
        Host(two, [replica])
    one.commit(content(2), 2)
    one.follow()
    assert steps(replica) == [2, 1]


def test_replicas_of_different_chains_are_refused() -> None:
    one, two = (Host(MemoryStore(name), [MemoryStore(f"r{name}")]) for name in "ab")
    for each in (one, two):
        each.commit(content(1), 1)
        each.follow()
    with pytest.raises(Mismatch, match="are of different chains"):
        Host(MemoryStore("c"), [*one.replicas.stores, *two.replicas.stores])
    one.close()
    with pytest.raises(Mismatch, match="is another chain than"):
        Host(one.chain.store, two.replicas.stores)


def test_a_replica_whose_place_holds_something_else_is_refused() -> None:
    first, junk = MemoryStore("first"), MemoryStore("junk")
    junk.put("readme", [b"mine"])
    with pytest.raises(Mismatch, match="is not an Everstep chain and not empty either"):
        Host(first, [junk])
    assert list(first.list("leases")) == []


def test_a_run_is_not_begun_anew_while_a_replica_does_not_answer() -> None:
    away = FaultyStore(MemoryStore("replica"), 0, lambda: Unavailable("away"), verbs=READS)
    empty = MemoryStore("empty")
    with pytest.raises(Unavailable, match="may have the run, does not answer"):
        Host(empty, [away])
    assert list(empty.list()) == []


def test_a_run_that_is_there_begins_without_a_replica_that_does_not_answer() -> None:
    first = MemoryStore("first")
    one = Host(first, [])
    one.commit(content(1), 1)
    one.close()

    class Away(FaultyStore):
        def _strikes(self, verb: str) -> bool:
            raise Unavailable("away")

    two = Host(first, [Away(MemoryStore("replica"))])
    assert two.lease.number == 3
    assert "does not answer" in str(two.told(Warned)[0])


def test_who_hangs_is_not_waited_for() -> None:
    release = threading.Event()

    def answer(store: Store) -> str:
        if store.url == "memory://slow":
            release.wait(60)
        return store.url

    stores = [MemoryStore("slow"), MemoryStore("quick")]
    slow, quick = ask_all(stores, answer, within_s=0.2)
    release.set()
    assert isinstance(slow.error, Unavailable)
    assert quick.answer == "memory://quick"


def _with_damaged_newest(replica: Store) -> None:
    chain = Chain(replica)
    newest, before = list(chain.snapshots())[:2]
    (name,) = chain.manifest(newest).packs.keys() - chain.manifest(before).packs.keys()
    data = bytearray(replica.get(keys.pack(name)))
    data[10] ^= 1
    replica.delete(keys.pack(name))
    replica.put(keys.pack(name), [data])


def test_of_a_replica_whose_newest_is_damaged_the_one_before_is_taken(host: list[str]) -> None:
    replica = MemoryStore("replica")
    made = contents(4)
    one = Host(MemoryStore("one"), [replica])
    for step in (1, 2, 3):
        one.commit(made[step - 1], step)
    one.follow()
    _with_damaged_newest(replica)
    host[0] = "b"
    two = Host(MemoryStore("two"), [replica])
    assert steps(two.chain.store) == [2]
    assert len(two.told(Skipped)) == 1
    two.commit(made[3], 4)
    two.follow()
    assert steps(replica) == [4, 3, 2, 1]
    assert_restores(Chain(replica), Chain(replica).find("head"), made[3])


def test_where_one_replica_is_damaged_another_helps(host: list[str]) -> None:
    bad, good = MemoryStore("bad"), MemoryStore("good")
    made = contents(3)
    one = Host(MemoryStore("one"), [bad, good])
    for step in (1, 2, 3):
        one.commit(made[step - 1], step)
    one.follow()
    _with_damaged_newest(bad)
    host[0] = "b"
    two = Host(MemoryStore("two"), [bad, good])
    assert two.told(Skipped) == []
    assert_restores(two.chain, two.chain.find("head"), made[2])


def test_nothing_whole_is_damage_and_no_new_beginning(host: list[str]) -> None:
    replica = MemoryStore("replica")
    one = Host(MemoryStore("one"), [replica])
    one.commit(content(1), 1)
    one.follow()
    for entry in list(replica.list(keys.PACKS)):
        replica.delete(entry.key)
    host[0] = "b"
    with pytest.raises(Damaged, match="none of the 1 snapshots"):
        Host(MemoryStore("two"), [replica])


@pytest.mark.slow
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_bringing_back_that_dies_at_any_write_is_begun_again(host: list[str], done: bool) -> None:
    made = contents(3)
    at, died = 0, True
    while died:
        host[0] = "a"
        replica = MemoryStore("replica")
        one = Host(MemoryStore("one"), [replica])
        one.commit(made[0], 1)
        one.commit(made[1], 2)
        one.follow()
        host[0] = "b"
        inner = MemoryStore("two")
        try:
            Host(FaultyStore(inner, at, done=done), [replica]).close()
            died = False
        except Died:
            if list(inner.list(keys.CHAIN)):
                assert_whole(inner)
            assert_whole(replica)
        host[0] = "c"  # The process that died is no living one.
        again = Host(inner, [replica])
        assert_restores(again.chain, again.chain.find("head"), made[1])
        again.commit(made[2], 3)
        again.follow()
        assert steps(replica) == [3, 2, 1]
        assert_whole(replica)
        assert_whole(inner)
        at += 1
    assert at > 8


# -- where they are ----------------------------------------------------------------------------------------


def test_a_chain_remembers_where_its_replicas_are(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("replica")
    chain = Chain.create(MemoryStore("first"), GRID_BYTES)
    assert remembered(chain) == ()
    remember(chain, [LocalStore(path), MemoryStore("of this process")])
    assert remembered(chain) == (str(path),)
    before = [entry.key for entry in chain.store.list()]
    remember(chain, [LocalStore(path)])
    assert [entry.key for entry in chain.store.list()] == before
    remember(chain, [])
    assert remembered(chain) == ()
    assert verify(chain).findings == []
