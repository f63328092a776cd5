"""A pack anew, byte for byte, out of its chunks wherever they are: in what is left of it, in its copies, in
any other pack that holds the same digest.

A pack's bytes follow from its footer and its chunks' stored bytes, and the footer's digest is its name: so
what comes out is the pack, or it is noticed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from everstep.chain.names import is_object
from everstep.errors import Damaged, NotFound, Unsupported
from everstep.format import keys, pack
from everstep.format.chunk import (
    ALIGNMENT_BYTES,
    MAX_CHUNK_BYTES,
    MAX_STORED_CHUNK_BYTES,
    MAX_WORD_BYTES,
    MAX_XOR_DEPTH,
    Buffer,
    Encoding,
    aligned,
    decode,
    digest,
    encode,
)
from everstep.format.manifest import Manifest, Place, StoredChunk
from everstep.store.base import Store

_NOT_HAD = (Damaged, NotFound, Unsupported)
_WORDS = (4, 2, 8, 1, *(word for word in range(3, MAX_WORD_BYTES + 1) if word not in (4, 8)))
"""Sizes of words in the order in which they are likely."""


@dataclass(frozen=True)
class Rebuilt:
    """A pack's bytes. `missing` are the digests of chunks that were nowhere to be had: in their place is what
    stood there before, or zeros."""

    parts: Sequence[Buffer]
    good: int
    missing: tuple[str, ...]


def footer_of(store: Store, name: str, size_bytes: int | None = None) -> pack.Footer:
    """A pack's footer. Raises NotFound, Damaged, Unsupported."""
    key = keys.pack(name)
    if size_bytes is None:
        size_bytes = next((one.size_bytes for one in store.list(key, limit=1) if one.key == key), None)
    if size_bytes is None:
        raise NotFound(f"{store.url} has no object {key}", key=key)
    if size_bytes < pack.TRAILER_BYTES:
        raise Damaged("a pack is too short to have a trailer", key=key)
    end = store.get(key, size_bytes - pack.TRAILER_BYTES, pack.TRAILER_BYTES)
    trailer = pack.decode_trailer(end, size_bytes)
    tail = store.get(key, trailer.footer_offset, trailer.tail_bytes)
    return pack.decode_tail(tail, size_bytes, name)


def refuse_other_pack(name: str, data: Buffer) -> None:
    """Raises Damaged where a bit of these bytes is not as in the pack of this name."""
    try:
        pack.check(memoryview(data), name)
    except Damaged as error:
        error.key = error.key or keys.pack(name)
        raise


class Chunks:
    """Chunks by digest, over several stores. The footers of all packs there are read when the first chunk is
    asked for; those that cannot be read are left out.

    Args:
        stores: where to look, the best first.
        manifests: of the chain that is repaired: they place chunks in packs whose footers are damaged.
    """

    def __init__(self, stores: Sequence[Store], manifests: Callable[[], Sequence[Manifest]]) -> None:
        self._stores = stores
        self._manifests = manifests
        self._places: dict[str, list[tuple[Store, str, pack.Entry]]] | None = None

    def anew(self, name: str) -> Rebuilt | None:
        """A pack anew; None where it is not known what it held, or none of it is to be had."""
        footer = self._footer(name)
        if footer is None:
            return None
        builder = pack.Builder()
        missing = []
        for one in footer.entries:
            stored = self._stored(name, one)
            if stored is None:
                missing.append(one.digest)
            builder.parts += self._padded(one, stored if stored is not None else self._as_it_is(name, one))
        builder.entries = list(footer.entries)
        builder.end = pack.data_bytes(footer.entries)
        made, parts = builder.finish(footer.salt)
        if made != name or len(missing) == len(footer.entries):
            return None
        return Rebuilt(parts, len(footer.entries) - len(missing), tuple(missing))

    def good_in(self, store: Store, name: str, footer: pack.Footer) -> int:
        """How many chunks of a pack are whole in one store."""
        return sum(self._read(store, keys.pack(name), one) is not None for one in footer.entries)

    def footer(self, name: str) -> pack.Footer | None:
        return self._footer(name)

    def _padded(self, one: pack.Entry, stored: Buffer) -> list[Buffer]:
        gap = aligned(one.stored_bytes) - one.stored_bytes
        return [stored, bytes(gap)] if gap else [stored]

    def _as_it_is(self, name: str, one: pack.Entry) -> Buffer:
        try:
            data = bytes(self._stores[0].get(keys.pack(name), one.offset, one.stored_bytes))
        except _NOT_HAD:
            data = b""
        return data.ljust(one.stored_bytes, b"\0")

    def _footer(self, name: str) -> pack.Footer | None:
        for store in self._stores:
            try:
                return footer_of(store, name)
            except _NOT_HAD:
                continue
        return self._guessed(name)

    def _guessed(self, name: str) -> pack.Footer | None:
        """The footer as manifests have it, where they name all chunks of the pack and these can be had."""
        rows = {}
        for manifest in self._manifests():
            for chunk, place in zip(manifest.chunks, manifest.places, strict=True):
                if place.pack == name:
                    rows[place.offset] = pack.Entry(
                        chunk.digest,
                        chunk.size_bytes,
                        place.offset,
                        place.stored_bytes,
                        place.encoding,
                        place.base,
                    )
        entries = []
        for offset in sorted(rows):
            one = rows[offset]
            if one.encoding != Encoding.RAW:
                stored = next(self._everywhere(name, one), None)
                if stored is None:
                    return None
                one = pack.Entry(
                    one.digest, one.size_bytes, offset, one.stored_bytes, one.encoding, one.base,
                    pack.check_of(stored, one.encoding),
                )  # fmt: skip
            entries.append(one)
        footer = pack.Footer(tuple(entries))
        return footer if entries and digest(pack.encode_footer(footer)) == name else None

    def twin(self, chunk: StoredChunk, place: Place) -> tuple[str, int] | None:
        """A pack of the first store, and the offset in it, where the same stored bytes lie that a manifest
        places elsewhere; None where there are none."""
        for store, key, one in self._where().get(chunk.digest, ()):
            if store is not self._stores[0] or one.base != place.base:
                continue
            if (one.encoding, one.stored_bytes) != (place.encoding, place.stored_bytes):
                continue
            if self._read(store, key, one) is not None:
                return key.rpartition("/")[2], one.offset
        return None

    # -- one chunk ----------------------------------------------------------------------------------------

    def _stored(self, name: str, one: pack.Entry) -> Buffer | None:
        """The stored bytes of a chunk of a pack."""
        for store in self._stores:
            stored = self._read(store, keys.pack(name), one)
            if stored is not None:
                return stored
        return next((stored for stored in self._everywhere(name, one) if pack.is_stored(one, stored)), None)

    def _everywhere(self, name: str, one: pack.Entry) -> Iterator[Buffer]:
        """What may be a chunk's stored bytes: those of other packs, and the chunk encoded anew."""
        for store, key, other in self._where().get(one.digest, ()):
            if (other.encoding, other.stored_bytes, other.base) == (one.encoding, one.stored_bytes, one.base):
                stored = self._read(store, key, other)
                if stored is not None:
                    yield stored
        raw = self._raw(one.digest)
        base = self._raw(one.base) if one.base else None
        if raw is None or (one.base and base is None):
            return
        for word in (
            _WORDS if one.encoding in (Encoding.SHUFFLE_ZSTD, Encoding.XOR_SHUFFLE_ZSTD) else _WORDS[:1]
        ):
            try:
                yield encode(raw, Encoding(one.encoding), word_bytes=word, base=base)
            except ValueError:
                return

    def _raw(self, name: str, depth: int = 0) -> Buffer | None:
        """A chunk's bytes, verified."""
        for store, key, one in self._where().get(name, ()) if depth <= MAX_XOR_DEPTH else ():
            stored = self._read(store, key, one)
            if stored is None:
                continue
            base = self._raw(one.base, depth + 1) if one.base else None
            try:
                raw = decode(stored, one.encoding, one.size_bytes, base=lambda base=base: base or b"")  # type: ignore[misc]
            except (Damaged, Unsupported):
                continue
            if digest(raw) == name:
                return raw
        return None

    def _read(self, store: Store, key: str, one: pack.Entry) -> Buffer | None:
        if not 0 < one.stored_bytes <= MAX_STORED_CHUNK_BYTES or not 0 < one.size_bytes <= MAX_CHUNK_BYTES:
            return None
        try:
            stored = store.get(key, one.offset, one.stored_bytes)
        except _NOT_HAD:
            return None
        return stored if pack.is_stored(one, stored) else None

    def _where(self) -> dict[str, list[tuple[Store, str, pack.Entry]]]:
        if self._places is None:
            self._places = defaultdict(list)
            for store in self._stores:
                for entry in store.list(keys.PACKS):
                    if is_object(entry.key) and entry.size_bytes % ALIGNMENT_BYTES == 0:
                        name = entry.key.rpartition("/")[2]
                        try:
                            footer = footer_of(store, name, entry.size_bytes)
                        except _NOT_HAD:
                            continue
                        for one in footer.entries:
                            self._places[one.digest].append((store, entry.key, one))
        return self._places
