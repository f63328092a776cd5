"""Objects of a chain from one store to another under the same keys, each verified on its way.

Whoever brings a snapshot somewhere does it as a writer commits: packs, manifest, snapshot record, each
durable before the next, and only then what names it. So whatever instant this ends at, what lists a snapshot
in the target never lacks a part of it; and doing it again sends only what is not there yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from everstep.chain.history import SHORT
from everstep.chain.relocations import Relocations, write_down
from everstep.errors import Damaged, EverstepError, NotFound, Unavailable, Unsupported
from everstep.format import keys, pack, record
from everstep.format import manifest as manifests
from everstep.format.chunk import Buffer, digest
from everstep.format.manifest import Manifest
from everstep.format.record import (
    SEALED_KINDS,
    SnapshotRecord,
    Spot,
)
from everstep.store.base import Distant, Store
from everstep.store.parallel import in_parallel
from everstep.store.replicated import copies_of

PACKS_AT_ONCE = 2
"""So many packs are in memory at a time, of some 64 MiB each."""

MAX_SENT_PACK_BYTES = 1 << 30
"""A pack is sent in one piece; the library's own are far smaller."""

_LIMITS = {
    keys.PACKS: MAX_SENT_PACK_BYTES,
    keys.MANIFESTS: manifests.MAX_STORED_BYTES,
    keys.STEPLOG: record.MAX_SEGMENT_BYTES,
}


@dataclass
class Sent:
    """What was put: so many objects and bytes."""

    objects: int = 0
    size_bytes: int = 0


@dataclass
class Sending:
    """From `source` to `target`.

    Args:
        before_pack: called before each pack is read; may wait.
        on_sent: called with the bytes of each object that was put.

    Attributes:
        packs: the names of packs that the target is known to have.
        refused: the keys under which it has something else.
        sent: what was put so far.
    """

    source: Store
    target: Store
    before_pack: Callable[[], None] = lambda: None
    on_sent: Callable[[int], None] = lambda size_bytes: None
    packs: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    sent: Sent = field(default_factory=Sent)

    def snapshot(self, id: str) -> set[str]:
        """Send all of a snapshot but what names it; durable on return. Returns the keys that it needs.

        Raises:
            NotFound: the source has no such snapshot, or not any more.
            Damaged: a part of it is not the one that was written, or is missing; or the target has an object
                under the same name that is another.
            Unavailable: one of the stores does not answer.
        """
        key = keys.snapshot(id)
        data = fetched(self.source, key)
        parts = self._manifests(id, record.decode(data, SnapshotRecord).manifests)
        sizes: dict[str, int] = {}
        for content in parts.values():
            sizes |= manifests.decode_packs(content)
        lost = self._all_packs(sizes)
        needed = set(map(keys.pack, sizes.keys() - lost))
        if lost:
            for content in parts.values():
                needed |= self._relocated(manifests.decode(content), lost)
        in_parallel(list(parts.items()), self._at_once(self.target), lambda: lambda part: self.put(*part))
        self.put(key, data)
        return {key, *parts, *needed}

    def _manifests(self, id: str, wanted: Sequence[str]) -> dict[str, Buffer]:
        """By key, those of all ranks of a snapshot: several are read at once where each takes its time."""
        parts: dict[str, Buffer] = {}

        def fetch(name: str) -> None:
            key = keys.manifest(name)
            try:
                parts[key] = fetched(self.source, key)
            except NotFound as error:
                raise Damaged(f"manifest {name[:SHORT]} of {id[:SHORT]} is missing", key=key) from error

        in_parallel(wanted, self._at_once(self.source), lambda: fetch)
        return parts

    def _at_once(self, store: Store) -> int:
        return store.at_once if isinstance(store, Distant) else 1

    def _all_packs(self, sizes: dict[str, int]) -> set[str]:
        """Send these packs; the names of those that the source has not."""
        lost: set[str] = set()

        def send(name: str) -> None:
            try:
                self.pack(name, sizes[name])
            except NotFound:
                lost.add(name)

        missing = [name for name in sizes if name not in self.packs]
        in_parallel(missing, PACKS_AT_ONCE, lambda: send)
        return lost

    def _relocated(self, manifest: Manifest, lost: set[str]) -> set[str]:
        """Send what a manifest's chunks were relocated to, out of packs that the source gave up, and write
        down in the target where they are. Returns the keys that this needs. Raises Damaged where they are
        nowhere."""
        moved, gone = Relocations(self.source), set(lost)
        while True:
            moved.look()
            found = moved.table.without(manifest, gone.__contains__)
            if found is None:
                key = keys.pack(min(lost & manifest.packs.keys()))
                raise Damaged(f"{key} is missing", key=key)
            new = {name: size for name, size in found.packs.items() if name not in manifest.packs}
            missed = self._all_packs(new)
            if not missed:
                break
            gone |= missed
        there, have = Relocations(self.target), (manifest.packs.keys() - lost) | new.keys()
        there.look()
        if there.table.without(manifest, lambda name: name not in have) is None:
            records = {write_down(self.target, new, _spots(manifest, found, list(new)))}
        else:
            places = [place for place in manifest.places if place.pack in lost]
            told = (there.table.moved(place.pack, place.offset) for place in places)
            records = {one.key for found_there in told for one in found_there if one.pack in new}
        return {*map(keys.pack, new), *records}

    def pack(self, name: str, size_bytes: int) -> None:
        """Send a pack, unless the target has it. Raises as `snapshot`, but NotFound where the source has
        none."""
        key = keys.pack(name)
        if not self._is_there(key, size_bytes):
            self.before_pack()
            self.put(key, fetched(self.source, key, size_bytes))
        self.packs.add(name)

    def put(self, key: str, data: Buffer) -> bool:
        """Put an object that is the same whoever puts it, unless it is there. Whether it was put. Raises
        Damaged where another is there."""
        if self._is_there(key, len(data)):
            return False
        if not self.target.put(key, [data]):
            if self._is_there(key, len(data)):
                return False
            raise Unavailable(f"{key} of {self.target.url} was taken away while it was looked at", key=key)
        self.count(len(data))
        return True

    def count(self, size_bytes: int) -> None:
        self.sent.objects += 1
        self.sent.size_bytes += size_bytes
        self.on_sent(size_bytes)

    def _is_there(self, key: str, size_bytes: int) -> bool:
        """By one listing: what is named by its digest is the same if it is as large; whether its bytes are,
        `everstep verify` of the target tells."""
        there = size_of(self.target, key)
        if there is not None and there != size_bytes:
            self.refused.add(key)
            raise Damaged(
                f"{key} of {self.target.url} has {there} bytes, and {size_bytes} are in {self.source.url}",
                kept="neither was touched",
                next=f"everstep -r {self.target.url} verify",
                key=key,
            )
        return there is not None


def _spots(manifest: Manifest, found: Manifest, packs: list[str]) -> dict[str, list[Spot]]:
    """What `found` places elsewhere than `manifest` does, by the pack that this names."""
    spots: dict[str, list[Spot]] = {}
    for old, new in zip(manifest.places, found.places, strict=True):
        if old.pack != new.pack:
            spots.setdefault(old.pack, []).append(Spot(old.offset, packs.index(new.pack), new.offset))
    return spots


def size_of(store: Store, key: str) -> int | None:
    """The size of an object, None where there is none. One listing of one entry."""
    return next((entry.size_bytes for entry in store.list(key, limit=1) if entry.key == key), None)


def fetched(store: Store, key: str, size_bytes: int | None = None) -> Buffer:
    """An object's bytes, held against what they must be; of several copies the first that is good.

    Args:
        size_bytes: how large it is, where that is known.

    Raises:
        NotFound: there is no such object.
        Damaged: it is not the one that was written.
        Unsupported: a newer version wrote it, or it is too large to be sent.
    """
    limit = next(
        (size for prefix, size in _LIMITS.items() if key.startswith(prefix)), record.MAX_RECORD_BYTES
    )
    if size_bytes is not None and size_bytes > limit:
        raise Unsupported(f"{key} of {store.url} is larger than the {limit} bytes that can be sent", key=key)
    failed: EverstepError | None = None
    for one in copies_of(store):
        try:
            data = one.get(key, 0, limit + 1 if size_bytes is None else size_bytes)
            check(key, data)
            return data
        except (Damaged, NotFound, Unavailable) as error:
            if failed is None or isinstance(failed, NotFound):
                failed = error
    assert failed is not None
    raise failed


def check(key: str, data: Buffer) -> None:
    """Raises Damaged when `data` is not what a writer has put at `key`, Unsupported where a newer version
    has."""
    try:
        _check(key, data)
    except EverstepError as error:
        error.key = error.key or key
        raise


def _check(key: str, data: Buffer) -> None:
    name = key.rpartition("/")[2]
    if key.startswith(keys.PACKS):
        pack.check(memoryview(data), name)
        return
    if key.startswith((keys.MANIFESTS, keys.SNAPSHOTS)):
        if digest(data) != name:
            raise Damaged(f"{key} does not match its digest")
        return
    if key.startswith(keys.STEPLOG):
        record.unseal_segment(data)
        return
    kind = next(kind for prefix, kind in SEALED_KINDS.items() if key.startswith(prefix))
    record.unseal(data, kind, key)
