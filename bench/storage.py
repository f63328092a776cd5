"""Bytes stored for one more snapshot: of the same state, of one that changed a little, of one that changed
everywhere; on the local disk and on a store that is slower than the encoder."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import everstep
from bench.measure import stored_bytes, summary
from bench.processes import Tree
from bench.setting import Setting, tell
from bench.states import STATES, State
from bench.systems import OURS, TORCH_SAVE, torch_save
from bench.worker import call
from everstep.run.session import Run
from everstep.store.base import Buffer, Entry
from everstep.store.local import LocalStore

SNAPSHOTS = 2
SLOW_BYTES_PER_SECOND = 60e6
SLOW = "dense, slow store"

# Name of the figure: the state, and whether it is trained a step between two snapshots.
CHANGES: dict[str, tuple[str, bool]] = {
    "identical": ("gpt2", False),
    "dense": ("gpt2", True),
    "LoRA": ("lora", True),
    "embeddings": ("recommender", True),
    SLOW: ("third_gpt2", True),
}


def measure(setting: Setting) -> dict[str, Any]:
    tree = Tree(f"{os.getpid()}-storage", str(setting.directory))
    found = {}
    for name in CHANGES:
        tell(f"storage: {name}")
        place = setting.place(name.replace(" ", "-").replace(",", ""))
        found[name] = call(tree, "bench.storage", "grow", name, str(place), setting.size, setting.tokens)
        shutil.rmtree(place)
    return found


def grow(name: str, directory: str, size: str, tokens: int) -> dict[str, Any]:
    """A first snapshot and some more, in all systems; what each further one adds to what is stored."""
    root = Path(directory)
    state_name, trained = CHANGES[name]
    state = STATES[state_name](size, tokens)
    state.step()
    file = root / "state.pt"
    systems = _systems(root, file, state, slow=name == SLOW)
    absent = {} if name == SLOW else _absent()
    stored: dict[str, list[int]] = {system: [] for system in systems}
    for _ in range(1 + SNAPSHOTS):
        torch_save(state, file)
        for system, (save, place) in systems.items():
            save()
            stored[system].append(stored_bytes(place))
        if trained:
            state.step()
    trained_bytes = state.trained_bytes() if state.trained_bytes else state.size_bytes
    return {
        "state_bytes": state.size_bytes,
        "trained_bytes": trained_bytes,
        "not measured": absent,
        "systems": {
            system: {
                "first_bytes": sizes[0],
                "further_bytes": summary(further(sizes)),
                "further / full": summary([one / state.size_bytes for one in further(sizes)]),
                "further / trained": summary([one / trained_bytes for one in further(sizes)]),
            }
            for system, sizes in stored.items()
        },
    }


def further(sizes: list[int]) -> list[int]:
    """What each save after the first has added."""
    return [after - before for before, after in itertools.pairwise(sizes)]


def _systems(
    root: Path, file: Path, state: State, slow: bool
) -> dict[str, tuple[Callable[[], object], Path]]:
    """By name: what stores the state once more, and where it does."""
    chain = root / "chain"
    store = Throttled(LocalStore(chain), SLOW_BYTES_PER_SECOND) if slow else chain
    run = everstep.open(store, **state.objects, every=None, keep="all")
    kept = root / "copies"
    kept.mkdir()
    found: dict[str, tuple[Callable[[], object], Path]] = {
        OURS: (lambda: _take(run), chain),
        TORCH_SAVE: (lambda: os.link(file, kept / str(len(os.listdir(kept)))), kept),
    }
    if slow:
        return found
    if shutil.which("restic"):
        found["restic"] = (_restic(root / "restic", file), root / "restic")
    if shutil.which("borg"):
        found["borg"] = (_borg(root / "borg", file), root / "borg")
    if _has_xet():
        # Beside its blocks of data it keeps caches and a growing index there: these are not counted.
        found["hf_xet"] = (lambda: _xet(root / "xet", file), root / "xet/xet/xorbs/xorbs")
    return found


def _absent() -> dict[str, str]:
    found = {
        name: f"not installed (apt-get install {package})"
        for name, package in (("restic", "restic"), ("borg", "borgbackup"))
        if not shutil.which(name)
    }
    return found if _has_xet() else {**found, "hf_xet": "not installed (pip install hf_xet)"}


def _take(run: Run) -> None:
    run.tick()
    run.take().durable()
    run.wait()  # What is durable is tidied up after: files come and go meanwhile.


def _restic(repository: Path, file: Path) -> Callable[[], object]:
    environment = {**os.environ, "RESTIC_PASSWORD": "bench", "RESTIC_CACHE_DIR": str(repository) + "-cache"}

    def restic(*arguments: str) -> None:
        subprocess.run(["restic", "-q", "-r", str(repository), *arguments], env=environment, check=True)

    restic("init")
    return lambda: restic("backup", str(file))


def _borg(repository: Path, file: Path) -> Callable[[], object]:
    environment = {**os.environ, "BORG_BASE_DIR": str(repository) + "-base"}

    def borg(*arguments: str) -> None:
        subprocess.run(["borg", *arguments], env=environment, check=True)

    borg("init", "-e", "none", str(repository))
    return lambda: borg("create", f"{repository}::{{now:%H%M%S%f}}", str(file))


def _has_xet() -> bool:
    try:
        import hf_xet  # noqa: F401
    except ImportError:
        return False
    return True


def _xet(place: Path, file: Path) -> None:
    """Into a store of its own in a directory, which takes no hub."""
    import hf_xet

    place.mkdir(exist_ok=True)
    hf_xet.upload_files([str(file)], f"local://{place}", None, None, None, None)


class Throttled:
    """A store that takes no more than so many bytes a second, as one at the other end of a network."""

    def __init__(self, store: LocalStore, bytes_per_second: float) -> None:
        self._store, self._rate = store, bytes_per_second
        self._lock = threading.Lock()
        self._due = 0.0

    @property
    def url(self) -> str:
        return self._store.url

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        with self._lock:  # Several at a time share it.
            due = self._due = max(self._due, time.monotonic()) + _size(parts) / self._rate
        done = self._store.put(key, parts)
        time.sleep(max(due - time.monotonic(), 0))
        return done

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        return self._store.get(key, start, size_bytes)

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        return self._store.read_into(key, start, buffers)

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[Entry]:
        return self._store.list(prefix, limit)

    def delete(self, key: str) -> None:
        self._store.delete(key)


def _size(parts: Sequence[Buffer]) -> int:
    return sum(memoryview(part).nbytes for part in parts)
