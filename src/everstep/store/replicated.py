"""Several stores of one chain, read as one: what the first lacks, another may have."""

from __future__ import annotations

import builtins
import heapq
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from everstep.errors import NotFound, Unavailable
from everstep.store.base import Buffer, Entry, Store

AWAY_S = 30.0
"""A store that did not answer is asked last for so long."""

Result = TypeVar("Result")


class Copied(Protocol):
    """A store whose objects lie in several places; who finds a copy damaged asks the next."""

    @property
    def copies(self) -> Sequence[Store]:
        """The places, the best first. An object may be in any of them."""


def copies_of(store: Store) -> Sequence[Store]:
    """Where the objects of a store lie: in itself, unless it is `Copied`."""
    # Not `isinstance`: this is asked for every object that is read, and Python takes its time for a Protocol.
    copies: Sequence[Store] | None = getattr(store, "copies", None)
    return (store,) if copies is None else copies


class ReplicatedStore:
    """A store over a first one and its replicas. Reads ask the first, then the others where it has no such
    object or does not answer; a listing is that of all, the first's entry before another's. Whoever checks
    digests asks `copies` one after the other, so that damage is got round too.

    It is for reading. What is put and deleted here is put and deleted in the first alone: a replica gets it
    by following (`chain.mirror`), in the order that makes it a chain of its own at every moment.

    Args:
        first: where a chain is written.
        others: its replicas, the ones asked first before the others.
        clock: in seconds.
    """

    def __init__(
        self, first: Store, others: Sequence[Store], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.first = first
        self.others = tuple(others)
        self._clock = clock
        self._away: dict[int, float] = {}
        """By a store's number, when it did not answer."""

    def __repr__(self) -> str:
        return f"<ReplicatedStore {', '.join(one.url for one in (self.first, *self.others))}>"

    @property
    def url(self) -> str:
        return self.first.url

    @property
    def copies(self) -> Sequence[Store]:
        stores = (self.first, *self.others)
        now = self._clock()
        late = [number for number, at in list(self._away.items()) if now - at < AWAY_S]
        order = sorted(range(len(stores)), key=lambda number: (number in late, number))
        return [_Watched(stores[number], self, number) for number in order]

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        return self.first.put(key, parts)

    def delete(self, key: str) -> None:
        self.first.delete(key)

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        return self._asked(lambda store: store.get(key, start, size_bytes))

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        return self._asked(lambda store: store.read_into(key, start, buffers))

    def _asked(self, request: Callable[[Store], Result]) -> Result:
        """The first good answer. Where there is none: that a store is away weighs more than that others have
        no such object, for it may have it."""
        failed: NotFound | Unavailable | None = None
        for store in self.copies:
            try:
                return request(store)
            except (NotFound, Unavailable) as error:
                if failed is None or (isinstance(failed, NotFound) and isinstance(error, Unavailable)):
                    failed = error
        assert failed is not None
        raise failed

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[Entry]:
        """Stores that do not answer are left out, unless none does."""
        failed: list[Unavailable] = []
        stores = self.copies
        listings = [self._listing(store, number, prefix, failed) for number, store in enumerate(stores)]
        merged = heapq.merge(*listings, key=lambda pair: (pair[0].key.encode(), pair[1]))
        groups = itertools.groupby(merged, key=lambda pair: pair[0].key)
        yield from itertools.islice((next(group)[0] for _, group in groups), limit)
        if len(failed) == len(stores):
            raise failed[0]

    @staticmethod
    def _listing(
        store: Store, number: int, prefix: str, failed: builtins.list[Unavailable]
    ) -> Iterator[tuple[Entry, int]]:
        try:
            for entry in store.list(prefix):
                yield entry, number
        except Unavailable as error:
            failed.append(error)

    def note_away(self, number: int) -> None:
        self._away[number] = self._clock()

    def note_back(self, number: int) -> None:
        self._away.pop(number, None)


class _Watched:
    """One of the stores, that notes whether it answers."""

    def __init__(self, store: Store, owner: ReplicatedStore, number: int) -> None:
        self._store = store
        self._owner = owner
        self._number = number
        self.url = store.url

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        return self._store.put(key, parts)

    def delete(self, key: str) -> None:
        self._store.delete(key)

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        return self._noted(lambda: self._store.get(key, start, size_bytes))

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        return self._noted(lambda: self._store.read_into(key, start, buffers))

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[Entry]:
        entries = iter(self._store.list(prefix, limit))
        while True:
            entry = self._noted(lambda: next(entries, None))
            if entry is None:
                return
            yield entry

    def _noted(self, request: Callable[[], Result]) -> Result:
        try:
            done = request()
        except Unavailable:
            self._owner.note_away(self._number)
            raise
        except NotFound:
            self._owner.note_back(self._number)
            raise
        self._owner.note_back(self._number)
        return done
