"""Snapshots of several ranks, and whoever else looks at them: verify, repair, copies, replicas, repacking,
comparing, exporting, counting."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from ranked import SHAPES, State, World, assert_restores, gathered, state
from safetensors.numpy import load_file

from everstep.chain import copying, export, prune, repair, stats
from everstep.chain.compare import compare
from everstep.chain.history import Chain, Snapshot
from everstep.chain.mirror import Mirror
from everstep.chain.prune import Repack
from everstep.chain.reader import Reader
from everstep.chain.retention import Keep
from everstep.chain.states import rehearse
from everstep.chain.verify import verify
from everstep.errors import Damaged, NotFound
from everstep.format import keys, record
from everstep.format.chunk import Encoding, digest
from everstep.format.record import HeadRecord
from everstep.integrations import safetensors_file
from everstep.store.memory import MemoryStore

RANKS = 3


def flip(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1 << at % 8
    return bytes(changed)


def series(
    ranks: int = RANKS, encoding: Encoding = Encoding.RAW
) -> tuple[World, list[Snapshot], list[State]]:
    world = World(MemoryStore(), ranks, encoding)
    first = state(1, ranks)
    second = first.changed(2, "sharded", "grid")
    states = [first, second, second.changed(3, "count")]
    return world, [world.take(one, step) for step, one in enumerate(states, 1)], states


def assert_same(chain: Chain, snapshots: list[Snapshot], states: list[State]) -> None:
    assert verify(chain).findings == []
    for one, wanted in zip(snapshots, states, strict=True):
        assert_restores(chain, one, wanted)


def committed(world: World, **changed: object) -> Snapshot:
    """The head with a forged record."""
    head = world.chain.head()
    assert head is not None
    made = msgspec.structs.replace(head.record, **changed)
    data = record.encode(made)
    world.chain.store.put(keys.snapshot(digest(data)), [data])
    number = world.chain.head_number() + 1
    forged = HeadRecord(digest(data), made.step, 1, "00", "now", "main", number=number, format=3)
    world.chain.store.put(forged.key, [record.seal(forged)])
    return Snapshot(digest(data), made)


# -- verify and repair -------------------------------------------------------------------------------------


def test_all_is_verified() -> None:
    world, snapshots, states = series()
    report = verify(world.chain)
    assert (report.findings, report.snapshots, report.whole) == ([], 3, 3)
    assert_same(world.chain, snapshots, states)


def test_any_rank_may_lack_its_manifest() -> None:
    for rank in range(RANKS):
        world, snapshots, _ = series()
        key = keys.manifest(snapshots[1].record.manifests[rank])
        world.chain.store.delete(key)
        (finding,) = verify(world.chain).findings
        assert (finding.key, finding.snapshots) == (key, (snapshots[1].id,))


def test_a_record_whose_manifests_are_not_those_of_one_snapshot() -> None:
    world, snapshots, _ = series()
    ours, others = snapshots[2].record.manifests, snapshots[1].record.manifests
    for names, what in (
        ((ours[0], others[1], ours[2]), "name different states"),
        ((ours[1], ours[0], ours[2]), "name different states"),
        (ours[:2], "name different states"),
    ):
        forged = committed(world, manifests=names)
        finding = next(one for one in verify(world.chain).findings if one.key == keys.snapshot(forged.id))
        assert what in finding.problem
        assert finding.snapshots == (forged.id,)
        with pytest.raises(Damaged):
            world.chain.manifest(forged)
        with pytest.raises(Damaged):
            rehearse(world.chain, forged)


@pytest.mark.slow
def test_every_flip_of_a_small_snapshot_of_two_ranks_is_found() -> None:
    """Of each object some bytes; whatever still reads back is what was taken."""
    world = World(MemoryStore(), 2)
    wanted = state(5, 2)
    snapshot = world.take(wanted, 1)
    store = world.chain.store
    silent = 0
    for entry in list(store.list()):
        whole = bytes(store.get(entry.key))
        for at in range(0, len(whole), max(len(whole) // 12, 1)):
            store.delete(entry.key)
            store.put(entry.key, [flip(whole, at)])
            try:
                chain = Chain(store)
                assert verify(chain).findings
                got = gathered(Reader(store), chain.manifest(chain.snapshot(snapshot.id)), strict=False)
            except Damaged:
                continue
            finally:
                store.delete(entry.key)
                store.put(entry.key, [whole])
            assert all(got[name].tobytes() == array.tobytes() for name, array in wanted.leaves.items())
            silent += 1
    assert silent, "a head record is not needed for a snapshot that is known, nor padding for its bytes"
    assert verify(Chain(store)).findings == []


def test_a_part_is_repaired_from_a_replica() -> None:
    world, snapshots, states = series()
    replica = MemoryStore("replica")
    Mirror(world.chain, replica, lease=world.lease.number).bring_up()
    store = world.chain.store
    part = world.chain.manifests(snapshots[2])[2]
    store.delete(keys.manifest(snapshots[2].record.manifests[1]))
    store.delete(keys.pack(next(iter(part.packs))))
    world.lease.release()
    plan = repair.consider(store, [replica])
    assert len(plan.steps) == 2
    repair.execute(plan)
    assert_same(Chain(store), snapshots, states)


# -- other stores ------------------------------------------------------------------------------------------


def test_a_replica_has_all_ranks() -> None:
    world, snapshots, states = series()
    take = world.begin()
    world.store(take, states[0])
    replica = MemoryStore("replica")
    mirror = Mirror(world.chain, replica, lease=world.lease.number)
    assert mirror.bring_up().behind == 0
    assert_same(Chain(replica), snapshots, states)
    assert not list(replica.list(keys.PARTS)), "what is under way is the source's own"
    snapshots.append(world.commit(take, 4))
    mirror.bring_up()
    assert_same(Chain(replica), snapshots, [*states, states[0]])
    mirror.prune(Keep.parse("last 1"))
    assert [one.step for one in Chain(replica).snapshots()] == [4, 3, 2, 1], "what the source lists stays"
    world.prune(Keep.parse("last 1"))
    mirror.bring_up()
    mirror.prune(Keep.parse("last 1"))
    assert [one.step for one in Chain(replica).snapshots()] == [4]
    assert_same(Chain(replica), snapshots[3:], states[:1])


@pytest.mark.parametrize("encoding", [Encoding.RAW, Encoding.XOR_SHUFFLE_ZSTD])
def test_snapshots_of_several_ranks_are_copied(encoding: Encoding) -> None:
    world, snapshots, states = series(encoding=encoding)
    target = MemoryStore("target")
    wanted = copying.of_branch(world.chain, "main")
    dry = copying.copy(world.chain, target, wanted, dry_run=True)
    done = copying.copy(world.chain, target, wanted)
    assert [row.sent_bytes for row in dry.rows] == [row.sent_bytes for row in done.rows]
    there = Chain(target)
    copies = [there.snapshot(row.id) for row in done.rows]
    assert_same(there, copies, states)
    assert [one.record.state for one in copies] == [one.record.state for one in snapshots]
    assert [head.format for head in there.heads()] == [3, 3, 3]
    again = copying.copy(world.chain, target, wanted)
    assert all(row.why for row in again.rows)
    # Of what is relocated, and in which a rank has little that is new, no more is sent than that.
    assert done.rows[2].sent_bytes < done.rows[0].sent_bytes / 2


def test_packs_of_several_ranks_are_repacked() -> None:
    world, snapshots, states = series()
    world.lease.release()
    store = world.chain.store
    before = {entry.key for entry in store.list(keys.PACKS)}
    done = list(prune.prune(world.chain, Keep.parse("last 1"), repack=Repack(max_unused=0.0, worth_bytes=1)))
    assert sum(one.copied_bytes for one in done)
    assert {entry.key for entry in store.list(keys.PACKS)} - before
    assert_same(Chain(store), snapshots[2:], states[2:])
    target = MemoryStore("target")
    copying.copy(Chain(store), target, copying.of_branch(Chain(store), "main"))
    (copied,) = Chain(target).snapshots()
    assert_restores(Chain(target), copied, states[2])


# -- comparing and counting --------------------------------------------------------------------------------


def test_two_snapshots_of_the_same_ranks_are_compared_by_their_chunks() -> None:
    world, snapshots, _ = series()
    found = compare(world.chain, snapshots[0], world.chain, snapshots[1])
    assert {one.name: one.kind for one in found.leaves} == {"sharded": "changed", "grid": "changed"}
    assert found.states == ("run/rng/torch",), "whichever rank's"
    read = sum(4 * np.prod(SHAPES[name]) for name in ("sharded", "grid"))
    assert found.read_bytes <= read + 4 * RANKS * 4096
    unread = compare(world.chain, snapshots[0], world.chain, snapshots[1], values=False)
    assert {one.name for one in unread.leaves if one.kind == "changed"} <= {"sharded", "grid"}
    assert {"sharded", "grid"} <= {one.name for one in unread.leaves}


def test_snapshots_of_other_ranks_are_compared_by_their_bytes() -> None:
    world, snapshots, states = series()
    other = World(MemoryStore(), 2)
    theirs = other.take(states[0].respread(2), 1)
    found = compare(world.chain, snapshots[0], other.chain, theirs)
    assert not [one for one in found.leaves if one.kind in ("changed", "may have changed")]
    changed = states[0].respread(2)
    changed.leaves["grid"] = changed.leaves["grid"].copy()
    changed.leaves["grid"][3, 7] += 1
    theirs = other.take(changed, 2)
    (one,) = (one for one in compare(world.chain, snapshots[0], other.chain, theirs).leaves if one.amount)
    assert one.amount is not None
    assert (one.name, one.amount.changed) == ("grid", 1)


def test_a_leaf_that_cannot_be_read_is_named() -> None:
    world, snapshots, states = series()
    other = World(MemoryStore(), 2)
    theirs = other.take(states[0].respread(2), 1)
    for entry in list(other.chain.store.list(keys.PACKS)):
        whole = bytes(other.chain.store.get(entry.key))
        other.chain.store.delete(entry.key)
        other.chain.store.put(entry.key, [bytes(len(whole))])
    with pytest.raises(Damaged, match=r"leaf [a-z0-9~/]+ of snapshot"):
        compare(world.chain, snapshots[0], other.chain, theirs)


def test_what_several_ranks_take_is_counted() -> None:
    world, snapshots, _ = series()
    found = stats.stats(world.chain, leaves=20)
    assert found.snapshots == 3
    assert found.unreadable == ()
    assert found.unreached_bytes == 0
    sizes = {one.name: one.logical_bytes for one in found.leaves}
    assert sizes["sharded"] == 4 * np.prod(SHAPES["sharded"]), "over all ranks"
    assert found.logical_bytes == sum(one.record.logical_bytes for one in snapshots)


# -- export ------------------------------------------------------------------------------------------------


def exported(world: World, path: Path, **given: str) -> tuple[dict[str, np.ndarray], list[str]]:  # type: ignore[type-arg]
    head = world.chain.head()
    assert head is not None
    done = safetensors_file.write(world.chain, head, path, overwrite=True, **given)
    return load_file(path), list(done.remarks)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_leaves_of_several_ranks_are_exported_whole(ranks: int, tmp_path: Path) -> None:
    world = World(MemoryStore(), ranks)
    one = state(4, ranks)
    world.take(one, 1)
    got, remarks = exported(world, tmp_path / "out")
    assert got.keys() == one.leaves.keys()
    for name, array in one.leaves.items():
        assert got[name].tobytes() == array.tobytes()
    what = (
        "tensor that a rank has for itself is" if ranks == 1 else "tensors that ranks have for themselves are"
    )
    assert remarks == [f"{ranks} {what} left out: --only ~rank/0 takes a rank's"]
    last = f"~rank/{ranks - 1}"
    mine, remarks = exported(world, tmp_path / "own", only=last)
    assert {name: array.tobytes() for name, array in mine.items()} == {"run.rng.torch": one.own[-1]}
    with pytest.raises(NotFound, match="~rank/0"):
        exported(world, tmp_path / "none", only=f"~rank/{ranks}")


def test_a_leaf_that_is_larger_than_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "WINDOW_BYTES", 1000)
    monkeypatch.setattr(export, "SPREAD_BYTES", 1000)
    world = World(MemoryStore(), 3)
    one = state(4, 3)
    world.take(one, 1)
    got, _ = exported(world, tmp_path / "out")
    for name, array in one.leaves.items():
        assert got[name].tobytes() == array.tobytes()


def test_an_export_reads_a_chunk_of_small_leaves_once(tmp_path: Path) -> None:
    """Though each leaf is in all ranks' regions."""

    class Counting(MemoryStore):
        reads = 0

        def read_into(self, key, start, buffers):  # type: ignore[no-untyped-def]
            self.reads += key.startswith(keys.PACKS)
            return super().read_into(key, start, buffers)

    world = World(store := Counting(), 4)
    world.take(state(4, 4), 1)
    head = world.chain.head()
    assert head is not None
    chunks = len(world.chain.manifest(head).chunks)
    store.reads = 0
    exported(world, tmp_path / "out")
    assert store.reads <= 2 * chunks
