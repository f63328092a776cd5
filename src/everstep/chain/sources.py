"""Where a repair finds objects whole: what an earlier one had at hand, and other stores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from everstep.chain.history import Chain
from everstep.chain.names import is_object, segment_of
from everstep.chain.rebuilding import refuse_other_pack
from everstep.errors import Damaged, NotFound, Unsupported
from everstep.format import keys, record, values
from everstep.format import manifest as manifests
from everstep.format.chunk import digest
from everstep.format.record import (
    SEALED_KINDS,
    SnapshotRecord,
)
from everstep.store.base import Buffer, Store
from everstep.store.replacing import SPARES, key_of_spare

_NOT_HAD = (Damaged, NotFound, Unsupported)
_COMPARED = 3
"""So many of the newest records that two copies of a chain both have are compared: do they part?"""


def refuse_other(key: str, data: Buffer) -> None:
    """Raises Damaged where these bytes cannot be the object `key`, Unsupported where a newer one's can."""
    name = key.rpartition("/")[2]
    if key.startswith(keys.PACKS):
        refuse_other_pack(name, data)
    elif key.startswith((keys.MANIFESTS, keys.SNAPSHOTS)):
        if digest(data) != name:
            raise Damaged("it does not match its digest", key=key)
        if key.startswith(keys.SNAPSHOTS):
            record.decode(data, SnapshotRecord)
        else:
            values.decode(manifests.decode(data).values)
    elif key.startswith(keys.STEPLOG):
        steps, named = record.unseal_segment(data), segment_of(key)
        if named is None or not steps or steps[0].step != named[1]:
            raise Damaged("it does not begin with the step that its name says", key=key)
    else:
        kind = next(kind for prefix, kind in SEALED_KINDS.items() if key.startswith(prefix))
        record.unseal(data, kind, key)


def _is_named_by_content(key: str) -> bool:
    return key.startswith((keys.PACKS, keys.MANIFESTS, keys.SNAPSHOTS))


@dataclass(frozen=True)
class Have:
    """An object that was found whole: `content` gives its bytes, read anew each time."""

    key: str
    how: str
    size_bytes: int
    content: Callable[[], Sequence[Buffer]]


class Place(Protocol):
    """Somewhere to look."""

    def have(self, key: str) -> Have | None:
        """The object, where it is here and whole."""


class Spares:
    """What a repair that was killed had put aside."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._of: dict[str, list[str]] | None = None

    def have(self, key: str) -> Have | None:
        if self._of is None:
            self._of = defaultdict(list)
            for entry in self._store.list(SPARES):
                self._of[key_of_spare(entry.key) or ""].append(entry.key)
        for spare in self._of.get(key, ()):
            found = _have(self._store, spare, key, "as an interrupted repair had put it aside")
            if found is not None:
                return found
        return None


class Source:
    """Another store. `same`: it holds this chain, and not another."""

    def __init__(self, store: Store) -> None:
        self.url = store.url
        self.same = True
        self._store = store

    def chain(self) -> str:
        """The random name of the chain that is there; "" where there is none that can be read."""
        try:
            return Chain(self._store).about.chain
        except _NOT_HAD:
            return ""

    def have(self, key: str) -> Have | None:
        if not self.same and not _is_named_by_content(key):
            return None
        return _have(self._store, key, key, f"from {self.url}")

    def shares(self, store: Store, heads: Sequence[str]) -> bool | None:
        """Whether one of these head records of another store is here, the same; None where there is none
        that both can read."""
        readable = False
        for key in heads:
            try:
                data = bytes(store.get(key))
                theirs = bytes(self._store.get(key))
                refuse_other(key, data)
                refuse_other(key, theirs)
            except _NOT_HAD:
                continue
            if theirs == data:
                return True
            readable = True
        return False if readable else None

    def absent_from(self, chain: Chain, remarks: list[str]) -> Iterator[Have]:
        """Records of this chain that are here and not there, and that no prune of that one has taken away."""
        ours = _by_kind(chain.store)
        pruned = bool(ours.get(keys.PRUNES))
        for kind, theirs in _by_kind(self._store).items():
            mine = ours.get(kind, set())
            if self._parts(chain.store, kind, mine & theirs):
                remarks.append(f"{self.url} has gone another way in {kind}: what it has there is not used")
                continue
            for key in sorted(theirs - mine):
                if _is_lost(kind, key, mine, pruned):
                    have = self.have(key)
                    if have is not None:
                        yield have

    def _parts(self, store: Store, kind: str, common: set[str]) -> bool:
        """Whether the two differ in records that both can read. The newest come first."""
        for key in (
            sorted(common)[:_COMPARED] if kind.startswith((keys.HEADS, keys.TAGS, keys.LEASES)) else ()
        ):
            try:
                here, there = bytes(store.get(key)), bytes(self._store.get(key))
                refuse_other(key, here)
                refuse_other(key, there)
            except _NOT_HAD:
                continue
            if here != there:
                return True
        return False


def _by_kind(store: Store) -> dict[str, set[str]]:
    """The keys of records, by what stands before their number."""
    found: dict[str, set[str]] = defaultdict(set)
    for prefix in (keys.HEADS, keys.TAGS, keys.LEASES, keys.PRUNES, keys.STEPLOG):
        for entry in store.list(prefix):
            if is_object(entry.key):
                found[entry.key.rpartition("/")[0] + "/"].add(entry.key)
    return found


def _is_lost(kind: str, key: str, mine: set[str], pruned: bool) -> bool:
    """Whether a record that is not here was lost, and did not just go with a prune."""
    if kind.startswith(keys.STEPLOG):  # These count up, and a prune takes the oldest.
        return not pruned or not mine or key > min(mine)
    is_newer = not mine or key < min(mine)
    if kind.startswith(keys.PRUNES):
        return is_newer
    return is_newer or not (pruned and kind.startswith(keys.HEADS))


def _have(store: Store, at: str, key: str, how: str) -> Have | None:
    try:
        data = store.get(at)
        refuse_other(key, data)
    except _NOT_HAD:
        return None
    return Have(key, how, len(data), partial(_content, store, at))


def _content(store: Store, key: str) -> Sequence[Buffer]:
    return [store.get(key)]
