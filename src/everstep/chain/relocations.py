"""Where chunks are whose pack was given up because little of it was needed any more (`repack`).

A manifest never changes, so it goes on naming the old pack. Nobody looks here before a pack is missed: a
chain in which nothing was relocated costs no request more.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from everstep.chain import names
from everstep.chain.history import now
from everstep.errors import Damaged, EverstepError, NotFound, Unsupported
from everstep.format import keys, record
from everstep.format.manifest import Manifest
from everstep.format.record import NewPack, RelocationRecord, Spot
from everstep.store.base import Store


@dataclass(frozen=True)
class Moved:
    """Where a chunk is, too: in `pack`, of `pack_bytes`, as the record at `key` says."""

    pack: str
    pack_bytes: int
    offset: int
    key: str


class Table:
    """Relocation records, newest first, to be asked for one place after the other.

    Attributes:
        sources: the packs that chunks were copied from, as manifests name them.
        targets: the packs that they were copied to, and their sizes in bytes.
    """

    def __init__(self, records: Mapping[str, RelocationRecord]) -> None:
        self.keys = frozenset(records)
        self.sources = frozenset(name for one in records.values() for name in one.moved)
        self.targets = {new.name: new.size_bytes for one in records.values() for new in one.packs}
        self._moved: dict[tuple[str, int], list[Moved]] = {}
        for key, one in records.items():
            for source, spots in one.moved.items():
                for spot in spots:
                    new = one.packs[spot.pack]
                    moved = Moved(new.name, new.size_bytes, spot.offset, key)
                    self._moved.setdefault((source, spot.at), []).append(moved)

    def moved(self, pack: str, offset: int) -> Sequence[Moved]:
        """Where else that is which a manifest places here; the newest record's first."""
        return self._moved.get((pack, offset), ())

    def without(
        self, manifest: Manifest, gone: Callable[[str], bool], *, whole: bool = True
    ) -> Manifest | None:
        """A manifest that places nothing in a pack which is `gone`, but where that was copied to.

        Args:
            whole: None comes back where something is nowhere else; else that stays where it was.
        """
        lost = {name for name in manifest.packs if gone(name)}
        if not lost:
            return manifest
        packs = {name: size for name, size in manifest.packs.items() if name not in lost}
        places = []
        for place in manifest.places:
            if place.pack in lost:
                there = next(
                    (one for one in self.moved(place.pack, place.offset) if not gone(one.pack)), None
                )
                if there is None and whole:
                    return None
                if there is None:
                    packs[place.pack] = manifest.packs[place.pack]
                else:
                    packs[there.pack] = there.pack_bytes
                    place = msgspec.structs.replace(place, pack=there.pack, offset=there.offset)
            places.append(place)
        return msgspec.structs.replace(manifest, places=tuple(places), packs=dict(sorted(packs.items())))


class Relocations:
    """The relocation records of a chain, for who looks again and again. For several threads at once.

    Attributes:
        table: what they said at the last look; nothing, before the first one.
        damaged: by key, why one could not be read.
    """

    def __init__(self, store: Store) -> None:
        self.table = Table({})
        self.damaged: dict[str, EverstepError] = {}
        self._store = store
        self._records: dict[str, RelocationRecord] = {}
        self._lock = threading.Lock()

    def look(self) -> None:
        """One listing, and a read of each record that was not there before.

        Raises:
            Unavailable: the store does not answer.
        """
        with self._lock:
            listed = [one.key for one in self._store.list(keys.RELOCATIONS) if names.is_object(one.key)]
            found: dict[str, RelocationRecord] = {}
            self.damaged = {}
            for key in listed:
                try:
                    found[key] = self._records.get(key) or self._read(key)
                except NotFound:
                    continue  # Pruned since it was listed.
                except (Damaged, Unsupported) as error:
                    error.key = error.key or key
                    self.damaged[key] = error
            if found.keys() != self._records.keys():
                self._records, self.table = found, Table(found)

    def resolved(self, manifest: Manifest) -> Manifest:
        """A manifest with the places where its chunks are now; what is nowhere stays where it was said to be.
        As of the last look; asks the store only for packs that something was relocated out of."""
        sources = self.table.sources & manifest.packs.keys()
        gone = {name for name in sources if not names.exists(self._store, keys.pack(name))}
        return self.table.without(manifest, lambda name: name in gone, whole=False) or manifest

    def _read(self, key: str) -> RelocationRecord:
        return record.unseal(self._store.get(key, 0, record.MAX_RECORD_BYTES + 1), RelocationRecord, key)


def write_down(store: Store, packs: Mapping[str, int], moved: Mapping[str, Sequence[Spot]]) -> str:
    """Put a record of where chunks are now; durable on return. Returns its key.

    Args:
        packs: those that chunks were copied to, with their sizes in bytes, in the order that spots count
            them.
        moved: by pack, as manifests name it.
    """
    while True:
        made = RelocationRecord(
            packs=tuple(NewPack(name, size) for name, size in packs.items()),
            moved={source: tuple(spots) for source, spots in sorted(moved.items()) if spots},
            nonce=secrets.token_hex(8),
            at=now(),
            number=names.newest(store, keys.RELOCATIONS) + 1,
        )
        if store.put(made.key, [record.seal(made)]):
            return made.key
