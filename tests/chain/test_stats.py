from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
from making import GRID_BYTES, Content, content, started, whole

from everstep.chain.history import Chain, now
from everstep.chain.lease import Lease
from everstep.chain.stats import stats
from everstep.chain.writer import Facts, Writer
from everstep.format import keys, record
from everstep.format.layout import lay_out
from everstep.format.record import TagRecord
from everstep.store.local import LocalStore
from everstep.store.memory import MemoryStore

LAYOUT = lay_out(
    [whole("dense", "float32", (9, 1024)), whole("moment", "float32", (8192,)), whole("small", "int64", (3,))]
)


def a_chain(store: MemoryStore | LocalStore) -> tuple[Chain, list[Content]]:
    """Three snapshots of main, taken 12 hours apart, of which the second changes one leaf and the third none;
    one of `try` that goes on from the first and changes the other leaf."""
    rng = random.Random(1)
    first = content(1, LAYOUT)
    second = first.changed(rng, "dense")
    third = second.changed(rng)
    states = [first, second, third]
    writer = started(store)
    shots = [
        writer.write(
            one.captured(),
            Facts(step=step, taken_at=f"2024-05-0{1 + step // 2}T{12 * (step % 2):02}:00:00+00:00"),
        )
        for step, one in enumerate(states)
    ]
    other = Writer(writer.chain, Lease.take(writer.chain.store, "try"), "try", shots[0].id)
    other.build_on(writer.chain.manifest(shots[0]))
    other.write(first.changed(rng, "moment").captured(), Facts(step=9, taken_at="2024-05-01T06:00:00+00:00"))
    return writer.chain, states


def test_what_a_chain_takes() -> None:
    chain, _ = a_chain(MemoryStore())
    found = stats(chain)
    state_bytes = LAYOUT.logical_bytes
    entries = list(chain.store.list())
    assert (found.snapshots, found.logical_bytes) == (4, 4 * state_bytes)
    assert found.stored_bytes == sum(one.size_bytes for one in entries)
    assert sum(found.kinds.values()) == found.stored_bytes
    assert next(iter(found.kinds)) == "packs"
    assert found.unreached_bytes == 0
    assert found.leaves == ()
    assert found.unreadable == ()
    assert (found.free_bytes, found.full_days) == (None, None)


def test_branches_share_packs() -> None:
    chain, _ = a_chain(MemoryStore())
    main, other = stats(chain).branches
    sizes = {entry.key.rpartition("/")[2]: entry.size_bytes for entry in chain.store.list(keys.PACKS)}
    shots = list(chain.snapshots())
    of_main = {name for one in shots for name in chain.manifest(one).packs}
    (first_of_other,) = chain.snapshots("try")
    of_other = set(chain.manifest(first_of_other).packs)
    assert of_main & of_other
    assert (main.name, main.snapshots, other.name, other.snapshots) == ("main", 3, "try", 1)
    assert main.stored_bytes == sum(sizes[name] for name in of_main)
    assert main.own_bytes == sum(sizes[name] for name in of_main - of_other) < main.stored_bytes
    assert other.own_bytes == sum(sizes[name] for name in of_other - of_main)


def test_leaves_by_what_their_chunks_take() -> None:
    chain, _ = a_chain(MemoryStore())
    leaves = {one.name: one for one in stats(chain, leaves=10).leaves}
    # All lie in one region; of a chunk that several share each has its part.
    stored = {
        (chunk.digest, place.pack): place.stored_bytes
        for branch in chain.branches()
        for one in chain.snapshots(branch)
        for chunk, place in zip(chain.manifest(one).chunks, chain.manifest(one).places, strict=True)
    }
    assert sum(one.stored_bytes for one in leaves.values()) == pytest.approx(sum(stored.values()), abs=3)
    assert leaves["dense"].logical_bytes == 9 * 4096
    assert leaves["dense"].versions > 1
    assert leaves["moment"].versions > 1
    assert [one.stored_bytes for one in stats(chain, leaves=1).leaves] == [
        max(one.stored_bytes for one in leaves.values())
    ]


def test_tied_leaves_count_once() -> None:
    layout = lay_out([whole("a", "float32", (1024,)), whole("tied", "float32", (1024,), alias="a")])
    writer = started(MemoryStore())
    writer.write(content(1, layout).captured(), Facts(step=1))
    (leaf,) = stats(writer.chain, leaves=5).leaves
    assert (leaf.stored_bytes, leaf.versions) == (4096, 1.0)


def test_growth_is_what_the_last_week_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, _ = a_chain(LocalStore(tmp_path / "c"))
    shots = sorted(
        (one for branch in chain.branches() for one in chain.snapshots(branch)),
        key=lambda one: one.record.taken_at,
    )
    added = sum(one.record.stored_bytes for one in shots[1:])
    found = stats(chain)
    assert found.daily_bytes == pytest.approx(added)  # In a day.
    assert found.free_bytes
    assert found.full_days == pytest.approx(found.free_bytes / added, rel=0.1)
    old = Writer(chain, Lease(chain.store, 1), parent=shots[-1].id)
    old.write(content(7, LAYOUT).captured(), Facts(step=20, taken_at="2024-06-01T00:00:00+00:00"))
    assert stats(chain).daily_bytes is None  # Alone in its week.


def test_what_nothing_needs_and_what_cannot_be_read(tmp_path: Path) -> None:
    chain, _ = a_chain(MemoryStore())
    orphan = keys.pack("ab" * 32)
    chain.store.put(orphan, [bytes(500)])
    head = chain.find("head")
    manifest = keys.manifest(head.record.manifests[0])
    chain.store.delete(manifest)
    found = stats(chain, leaves=3)
    assert found.unreached_bytes >= 500
    assert found.unreadable == (head.id,)
    assert found.snapshots == 4


def test_a_tagged_snapshot_counts_though_no_branch_lists_it() -> None:
    chain, _ = a_chain(MemoryStore())
    first = chain.find("step:0")
    tag = TagRecord(first.id, "00", now(), "first", number=1)
    chain.store.put(tag.key, [record.seal(tag)])
    chain.store.delete(keys.numbered(keys.head("main"), 1))
    found = stats(chain)
    assert found.snapshots == 4
    assert [one.snapshots for one in found.branches] == [2, 1]
    assert found.unreached_bytes == 0


def test_an_empty_chain() -> None:
    found = stats(Chain.create(MemoryStore(), GRID_BYTES), leaves=3)
    assert msgspec.to_builtins(found)["snapshots"] == 0
    assert (found.branches, found.leaves, found.daily_bytes) == ((), (), None)
