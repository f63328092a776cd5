"""The service inside this process, with a clock of its own, and trainers that speak for themselves."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from handing import DEADLINE_S, GRID_BYTES, LAYOUT, assert_stored, job_of, state, until

from everstep.chain import packing
from everstep.chain.history import Chain
from everstep.chain.lease import Lease, newest
from everstep.errors import Conflict, Damaged, EverstepError, Unavailable, Unsupported
from everstep.format import keys
from everstep.keeper import protocol, service
from everstep.keeper.arena import Arena
from everstep.keeper.protocol import Connection, Message, Peer
from everstep.keeper.service import LINGER_S, START_S, Log, Service

Kind = TypeVar("Kind", bound=Message)


class Running:
    """A service in a thread."""

    def __init__(self, path: Path, directory: Path, **seams: Any) -> None:
        self.now = 1000.0
        self.address = str(directory / "socket")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.address)
        listener.listen(16)
        self.service = Service(Chain(path), listener, clock=lambda: self.now, **seams)
        self.thread = threading.Thread(target=self.service.run)
        self.thread.start()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.service.wake()

    def has_left(self) -> bool:
        self.thread.join(DEADLINE_S)
        return not self.thread.is_alive()


class Speaker:
    """A trainer that says just what it is told to."""

    def __init__(self, running: Running) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(running.address)
        self.connection = Connection(sock, protocol.TO_TRAINER)
        self.heard: list[tuple[Message, list[int]]] = []

    def say(self, *messages: Message) -> None:
        for message in messages:
            self.connection.send(message)

    def hear(self, kind: type[Kind]) -> tuple[Kind, list[int]]:
        """The next message of a kind."""
        while True:
            for number, (message, descriptors) in enumerate(self.heard):
                if isinstance(message, kind):
                    del self.heard[number]
                    return message, descriptors
            assert not self.connection.ended, f"let go of before a {kind.__name__} came"
            self._wait()

    def _wait(self) -> None:
        assert select.select([self.connection], [], [], DEADLINE_S)[0], "nothing came"
        self.heard += self.connection.receive()

    def refusal(self) -> EverstepError:
        error = self.hear(protocol.Refused)[0].problem.error()
        while not self.connection.ended:
            self._wait()
        return error

    def status(self) -> protocol.Status:
        self.say(protocol.Ask())
        return self.hear(protocol.Status)[0]

    def settle(self) -> str:
        self.say(protocol.Hello(protocol.VERSION, ""), protocol.Settle())
        snapshot, descriptors = self.hear(protocol.Settled)
        for descriptor in descriptors:
            os.close(descriptor)
        return snapshot.snapshot

    def begin(self, path: Path) -> None:
        self.settle()
        store = Chain(path).store
        Lease(
            store, newest(store)
        ).release()  # An earlier trainer of this test is dead, and this process lives.
        self.say(protocol.Begin("main", Lease.take(store).number, "", "all"))

    def arena(self, number: int = 1) -> Arena:
        self.say(protocol.Prepare(number, LAYOUT.arena_bytes))
        _, (descriptor,) = self.hear(protocol.Lent)
        return Arena.opened(descriptor)

    def take(self, step: int, arena: Arena, number: int = 1) -> None:
        arena.memory[: LAYOUT.arena_bytes] = state(step)
        self.say(submit(step), protocol.Fill(step, number, 0, LAYOUT.arena_bytes, ()), protocol.End(step, {}))


def submit(step: int) -> protocol.Submit:
    job = job_of(step)
    return protocol.Submit(step, protocol.Said.of(job.facts), job.values, (), protocol.pieces(job.layout))


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


def dead_trainer(running: Running, path: Path) -> None:
    """One that takes a snapshot and dies when it is durable."""
    trainer = Speaker(running)
    trainer.begin(path)
    arena = trainer.arena()
    trainer.take(1, arena)
    trainer.hear(protocol.Tidied)
    trainer.connection.close()
    arena.close()


def test_it_lingers_as_long_as_it_should(start: Callable[..., Running], path: Path) -> None:
    running = start()
    dead_trainer(running, path)
    asker = Speaker(running)
    until(lambda: bool(asker.status().held), "the trainer's death is noticed")
    running.pass_time(LINGER_S - 1)
    assert asker.status().held
    running.pass_time(2)
    assert running.has_left()
    asker.connection.close()


def test_who_asks_what_is_held_makes_it_stay(start: Callable[..., Running], path: Path) -> None:
    running = start()
    dead_trainer(running, path)
    heir = Speaker(running)
    held = heir.settle()
    assert held == next(Chain(path).snapshots()).id
    running.pass_time(10 * LINGER_S)
    assert heir.status().held == held
    # It goes without having begun: then the time counts anew.
    heir.connection.close()
    other = Speaker(running)
    running.pass_time(LINGER_S - 1)
    assert other.status().held == held
    other.connection.close()
    until_left(running)


def until_left(running: Running) -> None:
    def passed() -> bool:
        running.pass_time(LINGER_S)
        running.thread.join(0.01)
        return not running.thread.is_alive()

    until(passed, "it has left")


def test_with_nothing_held_it_does_not_stay(start: Callable[..., Running], path: Path) -> None:
    running = start()
    trainer = Speaker(running)
    trainer.begin(path)
    trainer.arena().close()
    trainer.connection.close()
    assert running.has_left()


def test_nobody_comes(start: Callable[..., Running]) -> None:
    running = start()
    asker = Speaker(running)
    running.pass_time(START_S - 1)
    assert asker.status().trainer == 0
    running.pass_time(2)
    assert running.has_left()
    asker.connection.close()


def test_after_a_goodbye_it_keeps_nothing(start: Callable[..., Running], path: Path) -> None:
    running = start()
    trainer = Speaker(running)
    trainer.begin(path)
    arena = trainer.arena()
    trainer.take(1, arena)
    trainer.say(protocol.Goodbye())
    assert running.has_left()
    assert_stored(path, [1])
    trainer.connection.close()
    arena.close()


def test_the_memory_of_a_dead_trainer_is_lent_to_the_next(start: Callable[..., Running], path: Path) -> None:
    running = start()
    dead_trainer(running, path)
    heir = Speaker(running)
    heir.begin(path)
    arena = heir.arena()
    assert bytes(arena.memory[: LAYOUT.arena_bytes]) == state(1)
    heir.take(2, arena)
    heir.hear(protocol.Tidied)
    heir.connection.close()
    arena.close()
    assert_stored(path, [2, 1])


def test_a_trainer_that_says_goodbye_in_the_middle(start: Callable[..., Running], path: Path) -> None:
    running = start()
    trainer = Speaker(running)
    trainer.begin(path)
    trainer.say(submit(1), protocol.Goodbye())
    assert running.has_left()
    assert_stored(path, [])
    trainer.connection.close()


def test_a_state_is_stored_while_it_is_being_filled(start: Callable[..., Running], path: Path) -> None:
    """What has arrived is put, and nothing is committed before the end is said."""
    running = start()
    trainer = Speaker(running)
    trainer.begin(path)
    arena = trainer.arena()
    half = 32 * GRID_BYTES
    data = state(1)
    trainer.say(submit(1), protocol.Fill(1, 1, 0, LAYOUT.arena_bytes, (), 0))
    arena.memory[:half] = data[:half]
    trainer.say(protocol.Arrived(1, half))
    arena.memory[half : LAYOUT.arena_bytes] = data[half:]
    trainer.say(protocol.Arrived(1, LAYOUT.arena_bytes))
    store = Chain(path).store
    until(lambda: any(store.list(keys.PACKS)), "the pack is put")
    assert trainer.status().jobs[0].phase == "storing"
    assert_stored(path, [])
    trainer.say(protocol.End(1, {}))
    trainer.hear(protocol.Tidied)
    trainer.connection.close()
    arena.close()
    assert_stored(path, [1])


@pytest.mark.parametrize("arrived", [0, 8192, LAYOUT.arena_bytes])
@pytest.mark.parametrize("how", ["dropped", "killed"])
def test_a_state_that_was_not_completed_is_none(
    start: Callable[..., Running], path: Path, arrived: int, how: str
) -> None:
    running = start(linger_s=0.0)
    trainer = Speaker(running)
    trainer.begin(path)
    arena = trainer.arena()
    arena.memory[: LAYOUT.arena_bytes] = state(1)
    trainer.say(submit(1), protocol.Fill(1, 1, 0, LAYOUT.arena_bytes, (), 0), protocol.Arrived(1, arrived))
    if how == "dropped":
        trainer.say(protocol.Drop(1))
        assert isinstance(trainer.hear(protocol.Done)[0].error(), Unavailable)
        assert trainer.hear(protocol.Freed)[0].arena == 1
        trainer.take(2, arena)
        trainer.hear(protocol.Tidied)
        trainer.hear(protocol.Tidied)
    trainer.connection.close()
    assert running.has_left()
    arena.close()
    assert_stored(path, [2] if how == "dropped" else [])


def test_an_arena_that_is_being_filled_is_not_lent_when_its_job_fails(
    start: Callable[..., Running], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "PACK_BYTES", GRID_BYTES)
    (path / "packs").write_bytes(b"no directory")
    running = start()
    trainer = Speaker(running)
    trainer.begin(path)
    arena = trainer.arena()
    trainer.say(submit(1), protocol.Fill(1, 1, 0, LAYOUT.arena_bytes, (), LAYOUT.arena_bytes - 4096))
    assert isinstance(trainer.hear(protocol.Done)[0].error(), Conflict)
    trainer.status()  # All that was said before it has been heard.
    assert not any(isinstance(message, protocol.Freed) for message, _ in trainer.heard)
    trainer.say(protocol.Arrived(1, LAYOUT.arena_bytes), protocol.End(1, {}))
    assert trainer.hear(protocol.Freed)[0].arena == 1
    trainer.connection.close()
    arena.close()
    assert_stored(path, [])


def test_it_answers_while_it_stores(start: Callable[..., Running], path: Path) -> None:
    running = start()
    trainer = Speaker(running)
    trainer.begin(path)
    trainer.say(submit(7))
    status = trainer.status()
    assert [(one.step, one.size_bytes) for one in status.jobs] == [(7, LAYOUT.arena_bytes)]
    assert (status.trainer, status.pid, status.chain) == (os.getpid(), os.getpid(), str(path))
    trainer.connection.close()


def test_another_user_is_not_listened_to(start: Callable[..., Running]) -> None:
    running = start(identify=lambda sock: Peer(os.getpid(), os.geteuid() + 1))
    stranger = Speaker(running)
    stranger.say(protocol.Hello(protocol.VERSION, ""), protocol.Ask())
    with pytest.raises(AssertionError, match="let go of"):
        stranger.hear(protocol.Status)
    stranger.connection.close()


def test_another_version_is_told_so_and_can_only_ask_and_send_it_away(
    start: Callable[..., Running], path: Path
) -> None:
    running = start()
    dead_trainer(running, path)
    other = Speaker(running)
    other.say(protocol.Hello("0.0.1/0", ""))
    assert other.hear(protocol.Welcome)[0].version == protocol.VERSION
    other.say(protocol.Settle())
    assert isinstance(other.refusal(), Unsupported)
    last = Speaker(running)
    last.say(protocol.Leave())
    assert running.has_left()
    for speaker in (other, last):
        speaker.connection.close()


def test_one_trainer_at_a_time(start: Callable[..., Running], path: Path) -> None:
    running = start()
    trainer, second, third = (Speaker(running) for _ in range(3))
    third.settle()
    trainer.begin(path)
    trainer.arena().close()
    second.say(protocol.Hello(protocol.VERSION, ""))
    assert second.hear(protocol.Welcome)[0].trainer == os.getpid()
    second.say(protocol.Settle())
    assert isinstance(second.refusal(), Conflict)
    third.say(protocol.Begin("main", 9, "", "all"))
    assert isinstance(third.refusal(), Conflict)
    trainer.take(1, trainer.arena(2), 2)
    trainer.hear(protocol.Tidied)
    for speaker in (trainer, second, third):
        speaker.connection.close()
    assert_stored(path, [1])


HUGE = LAYOUT.arena_bytes + 4096
WRONG: dict[str, list[Message]] = {
    "wave-of-no-job": [protocol.Fill(9, 1, 0, 4096, ())],
    "end-of-no-job": [protocol.End(9, {})],
    "drop-of-no-job": [protocol.Drop(9)],
    "wave-in-no-arena": [submit(1), protocol.Fill(1, 9, 0, 4096, ())],
    "wave-larger-than-its-arena": [submit(1), protocol.Fill(1, 1, 0, HUGE, ())],
    "wave-backwards": [submit(1), protocol.Fill(1, 1, 4096, 0, ())],
    "wave-after-a-gap": [submit(1), protocol.Fill(1, 1, 4096, 8192, ())],
    "ends-too-early": [submit(1), protocol.Fill(1, 1, 0, 4096, ()), protocol.End(1, {})],
    "filled-past-its-end": [submit(1), protocol.Fill(1, 1, 0, LAYOUT.arena_bytes, (), HUGE)],
    "a-part-that-is-being-filled": [submit(1), protocol.Fill(1, 1, 0, 4096, (), 0)],
    "ends-before-it-is-full": [
        submit(1),
        protocol.Fill(1, 1, 0, LAYOUT.arena_bytes, (), 0),
        protocol.Arrived(1, 4096),
        protocol.End(1, {}),
    ],
    "arrived-too-far": [
        submit(1),
        protocol.Fill(1, 1, 0, LAYOUT.arena_bytes, (), 0),
        protocol.Arrived(1, HUGE),
    ],
    "arrived-backwards": [
        submit(1),
        protocol.Fill(1, 1, 0, LAYOUT.arena_bytes, (), 8192),
        protocol.Arrived(1, 4096),
    ],
    "arrived-of-no-job": [protocol.Arrived(9, 4096)],
    "job-twice": [submit(1), submit(1)],
    "arena-twice": [protocol.Prepare(1, 4096)],
    "no-layout": [
        protocol.Submit(1, protocol.Said.of(job_of(1).facts), b"", (), None),
    ],
    "what-the-keeper-says": [protocol.Warned("hm")],
}


@pytest.mark.parametrize("messages", WRONG.values(), ids=WRONG.keys())
def test_what_contradicts_itself_ends_the_connection(
    start: Callable[..., Running], path: Path, messages: list[Message]
) -> None:
    running = start()
    trainer = Speaker(running)
    trainer.begin(path)
    arena = trainer.arena()
    trainer.say(*messages)
    assert isinstance(trainer.refusal(), Damaged | Unsupported)
    trainer.connection.close()
    arena.close()
    assert running.has_left()
    assert_stored(path, [])


def test_memory_that_could_be_cut_is_not_taken(start: Callable[..., Running], path: Path) -> None:
    running = start()
    trainer = Speaker(running)
    trainer.begin(path)
    loose = os.memfd_create("loose")
    os.ftruncate(loose, 4096)
    trainer.connection.send(protocol.Bring(1), (loose,))
    assert "of other memory" in str(trainer.refusal())
    os.close(loose)
    trainer.connection.close()


def test_who_asks_and_does_not_listen_is_let_go(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MAX_UNSENT_BYTES", 10_000)
    running = start()
    deaf = Speaker(running)
    asks = protocol.encode(protocol.Ask()) * 1000

    def is_let_go() -> bool:
        deaf.connection.send_frame(asks)
        poll = select.poll()
        poll.register(deaf.connection, 0)
        return bool(poll.poll(0))

    until(is_let_go, "it is let go of")
    deaf.connection.close()
    assert Speaker(running).status().pid == os.getpid()


def test_the_log_does_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "LOG_BYTES", 1000)
    descriptor = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    log = Log(descriptor)
    for number in range(500):
        print(f"line {number}", file=log)
    assert (tmp_path / "log").stat().st_size < 1100
    assert (tmp_path / "log").read_text().endswith("line 499\n")
    os.close(descriptor)
