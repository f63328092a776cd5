"""What the writers of one process have in common: those of the ranks that a run has on one machine.

They store at the same instants. So together they compute on no more cores than are idle, hold no more memory
for encoded chunks than one might, put no more packs at a time than a store can take, know how fast that is
for all of them, and store a chunk that several have once. And rank 0, which waits for the parts of the
others, looks for them when those of this process are there.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from everstep.chain.common import Common
from everstep.chain.lanes import Air, idle_cores
from everstep.chain.packing import HELD_BYTES, PACKS_AT_ONCE, Shares

AIR_PACKS = 8
"""So many packs all writers may put at a time together: one has two, eight have one each."""

AIR_BYTES = 256 * 1024 * 1024
"""So much memory of their own all writers may hold together, for the encoded chunks of packs under way."""

TAKES = 2
"""What was stored for older takes is not shared any more, nor is who waits for one of them told."""


class Siblings:
    """For several threads.

    Args:
        idle: how many cores nobody but so many threads keeps busy, the calling thread's own included.
    """

    def __init__(self, idle: Callable[[int], int] = idle_cores) -> None:
        self._idle = idle
        self._changed = threading.Condition()
        self._writers: list[Callable[[], None]] = []
        """What each is told by."""
        self._writes = 0
        self._limit = 1
        self._computing = 0
        self._air = Air(limit=AIR_PACKS)
        self._takes: dict[object, Common] = {}
        self._finished: Counter[object] = Counter()
        """How many have no more to do for a take."""

    def enter(self, look: Callable[[], None]) -> None:
        """There is one writer more. `look` is called when all of them have told of their part of a take, or
        that they have none. It must not block."""
        with self._changed:
            self._writers.append(look)

    def leave(self, look: Callable[[], None]) -> None:
        """And one less."""
        with self._changed:
            self._writers.remove(look)

    def finished(self, take: object) -> None:
        """A writer has told of its part of a take, or that it has none."""
        with self._changed:
            self._finished[take] += 1
            _keep_newest(self._finished)
            told = list(self._writers) if self._finished[take] >= len(self._writers) else []
        for look in told:
            look()

    def shares(self, take: object) -> Shares:
        """What a writer has that begins to store its part of a take now. Who begins while no other stores
        looks how many cores are idle, for all who join it: of their threads not all compute at that instant.
        """
        with self._changed:
            # What siblings compute on is not idle, and is shared with them.
            limit = self._idle(self._computing)
            self._limit = max(limit, self._limit) if self._writes else limit
            self._writes += 1
            self._changed.notify_all()
            held_bytes = min(HELD_BYTES, AIR_BYTES // (PACKS_AT_ONCE * max(len(self._writers), 1)))
            return Shares(self._limit, held_bytes, self._core, self._air, self._common(take), self._done)

    def _done(self) -> None:
        with self._changed:
            self._writes -= 1

    def _common(self, take: object) -> Common:
        found = self._takes.setdefault(take, Common())
        _keep_newest(self._takes)
        return found

    @contextmanager
    def _core(self) -> Iterator[None]:
        """Blocks while siblings compute on all cores that were idle."""
        with self._changed:
            self._changed.wait_for(lambda: self._computing < self._limit)
            self._computing += 1
        try:
            yield
        finally:
            with self._changed:
                self._computing -= 1
                self._changed.notify()


def _keep_newest(takes: dict[object, Any]) -> None:
    while len(takes) > TAKES:
        del takes[next(iter(takes))]
