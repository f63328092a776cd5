"""The state that a manifest means, digested anew out of the bytes that the store gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from everstep.chain.history import Chain, Snapshot, joined
from everstep.chain.reader import Reader, Target
from everstep.errors import Damaged
from everstep.format import keys, values
from everstep.format import manifest as manifests
from everstep.format.chunk import digest, grid
from everstep.format.manifest import Manifest, StoredLeaf, StoredSlice

MAX_SHARED_BYTES = 64 * 1024**3
"""So much of small leaves is digested anew for a state digest: more than any state has. (A hostile manifest
can claim any size by naming one chunk a million times.)"""

WINDOW_BYTES = 32 * 1024 * 1024
"""So much of a leaf is in memory at once, or one chunk where that is larger."""


def state_of(reader: Reader, parts: Sequence[Manifest]) -> str:
    """The state digest of a snapshot out of the leaves of its manifests; slices that share a region are read
    for it."""
    return manifests.state_of_parts([_state_of(reader, part) for part in parts])


def _state_of(reader: Reader, manifest: Manifest) -> str:
    @lru_cache(maxsize=4)
    def chunk(number: int) -> memoryview:
        return memoryview(reader.chunk(manifest, manifest.chunks[number].digest))

    done: dict[tuple[int, int, int], list[str]] = {}
    leaves = []
    _refuse_endless(manifest)
    for leaf in manifest.leaves:
        parts = []
        for part in leaf.slices:
            region = manifest.regions[part.region]
            size = leaf.size_bytes(part)
            at = (part.region, part.offset, size)
            if part.offset == 0 and size == region.size_bytes:
                done[at] = [manifest.chunks[number].digest for number in region.chunks]
            if at not in done:
                done[at] = [
                    digest(_bytes_at(chunk, region.chunks, manifest.grid_bytes, part.offset + start, count))
                    for start, count in grid(size, manifest.grid_bytes)
                ]
            parts.append((part.at, part.extent, done[at]))
        leaves.append((leaf.name, leaf.dtype, leaf.shape, parts))
    return manifests.state_digest(leaves, manifest.values)


def _refuse_endless(manifest: Manifest) -> None:
    """Raises Damaged when more than `MAX_SHARED_BYTES` would have to be read for the state digest."""
    shared = {
        (part.region, part.offset, size)
        for leaf in manifest.leaves
        for part in leaf.slices
        if (size := leaf.size_bytes(part)) != manifest.regions[part.region].size_bytes
    }
    if sum(size for _, _, size in shared) > MAX_SHARED_BYTES:
        raise Damaged(f"its leaves claim to share more than {MAX_SHARED_BYTES} bytes")


def _bytes_at(
    chunk: Callable[[int], memoryview], numbers: tuple[int, ...], grid_bytes: int, start: int, size: int
) -> bytes:
    """`size` bytes of a region from `start` on, no more than the grid: out of two chunks at most."""
    first, offset = divmod(start, grid_bytes)
    data = bytes(chunk(numbers[first])[offset : offset + size])
    return data if len(data) == size else data + bytes(chunk(numbers[first + 1])[: size - len(data)])


@dataclass(frozen=True)
class Rehearsed:
    """A snapshot that was restored into memory, and came out as it was taken. `remarks` is damage that was
    seen and did not matter."""

    leaves: int
    size_bytes: int
    remarks: tuple[str, ...]


def rehearse(
    chain: Chain, snapshot: Snapshot, on_progress: Callable[[int, int], None] | None = None
) -> Rehearsed:
    """Restore a snapshot as a run would, leaf by leaf, into memory that is used again; and hold the digest of
    what came out against the one that was taken.

    Args:
        on_progress: called with (bytes done, bytes in all).

    Raises:
        Damaged: it cannot be restored.
        NotFound: it was pruned meanwhile.
        Unsupported: a newer version took it.
    """
    try:
        return _rehearse(chain, snapshot, on_progress or (lambda done, total: None))
    except Damaged:
        chain.refuse_pruned(snapshot, "was restored")
        raise


def _rehearse(chain: Chain, snapshot: Snapshot, on_progress: Callable[[int, int], None]) -> Rehearsed:
    parts = chain.manifests(snapshot)
    whole = joined(snapshot, parts)
    values.decode(whole.values)
    reader = Reader(chain.store)
    total = sum(size for part in parts for _, _, size in _extents(part))
    remarks: set[str] = set()
    done = 0

    def advance(size_bytes: int) -> None:
        nonlocal done
        done += size_bytes
        on_progress(done, total)

    states = []
    for part in parts:
        _refuse_endless(part)
        states.append(_restored(reader, part, remarks, advance))
    if manifests.state_of_parts(states) != snapshot.record.state:
        name = next(
            (
                name
                for name, part, state in zip(snapshot.record.manifests, parts, states, strict=True)
                if part.state != state
            ),
            snapshot.record.manifests[0],
        )
        raise Damaged(
            f"snapshot {snapshot.short} does not come out as the state that was taken",
            key=keys.manifest(name),
        )
    return Rehearsed(len(whole.leaves), total, tuple(sorted(remarks)))


def _restored(reader: Reader, manifest: Manifest, remarks: set[str], advance: Callable[[int], None]) -> str:
    """The state digest of a part out of what is read, a window at a time."""
    window = max(WINDOW_BYTES // manifest.grid_bytes, 1) * manifest.grid_bytes
    extents = _extents(manifest)
    memory = memoryview(bytearray(min(window, max((size for _, _, size in extents), default=0))))
    digests: dict[tuple[int, int, int], list[str]] = {}
    for region, offset, size in extents:
        found: list[str] = []
        for start in range(0, size, window):
            piece = memory[: min(window, size - start)]
            remarks.update(reader.fill(manifest, [Target(region, offset + start, piece)]))
            found += [digest(piece[at : at + count]) for at, count in grid(len(piece), manifest.grid_bytes)]
            advance(len(piece))
        digests[region, offset, size] = found
    rows = [
        (
            leaf.name,
            leaf.dtype,
            leaf.shape,
            [(part.at, part.extent, digests[_lies(leaf, part)]) for part in leaf.slices],
        )
        for leaf in manifest.leaves
    ]
    return manifests.state_digest(rows, manifest.values)


def _extents(manifest: Manifest) -> dict[tuple[int, int, int], None]:
    """Where the bytes of slices lie, each place once: those of tied leaves lie in one."""
    return dict.fromkeys(_lies(leaf, part) for leaf in manifest.leaves for part in leaf.slices)


def _lies(leaf: StoredLeaf, part: StoredSlice) -> tuple[int, int, int]:
    return part.region, part.offset, leaf.size_bytes(part)
