"""Tags, branches, rollbacks: what they cost, what a kill or a race leaves of them, and what others see."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making import Content, assert_restores, content, started

from everstep.chain import lease, prune, versions
from everstep.chain.history import Chain
from everstep.chain.lease import Lease
from everstep.chain.steplog import StepLog
from everstep.chain.verify import verify
from everstep.chain.writer import Facts, Writer
from everstep.errors import Conflict, Damaged, EverstepError, Mismatch, NotFound, Unavailable
from everstep.events import RolledBack
from everstep.format import keys, record
from everstep.format.record import HeadRecord, Move, StepRecord
from everstep.store.base import Store
from everstep.store.files import SystemFiles
from everstep.store.local import LocalStore
from everstep.store.memory import MemoryStore
from everstep.testing.crash import RecordingFiles, build
from everstep.testing.crash import states as states_of
from everstep.testing.faults import Died, FaultyStore
from examples import examples

STEPS = (10, 20, 30, 40)


def states() -> dict[int, Content]:
    found, one = {}, content(1)
    for step in STEPS:
        found[step] = one = one.changed(random.Random(step), "dense")
    return found


STATES = states()


def chain_of(store: Store) -> Chain:
    """Four snapshots on main; the writer has ended."""
    writer = started(store)  # type: ignore[arg-type]
    for step, one in STATES.items():
        writer.write(one.captured(), Facts(step=step))
    writer.lease.release()
    return writer.chain


@pytest.fixture
def chain() -> Chain:
    return chain_of(MemoryStore())


def head_step(chain: Chain, branch: str = "main") -> int:
    head = chain.head(branch)
    assert head is not None
    return head.step


def objects(chain: Chain) -> dict[str, bytes]:
    return {entry.key: bytes(chain.store.get(entry.key)) for entry in chain.store.list()}


def added(chain: Chain, action: Callable[[], object]) -> set[str]:
    before = objects(chain)
    action()
    after = objects(chain)
    assert before.items() <= after.items()
    return after.keys() - before.keys()


# -- tags --------------------------------------------------------------------------------------------------


def test_a_tag_is_one_small_record_and_stays_where_it_is(chain: Chain) -> None:
    (key,) = added(chain, lambda: versions.tag(chain, "good", "step:20"))
    assert key.startswith("tags/good/")
    assert len(chain.store.get(key)) < 400
    assert chain.find("good").step == 20
    assert added(chain, lambda: versions.tag(chain, "good", "head~2")) == set()
    with pytest.raises(Mismatch, match=r"names \w+ already") as caught:
        versions.tag(chain, "good", "head")
    assert "--force" in caught.value.next
    assert chain.find("good").step == 20


def test_a_tag_is_moved_by_force_and_taken_away(chain: Chain) -> None:
    versions.tag(chain, "good", "step:20")
    assert versions.tag(chain, "good", "step:30", force=True).step == 30
    assert chain.find("good").step == 30
    versions.untag(chain, "good")
    assert chain.tags() == {}
    for name in ("good", "never"):
        with pytest.raises(NotFound, match=f"has no tag '{name}'"):
            versions.untag(chain, name)
    versions.tag(chain, "good", "step:10")
    assert chain.find("good").step == 10
    assert verify(chain).findings == []


def test_a_damaged_tag_is_replaced_by_force_only(chain: Chain) -> None:
    versions.tag(chain, "good", "step:20")
    key = keys.numbered(keys.tag("good"), 1)
    chain.store.delete(key)
    chain.store.put(key, [b"rot"])
    with pytest.raises(Damaged):
        versions.tag(chain, "good", "step:10")
    versions.tag(chain, "good", "step:10", force=True)
    assert chain.find("good").step == 10
    chain.store.delete(keys.numbered(keys.tag("good"), 2))
    versions.untag(chain, "good")
    assert chain.tags() == {}


@pytest.mark.parametrize("name", ["head", "latest", "", "-d", "a/b", "a@b", "x" * 101, "step:5"])
@pytest.mark.parametrize("make", [versions.tag, versions.branch])
def test_names_that_could_not_be_referred_to(chain: Chain, name: str, make: Any) -> None:
    before = objects(chain)
    with pytest.raises(Mismatch, match="cannot name a"):
        make(chain, name, "head")
    assert objects(chain) == before


def test_a_name_is_a_branch_or_a_tag(chain: Chain) -> None:
    versions.tag(chain, "good", "step:20")
    versions.branch(chain, "try", "step:20")
    with pytest.raises(Mismatch, match="'try' is a branch"):
        versions.tag(chain, "try", "head")
    with pytest.raises(Mismatch, match="'good' is a tag"):
        versions.branch(chain, "good", "head")


def test_what_is_tagged_stays(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "GRACE_S", -10.0)
    versions.tag(chain, "good", "step:10")
    plan = prune.plan(chain, prune.Keep.parse("last 1"))
    assert plan is not None
    prune.execute(chain, plan)
    assert_restores(chain, chain.find("good"), STATES[10])
    with pytest.raises(NotFound):
        chain.find("step:20")


# -- branches ----------------------------------------------------------------------------------------------


def test_three_branches_of_one_snapshot_cost_no_chunk(chain: Chain) -> None:
    for number, name in enumerate(("lr-1e-4", "lr-3e-4", "lr-1e-3")):
        (key,) = added(chain, lambda name=name: versions.branch(chain, name, "step:20"))  # type: ignore[misc]
        assert key == keys.numbered(keys.head(name), 1)
        assert len(chain.store.get(key)) < 500
        assert_restores(chain, chain.find(name), STATES[20])
        assert len(chain.branches()) == number + 2
    assert verify(chain).findings == []
    # Each goes on by itself, and stores what is new only.
    for name in ("lr-1e-4", "lr-3e-4"):
        writer = Writer(chain, Lease.take(chain.store, name), branch=name, parent=chain.find(name).id)
        writer.build_on(chain.manifest(chain.find(name)))
        state = STATES[20].changed(random.Random(name), "count")
        made = writer.write(state.captured(), Facts(step=21))
        writer.lease.release()
        assert made.record.new_bytes < STATES[20].layout.logical_bytes / 10
        assert chain.find(f"{name}~").step == 20
        assert_restores(chain, chain.find(name), state)
    assert head_step(chain) == 40
    assert verify(chain).findings == []


def test_a_branch_says_where_it_began(chain: Chain) -> None:
    versions.branch(chain, "try", "step:20")
    versions.branch(chain, "other", "head", of="try")
    (point,) = versions.reflog(chain, "try")
    assert point.head is not None
    assert point.head.moved == Move("branch", "step:20")
    (point,) = versions.reflog(chain, "other")
    assert point.head is not None
    assert point.head.moved == Move("branch", "try@head")
    with pytest.raises(Mismatch, match="has a branch 'try' already"):
        versions.branch(chain, "try", "head")
    with pytest.raises(NotFound, match="no branch 'none'; its branches: main, other, try"):
        list(versions.reflog(chain, "none"))


def test_an_ordinary_head_record_has_the_bytes_it_always_had(chain: Chain) -> None:
    fields = ["snapshot", "step", "writer", "nonce", "at", "branch", "number", "format"]
    data = bytes(chain.store.get(keys.numbered(keys.head("main"), 1)))
    head = record.unseal(data, HeadRecord, keys.numbered(keys.head("main"), 1))
    assert head.moved is None
    assert list(record.msgspec.to_builtins(head)) == fields
    assert b"move" not in data


def test_a_branch_goes_only_by_force_where_something_would_be_lost(chain: Chain) -> None:
    versions.branch(chain, "try", "step:20")
    versions.drop_branch(chain, "try")
    assert chain.branches() == ["main"]
    versions.branch(chain, "try", "step:20")
    writer = Writer(chain, Lease.take(chain.store, "try"), branch="try", parent=chain.find("try").id)
    log = StepLog(chain, "try", writer.lease.number)
    log.append(StepRecord(step=21, epoch=0))
    made = writer.write(STATES[30].captured(), Facts(step=21))
    log.seal(log.cut())
    with pytest.raises(Conflict, match="by this process"):
        versions.drop_branch(chain, "try", force=True)
    writer.lease.release()
    with pytest.raises(Mismatch, match="1 snapshots are on no other branch than 'try'") as caught:
        versions.drop_branch(chain, "try")
    assert "--force" in caught.value.next
    versions.tag(chain, "kept", "try@head")
    versions.drop_branch(chain, "try")
    assert chain.branches() == ["main"]
    assert chain.find("kept") == made
    assert not list(chain.store.list(keys.steplog("try")))
    with pytest.raises(NotFound, match="no branch 'try'"):
        versions.drop_branch(chain, "try")
    assert verify(chain).findings == []


# -- rollback ----------------------------------------------------------------------------------------------


def test_a_rollback_moves_the_head_and_is_undone_by_another(chain: Chain) -> None:
    forty, twenty = chain.find("head"), chain.find("step:20")
    told = versions.rollback(chain, "main", "step:20")
    assert told == RolledBack(chain.url, "main", twenty.id, 40, 20)
    assert "from step 40 to" in str(told)
    assert chain.head() == twenty
    assert [point.head.step for point in versions.reflog(chain) if point.head] == [20, 40, 30, 20, 10]
    assert [point.head.step for point in chain.line() if point.head] == [20, 10]
    assert versions.rolled_back(chain, "main") == told
    assert versions.rollback(chain, "main", "main@{1}").snapshot == forty.id
    assert chain.head() == forty
    assert [point.head.step for point in chain.line() if point.head] == [40, 30, 20, 10]
    assert versions.rolled_back(chain, "main") is None
    assert verify(chain).findings == []


def test_a_rollback_to_the_head_writes_nothing(chain: Chain) -> None:
    assert added(chain, lambda: versions.rollback(chain, "main", "head~0")) == set()


def test_the_writer_after_a_rollback_follows_on_what_it_went_back_to(chain: Chain) -> None:
    versions.rollback(chain, "main", "step:20")
    writer = Writer(chain, Lease.take(chain.store), parent=chain.find("head").id)
    state = STATES[20].changed(random.Random(7), "moment")
    writer.write(state.captured(), Facts(step=25))
    writer.lease.release()
    assert [chain.find(ref).step for ref in ("head", "head~", "head~2", "@{1}", "@{2}")] == [
        25,
        20,
        10,
        20,
        40,
    ]
    assert [point.head.step for point in chain.line() if point.head] == [25, 20, 10]
    assert versions.rolled_back(chain, "main") is None
    assert {one.step for one in chain.snapshots()} == {10, 20, 25, 30, 40}
    assert verify(chain).findings == []


def test_a_head_may_go_to_any_snapshot_of_the_chain(chain: Chain) -> None:
    versions.branch(chain, "try", "step:20")
    writer = Writer(chain, Lease.take(chain.store, "try"), branch="try", parent=chain.find("try").id)
    for step in (21, 22):
        writer.write(STATES[30].changed(random.Random(step), "count").captured(), Facts(step=step))
    writer.lease.release()
    for ref, step in (("try", 22), ("try~", 21), ("main@{1}", 22), ("step:10", 10), ("try@{1}", 21)):
        assert versions.rollback(chain, "main", ref).to_step == step
        assert head_step(chain) == step
    assert verify(chain).findings == []


def test_a_head_may_go_back_to_what_was_never_its_own(chain: Chain) -> None:
    """The branch began with a snapshot that follows on one of main's, without a record of it."""
    writer = Writer(chain, Lease.take(chain.store, "try"), branch="try", parent=chain.find("step:20").id)
    writer.write(STATES[30].captured(), Facts(step=21))
    writer.lease.release()
    versions.rollback(chain, "try", "head~")
    assert head_step(chain, "try") == 20
    assert verify(chain).findings == []


def test_a_rollback_under_a_living_writer_is_refused(chain: Chain) -> None:
    mine = Lease.take(chain.store)
    before = objects(chain)
    with pytest.raises(Conflict, match="is being written by this process"):
        versions.rollback(chain, "main", "step:20")
    assert objects(chain) == before
    mine.release()
    for ref, branch in (("step:15", "main"), ("head", "none")):
        with pytest.raises(NotFound):
            versions.rollback(chain, branch, ref)


@pytest.mark.process
def test_the_living_writer_is_named(tmp_path: Path) -> None:
    chain = chain_of(LocalStore(tmp_path / "c"))
    code = (
        "import sys; from everstep.chain.lease import Lease; from everstep.store.local import LocalStore\n"
        "Lease.take(LocalStore(sys.argv[1])); print('taken', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "c")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"taken\n"
        with pytest.raises(Conflict, match=f"process {other.pid} on this machine"):
            versions.rollback(chain, "main", "step:20")
        assert head_step(chain) == 40
        other.kill()
        other.communicate()
    assert versions.rollback(chain, "main", "step:20").to_step == 20


def test_a_fenced_writer_commits_nothing_after_a_rollback(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One on another machine, which cannot be asked."""
    away = Writer(chain, Lease.take(chain.store), parent=chain.find("head").id)
    monkeypatch.setattr(lease, "_lives", lambda holder: False)
    versions.rollback(chain, "main", "step:10")
    with pytest.raises(EverstepError, match="has taken"):
        away.write(STATES[40].changed(random.Random(1), "count").captured(), Facts(step=50))
    assert head_step(chain) == 10


def test_what_a_rollback_took_back_is_not_fallen_back_to(chain: Chain) -> None:
    versions.rollback(chain, "main", "step:30")
    versions.rollback(chain, "main", "step:20")
    versions.rollback(chain, "main", "step:30")
    versions.rollback(chain, "main", "step:30~")
    assert [point.head.step for point in chain.line() if point.head] == [20, 10]
    # It is not known any more where 20 stood.
    chain.store.delete(keys.numbered(keys.head("main"), 2))
    chain.store.delete(keys.numbered(keys.head("main"), 6))
    assert [point.head.step for point in chain.line() if point.head] == [20]


def test_a_damaged_head_is_rolled_back_from(chain: Chain) -> None:
    key = keys.numbered(keys.head("main"), 4)
    chain.store.delete(key)
    chain.store.put(key, [b"rot"])
    assert versions.rollback(chain, "main", "step:30").to_step == 30
    assert head_step(chain) == 30


# -- the step log after a rollback -------------------------------------------------------------------------


def logged(chain: Chain, steps: range, loss: float) -> StepLog:
    mine = Lease.take(chain.store)
    log = StepLog(chain, "main", mine.number)
    for step in steps:
        log.append(StepRecord(step=step, epoch=0, metrics={"loss": loss.hex()}))
    log.seal(log.cut())
    writer = Writer(chain, mine, parent=chain.find("head").id)
    last = steps[-1]
    writer.write(STATES[40].changed(random.Random(loss), "count").captured(), Facts(step=last))
    mine.release()
    return log


def test_steps_before_a_rollback_are_not_compared_with(chain: Chain) -> None:
    logged(chain, range(41, 61), 1.0)
    versions.rollback(chain, "main", "step:40")
    log = StepLog(chain, "main", lease.newest(chain.store) + 1)
    assert log.after(40) == {}
    log = logged(chain, range(41, 51), 2.0)
    found = log.after(40)
    assert sorted(found) == list(range(41, 51))
    assert {one.metrics["loss"] for one in found.values()} == {(2.0).hex()}
    assert log.after(45).keys() == set(range(46, 51))


def test_steps_of_several_writers_are_compared_with_where_nobody_went_back(chain: Chain) -> None:
    logged(chain, range(41, 61), 1.0)
    log = logged(chain, range(45, 51), 2.0)
    found = log.after(40)
    assert sorted(found) == list(range(41, 61))
    assert {step for step, one in found.items() if one.metrics["loss"] == (2.0).hex()} == set(range(45, 51))


def test_a_branch_of_a_name_that_was_there_before_starts_anew(chain: Chain) -> None:
    versions.branch(chain, "try", "step:20")
    old = StepLog(chain, "try", lease.newest(chain.store, "try"))
    old.append(StepRecord(step=21, epoch=0))
    old.seal(old.cut())
    versions.drop_branch(chain, "try")
    # What a dead writer's journal holds is sealed later.
    old.append(StepRecord(step=22, epoch=0))
    old.seal(old.cut())
    versions.branch(chain, "try", "step:20")
    assert StepLog(chain, "try", lease.newest(chain.store, "try") + 1).after(20) == {}


# -- kills, lost answers, races ----------------------------------------------------------------------------


@pytest.fixture
def _the_dead_are_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_lives", lambda holder: False)


Change = Callable[[Chain], object]
CHANGES: dict[str, Change] = {
    "tag": lambda chain: versions.tag(chain, "new", "step:20"),
    "move a tag": lambda chain: versions.tag(chain, "old", "step:20", force=True),
    "untag": lambda chain: versions.untag(chain, "old"),
    "branch": lambda chain: versions.branch(chain, "fresh", "step:20"),
    "rollback": lambda chain: versions.rollback(chain, "main", "step:20"),
    "drop a branch": lambda chain: versions.drop_branch(chain, "side"),
}


def prepared() -> MemoryStore:
    store = MemoryStore()
    chain = chain_of(store)
    versions.tag(chain, "old", "step:30")
    versions.branch(chain, "side", "step:30")
    versions.rollback(chain, "side", "main@step:20")
    return store


def copied(store: MemoryStore) -> MemoryStore:
    made = MemoryStore()
    for entry in store.list():
        made.put(entry.key, [store.get(entry.key)])
    return made


def named(chain: Chain) -> dict[str, object]:
    """All that a person sees: tags, and the heads of branches."""
    heads = {name: chain.find(f"{name}@head").step for name in chain.branches()}
    return {**heads, **{f"tag {name}": chain.snapshot(id).step for name, id in chain.tags().items()}}


@pytest.mark.slow
@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("done", [False, True], ids=["before it", "after it"])
@pytest.mark.usefixtures("_the_dead_are_dead")
def test_killed_at_any_operation_there_is_the_old_or_the_new(what: str, done: bool) -> None:
    ready = prepared()
    old = named(Chain(ready))
    whole = copied(ready)
    CHANGES[what](Chain(whole))
    new = named(Chain(whole))
    assert old != new
    verbs = frozenset({"put", "delete", "get", "list"})
    for at in range(1000):
        inner = copied(ready)
        store = FaultyStore(inner, at, done=done, verbs=verbs)
        try:
            CHANGES[what](Chain(store))
        except Died:
            seen = named(Chain(inner))
            assert seen in (old, new), f"killed at operation {at}"
            assert verify(Chain(inner)).findings == []
            if seen == old:
                # Done again, as a person would.
                CHANGES[what](Chain(inner))
            assert named(Chain(inner)) == new
        else:
            break
    assert at > 3


@pytest.mark.parametrize("what", CHANGES)
def test_an_answer_that_is_lost_is_settled(what: str) -> None:
    """The put was carried out, and its caller was told that the store is away."""
    ready = prepared()
    whole = copied(ready)
    CHANGES[what](Chain(whole))
    new = named(Chain(whole))
    for at in range(100):
        inner = copied(ready)
        store = FaultyStore(inner, at, lambda: Unavailable("away"), done=True, verbs=frozenset({"put"}))
        try:
            CHANGES[what](Chain(store))
        except Unavailable:
            # Only of a lease: the record itself was read back.
            assert what in ("rollback", "drop a branch")
        else:
            assert named(Chain(inner)) == new
        if store.count <= at:
            break
    assert at >= 1 or what == "drop a branch"


def raced(count: int, action: Callable[[int], object]) -> list[object]:
    """What became of `count` threads that do it at once."""
    barrier = threading.Barrier(count)
    results: list[object] = [None] * count

    def work(number: int) -> None:
        barrier.wait()
        try:
            results[number] = action(number)
        except EverstepError as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("make", [versions.tag, versions.branch], ids=["tag", "branch"])
def test_of_many_at_once_exactly_one_wins(make: Any) -> None:
    for attempt in range(20):
        chain = chain_of(MemoryStore())
        steps = [STEPS[number % 4] for number in range(8)]
        results = raced(8, lambda number: make(chain, "new", f"step:{steps[number]}"))  # noqa: B023
        winners = {one.step for one in results if not isinstance(one, EverstepError)}  # type: ignore[attr-defined]
        assert len(winners) == 1, attempt
        assert chain.find("new").step in winners
        lost = [one for one in results if isinstance(one, EverstepError)]
        assert all(isinstance(one, Conflict | Mismatch) for one in lost)
        assert len(lost) >= 6 if make is versions.tag else len(lost) == 7
        prefix = keys.TAGS if make is versions.tag else keys.head("new")
        assert sum(1 for _ in chain.store.list(prefix)) == 1


def _make_in_a_process(path: str, what: str, step: int, go: Any, results: Any) -> None:
    chain = Chain(path)
    go.wait()
    try:
        getattr(versions, what)(chain, "new", f"step:{step}")
        results.put((os.getpid(), "won", step))
    except EverstepError as error:
        results.put((os.getpid(), type(error).__name__, step))


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("what", ["tag", "branch"])
def test_of_many_processes_at_once_exactly_one_wins(tmp_path: Path, what: str) -> None:
    chain_of(LocalStore(tmp_path / "c"))
    context = multiprocessing.get_context("fork")
    go, results = context.Event(), context.Queue()
    workers = [
        context.Process(target=_make_in_a_process, args=(str(tmp_path / "c"), what, step, go, results))
        for step in STEPS
    ]
    for worker in workers:
        worker.start()
    go.set()
    told = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    won = [step for _, how, step in told if how == "won"]
    assert len(won) == 1
    assert {how for _, how, _ in told} <= {"won", "Conflict", "Mismatch"}
    assert Chain(tmp_path / "c").find("new").step == won[0]


class Pruning(MemoryStore):
    """Somebody deletes a snapshot right after a record that names it was made."""

    victim = ""

    def put(self, key: str, parts: Any) -> bool:
        created = super().put(key, parts)
        if created and self.victim and key.startswith((keys.TAGS, keys.HEADS)):
            self.delete(keys.snapshot(self.victim))
        return created


@pytest.mark.parametrize("what", ["tag", "move a tag", "branch", "rollback"])
@pytest.mark.usefixtures("_the_dead_are_dead")
def test_a_snapshot_that_is_pruned_meanwhile_gets_no_name(what: str) -> None:
    store = Pruning()
    for entry in (ready := prepared()).list():
        store.put(entry.key, [ready.get(entry.key)])
    chain = Chain(store)
    before = named(chain)
    store.victim = chain.find("step:20").id
    with pytest.raises(Conflict, match="was pruned at the same moment"):
        CHANGES[what](chain)
    store.victim = ""
    heads = {name: next(chain.heads(name)).step for name in chain.branches()}
    assert {**heads, **{f"tag {n}": chain.snapshot(id).step for n, id in chain.tags().items()}} == before


class NoWait(SystemFiles):
    """For trees in which no power is cut any more."""

    def sync(self, path: str) -> None:
        return None

    def sync_directory(self, path: str) -> None:
        return None


@pytest.mark.slow
@pytest.mark.usefixtures("_the_dead_are_dead")
def test_a_power_cut_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """On a disk, at any instant: what was answered for is there, and what was begun is there or not."""
    (tmp_path / "disk").mkdir()
    recorder = RecordingFiles(tmp_path / "disk")
    chain = chain_of(LocalStore(tmp_path / "disk/chain", recorder))
    ready = len(recorder.operations)
    worlds = [named(chain)]
    first: list[Change] = [
        lambda chain: versions.tag(chain, "old", "step:10"),
        lambda chain: versions.branch(chain, "side", "step:30"),
    ]
    for change in (*first, *CHANGES.values()):
        recorder.mark("begun")
        change(chain)
        recorder.mark("done")
        worlds.append(named(chain))
    count = 0
    for count, state in enumerate(states_of(recorder.operations, seed=3), start=1):
        if state.after < ready:
            continue
        place = tmp_path / "after" / str(count)
        place.mkdir(parents=True)
        build(state, place)
        after = Chain(LocalStore(place / "chain", NoWait()))
        done, begun = state.marks.count("done"), state.marks.count("begun")
        assert named(after) in (worlds[done], worlds[begun]), state.how
        assert [one for one in verify(after).findings if not one.key.startswith(keys.LEASES)] == []
        shutil.rmtree(place)
    assert count > 100


# -- any history -------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from("tbru"), st.integers(0, 3), st.integers(0, 9)), max_size=14))
@settings(
    derandomize=True,
    deadline=None,
    max_examples=examples(60),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_history_is_as_a_model_says(actions: list[tuple[str, int, int]]) -> None:
    """Tags and heads of a model in memory; a rollback goes anywhere, and can be undone."""
    chain = chain_of(MemoryStore())
    tags: dict[str, int] = {}
    reflogs: dict[str, list[int]] = {"main": list(STEPS)}
    for what, which, where in actions:
        name, step = "main" if which == 3 else f"n{which}", STEPS[where % 4]
        if what == "t":
            versions.tag(chain, f"t{which}", f"step:{step}", force=True)
            tags[f"t{which}"] = step
        elif what == "b" and name not in reflogs:
            versions.branch(chain, name, f"step:{step}")
            reflogs[name] = [step]
        elif what == "r" and name in reflogs:
            versions.rollback(chain, name, f"main@step:{step}")
            if reflogs[name][-1] != step:
                reflogs[name].append(step)
        elif what == "u" and f"t{which}" in tags:
            versions.untag(chain, f"t{which}")
            del tags[f"t{which}"]
    assert {name: chain.snapshot(id).step for name, id in chain.tags().items()} == tags
    assert set(chain.branches()) == reflogs.keys()
    for name, steps in reflogs.items():
        assert [point.head.step for point in chain.points(name) if point.head] == steps[::-1]
        for back, step in enumerate(reversed(steps)):
            assert chain.find(f"{name}@{{{back}}}").step == step
        line = [point.head.step for point in chain.line(name) if point.head]
        assert line[0] == steps[-1]
        assert len(set(line)) == len(line)
    assert verify(chain).findings == []
