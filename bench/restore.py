"""Coming back: whole states cold, warm and from the arena, and the weights of a model alone.

A restore is measured to where every byte is there to be trained on: `torch.load(mmap=True)` returns before it
has read what the first step then waits for. Where it returns is reported, too.
"""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import everstep
from bench.floors import Floors
from bench.measure import cold, ratios, seconds, summary, warm
from bench.processes import Tree
from bench.setting import Setting, tell
from bench.states import State, fresh_gpt2, gpt2, only_model, tensors, touch
from bench.systems import safetensors_save, torch_save
from bench.worker import call, start, value_of
from everstep.run.session import Run

TORCH, DCP, OURS = "torch.load(mmap)", "dcp.load", "everstep"
SAFE = "safetensors"
Restore = Callable[[State], object]


def measure(setting: Setting, device: str = "cpu") -> dict[str, Any]:
    tree = Tree(f"{os.getpid()}-restore", str(setting.directory))
    place = str(setting.place("restore"))
    result: dict[str, Any] = call(
        tree, "bench.restore", "from_disk", place, setting.size, setting.repetitions, device
    )
    result["arena"] = _from_arena(setting, tree, result, device)
    return result


# -- from the disk, in one process -------------------------------------------------------------------------


def from_disk(directory: str, size: str, repetitions: int, device: str) -> dict[str, Any]:
    """Cold and warm, alternating, each into objects as a new process has them."""
    root = Path(directory)
    state = gpt2(size, device=device)
    state.step()
    size_bytes = state.size_bytes
    live_bytes = sum(one.nbytes for one in tensors(state.plain()["model"]))
    places = _saved(state, root)
    del state
    floors = Floors(root, size_bytes=1 << (29 if size == "full" else 24))
    times: dict[str, list[float]] = defaultdict(list)
    for repetition in range(repetitions):
        tell(f"restore, repetition {repetition + 1} of {repetitions}")
        floors.measure()
        for name, restore in _restores(places).items():
            for temperature, prepare in (("cold", cold), ("warm", warm)):
                fresh = fresh_gpt2(size, device)
                _time(times, f"{name}, {temperature}", restore, places[name], prepare, fresh)
        for name, restore in _partial(places).items():
            model = only_model(fresh_gpt2(size, device))
            _time_partial(times, f"{name}, model alone, cold", restore, places[name], model)
    read_floor = [size_bytes / 1e9 / rate for rate in floors.rates["direct_read"]]
    # The model is there and was touched; the optimizer has no state yet, so memory for it is new.
    fresh_floor = [
        live_bytes / 1e9 / rate + (size_bytes - live_bytes) / 1e9 / fresh
        for rate, fresh in zip(floors.rates["direct_read"], floors.rates["fresh_read"], strict=True)
    ]
    found = {name: summary(values) for name, values in times.items()}
    pairs = {
        "cold, ready": (f"{OURS}, cold, ready", f"{TORCH}, cold, ready"),
        "cold, as they return": (f"{OURS}, cold, returned", f"{TORCH}, cold, returned"),
        "warm, ready": (f"{OURS}, warm, ready", f"{TORCH}, warm, ready"),
        "warm, as they return": (f"{OURS}, warm, returned", f"{TORCH}, warm, returned"),
    }
    return {
        "state_bytes": size_bytes,
        "floors": floors.result(),
        "times_s": found,
        "ours / torch.load": {name: ratios(times[one], times[two]) for name, (one, two) in pairs.items()},
        "read floor / cold, as it returns": ratios(read_floor, times[f"{OURS}, cold, returned"]),
        "read floor with new memory / cold, as it returns": ratios(
            fresh_floor, times[f"{OURS}, cold, returned"]
        ),
        "torch.load, warm, ready": times[f"{TORCH}, warm, ready"],
    }


def _saved(state: State, root: Path) -> dict[str, Path]:
    from torch.distributed import checkpoint

    places = {name: root / name for name in (OURS, DCP)}
    places |= {TORCH: root / "state.pt", SAFE: root / "state.safetensors"}
    torch_save(state, places[TORCH])
    safetensors_save(state, places[SAFE])
    checkpoint.save(state.plain(), checkpoint_id=places[DCP], no_dist=True)
    with everstep.open(places[OURS], **state.objects, every=None, keep="all") as run:
        run.tick()
        run.take().durable()
    return places


def _restores(places: dict[str, Path]) -> dict[str, Restore]:
    return {
        OURS: lambda state: everstep.open(places[OURS], **state.objects, every=None, resume="must"),
        TORCH: lambda state: torch_load(state, places[TORCH]),
        DCP: lambda state: dcp_load(state, places[DCP]),
    }


def torch_load(state: State, file: Path) -> None:
    loaded = torch.load(file, map_location=state.device, mmap=True, weights_only=True)
    for name, one in state.objects.items():
        one.load_state_dict(loaded[name])


def dcp_load(state: State, place: Path) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import _init_optim_state

    for optimizer in state.optimizers:
        _init_optim_state(optimizer)
    wanted = state.plain()
    checkpoint.load(wanted, checkpoint_id=place, no_dist=True)
    for name, one in state.objects.items():
        one.load_state_dict(wanted[name])  # type: ignore[arg-type]


def _time(
    times: dict[str, list[float]],
    name: str,
    restore: Restore,
    place: Path,
    prepare: Callable[[Path], None],
    fresh: State,
) -> None:
    prepare(place)
    kept: list[object] = []
    returned = seconds(lambda: kept.append(restore(fresh)))
    times[f"{name}, returned"].append(returned)
    times[f"{name}, ready"].append(returned + seconds(lambda: touch(fresh)))
    for run in kept:
        if run is not None:
            run.close()  # type: ignore[attr-defined]


# -- the model alone ---------------------------------------------------------------------------------------


def _partial(places: dict[str, Path]) -> dict[str, Restore]:
    """What a user does to get the model out of a training's state, for inference."""
    found: dict[str, Restore] = {TORCH: lambda state: _torch_model(state, places[TORCH])}
    if hasattr(everstep, "load"):
        found[OURS] = lambda state: everstep.load(places[OURS]).into(model=state.objects["model"])
    found[SAFE] = lambda state: _safetensors_model(state, places[SAFE])
    return found


def _torch_model(state: State, file: Path) -> None:
    loaded = torch.load(file, map_location=state.device, mmap=True, weights_only=True)
    state.objects["model"].load_state_dict(loaded["model"])


def _safetensors_model(state: State, file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, framework="pt", device=state.device) as source:
        model = state.objects["model"]
        model.load_state_dict({name: source.get_tensor(f"model.{name}") for name in model.state_dict()})


def _time_partial(
    times: dict[str, list[float]], name: str, restore: Restore, place: Path, fresh: State
) -> None:
    cold(place)
    returned = seconds(lambda: restore(fresh))
    times[name].append(returned + seconds(lambda: touch(fresh)))


# -- from the arena, each time in a new process ------------------------------------------------------------


def _from_arena(setting: Setting, tree: Tree, disk: dict[str, Any], device: str) -> dict[str, Any]:
    """A training is killed when its snapshot is durable; the next one restores, changes everything, takes a
    snapshot and is killed in turn. The chain's files are cold: what is fast did not come from there."""
    chain = setting.place("arena") / "chain"
    times: dict[str, list[float]] = defaultdict(list)
    remarks: list[str] = []
    process = start(tree, "bench.restore", "restore_and_take", str(chain), setting.size, device)
    try:
        for repetition in range(setting.repetitions + 1):
            tell(f"restore from the arena, repetition {repetition} of {setting.repetitions}")
            answer = value_of(process)
            if repetition:
                times["returned"].append(answer["returned"])
                times["ready"].append(answer["ready"])
                remarks = answer["remarks"]
            process.kill()
            process.wait()
            if not tree.pids():
                return {"not measured": "no keeper outlives its training"}
            cold(chain)
            process = start(tree, "bench.restore", "restore_and_take", str(chain), setting.size, device)
    finally:
        for pid in tree.pids():
            os.kill(pid, signal.SIGKILL)
        process.wait()
    return {
        "times_s": {name: summary(values) for name, values in times.items()},
        "remarks": remarks,
        "ours / torch.load, warm, ready": ratios(times["ready"], disk["torch.load, warm, ready"]),
    }


def restore_and_take(chain: str, size: str, device: str) -> Iterator[dict[str, Any]]:
    """Restore what is there, and take a snapshot of a changed state."""
    state = fresh_gpt2(size, device) if Path(chain).exists() else gpt2(size, device=device)
    if state.loss is not None:
        state.step()
    opened: list[Run] = []
    returned = seconds(lambda: opened.append(everstep.open(chain, **state.objects, every=None, keep="all")))
    ready = returned + seconds(lambda: touch(state))
    (run,) = opened
    remarks = [] if run.resumed is None else list(run.resumed.remarks)
    with torch.no_grad():
        for tensor in tensors(state.plain()):
            tensor.mul_(1.001)
    run.tick()
    run.take().durable()
    run.wait()
    yield {"returned": returned, "ready": ready, "remarks": remarks}
