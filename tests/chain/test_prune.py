from __future__ import annotations

import random
from collections.abc import Iterator

import msgspec
import pytest
from making import Content, assert_restores, content, started, written

from everstep.chain import lease, prune
from everstep.chain.doomed import refuse_doomed
from everstep.chain.history import Chain, now
from everstep.chain.lease import Lease
from everstep.chain.prune import Plan
from everstep.chain.retention import Keep
from everstep.chain.steplog import StepLog
from everstep.chain.verify import verify
from everstep.chain.writer import Facts, Writer
from everstep.errors import Conflict, Damaged, Fenced, Unsupported
from everstep.format import keys, record
from everstep.format.chunk import digest
from everstep.format.record import HeadRecord, StepRecord, TagRecord
from everstep.store.base import Entry
from everstep.store.memory import MemoryStore
from everstep.testing.faults import Died, FaultyStore

LAST = Keep.parse("last 2")
BIG_STEPS = 7


@pytest.fixture(autouse=True)
def _all_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if what is unreachable had been written long ago."""
    monkeypatch.setattr(prune, "GRACE_S", -10.0)


def states(count: int = BIG_STEPS) -> list[Content]:
    """States each of which shares chunks with all others."""
    rng = random.Random(2)
    made = [content(0)]
    for number in range(count - 1):
        made.append(made[-1].changed(rng, ("moment", "dense", "dense", "count")[number % 4]))
    return made


STATES = states()


def chain_of(store: MemoryStore | FaultyStore) -> tuple[Chain, Writer]:
    """Seven snapshots on main, two on `try` from the second of them, a tag on the first, step log
    segments."""
    writer = started(store)
    chain = writer.chain
    log = StepLog(chain, "main", writer.lease.number)
    shots = []
    for step, one in enumerate(STATES, start=1):
        log.append(StepRecord(step=step, epoch=0))
        journal = log.cut()
        shots.append(writer.write(one.captured(), Facts(step=step)))
        assert journal is not None
        log.seal(journal)
    other = Writer(chain, writer.lease, branch="try", parent=shots[1].id)
    other.build_on(chain.manifest(shots[1]))
    for step in (3, 4):
        other.write(STATES[1].changed(random.Random(step), "mean").captured(), Facts(step=step))
    tag = TagRecord(shots[0].id, "00", now(), "first", number=1)
    chain.store.put(tag.key, [record.seal(tag)])
    return chain, writer


def reachable(chain: Chain) -> set[str]:
    """The keys of all that heads and tags need: an oracle of its own."""
    ids = {point.head.snapshot for b in chain.branches() for point in chain.points(b) if point.head}
    found: set[str] = set()
    for id in ids | set(chain.tags().values()):
        snapshot = chain.snapshot(id)
        found |= {keys.snapshot(id), *map(keys.manifest, snapshot.record.manifests)}
        found |= {keys.pack(place.pack) for place in chain.manifest(snapshot).places}
    return found


def stored(chain: Chain) -> set[str]:
    kinds = (keys.SNAPSHOTS, keys.MANIFESTS, keys.PACKS)
    found = (entry.key for entry in chain.store.list())
    return {key for key in found if key.startswith(kinds) and len(key.rpartition("/")[2]) == 64}


def planned(chain: Chain) -> Plan | None:
    """As the writer of `chain_of` plans it, which writes nothing meanwhile."""
    return prune.plan(chain, LAST, mine=Lease(chain.store, 1))


def assert_kept(chain: Chain) -> None:
    """The last two of each branch, what is tagged and where `try` began are there, whole, and are all there
    is."""
    assert [s.step for s in chain.snapshots()] == [7, 6, 2, 1]
    assert [s.step for s in chain.snapshots("try")] == [4, 3]
    for snapshot in [*chain.snapshots(), chain.find("first")]:
        assert_restores(chain, snapshot, STATES[snapshot.step - 1])
    for snapshot in chain.snapshots("try"):
        assert_restores(chain, snapshot, STATES[1].changed(random.Random(snapshot.step), "mean"))
    assert verify(chain).findings == []
    assert stored(chain) == reachable(chain)


def test_the_plan_changes_nothing_and_its_execution_keeps_what_it_promised() -> None:
    chain, _ = chain_of(MemoryStore())
    before = {entry.key for entry in chain.store.list()}
    plan = planned(chain)
    assert plan is not None
    assert {entry.key for entry in chain.store.list()} == before
    assert set(plan.snapshots) == {chain.find(f"step:{step}").id for step in (3, 4, 5)}
    heads = [key for key in plan.keys if key.startswith(keys.HEADS)]
    # Heads first, the oldest of them first of all: nothing listed ever lacks a part.
    assert heads == [keys.numbered(keys.head("main"), number) for number in (3, 4, 5)]
    assert list(plan.keys[:3]) == heads
    assert plan.packs == {key.rpartition("/")[2] for key in plan.keys if key.startswith(keys.PACKS)}
    assert plan.packs
    assert plan.freed_bytes == sum(one.size_bytes for one in chain.store.list() if one.key in plan.keys)
    done = prune.execute(chain, plan)
    assert (done.keys, done.freed_bytes) == (plan.keys, plan.freed_bytes)
    after = {entry.key for entry in chain.store.list()}
    # What tells that there was a prune is all that it leaves behind.
    assert after - before == {keys.numbered(keys.PRUNES, 2)}
    assert before - after == set(plan.keys)
    assert_kept(chain)
    assert planned(chain) is None


def test_all_is_kept_when_all_is_to_be_kept() -> None:
    chain, _ = chain_of(MemoryStore())
    assert prune.plan(chain, Keep.parse("all")) is None
    assert prune.plan(chain, Keep.parse("last 7")) is None


def test_the_reasons_are_given_with_what_stays() -> None:
    chain, _ = chain_of(MemoryStore())
    plan = planned(chain)
    assert plan is not None
    assert {(row.branch, row.step): row.reasons for row in plan.rows} == {
        ("main", 7): ("head of main", "last 2"),
        ("main", 6): ("last 2",),
        ("main", 5): (),
        ("main", 4): (),
        ("main", 3): (),
        ("main", 2): ("start of try",),
        ("main", 1): ("tag first",),
        ("try", 4): ("head of try", "last 2"),
        ("try", 3): ("last 2",),
    }


def test_only_the_branches_asked_for_are_pruned() -> None:
    chain, _ = chain_of(MemoryStore())
    plan = prune.plan(chain, Keep.parse("last 1"), branches=["try"], mine=Lease(chain.store, 1))
    assert plan is not None
    prune.execute(chain, plan)
    assert [s.step for s in chain.snapshots()] == [7, 6, 5, 4, 3, 2, 1]
    assert [s.step for s in chain.snapshots("try")] == [4]
    assert verify(chain).findings == []


def test_a_long_chain_is_pruned_in_several_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    chain, writer = chain_of(MemoryStore())
    writer.lease.release()
    monkeypatch.setattr(prune, "MAX_NAMES", 6)
    rounds = list(prune.prune(chain, LAST))
    assert len(rounds) > 1
    assert all(len(one.keys) <= 6 for one in rounds)
    assert_kept(chain)


def test_step_log_segments_of_steps_that_are_gone_go() -> None:
    chain, _ = chain_of(MemoryStore())
    chain.store.delete(keys.numbered(keys.tag("first"), 1))
    chain.store.delete(keys.numbered(keys.head("try"), 2))
    chain.store.delete(keys.numbered(keys.head("try"), 1))
    plan = planned(chain)
    assert plan is not None
    prune.execute(chain, plan)
    first_steps = [int(entry.key.rpartition("/")[2], 16) for entry in chain.store.list(keys.STEPLOG)]
    # Steps after the sixth snapshot are asked for when it is resumed, and it names the sixth's own end.
    assert first_steps == [6, 7]
    assert set(StepLog(chain, "main", 9).after(6)) == {7}


# -- what nothing reaches --------------------------------------------------------------------------------

UNDER_WAY = [keys.pack("ab" * 32), keys.manifest("cd" * 32), keys.snapshot("ef" * 32)]


def pruned(chain: Chain, mine: Lease | None = None) -> set[str]:
    """The keys that go."""
    plan = prune.plan(chain, LAST, mine=mine)
    return set() if plan is None else set(prune.execute(chain, plan).keys)


class Aged(MemoryStore):
    """Some objects are older than they are, by the store's own clock."""

    def __init__(self) -> None:
        super().__init__()
        self.age_s: dict[str, float] = {}

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[Entry]:
        for entry in super().list(prefix, limit):
            yield Entry(entry.key, entry.size_bytes, entry.modified_at - self.age_s.get(entry.key, 0.0))


def with_orphans(age_s: float) -> tuple[Aged, Chain, Writer]:
    store = Aged()
    chain, writer = chain_of(store)
    for key in UNDER_WAY:
        store.put(key, [b"of a snapshot that is being written"])
        store.age_s[key] = age_s
    return store, chain, writer


def test_what_is_younger_than_the_grace_window_and_nobodys_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "GRACE_S", 3600.0)
    store, chain, writer = with_orphans(3500.0)
    writer.lease.release()
    # What belonged to snapshots that go is known to be theirs, and goes at once.
    pruned(chain)
    assert stored(chain) == reachable(chain) | set(UNDER_WAY)
    store.age_s = dict.fromkeys(UNDER_WAY, 3700.0)
    assert pruned(chain) == set(UNDER_WAY)
    assert_kept(chain)


def test_what_is_younger_than_the_lease_of_a_writer_at_work_stays() -> None:
    store, chain, _ = with_orphans(0.0)
    assert not pruned(chain) & set(UNDER_WAY)
    store.age_s = dict.fromkeys(UNDER_WAY, 3600.0)
    # Put before the writer came, so that it is not its own.
    assert pruned(chain) == set(UNDER_WAY)


def test_a_writer_that_prunes_after_its_commit_has_no_others_under_way() -> None:
    _, chain, writer = with_orphans(0.0)
    assert set(UNDER_WAY) <= pruned(chain, mine=writer.lease)


def test_a_released_lease_holds_nothing() -> None:
    _, chain, writer = with_orphans(0.0)
    writer.lease.release()
    assert set(UNDER_WAY) <= pruned(chain)


def test_a_lease_of_another_machine_holds_until_another_writer_of_its_branch_commits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, chain, _ = with_orphans(0.0)
    with monkeypatch.context() as patch:
        patch.setattr(lease, "is_of_this_machine", lambda holder: False)
        assert not pruned(chain) & set(UNDER_WAY)
        following = Lease.take(chain.store)
        following.release()
        # It has committed nothing: the one before may still come first.
        assert not pruned(chain) & set(UNDER_WAY)
        next_one = Writer(chain, Lease.take(chain.store))
        (last,) = written(next_one, [STATES[0]], 8)
        next_one.lease.release()
        assert set(UNDER_WAY) <= pruned(chain)
    assert_restores(chain, last, STATES[0])


def test_a_lease_of_a_dead_process_holds_nothing_and_its_keeper_can_commit_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, chain, writer = with_orphans(0.0)
    before = len(list(chain.points()))
    with monkeypatch.context() as patch:
        patch.setattr(lease, "_lives", lambda holder: False)
        assert set(UNDER_WAY) <= pruned(chain)
    with pytest.raises(Fenced):
        written(writer, [STATES[0]], 8)
    assert len(list(chain.points())) == before - 3
    assert_kept_but_orphans(chain)


def test_who_prunes_before_its_first_commit_does_not_fence_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    _, chain, writer = with_orphans(0.0)
    with monkeypatch.context() as patch:
        patch.setattr(lease, "_lives", lambda holder: False)
        following = Lease.take(chain.store)
        assert set(UNDER_WAY) <= pruned(chain, mine=following)
    with pytest.raises(Fenced):
        written(writer, [STATES[0]], 8)
    (last,) = written(Writer(chain, following), [STATES[0]], 9)
    assert_restores(chain, last, STATES[0])


def assert_kept_but_orphans(chain: Chain) -> None:
    assert verify(chain).findings == []
    assert reachable(chain) <= stored(chain)


def test_what_a_snapshot_under_way_needs_stays() -> None:
    """A snapshot that a writer at work is about to commit: its record is there, and nothing lists it. It
    needs packs of a snapshot that goes."""
    chain, _ = chain_of(MemoryStore())
    third = chain.find("step:3")
    data = record.encode(msgspec.structs.replace(third.record, note="under way", step=8))
    chain.store.put(keys.snapshot(digest(data)), [data])
    assert set(chain.manifest(third).packs) - {
        pack for step in (1, 2, 6, 7) for pack in chain.manifest(chain.find(f"step:{step}")).packs
    }
    prune.execute(chain, prune.consider(chain, LAST))
    assert_restores(chain, chain.snapshot(digest(data)), STATES[2])


def test_foreign_files_are_left_alone() -> None:
    chain, _ = chain_of(MemoryStore())
    foreign = [
        "packs/ab/notes.txt",
        "snapshots/copy",
        "manifests/x",
        "steplog/main/x",
        "notes",
        "heads/main/x",
    ]
    for key in foreign:
        chain.store.put(key, [b"x"])
    plan = planned(chain)
    assert plan is not None
    prune.execute(chain, plan)
    assert set(foreign) <= {entry.key for entry in chain.store.list()}
    assert_kept(chain)


# -- damage ----------------------------------------------------------------------------------------------


def break_one(chain: Chain, key: str, how: str) -> None:
    data = bytearray(chain.store.get(key))
    data[len(data) // 2] ^= 1
    chain.store.delete(key)
    if how == "flip":
        chain.store.put(key, [bytes(data)])


@pytest.mark.parametrize("how", ["flip", "delete"])
@pytest.mark.parametrize("ref", ["head", "head~1", "try", "first", "step:2"])
@pytest.mark.parametrize("kind", ["snapshot", "manifest"])
def test_damage_in_what_stays_stops_it(ref: str, kind: str, how: str) -> None:
    chain, _ = chain_of(MemoryStore())
    snapshot = chain.find(ref)
    name = {"snapshot": keys.snapshot(snapshot.id), "manifest": keys.manifest(snapshot.record.manifests[0])}
    break_one(chain, name[kind], how)
    with pytest.raises(Damaged, match="nothing was pruned"):
        planned(chain)


def test_damaged_heads_and_tags_that_stay_stop_it() -> None:
    for key in (keys.numbered(keys.head("main"), 7), keys.numbered(keys.head("try"), 1),
                keys.numbered(keys.tag("first"), 1)):  # fmt: skip
        chain, _ = chain_of(MemoryStore())
        break_one(chain, key, "flip")
        with pytest.raises(Damaged):
            planned(chain)


@pytest.mark.parametrize("what", ["head", "snapshot", "manifest"])
@pytest.mark.parametrize("how", ["flip", "delete"])
def test_damage_in_what_goes_does_not_stop_it(what: str, how: str) -> None:
    chain, _ = chain_of(MemoryStore())
    third = chain.find("step:3")
    keys_of = {
        "head": keys.numbered(keys.head("main"), 3),
        "snapshot": keys.snapshot(third.id),
        "manifest": keys.manifest(third.record.manifests[0]),
    }
    break_one(chain, keys_of[what], how)
    plan = planned(chain)
    assert plan is not None
    prune.execute(chain, plan)
    assert_kept(chain)


def test_what_a_newer_version_wrote_stops_it() -> None:
    for number in (1, 8):
        chain, _ = chain_of(MemoryStore())
        newer = HeadRecord(chain.find("head").id, 9, 1, "00", now(), "main", number, format=99)
        chain.store.delete(newer.key)
        chain.store.put(newer.key, [record.seal(newer)])
        with pytest.raises(Unsupported):
            planned(chain)


# -- killed ----------------------------------------------------------------------------------------------


def writes() -> int:
    store = FaultyStore(MemoryStore())
    chain, _ = chain_of(store)
    plan = planned(chain)
    assert plan is not None
    before = store.count
    prune.execute(chain, plan)
    return store.count - before


@pytest.mark.slow
@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("number", range(writes()))
def test_killed_at_any_write_and_done_again(number: int, done: bool) -> None:
    inner = MemoryStore()
    store = FaultyStore(inner, done=done)
    chain, _ = chain_of(store)
    plan = planned(chain)
    assert plan is not None
    store.at = store.count + number
    with pytest.raises(Died):
        prune.execute(chain, plan)

    after = Chain(inner)
    # Nothing that is listed lacks a part, and what is to stay does.
    assert verify(after).findings == []
    assert reachable(after) <= stored(after)
    again = planned(after)
    if again is not None:
        assert set(again.keys) <= set(plan.keys)
        prune.execute(after, again)
    else:
        assert number + done > len(plan.keys)
    assert_kept(after)


def test_what_a_killed_prune_leaves_is_taken_away_by_the_next() -> None:
    inner = MemoryStore()
    store = FaultyStore(inner)
    chain, _ = chain_of(store)
    plan = planned(chain)
    assert plan is not None
    store.at = store.count + 3
    with pytest.raises(Died):
        prune.execute(chain, plan)
    after = Chain(inner)
    left = [entry.key for entry in inner.list(keys.PRUNES)]
    assert left == [keys.numbered(keys.PRUNES, 1)]
    with pytest.raises(Conflict, match="is being pruned"):
        refuse_doomed(after, plan.snapshots[0])
    again = planned(after)
    assert again is not None
    prune.execute(after, again)
    assert [entry.key for entry in inner.list(keys.PRUNES)] == [keys.numbered(keys.PRUNES, 3)]
    refuse_doomed(after, plan.snapshots[0])


@pytest.mark.slow
def test_a_writer_goes_on_after_a_prune_that_was_killed_anywhere() -> None:
    for number in range(writes()):
        inner = MemoryStore()
        store = FaultyStore(inner)
        chain, writer = chain_of(store)
        plan = planned(chain)
        assert plan is not None
        store.at = store.count + number
        with pytest.raises(Died):
            prune.execute(chain, plan)
        writer = Writer(Chain(inner), Lease(inner, 1), parent=chain_head(inner))
        writer.build_on(writer.chain.manifest(writer.chain.find("head~1")))
        (old, fresh) = written(writer, [STATES[2], STATES[0]], 8)
        assert_restores(writer.chain, old, STATES[2])
        assert_restores(writer.chain, fresh, STATES[0])
        assert verify(writer.chain).findings == []


def chain_head(store: MemoryStore) -> str:
    head = Chain(store).head()
    assert head is not None
    return head.id


def test_all_records_of_a_snapshot_that_stays_stay() -> None:
    """A snapshot that was committed twice."""
    chain, _ = chain_of(MemoryStore())
    again = HeadRecord(chain.find("step:3").id, 3, 1, "00", now(), "main", number=8)
    chain.store.put(again.key, [record.seal(again)])
    plan = planned(chain)
    assert plan is not None
    prune.execute(chain, plan)
    assert [point.number for point in chain.points()] == [8, 7, 3, 2, 1]
    assert_restores(chain, chain.find("head"), STATES[2])
    assert stored(chain) == reachable(chain)


def test_a_writer_forgets_all_that_was_pruned_and_not_only_what_it_needed_next() -> None:
    """A state that comes back after another one was taken, which needed nothing of what had gone."""
    writer = started(MemoryStore())
    first, second = content(1), content(2)
    written(writer, [first, second])
    for _ in prune.prune(writer.chain, Keep.parse("last 1")):
        pass
    third = second.changed(random.Random(6), "count")
    for shot, state in zip(written(writer, [third, first], 3), (third, first), strict=True):
        assert_restores(writer.chain, shot, state)
    assert verify(writer.chain).findings == []


def test_what_was_listed_since_the_plan_keeps_what_it_needs_although_the_policy_would_not_keep_it() -> None:
    writer = started(MemoryStore())
    chain = writer.chain
    first, second = content(1), content(2)
    written(writer, [first, second])
    plan = prune.consider(chain, Keep.parse("last 1"))
    between, newest = written(writer, [first, second], 3)
    prune.execute(chain, plan)
    assert [one.step for one in chain.snapshots()] == [4, 3, 2]
    assert_restores(chain, between, first)
    assert_restores(chain, newest, second)
    assert verify(chain).findings == []
