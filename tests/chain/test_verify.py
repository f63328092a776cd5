from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from making import content, started, whole, written

from everstep.chain import prune, states
from everstep.chain.history import Chain, now
from everstep.chain.retention import Keep
from everstep.chain.verify import Report, verify
from everstep.chain.writer import Facts, Writer
from everstep.errors import Unavailable
from everstep.format import keys, pack, record
from everstep.format.chunk import Encoding, digest, encode
from everstep.format.layout import lay_out
from everstep.format.record import HeadRecord, TagRecord
from everstep.store.base import Buffer
from everstep.store.memory import MemoryStore
from everstep.testing.faults import READS, FaultyStore

SMALL = lay_out([whole("moving", "float32", (100,)), whole("still", "float32", (100,), "frozen")])


def chain_of(count: int = 3, store: MemoryStore | None = None) -> tuple[Chain, Writer]:
    writer = started(MemoryStore() if store is None else store)
    one = content(1, SMALL)
    written(writer, [one.changed(random.Random(n), "moving") for n in range(count)])
    return writer.chain, writer


def replace(chain: Chain, key: str, change: Callable[[bytearray], None] | None) -> None:
    data = bytearray(chain.store.get(key))
    chain.store.delete(key)
    if change is not None:
        change(data)
        chain.store.put(key, [bytes(data)])


def flipped(data: bytearray) -> None:
    data[len(data) // 3] ^= 8


def test_a_sound_chain_and_its_progress() -> None:
    chain, _ = chain_of()
    seen: list[tuple[int, int]] = []
    report = verify(chain, lambda done, total: seen.append((done, total)))
    entries = list(chain.store.list())
    total = sum(entry.size_bytes for entry in entries)
    sound = tuple(one.id for one in chain.snapshots())
    assert report == Report(len(entries), total, 3, 3, sound=sound)
    assert len(seen) == len(entries)
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)


def test_an_empty_chain_is_sound() -> None:
    report = verify(Chain.create(MemoryStore()))
    assert (report.objects, report.snapshots, report.findings) == (1, 0, [])


def test_the_next_step_names_the_newest_whole_snapshot() -> None:
    chain, _ = chain_of()
    head, before = chain.find("head"), chain.find("head~1")
    key = keys.manifest(head.record.manifests[0])
    replace(chain, key, flipped)
    report = verify(chain)
    (finding,) = report.findings
    assert (finding.key, finding.snapshots) == (key, (head.id,))
    assert (report.snapshots, report.whole) == (3, 2)
    assert f"it resumes from {before.short} (step 2)" in finding.next


def test_the_damaged_head_record_names_the_snapshot_that_only_it_named() -> None:
    chain, _ = chain_of()
    lost = chain.find("head~1")
    for change in (flipped, None):
        key = keys.numbered(keys.head("main"), 2)
        good = bytes(chain.store.get(key))
        replace(chain, key, change)
        (finding,) = verify(chain).findings
        assert (finding.key, finding.snapshots) == (key, (lost.id,))
        chain.store.delete(key)
        chain.store.put(key, [good])


def test_a_snapshot_that_only_a_tag_names_is_followed() -> None:
    chain, writer = chain_of()
    first = chain.find("step:1")
    tag = TagRecord(first.id, "00", now(), "first", number=1)
    chain.store.put(tag.key, [record.seal(tag)])
    plan = prune.plan(chain, Keep.parse("last 1"))
    assert plan is not None
    prune.execute(chain, plan)
    assert (verify(chain).snapshots, verify(chain).findings) == (2, [])
    key = keys.manifest(first.record.manifests[0])
    replace(chain, key, flipped)
    (finding,) = verify(chain).findings
    assert (finding.key, finding.snapshots) == (key, (first.id,))
    replace(chain, key, None)
    (finding,) = verify(chain).findings
    assert (finding.key, finding.problem, finding.snapshots) == (key, "it is missing", (first.id,))
    assert writer.branch == "main"


def test_what_nobody_needs_is_told_as_such() -> None:
    chain, _ = chain_of()
    builder = pack.Builder()
    for encoding in (Encoding.RAW, Encoding.ZSTD):
        raw = random.Random(encoding).randbytes(5000)
        stored = encode(raw, encoding)
        builder.add(digest(raw), len(raw), stored, len(stored), encoding, "")
    name, parts = builder.finish()
    key = keys.pack(name)
    chain.store.put(key, parts)
    assert verify(chain).findings == []
    for entry in builder.entries:
        good = bytes(chain.store.get(key))

        def change(data: bytearray, at: int = entry.offset + entry.stored_bytes // 2) -> None:
            data[at] ^= 1

        replace(chain, key, change)
        (finding,) = verify(chain).findings
        assert (finding.key, finding.snapshots) == (key, ())
        assert finding.next.startswith("no snapshot needs it")
        assert f"dump {key}" in finding.next
        chain.store.delete(key)
        chain.store.put(key, [good])


def test_heads_in_the_wrong_order_are_found() -> None:
    chain, writer = chain_of()
    late = HeadRecord(chain.find("step:1").id, 1, 0, "00", now(), "main", number=4)
    chain.store.put(late.key, [record.seal(late)])
    found = {finding.key: finding.problem for finding in verify(chain).findings}
    assert found == {late.key: "it stands after the head of a later writer"}
    assert writer.lease.number == 1


@pytest.mark.parametrize("prefix", [keys.lease("main"), keys.tag("first")])
def test_records_that_changed_places_are_found(prefix: str) -> None:
    """Each is whole, and no snapshot is the worse for it."""
    chain, writer = chain_of()
    for number, id in enumerate((chain.find("step:1").id, chain.find("step:2").id), start=1):
        tag = TagRecord(id, "00", now(), "first", number)
        chain.store.put(tag.key, [record.seal(tag)])
    writer.lease.release()
    one, other = keys.numbered(prefix, 1), keys.numbered(prefix, 2)
    first, second = bytes(chain.store.get(one)), bytes(chain.store.get(other))
    assert verify(chain).findings == []
    for key, data in ((one, second), (other, first)):
        chain.store.delete(key)
        chain.store.put(key, [data])
    report = verify(chain)
    assert [finding.key for finding in report.findings] == [other, one]
    assert {finding.problem.partition(" record is ")[2] for finding in report.findings} == {
        "the record of another place"
    }
    assert report.whole == 3


def test_all_that_a_record_with_a_gap_before_it_can_mean() -> None:
    chain, _ = chain_of(5)
    for number in (2, 4):
        chain.store.delete(keys.numbered(keys.head("main"), number))
    report = verify(chain)
    assert [finding.key for finding in report.findings] == [
        keys.numbered(keys.head("main"), number) for number in (4, 2)
    ]
    assert report.whole == 3


@pytest.mark.parametrize("verb", sorted(READS))
def test_a_store_that_is_away_is_no_damage(verb: str) -> None:
    chain, _ = chain_of(1)
    inner = chain.store
    counting = FaultyStore(inner, verbs=frozenset({verb}))
    chain.store = counting
    verify(chain)
    for number in range(counting.count):
        chain.store = FaultyStore(inner, number, lambda: Unavailable("away"), verbs=frozenset({verb}))
        with pytest.raises(Unavailable):
            verify(chain)


class Meanwhile(MemoryStore):
    """Something happens when a certain object is read."""

    at = ""
    then: Callable[[], object] | None = None

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        if self.then is not None and key.startswith(self.at):
            then, self.then = self.then, None
            then()
        return super().get(key, start, size_bytes)

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        return super().put(key, parts)


@pytest.mark.parametrize(
    "at", [keys.CHAIN, keys.HEADS, keys.LEASES, keys.MANIFESTS, keys.SNAPSHOTS, keys.PACKS]
)
def test_a_run_that_goes_on_and_prunes_meanwhile_is_no_damage(at: str) -> None:
    store = Meanwhile()
    chain, writer = chain_of(3, store)

    def go_on() -> None:
        for step in (4, 5):
            writer.write(content(step, SMALL).captured(), Facts(step=step))
        plan = prune.plan(chain, Keep.parse("last 2"), mine=writer.lease)
        assert plan is not None
        prune.execute(chain, plan)

    store.at, store.then = at, go_on
    assert verify(chain).findings == []
    assert store.then is None
    assert verify(chain).whole == 2


def test_leaves_that_share_regions_are_digested_across_chunks() -> None:
    """Small leaves that lie across the grid: their digests are cut from their own start."""
    layout = lay_out([whole(f"leaf{n}", "uint8", (5000 + 777 * n,)) for n in range(40)])
    writer = started(MemoryStore())
    (snapshot,) = written(writer, [content(3, layout)])
    manifest = writer.chain.manifest(snapshot)
    assert len(manifest.regions) == 1
    assert len(manifest.chunks) > 20
    assert any(leaf.size_bytes(leaf.slices[0]) > manifest.grid_bytes for leaf in manifest.leaves)
    assert verify(writer.chain).findings == []


def test_more_shared_bytes_than_any_state_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = lay_out([whole("one", "uint8", (6000,)), whole("two", "uint8", (6000,))])
    writer = started(MemoryStore())
    (snapshot,) = written(writer, [content(3, layout)])
    monkeypatch.setattr(states, "MAX_SHARED_BYTES", 11_999)
    (finding,) = verify(writer.chain).findings
    assert "claim to share more than" in finding.problem
    assert finding.snapshots == (snapshot.id,)
