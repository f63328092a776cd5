"""What several ranks of a machine read is read once."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from handing import DEADLINE_S
from test_seats import RANKS, Ranked, Run, running
from test_service import Running, path, start, until_left

from everstep.chain.history import Chain
from everstep.errors import Damaged, Unavailable
from everstep.format import keys
from everstep.keeper import protocol
from everstep.keeper.arena import Arena
from everstep.keeper.reading import LARGEST_BYTES, SMALLEST_BYTES, Range, Reading, SharedReads
from everstep.store.base import Distant, Entry
from everstep.store.memory import MemoryStore

__all__ = ["path", "running", "start"]

KEY = keys.pack("ab" * 32)
BYTES = random.Random(5).randbytes(4 * SMALLEST_BYTES)


class Counting(MemoryStore):
    """A store that may be waited for, and says what was read."""

    at_once = 7

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[Range] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.away = False
        self.put(KEY, [BYTES])

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        self.reads.append(Range(key, start, sum(map(len, buffers))))
        assert self.go_on.wait(DEADLINE_S)
        if self.away:
            raise Unavailable("it is away")
        return super().read_into(key, start, buffers)


@pytest.fixture
def store() -> Counting:
    return Counting()


@pytest.fixture
def reading(store: Counting) -> Iterator[Reading]:
    one = Reading(store, lambda: 3 * SMALLEST_BYTES)
    yield one
    store.go_on.set()
    one.close()


class Asking:
    """What is answered."""

    def __init__(self) -> None:
        self.found: bytes | None = None
        self.done = threading.Event()

    def __call__(self, descriptor: int | None) -> None:
        if descriptor is not None:
            arena = Arena.mapped(os.dup(descriptor))
            self.found = bytes(arena.memory)
            arena.close()
        self.done.set()

    def answer(self) -> bytes | None:
        assert self.done.wait(DEADLINE_S)
        return self.found


def asked(reading: Reading, at: int, size_bytes: int = SMALLEST_BYTES) -> bytes | None:
    asking = Asking()
    reading.ask(Range(KEY, at, size_bytes), asking)
    return asking.answer()


def test_all_who_ask_at_once_get_what_was_read_once(store: Counting, reading: Reading) -> None:
    store.go_on.clear()
    asking = [Asking() for _ in range(5)]
    for one in asking:
        reading.ask(Range(KEY, 8192, SMALLEST_BYTES), one)
    store.go_on.set()
    assert [one.answer() for one in asking] == [BYTES[8192 : 8192 + SMALLEST_BYTES]] * 5
    assert asked(reading, 8192) == BYTES[8192 : 8192 + SMALLEST_BYTES]
    assert len(store.reads) == 1


def test_no_more_is_kept_than_there_is_room_for(store: Counting, reading: Reading) -> None:
    for at in range(4):
        assert asked(reading, at * SMALLEST_BYTES) is not None
    assert len(store.reads) == 4
    # The one that nobody has asked for the longest is gone.
    for at in (1, 2, 3):
        asked(reading, at * SMALLEST_BYTES)
    assert len(store.reads) == 4
    asked(reading, 0)
    assert len(store.reads) == 5
    with reading._lock:  # It is tidied up right after it was answered.
        before = len(os.listdir("/proc/self/fd"))
    reading.forget()
    assert len(os.listdir("/proc/self/fd")) == before - 3


@pytest.mark.parametrize("wrong", ["away", "short", "missing"])
def test_what_cannot_be_read_is_left_to_who_asked(store: Counting, reading: Reading, wrong: str) -> None:
    store.away = wrong == "away"
    key = keys.pack("cd" * 32) if wrong == "missing" else KEY
    asking = Asking()
    start = len(BYTES) - 4096 if wrong == "short" else 0
    reading.ask(Range(key, start, SMALLEST_BYTES), asking)
    assert asking.answer() is None
    # And is tried again for the next.
    store.away = False
    assert asked(reading, 0) == BYTES[:SMALLEST_BYTES]


def test_only_packs_are_shared_and_neither_little_nor_too_much() -> None:
    assert Range(KEY, 0, SMALLEST_BYTES).shareable
    assert not Range(KEY, 0, SMALLEST_BYTES - 1).shareable
    assert not Range(KEY, 0, LARGEST_BYTES + 1).shareable
    assert not Range(keys.manifest("ab" * 32), 0, SMALLEST_BYTES).shareable


def test_what_the_keeper_does_not_give_comes_from_the_store(store: Counting) -> None:
    wanted: list[Range] = []

    def fetch(one: Range) -> Arena | None:
        wanted.append(one)
        if one.start:
            return None
        arena = Arena.shared(one.size_bytes)
        arena.memory[: one.size_bytes] = bytes(reversed(BYTES[: one.size_bytes]))
        return arena

    shared = SharedReads(store, fetch)
    buffers = [memoryview(bytearray(size)) for size in (100, SMALLEST_BYTES)]
    size = 100 + SMALLEST_BYTES
    assert shared.read_into(KEY, 0, buffers) == size
    assert b"".join(buffers) == bytes(reversed(BYTES[:size]))
    assert shared.read_into(KEY, 50, buffers) == size
    assert b"".join(buffers) == BYTES[50 : 50 + size]
    assert wanted == [Range(KEY, 0, size), Range(KEY, 50, size)]
    assert shared.read_into(KEY, 7, buffers[:1]) == 100
    assert store.reads == [Range(KEY, 50, size), Range(KEY, 7, 100)]
    # Everything else is the store's.
    assert isinstance(shared, Distant)
    assert (shared.at_once, shared.url) == (7, store.url)
    assert bytes(shared.get(KEY, 3, 5)) == BYTES[3:8]
    assert shared.put("a", [b"b"])
    assert [type(one) for one in shared.list("a")] == [Entry]
    shared.delete("a")
    assert not list(store.list("a"))


# -- with a service ----------------------------------------------------------------------------------------


def put_pack(path: Path) -> None:
    Chain(path).store.put(KEY, [BYTES])


def test_heirs_read_through_the_keeper(running: Running, path: Path) -> None:
    put_pack(path)
    heirs = [Ranked(running, rank) for rank in range(RANKS)]
    for heir in heirs:
        heir.settle()
        heir.say(protocol.Read(1, KEY, 4096, SMALLEST_BYTES))
        heir.say(protocol.Read(2, keys.pack("ef" * 32), 0, SMALLEST_BYTES))
    for heir in heirs:
        found: dict[int, list[Arena]] = {}
        for _ in range(2):
            message, descriptors = heir.hear(protocol.Got)
            found[message.number] = [Arena.opened(one) for one in descriptors]
        assert found[2] == []
        (arena,) = found[1]
        assert bytes(arena.memory) == BYTES[4096 : 4096 + SMALLEST_BYTES]
        arena.close()
        heir.connection.close()
    until_left(running)


@pytest.mark.parametrize(
    "message",
    [
        protocol.Read(1, "leases/main/1", 0, SMALLEST_BYTES),
        protocol.Read(1, KEY, 0, 1),
    ],
)
def test_what_is_not_to_be_shared_is_not_read(running: Running, path: Path, message: protocol.Read) -> None:
    heir = Ranked(running, 0)
    heir.settle()
    heir.say(message)
    assert isinstance(heir.refusal(), Damaged)
    heir.connection.close()
    until_left(running)


def test_a_trainer_at_work_does_not_read(running: Running, path: Path) -> None:
    run = Run(running, path)
    run.trainers[1].say(protocol.Read(1, KEY, 0, SMALLEST_BYTES))
    assert isinstance(run.trainers[1].refusal(), Damaged)
    run.die()
    until_left(running)
