"""States without tensors, and chains of them, for the tests of `chain/`."""

from __future__ import annotations

import itertools
import mmap
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from everstep.chain.encoding import Always
from everstep.chain.history import Chain, Snapshot
from everstep.chain.lease import Lease
from everstep.chain.reader import Reader, Target
from everstep.chain.writer import Captured, Facts, Writer
from everstep.format import keys, pack, record, values
from everstep.format import manifest as manifests
from everstep.format.chunk import Encoding, digest, encode
from everstep.format.layout import Layout, Slice, lay_out
from everstep.format.manifest import Manifest, Place, StoredChunk
from everstep.format.record import HeadRecord
from everstep.store.base import Store
from everstep.store.memory import MemoryStore

GRID_BYTES = 16 * 1024


def whole(
    name: str, dtype: str, shape: tuple[int, ...], kin: str = "moving", alias: str | None = None
) -> Slice:
    return Slice(name, dtype, shape, (0,) * len(shape), shape, kin, alias)  # type: ignore[arg-type]


LAYOUT = lay_out(
    [
        whole("dense", "float32", (9, 1024)),
        whole("moment", "float32", (5000,)),
        whole("small", "float64", (3,)),
        whole("tied", "float32", (9, 1024), alias="dense"),
        whole("empty", "float32", (0, 4)),
        whole("count", "int64", ()),
        whole("mean", "float32", (100,), "buffer"),
        whole("frozen", "uint8", (40_000,), "frozen"),
    ]
)
"""A few regions of several chunks each on `GRID_BYTES`, with a tied, an empty and a scalar leaf."""


@dataclass
class Content:
    """A state: the bytes of each leaf that is not tied to another, and a plain value."""

    layout: Layout = LAYOUT
    leaves: dict[str, bytes] = field(default_factory=dict)
    value: object = None

    def arena(self) -> bytearray:
        """Its bytes, where the layout has them."""
        arena = bytearray(self.layout.arena_bytes)
        for one, (number, offset) in zip(self.layout.slices, self.layout.places, strict=True):
            if one.alias is None:
                start = self.layout.regions[number].offset + offset
                arena[start : start + one.size_bytes] = self.leaves[one.name]
        return arena

    def captured(self, memory: memoryview | None = None, unchanged: Iterable[int] = ()) -> Captured:
        """Captured whole; into `memory`, if it is given."""
        arena = memoryview(self.arena())
        if memory is not None:
            memory[:] = arena
            arena = memory
        return Captured.whole(self.layout, arena, self.encoded_values(), frozenset(unchanged))

    def encoded_values(self) -> bytes:
        return values.encode({"value": self.value})

    def changed(self, rng: random.Random, *names: str) -> Content:
        """With other bytes in these leaves."""
        leaves = dict(self.leaves)
        for one in self.layout.slices:
            if one.name in names:
                leaves[one.name] = rng.randbytes(one.size_bytes)
        return Content(self.layout, leaves, rng.random())


def content(seed: int, layout: Layout = LAYOUT) -> Content:
    """A state of random bytes."""
    rng = random.Random(seed)
    fresh = {one.name: rng.randbytes(one.size_bytes) for one in layout.slices if one.alias is None}
    return Content(layout, fresh, seed)


def compressible(seed: int, layout: Layout = LAYOUT) -> Content:
    """A state that shuffle+zstd makes smaller."""
    rng = random.Random(seed)
    made = content(seed, layout)
    for name, data in made.leaves.items():
        made.leaves[name] = bytes(rng.choices(range(12), k=len(data)))
    return made


class Slots:
    """Two arenas that take turns, as a run's do."""

    def __init__(self, layout: Layout = LAYOUT) -> None:
        self.mappings = [mmap.mmap(-1, layout.arena_bytes) for _ in range(2)]
        self._turn = 0

    def next(self) -> memoryview:
        self._turn += 1
        return memoryview(self.mappings[self._turn % 2])

    def write(self, writer: Writer, one: Content, step: int = 1) -> Snapshot:
        return writer.write(one.captured(self.next()), Facts(step=step))


def restored(chain: Chain, snapshot: Snapshot, layout: Layout = LAYOUT) -> tuple[Content, list[str]]:
    """A snapshot's content as its manifest and packs give it, and the reader's remarks."""
    manifest = chain.manifest(snapshot)
    regions = [memoryview(bytearray(region.size_bytes)) for region in manifest.regions]
    targets = [Target(number, 0, buffer) for number, buffer in enumerate(regions)]
    remarks = Reader(chain.store).fill(manifest, targets)
    leaves = {}
    aliases = {one.name for one in layout.slices if one.alias}
    for leaf in manifest.leaves:
        (part,) = leaf.slices
        if leaf.name not in aliases:
            data = regions[part.region][part.offset : part.offset + leaf.size_bytes(part)]
            leaves[leaf.name] = bytes(data)
    tree = manifest.tree
    return Content(layout, leaves, tree["value"]), remarks


def assert_restores(chain: Chain, snapshot: Snapshot, wanted: Content) -> None:
    got, remarks = restored(chain, snapshot, wanted.layout)
    assert got == wanted, f"snapshot {snapshot.short} came back as something else"
    assert not remarks


def started(store: Store | str, *, encoding: Encoding = Encoding.RAW, parent: str = "") -> Writer:
    """A writer on a chain, which is created where there is none."""
    chain = Chain.create(store, GRID_BYTES)
    return Writer(chain, Lease.take(chain.store), parent=parent, encodings=Always(encoding))


def written(writer: Writer, contents: Sequence[Content], first_step: int = 1) -> list[Snapshot]:
    return [
        writer.write(one.captured(), Facts(step=first_step + number)) for number, one in enumerate(contents)
    ]


def xor_chain(depth: int, floats: int = 2048) -> tuple[Chain, Manifest, bytes]:
    """A snapshot whose only chunk builds on `depth` others, each in a pack of its own.

    Returns:
        The chain, the snapshot's manifest, and the bytes of its only leaf.
    """
    layout = lay_out([whole("one", "float32", (floats,))])
    store = MemoryStore()
    writer = started(store)
    states = [content(number, layout) for number in range(depth + 1)]
    (first,) = written(writer, states[:1])
    base = writer.chain.manifest(first)
    chunks, places, packs = list(base.chunks), list(base.places), dict(base.packs)
    for below, above in itertools.pairwise(states):
        raw = above.leaves["one"]
        stored = encode(raw, Encoding.XOR_SHUFFLE_ZSTD, word_bytes=4, base=below.leaves["one"])
        builder = pack.Builder()
        parent = chunks[-1].digest
        builder.add(digest(raw), len(raw), stored, len(stored), Encoding.XOR_SHUFFLE_ZSTD, parent)
        name, parts = builder.finish()
        store.put(keys.pack(name), parts)
        chunks.append(StoredChunk(digest(raw), len(raw)))
        places.append(Place(name, 0, len(stored), Encoding.XOR_SHUFFLE_ZSTD, parent))
        packs[name] = sum(map(len, parts))
    region = msgspec.structs.replace(base.regions[0], chunks=(depth,))
    forged = msgspec.structs.replace(
        base, chunks=tuple(chunks), places=tuple(places), packs=packs, regions=(region,)
    )
    leaf = forged.leaves[0]
    rows = [
        (leaf.name, leaf.dtype, leaf.shape, [(leaf.slices[0].at, leaf.slices[0].extent, [chunks[-1].digest])])
    ]
    forged = msgspec.structs.replace(forged, state=manifests.state_digest(rows, forged.values))
    encoded = manifests.encode(forged)
    store.put(keys.manifest(digest(encoded)), [encoded])
    made = msgspec.structs.replace(first.record, step=2, manifests=(digest(encoded),), state=forged.state)
    data = record.encode(made)
    store.put(keys.snapshot(digest(data)), [data])
    head = HeadRecord(digest(data), 2, 1, "00", "now", "main", number=2)
    store.put(head.key, [record.seal(head)])
    return writer.chain, forged, states[-1].leaves["one"]
