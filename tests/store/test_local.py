"""The store in a directory keeps the contract, on a disk that has its moods."""

from __future__ import annotations

import errno
import mmap
import multiprocessing
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from everstep.errors import Conflict, Damaged, EverstepError, NotFound, Unavailable, Unsupported
from everstep.store import files
from everstep.store.base import Buffer, Store
from everstep.store.files import SystemFiles
from everstep.store.local import TEMPORARY, LocalStore
from everstep.store.urls import open_store
from everstep.testing.store import StoreContract, odd_parts, pattern

SHARED_MEMORY = Path("/dev/shm")
LARGE_BYTES = 3 * 1024 * 1024 + 123
NOBODY = 65534


class TestLocalStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "chain")


@pytest.mark.slow
class TestLocalStoreWithoutDirectWrites(StoreContract):
    """On a file system that refuses O_DIRECT, as many do."""

    @pytest.fixture
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
        refuse_direct(monkeypatch, after_bytes=0)
        return LocalStore(tmp_path / "chain")


@pytest.mark.skipif(not os.access(SHARED_MEMORY, os.W_OK), reason="there is no /dev/shm to write to")
@pytest.mark.slow
class TestLocalStoreInSharedMemory(StoreContract):
    @pytest.fixture
    def store(self) -> Iterator[Store]:
        with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as directory:
            yield LocalStore(Path(directory) / "chain")


def refuse_direct(
    monkeypatch: pytest.MonkeyPatch, *, after_bytes: int, number: int = errno.EINVAL
) -> list[int]:
    """Direct writes fail at open (after 0 bytes) or at a write. Returns a list that grows with each."""
    refused: list[int] = []
    really_open = os.open
    direct: dict[int, int] = {}

    def open_(path: Any, flags: int, mode: int = 0o777) -> int:
        if not flags & os.O_DIRECT:
            return really_open(path, flags, mode)
        if after_bytes == 0:
            refused.append(0)
            raise OSError(number, os.strerror(number), path)
        descriptor = really_open(path, flags & ~os.O_DIRECT, mode)
        direct[descriptor] = 0
        return descriptor

    def writev(descriptor: int, buffers: Any) -> int:
        """Fewer bytes than asked for each time, as a system may."""
        if descriptor in direct and direct[descriptor] >= after_bytes:
            refused.append(direct.pop(descriptor))
            raise OSError(number, os.strerror(number))
        written = os.write(descriptor, buffers[0][:700_001])
        if descriptor in direct:
            direct[descriptor] += written
        return written

    monkeypatch.setattr(files.os, "open", open_)
    monkeypatch.setattr(files.os, "writev", writev)
    return refused


def unfinished(store: LocalStore) -> list[str]:
    directory = store.root / TEMPORARY
    return sorted(os.listdir(directory)) if directory.is_dir() else []


def all_files(store: LocalStore) -> list[str]:
    return sorted(str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file())


# -- past the page cache ----------------------------------------------------------------------------------


def aligned_buffer(data: bytes) -> memoryview:
    buffer = memoryview(mmap.mmap(-1, len(data)))
    buffer[:] = data
    return buffer


def direct_parts(shape: str) -> list[Buffer]:
    data = pattern(LARGE_BYTES)
    block = len(data) // 4096 * 4096
    whole = aligned_buffer(data[:block])
    return {
        "aligned": [whole],
        "aligned, then a rest": [whole, data[block:]],
        "aligned after odd": [data[:5], whole, data[5:900]],
        "aligned in pieces": [whole[: 1 << 20], whole[1 << 20 :]],
        "one byte into a block": [whole[1:]],
        "odd": odd_parts(data),
        "small before large": [data[:4096], whole, data[:4096]],
        "larger than the bounce buffer": [pattern(9 * 1024 * 1024 + 1)],
    }[shape]


SHAPES = [
    "aligned", "aligned, then a rest", "aligned after odd", "aligned in pieces", "one byte into a block",
    "odd", "small before large", "larger than the bounce buffer",
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_direct_writes_give_the_same_bytes(tmp_path: Path, shape: str) -> None:
    parts = direct_parts(shape)
    path = tmp_path / "file"
    try:
        files._write_direct(str(path), parts)
    except OSError as error:
        pytest.skip(f"no O_DIRECT under {tmp_path}: {error}")
    assert path.read_bytes() == b"".join(map(bytes, parts))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("after_bytes", [0, 1, 2_000_000])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_falls_back_where_direct_writes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str, after_bytes: int, number: int
) -> None:
    """At open, at the first write, or in the middle: the object is whole all the same."""
    refused = refuse_direct(monkeypatch, after_bytes=after_bytes, number=number)
    store = LocalStore(tmp_path / "chain")
    parts = direct_parts(shape)
    assert store.put("key", parts) is True
    assert bytes(store.get("key")) == b"".join(map(bytes, parts))
    assert len(refused) == 1 or after_bytes
    assert unfinished(store) == []


def test_another_error_of_a_direct_write_is_not_swallowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = refuse_direct(monkeypatch, after_bytes=4096, number=errno.EIO)
    store = LocalStore(tmp_path / "chain")
    with pytest.raises(Unavailable):
        store.put("key", [pattern(LARGE_BYTES)])
    assert refused
    assert all_files(store) == []


# -- a disk that is full or fails -------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    where = tmp_path / "tiny"
    where.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m,nr_inodes=64", "tmpfs", str(where)],
        capture_output=True,
        text=True,
    )
    if made.returncode != 0:
        pytest.skip(f"mounting is not allowed here: {made.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def fill(store: LocalStore, parts: Sequence[Buffer]) -> Unavailable:
    """Put objects until there is no room; returns the error that says so."""
    for number in range(1000):
        try:
            store.put(f"filler/{number}", parts)
        except Unavailable as error:
            return error
    raise AssertionError("the disk never fills")


@pytest.mark.parametrize("size_bytes", [900_000, LARGE_BYTES], ids=["through the page cache", "past it"])
def test_a_full_disk(tiny_disk: Path, size_bytes: int) -> None:
    store = LocalStore(tiny_disk / "chain")
    assert store.put("first", [pattern(800_000)]) is True
    error = fill(store, [pattern(size_bytes)])
    assert "no room" in error.problem
    assert str(store.root) in error.next
    assert "intact" in error.kept
    assert unfinished(store) == []
    assert bytes(store.get("first")) == pattern(800_000)
    for entry in list(store.list("filler/")):
        assert entry.size_bytes == size_bytes
        store.delete(entry.key)
    store.delete("first")
    assert store.put("again", [pattern(900_000)]) is True


def test_a_disk_without_room_for_one_more_name(tiny_disk: Path) -> None:
    store = LocalStore(tiny_disk / "chain")
    error = fill(store, [b"x"])
    assert "no room" in error.problem
    assert error.key == f"filler/{len(list(store.list()))}"
    assert unfinished(store) == []


class FailingFiles(SystemFiles):
    """Counts operations, and lets one of them fail, before or after it has done its work."""

    def __init__(self, fail_at: int = -1, after: bool = False, number: int = errno.EIO) -> None:
        self.fail_at, self.after, self.number = fail_at, after, number
        self.done: list[str] = []

    def _do(self, what: str, work: Callable[[], None]) -> None:
        self.done.append(what)
        failing = len(self.done) - 1 == self.fail_at
        if failing and not self.after:
            raise OSError(self.number, os.strerror(self.number))
        work()
        if failing:
            raise OSError(self.number, os.strerror(self.number))

    def make_directory(self, path: str) -> None:
        self._do("make_directory", lambda: SystemFiles.make_directory(self, path))

    def write(self, path: str, parts: Sequence[Buffer]) -> None:
        self._do("write", lambda: SystemFiles.write(self, path, parts))

    def sync(self, path: str) -> None:
        self._do("sync", lambda: SystemFiles.sync(self, path))

    def link(self, path: str, to: str) -> None:
        self._do("link", lambda: SystemFiles.link(self, path, to))

    def unlink(self, path: str) -> None:
        self._do("unlink", lambda: SystemFiles.unlink(self, path))

    def sync_directory(self, path: str) -> None:
        self._do("sync_directory", lambda: SystemFiles.sync_directory(self, path))


def test_the_order_that_makes_a_put_durable(tmp_path: Path) -> None:
    """The bytes before the name, the name before the answer; the directories on the way down first."""
    recorded = FailingFiles()
    store = LocalStore(tmp_path / "chain", recorded)
    store.put("heads/main/1", [b"x"])
    commit = ["write", "sync", "link", "sync_directory", "unlink"]
    assert recorded.done[-5:] == commit
    assert recorded.done[:-5] == ["make_directory", "sync_directory"] * 4
    recorded.done.clear()
    store.put("heads/main/2", [b"x"])
    assert recorded.done == commit
    recorded.done.clear()
    assert store.put("heads/main/2", [b"x"]) is False
    assert recorded.done == ["sync_directory"], "a name that is there must be durable before it is built upon"


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("fail_at", range(13))
def test_a_put_that_fails_anywhere_can_be_done_again(
    tmp_path: Path, fail_at: int, after: bool, number: int
) -> None:
    """Each of its operations fails once: nothing half-done shows, and a second put makes it whole."""
    failing = FailingFiles(fail_at, after, number)
    store = LocalStore(tmp_path / "chain", failing)
    with pytest.raises(Unavailable) as caught:
        store.put("heads/main/1", [b"whole"])
    assert len(failing.done) > fail_at
    assert "intact" in caught.value.kept
    assert caught.value.key == "heads/main/1"
    there = [entry.key for entry in store.list()]
    assert there in ([], ["heads/main/1"])
    for again in (store, LocalStore(tmp_path / "chain")):
        again.put("heads/main/1", [b"whole"])
        assert bytes(again.get("heads/main/1")) == b"whole"
    store.sweep()
    assert all_files(store) == ["heads/main/1"]


def test_a_directory_that_a_killed_process_made_is_made_durable(tmp_path: Path) -> None:
    """It is there, but nobody knows whether a power cut would leave it."""
    (tmp_path / "chain" / "heads" / "main").mkdir(parents=True)
    (tmp_path / "chain" / TEMPORARY).mkdir()
    recorded = FailingFiles()
    LocalStore(tmp_path / "chain", recorded).put("heads/main/1", [b"x"])
    assert recorded.done[:-5] == ["sync_directory"] * 4


def test_a_file_system_without_links(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "chain", FailingFiles(fail_at=8, number=errno.EPERM))
    with pytest.raises(Unsupported, match="cannot link"):
        store.put("a/key", [b"x"])
    assert all_files(store) == []


def test_a_bad_sector_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path / "chain")
    store.put("key", [b"x"])

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    for read in (lambda: store.get("key"), lambda: store.read_into("key", 0, [memoryview(bytearray(1))])):
        with pytest.raises(Damaged) as caught:
            read()
        assert caught.value.key == "key"


# -- what somebody else has left there --------------------------------------------------------------------


def test_a_file_where_a_directory_belongs(tmp_path: Path) -> None:
    root = tmp_path / "chain"
    root.mkdir()
    (root / "heads").write_bytes(b"a file")
    store = LocalStore(root)
    with pytest.raises(Conflict, match="heads/main/1"):
        store.put("heads/main/1", [b"x"])
    with pytest.raises(NotFound):
        store.get("heads/main/1")
    assert list(store.list("heads/")) == []
    store.delete("heads/main/1")
    assert (root / "heads").read_bytes() == b"a file"


@pytest.mark.parametrize("below", ["", "/deeper/chain"])
def test_a_file_where_the_root_belongs(tmp_path: Path, below: str) -> None:
    (tmp_path / "chain").write_bytes(b"a file")
    store = LocalStore(f"{tmp_path}/chain{below}")
    with pytest.raises(Conflict):
        store.put("key", [b"x"])
    with pytest.raises(NotFound):
        store.get("key")
    assert list(store.list()) == []
    assert store.sweep() == 0
    assert (tmp_path / "chain").read_bytes() == b"a file"


def test_a_file_where_unfinished_files_belong(tmp_path: Path) -> None:
    root = tmp_path / "chain"
    root.mkdir()
    (root / TEMPORARY).write_bytes(b"a file")
    store = LocalStore(root)
    with pytest.raises(Conflict):
        store.put("key", [b"x"])
    assert store.sweep() == 0
    assert [entry.key for entry in store.list()] == [TEMPORARY]


def test_foreign_names_are_not_listed(tmp_path: Path) -> None:
    """What is no key could not be read by one: hidden files of the system, names of other programs."""
    store = LocalStore(tmp_path / "chain")
    store.put("heads/main/1", [b"x"])
    directory = store.root / "heads" / "main"
    for name in (".nfs0000", ".DS_Store", "a b", "ä", "-x"):
        (directory / name).write_bytes(b"foreign")
    (store.root / ".hidden").mkdir()
    (store.root / ".hidden" / "file").write_bytes(b"foreign")
    (directory / "dangling").symlink_to("nowhere")
    assert [entry.key for entry in store.list()] == ["heads/main/1"]
    assert [entry.key for entry in store.list("heads/main/", limit=1)] == ["heads/main/1"]


def test_unfinished_files_are_no_objects(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "chain")
    store.put("key", [b"x"])
    (store.root / TEMPORARY / "1-ab").write_bytes(b"half")
    for prefix in ("", TEMPORARY, f"{TEMPORARY}/", f"{TEMPORARY}/1"):
        assert [entry.key for entry in store.list(prefix)] == ([] if prefix else ["key"])
    uses: list[Callable[[str], object]] = [
        lambda key: store.put(key, [b"x"]), store.get, store.delete, lambda key: store.read_into(key, 0, [])
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(ValueError, match="unfinished"):
            use(f"{TEMPORARY}/1-ab")
    assert unfinished(store) == ["1-ab"]


# -- no permission ----------------------------------------------------------------------------------------


def as_somebody(work: Callable[[], None]) -> None:
    """Run `work` in a process that may not do everything."""
    if os.geteuid() != 0:
        work()
        return
    process = multiprocessing.get_context("fork").Process(target=_as_nobody, args=(work,))
    process.start()
    process.join(60)
    assert process.exitcode == 0


def _as_nobody(work: Callable[[], None]) -> None:
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    work()


@pytest.fixture
def forbidden() -> Iterator[LocalStore]:
    """A store with one object where everybody may pass; its rights are the test's to take."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        store = LocalStore(Path(directory) / "chain")
        store.put("heads/main/1", [b"x"])
        (store.root / TEMPORARY / "1-ab").write_bytes(b"half")
        yield store
        for path in [store.root, *store.root.rglob("*")]:
            path.chmod(0o755)


@pytest.mark.process
def test_no_permission_to_write(forbidden: LocalStore) -> None:
    for path in [forbidden.root, *forbidden.root.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)

    def work() -> None:
        store = LocalStore(forbidden.root)
        for use in (
            lambda: store.put("heads/main/2", [b"x"]),
            lambda: store.put("tags/new/1", [b"x"]),
            lambda: store.delete("heads/main/1"),
            store.sweep,
        ):
            with pytest.raises(Unavailable, match="Permission denied"):
                use()
        assert bytes(store.get("heads/main/1")) == b"x"
        assert [entry.key for entry in store.list()] == ["heads/main/1"]

    as_somebody(work)
    assert all_files(forbidden) == ["heads/main/1", f"{TEMPORARY}/1-ab"]


@pytest.mark.process
def test_no_permission_to_read(forbidden: LocalStore) -> None:
    (forbidden.root / "heads" / "main" / "1").chmod(0)
    (forbidden.root / TEMPORARY).chmod(0)

    def work() -> None:
        store = LocalStore(forbidden.root)
        with pytest.raises(Unavailable, match="Permission denied"):
            store.get("heads/main/1")
        assert [entry.key for entry in store.list("heads/")] == ["heads/main/1"]

    as_somebody(work)
    (forbidden.root / "heads" / "main").chmod(0)

    def find_nothing() -> None:
        with pytest.raises(Unavailable, match="Permission denied"):
            list(LocalStore(forbidden.root).list("heads/"))

    as_somebody(find_nothing)


@pytest.mark.process
def test_a_root_below_a_directory_that_only_lets_through(forbidden: LocalStore) -> None:
    """The parent can be entered but not read, so it cannot be made durable either: that is no error."""
    forbidden.root.chmod(0o777)
    for path in forbidden.root.rglob("*"):
        path.chmod(0o777)
    forbidden.root.parent.chmod(0o711)
    if os.geteuid() != 0:
        pytest.skip("needs another user's directory")

    def work() -> None:
        assert LocalStore(forbidden.root).put("heads/main/2", [b"x"]) is True

    as_somebody(work)
    assert bytes(forbidden.get("heads/main/2")) == b"x"


# -- sweep ------------------------------------------------------------------------------------------------


def test_sweep_takes_what_killed_writers_left(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "chain")
    assert store.sweep() == 0
    store.put("key", [b"x"])
    directory = store.root / TEMPORARY
    for number in range(3):
        (directory / f"{number}-dead").write_bytes(b"half" * number)
    (directory / "a directory").mkdir()
    (directory / "dangling").symlink_to("nowhere")
    assert store.sweep() == 12 + len("nowhere")
    assert unfinished(store) == ["a directory"]
    assert bytes(store.get("key")) == b"x"
    assert store.sweep() == 0


class SweptFiles(FailingFiles):
    """Somebody sweeps just before the operation `fail_at`."""

    def __init__(self, store_root: Path, fail_at: int) -> None:
        super().__init__()
        self.root, self.sweep_at = store_root, fail_at

    def _do(self, what: str, work: Callable[[], None]) -> None:
        if len(self.done) == self.sweep_at:
            assert LocalStore(self.root).sweep() > 0
        super()._do(what, work)


@pytest.mark.parametrize(("sweep_at", "put"), [(9, False), (10, False), (11, True), (12, True)])
def test_a_put_whose_file_is_swept_away(tmp_path: Path, sweep_at: int, put: bool) -> None:
    """Before it has its name, nothing was put; afterwards the sweep takes only the other name of it."""
    swept = SweptFiles(tmp_path / "chain", sweep_at)
    store = LocalStore(tmp_path / "chain", swept)
    if put:
        assert store.put("heads/main/1", [b"whole"]) is True
    else:
        with pytest.raises(Unavailable):
            store.put("heads/main/1", [b"whole"])
        assert all_files(store) == []
        assert store.put("heads/main/1", [b"whole"]) is True
    assert swept.done[8] == "write"
    assert swept.done[sweep_at] in ("sync", "link", "sync_directory", "unlink")
    assert all_files(store) == ["heads/main/1"]
    assert bytes(store.get("heads/main/1")) == b"whole"


# -- several processes ------------------------------------------------------------------------------------

PROCESSES, TURNS = 8, 60


def _race(root: Path, number: int, start: Any, answers: Any) -> None:
    store = LocalStore(root)
    won = []
    for turn in range(TURNS):
        start.wait(60)
        if store.put(f"leases/{turn:04}", [f"{number}".encode() * 5000]):
            won.append(turn)
    answers.put((number, won))


@pytest.mark.process
def test_of_several_processes_exactly_one_gets_the_key(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(PROCESSES), context.Queue()
    racers = [
        context.Process(target=_race, args=(tmp_path / "chain", number, start, answers))
        for number in range(PROCESSES)
    ]
    for racer in racers:
        racer.start()
    won = dict(answers.get(timeout=120) for _ in racers)
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    assert sorted(turn for turns in won.values() for turn in turns) == list(range(TURNS))
    store = LocalStore(tmp_path / "chain")
    for number, turns in won.items():
        for turn in turns:
            assert bytes(store.get(f"leases/{turn:04}")) == f"{number}".encode() * 5000
    assert unfinished(store) == []


def _use_in_child(store: LocalStore) -> None:
    assert bytes(store.get("before")) == b"x"
    assert store.put("child/key", [b"child"]) is True
    assert store.put("both", [b"child"]) is True


@pytest.mark.process
def test_a_store_survives_a_fork(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "chain")
    store.put("before", [b"x"])
    child = multiprocessing.get_context("fork").Process(target=_use_in_child, args=(store,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert store.put("both", [b"parent"]) is False
    assert bytes(store.get("child/key")) == b"child"


# -- paths and urls ---------------------------------------------------------------------------------------


def test_a_relative_root_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = LocalStore("chain")
    monkeypatch.chdir("/")
    store.put("key", [b"x"])
    assert (tmp_path / "chain" / "key").read_bytes() == b"x"
    assert store.url == "chain"


def test_nothing_is_made_before_the_first_put(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "chain")
    assert list(store.list()) == []
    store.delete("key")
    assert store.sweep() == 0
    with pytest.raises(NotFound):
        store.get("key")
    assert list(tmp_path.iterdir()) == []


def test_urls(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert open_store(store) is store
    for url in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        opened = open_store(url)
        assert isinstance(opened, LocalStore)
        assert opened.root == tmp_path
    with pytest.raises(Unsupported, match="ftp://"):
        open_store("ftp://host/chain")


def test_errors_name_the_object(tmp_path: Path) -> None:
    with pytest.raises(EverstepError) as caught:
        LocalStore(tmp_path / "chain").get("heads/main/1")
    assert str(tmp_path / "chain") in str(caught.value)
    assert "heads/main/1" in str(caught.value)


def test_a_directory_that_was_taken_away_is_made_again(tmp_path: Path) -> None:
    """As a keeper that outlives its trainer finds it, when somebody has moved the chain's directory away."""
    store = LocalStore(tmp_path / "chain")
    assert store.put("packs/one", [b"1"])
    shutil.rmtree(tmp_path / "chain")
    assert store.put("packs/two", [b"2"])
    assert [entry.key for entry in store.list()] == ["packs/two"]
