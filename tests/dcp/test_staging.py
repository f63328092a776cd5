from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from by_hand import numbered
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.staging import AsyncStager

from everstep import dcp
from everstep.errors import Conflict

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

DEADLINE_S = 60.0


def addresses(state: dict[str, Any]) -> int:
    return int(state["x"].data_ptr())


def test_a_copy_is_complete_and_its_memory_is_used_again() -> None:
    stager = dcp.Stager()
    assert isinstance(stager, AsyncStager)
    state = {"x": numbered((5,)), "n": [1]}
    staged = stager.stage(state)
    state["x"].zero_()
    state["n"].append(2)
    assert torch.equal(staged["x"], numbered((5,)))
    assert staged["n"] == [1]
    first = addresses(staged)
    del staged
    assert addresses(stager.stage(state)) == first
    stager.close()
    with pytest.raises(Conflict, match="closed"):
        stager.stage(state)


def test_memory_that_is_read_is_not_used_again() -> None:
    stager = dcp.Stager(patience_s=0.0)
    state = {"x": numbered((5,))}
    one = stager.stage(state)
    state["x"] += 1
    other = stager.stage(state)
    assert torch.equal(one["x"], numbered((5,)))
    assert torch.equal(other["x"], numbered((5,)) + 1)
    with pytest.raises(Conflict, match="2 saves are still under way"):
        stager.stage(state)
    first = addresses(one)
    del one
    assert addresses(stager.stage(state)) == first


def test_a_third_save_waits_for_one_of_two() -> None:
    stager = dcp.Stager(patience_s=DEADLINE_S)
    state = {"x": numbered((5,))}
    held = [stager.stage(state), stager.stage(state)]
    first = addresses(held[0])
    waits = threading.Event()
    collect = gc.collect

    def collected() -> int:
        waits.set()
        return collect()

    found: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", collected)
        thread = threading.Thread(target=lambda: found.append(addresses(stager.stage(state))))
        thread.start()
        assert waits.wait(DEADLINE_S)
        assert not found
        del held[0]
        thread.join(DEADLINE_S)
    assert found == [first]


class Slow(dcp.SavePlanner):
    """Its save reads nothing until it may."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Event()
        self.may = threading.Event()

    def lookup_object(self, index: MetadataIndex) -> Any:
        self.begun.set()
        assert self.may.wait(DEADLINE_S)
        return super().lookup_object(index)


def test_no_save_is_torn(tmp_path: Path) -> None:
    """Two saves that overlap, and a state that changes under both."""
    stager = dcp.Stager()
    state = {"x": torch.zeros(1000)}
    saves = []
    for step in (1, 2):
        state["x"].fill_(step)
        planner = Slow()
        writer = dcp.Writer(tmp_path / "c", step=step)
        future = torch_dcp.async_save(state, storage_writer=writer, planner=planner, async_stager=stager)
        if step == 1:
            assert planner.begun.wait(DEADLINE_S)
        saves.append((planner, future))
    state["x"].fill_(99)
    for planner, future in saves:
        planner.may.set()
        future.result(DEADLINE_S)
    for step in (1, 2):
        there = {"x": torch.zeros(1000)}
        torch_dcp.load(there, storage_reader=dcp.Reader(tmp_path / "c", f"step:{step}"))
        assert torch.equal(there["x"], torch.full((1000,), float(step)))


def test_a_save_that_fails_does_not_keep_the_next_from_its_memory(tmp_path: Path) -> None:
    """Also not where its future, with the traceback, is kept until the next has begun."""
    stager = dcp.Stager(patience_s=0.0)
    state: dict[str, Any] = {"x": numbered((5,)), "bad": print}
    for _ in range(4):
        future = torch_dcp.async_save(state, storage_writer=dcp.Writer(tmp_path / "c"), async_stager=stager)
        with pytest.raises(BaseException, match="cannot be stored"):
            future.result(DEADLINE_S)
