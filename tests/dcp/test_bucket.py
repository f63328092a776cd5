"""Ranks in processes of their own save to a real object store, and another process loads: what s3-connector-
for-pytorch tests its storage of DCP with end to end (three ranks, small and large tensors, saves one after
the other, loads of a part), but for the names of its objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
import torch.multiprocessing as mp

from everstep import dcp
from everstep.chain.history import Chain
from everstep.chain.verify import verify
from servers.fixtures import Bucket
from servers.running import S3

pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

RANKS = 3


def save(rank: int, url: str, group: str, states: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{group}", rank=rank, world_size=RANKS)
    for step, state in enumerate(states):
        writer = dcp.Writer(url, step=step)
        torch_dcp.save(state, storage_writer=writer, planner=dcp.SavePlanner() if step else None)
    dist.barrier()
    dist.destroy_process_group()


def test_three_ranks_and_a_bucket(ceph: S3, bucket: Bucket, tmp_path: Path) -> None:
    url = f"{bucket(ceph)}/runs/gpt"
    torch.manual_seed(3)
    small = {"tensor1": torch.randn(3, 2), "tensor2": torch.randn(5, 5), "scalar": torch.tensor(3.14), "n": 1}
    large = {**small, "tensor1": torch.randn(10, 1024, 1024), "n": 2}
    states = [small, large]
    mp.spawn(save, (url, str(tmp_path / "group"), states), RANKS)
    for step, state in enumerate(states):
        there = {name: torch.empty_like(one) if name != "n" else 0 for name, one in state.items()}
        torch_dcp.load(there, storage_reader=dcp.Reader(url, f"step:{step}"))
        assert there["n"] == state["n"]
        assert all(torch.equal(one, there[name]) for name, one in state.items() if name != "n")
    part = {"tensor2": torch.zeros(5, 5)}
    torch_dcp.load(part, storage_reader=dcp.Reader(url))
    assert torch.equal(part["tensor2"], large["tensor2"])
    chain = Chain(url)
    head = chain.head()
    assert head is not None
    parts = [sum(region.size_bytes for region in one.regions) for one in chain.manifests(head)]
    # What all hold was written once, by all: the large one in rows of 4 MiB.
    assert max(parts) < sum(parts) / RANKS + large["tensor1"][0].nbytes
    assert sum(parts) < 1.01 * large["tensor1"].nbytes
    assert not verify(chain).findings
