"""What a keeper is to the run: it lends memory, takes filled memory, and makes durable what is in it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from everstep.chain.history import Snapshot
from everstep.chain.steplog import EndedJournal
from everstep.chain.writer import Facts
from everstep.errors import Unavailable
from everstep.format.layout import Layout
from everstep.keeper.arena import Arena

ARENAS = 2
"""One is filled while the other is stored."""


class Pending:
    """A snapshot that is being taken."""

    def __init__(self) -> None:
        self._released = threading.Event()
        self._done = threading.Event()
        self._snapshot: Snapshot | None = None
        self._error: BaseException | None = None
        self.told = False
        """Whether somebody who waited was told of its failure, so that nobody else need be."""
        self.begun = False
        """Whether its capture has begun; before, nobody can wait for it."""

    @property
    def released(self) -> bool:
        """Whether the state was captured, so that it may change in any way. Does not block."""
        return self._released.is_set()

    @property
    def snapshot(self) -> Snapshot | None:
        """The snapshot, once it is durable; None before, and when it failed. Does not block."""
        return self._snapshot

    def durable(self, timeout: float | None = None) -> bool:
        """Wait until the snapshot is durable: it then survives a power cut.

        Args:
            timeout: at most so many seconds; None: as long as it takes.

        Returns:
            False when the time was not enough.

        Raises:
            EverstepError: it failed; the snapshots before it are intact.
        """
        if not self.begun and not self._done.is_set():
            raise Unavailable(
                "this snapshot is taken when the step ends, which it cannot while it is waited for",
                kept="nothing was touched",
                next="call durable() after the step",
            )
        if not self._done.wait(timeout):
            return False
        if self._error is not None:
            self.told = True
            raise self._error
        return True

    def release(self) -> None:
        self._released.set()

    def finish(self, snapshot: Snapshot | None, error: BaseException | None = None) -> None:
        self._snapshot, self._error = snapshot, error
        self._released.set()
        self._done.set()


@dataclass(frozen=True)
class Terms:
    """What a keeper works under.

    `lease` is the number of the run's lease of its `branch`, `parent` the id of the snapshot that the next
    one follows on and may share chunks with ("" for none), `keep` says which snapshots of the branch stay
    (`chain.retention`)."""

    branch: str
    lease: int
    parent: str
    keep: str


@dataclass(eq=False)
class Job:
    """A snapshot to be stored: all of it but its bytes, which follow as waves.

    `journals` are the step log up to it, to be sealed once it is durable.
    """

    layout: Layout
    facts: Facts
    values: bytes = b""
    journals: Sequence[EndedJournal] = ()
    pending: Pending = field(default_factory=Pending)


@dataclass(frozen=True)
class Outcome:
    """What became of a job: one of `snapshot` and `error` is None. `durable_ms` counts from `facts.begun`.
    `again`: nothing is wrong that another snapshot would not make up for."""

    job: Job
    snapshot: Snapshot | None
    error: BaseException | None
    durable_ms: float
    again: bool = False


@dataclass(frozen=True)
class Held:
    """A snapshot that lies in an arena: the regions of its manifest one after the other, each at the next
    multiple of 4096. Its bytes are to be verified against the manifest by whoever uses them."""

    snapshot: str
    memory: memoryview


class Keeper(Protocol):
    """Calls are made by the run's own thread, but for `wave` and `end`, which its capture thread makes."""

    def held(self) -> list[Held]:
        """What lies in arenas since an earlier process of this run, newest first. Blocks until the keeper has
        made durable (or failed to) all that the earlier process had handed over."""

    def begin(self, terms: Terms) -> None:
        """Work for this run from now on. What `held` gave is not to be used any more. Does not block."""

    def prepare(self, size_bytes: int) -> None:
        """Have arenas of at least this size made ready in the background. Does not block; asking for what is
        there already costs nothing."""

    def has_room(self) -> bool:
        """Whether `arena` would give one that is not in use. Does not block."""

    def arena(self, size_bytes: int, wait: bool) -> Arena | None:
        """Memory of at least this size that nobody uses; None when all is in use and `wait` is false. Blocks
        while arenas are made ready: once in a run's life, and none of it if `prepare` was called in time."""

    def give_back(self, arena: Arena) -> None:
        """An arena that was not filled after all."""

    def submit(self, job: Job) -> None:
        """Announce a snapshot; its waves follow. Does not block."""

    def wave(self, job: Job, arena: Arena, begin: int, end: int, unchanged: frozenset[int]) -> None:
        """Hand over an arena whose first bytes are those of the layout's addresses `begin` to `end`; see
        `chain.writer.Wave` for `unchanged`. Does not block. The arena is lent again once it is stored: a
        whole snapshot's when that is durable, others as soon as their bytes are."""

    def end(self, job: Job) -> None:
        """All waves of the job were handed over."""

    def drop(self, job: Job) -> None:
        """The job cannot be completed: nothing of it is to become a snapshot. Its waves' arenas are freed."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all jobs announced are durable or have failed and the chain is tidied; False when
        `timeout` seconds were not enough."""

    def close(self) -> None:
        """Wait for all, then let go of the keeper. Its memory is given back."""
