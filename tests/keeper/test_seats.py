"""Seats of many ranks in a service inside this process, with a clock of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from handing import assert_joined, job_of, laid_of, state, until
from test_service import Running, Speaker, path, start, until_left

from everstep.chain.history import Chain
from everstep.chain.lease import Lease
from everstep.chain.parts import Part
from everstep.errors import Conflict, Damaged, Unavailable
from everstep.format import keys
from everstep.keeper import protocol
from everstep.keeper.arena import Arena
from everstep.keeper.service import LINGER_S, START_S

__all__ = ["path", "start"]

RANKS = 3


class Ranked(Speaker):
    """The trainer of one of several ranks, which says just what it is told to."""

    def __init__(self, running: Running, rank: int, ranks: int = RANKS) -> None:
        super().__init__(running)
        self.rank, self.ranks = rank, ranks
        self.layout = laid_of(rank, ranks)
        self.held: list[Arena] = []

    def settle(self) -> tuple[str, ...]:  # type: ignore[override]
        """The names of the parts that are held."""
        self.say(protocol.Hello(protocol.VERSION, ""), protocol.Settle(self.rank, self.ranks))
        settled, descriptors = self.hear(protocol.Settled)
        self.held = [Arena.opened(descriptor) for descriptor in descriptors]
        assert settled.snapshot == ""
        return settled.parts

    def begin_under(self, lease: Lease, deadline_s: float = 600.0) -> None:
        terms = {"rank": self.rank, "ranks": self.ranks, "deadline_s": deadline_s}
        self.say(protocol.Begin("main", lease.number, "", "all", **terms))  # type: ignore[arg-type]

    def arena(self, number: int = 1) -> Arena:
        self.say(protocol.Prepare(number, self.layout.arena_bytes))
        _, (descriptor,) = self.hear(protocol.Lent)
        return Arena.opened(descriptor)

    def submit(self, step: int, take: int) -> None:
        job = job_of(step, self.layout)
        self.say(
            protocol.Submit(
                step, protocol.Said.of(job.facts), job.values, (), protocol.pieces(job.layout), take=take
            )
        )

    def store(self, step: int, take: int, arena: Arena, number: int = 1) -> None:
        arena.memory[: self.layout.arena_bytes] = state(step, self.layout)
        self.submit(step, take)
        size = self.layout.arena_bytes
        self.say(protocol.Fill(step, number, 0, size, ()), protocol.End(step, {}))


class Run:
    """Trainers of all ranks, each with an arena."""

    def __init__(self, running: Running, path: Path, ranks: int = RANKS, deadline_s: float = 600.0) -> None:
        self.trainers = [Ranked(running, rank, ranks) for rank in range(ranks)]
        for trainer in self.trainers:
            trainer.settle()
        self.lease = Lease.take(Chain(path).store)
        for trainer in self.trainers:
            trainer.begin_under(self.lease, deadline_s)
        self.arenas = [trainer.arena() for trainer in self.trainers]

    def take(self, step: int, take: int) -> None:
        for trainer, arena in zip(self.trainers, self.arenas, strict=True):
            trainer.store(step, take, arena)

    def taken(self) -> list[protocol.Done]:
        done = [trainer.hear(protocol.Done)[0] for trainer in self.trainers]
        for trainer in self.trainers:
            trainer.hear(protocol.Tidied)
        return done

    def die(self, *ranks: int) -> None:
        for rank in ranks or range(len(self.trainers)):
            self.trainers[rank].connection.close()
            self.arenas[rank].close()


@pytest.fixture
def running(start: Callable[..., Running]) -> Running:
    return start()


@pytest.fixture
def asker(running: Running) -> Iterator[Speaker]:
    one = Speaker(running)
    yield one
    one.connection.close()


def seats(asker: Speaker) -> list[tuple[int, bool, int]]:
    """By rank, whether it has a trainer, and how much it holds."""
    return [(seat.rank, bool(seat.trainer), len(seat.held)) for seat in asker.status().seats]


def test_all_ranks_are_served_by_one_process(running: Running, path: Path, asker: Speaker) -> None:
    run = Run(running, path)
    run.take(10, 1)
    first, *others = run.taken()
    assert first.taken() is not None
    for rank, done in enumerate(others, 1):
        assert done.error() is None
        assert done.part is not None
        assert isinstance(done.part.part(), Part)
        assert (done.part.rank, done.part.ranks) == (rank, RANKS)
    status = asker.status()
    assert (status.ranks, status.trainer, status.arenas) == (
        RANKS,
        os.getpid(),
        tuple(size for seat in status.seats for size in seat.arenas),
    )
    for trainer in run.trainers:
        trainer.say(protocol.Goodbye())
    assert running.has_left()
    assert_joined(path, [10], RANKS)
    run.die()


def test_a_death_only_orphans_its_seat(running: Running, path: Path, asker: Speaker) -> None:
    run = Run(running, path)
    run.take(10, 1)
    run.taken()
    run.die(1)
    until(lambda: seats(asker) == [(0, True, 0), (1, False, 1), (2, True, 0)], "its death is noticed")
    # Nobody comes for what it holds: it is given back, although the others go on.
    running.pass_time(LINGER_S - 1)
    assert len(seats(asker)) == RANKS
    running.pass_time(2)
    until(lambda: seats(asker) == [(0, True, 0), (2, True, 0)], "its memory is given back")
    # A trainer of the rank may come all the same.
    heir = Ranked(running, 1)
    assert heir.settle() == ()
    heir.begin_under(run.lease)
    arena = heir.arena()
    for rank, one in ((0, run.trainers[0]), (2, run.trainers[2]), (1, heir)):
        one.store(30, 3, arena if rank == 1 else run.arenas[rank])
    assert run.trainers[0].hear(protocol.Done)[0].taken() is not None
    heir.connection.close()
    arena.close()
    run.die()
    assert_joined(path, [30, 10], RANKS)
    until_left(running)


def test_the_death_of_a_rank_is_told_to_rank_0(running: Running, path: Path) -> None:
    run = Run(running, path)
    run.take(10, 1)
    run.taken()
    # It dies before it has heard of the next take, and in the middle of one.
    run.trainers[2].submit(20, 2)
    run.die(2)
    for rank in (0, 1):
        run.trainers[rank].store(20, 2, run.arenas[rank])
    error = run.trainers[0].hear(protocol.Done)[0].error()
    assert isinstance(error, Unavailable)
    assert error.away
    assert "rank 2 could not store its part" in str(error)
    for rank in (0, 1):
        run.trainers[rank].hear(protocol.Tidied)
        run.trainers[rank].store(30, 3, run.arenas[rank])
    assert "its process died" in str(run.trainers[0].hear(protocol.Done)[0].error())
    assert_joined(path, [10], RANKS)
    run.die()
    until_left(running)


def test_who_says_goodbye_withdraws_from_nothing(running: Running, path: Path) -> None:
    run = Run(running, path)
    run.take(10, 1)
    run.taken()
    for trainer in run.trainers:
        trainer.say(protocol.Goodbye())
    assert running.has_left()
    assert list(Chain(path).store.list(keys.PARTS)) == []
    run.die()


def test_each_rank_s_next_trainer_gets_its_own(running: Running, path: Path, asker: Speaker) -> None:
    run = Run(running, path)
    run.take(10, 1)
    run.die()
    until(lambda: not asker.status().trainer, "they are dead")
    heirs = [Ranked(running, rank) for rank in range(RANKS)]
    snapshot = None
    for heir in heirs:
        (name,) = heir.settle()
        snapshot = snapshot or next(Chain(path).snapshots())
        assert name == snapshot.record.manifests[heir.rank]
        (arena,) = heir.held
        assert bytes(arena.memory[: heir.layout.arena_bytes]) == state(10, heir.layout)
        arena.close()
    # They stay as long as somebody may want to be the next trainer, whoever it is.
    running.pass_time(10 * LINGER_S)
    assert seats(asker) == [(rank, False, 1) for rank in range(RANKS)]
    heirs[0].connection.close()
    running.pass_time(10 * LINGER_S)
    assert seats(asker) == [(rank, False, 1) for rank in range(RANKS)]
    for heir in heirs[1:]:
        heir.connection.close()
    until_left(running)


def test_who_comes_back_elsewhere_leaves_no_memory_here(running: Running, path: Path, asker: Speaker) -> None:
    run = Run(running, path)
    run.take(10, 1)
    run.die()
    until(lambda: not any(seat.jobs or seat.trainer for seat in asker.status().seats), "all is done")
    back = Ranked(running, 1)
    back.settle()
    run.lease.release()
    lease = Lease.take(Chain(path).store)
    back.begin_under(lease)
    back.arena().close()
    assert seats(asker) == [(0, False, 1), (1, True, 0), (2, False, 1)]
    running.pass_time(START_S + 1)
    until(lambda: seats(asker) == [(1, True, 0)], "the others are not waited for any more")
    back.connection.close()
    lease.release()
    until_left(running)


def test_another_number_of_ranks_waits_for_all_and_gets_nothing(
    running: Running, path: Path, asker: Speaker
) -> None:
    run = Run(running, path)
    run.take(10, 1)
    run.die()
    until(lambda: not asker.status().trainer, "they are dead")
    heir = Ranked(running, 1, 2)
    assert heir.settle() == ()
    assert_joined(path, [10], RANKS)
    assert len(seats(asker)) == RANKS, "nothing is let go of before it begins"
    other = Ranked(running, 0, 2)
    other.settle()
    run.lease.release()
    lease = Lease.take(Chain(path).store)
    for one in (heir, other):
        one.begin_under(lease)
        one.arena().close()
    assert seats(asker) == [(0, True, 0), (1, True, 0)]
    assert asker.status().ranks == 2
    lease.release()
    for one in (heir, other):
        one.connection.close()
    until_left(running)


def test_a_rank_has_one_trainer_and_a_run_one_number_of_ranks(running: Running, path: Path) -> None:
    run = Run(running, path)
    for rank, ranks, shown in (
        (1, RANKS, f"as rank 1 of {RANKS}"),
        (0, 1, "as rank 0 of 3"),
        (3, 4, "rank 0"),
    ):
        second = Ranked(running, rank, ranks)
        second.say(protocol.Hello(protocol.VERSION, ""), protocol.Settle(rank, ranks))
        error = second.refusal()
        assert isinstance(error, Conflict)
        assert shown in str(error)
        second.connection.close()
    run.take(10, 1)
    run.taken()
    run.die()
    until_left(running)


def test_a_rank_that_begins_as_another_is_refused(running: Running, path: Path) -> None:
    one = Ranked(running, 1)
    one.settle()
    one.rank = 2
    one.begin_under(Lease.take(Chain(path).store))
    assert isinstance(one.refusal(), Damaged)
    one.connection.close()


def test_who_waits_for_rank_0_does_not_wait_for_its_deadline(
    running: Running, path: Path, asker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ranks on other machines this one is told nothing: they may have died with their keepers."""
    monkeypatch.setattr("everstep.keeper.joining.HURRY_S", 0.0)
    run = Run(running, path)
    for rank in (0, 1):
        run.trainers[rank].store(10, 1, run.arenas[rank])
    run.trainers[1].hear(protocol.Done)
    run.die(0, 1)
    until(
        lambda: [seat.trainer > 0 for seat in asker.status().seats] == [False, False, True], "they are dead"
    )
    heir = Ranked(running, 0)
    assert heir.settle() == ()
    assert list(Chain(path).snapshots()) == []
    heir.connection.close()
    run.die(2)
    until_left(running)


def test_ranks_and_deadlines_that_cannot_be_are_no_message() -> None:
    begin = protocol.Begin("main", 1, "", "all", rank=2, ranks=3, deadline_s=0.5)
    for message in (protocol.Settle(2, 3), begin):
        told = msgspec.msgpack.decode(protocol.encode(message)[4:])
        assert protocol.TO_KEEPER.decode(msgspec.msgpack.encode(told)) == message
        for wrong in ({"rank": 3}, {"ranks": 0}, {"rank": -1}, {"ranks": 1 << 16}, {"deadline_s": "soon"}):
            with pytest.raises(Damaged):
                protocol.TO_KEEPER.decode(msgspec.msgpack.encode({**told, "type": "begin", **LEAST, **wrong}))
    for deadline_s in (-1.0, float("nan"), float("inf")):
        frame = msgspec.msgpack.encode({"type": "begin", **LEAST, "deadline_s": deadline_s})
        with pytest.raises(Damaged):
            protocol.TO_KEEPER.decode(frame)


LEAST = {"branch": "main", "lease": 1, "parent": "", "keep": "all", "rank": 2, "ranks": 3}
