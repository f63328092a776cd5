"""Reading files at the disk's own speed: out of the page cache where they are in it, past it where not.

A file that was written past the page cache is not in it, and reading it through the cache costs more than the
read itself: a fresh page for every 4 kB, and a copy out of it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_BLOCK = 4096
_BOUNCE_BYTES = 8 * 1024 * 1024
_DIRECT_FROM_BYTES = 1024 * 1024
_STRAIGHT_FROM_BYTES = 64 * 1024
_NUMPY_FROM_BYTES = 64 * 1024
_MOST_BUFFERS = 1000
_KEPT_BOUNCES = 8
_BOUNCES: list[memoryview] = []
"""Buffers for the way past the page cache that nobody uses now."""

_NOT_HERE = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def read(path: str | os.PathLike[str], start: int, buffers: Sequence[memoryview]) -> int:
    """Fill `buffers`, one after the other, with a file's bytes from `start` on.

    Returns how many bytes there were: fewer than the buffers hold where the file ends before that. Raises
    OSError.
    """
    wanted = sum(map(len, buffers))
    with _opened(path, 0) as descriptor:
        if wanted < _DIRECT_FROM_BYTES or not hasattr(os, "O_DIRECT"):
            return _through_cache(descriptor, start, buffers)
        done = _cached(descriptor, start, buffers)
        if done == wanted:
            return done
        rest = _after(buffers, done)
        try:
            return done + _past_cache(path, start + done, rest)
        except OSError as error:
            # What a file system says that has no O_DIRECT.
            if error.errno not in _NOT_HERE:
                raise
        return done + _through_cache(descriptor, start + done, rest)


@contextmanager
def _opened(path: str | os.PathLike[str], flags: int) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        yield descriptor
    finally:
        os.close(descriptor)


def _cached(descriptor: int, start: int, buffers: Sequence[memoryview]) -> int:
    """What the page cache has of it from the start on; the disk is not waited for.

    A read that does not wait still asks for what it misses, in the background: so one byte is tried first,
    with read-ahead off.
    """
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        if os.preadv(descriptor, [bytearray(1)], start, os.RWF_NOWAIT) == 0:
            return 0
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_NORMAL)
        return os.preadv(descriptor, list(buffers[:_MOST_BUFFERS]), start, os.RWF_NOWAIT)
    except BlockingIOError:
        return 0
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
        return 0


def _through_cache(descriptor: int, start: int, buffers: Sequence[memoryview]) -> int:
    done = 0
    rest = _after(buffers, 0)
    while rest:
        count = os.preadv(descriptor, rest[:_MOST_BUFFERS], start + done)
        if count == 0:
            break
        done += count
        rest = _after(rest, count)
    return done


def _past_cache(path: str | os.PathLike[str], start: int, buffers: Sequence[memoryview]) -> int:
    """Straight into those buffers that lie as O_DIRECT asks, through one that does into the others: a tensor
    lies so only where its memory was made for this."""
    rest = _after(buffers, 0)
    done = 0
    with _opened(path, os.O_DIRECT) as descriptor, _bounce() as bounce:
        while rest:
            at = start + done
            together = _together(at, rest)
            if together:
                count = os.preadv(descriptor, together, at)
            else:
                count = _bounced(descriptor, at, bounce, rest)
            if count == 0:
                break
            done += count
            rest = _after(rest, count)
    return done


def _together(at: int, buffers: list[memoryview]) -> list[memoryview]:
    """The first buffers, as far as one call can read into their own memory: the fewer calls, the more the
    disk has to do at a time."""
    found: list[memoryview] = []
    for buffer in buffers[:_MOST_BUFFERS]:
        straight = _straight(at, buffer)
        if straight:
            found.append(buffer[:straight])
        if straight < len(buffer):
            break
        at += straight
    return found


def _straight(at: int, buffer: memoryview) -> int:
    """How many bytes can be read from `at` on into a buffer's own memory, which lies on block boundaries."""
    if at % _BLOCK or len(buffer) < _STRAIGHT_FROM_BYTES:
        return 0
    if ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % _BLOCK:
        return 0
    return len(buffer) // _BLOCK * _BLOCK


def _bounced(descriptor: int, at: int, bounce: memoryview, buffers: list[memoryview]) -> int:
    """Read one bounce buffer and copy it to where it belongs, up to a buffer that needs no such detour."""
    wanted = 0
    for buffer in buffers:
        if wanted >= len(bounce) or _straight(at + wanted, buffer):
            break
        wanted += len(buffer)
    lead = at % _BLOCK
    asked = min(len(bounce), -(-(lead + wanted) // _BLOCK) * _BLOCK)
    count = os.preadv(descriptor, [bounce[:asked]], at - lead)
    fresh = bounce[lead : max(lead, min(count, lead + wanted))]
    scatter(fresh, buffers)
    return len(fresh)


@contextmanager
def _bounce() -> Iterator[memoryview]:
    """Page-aligned memory, used again and again: fresh pages cost more than what is read into them."""
    try:
        bounce = _BOUNCES.pop()
    except IndexError:
        bounce = memoryview(mmap.mmap(-1, _BOUNCE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    try:
        yield bounce
    finally:
        if len(_BOUNCES) < _KEPT_BOUNCES:
            _BOUNCES.append(bounce)


def scatter(data: memoryview, buffers: Sequence[memoryview]) -> list[memoryview]:
    """Copy to the beginning of the buffers; returns what is left of them."""
    for number, buffer in enumerate(buffers):
        part = data[: len(buffer)]
        copy(buffer[: len(part)], part)
        data = data[len(part) :]
        if len(part) < len(buffer):
            return [buffer[len(part) :], *buffers[number + 1 :]]
    return []


def copy(target: memoryview, source: memoryview) -> None:
    """Copy bytes; many of them with numpy, which lets other threads run meanwhile: the first touch of fresh
    memory takes its time."""
    if len(source) >= _NUMPY_FROM_BYTES and "numpy" in sys.modules:
        import numpy as np

        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
    else:
        target[:] = source


def _after(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """The buffers without their first `count` bytes, and without empty ones."""
    rest = []
    for buffer in buffers:
        taken = min(count, len(buffer))
        count -= taken
        if taken < len(buffer):
            rest.append(buffer[taken:])
    return rest
