"""Chunks: contiguous bytes named by digest, and the encodings they are stored in.

An encoding never changes a digest: digests name raw bytes (FORMAT.md, "Chunks").
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypeAlias

import zstandard
from blake3 import blake3

from everstep.errors import Damaged, Unsupported

if TYPE_CHECKING:
    import numpy as np

Buffer: TypeAlias = bytes | bytearray | memoryview

DIGEST_BYTES = 32
ALIGNMENT_BYTES = 4096
"""Chunks start on this boundary in a pack, so that a store may write and read past the page cache."""

GRID_BYTES = 8 * 1024 * 1024
"""The default grid: leaves are cut into chunks of this size from the start of each slice."""

MAX_CHUNK_BYTES = 64 * 1024 * 1024
MAX_STORED_CHUNK_BYTES = 2 * MAX_CHUNK_BYTES
MAX_XOR_DEPTH = 8
MAX_WORD_BYTES = 16

_BLOCK_BYTES = 256 * 1024
"""Planes are gathered and scattered by blocks that stay in a processor's cache: fresh memory of a chunk's
size would cost more than the compression."""

_MAX_BLOCKS = 1 << 16
"""In a frame. A chunk of any size has a few hundred; empty ones could keep a reader busy for minutes."""

_REPEATED = 1
"""The zstd block that is one byte and how often it comes."""

_own = threading.local()


class Encoding(IntEnum):
    """How the stored bytes of a chunk give its raw bytes."""

    RAW = 0
    ZSTD = 1
    SHUFFLE_ZSTD = 2
    XOR_SHUFFLE_ZSTD = 3


def digest(data: Buffer) -> str:
    """The BLAKE3-256 digest of `data`, 64 lower-case hexadecimal digits."""
    return blake3(data).hexdigest()


def aligned(size_bytes: int) -> int:
    """`size_bytes` rounded up to the alignment."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def grid(size_bytes: int, grid_bytes: int) -> list[tuple[int, int]]:
    """The (offset, size) of each chunk of `size_bytes` contiguous bytes."""
    return [(start, min(grid_bytes, size_bytes - start)) for start in range(0, size_bytes, grid_bytes)]


def encode(raw: Buffer, encoding: Encoding, *, word_bytes: int = 4, base: Buffer | None = None) -> bytes:
    """The stored bytes of a chunk.

    Args:
        raw: the chunk's bytes.
        encoding: how to store them.
        word_bytes: size of one element, 1 to 16; the shuffle groups the n-th bytes of all elements.
        base: the raw bytes of the chunk to XOR with, of the same size (`XOR_SHUFFLE_ZSTD` only).
    """
    if encoding is Encoding.RAW:
        return bytes(raw)
    _check_word(word_bytes)
    if encoding is Encoding.ZSTD:
        return _compressor().compress(raw)
    if encoding is Encoding.XOR_SHUFFLE_ZSTD:
        if base is None or len(base) != len(raw):
            raise ValueError("an xor encoding needs a base of the chunk's own size")
        raw = xor(raw, base, bytearray(len(raw)))
    return encode_shuffled(raw, word_bytes)


def encode_shuffled(raw: Buffer, word_bytes: int) -> bytes:
    """The stored bytes of a chunk in `SHUFFLE_ZSTD`; or in `XOR_SHUFFLE_ZSTD`, if `raw` is XORed already."""
    _check_word(word_bytes)
    if word_bytes == 1:
        return b"\x01" + _compressor().compress(raw)
    import numpy as np

    frame = _compressor().compressobj(size=len(raw))
    scratch = np.empty(_BLOCK_BYTES, np.uint8)
    parts = [bytes([word_bytes])]
    for plane in _planes(raw, word_bytes):
        for start in range(0, len(plane), _BLOCK_BYTES):
            piece = plane[start : start + _BLOCK_BYTES]
            np.copyto(scratch[: len(piece)], piece)
            parts.append(frame.compress(scratch[: len(piece)].data))
        # A block of its own for each plane: what one is made of says nothing about the next.
        parts.append(frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    parts.append(frame.flush())
    return b"".join(parts)


def decode(
    stored: Buffer,
    encoding: int,
    size_bytes: int,
    *,
    base: Callable[[], Buffer] | None = None,
    into: memoryview | None = None,
) -> Buffer:
    """The raw bytes of a chunk; never more than `size_bytes` of memory are taken for them.

    Args:
        stored: what lies in the pack.
        encoding: the number of an `Encoding`.
        size_bytes: size of the raw bytes, at most `MAX_CHUNK_BYTES`.
        base: gives the raw bytes of the base chunk, called for `XOR_SHUFFLE_ZSTD` only.
        into: writable memory of `size_bytes` in which an encoded chunk is decoded, and which is then
            returned; `RAW` leaves it alone and returns `stored`. Its contents are undefined after an error.

    Raises:
        Damaged: `stored` is not such an encoding of `size_bytes` bytes.
        Unsupported: the encoding's number is unknown.
    """
    if not 0 <= size_bytes <= MAX_CHUNK_BYTES:
        raise Damaged(f"a chunk claims {size_bytes} bytes, more than the {MAX_CHUNK_BYTES} a chunk may have")
    if encoding == Encoding.RAW:
        if len(stored) != size_bytes:
            raise Damaged(f"a raw chunk of {size_bytes} bytes is stored in {len(stored)}")
        return stored
    if encoding not in (Encoding.ZSTD, Encoding.SHUFFLE_ZSTD, Encoding.XOR_SHUFFLE_ZSTD):
        raise Unsupported(
            f"chunk encoding {encoding} is newer than this Everstep", next="pip install -U everstep"
        )
    if into is not None and len(into) != size_bytes:
        raise ValueError(f"{len(into)} bytes of memory are no place for a chunk of {size_bytes}")
    if encoding == Encoding.ZSTD:
        return _unshuffled(stored, 1, size_bytes, into)
    if not len(stored) or not 1 <= stored[0] <= MAX_WORD_BYTES:
        raise Damaged(f"a shuffled chunk names no word size from 1 to {MAX_WORD_BYTES}")
    raw = _unshuffled(memoryview(stored)[1:], stored[0], size_bytes, into)
    if encoding == Encoding.SHUFFLE_ZSTD:
        return raw
    below = base() if base is not None else b""
    if len(below) != size_bytes:
        raise Damaged(f"an xor chunk of {size_bytes} bytes has a base of {len(below)}")
    return xor(raw, below, raw)


def xor(a: Buffer, b: Buffer, into: bytearray | memoryview) -> bytearray | memoryview:
    """Fill `into` with the XOR of two buffers of its size, and return it; it may be one of the two."""
    import numpy as np

    np.bitwise_xor(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8), out=np.frombuffer(into, np.uint8))
    return into


def decompress(stored: Buffer, size_bytes: int) -> bytes:
    """One zstd frame that says in its header that it holds `size_bytes`; the header is checked first."""
    try:
        frame = zstandard.get_frame_parameters(stored)
        if frame.content_size != size_bytes:
            raise Damaged(f"a zstd frame holds {frame.content_size} bytes where {size_bytes} belong")
        raw = zstandard.ZstdDecompressor().decompress(
            stored, read_across_frames=False, allow_extra_data=False
        )
    except (zstandard.ZstdError, ValueError, MemoryError) as error:
        raise Damaged(f"a zstd frame cannot be read: {error}") from error
    if len(raw) != size_bytes:
        raise Damaged(f"a zstd frame holds {len(raw)} bytes where {size_bytes} belong")
    return raw


def _check_word(word_bytes: int) -> None:
    if not 1 <= word_bytes <= MAX_WORD_BYTES:
        raise ValueError(f"a word has 1 to {MAX_WORD_BYTES} bytes, not {word_bytes}")


def _compressor() -> zstandard.ZstdCompressor:
    """This thread's own: none may be used by two at once, and making one takes as long as a small chunk."""
    if not hasattr(_own, "compressor"):
        # Numbers repeat in what their bytes are, hardly ever in sequences of them: a small table of
        # sequences finds those few as well, stays in the processor's cache, and is a third faster.
        parameters = zstandard.ZstdCompressionParameters(
            window_log=17,
            chain_log=6,
            hash_log=12,
            search_log=1,
            min_match=7,
            strategy=zstandard.STRATEGY_FAST,
        )
        _own.compressor = zstandard.ZstdCompressor(compression_params=parameters)
    compressor: zstandard.ZstdCompressor = _own.compressor
    return compressor


def _planes(raw: Buffer, word_bytes: int) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Views of all first bytes, all second bytes, and so on; then of a rest that is shorter than a word."""
    import numpy as np

    flat = np.frombuffer(raw, np.uint8)
    whole = len(flat) // word_bytes * word_bytes
    if whole:
        yield from (flat[first:whole:word_bytes] for first in range(word_bytes))
    if whole < len(flat):
        yield flat[whole:]


def _unshuffled(
    frame: Buffer, word_bytes: int, size_bytes: int, into: memoryview | None
) -> bytearray | memoryview:
    """The bytes that were shuffled by words and compressed to a frame; block by block to their places."""
    _check_frame(frame, size_bytes)
    raw: bytearray | memoryview = bytearray(size_bytes) if into is None else into
    try:
        reader = zstandard.ZstdDecompressor().stream_reader(frame)
        if word_bytes == 1:
            _fill(reader, memoryview(raw))
        else:
            import numpy as np

            scratch = np.empty(min(_BLOCK_BYTES, size_bytes), np.uint8)
            for plane in _planes(raw, word_bytes):
                for start in range(0, len(plane), _BLOCK_BYTES):
                    piece = plane[start : start + _BLOCK_BYTES]
                    _fill(reader, scratch[: len(piece)].data)
                    np.copyto(piece, scratch[: len(piece)])
        if reader.read(1):
            raise Damaged(f"a zstd frame holds more than the {size_bytes} bytes that it claims")
    except (zstandard.ZstdError, ValueError, MemoryError) as error:
        raise Damaged(f"a zstd frame cannot be read: {error}") from error
    return raw


def _fill(reader: zstandard.ZstdDecompressionReader, buffer: memoryview) -> None:
    while len(buffer):
        count = reader.readinto(buffer)
        if not count:
            raise Damaged(f"a zstd frame ends {len(buffer)} bytes before it should")
        buffer = buffer[count:]


def _check_frame(frame: Buffer, size_bytes: int) -> None:
    """Raises Damaged where `frame` is not one whole zstd frame, and nothing else, that says in its header
    that it holds `size_bytes`. Reads headers only: a stream's reader does not tell where a frame ends."""
    try:
        facts = zstandard.get_frame_parameters(frame)
        at = zstandard.frame_header_size(frame)
    except (zstandard.ZstdError, ValueError) as error:
        raise Damaged(f"a zstd frame cannot be read: {error}") from error
    if facts.content_size != size_bytes:
        raise Damaged(f"a zstd frame holds {facts.content_size} bytes where {size_bytes} belong")
    last, blocks = False, 0
    while not last:
        blocks += 1
        header = int.from_bytes(bytes(frame[at : at + 3]), "little")
        if at + 3 > len(frame) or blocks > _MAX_BLOCKS:
            raise Damaged("a zstd frame is cut short, or into crumbs")
        last, kind, block_bytes = bool(header & 1), header >> 1 & 3, header >> 3
        at += 3 + (1 if kind == _REPEATED else block_bytes)
    if at + 4 * facts.has_checksum != len(frame):
        raise Damaged("a zstd frame does not end where its stored bytes do")
