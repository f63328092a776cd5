"""What this machine can do at most, measured next to what is compared with it: rates and CPU per byte."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from blake3 import blake3

from bench.measure import Summary, cold, summary, warm

FLOORS = ("memcpy", "blake3", "direct_write", "direct_read", "fresh_read", "cached_read")
_PART_BYTES = 64 << 20


class Floors:
    """Measures all floors each time it is asked.

    Args:
        directory: where files are written and read.
        size_bytes: how much is copied, digested, written and read each time.
    """

    def __init__(self, directory: Path, size_bytes: int = 1 << 29) -> None:
        self._path = directory / "floor"
        self._source = _memory(size_bytes)
        self._target = _memory(size_bytes)
        random = os.urandom(1 << 20)
        for start in range(0, size_bytes, len(random)):
            self._source[start : start + len(random)] = random[: size_bytes - start]
        self._target[:] = self._source
        self._gigabytes = size_bytes / 1e9
        self.rates: dict[str, list[float]] = {name: [] for name in FLOORS}
        self.cpu: dict[str, list[float]] = {name: [] for name in FLOORS}

    def measure(self) -> None:
        """One repetition of all."""
        self._time("memcpy", self._copy)
        self._time("blake3", lambda: blake3(self._source).digest())
        self._time("direct_write", self._write)
        cold(self._path)
        self._time("direct_read", self._read_direct)
        cold(self._path)
        self._time("fresh_read", self._read_fresh)
        warm(self._path)
        self._time("cached_read", self._read_cached)
        self._path.unlink()

    def _time(self, name: str, action: Callable[[], object]) -> None:
        begun, cpu = time.perf_counter(), time.process_time()
        action()
        self.rates[name].append(self._gigabytes / (time.perf_counter() - begun))
        self.cpu[name].append((time.process_time() - cpu) / self._gigabytes)

    def _copy(self) -> None:
        self._target[:] = self._source

    def _write(self) -> None:
        """From shared memory past the page cache, durable at the end."""
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
        for start in range(0, len(self._source), _PART_BYTES):
            os.pwrite(descriptor, self._source[start : start + _PART_BYTES], start)
        os.fsync(descriptor)
        os.close(descriptor)

    def _read_direct(self) -> None:
        self._read(os.O_RDONLY | os.O_DIRECT)

    def _read_fresh(self) -> None:
        """Into memory that was never touched, as what a restore makes is: of large pages where there are
        some."""
        memory = mmap.mmap(-1, len(self._target), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        self._read(os.O_RDONLY | os.O_DIRECT, memoryview(memory))

    def _read_cached(self) -> None:
        self._read(os.O_RDONLY)

    def _read(self, flags: int, into: memoryview | None = None) -> None:
        """By as many threads as there are cores, into memory that was touched before where none is given."""
        descriptor = os.open(self._path, flags)
        target = self._target if into is None else into

        def read(start: int) -> None:
            os.preadv(descriptor, [target[start : start + _PART_BYTES]], start)

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(read, range(0, len(target), _PART_BYTES)))
        os.close(descriptor)

    def result(self) -> dict[str, dict[str, Summary]]:
        return {
            name: {"GB_per_s": summary(self.rates[name]), "cpu_s_per_GB": summary(self.cpu[name])}
            for name in FLOORS
        }


def _memory(size_bytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size_bytes))
