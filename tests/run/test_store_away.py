"""A store that does not answer for longer than it is tried: training goes on, and nothing is hidden."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from everstep.chain.history import Chain
from everstep.errors import Unavailable
from everstep.events import Away, Back, Event, Failed, Taken
from everstep.keeper.protocol import Problem
from everstep.run.session import Run
from everstep.run.settings import Settings
from everstep.store.base import Buffer
from everstep.store.memory import MemoryStore


class Network(MemoryStore):
    """`away`: it was tried for long enough, and did not answer; `full`: it did, and has no room."""

    away = False
    full = False

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        if self.away or self.full:
            raise Unavailable(f"cannot write {self.url}/{key}: no answer, tried for 300 s", away=self.away)
        return super().put(key, parts)


@pytest.fixture
def store() -> Network:
    return Network()


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def run(store: Network, events: list[Event]) -> Run:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    objects = {"model": model, "optimizer": optimizer}
    return Run(Settings(store, every="2 steps", keep="all"), objects, sink=events.append)


def train(run: Run, steps: int) -> None:
    """Each step's snapshot is stored, or was tried for long enough, before the next step."""
    for _ in range(steps):
        run.tick()
        run._taking.wait()


def of(kind: type[Event], events: list[Event]) -> list[int]:
    return [event.step for event in events if isinstance(event, kind)]  # type: ignore[union-attr]


def test_training_goes_on_and_the_newest_state_is_stored_when_the_store_is_back(
    store: Network, events: list[Event], run: Run
) -> None:
    train(run, 3)
    store.away = True
    train(run, 7)
    assert of(Taken, events) == [2]
    assert of(Away, events) == [4], "told once"
    store.away = False
    train(run, 1)
    assert of(Taken, events) == [2, 11], "a step that fired no trigger: the newest there is"
    (back,) = [event for event in events if isinstance(event, Back)]
    assert (back.step, back.lost) == (11, 7)
    assert of(Failed, events) == []
    train(run, 1)
    run.wait()
    run.close()
    assert [snapshot.step for snapshot in Chain(store).snapshots()] == [12, 11, 2]


def test_each_outage_is_told(store: Network, events: list[Event], run: Run) -> None:
    for _ in range(2):
        store.away = True
        train(run, 3)
        store.away = False
        train(run, 3)
    run.close()
    assert len(of(Away, events)) == len(of(Back, events)) == 2


def test_who_waits_is_told(store: Network, run: Run) -> None:
    store.away = True
    pending = run.take()
    with pytest.raises(Unavailable, match="tried for 300 s"):
        pending.durable()
    train(run, 1)
    with pytest.raises(Unavailable, match="tried for 300 s"):
        run.wait()
    store.away = False
    train(run, 1)
    run.wait()
    run.close()


def test_a_run_that_ends_while_the_store_is_away_says_that_its_end_is_not_stored(
    store: Network, run: Run
) -> None:
    train(run, 2)
    store.away = True
    train(run, 1)
    with pytest.raises(Unavailable, match="tried for 300 s"):
        run.close()
    store.away = False
    head = Chain(store).head()
    assert head is not None
    assert head.step == 2


def test_a_store_that_has_no_room_is_another_matter(store: Network, events: list[Event], run: Run) -> None:
    store.full = True
    with pytest.raises(Unavailable):
        train(run, 3)
    assert of(Failed, events) == [2]
    store.full = False
    run.close()


def test_a_keeper_process_says_which_it_is() -> None:
    for away in (True, False):
        made = Problem.of(Unavailable("no answer", away=away)).error()
        assert isinstance(made, Unavailable)
        assert made.away is away
