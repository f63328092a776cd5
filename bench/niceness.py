"""What the keeper's niceness trades: how soon a snapshot is durable, and what the training loses until then.

A training for each niceness, of the same state; told in turn, as in `overlap`, to train and save.
"""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from typing import Any

from bench.measure import summary
from bench.setting import Setting, tell
from bench.systems import OURS
from bench.trainer import Answer, Trainer
from everstep.keeper.service import NICE

STATE = "third_gpt2"
NICENESSES = (0, 5, 10, 15, 19)


def measure(setting: Setting) -> dict[str, Any]:
    busy: dict[int, list[Answer]] = {nice: [] for nice in NICENESSES}
    idle: dict[int, list[Answer]] = {nice: [] for nice in NICENESSES}
    with ExitStack() as stack:
        trainers: dict[int, Trainer] = {}
        for nice in NICENESSES:
            place = setting.directory / f"nice-{nice}"
            stack.callback(shutil.rmtree, place, ignore_errors=True)
            own = {"EVERSTEP_KEEPER_NICE": str(nice)}
            one = Trainer(STATE, OURS, place, setting.size, setting.tokens, own)
            trainers[nice] = stack.enter_context(one)
            one.tell("begin")
        for repetition in range(setting.repetitions):
            tell(f"niceness, repetition {repetition + 1} of {setting.repetitions}")
            for nice in NICENESSES[:: 1 if repetition % 2 == 0 else -1]:
                os.sync()
                busy[nice].append(trainers[nice].tell("busy"))
                os.sync()
                idle[nice].append(trainers[nice].tell("idle"))
        state_bytes = trainers[NICE].built["state_bytes"]
        for one in trainers.values():
            one.tell("end")
    return {
        "state_bytes": state_bytes,
        "chosen": NICE,
        "niceness": {
            str(nice): {
                "durable, busy, s": summary([one["durable_s"] for one in busy[nice]]),
                "durable, idle, s": summary([one["durable_s"] for one in idle[nice]]),
                "lost, s": summary([one["lost_s"] for one in busy[nice]]),
                "blocked, s": summary([one["blocked_s"] for one in busy[nice]]),
                "step, s": summary([one["step_s"] for one in busy[nice]]),
            }
            for nice in NICENESSES
        },
    }
