"""States without tensors, handed over to keepers, and read back; imported by processes that have no torch."""

from __future__ import annotations

import random
import select
import time
from collections.abc import Callable
from pathlib import Path

from everstep.chain.history import Chain, Snapshot
from everstep.chain.lease import Lease
from everstep.chain.reader import Reader, Target
from everstep.chain.writer import Facts
from everstep.format import values
from everstep.format.chunk import aligned
from everstep.format.layout import Layout, Slice, lay_out
from everstep.format.manifest import Manifest
from everstep.keeper.base import Job, Keeper, Terms
from everstep.store.base import Store

GRID_BYTES = 16 * 1024
DEADLINE_S = 120.0


def laid(floats: int = 300_000) -> Layout:
    """A region of its own and a shared one."""
    shapes = {"large": (floats,), "small": (3, 5), "count": ()}
    return lay_out(
        [Slice(name, "float32", shape, (0,) * len(shape), shape) for name, shape in shapes.items()]
    )


def laid_of(rank: int, ranks: int, floats: int = 100_000) -> Layout:
    """One rank's part: its rows of a leaf, a leaf of its own, and one that all have and the first stores."""
    slices = [
        Slice("rows", "float32", (ranks * floats,), (rank * floats,), (floats,)),
        Slice(f"~rank/{rank}/own", "float32", (7,), (0,), (7,)),
    ]
    if rank == 0:
        slices.append(Slice("first", "float32", (50,), (0,), (50,)))
    return lay_out(slices)


LAYOUT = laid()


def state(seed: int, layout: Layout = LAYOUT) -> bytes:
    """The bytes of an arena."""
    made = bytearray(layout.arena_bytes)
    for one, (number, offset) in zip(layout.slices, layout.places, strict=True):
        start = layout.regions[number].offset + offset
        named = f"{seed} {one.name}" + (f" from {one.at}" if any(one.at) else "")
        made[start : start + one.size_bytes] = random.Random(named).randbytes(one.size_bytes)
    return bytes(made)


def job_of(step: int, layout: Layout = LAYOUT, take: int = 0) -> Job:
    job = Job(layout, Facts(step=step, begun=time.monotonic()), values.encode({"step": step}), take=take)
    job.pending.begun = True
    return job


def hand_over(keeper: Keeper, step: int, layout: Layout = LAYOUT, *, end: bool = True, take: int = 0) -> Job:
    """A snapshot whose state is that of seed `step`, as one wave."""
    arena = keeper.arena(layout.arena_bytes, wait=True)
    assert arena is not None
    arena.memory[: layout.arena_bytes] = state(step, layout)
    job = job_of(step, layout, take)
    keeper.submit(job)
    keeper.wave(job, arena, 0, layout.arena_bytes, frozenset())
    if end:
        keeper.end(job)
    return job


def begun(keeper: Keeper, chain: Chain, parent: str = "", keep: str = "all") -> Lease:
    lease = Lease.take(chain.store)
    keeper.begin(Terms("main", lease.number, parent, keep))
    return lease


def stored(chain: Chain, snapshot: Snapshot) -> bytes:
    """What an arena would hold of a snapshot, read from the store and verified."""
    return read_back(chain, snapshot, chain.manifest(snapshot))


def read_back(chain: Chain, snapshot: Snapshot, manifest: Manifest) -> bytes:
    """The same of one of its manifests, or of all joined."""
    assert manifest.tree == {"step": snapshot.step}
    return filled(chain.store, manifest)


def filled(store: Store, manifest: Manifest) -> bytes:
    made = bytearray(sum(aligned(region.size_bytes) for region in manifest.regions))
    targets, at = [], 0
    for number, region in enumerate(manifest.regions):
        targets.append(Target(number, 0, memoryview(made)[at : at + region.size_bytes]))
        at += aligned(region.size_bytes)
    assert Reader(store).fill(manifest, targets) == []
    return bytes(made)


def assert_stored(path: Path | str, steps: list[int], layout: Layout = LAYOUT) -> None:
    """The chain has a snapshot of just these steps, newest first, each whole and once."""
    chain = Chain(path)
    points = list(chain.points())
    assert [point.damage for point in points] == [None] * len(points)
    assert [point.head.step for point in points if point.head] == steps
    for snapshot in chain.snapshots():
        assert stored(chain, snapshot) == state(snapshot.step, layout)


def assert_joined(path: Path | str | Store, steps: list[int], ranks: int) -> None:
    """The chain has a snapshot of all ranks of just these steps, newest first, each whole and once."""
    chain = Chain(path)
    assert [snapshot.step for snapshot in chain.snapshots()] == steps
    for snapshot in chain.snapshots():
        assert len(snapshot.record.manifests) == ranks
        chain.manifest(snapshot)
        for rank, manifest in enumerate(chain.manifests(snapshot)):
            assert read_back(chain, snapshot, manifest) == state(snapshot.step, laid_of(rank, ranks))


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that tells nobody."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        select.select([], [], [], 0.005)
