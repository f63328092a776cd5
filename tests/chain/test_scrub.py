from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from making import content, started, whole, written

from everstep.chain import states
from everstep.chain.history import Chain
from everstep.chain.remembering import Checks, Memory
from everstep.chain.scrub import SAVED_EVERY_S, scrub
from everstep.chain.states import rehearse
from everstep.chain.verify import Subset, verify
from everstep.errors import Damaged, Unavailable
from everstep.format import keys
from everstep.format.layout import lay_out
from everstep.store.base import Buffer
from everstep.store.memory import MemoryStore
from everstep.store.parity import ParityStore
from everstep.store.patience import Clock
from everstep.store.shards import Shape

LAYOUT = lay_out([whole("dense", "float32", (200, 1024)), whole("small", "float32", (100,), "buffer")])


class Time:
    """Passes only by being slept away."""

    def __init__(self) -> None:
        self.now = 0.0
        self.clock = Clock(now=lambda: self.now, sleep=self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds


class Counting(MemoryStore):
    """Knows how many bytes of packs were read, and can break off."""

    def __init__(self) -> None:
        super().__init__()
        self.read_bytes = 0
        self.until: int | None = None

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        data = super().get(key, start, size_bytes)
        self.read_bytes += len(data)
        if self.until is not None and key.startswith(keys.PACKS) and self.read_bytes > self.until:
            raise KeyboardInterrupt
        return data


def chain_of(store: MemoryStore | ParityStore, count: int = 8) -> Chain:
    writer = started(store)
    one = content(1, LAYOUT)
    written(writer, [one.changed(random.Random(n), "dense") for n in range(count)])
    writer.lease.release()
    return writer.chain


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


# -- subsets -----------------------------------------------------------------------------------------------


def flipped(store: MemoryStore, key: str, at: int) -> None:
    data = bytearray(store.get(key))
    data[at] ^= 1
    store.delete(key)
    store.put(key, [bytes(data)])


def test_all_subsets_together_read_all_and_each_says_what_it_left() -> None:
    store = MemoryStore()
    chain = chain_of(store)
    (key, *_) = [entry.key for entry in store.list(keys.PACKS)]
    flipped(store, key, 17 * 4096)
    whole = verify(chain)
    assert whole.left_bytes == 0
    found, read = 0, 0
    left: list[int] = []
    for number in range(1, 21):
        report = verify(chain, wants=Subset(number, 20).wants)
        found += len(report.findings)
        left.append(report.left_bytes)
        read += whole.bytes - report.bytes
        assert report.bytes + report.left_bytes == whole.bytes
    assert found == 1
    # Each chunk is left out by all of them but one.
    data = sum(left) // 19
    assert sum(left) == data * 19
    assert all(0.6 * data < one < data for one in left)


def test_records_and_footers_are_read_with_every_subset() -> None:
    store = MemoryStore()
    chain = chain_of(store, 2)
    (key, *_) = [entry.key for entry in store.list(keys.PACKS)]
    size = len(store.get(key))
    for hit, at in ((key, size - 10), (keys.manifest(chain.find("head").record.manifests[0]), 50)):
        good = bytes(store.get(hit))
        flipped(store, hit, at)
        for number in (1, 7, 20):
            assert [one.key for one in verify(chain, wants=Subset(number, 20).wants).findings] == [hit]
        store.delete(hit)
        store.put(hit, [good])


# -- restoring into memory ---------------------------------------------------------------------------------


def test_a_rehearsal_restores_every_leaf_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    chain = chain_of(store, 2)
    monkeypatch.setattr(states, "WINDOW_BYTES", 40_000)
    seen: list[tuple[int, int]] = []
    done = rehearse(chain, chain.find("head"), lambda at, total: seen.append((at, total)))
    assert (done.leaves, done.size_bytes, done.remarks) == (2, 200 * 1024 * 4 + 400, ())
    assert seen[-1] == (done.size_bytes, done.size_bytes)
    assert max(b[0] - a[0] for a, b in itertools.pairwise(seen)) <= 40_000


def test_a_rehearsal_finds_what_a_restore_would() -> None:
    store = MemoryStore()
    chain = chain_of(store, 2)
    head, before = chain.find("head"), chain.manifest(chain.find("head~1"))
    pack = keys.pack(next(name for name in chain.manifest(head).packs if name not in before.packs))
    flipped(store, pack, 5)
    with pytest.raises(Damaged) as caught:
        rehearse(chain, head)
    assert caught.value.key == pack
    rehearse(chain, chain.find("head~1"))


def test_a_rehearsal_reads_padding_and_footers_too() -> None:
    store = MemoryStore()
    chain = chain_of(store, 1)
    head = chain.find("head")
    pack = keys.pack(chain.manifest(head).places[0].pack)
    flipped(store, pack, len(store.get(pack)) - 10)
    assert [pack in remark for remark in rehearse(chain, head).remarks] == [True]


# -- scrub -------------------------------------------------------------------------------------------------


def test_a_scrub_reads_no_faster_than_it_may() -> None:
    store, time = Counting(), Time()
    chain = chain_of(store)
    store.read_bytes = 0
    report = scrub(chain, 1e6, Memory(chain), clock=time.clock)
    assert report.findings == []
    assert report.left_bytes == 0
    assert time.now == pytest.approx(store.read_bytes / 1e6, rel=0.01)
    assert report.bytes <= store.read_bytes


def test_a_scrub_that_was_interrupted_goes_on() -> None:
    store, time = Counting(), Time()
    chain = chain_of(store)
    total = sum(entry.size_bytes for entry in store.list(keys.PACKS))
    memory = Memory(chain)
    store.read_bytes, store.until = 0, total // 2
    rate = total / (SAVED_EVERY_S * 20)
    with pytest.raises(KeyboardInterrupt):
        scrub(chain, rate, memory, clock=time.clock)
    saved = memory.load()
    assert saved.scrubbed
    assert saved.passes == 0
    store.read_bytes, store.until = 0, None
    # What it finds is behind the place where it was; the next pass begins at the beginning.
    first, *_, last = [entry.key for entry in store.list(keys.PACKS)]
    flipped(store, last, 5)
    flipped(store, first, 5)
    report = scrub(chain, rate, memory, clock=time.clock, wall=lambda: 5.0)
    assert [one.key for one in report.findings] == [last]
    assert 0.2 * total < report.left_bytes < 0.6 * total
    assert memory.load() == Checks(passes=1, passed_at=5.0)
    assert {one.key for one in scrub(chain, rate, memory, clock=time.clock).findings} == {first, last}
    assert memory.load().passes == 2


def test_a_scrub_that_was_interrupted_finds_again_what_it_found() -> None:
    store, time = Counting(), Time()
    chain = chain_of(store)
    first, *_ = [entry.key for entry in store.list(keys.PACKS)]
    flipped(store, first, 5)
    total = sum(entry.size_bytes for entry in store.list(keys.PACKS))
    memory, rate = Memory(chain), total / (SAVED_EVERY_S * 20)
    store.read_bytes, store.until = 0, total * 3 // 4
    with pytest.raises(KeyboardInterrupt):
        scrub(chain, rate, memory, clock=time.clock)
    store.until = None
    assert [one.key for one in scrub(chain, rate, memory, clock=time.clock).findings] == [first]


def test_what_a_verify_notes_beside_a_scrub_stays() -> None:
    store, time = Counting(), Time()
    chain = chain_of(store)
    memory = Memory(chain)

    def note(done: int, total: int) -> None:
        memory.save(Checks({"20": 3}, memory.load().scrubbed))

    scrub(chain, 1e6, memory, note, time.clock)
    assert memory.load().subsets == {"20": 3}


def test_it_is_remembered_by_where_the_chain_is_not_by_where_one_looks_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Chain.create("chain", 4096)
    Memory(Chain("chain")).save(Checks(passes=1))
    monkeypatch.chdir("/")
    assert Memory(Chain(tmp_path / "chain")).load().passes == 1
    places = [f"{tmp_path}/{name}" for name in "abc"]
    url = f"parity:2+1:{','.join(places)}"
    Chain.create(url, 4096)
    Memory(Chain(url)).save(Checks(passes=2))
    monkeypatch.chdir(tmp_path)
    assert Memory(Chain(url)).load().passes == 2


def test_a_scrub_looks_at_parity_too() -> None:
    members = [MemoryStore(str(number)) for number in range(3)]
    chain = chain_of(ParityStore(Shape(2, 1), members), 2)
    time = Time()
    assert scrub(chain, 1e6, Memory(chain), clock=time.clock).findings == []
    (key, *_) = [entry.key for entry in members[2].list("shards/")]
    flipped(members[2], key, 9000)
    (finding,) = scrub(chain, 1e6, Memory(chain), clock=time.clock).findings
    assert finding.key == key.removeprefix("shards/")
    assert "its part with memory://2 is damaged" in finding.problem
    assert finding.next.endswith("repair")
    stored = sum(entry.size_bytes for entry in chain.store.list())
    assert time.now > 2 * stored / 1e6


def test_where_nothing_can_be_remembered_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    chain = chain_of(MemoryStore(), 1)
    with pytest.raises(Unavailable, match="cannot be kept"):
        Memory(chain).save(Checks())


def test_what_is_remembered_and_cannot_be_read_is_the_beginning(tmp_path: Path) -> None:
    memory = Memory(chain_of(MemoryStore(), 1))
    memory.save(Checks({"20": 3}, "ab", 7))
    assert memory.load() == Checks({"20": 3}, "ab", 7)
    (path,) = (tmp_path / "state").rglob("checks-*.json")
    for junk in (b"", b"{", b"[]", b'{"passes": "x"}', b"\xff" * 100_000):
        path.write_bytes(junk)
        assert memory.load() == Checks()
