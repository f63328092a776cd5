"""The commit of a snapshot of thousands of ranks, on a clock of its own: the real writers and part records,
over a store in memory that counts requests, takes its time, refuses when it is asked too often, and shows an
object only from when it was put.

    python -m bench.ranks --ranks 16384

Ranks other than 0 read nothing of each other, so that each lives its take through before the next one does,
each on its own clock; what rank 0 sees of them is what was there by its clock. Nobody waits for real time.
"""

from __future__ import annotations

import argparse
import bisect
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from unittest import mock

from everstep.chain import lease, parts
from everstep.chain.encoding import Always
from everstep.chain.history import Chain, Snapshot
from everstep.chain.lease import Lease
from everstep.chain.parts import Take
from everstep.chain.writer import Captured, Facts, Writer
from everstep.errors import NotFound, Unavailable
from everstep.format import manifest, record, values
from everstep.format.chunk import Encoding
from everstep.format.layout import Slice, lay_out
from everstep.format.values import Leaf
from everstep.store.base import Buffer, Entry
from everstep.store.patience import Clock, Patience, tries
from everstep.testing.faults import Died

PAGE = 1000
"""Keys on a page of a listing, and in a request that deletes."""

AT_ONCE = 16
"""Reads of small objects, as from a bucket."""

SHARD_BYTES = 64
"""Of a rank: what is counted is requests, not bytes."""


@dataclass
class Setting:
    """How the world is. Times are in seconds.

    Attributes:
        latency_s: a request takes so long, and up to twice as long.
        per_second: so many requests of all together are answered in a second; others are told to slow down.
        store_s: so long a rank takes to store its part, and up to twice as long.
        slow: the share of ranks that take `slow_times` as long.
        dying: the share that die in a take, each at a request chosen at random.
        apart_s: within so much all begin: they do not stand at the same step at the same instant.
    """

    ranks: int = 4096
    seed: int = 1
    latency_s: float = 0.03
    per_second: int = 3500
    store_s: float = 10.0
    slow: float = 0.01
    slow_times: float = 6.0
    dying: float = 0.0
    apart_s: float = 2.0
    deadline_s: float = 600.0


class Objects:
    """What all see of the store, each by its own clock."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.sorted: dict[str, list[str]] = defaultdict(list)
        self.answered: Counter[str] = Counter()
        self.seconds: Counter[int] = Counter()


class View:
    """The store as one process has it: a verb moves its clock on. `dies_at` is the number of a request."""

    def __init__(self, objects: Objects, name: str, seed: int, dies_at: int | None = None) -> None:
        self.url = f"memory://{name}"
        self.now = 0.0
        self.answered: Counter[str] = Counter()
        self.refused = 0
        self.dies_at = dies_at
        self._objects = objects
        self._rng = random.Random(seed)
        self._clock = Clock(lambda: self.now, self.sleep, self._rng.random)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def _ask(self, verb: str, key: str, requests: int = 1) -> None:
        if self.dies_at is not None and self.answered.total() >= self.dies_at:
            raise Died
        # Who reads many small objects asks for several at once.
        latency_s = self._objects.setting.latency_s / (AT_ONCE if verb == "get" else 1)
        for _ in range(requests):
            self._request(latency_s)
        what = f"{verb} {key.partition('/')[0]}"
        self.answered[what] += requests
        self._objects.answered[what] += requests

    def _request(self, latency_s: float) -> None:
        setting = self._objects.setting
        for _ in tries(Patience(), self._clock):
            self.now += latency_s * (1 + self._rng.random())
            second = int(self.now)
            if self._objects.seconds[second] < setting.per_second:
                self._objects.seconds[second] += 1
                return
            self.refused += 1
        raise Unavailable(f"{self.url} is asked too often", away=True)

    def _there(self, key: str) -> bytes | None:
        data, since = self._objects.objects.get(key, (None, 0.0))
        return data if since <= self.now else None

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        self._ask("put", key)
        if self._there(key) is not None:
            return False
        if key not in self._objects.objects:
            bisect.insort(self._objects.sorted[key.partition("/")[0]], key)
        self._objects.objects[key] = (b"".join(parts), self.now)
        return True

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        self._ask("get", key)
        data = self._there(key)
        if data is None:
            raise NotFound(f"there is no {key}", key=key)
        return data[start:] if size_bytes is None else data[start : start + size_bytes]

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        raise NotImplementedError

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[Entry]:
        found = self._objects.sorted[prefix.partition("/")[0]] if prefix else sorted(self._objects.objects)
        begin = bisect.bisect_left(found, prefix)
        keys_there = []
        for key in found[begin:]:
            if not key.startswith(prefix):
                break
            if self._objects.objects[key][1] <= self.now:
                keys_there.append(key)
            if limit is not None and len(keys_there) == limit:
                break
        self._ask("list", prefix, 1 + len(keys_there) // PAGE)
        for key in keys_there:
            data, since = self._objects.objects[key]
            yield Entry(key, len(data), since)

    def delete(self, key: str) -> None:
        self.clear([key])

    def clear(self, keys: Sequence[str]) -> None:
        if keys:
            self._ask("delete", keys[0], -(-len(keys) // PAGE))
        for key in keys:
            if self._objects.objects.pop(key, None) is not None:
                self._objects.sorted[key.partition("/")[0]].remove(key)


@dataclass
class Took:
    """What became of a take. Requests are those that were answered: of the rank with the most, of rank 0, and
    of all by kind; `refused` are those to which the store said to ask later. `late_s`: how long after the
    last part was there rank 0 had committed."""

    committed: bool
    dead: int
    why: str = ""
    of_a_rank: int = 0
    of_rank_0: int = 0
    requests: dict[str, int] = field(default_factory=dict)
    refused: int = 0
    last_part_s: float = 0.0
    late_s: float = 0.0


class Job:
    """The ranks of a training, started with `start` and again after some have died."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.objects = Objects(setting)
        self.now = 0.0
        self._rng = random.Random(setting.seed)
        self.views: dict[int, View] = {}
        self.writers: dict[int, Writer] = {}
        self.number = 0
        self.start()

    def start(self) -> None:
        """All that are not there begin, rank 0 with a lease of its own."""
        for rank in range(self.setting.ranks):
            if rank not in self.writers:
                self._begin(rank)

    def _begin(self, rank: int) -> None:
        view = self.views[rank] = View(self.objects, "ranks", self._rng.randrange(1 << 30))
        view.now = self.now
        chain = Chain.create(view)
        if rank == 0:
            # As on another machine: nobody can tell whether the one before is dead.
            with mock.patch.object(lease, "_lives", return_value=False):
                self.lease = Lease.take(view)
            head = chain.head()
            self.parent = head.id if head is not None else ""
        mine = Lease(view, self.lease.number)
        self.writers[rank] = Writer(
            chain, mine, parent=self.parent, encodings=Always(Encoding.RAW), cores=lambda: 1
        )

    def die(self, rank: int) -> None:
        self.writers.pop(rank, None)

    def take(self, step: int, dying: dict[int, int] | None = None) -> Took:
        """One take, with a part of each rank. `dying`: at which request of the take a rank dies; the share in
        the setting, unless given."""
        setting, rng = self.setting, self._rng
        if dying is None:
            count = round(setting.dying * setting.ranks)
            dying = {rank: rng.randrange(3) for rank in rng.sample(range(1, setting.ranks), count)}
        self.number += 1
        take = Take("main", self.lease.number, self.number)
        self.objects.seconds.clear()
        self.objects.answered.clear()
        before, slow = self.now, set(rng.sample(range(setting.ranks), round(setting.slow * setting.ranks)))
        begun: dict[int, float] = {rank: before + rng.random() * setting.apart_s for rank in self.writers}
        ready, dead = before, []
        for rank in sorted(self.writers, key=begun.__getitem__):
            view = self.views[rank]
            view.now, view.dies_at = begun[rank], dying.get(rank)
            view.answered.clear()
            view.refused = 0
            view.sleep(setting.store_s * (1 + rng.random()) * (setting.slow_times if rank in slow else 1))
            try:
                part = self.writers[rank].store_part(
                    _captured(rank, setting.ranks, step), rank, setting.ranks
                )
                parts.announce(self.writers[rank].chain, take, part)
                ready = max(ready, view.now)
            except Died:
                dead.append(rank)
        found = Took(False, 0, last_part_s=ready - before)
        found.of_a_rank = max(self.views[rank].answered.total() for rank in self.writers if rank)
        zero = self.views[0]
        zero.now = max(zero.now, begun[0])
        try:
            self._commit(take, step)
            found.committed, found.late_s = True, zero.now - ready
        except Unavailable as error:
            found.why = error.problem
        except Died:
            dead.append(0)
        found.of_rank_0, found.requests = zero.answered.total(), dict(self.objects.answered)
        found.dead = len(dead)
        found.refused = sum(view.refused for view in self.views.values())
        self.now = max(view.now for view in self.views.values())
        for rank in dead:
            self.die(rank)
        return found

    def _commit(self, take: Take, step: int) -> Snapshot:
        zero, chain = self.views[0], self.writers[0].chain
        found = parts.gather(
            chain, take, self.setting.ranks, self.setting.deadline_s, lambda: zero.now, zero.sleep
        )
        snapshot = self.writers[0].commit(found, Facts(step=step))
        with suppress(Unavailable):
            parts.clear(chain, take)
        return snapshot

    def head(self) -> Snapshot | None:
        view = View(self.objects, "ranks", 0)
        view.now = self.now
        return Chain(view).head()


def _captured(rank: int, ranks: int, step: int) -> Captured:
    layout = lay_out(
        [Slice("model/w", "uint8", (ranks * SHARD_BYTES,), (rank * SHARD_BYTES,), (SHARD_BYTES,))]
    )
    memory = bytearray(layout.arena_bytes)
    memory[:16] = rank.to_bytes(8, "little") + step.to_bytes(8, "little")
    tree = {"objects": {"model": {"w": Leaf("model/w")}}, "run": {"progress": {"step": step}}}
    return Captured.whole(layout, memoryview(memory), values.encode(tree))


# -- sizes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """In bytes, of the objects of a snapshot of so many ranks; and how many requests it takes."""

    ranks: int
    record: int
    head: int
    part_record: int
    part_records: int
    restore_gets: int
    listing_pages: int


def sizes(ranks: int) -> Sizes:
    """By encoding such objects."""
    digest = "ab" * 32
    facts = {"loss": 2.345678, "lr": 0.0003}
    made = record.SnapshotRecord(
        format=manifest.SEVERAL, step=123_456, epoch=3, state=digest, manifests=(digest,) * ranks,
        taken_at="2026-01-02T03:04:05.678901+00:00", branch="main", writer=7, parents=(digest,),
        metrics=facts,
        logical_bytes=1 << 44, new_bytes=1 << 44, stored_bytes=1 << 44,
    )  # fmt: skip
    head = record.HeadRecord(digest, 123_456, 7, "0" * 16, made.taken_at, "main", number=1234, format=3)
    part = record.PartRecord(
        "main",
        7,
        1234,
        ranks - 1,
        ranks,
        digest,
        digest,
        "0" * 16,
        made.taken_at,
        "",
        1 << 30,
        1 << 30,
        1 << 30,
    )
    one = len(record.seal(part))
    return Sizes(
        ranks,
        len(record.encode(made)),
        len(record.seal(head)),
        one,
        one * ranks,
        2 + ranks,
        -(-ranks // PAGE),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ranks", description=__doc__)
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--dying", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args(arguments)
    job = Job(Setting(chosen.ranks, chosen.seed))
    print(json.dumps({"calm": asdict(job.take(1))}))
    job.setting.dying = chosen.dying
    print(json.dumps({"some die": asdict(job.take(2))}))
    job.setting.dying = 0.0
    job.start()
    print(json.dumps({"started again": asdict(job.take(3))}))
    head = job.head()
    print(json.dumps({"head": head.step if head else None, "sizes": asdict(sizes(chosen.ranks))}))
    return 0 if head is not None and head.step == 3 else 1


if __name__ == "__main__":
    raise SystemExit(main())
