"""One rank of a few, in a process of its own: trains, keeps its part of a snapshot in a file, brings it back.

    python rank_process.py DIRECTORY RANK RANKS PORT WORK [FROM]

WORK is a parallelism; with FROM the part files of that name are restored into one that was trained otherwise.
"""

from __future__ import annotations

import os
import pickle
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from stored import Stored, joined, part_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from everstep.state.collecting import Collector
from everstep.state.objects import named
from everstep.state.restore import restore
from everstep.state.sharding import is_sharded
from everstep.state.sharing import have_parted
from everstep.state.world import World

DEADLINE = timedelta(seconds=120)


class Telling:
    """What the job's own store tells all ranks."""

    def __init__(self, store: dist.Store, rank: int, ranks: int) -> None:
        self._store, self._rank, self._ranks = store, rank, ranks

    def share(self, key: str, mine: bytes) -> list[bytes]:
        self._store.set(f"{key}/{self._rank}", mine)
        names = [f"{key}/{rank}" for rank in range(self._ranks)]
        self._store.wait(names, DEADLINE)
        return [bytes(self._store.get(name)) for name in names]


class Net(nn.Module):
    """Sizes that no number of ranks divides, a buffer that each rank has its own of, and frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 22)
        self.second = nn.Linear(22, 10)
        self.norm = nn.LayerNorm(10)
        self.last = nn.Linear(10, 7)
        self.last.bias.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.second(torch.relu(self.first(batch)))))


def made(work: str, seed: int, ranks: int) -> dict[str, Any]:
    """A model and its optimizer, as the parallelism has them."""
    torch.manual_seed(seed)
    model: Any = Net()
    if work == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif work == "fsdp":
        mesh = init_device_mesh("cpu", (ranks,))
        for part in (model.first, model.second):
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif work == "fsdp-tp":
        mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"first": ColwiseParallel(), "second": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
    elif work == "hsdp":
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
    trained = [one for one in model.parameters() if one.requires_grad]
    return {"model": model, "optimizer": torch.optim.AdamW(trained, lr=0.01 * seed)}


def train(objects: dict[str, Any], rank: int, steps: int) -> None:
    for step in range(steps):
        # Tensor parallel ranks must get the same batch, and so all may.
        batch = torch.randn(4, 10, generator=torch.Generator().manual_seed(step))
        objects["optimizer"].zero_grad()
        objects["model"](batch).square().mean().backward()
        objects["optimizer"].step()
    plain = objects["model"]
    plain = getattr(plain, "module", plain)
    plain.seen.fill_(rank)


def whole(value: Any) -> Any:
    """A state with whole tensors, gathered by torch from all ranks."""
    if isinstance(value, torch.Tensor):
        return value.full_tensor().clone() if is_sharded(value) else value.clone()
    if isinstance(value, dict):
        return {key: whole(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(one) for one in value)
    return value


def states(objects: dict[str, Any]) -> dict[str, Any]:
    live: dict[str, Any] = named(objects)
    return {name: whole(value.state_dict()) for name, value in live.items()}


def main(directory: str, rank: str, ranks: str, port: str, work: str, source: str = "") -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=rank, WORLD_SIZE=ranks)
    store = dist.TCPStore("127.0.0.1", int(port), int(ranks), rank == "0", timeout=DEADLINE)
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(ranks), timeout=DEADLINE)
    world = World(int(rank), int(ranks), Telling(dist.PrefixStore("everstep", store), int(rank), int(ranks)))
    where = Path(directory)
    for one in work.split(","):
        if source:
            bring(where, world, one, source)
        else:
            keep(where, world, one)
    dist.destroy_process_group()


def keep(where: Path, world: World, work: str) -> None:
    objects = made(work, 1, world.ranks)
    train(objects, world.rank, 2)
    collector = Collector(world)

    def look(key: str = "") -> Any:
        return collector.collect(named(objects), position=None, progress={"step": 2}, anew=key)

    first = look(work)
    train(objects, world.rank, 1)
    again = look()
    assert again.sorts is first.sorts, "what modules and optimizers told was not remembered"
    assert first.fits
    assert again.fits
    samples = Telling(world.exchange._store, world.rank, world.ranks)  # type: ignore[union-attr]
    assert not have_parted(samples.share(f"samples/{work}", again.watch.now()))
    part = part_of(again, world.rank, world.ranks)
    kept = pickle.dumps((part.manifest, part.regions, states(objects)))
    (where / f"{work}-{world.ranks}-{world.rank}").write_bytes(kept)


def parts_of(where: Path, name: str) -> tuple[list[Stored], list[dict[str, Any]]]:
    """The parts of a snapshot, and the states that torch had gathered on each rank."""
    ranks = int(name.rpartition("-")[2])
    loaded = [pickle.loads((where / f"{name}-{rank}").read_bytes()) for rank in range(ranks)]
    return [Stored(manifest, regions) for manifest, regions, _ in loaded], [one[2] for one in loaded]


def bring(where: Path, world: World, work: str, source: str) -> None:
    parts, expected = parts_of(where, source)
    snapshot = joined(parts)
    for steps in (0, 1):
        objects = made(work, 5, world.ranks)
        train(objects, world.rank, steps)
        manifests = [part.manifest for part in parts]
        back = restore(snapshot.manifest, snapshot.fill, named(objects), world=world, parts=manifests)
        moved = len(parts) != world.ranks
        assert back.approximate == ([f"world size {len(parts)} -> {world.ranks}"] if moved else [])
        found, wanted = states(objects), expected[0 if moved else world.rank]
        for name in ("model", "optimizer"):
            same(name, found[name], wanted[name])
        # And it can be trained on.
        train(objects, world.rank, 1)


def same(path: str, found: Any, wanted: Any) -> None:
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), path
        assert found.dtype == wanted.dtype, path
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), path
        for key in wanted:
            same(f"{path}/{key}", found[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted), path
        for number, one in enumerate(wanted):
            same(f"{path}/{number}", found[number], one)
    else:
        assert found == wanted, path


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
