"""Seeded fuzzing of every decoder (`bench/fuzz.py`), and a look at whether the fuzzer would see anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench import fuzz

from everstep.errors import Damaged
from everstep.format import record
from everstep.format.record import HeadRecord

ROOT = Path(__file__).parents[2]
INPUTS = 5000


@pytest.mark.slow
def test_nothing_but_damaged_and_unsupported_comes_out() -> None:
    """In a process of its own, for the limit of memory that the fuzzer sets itself."""
    source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "bench.fuzz", "--inputs", str(INPUTS), "--seed", "20240506"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counted = dict(re.findall(r"(\d+) (Damaged|Unsupported|decoded)", done.stdout.splitlines()[-2]))
    assert sum(map(int, counted)) == INPUTS
    assert set(counted.values()) == {"Damaged", "Unsupported", "decoded"}, "mutations reach all outcomes"


def test_every_seed_decodes() -> None:
    """Otherwise mutations would begin at rubbish."""
    for target in fuzz.targets():
        for seed in target.seeds:
            target.decode(seed)


def test_inputs_can_be_made_again() -> None:
    found = fuzz.targets()
    first = [fuzz.made_input(found, 7, number) for number in range(300)]
    again = [fuzz.made_input(fuzz.targets(), 7, number) for number in range(300)]
    assert [data for _, data in first] == [data for _, data in again]
    assert len({data for _, data in first}) > 250


def test_sees_an_error_that_escapes() -> None:
    def decode(data: bytes) -> object:
        if b"\xff" in data:
            raise KeyError(data[:10])
        raise Damaged("what the target is expected to say")

    target = fuzz.Target("broken", [bytes(50)], decode)
    report = fuzz.run([target], 300, seed=1)
    assert report.outcomes["broken", "ESCAPED"] > 10
    assert report.outcomes["broken", "Damaged"] > 10
    assert "KeyError" in report.failures[0]


def test_sees_a_change_that_no_digest_sees() -> None:
    head = HeadRecord("0" * 64, step=1, writer=1, nonce="n", at="now", branch="main", number=1)
    sealed = record.seal(head)
    target = fuzz.Target("blind", [sealed], lambda data: len(data), sealed=True)
    report = fuzz.run([target], 50, seed=1)
    assert report.outcomes["blind", "ESCAPED"] >= 45


def test_sees_a_call_that_takes_too_long() -> None:
    def decode(data: bytes) -> object:
        until = time.perf_counter() + 0.02
        while time.perf_counter() < until:
            pass
        return data

    report = fuzz.run([fuzz.Target("slow", [b"seed"], decode)], 3, seed=1, call_limit_s=0.01)
    assert len(report.failures) == 3
    assert report.slowest_s["slow"][0] >= 0.02
