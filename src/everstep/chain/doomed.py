"""What prunes under way are about to delete, and how those who rely on it find out.

Two look at each other, so that one of them sees the other: a prune writes down what it is about to delete and
looks afterwards whether anybody relies on it; who begins to rely on something (a tag, a branch, a snapshot
that shares its packs) writes that down and looks afterwards whether it is doomed.

The record of a prune is taken away by who wrote it, when all is deleted, and an empty one with the next
number takes its place: so who has looked before sees that there was one. What a killed prune leaves is taken
away by the next one on the machine; from another machine, once it is older than `VOID_S`, since a prune
deletes nothing any more when its record is older than `STOP_S`.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterable

from everstep.chain import lease, names
from everstep.chain.history import SHORT, Chain, now
from everstep.errors import Conflict, Damaged, NotFound
from everstep.format import keys, record
from everstep.format.record import PruneRecord
from everstep.store.base import Entry, Store

STOP_S = 24 * 3600.0
VOID_S = 7 * 24 * 3600.0

_at_work: set[str] = set()
"""The nonces of this process's own prunes."""


class Announced:
    """A prune that was written down.

    Attributes:
        at: when, by the store's clock, in seconds since 1970.
        nonce: that of its record.
        numbers: those of its records, the one that ends it included once there is one.
    """

    def __init__(
        self, store: Store, mine: PruneRecord, at: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.at = at
        self.nonce = mine.nonce
        self.numbers = [mine.number]
        self._store = store
        self._mine = mine
        self._clock = clock
        self._until = clock() + STOP_S

    def check(self) -> None:
        """Raises Conflict when it is too late to delete anything under this record."""
        if self._clock() > self._until:
            raise Conflict(
                f"a prune of {self._store.url} was stopped for too long to go on",
                kept="what was not deleted yet is intact",
                next=f"everstep -r {self._store.url} prune",
            )

    def finish(self) -> None:
        """Nothing is deleted any more. What killed prunes have left is taken away, too."""
        over = _put(self._store, (), (), ())
        self.numbers.append(over.number)
        self._store.delete(self._mine.key)
        for entry, one in _present(self._store):
            # One that came meanwhile stays: without the newest number nobody would know that there was any.
            if entry.key > over.key and _is_over(one, self.at - entry.modified_at):
                self._store.delete(entry.key)

    def leave(self) -> None:
        """This process does nothing more under it."""
        _at_work.discard(self._mine.nonce)


def announce(
    store: Store, snapshots: Iterable[str], manifests: Iterable[str], packs: Iterable[str]
) -> Announced:
    """Write down what is about to be deleted; durable on return."""
    mine = _put(store, tuple(snapshots), tuple(manifests), tuple(packs))
    _at_work.add(mine.nonce)
    (at,) = [entry.modified_at for entry in store.list(mine.key, limit=1)] or [0.0]
    return Announced(store, mine, at)


def note_pruned(store: Store) -> None:
    """Make sure that a chain says that numbers may be missing in it: a replica does not get what was pruned
    before it was sent. Durable on return; nothing is put where a prune was noted before."""
    if not names.newest(store, keys.PRUNES):
        _put(store, (), (), ())


def _put(
    store: Store, snapshots: tuple[str, ...], manifests: tuple[str, ...], packs: tuple[str, ...]
) -> PruneRecord:
    host, boot, pid, started = lease.process(os.getpid())
    nonce = secrets.token_hex(8)
    while True:
        number = names.newest(store, keys.PRUNES) + 1
        mine = PruneRecord(
            snapshots, manifests, packs, host, boot, pid, started, nonce, begun_at=now(), number=number
        )
        if store.put(mine.key, [record.seal(mine)]):
            return mine


def _is_over(one: PruneRecord | None, age_s: float) -> bool:
    """Whether whoever wrote it deletes nothing any more."""
    if age_s > VOID_S:
        return True
    if one is None:
        return False
    if not one.names:
        return True
    if not lease.is_of_this_machine(one):
        return False
    if one.pid == os.getpid() and lease.lives_here(one):
        return one.nonce not in _at_work
    return not lease.lives_here(one)


def _present(store: Store) -> list[tuple[Entry, PruneRecord | None]]:
    """The records there are, newest first; None for one that cannot be read."""
    found: list[tuple[Entry, PruneRecord | None]] = []
    for entry in store.list(keys.PRUNES):
        if not names.is_object(entry.key):
            continue
        try:
            data = store.get(entry.key, 0, record.MAX_RECORD_BYTES + 1)
            found.append((entry, record.unseal(data, PruneRecord, entry.key)))
        except NotFound:
            continue
        except Damaged:
            found.append((entry, None))
    return found


def doomed_by_others(store: Store, mine: str, at: float) -> frozenset[str]:
    """What prunes under way are about to delete, but that whose record has the nonce `mine`. `at` is by the
    store's clock. One listing, and a read of each record."""
    found = [
        one.names
        for entry, one in _present(store)
        if one is not None and one.nonce != mine and not _is_over(one, at - entry.modified_at)
    ]
    return frozenset().union(*found)


class Doomed:
    """What is doomed, for one who looks again and again.

    Attributes:
        names: ids of snapshots, names of manifests and packs, as of the last look.
    """

    def __init__(self, store: Store) -> None:
        self.names: frozenset[str] = frozenset()
        self._store = store
        self._number: int | None = None

    def look(self) -> bool:
        """Whether there was a prune since the last look, or ever before the first: then what it deleted is
        gone, and nothing tells of it. One listing, and a read of each record while a prune is under way.

        Raises:
            Unavailable: the store does not answer.
            Unsupported: a newer version prunes here.
        """
        number = names.newest(self._store, keys.PRUNES)
        news = number != (self._number or 0)
        self._number = number
        if news or self.names:
            found = [one for _, one in _present(self._store)]
            self.names = frozenset(name for one in found if one is not None for name in one.names)
            if None in found:
                self._number = None  # One that cannot be read may be under way: look again next time.
        return news

    def know(self, numbers: list[int]) -> None:
        """A prune with these records was one's own: if there was no other since the last look, that is no
        news."""
        if self._number is not None and numbers == [self._number + 1, self._number + 2]:
            self._number += 2


def refuse_doomed(chain: Chain, id: str) -> None:
    """For who has just written a record that names a snapshot: raises Conflict when a prune is about to
    delete it, so that the record must be taken back. (That it is still there, is to be looked for after
    this.)"""
    looked = Doomed(chain.store)
    looked.look()
    if id in looked.names:
        raise Conflict(
            f"snapshot {id[:SHORT]} of {chain.url} is being pruned",
            kept="nothing else was touched",
            next=f"everstep -r {chain.url} log",
        )
