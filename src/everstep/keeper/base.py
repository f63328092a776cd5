"""What a keeper is to the run: it lends memory, takes filled memory, and makes durable what is in it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from everstep.chain.history import Snapshot
from everstep.chain.parts import Part
from everstep.chain.steplog import EndedJournal
from everstep.chain.writer import Facts
from everstep.errors import EverstepError, NotFound, Unavailable
from everstep.events import Returned, Sink, Warned
from everstep.format.layout import Layout
from everstep.keeper.arena import Arena
from everstep.store.base import Store

ARENAS = 2
"""One is filled while the other is stored."""

DEADLINE_S = 600.0
"""So long rank 0 waits for the other ranks' parts of a snapshot, unless it is told otherwise."""


@dataclass(frozen=True)
class Followed:
    """How a replica stands: `snapshot` and `step` are its newest of the branch ("" and 0 for none), `behind`
    is how many it lacks. `problem` says why it could not be sent anything just now; `fenced` is the error of
    a run that another writer has taken over through it."""

    replica: str
    snapshot: str = ""
    step: int = 0
    behind: int = 0
    problem: str = ""
    fenced: EverstepError | None = None


class Standings:
    """How the replicas of a run stand to the snapshots that it takes. For several threads.

    Args:
        first: the chain's own address.
        replicas: how the user calls them.
        emit: is told when one goes away, and when it is back.
        on_fenced: is told that the run was taken over through one.
    """

    def __init__(
        self,
        first: str = "",
        replicas: Sequence[str] = (),
        emit: Sink = lambda event: None,
        on_fenced: Callable[[EverstepError], None] = lambda error: None,
    ) -> None:
        self.first = first
        self.replicas = tuple(replicas)
        self._emit = emit
        self._on_fenced = on_fenced
        self._changed = threading.Condition()
        self._taken: dict[str, int] = {}
        """By id, which of this run's snapshots it is, from 1 on."""
        self._told: dict[str, Followed] = {}
        self._reached: dict[str, int] = dict.fromkeys(self.replicas, 0)
        self._fenced: EverstepError | None = None

    def took(self, snapshot: Snapshot) -> None:
        """It is durable in the chain's own store."""
        with self._changed:
            self._taken[snapshot.id] = len(self._taken) + 1
            for told in self._told.values():
                self._note(told)

    def told(self, followed: Followed) -> None:
        """By a keeper, in whatever thread."""
        if followed.replica not in self._reached:
            return
        with self._changed:
            before = self._told.get(followed.replica, Followed(followed.replica))
            if followed.problem and not followed.snapshot:
                followed = replace(followed, snapshot=before.snapshot, step=before.step)
            self._told[followed.replica] = followed
            self._note(followed)
            if followed.fenced is not None:
                self._fenced = followed.fenced
            self._changed.notify_all()
        if followed.fenced is not None:
            self._on_fenced(followed.fenced)
        elif followed.problem and not before.problem:
            self._emit(
                Warned(
                    f"the replica {followed.replica} gets nothing now ({followed.problem}); it is tried "
                    "again, and nothing waits for it"
                )
            )
        elif before.problem and not followed.problem:
            self._emit(Returned(followed.replica, followed.behind))

    def _note(self, followed: Followed) -> None:
        name = followed.replica
        self._reached[name] = max(self._reached[name], self._taken.get(followed.snapshot, 0))

    def behind(self, step: int) -> tuple[tuple[str, int], ...]:
        """By replica, how many steps its newest snapshot is behind one of `step`."""
        with self._changed:
            told = {name: self._told.get(name) for name in self.replicas}
            return tuple((name, step - (one.step if one else 0)) for name, one in told.items())

    def unsent(self) -> dict[str, int]:
        """By replica, how many of this run's snapshots it lacks; those that lack none are left out."""
        with self._changed:
            return {
                name: len(self._taken) - reached
                for name, reached in self._reached.items()
                if reached < len(self._taken)
            }

    def settle(self, timeout: float) -> bool:
        """Wait until all replicas that can be sent to have all of this run's snapshots."""
        with self._changed:
            return self._changed.wait_for(self._is_settled, timeout)

    def _is_settled(self) -> bool:
        return self._fenced is not None or all(
            reached >= len(self._taken) or self._told.get(name, Followed(name)).problem
            for name, reached in self._reached.items()
        )

    def reach(self, snapshot: Snapshot, where: str, timeout: float | None) -> bool:
        """Wait until a replica (`all`: every one) has a snapshot of this run, or one that follows it.

        Raises:
            NotFound: the run has no such replica.
            Fenced: the run was taken over.
        """
        names = self.replicas if where == ALL else (where,)
        if any(name not in self._reached for name in names):
            raise NotFound(
                f"{where!r} is no replica of this run; they are {', '.join(self.replicas) or 'none'}",
                kept="nothing was touched",
                next="everstep.open(..., replicas=[...])",
            )
        with self._changed:
            number = self._taken.get(snapshot.id, 0)
            reached = self._changed.wait_for(
                lambda: self._fenced is not None or all(self._reached[name] >= number for name in names),
                timeout,
            )
            if self._fenced is not None:
                raise self._fenced
            return reached


ALL = "all"
"""Every replica."""


class Pending:
    """A snapshot that is being taken."""

    def __init__(self) -> None:
        self.standings = Standings()
        """Of the run that takes it."""
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

    def durable(self, where: str | float | None = None, timeout: float | None = None) -> bool:
        """Wait until the snapshot is durable: it then survives a power cut.

        Args:
            where: the address of a replica, as it was given to `everstep.open`: wait until that has this
                snapshot, or one that follows it (of what is pruned before it is sent a replica gets only what
                follows); `"all"` for every replica. Unless given: in the chain's own store. A number is a
                timeout.
            timeout: at most so many seconds; None: as long as it takes.

        Returns:
            False when the time was not enough.

        Raises:
            EverstepError: it failed; the snapshots before it are intact.
            NotFound: the run has no such replica.
        """
        if isinstance(where, int | float):
            where, timeout = None, where
        if not self.begun and not self._done.is_set():
            raise Unavailable(
                "this snapshot is taken when the step ends, which it cannot while it is waited for",
                kept="nothing was touched",
                next="call durable() after the step",
            )
        begun = time.monotonic()
        if not self._done.wait(timeout):
            return False
        if self._error is not None:
            self.told = True
            raise self._error
        if not where or where == self.standings.first or self._snapshot is None:
            return True
        left = None if timeout is None else max(0.0, timeout - (time.monotonic() - begun))
        return self.standings.reach(self._snapshot, where, left)

    def settled(self, timeout: float | None = None) -> bool:
        """Wait until it is durable or has failed; False when `timeout` seconds were not enough."""
        return self._done.wait(timeout)

    def release(self) -> None:
        self._released.set()

    def finish(self, snapshot: Snapshot | None, error: BaseException | None = None) -> None:
        """Say what became of it. Only the first call counts."""
        if self._done.is_set():
            return
        self._snapshot, self._error = snapshot, error
        self._released.set()
        self._done.set()


@dataclass(frozen=True)
class Terms:
    """What a keeper works under.

    `lease` is the number of the run's lease of its `branch`, `parent` the id of the snapshot that the next
    one follows on and may share chunks with ("" for none), `keep` says which snapshots of the branch stay
    (`chain.retention`). `fresh`: no chunk of the parent is to be relied on, for it had to be read from a
    replica. `replicas` are the names and addresses of those that follow; a keeper in the run's own process is
    given their stores. `scrub_bytes_per_s`: how fast the chain is scrubbed beside the run; 0: it is not.

    Of `ranks` ranks this is the keeper of `rank`. Rank 0 waits at most `deadline_s` seconds for the others'
    parts of a snapshot, counted from when its own is stored. It alone commits, prunes, sends to replicas and
    scrubs, and `lease` is its number for all of them. `part` names the manifest of the newest part that this
    rank has announced under the lease, "" for none: the next one shares chunks with that one alone."""

    branch: str
    lease: int
    parent: str
    keep: str
    fresh: bool = False
    replicas: tuple[tuple[str, str], ...] = ()
    scrub_bytes_per_s: int = 0
    rank: int = 0
    ranks: int = 1
    deadline_s: float = DEADLINE_S
    part: str = ""


@dataclass(eq=False)
class Job:
    """A snapshot to be stored: all of it but its bytes, which follow as waves.

    `journals` are the step log up to it, to be sealed once it is durable. `take` is which take of the run it
    is, counted from 1 on and the same on all ranks; 0 where there is one rank. `look`: the take before it was
    not committed, so that what was pruned meanwhile is to be looked for before chunks are shared.
    """

    layout: Layout
    facts: Facts
    values: bytes = b""
    journals: Sequence[EndedJournal] = ()
    pending: Pending = field(default_factory=Pending)
    take: int = 0
    look: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a job: one of `snapshot`, `part` and `error` is not None. `durable_ms` counts from
    `facts.begun`. `again`: nothing is wrong that another snapshot would not make up for.

    A rank that is not the first has a `part`: it is durable and announced, and becomes a snapshot when rank 0
    says so. The keeper does not know of that, so it does not finish the job's `Pending`: who is told does.

    Where rank 0 waited in vain for others, the error is an `Unavailable` that is `away` and names them: as
    with a store that does not answer, training goes on, the snapshots before it are intact, and the newest
    state is to be taken in its place.
    """

    job: Job
    snapshot: Snapshot | None
    error: BaseException | None
    durable_ms: float
    again: bool = False
    part: Part | None = None


@dataclass(frozen=True)
class Held:
    """A snapshot that lies in an arena: the regions of its manifest one after the other, each at the next
    multiple of 4096. Its bytes are to be verified against the manifest by whoever uses them.

    What a keeper holds of one of several ranks is a part, which it cannot tell the snapshot of: it has
    `manifest`, the name of the part's, and `snapshot` is ""."""

    snapshot: str
    memory: memoryview
    manifest: str = ""


class Keeper(Protocol):
    """Calls are made by the run's own thread, but what is said of a job its capture thread may say."""

    def held(self) -> list[Held]:
        """What lies in arenas since an earlier process of this run and rank, newest first. Blocks until the
        keeper has made durable (or failed to) all that the earlier process had handed over; of a run of
        another number of ranks, all that any of them had."""

    def reading(self, store: Store) -> Store:
        """The chain's store to restore from, between `held` and `begin`: what several ranks of this machine
        read of its packs is read once. From several threads. Digests are to be verified, as ever."""

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

    def wave(
        self,
        job: Job,
        arena: Arena,
        begin: int,
        end: int,
        unchanged: frozenset[int],
        filled: int | None = None,
    ) -> None:
        """Hand over an arena whose first bytes are those of the layout's addresses `begin` to `end`; see
        `chain.writer.Wave` for `unchanged`. Does not block. The arena is lent again once it is stored: a
        whole snapshot's when that is durable, others as soon as their bytes are.

        Where it is all of the state it may be handed over while it is being filled: `filled` is up to where
        that has come. Behind it the caller may write until `end` or `drop`."""

    def arrived(self, job: Job, end: int) -> None:
        """The arena that was handed over before it was full is filled up to the address `end`; what lies
        before is not written to any more. Does not block."""

    def end(self, job: Job) -> None:
        """All waves of the job were handed over, and it is what is to become a snapshot: before this it is
        digested and written, and not committed."""

    def drop(self, job: Job) -> None:
        """The job cannot be completed: nothing of it is to become a snapshot. Its waves' arenas are freed."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all jobs announced are durable or have failed and the chain is tidied; False when
        `timeout` seconds were not enough."""

    @property
    def outlives(self) -> bool:
        """Whether it goes on sending to replicas when this process is gone."""

    def close(self) -> None:
        """Wait for all, then let go of the keeper. Its memory is given back. What replicas lack is not waited
        for: see `Standings.settle`."""

    def abandon(self) -> None:
        """Let go of the keeper as if this process had been killed: one that outlives it goes on with what it
        was handed over, and nobody here hears of that; each `Pending` says so. Another one is waited for, but
        other ranks are waited for a minute at most."""
