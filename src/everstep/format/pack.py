"""Packs: chunks, then a footer that names them, then a fixed trailer (FORMAT.md, "Packs")."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from everstep.errors import Damaged, Unsupported
from everstep.format.chunk import (
    ALIGNMENT_BYTES,
    MAX_CHUNK_BYTES,
    MAX_STORED_CHUNK_BYTES,
    Buffer,
    Encoding,
    aligned,
    digest,
)

MAGIC = b"EVSTPACK"
VERSION = 1
TRAILER_BYTES = 64
MAX_ENTRIES = 1 << 16
MAX_PACK_BYTES = 1 << 40
CHECK_BYTES = 7

_HEADER = struct.Struct("<8s16sI4x")
_ENTRY = struct.Struct(f"<32s32sQIIB{CHECK_BYTES}s")
_TRAILER = struct.Struct("<8sHHIQ32s8x")
FOOTER_MAGIC = b"EVSTFOOT"


@dataclass(frozen=True)
class Entry:
    """One chunk of a pack. `base` is "" unless the encoding builds on another chunk.

    `check` covers the stored bytes: a zstd frame has bits that mean nothing, and no digest of what it holds
    tells when one of them flips.
    """

    digest: str
    size_bytes: int
    offset: int
    stored_bytes: int
    encoding: int
    base: str = ""
    check: bytes = bytes(CHECK_BYTES)


def check_of(stored: Buffer, encoding: int) -> bytes:
    """The `check` of a chunk; zeros where it is raw, for then its own digest covers the stored bytes."""
    return bytes(CHECK_BYTES) if encoding == Encoding.RAW else bytes.fromhex(digest(stored))[:CHECK_BYTES]


@dataclass(frozen=True)
class Footer:
    """What a pack holds; its digest is the pack's name. `salt` is sixteen zero bytes, unless a pack of
    that name was found damaged: then it makes another name."""

    entries: tuple[Entry, ...]
    salt: bytes = bytes(16)


@dataclass
class Builder:
    """Gathers chunks for a pack: `parts` are the buffers to store one after the other, `entries` what the
    footer will say. Buffers are kept, not copied."""

    parts: list[Buffer] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    end: int = 0

    def add(
        self, digest: str, size_bytes: int, stored: Buffer, stored_bytes: int, encoding: int, base: str
    ) -> None:
        """Add a chunk.

        Args:
            stored: the stored bytes, which may be followed by zeros up to the alignment (so that a buffer
                out of an arena goes to disk without a copy); `stored_bytes` is their number without those.
        """
        check = check_of(memoryview(stored)[:stored_bytes], encoding)
        self.entries.append(Entry(digest, size_bytes, self.end, stored_bytes, encoding, base, check))
        self.parts.append(stored)
        self.end += len(stored)
        gap = aligned(self.end) - self.end
        if gap:
            self.parts.append(bytes(gap))
            self.end += gap

    def finish(self, salt: bytes = bytes(16)) -> tuple[str, list[Buffer]]:
        """The pack's name and all its parts, footer and trailer included; their sizes add up to a multiple
        of the alignment."""
        footer = encode_footer(Footer(tuple(self.entries), salt))
        name = digest(footer)
        size_bytes = aligned(self.end + len(footer) + TRAILER_BYTES)
        gap = size_bytes - self.end - len(footer) - TRAILER_BYTES
        trailer = _TRAILER.pack(MAGIC, VERSION, 0, len(footer), self.end, bytes.fromhex(name))
        return name, [*self.parts, footer + bytes(gap) + trailer]


def encode_footer(footer: Footer) -> bytes:
    rows = [_HEADER.pack(FOOTER_MAGIC, footer.salt, len(footer.entries))]
    for one in footer.entries:
        base = bytes.fromhex(one.base) if one.base else bytes(32)
        sizes = (one.stored_bytes, one.size_bytes)
        rows.append(_ENTRY.pack(bytes.fromhex(one.digest), base, one.offset, *sizes, one.encoding, one.check))
    return b"".join(rows)


def decode_footer(data: Buffer) -> Footer:
    """Raises Damaged when `data` is not a footer, or its chunks overlap or stray from the alignment."""
    if len(data) < _HEADER.size:
        raise Damaged("a pack's footer is too short")
    magic, salt, count = _HEADER.unpack_from(data)
    if magic != FOOTER_MAGIC or count > MAX_ENTRIES or len(data) != _HEADER.size + count * _ENTRY.size:
        raise Damaged("a pack's footer is not a footer")
    if _HEADER.pack(magic, salt, count) != bytes(data[: _HEADER.size]):
        raise Damaged("a pack's footer has bytes set that must be zero")
    entries = []
    end = 0
    for number in range(count):
        at = _HEADER.size + number * _ENTRY.size
        chunk, base, offset, stored_bytes, size_bytes, encoding, check = _ENTRY.unpack_from(data, at)
        if encoding == Encoding.RAW and any(check):
            raise Damaged("a pack's footer has bytes set that must be zero")
        if (
            offset != end
            or not 0 < stored_bytes <= MAX_STORED_CHUNK_BYTES
            or not 0 < size_bytes <= MAX_CHUNK_BYTES
        ):
            raise Damaged("a pack's footer places a chunk where none can be")
        end = aligned(offset + stored_bytes)
        below = base.hex() if any(base) else ""
        entries.append(Entry(chunk.hex(), size_bytes, offset, stored_bytes, encoding, below, check))
    return Footer(tuple(entries), salt)


@dataclass(frozen=True)
class Trailer:
    """The last 64 bytes of a pack: where its footer lies and what the footer's digest is."""

    footer_offset: int
    footer_bytes: int
    footer_digest: str

    @property
    def tail_bytes(self) -> int:
        """Size of footer, gap and trailer together."""
        return aligned(self.footer_offset + self.footer_bytes + TRAILER_BYTES) - self.footer_offset


def decode_trailer(data: Buffer, pack_bytes: int) -> Trailer:
    """The trailer of a pack of `pack_bytes`.

    Raises:
        Damaged: it is none, or does not fit a pack of that size.
        Unsupported: a newer version wrote it.
    """
    if len(data) != TRAILER_BYTES:
        raise Damaged("a pack is too short to have a trailer")
    magic, version, flags, footer_bytes, footer_offset, footer_digest = _TRAILER.unpack(data)
    if magic != MAGIC:
        raise Damaged("a pack does not end with a trailer")
    if version > VERSION:
        raise Unsupported(
            f"a pack has version {version}, newer than this Everstep", next="pip install -U everstep"
        )
    trailer = Trailer(footer_offset, footer_bytes, footer_digest.hex())
    canonical = _TRAILER.pack(magic, version, 0, footer_bytes, footer_offset, footer_digest)
    if version < 1 or flags or canonical != bytes(data):
        raise Damaged("a pack's trailer has bytes set that must be zero")
    fits = footer_offset % ALIGNMENT_BYTES == 0 and footer_offset + trailer.tail_bytes == pack_bytes
    if not fits or pack_bytes > MAX_PACK_BYTES or footer_bytes > _HEADER.size + MAX_ENTRIES * _ENTRY.size:
        raise Damaged("a pack's trailer does not fit the pack's size")
    return trailer


def decode_tail(tail: Buffer, pack_bytes: int, name: str) -> Footer:
    """The footer of the pack `name`, out of its last bytes (from the footer's offset to the end).

    Raises:
        Damaged: a bit of them is not as it was written.
    """
    trailer = decode_trailer(tail[-TRAILER_BYTES:], pack_bytes)
    if trailer.tail_bytes != len(tail):
        raise Damaged("a pack's footer is not where its trailer says")
    footer, gap = tail[: trailer.footer_bytes], tail[trailer.footer_bytes : -TRAILER_BYTES]
    if trailer.footer_digest != name or digest(footer) != name:
        raise Damaged("a pack's footer is not the one that the pack is named after")
    if any(gap):
        raise Damaged("a pack's footer is followed by bytes that must be zero")
    decoded = decode_footer(footer)
    if data_bytes(decoded.entries) != trailer.footer_offset:
        raise Damaged("a pack's footer does not follow its last chunk")
    return decoded


def footer_bytes(entries: int) -> int:
    """The size of a footer of so many entries."""
    return _HEADER.size + entries * _ENTRY.size


def is_stored(one: Entry, stored: Buffer) -> bool:
    """Whether these are a chunk's stored bytes, as its entry says."""
    if len(stored) != one.stored_bytes:
        return False
    if one.encoding == Encoding.RAW:
        return one.stored_bytes == one.size_bytes and digest(stored) == one.digest
    return check_of(stored, one.encoding) == one.check


def check(data: memoryview, name: str) -> Footer:
    """The footer of the pack `name`, whose bytes `data` are, all of them held against their digests.

    Raises:
        Damaged: a bit of them is not as it was written.
        Unsupported: a newer version wrote it.
    """
    if len(data) < TRAILER_BYTES:
        raise Damaged("a pack is too short to have a trailer")
    trailer = decode_trailer(data[-TRAILER_BYTES:], len(data))
    footer = decode_tail(data[trailer.footer_offset :], len(data), name)
    for one in footer.entries:
        end = one.offset + one.stored_bytes
        if not is_stored(one, data[one.offset : end]):
            raise Damaged(f"chunk {one.digest[:12]} of a pack is not stored as it was written")
        if any(data[end : aligned(end)]):
            raise Damaged("a pack has padding that is not zero")
    return footer


def data_bytes(entries: Sequence[Entry]) -> int:
    """Where the chunks end and the footer begins."""
    return aligned(entries[-1].offset + entries[-1].stored_bytes) if entries else 0
