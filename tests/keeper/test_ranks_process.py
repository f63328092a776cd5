"""Four trainers of four ranks on one machine, and the one keeper process that they have."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from handing import assert_joined, until
from test_keeper_process import Trainer, arenas_of, dead, path, runtime

from everstep.chain.history import Chain
from everstep.chain.verify import verify
from everstep.keeper.client import living

__all__ = ["path", "runtime"]

pytestmark = pytest.mark.process

RANKS = 4
LONG_S = 600


class Ranks:
    """The trainers of a run."""

    def __init__(self, path: Path, ranks: int = RANKS) -> None:
        self.path = path
        self.all = [Trainer(path, rank, ranks) for rank in range(ranks)]

    def begin(self, deadline_s: float = LONG_S) -> None:
        head = Chain(self.path).head()
        lease = self.all[0].do("take_lease")
        self.ask("begin_as", lease, deadline_s, *([head.id] if head else []))
        self.ask("ready")

    def begin_with_a_snapshot(self, deadline_s: float = LONG_S) -> None:
        """Of step 10, durable."""
        self.begin(deadline_s)
        self.ask("take", 10, 1)
        self.ask("wait")

    def ask(self, word: str, *arguments: object) -> list[object]:
        """All at once."""
        for trainer in self.all:
            trainer.ask(word, *arguments)
        return [trainer.answer() for trainer in self.all]

    def held(self) -> list[list[dict[str, Any]]]:
        """A rank that is not the first knows of no snapshot, only of its part: so the chain is looked at
        when all are settled."""
        self.ask("settle")
        return self.ask("lying")  # type: ignore[return-value]

    def kill(self) -> None:
        for trainer in self.all:
            trainer.process.kill()
        for trainer in self.all:
            trainer.kill()


@pytest.fixture
def start(path: Path) -> Iterator[Callable[..., Ranks]]:
    started: list[Ranks] = []

    def make(ranks: int = RANKS) -> Ranks:
        started.append(Ranks(path, ranks))
        return started[-1]

    yield make
    for run in started:
        run.kill()


def assert_each_gets_its_own_back(path: Path, heirs: Ranks) -> None:
    """What was handed over of step 20 has become durable, and each rank has it in memory, and step 10."""
    held = heirs.held()
    assert_joined(path, [20, 10], RANKS)
    for found in held:
        assert [(one["step"], one["same"]) for one in found] == [(20, True), (10, True)]


def outcomes(trainer: Trainer) -> list[tuple[int, str]]:
    return [(step, error) for step, error in trainer.do("wait")]


def test_they_have_one_keeper_and_do_without_a_dead_one(
    path: Path, runtime: Path, start: Callable[..., Ranks]
) -> None:
    run = start()
    assert run.held() == [[]] * RANKS
    run.begin_with_a_snapshot()
    (status,) = living()
    pids = [trainer.process.pid for trainer in run.all]
    assert [(seat.rank, seat.trainer) for seat in status.seats] == list(enumerate(pids))
    assert (status.ranks, status.trainer, len(status.arenas)) == (RANKS, pids[0], 2 * RANKS)
    assert_joined(path, [10], RANKS)
    # It is killed right when it has been given something.
    os.kill(status.pid, signal.SIGSTOP)
    run.ask("take", 20, 2)
    os.kill(status.pid, signal.SIGKILL)
    run.ask("wait")
    assert_joined(path, [20, 10], RANKS)
    assert run.ask("deaths") == [1] * RANKS
    (other,) = living()
    assert other.pid != status.pid
    assert len(other.seats) == RANKS
    run.ask("close")
    # None waits for long until it is gone: it may have stayed for the other ranks.
    until(lambda: dead(other.pid), "the keeper is gone")
    assert list((runtime / "everstep").iterdir()) == []


def test_a_frozen_rank_costs_a_snapshot_and_a_killed_one_does(
    path: Path, start: Callable[..., Ranks]
) -> None:
    run = start()
    run.begin_with_a_snapshot(deadline_s=0.5)
    frozen = run.all[2]
    frozen.process.send_signal(signal.SIGSTOP)
    others = [one for one in run.all if one is not frozen]
    for one in others:
        one.do("take", 20, 2)
    assert [outcomes(one)[-1] for one in others] == [(20, "Unavailable"), (20, ""), (20, "")]
    assert "(2)" in run.all[0].do("said")[-1]
    assert_joined(path, [10], RANKS)
    frozen.process.send_signal(signal.SIGCONT)
    run.ask("take", 30, 3)
    run.ask("wait")
    assert_joined(path, [30, 10], RANKS)


def test_a_rank_that_is_killed_in_the_middle_is_not_waited_for(
    path: Path, start: Callable[..., Ranks]
) -> None:
    """Its trainer's death is all that the keeper needs to know; and then all are killed."""
    run = start()
    run.begin_with_a_snapshot()
    killed = run.all[2]
    for one in run.all:
        one.do("take_without_end" if one is killed else "take", 20, 2)
    # What the ranks have not agreed on is stored meanwhile.
    until(lambda: [job.step for job in living()[0].seats[2].jobs] == [20], "the keeper has it")
    killed.kill()
    others = [one for one in run.all if one is not killed]
    assert [outcomes(one)[-1] for one in others] == [(20, "Unavailable"), (20, ""), (20, "")]
    assert "rank 2 could not store its part" in run.all[0].do("said")[-1]
    assert_joined(path, [10], RANKS)
    run.kill()
    # The part that was taken in vain is there, and so is the one before it, that is a snapshot's.
    heirs = start()
    held = heirs.held()
    for rank, found in enumerate(held):
        steps = [(one["step"], one["same"]) for one in found]
        assert (10, True) in steps, f"of rank {rank}"


def test_what_was_handed_over_outlives_all_and_each_gets_its_own_back(
    path: Path, start: Callable[..., Ranks]
) -> None:
    run = start()
    run.begin_with_a_snapshot()
    (status,) = living()
    os.kill(status.pid, signal.SIGSTOP)
    run.ask("take", 20, 2)
    run.kill()
    os.kill(status.pid, signal.SIGCONT)
    heirs = start()
    assert_each_gets_its_own_back(path, heirs)
    manifests = Chain(path).manifests(next(Chain(path).snapshots()))
    assert len(manifests) == RANKS
    assert living()[0].pid == status.pid
    # Whatever they read of the store, the keeper reads once for all.
    restored = heirs.ask("restore")
    assert restored == [restored[0]] * RANKS
    assert restored[0][0] == []  # type: ignore[index]
    heirs.begin()
    heirs.ask("take", 30, 1)
    heirs.ask("wait")
    assert_joined(path, [30, 20, 10], RANKS)
    heirs.kill()
    # Fewer come back: what they were handed over is done first, and the memory is let go of.
    fewer = start(2)
    assert fewer.held() == [[], []]
    fewer.begin()
    until(lambda: len(arenas_of(status.pid)) <= 2 * 2 * 2, "the memory of four ranks is given back")
    fewer.ask("take", 40, 1)
    fewer.ask("wait")
    (now,) = living()
    assert (now.pid, now.ranks, len(now.seats)) == (status.pid, 2, 2)
    newest = next(Chain(path).snapshots())
    assert (newest.step, len(newest.record.manifests)) == (40, 2)
    fewer.ask("close")
    until(lambda: dead(status.pid), "the keeper is gone")


def test_ranks_that_leave_the_keeper_with_what_it_has_lose_nothing(
    path: Path, start: Callable[..., Ranks]
) -> None:
    run = start()
    run.begin_with_a_snapshot()
    (status,) = living()
    os.kill(status.pid, signal.SIGSTOP)
    run.ask("take", 20, 2)
    told = run.ask("abandon")
    assert told == [told[0]] * RANKS
    (text,) = told[0]  # type: ignore[misc]
    assert text.startswith("Unavailable: this process left before the snapshot was durable; the keeper")
    assert_joined(path, [10], RANKS)
    os.kill(status.pid, signal.SIGCONT)
    heirs = start()  # The processes that have left live on.
    assert_each_gets_its_own_back(path, heirs)


def test_a_rank_that_closes_does_not_wait_for_the_others(path: Path, start: Callable[..., Ranks]) -> None:
    run = start()
    run.begin_with_a_snapshot()
    first, *others = run.all
    for one in others:
        assert one.do("close") is None
        assert one.do("warnings") == []
    (status,) = living()
    assert [seat.trainer for seat in status.seats if seat.trainer] == [first.process.pid]
    first.do("close")
    until(lambda: dead(status.pid), "the keeper is gone")


def kill_keepers() -> None:
    """There may be none just now."""
    for status in living():
        with suppress(ProcessLookupError):
            os.kill(status.pid, signal.SIGKILL)


@pytest.mark.slow
def test_ranks_and_keepers_that_are_killed_at_random(path: Path, start: Callable[..., Ranks]) -> None:
    """Whoever dies when: what is listed is whole, and what rank 0 was told of is listed."""
    rng = random.Random(7)
    step, told = 0, 0
    for _ in range(4):
        run = start()
        held = run.held()
        newest = next(iter(Chain(path).snapshots()), None)
        assert (newest.step if newest else 0) >= told
        for found in held:
            assert all(one["same"] or one["step"] < 0 for one in found)
        run.begin()
        for take in range(1, 4):
            step += 10
            for trainer in run.all:
                trainer.ask("take", step, take)
                if rng.random() < 0.1:
                    kill_keepers()
            for trainer in run.all:
                trainer.answer()
            if rng.random() < 0.5:
                told = max([told, *(at for at, error in run.ask("wait")[0] if not error)])  # type: ignore[attr-defined]
        # One dies a moment before the others, or all at once.
        rng.choice(run.all).kill()
        if rng.random() < 0.5:
            kill_keepers()
        run.kill()
    last = start()
    last.ask("settle")
    chain = Chain(path)
    steps = [snapshot.step for snapshot in chain.snapshots()]
    assert steps == sorted(set(steps), reverse=True)
    assert_joined(path, steps, RANKS)
    assert told > 0
    assert told in steps
    assert not verify(chain).findings
