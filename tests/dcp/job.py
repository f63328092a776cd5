"""A job of several gloo ranks that shards a model with FSDP2 and saves it in every way there is.

    job.py CHAIN DIRECTORY RANK RANKS

Rank 0 puts what each step should come back as into DIRECTORY, gathered by torch itself. At the end the last
rank is killed in the middle of a save.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from everstep import dcp


class Job:
    def __init__(self, chain: str, directory: Path, ranks: int) -> None:
        self.chain = chain
        self.directory = directory
        torch.manual_seed(0)
        # Frozen, it changes in no step: its chunks are shared.
        self.model = nn.Sequential(nn.Linear(600, 2000), nn.Linear(2000, 13), nn.Linear(13, 5))
        self.model[0].requires_grad_(False)
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in self.model:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(one for one in self.model.parameters() if one.requires_grad)

    def train(self) -> None:
        self.model(torch.ones(4, 600)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self, whole: bool = False) -> dict[str, Any]:
        options = StateDictOptions(full_state_dict=whole, cpu_offload=whole)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        return {"model": model, "optim": optimizer}

    def expect(self, step: int) -> None:
        """Keep what a step is to come back as."""
        whole = self.state(whole=True)
        if dist.get_rank() == 0:
            torch.save(whole, self.directory / f"{step}.pt")

    def writer(self, step: int) -> dcp.Writer:
        return dcp.Writer(self.chain, step=step)


class Killed(dcp.SavePlanner):
    """The last rank goes in the middle of its write."""

    def resolve_data(self, write_item: Any) -> Any:
        if dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().resolve_data(write_item)


def main(chain: str, directory: Path, rank: int, ranks: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory / 'group'}", rank=rank, world_size=ranks)
    job = Job(chain, directory, ranks)
    job.train()
    job.expect(1)
    torch_dcp.save(job.state(), storage_writer=job.writer(1), planner=dcp.SavePlanner())

    stager = dcp.Stager()
    # What a thread says to the other ranks does not get between what training says.
    beside = dist.new_group(backend="gloo")
    for step, kind in (
        (2, AsyncCheckpointerType.THREAD),
        (3, AsyncCheckpointerType.THREAD),
        (4, AsyncCheckpointerType.PROCESS),
        (5, AsyncCheckpointerType.PROCESS),
    ):
        job.train()
        job.expect(step)
        saved = torch_dcp.async_save(
            job.state(),
            storage_writer=job.writer(step),
            process_group=beside,
            async_checkpointer_type=kind,
            async_stager=stager,
        )
        # What comes after is not in it.
        job.train()
        saved.result()
    stager.close()

    job.expect(6)
    torch_dcp.save(job.state(), storage_writer=job.writer(6))
    dist.barrier()
    try:
        torch_dcp.save(job.state(), storage_writer=job.writer(7), planner=Killed())
    except Exception as error:  # A rank is gone: what gloo says of it is not our matter.
        print(f"not saved: {type(error).__name__}", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
