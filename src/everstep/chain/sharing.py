"""Which chunks a copy has to send, and how the packs that hold them are called: all of it known before a byte
of them is read, for a pack is named by its footer, and a footer says of each chunk what the source's says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from everstep.format import pack
from everstep.format.chunk import MAX_XOR_DEPTH, aligned, digest
from everstep.format.manifest import Manifest, Place, StoredChunk


@dataclass(frozen=True)
class NewPack:
    """A pack of the target: chunks of the source, in this order, as they are stored."""

    name: str
    size_bytes: int
    parts: tuple[tuple[str, pack.Entry], ...]
    """For each chunk, its pack in the source and its entry there."""
    entries: tuple[pack.Entry, ...]
    salt: bytes = bytes(16)

    @classmethod
    def of(cls, parts: Sequence[tuple[str, pack.Entry]], salt: bytes = bytes(16)) -> NewPack:
        entries, end = [], 0
        for _, one in parts:
            entries.append(replace(one, offset=end))
            end = aligned(end + one.stored_bytes)
        footer = pack.encode_footer(pack.Footer(tuple(entries), salt))
        size = aligned(end + len(footer) + pack.TRAILER_BYTES)
        return cls(digest(footer), size, tuple(parts), tuple(entries), salt)


@dataclass
class Known:
    """The chunks that the target has, and where; what a chunk builds on is known too, at most so deep that a
    reader takes it, and nothing builds on itself."""

    chunks: dict[str, tuple[StoredChunk, Place]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    depths: dict[str, int] = field(default_factory=dict)

    def copy(self) -> Known:
        return Known(dict(self.chunks), dict(self.sizes), dict(self.depths))

    def learn(self, manifest: Manifest) -> None:
        self.sizes |= manifest.packs
        for chunk, place in _bases_first(manifest):
            if chunk.digest in self.chunks or (place.base and place.base not in self.chunks):
                continue
            depth = self.depths[place.base] + 1 if place.base else 0
            if depth <= MAX_XOR_DEPTH:
                self.chunks[chunk.digest], self.depths[chunk.digest] = (chunk, place), depth

    def forget(self, packs: set[str]) -> None:
        """And what builds on something in them."""
        gone = {name for name, (_, place) in self.chunks.items() if place.pack in packs}
        while gone:
            for name in gone:
                del self.chunks[name], self.depths[name]
            gone = {name for name, (_, place) in self.chunks.items() if place.base in gone}

    def below(self, name: str) -> Iterator[str]:
        """A chunk, and all that it builds on."""
        while name:
            yield name
            name = self.chunks[name][1].base


def _bases_first(manifest: Manifest) -> Iterator[tuple[StoredChunk, Place]]:
    done: set[str] = set()
    for chunk in manifest.chunks:
        line = []
        name = chunk.digest
        while name and name not in done:
            line.append(manifest.place_of[name])
            done.add(name)
            name = line[-1][1].base
        yield from reversed(line)


def is_shallow(found: Sequence[tuple[StoredChunk, Place]]) -> bool:
    """Whether no chunk builds on more than a reader takes."""
    bases = {chunk.digest: place.base for chunk, place in found}
    for name in bases:
        depth = 0
        while bases.get(name, ""):
            name, depth = bases[name], depth + 1
            if depth > MAX_XOR_DEPTH:
                return False
    return True
