"""What a chain lists, and what each snapshot needs: each object read once in the life of a `Census`.

All that it reads is immutable, but for what the listings themselves say. So who plans a prune after each
snapshot reads what is new since the last time, and little is kept of each: not whole records or manifests.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from everstep.chain.history import SHORT, Chain, Snapshot
from everstep.chain.names import is_object
from everstep.chain.retention import Listed
from everstep.errors import Damaged, EverstepError, NotFound, Unsupported
from everstep.format import keys
from everstep.format import manifest as manifests
from everstep.format.chunk import digest
from everstep.format.record import MAX_RECORD_BYTES, HeadRecord, unseal
from everstep.store.base import Entry


@dataclass(frozen=True)
class Advance:
    """A head record; `listed` is None for a fence. Of one that cannot be read `listed` stands for what nobody
    knows, with the key for an id, and `damage` says why."""

    key: str
    branch: str
    size_bytes: int
    writer: int
    listed: Listed | None
    damage: EverstepError | None = None


class Census:
    """Reads a chain anew each time it is asked, but no object twice."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self._heads: dict[str, HeadRecord | EverstepError] = {}
        self._facts: dict[str, tuple[Listed, tuple[str, ...]]] = {}
        """By id: what retention goes by, and the manifests."""
        self._packs: dict[str, tuple[str, ...]] = {}
        """By manifest."""

    # -- what is listed -----------------------------------------------------------------------------------

    def advances(self) -> dict[str, list[Advance]]:
        """By branch, its head records, newest first. Raises Unsupported where a newer version wrote one."""
        entries = [entry for entry in self.chain.store.list(keys.HEADS) if is_object(entry.key)]
        self._heads = {one.key: self._heads[one.key] for one in entries if one.key in self._heads}
        found: dict[str, list[Advance]] = {}
        for entry in entries:
            advance = self._advance(entry)
            if advance is not None:
                found.setdefault(advance.branch, []).append(advance)
        listed = {one.listed.id for line in found.values() for one in line if one.listed is not None}
        self._facts = {id: facts for id, facts in self._facts.items() if id in listed}
        return found

    def _advance(self, entry: Entry) -> Advance | None:
        """None where it has gone since it was listed."""
        branch = entry.key.split("/")[1]
        if entry.key not in self._heads:
            try:
                data = self.chain.store.get(entry.key, 0, MAX_RECORD_BYTES + 1)
                self._heads[entry.key] = unseal(data, HeadRecord, entry.key)
            except NotFound:
                return None
            except Damaged as error:
                error.key = entry.key
                self._heads[entry.key] = error
        head = self._heads[entry.key]
        if isinstance(head, EverstepError):
            unknown = Listed(entry.key, -1, listed_at=entry.modified_at)
            return Advance(entry.key, branch, entry.size_bytes, 0, unknown, head)
        if head.fence is True:
            return Advance(entry.key, branch, entry.size_bytes, head.writer, None)
        listed = self._listed(head, entry.modified_at)
        return Advance(entry.key, branch, entry.size_bytes, head.writer, listed)

    def _listed(self, head: HeadRecord, at: float) -> Listed:
        try:
            known, _ = self._known(head.snapshot)
        except (Damaged, NotFound):
            # Where it is to stay, that is found out when it is asked what it needs.
            return Listed(head.snapshot, head.step, head.at, at)
        return Listed(head.snapshot, head.step, known.taken_at, at, known.metrics, known.parents)

    def _known(self, id: str) -> tuple[Listed, tuple[str, ...]]:
        if id not in self._facts:
            self._facts[id] = _facts(self.chain.snapshot(id))
        return self._facts[id]

    # -- what it needs ------------------------------------------------------------------------------------

    def objects(self, id: str) -> set[str]:
        """The keys of all objects that a snapshot consists of. Raises Damaged."""
        try:
            _, names = self._known(id)
            found = {keys.snapshot(id), *map(keys.manifest, names)}
            return found | {keys.pack(pack) for name in names for pack in self.packs(name)}
        except (Damaged, NotFound) as error:
            raise Damaged(
                f"snapshot {id[:SHORT]} cannot be read ({error.problem}), so nothing was pruned",
                kept="nothing was touched",
                next=f"everstep -r {self.chain.url} verify",
                key=error.key,
            ) from error

    def readable_objects(self, id: str) -> set[str]:
        """The same for a snapshot that is to go: what cannot be read is left out."""
        try:
            return self.objects(id)
        except Damaged:
            return {keys.snapshot(id)}

    def packs(self, manifest: str) -> tuple[str, ...]:
        """The packs that a manifest names. Raises Damaged, also where it is missing."""
        if manifest not in self._packs:
            key = keys.manifest(manifest)
            try:
                data = self.chain.store.get(key, 0, manifests.MAX_STORED_BYTES + 1)
            except NotFound as error:
                raise Damaged(f"manifest {manifest[:SHORT]} is missing", key=key) from error
            if digest(data) != manifest:
                raise Damaged(f"manifest {manifest[:SHORT]} does not match its digest", key=key)
            self._packs[manifest] = tuple(manifests.decode_packs(data))
        return self._packs[manifest]

    def forget_manifests(self, but: Collection[str]) -> None:
        """Those that are not there any more."""
        self._packs = {name: packs for name, packs in self._packs.items() if keys.manifest(name) in but}


def _facts(snapshot: Snapshot) -> tuple[Listed, tuple[str, ...]]:
    record = snapshot.record
    if len(record.manifests) != 1:
        raise Unsupported(f"snapshot {snapshot.short} was taken by several ranks")
    listed = Listed(snapshot.id, record.step, record.taken_at, metrics=record.metrics, parents=record.parents)
    return listed, record.manifests
