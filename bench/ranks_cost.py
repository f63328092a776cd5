"""What many ranks cost, under `torchrun` on one machine, with gloo on CPUs.

    python -m bench.ranks_cost --json ranks_cost.json

A DDP model with AdamW, with a state of 75 MB on 1, 4 and 8 ranks and with one of 1 GB on 1 and 4: what is
stored, which is to be what one rank stores; how long it takes until a snapshot is durable; and what a tick
costs when nothing is due. Ratios are against one rank on the same disk in the same run, medians of several
repetitions.

The ranks end each step together, as they do where each has a device of its own: here they share two cores,
and the last of them would begin its snapshot half a step after the first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import everstep
from everstep.chain.history import Chain

SIZES = {"75 MB": (6, (1, 4, 8)), "1 GB": (85, (1, 4))}
"""Layers, and numbers of ranks."""

SNAPSHOTS = 4
TICKS = 2000
WAIT_S = 600.0


def train(path: str, layers: int) -> None:
    """A rank: a few snapshots of a state that changes all over, then many ticks with nothing due.

    Args:
        layers: the model has so many, of 4 MB each.
    """
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(layers)))
    if ranks > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = everstep.open(path, model=model, optimizer=optimizer, every=None, keep="all")

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(2, 1024)).square().mean().backward()
        optimizer.step()
        dist.barrier()
        run.tick()

    step()
    for _ in range(SNAPSHOTS):
        step()
        pending = run.take()
        while not pending.begun:
            step()
        pending.durable(WAIT_S)
        dist.barrier()
    times = []
    for _ in range(TICKS):
        begun = time.perf_counter()
        run.tick()
        times.append(time.perf_counter() - begun)
    for turn in range(ranks):
        if turn == rank:
            print(json.dumps({"rank": rank, "tick_us": statistics.median(times) * 1e6}), flush=True)
        dist.barrier()
    run.close()
    dist.destroy_process_group()


def measured(ranks: int, layers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="ranks-cost-") as scratch:
        path = Path(scratch) / "chain"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
            "-m", "bench.ranks_cost", "--train", str(path), "--layers", str(layers),
        ]  # fmt: skip
        environment = {**os.environ, "EVERSTEP_LOG": "quiet", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT_S)
        if done.returncode:
            raise SystemExit(done.stderr)
        ticks = [json.loads(line)["tick_us"] for line in done.stdout.splitlines() if line.startswith("{")]
        # The last is that of `close`; the first has no parent to share with, and memory that is new.
        taken = [one.record for one in Chain(path).snapshots() if one.record.trigger == "take"][:-1]
        return {
            "stored_bytes": statistics.median(one.stored_bytes for one in taken),
            "logical_bytes": statistics.median(one.logical_bytes for one in taken),
            "costs": {
                name: statistics.median(one.costs[name] for one in taken) for name in sorted(taken[0].costs)
            },
            "durable_ms": statistics.median(one.costs["durable"] for one in taken),
            "stall_ms": statistics.median(one.costs["stall"] for one in taken),
            "tick_us": statistics.median(ticks),
            "tick_of_slowest_us": max(ticks),
        }


def compared(layers: int, worlds: Sequence[int], repetitions: int) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {str(ranks): [] for ranks in worlds}
    for _ in range(repetitions):
        for ranks in worlds:
            found[str(ranks)].append(measured(ranks, layers))
    medians = {
        ranks: {name: statistics.median(one[name] for one in each) for name in each[0] if name != "costs"}
        for ranks, each in found.items()
    }
    one = medians["1"]
    return {
        "medians": medians,
        "stored_of_one_rank": {n: medians[n]["stored_bytes"] / one["stored_bytes"] for n in medians},
        "durable_of_one_rank": {n: medians[n]["durable_ms"] / one["durable_ms"] for n in medians},
        "runs": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--train", default="")
    parser.add_argument(
        "--layers", type=int, default=1, help="with --train: of 4 MB, and 8 MB of optimizer state"
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", choices=SIZES, help="a state of this size alone; the file keeps the other")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.train:
        train(given.train, given.layers)
        return
    result = {
        size: compared(layers, worlds, given.repetitions)
        for size, (layers, worlds) in SIZES.items()
        if given.only in (None, size)
    }
    shown = {size: {name: one[name] for name in one if name != "runs"} for size, one in result.items()}
    print(json.dumps(shown, indent=1))
    if given.json:
        others = json.loads(given.json.read_text()) if given.json.exists() else {}
        given.json.write_text(json.dumps({**others, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
