"""The file operations that the local store is made of: the seam at which faults are put in.

Each is one system call or so. What a power cut may leave of each is written at `everstep.testing.crash`,
which records them and replays every prefix.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from typing import Protocol, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

_BLOCK = 4096
_BOUNCE_BYTES = 4 * 1024 * 1024
_VECTOR = 256
"""So many buffers are written with one call: every system takes 1024, some count their pages as well."""

_DIRECT_FROM_BYTES = 1024 * 1024
"""Smaller files go through the page cache: there a bypass saves nothing."""


class Files(Protocol):
    """What a store asks of a file system. All paths are absolute; all may raise OSError."""

    def make_directory(self, path: str) -> None:
        """Create a directory; FileExistsError where there is one."""

    def write(self, path: str, parts: Sequence[Buffer]) -> None:
        """Create a file that must not exist and write `parts` to it; not durable yet."""

    def sync(self, path: str) -> None:
        """Make a file's bytes durable."""

    def link(self, path: str, to: str) -> None:
        """Give a file a second name; FileExistsError where the name is taken."""

    def unlink(self, path: str) -> None:
        """Take a name away."""

    def sync_directory(self, path: str) -> None:
        """Make the names in a directory durable."""


class SystemFiles:
    """The real thing."""

    def make_directory(self, path: str) -> None:
        os.mkdir(path)

    def write(self, path: str, parts: Sequence[Buffer]) -> None:
        if sum(map(len, parts)) >= _DIRECT_FROM_BYTES and hasattr(os, "O_DIRECT"):
            try:
                return _write_direct(path, parts)
            except OSError as error:
                # What a file system says that has no O_DIRECT, at open or at the first write.
                if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
                    raise
                if os.path.exists(path):
                    os.unlink(path)
        return _write_buffered(path, parts)

    def sync(self, path: str) -> None:
        _sync(path, os.O_RDONLY)

    def link(self, path: str, to: str) -> None:
        os.link(path, to)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def sync_directory(self, path: str) -> None:
        _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: str, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_buffered(path: str, parts: Sequence[Buffer]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _write_all(descriptor, [memoryview(part).cast("B") for part in parts])
    finally:
        os.close(descriptor)


def _write_direct(path: str, parts: Sequence[Buffer]) -> None:
    """Past the page cache: at the disk's own speed, and without pushing the training data out of memory.

    Buffers that lie right go out as they are, as many with one call as lie one after the other in the file,
    so that the disk always has the next at hand; others through an aligned buffer. The last bytes, if they
    are no whole block, go through the page cache.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_DIRECT, 0o666)
    try:
        straight: list[memoryview] = []
        bounce = _Bounce()
        for part in parts:
            data = memoryview(part).cast("B")
            if not bounce.held and _lies_right(data):
                straight.append(data)
                continue
            while len(data):
                data = bounce.take(data)
                if bounce.held % _BLOCK == 0:
                    _write_all(descriptor, [*straight, bounce.memory[: bounce.held]])
                    straight, bounce.held = [], 0
        whole = bounce.held // _BLOCK * _BLOCK
        _write_all(descriptor, [*straight, bounce.memory[:whole]])
        if whole < bounce.held:
            _drop_direct(descriptor)
            _write_all(descriptor, [bounce.memory[whole : bounce.held]])
    finally:
        os.close(descriptor)


class _Bounce:
    """An aligned buffer for what does not lie right, made when it is needed; `held` bytes wait in it."""

    def __init__(self) -> None:
        self.memory = memoryview(b"")
        self.held = 0

    def take(self, data: memoryview) -> memoryview:
        """Copy as much as there is room for; returns what is left."""
        if not self.memory:
            self.memory = memoryview(mmap.mmap(-1, _BOUNCE_BYTES))
        taken = min(len(data), _BOUNCE_BYTES - self.held)
        self.memory[self.held : self.held + taken] = data[:taken]
        self.held += taken
        return data[taken:]


def _drop_direct(descriptor: int) -> None:
    import fcntl

    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)


def _lies_right(buffer: memoryview) -> bool:
    """Whether address and size are whole blocks, as O_DIRECT asks."""
    import numpy as np

    return len(buffer) % _BLOCK == 0 and np.frombuffer(buffer, np.uint8).ctypes.data % _BLOCK == 0


def _write_all(descriptor: int, buffers: Sequence[memoryview]) -> None:
    left = [buffer for buffer in buffers if len(buffer)]
    while left:
        written = os.writev(descriptor, left[:_VECTOR])
        done = 0
        while done < len(left) and written >= len(left[done]):
            written -= len(left[done])
            done += 1
        left = left[done:]
        if written:
            left[0] = left[0][written:]
