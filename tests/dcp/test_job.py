"""Real ranks, with gloo: everything that torch does between us and the state."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import everstep
from everstep import dcp
from everstep.chain.history import Chain
from everstep.chain.verify import verify

pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

JOB = Path(__file__).with_name("job.py")
RANKS = 2


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("job")
    chain = directory / "chain"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(JOB), str(chain), str(directory)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(RANKS)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    try:
        told = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, -signal.SIGKILL], "\n".join(told)
    return chain, directory


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def zeroed(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return torch.zeros_like(state)
    if isinstance(state, dict):
        return {key: zeroed(value) for key, value in state.items()}
    return state


def test_each_way_of_saving_is_exact(done: tuple[Path, Path]) -> None:
    """And nothing that was trained while a save went on is in it."""
    path, directory = done
    chain = Chain(path)
    # The head is as it was before a rank was killed.
    assert [one.step for one in chain.snapshots()] == [6, 5, 4, 3, 2, 1]
    for step in range(1, 7):
        expected = torch.load(directory / f"{step}.pt", weights_only=False)
        there = zeroed(expected)
        torch_dcp.load(there, storage_reader=dcp.Reader(path, f"step:{step}"))
        assert same(expected, there), step
    assert not verify(chain).findings


def test_what_does_not_change_is_written_once(done: tuple[Path, Path]) -> None:
    """Also by the processes that do the asynchronous saves."""
    frozen = 600 * 2000 * 4
    new = {one.step: one.record.new_bytes for one in Chain(done[0]).snapshots()}
    assert new[1] >= frozen
    assert new[4] >= frozen  # The first of another process, which has read nothing.
    assert all(new[step] < frozen for step in (2, 3, 5, 6))


def test_a_run_without_ranks_goes_on(done: tuple[Path, Path]) -> None:
    path, directory = done
    expected = torch.load(directory / "6.pt", weights_only=False)
    model = nn.Sequential(nn.Linear(600, 2000), nn.Linear(2000, 13), nn.Linear(13, 5))
    everstep.load(path).into(model=model)
    assert same(expected["model"], dict(model.state_dict()))


def test_open_goes_on_from_what_all_ranks_saved(done: tuple[Path, Path], tmp_path: Path) -> None:
    path, directory = done
    shutil.copytree(path, tmp_path / "chain")
    expected = torch.load(directory / "6.pt", weights_only=False)
    model = nn.Sequential(nn.Linear(600, 2000), nn.Linear(2000, 13), nn.Linear(13, 5))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(one for one in model.parameters() if one.requires_grad)
    with everstep.open(tmp_path / "chain", every=None, model=model, optim=optimizer) as run:
        assert run.step == 6
        assert same(expected["model"], dict(model.state_dict()))
        assert same(expected["optim"], get_optimizer_state_dict(model, optimizer))
