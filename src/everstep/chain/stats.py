"""What a chain takes, and for what: by kind of object, by branch, by leaf; how fast it grows."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone

from everstep.chain.history import Chain, Snapshot
from everstep.chain.names import is_object
from everstep.chain.relocations import Relocations
from everstep.errors import Damaged, NotFound
from everstep.format import keys
from everstep.format.manifest import Manifest
from everstep.store.local import LocalStore

DAY_S = 24 * 3600.0
GROWTH_DAYS = 7.0
"""Growth is that of the last week: what a training did before says little of what it does now."""


@dataclass(frozen=True)
class Branch:
    """What a branch lists. `logical_bytes` are its states one by one, `stored_bytes` the packs that any of
    them needs, `own_bytes` those that no other branch or tag needs."""

    name: str
    snapshots: int
    logical_bytes: int
    stored_bytes: int
    own_bytes: int


@dataclass(frozen=True)
class Leaf:
    """What the chunks of a leaf take, over all snapshots, each chunk counted once. Of a chunk that several
    leaves share each has its part. `versions` is how many different chunks there are for each that it
    needs."""

    name: str
    stored_bytes: int
    logical_bytes: int
    versions: float


@dataclass(frozen=True)
class Stats:
    """All sizes are in bytes.

    Attributes:
        logical_bytes: all states that are listed or tagged, one by one.
        stored_bytes: all objects.
        kinds: the objects by kind: packs, manifests, snapshots, heads and so on.
        unreached_bytes: packs that nothing listed or tagged needs.
        branches, leaves: see there; leaves with the most first.
        unreadable: snapshots that could not be counted, by id.
        daily_bytes: by how much what is there now has grown a day, over the last week at most; None where
            there are less than two snapshots.
        free_bytes: room on the disk; None where that is not known.
        full_days: when it is full if it goes on like this; None where it is not known, or never.
    """

    snapshots: int
    logical_bytes: int
    stored_bytes: int
    kinds: dict[str, int]
    unreached_bytes: int
    branches: tuple[Branch, ...]
    leaves: tuple[Leaf, ...]
    unreadable: tuple[str, ...]
    daily_bytes: float | None
    free_bytes: int | None
    full_days: float | None


def stats(
    chain: Chain, leaves: int = 0, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Stats:
    """Count. Reads every record and manifest once, and no pack; changes nothing.

    Args:
        leaves: so many of the largest are named.
        on_progress: called with (snapshots done, in all) after each.

    Raises:
        Unavailable: the store does not answer.
        Unsupported: a newer version wrote something here.
    """
    listed = {branch: list(chain.snapshots(branch)) for branch in chain.branches()}
    snapshots = {one.id: one for line in listed.values() for one in line}
    tagged = _tagged(chain)
    for id in tagged - snapshots.keys():
        try:
            snapshots[id] = chain.snapshot(id)
        except (Damaged, NotFound):
            continue
    needed: dict[str, frozenset[str]] = {}
    unreadable = sorted(tagged - snapshots.keys())
    counted = _Leaves()
    kinds: Counter[str] = Counter()
    packs: dict[str, int] = {}
    for entry in chain.store.list():
        if is_object(entry.key):
            kinds[entry.key.partition("/")[0]] += entry.size_bytes
        if entry.key.startswith(keys.PACKS):
            packs[entry.key.rpartition("/")[2]] = entry.size_bytes
    relocations = Relocations(chain.store)
    relocations.look()
    for done, one in enumerate(snapshots.values(), start=1):
        try:
            manifest = chain.manifest(one)
        except Damaged:
            unreadable.append(one.id)
        else:
            manifest = (
                relocations.table.without(manifest, lambda pack: pack not in packs, whole=False) or manifest
            )
            needed[one.id] = frozenset(manifest.packs)
            if leaves:
                counted.add(manifest)
        on_progress(done, len(snapshots))
    reached = frozenset().union(*needed.values())
    daily = _daily_bytes(snapshots.values())
    free = _free_bytes(chain)
    return Stats(
        snapshots=len(snapshots),
        logical_bytes=sum(one.record.logical_bytes for one in snapshots.values()),
        stored_bytes=kinds.total(),
        kinds=dict(kinds.most_common()),
        unreached_bytes=sum(size for name, size in packs.items() if name not in reached),
        branches=tuple(_branches(listed, tagged, needed, packs)),
        leaves=tuple(counted.largest(leaves)),
        unreadable=tuple(unreadable),
        daily_bytes=daily,
        free_bytes=free,
        full_days=free / daily if free is not None and daily else None,
    )


def _tagged(chain: Chain) -> set[str]:
    try:
        return set(chain.tags().values())
    except Damaged:
        return set()


def _branches(
    listed: dict[str, list[Snapshot]],
    tagged: set[str],
    needed: dict[str, frozenset[str]],
    packs: dict[str, int],
) -> Iterable[Branch]:
    of = {
        branch: frozenset().union(*(needed.get(one.id, frozenset()) for one in line))
        for branch, line in listed.items()
    }
    of_tags = frozenset().union(*(needed.get(id, frozenset()) for id in tagged))
    for branch, line in listed.items():
        ids = {one.id for one in line}
        # A tag on a snapshot of the branch itself takes nothing from it.
        elsewhere = frozenset().union(
            *(names for other, names in of.items() if other != branch),
            of_tags if tagged - ids else frozenset(),
        )
        yield Branch(
            branch,
            len(line),
            sum(one.record.logical_bytes for one in line),
            sum(packs.get(name, 0) for name in of[branch]),
            sum(packs.get(name, 0) for name in of[branch] - elsewhere),
        )


class _Leaves:
    def __init__(self) -> None:
        self._seen: set[tuple[str, str]] = set()
        self._stored: dict[str, float] = defaultdict(float)
        self._logical: dict[str, int] = {}
        self._raw: dict[str, float] = defaultdict(float)

    def add(self, manifest: Manifest) -> None:
        """Each chunk goes to the leaves in its place, by how much of it is theirs. It counts for the leaf in
        which it was first seen."""
        lies: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
        for leaf in manifest.leaves:
            for part in leaf.slices:
                size = leaf.size_bytes(part)
                lies[part.region].append((part.offset, part.offset + size, leaf.name))
            size = sum(map(leaf.size_bytes, leaf.slices))
            self._logical[leaf.name] = max(self._logical.get(leaf.name, 0), size)
        for number, region in enumerate(manifest.regions):
            slices = sorted(lies[number])
            for place, chunk in enumerate(region.chunks):
                self._add_chunk(manifest, chunk, place * manifest.grid_bytes, slices)

    def _add_chunk(
        self, manifest: Manifest, number: int, start: int, slices: list[tuple[int, int, str]]
    ) -> None:
        chunk, place = manifest.chunks[number], manifest.places[number]
        if (chunk.digest, place.pack) in self._seen:
            return
        self._seen.add((chunk.digest, place.pack))
        parts: dict[tuple[int, int], tuple[int, str]] = {}
        for begin, end, name in slices:
            size = min(end, start + chunk.size_bytes) - max(begin, start)
            if size > 0:
                parts.setdefault((begin, end), (size, name))  # Tied leaves lie in the same place.
        total = sum(size for size, _ in parts.values())
        for size, name in parts.values():
            self._stored[name] += place.stored_bytes * size / total
            self._raw[name] += size

    def largest(self, count: int) -> Iterable[Leaf]:
        names = sorted(self._stored, key=lambda name: (-self._stored[name], name))
        for name in names[:count]:
            logical = self._logical[name]
            versions = self._raw[name] / logical if logical else 0.0
            yield Leaf(name, round(self._stored[name]), logical, round(versions, 2))


def _daily_bytes(snapshots: Iterable[Snapshot]) -> float | None:
    """What the snapshots that are still there of the last week have added, by their own times. The first of
    them began that time, and is not counted."""
    taken = sorted(
        (moment, one.record.stored_bytes)
        for one in snapshots
        if (moment := _seconds(one.record.taken_at)) is not None
    )
    recent = [one for one in taken if one[0] >= taken[-1][0] - GROWTH_DAYS * DAY_S]
    if len(recent) < 2 or recent[-1][0] <= recent[0][0]:
        return None
    return sum(size for _, size in recent[1:]) / (recent[-1][0] - recent[0][0]) * DAY_S


def _seconds(text: str) -> float | None:
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, OverflowError):
        return None


def _free_bytes(chain: Chain) -> int | None:
    if not isinstance(chain.store, LocalStore):
        return None
    facts = os.statvfs(chain.store.root)
    return facts.f_frsize * facts.f_bavail
