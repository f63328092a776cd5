"""From an arena to a committed snapshot: packs, manifest, snapshot record, head, in this order.

Before the head exists nothing has happened: a writer may be killed at any instant, and what it has put is
unreachable. What is put is immutable and named by its digest, so that doing it again does no harm.
"""

from __future__ import annotations

import itertools
import secrets
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from everstep.chain.doomed import Doomed
from everstep.chain.encoding import Encoder, Encodings, Measured
from everstep.chain.fence import fence_former
from everstep.chain.history import MAIN, Chain, Snapshot, now
from everstep.chain.lanes import idle_cores
from everstep.chain.lease import Lease
from everstep.chain.names import exists
from everstep.chain.packing import Before, Draft, Extent, Packing, Wave
from everstep.chain.relocations import Relocations
from everstep.errors import Conflict, Damaged, NotFound, Unavailable
from everstep.format import keys, pack, record
from everstep.format import manifest as manifests
from everstep.format.chunk import Buffer, digest
from everstep.format.layout import Layout
from everstep.format.manifest import (
    Manifest,
    Place,
    StoredChunk,
    StoredLeaf,
    StoredRegion,
    StoredSlice,
    leaf_head,
    slice_head,
    state_hasher,
)
from everstep.format.record import HeadRecord, Number, Origin, SnapshotRecord

__all__ = ["Captured", "Facts", "Wave", "Writer"]

RECENT = 4
"""Chunks are shared with so many snapshots back; the rest of a chain need not be held in memory."""

MEMORIES = 2
"""So many memories take turns holding states: what is known of others is of no use."""


@dataclass(frozen=True)
class Captured:
    """A state as it was captured: all that the writer knows of it, and no tensor.

    Its bytes come as `waves`, often as one: ranges of `layout`'s address space in their order, which is
    `layout.arena_bytes` long and zero in the padding after each region. A wave's memory must not change until
    the writer asks for the next wave or returns. `values` is the encoded values tree.
    """

    layout: Layout
    values: bytes
    waves: Iterable[Wave]

    @classmethod
    def whole(
        cls, layout: Layout, memory: memoryview, values: bytes, unchanged: frozenset[int] = frozenset()
    ) -> Captured:
        """A state that lies in one piece of memory, from its begin on. For `unchanged` see `Wave`."""
        return cls(layout, values, [Wave(0, memory[: layout.arena_bytes], unchanged)])


@dataclass(frozen=True)
class Facts:
    """What a snapshot record says besides the state.

    `costs` (milliseconds by phase) is looked at when the record is made, right before the snapshot becomes
    the head: whoever holds it may add to it until then. `begun` is a value of `time.monotonic()`, in any
    process of this machine: if it is given, the record's costs say with `durable` how long ago that was.
    """

    step: int
    epoch: int = 0
    trigger: str = ""
    note: str = ""
    metrics: dict[str, Number] = field(default_factory=dict)
    approximate: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    taken_at: str = field(default_factory=now)
    begun: float | None = None
    origin: Origin | None = None


class _Pruned(Exception):
    """Something that a snapshot was about to rely on is doomed, or gone. `memory` still holds the state, if
    it is in one piece."""

    def __init__(self, names: set[str], memory: memoryview | None) -> None:
        super().__init__(names)
        self.names = names
        self.memory = memory


class Writer:
    """Commits snapshots to one branch of a chain, one at a time, while it holds the lease.

    Args:
        chain: where to.
        lease: the right to write; asked again before each commit.
        branch: whose head advances.
        parent: the id of the snapshot that the next one follows on; "" for none.
        encodings: how new chunks are stored; by default measured, so that none is durable later for it.
        cores: how many threads may digest and encode, the one that calls `write` included.
        clock, thread_clock: how late it is, and how long the calling thread has computed, in seconds.
    """

    def __init__(
        self,
        chain: Chain,
        lease: Lease,
        branch: str = MAIN,
        parent: str = "",
        encodings: Encodings | None = None,
        *,
        cores: Callable[[], int] = idle_cores,
        clock: Callable[[], float] = time.perf_counter,
        thread_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self.chain = chain
        self.lease = lease
        self.branch = branch
        self.parent = parent
        self._cores = cores
        self._clock = clock
        self._thread_clock = thread_clock
        self._encoder = Encoder(encodings or Measured(thread_clock), chain.store, thread_clock)
        self._recent: deque[Manifest] = deque(maxlen=RECENT)
        self._doomed = Doomed(chain.store)
        self._relocations = Relocations(chain.store)
        self._first = True
        """Whether a former writer of the branch may not be fenced yet."""
        self._described: _Described | None = None
        self._earlier: deque[_Earlier] = deque(maxlen=MEMORIES)

    @property
    def encodings(self) -> Encodings:
        """How new chunks are stored, from the next snapshot on."""
        return self._encoder.encodings

    @encodings.setter
    def encodings(self, encodings: Encodings) -> None:
        self._encoder.encodings = encodings

    def build_on(self, manifest: Manifest) -> None:
        """Chunks of this manifest need not be written again: only for one whose chunks are known good."""
        self._recent.append(manifest)

    def forget_packs(self, names: set[str]) -> None:
        """These packs are about to be deleted: their chunks must be written again when they come back, unless
        they have been copied to others."""
        if not any(names & manifest.packs.keys() for manifest in self._recent):
            return
        self._relocations.look()
        there = self._packs_there() - names - self._doomed.names
        found = [
            self._relocations.table.without(manifest, lambda pack: pack not in there)
            if names & manifest.packs.keys()
            else manifest
            for manifest in self._recent
        ]
        kept = [manifest for manifest in found if manifest is not None]
        self._recent = deque(kept, maxlen=RECENT)

    def has_pruned(self, records: list[int]) -> None:
        """A prune with records of these numbers was made under this lease, after `forget_packs`."""
        self._doomed.know(records)

    def write(self, captured: Captured, facts: Facts) -> Snapshot:
        """Store a state and make it the head of the branch. Blocks; durable on return.

        The record's costs say, in milliseconds, how long it took to `store` the packs and the `manifest`; for
        the rest see `packing.Draft.costs`.

        Raises:
            Fenced: another writer has taken over; the head was not moved.
            Unavailable: the store has no room or does not answer. The head was not moved; or it was, and only
                the answer was lost: then the snapshot is whole, and writing it again does no harm. Or the
                state comes in waves, and somebody has pruned meanwhile what it shares chunks with.
        """
        while True:
            try:
                return self._write(captured, facts)
            except _Pruned as pruned:
                self.forget_packs(pruned.names)
                if pruned.memory is None:
                    raise Unavailable(
                        f"the snapshot of step {facts.step} shares chunks with one that was pruned meanwhile",
                        kept="those before it are intact",
                        next="nothing: the next snapshot does without them",
                    ) from pruned
                captured = Captured.whole(captured.layout, pruned.memory, captured.values)

    def _write(self, captured: Captured, facts: Facts) -> Snapshot:
        computed, begun = self._thread_clock(), self._clock()
        draft = Draft(captured.layout)
        memory = self._store_chunks(draft, captured)
        stored = self._clock()
        manifest = self._manifest(draft, captured.values)
        name = self._put_manifest(manifest)
        draft.cpu_s += self._thread_clock() - computed
        costs = {"store": (stored - begun) * 1e3, "manifest": (self._clock() - stored) * 1e3}
        snapshot = self._snapshot(draft, facts, manifest.state, name, {**costs, **draft.costs()})
        self._refuse_pruned(manifest, name, memory)
        self._advance(snapshot)
        self.parent = snapshot.id
        self.build_on(manifest)
        if memory is not None:
            self._remember(memory, draft, manifest)
        return snapshot

    # -- chunks and packs ---------------------------------------------------------------------------------

    def _store_chunks(self, draft: Draft, captured: Captured) -> memoryview | None:
        """Returns the memory that holds the state, if it is in one piece."""
        waves = iter(captured.waves)
        first = next(waves, None)
        whole = None
        if first is not None:
            if first.begin == 0 and len(first.memory) >= draft.layout.arena_bytes:
                whole = first.memory
            waves = itertools.chain((first,), waves)
        packing = Packing(
            draft,
            self._describe(draft.layout).shared,
            self._before(draft.layout, whole),
            self._encoder,
            partial(self._put_pack, draft),
            self.chain.about.grid_bytes,
            self._clock,
            self._thread_clock,
            self._cores(),
        )
        packing.store(waves)
        return whole

    def _before(self, layout: Layout, memory: memoryview | None) -> Before:
        """What is known of the state that this memory held before; that knowledge ends here. And of the last
        one written, if that lies in other memory."""
        recent = tuple(self._recent)
        here = there = None
        for one in list(self._earlier):
            if memory is not None and one.is_at(memory):
                self._earlier.remove(one)
                here = one.digests if one.layout == layout else None
        if memory is not None and self._earlier:
            last = self._earlier[-1]
            held = last.memory()
            if held is not None and last.layout == layout and last.manifest in self._recent:
                there = (last.manifest, last.digests, held)
        return Before(recent, here, there)

    def _remember(self, memory: memoryview, draft: Draft, manifest: Manifest) -> None:
        earlier = _Earlier.of(memory, draft, manifest)
        if earlier is not None:
            self._earlier.append(earlier)

    def _put_pack(self, draft: Draft, builder: pack.Builder) -> None:
        name, parts = builder.finish()
        if not self._put_named(keys.pack, name, parts):
            name, parts = builder.finish(salt=secrets.token_bytes(16))
            self._put_named(keys.pack, name, parts)
        size_bytes = sum(map(len, parts))
        draft.packs[name] = size_bytes
        draft.stored.append(size_bytes)
        for entry in builder.entries:
            draft.places[entry.digest] = Place(
                name, entry.offset, entry.stored_bytes, entry.encoding, entry.base
            )

    def _put_named(self, key_of: Callable[[str], str], name: str, parts: list[Buffer]) -> bool:
        """Put an object that is named by its digest. False: the name is taken by one that cannot be relied
        on: it is damaged, or a prune is about to delete it."""
        if name in self._doomed.names:
            return False
        if self.chain.store.put(key_of(name), parts):
            return True
        try:
            return _same(self.chain.store.get(key_of(name)), parts)
        except (Damaged, NotFound):
            # Its disk cannot read it, or it went away meanwhile: no object to build on.
            return False

    def _refuse_pruned(self, manifest: Manifest, name: str, memory: memoryview | None) -> None:
        """Look whether somebody prunes, or has pruned, what this snapshot relies on. All of it that is new is
        put by now, so that a prune that begins after this finds it and spares what it needs."""
        news = self._doomed.look()
        taken = {name, *manifest.packs} & self._doomed.names
        if news:
            there = self._packs_there()
            # What later snapshots might have shared, too: nothing tells of it once more.
            self.forget_packs({pack for one in self._recent for pack in one.packs} - there)
            taken |= manifest.packs.keys() - there
            if not exists(self.chain.store, keys.manifest(name)):
                taken.add(name)
        if taken:
            raise _Pruned(taken, memory)

    def _packs_there(self) -> set[str]:
        """By one listing."""
        return {entry.key.rpartition("/")[2] for entry in self.chain.store.list(keys.PACKS)}

    # -- manifest, snapshot, head -------------------------------------------------------------------------

    def _describe(self, layout: Layout) -> _Described:
        if self._described is None or self._described.layout is not layout:
            self._described = _Described(layout, self.chain.about.grid_bytes)
        return self._described

    def _manifest(self, draft: Draft, values: bytes) -> Manifest:
        described = self._describe(draft.layout)
        numbers = {name: number for number, name in enumerate(draft.sizes)}
        return Manifest(
            format=manifests.FORMAT,
            grid_bytes=self.chain.about.grid_bytes,
            leaves=described.leaves,
            regions=tuple(
                StoredRegion(region.size_bytes, tuple(numbers[name] for name in names))
                for region, names in zip(draft.layout.regions, draft.digests, strict=True)
            ),
            chunks=tuple(StoredChunk(name, size) for name, size in draft.sizes.items()),
            places=tuple(draft.places[name] for name in draft.sizes),
            # In an order of their own: packs are put while others are found.
            packs=dict(sorted(draft.packs.items())),
            values=values,
            state=described.state_digest(draft, values),
        )

    def _put_manifest(self, manifest: Manifest) -> str:
        """Store a manifest; returns its name."""
        encoded = manifests.encode(manifest)
        name = digest(encoded)
        if not self._put_named(keys.manifest, name, [encoded]):
            encoded = manifests.encode(_salted(manifest))
            name = digest(encoded)
            self._put_named(keys.manifest, name, [encoded])
        return name

    def _snapshot(
        self, draft: Draft, facts: Facts, state: str, manifest: str, costs: dict[str, float]
    ) -> Snapshot:
        costs = {**facts.costs, **costs}
        if facts.begun is not None:
            costs["durable"] = (time.monotonic() - facts.begun) * 1e3
        made = SnapshotRecord(
            format=manifests.FORMAT,
            step=facts.step,
            epoch=facts.epoch,
            state=state,
            manifests=(manifest,),
            taken_at=facts.taken_at,
            branch=self.branch,
            writer=self.lease.number,
            parents=(self.parent,) if self.parent else (),
            trigger=facts.trigger,
            note=facts.note,
            logical_bytes=draft.layout.logical_bytes,
            new_bytes=draft.new_bytes,
            stored_bytes=sum(draft.stored),
            metrics=facts.metrics,
            approximate=facts.approximate,
            environment=facts.environment,
            costs={name: round(cost, 3) for name, cost in costs.items()},
            origin=facts.origin,
        )
        encoded = record.encode(made)
        name = digest(encoded)
        if not self._put_named(keys.snapshot, name, [encoded]):
            raise Damaged(f"snapshot record {name} exists and is damaged", key=keys.snapshot(name))
        return Snapshot(name, made)

    def _advance(self, snapshot: Snapshot) -> None:
        """Move the head: the commit point. Exactly one put; losing it to another writer is settled here."""
        if self._first:
            fence_former(self.chain, self.lease)
            self._first = False
        nonce = secrets.token_hex(8)
        while True:
            # The number first, the lease second: who takes over in between finds this number free, or takes
            # it and we lose the race. Never is the head of a new writer followed by one of an old writer.
            mine = HeadRecord(
                snapshot=snapshot.id,
                step=snapshot.step,
                writer=self.lease.number,
                nonce=nonce,
                at=now(),
                branch=self.branch,
                number=self.chain.head_number(self.branch) + 1,
            )
            self.lease.check()
            if self.chain.store.put(mine.key, [record.seal(mine)]):
                return
            try:
                winner = record.unseal(self.chain.store.get(mine.key), HeadRecord, mine.key)
            except (Damaged, NotFound):
                continue
            if winner.nonce == mine.nonce:
                return
            if winner.fence is True:
                continue  # Of who replaces us, which the lease tells; or of who repacks.
            if winner.writer == self.lease.number:
                raise Conflict(
                    f"branch {self.branch!r} of {self.chain.url} advanced by itself to {mine.key}",
                    key=mine.key,
                )


class _Described:
    """What all snapshots of one layout say alike, made once: thousands of leaves take their time."""

    def __init__(self, layout: Layout, grid_bytes: int) -> None:
        self.layout = layout
        self.leaves = tuple(
            StoredLeaf(one.name, one.dtype, one.shape, (StoredSlice(one.at, one.extent, *place),))
            for one, place in zip(layout.slices, layout.places, strict=True)
        )
        self._grid_bytes = grid_bytes
        self._heads: list[tuple[bytes, Extent]] = []
        """In the order of the state digest: its input before a slice's digests, and where the slice lies."""
        self.shared: dict[int, list[Extent]] = {}
        """By region, the slices that are not all of it."""
        pairs = zip(layout.slices, layout.places, strict=True)
        for one, (region, offset) in sorted(pairs, key=lambda pair: pair[0].name.encode()):
            chunks = -(-one.size_bytes // grid_bytes)
            head = leaf_head(one.name, one.dtype, one.shape, 1) + slice_head(one.at, one.extent, chunks)
            extent = (region, offset, one.size_bytes)
            self._heads.append((head, extent))
            if one.alias is None and extent != (region, 0, layout.regions[region].size_bytes):
                self.shared.setdefault(region, []).append(extent)

    def state_digest(self, draft: Draft, values: bytes) -> str:
        """The state digest of a state of this layout whose chunks were digested."""
        hasher = state_hasher(len(self._heads))
        for head, extent in self._heads:
            names = draft.slices[extent] if extent in draft.slices else draft.digests[extent[0]]
            hasher.update(head + bytes.fromhex("".join(names)))
        hasher.update(values)
        return hasher.hexdigest()


@dataclass(frozen=True)
class _Earlier:
    """A state that was written, and the memory that it lay in, which may hold another by now or be no more:
    it is not kept alive for this."""

    layout: Layout
    manifest: Manifest
    digests: list[list[str]]
    owner: weakref.ref[Any]
    start: int

    @classmethod
    def of(cls, memory: memoryview, draft: Draft, manifest: Manifest) -> _Earlier | None:
        try:
            owner = weakref.ref(memory.obj)
        except TypeError:
            # A bytearray, say, of which nobody could tell whether it is still there.
            return None
        return cls(draft.layout, manifest, draft.digests, owner, _start(memory))

    def is_at(self, memory: memoryview) -> bool:
        return self.owner() is memory.obj and self.start == _start(memory)

    def memory(self) -> memoryview | None:
        """The memory, if it is still there."""
        owner = self.owner()
        try:
            whole = None if owner is None else memoryview(owner).cast("B")
        except ValueError:
            # A mapping that was closed.
            return None
        end = self.start + self.layout.arena_bytes
        return whole[self.start : end] if whole is not None and len(whole) >= end else None


def _start(memory: memoryview) -> int:
    """Where a view begins in the object that it is a view of."""
    import numpy as np

    whole = memoryview(memory.obj).cast("B")
    if not len(memory):
        return 0
    return int(np.frombuffer(memory, np.uint8).ctypes.data - np.frombuffer(whole, np.uint8).ctypes.data)


def _salted(manifest: Manifest) -> Manifest:
    return msgspec.structs.replace(manifest, salt=secrets.token_hex(16))


def _same(stored: Buffer, parts: list[Buffer]) -> bool:
    """Whether `stored` is the bytes of `parts`, one after the other."""
    at = 0
    view = memoryview(stored)
    for part in parts:
        if view[at : at + len(part)] != memoryview(part).cast("B"):
            return False
        at += len(part)
    return at == len(view)
