"""Filling from an arena: what it still holds comes from there, verified on the copy; the rest comes back."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import GRID_BYTES, LAYOUT, Content, content, started, written

from everstep.chain import held
from everstep.chain.reader import Reader, Target
from everstep.format.chunk import Encoding, aligned
from everstep.format.manifest import Manifest
from everstep.store.memory import MemoryStore
from examples import examples


def made() -> tuple[MemoryStore, Manifest, bytearray]:
    """A store with a snapshot, its manifest, and an arena as a keeper would still have it."""
    store = MemoryStore()
    writer = started(store, encoding=Encoding.SHUFFLE_ZSTD)
    one = content(3)
    (snapshot,) = written(writer, [one])
    return store, writer.chain.manifest(snapshot), arena_of(one)


def arena_of(one: Content) -> bytearray:
    arena = bytearray(one.layout.arena_bytes)
    for part, (number, offset) in zip(one.layout.slices, one.layout.places, strict=True):
        if part.alias is None:
            start = one.layout.regions[number].offset + offset
            arena[start : start + part.size_bytes] = one.leaves[part.name]
    return arena


STORE, MANIFEST, ARENA = made()
STARTS = [0, *accumulate(aligned(region.size_bytes) for region in MANIFEST.regions)]
REGIONS = [
    bytes(ARENA[start : start + region.size_bytes])
    for start, region in zip(STARTS, MANIFEST.regions, strict=False)
]


def targets_of(ranges: list[tuple[int, int, int]]) -> list[Target]:
    return [Target(region, start, memoryview(bytearray(size))) for region, start, size in ranges]


def assert_filled(targets: list[Target]) -> None:
    for one in targets:
        assert one.buffer == REGIONS[one.region][one.offset : one.offset + len(one.buffer)]


def everything() -> list[Target]:
    return targets_of([(number, 0, len(data)) for number, data in enumerate(REGIONS)])


def test_the_layouts_arena_is_where_the_manifest_says() -> None:
    assert [region.offset for region in LAYOUT.regions] == STARTS[:-1]
    assert sum(len(region.chunks) for region in MANIFEST.regions) > 2 * len(MANIFEST.regions)


def test_everything_comes_out_of_a_whole_arena() -> None:
    targets = everything()
    assert held.fill(MANIFEST, memoryview(ARENA), targets) == []
    assert_filled(targets)


@pytest.mark.parametrize("length", [0, 4096, len(ARENA) - 1])
def test_an_arena_that_is_too_small_is_not_looked_at(length: int) -> None:
    targets = everything()
    assert held.fill(MANIFEST, memoryview(ARENA)[:length], targets) == targets
    assert not any(any(one.buffer) for one in targets)


def test_padding_may_hold_anything() -> None:
    arena = bytearray(ARENA)
    for region, start in zip(MANIFEST.regions, STARTS, strict=False):
        end = start + region.size_bytes
        arena[end : start + aligned(region.size_bytes)] = b"x" * (
            aligned(region.size_bytes) - region.size_bytes
        )
    targets = everything()
    assert held.fill(MANIFEST, memoryview(arena), targets) == []
    assert_filled(targets)


def test_a_chunk_that_was_written_over_comes_back_and_no_other() -> None:
    number = max(range(len(REGIONS)), key=lambda number: len(REGIONS[number]))
    arena = bytearray(ARENA)
    arena[STARTS[number] + GRID_BYTES + 5] ^= 1
    targets = everything()
    (left,) = held.fill(MANIFEST, memoryview(arena), targets)
    assert (left.region, left.offset, len(left.buffer)) == (number, GRID_BYTES, GRID_BYTES)
    assert Reader(STORE).fill(MANIFEST, [left]) == []
    assert_filled(targets)


def test_the_copy_is_digested_not_the_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody writes to the arena while it is copied, and puts back what was there."""
    copy = held.copy

    def torn(target: memoryview, source: memoryview) -> None:
        copy(target, source)
        target[0] ^= 255

    monkeypatch.setattr(held, "copy", torn)
    targets = everything()
    left = held.fill(MANIFEST, memoryview(ARENA), targets)
    assert sum(len(one.buffer) for one in left) == sum(map(len, REGIONS))


RANGES = st.lists(
    st.integers(0, len(REGIONS) - 1).flatmap(
        lambda number: st.integers(0, len(REGIONS[number]) - 1).flatmap(
            lambda start: st.tuples(
                st.just(number), st.just(start), st.integers(0, len(REGIONS[number]) - start)
            )
        )
    ),
    max_size=12,
)


@settings(max_examples=examples(80), deadline=None)
@given(ranges=RANGES, damage=st.lists(st.integers(0, len(ARENA) - 1), max_size=4), seed=st.integers(0, 999))
def test_whatever_is_asked_for_and_damaged_the_bytes_are_the_snapshots(
    ranges: list[tuple[int, int, int]], damage: list[int], seed: int
) -> None:
    arena = bytearray(ARENA)
    rng = random.Random(seed)
    for at in damage:
        arena[at] = rng.randrange(256)
    targets = targets_of(ranges)
    left = held.fill(MANIFEST, memoryview(arena), targets)
    if arena == ARENA:
        assert left == []
    assert Reader(STORE).fill(MANIFEST, left) == []
    assert_filled(targets)
