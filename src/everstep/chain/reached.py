"""Which packs the manifests that stay need, and what of those; through relocations, as a reader finds it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TypeAlias

from everstep.chain.census import Census
from everstep.chain.relocations import Moved
from everstep.format import keys

At: TypeAlias = tuple[str, int]
"""A pack, and an offset in it."""


class Reached:
    """Grows with each manifest that is added.

    Args:
        there: the packs that there are; what was relocated counts only where it is in one of those, and
            that stays.
        closely: look at every chunk, not at those alone that were relocated.

    Attributes:
        packs: names of packs.
        records: keys of relocation records.
        live: by pack, what is needed of it: offsets and stored sizes in bytes; complete where it was looked
            at closely.
        known_as: by where a relocated chunk is now, the places that manifests give it.
    """

    def __init__(self, census: Census, there: Iterable[str], closely: bool) -> None:
        self.packs: set[str] = set()
        self.records: set[str] = set()
        self.live: dict[str, dict[int, int]] = defaultdict(dict)
        self.known_as: dict[At, set[At]] = defaultdict(set)
        self._census = census
        self._table = census.relocations.table
        self._there = frozenset(there)
        self._closely = closely

    def add(self, manifests: Iterable[str]) -> None:
        """Raises Damaged where one cannot be read; nothing is added then."""
        for manifest in list(map(self._look_at, manifests)):
            for pack, chunks in manifest.items():
                self._add(pack, chunks)

    def _look_at(self, manifest: str) -> dict[str, tuple[tuple[int, int], ...] | None]:
        """By pack, offsets and sizes of chunks; None where those do not matter."""
        names = self._census.packs(manifest)
        if not self._closely and self._table.sources.isdisjoint(names):
            return dict.fromkeys(names)
        places = self._census.places(manifest)
        wanted = names if self._closely else self._table.sources
        return {name: places.get(name, ()) if name in wanted else None for name in names}

    def _add(self, pack: str, chunks: tuple[tuple[int, int], ...] | None) -> None:
        if chunks is None or pack not in self._table.sources:
            self.packs.add(pack)
            self.live[pack].update(chunks or ())
            return
        for offset, size_bytes in chunks:
            moved = self._moved(pack, offset)
            if moved is None:
                self.packs.add(pack)
                self.live[pack][offset] = size_bytes
            else:
                self.packs.add(moved.pack)
                self.records.add(moved.key)
                self.live[moved.pack][moved.offset] = size_bytes
                self.known_as[moved.pack, moved.offset].add((pack, offset))

    def _moved(self, pack: str, offset: int) -> Moved | None:
        return next((one for one in self._table.moved(pack, offset) if one.pack in self._there), None)

    def keys(self) -> set[str]:
        """Those of the packs and records."""
        return {*map(keys.pack, self.packs), *self.records}
