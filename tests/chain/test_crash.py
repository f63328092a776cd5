from __future__ import annotations

import itertools
import os
import random
import shutil
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from making import GRID_BYTES, Content, content, restored

from everstep.chain import lease, prune, reader
from everstep.chain.history import Chain
from everstep.chain.lease import Lease
from everstep.chain.retention import Keep
from everstep.chain.steplog import JOURNAL, StepLog
from everstep.chain.verify import verify
from everstep.chain.writer import Facts, Writer
from everstep.errors import NotFound
from everstep.format import keys
from everstep.format.record import StepRecord
from everstep.store.base import Buffer
from everstep.store.files import Files, SystemFiles
from everstep.store.local import LocalStore
from everstep.testing.crash import Operation, RecordingFiles, State, build, states

STEPS = 4
LAST = Keep.parse("last 2")


class NoWait(SystemFiles):
    """For trees in which no power is cut any more."""

    def sync(self, path: str) -> None:
        return None

    def sync_directory(self, path: str) -> None:
        return None


def contents() -> list[Content]:
    """Those of four snapshots that share most of their chunks, and of a fifth for afterwards."""
    rng = random.Random(5)
    first = content(1)
    changes = [("dense",), ("moment", "mean"), ("count",), ("dense", "frozen")]
    return list(itertools.accumulate(changes, lambda one, names: one.changed(rng, *names), initial=first))


CONTENTS = contents()


def record_run(recorder: RecordingFiles, store: LocalStore) -> None:
    """A run as a session does it: create, take the lease, four snapshots, each with its journal sealed and
    what is too old pruned; then let go."""
    chain = Chain.create(store, GRID_BYTES)
    recorder.mark("created")
    mine = Lease.take(store)
    log = StepLog(chain, "main", mine.number)
    writer = Writer(chain, mine)
    for step in range(1, STEPS + 1):
        for inner in (2 * step - 1, 2 * step):
            log.append(StepRecord(step=inner, epoch=0, metrics={"loss": (0.5 / inner).hex()}))
            recorder.note(store.root / JOURNAL)
        journal = log.cut()
        recorder.mark(f"takes {step}")
        snapshot = writer.write(CONTENTS[step - 1].captured(), Facts(step=step))
        recorder.mark(f"committed {step}")
        assert snapshot.step == step
        assert journal is not None
        log.seal(journal)
        recorder.note(store.root / JOURNAL)
        plan = prune.plan(chain, LAST, branches=["main"], mine=mine)
        if plan is not None:
            writer.forget_packs(set(plan.packs))
            prune.execute(chain, plan)
    mine.release()


def newest_mark(marks: Iterable[str], word: str) -> int:
    return max((int(mark.split()[1]) for mark in marks if mark.startswith(word)), default=0)


def check(state: State, directory: Path) -> None:
    """What was promised before the crash holds after it, and the run can go on."""
    build(state, directory)
    store = LocalStore(directory / "chain", NoWait())
    try:
        chain = Chain(store)
    except NotFound:
        assert "created" not in state.marks
        chain = Chain.create(store, GRID_BYTES)
    committed, begun = newest_mark(state.marks, "committed"), newest_mark(state.marks, "takes")

    points = list(chain.points())
    assert all(point.damage is None for point in points)
    steps = [point.snapshot.step for point in points if point.snapshot]
    head = chain.head()
    assert (head.step if head else 0) in {committed, begun}
    assert steps == sorted(set(steps), reverse=True)
    # The last two of what was committed are listed, whatever instant of a prune it was.
    assert {committed, committed - 1} - {0, -1} <= set(steps)

    assert_whole(chain, {step: CONTENTS[step - 1] for step in steps})

    # The run goes on: as a session that opens it does.
    store.sweep()
    mine = Lease.take(store)
    StepLog(chain, "main", mine.number).adopt()
    logged = StepLog(chain, "main", mine.number).after(0)
    assert all(one.metrics == {"loss": (0.5 / step).hex()} for step, one in logged.items())
    writer = Writer(chain, mine, parent=head.id if head else "")
    if head:
        writer.build_on(chain.manifest(head))
    writer.write(CONTENTS[STEPS].captured(), Facts(step=STEPS + 1))
    plan = prune.plan(chain, LAST, branches=["main"], mine=mine)
    if plan is not None:
        prune.execute(chain, plan)
    mine.release()
    kept = [snapshot.step for snapshot in chain.snapshots()]
    assert kept == [STEPS + 1, *steps[:1]]
    assert_whole(chain, {step: CONTENTS[step - 1] for step in kept}, clean=True)
    assert not list((directory / "chain" / "tmp").iterdir())


def assert_whole(chain: Chain, wanted: dict[int, Content], clean: bool = False) -> None:
    report = verify(chain)
    assert [one for one in report.findings if one.snapshots or not one.key.startswith(JOURNAL)] == []
    assert not clean or not report.findings
    assert report.whole == report.snapshots == len(wanted)
    for snapshot in chain.snapshots():
        got, remarks = restored(chain, snapshot)
        assert got == wanted[snapshot.step]
        assert not remarks


@pytest.fixture(autouse=True)
def _another_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that this process takes look like those of a process that is no more."""
    monkeypatch.setattr(lease, "_lives", lambda holder: False)
    # To start threads takes longer than what they would read.
    monkeypatch.setattr(reader, "THREADS", 1)


def recorded(base: Path, files: Files | None = None) -> tuple[RecordingFiles, LocalStore]:
    base.mkdir()
    recorder = RecordingFiles(base, files)
    return recorder, LocalStore(base / "chain", recorder)


def violations(operations: Sequence[Operation], at_most: int = 10**9) -> tuple[int, list[str]]:
    """The number of states, and what does not hold in which of them. Of those that differ in nothing but
    unfinished files, which nobody looks at, every tenth is looked at all the same."""
    found: list[str] = []
    seen: Counter[Hashable] = Counter()
    with scratch() as directory:
        for state in states(operations, seed=7):
            seen[of_interest(state)] += 1
            if seen[of_interest(state)] % 10 != 1:
                continue
            place = directory / "state"
            place.mkdir()
            try:
                check(state, place)
            except Exception as error:
                found.append(f"after {state.after} operations, {state.how}: {type(error).__name__} {error}")
                if len(found) >= at_most:
                    break
            shutil.rmtree(place)
    return seen.total(), found


def of_interest(state: State) -> Hashable:
    """All of it that `check` goes by."""
    files = tuple(one for one in state.files if not one[0].startswith("chain/tmp/"))
    promised = (
        "created" in state.marks,
        *(newest_mark(state.marks, word) for word in ("committed", "takes")),
    )
    return files, state.directories, promised


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory in memory, where there is such: what a crash does to a disk is in the states."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as directory:
        yield Path(directory)


@pytest.mark.slow
def test_no_crash_loses_a_committed_snapshot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder, store = recorded(tmp_path / "disk")
    record_run(recorder, store)
    count, found = violations(recorder.operations)
    with capsys.disabled():
        print(f" {len(recorder.operations)} operations, {count} states ", end="")
    assert not found, "\n".join(found[:10])
    assert count >= 1000
    kinds = {operation.kind for operation in recorder.operations}
    assert kinds == {"mkdir", "write", "append", "sync", "link", "unlink", "sync_directory", "mark"}


# -- the explorer catches a store that breaks the rules ------------------------------------------------


class Unsynced(RecordingFiles):
    def sync(self, path: str) -> None:
        return None


class UnsyncedNames(RecordingFiles):
    def sync_directory(self, path: str) -> None:
        return None


class NamesOfOneFolder(RecordingFiles):
    """Forgets to make durable the names in one place alone."""

    folder = ""

    def sync_directory(self, path: str) -> None:
        if f"/{self.folder}" not in path:
            super().sync_directory(path)


class HeadFirst(LocalStore):
    """Puts the packs of a snapshot after its head."""

    def __init__(self, root: Path, files: Files) -> None:
        super().__init__(root, files)
        self.held: list[tuple[str, list[bytes]]] = []

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        if key.startswith(keys.PACKS):
            self.held.append((key, [bytes(part) for part in parts]))
            return True
        created = super().put(key, parts)
        if key.startswith(keys.HEADS):
            held, self.held = self.held, []
            for one, data in held:
                super().put(one, data)
        return created


class PacksGoFirst(LocalStore):
    """Deletes what a snapshot consists of before the head record that lists it."""

    def __init__(self, root: Path, files: Files) -> None:
        super().__init__(root, files)
        self.held: list[str] = []

    def delete(self, key: str) -> None:
        if key.startswith(keys.HEADS):
            self.held.append(key)
            return
        super().delete(key)
        if key.startswith((keys.PACKS, keys.STEPLOG)):
            held, self.held = self.held, []
            for one in held:
                super().delete(one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "store"),
    [
        (Unsynced, LocalStore),
        (UnsyncedNames, LocalStore),
        (type("OfPacks", (NamesOfOneFolder,), {"folder": "packs/"}), LocalStore),
        (type("OfManifests", (NamesOfOneFolder,), {"folder": "manifests"}), LocalStore),
        (type("OfSnapshots", (NamesOfOneFolder,), {"folder": "snapshots"}), LocalStore),
        (type("OfHeads", (NamesOfOneFolder,), {"folder": "heads/"}), LocalStore),
        (RecordingFiles, HeadFirst),
        (RecordingFiles, PacksGoFirst),
    ],
)
def test_a_store_that_breaks_a_rule_is_caught(
    tmp_path: Path, files: type[RecordingFiles], store: type[LocalStore]
) -> None:
    base = tmp_path / "disk"
    base.mkdir()
    recorder = files(base)
    record_run(recorder, store(base / "chain", recorder))
    _, found = violations(recorder.operations, at_most=1)
    assert found


# -- the model itself ----------------------------------------------------------------------------------


def trees(operations: Sequence[Operation]) -> set[tuple[tuple[str, bytes], ...]]:
    return {files for _, files in final(operations)}


def final(operations: Sequence[Operation]) -> set[tuple[tuple[str, ...], tuple[tuple[str, bytes], ...]]]:
    """The directories and files of all states after the last operation."""
    # The mark makes these differ from equal states of earlier instants, which are given once.
    marked = [*operations, Operation("mark", "end")]
    return {(state.directories, state.files) for state in states(marked, samples=60) if state.marks}


def test_what_was_synced_stays() -> None:
    done = [
        Operation("write", "a", data=b"x" * 2000),
        Operation("sync", "a"),
        Operation("sync_directory", "."),
    ]
    assert trees(done) == {(("a", b"x" * 2000),)}


def test_bytes_that_were_not_synced_may_be_lost_or_torn_in_any_way() -> None:
    done = [Operation("write", "a", data=b"x" * 2000), Operation("sync_directory", ".")]
    found = {dict(files)["a"] for files in trees(done)}
    assert {b"x" * 2000, b"", bytes(2000)} <= found
    shorter = [data for data in found if data == b"x" * len(data) and 0 < len(data) < 2000]
    torn = [data for data in found if len(data) == 2000 and b"x" in data and data != b"x" * 2000]
    assert shorter
    assert any(bytes(512) in data for data in torn)
    assert any(bytes(512) not in data for data in torn)


def test_names_come_in_any_order() -> None:
    done: list[Operation] = []
    for name in ("a", "b"):
        done += [Operation("write", name, data=b"1"), Operation("sync", name)]
    assert trees(done) == {(), (("a", b"1"),), (("b", b"1"),), (("a", b"1"), ("b", b"1"))}
    done += [Operation("sync_directory", "."), Operation("unlink", "a"), Operation("link", "b", to="c")]
    one, two, three = ("a", b"1"), ("b", b"1"), ("c", b"1")
    assert trees(done) == {(two,), (one, two), (two, three), (one, two, three)}


def test_a_directory_that_did_not_come_takes_all_below_with_it() -> None:
    done = [
        Operation("mkdir", "d"),
        Operation("write", "d/a", data=b"1"),
        Operation("sync", "d/a"),
        Operation("sync_directory", "d"),
    ]
    assert final(done) == {((), ()), (("d",), (("d/a", b"1"),))}


def test_appended_bytes_are_torn_behind_what_was_synced() -> None:
    done = [
        Operation("write", "a", data=b"12345678"),
        Operation("sync", "a"),
        Operation("sync_directory", "."),
        Operation("append", "a", data=b"90"),
    ]
    found = {dict(files)["a"] for files in trees(done)}
    assert {b"12345678", b"1234567890", b"123456789"} <= found
    assert all(data.startswith(b"12345678") for data in found)


def test_a_kill_in_the_middle_of_a_write_leaves_a_part_of_it() -> None:
    done = [Operation("write", "a", data=b"1234567890")]
    kills = [dict(s.files)["a"] for s in states(done) if s.how.startswith("killed") and s.files]
    assert len(kills) == 2
    assert kills[1] == b"1234567890"
    assert b"1234567890".startswith(kills[0])
    assert len(kills[0]) < 10


def test_marks_and_seeds() -> None:
    done = [Operation("write", "a", data=bytes(5000)), Operation("mark", "told"), Operation("sync", "a")]
    assert {state.marks for state in states(done) if state.after >= 2} == {("told",)}
    assert {state.marks for state in states(done) if state.after < 2} == {()}
    assert list(states(done, seed=3)) == list(states(done, seed=3))
    assert list(states(done, seed=3)) != list(states(done, seed=4))


def test_recording_does_the_real_thing_and_notes_what_others_did(tmp_path: Path) -> None:
    recorder, store = recorded(tmp_path / "disk")
    assert store.put("a/b", [b"12", b"34"])
    assert bytes(store.get("a/b")) == b"1234"
    folder = tmp_path / "disk" / "chain" / "journal"
    folder.mkdir()
    (folder / "one").write_bytes(b"12")
    recorder.note(folder)
    (folder / "one").write_bytes(b"1234")
    recorder.note(folder)
    (folder / "one").unlink()
    recorder.note(folder)
    assert recorder.operations[-4:] == [
        Operation("mkdir", "chain/journal"),
        Operation("write", "chain/journal/one", data=b"12"),
        Operation("append", "chain/journal/one", data=b"34"),
        Operation("unlink", "chain/journal/one"),
    ]
    last = list(states(recorder.operations))[-1]
    assert dict(last.files)["chain/a/b"] == b"1234"
    build(last, tmp_path / "disk" / "chain" / "journal")
    assert (folder / "chain" / "a" / "b").read_bytes() == b"1234"
