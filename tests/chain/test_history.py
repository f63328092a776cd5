from __future__ import annotations

import itertools
import random

import msgspec
import pytest
from making import content, started, written

from everstep.chain.history import Chain, Snapshot, now
from everstep.chain.writer import Facts, Writer
from everstep.errors import Damaged, Mismatch, NotFound, Unsupported
from everstep.format import keys, record
from everstep.format.record import HeadRecord, TagRecord
from everstep.store.base import Entry
from everstep.store.local import LocalStore
from everstep.store.memory import MemoryStore


def tag(chain: Chain, name: str, id: str, number: int = 1) -> None:
    made = TagRecord(id, "00", now(), name, number)
    assert chain.store.put(made.key, [record.seal(made)])


@pytest.fixture
def writer() -> Writer:
    """Six snapshots on main at steps 10 to 60, two on branch `try`, a tag."""
    made = started(MemoryStore())
    small = content(1)
    shots = []
    for step in range(10, 70, 10):
        small = small.changed(random.Random(step), "count")
        shots.append(made.write(small.captured(), Facts(step=step)))
    other = Writer(made.chain, made.lease, branch="try", parent=shots[1].id)
    for step in (25, 26):
        other.write(small.changed(random.Random(step), "count").captured(), Facts(step=step))
    tag(made.chain, "best", shots[2].id)
    return made


@pytest.fixture
def chain(writer: Writer) -> Chain:
    return writer.chain


def step_of(chain: Chain, ref: str, branch: str = "main") -> int:
    return chain.find(ref, branch).step


@pytest.mark.parametrize(
    ("ref", "step"),
    [
        ("head", 60), ("latest", 60), ("main", 60), ("try", 26), ("best", 30), ("step:10", 10),
        ("step:60", 60),
        ("head~", 50), ("head~0", 60), ("head~1", 50), ("head~5", 10), ("best~2", 10), ("try~2", 20),
        ("step:40~1", 30), ("head~~", 40), ("head~1~2", 30),
    ],
)  # fmt: skip
def test_references(chain: Chain, ref: str, step: int) -> None:
    assert step_of(chain, ref) == step


def test_references_on_another_branch(chain: Chain) -> None:
    assert step_of(chain, "head", "try") == 26
    assert step_of(chain, "step:25", "try") == 25
    with pytest.raises(NotFound, match="no snapshot at step 25"):
        chain.find("step:25")


def test_ids_and_their_beginnings(chain: Chain) -> None:
    for snapshot in chain.snapshots():
        assert chain.find(snapshot.id) == chain.find(snapshot.short) == snapshot
        assert chain.find(f"{snapshot.id[:20]}~0") == snapshot
    assert [s.step for s in chain.snapshots()] == [60, 50, 40, 30, 20, 10]
    assert [s.step for s in chain.snapshots("try")] == [26, 25]


def test_an_ambiguous_beginning_lists_what_it_fits(chain: Chain) -> None:
    ids = [f"abcd{n}" + "0" * 59 for n in "12"]
    for id in ids:
        chain.store.put(keys.snapshot(id), [b"x"])
    chain.store.put(keys.snapshot("abcd1-a-copy"), [b"x"])
    with pytest.raises(
        Mismatch, match=r"abcd is the beginning of 2 snapshots \(abcd1000, abcd2000\)"
    ) as caught:
        chain.find("abcd")
    assert caught.value.next


@pytest.mark.parametrize(
    "ref",
    ["nothing", "step:35", "step:", "0000", "ab", "head~6", "head~99999", "", "~", "~1", "head~x",
     "nothing~1", "step:" + "9" * 5000, "head~" + "9" * 5000, "a/b", "HEAD", "f" * 64],
)  # fmt: skip
def test_what_is_not_there_is_told_with_what_there_is(chain: Chain, ref: str) -> None:
    with pytest.raises(NotFound) as caught:
        chain.find(ref)
    message = str(caught.value)
    assert message.endswith(f"Next: everstep -r {chain.url} log")
    names_what_there_is = (
        "main at step 60, try at step 26, tag best",
        "the nearest are at",
        "its parent is not kept",
    )
    assert any(part in message for part in names_what_there_is), message


def test_the_nearest_steps_are_named(chain: Chain) -> None:
    with pytest.raises(NotFound, match="the nearest are at 20, 30, 40"):
        chain.find("step:31")


def test_an_empty_chain(chain: Chain) -> None:
    empty = Chain.create(MemoryStore())
    assert (empty.head(), empty.head_number(), empty.branches(), empty.tags()) == (None, 0, [], {})
    assert list(empty.points()) == list(empty.snapshots()) == []
    for ref in ("head", "main", "step:1", "abcd"):
        with pytest.raises(NotFound, match="Next: everstep"):
            empty.find(ref)


def test_no_chain() -> None:
    with pytest.raises(NotFound, match="is not an Everstep chain") as caught:
        Chain(MemoryStore("here"))
    assert caught.value.next


def test_tags_move_and_go(chain: Chain) -> None:
    first, second = chain.find("step:10"), chain.find("step:20")
    assert chain.tags() == {"best": chain.find("step:30").id}
    tag(chain, "best", first.id, 2)
    tag(chain, "old", second.id)
    assert chain.tags() == {"best": first.id, "old": second.id}
    tag(chain, "old", "", 2)
    assert chain.tags() == {"best": first.id}
    with pytest.raises(NotFound):
        chain.find("old")


def test_a_damaged_tag_stands_in_nobody_elses_way(chain: Chain) -> None:
    chain.store.put(keys.numbered(keys.tag("bad"), 1), [b"rot"])
    assert step_of(chain, "best") == 30
    assert step_of(chain, chain.find("head").id[:10]) == 60
    with pytest.raises(Damaged, match="tag record"):
        chain.find("bad")
    with pytest.raises(Damaged):
        chain.tags()


def replace(chain: Chain, key: str, data: bytes | None) -> None:
    chain.store.delete(key)
    if data is not None:
        chain.store.put(key, [data])


def test_damaged_points_are_shown_and_passed_over(chain: Chain) -> None:
    points = list(chain.points())
    assert [point.number for point in points] == [6, 5, 4, 3, 2, 1]
    replace(chain, points[0].key, b"rot")
    assert points[1].snapshot is not None
    replace(chain, keys.snapshot(points[1].snapshot.id), None)
    assert points[2].snapshot is not None
    replace(chain, keys.snapshot(points[2].snapshot.id), b"rot")
    seen = list(chain.points())
    assert [type(point.damage) for point in seen] == [Damaged] * 3 + [type(None)] * 3
    assert [point.head is None for point in seen] == [True] + [False] * 5
    assert seen[0].name() == f"head record {points[0].key}"
    assert seen[1].name() == points[1].name()
    assert "is missing" in str(seen[1].damage)
    assert [snapshot.step for snapshot in chain.snapshots()] == [30, 20, 10]
    assert chain.head_number() == 6
    with pytest.raises(Damaged):
        chain.head()
    with pytest.raises(Damaged):
        chain.find("head")
    assert step_of(chain, "step:30") == 30


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(range(1, 7), 2)))
def test_head_records_that_changed_places_are_damaged(chain: Chain, one: int, other: int) -> None:
    """However whole they are: each of them says where it belongs."""
    good = list(chain.points())
    swap(chain, *(keys.numbered(keys.head("main"), number) for number in (one, other)))
    for point, before in zip(chain.points(), good, strict=True):
        if point.number not in (one, other):
            assert point == before
            continue
        assert (point.head, point.snapshot) == (None, None)
        assert isinstance(point.damage, Damaged)
        assert point.damage.problem == "a head record is the record of another place"
        assert point.damage.key == point.key
    assert [snapshot.step // 10 for snapshot in chain.snapshots()] == [
        number for number in range(6, 0, -1) if number not in (one, other)
    ]


def test_a_head_record_of_another_branch_is_damaged(chain: Chain) -> None:
    """Of the same number: only the branch tells."""
    swap(chain, keys.numbered(keys.head("main"), 2), keys.numbered(keys.head("try"), 2))
    for branch, steps in (("main", [60, 50, 40, 30, 10]), ("try", [25])):
        (damaged,) = [point for point in chain.points(branch) if point.damage]
        assert damaged.number == 2
        assert [snapshot.step for snapshot in chain.snapshots(branch)] == steps


def test_a_tag_record_of_another_tag_or_time_is_damaged(chain: Chain) -> None:
    first, second = chain.find("step:10").id, chain.find("step:20").id
    tag(chain, "good", first)
    tag(chain, "worse", first, 1)
    tag(chain, "worse", second, 2)
    # The tag of another name, and one that has been moved since.
    swap(chain, keys.numbered(keys.tag("best"), 1), keys.numbered(keys.tag("good"), 1))
    swap(chain, keys.numbered(keys.tag("worse"), 1), keys.numbered(keys.tag("worse"), 2))
    for name in ("best", "good", "worse"):
        with pytest.raises(Damaged, match="a tag record is the record of another place"):
            chain.find(name)
    with pytest.raises(Damaged):
        chain.tags()


def swap(chain: Chain, one: str, other: str) -> None:
    """Two objects change places."""
    first, second = bytes(chain.store.get(one)), bytes(chain.store.get(other))
    assert first != second
    replace(chain, one, second)
    replace(chain, other, first)


def test_a_head_of_a_newer_version_is_shown_and_never_passed_over_silently(chain: Chain) -> None:
    newer = HeadRecord(chain.find("head").id, 70, 1, "00", now(), "main", number=7, format=99)
    chain.store.put(newer.key, [record.seal(newer)])
    assert isinstance(next(chain.points()).damage, Unsupported)
    with pytest.raises(Unsupported, match="pip install -U"):
        chain.head()


def test_a_manifest_that_is_missing_damaged_or_another(chain: Chain) -> None:
    head, before = chain.find("head"), chain.find("head~1")
    key = keys.manifest(head.record.manifests[0])
    good = bytes(chain.store.get(key))
    other = msgspec.structs.replace(head.record, manifests=before.record.manifests)
    with pytest.raises(Damaged, match="name different states"):
        chain.manifest(Snapshot(head.id, other))
    replace(chain, key, good[:-1])
    with pytest.raises(Damaged, match="does not match its digest") as caught:
        chain.manifest(head)
    assert caught.value.key == key
    replace(chain, key, None)
    with pytest.raises(Damaged, match="is missing") as caught:
        chain.manifest(head)
    assert caught.value.key == key


def test_a_snapshot_that_is_pruned_while_one_looks_is_no_damage() -> None:
    """Between the listing and the reading of a head record it goes; or its snapshot goes with it."""

    class Pruned(MemoryStore):
        go: tuple[str, ...] = ()

        def get(self, key: str, start: int = 0, size_bytes: int | None = None):  # type: ignore[no-untyped-def]
            if key in self.go:
                for one in self.go:
                    self.delete(one)
            return super().get(key, start, size_bytes)

    store = Pruned()
    writer = started(store)
    first, second = written(writer, [content(1), content(2)])
    head = keys.numbered(keys.head("main"), 1)
    store.go = (keys.snapshot(first.id), head)
    assert [point.number for point in writer.chain.points()] == [2]
    store.go = (keys.numbered(keys.head("main"), 2),)
    assert list(writer.chain.points()) == []
    assert second.step == 2


def test_reading_a_chain_is_lazy(writer: Writer) -> None:
    class Counting(MemoryStore):
        gets = 0

        def get(self, key: str, start: int = 0, size_bytes: int | None = None):  # type: ignore[no-untyped-def]
            self.gets += 1
            return super().get(key, start, size_bytes)

    store = Counting()
    for entry in writer.chain.store.list():
        store.put(entry.key, [writer.chain.store.get(entry.key)])
    chain = Chain(store)
    assert store.gets == 1
    assert chain.head() is not None
    assert store.gets == 3


def test_stray_files_are_no_branches_and_no_tags(tmp_path) -> None:  # type: ignore[no-untyped-def]
    writer = started(str(tmp_path / "c"))
    (snapshot,) = written(writer, [content(1)])
    for name in ("heads/.DS_Store", "heads/main/.nfs0001", "heads/main/0copy", "heads/x", "tags/.y", "tags/z",
                 "leases/.DS_Store", "leases/0", "snapshots/0000copy"):  # fmt: skip
        place = tmp_path / "c" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"x")
    chain = Chain(LocalStore(tmp_path / "c"))
    assert (chain.branches(), chain.tags(), chain.head_number()) == (["main"], {}, 1)
    assert chain.head() == snapshot
    (second,) = written(writer, [content(2)], 2)
    assert chain.head() == second
    with pytest.raises(NotFound, match="begins with 0000"):
        chain.find("0000")


def test_a_point_is_an_entry_of_the_store(chain: Chain) -> None:
    entries = {entry.key for entry in chain.store.list() if isinstance(entry, Entry)}
    assert {point.key for branch in chain.branches() for point in chain.points(branch)} <= entries
