"""What differs between the circumstances of two states, and what it means."""

from __future__ import annotations

import pytest

from everstep.chain.drift import EXACTNESS, NONE, SAFE, TRAJECTORY, config_drift, drift
from everstep.format.values import Symbol

HERE = {
    "torch": "2.6.0", "python": "3.11.7", "host": "a", "system": "Linux", "cpu": "AVX512", "threads": "2",
    "device": "NVIDIA H100", "cuda": "12.4", "cudnn": "90100", "deterministic": "False",
    "arguments": "train.py --lr 0.1 --epochs 3", "commit": "0123456789abcdef", "script": "aa",
    "optimizer.lr": "0.1", "data.batch_size": "8", "model.frozen": "0 of 4",
}  # fmt: skip


@pytest.mark.parametrize(
    ("fact", "value", "kind", "text"),
    [
        ("torch", "2.7.0", EXACTNESS, "torch 2.6.0 -> 2.7.0"),
        ("cuda", "12.6", EXACTNESS, "CUDA 12.4 -> 12.6"),
        ("cudnn", "90200", EXACTNESS, "cuDNN 90100 -> 90200"),
        ("cpu", "AVX2", EXACTNESS, "CPU capability AVX512 -> AVX2"),
        ("threads", "4", EXACTNESS, "torch threads 2 -> 4"),
        ("device", "cpu", EXACTNESS, "device NVIDIA H100 -> cpu"),
        ("deterministic", "True", EXACTNESS, "deterministic algorithms False -> True"),
        ("arguments", "train.py --lr 0.2 --epochs 3", TRAJECTORY, "arguments 0.1 -> 0.2"),
        ("arguments", "train.py --lr 0.1", TRAJECTORY, "arguments --epochs 3 -> none"),
        ("arguments", "./train.py --lr 0.1 --epochs 3", SAFE, "arguments train.py -> ./train.py"),
        ("commit", "0123456789abcdef-dirty", TRAJECTORY, "git commit 012345678 -> 012345678-dirty"),
        ("commit", "fedcba9876543210", TRAJECTORY, "git commit 012345678 -> fedcba987"),
        ("script", "bb", TRAJECTORY, "script aa -> bb"),
        ("optimizer.lr", "0.2", TRAJECTORY, "optimizer.lr 0.1 -> 0.2"),
        ("data.batch_size", "16", TRAJECTORY, "data.batch_size 8 -> 16"),
        ("model.frozen", "2 of 4", TRAJECTORY, "model.frozen 0 of 4 -> 2 of 4"),
        ("host", "b", SAFE, "host a -> b"),
        ("python", "3.12.1", SAFE, "python 3.11.7 -> 3.12.1"),
        ("system", "Linux 6", SAFE, "system Linux -> Linux 6"),
    ],
)
def test_each_fact_has_its_class(fact: str, value: str, kind: str, text: str) -> None:
    (found,) = drift(HERE, {**HERE, fact: value})
    assert (found.kind, found.fact, str(found)) == (kind, fact, text)


def test_the_gravest_comes_first() -> None:
    found = drift(HERE, {**HERE, "host": "b", "optimizer.lr": "0.2", "threads": "1"})
    assert [one.kind for one in found] == [EXACTNESS, TRAJECTORY, SAFE]
    assert drift(HERE, dict(reversed(HERE.items()))) == []


def test_what_an_older_version_did_not_record_is_no_difference() -> None:
    assert drift({"torch": "2.6.0"}, HERE) == []
    assert drift(HERE, {"torch": "2.6.0"}) == []
    assert drift(HERE, {"torch": "2.6.0", "scheduler.x": "1"}) == []


def test_a_setting_that_came_or_went_is_one() -> None:
    (came,) = drift(HERE, {**HERE, "optimizer.weight_decay": "0.01"})
    assert (came.before, came.after) == (NONE, "0.01")
    (went,) = drift({**HERE, "optimizer.nesterov": "True"}, HERE)
    assert (went.before, went.after) == ("True", NONE)


def test_configurations_are_held_against_each_other() -> None:
    found = config_drift(
        {"lr": 0.1, "model": {"dtype": Symbol("torch.dtype", "float32")}, "seed": 1},
        {"lr": 0.1, "model": {"dtype": Symbol("torch.dtype", "bfloat16")}, "warmup": 10},
    )
    assert [str(one) for one in found] == [
        "config/model/dtype torch.float32 -> torch.bfloat16",
        "config/seed 1 -> -",
        "config/warmup - -> 10",
    ]
    assert {one.kind for one in found} == {TRAJECTORY}
    assert config_drift(None, {"lr": 1}) == config_drift({"lr": 1}, None) == []


def test_long_texts_are_cut() -> None:
    (found,) = drift({"arguments": "a " + "x" * 900}, {"arguments": "a " + "y" * 900})
    assert len(found.before) == len(found.after) == 120
