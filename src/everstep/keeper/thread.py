"""A keeper in a thread of the trainer: for stores and systems that a process of its own cannot serve."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial

from everstep.chain.history import Chain
from everstep.keeper.arena import Arena
from everstep.keeper.base import ARENAS, Followed, Held, Job, Outcome, Terms
from everstep.keeper.following import Following, Target
from everstep.keeper.keeping import TIDYING, Given, Keeping
from everstep.keeper.scrubbing import Scrubbing
from everstep.store.base import Store


class ThreadKeeper:
    """See `keeper.base.Keeper`.

    Args:
        chain: where to.
        on_outcome: called in the keeper's thread after each job, before its `Pending` says so.
        warn: is told, a sentence each, what failed and did no harm.
        replicas: where the chain is followed.
        on_followed: is told how each replica stands, from its thread.
    """

    outlives = False

    def __init__(
        self,
        chain: Chain,
        on_outcome: Callable[[Outcome], None],
        warn: Callable[[str], None],
        replicas: Sequence[Store] = (),
        on_followed: Callable[[Followed], None] = lambda followed: None,
    ) -> None:
        self._replicas = replicas
        self._on_followed = on_followed
        self._following: Following | None = None
        self._scrubbing: Scrubbing | None = None
        self._chain = chain
        self._on_outcome = on_outcome
        self._warn = warn
        self._keeping: Keeping | None = None
        self._arenas: list[Arena] = []
        self._free: list[Arena] = []
        self._wanted_bytes = 0
        self._open: dict[Job, Given] = {}
        self._given: queue.SimpleQueue[Given | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def held(self) -> list[Held]:
        return []

    def reading(self, store: Store) -> Store:
        return store

    def begin(self, terms: Terms) -> None:
        if self._replicas and not terms.rank:
            targets = [Target(store.url, store) for store in self._replicas]
            self._following = Following(
                self._chain, terms.branch, terms.lease, terms.keep, targets, self._on_followed, self._warn
            )
        if terms.scrub_bytes_per_s and not terms.rank:
            self._scrubbing = Scrubbing(self._chain, terms.scrub_bytes_per_s, self._warn)
        self._keeping = Keeping(self._chain, terms, self._warn, self._following, self._scrubbing)
        self._thread = threading.Thread(target=self._work, name="everstep-keeper", daemon=True)
        self._thread.start()

    # -- memory -------------------------------------------------------------------------------------------

    def prepare(self, size_bytes: int) -> None:
        """Here memory is made when it is asked for: a thread that touches it would hold the loop up too."""

    def has_room(self) -> bool:
        with self._changed:
            return bool(self._free) or len(self._arenas) < ARENAS

    def arena(self, size_bytes: int, wait: bool) -> Arena | None:
        with self._changed:
            self._wanted_bytes = max(size_bytes, self._wanted_bytes)
            if wait:
                self._changed.wait_for(lambda: self._free or len(self._arenas) < ARENAS)
            if self._free:
                # The one that was free longest: the other holds the state that the next is compared with.
                arena = self._free.pop(0)
                return arena if arena.size_bytes >= size_bytes else self._larger(arena)
            return self._another() if len(self._arenas) < ARENAS else None

    def _another(self) -> Arena:
        arena = Arena.private(self._wanted_bytes)
        self._arenas.append(arena)
        return arena

    def _larger(self, arena: Arena) -> Arena:
        self._arenas.remove(arena)
        arena.close()
        return self._another()

    def give_back(self, arena: Arena) -> None:
        with self._changed:
            self._free.append(arena)
            self._changed.notify_all()

    # -- jobs ---------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        with self._changed:
            given = self._open[job] = Given(job, self.give_back)
        self._given.put(given)

    def wave(
        self,
        job: Job,
        arena: Arena,
        begin: int,
        end: int,
        unchanged: frozenset[int],
        filled: int | None = None,
    ) -> None:
        self._open[job].wave(arena, begin, end, unchanged, filled)

    def arrived(self, job: Job, end: int) -> None:
        self._open[job].arrived(end)

    def end(self, job: Job) -> None:
        self._open[job].end()

    def drop(self, job: Job) -> None:
        self._open[job].drop()

    def wait(self, timeout: float | None = None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout)

    def close(self) -> None:
        if self._scrubbing is not None:
            self._scrubbing.stop()
        self.wait()
        self._given.put(None)
        if self._thread is not None:
            self._thread.join()
        if self._following is not None:
            self._following.close()
        if self._keeping is not None:
            self._keeping.close()
        self._keeping = None
        while self._arenas:
            self._arenas.pop().close()

    def abandon(self) -> None:
        if self._keeping is not None:
            self._keeping.hurry()
        self.close()

    # -- in the thread ------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (given := self._given.get()) is not None:
            self._store(given)

    def _store(self, given: Given) -> None:
        assert self._keeping is not None
        self._keeping.store(given, partial(self._done, given))

    def _done(self, given: Given, outcome: Outcome) -> None:
        """In this thread, or in the one that joins."""
        assert self._keeping is not None
        given.finish()
        error = outcome.error
        try:
            self._on_outcome(outcome)
        except BaseException as raised:
            error = error or raised
        if outcome.part is None or error is not None:
            given.job.pending.finish(outcome.snapshot, error)
        if outcome.snapshot is not None:
            given.phase = TIDYING
            self._keeping.tidy(given.job.journals)
        with self._changed:
            del self._open[given.job]
            self._changed.notify_all()
