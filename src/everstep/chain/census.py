"""What a chain lists, and what each snapshot needs: each object read once in the life of a `Census`.

All that it reads is immutable, but for what the listings themselves say. So who plans a prune after each
snapshot reads what is new since the last time, and little is kept of each: not whole records or manifests.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass

from everstep.chain.history import SHORT, Chain, Snapshot
from everstep.chain.names import is_object
from everstep.chain.parts import read as read_part
from everstep.chain.relocations import Relocations
from everstep.chain.retention import Listed
from everstep.errors import Damaged, EverstepError, NotFound
from everstep.format import keys
from everstep.format import manifest as manifests
from everstep.format.chunk import digest
from everstep.format.manifest import FORMAT
from everstep.format.record import MAX_RECORD_BYTES, HeadRecord, PartRecord, unseal
from everstep.store.base import Distant, Entry
from everstep.store.parallel import in_parallel


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
    format: int = FORMAT


class Census:
    """Reads a chain anew each time it is asked, but no object twice."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self._heads: dict[str, HeadRecord | EverstepError] = {}
        self._facts: dict[str, tuple[Listed, tuple[str, ...]]] = {}
        """By id: what retention goes by, and the manifests."""
        self._packs: dict[str, tuple[str, ...]] = {}
        """By manifest."""
        self._places: dict[str, dict[str, array[int]]] = {}
        """By manifest that was looked at closely."""
        self._commits: dict[tuple[str, int], dict[str, float]] = {}
        """By branch and writer: the head records that it was seen to have put, also those that have gone
        since, and when that was."""
        self._parts: dict[str, PartRecord | None] = {}
        """By key; None for one that cannot be read."""
        self.relocations = Relocations(chain.store)

    # -- what is listed -----------------------------------------------------------------------------------

    def advances(self) -> dict[str, list[Advance]]:
        """By branch, its head records, newest first. Raises Unsupported where a newer version wrote one."""
        entries = [entry for entry in self.chain.store.list(keys.HEADS) if is_object(entry.key)]
        self._heads = {one.key: self._heads[one.key] for one in entries if one.key in self._heads}
        self._at_once([one.key for one in entries if one.key not in self._heads], self._read_head)
        heads = [one for one in self._heads.values() if isinstance(one, HeadRecord) and one.fence is not True]
        self._at_once({one.snapshot for one in heads} - self._facts.keys(), self._read_facts)
        found: dict[str, list[Advance]] = {}
        for entry in entries:
            advance = self._advance(entry)
            if advance is not None:
                found.setdefault(advance.branch, []).append(advance)
                if advance.listed is not None:
                    seen = self._commits.setdefault((advance.branch, advance.writer), {})
                    seen[entry.key] = entry.modified_at
        listed = {one.listed.id for line in found.values() for one in line if one.listed is not None}
        self._facts = {id: facts for id, facts in self._facts.items() if id in listed}
        return found

    def commits(self, branch: str, writer: int) -> list[float]:
        """When a writer was seen to commit to a branch, by the store's clock, the newest first."""
        seen = self._commits.get((branch, writer), {})
        return [seen[key] for key in sorted(seen)]

    def _advance(self, entry: Entry) -> Advance | None:
        """None where it has gone since it was listed."""
        branch = entry.key.split("/")[1]
        if entry.key not in self._heads:
            return None
        head = self._heads[entry.key]
        if isinstance(head, EverstepError):
            unknown = Listed(entry.key, -1, listed_at=entry.modified_at)
            return Advance(entry.key, branch, entry.size_bytes, 0, unknown, head)
        if head.fence is True:
            return Advance(entry.key, branch, entry.size_bytes, head.writer, None, format=head.format)
        listed = self._listed(head, entry.modified_at)
        return Advance(entry.key, branch, entry.size_bytes, head.writer, listed, format=head.format)

    def _read_head(self, key: str) -> None:
        try:
            data = self.chain.store.get(key, 0, MAX_RECORD_BYTES + 1)
            self._heads[key] = unseal(data, HeadRecord, key)
        except NotFound:
            return
        except Damaged as error:
            error.key = key
            self._heads[key] = error

    def _read_facts(self, id: str) -> None:
        with suppress(Damaged, NotFound):
            self._known(id)

    def _at_once(self, names: Iterable[str], read: Callable[[str], None]) -> None:
        """Read many small objects: several at once where each takes its time."""
        store = self.chain.store
        in_parallel(list(names), store.at_once if isinstance(store, Distant) else 1, lambda: read)

    def _listed(self, head: HeadRecord, at: float) -> Listed:
        if head.snapshot not in self._facts:
            # It cannot be read. Where it is to stay, that is found out when it is asked what it needs.
            return Listed(head.snapshot, head.step, head.at, at)
        known, _ = self._facts[head.snapshot]
        return Listed(head.snapshot, head.step, known.taken_at, at, known.metrics, known.parents)

    def _known(self, id: str) -> tuple[Listed, tuple[str, ...]]:
        if id not in self._facts:
            self._facts[id] = _facts(self.chain.snapshot(id))
        return self._facts[id]

    def parts(self, wanted: Collection[str]) -> list[PartRecord]:
        """The part records at these keys that can be read: who commits looks at what they say once more, so
        one that cannot keeps nothing back."""
        self._parts = {key: one for key, one in self._parts.items() if key in wanted}
        self._at_once([key for key in wanted if key not in self._parts], self._read_part)
        return [one for one in self._parts.values() if one is not None]

    def _read_part(self, key: str) -> None:
        try:
            self._parts[key] = read_part(self.chain.store, key)
        except (Damaged, NotFound):
            self._parts[key] = None

    # -- what it needs ------------------------------------------------------------------------------------

    def manifests(self, id: str) -> tuple[str, ...]:
        """The names of a snapshot's manifests. Raises Damaged, NotFound."""
        return self._known(id)[1]

    def read_ahead(self, ids: Iterable[str], closely: bool) -> None:
        """Read what `packs` and `places` will be asked about these snapshots: several at once, where that is
        faster."""
        known = self._places if closely else self._packs
        wanted = [name for id in ids if id in self._facts for name in self._facts[id][1] if name not in known]

        def read(name: str) -> None:
            with suppress(Damaged):
                self._read_manifest(name, closely)

        self._at_once(dict.fromkeys(wanted), read)

    def packs(self, manifest: str) -> tuple[str, ...]:
        """The packs that a manifest names. Raises Damaged, also where it is missing."""
        if manifest not in self._packs:
            self._read_manifest(manifest, closely=False)
        return self._packs[manifest]

    def places(self, manifest: str) -> dict[str, tuple[tuple[int, int], ...]]:
        """The same, and of each pack where the manifest's chunks lie, and their stored sizes in bytes."""
        if manifest not in self._places:
            self._read_manifest(manifest, closely=True)
        found = self._places[manifest].items()
        return {pack: tuple(zip(flat[::2], flat[1::2], strict=True)) for pack, flat in found}

    def _read_manifest(self, manifest: str, closely: bool) -> None:
        key = keys.manifest(manifest)
        try:
            data = self.chain.store.get(key, 0, manifests.MAX_STORED_BYTES + 1)
        except NotFound as error:
            raise Damaged(f"manifest {manifest[:SHORT]} is missing", key=key) from error
        if digest(data) != manifest:
            raise Damaged(f"manifest {manifest[:SHORT]} does not match its digest", key=key)
        if closely:
            self._places[manifest] = manifests.decode_places(data)
        if manifest not in self._packs:
            self._packs[manifest] = tuple(manifests.decode_packs(data))

    def forget_manifests(self, but: Collection[str]) -> None:
        """Those that are not there any more."""
        self._packs = {name: packs for name, packs in self._packs.items() if keys.manifest(name) in but}
        self._places = {name: places for name, places in self._places.items() if name in self._packs}


def _facts(snapshot: Snapshot) -> tuple[Listed, tuple[str, ...]]:
    record = snapshot.record
    listed = Listed(snapshot.id, record.step, record.taken_at, metrics=record.metrics, parents=record.parents)
    return listed, record.manifests
