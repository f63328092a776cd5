"""What keepers of several ranks do together: parts, commits, and what becomes of those that are missing."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
from handing import DEADLINE_S, GRID_BYTES, assert_joined, hand_over, job_of, laid_of, state, until

from everstep.chain import parts
from everstep.chain.history import Chain
from everstep.chain.lease import Lease
from everstep.chain.siblings import Siblings
from everstep.errors import Fenced, Unavailable
from everstep.format import keys
from everstep.keeper import joining
from everstep.keeper.arena import Arena, allocated
from everstep.keeper.base import Job, Outcome, Terms
from everstep.keeper.keeping import Given, Keeping
from everstep.keeper.thread import ThreadKeeper
from everstep.store.base import Buffer, Entry
from everstep.store.memory import MemoryStore

RANKS = 3


class Held(MemoryStore):
    """A store that makes whoever puts some objects wait, or fail."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()
        self.holds: Callable[[str], bool] = lambda key: False
        self.fails: Callable[[str], bool] = lambda key: False
        self.waiting = threading.Event()
        self.puts: list[str] = []

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        if self.fails(key):
            raise Unavailable("the disk is full", key=key)
        if self.holds(key):
            self.waiting.set()
            assert self.let_go.wait(DEADLINE_S)
        self.puts.append(key)
        return super().put(key, parts)


class World:
    """Keepers of all ranks, each in a thread of this process."""

    def __init__(self, store: MemoryStore, deadline_s: float = DEADLINE_S, keep: str = "all") -> None:
        self.chain = Chain(store)
        self.lease = Lease.take(store)
        self.outcomes: list[list[Outcome]] = [[] for _ in range(RANKS)]
        self.warnings: list[str] = []
        self.keepers = [
            ThreadKeeper(Chain(store), self.outcomes[rank].append, self.warnings.append)
            for rank in range(RANKS)
        ]
        head = self.chain.head()
        for rank, keeper in enumerate(self.keepers):
            parent = head.id if head else ""
            number = self.lease.number
            keeper.begin(Terms("main", number, parent, keep, rank=rank, ranks=RANKS, deadline_s=deadline_s))

    def take(self, number: int, *, but: Sequence[int] = ()) -> list[Job]:
        return [
            hand_over(keeper, 10 * number, laid_of(rank, RANKS), take=number)
            for rank, keeper in enumerate(self.keepers)
            if rank not in but
        ]

    def wait(self) -> None:
        for keeper in self.keepers:
            assert keeper.wait(DEADLINE_S)

    def close(self) -> None:
        for keeper in self.keepers:
            keeper.close()
        self.lease.release()


@pytest.fixture
def store() -> Held:
    store = Held()
    Chain.create(store, GRID_BYTES)
    return store


@pytest.fixture
def world(store: Held) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(**terms: float | str) -> World:
        made.append(World(store, **terms))  # type: ignore[arg-type]
        return made[-1]

    yield make
    store.let_go.set()
    for one in made:
        one.close()


def test_all_parts_become_one_snapshot(store: Held, world: Callable[..., World]) -> None:
    run = world()
    for number in (1, 2):
        run.take(number)
        run.wait()
    assert_joined(store, [20, 10], RANKS)
    first, *others = run.outcomes
    assert [outcome.snapshot for outcome in first] == list(run.chain.snapshots())[::-1]
    snapshot = first[-1].snapshot
    assert snapshot is not None
    assert first[-1].job.pending.snapshot == snapshot
    assert snapshot.record.costs["join"] >= 0
    assert snapshot.record.costs["store"] > 0
    for rank, told in enumerate(others, 1):
        parts = [outcome.part for outcome in told]
        assert [outcome.error or outcome.snapshot for outcome in told] == [None, None]
        assert parts[-1] is not None
        assert parts[-1].manifest == snapshot.record.manifests[rank]
        # Whether it is a snapshot, somebody else says.
        assert not any(outcome.job.pending.durable(0) for outcome in told)
    assert run.warnings == []
    assert list(store.list(keys.PARTS)) == []


def test_a_rank_costs_three_puts(store: Held, world: Callable[..., World]) -> None:
    run = world()
    run.take(1)
    run.wait()
    store.puts.clear()
    run.take(2)
    run.wait()
    kinds = [key.partition("/")[0] for key in store.puts]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    assert counts == {"packs": RANKS, "manifests": RANKS, "parts": RANKS, "snapshots": 1, "heads": 1}


def test_who_waits_for_others_holds_nothing_up(store: Held, world: Callable[..., World]) -> None:
    """Rank 0 stores what comes next while it waits for a slow one, and commits one after the other."""
    run = world()
    store.holds = lambda key: key == keys.part("main", run.lease.number, 1, 2)
    run.take(1)
    assert store.waiting.wait(DEADLINE_S)
    run.take(2)
    announced = keys.part("main", run.lease.number, 2, 0)
    until(lambda: announced in store.puts, "rank 0 has stored the next")
    assert list(run.chain.snapshots()) == []
    store.let_go.set()
    run.wait()
    assert_joined(store, [20, 10], RANKS)
    assert [outcome.job.facts.step for outcome in run.outcomes[0]] == [10, 20]


def test_a_rank_that_is_late_costs_a_snapshot_and_no_more(store: Held, world: Callable[..., World]) -> None:
    run = world(deadline_s=0.0)
    store.holds = lambda key: key.startswith(keys.parts("main", run.lease.number, 1)) and key.endswith("2")
    run.take(1, but=[0])
    assert run.keepers[1].wait(DEADLINE_S)
    run.take(1, but=[1, 2])
    assert run.keepers[0].wait(DEADLINE_S)
    (outcome,) = run.outcomes[0]
    assert outcome.snapshot is None
    assert isinstance(outcome.error, Unavailable)
    assert outcome.error.away, "training goes on"
    assert "of 3 ranks 1 had not stored their part" in str(outcome.error)
    assert "(2)" in str(outcome.error)
    store.let_go.set()
    run.wait()
    assert list(run.chain.snapshots()) == []


def test_a_rank_that_cannot_store_says_so_at_once(store: Held, world: Callable[..., World]) -> None:
    run = world()
    run.take(1)
    run.wait()
    failing = run.keepers[2]._thread
    store.fails = lambda key: key.startswith(keys.MANIFESTS) and threading.current_thread() is failing
    run.take(2)
    run.wait()
    failed = run.outcomes[0][-1].error
    assert isinstance(failed, Unavailable)
    assert failed.away
    assert "could not store its part of the snapshot" in str(failed)
    assert "the disk is full" in str(failed)
    own = run.outcomes[2][-1].error
    assert isinstance(own, Unavailable)
    assert not own.away, "its trainer is to make room"
    assert run.outcomes[1][-1].part is not None
    assert_joined(store, [10], RANKS)
    store.fails = lambda key: False
    run.take(3)
    run.wait()
    assert_joined(store, [30, 10], RANKS)


def test_a_rank_whose_state_is_incomplete_withdraws(store: Held, world: Callable[..., World]) -> None:
    run = world()
    run.take(1, but=[1])
    job = hand_over(run.keepers[1], 10, laid_of(1, RANKS), end=False, take=1)
    run.keepers[1].drop(job)
    run.wait()
    assert "rank 1 could not store its part" in str(run.outcomes[0][0].error)
    assert list(run.chain.snapshots()) == []


@pytest.mark.parametrize("dropped", [0, 1])
@pytest.mark.parametrize("filled", ["half", "whole"])
def test_what_was_stored_ahead_and_is_dropped_is_no_part(
    store: Held, world: Callable[..., World], dropped: int, filled: str
) -> None:
    """All of it may be in packs when it turns out that the ranks do not agree."""
    run = world()
    run.take(1, but=[dropped])
    keeper, layout = run.keepers[dropped], laid_of(dropped, RANKS)
    arena = keeper.arena(layout.arena_bytes, wait=True)
    assert arena is not None
    job = job_of(10, layout, take=1)
    keeper.submit(job)
    keeper.wave(job, arena, 0, layout.arena_bytes, frozenset(), 0)
    arena.memory[: layout.arena_bytes] = state(10, layout)
    keeper.arrived(job, layout.arena_bytes if filled == "whole" else layout.arena_bytes // 2)
    if filled == "whole":
        packs = RANKS
        until(lambda: sum(key.startswith(keys.PACKS) for key in store.puts) == packs, "it is in packs")
    told = keys.part("main", run.lease.number, 1, dropped)
    assert told not in store.puts
    keeper.drop(job)
    run.wait()
    assert [outcome.part for outcome in run.outcomes[dropped]] == [None]
    assert isinstance(run.outcomes[0][0].error, Unavailable)
    assert len([key for key in store.puts if key.startswith(keys.MANIFESTS)]) == RANKS - 1
    assert list(run.chain.snapshots()) == []
    run.take(2)
    run.wait()
    assert_joined(store, [20], RANKS)


@pytest.mark.parametrize("told", ["withdrawn", "damaged"])
def test_a_rank_that_has_withdrawn_stays_so_and_trains_on(
    store: Held, world: Callable[..., World], told: str
) -> None:
    """As when its keeper died right after it had told rank 0, and another stores the same."""
    run = world()
    if told == "withdrawn":
        parts.withdraw(run.chain, parts.Take("main", run.lease.number, 1), 1, "no room")
    else:
        store.put(keys.part("main", run.lease.number, 1, 1), [b"nonsense"])
    run.take(1)
    run.wait()
    for rank in (0, 1):
        error = run.outcomes[rank][0].error
        assert isinstance(error, Unavailable)
        assert error.away
    assert run.outcomes[2][0].part is not None
    run.take(2)
    run.wait()
    assert_joined(store, [20], RANKS)


def test_what_is_not_to_stay_is_pruned_by_rank_0(store: Held, world: Callable[..., World]) -> None:
    run = world(keep="last 1")
    for number in range(1, 5):
        run.take(number)
        run.wait()
    assert run.warnings == []
    assert_joined(store, [40], RANKS)
    # Also by a rank that builds on nothing but its own last part.
    run.close()
    again = World(store, keep="last 1")
    again.take(1)
    again.wait()
    again.close()
    assert_joined(store, [10], RANKS)


def test_a_take_that_failed_is_looked_after_by_the_next(store: Held, world: Callable[..., World]) -> None:
    run = world()
    jobs = run.take(1)
    run.wait()
    job = hand_over(run.keepers[1], 20, laid_of(1, RANKS), end=False, take=2)
    run.take(2, but=[1])
    run.keepers[1].drop(job)
    run.wait()
    for rank, keeper in enumerate(run.keepers):
        arena = keeper.arena(1, wait=True)
        assert arena is not None
        arena.memory[:4] = b"next"
        job = Job(laid_of(rank, RANKS), jobs[0].facts, jobs[0].values, take=3, look=True)
        job.pending.begun = True
        keeper.submit(job)
        keeper.wave(job, arena, 0, job.layout.arena_bytes, frozenset())
        keeper.end(job)
    run.wait()
    assert run.outcomes[0][-1].snapshot is not None
    assert len(list(run.chain.snapshots())) == 2


def test_who_was_replaced_commits_nothing(store: Held, world: Callable[..., World]) -> None:
    run = world()
    run.take(1)
    run.wait()
    run.lease.release()
    Lease.take(store)
    run.take(2)
    run.wait()
    assert isinstance(run.outcomes[0][-1].error, Fenced)
    assert_joined(store, [10], RANKS)


def test_damage_to_what_a_rank_told_costs_a_snapshot(store: Held, world: Callable[..., World]) -> None:
    run = world()
    store.put(keys.part("main", run.lease.number, 1, 1), [b"nonsense"])
    run.take(1, but=[1])
    run.wait()
    error = run.outcomes[0][0].error
    assert isinstance(error, Unavailable)
    assert error.away
    assert "cannot be read" in str(error)


class Waiting:
    """Rank 0 of two, whose other rank does not come."""

    def __init__(self, store: Held) -> None:
        self.now = 100.0
        self.joins = joining.Joining(Chain(store), 2, 600.0, lambda: self.now)
        self.done = threading.Event()
        self._told: list[Exception | None] = []

    def put(self) -> None:
        self.joins.put(joining.Take("main", 1, 1), self._then)

    def _then(self, found: list[parts.Part], error: Exception | None) -> None:
        self._told.append(error)
        self.done.set()

    def assert_given_up(self) -> None:
        assert self.done.wait(DEADLINE_S)
        assert isinstance(self._told[0], Unavailable)
        self.joins.close()


def test_hurry_makes_the_deadline_come_sooner(store: Held) -> None:
    waiting = Waiting(store)
    waiting.joins.hurry()
    waiting.put()
    assert not waiting.done.wait(0.05)
    waiting.now += joining.HURRY_S
    waiting.assert_given_up()


def test_hurry_that_is_over_before_the_wait_begins(store: Held) -> None:
    waiting = Waiting(store)
    waiting.joins.hurry()
    waiting.now += joining.HURRY_S
    waiting.put()
    waiting.assert_given_up()


def test_rank_0_looks_for_parts_when_those_beside_it_are_there(
    store: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "FIRST_WAIT_S", 10 * DEADLINE_S)
    lease, siblings = Lease.take(store), Siblings()
    told: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    terms = [Terms("main", lease.number, "", "all", rank=rank, ranks=2) for rank in range(2)]
    keepings = [Keeping(Chain(store), one, pytest.fail, siblings=siblings) for one in terms]
    listed = threading.Event()
    list_all = store.list

    def listing(prefix: str = "", limit: int | None = None) -> Iterator[Entry]:
        found = list(list_all(prefix, limit))
        if prefix.startswith(keys.PARTS):
            listed.set()
        return iter(found)

    monkeypatch.setattr(store, "list", listing)
    for rank, keeping in enumerate(keepings):
        layout = laid_of(rank, 2)
        given = Given(job_of(10, layout, take=1), lambda arena: None)
        arena = Arena.mapped(allocated(layout.arena_bytes))
        arena.memory[: layout.arena_bytes] = state(10, layout)
        given.wave(arena, 0, layout.arena_bytes, frozenset())
        given.end()
        keeping.store(given, told.put)
        assert listed.wait(DEADLINE_S), "rank 0 has looked in vain"
    outcomes = [told.get(timeout=DEADLINE_S) for _ in range(2)]
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert_joined(store, [10], 2)
    for keeping in keepings:
        keeping.close()
    lease.release()
