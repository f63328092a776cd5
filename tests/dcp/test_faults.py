"""Whatever dies, and whenever: the branch is as it was, or has the whole snapshot."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from by_hand import Boxed, load, mesh, numbered, save

from everstep import dcp
from everstep.chain.history import Chain
from everstep.chain.verify import verify
from everstep.errors import Unavailable
from everstep.integrations.dcp import saving
from everstep.store.memory import MemoryStore
from everstep.testing.faults import Died, FaultyStore

GRID_BYTES = 4096
RANKS = 2
SHAPE = (40, 64)


@pytest.fixture(autouse=True)
def _as_a_process_that_has_just_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_savings", "_left", "_kept"):
        monkeypatch.setattr(saving, name, {})


def states(first: int) -> list[dict[str, Any]]:
    whole = numbered(SHAPE, first=first)
    return [{"w": Boxed.of(whole, mine), "n": first} for mine in mesh(SHAPE, [[7], [33]], RANKS)]


def whole_of(store: MemoryStore) -> tuple[list[int], torch.Tensor]:
    """The steps there are, and the newest state."""
    there = {"w": torch.zeros(SHAPE), "n": 0}
    load([there], [dcp.Reader(store)])
    assert torch.equal(there["w"], numbered(SHAPE, first=there["n"]))
    return [one.step for one in Chain(store).snapshots()], there["w"]


def started() -> MemoryStore:
    store = MemoryStore()
    Chain.create(store, GRID_BYTES)
    save(states(1), [dcp.Writer(store, step=1) for _ in range(RANKS)])
    return store


def writes() -> int:
    store = FaultyStore(started())
    save(states(50), [dcp.Writer(store, step=2, keep="last 1") for _ in range(RANKS)])
    return store.count


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("fault", [Died, lambda: Unavailable("away")], ids=["died", "away"])
def test_a_fault_at_any_write(done: bool, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks use one store here, so that any write of any rank is struck."""
    for at in range(writes()):
        for name in ("_savings", "_left", "_kept"):
            monkeypatch.setattr(saving, name, {})
        inner = started()
        store = FaultyStore(inner, at, fault, done=done)
        writers = [dcp.Writer(store, step=2, keep="last 1") for _ in range(RANKS)]
        with suppress(Died, Unavailable):
            save(states(50), writers)
        steps, _ = whole_of(inner)
        assert steps in ([1], [2, 1], [2]), at
        assert not verify(Chain(inner)).findings, at
        # The next job saves, and this one too, where it lives.
        for name in ("_savings", "_left", "_kept") if fault is Died else ():
            monkeypatch.setattr(saving, name, {})
        again = inner if fault is Died else store
        if fault is Died:
            monkeypatch.setattr("everstep.chain.lease._lives", lambda _: False)
        save(states(90), [dcp.Writer(again, step=3) for _ in range(RANKS)])
        steps, newest = whole_of(inner)
        assert steps[0] == 3
        assert torch.equal(newest, numbered(SHAPE, first=90))
        monkeypatch.undo()


def test_a_rank_that_fails_leaves_nothing_to_trip_over() -> None:
    """Its part was not committed, nor were the others': the next save is whole."""
    store = started()

    class Failing(dcp.SavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            if write_item.index.fqn == "w":
                raise RuntimeError("no")
            return super().resolve_data(write_item)

    with pytest.raises(RuntimeError, match="no"):
        save(states(5), [dcp.Writer(store, step=2) for _ in range(RANKS)], Failing)
    assert whole_of(store)[0] == [1]
    save(states(5), [dcp.Writer(store, step=3) for _ in range(RANKS)])
    assert whole_of(store)[0] == [3, 1]
