"""Chunks: every encoding gives back the bytes, and takes no more memory than the chunk's size."""

from __future__ import annotations

import random
import threading
import tracemalloc
from typing import Any

import numpy as np
import pytest
import zstandard
from hostile import bit_flips, is_refused, same_every_time, truncations
from hypothesis import given
from hypothesis import strategies as st

from everstep.errors import Damaged, Unsupported
from everstep.format import chunk
from everstep.format.chunk import MAX_CHUNK_BYTES, MAX_WORD_BYTES, Encoding

RAW = b"words that repeat, words that repeat, words that do not; " * 3 + b"rest"
BASE = bytes(reversed(RAW))
SHUFFLED = (Encoding.SHUFFLE_ZSTD, Encoding.XOR_SHUFFLE_ZSTD)


def stored(encoding: Encoding, raw: bytes = RAW, base: bytes = BASE, word_bytes: int = 4) -> bytes:
    below = base if encoding is Encoding.XOR_SHUFFLE_ZSTD else None
    return chunk.encode(raw, encoding, word_bytes=word_bytes, base=below)


def decoded(data: bytes, encoding: int, size_bytes: int = len(RAW), base: bytes = BASE) -> bytes:
    return bytes(chunk.decode(data, encoding, size_bytes, base=lambda: base))


@same_every_time
@given(
    raw=st.binary(min_size=1, max_size=400)
    | st.builds(lambda part, n: part * n, st.binary(min_size=1), st.integers(1, 90)),
    encoding=st.sampled_from(list(Encoding)),
    word_bytes=st.integers(1, MAX_WORD_BYTES),
    pattern=st.binary(min_size=1, max_size=50),
)
def test_every_encoding_gives_back_the_bytes(
    raw: bytes, encoding: Encoding, word_bytes: int, pattern: bytes
) -> None:
    base = (pattern * len(raw))[: len(raw)]
    data = stored(encoding, raw, base, word_bytes)
    for kind in (bytes, bytearray, memoryview):
        back: Any = chunk.decode(kind(data), encoding, len(raw), base=lambda: base)
        assert bytes(back) == raw


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("size_bytes", [1, 15, 16, 17, 4095, 4096, 4097, 1 << 20, (1 << 20) + 7])
def test_sizes(encoding: Encoding, size_bytes: int) -> None:
    raw = (bytes(range(256)) * (size_bytes // 256 + 1))[:size_bytes]
    base = raw[::-1]
    for word_bytes in (1, 2, 3, 4, 8, 16):
        assert decoded(stored(encoding, raw, base, word_bytes), encoding, size_bytes, base) == raw


@same_every_time
@given(
    seed=st.integers(0, 99),
    size_bytes=st.integers(1, 5000) | st.sampled_from([1 << 18, (1 << 20) + 3, 3 * (1 << 20)]),
    encoding=st.sampled_from(list(Encoding)),
    word_bytes=st.sampled_from([1, 2, 4, 8, 16, 3]),
    changed=st.integers(0, 50),
)
def test_large_chunks_come_back_into_memory_that_is_there(
    seed: int, size_bytes: int, encoding: Encoding, word_bytes: int, changed: int
) -> None:
    """Planes of several blocks, a base that differs in a few bytes, and memory that held something else."""
    rng = random.Random(seed)
    base = rng.randbytes(size_bytes)
    raw = bytearray(base)
    for _ in range(changed):
        raw[rng.randrange(size_bytes)] ^= 1
    data = stored(encoding, bytes(raw), base, word_bytes)
    memory = memoryview(bytearray(b"x" * size_bytes))
    back = chunk.decode(data, encoding, size_bytes, base=lambda: base, into=memory)
    assert bytes(back) == raw
    assert (back is memory) is (encoding is not Encoding.RAW)
    if encoding is Encoding.XOR_SHUFFLE_ZSTD and size_bytes > 100_000:
        assert len(data) < size_bytes / 20


@pytest.mark.parametrize("encoding", [one for one in Encoding if one is not Encoding.RAW])
def test_memory_of_another_size_is_no_place_for_a_chunk(encoding: Encoding) -> None:
    for wrong in (0, len(RAW) - 1, len(RAW) + 1):
        with pytest.raises(ValueError, match="no place"):
            chunk.decode(
                stored(encoding), encoding, len(RAW), base=lambda: BASE, into=memoryview(bytearray(wrong))
            )


def test_each_plane_is_compressed_by_itself() -> None:
    """Exponents are alike and the rest is noise: in one block they would hide each other."""
    weights = (np.random.default_rng(1).standard_normal(16_000) * 0.02).astype(np.float32).tobytes()
    assert len(chunk.encode(weights, Encoding.SHUFFLE_ZSTD)) < 0.87 * len(weights)


def test_an_xor_may_be_made_in_place() -> None:
    a, b = bytearray(b"\x0f\xf0"), bytearray(b"\xff\xff")
    assert chunk.xor(a, b, a) is a
    assert a == b"\xf0\x0f"
    assert chunk.xor(a, b, memoryview(b)) == b"\x0f\xf0"


def test_threads_do_not_disturb_each_other() -> None:
    rng = random.Random(1)
    chunks = [bytes(rng.choices(range(9), k=300_000)) for _ in range(4)]
    wrong: list[bytes] = []

    def work(raw: bytes) -> None:
        for encoding in (Encoding.ZSTD, Encoding.SHUFFLE_ZSTD) * 5:
            back = chunk.decode(chunk.encode(raw, encoding), encoding, len(raw))
            if bytes(back) != raw:
                wrong.append(raw)

    workers = [threading.Thread(target=work, args=(raw,)) for raw in chunks]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_the_shuffle_is_the_documents() -> None:
    """By hand: words of 3 in 8 bytes, two of which are left over."""
    raw = bytes([1, 2, 3, 11, 12, 13, 98, 99])
    data = chunk.encode(raw, Encoding.SHUFFLE_ZSTD, word_bytes=3)
    assert data[0] == 3
    assert zstandard.ZstdDecompressor().decompress(data[1:]) == bytes([1, 11, 2, 12, 3, 13, 98, 99])


def test_the_xor_is_the_documents() -> None:
    data = chunk.encode(b"\x0f\xf0", Encoding.XOR_SHUFFLE_ZSTD, word_bytes=1, base=b"\xff\xff")
    assert zstandard.ZstdDecompressor().decompress(data[1:]) == b"\xf0\x0f"


@pytest.mark.parametrize("word_bytes", [-1, 0, 17, 160])
def test_words_that_could_not_be_read_are_not_written(word_bytes: int) -> None:
    for encoding in SHUFFLED:
        with pytest.raises(ValueError, match="word"):
            stored(encoding, word_bytes=word_bytes)


@pytest.mark.parametrize("base", [None, b"", BASE[:-1], BASE + b"x"])
def test_a_base_of_another_size_is_not_built_upon(base: bytes | None) -> None:
    with pytest.raises(ValueError, match="base"):
        chunk.encode(RAW, Encoding.XOR_SHUFFLE_ZSTD, base=base)


def test_digests_are_blake3() -> None:
    """The digest of nothing is in every text about BLAKE3."""
    assert chunk.digest(b"") == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    for data in (b"abc", bytearray(b"abc"), memoryview(b"abc")):
        assert chunk.digest(data) == chunk.digest(b"abc")


@same_every_time
@given(st.integers(0, 10**7), st.integers(1, 10**5))
def test_the_grid_covers_all_once(size_bytes: int, grid_bytes: int) -> None:
    size_bytes %= grid_bytes * 50
    pieces = chunk.grid(size_bytes, grid_bytes)
    assert sum(size for _, size in pieces) == size_bytes
    assert [at for at, _ in pieces] == [number * grid_bytes for number in range(len(pieces))]
    assert all(size == grid_bytes for _, size in pieces[:-1])
    assert all(0 < size <= grid_bytes for _, size in pieces)


@pytest.mark.parametrize(("size", "rounded"), [(0, 0), (1, 4096), (4095, 4096), (4096, 4096), (4097, 8192)])
def test_alignment(size: int, rounded: int) -> None:
    assert chunk.aligned(size) == rounded


# -- hostile bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", Encoding)
def test_every_truncation_is_refused(encoding: Encoding) -> None:
    assert all(is_refused(lambda it: decoded(it, encoding), short) for short in truncations(stored(encoding)))


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize(
    "follow",
    [
        b"\0",
        b"more",
        bytes(4096),
        zstandard.ZstdCompressor().compress(b""),
        b"\x50\x2a\x4d\x18\x04\0\0\0skip",
    ],
    ids=["zero", "text", "zeros", "an empty frame", "a frame to skip"],
)
def test_nothing_follows(encoding: Encoding, follow: bytes) -> None:
    data = stored(encoding)
    with pytest.raises(Damaged):
        decoded(data + follow, encoding)
    if encoding is not Encoding.RAW:
        with pytest.raises(Damaged):
            decoded(data + data, encoding)


@pytest.mark.parametrize("encoding", Encoding)
def test_every_flipped_bit_is_refused_or_other_bytes_of_the_size(encoding: Encoding) -> None:
    """What other bytes are, the digest says; here it only matters that there are not more."""
    for flipped in bit_flips(stored(encoding)):
        try:
            assert len(decoded(flipped, encoding)) == len(RAW)
        except Damaged:
            continue


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("size_bytes", [0, 1, len(RAW) - 1, len(RAW) + 1, MAX_CHUNK_BYTES])
def test_another_size_than_the_manifests(encoding: Encoding, size_bytes: int) -> None:
    with pytest.raises(Damaged):
        decoded(stored(encoding), encoding, size_bytes)


@pytest.mark.parametrize("encoding", [*Encoding, 77])
@pytest.mark.parametrize("size_bytes", [-1, MAX_CHUNK_BYTES + 1, 1 << 62, -(1 << 62)])
def test_sizes_out_of_bounds(encoding: int, size_bytes: int) -> None:
    with pytest.raises(Damaged, match="claims"):
        decoded(stored(Encoding.ZSTD), encoding, size_bytes)


@pytest.mark.parametrize("encoding", [4, 5, 100, 255])
def test_encodings_of_later_versions(encoding: int) -> None:
    with pytest.raises(Unsupported, match="newer"):
        decoded(RAW, encoding)


@pytest.mark.parametrize("first", [0, 17, 18, 255])
def test_words_out_of_bounds(first: int) -> None:
    for encoding in SHUFFLED:
        with pytest.raises(Damaged, match="word"):
            decoded(bytes([first]) + stored(encoding)[1:], encoding)


@pytest.mark.parametrize("base", [b"", BASE[:-1], BASE + b"x"])
def test_a_base_of_another_size(base: bytes) -> None:
    with pytest.raises(Damaged, match="base"):
        decoded(stored(Encoding.XOR_SHUFFLE_ZSTD), Encoding.XOR_SHUFFLE_ZSTD, base=base)


def test_no_base_at_all() -> None:
    with pytest.raises(Damaged, match="base"):
        chunk.decode(stored(Encoding.XOR_SHUFFLE_ZSTD), Encoding.XOR_SHUFFLE_ZSTD, len(RAW))


def test_the_base_is_asked_for_only_where_it_is_needed() -> None:
    def base() -> bytes:
        raise AssertionError("nobody needs it")

    for encoding in (Encoding.RAW, Encoding.ZSTD, Encoding.SHUFFLE_ZSTD):
        assert bytes(chunk.decode(stored(encoding), encoding, len(RAW), base=base)) == RAW


def claiming(content_bytes: int, body: bytes = b"") -> bytes:
    """A zstd frame whose header claims a content of that size."""
    return b"\x28\xb5\x2f\xfd\xe0" + content_bytes.to_bytes(8, "little") + body


EMPTY_LAST_BLOCK = b"\x01\0\0"
RUN_BLOCK = ((1 << 17) << 3 | 1 << 1).to_bytes(3, "little") + b"x"
"""Four bytes that stand for 128 KiB."""


@pytest.mark.parametrize("content_bytes", [1 << 27, 1 << 40, (1 << 64) - 3, (1 << 64) - 1])
def test_a_frame_that_claims_too_much_gets_no_memory(content_bytes: int) -> None:
    tracemalloc.start()
    try:
        for size_bytes in (1, len(RAW), MAX_CHUNK_BYTES):
            with pytest.raises(Damaged):
                decoded(claiming(content_bytes, EMPTY_LAST_BLOCK), Encoding.ZSTD, size_bytes)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_frame_that_holds_more_than_it_claims() -> None:
    bomb = claiming(1000, RUN_BLOCK * 5000 + EMPTY_LAST_BLOCK)
    tracemalloc.start()
    try:
        with pytest.raises(Damaged):
            decoded(bomb, Encoding.ZSTD, 1000)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_frame_that_holds_less_than_it_claims() -> None:
    with pytest.raises(Damaged):
        decoded(claiming(1 << 18, RUN_BLOCK + EMPTY_LAST_BLOCK), Encoding.ZSTD, 1 << 18)


def test_a_frame_in_crumbs_does_not_keep_a_reader_busy() -> None:
    empty = b"\0\0\0"
    for count, crumbs in ((1000, True), (1 << 20, False)):
        body = empty * count + (len(RAW) << 3 | 1).to_bytes(3, "little") + RAW
        frame = claiming(len(RAW), body)
        if crumbs:
            assert decoded(frame, Encoding.ZSTD) == RAW
        else:
            with pytest.raises(Damaged, match="crumbs"):
                decoded(frame, Encoding.ZSTD)


def test_a_frame_without_its_size() -> None:
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(RAW)
    with pytest.raises(Damaged):
        decoded(unsized, Encoding.ZSTD)


def test_a_frame_that_needs_a_dictionary() -> None:
    samples = zstandard.ZstdCompressionDict(RAW * 100)
    with pytest.raises(Damaged):
        decoded(zstandard.ZstdCompressor(dict_data=samples).compress(RAW), Encoding.ZSTD)


@pytest.mark.parametrize("data", [b"", b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18\x04\0\0\0skip", RAW])
def test_no_frames(data: bytes) -> None:
    for encoding in (Encoding.ZSTD, *SHUFFLED):
        for size_bytes in (0, 4, len(RAW)):
            if data[:1] == b"\x50" and size_bytes == 0 and encoding is Encoding.ZSTD:
                continue  # A frame to skip is no content, and no chunk has none.
            assert is_refused(lambda it, e=encoding, s=size_bytes: decoded(it, e, s), data)  # type: ignore[misc]
