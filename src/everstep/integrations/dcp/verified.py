"""The chunks that this process has read, and so knows to be good: those a first save may share.

After a load all of a snapshot's chunks, or those of a rank, were verified. So a job that loads and goes on
writes no chunk again that is as it was. A process that has read nothing shares nothing with what is there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import msgspec

from everstep.chain.history import Chain
from everstep.errors import Damaged, NotFound, Unsupported
from everstep.format.manifest import Manifest

_read: dict[str, set[str]] = {}
"""The digests of chunks, by the id of the last chain that was read."""

_lock = threading.Lock()


def note(chain: Chain, manifest: Manifest, ranges: Iterable[tuple[int, int, int]]) -> None:
    """These ranges of a snapshot (region, offset, size in bytes) were read and verified."""
    grid = manifest.grid_bytes
    numbers = {
        number
        for region, offset, size_bytes in ranges
        if size_bytes
        for number in manifest.regions[region].chunks[offset // grid : (offset + size_bytes - 1) // grid + 1]
    }
    with _lock:
        if chain.about.chain not in _read:
            _read.clear()
        _read.setdefault(chain.about.chain, set()).update(
            manifest.chunks[number].digest for number in numbers
        )


def part_of(chain: Chain, branch: str, rank: int, ranks: int) -> Manifest | None:
    """The newest part of a rank as far as its chunks were read by this process; None where there is nothing.
    It is made to be built on: it has no leaves."""
    known = _read.get(chain.about.chain)
    if not known:
        return None
    try:
        head = chain.head(branch)
        if head is None or len(head.record.manifests) != ranks:
            return None
        part = chain.part(head, rank)
    except (Damaged, NotFound, Unsupported):
        # Then nothing is shared with it, and the next snapshot is a full one.
        return None
    return _only(part, known)


def _only(part: Manifest, known: set[str]) -> Manifest | None:
    """The chunks of a part that are known, with what they build on: a chunk that was verified was decoded."""
    wanted: dict[str, None] = {}
    for chunk in part.chunks:
        name = chunk.digest if chunk.digest in known else ""
        while name and name not in wanted:
            wanted[name] = None
            name = part.place_of[name][1].base
    if not wanted:
        return None
    placed = [part.place_of[name] for name in wanted]
    packs = {place.pack: part.packs[place.pack] for _, place in placed}
    return msgspec.structs.replace(
        part,
        leaves=(),
        regions=(),
        chunks=tuple(chunk for chunk, _ in placed),
        places=tuple(place for _, place in placed),
        packs=packs,
    )
