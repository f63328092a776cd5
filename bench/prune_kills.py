"""Prunes that repack, killed at random operations on a Ceph object gateway, with writers at work.

    python -m bench.prune_kills --kills 100 --seed 1 --json prune_kills.json

Each time a fresh chain gets some snapshots on two branches, which share a part of their chunks. Then two
writers go on committing, and a prune that gives up every pack of which anything is dead is killed at an
operation chosen at random, reads included. Whatever it was: all that is listed must come back bit for bit,
while the writers go on and another prune runs beside them; and once nobody is at work, one more prune must
leave nothing that no snapshot needs.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest import mock

from tests.servers import ceph

from everstep.chain import prune
from everstep.chain.history import Chain, Snapshot
from everstep.chain.lease import Lease
from everstep.chain.prune import Repack
from everstep.chain.reader import Reader, Target
from everstep.chain.relocations import Relocations
from everstep.chain.retention import Keep
from everstep.chain.verify import verify
from everstep.chain.writer import Captured, Facts, Writer
from everstep.format import keys, values
from everstep.format.layout import Slice, lay_out
from everstep.store.base import Store
from everstep.store.objects import ObjectStore
from everstep.testing.faults import READS, WRITES, Died, FaultyStore

LAST = Keep.parse("last 1")
ALWAYS = Repack(max_unused=0.0, worth_bytes=1)
GRID_BYTES = 16 * 1024
LEAVES = {"dense": 60_000, "moment": 40_000, "count": 100}
LAYOUT = lay_out([Slice(name, "uint8", (size,), (0,), (size,)) for name, size in LEAVES.items()])
BRANCHES = ("main", "other")
BEFORE, MEANWHILE = 3, 3
"""Snapshots of each branch."""


@dataclass
class Outcome:
    """What a campaign saw. `at` are the operations at which prunes were killed, of about `operations`."""

    kills: int = 0
    operations: int = 0
    at: list[int] = field(default_factory=list)
    through: int = 0
    deleted: int = 0
    copied_bytes: int = 0
    violations: list[str] = field(default_factory=list)


class World:
    """A chain with a writer on each of two branches; and what was committed."""

    def __init__(self, store: Store, rng: random.Random) -> None:
        self.store = store
        self.taken: dict[str, bytes] = {}
        chain = Chain.create(store, GRID_BYTES)
        # States come again: so writers share chunks with snapshots that are not the newest.
        state = bytearray(LAYOUT.arena_bytes)
        self._states = []
        for changed in (LEAVES, ("dense",), ("moment",)):
            for one, (region, offset) in zip(LAYOUT.slices, LAYOUT.places, strict=True):
                if one.name in changed:
                    begin = LAYOUT.regions[region].offset + offset
                    state[begin : begin + one.size_bytes] = rng.randbytes(one.size_bytes)
            self._states.append(bytes(state))
        self.writers = {name: Writer(chain, Lease.take(store, name), name) for name in BRANCHES}
        for step in range(BEFORE):
            for name in BRANCHES:
                self.take(name, step)

    def take(self, branch: str, step: int) -> None:
        state = self._states[step % len(self._states)]
        captured = Captured.whole(LAYOUT, memoryview(state), values.encode({"step": step}))
        self.taken[self.writers[branch].write(captured, Facts(step=step)).id] = state

    def at_work(self, first_step: int, failed: list[BaseException]) -> list[threading.Thread]:
        """Both writers, committing."""

        def work(name: str) -> None:
            try:
                for step in range(first_step, first_step + MEANWHILE):
                    self.take(name, step)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(name,)) for name in BRANCHES]
        for one in threads:
            one.start()
        return threads

    def listed(self) -> list[Snapshot]:
        chain = Chain(self.store)
        return [one for name in BRANCHES for one in chain.snapshots(name)]

    def check(self) -> None:
        chain = Chain(self.store)
        lost = [one for one in verify(chain).findings if one.snapshots]
        assert not lost, lost
        for name in BRANCHES:
            for point in chain.points(name):
                assert point.damage is None, point
        for one in self.listed():
            named = chain.manifest(one)
            got = bytearray(LAYOUT.arena_bytes)
            targets = [
                Target(number, 0, memoryview(got)[region.offset : region.offset + region.size_bytes])
                for number, region in enumerate(LAYOUT.regions)
            ]
            assert Reader(self.store).fill(named, targets) == []
            for region in LAYOUT.regions:
                part = slice(region.offset, region.offset + region.size_bytes)
                assert got[part] == self.taken[one.id][part], one.short

    def check_clean(self) -> None:
        """When nobody is at work any more."""
        chain = Chain(self.store)
        packs = {entry.key.rpartition("/")[2] for entry in self.store.list(keys.PACKS)}
        relocations = Relocations(self.store)
        relocations.look()
        needed: set[str] = set()
        for one in self.listed():
            needed |= {keys.snapshot(one.id), *map(keys.manifest, one.record.manifests)}
            for place in chain.manifest(one).places:
                moved = relocations.table.moved(place.pack, place.offset)
                there = next((spot for spot in moved if spot.pack in packs), None)
                needed |= {keys.pack(there.pack), there.key} if there else {keys.pack(place.pack)}
        kinds = (keys.SNAPSHOTS, keys.MANIFESTS, keys.PACKS, keys.RELOCATIONS)
        found = {entry.key for entry in self.store.list() if entry.key.startswith(kinds)}
        assert found == needed, found ^ needed


def pruned(store: Store, outcome: Outcome) -> None:
    for done in prune.prune(Chain(store), LAST, repack=ALWAYS):
        outcome.deleted += len(done.keys)
        outcome.copied_bytes += done.copied_bytes


def campaign(
    open_chain: Callable[[int], Store], kills: int, seed: int, tell: Callable[[str], None] = print
) -> Outcome:
    """So many prunes, each on a chain of its own.

    Args:
        open_chain: an empty place for the chain of this number.
    """
    outcome = Outcome()
    rng = random.Random(seed)
    # As if hours lay between any two things that happen: nothing is spared for being young.
    with mock.patch.object(prune, "GRACE_S", -10.0):
        outcome.operations = _operations(World(open_chain(0), rng), outcome)
        for number in range(1, kills + 1):
            at = rng.randrange(outcome.operations)
            world = World(open_chain(number), rng)
            try:
                _killed(world, at, outcome)
            except AssertionError as error:
                outcome.violations.append(f"killed at operation {at}: {error}")
            outcome.kills += 1
            outcome.at.append(at)
            if number % 10 == 0:
                tell(f"{number} of {kills} killed, {len(outcome.violations)} violations")
    return outcome


def _operations(world: World, outcome: Outcome) -> int:
    store = FaultyStore(world.store, verbs=READS | WRITES)
    pruned(store, outcome)
    world.check()
    return store.count


def _killed(world: World, at: int, outcome: Outcome) -> None:
    failed: list[BaseException] = []
    writers = world.at_work(BEFORE, failed)
    try:
        with suppress(Died):
            pruned(FaultyStore(world.store, at, verbs=READS | WRITES), outcome)
            outcome.through += 1
    finally:
        for one in writers:
            one.join()
    world.check()
    writers = world.at_work(BEFORE + MEANWHILE, failed)
    try:
        pruned(world.store, outcome)
    finally:
        for one in writers:
            one.join()
    assert not failed, failed
    world.check()
    for writer in world.writers.values():
        writer.lease.release()
    pruned(world.store, outcome)
    world.check()
    world.check_clean()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="OUT", help="where the figures go, too")
    chosen = parser.parse_args(arguments)
    directory = Path(tempfile.mkdtemp(prefix="ceph-", dir="/tmp"))
    try:
        with ceph.running(directory) as server, mock.patch.dict("os.environ", server.variables()):
            name = server.make_bucket("prunes")
            outcome = campaign(
                lambda number: ObjectStore(f"s3://{name}/{number}"),
                chosen.kills,
                chosen.seed,
                lambda line: print(line, file=sys.stderr, flush=True),
            )
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    text = json.dumps(asdict(outcome), indent=1)
    print(text)
    if chosen.json:
        Path(chosen.json).write_text(text + "\n")
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())
