"""Arenas: memory that capture fills and the keeper reads; all that torch and the rest have in common."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from typing import TypeVar

from everstep.errors import Damaged, Unavailable
from everstep.format.chunk import aligned
from everstep.keeper import memory

Taken = TypeVar("Taken")

MAX_ARENA_BYTES = 1 << 46
"""What claims to be larger is no arena."""

_POPULATE_READ = 22
_DONTFORK = 10
_FIXED = 0x10
_F_ADD_SEALS = 1033
_F_GET_SEALS = 1034
_SEAL_SHRINK = 0x0002
_SEAL_GROW = 0x0004

_inherited: list[Arena] = []
"""In a forked child: arenas it has no memory of, kept so that nothing unmaps what now lies in their place."""


class Arena:
    """Page-aligned memory. Shared memory has a descriptor that another process of this machine can open it
    by; it is gone when the last process that has it is.

    Loader workers that are forked do not get the memory: they have no use for it, and sharing it would copy
    every page of private memory at the next capture.
    """

    def __init__(self, memory: mmap.mmap, descriptor: int | None = None) -> None:
        self._mapping = memory
        self.memory = memoryview(memory)
        self._first = self.memory
        self.size_bytes = len(memory)
        self.descriptor = descriptor

    @classmethod
    def private(cls, size_bytes: int) -> Arena:
        """Memory of this process alone. Takes all of it page by page: seconds for gigabytes."""
        arena = cls(_reserved(size_bytes, lambda: _addresses(_size(size_bytes))))
        arena._advise(_DONTFORK)
        arena.memory[::4096] = bytes(len(arena.memory) // 4096)
        return arena

    @classmethod
    def shared(cls, size_bytes: int) -> Arena:
        """Fresh shared memory, all of it taken now. Raises Unavailable where there is not so much."""
        return cls.opened(allocated(size_bytes))

    @classmethod
    def opened(cls, descriptor: int) -> Arena:
        """The shared memory of a descriptor, which is taken over. Enters all pages into this process's table,
        which takes half a second a gigabyte, and lets other threads run meanwhile."""
        arena = cls.mapped(descriptor)
        arena._advise(_POPULATE_READ)
        return arena

    @classmethod
    def mapped(cls, descriptor: int) -> Arena:
        """The same without entering the pages: for one who reads them once.

        Raises:
            Damaged: the descriptor is none of an arena's: it could be cut while it is read. It is closed.
        """
        try:
            size = _checked_size(descriptor)
            # Python's own mapping of a descriptor would duplicate it, and forked children would get that one.
            memory = _reserved(size, lambda: _addresses(size))
            _map_over(_address(memory), size, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        arena = cls(memory, descriptor)
        arena._advise(_DONTFORK)
        return arena

    def first(self, size_bytes: int) -> memoryview:
        """The first bytes: the same object as long as the same size is asked for, so that one can tell by it
        whether the arena is still there."""
        if len(self._first) != size_bytes:
            self._first = self.memory[:size_bytes]
        return self._first

    def close(self) -> None:
        """Give the memory back; what is still viewed goes when its last view does."""
        self._close_descriptor()
        try:
            self._first.release()
            self.memory.release()
            self._mapping.close()
        except BufferError:
            return

    def disown(self) -> None:
        """In a forked child, which has the descriptor and not the memory: close the one, never touch the
        other's place."""
        _inherited.append(self)
        self._close_descriptor()

    def _close_descriptor(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    @property
    def address(self) -> int:
        return _address(self._mapping)

    def _advise(self, advice: int) -> None:
        """An older kernel, or another system, may not know an advice: then the first capture is slower.
        Python's own `madvise` would stop all other threads meanwhile."""
        libc = ctypes.CDLL(None)
        if hasattr(libc, "madvise"):
            libc.madvise(ctypes.c_void_p(self.address), ctypes.c_size_t(self.size_bytes), advice)


def allocated(size_bytes: int) -> int:
    """The descriptor of fresh shared memory, zero, all of it taken now: a second or so a gigabyte, in which
    other threads run. Raises Unavailable where there is not so much."""
    size = _size(size_bytes)
    # The system promises shared memory without end, and kills processes when it has none left.
    if size > memory.available_bytes():
        raise _no_memory(size, os.strerror(errno.ENOMEM))

    def make() -> int:
        descriptor = os.memfd_create("everstep-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(descriptor, 0, size)
            # Nobody who has it can cut it under the feet of another who reads it.
            fcntl.fcntl(descriptor, _F_ADD_SEALS, _SEAL_SHRINK | _SEAL_GROW)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    return _reserved(size, make)


def _size(size_bytes: int) -> int:
    return max(aligned(size_bytes), mmap.PAGESIZE)


def _checked_size(descriptor: int) -> int:
    """The size of an arena's memory; whoever sent the descriptor is not believed."""
    try:
        seals = fcntl.fcntl(descriptor, _F_GET_SEALS)
    except OSError as error:
        raise Damaged("a descriptor that came as an arena is of something else") from error
    size = os.fstat(descriptor).st_size
    if not seals & _SEAL_SHRINK or size % mmap.PAGESIZE or not 0 < size <= MAX_ARENA_BYTES:
        raise Damaged(f"a descriptor that came as an arena is of other memory ({size} bytes)")
    return size


def _addresses(size_bytes: int) -> mmap.mmap:
    return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def _map_over(address: int, size_bytes: int, descriptor: int) -> None:
    """Put the memory of a descriptor in the place of reserved addresses."""
    call = ctypes.CDLL(None, use_errno=True).mmap
    call.restype = ctypes.c_void_p
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    if call(address, size_bytes, protection, mmap.MAP_SHARED | _FIXED, descriptor, 0) != address:
        number = ctypes.get_errno()
        raise Unavailable(f"an arena of {size_bytes:,} bytes cannot be mapped ({os.strerror(number)})")


def _reserved(size_bytes: int, take: Callable[[], Taken]) -> Taken:
    try:
        return take()
    except OSError as error:
        raise _no_memory(size_bytes, error.strerror) from error


def _no_memory(size_bytes: int, reason: str | None) -> Unavailable:
    return Unavailable(
        f"there is no memory for an arena of {size_bytes:,} bytes ({reason})",
        kept="training goes on, and what was committed before is intact",
        next="everstep.open(..., max_arena_bytes=...), which takes snapshots in waves of that size",
    )
