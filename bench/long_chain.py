"""A chain of ten thousand snapshots, in a directory and on a Ceph object gateway: what it takes to find its
head, to list the newest, to plan a prune.

    python -m bench.long_chain --snapshots 10000 --on directory --on ceph --json long_chain.json

Each snapshot has a head record, a record, a manifest and a pack of its own, and shares a pack with all; the
packs hold nothing. Commands are run as a user runs them, in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
from tests.servers import ceph

from everstep.chain.history import Chain
from everstep.chain.lease import Lease
from everstep.chain.writer import Captured, Facts, Writer
from everstep.format import keys, manifest, record, values
from everstep.format.chunk import digest
from everstep.format.layout import Slice, lay_out
from everstep.format.record import HeadRecord
from everstep.store.memory import MemoryStore
from everstep.store.parallel import in_parallel
from everstep.store.urls import open_store
from everstep.testing.faults import READS, FaultyStore

POLICY = "last 3, hourly 24, daily 7, weekly 4, every 1000 steps, best loss 2, tags"
LEAVES = 200
BEGUN = datetime(2024, 5, 6, tzinfo=timezone.utc)
PUTS_AT_ONCE = 32


def objects(count: int) -> Iterator[tuple[str, bytes]]:
    """The keys and bytes of all objects of such a chain."""
    layout = lay_out([Slice(f"model/{number}", "float32", (64,), (0,), (64,)) for number in range(LEAVES)])
    store = MemoryStore()
    writer = Writer(Chain.create(store), Lease.take(store))
    arena = Captured.whole(layout, memoryview(bytearray(layout.arena_bytes)), values.encode({}))
    environment = {f"argument {number}": "x" * 40 for number in range(20)}
    first = writer.write(arena, Facts(step=0, environment=environment))
    writer.lease.release()
    model = writer.chain.manifest(first)
    for entry in store.list():
        yield entry.key, bytes(store.get(entry.key))
    for number in range(2, count + 1):
        pack = digest(f"pack {number}".encode())
        yield keys.pack(pack), b"\0"
        frame = manifest.encode(msgspec.structs.replace(model, packs={**model.packs, pack: 4096}))
        yield keys.manifest(digest(frame)), frame
        taken = (BEGUN + timedelta(minutes=7 * number)).isoformat(timespec="microseconds")
        made = record.encode(
            msgspec.structs.replace(
                first.record,
                step=10 * number,
                manifests=(digest(frame),),
                taken_at=taken,
                metrics={"loss": 1000.0 / number},
            )
        )
        yield keys.snapshot(digest(made)), made
        head = HeadRecord(digest(made), 10 * number, 1, "00", taken, "main", number=number)
        yield head.key, record.seal(head)


def fill(url: str, made: Iterable[tuple[str, bytes]]) -> None:
    if "://" not in url:
        for key, data in made:
            place = Path(url) / key
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
        return
    store = open_store(url)
    rest = iter(made)
    # Some at a time: what this process has held counts as held by those that it starts.
    while some := list(islice(rest, 1000)):
        in_parallel(some, PUTS_AT_ONCE, lambda: lambda one: store.put(one[0], [one[1]]))


def figures(url: str, count: int) -> dict[str, Any]:
    store = FaultyStore(open_store(url), verbs=READS)
    begun = time.perf_counter()
    chain = Chain(store)
    number = chain.head_number()
    key = keys.numbered(keys.head("main"), number)
    head = record.unseal(store.get(key), HeadRecord, key)
    found_s, found = time.perf_counter() - begun, store.count
    assert head.step == 10 * count
    chain.snapshot(head.snapshot)
    return {
        "find the head": {"seconds": round(found_s, 4), "requests": found},
        "and its record": {
            "seconds": round(time.perf_counter() - begun, 4),
            "requests": store.count,
        },
        "log -n 20": command(url, "log", "-n", "20"),
        "prune --dry-run --no-repack": command(url, "prune", "--dry-run", "--no-repack", "--keep", POLICY),
        "prune --dry-run": command(url, "prune", "--dry-run", "--keep", POLICY),
    }


def command(url: str, *arguments: str) -> dict[str, float]:
    """A command's wall-clock and processor seconds, and the most memory it had."""
    asked = [sys.executable, "-m", "everstep", "-r", url, *arguments]
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        child = subprocess.Popen(asked, stdout=out)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(asked)} ended with {child.returncode}")
    return {
        "seconds": round(time.perf_counter() - begun, 2),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
        "peak_MB": round(used.ru_maxrss * 1024 / 1e6),
    }


@contextmanager
def directory() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="everstep-long-") as place:
        yield f"{place}/chain"


@contextmanager
def gateway() -> Iterator[str]:
    place = Path(tempfile.mkdtemp(prefix="ceph-", dir="/tmp"))
    try:
        with ceph.running(place) as server, mock.patch.dict("os.environ", server.variables()):
            yield f"s3://{server.make_bucket('long')}/chain"
    finally:
        shutil.rmtree(place, ignore_errors=True)


WHERE: dict[str, Callable[[], Any]] = {"directory": directory, "ceph": gateway}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--snapshots", type=int, default=10_000)
    parser.add_argument("--on", choices=WHERE, action="append")
    parser.add_argument("--json", metavar="OUT", help="where the figures go, too")
    chosen = parser.parse_args(arguments)
    found: dict[str, Any] = {"snapshots": chosen.snapshots}
    for name in chosen.on or WHERE:
        with WHERE[name]() as url:
            begun = time.perf_counter()
            fill(url, objects(chosen.snapshots))
            print(f"{name}: filled in {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
            found[name] = figures(url, chosen.snapshots)
    text = json.dumps(found, indent=1)
    print(text)
    if chosen.json:
        Path(chosen.json).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
