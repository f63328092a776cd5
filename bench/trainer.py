"""A training in a process of its own with one system that keeps its state; told by lines of JSON what to do.

`python -m bench.trainer STATE SYSTEM` (with options) answers every line on its standard input with one on its
standard output. `Trainer` is the other end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from bench.processes import MARK, TICK_S, Tree

WARM_STEPS = 2
UNDISTURBED_STEPS = 3
ROOT = Path(__file__).resolve().parents[1]
Answer = dict[str, Any]


class Trainer:
    """The parent's end: starts the process, sends commands, ends it with the `with`."""

    def __init__(
        self,
        state: str,
        system: str,
        directory: Path,
        size: str,
        tokens: int,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        directory.mkdir()
        self.system = system
        self.tree = Tree(f"{os.getpid()}-{directory.name}", str(directory))
        arguments = [state, system, str(directory), "--size", size, "--tokens", str(tokens)]
        with open(directory / "log", "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.trainer", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**self.tree.environment(), **environment},
                cwd=ROOT,
                text=True,
            )
        self.built = self._answer()

    def tell(self, command: str) -> Answer:
        """Send a command; returns the answer. Raises RuntimeError when there is an error in it, or none."""
        assert self._process.stdin is not None
        print(command, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: Answer = json.loads(line) if line else {"error": "the process has died"}
        if "error" in answer:
            raise RuntimeError(f"{self.system}: {answer['error']}")
        return answer

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._process.communicate("", timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


class Loop:
    """The child's end: a training loop whose steps are timed."""

    def __init__(self, state: str, system: str, directory: Path, size: str, tokens: int) -> None:
        from bench.states import STATES

        self._system_name, self._directory = system, directory
        self._tree = Tree(os.environ[MARK], str(directory))
        self._state = STATES[state](size, tokens)
        self._system: Any = None
        self._fence_s = 0.0
        self._fenced_from = 0.0
        for _ in range(WARM_STEPS):
            self._state.step()

    def built(self) -> Answer:
        import torch

        return {"state_bytes": self._state.size_bytes, "threads": torch.get_num_threads()}

    def alone(self) -> Answer:
        """Train as if nothing was ever saved."""
        for _ in range(UNDISTURBED_STEPS):
            self._state.step()
        return {}

    def begin(self) -> Answer:
        """Make the system, and save for the first time, which is when most systems get their memory."""
        from bench.systems import SYSTEMS

        made = time.perf_counter()
        self._system = SYSTEMS[self._system_name](self._state, self._directory)
        made = time.perf_counter() - made
        hooked = self._state.optimizers[0]
        self._hook = hooked.register_step_pre_hook(lambda *_: self._at_update())
        return {"made_s": made, **self.idle()}

    def busy(self) -> Answer:
        """Train undisturbed, save, train until the save is durable and its last step is over."""
        cpu = self._tree.cpu_seconds()
        spans = [self._step() for _ in range(UNDISTURBED_STEPS)]
        cpu_per_step = (self._tree.cpu_seconds() - cpu) / UNDISTURBED_STEPS
        undisturbed_s = statistics.median(end - begin for begin, end in spans)
        self._train()
        cpu = self._tree.cpu_seconds()
        saving, saving_call_s = self._save()
        blocked_s = saving_call_s
        during: list[tuple[float, float]] = []
        while not during or not saving.done:
            during.append(self._step())
            if len(during) == 1:
                blocked_s += self._fence_s
        cpu = self._tree.cpu_seconds() - cpu - cpu_per_step * len(during)
        saving.wait()
        lost_s = during[-1][1] - saving.begun - undisturbed_s * len(during)
        return {
            "blocked_s": blocked_s,
            "lost_s": lost_s,
            # A device waits where its host goes on: that shows in the length of the step alone.
            "held_s": saving_call_s + during[0][1] - during[0][0] - undisturbed_s,
            "durable_s": saving.durable_at - saving.begun,
            "cpu_s": max(cpu, TICK_S),
            "step_s": undisturbed_s,
            "costs": saving.costs,
            "steps": [(begin - saving.begun, end - saving.begun) for begin, end in [*spans, *during]],
        }

    def idle(self) -> Answer:
        """Train a step, save, and do nothing until the save is durable."""
        self._train()
        cpu = self._tree.cpu_seconds()
        saving, called_s = self._save()
        saving.wait()
        return {
            "called_s": called_s,
            "released_s": saving.released_at - saving.begun,
            "durable_s": saving.durable_at - saving.begun,
            "cpu_s": max(self._tree.cpu_seconds() - cpu, TICK_S),
            "costs": saving.costs,
        }

    def end(self) -> Answer:
        self._system.close()
        return {}

    def _train(self) -> None:
        """All of a step but its end."""
        self._fenced_from = 0.0
        self._state.step(self._updating)

    @contextmanager
    def _updating(self) -> Iterator[None]:
        # The own hook has to be the last one, after the system's: hooks run in the order they came.
        hooks = self._state.optimizers[0]._optimizer_step_pre_hooks
        hooks.move_to_end(self._hook.id)
        self._fenced_from = time.perf_counter()
        with self._system.updating():
            yield

    def _at_update(self) -> None:
        """The optimizer is about to change the state: whatever it waited for is over."""
        self._fence_s = time.perf_counter() - self._fenced_from

    def _step(self) -> tuple[float, float]:
        """A step that is not saved: its begin and end."""
        begun = time.perf_counter()
        self._train()
        self._system.boundary(take=False)
        return begun, time.perf_counter()

    def _save(self) -> tuple[Any, float]:
        """End the step with a save; also how long that blocked."""
        begun = time.perf_counter()
        saving = self._system.boundary(take=True)
        return saving, time.perf_counter() - begun


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.trainer")
    for name in ("state", "system"):
        parser.add_argument(name)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", default="full")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    os.environ["EVERSTEP_LOG"] = "quiet"
    warnings.simplefilter("ignore")
    # Libraries print to the standard output: what they say goes to the error output instead.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        try:
            loop = Loop(**vars(arguments))
            commands = {
                command.__name__: command
                for command in (loop.alone, loop.begin, loop.busy, loop.idle, loop.end)
            }
            print(json.dumps(loop.built()), file=answers, flush=True)
            for line in sys.stdin:
                answer = commands[line.strip()]()
                print(json.dumps(answer), file=answers, flush=True)
        except Exception as error:
            traceback.print_exc()
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
            return 1
    return 0


if __name__ == "__main__":
    # What starts processes with this as their main module must not begin a second training.
    raise SystemExit(main())
