"""Snapshots of one chain into another: what `everstep copy` does.

Each snapshot is committed in the target as a writer commits one, under the lease of the branch it goes to:
packs, manifest, snapshot record, head. So whatever instant this ends at, the target lists whole snapshots
only, and doing it again goes on where it was left.

Chunks that the target has, in whatever pack, are not sent; the others go over as they are stored, never
encoded anew. A pack of which all is wanted keeps its name, for that is the digest of what it holds; of others
the wanted chunks are laid into new packs. All names are known before a byte is read, so that what is there is
not read.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from everstep.chain import versions
from everstep.chain.doomed import Doomed
from everstep.chain.fence import fence_former
from everstep.chain.history import SHORT, Chain, Snapshot, now
from everstep.chain.lease import Lease
from everstep.chain.names import exists
from everstep.chain.packing import PACK_BYTES
from everstep.chain.relocations import Relocations
from everstep.chain.sending import PACKS_AT_ONCE, Sending, size_of
from everstep.chain.sharing import Known, NewPack, is_shallow
from everstep.errors import Conflict, Damaged, EverstepError, Mismatch, NotFound, Unsupported
from everstep.format import keys, pack, record
from everstep.format import manifest as manifests
from everstep.format.chunk import aligned, digest
from everstep.format.manifest import Manifest, Place, StoredChunk
from everstep.format.record import COPY, HeadRecord, Move, Origin, SnapshotRecord
from everstep.store.base import Buffer, Store
from everstep.store.parallel import in_parallel

OnProgress = Callable[[int, int], None]

KNOWN_SNAPSHOTS = 64
"""So many of the newest of each branch of the target are looked at for chunks that it has."""

_TRIES = 5


@dataclass(frozen=True)
class Wanted:
    """A snapshot that is to be copied, and the branch of the target that it goes to."""

    snapshot: Snapshot
    branch: str


@dataclass(frozen=True)
class Row:
    """What becomes of one snapshot. `id` is the target's ("" where nothing was written), `why` is "" where it
    is sent, else why not; `sent_bytes` go over, and `shared_bytes`, as stored, are there."""

    source: str
    id: str
    branch: str
    step: int
    sent_bytes: int
    shared_bytes: int
    why: str = ""


@dataclass(frozen=True)
class Copied:
    """What was copied, or would be. `tags` by name: the id in the target; `remarks` what a person should
    know."""

    rows: tuple[Row, ...]
    tags: dict[str, str]
    remarks: tuple[str, ...]

    @property
    def sent_bytes(self) -> int:
        return sum(row.sent_bytes for row in self.rows)


# -- what is wanted ----------------------------------------------------------------------------------------


def of_branch(source: Chain, branch: str, to: str = "") -> list[Wanted]:
    """The readable snapshots that led to a branch's head, the oldest first. Raises NotFound."""
    found = [point.snapshot for point in source.line(branch) if point.snapshot is not None]
    if not found:
        raise NotFound(
            f"{source.url} has no snapshot on branch {branch!r}", next=f"everstep -r {source.url} log"
        )
    unique = {snapshot.id: snapshot for snapshot in reversed(found)}
    return [Wanted(snapshot, to or branch) for snapshot in unique.values()]


def of_refs(source: Chain, refs: Iterable[str], branch: str, to: str = "") -> list[Wanted]:
    """The snapshots that references mean, those of a branch by their steps. Raises as `Chain.find`."""
    found = [source.find(ref, branch) for ref in refs]
    unique = {snapshot.id: snapshot for snapshot in sorted(found, key=lambda one: one.step)}
    return [Wanted(snapshot, to or snapshot.record.branch) for snapshot in unique.values()]


# -- copying -----------------------------------------------------------------------------------------------


def copy(
    source: Chain,
    target: Store,
    wanted: Sequence[Wanted],
    *,
    tags: bool = False,
    dry_run: bool = False,
    on_progress: OnProgress = lambda done, total: None,
) -> Copied:
    """Copy snapshots, in their order, into the chain in `target`, which is created where there is none. Each
    is durable there, and the head of its branch, before the next begins. Blocks.

    Args:
        tags: give them the tags that they have, where the target has none of these names.
        dry_run: only say what would be sent.

    Raises:
        Mismatch: a branch there has snapshots of its own, or the chains have different grids, or something
            else is in the target's place; nothing was touched.
        Conflict: a living process writes to a branch there; or somebody prunes again and again.
        Damaged: something here is not what was written; what was copied before stands.
        Unavailable: a store does not answer; likewise.
    """
    there: Chain | None
    try:
        there = Chain(target)
    except NotFound:
        # Where nothing is written a chain that is not there is as good as an empty one.
        there = None if dry_run else Chain.create(target, source.about.grid_bytes)
    if there is not None and there.about.grid_bytes != source.about.grid_bytes:
        raise Mismatch(
            f"{there.url} is cut into chunks of {there.about.grid_bytes} bytes, and {source.url} into chunks "
            f"of {source.about.grid_bytes}",
            kept="nothing was touched",
            next="a target that is not there yet",
        )
    return _Copying(source, target, there, dry_run, on_progress).run(wanted, tags)


@dataclass(frozen=True)
class _Part:
    """What becomes of one rank's part of a snapshot: mostly there is one."""

    manifest: Manifest
    packs: tuple[NewPack, ...]
    chunks: tuple[StoredChunk, ...]
    places: tuple[Place, ...]
    sizes: dict[str, int]

    @property
    def sent_bytes(self) -> int:
        return sum(one.size_bytes for one in self.packs)

    @property
    def shared_bytes(self) -> int:
        new = {entry.digest for one in self.packs for entry in one.entries}
        return sum(
            place.stored_bytes
            for chunk, place in zip(self.chunks, self.places, strict=True)
            if chunk.digest not in new
        )


@dataclass(frozen=True)
class _Plan:
    wanted: Wanted
    parts: tuple[_Part, ...]

    @property
    def packs(self) -> list[NewPack]:
        return [pack for part in self.parts for pack in part.packs]

    @property
    def sent_bytes(self) -> int:
        return sum(part.sent_bytes for part in self.parts)

    @property
    def shared_bytes(self) -> int:
        return sum(part.shared_bytes for part in self.parts)


class _Copying:
    def __init__(
        self, source: Chain, target: Store, there: Chain | None, dry_run: bool, on_progress: OnProgress
    ) -> None:
        self.source = source
        self.target = target
        self.there = there
        self.dry_run = dry_run
        self.on_progress = on_progress
        self.same = there is not None and there.about.chain == source.about.chain
        self.known = Known()
        self.ids: dict[str, str] = {}
        """By the source's id, the target's, of what is there or was copied."""
        self.on: set[tuple[str, str]] = set()
        """Branches of the target, and the source's ids of what they list."""
        self.heads: dict[str, int] = {}
        """By branch of the target, the step of its head."""
        self.footers: dict[str, pack.Footer] = {}
        self.leases: dict[str, Lease] = {}
        self.doomed = Doomed(target)
        self.moved_here, self.moved_there = Relocations(source.store), Relocations(target)
        self.remarks: list[str] = []
        self.done = self.total = 0
        self.renamed = False
        """Whether a pack got another name than was planned: then what was planned on it is planned anew."""

    def run(self, wanted: Sequence[Wanted], tags: bool) -> Copied:
        for branch in dict.fromkeys(one.branch for one in wanted):
            keys.checked(branch, "branch")
            self._look(branch)
        left = [self._why_not(one) for one in wanted]
        self.doomed.look()
        self.moved_here.look()
        self.moved_there.look()
        if self.there is not None and not self.same:
            self._learn()
        plans = self._plans([one for one, why in zip(wanted, left, strict=True) if not why])
        self.total = sum(plan.sent_bytes for plan in plans.values())
        self.on_progress(0, self.total)
        rows: list[Row] = []
        try:
            for one, why in zip(wanted, left, strict=True):
                rows.append(self._row(one, why, plans.pop(one.snapshot.id, None)))
        finally:
            for lease in self.leases.values():
                lease.release()
        named = self._tags(wanted) if tags else {}
        return Copied(tuple(rows), named, tuple(self.remarks))

    # -- what is there already ----------------------------------------------------------------------------

    def _look(self, branch: str) -> None:
        """What a branch of the target has of this chain. Raises Mismatch where it has something else."""
        if self.there is None:
            return
        head = self.there.head(branch)
        for snapshot in self.there.snapshots(branch):
            origin = snapshot.record.origin
            if self.same:
                self._note(branch, snapshot.id, snapshot.id)
            elif origin is not None and origin.chain == self.source.about.chain:
                self._note(branch, origin.snapshot, snapshot.id)
        moves = [one.moved for one in self.there.heads(branch)][-1:]
        own = [move for move in moves if move is None or move.what != COPY] if self.same else []
        if head is not None and (head.id not in self.ids.values() or own):
            raise Mismatch(
                f"branch {branch!r} of {self.there.url} has snapshots of its own",
                kept="nothing was touched",
                next="--as NAME, for a branch that is not there yet",
            )
        self.heads[branch] = -1 if head is None else head.step

    def _note(self, branch: str, source: str, id: str) -> None:
        self.on.add((branch, source))
        self.ids.setdefault(source, id)

    def _why_not(self, one: Wanted) -> str:
        if (one.branch, one.snapshot.id) in self.on:
            return "it is there"
        if self.there is not None and one.snapshot.step < self.heads.get(one.branch, -1):
            return "it is older than the head of the branch there"
        return ""

    def _learn(self) -> None:
        assert self.there is not None
        for branch in self.there.branches():
            for snapshot in itertools.islice(self.there.snapshots(branch), KNOWN_SNAPSHOTS):
                try:
                    self.known.learn(self._there_now(snapshot))
                except (Damaged, NotFound, Unsupported):
                    continue  # Then nothing is shared with it.

    def _there_now(self, snapshot: Snapshot) -> Manifest:
        """A manifest of the target, with the places where its chunks are now."""
        assert self.there is not None
        return self.moved_there.resolved(self.there.manifest(snapshot))

    # -- what is to be sent -------------------------------------------------------------------------------

    def _plans(self, wanted: Sequence[Wanted]) -> dict[str, _Plan]:
        """All are planned before anything is sent, each as if those before it were there. By snapshot."""
        plans: dict[str, _Plan] = {}
        known = self.known.copy()
        for one in wanted:
            if one.snapshot.id not in self.ids and one.snapshot.id not in plans:
                plans[one.snapshot.id] = self._plan(one, known)
        return plans

    def _plan(self, one: Wanted, known: Known) -> _Plan:
        """Part after part, each as if what is `known` and those before it were there: then they are known."""
        parts = []
        for manifest in self.source.manifests(one.snapshot):
            parts.append(self._plan_part(self.moved_here.resolved(manifest), known))
            known.learn(self._manifest(parts[-1]))
        return _Plan(one, tuple(parts))

    def _plan_part(self, manifest: Manifest, known: Known) -> _Part:
        packs = tuple(self._new_packs(manifest, known))
        places: dict[str, tuple[StoredChunk, Place]] = {}
        for new in packs:
            for entry in new.entries:
                place = Place(new.name, entry.offset, entry.stored_bytes, entry.encoding, entry.base)
                places[entry.digest] = (StoredChunk(entry.digest, entry.size_bytes), place)
        needed = dict.fromkeys(chunk.digest for chunk in manifest.chunks)
        for name in list(needed):
            if name not in places:
                # What is there may build on what only the target has.
                needed |= dict.fromkeys(known.below(name))
        found = [places.get(name) or known.chunks[name] for name in needed]
        if not is_shallow(found):
            return self._plan_part(manifest, Known())
        sizes = {new.name: new.size_bytes for new in packs}
        sizes |= {place.pack: known.sizes[place.pack] for _, place in found if place.pack not in sizes}
        chunks, stored = tuple(chunk for chunk, _ in found), tuple(place for _, place in found)
        return _Part(manifest, packs, chunks, stored, sizes)

    def _new_packs(self, manifest: Manifest, known: Known) -> Iterator[NewPack]:
        missing: dict[str, list[Place]] = {}
        wanted: dict[tuple[str, int], str] = {}
        for chunk, place in zip(manifest.chunks, manifest.places, strict=True):
            if chunk.digest not in known.chunks:
                missing.setdefault(place.pack, []).append(place)
                wanted[place.pack, place.offset] = chunk.digest
        loose: list[tuple[str, pack.Entry]] = []
        for name, places in missing.items():
            footer = self._footer(name, manifest.packs[name])
            offsets = {place.offset for place in places}
            parts = [(name, entry) for entry in footer.entries if entry.offset in offsets]
            if [wanted[name, entry.offset] for _, entry in parts] != [entry.digest for _, entry in parts]:
                raise Damaged(f"{keys.pack(name)} does not hold what a manifest says", key=keys.pack(name))
            if len(parts) != len(places):
                raise Damaged(f"{keys.pack(name)} lacks what a manifest says", key=keys.pack(name))
            if len(parts) == len(footer.entries):
                yield NewPack.of(parts, footer.salt)
                continue
            loose += parts
        while loose:
            sizes = itertools.accumulate(aligned(entry.stored_bytes) for _, entry in loose)
            count = sum(size <= PACK_BYTES for size in sizes) or 1
            yield NewPack.of(loose[:count])
            loose = loose[count:]

    def _footer(self, name: str, size_bytes: int) -> pack.Footer:
        if name not in self.footers:
            key = keys.pack(name)
            try:
                if size_bytes < pack.TRAILER_BYTES:
                    raise Damaged("a pack is too short to have a trailer")
                end = self.source.store.get(key, size_bytes - pack.TRAILER_BYTES, pack.TRAILER_BYTES)
                trailer = pack.decode_trailer(end, size_bytes)
                tail = self.source.store.get(key, trailer.footer_offset, trailer.tail_bytes)
                self.footers[name] = pack.decode_tail(tail, size_bytes, name)
            except NotFound as error:
                raise Damaged(f"{key} is missing", key=key) from error
            except EverstepError as error:
                error.key = error.key or key
                raise
        return self.footers[name]

    # -- sending ------------------------------------------------------------------------------------------

    def _row(self, one: Wanted, why: str, plan: _Plan | None) -> Row:
        if plan is None:
            # Not to be sent, or there already, on another branch: then this one names it too.
            id = self.ids.get(one.snapshot.id, "")
            if not why and not self.dry_run:
                self._list(one, id)
            return Row(one.snapshot.id, id, one.branch, one.snapshot.step, 0, 0, why)
        if self.renamed:
            plan = self._plan(one, self.known.copy())
        id = "" if self.dry_run else self._commit(plan)
        self._note(one.branch, one.snapshot.id, id)
        shared, sent = plan.shared_bytes, plan.sent_bytes
        return Row(one.snapshot.id, id, one.branch, one.snapshot.step, sent, shared)

    def _commit(self, plan: _Plan) -> str:
        assert self.there is not None
        lease = self._lease(plan.wanted.branch)
        for _ in range(_TRIES):
            if self.same:
                id = plan.wanted.snapshot.id
                sent = Sending(self.source.store, self.target, on_sent=self._count).snapshot(id)
                needed = {key.rpartition("/")[2] for key in sent if key.startswith(keys.PACKS)}
                snapshot = plan.wanted.snapshot
            else:
                snapshot, needed = self._put(plan, lease)
            gone = self._gone(needed)
            if not gone:
                self._advance(snapshot, plan.wanted, lease)
                if not self._gone(needed):
                    if not self.same:
                        self.known.learn(self._there_now(snapshot))
                    return snapshot.id
                self.target.delete(self._last)
                gone = needed
            self.known.forget(gone)
            plan = self._plan(plan.wanted, self.known.copy())
        raise Conflict(
            f"{self.there.url} is pruned again and again of what snapshot {plan.wanted.snapshot.short} needs",
            kept="what was copied before stands",
            next="the same again",
        )

    def _list(self, one: Wanted, id: str) -> None:
        """Have a branch name a snapshot that the target has."""
        assert self.there is not None
        snapshot = self.there.snapshot(id)
        needed = set(self._there_now(snapshot).packs)
        self._advance(snapshot, one, self._lease(one.branch))
        if id in self.doomed.names or self._gone(needed):
            self.target.delete(self._last)
            raise Conflict(
                f"snapshot {snapshot.short} of {self.there.url} is being pruned",
                kept="what was copied before stands",
                next="the same again",
            )

    def _lease(self, branch: str) -> Lease:
        assert self.there is not None
        if branch not in self.leases:
            self.leases[branch] = Lease.take(self.target, branch)
            fence_former(self.there, self.leases[branch])
        return self.leases[branch]

    def _put(self, plan: _Plan, lease: Lease) -> tuple[Snapshot, set[str]]:
        """Packs, manifest and snapshot record; returns the snapshot and the packs that it needs."""
        names = in_parallel(plan.packs, PACKS_AT_ONCE, lambda: self._put_pack)
        renamed = {old: new for old, new in names if old != new.name}
        self.renamed = self.renamed or bool(renamed)
        made_of = [self._manifest(part, renamed) for part in plan.parts]
        made = self._record(plan, tuple(map(self._put_manifest, made_of)), lease)
        data = record.encode(made)
        if not self._put_same(keys.snapshot(digest(data)), data):
            raise Damaged(f"snapshot record {digest(data)[:SHORT]} of {self.target.url} is damaged")
        return Snapshot(digest(data), made), {name for manifest in made_of for name in manifest.packs}

    def _put_manifest(self, manifest: Manifest) -> str:
        """Returns its name."""
        encoded = manifests.encode(manifest)
        if digest(encoded) in self.doomed.names or not self._put_same(
            keys.manifest(digest(encoded)), encoded
        ):
            encoded = manifests.encode(msgspec.structs.replace(manifest, salt=secrets.token_hex(16)))
            self._put_same(keys.manifest(digest(encoded)), encoded)
        return digest(encoded)

    def _manifest(self, plan: _Part, renamed: dict[str, NewPack] | None = None) -> Manifest:
        names = {old: new.name for old, new in (renamed or {}).items()}
        return msgspec.structs.replace(
            plan.manifest,
            chunks=plan.chunks,
            places=tuple(
                msgspec.structs.replace(place, pack=names.get(place.pack, place.pack))
                for place in plan.places
            ),
            packs=dict(sorted((names.get(name, name), size) for name, size in plan.sizes.items())),
        )

    def _record(self, plan: _Plan, names: tuple[str, ...], lease: Lease) -> SnapshotRecord:
        before = plan.wanted.snapshot
        parents = tuple(self.ids[id] for id in before.record.parents if self.ids.get(id))
        new = {entry.digest: entry.size_bytes for one in plan.packs for entry in one.entries}
        return msgspec.structs.replace(
            before.record,
            manifests=names,
            branch=plan.wanted.branch,
            writer=lease.number,
            parents=parents,
            new_bytes=sum(new.values()),
            stored_bytes=plan.sent_bytes,
            origin=Origin(self.source.about.chain, self.source.url, before.id, before.step),
        )

    def _put_same(self, key: str, data: Buffer) -> bool:
        """Put an object that is named by its digest. False: another has the name."""
        if self.target.put(key, [data]):
            return True
        try:
            return bytes(self.target.get(key, 0, len(data) + 1)) == bytes(data)
        except (Damaged, NotFound):
            return False

    def _put_pack(self, new: NewPack) -> tuple[str, NewPack]:
        """Put a pack, unless it is there; under another name where that one cannot be relied on. Returns the
        name that was planned, and what was put."""
        planned = new.name
        while new.name in self.doomed.names or size_of(self.target, keys.pack(new.name)) != new.size_bytes:
            if new.name in self.doomed.names:
                new = NewPack.of(new.parts, secrets.token_bytes(16))
                continue
            if self.target.put(keys.pack(new.name), self._parts(new)):
                break
            new = NewPack.of(new.parts, secrets.token_bytes(16))
        self._count(new.size_bytes)
        return planned, new

    def _parts(self, new: NewPack) -> list[Buffer]:
        """The bytes of a pack, each chunk held against its digest or check."""
        builder = pack.Builder()
        for (name, entry), ours in zip(new.parts, new.entries, strict=True):
            key = keys.pack(name)
            try:
                stored = self.source.store.get(key, entry.offset, entry.stored_bytes)
            except NotFound as error:
                raise Damaged(f"{key} is missing", key=key) from error
            if not pack.is_stored(entry, stored):
                raise Damaged(
                    f"chunk {entry.digest[:12]} in {key} is not the one that was written",
                    kept="what was copied before stands",
                    next=f"everstep -r {self.source.url} verify",
                    key=key,
                )
            builder.add(ours.digest, ours.size_bytes, stored, ours.stored_bytes, ours.encoding, ours.base)
        name, parts = builder.finish(new.salt)
        assert name == new.name
        return parts

    def _count(self, size_bytes: int) -> None:
        self.done += size_bytes
        self.on_progress(min(self.done, self.total), self.total)

    # -- committing ---------------------------------------------------------------------------------------

    def _gone(self, needed: set[str]) -> set[str]:
        """Packs that somebody prunes, or has pruned since the last look."""
        news = self.doomed.look()
        gone = needed & self.doomed.names
        if news:
            gone |= {name for name in needed if not exists(self.target, keys.pack(name))}
        return gone

    def _advance(self, snapshot: Snapshot, wanted: Wanted, lease: Lease) -> None:
        assert self.there is not None
        nonce = secrets.token_hex(8)
        while True:
            mine = HeadRecord(
                snapshot=snapshot.id,
                step=snapshot.step,
                writer=lease.number,
                nonce=nonce,
                at=now(),
                branch=wanted.branch,
                number=self.there.head_number(wanted.branch) + 1,
                move=Move(COPY, f"{self.source.url}@{wanted.snapshot.short}"),
                format=snapshot.record.format,
            )
            lease.check()
            self._last = mine.key
            if self.target.put(mine.key, [record.seal(mine)]):
                return

    def _tags(self, wanted: Sequence[Wanted]) -> dict[str, str]:
        ids = {one.snapshot.id for one in wanted}
        named: dict[str, str] = {}
        for name, id in self.source.tags().items():
            if id not in ids or id not in self.ids:
                continue
            if self.dry_run or self.there is None:
                named[name] = self.ids[id]
                continue
            try:
                versions.tag(self.there, name, self.ids[id])
                named[name] = self.ids[id]
            except Mismatch as error:
                self.remarks.append(f"tag {name} was not copied: {error.problem}")
        return named
