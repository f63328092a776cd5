"""How much memory there is, and how much a keeper takes of its own, besides the arenas."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_FORGET_PEAK = "5"


_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""Control groups of the second version and of the first."""


def available_bytes() -> int:
    """What could be taken now, by what the system says and the limits of this process's control group; a very
    large number where neither is known."""
    rooms = [_kilobytes("/proc/meminfo", "MemAvailable:", default=1 << 40) * 1024]
    for directory, limit, used in _GROUPS:
        with suppress(OSError, ValueError):  # No such limit; "max" is none.
            rooms.append(_room(Path(directory), limit, used))
    return max(0, min(rooms))


def _room(group: Path, limit: str, used: str) -> int:
    """What a control group has left; the page cache counts as used there, and is given up when asked for."""
    lines = (group / "memory.stat").read_text().splitlines()
    facts = {name: int(value) for name, value in (line.split() for line in lines)}
    cached = facts.get("inactive_file", 0) + facts.get("active_file", 0)
    return int((group / limit).read_text()) - int((group / used).read_text()) + cached


def forget_peak() -> None:
    """Let the peak be counted anew, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text(_FORGET_PEAK)


def peak_private_bytes() -> int:
    """The most memory of its own that this process had at once, since `forget_peak` or its start; 0 where the
    system does not say. What it shares is taken off as it is now: arenas come and go rarely."""
    shared = _kilobytes("/proc/self/status", "RssShmem:", default=0)
    return max(_kilobytes("/proc/self/status", "VmHWM:", default=0) - shared, 0) * 1024


def _kilobytes(path: str, name: str, default: int) -> int:
    """The number in a line of one of the system's files."""
    try:
        lines = Path(path).read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))
    except (OSError, ValueError, IndexError, StopIteration):
        return default
