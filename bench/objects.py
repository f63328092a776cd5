"""Packs to and from a Ceph object gateway, beside bare obstore with the same objects: what the deadline, the
settling of lost answers and reading into given memory cost.
"""

from __future__ import annotations

import mmap
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.servers import ceph

from bench.measure import ratios, summary
from bench.setting import Setting, tell
from everstep.store import cloud
from everstep.store.base import Store
from everstep.store.objects import ObjectStore
from everstep.store.patience import Patience

BUCKET = "bench"
OURS = "everstep"
READERS = 4
"""So many threads read, as a restore on this machine does."""

_GIB = 1 << 30
_PIECE = 8 << 20


def measure(setting: Setting) -> dict[str, Any]:
    missing = ceph.missing()
    if missing:
        return {"not measured": f"Ceph is not installed (no {', '.join(missing)}): make servers"}
    # What is deleted stays in its memory for two hours, so all repetitions together must find room there.
    count, pack_bytes = (4, 64 << 20) if setting.is_full else (2, 36 << 20)
    with _gateway() as store, _Bucket(store, count, pack_bytes) as packs:
        return rounds(setting, "objects", packs)


def rounds(setting: Setting, name: str, packs: Packs) -> dict[str, Any]:
    """The figures of both, turn by turn."""
    found: dict[str, list[tuple[float, float]]] = {
        f"{who} {what}": [] for who in packs.systems for what in packs.verbs
    }
    for repetition in range(setting.repetitions + 1):
        tell(f"{name}, repetition {repetition} of {setting.repetitions}, the first is not counted")
        for who in packs.systems[:: 1 if repetition % 2 else -1]:
            for what, timed in packs.turn(who).items():
                if repetition:
                    found[f"{who} {what}"].append(timed)
    return _figures(found, packs)


def _figures(found: dict[str, list[tuple[float, float]]], packs: Packs) -> dict[str, Any]:
    gib = packs.size_bytes / _GIB
    rates = {name: [gib / seconds for seconds, _ in one] for name, one in found.items()}
    return {
        "packs": packs.count,
        "pack_bytes": packs.pack_bytes,
        "GiB_per_s": {name: summary(one) for name, one in rates.items()},
        "cpu_s_per_GiB": {name: summary([cpu / gib for _, cpu in one]) for name, one in found.items()},
        f"ours / {packs.bare}": {
            what: ratios(rates[f"{OURS} {what}"], rates[f"{packs.bare} {what}"]) for what in packs.verbs
        },
    }


@contextmanager
def _gateway() -> Iterator[ObjectStore]:
    """A fresh gateway that keeps all in memory, and a store there, for as long as the block lasts."""
    directory = Path(tempfile.mkdtemp(prefix="ceph-", dir="/tmp"))
    before = dict(os.environ)
    try:
        with ceph.running(directory) as server:
            os.environ.update(server.variables())
            server.make_bucket(BUCKET)
            yield ObjectStore(f"s3://{BUCKET}/packs")
    finally:
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(directory, ignore_errors=True)


class Packs:
    """The same bytes for both, in memory as the keeper has them; each turn leaves nothing behind.

    Attributes:
        bare: what is compared with; `put_bare` and `get_bare` are its.
    """

    bare = ""
    verbs = ("put", "get")

    def __init__(self, store: Store, count: int, pack_bytes: int) -> None:
        self.count = count
        self.pack_bytes = pack_bytes
        self.size_bytes = count * pack_bytes
        self.systems = (OURS, self.bare)
        self.source = mmap.mmap(-1, pack_bytes)
        self.source.write(os.urandom(1 << 20) * (pack_bytes >> 20))
        self._store = store
        self._targets = [mmap.mmap(-1, pack_bytes) for _ in range(READERS)]
        for target in self._targets:
            target.write(b"\x01" * pack_bytes)

    def __enter__(self) -> Packs:
        return self

    def __exit__(self, *_: object) -> None:
        for one in (self.source, *self._targets):
            one.close()

    def put_bare(self, name: str) -> None:
        raise NotImplementedError

    def get_bare(self, name: str) -> int:
        """Read all of it; returns how many bytes."""
        raise NotImplementedError

    def delete(self, names: list[str]) -> None:
        for name in names:
            self._store.delete(name)

    def turn(self, who: str) -> dict[str, tuple[float, float]]:
        """(seconds, CPU-seconds) of each verb over all packs."""
        names = [secrets.token_hex(32) for _ in range(self.count)]
        put, get = (self._put, self._get) if who == OURS else (self.put_bare, self._get_bare)
        try:
            return {
                "put": _timed(lambda: list(map(put, names))),
                "get": _timed(lambda: self._in_threads(get, names)),
            }
        finally:
            self.delete(names)

    def _in_threads(self, get: Callable[[str, memoryview], None], names: list[str]) -> None:
        """Each thread has memory of its own, touched before."""
        with ThreadPoolExecutor(READERS) as threads:
            for number in range(0, len(names), READERS):
                several = names[number : number + READERS]
                list(threads.map(get, several, map(memoryview, self._targets)))

    def _put(self, name: str) -> None:
        with memoryview(self.source) as view:
            assert self._store.put(name, [view[at : at + _PIECE] for at in range(0, len(view), _PIECE)])

    def _get(self, name: str, target: memoryview) -> None:
        with target:
            assert self._store.read_into(name, 0, [target]) == self.pack_bytes

    def _get_bare(self, name: str, target: memoryview) -> None:
        target.release()
        assert self.get_bare(name) == self.pack_bytes


class _Bucket(Packs):
    bare = "obstore"

    def __init__(self, store: ObjectStore, count: int, pack_bytes: int) -> None:
        super().__init__(store, count, pack_bytes)
        self._bare = cloud.client(cloud.Address.parse(store.url), Patience(), 10)

    def put_bare(self, name: str) -> None:
        import obstore

        obstore.put(self._bare, name, self.source)

    def get_bare(self, name: str) -> int:
        import obstore

        return len(obstore.get(self._bare, name).bytes())


def _timed(action: Callable[[], object]) -> tuple[float, float]:
    begun, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - begun, time.process_time() - cpu
