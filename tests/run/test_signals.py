"""Signals to real processes: a last snapshot, an exit status that asks for more, nothing swallowed."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from everstep.chain.history import Chain
from everstep.run.signals import STOP, Signals

pytestmark = pytest.mark.process

SCRIPT = """
import signal, sys, time
handler = sys.argv[2]
if handler == "own":
    signal.signal(signal.SIGTERM, lambda number, frame: print("own handler", flush=True))
import everstep
run = everstep.open(sys.argv[1], history=[], every=None)
print("open", flush=True)
if handler == "stuck":
    while True:
        time.sleep(0.01)
for line in sys.stdin:
    run.tick()
    print("step", run.step, flush=True)
"""


class Script:
    """The script above as a process that takes a step for each line it is given."""

    def __init__(self, repo: Path, handler: str = "none") -> None:
        command = [sys.executable, "-c", SCRIPT, str(repo), handler]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        assert self.said() == "open"

    def said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def step(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def ended(self) -> tuple[int, str]:
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out + err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_last_snapshot_at_the_end_of_the_step(tmp_path: Path, number: signal.Signals) -> None:
    script = Script(tmp_path)
    script.step()
    assert script.said() == "step 1"
    script.process.send_signal(number)
    script.step()
    status, said = script.ended()
    assert status == 143
    assert f"{number.name}: takes a snapshot at the end of this step and stops" in said
    head = Chain(tmp_path).find("head")
    assert (head.step, head.record.trigger) == (2, number.name)
    # Nobody holds the chain any more.
    assert Script(tmp_path).ended()[0] == 0


def test_a_handler_that_was_there_is_called_too(tmp_path: Path) -> None:
    script = Script(tmp_path, "own")
    script.process.send_signal(signal.SIGTERM)
    assert script.said() == "own handler"
    script.step()
    assert script.ended()[0] == 143
    assert Chain(tmp_path).find("head").step == 1


def test_the_second_signal_ends_at_once(tmp_path: Path) -> None:
    script = Script(tmp_path, "stuck")
    script.process.send_signal(signal.SIGTERM)
    assert script.process.stderr is not None
    while "stops at once" not in script.process.stderr.readline():
        assert script.process.poll() is None
    script.process.send_signal(signal.SIGTERM)
    assert script.ended()[0] == 143
    assert not list(Chain(tmp_path).snapshots())


WORKERS = """
import os, signal, sys
import torch
from torch.utils.data import DataLoader, Dataset
import everstep

class Endless(Dataset):
    def __len__(self):
        return 80
    def __getitem__(self, index):
        if sys.argv[2] == "locked" and index in (4, 6):
            meet(index)
        if index >= 6 and sys.argv[2] != "busy":
            if sys.argv[2] == "locked":
                hold_what_the_loader_needs_to_end()
            os.read(os.pipe()[0], 1)
        return index

def meet(index):
    # A worker asks for the lock before each batch: the third batch has to be past that when it is taken.
    with open(sys.argv[1] + ".meeting", "r" if index == 6 else "w"):
        pass

def hold_what_the_loader_needs_to_end():
    frame = sys._getframe()
    while frame.f_code.co_name != "_worker_loop":
        frame = frame.f_back
    frame.f_locals["done_event"]._cond.acquire()
    os.write(1, b"holds it\\n")

if __name__ == "__main__":
    os.mkfifo(sys.argv[1] + ".meeting")
    loader = DataLoader(Endless(), 2, num_workers=2)
    run = everstep.open(sys.argv[1], history=[], every=None, data=loader)
    for batch in run.steps():
        print("step", run.step + 1, flush=True)
        if run.step == 2 and sys.argv[2] == "busy":
            os.killpg(0, signal.SIGTERM)
            for worker in torch.multiprocessing.active_children():
                worker.join()
"""


@pytest.mark.parametrize("loop", ["busy", "waiting", "locked"])
def test_a_signal_to_the_whole_group(tmp_path: Path, loop: str) -> None:
    """Schedulers signal the loader's workers too: they die (perhaps while they hold a lock that the loader
    asks for when it ends), and the last snapshot is taken and the process ends all the same."""
    script = tmp_path / "script.py"
    script.write_text(WORKERS)
    process = subprocess.Popen(
        [sys.executable, script, tmp_path / "run", loop],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said_first = {process.stdout.readline() for _ in range(4 if loop == "locked" else 3)}
        assert said_first == {"step 1\n", "step 2\n", "step 3\n"} | (
            {"holds it\n"} if loop == "locked" else set()
        )
        if loop != "busy":
            os.killpg(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 143, said
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert Chain(tmp_path / "run").find("head").step == 3


LATE = """
import os, sys
import torch
from torch.utils.data import DataLoader, Dataset
import everstep
from everstep.run import signals

class Endless(Dataset):
    def __len__(self):
        return 1 << 20
    def __getitem__(self, index):
        return torch.tensor(float(index))

signals.GROUP_S = float(sys.argv[2])
loader = DataLoader(Endless(), 2, num_workers=1)
run = everstep.open(sys.argv[1], history=[], every=None, data=loader)
for batch in run.steps():
    if run.step == 1:
        print(torch.multiprocessing.active_children()[0].pid, flush=True)
        sys.stdin.readline()
    elif run.step == 2:
        raise SystemExit("it went on")
"""


@pytest.mark.parametrize("follows", [True, False])
def test_a_worker_that_is_signalled_before_the_trainer(tmp_path: Path, follows: bool) -> None:
    """Slurm and shells signal one process after the other. A worker that somebody kills alone is told of."""
    script = tmp_path / "script.py"
    script.write_text(LATE)
    process = subprocess.Popen(
        [sys.executable, script, tmp_path / "run", "600" if follows else "0.1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        life = os.pidfd_open(worker)
        os.kill(worker, signal.SIGTERM)
        select.select([life], [], [])
        os.close(life)
        if follows:
            process.send_signal(signal.SIGTERM)
        said = process.communicate("\n" if follows else None, timeout=120)[1]
        assert process.returncode == (143 if follows else 1), said
        assert ("is killed by signal: Terminated" in said) == (not follows)
    finally:
        process.kill()
        process.communicate()
    if follows:
        assert Chain(tmp_path / "run").find("head").step == 2


def test_the_handler_of_torch_is_back_when_the_run_is_over() -> None:
    ours = False

    def handler(number: int, frame: object) -> None:
        if ours:  # A child of an earlier test may end at any time.
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")

    handler.__module__ = "torch.utils.data._utils.signal_handling"
    children = signal.signal(signal.SIGCHLD, handler)
    stops = [signal.signal(number, signal.SIG_DFL) for number in STOP]
    received: list[str] = []
    signals = Signals(received.append)
    signals.install()
    try:
        signals.look_after_workers()
        signals.look_after_workers()
        assert signal.getsignal(signal.SIGCHLD) is not handler
        signals.remove()
        assert signal.getsignal(signal.SIGCHLD) is handler
        signals.install()
        signals.look_after_workers()
        ours = True
        os.kill(os.getpid(), signal.SIGCHLD)
        assert received == ["SIGTERM"]
    finally:
        signals.remove()
        signal.signal(signal.SIGCHLD, children)
        for number, before in zip(STOP, stops, strict=True):
            signal.signal(number, before)
