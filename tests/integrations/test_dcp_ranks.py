"""DCP on two ranks: stock DCP loads what was exported, and what it saved is joined."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import everstep
from everstep import errors
from everstep.integrations import dcp_reading, dcp_writing, importing
from integrations.checkpoints import chain

RANKS = """
import os, sys
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

def work(rank, port, place):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    load(mesh, place + "/exported", torch.load(place + "/whole.pt", weights_only=True))
    save(mesh, place + "/saved")
    dist.destroy_process_group()
    sys.stdout.flush()
    # All is done; what torch takes down after this sometimes ends in std::terminate.
    os._exit(0)

def load(mesh, place, expected):
    model = nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 3))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=place)
    for number, (name, one) in enumerate(of_model.items()):
        assert torch.equal(one.full_tensor(), expected["model"][name]), name
        for key in ("exp_avg", "exp_avg_sq"):
            ours, theirs = of_optimizer["state"][name][key], expected["optimizer"]["state"][number][key]
            assert torch.equal(ours.full_tensor(), theirs), (name, key)
    assert of_optimizer["param_groups"][0]["lr"] == 0.25

def save(mesh, place):
    base = torch.arange(7 * 6, dtype=torch.float32).reshape(7, 6)
    state = {
        "rows": distribute_tensor(base, mesh, [Shard(0)]),
        "columns": distribute_tensor(base * 2, mesh, [Shard(1)]),
        "whole": distribute_tensor(base * 3, mesh, [Replicate()]),
        "plain": base * 4,
        "step": 6,
    }
    dcp.save(state, checkpoint_id=place)

if __name__ == "__main__":
    torch.multiprocessing.spawn(work, args=tuple(sys.argv[1:]), nprocs=2)
"""


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


@pytest.mark.slow
@pytest.mark.process
def test_two_ranks_load_what_was_exported_and_save_what_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    model(torch.randn(4, 5)).square().mean().backward()
    optimizer.step()
    with everstep.open(tmp_path / "run", model=model, optimizer=optimizer, every=None) as run:
        run.tick()
    monkeypatch.setattr(dcp_writing, "PART_BYTES", 80)
    everstep.Chain(tmp_path / "run").export("head", tmp_path / "exported", format="dcp")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "whole.pt")
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, str(tmp_path / "ranks.py"), free_port(), str(tmp_path)]
    done = subprocess.run(command, timeout=200, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    assert len(list((tmp_path / "saved").glob("*.distcp"))) == 2
    monkeypatch.setattr(dcp_reading, "_OPEN_FILES", 1)
    c = chain(tmp_path / "c")
    c.import_(tmp_path / "saved")
    base = torch.arange(7 * 6, dtype=torch.float32).reshape(7, 6)
    loaded = c.load()
    for name, factor in (("rows", 1), ("columns", 2), ("whole", 3), ("plain", 4)):
        assert torch.equal(loaded[name], base * factor)  # type: ignore[arg-type]
    next((tmp_path / "saved").glob("__1*")).unlink()
    with pytest.raises(errors.Damaged, match=r"__1_0\.distcp"):
        importing.read(tmp_path / "saved")
