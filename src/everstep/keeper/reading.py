"""Reading a range of a pack once for all ranks of a machine: the keeper reads it, into memory that it gives
to each of them. Whoever uses it verifies digests, as with what a store gives.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from everstep.format import keys
from everstep.keeper import memory
from everstep.keeper.arena import Arena, allocated
from everstep.store.base import Buffer, Entry, Store
from everstep.store.reads import copy

THREADS = 8
SMALLEST_BYTES = 256 * 1024
"""Less is read as fast as it is asked for."""
LARGEST_BYTES = 128 * 1024 * 1024
KEPT_BYTES = 2 * 1024 * 1024 * 1024
MEMORY_SHARE = 8
"""So much is kept for ranks that come to it later, and no more than this part of the memory that is free."""


@dataclass(frozen=True)
class Range:
    """Bytes of an object."""

    key: str
    start: int
    size_bytes: int

    @property
    def shareable(self) -> bool:
        return self.key.startswith(keys.PACKS) and SMALLEST_BYTES <= self.size_bytes <= LARGEST_BYTES


Answer = Callable[[int | None], None]
"""Takes the descriptor of memory that begins with the bytes, which stays the giver's; None: ask the store."""


@dataclass
class _Kept:
    """`descriptor` is -1 as long as it is being read."""

    descriptor: int = -1
    waiting: list[Answer] = field(default_factory=list)


class Reading:
    """In the keeper: reads each range once, and keeps it for a while.

    Args:
        store: where from.
        limit_bytes: so much memory at most, asked when there is something to keep.
    """

    def __init__(self, store: Store, limit_bytes: Callable[[], int] | None = None) -> None:
        self._store = store
        self._limit_bytes = limit_bytes or _limit_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[Range, _Kept] = OrderedDict()
        self._bytes = 0
        self._threads: ThreadPoolExecutor | None = None

    def ask(self, wanted: Range, answer: Answer) -> None:
        """Have a range read, unless it is there or on its way. `answer` is called once, in this thread or in
        another. Does not block."""
        with self._lock:
            kept = self._kept.get(wanted)
            if kept is None:
                kept = self._kept[wanted] = _Kept()
                if self._threads is None:
                    self._threads = ThreadPoolExecutor(THREADS, "everstep-share")
                self._threads.submit(self._read, wanted, kept)
            self._kept.move_to_end(wanted)
            if kept.descriptor < 0:
                kept.waiting.append(answer)
                return
            # Under the lock, lest it is closed meanwhile.
            answer(kept.descriptor)

    def forget(self) -> None:
        """Nobody comes for what is kept."""
        with self._lock:
            for wanted in [wanted for wanted, kept in self._kept.items() if kept.descriptor >= 0]:
                self._drop(wanted)

    def close(self) -> None:
        """End; what is being read is answered. Blocks as long as that takes."""
        if self._threads is not None:
            self._threads.shutdown()
        self.forget()

    def _read(self, wanted: Range, kept: _Kept) -> None:
        descriptor = -1
        try:
            descriptor = self._filled(wanted)
        except Exception:
            # Whoever asked finds out by itself what is wrong.
            descriptor = -1
        with self._lock:
            answers, kept.waiting = kept.waiting, []
            for answer in answers:
                answer(None if descriptor < 0 else descriptor)
            if descriptor < 0:
                del self._kept[wanted]
                return
            kept.descriptor = descriptor
            self._bytes += wanted.size_bytes
            limit_bytes = self._limit_bytes()
            for one in [one for one, other in self._kept.items() if other.descriptor >= 0]:
                if self._bytes > limit_bytes:
                    self._drop(one)

    def _filled(self, wanted: Range) -> int:
        arena = Arena.mapped(allocated(wanted.size_bytes))
        try:
            target = arena.memory[: wanted.size_bytes]
            count = self._store.read_into(wanted.key, wanted.start, [target])
            target.release()
            if count != wanted.size_bytes or arena.descriptor is None:
                return -1
            return os.dup(arena.descriptor)
        finally:
            arena.close()

    def _drop(self, wanted: Range) -> None:
        os.close(self._kept.pop(wanted).descriptor)
        self._bytes -= wanted.size_bytes


def _limit_bytes() -> int:
    return min(KEPT_BYTES, memory.available_bytes() // MEMORY_SHARE)


class SharedReads:
    """In the trainer: a store whose packs are read through the keeper. What that does not have, or cannot
    read, comes from the store itself, and so does everything else.

    Args:
        store: the chain's.
        fetch: gets a range from the keeper, in memory that is the caller's; None where it cannot.
    """

    def __init__(self, store: Store, fetch: Callable[[Range], Arena | None]) -> None:
        self._store = store
        self._fetch = fetch

    def __getattr__(self, name: str) -> object:
        """What else the store can do."""
        return getattr(self._store, name)

    @property
    def url(self) -> str:
        return self._store.url

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        return self._store.put(key, parts)

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        return self._store.get(key, start, size_bytes)

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        wanted = Range(key, start, sum(map(len, buffers)))
        arena = self._fetch(wanted) if wanted.shareable else None
        if arena is None:
            return self._store.read_into(key, start, buffers)
        at = 0
        with arena.memory[: wanted.size_bytes] as found:
            for buffer in buffers:
                copy(buffer, found[at : at + len(buffer)])
                at += len(buffer)
        arena.close()
        return at

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[Entry]:
        return self._store.list(prefix, limit)

    def delete(self, key: str) -> None:
        self._store.delete(key)
