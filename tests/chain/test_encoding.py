"""How chunks are stored: what is chosen by measurement, and what XORs build on."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making import GRID_BYTES, LAYOUT, Content, Slots, assert_restores, content, started, whole

from everstep.chain import encoding, prune
from everstep.chain.encoding import MAX_DEPTH, RAW, Always, Base, Fresh, Measured, Way, base_of
from everstep.chain.history import Chain, Snapshot
from everstep.chain.lease import Lease
from everstep.chain.verify import verify
from everstep.chain.writer import Facts, Writer
from everstep.errors import NotFound
from everstep.format import keys
from everstep.format.chunk import Encoding, digest
from everstep.format.layout import Layout, lay_out
from everstep.format.manifest import Manifest
from everstep.store.base import Buffer
from everstep.store.memory import MemoryStore
from examples import examples

XOR = Always(Encoding.XOR_SHUFFLE_ZSTD)
ONE = lay_out([whole("one", "float32", (64 * 1024,))])
"""A region of sixteen chunks."""


def touched(one: Content, rng: random.Random, count: int = 3) -> Content:
    """With a few bytes changed in each of its leaves' chunks."""
    leaves = {}
    for name, data in one.leaves.items():
        changed = bytearray(data)
        for start in range(0, len(data), GRID_BYTES):
            for _ in range(count):
                at = rng.randrange(start, min(start + GRID_BYTES, len(data)))
                changed[at] ^= rng.randrange(1, 256)
        leaves[name] = bytes(changed)
    return Content(one.layout, leaves, rng.random())


def story(count: int, layout: Layout = ONE) -> list[Content]:
    rng = random.Random(count)
    states = itertools.accumulate(range(count), lambda one, _: touched(one, rng), initial=content(1, layout))
    return list(states)


def depths(manifest: Manifest) -> set[int]:
    """How many others the chunks of a snapshot build on."""
    found = set()
    for region in manifest.regions:
        for number in region.chunks:
            place, depth = manifest.places[number], 0
            while place.base:
                place, depth = manifest.place_of[place.base][1], depth + 1
            found.add(depth)
    return found


def assert_clean(chain: Chain) -> None:
    assert verify(chain).findings == []


# -- what an XOR builds on --------------------------------------------------------------------------------


def test_sparse_changes_are_stored_as_such_and_come_back() -> None:
    writer, slots = started(MemoryStore(), encoding=XOR.encoding), Slots(ONE)
    states = story(9)
    shots = [slots.write(writer, one, step) for step, one in enumerate(states, 1)]
    full = shots[0].record.stored_bytes
    assert all(shot.record.new_bytes == ONE.logical_bytes for shot in shots)
    # Sixteen chunks on pages of their own, and a footer.
    assert all(shot.record.stored_bytes <= 17 * 4096 < full / 3 for shot in shots[1:])
    for shot, one in zip(shots, states, strict=True):
        assert_restores(writer.chain, shot, one)
    assert_clean(writer.chain)


def test_no_chunk_builds_on_more_than_three_others() -> None:
    """The fourth builds on the first in the line again: what lies between is XORed together."""
    writer, slots = started(MemoryStore(), encoding=XOR.encoding), Slots(ONE)
    states = story(8)
    shots = [slots.write(writer, one, step) for step, one in enumerate(states, 1)]
    found = [depths(writer.chain.manifest(shot)) for shot in shots]
    assert found == [{0}, {1}, {2}, {3}, {1}, {2}, {3}, {1}, {2}]
    first = writer.chain.manifest(shots[0])
    again = writer.chain.manifest(shots[4])
    bases = {again.places[number].base for number in again.regions[0].chunks}
    assert bases == {first.chunks[number].digest for number in first.regions[0].chunks}
    assert len(again.packs) == 2, "nothing of what lies between is needed any more"
    assert_restores(writer.chain, shots[4], states[4])


def test_where_the_way_back_is_too_long_a_chunk_is_stored_as_it_is() -> None:
    writer, slots = started(MemoryStore(), encoding=XOR.encoding), Slots(ONE)
    rng = random.Random(1)
    states = list(
        itertools.accumulate(range(4), lambda one, _: touched(one, rng, 2500), initial=content(1, ONE))
    )
    shots = [slots.write(writer, one, step) for step, one in enumerate(states, 1)]
    assert [depths(writer.chain.manifest(shot)) for shot in shots] == [{0}, {1}, {2}, {3}, {0}]
    for shot, one in zip(shots, states, strict=True):
        assert_restores(writer.chain, shot, one)


class Meddling(Always):
    """Does something each time a chunk's encoding is chosen: right before its base is read."""

    def __init__(self, meddle: Callable[[], object]) -> None:
        super().__init__(Encoding.XOR_SHUFFLE_ZSTD)
        object.__setattr__(self, "_meddle", meddle)

    def choose(self, fresh: Fresh, threads: int) -> Way:
        way = super().choose(fresh, threads)
        if fresh.base is not None:
            self._meddle()  # type: ignore[attr-defined]
        return way


def test_a_base_that_is_overwritten_meanwhile_is_not_built_on() -> None:
    writer, slots = started(MemoryStore(), encoding=XOR.encoding), Slots(ONE)
    one, two = story(1)
    slots.write(writer, one)
    # The sixth chunk is written to right when it is to be read.
    seen: list[int] = []

    def meddle() -> None:
        seen.append(1)
        if len(seen) == 6:
            slots.mappings[1][5 * GRID_BYTES + 100] ^= 1

    writer.encodings = Meddling(meddle)
    shot = slots.write(writer, two, 2)
    manifest = writer.chain.manifest(shot)
    kinds = [manifest.places[number].encoding for number in manifest.regions[0].chunks]
    assert kinds == [3] * 5 + [0] + [3] * 10
    assert_restores(writer.chain, shot, two)
    assert_clean(writer.chain)


def test_memory_that_is_no_more_is_not_built_on() -> None:
    writer, slots = started(MemoryStore(), encoding=XOR.encoding), Slots(ONE)
    one, two = story(1)
    slots.write(writer, one)
    # The writer holds on to no memory of a state that it has written.
    slots.mappings[1].close()
    shot = slots.write(writer, two, 2)
    assert depths(writer.chain.manifest(shot)) == {0}
    assert_restores(writer.chain, shot, two)


def test_memory_of_another_layout_is_not_built_on() -> None:
    writer = started(MemoryStore(), encoding=XOR.encoding)
    other = lay_out([whole("one", "float32", (32, 2048))])
    slots = Slots(ONE)
    slots.write(writer, content(1, ONE))
    shot = slots.write(writer, touched(content(1, other), random.Random(1)), 2)
    assert depths(writer.chain.manifest(shot)) == {0}


def test_a_single_arena_holds_no_base() -> None:
    writer, slots = started(MemoryStore(), encoding=XOR.encoding), Slots(ONE)
    memory = slots.next()
    one, two = story(1)
    for step, state in enumerate((one, two), 1):
        shot = writer.write(state.captured(memory), Facts(step=step))
    assert depths(writer.chain.manifest(shot)) == {0}
    assert_restores(writer.chain, shot, two)


def test_what_was_forgotten_is_not_built_on() -> None:
    store = MemoryStore()
    writer, slots = started(store, encoding=XOR.encoding), Slots(ONE)
    one, two = story(1)
    first = slots.write(writer, one)
    writer.forget_packs(set(writer.chain.manifest(first).packs))
    shot = slots.write(writer, two, 2)
    assert depths(writer.chain.manifest(shot)) == {0}


def test_pruning_keeps_what_is_built_on() -> None:
    writer, slots = started(MemoryStore(), encoding=XOR.encoding), Slots()
    for step, one in enumerate(story(7, LAYOUT), 1):
        shot = slots.write(writer, one, step)
        plan = prune.plan(writer.chain, prune.Keep.parse("last 1"))
        if plan is not None:
            writer.forget_packs(set(plan.packs))
            prune.execute(writer.chain, plan)
        assert [snapshot.id for snapshot in writer.chain.snapshots()] == [shot.id]
        assert_restores(writer.chain, shot, one)
        assert_clean(writer.chain)
        if step > 1:
            assert max(depths(writer.chain.manifest(shot))) > 0


def test_a_flipped_bit_in_a_base_is_found() -> None:
    store = MemoryStore()
    writer, slots = started(store, encoding=XOR.encoding), Slots(ONE)
    shots = [slots.write(writer, one, step) for step, one in enumerate(story(2), 1)]
    base = writer.chain.manifest(shots[0]).places[7]
    key = keys.pack(base.pack)
    data = bytearray(store.get(key))
    data[base.offset + 1234] ^= 32
    store.delete(key)
    assert store.put(key, [bytes(data)])
    (finding,) = verify(writer.chain).findings  # And nothing of the packs that build on it.
    assert finding.key == key
    assert "is not the one that was written" in finding.problem
    assert set(finding.snapshots) == {shot.id for shot in shots}


class Lossy(MemoryStore):
    """Some objects are gone, or give other bytes, when they are read."""

    lost: frozenset[str] = frozenset()
    spoiled: frozenset[str] = frozenset()

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        if key in self.lost:
            raise NotFound(f"{key} is gone", key=key)
        data = super().get(key, start, size_bytes)
        if key in self.spoiled:
            # Still a frame, of other bytes.
            changed = bytearray(data)
            changed[-6] ^= 1
            return bytes(changed)
        return data


@pytest.mark.parametrize("how", ["lost", "spoiled"])
def test_a_way_back_that_cannot_be_read_is_not_gone(how: str) -> None:
    store = Lossy()
    writer, slots = started(store, encoding=XOR.encoding), Slots(ONE)
    states = story(4)
    shots = [slots.write(writer, one, step) for step, one in enumerate(states[:4], 1)]
    setattr(store, how, frozenset(keys.pack(name) for name in writer.chain.manifest(shots[2]).packs))
    shot = slots.write(writer, states[4], 5)
    setattr(store, how, frozenset())
    assert depths(writer.chain.manifest(shot)) == {0}
    assert_restores(writer.chain, shot, states[4])


def test_a_base_is_the_chunk_itself_up_to_the_depth_allowed() -> None:
    writer, slots = started(MemoryStore(), encoding=XOR.encoding), Slots(ONE)
    shots = [slots.write(writer, one, step) for step, one in enumerate(story(3), 1)]
    memory = memoryview(bytes(GRID_BYTES))
    for depth, shot in enumerate(shots):
        manifest = writer.chain.manifest(shot)
        name = manifest.chunks[manifest.regions[0].chunks[0]].digest
        base = base_of(manifest, name, memory)
        assert base is not None
        assert (base.digest == name, len(base.links)) == ((True, 0) if depth < MAX_DEPTH else (False, 3))


@settings(
    max_examples=examples(25), deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["none", "few", "all", "back"]),
            st.sampled_from(list(Encoding)),
            st.booleans(),
        ),
        min_size=1,
        max_size=9,
    )
)
def test_any_history_of_changes_and_encodings_restores(steps: list[tuple[str, Encoding, bool]]) -> None:
    """And pruning to the last one at any time, which is forgotten or not."""
    writer, slots = started(MemoryStore()), Slots()
    rng = random.Random(0)
    states = [content(1)]
    for step, (change, kind, pruned) in enumerate(steps, 1):
        last = states[-1]
        states.append(
            {"none": last, "few": touched(last, rng, 1), "all": content(step), "back": rng.choice(states)}[
                change
            ]
        )
        writer.encodings = Always(kind)
        shot = slots.write(writer, states[-1], step)
        assert_restores(writer.chain, shot, states[-1])
        assert max(depths(writer.chain.manifest(shot))) <= MAX_DEPTH
        plan = prune.plan(writer.chain, prune.Keep.parse("last 1"), mine=writer.lease) if pruned else None
        if plan is not None:
            writer.forget_packs(set(plan.packs))
            prune.execute(writer.chain, plan)
            assert_restores(writer.chain, shot, states[-1])
    assert_clean(writer.chain)


# -- what is chosen ---------------------------------------------------------------------------------------

MIB = 1024 * 1024


class Clock:
    """A thread's own time: each look at it takes a while, and so does what a test says."""

    def __init__(self, look_s: float = 0.0) -> None:
        self.look_s = look_s
        self._own = threading.local()

    def __call__(self) -> float:
        return self.passes(self.look_s)

    def passes(self, seconds: float) -> float:
        self._own.now = getattr(self._own, "now", 0.0) + seconds
        return float(self._own.now)


def encoder_at(bytes_per_s: float) -> Clock:
    """A clock by which a sample of 128 KiB is encoded at this speed."""
    return Clock(128 * 1024 / bytes_per_s)


def measured(*, store: float, encoder: float = 0.5e9, digests: float = 4e9) -> Measured:
    """After a pack was put and chunks were digested at these speeds, in bytes per second."""
    made = Measured(encoder_at(encoder))
    made.put(64 * MIB, 64 * MIB / store)
    made.digested(8 * MIB, 8 * MIB / digests)
    return made


def floats(seed: int, size_bytes: int = MIB) -> bytes:
    """Weights, as they are after some training: their exponents are alike."""
    return (np.random.default_rng(seed).standard_normal(size_bytes // 4) * 0.02).astype(np.float32).tobytes()


def rows_changed(raw: bytes, share: float, seed: int = 1) -> bytes:
    """With other floats in so many random rows of 256 bytes."""
    rng = np.random.default_rng(seed)
    rows = np.frombuffer(raw, np.uint8).reshape(-1, 256).copy()
    chosen = rng.choice(len(rows), max(1, int(len(rows) * share)), replace=False)
    rows[chosen] = np.frombuffer(floats(seed, 256 * len(chosen)), np.uint8).reshape(-1, 256)
    return rows.tobytes()


def fresh(raw: bytes, base: bytes | None = None, region: int = 0, word_bytes: int = 4) -> Fresh:
    below = None if base is None else Base(digest(base), memoryview(base))
    return Fresh(memoryview(raw), region, word_bytes, below)


def a_step_later(raw: bytes) -> bytes:
    weights = np.frombuffer(raw, np.float32)
    return (weights * np.float32(0.9999) + np.float32(1e-6)).tobytes()


DENSE = floats(1)
NOISE = random.Random(1).randbytes(MIB)
SPARSE = Way(Encoding.XOR_SHUFFLE_ZSTD, 1)


def test_all_is_raw_before_the_store_was_measured() -> None:
    made = Measured(encoder_at(1e12))
    made.put(100_000, 10.0)  # A small object says nothing of a store's width.
    assert made.choose(fresh(bytes(MIB), bytes(MIB)), 4) == RAW
    made.put(MIB, 10.0)
    assert made.choose(fresh(bytes(MIB), bytes(MIB)), 4) != RAW


@pytest.mark.parametrize(
    ("store", "threads", "encoded"),
    [
        (2e9, 1, False),
        (2e9, 4, False),
        (0.6e9, 1, False),
        (0.6e9, 2, True),
        (0.2e9, 1, True),
        (0.01e9, 1, True),
    ],
)
def test_weights_are_encoded_where_that_is_faster_than_the_store(
    store: float, threads: int, encoded: bool
) -> None:
    made = measured(store=store)
    assert (made.choose(fresh(DENSE), threads) == Way(Encoding.SHUFFLE_ZSTD, 4)) is encoded
    assert (made.choose(fresh(DENSE), threads) == RAW) is not encoded


@pytest.mark.parametrize("store", [2e9, 1.2e9, 0.1e9])
def test_a_few_rows_of_an_embedding_are_xored_on_a_fast_disk_too(store: float) -> None:
    made = measured(store=store, encoder=1.5e9)
    assert made.choose(fresh(rows_changed(DENSE, 0.01), DENSE), 1) == SPARSE


def test_an_encoder_that_is_starved_lets_even_those_go_raw() -> None:
    made = measured(store=2e9, encoder=0.3e9)
    assert made.choose(fresh(rows_changed(DENSE, 0.01), DENSE), 1) == RAW


def test_weights_a_step_later_are_xored_on_a_slow_store() -> None:
    assert measured(store=0.1e9).choose(fresh(a_step_later(DENSE), DENSE), 1) == Way(
        Encoding.XOR_SHUFFLE_ZSTD, 4
    )


def test_a_base_that_has_nothing_in_common_is_left_alone() -> None:
    assert measured(store=0.1e9).choose(fresh(DENSE, NOISE), 1) == Way(Encoding.SHUFFLE_ZSTD, 4)


@pytest.mark.parametrize("base", [None, floats(2)])
def test_noise_stays_raw_on_the_slowest_store(base: bytes | None) -> None:
    assert measured(store=1e6).choose(fresh(NOISE, base), 4) == RAW


def test_bytes_are_not_shuffled() -> None:
    soft = bytes(random.Random(1).choices(range(12), k=MIB))
    assert measured(store=1e8).choose(fresh(soft, word_bytes=1), 1) == Way(Encoding.ZSTD)


def test_one_slow_observation_is_no_verdict() -> None:
    """The trainer had the processor for a while."""
    clock = encoder_at(2e9)
    made = Measured(clock)
    for _ in range(3):
        made.put(64 * MIB, 64 * MIB / 1e9)
        made.digested(8 * MIB, 8 * MIB / 4e9)
    clock.look_s *= 1000
    chunks = [fresh(rows_changed(DENSE, 0.01), DENSE, region) for region in range(9)]
    assert made.choose(chunks[0], 1) == RAW
    clock.look_s /= 1000
    assert [made.choose(chunk, 1) for chunk in chunks[1:]][2:] == [SPARSE] * 6
    made.put(64 * MIB, 64)
    made.encoded(chunks[0], SPARSE, 10_000, 1.0)
    assert made.choose(chunks[5], 1) == SPARSE


def test_small_chunks_stay_raw() -> None:
    assert measured(store=1e6).choose(fresh(bytes(encoding.SMALL_BYTES - 1)), 4) == RAW
    assert measured(store=1e6).choose(fresh(bytes(encoding.SMALL_BYTES)), 4) != RAW


def test_a_judgement_follows_the_store_and_the_encoder() -> None:
    made = measured(store=0.1e9)
    chunk = fresh(DENSE)
    way = made.choose(chunk, 1)
    assert way != RAW
    for _ in range(30):
        made.put(64 * MIB, 64 * MIB / 5e9)
    assert made.choose(chunk, 1) == RAW
    for _ in range(60):
        made.put(64 * MIB, 64 * MIB / 0.1e9)
    assert made.choose(chunk, 1) == way
    for _ in range(60):
        made.encoded(chunk, way, 800_000, MIB / 0.01e9)
    assert made.choose(chunk, 1) == RAW, "the encoder has become slower than this store"


def test_what_a_chunk_really_became_counts_more_than_its_sample() -> None:
    made = measured(store=0.1e9)
    chunk = fresh(DENSE)
    way = made.choose(chunk, 1)
    made.encoded(chunk, way, int(0.99 * MIB), 0.002)
    assert made.choose(chunk, 1) == RAW


def samples(monkeypatch: pytest.MonkeyPatch) -> list[Way]:
    """The ways that are tried on samples."""
    tried: list[Way] = []
    real = encoding._Sample.encode

    def encode(self: encoding._Sample, way: Way) -> int:
        tried.append(way)
        return real(self, way)

    monkeypatch.setattr(encoding._Sample, "encode", encode)
    return tried


def test_regions_are_judged_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = samples(monkeypatch)
    made = measured(store=0.3e9)
    for _ in range(50):
        for region in range(2):
            made.choose(fresh(DENSE, region=region), 1)
    assert len(tried) == 2 * 3


def test_what_cannot_pay_is_hardly_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model has hundreds of regions: on a fast disk they cost a comparison, no compression."""
    tried = samples(monkeypatch)
    made = measured(store=2.5e9)
    for region in range(320):
        assert made.choose(fresh(a_step_later(DENSE), DENSE, region=region), 2) == RAW
    assert len(tried) <= 2 * (5 + 320 / 32)
    # Those that change little are seen among them all the same.
    assert made.choose(fresh(rows_changed(DENSE, 0.001), DENSE, region=999), 2) in (SPARSE, RAW)
    assert tried[-1] == SPARSE


# -- with a writer ----------------------------------------------------------------------------------------

BIG_GRID = MIB
BIG = lay_out([whole(name, "float32", (5 * MIB // 4,)) for name in ("model", "exp_avg", "exp_avg_sq")])


@dataclass
class Throttled(MemoryStore):
    """A store that takes its time, by a clock of the test's."""

    clock: Clock
    bytes_per_s: float

    def __post_init__(self) -> None:
        super().__init__()

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        self.clock.passes(sum(map(len, parts)) / self.bytes_per_s)
        return super().put(key, parts)


def adamw(steps: int) -> Iterator[Content]:
    """Three leaves as AdamW leaves them, step by step."""
    rng = np.random.default_rng(1)
    count = 5 * MIB // 4
    weights = (rng.standard_normal(count) * 0.02).astype(np.float32)
    mean, square = np.zeros(count, np.float32), np.zeros(count, np.float32)
    for step in range(1, steps + 50):
        gradient = (rng.standard_normal(count) * 1e-3).astype(np.float32)
        mean += np.float32(0.1) * (gradient - mean)
        square += np.float32(0.001) * (gradient * gradient - square)
        update = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        weights = (weights - np.float32(1e-4) * update).astype(np.float32)
        if step >= 50:
            leaves = {"model": weights.tobytes(), "exp_avg": mean.tobytes(), "exp_avg_sq": square.tobytes()}
            yield Content(BIG, leaves, step)


def writer_on(store: MemoryStore, clock: Clock) -> Writer:
    chain = Chain.create(store, BIG_GRID)
    return Writer(chain, Lease.take(store), cores=lambda: 1, clock=clock, thread_clock=clock)


def shares(shots: list[Snapshot]) -> list[float]:
    return [shot.record.stored_bytes / BIG.logical_bytes for shot in shots]


@pytest.mark.slow
@pytest.mark.parametrize("store_speed", [0.1e9, 3e9], ids=["slow", "fast"])
def test_dense_training_is_encoded_on_a_slow_store_only(store_speed: float) -> None:
    clock = encoder_at(0.5e9)
    store = Throttled(clock, store_speed)
    writer, slots = writer_on(store, clock), Slots(BIG)
    states = list(adamw(4))
    shots = [slots.write(writer, one, step) for step, one in enumerate(states, 1)]
    later = shares(shots)[1:]
    if store_speed == 0.1e9:
        assert all(share <= 0.85 for share in later)
    else:
        assert all(share >= 0.99 for share in later)
    assert_restores(writer.chain, shots[-1], states[-1])
    assert_clean(writer.chain)


def test_an_embedding_of_which_some_rows_change() -> None:
    """A hundredth of the rows with each snapshot, chosen anew."""
    clock = encoder_at(1.5e9)
    writer, slots = writer_on(Throttled(clock, 2e9), clock), Slots(BIG)
    one = content(1, BIG)
    shots = [slots.write(writer, one)]
    for step in range(2, 8):
        one = Content(BIG, {n: rows_changed(data, 0.01, step) for n, data in one.leaves.items()}, step)
        shots.append(slots.write(writer, one, step))
        assert_restores(writer.chain, shots[-1], one)
    full, *further = shares(shots)
    assert full > 1
    assert sum(further) / len(further) <= 0.03
    assert max(further) <= 0.08
    assert_clean(writer.chain)
