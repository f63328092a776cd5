"""Saving and coming back where the state is on a CUDA device; nothing is measured where there is none.

What the host waits for is "blocked", as everywhere. The device may wait where the host goes on: "held" is how
much longer the step took that a save was taken in, and the call that took it. Steps end where the device is
done with them.
"""

from __future__ import annotations

import mmap
import time
from dataclasses import replace
from typing import Any

import torch

from bench import overlap, restore
from bench.measure import Summary, summary
from bench.processes import Tree
from bench.setting import Setting
from bench.systems import DCP_BEST, OURS, TORCH_SAVE
from bench.worker import call

LINKS = ("down, page-locked", "down, shared memory locked", "down, pageable", "up, page-locked")
TOKENS = 16384
"""What a step trains on there, so that it takes longer than the copy of its state."""

ABSENT = {"not measured": "there is no CUDA device"}


def measure(setting: Setting) -> dict[str, Any]:
    """1.5 GB of state."""
    return _beside_others(setting, "gpt2_on_cuda", (OURS, *DCP_BEST, TORCH_SAVE))


def measure_medium(setting: Setting) -> dict[str, Any]:
    """4.3 GB of state."""
    return _beside_others(setting, "medium_gpt2_on_cuda", (OURS, *DCP_BEST))


def measure_restore(setting: Setting) -> dict[str, Any]:
    """1.5 GB back to the device."""
    return restore.measure(setting, "cuda") if torch.cuda.is_available() else ABSENT


def _beside_others(setting: Setting, state: str, systems: tuple[str, ...]) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return ABSENT
    setting = replace(setting, tokens=TOKENS if setting.is_full else setting.tokens)
    tree = Tree("links", str(setting.directory))
    links: dict[str, list[float]] = call(tree, "bench.cuda", "links", setting.is_full, setting.repetitions)
    found = {"device": torch.cuda.get_device_name(), "links": {k: summary(v) for k, v in links.items()}}
    found |= overlap.beside_others(setting, state, [systems])
    found["down, of the link"] = _of_the_link(found, found["links"]["down, page-locked"])
    return found


def _of_the_link(found: dict[str, Any], link: Summary) -> dict[str, float]:
    """How fast a state leaves the device, with nothing else to do, of what the link can: for those systems
    whose save says when that is over."""
    gigabytes = found["state_bytes"] / 1e9
    return {
        name: gigabytes / one["idle"]["released_s"]["median"] / link["median"]
        for name, one in found["systems"].items()
        if name in (OURS, *DCP_BEST)
    }


def links(is_full: bool, repetitions: int) -> dict[str, list[float]]:
    """What goes between the host's memory and the device at most, in GB/s, and what locking pages takes."""
    size_bytes = 1 << (30 if is_full else 24)
    source = torch.ones(size_bytes, dtype=torch.uint8, device="cuda")
    memory = mmap.mmap(-1, size_bytes)
    shared = torch.frombuffer(memory, dtype=torch.uint8)
    shared.zero_()
    begun = time.perf_counter()
    status = torch.cuda.cudart().cudaHostRegister(shared.data_ptr(), size_bytes, 1)
    locked_s = time.perf_counter() - begun
    assert not int(status)
    host = {
        "down, page-locked": torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=True),
        "down, shared memory locked": shared,
        "down, pageable": torch.zeros(size_bytes, dtype=torch.uint8),
    }
    found: dict[str, list[float]] = {name: [] for name in LINKS}
    for _ in range(repetitions):
        for name, target in host.items():
            found[name].append(_rate(target, source))
        found["up, page-locked"].append(_rate(source, host["down, page-locked"]))
    torch.cuda.cudart().cudaHostUnregister(shared.data_ptr())
    return {**found, "locking, s per GB": [locked_s / size_bytes * 1e9]}


def _rate(target: torch.Tensor, source: torch.Tensor) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return target.nbytes / (time.perf_counter() - begun) / 1e9
