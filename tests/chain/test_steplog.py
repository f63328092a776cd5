from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from making import GRID_BYTES

from everstep.chain import steplog
from everstep.chain.history import Chain
from everstep.chain.steplog import JOURNAL, StepLog, read_journal
from everstep.chain.verify import verify
from everstep.errors import Damaged, Unavailable
from everstep.format import keys
from everstep.format.record import StepRecord
from everstep.store.memory import MemoryStore
from everstep.testing.faults import FaultyStore


def step(number: int, **more: object) -> StepRecord:
    return StepRecord(step=number, epoch=0, metrics={"loss": (1.0 / number).hex()}, **more)  # type: ignore[arg-type]


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain.create(str(tmp_path / "c"), GRID_BYTES)


def folder(chain: Chain) -> Path:
    return chain.store.root / JOURNAL  # type: ignore[attr-defined,no-any-return]


def journals(chain: Chain) -> list[Path]:
    return sorted(folder(chain).iterdir()) if folder(chain).is_dir() else []


def segments(chain: Chain) -> list[str]:
    return [entry.key for entry in chain.store.list(keys.STEPLOG)]


def seal(log: StepLog) -> None:
    journal = log.cut()
    assert journal is not None
    log.seal(journal)


def killed_after(chain: Chain, writer: int, *numbers: int, branch: str = "main") -> Path:
    """The journal of a writer that appended and died."""
    log = StepLog(chain, branch, writer)
    for number in numbers:
        log.append(step(number))
    return folder(chain) / f"{branch}-{writer:016x}-{numbers[0]:016x}"


def test_snapshots_that_follow_fast_take_the_journal_along_once_a_second(chain: Chain) -> None:
    now = 100.0
    log = StepLog(chain, "main", 1, clock=lambda: now)
    cuts = []
    for number, now in enumerate([100.0, 100.5, 100.9, 101.0, 101.2, 102.5], 1):  # noqa: B007
        log.append(step(number))
        cuts.append(log.cut_in_time())
    assert [len(cut) for cut in cuts] == [1, 0, 0, 1, 0, 1]
    assert len(journals(chain)) == 3
    for cut in cuts:
        log.seal(cut)
    assert [one.step for one in log.after(0).values()] == [1, 2, 3, 4, 5, 6]
    assert len(segments(chain)) == 3
    assert journals(chain) == []


def test_records_are_in_the_journal_at_once_and_in_a_segment_when_sealed(chain: Chain) -> None:
    log = StepLog(chain, "main", 1)
    assert log.cut() == []
    for number in (1, 2, 3):
        log.append(step(number))
        (path,) = journals(chain)
        assert read_journal(path.read_bytes()) == [step(n) for n in range(1, number + 1)]
    seal(log)
    assert journals(chain) == []
    assert segments(chain) == [keys.segment("main", 1, 1)]
    assert log.after(0) == {n: step(n) for n in (1, 2, 3)}
    log.append(step(4))
    seal(log)
    assert set(log.after(0)) == {1, 2, 3, 4}
    assert set(log.after(3)) == {4}
    assert log.after(4) == {}
    assert verify(chain).findings == []


def test_a_store_that_is_no_directory_keeps_records_in_memory() -> None:
    log = StepLog(Chain.create(MemoryStore()), "main", 1)
    log.append(step(1))
    log.adopt()
    seal(log)
    assert log.after(0) == {1: step(1)}


def test_what_a_dead_writer_left_is_adopted(chain: Chain) -> None:
    killed_after(chain, 1, 1, 2, 3)
    killed_after(chain, 2, 3, 4)
    other = killed_after(chain, 2, 7, branch="other-branch")
    mine = StepLog(chain, "main", 3)
    mine.append(step(5))
    mine.adopt()
    # Its own journal and another branch's are left alone.
    assert journals(chain) == sorted([folder(chain) / f"main-{3:016x}-{5:016x}", other])
    assert segments(chain) == [keys.segment("main", 1, 1), keys.segment("main", 2, 3)]
    assert set(mine.after(0)) == {1, 2, 3, 4}
    StepLog(chain, "other-branch", 9).adopt()
    assert set(StepLog(chain, "other-branch", 9).after(0)) == {7}
    assert verify(chain).findings == []


def test_a_torn_last_line_loses_that_line_alone(chain: Chain) -> None:
    path = killed_after(chain, 1, 1, 2, 3)
    whole = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole) + 1):
        found = read_journal(whole[:length])
        assert found == [step(n) for n in range(1, 1 + sum(end <= length for end in ends))]
    path.write_bytes(whole[: ends[1] + 7])
    assert verify(chain).findings == []
    StepLog(chain, "main", 2).adopt()
    assert set(StepLog(chain, "main", 2).after(0)) == {1, 2}


def test_any_flipped_bit_of_a_journal_is_found(chain: Chain) -> None:
    path = killed_after(chain, 1, 1, 2)
    data = bytearray(path.read_bytes())
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Damaged):
            read_journal(data)
        data[bit // 8] ^= 1 << bit % 8
    assert len(read_journal(data)) == 2


def test_a_damaged_line_of_a_dead_writers_journal_ends_what_is_adopted(chain: Chain) -> None:
    path = killed_after(chain, 1, 1, 2, 3, 4)
    lines = path.read_bytes().split(b"\n")
    lines[2] = lines[2][:-1] + b"?"
    path.write_bytes(b"\n".join(lines))
    assert [finding.key for finding in verify(chain).findings] == [f"{JOURNAL}/{path.name}"]
    StepLog(chain, "main", 2).adopt()
    assert set(StepLog(chain, "main", 2).after(0)) == {1, 2}
    assert journals(chain) == []


def test_a_journal_that_is_damaged_at_its_beginning_is_adopted_in_no_time(chain: Chain) -> None:
    path = killed_after(chain, 1, 1)
    path.write_bytes(b"x" + path.read_bytes() * 20_000)
    begun = time.process_time()
    StepLog(chain, "main", 2).adopt()
    assert time.process_time() - begun < 5
    assert journals(chain) == []
    assert segments(chain) == []


def test_strange_files_beside_the_journals_are_left_alone(chain: Chain) -> None:
    folder(chain).mkdir()
    names = [".nfs0001", "main-zzzzzzzzzzzzzzzz-1", "notes.txt", f"main-{1:016x}-notes", "main"]
    for name in names:
        (folder(chain) / name).write_bytes(b"x")
    StepLog(chain, "main", 2).adopt()
    assert sorted(path.name for path in journals(chain)) == sorted(names)


def test_a_writer_killed_between_sealing_and_removing_is_adopted_once(chain: Chain) -> None:
    path = killed_after(chain, 1, 1, 2)
    data = path.read_bytes()
    StepLog(chain, "main", 2).adopt()
    path.write_bytes(data)
    StepLog(chain, "main", 3).adopt()
    assert segments(chain) == [keys.segment("main", 1, 1)]
    assert journals(chain) == []
    assert set(StepLog(chain, "main", 3).after(0)) == {1, 2}


def test_the_journal_stays_until_the_segment_is_durable(tmp_path: Path) -> None:
    chain = Chain.create(str(tmp_path / "c"))
    log = StepLog(chain, "main", 1)
    log.append(step(1))
    journal = log.cut()
    assert journal is not None
    real = chain.store
    chain.store = FaultyStore(real, 0, lambda: Unavailable("away"))
    with pytest.raises(Unavailable):
        log.seal(journal)
    chain.store = real
    assert len(journals(chain)) == 1
    log.seal(journal)
    assert (journals(chain), len(segments(chain))) == ([], 1)


def test_the_latest_writer_of_a_step_counts(chain: Chain) -> None:
    for writer, numbers in ((1, (1, 2, 3)), (2, (3, 4)), (10, (4, 5))):
        log = StepLog(chain, "main", writer)
        for number in numbers:
            log.append(step(number, rng=f"{writer:02x}"))
        seal(log)
    found = StepLog(chain, "main", 11).after(1)
    assert {number: one.rng for number, one in found.items()} == {2: "01", 3: "02", 4: "0a", 5: "0a"}


def test_only_segments_that_can_matter_are_read(chain: Chain) -> None:
    log = StepLog(chain, "main", 1)
    for first in range(1, 20, 2):
        log.append(step(first))
        log.append(step(first + 1))
        seal(log)
    read: list[str] = []
    real = chain.store.get
    chain.store.get = lambda key, *rest: (read.append(key), real(key, *rest))[1]  # type: ignore[method-assign]
    assert set(log.after(16)) == {17, 18, 19, 20}
    assert read == [keys.segment("main", 1, first) for first in (17, 19)]
    read.clear()
    assert set(log.after(15)) == {16, 17, 18, 19, 20}
    assert len(read) == 3


@pytest.mark.parametrize("how", ["flip", "cut", "delete"])
def test_a_damaged_segment_is_left_out(chain: Chain, how: str) -> None:
    log = StepLog(chain, "main", 1)
    for number in (1, 2, 3):
        log.append(step(number))
        seal(log)
    key = segments(chain)[1]
    data = bytearray(chain.store.get(key))
    data[-3] ^= 1
    chain.store.delete(key)
    if how != "delete":
        chain.store.put(key, [bytes(data if how == "flip" else data[:50])])
        assert [finding.key for finding in verify(chain).findings] == [key]
    assert set(log.after(0)) == {1, 3}


def test_stray_objects_among_the_segments_do_not_matter(chain: Chain) -> None:
    log = StepLog(chain, "main", 1)
    log.append(step(1))
    seal(log)
    for key in ("steplog/main/x", "steplog/main/0000/1", f"steplog/main/{2:016x}/copy"):
        chain.store.put(key, [b"x"])
    assert set(log.after(0)) == {1}


def test_a_full_disk_costs_the_journal_and_not_the_training(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = StepLog(chain, "main", 1)
    log.append(step(1))
    real = os.write

    def short(descriptor: int, data: bytes) -> int:
        return real(descriptor, data[:10])

    with monkeypatch.context() as patched:
        patched.setattr(steplog.os, "write", short)
        log.append(step(2))
    log.append(step(3))
    (path,) = journals(chain)
    assert read_journal(path.read_bytes()) == [step(1)]
    seal(log)
    assert set(log.after(0)) == {1, 2, 3}
    assert journals(chain) == []

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    for call in ("write", "open"):
        with monkeypatch.context() as patched:
            patched.setattr(steplog.os, call, full)
            log.append(step(4))
        seal(log)
        assert 4 in log.after(3)


def test_a_long_journal_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everstep.chain.steplog.SEGMENT_STEPS", 3)
    chain = Chain.create(str(tmp_path / "c"))
    log = StepLog(chain, "main", 1)
    for number in range(1, 8):
        log.append(step(number))
    assert len(journals(chain)) == 3
    seal(log)
    assert segments(chain) == [keys.segment("main", 1, first) for first in (1, 4, 7)]
    assert journals(chain) == []
    assert list(StepLog(chain, "main", 2).after(4)) == [5, 6, 7]
