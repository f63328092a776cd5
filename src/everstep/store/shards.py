"""What the members of a parity set hold (FORMAT.md, "Parity sets"): pure, and never more of an object in
memory than its parity.

A large object is cut into k contiguous parts of equal size, and m more are computed from them; any k of the
k+m give it back. Each is a shard: a header that says what it is, a table with the digest of each of its
blocks, the part. So a range is read from the one or two shards it lies in, every block of it is checked, and
a damaged one is found and located. A small object is kept whole, as a copy, by every member.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

from blake3 import blake3

from everstep.errors import Damaged, Unsupported
from everstep.store.base import MAX_KEY_CHARACTERS, Buffer

BLOCK_BYTES = 64 * 1024
PAGE = 4096
DIGEST_BYTES = 32
VERSION = 1
SMALL_BYTES = 64 * 1024
"""Objects that are smaller are kept as copies: a shard would be little but header."""

MAX_MEMBERS = 64
MAX_OBJECT_BYTES = 1 << 40
_STRIDE_BYTES = 1024 * 1024
"""So much of each part is encoded at once."""

_SHARD_MAGIC = b"EVSTSHRD"
_COPY_MAGIC = b"EVSTCOPY"
_SHARD = struct.Struct("<8sHBBBxHIIQ")
_COPY = struct.Struct("<8sHBB4xQ16s32s")
HEAD_BYTES = 2 * PAGE
"""A first read of a shard: its header, and the table of all but large ones."""

_PER_TABLE_PAGE = PAGE // DIGEST_BYTES


@dataclass(frozen=True)
class Shape:
    """`k` parts, any of which can be had from `m` more."""

    k: int
    m: int

    @property
    def members(self) -> int:
        return self.k + self.m

    def __str__(self) -> str:
        return f"{self.k}+{self.m}"

    def part_bytes(self, size_bytes: int) -> int:
        """The size of each part of an object: whole pages, so that chunks keep their alignment."""
        return _rounded(-(-size_bytes // self.k), PAGE)


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _blocks(part_bytes: int) -> int:
    return -(-part_bytes // BLOCK_BYTES)


def payload_at(part_bytes: int) -> int:
    """Where in a shard the part begins."""
    return PAGE + _rounded(DIGEST_BYTES * _blocks(part_bytes), PAGE)


def _filler_bytes(shape: Shape, size_bytes: int) -> int:
    """Zeros behind the part, so that a shard's length tells the object's size (or that its header does)."""
    slack = shape.part_bytes(size_bytes) * shape.k - size_bytes
    return slack // PAGE if size_bytes % PAGE == 0 else shape.k


def size_by_length(shape: Shape, length: int) -> int | None:
    """The size of the object of which a shard is so long; None where the header has to be asked, or it is no
    shard's length."""
    pages, filler = divmod(length, PAGE)
    full, rest = divmod(pages - 1, _PER_TABLE_PAGE * (BLOCK_BYTES // PAGE) + 1)
    part = PAGE * (full * _PER_TABLE_PAGE * (BLOCK_BYTES // PAGE) + max(rest - 1, 0))
    if filler >= shape.k or pages < 3 or rest == 1:
        return None
    return part * shape.k - filler * PAGE


# -- an object as one run of bytes --------------------------------------------------------------------------


class Whole:
    """The bytes of `parts`, one after the other, and zeros up to `end`: ranges of them without copies, where
    they lie in one buffer."""

    def __init__(self, parts: Sequence[Buffer]) -> None:
        self._views = [memoryview(part).cast("B") for part in parts if len(part)]
        self._ends = list(accumulate(map(len, self._views)))
        self.size_bytes = self._ends[-1] if self._ends else 0

    def views(self, start: int, size_bytes: int) -> Iterator[memoryview]:
        """The buffers of a range; zeros for what lies behind the end."""
        number = bisect_right(self._ends, start)
        while size_bytes and number < len(self._views):
            view = self._views[number]
            offset = start - (self._ends[number] - len(view))
            piece = view[offset : offset + size_bytes]
            yield piece
            start, size_bytes, number = start + len(piece), size_bytes - len(piece), number + 1
        if size_bytes:
            yield memoryview(bytes(size_bytes))

    def bytes_at(self, start: int, size_bytes: int) -> Buffer:
        found = list(self.views(start, size_bytes))
        return found[0] if len(found) == 1 else b"".join(found)


# -- shards -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What a shard says of itself. `table` has the digest of each block of its part."""

    key: str
    shape: Shape
    index: int
    size_bytes: int
    table: bytes

    @property
    def part_bytes(self) -> int:
        return self.shape.part_bytes(self.size_bytes)

    @property
    def payload_at(self) -> int:
        return payload_at(self.part_bytes)

    @property
    def length(self) -> int:
        """The whole shard's."""
        return self.payload_at + self.part_bytes + _filler_bytes(self.shape, self.size_bytes)

    def encoded(self) -> bytes:
        name = self.key.encode()
        front = _SHARD.pack(
            _SHARD_MAGIC, VERSION, self.shape.k, self.shape.m, self.index, len(name), BLOCK_BYTES,
            len(self.table) // DIGEST_BYTES, self.size_bytes,
        )  # fmt: skip
        body = (front + bytes(DIGEST_BYTES) + name).ljust(PAGE, b"\0")
        table = self.table.ljust(_rounded(len(self.table), PAGE), b"\0")
        seal = blake3(body + table).digest()
        return body[: len(front)] + seal + body[len(front) + DIGEST_BYTES :] + table

    def is_block(self, number: int, data: Buffer) -> bool:
        at = number * DIGEST_BYTES
        return blake3(data).digest() == self.table[at : at + DIGEST_BYTES]


def head_bytes(first: Buffer) -> int:
    """How long header and table are, out of the first page. Raises Damaged, Unsupported."""
    if len(first) < PAGE:
        raise Damaged("a shard is too short to have a header")
    magic, version, k, m, _, _, block, count, size_bytes = _SHARD.unpack_from(first)
    if magic != _SHARD_MAGIC:
        raise Damaged("it is no shard")
    if version > VERSION:
        raise Unsupported(f"a shard has version {version}, newer than this Everstep")
    if not k or k + m > MAX_MEMBERS or block != BLOCK_BYTES or size_bytes > MAX_OBJECT_BYTES:
        raise Damaged("a shard's header says what none can say")
    part = Shape(k, m).part_bytes(size_bytes)
    if count != _blocks(part):
        raise Damaged("a shard's header says what none can say")
    return payload_at(part)


def decode_header(data: Buffer, key: str) -> Header:
    """The header of a shard of the object `key`, out of its first `head_bytes`.

    Raises:
        Damaged: it is none, or another object's.
        Unsupported: a newer version wrote it.
    """
    size = head_bytes(data)
    if len(data) < size:
        raise Damaged("a shard is too short to have a header")
    _, _, k, m, index, name_bytes, _, count, size_bytes = _SHARD.unpack_from(data)
    name = bytes(data[_SHARD.size + DIGEST_BYTES :][: min(name_bytes, MAX_KEY_CHARACTERS)])
    table = bytes(data[PAGE : PAGE + count * DIGEST_BYTES])
    found = Header(name.decode("utf-8", "replace"), Shape(k, m), index, size_bytes, table)
    if index >= k + m or found.encoded() != bytes(data[:size]):
        raise Damaged("a shard's header is not as it was written")
    if found.key != key:
        raise Damaged(f"it is a shard of {found.key}")
    return found


def cut(key: str, shape: Shape, whole: Whole) -> list[list[Buffer]]:
    """The shards of an object, each as buffers to put one after the other. The data parts are the caller's
    own memory; only the parity is new."""
    part = shape.part_bytes(whole.size_bytes)
    parity: list[list[Buffer]] = [[] for _ in range(shape.m)]
    tables = [bytearray() for _ in range(shape.members)]
    encoder = _encoder(shape)
    for at in range(0, part, _STRIDE_BYTES):
        size = min(_STRIDE_BYTES, part - at)
        data = [whole.bytes_at(number * part + at, size) for number in range(shape.k)]
        more = encoder.encode(data, list(range(shape.k, shape.members)))
        for number, piece in enumerate((*data, *more)):
            view = memoryview(piece)
            for start in range(0, size, BLOCK_BYTES):
                tables[number] += blake3(view[start : start + BLOCK_BYTES]).digest()
        for number, piece in enumerate(more):
            parity[number].append(piece)
    filler = bytes(_filler_bytes(shape, whole.size_bytes))
    shards = []
    for number in range(shape.members):
        header = Header(key, shape, number, whole.size_bytes, bytes(tables[number]))
        payload = list(whole.views(number * part, part)) if number < shape.k else parity[number - shape.k]
        shards.append([header.encoded(), *payload, filler])
    return shards


def joined(shape: Shape, pieces: dict[int, Buffer]) -> list[Buffer]:
    """The same range of all k parts, out of that of any k shards by their indices."""
    chosen = sorted(pieces)[: shape.k]
    if chosen == list(range(shape.k)):
        return [pieces[number] for number in chosen]
    found: list[Buffer] = _decoder(shape).decode([pieces[number] for number in chosen], chosen)
    return found


def refuse_without_zfec() -> None:
    """Raises Unsupported where the package is not installed."""
    import importlib.util

    if importlib.util.find_spec("zfec") is None:
        raise Unsupported(
            "a parity set needs the package zfec, which is not installed",
            kept="nothing was touched",
            next="pip install 'everstep[parity]'",
        )


@lru_cache(maxsize=8)
def _encoder(shape: Shape) -> Any:
    import zfec  # type: ignore[import-untyped]

    return zfec.Encoder(shape.k, shape.members)


@lru_cache(maxsize=8)
def _decoder(shape: Shape) -> Any:
    import zfec

    return zfec.Decoder(shape.k, shape.members)


# -- copies -------------------------------------------------------------------------------------------------

COPY_BYTES = _COPY.size
"""What a copy is longer than the object."""


def copy_of(key: str, shape: Shape, parts: Sequence[Buffer], nonce: bytes) -> bytes:
    """An object as every member keeps it, with a seal behind it; `nonce`, 16 bytes, tells who put it."""
    content = b"".join(parts)
    front = _COPY.pack(_COPY_MAGIC, VERSION, shape.k, shape.m, len(content), nonce, bytes(DIGEST_BYTES))
    front = front[:-DIGEST_BYTES]
    return b"".join((content, front, _seal(key, content, front)))


def out_of_copy(data: Buffer, key: str) -> bytes:
    """The object. Raises Damaged, also where it is another's copy; Unsupported."""
    whole = bytes(data)
    if len(whole) < COPY_BYTES:
        raise Damaged("a copy is too short to be one")
    content, end = whole[:-COPY_BYTES], whole[-COPY_BYTES:]
    magic, version, _, _, size, _, seal = _COPY.unpack(end)
    if magic != _COPY_MAGIC:
        raise Damaged("it is no copy of a parity set")
    if version > VERSION:
        raise Unsupported(f"a copy has version {version}, newer than this Everstep")
    if size != len(content) or seal != _seal(key, content, end[:-DIGEST_BYTES]):
        raise Damaged("a copy is not as it was written")
    return content


def _seal(key: str, content: Buffer, front: bytes) -> bytes:
    return blake3(key.encode() + b"\0").update(content).update(front).digest()


def most(sizes: Sequence[int]) -> int:
    """What most of them say; of equally many the first."""
    return Counter(sizes).most_common(1)[0][0]
