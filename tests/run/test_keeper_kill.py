"""A run and its keeper process when the one or the other is killed, stopped, signalled, or has no room."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.kill import DEADLINE_S, arenas, keepers, wait_until
from torch import nn

from everstep.chain.history import Chain
from everstep.chain.verify import verify
from everstep.errors import EverstepError, Unavailable
from everstep.events import Event, Failed, Missed, Taken, Warned
from everstep.keeper import start as starting
from everstep.keeper.client import living
from everstep.keeper.protocol import Status
from everstep.run.session import Run
from everstep.run.settings import Settings

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("runtime")]

SOURCE = Path(__file__).resolve().parents[2] / "src"


class Training:
    """A run of this process that takes a snapshot after each step."""

    def __init__(self, path: Path, **settings: Any) -> None:
        torch.manual_seed(3)
        self.events: list[Event] = []
        self.model = nn.Linear(400, 100)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.01)
        self.run = Run(
            Settings(path, every="1 step", keep="all", **settings).overridden(),
            {"model": self.model, "optimizer": self.optimizer},
            sink=self.events.append,
        )

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.full((1, 400), 1.0 + self.run.step)).sum().backward()
        self.optimizer.step()
        self.run.tick()

    def durable_step(self) -> None:
        """A step whose snapshot is durable, with nothing else under way."""
        self.step()
        assert self.run.wait(DEADLINE_S)

    def steps_until_told(self) -> EverstepError:
        """Train until a tick raises, as a loop that goes on all the same does."""
        raised: list[EverstepError] = []

        def told() -> bool:
            try:
                self.step()
            except EverstepError as error:
                raised.append(error)
            return bool(raised)

        assert wait_until(told)
        return raised[0]

    def settle(self) -> None:
        """Wait until nothing is under way, and hear of all that has failed."""
        while True:
            try:
                assert self.run.wait(DEADLINE_S)
                return
            except EverstepError:
                continue

    def all_of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def weight(self) -> torch.Tensor:
        return self.model.weight.detach().clone()


def the_keeper() -> Status:
    (status,) = living()
    return status


def assert_whole(path: Path, head: int) -> None:
    assert not verify(Chain(path)).findings
    assert Chain(path).find("head").step == head


# -- keepers that die, again and again ---------------------------------------------------------------------

DYING = """
import json, os, signal, sys
sys.path[:] = json.loads(sys.argv[3])
from everstep.chain.writer import Writer
from everstep.keeper.service import main
write = Writer.write

def die_or_write(*arguments):
    if os.path.exists(%r):
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)

Writer.write = die_or_write
main(sys.argv[1], sys.argv[2])
"""


def test_keepers_that_keep_dying_do_not_stop_training_and_then_all_is_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cause = tmp_path / "cause"
    monkeypatch.setattr(starting, "_PROGRAM", DYING % str(cause))
    training = Training(tmp_path / "chain")
    training.durable_step()
    cause.touch()
    for rounds in (1, 2):
        error = training.steps_until_told()
        assert isinstance(error, Unavailable)
        assert "3 keepers in a row" in str(error)
        assert "EVERSTEP_KEEPER=thread" in error.next
        died = [event for event in training.all_of(Warned) if "signal 9" in event.what]
        assert len(died) >= 2 * rounds  # The third of three is told as the failure.
        training.settle()
    assert training.all_of(Failed)
    cause.unlink()
    training.durable_step()
    assert training.all_of(Taken)[-1].step == training.run.step
    weight, last = training.weight(), training.run.step
    training.run.close()
    assert living() == []
    assert_whole(tmp_path / "chain", last)
    again = Training(tmp_path / "chain")
    assert torch.equal(again.weight(), weight)
    again.run.close()


def test_one_that_is_killed_while_it_starts_is_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even told: the loop has not come to need it."""
    count = tmp_path / "count"
    program = starting._PROGRAM.replace(
        "sys.path[:]",
        f"import os, signal\nwith open({str(count)!r}, 'ab') as file:\n    file.write(b'x')\n"
        f"if os.path.getsize({str(count)!r}) < 3:\n    os.kill(os.getpid(), signal.SIGKILL)\nsys.path[:]",
    )
    monkeypatch.setattr(starting, "_PROGRAM", program)
    training = Training(tmp_path / "chain")
    training.durable_step()
    assert count.stat().st_size == 3
    training.run.close()
    assert not training.all_of(Failed)
    assert_whole(tmp_path / "chain", 1)


def test_those_that_are_always_killed_while_they_start_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(starting, "_PROGRAM", "import os; os.kill(os.getpid(), 9)")
        training = Training(tmp_path / "chain")
        with pytest.raises(Unavailable, match=r"cannot be started \(status -9\)"):
            training.durable_step()
    training.durable_step()
    training.run.close()
    assert_whole(tmp_path / "chain", 2)


def test_a_child_that_is_forked_while_a_keeper_starts_does_not_stop_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader's worker, say: it must not get the pipe whose end says that the keeper was started."""
    inside, forked = threading.Event(), threading.Event()
    owner = subprocess if hasattr(subprocess, "_fork_exec") else subprocess._posixsubprocess  # type: ignore[attr-defined]
    name = "_fork_exec" if owner is subprocess else "fork_exec"
    original = getattr(owner, name)

    def fork_exec(*arguments: Any) -> Any:
        inside.set()
        forked.wait(0.5)  # In vain, if all is well: the fork has to wait for this.
        return original(*arguments)

    monkeypatch.setattr(owner, name, fork_exec)
    training = Training(tmp_path / "chain")
    assert inside.wait(DEADLINE_S)
    child = os.fork()
    if not child:
        while True:
            signal.pause()
    forked.set()
    try:
        training.step()
        assert training.run.wait(20)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    training.run.close()
    assert_whole(tmp_path / "chain", 1)


def test_a_keeper_that_is_killed_between_snapshots_costs_none(tmp_path: Path) -> None:
    training = Training(tmp_path / "chain")
    for _ in range(4):
        training.durable_step()
        os.kill(the_keeper().pid, signal.SIGKILL)
    training.run.close()
    assert [event.step for event in training.all_of(Taken)] == [1, 2, 3, 4]
    assert training.all_of(Failed) == []
    assert all("another takes over, and nothing is lost" in event.what for event in training.all_of(Warned))
    assert_whole(tmp_path / "chain", 4)


# -- a keeper that stands still ----------------------------------------------------------------------------


def test_a_keeper_that_stands_still_does_not_stop_training(tmp_path: Path) -> None:
    training = Training(tmp_path / "chain")
    training.durable_step()
    pid = the_keeper().pid
    os.kill(pid, signal.SIGSTOP)
    for _ in range(12):
        training.step()
    # There is room for two at most; the rest is skipped, and told at the 1st, 2nd, 4th and 8th.
    assert [event.count for event in training.all_of(Missed)] == [1, 2, 4, 8]
    assert [event.step for event in training.all_of(Taken)] == [1]
    os.kill(pid, signal.SIGCONT)
    assert training.run.wait(DEADLINE_S)
    training.durable_step()
    assert training.all_of(Taken)[-1].step == 14
    assert the_keeper().pid == pid
    training.run.close()
    assert training.all_of(Failed) == []
    assert_whole(tmp_path / "chain", 14)


# -- a store that takes nothing ----------------------------------------------------------------------------


def assert_heals(training: Training, path: Path, heal: Callable[[], object], says: str) -> None:
    """A store that takes nothing is told, training goes on, and afterwards snapshots work again."""
    head = Chain(path).find("head").step
    assert says in str(training.steps_until_told())
    assert_whole(path, head)
    heal()
    training.settle()
    training.durable_step()
    assert training.all_of(Taken)[-1].step == training.run.step
    weight, last = training.weight(), training.run.step
    training.run.close()
    assert_whole(path, last)
    again = Training(path)
    assert torch.equal(again.weight(), weight)
    again.run.close()


def test_no_file_can_grow(tmp_path: Path) -> None:
    """As under a quota."""
    training = Training(tmp_path / "chain")
    training.durable_step()
    pid = the_keeper().pid
    free = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, free[1]))
    heal = partial(resource.prlimit, pid, resource.RLIMIT_FSIZE, free)
    assert_heals(training, tmp_path / "chain", heal, os.strerror(errno.EFBIG))


@pytest.fixture(name="disk")
def _disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "none", disk], capture_output=True
    ).returncode:
        pytest.skip("only who may mount a file system has one to fill")
    yield disk
    for pid in keepers(tmp_path):
        os.kill(pid, signal.SIGKILL)
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk(tmp_path: Path, disk: Path) -> None:
    training = Training(disk / "chain")
    training.durable_step()
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert_heals(training, disk / "chain", ballast.unlink, "No space left on device")


def test_a_file_system_that_becomes_read_only(tmp_path: Path, disk: Path) -> None:
    training = Training(disk / "chain")
    training.durable_step()
    remount = ["mount", "-o", "remount"]
    # While files are open for writing the system refuses.
    assert wait_until(lambda: subprocess.run([*remount, "-o", "ro", disk]).returncode == 0)
    heal = partial(subprocess.run, [*remount, "-o", "rw", disk], check=True)
    assert_heals(training, disk / "chain", heal, "Read-only file system")


# -- a trainer in a process of its own ---------------------------------------------------------------------

SCRIPT = """
import json, os, signal, sys
import torch
from torch.utils.data import DataLoader, Dataset
import everstep

class Endless(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 3:
            os.write(1, f"worker {os.getpid()}\\n".encode())
            while True:
                signal.pause()
        return torch.ones(400)

def main():
    path, workers, context = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    model = torch.nn.Linear(400, 100)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    # Without overlap all is handed over when a step has ended.
    run = everstep.open(path, model=model, optimizer=optimizer, every="1 step", keep="all", overlap=False)
    batches = iter([torch.ones(400)] * 100)
    if workers:
        waiting = {"prefetch_factor": 4, "multiprocessing_context": context}
        batches = iter(DataLoader(Endless(), num_workers=workers, **waiting))

    def step():
        optimizer.zero_grad()
        model(next(batches)).sum().backward()
        optimizer.step()
        run.tick()

    step()
    run.wait()
    print("step 1", flush=True)
    try:
        for line in sys.stdin:
            step()
            print("step", run.step, flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        raise

if __name__ == "__main__":
    main()
"""


class Script:
    """The script above: one step, then one for each line it is given."""

    def __init__(self, directory: Path, workers: int = 0, context: str = "fork") -> None:
        (directory / "script.py").write_text(SCRIPT)
        self.path = directory / "chain"
        self.workers: list[int] = []
        self.process = subprocess.Popen(
            [sys.executable, directory / "script.py", self.path, str(workers), context],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            start_new_session=True,
            text=True,
        )
        said = [self.said() for _ in range(1 + (workers > 0))]
        self.workers = [int(line.split()[1]) for line in said if line.startswith("worker")]
        assert "step 1" in said

    def said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def step(self, number: int) -> None:
        self.ask_for_a_step()
        assert self.said() == f"step {number}"

    def ask_for_a_step(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def heard(self, text: str) -> None:
        """Wait until it says that on standard error."""
        assert self.process.stderr is not None
        assert any(text in line for line in self.process.stderr)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def rests() -> bool:
    """Whether the only keeper knows that its trainer is gone, and holds the newest of what it was given."""
    status = the_keeper()
    return not status.trainer and not status.jobs and bool(status.held)


def test_what_a_killed_trainer_has_handed_over_becomes_durable_without_another(tmp_path: Path) -> None:
    script = Script(tmp_path)
    keeper = the_keeper().pid
    os.kill(keeper, signal.SIGSTOP)
    script.step(2)
    script.step(3)
    script.kill()
    assert_whole(script.path, 1)
    os.kill(keeper, signal.SIGCONT)
    assert wait_until(rests)
    assert_whole(script.path, 3)
    assert [snapshot.step for snapshot in Chain(script.path).snapshots()] == [3, 2, 1]
    assert len(the_keeper().arenas) == 1


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_loader_workers_that_live_on_do_not_hide_the_trainer_s_death(tmp_path: Path, context: str) -> None:
    script = Script(tmp_path, workers=1, context=context)
    script.step(2)
    (worker,) = script.workers
    life = os.pidfd_open(worker)
    try:
        os.kill(worker, signal.SIGSTOP)  # It lives as long as this test wants it to.
        script.kill()
        assert wait_until(rests)
        signal.pidfd_send_signal(life, 0)
        assert_whole(script.path, 2)
        status = the_keeper()
        assert status.held == Chain(script.path).find("head").id
        assert arenas([worker]) == set()
    finally:
        signal.pidfd_send_signal(life, signal.SIGKILL)
        os.close(life)


@pytest.mark.parametrize(
    ("number", "ends_with"), [(signal.SIGTERM, 143), (signal.SIGINT, -2), (signal.SIGHUP, -1)]
)
def test_a_signal_to_the_whole_group_leaves_the_keeper_to_finish(
    tmp_path: Path, number: signal.Signals, ends_with: int
) -> None:
    """As a scheduler or a terminal sends them."""
    script = Script(tmp_path)
    keeper = the_keeper().pid
    os.kill(keeper, signal.SIGSTOP)
    script.step(2)
    os.killpg(script.process.pid, number)
    if number == signal.SIGTERM:
        script.heard("SIGTERM: takes a snapshot at the end of this step")
        script.ask_for_a_step()
    elif number == signal.SIGINT:
        script.ask_for_a_step()  # See below.
        assert script.said() == "interrupted"
    else:
        script.process.wait()
    assert_whole(script.path, 1)
    os.kill(keeper, signal.SIGCONT)
    _, said = script.process.communicate(timeout=DEADLINE_S)
    assert script.process.returncode == ends_with, said
    if number == signal.SIGHUP:
        assert wait_until(rests)
    else:
        assert living() == []
    assert_whole(script.path, 3 if number == signal.SIGTERM else 2)


def test_a_second_interrupt_does_not_take_along_what_was_handed_over(tmp_path: Path) -> None:
    """Who cannot wait presses Ctrl-C twice: the first is heard, the second ends the wait for the keeper."""
    script = Script(tmp_path)
    keeper = the_keeper().pid
    os.kill(keeper, signal.SIGSTOP)
    script.step(2)
    os.killpg(script.process.pid, signal.SIGINT)
    # Python sees a signal that came right before it began to read only when it has read something.
    script.ask_for_a_step()
    assert script.said() == "interrupted"
    script.heard("KeyboardInterrupt")  # Python has shown the first, so that it is leaving now.
    assert wait_until(lambda: _ends(script))
    os.kill(keeper, signal.SIGCONT)
    assert wait_until(rests)
    assert_whole(script.path, 2)


def _ends(script: Script) -> bool:
    if script.process.poll() is None:
        os.killpg(script.process.pid, signal.SIGINT)
    return script.process.poll() is not None
