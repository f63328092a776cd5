"""Saving while training: how long it blocks, what it costs, when it is durable, how much memory it takes.

Every system has a training in a process of its own, so that the threads and processes of one do not disturb
another. The trainings of a group live side by side and are told in turn, in an order that is reversed in
every second repetition, to train and save; all but one wait meanwhile and use no CPU. The floors of the
hardware are measured in each repetition.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from bench.floors import Floors
from bench.measure import Summary, ratios, summary
from bench.processes import Peak
from bench.setting import Setting, tell
from bench.systems import DCP_BEST, OURS, SYSTEMS, TORCH_SAVE, missing
from bench.trainer import Answer, Trainer

# All trainings of a group are in memory together: two groups of five fit into 24 GB.
GROUPS: dict[str, list[tuple[str, ...]]] = {
    "gpt2": [
        (OURS, *DCP_BEST, TORCH_SAVE),
        tuple(name for name in SYSTEMS if name not in (OURS, *DCP_BEST, TORCH_SAVE)),
    ],
    "third_gpt2": [(OURS,)],
    "lora": [(OURS, *DCP_BEST, TORCH_SAVE)],
    "many_tensors": [(OURS, *DCP_BEST, TORCH_SAVE)],
}
COUNTED = ("blocked_s", "lost_s", "durable_s", "cpu_s", "step_s")


@dataclass
class Measured:
    """What one system did, by repetition."""

    built: Answer = field(default_factory=dict)
    first: Answer = field(default_factory=dict)
    busy: list[Answer] = field(default_factory=list)
    idle: list[Answer] = field(default_factory=list)
    extra_bytes: int = 0

    def series(self, name: str) -> list[float]:
        return [float(answer[name]) for answer in self.busy]

    def idle_series(self, name: str) -> list[float]:
        return [float(answer[name]) for answer in self.idle]

    def result(self) -> dict[str, Any]:
        gigabytes = self.built["state_bytes"] / 1e9
        costs: dict[str, list[float]] = defaultdict(list)
        for answer in self.busy:
            for name, value in answer["costs"].items():
                costs[name].append(value)
        return {
            "state_bytes": self.built["state_bytes"],
            "busy": {name: summary(self.series(name)) for name in (*COUNTED, "held_s")},
            "idle": {
                name: summary(self.idle_series(name))
                for name in ("called_s", "released_s", "durable_s", "cpu_s")
            },
            "cpu_s_per_GB": {
                "busy": summary([one / gigabytes for one in self.series("cpu_s")]),
                "idle": summary([one / gigabytes for one in self.idle_series("cpu_s")]),
            },
            "persist_GB_per_s": summary(persist_rates(self)),
            "first": {name: self.first[name] for name in ("made_s", "called_s", "durable_s")},
            "extra_memory_bytes": self.extra_bytes,
            "costs_ms": {name: summary(values) for name, values in costs.items()},
            "timeline": self.busy[-1]["steps"],
            "timeline_durable_s": self.busy[-1]["durable_s"],
        }


def persist_rates(measured: Measured) -> list[float]:
    """GB/s from the call to durable, with nothing else to do. The copy counts: it may be written by then."""
    gigabytes = measured.built["state_bytes"] / 1e9
    return [gigabytes / one["durable_s"] for one in measured.idle]


def measure(setting: Setting) -> dict[str, Any]:
    found = {state: beside_others(setting, state, groups) for state, groups in GROUPS.items()}
    large, small = (
        found[state]["systems"][OURS]["busy"]["blocked_s"]["median"] for state in ("gpt2", "third_gpt2")
    )
    return {**found, "blocked, gpt2 / third_gpt2": large / small}


def beside_others(setting: Setting, state: str, groups: list[tuple[str, ...]]) -> dict[str, Any]:
    """One state with each system, those of a group in turn."""
    floors = Floors(setting.place(f"floors-{state}"), size_bytes=1 << (29 if setting.is_full else 24))
    measured: dict[str, Measured] = {}
    absent: dict[str, str] = {}
    for group in groups:
        _group(setting, state, group, floors, measured, absent)
    return {
        "state_bytes": measured[OURS].built["state_bytes"],
        "threads": measured[OURS].built["threads"],
        "floors": floors.result(),
        "systems": {name: one.result() for name, one in measured.items()},
        "not measured": absent,
        **_compared(measured, floors),
    }


def _group(
    setting: Setting,
    state: str,
    group: tuple[str, ...],
    floors: Floors,
    measured: dict[str, Measured],
    absent: dict[str, str],
) -> None:
    """Measure the systems of a group; those that are missing or fail are put down as absent, with the
    reason."""
    with ExitStack() as stack:
        trainers: dict[str, Trainer] = {}
        for name in group:
            reason = missing(name)
            if not reason:
                place = setting.directory / f"{state}-{len(measured)}-{len(absent)}"
                stack.callback(shutil.rmtree, place, ignore_errors=True)
                try:
                    trainer = stack.enter_context(Trainer(state, name, place, setting.size, setting.tokens))
                    measured[name] = _begun(trainer)
                    trainers[name] = trainer
                except RuntimeError as error:
                    reason = str(error)
                    measured.pop(name, None)
            if reason:
                _put_down(absent, name, reason)
        for repetition in range(setting.repetitions):
            tell(f"{state}, repetition {repetition + 1} of {setting.repetitions}: {', '.join(trainers)}")
            floors.measure()
            for name in list(trainers)[:: 1 if repetition % 2 == 0 else -1]:
                os.sync()
                try:
                    measured[name].busy.append(trainers[name].tell("busy"))
                    os.sync()
                    measured[name].idle.append(trainers[name].tell("idle"))
                except RuntimeError as error:
                    _put_down(absent, name, str(error))
                    del trainers[name], measured[name]
        for trainer in trainers.values():
            trainer.tell("end")


def _put_down(absent: dict[str, str], name: str, reason: str) -> None:
    """Others may be absent; without this project there is nothing to compare."""
    if name == OURS:
        raise RuntimeError(reason)
    absent[name] = reason


def _begun(trainer: Trainer) -> Measured:
    """The first save, and the peak of memory at the second, above that of the training alone (which has its
    gradients then)."""
    measured = Measured(trainer.built)
    with Peak(trainer.tree) as alone:
        trainer.tell("alone")
    measured.first = trainer.tell("begin")
    with Peak(trainer.tree) as peak:
        trainer.tell("busy")
    measured.extra_bytes = peak.bytes - alone.bytes
    return measured


def _compared(measured: dict[str, Measured], floors: Floors) -> dict[str, Any]:
    """Everstep beside others: ratios of what was measured in the same repetition."""
    ours = measured[OURS]
    gigabytes = ours.built["state_bytes"] / 1e9
    floor_cpu = [
        sum(parts)
        for parts in zip(*(floors.cpu[one] for one in ("memcpy", "blake3", "direct_write")), strict=True)
    ]
    count = len(ours.busy)
    found: dict[str, Any] = {
        "ratios": {name: _ratios(ours, one) for name, one in measured.items() if name != OURS},
        "persist / direct write": ratios(persist_rates(ours), floors.rates["direct_write"][:count]),
        "cpu idle / floors": ratios(
            [one / gigabytes for one in ours.idle_series("cpu_s")], floor_cpu[:count]
        ),
        "cpu busy / floors": ratios([one / gigabytes for one in ours.series("cpu_s")], floor_cpu[:count]),
        "memory beyond two slots": ours.extra_bytes - 2 * ours.built["state_bytes"],
    }
    best = best_of(measured)
    if best:
        found["DCP best"] = best
        found["ours / DCP best"] = _ratios(ours, measured[best])
    return found


def best_of(measured: dict[str, Measured]) -> str:
    """The mode of DCP that loses the least of the training; empty when none could be measured."""
    candidates = [name for name in DCP_BEST if name in measured]
    return min(candidates, key=lambda one: statistics.median(measured[one].series("lost_s")), default="")


def _ratios(ours: Measured, other: Measured) -> dict[str, Summary]:
    found = {name: ratios(ours.series(name), other.series(name)) for name in COUNTED if name != "step_s"}
    for name in ("durable_s", "cpu_s"):
        found[f"idle {name}"] = ratios(ours.idle_series(name), other.idle_series(name))
    return found
