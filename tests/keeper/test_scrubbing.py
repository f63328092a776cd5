"""The keeper scrubs beside a run: slowly, out of the way, and what it finds is told."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from handing import DEADLINE_S, GRID_BYTES, begun, hand_over, until
from test_service import Running, Speaker

from everstep.chain.history import Chain
from everstep.chain.lease import Lease
from everstep.chain.remembering import Checks, Memory
from everstep.chain.scrub import SAVED_EVERY_S
from everstep.errors import Unavailable
from everstep.format import keys
from everstep.keeper import protocol
from everstep.keeper.base import Terms
from everstep.keeper.scrubbing import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    MAX_TOLD,
    OTHER_S,
    REST_S,
    Scrubber,
    Scrubbing,
    Stopped,
)
from everstep.keeper.thread import ThreadKeeper
from everstep.store.base import Buffer, Store
from everstep.store.memory import MemoryStore
from everstep.store.parity import ParityStore
from everstep.store.patience import Clock
from everstep.store.shards import Shape

RATE = 1_000_000


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


class Stage(MemoryStore):
    """Tells of each read of a pack, which waits until it may go on; may be away."""

    def __init__(self, name: str = "stage") -> None:
        super().__init__(name)
        self.away = ""
        self.reads = 0
        self.was_read = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        if self.away:
            raise Unavailable(self.away)
        if key.startswith(keys.PACKS):
            self.reads += 1
            self.was_read.set()
            assert self.go_on.wait(DEADLINE_S)
        return super().get(key, start, size_bytes)


class Scrubbed:
    """A chain, and its scrubber with time of its own, which passes by being slept away."""

    def __init__(self, store: Store, steps: int = 3) -> None:
        self.chain = Chain.create(store, GRID_BYTES)
        filled(self.chain, steps)
        self.warnings: list[str] = []
        self.now = 0.0
        self.stop_at = float("inf")
        self.stops_when_told = False
        clock = Clock(now=lambda: self.now, sleep=self._sleep)
        self.scrubber = Scrubber(self.chain, RATE, self.warnings.append, clock, wall=lambda: 1e9 + self.now)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self.stop_at or (self.stops_when_told and self.warnings):
            raise Stopped

    @property
    def passes(self) -> int:
        return Memory(self.chain).load().passes


def filled(chain: Chain, steps: int) -> None:
    keeper = ThreadKeeper(chain, lambda outcome: None, lambda text: None)
    lease = begun(keeper, chain)
    for step in range(1, steps + 1):
        hand_over(keeper, step)
    keeper.close()
    lease.release()


def packs(store: Store) -> list[str]:
    return [entry.key for entry in store.list(keys.PACKS)]


def flip(store: Store, key: str, at: int = 5) -> None:
    data = bytearray(store.get(key))
    data[at] ^= 1
    store.delete(key)
    store.put(key, [bytes(data)])


# -- passes ------------------------------------------------------------------------------------------------


def test_a_day_lies_between_two_passes_whoever_made_the_last() -> None:
    stage = Scrubbed(MemoryStore())
    assert stage.scrubber.once() == REST_S
    stored = sum(entry.size_bytes for entry in stage.chain.store.list())
    assert stage.now >= stored / RATE
    assert (stage.passes, stage.warnings) == (1, [])
    before = stage.now
    stage.now += REST_S - 10
    assert stage.scrubber.once() == pytest.approx(10)
    assert (stage.passes, stage.now) == (1, before + REST_S - 10)
    stage.now += 10
    assert stage.scrubber.once() == REST_S
    assert stage.passes == 2


def test_of_two_keepers_on_a_machine_one_scrubs() -> None:
    stage = Scrubbed(MemoryStore())
    with Memory(stage.chain).alone() as alone:
        assert alone
        assert stage.scrubber.once() == OTHER_S
        assert (stage.passes, stage.now) == (0, 0.0)
    assert stage.scrubber.once() == REST_S
    assert stage.passes == 1
    with Memory(stage.chain).alone() as alone:
        assert alone, "it has let go"


def test_a_wall_clock_that_was_set_back_does_not_put_it_off_for_years() -> None:
    stage = Scrubbed(MemoryStore())
    Memory(stage.chain).save(Checks(passes=4, passed_at=9e9))
    assert stage.scrubber.once() == REST_S


def test_what_it_finds_is_told_at_once_and_once() -> None:
    stage = Scrubbed(MemoryStore())
    first = packs(stage.chain.store)[0]
    flip(stage.chain.store, first)
    before = {entry.key: bytes(stage.chain.store.get(entry.key)) for entry in stage.chain.store.list()}
    stage.stops_when_told = True
    with pytest.raises(Stopped):
        stage.scrubber.once()
    stage.stops_when_told = False
    (told,) = stage.warnings
    assert first in told
    assert told.endswith(f"Next: everstep -r {stage.chain.url} repair")
    stage.scrubber.once()
    stage.now += REST_S
    stage.scrubber.once()
    assert stage.passes == 2
    assert stage.warnings == [told]
    after = {entry.key: bytes(stage.chain.store.get(entry.key)) for entry in stage.chain.store.list()}
    assert before == after


def test_what_is_missing_is_told_with_what_it_takes_along() -> None:
    stage = Scrubbed(MemoryStore(), steps=2)
    head = stage.chain.find("head")
    stage.chain.store.delete(keys.manifest(head.record.manifests[0]))
    stage.scrubber.once()
    (told,) = stage.warnings
    assert keys.manifest(head.record.manifests[0]) in told
    assert f"takes the snapshots {head.short} with it" in told


def test_a_bad_disk_does_not_fill_the_log() -> None:
    stage = Scrubbed(MemoryStore(), steps=MAX_TOLD + 5)
    for key in packs(stage.chain.store):
        flip(stage.chain.store, key)
    stage.scrubber.once()
    assert len(stage.warnings) == MAX_TOLD + 1
    assert f"more than {MAX_TOLD} damaged" in stage.warnings[-1]
    assert stage.warnings[-1].endswith("verify")


def test_an_interrupted_pass_is_gone_on_with_but_what_it_found_is_found_again() -> None:
    stage = Scrubbed(MemoryStore(), steps=8)
    total = sum(entry.size_bytes for entry in stage.chain.store.list(keys.PACKS))
    stage.scrubber._bytes_per_s = total / (20 * SAVED_EVERY_S)
    damaged = packs(stage.chain.store)[3]
    flip(stage.chain.store, damaged)
    stage.stop_at = 18 * SAVED_EVERY_S
    with pytest.raises(Stopped):
        stage.scrubber.once()
    assert len(stage.warnings) == 1
    assert "" < Memory(stage.chain).load().scrubbed < damaged.rpartition("/")[2]
    later = Scrubber(stage.chain, 1e9, stage.warnings.append, Clock(lambda: 0.0, lambda seconds: None))
    assert later.once() == REST_S
    assert len(stage.warnings) == 2, "the next run is told too"
    assert stage.passes == 1


def test_a_store_that_is_away_is_tried_later_and_later_and_told_of_once() -> None:
    store = Stage()
    stage = Scrubbed(store)
    store.away = "the bucket does not answer"
    pauses = [stage.scrubber.once() for _ in range(9)]
    assert pauses == [min(FIRST_PAUSE_S * 2**number, LONGEST_PAUSE_S) for number in range(9)]
    (told,) = stage.warnings
    assert "was interrupted (the bucket does not answer); it is gone on with later" in told
    store.away = ""
    assert stage.scrubber.once() == REST_S
    assert len(stage.warnings) == 1


def test_where_nothing_can_be_remembered_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Scrubbed(MemoryStore(), steps=1)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert stage.scrubber.once() == FIRST_PAUSE_S
    (told,) = stage.warnings
    assert "cannot be kept" in told


def test_a_flaw_of_a_parity_set_is_found() -> None:
    members = [MemoryStore(str(number)) for number in range(3)]
    stage = Scrubbed(ParityStore(Shape(2, 1), members), steps=2)
    key = next(entry.key for entry in members[2].list("shards/packs"))
    flip(members[2], key, 9000)
    stage.scrubber.once()
    (told,) = stage.warnings
    assert key.removeprefix("shards/") in told
    assert "its part with memory://2 is damaged" in told


# -- beside a keeper ---------------------------------------------------------------------------------------


class Turn(threading.Event):
    """Tells when somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.is_waited_for = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        if not self.is_set():
            self.is_waited_for.set()
        return super().wait(timeout)


def test_it_waits_while_something_is_stored() -> None:
    store = Stage()
    chain = Chain.create(store, GRID_BYTES)
    filled(chain, 3)
    store.go_on.clear()
    store.was_read.clear()
    scrubbing = Scrubbing(chain, 10**12, lambda text: None)
    assert store.was_read.wait(DEADLINE_S)
    turn = scrubbing._turn = Turn()
    scrubbing.storing(True)
    reads = store.reads
    store.go_on.set()
    assert turn.is_waited_for.wait(DEADLINE_S)
    assert store.reads == reads
    scrubbing.storing(False)
    until(lambda: Memory(chain).load().passes == 1, "it went on")
    assert store.reads > reads
    scrubbing.stop()
    scrubbing.thread.join(DEADLINE_S)
    assert not scrubbing.thread.is_alive(), "also in the rest between two passes"


def test_one_that_waits_for_its_turn_can_be_stopped() -> None:
    store = Stage()
    chain = Chain.create(store, GRID_BYTES)
    filled(chain, 1)
    store.go_on.clear()
    store.was_read.clear()
    scrubbing = Scrubbing(chain, 10**12, lambda text: None)
    assert store.was_read.wait(DEADLINE_S)
    turn = scrubbing._turn = Turn()
    store.go_on.set()
    assert turn.is_waited_for.wait(DEADLINE_S)
    scrubbing.stop()
    scrubbing.thread.join(DEADLINE_S)
    assert not scrubbing.thread.is_alive()
    assert Memory(chain).load().passes == 0


def test_neither_a_store_nor_the_end_waits_for_a_read_that_hangs() -> None:
    store = Stage()
    chain = Chain.create(store, GRID_BYTES)
    filled(chain, 1)
    store.go_on.clear()
    store.was_read.clear()
    keeper = ThreadKeeper(chain, lambda outcome: None, lambda text: None)
    lease = Lease.take(store)
    keeper.begin(Terms("main", lease.number, "", "all", scrub_bytes_per_s=10**12))
    assert store.was_read.wait(DEADLINE_S)
    assert hand_over(keeper, 2).pending.durable(timeout=DEADLINE_S)
    keeper.close()
    lease.release()
    store.go_on.set()


def test_a_thread_keeper_scrubs_and_does_not_wait_for_it() -> None:
    store = Stage()
    chain = Chain.create(store, GRID_BYTES)
    filled(chain, 2)
    damaged = packs(store)[0]
    flip(store, damaged)
    warnings: list[str] = []
    told = threading.Event()

    def warn(text: str) -> None:
        warnings.append(text)
        told.set()

    keeper = ThreadKeeper(chain, lambda outcome: None, warn)
    lease = Lease.take(store)
    keeper.begin(Terms("main", lease.number, "", "all", scrub_bytes_per_s=10**12))
    job = hand_over(keeper, 3)
    assert job.pending.durable(timeout=DEADLINE_S)
    assert told.wait(DEADLINE_S)
    assert damaged in warnings[0]
    keeper.close()
    lease.release()
    assert len(list(chain.snapshots())) == 3


def test_a_keeper_process_scrubs_tells_and_ends_with_its_trainer(tmp_path: Path) -> None:
    chain = Chain.create(tmp_path / "chain", GRID_BYTES)
    filled(chain, 2)
    damaged = packs(chain.store)[0]
    flip(chain.store, damaged)
    running = Running(tmp_path / "chain", tmp_path)
    speaker = Speaker(running)
    speaker.settle()
    lease = Lease.take(chain.store)
    terms = Terms("main", lease.number, "", "all", scrub_bytes_per_s=10**12)
    speaker.say(protocol.Begin.under(terms))
    assert damaged in speaker.hear(protocol.Warned)[0].text
    assert speaker.status().trainer, "it has begun, whatever was told meanwhile"
    thread = running.service._seats[0].work._scrubbing.thread  # type: ignore[union-attr]
    speaker.say(protocol.Goodbye())
    assert running.has_left()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    lease.release()
