"""Replicas follow beside the keeper: nothing waits for them, and they get all in the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from handing import DEADLINE_S, GRID_BYTES, LAYOUT, assert_stored, hand_over, state, stored, until
from test_service import Running, Speaker, submit, until_left

from everstep.chain import lease as leases
from everstep.chain.history import Chain
from everstep.chain.lease import Lease
from everstep.chain.mirror import Mirror
from everstep.chain.retention import Keep
from everstep.chain.verify import verify
from everstep.errors import Fenced, NotFound, Unavailable
from everstep.events import Event, Returned, Warned
from everstep.format import keys
from everstep.keeper import protocol
from everstep.keeper.arena import Arena
from everstep.keeper.base import Followed, Outcome, Standings, Terms
from everstep.keeper.following import FIRST_PAUSE_S, LONGEST_PAUSE_S, Follower
from everstep.keeper.service import LINGER_S
from everstep.keeper.thread import ThreadKeeper
from everstep.store.base import Buffer, Store
from everstep.store.memory import MemoryStore
from everstep.testing.faults import FaultyStore


@pytest.fixture
def chain() -> Chain:
    return Chain.create(MemoryStore("first"), GRID_BYTES)


class Gate(FaultyStore):
    """Puts of packs wait until it is opened; while `away` nothing is answered."""

    def __init__(self, inner: Store, closed: bool = False) -> None:
        super().__init__(inner)
        self.away = False
        self.waiting = threading.Event()
        self.open = threading.Event()
        if not closed:
            self.open.set()

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        if key.startswith(keys.PACKS):
            self.waiting.set()
            assert self.open.wait(DEADLINE_S)
        return super().put(key, parts)

    def _strikes(self, verb: str) -> bool:
        if self.away:
            raise Unavailable("it is away")
        return False


class Trainer:
    """One with a thread for a keeper."""

    def __init__(self, chain: Chain, *replicas: Store, keep: str = "all") -> None:
        self.chain = chain
        self.events: list[Event] = []
        self.fenced: list[BaseException] = []
        self.outcomes: list[Outcome] = []
        self.standings = Standings(
            chain.url, [one.url for one in replicas], self.events.append, self.fenced.append
        )
        self.keeper = ThreadKeeper(
            chain, self._outcome, lambda text: self.events.append(Warned(text)), replicas, self.standings.told
        )
        self.lease = Lease.take(chain.store)
        self.keeper.begin(Terms("main", self.lease.number, "", keep))

    def _outcome(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        if outcome.snapshot is not None:
            self.standings.took(outcome.snapshot)

    def take(self, step: int) -> Any:
        job = hand_over(self.keeper, step)
        job.pending.standings = self.standings
        return job.pending

    def close(self) -> None:
        self.keeper.close()
        self.lease.release()

    def told(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


def steps_of(store: Store) -> list[int]:
    chain = Chain(store)
    found = list(chain.snapshots())
    assert all(stored(chain, one) == state(one.step, LAYOUT) for one in found)
    assert verify(chain).findings == []
    return [one.step for one in found]


def test_a_replica_gets_what_is_committed(chain: Chain) -> None:
    replica = MemoryStore("replica")
    trainer = Trainer(chain, replica)
    for step in (1, 2, 3):
        pending = trainer.take(step)
    assert pending.durable(replica.url, DEADLINE_S)
    assert steps_of(replica) == [3, 2, 1]
    assert trainer.standings.unsent() == {}
    assert trainer.standings.behind(7) == ((replica.url, 4),)
    trainer.close()


def test_a_replica_that_hangs_holds_nothing_up(chain: Chain) -> None:
    replica = Gate(MemoryStore("replica"), closed=True)
    trainer = Trainer(chain, replica)
    first = trainer.take(1)
    assert first.durable(timeout=DEADLINE_S)
    assert replica.waiting.wait(DEADLINE_S)
    for step in (2, 3, 4, 5):
        # Both arenas are given back although nothing was sent.
        assert trainer.take(step).durable(timeout=DEADLINE_S)
    assert not first.durable(replica.url, 0)
    assert trainer.keeper.wait(DEADLINE_S)
    assert trainer.standings.unsent() == {replica.url: 5}
    assert not trainer.standings.settle(0)
    replica.open.set()
    assert trainer.standings.settle(DEADLINE_S)
    assert steps_of(replica.inner) == [5, 4, 3, 2, 1]
    trainer.close()


def test_each_replica_is_waited_for_by_name(chain: Chain) -> None:
    quick, slow = MemoryStore("quick"), Gate(MemoryStore("slow"), closed=True)
    trainer = Trainer(chain, quick, slow)
    pending = trainer.take(1)
    assert pending.durable(quick.url, DEADLINE_S)
    assert not pending.durable("all", 0)
    assert pending.durable(chain.url, DEADLINE_S)
    assert pending.durable(DEADLINE_S), "a number is a timeout"
    assert pending.durable(None, DEADLINE_S)
    with pytest.raises(NotFound, match="no replica of this run; they are memory://quick, memory://slow"):
        pending.durable("memory://other", 0)
    slow.open.set()
    assert pending.durable("all", DEADLINE_S)
    trainer.close()


def follower(chain: Chain, target: Store, number: int, told: list[Followed]) -> Follower:
    return Follower(
        Mirror(chain, target, "main", number), target.url, Keep.parse("all"), told.append, lambda text: None
    )


def test_one_that_is_away_is_tried_later_and_later_and_told_of_once(chain: Chain) -> None:
    trainer = Trainer(chain)
    trainer.take(1).durable(timeout=DEADLINE_S)
    events: list[Event] = []
    target = Gate(MemoryStore("replica"))
    standings = Standings(chain.url, [target.url], events.append)
    told: list[Followed] = []
    one = follower(chain, target, trainer.lease.number, told)
    target.away = True
    pauses = []
    for _ in range(9):
        assert not one.once()
        pauses.append(one.pause_s)
    assert pauses == [min(FIRST_PAUSE_S * 2**number, LONGEST_PAUSE_S) for number in range(9)]
    target.away = False
    trainer.take(2).durable(timeout=DEADLINE_S)
    assert one.once()
    assert one.pause_s == 0
    for followed in told:
        standings.told(followed)
    assert [type(event) for event in events] == [Warned, Returned]
    assert "gets nothing now (it is away)" in str(events[0])
    assert steps_of(target.inner) == [2, 1]
    trainer.close()


def test_one_that_was_away_catches_up_in_a_later_run(chain: Chain) -> None:
    replica = Gate(MemoryStore("replica"))
    replica.away = True
    trainer = Trainer(chain, replica)
    for step in (1, 2):
        assert trainer.take(step).durable(timeout=DEADLINE_S)
    until(lambda: trainer.told(Warned) != [], "it is told")
    assert trainer.standings.settle(DEADLINE_S), "who is away is not waited for"
    trainer.close()
    assert list(replica.inner.list()) == []
    replica.away = False
    later = Trainer(chain, replica)
    until(lambda: later.standings.behind(2) == ((replica.url, 0),), "it caught up")
    assert steps_of(replica.inner) == [2, 1]
    later.close()


def test_retention_follows(chain: Chain) -> None:
    replica = MemoryStore("replica")
    trainer = Trainer(chain, replica, keep="last 2")
    for step in range(1, 6):
        assert trainer.take(step).durable(replica.url, DEADLINE_S)
    until(lambda: len(list(replica.list(keys.HEADS))) == 2, "it is pruned")
    trainer.close()
    assert steps_of(replica) == steps_of(chain.store) == [5, 4]


def test_a_run_that_was_taken_over_through_a_replica_stops(chain: Chain) -> None:
    replica = MemoryStore("replica")
    trainer = Trainer(chain, replica)
    assert trainer.take(1).durable(replica.url, DEADLINE_S)
    other = leases._owner(0, trainer.lease.number + 1, "main")
    replica.put(other.key, [b"another host's"])
    second = trainer.take(2)
    assert second.durable(timeout=DEADLINE_S), "it was committed before anybody could know"
    until(lambda: trainer.fenced != [], "it is told")
    with pytest.raises(Fenced):
        second.durable(replica.url, DEADLINE_S)
    third = trainer.take(3)
    with pytest.raises(Fenced, match="by way of memory://replica"):
        third.durable(timeout=DEADLINE_S)
    trainer.close()
    assert steps_of(chain.store) == [2, 1]


# -- the keeper process ------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    Chain.create(tmp_path / "chain", GRID_BYTES)
    return tmp_path / "chain"


@pytest.fixture
def start(path: Path, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def make(**seams: Any) -> Running:
        started.append(Running(path, tmp_path, **seams))
        return started[-1]

    yield make
    for running in started:
        running.service.leave()
        assert running.has_left()


_arenas: list[Arena] = []


@pytest.fixture(autouse=True)
def _no_arena_is_left() -> Iterator[None]:
    yield
    while _arenas:
        _arenas.pop().close()


class Replicated:
    """A trainer of a keeper process, with a replica that the test has a hand on."""

    def __init__(self, running: Running, path: Path, target: Store, patch: pytest.MonkeyPatch) -> None:
        patch.setattr("everstep.keeper.work.open_store", lambda address: target)
        self.running = running
        self.speaker = Speaker(running)
        self.speaker.settle()
        self.lease = Lease.take(Chain(path).store)
        terms = Terms("main", self.lease.number, "", "all", replicas=(("there", "there"),))
        self.speaker.say(protocol.Begin.under(terms))
        self.arena = self.speaker.arena()
        _arenas.append(self.arena)

    def take(self, step: int) -> None:
        self.arena.memory[: LAYOUT.arena_bytes] = state(step)
        fill = protocol.Fill(step, 1, 0, LAYOUT.arena_bytes, ())
        self.speaker.say(submit(step), fill, protocol.End(step, {}))
        self.speaker.hear(protocol.Tidied)


def test_a_keeper_goes_on_sending_when_its_trainer_is_done(
    start: Callable[..., Running], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start()
    target = Gate(MemoryStore("there"), closed=True)
    trainer = Replicated(running, path, target, monkeypatch)
    trainer.take(1)
    assert target.waiting.wait(DEADLINE_S)
    trainer.speaker.say(protocol.Goodbye())
    trainer.lease.release()
    asker = Speaker(running)
    until(lambda: not asker.status().trainer, "the trainer is gone")
    status = asker.status()
    assert status.held == "", "nobody comes for it"
    assert list(status.unsent) == ["there"]
    running.pass_time(LINGER_S - 1)
    assert asker.status().pid
    target.open.set()
    assert running.has_left()
    assert steps_of(target.inner) == [1]
    assert leases.newest(target.inner) == trainer.lease.number + 1, "the lease was released there too"
    asker.connection.close()


def test_a_keeper_does_not_wait_for_ever_for_a_replica(
    start: Callable[..., Running], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start()
    target = Gate(MemoryStore("there"))
    target.away = True
    trainer = Replicated(running, path, target, monkeypatch)
    trainer.take(1)
    assert trainer.speaker.hear(protocol.Stands)[0].problem
    trainer.speaker.say(protocol.Goodbye())
    asker = Speaker(running)
    until(lambda: not asker.status().trainer, "the trainer is gone")
    until_left(running)  # Its patience begins when the trainer's work is done, which may be later than now.
    assert_stored(path, [1])
    asker.connection.close()


def test_the_next_trainer_takes_the_sending_over(
    start: Callable[..., Running], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start()
    target = Gate(MemoryStore("there"), closed=True)
    trainer = Replicated(running, path, target, monkeypatch)
    trainer.take(1)
    assert target.waiting.wait(DEADLINE_S)
    trainer.speaker.connection.close()
    trainer.lease.release()
    following = Replicated(running, path, target, monkeypatch)
    target.open.set()
    following.take(2)
    stands = protocol.Stands("there")
    while stands.step != 2:
        stands, _ = following.speaker.hear(protocol.Stands)
    assert steps_of(target.inner) == [2, 1]
    assert leases.newest(target.inner) == following.lease.number
    following.speaker.say(protocol.Goodbye())
    assert running.has_left()


def test_how_a_replica_stands_travels_as_it_is() -> None:
    for followed in (
        Followed("s3://b/x", "ab" * 32, 7, 2),
        Followed("s3://b/x", problem="it is away"),
        Followed("s3://b/x", problem="taken", fenced=Fenced("taken", kept="all", next="log")),
    ):
        message = protocol.Stands.of(followed)
        frame = protocol.encode(message)
        back = protocol.TO_TRAINER.decode(frame[4:])
        assert isinstance(back, protocol.Stands)
        assert replace(back.followed(), fenced=None) == replace(followed, fenced=None)
        assert str(back.followed().fenced) == str(followed.fenced)
