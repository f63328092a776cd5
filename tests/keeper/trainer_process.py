"""A trainer without torch, for tests to kill: does what it is told on standard input, and answers.

Run as `python trainer_process.py CHAIN [RANK RANKS]`. A line in is a word and its arguments, a line out is
JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from handing import LAYOUT, begun, filled, hand_over, laid_of, state

from everstep.chain.history import Chain
from everstep.chain.lease import Lease
from everstep.errors import EverstepError
from everstep.format.chunk import digest
from everstep.keeper.base import Held, Outcome, Terms
from everstep.keeper.client import ProcessKeeper, living
from everstep.store.base import Store


class Counted:
    """A store that counts what is read into memory."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.read: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        self.read.append(key)
        return self.store.read_into(key, start, buffers)


class Trainer:
    def __init__(self, path: str, rank: str = "0", ranks: str = "1") -> None:
        self.warned: list[str] = []
        self.outcomes: list[tuple[int, str]] = []
        self.chain = Chain(path)
        self.rank, self.ranks = int(rank), int(ranks)
        self.layout = LAYOUT if self.ranks == 1 else laid_of(self.rank, self.ranks)
        self.keeper = ProcessKeeper(
            self.chain, self._outcome, self.warned.append, rank=self.rank, ranks=self.ranks
        )
        self.lease: Lease | None = None
        self.errors: list[str] = []
        self._held: list[Held] = []

    def _outcome(self, outcome: Outcome) -> None:
        error = "" if outcome.error is None else type(outcome.error).__name__
        self.errors.append(str(outcome.error or ""))
        self.outcomes.append((outcome.job.facts.step, error))

    def held(self) -> list[dict[str, Any]]:
        """What lies in memory, and whether it is the state of its step."""
        self.settle()
        return self.lying()

    def settle(self) -> None:
        """Wait until all is done that was handed over before."""
        self._held = self.keeper.held()

    def lying(self) -> list[dict[str, Any]]:
        """As `held`, of what was settled."""
        found = []
        for held in self._held:
            name = held.snapshot or held.manifest
            step = self._step_of(name)
            same = bytes(held.memory[: self.layout.arena_bytes]) == state(step, self.layout)
            found.append({"snapshot": name, "step": step, "same": same})
        return found

    def _step_of(self, name: str) -> int:
        if self.ranks == 1:
            return self.chain.snapshot(name).step
        steps = [one.step for one in self.chain.snapshots() if name in one.record.manifests]
        return steps[0] if steps else -1

    def begin(self, parent: str = "") -> int:
        self.lease = begun(self.keeper, self.chain, parent)
        self.keeper.prepare(self.layout.arena_bytes)
        return self.lease.number

    def begin_as(self, lease: str, deadline_s: str, parent: str = "") -> None:
        """One of several ranks; the first takes the lease, which the others are told."""
        terms = Terms("main", int(lease), parent, "all", rank=self.rank, ranks=self.ranks)
        self.keeper.begin(replace(terms, deadline_s=float(deadline_s)))
        self.keeper.prepare(self.layout.arena_bytes)

    def restore(self) -> list[object]:
        """Read all of the newest snapshot; returns which packs were read without the keeper, and a digest."""
        snapshot = next(self.chain.snapshots())
        store = Counted(self.chain.store)
        data = filled(self.keeper.reading(store), self.chain.manifest(snapshot))  # type: ignore[arg-type]
        return [store.read, digest(data)]

    def take_lease(self) -> int:
        self.lease = Lease.take(self.chain.store)
        return self.lease.number

    def ready(self) -> None:
        """Wait until there are arenas."""
        arena = self.keeper.arena(self.layout.arena_bytes, wait=True)
        assert arena is not None
        self.keeper.give_back(arena)

    def take(self, step: str, take: str = "0") -> None:
        hand_over(self.keeper, int(step), self.layout, take=int(take))

    def take_without_end(self, step: str, take: str = "0") -> None:
        hand_over(self.keeper, int(step), self.layout, end=False, take=int(take))

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

    def said(self) -> list[str]:
        """Why what failed did."""
        return self.errors

    def deaths(self) -> int:
        return self.keeper.deaths

    def warnings(self) -> list[str]:
        return self.warned

    def torch_imported(self) -> bool:
        return "torch" in sys.modules

    def abandon(self) -> list[str]:
        """Leave the keeper with what it has; what they are told who wait."""
        jobs = list(self.keeper._open)
        self.keeper.abandon()
        said = []
        for job in jobs:
            try:
                job.pending.durable(0)
                said.append("")
            except EverstepError as error:
                said.append(f"{type(error).__name__}: {error}")
        return said

    def close(self) -> None:
        self.keeper.close()
        if self.lease is not None:
            self.lease.release()


def main() -> None:
    trainer = Trainer(*sys.argv[1:])
    for line in sys.stdin:
        word, *arguments = line.split()
        try:
            answer = getattr(trainer, word)(*arguments)
        except EverstepError as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
