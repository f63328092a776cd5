"""From an arena to a committed snapshot: packs, manifest, snapshot record, head, in this order. Of several
ranks each stores its part, and rank 0 commits.

Before the head exists nothing has happened: a writer may be killed at any instant, and what it has put is
unreachable. What is put is immutable and named by its digest, so that doing it again does no harm.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import msgspec

from everstep.chain.common import Common
from everstep.chain.describing import Described
from everstep.chain.doomed import Doomed
from everstep.chain.earlier import Earlier
from everstep.chain.encoding import Encoder, Encodings, Measured
from everstep.chain.fence import fence_former
from everstep.chain.history import MAIN, Chain, Snapshot, now
from everstep.chain.lanes import Air, idle_cores
from everstep.chain.lease import Lease
from everstep.chain.names import missing
from everstep.chain.packing import Before, Draft, Packing, Shares, Wave
from everstep.chain.parts import Part
from everstep.chain.relocations import Relocations
from everstep.errors import Conflict, Damaged, Mismatch, NotFound, Unavailable
from everstep.format import keys, pack, record
from everstep.format import manifest as manifests
from everstep.format.chunk import Buffer, digest
from everstep.format.joining import join
from everstep.format.layout import Layout
from everstep.format.manifest import Manifest, Place, state_of_parts
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
    """Something that a snapshot was about to rely on is doomed, or gone."""

    def __init__(self, names: set[str]) -> None:
        super().__init__(names)
        self.names = names


@dataclass(frozen=True)
class _Stored:
    """A part that this writer has stored; `memory` still holds it, if it is in one piece. Costs are in
    milliseconds."""

    part: Part
    manifest: Manifest
    draft: Draft
    memory: memoryview | None
    costs: dict[str, float]


class Writer:
    """Commits snapshots to one branch of a chain, one at a time, while it holds the lease. Of several ranks
    each has one: with all but rank 0's nothing is done but `store_part`.

    Args:
        chain: where to.
        lease: the right to write; asked again before each commit. A rank that does not commit is given rank
            0's number, and its lease is never asked.
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
        self._described: Described | None = None
        self._earlier: deque[Earlier] = deque(maxlen=MEMORIES)
        self._stored: _Stored | None = None
        """The last part of `store_part`, without its memory."""
        self._dropped = False
        """Whether a prune of one's own was not looked for in what other ranks rely on."""

    @property
    def encodings(self) -> Encodings:
        """How new chunks are stored, from the next snapshot on."""
        return self._encoder.encodings

    @encodings.setter
    def encodings(self, encodings: Encodings) -> None:
        self._encoder.encodings = encodings

    @property
    def stored(self) -> Manifest | None:
        """The manifest of what `store_part` has stored last: to build on, if another writer commits it."""
        return None if self._stored is None else self._stored.manifest

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
        self._dropped = True

    def look_again(self) -> None:
        """For a rank whose part was not committed: what was pruned meanwhile, or is about to be, is shared no
        more. A listing, and one of all packs if there was a prune since the last look."""
        if self._doomed.look() or self._doomed.names:
            self._forget_gone(self._packs_there() - self._doomed.names)

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
            stored = self._store(captured, 0, 1)
            try:
                snapshot = self._commit([stored.part], facts, stored)
                self._share(stored)
                return snapshot
            except _Pruned as pruned:
                self.forget_packs(pruned.names)
                if stored.memory is None:
                    raise _shares_pruned(facts) from pruned
                captured = Captured.whole(captured.layout, stored.memory, captured.values)

    def store_part(
        self,
        captured: Captured,
        rank: int,
        ranks: int,
        shares: Callable[[], Shares] | None = None,
    ) -> Part:
        """Store what one rank has of a state: packs, then the manifest. Blocks; durable on return. No head is
        moved, the lease is not asked, and nobody is told: see `parts.announce`.

        Of several ranks, chunks are shared with the last part alone, committed or not: that is one that no
        prune of rank 0's takes anything from.

        Args:
            shares: what is this writer's where other ranks store in this process; asked when the bytes come.

        Raises:
            Unavailable: the store has no room or does not answer.
        """
        stored = self._store(captured, rank, ranks, shares)
        if ranks > 1:
            self._recent.clear()
            self._share(stored)
        # The memory is the caller's again.
        self._stored = replace(stored, memory=None)
        return stored.part

    def commit(self, parts: Sequence[Part], facts: Facts) -> Snapshot:
        """Make a state whose parts are all stored the head of the branch. Blocks for a few requests; durable
        on return. The costs of the record are those of this writer's own part, and those in `facts`.

        Args:
            parts: those of all ranks, in any order.

        Raises:
            Mismatch: they are not one of each rank; nothing was touched.
            Fenced: another writer has taken over; the head was not moved.
            Unavailable: the store does not answer, see `write`; or something was pruned that a part relies
                on: the head was not moved, and before the next take all ranks `look_again`.
        """
        last = self._stored
        mine = last if last and any(one.manifest == last.part.manifest for one in parts) else None
        try:
            snapshot = self._commit(parts, facts, mine)
            if mine is not None and len(parts) == 1:
                self._share(mine)
            return snapshot
        except _Pruned as pruned:
            self.forget_packs(pruned.names)
            raise _shares_pruned(facts) from pruned

    def _store(
        self, captured: Captured, rank: int, ranks: int, shares: Callable[[], Shares] | None = None
    ) -> _Stored:
        computed, begun = self._thread_clock(), self._clock()
        draft = Draft(captured.layout)
        memory = self._store_chunks(draft, captured, shares or self._own_shares)
        stored = self._clock()
        manifest = self._describe(draft.layout).manifest(draft, captured.values, rank, ranks)
        if ranks == 1:
            _refuse_unreadable(manifest)
        name, made = self._put_manifest(manifest)
        draft.cpu_s += self._thread_clock() - computed
        costs = {"store": (stored - begun) * 1e3, "manifest": (self._clock() - stored) * 1e3}
        relies = sorted(manifest.packs.keys() - draft.made) + ([] if made else [name])
        part = Part(
            rank=rank,
            ranks=ranks,
            manifest=name,
            state=manifest.state,
            logical_bytes=draft.layout.logical_bytes,
            new_bytes=draft.new_bytes,
            stored_bytes=sum(draft.stored),
            relies=tuple(relies),
        )
        return _Stored(part, manifest, draft, memory, {**costs, **draft.costs()})

    def _commit(self, parts: Sequence[Part], facts: Facts, mine: _Stored | None) -> Snapshot:
        parts = sorted(parts, key=lambda part: part.rank)
        wanted = [(rank, len(parts)) for rank in range(len(parts))]
        if not parts or [(part.rank, part.ranks) for part in parts] != wanted:
            ranks = ", ".join(f"{part.rank} of {part.ranks}" for part in parts[:8])
            raise Mismatch(f"these are not the parts of all ranks: {ranks}", kept="nothing was touched")
        snapshot = self._snapshot(parts, facts, {} if mine is None else mine.costs)
        self._refuse_pruned(parts, mine)
        self._advance(snapshot)
        self.parent = snapshot.id
        return snapshot

    def _share(self, stored: _Stored) -> None:
        self.build_on(stored.manifest)
        if stored.memory is not None:
            self._remember(stored.memory, stored.draft, stored.manifest)

    # -- chunks and packs ---------------------------------------------------------------------------------

    def _store_chunks(
        self, draft: Draft, captured: Captured, shares: Callable[[], Shares]
    ) -> memoryview | None:
        """Returns the memory that holds the state, if it is in one piece."""
        waves = iter(captured.waves)
        first = next(waves, None)
        whole = None
        if first is not None:
            if first.begin == 0 and len(first.memory) >= draft.layout.arena_bytes:
                whole = first.memory
            waves = itertools.chain((first,), waves)
        mine = shares()
        packing = Packing(
            draft,
            self._describe(draft.layout).shared,
            self._before(draft.layout, whole),
            self._encoder,
            partial(self._put_pack, draft, mine.common),
            self.chain.about.grid_bytes,
            self._clock,
            self._thread_clock,
            mine,
        )
        packing.store(waves)
        return whole

    def _own_shares(self) -> Shares:
        return Shares(self._cores(), air=Air(self._clock))

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
        earlier = Earlier.of(memory, draft, manifest)
        if earlier is not None:
            self._earlier.append(earlier)

    def _put_pack(self, draft: Draft, common: Common | None, builder: pack.Builder) -> None:
        name, parts = builder.finish()
        made = self._put_named(keys.pack, name, parts)
        if made is None:
            name, parts = builder.finish(salt=secrets.token_bytes(16))
            made = self._put_named(keys.pack, name, parts)
        if made:
            draft.made.add(name)
        size_bytes = sum(map(len, parts))
        draft.packs[name] = size_bytes
        draft.stored.append(size_bytes)
        for entry in builder.entries:
            draft.places[entry.digest] = Place(
                name, entry.offset, entry.stored_bytes, entry.encoding, entry.base
            )
        if common is not None:
            common.put((entry.digest, draft.found(entry.digest)) for entry in builder.entries)

    def _put_named(self, key_of: Callable[[str], str], name: str, parts: list[Buffer]) -> bool | None:
        """Put an object that is named by its digest. True: there was none; False: it was there before. None:
        the name is taken by one that cannot be relied on: it is damaged, or a prune is about to delete it."""
        if name in self._doomed.names:
            return None
        if self.chain.store.put(key_of(name), parts):
            return True
        try:
            return False if _same(self.chain.store.get(key_of(name)), parts) else None
        except (Damaged, NotFound):
            # Its disk cannot read it, or it went away meanwhile: no object to build on.
            return None

    def _refuse_pruned(self, parts: Sequence[Part], mine: _Stored | None) -> None:
        """Look whether somebody prunes, or has pruned, what this snapshot relies on. All of it that is new is
        put by now, so that a prune that begins after this finds it and spares what it needs."""
        news = self._doomed.look()
        several = len(parts) > 1
        names = {part.manifest for part in parts}
        relied = {name for part in parts for name in part.relies}
        if mine is not None and not several:
            relied |= {*mine.manifest.packs, *names}
        taken = (relied | names) & self._doomed.names
        if (news or (several and self._dropped)) and relied:
            there = self._packs_there()
            self._forget_gone(there)
            gone = relied - names - there
            taken |= gone if not several else self._lost(parts, gone, there)
            found = set(map(keys.manifest, relied & names))
            taken |= {key.rpartition("/")[2] for key in missing(self.chain.store, keys.MANIFESTS, found)}
        if taken:
            raise _Pruned(taken)
        self._dropped = False

    def _lost(self, parts: Sequence[Part], gone: set[str], there: set[str]) -> set[str]:
        """Those of the packs that are gone of which not all that a part needs was relocated. Another rank's
        part is not stored once more, so what is in it stands; but not while somebody prunes, who may be about
        to take relocations away."""
        concerned = [part for part in parts if not gone.isdisjoint(part.relies)]
        if not concerned or self._doomed.names:
            return gone
        self._relocations.look()
        lost: set[str] = set()
        for part in concerned:
            try:
                manifest = manifests.decode(self.chain.store.get(keys.manifest(part.manifest)))
            except (Damaged, NotFound):
                return gone
            if self._relocations.table.without(manifest, lambda pack: pack not in there) is None:
                lost |= gone & manifest.packs.keys()
        return lost

    def _forget_gone(self, there: set[str]) -> None:
        """What later snapshots might have shared, too: nothing tells of it once more."""
        self.forget_packs({pack for one in self._recent for pack in one.packs} - there)

    def _packs_there(self) -> set[str]:
        """By one listing."""
        return {entry.key.rpartition("/")[2] for entry in self.chain.store.list(keys.PACKS)}

    # -- manifest, snapshot, head -------------------------------------------------------------------------

    def _describe(self, layout: Layout) -> Described:
        if self._described is None or self._described.layout is not layout:
            self._described = Described(layout, self.chain.about.grid_bytes)
        return self._described

    def _put_manifest(self, manifest: Manifest) -> tuple[str, bool]:
        """Store a manifest; returns its name, and whether it was not there before."""
        encoded = manifests.encode(manifest)
        name = digest(encoded)
        made = self._put_named(keys.manifest, name, [encoded])
        if made is None:
            encoded = manifests.encode(_salted(manifest))
            name = digest(encoded)
            made = self._put_named(keys.manifest, name, [encoded])
        return name, bool(made)

    def _snapshot(self, parts: Sequence[Part], facts: Facts, costs: dict[str, float]) -> Snapshot:
        costs = {**facts.costs, **costs}
        if facts.begun is not None:
            costs["durable"] = (time.monotonic() - facts.begun) * 1e3
        reasons = itertools.chain(facts.approximate, *(part.approximate for part in parts))
        made = SnapshotRecord(
            format=_format(parts),
            step=facts.step,
            epoch=facts.epoch,
            state=state_of_parts([part.state for part in parts]),
            manifests=tuple(part.manifest for part in parts),
            taken_at=facts.taken_at,
            branch=self.branch,
            writer=self.lease.number,
            parents=(self.parent,) if self.parent else (),
            trigger=facts.trigger,
            note=facts.note,
            logical_bytes=sum(part.logical_bytes for part in parts),
            new_bytes=sum(part.new_bytes for part in parts),
            stored_bytes=sum(part.stored_bytes for part in parts),
            metrics=facts.metrics,
            approximate=tuple(dict.fromkeys(reasons)),
            environment=facts.environment,
            costs={name: round(cost, 3) for name, cost in costs.items()},
            origin=facts.origin,
        )
        encoded = record.encode(made)
        name = digest(encoded)
        if self._put_named(keys.snapshot, name, [encoded]) is None:
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
                format=snapshot.record.format,
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


def _format(parts: Sequence[Part]) -> int:
    return manifests.SEVERAL if len(parts) > 1 else manifests.FORMAT


def _refuse_unreadable(manifest: Manifest) -> None:
    """Slices that leave a hole in a leaf could not be read back: nothing is committed."""
    try:
        join([manifest])
    except Damaged as error:
        raise Mismatch(error.problem, kept="the head was not moved") from error


def _shares_pruned(facts: Facts) -> Unavailable:
    return Unavailable(
        f"the snapshot of step {facts.step} shares chunks with one that was pruned meanwhile",
        kept="those before it are intact",
        next="nothing: the next snapshot does without them",
    )


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
