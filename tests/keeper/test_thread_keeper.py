"""The keeper in a thread of the trainer."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from handing import DEADLINE_S, GRID_BYTES, LAYOUT, begun, hand_over, job_of, laid, state, stored

from everstep.chain.history import Chain
from everstep.chain.lease import Lease
from everstep.errors import Fenced, Unavailable
from everstep.keeper.base import Outcome
from everstep.keeper.thread import ThreadKeeper
from everstep.store.base import Buffer
from everstep.store.memory import MemoryStore


class Told:
    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.warnings: list[str] = []

    def keeper(self, chain: Chain) -> ThreadKeeper:
        return ThreadKeeper(chain, self.outcomes.append, self.warnings.append)


@pytest.fixture
def chain() -> Chain:
    return Chain.create(MemoryStore(), GRID_BYTES)


def steps_of(chain: Chain) -> list[int]:
    found = list(chain.snapshots())
    assert all(stored(chain, one) == state(one.step, LAYOUT) for one in found)
    return [one.step for one in found]


def test_snapshots_are_made_durable(chain: Chain) -> None:
    told = Told()
    keeper = told.keeper(chain)
    assert keeper.held() == []
    begun(keeper, chain)
    for step in (1, 2, 3, 4):
        hand_over(keeper, step)
    assert keeper.wait(DEADLINE_S)
    assert [(one.job.facts.step, one.error) for one in told.outcomes] == [
        (step, None) for step in (1, 2, 3, 4)
    ]
    assert all(one.snapshot == one.job.pending.snapshot for one in told.outcomes)
    keeper.close()
    assert steps_of(chain) == [4, 3, 2, 1]


def test_a_state_in_waves_that_is_stored_while_it_comes(chain: Chain) -> None:
    layout = laid(600_000)
    keeper = Told().keeper(chain)
    begun(keeper, chain)
    waves = layout.waves(512 * 1024, GRID_BYTES)
    assert len(waves) > 4
    job = job_of(1, layout)
    keeper.submit(job)
    for first, last in waves:
        arena = keeper.arena(512 * 1024, wait=True)
        assert arena is not None
        arena.memory[: last - first] = state(1, layout)[first:last]
        keeper.wave(job, arena, first, last, frozenset())
    keeper.end(job)
    assert job.pending.durable(DEADLINE_S)
    keeper.close()
    assert job.pending.snapshot is not None
    assert stored(chain, job.pending.snapshot) == state(1, layout)


def test_there_are_two_arenas_and_the_older_is_lent_first(chain: Chain) -> None:
    keeper = Told().keeper(chain)
    begun(keeper, chain)
    first, second = (keeper.arena(5000, wait=False) for _ in range(2))
    assert first is not None
    assert second is not None
    assert keeper.arena(5000, wait=False) is None
    assert not keeper.has_room()
    keeper.give_back(second)
    keeper.give_back(first)
    assert keeper.has_room()
    assert keeper.arena(5000, wait=True) is second
    larger = keeper.arena(50_000, wait=True)
    assert larger is not None
    assert larger.size_bytes >= 50_000
    keeper.close()


def test_a_snapshot_that_cannot_be_completed_is_none(chain: Chain) -> None:
    keeper = Told().keeper(chain)
    begun(keeper, chain)
    dropped = hand_over(keeper, 1, end=False)
    keeper.drop(dropped)
    hand_over(keeper, 2)
    keeper.wait()
    with pytest.raises(Unavailable, match="could not be completed"):
        dropped.pending.durable()
    assert keeper.has_room()
    keeper.close()
    assert steps_of(chain) == [2]


def test_one_that_fails_frees_its_memory_and_the_next_goes_well() -> None:
    class Full(MemoryStore):
        is_full = False

        def put(self, key: str, parts: Sequence[Buffer]) -> bool:
            if self.is_full:
                raise Unavailable("no room")
            return super().put(key, parts)

    store = Full()
    chain = Chain.create(store, GRID_BYTES)
    told = Told()
    keeper = told.keeper(chain)
    begun(keeper, chain)
    store.is_full = True
    for step in (1, 2, 3):
        job = hand_over(keeper, step)
        with pytest.raises(Unavailable, match="no room"):
            job.pending.durable(DEADLINE_S)
    store.is_full = False
    assert hand_over(keeper, 4).pending.durable(DEADLINE_S)
    keeper.close()
    assert steps_of(chain) == [4]


def test_waiting_has_an_end(chain: Chain) -> None:
    keeper = Told().keeper(chain)
    begun(keeper, chain)
    job = hand_over(keeper, 1, end=False)
    assert not keeper.wait(0.01)
    assert not job.pending.durable(0.01)
    keeper.end(job)
    assert keeper.wait(DEADLINE_S)
    keeper.close()


def test_what_only_tidying_finds_is_told(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oh")

    told = Told()
    keeper = told.keeper(chain)
    begun(keeper, chain, keep="last 1")
    monkeypatch.setattr("everstep.chain.prune.plan", broken)
    assert hand_over(keeper, 1).pending.durable(DEADLINE_S)
    assert keeper.wait(DEADLINE_S)
    assert told.warnings == ["the chain could not be tidied (ZeroDivisionError: oh)"]
    keeper.close()


def test_a_writer_that_was_taken_over_stops(chain: Chain) -> None:
    keeper = Told().keeper(chain)
    lease = begun(keeper, chain)
    lease.release()
    with pytest.raises(Fenced):
        hand_over(keeper, 1).pending.durable(DEADLINE_S)
    keeper.close()
    assert Lease(chain.store, 2).number == 2


def test_closing_gives_all_memory_back_and_ends_the_thread(chain: Chain) -> None:
    others = set(threading.enumerate())
    keeper = Told().keeper(chain)
    begun(keeper, chain)
    job = hand_over(keeper, 1)
    arena = keeper.arena(LAYOUT.arena_bytes, wait=True)
    assert arena is not None
    keeper.close()
    assert job.pending.snapshot is not None
    with pytest.raises(ValueError, match="released"):
        len(arena.memory)
    assert not set(threading.enumerate()) - others
