"""What a tree of processes uses: CPU and memory, wherever its parts were started and whoever waits for them.

A tree is all processes that carry a mark in the environment they were started with, their descendants, and
those whose command line names the tree's directory: so a process that left its parent is still counted.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

MARK = "EVERSTEP_BENCH_TREE"
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
TICK_S = 1 / _TICKS_PER_SECOND
"""The least CPU time that can be told from none."""
_BLOCK_BYTES = 512


@dataclass(frozen=True)
class Tree:
    """The processes started with `mark` in their environment, or with `directory` on their command line."""

    mark: str
    directory: str

    def environment(self) -> dict[str, str]:
        """What to start the first process of the tree with."""
        return {**os.environ, MARK: self.mark}

    def pids(self) -> list[int]:
        parents = dict(_parents())
        mine = {pid for pid in parents if self._is_marked(pid)}
        while True:
            further = {pid for pid, parent in parents.items() if parent in mine} - mine
            if not further:
                return sorted(mine)
            mine |= further

    def _is_marked(self, pid: int) -> bool:
        mark = f"{MARK}={self.mark}".encode()
        environment, command = (_read(pid, name).split(b"\0") for name in ("environ", "cmdline"))
        return mark in environment or any(os.fsencode(self.directory) in word for word in command)

    def cpu_seconds(self) -> float:
        """CPU used so far by the living and by those that they have waited for."""
        return sum(_cpu_seconds(pid) for pid in self.pids())

    def memory_bytes(self) -> int:
        """Memory that would be free if the tree were not there.

        Private and file pages by proportional set size; shared memory is what is mapped or, where that is
        more, what is held by open descriptors: pages that nobody has mapped yet are in use, too.
        """
        private, mapped, held = 0, 0, {}
        for pid in self.pids():
            sizes = _rollup(pid)
            private += sizes.get("Pss", 0) - sizes.get("Pss_Shmem", 0)
            mapped += sizes.get("Pss_Shmem", 0)
            held.update(_shared_memory(pid))
        return private + max(mapped, sum(held.values()))


@dataclass
class Peak:
    """The highest memory of a tree while inside the `with`; sampled by a thread of this process."""

    tree: Tree
    interval_s: float = 0.05
    bytes: int = 0
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Peak:
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while True:
            self.bytes = max(self.bytes, self.tree.memory_bytes())
            if self._over.wait(self.interval_s):
                return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()


def _parents() -> Iterator[tuple[int, int]]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            fields = _statistics(int(name))
            if fields:
                yield int(name), int(fields[1])


def _statistics(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the state on; empty when the process is gone."""
    return _read(pid, "stat").rpartition(b")")[2].split()


def _cpu_seconds(pid: int) -> float:
    fields = _statistics(pid)
    return sum(int(ticks) for ticks in fields[11:15]) / _TICKS_PER_SECOND


def _rollup(pid: int) -> dict[str, int]:
    sizes = {}
    for line in _read(pid, "smaps_rollup").splitlines()[1:]:
        name, _, rest = line.partition(b":")
        sizes[name.decode()] = int(rest.split()[0]) * 1024
    return sizes


def _shared_memory(pid: int) -> dict[tuple[int, int], int]:
    """Bytes of the shared memory that a process holds open, by device and inode."""
    found = {}
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(entry.path)
                if target.startswith(("/memfd:", "/dev/shm/")):
                    status = os.stat(entry.path)
                    found[status.st_dev, status.st_ino] = status.st_blocks * _BLOCK_BYTES
    return found


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
