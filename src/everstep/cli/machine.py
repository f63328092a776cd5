"""What this machine and a directory on it have of what Everstep needs."""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import platform
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from everstep.errors import EverstepError, Unsupported
from everstep.events import size
from everstep.store.base import Probing
from everstep.store.objects import ObjectStore
from everstep.store.parity import parse
from everstep.store.patience import Patience
from everstep.store.urls import open_store
from everstep.version import __version__

OK, WARN, MISSING = "ok", "warn", "missing"

_PROBE_BYTES = 16 * 1024 * 1024
_LITTLE_ROOM_BYTES = 10 * 1000**3
_LITTLE_SHARED_BYTES = 64 * 1000**2
_TORCH_DEADLINE_S = 120
_STORE_S = 10.0
"""So long a store is tried that does not answer."""

_OVER_A_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "lustre", "beegfs", "glusterfs", "ceph"}
)
_PACKAGES = ("blake3", "zstandard", "msgspec")
_TO_TRAIN = "training needs it; log, show, verify and export do not"

_ASK_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if cuda else []
print(json.dumps([str(torch.__version__), names]))
"""


@dataclass(frozen=True)
class Line:
    """One thing that was looked at. `status` is `ok`, `warn` (Everstep works, and something is worth knowing)
    or `missing` (Everstep does not work with it)."""

    name: str
    status: str
    value: str
    hint: str = ""


def examine(place: str) -> Iterator[Line]:
    """Look at everything, one line at a time.

    Writes and deletes a small probe at `place`, a directory or a URL; where a directory is not there yet, in
    the nearest above it. Blocks on the disk or the network, and while torch is imported by a process of its
    own.
    """
    yield Line("everstep", OK, __version__)
    yield _python()
    yield from _packages()
    yield from _torch()
    yield Line("CPUs", OK, str(_cpus()))
    yield _shared_memory()
    place = place.removeprefix("file://")
    yield from _place(place)


def _place(place: str) -> Iterator[Line]:
    if place.startswith("parity:"):
        try:
            members = parse(place)[1]
            open_store(place)
        except EverstepError as error:
            yield Line("parity set", MISSING, error.problem, error.next)
            return
        yield Line("parity set", OK, place)
        for member in members:
            yield from _place(member)
    else:
        yield from _bucket(place) if "://" in place else _directory(Path(place))


def _directory(path: Path) -> Iterator[Line]:
    place = _nearest(path)
    there = place == path.expanduser().absolute()
    yield Line("path", OK, str(place) if there else f"{path} (not there yet; {place} is looked at)")
    yield _file_system(place)
    yield _room(place)
    yield from _probes(place)


def _bucket(url: str) -> Iterator[Line]:
    """Whether a store over the network answers, lets us write, and refuses to overwrite."""
    yield Line("store", OK, url)
    begun = time.perf_counter()
    try:
        store = open_store(url, patience=Patience(deadline_s=_STORE_S))
        if isinstance(store, ObjectStore):
            store.unsafe_single_writer = False  # Whether somebody insists or not: what can it do?
        assert isinstance(store, Probing)
        store.probe()
    except Unsupported as error:
        yield Line("exclusive put", MISSING, "no", error.problem)
    except EverstepError as error:
        yield Line("answers", MISSING, error.problem, error.next)
    else:
        took_ms = (time.perf_counter() - begun) * 1e3
        yield Line("exclusive put", OK, f"yes (a probe took {took_ms:.0f} ms)")


def _python() -> Line:
    known = sys.version_info >= (3, 10)
    hint = "" if known else "Everstep needs Python 3.10 or newer"
    return Line("python", OK if known else MISSING, f"{platform.python_version()} ({sys.executable})", hint)


def _packages() -> Iterator[Line]:
    for name in _PACKAGES:
        try:
            yield Line(name, OK, version(name))
        except PackageNotFoundError:
            yield Line(name, MISSING, "not installed", f"pip install {name}")
    try:
        yield Line("numpy", OK, version("numpy"))
    except PackageNotFoundError:
        yield Line("numpy", WARN, "not installed", _TO_TRAIN)


def _torch() -> Iterator[Line]:
    """torch is asked in a process of its own: it takes seconds, and one that is broken may not come back."""
    if importlib.util.find_spec("torch") is None:
        yield Line("torch", WARN, "not installed", _TO_TRAIN)
        return
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=_TORCH_DEADLINE_S
        )
        found, devices = json.loads(done.stdout.strip().rpartition("\n")[2])
    except (subprocess.TimeoutExpired, OSError, ValueError):
        yield Line("torch", WARN, "installed, and does not start", 'see why: python -c "import torch"')
        return
    yield Line("torch", OK, found)
    yield Line("CUDA devices", OK, ", ".join(devices) or "none")


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shared_memory() -> Line:
    try:
        facts = os.statvfs("/dev/shm")
    except OSError:
        return Line("shared memory", WARN, "/dev/shm is not there", "loader workers need it")
    total, free = facts.f_frsize * facts.f_blocks, facts.f_frsize * facts.f_bavail
    enough = total > _LITTLE_SHARED_BYTES
    hint = "" if enough else "loader workers need more: docker run --shm-size=8g"
    return Line("shared memory", OK if enough else WARN, f"{size(total)}, {size(free)} free", hint)


# -- the directory -----------------------------------------------------------------------------------------


def _nearest(path: Path) -> Path:
    """The directory itself, or the one above it that is there."""
    path = path.expanduser().absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def _file_system(path: Path) -> Line:
    kind = file_system(path)
    hint = ""
    if kind == "tmpfs":
        hint = "its files are gone when the machine stops"
    elif kind in _OVER_A_NETWORK:
        hint = "a local disk is faster and safer"
    return Line("file system", WARN if hint else OK, kind, hint)


def file_system(path: Path) -> str:
    """The type of the file system that a directory is on, `unknown` where the system does not say."""
    best, found = "", "unknown"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return found
    where = path.resolve()
    for line in mounts:
        before, separator, after = line.partition(" - ")
        if not separator or len(before.split()) < 5:
            continue
        point = before.split()[4].replace("\\040", " ")
        if len(point) >= len(best) and (where == Path(point) or Path(point) in where.parents):
            best, found = point, after.split()[0]
    return found


def _room(path: Path) -> Line:
    free = shutil.disk_usage(path).free
    enough = free >= _LITTLE_ROOM_BYTES
    return Line(
        "free space", OK if enough else WARN, size(free), "" if enough else "that is not much for a chain"
    )


def _probes(path: Path) -> Iterator[Line]:
    try:
        with _scratch(path) as directory:
            yield _direct(directory)
            yield _links(directory)
            yield _rate(directory)
    except OSError as error:
        hint = "a chain needs a directory that can be written to"
        yield Line("writing", MISSING, os.strerror(error.errno or 0), hint)


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    directory = path / f".everstep-doctor-{secrets.token_hex(6)}"
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _direct(directory: Path) -> Line:
    """Whether files can be written past the page cache."""
    block = mmap.mmap(-1, mmap.PAGESIZE)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_DIRECT", 0)
    try:
        if not hasattr(os, "O_DIRECT"):
            raise OSError
        descriptor = os.open(directory / "direct", flags)
        try:
            os.write(descriptor, block)
        finally:
            os.close(descriptor)
    except OSError:
        return Line("O_DIRECT", WARN, "no", "snapshots go through the page cache, which is slower")
    return Line("O_DIRECT", OK, "yes")


def _links(directory: Path) -> Line:
    (directory / "one").touch()
    try:
        os.link(directory / "one", directory / "two")
    except OSError as error:
        return Line(
            "hard links", MISSING, os.strerror(error.errno or 0), "a commit needs them: choose another disk"
        )
    return Line("hard links", OK, "yes")


def _rate(directory: Path) -> Line:
    data = os.urandom(_PROBE_BYTES)
    begun = time.perf_counter()
    descriptor = os.open(directory / "rate", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        rest = memoryview(data)
        while len(rest):
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    seconds = time.perf_counter() - begun
    return Line("durable writes", OK, f"{size(_PROBE_BYTES / seconds)}/s ({size(_PROBE_BYTES)} and an fsync)")
