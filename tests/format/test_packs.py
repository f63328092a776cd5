"""Packs: what was added is found again, and no bit of footer, padding or trailer changes unseen."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest
from hostile import bit_flips, is_refused, same_every_time, truncations
from hypothesis import given
from hypothesis import strategies as st

from everstep.errors import Damaged, Unsupported
from everstep.format import chunk, pack
from everstep.format.chunk import MAX_CHUNK_BYTES, MAX_STORED_CHUNK_BYTES, Encoding
from everstep.format.pack import Builder, Entry, Footer

DIGEST = chunk.digest(b"some chunk")
BASE = chunk.digest(b"its base")


def built(chunks: list[bytes], salt: bytes = bytes(16)) -> tuple[str, bytes, list[Entry]]:
    builder = Builder()
    for raw in chunks:
        builder.add(chunk.digest(raw), len(raw), raw, len(raw), Encoding.RAW, "")
    name, parts = builder.finish(salt)
    return name, b"".join(parts), builder.entries


NAME, DATA, ENTRIES = built([b"first", b"second" * 1000, b"third"])
END = pack.data_bytes(ENTRIES)
TAIL = DATA[END:]


def decode_tail(tail: bytes) -> Footer:
    return pack.decode_tail(tail, len(DATA) - len(TAIL) + len(tail), NAME)


def entry_of(encodings: st.SearchStrategy[int], checks: st.SearchStrategy[bytes]) -> st.SearchStrategy[Entry]:
    return st.builds(
        Entry,
        digest=st.binary(min_size=32, max_size=32).map(bytes.hex),
        size_bytes=st.integers(1, MAX_CHUNK_BYTES),
        offset=st.just(0),
        stored_bytes=st.integers(1, MAX_STORED_CHUNK_BYTES),
        encoding=encodings,
        base=st.just("") | st.binary(min_size=32, max_size=32).filter(any).map(bytes.hex),
        check=checks,
    )


entries = entry_of(st.just(0), st.just(bytes(7))) | entry_of(
    st.integers(1, 255), st.binary(min_size=7, max_size=7)
)


def one_after_the_other(rows: list[Entry]) -> tuple[Entry, ...]:
    placed: list[Entry] = []
    for row in rows:
        placed.append(replace(row, offset=pack.data_bytes(placed)))
    return tuple(placed)


@same_every_time
@given(st.lists(st.binary(min_size=1, max_size=9000), max_size=8), st.binary(min_size=16, max_size=16))
def test_what_was_added_is_found(chunks: list[bytes], salt: bytes) -> None:
    name, data, made = built(chunks, salt)
    assert len(data) % 4096 == 0
    trailer = pack.decode_trailer(data[-64:], len(data))
    footer = pack.decode_tail(data[trailer.footer_offset :], len(data), name)
    assert footer == Footer(tuple(made), salt)
    assert trailer.footer_offset == pack.data_bytes(made)
    for raw, entry in zip(chunks, footer.entries, strict=True):
        assert entry.offset % 4096 == 0
        assert data[entry.offset : entry.offset + entry.stored_bytes] == raw
        assert not any(
            data[entry.offset + entry.stored_bytes : chunk.aligned(entry.offset + entry.stored_bytes)]
        )


@same_every_time
@given(st.lists(entries, max_size=12).map(one_after_the_other), st.binary(min_size=16, max_size=16))
def test_every_footer_comes_back(rows: tuple[Entry, ...], salt: bytes) -> None:
    footer = Footer(rows, salt)
    encoded = pack.encode_footer(footer)
    assert len(encoded) == 32 + 88 * len(rows)
    assert pack.decode_footer(encoded) == footer


def test_padded_buffers_are_stored_as_they_are() -> None:
    """Out of an arena: the padding is there already, and is not written twice."""
    raw = b"x" * 5000
    padded = memoryview(raw + bytes(8192 - 5000))
    builder = Builder()
    builder.add(chunk.digest(raw), len(raw), padded, len(raw), Encoding.RAW, "")
    assert builder.parts == [padded]
    name, parts = builder.finish()
    assert parts[0] is padded, "no copy"
    assert b"".join(parts) == built([raw])[1]
    assert name == built([raw])[0]


def test_an_entry_covers_the_stored_bytes() -> None:
    """Not those of a raw chunk, which its digest covers, and not the padding behind them."""
    raw = b"text " * 1000
    builder = Builder()
    for encoding in Encoding:
        base = raw[::-1] if encoding is Encoding.XOR_SHUFFLE_ZSTD else None
        stored = chunk.encode(raw, encoding, base=base)
        below = chunk.digest(base) if base else ""
        padded = stored + bytes(chunk.aligned(len(stored)) - len(stored))
        builder.add(chunk.digest(raw), len(raw), padded, len(stored), encoding, below)
        expected = bytes(7) if encoding is Encoding.RAW else bytes.fromhex(chunk.digest(stored)[:14])
        assert builder.entries[-1].check == expected
    assert len({one.check for one in builder.entries}) == 4
    footer = Footer(tuple(builder.entries))
    assert pack.decode_footer(pack.encode_footer(footer)) == footer


def test_an_empty_pack() -> None:
    name, data, _ = built([])
    assert len(data) == 4096
    assert pack.decode_tail(data, len(data), name) == Footer(())


def test_the_salt_makes_another_name() -> None:
    assert built([b"same"])[0] != built([b"same"], salt=b"other salt 16 by")[0]
    assert built([b"same"])[0] == built([b"same"])[0]


@pytest.mark.parametrize("count", [0, 1, 45, 46, 47, 92, 93])
def test_footers_around_a_block(count: int) -> None:
    """Footer and trailer fill the last block exactly, or need another."""
    name, data, made = built([bytes([number]) for number in range(count)])
    assert len(data) == chunk.aligned(4096 * count + 32 + 88 * count + 64)
    assert pack.decode_tail(data[4096 * count :], len(data), name).entries == tuple(made)


# -- hostile bytes ----------------------------------------------------------------------------------------


def test_every_flipped_bit_of_a_tail_is_seen() -> None:
    for flipped in bit_flips(TAIL):
        assert is_refused(decode_tail, flipped)


def test_every_truncation_of_a_tail_is_seen() -> None:
    assert all(is_refused(decode_tail, short) for short in truncations(TAIL))
    assert all(is_refused(decode_tail, TAIL[cut:]) for cut in range(1, len(TAIL)))


@pytest.mark.parametrize("wrong", [-4096, -1, 1, 64, 4096, 1 << 50])
def test_a_pack_of_another_size(wrong: int) -> None:
    with pytest.raises(Damaged, match="size"):
        pack.decode_tail(TAIL, len(DATA) + wrong, NAME)


def test_a_pack_under_anothers_name() -> None:
    with pytest.raises(Damaged, match="named after"):
        pack.decode_tail(TAIL, len(DATA), DIGEST)


def test_every_flipped_bit_of_a_trailer_is_seen() -> None:
    """But for the footer's size and digest, which the footer itself is held against."""
    for number, flipped in enumerate(bit_flips(DATA[-64:])):
        if not (12 <= number // 8 < 16 or 24 <= number // 8 < 56):
            assert is_refused(lambda data: pack.decode_trailer(data, len(DATA)), flipped)


@pytest.mark.parametrize("size", [0, 1, 63, 65, 4096])
def test_trailers_of_another_size(size: int) -> None:
    with pytest.raises(Damaged, match="too short"):
        pack.decode_trailer(bytes(size), 4096)


def trailer(**changed: Any) -> bytes:
    fields = {
        "magic": b"EVSTPACK", "version": 1, "flags": 0, "footer_bytes": 32, "footer_offset": 0,
        "digest": bytes(32), "rest": bytes(8), **changed,
    }  # fmt: skip
    return struct.pack("<8sHHIQ32s8s", *fields.values())


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"version": 2}, Unsupported),
        ({"version": 65535, "flags": 7, "rest": b"whatever"}, Unsupported),
        ({"version": 0}, Damaged),
        ({"magic": b"EVSTPACJ"}, Damaged),
        ({"magic": bytes(8), "version": 2}, Damaged),
        ({"flags": 1}, Damaged),
        ({"rest": b"\0\0\0\0\0\0\0\x01"}, Damaged),
        ({"footer_offset": 1}, Damaged),
        ({"footer_offset": 4096}, Damaged),
        ({"footer_offset": (1 << 64) - 4096}, Damaged),
        ({"footer_bytes": 0xFFFF_FFFF}, Damaged),
        ({"footer_bytes": 4033}, Damaged),
    ],
    ids=repr,
)
def test_trailers(changed: dict[str, Any], kind: type[Exception]) -> None:
    assert pack.decode_trailer(trailer(), 4096).footer_bytes == 32
    with pytest.raises(kind):
        pack.decode_trailer(trailer(**changed), 4096)


def test_the_largest_pack() -> None:
    """Its size and its footer are bounded, however well they fit together."""
    huge = trailer(footer_offset=pack.MAX_PACK_BYTES)
    with pytest.raises(Damaged):
        pack.decode_trailer(huge, pack.MAX_PACK_BYTES + 4096)
    many = 32 + 88 * (pack.MAX_ENTRIES + 1)
    with pytest.raises(Damaged):
        pack.decode_trailer(trailer(footer_bytes=many), chunk.aligned(many + 64))


def footer(count: int | None = None, rows: list[bytes] | None = None, magic: bytes = b"EVSTFOOT") -> bytes:
    made = [row()] if rows is None else rows
    return struct.pack("<8s16sI4x", magic, bytes(16), len(made) if count is None else count) + b"".join(made)


def row(
    offset: int = 0,
    stored: int = 5,
    raw: int = 5,
    encoding: int = 0,
    base: str = "00" * 32,
    check: bytes = bytes(7),
) -> bytes:
    fields = (bytes.fromhex(DIGEST), bytes.fromhex(base), offset, stored, raw, encoding, check)
    return struct.pack("<32s32sQIIB7s", *fields)


def test_a_footer_by_hand() -> None:
    made = pack.decode_footer(footer(rows=[row(), row(4096, 9, 7, 3, BASE, b"7 bytes")]))
    assert made.entries == (Entry(DIGEST, 5, 0, 5, 0), Entry(DIGEST, 7, 4096, 9, 3, BASE, b"7 bytes"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        footer()[:31],
        footer(count=0),
        footer(count=2),
        footer(count=0xFFFF_FFFF),
        footer(magic=b"EVSTFOOS"),
        footer()[:28] + b"\x01" + footer()[29:],
        footer(rows=[row(check=b"\0\0\0\0\0\0\x01")]),
        footer(rows=[row(check=b"\x80\0\0\0\0\0\0")]),
        footer(rows=[row(offset=4096)]),
        footer(rows=[row(offset=1)]),
        footer(rows=[row(offset=(1 << 64) - 4096)]),
        footer(rows=[row(stored=0)]),
        footer(rows=[row(raw=0)]),
        footer(rows=[row(stored=MAX_STORED_CHUNK_BYTES + 1)]),
        footer(rows=[row(raw=MAX_CHUNK_BYTES + 1)]),
        footer(rows=[row(), row()]),
        footer(rows=[row(), row(offset=8192)]),
        footer(rows=[row(stored=4097), row(offset=4096)]),
        footer() + b"\0",
        footer(rows=[row()] * (pack.MAX_ENTRIES + 1)),
    ],
    ids=range(21),
)
def test_footers_that_cannot_be(data: bytes) -> None:
    with pytest.raises(Damaged):
        pack.decode_footer(data)


def test_every_truncation_of_a_footer_is_seen() -> None:
    whole = pack.encode_footer(Footer(tuple(ENTRIES)))
    assert all(is_refused(pack.decode_footer, short) for short in truncations(whole))


@same_every_time
@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    is_refused(pack.decode_footer, data)
    is_refused(pack.decode_footer, footer(rows=[data]))
    is_refused(decode_tail, data)
    is_refused(lambda it: pack.decode_trailer(it, 4096), data[:64].ljust(64, b"\0"))
