"""What is left of a keeper when a training has ended in one of the ways a training ends: nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from bench.kill import DEADLINE_S, arenas, keepers, wait_until

from everstep.chain.history import Chain
from everstep.chain.verify import verify
from everstep.keeper.client import living

pytestmark = pytest.mark.process

SOURCE = Path(__file__).resolve().parents[2] / "src"

SCRIPT = """
import os, signal, sys
import torch
import everstep

model = torch.nn.Linear(2000, 300)
run = everstep.open(sys.argv[1], model=model, every="1 step", overlap=False)
for number in range(2):
    run.tick()
    run.wait()
print("ready", flush=True)
sys.stdin.readline()
"""

ENDS = {
    "close": ("run.tick(); run.close()", 0),
    "no close": ("run.tick()", 0),
    "sys.exit": ("run.tick(); sys.exit(3)", 3),
    "an exception": ("run.tick(); raise ValueError('mine')", 1),
    "os._exit": ("run.tick(); os._exit(4)", 4),
    "SIGKILL": ("run.tick(); os.kill(os.getpid(), signal.SIGKILL)", -9),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM); run.tick()", 143),
    "a fork that goes on": (
        "run.tick()\nif os.fork():\n    os._exit(5)\nos.closerange(0, 3)\nsignal.pause()",
        5,
    ),
}
"""The last lines of a training, and the status that it ends with."""


@pytest.fixture(autouse=True)
def _for_a_short_time(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERSTEP_KEEPER_LINGER", "0.2")


def begin(path: Path, end: str) -> subprocess.Popen[str]:
    """Start a training in a process group of its own; it waits for a line before its end."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + end, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        start_new_session=True,
        text=True,
    )
    assert process.stdout is not None
    said = process.stdout.readline()
    assert said == "ready\n", process.communicate()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("how", ENDS)
def test_nothing(tmp_path: Path, runtime: Path, how: str) -> None:
    end, status = ENDS[how]
    process = begin(tmp_path / "chain", end)
    try:
        (keeper,) = living()
        seen = arenas([process.pid, keeper.pid])
        assert len(seen) == 2
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(DEADLINE_S) == status
        assert wait_until(lambda: not keepers(tmp_path)), "the keeper leaves"
        assert list(runtime.iterdir()) == []
        # Also where a forked child of the training lives on.
        assert not seen & arenas(filter(str.isdigit, os.listdir("/proc")))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    # The last step was handed over before the end, whatever that was.
    assert Chain(tmp_path / "chain").find("head").step == 3
    assert not verify(Chain(tmp_path / "chain")).findings


@pytest.mark.slow
def test_what_two_that_were_killed_leave_is_taken_away_by_whatever_keeper_comes_next(
    tmp_path: Path, runtime: Path
) -> None:
    process = begin(tmp_path / "one", "")
    (keeper,) = living()
    seen = arenas([process.pid, keeper.pid])
    for pid in (keeper.pid, process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert wait_until(lambda: not keepers(tmp_path))
    assert not seen & arenas(filter(str.isdigit, os.listdir("/proc")))
    assert len(list(runtime.iterdir())) == 1
    other = begin(tmp_path / "other", "run.close()")
    other.communicate("\n")
    assert wait_until(lambda: not keepers(tmp_path))
    assert list(runtime.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("python", [("-O",), ("-I", "-X", "dev"), ("-B", "-E")], ids=" ".join)
def test_pythons_with_options(tmp_path: Path, runtime: Path, python: tuple[str, ...]) -> None:
    """And a path that no socket could be bound to, from another directory."""
    directory = tmp_path / ("long" * 40)
    directory.mkdir()
    path = f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n"
    done = subprocess.run(
        [sys.executable, *python, "-c", path + SCRIPT + "run.close()", f"{directory.name}/chain"],
        cwd=tmp_path,
        input="\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "thread" not in done.stderr
    assert Chain(directory / "chain").find("head").step == 2
    assert keepers(tmp_path) == []
    assert list(runtime.iterdir()) == []
