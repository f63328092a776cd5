"""The crash explorer: every tree of files that a kill or a power cut could leave of a recorded run.

`RecordingFiles` is put under a `LocalStore`; it does the real operations and records them. `states` then
gives, for every instant of the record, trees that may be found on the disk afterwards, and `build` makes one
of them, so that a test can open it and hold what it finds against what had been promised.

The faults this covers, and what is believed of a disk:

* **A kill** (SIGKILL, out of memory): everything done so far stays, and the write under way is there up to
  any byte.
* **A power cut** (or a crash of the kernel):
  * Bytes of a file that were synced after they were written stay. Of other bytes anything may be left: all,
    none, fewer at the end, or any subset of 512-byte sectors, with zeros or stale bytes in the others.
  * Names (made by mkdir, write and link, taken away by unlink) whose directory was synced afterwards stay as
    they are. Each other name is, independently of all others and of their order, as it was at the last sync
    of its directory or at any time since. That a file is synced says nothing about its name, and a name
    nothing about the file's bytes.
  * What is below a directory whose own name did not come to the disk is gone.
* Not covered: disks that lie about a sync, and bytes that rot later (for those there is `verify`).
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from everstep.store.files import Buffer, Files, SystemFiles

SECTOR_BYTES = 512

Kind: TypeAlias = Literal["mkdir", "write", "append", "sync", "link", "unlink", "sync_directory", "mark"]


@dataclass(frozen=True)
class Operation:
    """One thing that was done. Paths are relative to the recorder's base ("." is the base itself).

    `to` is the second name of a link, `data` what was written. A `mark` changes nothing: `path` is a text by
    which the test notes what was promised at this instant.
    """

    kind: Kind
    path: str
    to: str = ""
    data: bytes = b""


@dataclass(frozen=True)
class State:
    """A tree that may be found after a crash.

    Attributes:
        after: how many operations had ended.
        how: what happened, for a message.
        directories, files: relative paths; what is not named is not there.
        marks: the marks that had been made.
    """

    after: int
    how: str
    directories: tuple[str, ...]
    files: tuple[tuple[str, bytes], ...]
    marks: tuple[str, ...]


class RecordingFiles:
    """`Files` that does the real thing below `base` and records it in `operations`.

    Args:
        base: a directory that exists and is durable; every path must lie below it.
        files: what does the operations.
    """

    def __init__(self, base: str | os.PathLike[str], files: Files | None = None) -> None:
        self.base = Path(base).absolute()
        self.operations: list[Operation] = []
        self._files = files or SystemFiles()
        # One operation at a time, so that the record is the order in which they were done.
        self._lock = threading.Lock()
        self._noted: dict[str, int] = {}

    def make_directory(self, path: str) -> None:
        with self._lock:
            self._files.make_directory(path)
            self._record("mkdir", path)

    def write(self, path: str, parts: Sequence[Buffer]) -> None:
        with self._lock:
            self._files.write(path, parts)
            self._record("write", path, data=b"".join(parts))

    def sync(self, path: str) -> None:
        with self._lock:
            self._files.sync(path)
            self._record("sync", path)

    def link(self, path: str, to: str) -> None:
        with self._lock:
            self._files.link(path, to)
            self._record("link", path, to=to)

    def unlink(self, path: str) -> None:
        with self._lock:
            self._files.unlink(path)
            self._record("unlink", path)

    def sync_directory(self, path: str) -> None:
        with self._lock:
            self._files.sync_directory(path)
            self._record("sync_directory", path)

    def mark(self, text: str) -> None:
        """Note that something was promised just now."""
        with self._lock:
            self.operations.append(Operation("mark", text))

    def note(self, directory: str | os.PathLike[str]) -> None:
        """Record what was done in `directory` past this object since the last call: files made, appended to
        and taken away, nothing of it synced."""
        with self._lock:
            path = Path(directory)
            known = str(path) in self._noted
            if path.is_dir() and not known:
                self._record("mkdir", str(path))
                self._noted[str(path)] = 0
            there = {str(one): one.read_bytes() for one in sorted(path.iterdir())} if path.is_dir() else {}
            for name, data in there.items():
                if name not in self._noted:
                    self._record("write", name, data=data)
                elif len(data) > self._noted[name]:
                    self._record("append", name, data=data[self._noted[name] :])
                self._noted[name] = len(data)
            for name in [one for one in self._noted if Path(one).parent == path and one not in there]:
                self._record("unlink", name)
                del self._noted[name]

    def _record(self, kind: Kind, path: str, *, to: str = "", data: bytes = b"") -> None:
        self.operations.append(Operation(kind, self._relative(path), self._relative(to) if to else "", data))

    def _relative(self, path: str) -> str:
        return str(Path(path).relative_to(self.base))


# -- the disk ------------------------------------------------------------------------------------------


@dataclass
class _File:
    """The first `synced_bytes` of `data` are durable."""

    data: bytes
    synced_bytes: int = 0


@dataclass
class _Directory:
    """For each name what it was at the last sync, then all that it was since; None: not there."""

    names: dict[str, list[_File | _Directory | None]] = field(default_factory=dict)

    def now(self, name: str) -> _File | _Directory | None:
        return self.names.get(name, [None])[-1]

    def set(self, name: str, node: _File | _Directory | None) -> None:
        self.names.setdefault(name, [None]).append(node)

    def sync(self) -> None:
        self.names = {name: been[-1:] for name, been in self.names.items() if been[-1] is not None}


class _Disk:
    def __init__(self) -> None:
        self.root = _Directory()

    def apply(self, operation: Operation) -> None:
        kind = operation.kind
        if kind == "mark":
            return
        if kind == "sync_directory":
            self._directory(operation.path).sync()
            return
        folder, name = self._split(operation.path)
        if kind == "mkdir":
            folder.set(name, _Directory())
        elif kind == "write":
            folder.set(name, _File(operation.data))
        elif kind == "append":
            self._file(operation.path).data += operation.data
        elif kind == "sync":
            file = self._file(operation.path)
            file.synced_bytes = len(file.data)
        elif kind == "link":
            second, second_name = self._split(operation.to)
            second.set(second_name, self._file(operation.path))
        elif kind == "unlink":
            folder.set(name, None)

    def _split(self, path: str) -> tuple[_Directory, str]:
        parent, _, name = path.rpartition("/")
        return self._directory(parent or "."), name

    def _directory(self, path: str) -> _Directory:
        node: _File | _Directory | None = self.root
        for part in [] if path == "." else path.split("/"):
            assert isinstance(node, _Directory), path
            node = node.now(part)
        assert isinstance(node, _Directory), path
        return node

    def _file(self, path: str) -> _File:
        folder, name = self._split(path)
        node = folder.now(name)
        assert isinstance(node, _File), path
        return node


class _Fate:
    """What becomes of names and bytes that are not durable. This one is a kill: they stay."""

    def node(self, been: Sequence[_File | _Directory | None]) -> _File | _Directory | None:
        return been[-1]

    def data(self, file: _File) -> bytes:
        return file.data


class _AllLost(_Fate):
    def node(self, been: Sequence[_File | _Directory | None]) -> _File | _Directory | None:
        return been[0]

    def data(self, file: _File) -> bytes:
        return file.data[: file.synced_bytes]


class _DataLost(_AllLost):
    """Names come to the disk before the bytes: the classic file of zeros."""

    def node(self, been: Sequence[_File | _Directory | None]) -> _File | _Directory | None:
        return been[-1]


class _Luck(_Fate):
    """Each name and each file by itself."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._torn: dict[int, bytes] = {}

    def node(self, been: Sequence[_File | _Directory | None]) -> _File | _Directory | None:
        return self._rng.choice(been)

    def data(self, file: _File) -> bytes:
        # A file with two names has one content.
        if id(file) not in self._torn:
            lost = file.data[file.synced_bytes :]
            self._torn[id(file)] = file.data[: file.synced_bytes] + (_torn(lost, self._rng) if lost else b"")
        return self._torn[id(file)]


def _torn(data: bytes, rng: random.Random) -> bytes:
    how = rng.randrange(5)
    if how == 0:
        return data
    if how == 1:
        return data[: rng.randrange(len(data) + 1)]
    if how == 2:
        return bytes(len(data))
    filler = bytes(SECTOR_BYTES) if how == 3 else rng.randbytes(SECTOR_BYTES)
    pieces = [data[at : at + SECTOR_BYTES] for at in range(0, len(data), SECTOR_BYTES)]
    return b"".join(piece if rng.random() < 0.5 else filler[: len(piece)] for piece in pieces)


def _tree(disk: _Disk, fate: _Fate) -> tuple[tuple[str, ...], tuple[tuple[str, bytes], ...]]:
    directories: list[str] = []
    files: list[tuple[str, bytes]] = []

    def walk(folder: _Directory, prefix: str) -> None:
        for name in sorted(folder.names):
            node = fate.node(folder.names[name])
            if isinstance(node, _Directory):
                directories.append(prefix + name)
                walk(node, prefix + name + "/")
            elif node is not None:
                files.append((prefix + name, fate.data(node)))

    walk(disk.root, "")
    return tuple(directories), tuple(files)


def states(operations: Sequence[Operation], seed: int = 0, samples: int = 6) -> Iterator[State]:
    """The trees that a crash may leave: several for every prefix of `operations`, equal ones once.

    For each prefix: a kill; power cuts in which nothing, all names, or a random part of what is not durable
    comes to the disk (`samples` of the last kind); and the same with the next operation half done, where it
    is a write. The same arguments give the same states.
    """
    rng = random.Random(seed)
    disk = _Disk()
    marks: tuple[str, ...] = ()
    seen: set[int] = set()
    for after in range(len(operations) + 1):
        coming = operations[after] if after < len(operations) else None
        for how, fate in _fates(rng, samples):
            directories, files = _tree(disk, fate)
            yield from _fresh(State(after, how, directories, files, marks), seen)
            if coming is not None and coming.kind in ("write", "append") and coming.data:
                half = _half_done(operations[:after], coming, rng)
                directories, files = _tree(half, fate)
                yield from _fresh(State(after, f"{how}, in a write", directories, files, marks), seen)
        if coming is not None:
            disk.apply(coming)
            marks += (coming.path,) if coming.kind == "mark" else ()


def _fates(rng: random.Random, samples: int) -> Iterator[tuple[str, _Fate]]:
    yield "killed", _Fate()
    yield "power cut, all lost", _AllLost()
    yield "power cut, only names came", _DataLost()
    for _ in range(samples):
        yield "power cut", _Luck(rng)


def _half_done(done: Sequence[Operation], coming: Operation, rng: random.Random) -> _Disk:
    """A disk of its own with a part of a write on it."""
    disk = _Disk()
    for operation in done:
        disk.apply(operation)
    part = coming.data[: rng.randrange(len(coming.data))]
    disk.apply(Operation(coming.kind, coming.path, data=part))
    return disk


def _fresh(state: State, seen: set[int]) -> Iterator[State]:
    key = hash((state.directories, state.files, state.marks))
    if key not in seen:
        seen.add(key)
        yield state


def build(state: State, directory: str | os.PathLike[str]) -> None:
    """Make the tree of a state in `directory`, which must be there and be empty."""
    for path in state.directories:
        os.mkdir(os.path.join(directory, path))
    for path, data in state.files:
        with open(os.path.join(directory, path), "xb") as file:
            file.write(data)
