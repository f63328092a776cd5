"""States that several ranks hold, and worlds of writers that store them, without trainers and processes."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from making import GRID_BYTES

from everstep.chain import parts, prune
from everstep.chain.census import Census
from everstep.chain.encoding import Always
from everstep.chain.history import Chain, Snapshot
from everstep.chain.lease import Lease
from everstep.chain.parts import Part, Take
from everstep.chain.reader import Reader, Target
from everstep.chain.retention import Keep
from everstep.chain.writer import Captured, Facts, Writer
from everstep.format import values
from everstep.format.chunk import Encoding
from everstep.format.layout import Box, Layout, Slice, lay_out
from everstep.format.manifest import Manifest
from everstep.format.values import Leaf
from everstep.store.base import Store

Array = np.ndarray[Any, Any]
SHAPES: dict[str, tuple[int, ...]] = {
    "sharded": (12, 1024),
    "grid": (8, 90),
    "bias": (5000,),
    "frozen": (30_000,),
    "empty": (0, 4),
    "count": (),
}


def cut(box: Box, number: int, pieces: int) -> list[Box]:
    """A box in so many pieces along a dimension, as equal as can be; some may be empty."""
    at, extent = box
    found, end = [], 0
    for piece in range(pieces):
        size = extent[number] * (piece + 1) // pieces - end
        found.append(
            (
                (*at[:number], at[number] + end, *at[number + 1 :]),
                (*extent[:number], size, *extent[number + 1 :]),
            )
        )
        end += size
    return found


def holders(ranks: int) -> dict[str, list[tuple[int, Box]]]:
    """Who holds what: sharded by rows, on a grid with two boxes a rank, cut among all, by one, by all."""
    whole = {name: ((0,) * len(shape), shape) for name, shape in SHAPES.items()}
    found: dict[str, list[tuple[int, Box]]] = {
        "sharded": list(enumerate(cut(whole["sharded"], 0, ranks))),
        "grid": [
            (rank, box)
            for rank, columns in enumerate(cut(whole["grid"], 1, ranks))
            for box in cut(columns, 0, 2)
        ],
        "bias": list(enumerate(cut(whole["bias"], 0, ranks))),
        "frozen": [(ranks - 1, whole["frozen"])],
        "empty": [(rank, whole["empty"]) for rank in range(ranks)],
        "count": [(rank, whole["count"]) for rank in range(ranks)],
    }
    return found


@dataclass
class State:
    """A state over all ranks: each leaf whole, and what each rank has for itself."""

    leaves: dict[str, Array]
    own: list[bytes]
    value: int = 0
    kins: Mapping[str, str] = field(default_factory=lambda: {"frozen": "frozen"})

    @property
    def ranks(self) -> int:
        return len(self.own)

    def changed(self, seed: int, *names: str) -> State:
        rng = np.random.default_rng(seed)
        leaves = {
            name: rng.random(array.shape, np.float32) if name in names else array
            for name, array in self.leaves.items()
        }
        return State(leaves, [rng.bytes(len(one)) for one in self.own], seed)

    def respread(self, ranks: int) -> State:
        return State(self.leaves, [bytes(16)] * ranks, self.value)

    def captured(self, rank: int) -> Captured:
        layout = self.layout(rank)
        arena = bytearray(layout.arena_bytes)
        for one, (number, offset) in zip(layout.slices, layout.places, strict=True):
            start = layout.regions[number].offset + offset
            if one.name == own_name(rank):
                data = self.own[rank]
            else:
                data = self.leaves[one.name][where(one.box)].tobytes()
            arena[start : start + one.size_bytes] = data
        return Captured.whole(layout, memoryview(arena), values.encode(self.tree(rank)))

    def layout(self, rank: int) -> Layout:
        slices = [
            Slice(name, "float32", SHAPES[name], *box, self.kins.get(name, "moving"))  # type: ignore[arg-type]
            for name, held in holders(self.ranks).items()
            for holder, box in held
            if holder == rank and (0 not in box[1] or 0 in SHAPES[name])
        ]
        own = len(self.own[rank])
        return lay_out([*slices, Slice(own_name(rank), "uint8", (own,), (0,), (own,))])

    def tree(self, rank: int) -> Any:
        return {
            "objects": {name: Leaf(name) for name in self.leaves},
            "run": {"rng": {"torch": Leaf(own_name(rank))}, "value": self.value},
        }


def own_name(rank: int) -> str:
    """The leaf that each rank has for itself."""
    return f"~rank/{rank}/run/rng/torch"


def where(box: Box) -> tuple[slice, ...]:
    return tuple(slice(at, at + extent) for at, extent in zip(*box, strict=True))


def state(seed: int, ranks: int) -> State:
    rng = np.random.default_rng(seed)
    leaves = {name: rng.random(shape, np.float32) for name, shape in SHAPES.items()}
    return State(leaves, [rng.bytes(16) for _ in range(ranks)], seed)


def gathered(reader: Reader, manifest: Manifest, strict: bool = True) -> dict[str, Array]:
    """The leaves of a joined manifest, put together from their boxes. `strict`: without a remark."""
    regions = [memoryview(bytearray(one.size_bytes)) for one in manifest.regions]
    remarks = reader.fill(manifest, [Target(number, 0, one) for number, one in enumerate(regions)])
    assert not (strict and remarks)
    found: dict[str, Array] = {}
    for leaf in manifest.leaves:
        dtype = np.dtype(leaf.dtype)
        array = np.empty(leaf.shape, dtype)
        for one in leaf.slices:
            data = regions[one.region][one.offset : one.offset + leaf.size_bytes(one)]
            array[where(one.box)] = np.frombuffer(data, dtype).reshape(one.extent)
        found[leaf.name] = array
    return found


def assert_restores(chain: Chain, snapshot: Snapshot, wanted: State) -> None:
    got = gathered(Reader(chain.store), chain.manifest(snapshot))
    for name, array in wanted.leaves.items():
        assert got.pop(name).tobytes() == array.tobytes(), f"{name} came back as something else"
    for rank, own in enumerate(wanted.own):
        assert got.pop(own_name(rank)).tobytes() == own
    assert not got
    assert [part.tree for part in chain.manifests(snapshot)] == [wanted.tree(r) for r in range(wanted.ranks)]


class World:
    """The writers of all ranks of a job, which take turns in one thread."""

    def __init__(
        self,
        store: Store | str,
        ranks: int,
        encoding: Encoding = Encoding.RAW,
        branch: str = "main",
        through: Mapping[int, Store] | None = None,
    ) -> None:
        """`through`: the ways of some ranks to the store."""
        self.chain = Chain.create(store, GRID_BYTES)
        self.chains = [Chain((through or {}).get(rank, self.chain.store)) for rank in range(ranks)]
        self.ranks = ranks
        self.lease = Lease.take(self.chain.store, branch)
        newest = self.chain.head(branch) if self.chain.is_branch(branch) else None
        self.parent = newest.id if newest is not None else ""
        self.number = 0
        self.census = Census(self.chains[0])
        self.writers = [
            Writer(
                chain,
                Lease(chain.store, self.lease.number, branch),
                branch,
                self.parent,
                Always(encoding),
            )
            for chain in self.chains
        ]
        if newest is not None and len(newest.record.manifests) == ranks:
            for writer, part in zip(self.writers, self.chain.manifests(newest), strict=True):
                writer.build_on(part)

    def begin(self) -> Take:
        self.number += 1
        return Take(self.lease.branch, self.lease.number, self.number)

    def store(self, take: Take, one: State, ranks: Sequence[int] | None = None) -> list[Part]:
        """Each rank stores its part and tells of it, in a random order."""
        order = list(range(self.ranks) if ranks is None else ranks)
        random.Random(take.number).shuffle(order)
        return [
            parts.announce(
                self.chains[rank], take, self.writers[rank].store_part(one.captured(rank), rank, self.ranks)
            )
            for rank in order
        ]

    def commit(self, take: Take, step: int) -> Snapshot:
        found = parts.gather(self.chains[0], take, self.ranks, deadline_s=0.0)
        snapshot = self.writers[0].commit(found, Facts(step=step))
        parts.clear(self.chains[0], take)
        return snapshot

    def take(self, one: State, step: int) -> Snapshot:
        take = self.begin()
        self.store(take, one)
        return self.commit(take, step)

    def prune(self, keep: Keep) -> None:
        """As rank 0's keeper does after a commit."""
        chain, writer = self.chains[0], self.writers[0]
        plan = prune.plan(chain, keep, branches=[writer.branch], mine=writer.lease, census=self.census)
        if plan is not None:
            writer.forget_packs(set(plan.packs))
            writer.has_pruned(prune.execute(chain, plan).records)
