"""Snapshots of one chain in another: whole at every moment, and only what is missing is sent."""

from __future__ import annotations

import random
from functools import partial

import pytest
from making import (
    GRID_BYTES,
    Content,
    assert_restores,
    compressible,
    content,
    restored,
    started,
    whole,
    written,
    xor_chain,
)

from everstep.chain import copying, lease, prune, versions
from everstep.chain.copying import Copied, of_branch, of_refs
from everstep.chain.doomed import announce
from everstep.chain.encoding import Always
from everstep.chain.history import Chain, Snapshot
from everstep.chain.lease import Lease, newest
from everstep.chain.retention import Keep
from everstep.chain.verify import verify
from everstep.chain.writer import Facts, Writer
from everstep.errors import Conflict, Damaged, Mismatch, NotFound, Unavailable
from everstep.format import keys
from everstep.format.chunk import Encoding
from everstep.format.layout import lay_out
from everstep.store.base import Store
from everstep.store.memory import MemoryStore
from everstep.testing.faults import READS, WRITES, Died, FaultyStore


def assert_whole(store: Store) -> Chain:
    chain = Chain(store)
    report = verify(chain)
    assert report.findings == []
    assert report.whole == report.snapshots
    return chain


def source(count: int = 4, encoding: Encoding = Encoding.RAW) -> tuple[Writer, list[Content]]:
    writer = started(MemoryStore("source"), encoding=encoding)
    rng = random.Random(3)
    contents = [compressible(1)]
    while len(contents) < count:
        contents.append(contents[-1].changed(rng, rng.choice(["dense", "moment", "mean"]), "count"))
    written(writer, contents)
    return writer, contents


def copied(chain: Chain, target: Store, *refs: str, **options: object) -> Copied:
    to = str(options.pop("to", ""))
    wanted = of_refs(chain, refs, "main", to) if refs else of_branch(chain, "main", to)
    return copying.copy(chain, target, wanted, **options)  # type: ignore[arg-type]


def packs(store: Store) -> set[str]:
    return {entry.key for entry in store.list(keys.PACKS)}


@pytest.mark.parametrize("encoding", list(Encoding))
def test_a_branch_comes_over_whole(encoding: Encoding) -> None:
    writer, contents = source(encoding=encoding)
    target = MemoryStore("target")
    done = copied(writer.chain, target)
    assert [row.step for row in done.rows] == [1, 2, 3, 4]
    there = assert_whole(target)
    assert there.about.chain != writer.chain.about.chain
    found = list(there.snapshots())[::-1]
    assert [one.id for one in found] == [row.id for row in done.rows]
    for one, row, wanted in zip(found, done.rows, contents, strict=True):
        assert_restores(there, one, wanted)
        origin = one.record.origin
        assert origin is not None
        assert (origin.chain, origin.snapshot, origin.step) == (
            writer.chain.about.chain,
            row.source,
            row.step,
        )
    assert [one.record.parents for one in found[1:]] == [(one.id,) for one in found[:-1]]
    assert packs(target) == packs(writer.chain.store), "all of each pack is wanted: they are the same"
    assert newest(target) == 2
    assert lease._holder(target, keys.numbered(keys.lease("main"), 2)).pid == 0  # type: ignore[union-attr]


def test_of_a_pack_only_what_is_wanted_goes_over() -> None:
    writer, contents = source()
    target = MemoryStore("target")
    done = copied(writer.chain, target, "step:4")
    there = assert_whole(target)
    assert_restores(there, there.find("head"), contents[3])
    stored = sum(entry.size_bytes for entry in target.list(keys.PACKS))
    assert done.sent_bytes == stored < sum(entry.size_bytes for entry in writer.chain.store.list(keys.PACKS))
    new = packs(target) - packs(writer.chain.store)
    assert len(new) == 1, "what is wanted of packs of which not all is, together"
    assert len(packs(target)) > 1, "the others as they are"


def test_what_is_there_is_not_sent_again() -> None:
    writer, contents = source()
    target = FaultyStore(MemoryStore("target"))
    copied(writer.chain, target, "step:2")
    before = len(packs(target))
    later = copied(writer.chain, target, "step:4")
    assert later.rows[0].shared_bytes > 0
    assert later.rows[0].sent_bytes < 60_000
    assert len(packs(target)) > before
    again = copied(writer.chain, target)
    assert [row.why for row in again.rows] == [
        "it is older than the head of the branch there",
        "it is there",
        "it is older than the head of the branch there",
        "it is there",
    ]
    writes = target.count
    copied(writer.chain, target, "step:2", "step:4")
    assert target.count == writes
    there = assert_whole(target)
    assert_restores(there, there.find("step:4"), contents[3])


def test_chunks_in_packs_of_another_run_are_shared() -> None:
    """The same model, trained by two runs."""
    writer, contents = source()
    other = started(MemoryStore("target"))
    written(other, [contents[1], content(9)], 7)
    done = copied(writer.chain, other.chain.store, "step:2", to="theirs")
    assert done.rows[0].sent_bytes == 0
    there = assert_whole(other.chain.store)
    assert_restores(there, there.find("theirs"), contents[1])
    assert there.find("main").step == 8


def test_what_builds_on_what_only_the_target_has_brings_that_along() -> None:
    chain, _, raw = xor_chain(3)
    target = MemoryStore("target")
    copied(chain, target, "step:2")
    again = MemoryStore("again")
    assert_whole(target)
    # From there, to where only the chunk at the bottom is.
    copied(chain, again, "step:1")
    copied(chain, again, "step:2")
    there = assert_whole(again)
    layout = lay_out([whole("one", "float32", (2048,))])
    got, _ = restored(there, there.find("step:2"), layout)
    assert got.leaves["one"] == raw


def test_two_that_build_on_each_other_the_other_way_round() -> None:
    """Source and target store the same two states, each the other one as a difference."""
    made = [compressible(1), compressible(1).changed(random.Random(1), "dense")]
    one = started(MemoryStore("one"), encoding=Encoding.RAW)
    written(one, made[:1])
    one.encodings = Always(Encoding.XOR_SHUFFLE_ZSTD)
    written(one, made[1:], 2)
    two = started(MemoryStore("two"), encoding=Encoding.RAW)
    written(two, made[1:])
    two.encodings = Always(Encoding.XOR_SHUFFLE_ZSTD)
    written(two, made[:1], 2)
    for step in (1, 2):
        copied(one.chain, two.chain.store, f"step:{step}", to="other")
    there = assert_whole(two.chain.store)
    for step, wanted in zip((1, 2), made, strict=True):
        assert_restores(there, there.find(f"other@step:{step}"), wanted)


def test_tags_come_along_on_request() -> None:
    writer, _ = source()
    versions.tag(writer.chain, "good", "step:2")
    versions.tag(writer.chain, "elsewhere", "step:3")
    target = MemoryStore("target")
    done = copied(writer.chain, target, "step:2", tags=True)
    there = Chain(target)
    assert done.tags == there.tags() == {"good": done.rows[0].id}
    versions.tag(there, "elsewhere", "step:2")
    done = copied(writer.chain, target, "step:3", tags=True)
    assert "tag elsewhere was not copied" in done.remarks[0]


def test_what_is_on_several_branches_is_copied_once() -> None:
    writer, contents = source(2)
    versions.branch(writer.chain, "try", "step:2")
    target = MemoryStore("target")
    wanted = [one for name in ("main", "try") for one in of_branch(writer.chain, name)]
    done = copying.copy(writer.chain, target, wanted)
    there = assert_whole(target)
    assert [(row.branch, row.step) for row in done.rows] == [("main", 1), ("main", 2), ("try", 2)]
    assert there.find("try") == there.find("main") == there.snapshot(done.rows[1].id)
    assert_restores(there, there.find("try"), contents[1])
    again = copying.copy(writer.chain, target, wanted)
    assert [row.why for row in again.rows] == ["it is there"] * 3


def test_a_dry_run_says_the_same_and_writes_nothing() -> None:
    writer, _ = source()
    target = MemoryStore("target")
    dry = copied(writer.chain, target, dry_run=True)
    assert list(target.list()) == []
    real = copied(writer.chain, target)
    sizes = [[(row.source, row.sent_bytes, row.shared_bytes) for row in one.rows] for one in (dry, real)]
    assert sizes[0] == sizes[1]
    assert all(row.id == "" for row in dry.rows)


def test_progress_goes_up_to_all() -> None:
    writer, _ = source()
    told: list[tuple[int, int]] = []
    done = copied(writer.chain, MemoryStore("t"), on_progress=lambda one, of: told.append((one, of)))
    assert told[0] == (0, done.sent_bytes)
    assert told[-1] == (done.sent_bytes, done.sent_bytes)


# -- what is refused ---------------------------------------------------------------------------------------


def test_a_branch_of_the_targets_own_is_not_moved() -> None:
    writer, _ = source(2)
    other = started(MemoryStore("target"))
    written(other, [content(5)])
    before = [entry.key for entry in other.chain.store.list()]
    with pytest.raises(Mismatch, match="has snapshots of its own"):
        copied(writer.chain, other.chain.store)
    assert [entry.key for entry in other.chain.store.list()] == before


def test_another_grid_is_refused() -> None:
    writer, _ = source(1)
    target = MemoryStore("target")
    Chain.create(target, GRID_BYTES * 2)
    with pytest.raises(Mismatch, match="is cut into chunks of"):
        copied(writer.chain, target)


def test_a_living_writer_there_is_told_of() -> None:
    writer, _ = source(1)
    target = MemoryStore("target")
    Chain.create(target, GRID_BYTES)
    Lease.take(target)
    with pytest.raises(Conflict, match="is being written by"):
        copied(writer.chain, target)


def test_what_is_not_there_cannot_be_copied() -> None:
    writer, _ = source(1)
    with pytest.raises(NotFound):
        copied(writer.chain, MemoryStore("t"), "step:7")
    with pytest.raises(NotFound):
        of_branch(writer.chain, "none")


def test_damage_is_not_copied() -> None:
    writer, _ = source(2)
    key = sorted(packs(writer.chain.store))[0]
    data = bytearray(writer.chain.store.get(key))
    data[5] ^= 1
    writer.chain.store.delete(key)
    writer.chain.store.put(key, [data])
    target = MemoryStore("target")
    with pytest.raises(Damaged, match="is not the one that was written"):
        copied(writer.chain, target)
    assert_whole(target)


def test_a_snapshot_goes_into_a_replica_of_its_own_chain_as_it_is() -> None:
    """What keeps both sides of a run that went on differently."""
    writer, contents = source(3)
    replica = MemoryStore("replica")
    Chain.create_as(replica, bytes(writer.chain.store.get(keys.CHAIN)))
    with pytest.raises(NotFound):
        Chain(replica).find("rescued")
    done = copied(writer.chain, replica, "main@head", to="rescued")
    there = assert_whole(replica)
    assert there.find("rescued") == writer.chain.find("head")
    assert done.rows[0].id == writer.chain.find("head").id
    assert_restores(there, there.find("rescued"), contents[2])
    other = Writer(there, Lease.take(replica))
    other.write(content(8).captured(), Facts(step=1))
    other.lease.release()
    with pytest.raises(Mismatch, match="has snapshots of its own"):
        copied(writer.chain, replica)


# -- crashes, and others at work ---------------------------------------------------------------------------


@pytest.fixture
def _dead_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_lives", lambda holder: False)


@pytest.mark.slow
@pytest.mark.usefixtures("_dead_writers")
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_copy_that_dies_at_any_write_goes_on(done: bool) -> None:
    writer, contents = source(3)
    versions.tag(writer.chain, "good", "step:2")
    at, died = 0, True
    while died:
        inner = MemoryStore("target")
        faulty = FaultyStore(inner, at, done=done)
        try:
            copied(writer.chain, faulty, tags=True)
            died = False
        except Died:
            if list(inner.list(keys.CHAIN)):
                assert_whole(inner)
        copied(writer.chain, inner, tags=True)
        there = assert_whole(inner)
        assert [one.step for one in there.snapshots()] == [3, 2, 1]
        for one, wanted in zip(there.snapshots(), reversed(contents), strict=True):
            assert_restores(there, one, wanted)
        assert there.tagged("good") == there.find("step:2").id
        assert packs(inner) == packs(writer.chain.store)
        at += 1
    assert at > 12


@pytest.mark.usefixtures("_dead_writers")
def test_a_target_that_is_away_loses_nothing() -> None:
    writer, contents = source(2)
    for at in range(0, 60, 4):
        inner = MemoryStore("target")
        faulty = FaultyStore(inner, at, partial(Unavailable, "away"), verbs=READS | WRITES)
        try:
            copied(writer.chain, faulty)
        except Unavailable:
            copied(writer.chain, inner)
        there = assert_whole(inner)
        assert_restores(there, there.find("head"), contents[1])


def test_what_is_being_pruned_there_is_not_relied_on() -> None:
    writer, contents = source(2)
    other = started(MemoryStore("target"))
    store = other.chain.store
    (snapshot,) = written(other, contents[:1])
    doomed = announce(store, [], [], other.chain.manifest(snapshot).packs)
    done = copied(writer.chain, store, "step:1", to="theirs")
    there = Chain(store)
    for name in other.chain.manifest(snapshot).packs:
        store.delete(keys.pack(name))
    doomed.finish()
    doomed.leave()
    assert done.rows[0].id
    assert_restores(there, there.find("theirs"), contents[0])


def test_a_copy_shares_its_packs_when_the_source_prunes() -> None:
    writer, _ = source(4)
    target = MemoryStore("target")
    copied(writer.chain, target, "step:1")
    plan = prune.plan(writer.chain, Keep.parse("last 1"), branches=["main"], mine=writer.lease)
    assert plan is not None
    prune.execute(writer.chain, plan)
    done = copied(writer.chain, target)
    assert [row.step for row in done.rows] == [4]
    found: list[Snapshot] = list(assert_whole(target).snapshots())
    assert [one.step for one in found] == [4, 1]
