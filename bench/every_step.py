"""A small model that is snapshotted at every step, beside the same training without snapshots.

With one thread for the training, a machine of two cores has one to spare; with as many threads as cores it
has none. Both are measured, in blocks of steps with and without that alternate within each repetition.

How much the spare core is worth is measured beside a process that does nothing but count: two cores of a
virtual machine may be two threads of one, and then what is done on one slows down the other. And the floor is
measured: the loop copies the state's bytes and says so, and a nice process digests them and makes one file of
them durable; no names, no manifest, no history, no look at what there is to copy.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from blake3 import blake3
from torch import nn
from torch.nn import functional

import everstep
from bench.measure import ratios, summary
from bench.processes import Tree
from bench.setting import Setting, tell
from bench.states import State, tensors
from bench.worker import call
from everstep.run.session import Run

WARM_STEPS = 5
BLOCKS = 3
"""So many with snapshots and so many without make a repetition: what disturbs the machine for a second or two
disturbs both."""


def measure(setting: Setting) -> dict[str, Any]:
    cores = os.cpu_count() or 1
    found: dict[str, Any] = {"cores": cores}
    for name, threads in (("a spare core", max(cores - 1, 1)), ("no spare core", cores)):
        tell(f"every step, {name}")
        place = setting.place(f"every-step-{threads}")
        tree = Tree(f"{os.getpid()}-{place.name}", str(place))
        steps = 60 if setting.is_full else 6
        found[name] = call(
            tree, "bench.every_step", "throughput", str(place), threads, steps, setting.repetitions
        )
    return found


def small_model() -> State:
    """3 MB with AdamW; a step takes some 20 ms on one core."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 384), nn.ReLU(), nn.Linear(384, 384), nn.ReLU(), nn.Linear(384, 10))

    def loss() -> torch.Tensor:
        x = torch.randn(1024, 256)
        return functional.cross_entropy(model(x), (x[:, 0] > 0).long())

    return State({"model": model, "optimizer": torch.optim.AdamW(model.parameters())}, loss)


def throughput(directory: str, threads: int, steps: int, repetitions: int) -> dict[str, Any]:
    """Seconds of a block of steps without a run and with one that takes a snapshot at every step."""
    torch.set_num_threads(threads)
    state = small_model()
    for _ in range(WARM_STEPS):
        state.step()
    plain, kept, beside, bare, taken = [], [], [], [], []
    for repetition in range(repetitions):
        without = with_ = 0.0
        beside.append(_beside_another(state, steps))
        floor = 0.0
        for block in range(BLOCKS):
            without += _plain(state, steps) / BLOCKS
            seconds, snapshots = _kept(state, steps, Path(directory) / f"{repetition}-{block}")
            with_ += seconds / BLOCKS
            floor += _bare(state, steps, Path(directory) / f"bare-{repetition}-{block}") / BLOCKS
            taken.append(float(snapshots))
        plain.append(without)
        kept.append(with_)
        bare.append(floor)
    return {
        "threads": threads,
        "steps": steps,
        "state_bytes": state.size_bytes,
        "step_ms": summary([one / steps * 1e3 for one in plain]),
        "step_with_snapshots_ms": summary([one / steps * 1e3 for one in kept]),
        "step_beside_a_process_that_counts_ms": summary([one / steps * 1e3 for one in beside]),
        "snapshots_taken": summary(taken),
        "throughput with / without": ratios(plain, kept),
        "throughput beside a process that counts / without": ratios(plain, beside),
        "throughput with a bare copy and file / without, the floor": ratios(plain, bare),
    }


def _plain(state: State, steps: int) -> float:
    begun = time.perf_counter()
    for _ in range(steps):
        state.step()
    return time.perf_counter() - begun


def _beside_another(state: State, steps: int) -> float:
    """The same beside a process as nice as a keeper that touches no memory, disk or socket."""
    counts = "import os\nos.nice(10)\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", counts], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            return _plain(state, steps)
        finally:
            process.kill()


def _bare(state: State, steps: int, directory: Path) -> float:
    """The least that makes each step's bytes durable. Two may be under way, as with a run's two arenas."""
    directory.mkdir()
    parts = [tensor for one in state.objects.values() for tensor in tensors(one.state_dict())]
    size_bytes = sum(tensor.nbytes for tensor in parts)
    memory = mmap.mmap(-1, 2 * size_bytes)
    copies = torch.frombuffer(memory, dtype=torch.uint8)
    copies.fill_(1)  # Touched before.
    given, taken = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.close(given[1])
        _store_bare(memory, size_bytes, directory, given[0], taken[1])
    try:
        under_way = 0
        begun = time.perf_counter()
        for step in range(steps):
            state.step()
            if under_way == 2:
                os.read(taken[0], 1)
                under_way -= 1
            at = step % 2 * size_bytes
            for tensor in parts:
                flat = tensor.detach().reshape(-1).view(torch.uint8)
                copies[at : at + flat.numel()].copy_(flat)
                at += flat.numel()
            os.write(given[1], b"%d" % (step % 2))
            under_way += 1
        for _ in range(under_way):
            os.read(taken[0], 1)
        return time.perf_counter() - begun
    finally:
        os.close(given[1])
        os.waitpid(child, 0)
        for descriptor in (given[0], *taken):
            os.close(descriptor)


def _store_bare(memory: mmap.mmap, size_bytes: int, directory: Path, given: int, taken: int) -> NoReturn:
    """In a child."""
    os.nice(10)
    slots = [memoryview(memory)[at : at + size_bytes] for at in (0, size_bytes)]
    number = 0
    while slot := os.read(given, 1):
        data = slots[int(slot)]
        blake3(data).digest()
        file = os.open(directory / str(number), os.O_WRONLY | os.O_CREAT)
        os.write(file, data)
        os.fdatasync(file)
        os.close(file)
        number += 1
        os.write(taken, b"x")
    os._exit(0)


def _kept(state: State, steps: int, chain: Path) -> tuple[float, int]:
    """The clock runs until the last snapshot is durable: what is owed at the end counts, too. The first
    snapshots, for which memory has to be found, come before."""
    with everstep.open(chain, **state.objects, every="1 steps", keep="all") as run:
        _train(state, run, WARM_STEPS)
        run.wait()
        before = _snapshots(run)
        begun = time.perf_counter()
        _train(state, run, steps)
        run.wait()
        seconds = time.perf_counter() - begun
        return seconds, _snapshots(run) - before


def _train(state: State, run: Run, steps: int) -> None:
    for _ in range(steps):
        state.step()
        run.tick()


def _snapshots(run: Run) -> int:
    return sum(1 for _ in run.chain.snapshots())
