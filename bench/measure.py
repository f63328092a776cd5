"""Measuring: alternating repetitions, medians and spread, ratios of neighbours, caches dropped, facts of the
machine."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

Summary = dict[str, float]


def summary(values: Sequence[float]) -> Summary:
    """Median and spread of the repetitions."""
    return {
        "median": round(statistics.median(values), 6),
        "min": round(min(values), 6),
        "max": round(max(values), 6),
        "count": len(values),
    }


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Summary:
    """Median and spread of the ratios of what was measured next to each other."""
    return summary([one / other for one, other in zip(ours, theirs, strict=True)])


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def cold(*paths: Path) -> None:
    """Drop these files (all files below a directory) from the page cache, and make sure of it: a file that
    is still mapped somewhere stays there."""
    gc.collect()
    for file in files(*paths):
        if file.stat().st_size:
            _drop(file)


def warm(*paths: Path) -> None:
    """Have these files (all files below a directory) in the page cache."""
    for file in files(*paths):
        with open(file, "rb", buffering=0) as source:
            while source.read(16 << 20):
                pass


def files(*paths: Path) -> list[Path]:
    """The files, and all files below the directories."""
    found = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return [file for file in found if file.is_file()]


def stored_bytes(*paths: Path) -> int:
    """How much these files and directories hold."""
    return sum(file.stat().st_size for file in files(*paths))


def sync(*paths: Path) -> None:
    """Make files durable that somebody else has written, and the directories they are in."""
    for path in paths:
        inside = [path, *path.rglob("*")] if path.is_dir() else [path]
        for one in [*inside, path.parent]:
            descriptor = os.open(one, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def _drop(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        for _ in range(100):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if not _is_cached(descriptor):
                return
            # A page that the kernel has in its hands for a moment cannot be dropped.
            time.sleep(0.02)
    finally:
        os.close(descriptor)
    if file.stat().st_size > 1 << 20:
        raise RuntimeError(f"{file} is still in the page cache")


def _is_cached(descriptor: int) -> bool:
    """Whether some of a file is in the page cache, by a look at sixteen places that asks for nothing else."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    size_bytes = os.fstat(descriptor).st_size
    found = 0
    for part in range(16):
        try:
            found += os.preadv(descriptor, [bytearray(1)], size_bytes * part // 16, os.RWF_NOWAIT)
        except BlockingIOError:
            continue
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return found > 1


def machine() -> dict[str, object]:
    """What the figures depend on."""
    return {
        "cores": os.cpu_count(),
        "memory_GB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "system": platform.platform(),
    }
