"""A trainer without torch, for tests to kill: does what it is told on standard input, and answers.

Run as `python trainer_process.py CHAIN`. A line in is a word and its arguments, a line out is JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from handing import LAYOUT, begun, hand_over, state

from everstep.chain.history import Chain
from everstep.chain.lease import Lease
from everstep.errors import EverstepError
from everstep.keeper.base import Held, Outcome
from everstep.keeper.client import ProcessKeeper, living


class Trainer:
    def __init__(self, path: str) -> None:
        self.warned: list[str] = []
        self.outcomes: list[tuple[int, str]] = []
        self.chain = Chain(path)
        self.keeper = ProcessKeeper(self.chain, self._outcome, self.warned.append)
        self.lease: Lease | None = None
        self._held: list[Held] = []

    def _outcome(self, outcome: Outcome) -> None:
        error = "" if outcome.error is None else type(outcome.error).__name__
        self.outcomes.append((outcome.job.facts.step, error))

    def held(self) -> list[dict[str, Any]]:
        """What lies in memory, and whether it is the state of its step."""
        self._held = self.keeper.held()
        found = []
        for held in self._held:
            step = self.chain.snapshot(held.snapshot).step
            same = bytes(held.memory[: LAYOUT.arena_bytes]) == state(step)
            found.append({"snapshot": held.snapshot, "step": step, "same": same})
        return found

    def begin(self, parent: str = "") -> int:
        self.lease = begun(self.keeper, self.chain, parent)
        self.keeper.prepare(LAYOUT.arena_bytes)
        return self.lease.number

    def ready(self) -> None:
        """Wait until there are arenas."""
        arena = self.keeper.arena(LAYOUT.arena_bytes, wait=True)
        assert arena is not None
        self.keeper.give_back(arena)

    def take(self, step: str) -> None:
        hand_over(self.keeper, int(step))

    def take_without_end(self, step: str) -> None:
        hand_over(self.keeper, int(step), end=False)

    def wait(self) -> list[tuple[int, str]]:
        self.keeper.wait()
        return self.outcomes

    def fork(self) -> int:
        """A child that lives on, as a loader's worker does when its trainer is killed."""
        pid = os.fork()
        if not pid:
            for descriptor in (0, 1, 2):
                os.close(descriptor)
            while True:
                signal.pause()
        return pid

    def keepers(self) -> list[int]:
        return [status.pid for status in living()]

    def warnings(self) -> list[str]:
        return self.warned

    def torch_imported(self) -> bool:
        return "torch" in sys.modules

    def close(self) -> None:
        self.keeper.close()
        if self.lease is not None:
            self.lease.release()


def main() -> None:
    trainer = Trainer(sys.argv[1])
    for line in sys.stdin:
        word, *arguments = line.split()
        try:
            answer = getattr(trainer, word)(*arguments)
        except EverstepError as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
