"""Hostile bytes, and what a decoder may do with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hypothesis import settings

from everstep.errors import Damaged, Unsupported
from examples import examples

DEEP = 100_000

same_every_time = settings(deadline=None, derandomize=True, database=None, max_examples=examples(150))
"""Property tests are as deterministic as the others."""


def truncations(data: bytes) -> Iterator[bytes]:
    """`data` cut off at every length."""
    return (data[:size] for size in range(len(data)))


def bit_flips(data: bytes) -> Iterator[bytes]:
    """`data` with every single bit flipped."""
    for at in range(len(data)):
        for bit in range(8):
            yield data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def is_refused(decode: Callable[[bytes], object], data: bytes) -> bool:
    """Whether `decode` says Damaged or Unsupported; anything else that it raises comes out of here."""
    try:
        decode(data)
    except (Damaged, Unsupported):
        return True
    return False


def nested(opening: str, closing: str, inner: str = "") -> bytes:
    return (opening * DEEP + inner + closing * DEEP).encode()
