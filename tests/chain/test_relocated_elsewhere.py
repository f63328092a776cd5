"""What was relocated in one store, as others see it: replicas, copies, readers of several copies, repairs."""

from __future__ import annotations

import random

import pytest
from making import Content, assert_restores, content, restored, started, written

from everstep.chain import prune
from everstep.chain.copying import copy, of_branch, of_refs
from everstep.chain.history import Chain, Snapshot
from everstep.chain.mirror import Mirror
from everstep.chain.prune import Repack
from everstep.chain.reader import Reader
from everstep.chain.repair import consider, execute
from everstep.chain.replicas import remember, source_of
from everstep.chain.retention import Keep
from everstep.chain.verify import verify
from everstep.chain.writer import Writer
from everstep.format import keys
from everstep.store.base import Store
from everstep.store.memory import MemoryStore
from everstep.store.replicated import ReplicatedStore
from everstep.testing.faults import WRITES, Died, FaultyStore

ALWAYS = Repack(max_unused=0.0, worth_bytes=1)
LAST = Keep.parse("last 2")


@pytest.fixture(autouse=True)
def _all_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "GRACE_S", -10.0)


def states(count: int) -> list[Content]:
    rng = random.Random(2)
    made = [content(0)]
    for number in range(count - 1):
        made.append(made[-1].changed(rng, ("moment", "dense", "count")[number % 3]))
    return made


STATES = states(7)


def source(count: int = 5) -> Writer:
    writer = started(MemoryStore("source"))
    written(writer, STATES[:count])
    return writer


def repack(chain: Chain) -> None:
    before = listed(chain.store, keys.RELOCATIONS)
    list(prune.prune(chain, LAST, repack=ALWAYS))
    assert listed(chain.store, keys.RELOCATIONS) != before, "something was relocated"


def listed(store: Store, prefix: str) -> list[str]:
    return [entry.key for entry in store.list(prefix)]


def mirror(writer: Writer, target: Store) -> Mirror:
    return Mirror(writer.chain, target, writer.branch, writer.lease.number)


def assert_holds(store: Store, count: int, *steps: int) -> None:
    """The newest snapshots are whole, and restore."""
    chain = Chain(store)
    report = verify(chain)
    assert report.findings == []
    assert report.whole == report.snapshots >= len(steps)
    shots = {one.step: one for one in chain.snapshots()}
    for step in steps:
        assert_restores(chain, shots[step], STATES[step - 1])
    assert max(shots) == count


def test_a_replica_gets_what_was_relocated_before_it_came() -> None:
    writer, target = source(), MemoryStore("target")
    repack(writer.chain)
    standing = mirror(writer, target).bring_up()
    assert standing.remarks == ()
    assert_holds(target, 5, 4, 5)
    there = len(listed(target, "relocations"))
    mirror(writer, target).bring_up()
    assert len(listed(target, "relocations")) == there, "it is written down once"


def test_a_replica_that_has_the_old_packs_goes_on() -> None:
    writer, target = source(), MemoryStore("target")
    one = mirror(writer, target)
    one.bring_up()
    repack(writer.chain)
    written(writer, STATES[5:6], 6)
    one.bring_up()
    mirror(writer, target).bring_up()
    assert_holds(target, 6, 4, 5, 6)


def test_a_replica_is_not_repacked_by_itself() -> None:
    """The fence of that would take the number of a head record that is still to come."""
    writer, target = source(), MemoryStore("target")
    mirror(writer, target).bring_up()
    assert source_of(Chain(target)) == writer.chain.url
    list(prune.prune(Chain(target), LAST, repack=ALWAYS))
    assert listed(target, keys.RELOCATIONS) == []
    repack(writer.chain)
    written(writer, STATES[5:7], 6)
    mirror(writer, target).bring_up()
    assert_holds(target, 7, 5, 6, 7)
    # Who goes on in it makes it a chain of its own.
    remember(Chain(target), [])
    assert source_of(Chain(target)) == ""
    repack(Chain(target))


def test_killed_at_any_write_what_the_replica_lists_is_whole() -> None:
    writer = source()
    repack(writer.chain)
    number = -1
    while True:
        target = MemoryStore("target")
        number += 1
        try:
            mirror(writer, FaultyStore(target, number, verbs=WRITES)).bring_up()
            break
        except Died:
            if listed(target, keys.CHAIN):
                report = verify(Chain(target))
                assert report.whole == report.snapshots, number
                assert [one for one in report.findings if one.snapshots] == []
        mirror(writer, target).bring_up()
        assert_holds(target, 5, 4, 5)
    assert number > 8


def test_a_chain_in_which_packs_were_relocated_is_copied() -> None:
    writer, target = source(), MemoryStore("target")
    repack(writer.chain)
    copy(writer.chain, target, of_branch(writer.chain, "main"))
    assert_holds(target, 5, 4, 5)
    assert listed(target, "relocations") == []


def test_what_was_relocated_in_the_target_of_a_copy_is_shared() -> None:
    writer, target, other = source(), MemoryStore("target"), MemoryStore("other")
    for store in (target, other):
        copy(writer.chain, store, of_branch(writer.chain, "main"))
    repack(Chain(target))
    written(writer, STATES[5:6], 6)
    head = of_refs(writer.chain, ["head"], "main")
    done, as_before = copy(writer.chain, target, head), copy(writer.chain, other, head)
    assert 0 < done.rows[-1].shared_bytes == as_before.rows[-1].shared_bytes
    assert_holds(target, 6, 5, 6)


def read(store: Store, snapshot: Snapshot, step: int) -> Reader:
    chain, reader = Chain(store), Reader(store)
    manifest = chain.manifest(snapshot)
    for chunk in manifest.chunks:
        reader.chunk(manifest, chunk.digest)
    assert restored(chain, snapshot)[0] == STATES[step - 1]
    return reader


def test_of_several_copies_the_first_is_read_where_it_was_relocated() -> None:
    writer, target = source(), MemoryStore("target")
    mirror(writer, target).bring_up()
    repack(writer.chain)
    head = writer.chain.find("head")
    assert not read(ReplicatedStore(writer.chain.store, [target]), head, 5).got_round


def test_what_is_nowhere_in_the_first_is_read_elsewhere() -> None:
    writer, target = source(), MemoryStore("target")
    mirror(writer, target).bring_up()
    head = writer.chain.find("head")
    for name in writer.chain.manifest(head).packs:
        writer.chain.store.delete(keys.pack(name))
    assert read(ReplicatedStore(writer.chain.store, [target]), head, 5).got_round


def damage(store: MemoryStore, key: str) -> bytes:
    data = bytes(store.get(key))
    store.delete(key)
    store.put(key, [data[:-3] + b"xyz"])
    return data


def test_a_damaged_relocation_record_is_put_back_from_a_copy() -> None:
    writer = source()
    repack(writer.chain)
    store = writer.chain.store
    assert isinstance(store, MemoryStore)
    copied = MemoryStore("copied")
    for entry in store.list():
        copied.put(entry.key, [store.get(entry.key)])
    (key,) = listed(store, keys.RELOCATIONS)
    good = damage(store, key)
    execute(consider(store, [copied]))
    assert bytes(store.get(key)) == good
    assert_holds(store, 5, 4, 5)


def test_a_record_of_other_packs_under_the_same_number_is_not_taken() -> None:
    writer, other = source(), source(4)
    repack(writer.chain)
    repack(other.chain)
    store = writer.chain.store
    assert isinstance(store, MemoryStore)
    copied = MemoryStore("copied")
    (key,) = listed(store, keys.RELOCATIONS)
    for entry in store.list():
        copied.put(entry.key, [(other.chain.store if entry.key == key else store).get(entry.key)])
    theirs = bytes(copied.get(key))
    damage(store, key)
    execute(consider(store, [copied]))
    assert bytes(store.get(key)) != theirs
    assert_holds(store, 5, 4, 5)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_relocation_record_is_made_anew_of_what_the_packs_hold(is_there: bool) -> None:
    writer = source()
    repack(writer.chain)
    store = writer.chain.store
    assert isinstance(store, MemoryStore)
    (key,) = listed(store, keys.RELOCATIONS)
    damage(store, key)
    if not is_there:
        store.delete(key)
    assert verify(writer.chain).whole == 0
    plan = consider(store)
    assert [step.key for step in plan.steps] == [key]
    assert not execute(plan).left
    assert_holds(store, 5, 4, 5)
    # And it goes on as ever.
    written(writer, STATES[5:7], 6)
    list(prune.prune(writer.chain, LAST, repack=ALWAYS))
    assert_holds(store, 7, 6, 7)


def test_of_a_damaged_relocation_record_nothing_is_taken_away_while_something_is_nowhere() -> None:
    writer = source()
    repack(writer.chain)
    store = writer.chain.store
    assert isinstance(store, MemoryStore)
    (key,) = listed(store, keys.RELOCATIONS)
    damage(store, key)
    head = writer.chain.find("head")
    new = next(
        name
        for name in listed(store, keys.PACKS)
        if name.rpartition("/")[2] not in writer.chain.manifest(head).packs
    )
    store.delete(new)
    plan = consider(store)
    assert key not in {step.key for step in plan.steps}
    assert any(one.key == key for one in plan.lost)
