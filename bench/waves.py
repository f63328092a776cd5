"""A state that is larger than the memory that a snapshot may take: it streams through in waves."""

from __future__ import annotations

import inspect
import os
import time
from typing import Any

import torch
from torch import nn

import everstep
from bench.processes import Peak, Tree
from bench.setting import Setting, tell
from bench.worker import start, value_of

LIMIT_BYTES = 24 << 30
PIECE_BYTES = 16_000_000


def measure(setting: Setting) -> dict[str, Any]:
    if "max_arena_bytes" not in inspect.signature(everstep.open).parameters:
        return {"not measured": "everstep.open has no max_arena_bytes"}
    tell("waves")
    place = setting.place("waves")
    tree = Tree(f"{os.getpid()}-waves", str(place))
    state_bytes, arena_bytes = (
        (6_000_000_000, 1_000_000_000) if setting.is_full else (160_000_000, 40_000_000)
    )
    with start(tree, "bench.waves", "stream", str(place), state_bytes, arena_bytes) as process:
        value_of(process)
        alone = tree.memory_bytes()
        assert process.stdin is not None
        with Peak(tree) as peak:
            print(file=process.stdin, flush=True)
            taken = value_of(process)
    return {
        "state_bytes": state_bytes,
        "max_arena_bytes": arena_bytes,
        "peak_bytes": peak.bytes,
        "extra_bytes": peak.bytes - alone,
        "limit_bytes": LIMIT_BYTES,
        **taken,
    }


def stream(directory: str, state_bytes: int, arena_bytes: int) -> Any:
    """Two snapshots of a state that changes everywhere in between."""
    elements, pieces = PIECE_BYTES // 4, state_bytes // PIECE_BYTES
    model = nn.ParameterList(torch.full((elements,), float(number)) for number in range(pieces))
    yield {}
    chain, durable = f"{directory}/chain", []
    with everstep.open(chain, model=model, every=None, keep="last 1", max_arena_bytes=arena_bytes) as run:
        for _ in range(2):
            with torch.no_grad():
                for parameter in model:
                    parameter.add_(torch.rand(1))
            run.tick()
            begun = time.perf_counter()
            run.take().durable()
            durable.append(time.perf_counter() - begun)
    yield {"durable_s": durable}
