from __future__ import annotations

import itertools
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.chain.history import Chain
from everstep.errors import Damaged, EverstepError, Mismatch, NotFound, Unavailable
from everstep.store import sharded
from everstep.store.base import Addressed, Buffer, Entry, Redundant, Store
from everstep.store.local import LocalStore
from everstep.store.memory import MemoryStore
from everstep.store.parity import ParityStore, parse
from everstep.store.patience import Clock
from everstep.store.shards import (
    BLOCK_BYTES,
    PAGE,
    SMALL_BYTES,
    Header,
    Shape,
    Whole,
    copy_of,
    cut,
    decode_header,
    head_bytes,
    joined,
    out_of_copy,
    size_by_length,
)
from everstep.store.urls import open_store
from everstep.testing.faults import Died, FaultyStore
from everstep.testing.store import StoreContract, in_threads, listed, pattern
from examples import examples

pytestmark = pytest.mark.slow

NAME = "packs/ab/" + "ab" * 32
"""A key that is named by a digest, as far as a store can see."""


class Flaky:
    """A store that is away when it is told to be: always, or at every nth verb."""

    def __init__(self, inner: Store, away: Callable[[], bool] = lambda: False) -> None:
        self.inner = inner
        self.is_away = away

    @property
    def url(self) -> str:
        return self.inner.url

    def _ask(self) -> Store:
        if self.is_away():
            raise Unavailable(f"{self.url} does not answer")
        return self.inner

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        return self._ask().put(key, parts)

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        return self._ask().get(key, start, size_bytes)

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        return self._ask().read_into(key, start, buffers)

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[Entry]:
        return self._ask().list(prefix, limit)

    def delete(self, key: str) -> None:
        self._ask().delete(key)


def memories(count: int = 6) -> list[MemoryStore]:
    return [MemoryStore(str(number)) for number in range(count)]


def over(members: Sequence[Store], away: Sequence[int] = (), clock: Clock | None = None) -> ParityStore:
    """A set of these members, some of which are away."""
    some = [Flaky(one, lambda gone=number in away: gone) for number, one in enumerate(members)]  # type: ignore[misc]
    return ParityStore(Shape(4, 2), some, clock=clock)


def no_waiting() -> Clock:
    """Time that passes by being slept away."""
    time = [0.0]

    def sleep(seconds: float) -> None:
        time[0] += seconds

    return Clock(now=lambda: time[0], sleep=sleep, share=lambda: 0.5)


# -- the contract ------------------------------------------------------------------------------------------


class TestOverDirectories(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return open_store("parity:2+1:" + ",".join(str(tmp_path / str(number)) for number in range(3)))


class TestWithMembersAway(StoreContract):
    """As many as may be."""

    @pytest.fixture
    def store(self) -> Store:
        return over(memories(), away=(0, 3))


class TestInShards(StoreContract):
    """Every object is cut, whatever its name and size: all but the exclusive creation holds for these too."""

    @pytest.fixture
    def store(self, monkeypatch: pytest.MonkeyPatch) -> Store:
        monkeypatch.setattr("everstep.store.parity.SMALL_BYTES", 0)
        monkeypatch.setattr("everstep.store.parity.is_named_by_digest", lambda key: True)
        monkeypatch.setattr("everstep.store.parity.can_have_shards", sharded.can_have_shards)
        return ParityStore(Shape(3, 2), memories(5))


# -- addresses ---------------------------------------------------------------------------------------------


def test_an_address_is_opened_by_any_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("parity:2+1:a,b,s3://bucket/c")
    assert isinstance(store, ParityStore)
    assert isinstance(store, Addressed)
    assert isinstance(store, Redundant)
    assert store.url == "parity:2+1:a,b,s3://bucket/c"
    assert store.address == f"parity:2+1:{tmp_path}/a,{tmp_path}/b,s3://bucket/c"
    assert open_store(store.address).url == store.address
    assert not isinstance(ParityStore(Shape(2, 1), memories(3)), Addressed)


@pytest.mark.parametrize(
    "address",
    [
        "parity:", "parity:4+2", "parity:4+2:", "parity:4:a,b,c,d", "parity:2+1:a,b", "parity:2+1:a,b,c,d",
        "parity:2+1:a,,c", "parity:2+1:a,b,a", "parity:2+2:a,b,c,d", "parity:1+1:a,b", "parity:3+0:a,b,c",
        "parity:60+6:" + ",".join(map(str, range(66))),
    ],
)  # fmt: skip
def test_what_is_no_set_is_refused(address: str) -> None:
    with pytest.raises(Mismatch) as caught:
        open_store(address)
    assert caught.value.next


# -- the layout --------------------------------------------------------------------------------------------

shapes = st.builds(Shape, st.integers(2, 9), st.integers(1, 4)).filter(lambda shape: shape.k > shape.m)
sizes = st.one_of(
    st.integers(1, 3 * PAGE),
    st.builds(lambda pages, more: max(pages * PAGE + more, 1), st.integers(0, 90), st.integers(-2, 2)),
    st.builds(lambda blocks: blocks * BLOCK_BYTES, st.integers(1, 12)),
)


@settings(max_examples=examples(60), deadline=None)
@given(shapes, sizes, st.integers(0, 1 << 32))
def test_any_k_shards_give_the_object_back(shape: Shape, size: int, seed: int) -> None:
    rng = random.Random(seed)
    data = rng.randbytes(size)
    cuts = sorted(rng.randrange(size + 1) for _ in range(3))
    parts = [data[a:b] for a, b in itertools.pairwise([0, *cuts, size])]
    shards = [b"".join(map(bytes, shard)) for shard in cut("a/key", shape, Whole(parts))]
    headers = [decode_header(shard[: head_bytes(shard)], "a/key") for shard in shards]
    assert [header.index for header in headers] == list(range(shape.members))
    (length,) = {len(shard) for shard in shards}
    assert {header.length for header in headers} == {length}
    assert size_by_length(shape, length) == (size if size % PAGE == 0 else None)
    part = headers[0].part_bytes
    bodies = [shard[headers[0].payload_at :][:part] for shard in shards]
    for number, body in enumerate(bodies):
        for at in range(0, part, BLOCK_BYTES):
            assert headers[number].is_block(at // BLOCK_BYTES, body[at : at + BLOCK_BYTES])
    chosen = rng.sample(range(shape.members), shape.k)
    again = b"".join(map(bytes, joined(shape, {number: bodies[number] for number in chosen})))
    assert again[:size] == data
    assert not any(again[size:])


def test_large_tables_and_their_lengths() -> None:
    """No object of this size is made: only the arithmetic is asked."""
    shape = Shape(4, 2)
    for pages in (1, 127, 128, 2047, 2048, 2049, 4096, 40_000, 2**28):
        for slack in range(4):
            size = (pages * 4 - slack) * PAGE
            if shape.part_bytes(size) == pages * PAGE and size:
                count = -(-pages * PAGE // BLOCK_BYTES)
                if count < 10_000:
                    header = Header("key", shape, 0, size, bytes(32 * count))
                    assert size_by_length(shape, header.length) == size


@settings(max_examples=examples(200), deadline=None)
@given(st.binary(max_size=3 * PAGE), st.booleans())
def test_hostile_headers_and_copies(data: bytes, begins_right: bool) -> None:
    data = b"EVSTSHRD\1\0\4\2\0" + data if begins_right else data
    for decode in (
        lambda: head_bytes(data),
        lambda: decode_header(data, "k"),
        lambda: out_of_copy(data, "k"),
    ):
        with pytest.raises(EverstepError):
            decode()


def reference_parity(k: int, m: int, data: list[bytes]) -> list[bytes]:
    """As FORMAT.md describes it: a matrix over GF(256), without the library."""
    power, log = [0] * 255, [0] * 256
    value = 1
    for exponent in range(255):
        power[exponent], log[value] = value, exponent
        value = value << 1 ^ (0x11D if value & 0x80 else 0)

    def times(a: int, b: int) -> int:
        return power[(log[a] + log[b]) % 255] if a and b else 0

    rows = [[1] + [0] * (k - 1)]
    rows += [[power[(row - 1) * column % 255] for column in range(k)] for row in range(1, k + m)]
    # Gauss-Jordan on the columns: the first k rows become the identity.
    for pivot in range(k):
        swap = next(column for column in range(pivot, k) if rows[pivot][column])
        for row in rows:
            row[pivot], row[swap] = row[swap], row[pivot]
        inverse = power[-log[rows[pivot][pivot]] % 255]
        for row in rows:
            row[pivot] = times(row[pivot], inverse)
        for column in range(k):
            factor = rows[pivot][column]
            if column != pivot and factor:
                for row in rows:
                    row[column] ^= times(row[pivot], factor)
    made = []
    for row in rows[k:]:
        line = bytearray(len(data[0]))
        for factor, part in zip(row, data, strict=True):
            for at, byte in enumerate(part):
                line[at] ^= times(factor, byte)
        made.append(bytes(line))
    return made


@pytest.mark.parametrize(("k", "m"), [(2, 1), (4, 2), (5, 4), (10, 3)])
def test_parity_is_what_the_format_says(k: int, m: int) -> None:
    size = k * PAGE
    data = pattern(size)
    shards = [b"".join(map(bytes, shard)) for shard in cut("key", Shape(k, m), Whole([data]))]
    parts = [data[at * PAGE : (at + 1) * PAGE] for at in range(k)]
    bodies = [shard[2 * PAGE : 3 * PAGE] for shard in shards]
    assert bodies[:k] == parts
    assert bodies[k:] == reference_parity(k, m, parts)


# -- losing members ----------------------------------------------------------------------------------------

OBJECTS = {
    NAME: pattern(5 * 1024 * 1024 + 8192),
    "manifests/" + "cd" * 32: pattern(300_001, 1),
    "snapshots/" + "ef" * 32: b"a small one that is named by its digest",
    "heads/main/fffffffffffffffe": b"a record",
    "everstep.json": b"",
}


def filled(store: Store) -> None:
    for key, data in OBJECTS.items():
        assert store.put(key, [data])


def assert_whole(store: ParityStore) -> None:
    assert [(entry.key, entry.size_bytes) for entry in store.list()] == [
        (key, len(OBJECTS[key])) for key in sorted(OBJECTS)
    ]
    for key, data in OBJECTS.items():
        assert bytes(store.get(key)) == data
        assert bytes(store.get(key, 70_000, 300_000)) == data[70_000:370_000]


@pytest.mark.parametrize("lost", list(itertools.combinations(range(6), 2)))
@pytest.mark.parametrize("how", ["away", "wiped", "exchanged"])
def test_any_m_members_can_be_lost(lost: tuple[int, int], how: str) -> None:
    members = memories()
    filled(over(members))
    if how == "exchanged":  # They come back in each other's places, which loses nothing.
        members[lost[0]], members[lost[1]] = members[lost[1]], members[lost[0]]
    if how == "wiped":
        for number in lost:
            members[number] = MemoryStore(str(number))
    store = over(members, away=lost if how == "away" else ())
    assert_whole(store)
    assert store.put("heads/main/fffffffffffffffd", [b"another"])
    assert not store.put("heads/main/fffffffffffffffd", [b"yet another"])
    assert store.put("packs/ac/" + "ac" * 32, [pattern(200_000)])
    assert bytes(over(members).get("packs/ac/" + "ac" * 32)) == pattern(200_000)


def test_one_more_than_m_is_told_and_nothing_is_made_up() -> None:
    members = memories()
    filled(over(members))
    store = over(members, away=(1, 2, 5), clock=no_waiting())
    for verb in (
        lambda: store.get(NAME),
        lambda: store.get("everstep.json"),
        lambda: list(store.list()),
        lambda: store.put("heads/main/fffffffffffffffd", [b"x"]),
        lambda: store.put("packs/ac/" + "ac" * 32, [pattern(200_000)]),
        lambda: store.delete("manifests/" + "cd" * 32),
    ):
        with pytest.raises(Unavailable) as caught:
            verb()
        assert "of the 6 members" in caught.value.problem
        assert "are away" in caught.value.problem
    for number in (1, 2, 5):
        members[number] = MemoryStore(str(number))
    with pytest.raises(NotFound, match="3 of its shards are there, and it takes 4"):
        over(members).get(NAME)
    with pytest.raises(NotFound, match="3 of 6 members hold it, and it takes 4"):
        over(members).get("everstep.json")
    assert listed(over(members)) == ["packs/ab/" + "ab" * 32][:0]
    with pytest.raises(Mismatch, match="fewer than the 4 members"):
        over(members).probe()


def test_what_members_that_were_away_have_not_heard_of_stays_undone() -> None:
    members = memories()
    filled(over(members))
    for key in OBJECTS:
        over(members, away=(0, 1)).delete(key)
    store = over(members)
    assert listed(store) == []
    for key in OBJECTS:
        with pytest.raises(NotFound):
            store.get(key)


def test_a_member_in_which_something_stands_in_the_way_is_one_less(tmp_path: Path) -> None:
    (tmp_path / "1").write_text("a file, where the directory of a member is to be")
    store = open_store("parity:2+1:" + ",".join(str(tmp_path / str(number)) for number in range(3)))
    filled(store)
    assert isinstance(store, ParityStore)
    assert_whole(store)


def test_it_costs_k_plus_m_of_k() -> None:
    members = memories()
    size = 32 * 1024 * 1024
    over(members).put(NAME, [bytes(size)])
    stored = sum(entry.size_bytes for member in members for entry in member.list())
    assert size * 6 / 4 <= stored < size * 6 / 4 * 1.002


def test_a_chunk_is_read_from_two_members_at_most() -> None:
    members = memories()
    data = pattern(32 * 1024 * 1024)
    over(members).put(NAME, [data])
    counting = [FaultyStore(member, verbs=frozenset({"read_into"})) for member in members]
    store = ParityStore(Shape(4, 2), counting)
    buffer = bytearray(8 * 1024 * 1024)
    for start, touched in ((0, 1), (8 << 20, 1), (4 << 20, 2)):
        before = [one.count for one in counting]
        assert store.read_into(NAME, start, [memoryview(buffer)]) == len(buffer)
        assert buffer == data[start : start + len(buffer)]
        assert sum(one.count - was for one, was in zip(counting, before, strict=True)) == touched


# -- damage ------------------------------------------------------------------------------------------------


def change(member: MemoryStore, key: str, to: Callable[[bytearray], bytes | bytearray | None]) -> None:
    data = to(bytearray(member.get(key)))
    member.delete(key)
    if data is not None:
        member.put(key, [bytes(data)])


def flipped(rng: random.Random) -> Callable[[bytearray], bytearray]:
    def flip(data: bytearray) -> bytearray:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return data

    return flip


@pytest.mark.parametrize("seed", range(25))
def test_damage_is_read_past_found_located_and_mended(seed: int) -> None:
    """In any two members at once, in any way."""
    rng = random.Random(seed)
    members = memories()
    filled(over(members))
    before = [{entry.key: bytes(member.get(entry.key)) for entry in member.list()} for member in members]
    key = rng.choice([key for key in OBJECTS if OBJECTS[key]])
    inner = sharded.PREFIX + key if len(OBJECTS[key]) >= SMALL_BYTES else key
    hit = rng.sample(range(6), 2)
    for number in hit:
        ways: list[Callable[[bytearray], bytes | bytearray | None]] = [
            flipped(rng),
            lambda data: data[: rng.randrange(len(data))],
            lambda data: data + bytes(1 + rng.randrange(5000)),
            lambda data: None,
            lambda data: bytes(len(data)),
        ]
        change(members[number], inner, rng.choice(ways))
    store = over(members)
    assert_whole(store)
    flaws = store.flaws(key)
    assert len(flaws) == 2
    assert all(any(members[number].url in flaw for flaw in flaws) for number in hit)
    assert all(not store.flaws(other) for other in OBJECTS if other != key)
    assert len(store.mend(key)) == 2
    assert store.flaws(key) == store.mend(key) == []
    after = [{entry.key: bytes(member.get(entry.key)) for entry in member.list()} for member in members]
    assert after == before


def test_damage_in_more_than_m_members_but_never_in_more_of_one_block() -> None:
    members = memories()
    data = pattern(4 * 20 * BLOCK_BYTES)
    over(members).put(NAME, [data])
    for number, member in enumerate(members):
        key = sharded.PREFIX + NAME
        change(
            member,
            key,
            lambda shard, at=3 * BLOCK_BYTES * number: shard[: 9000 + at] + b"?" + shard[9001 + at :],
        )  # type: ignore[misc]
    store = over(members)
    assert bytes(store.get(NAME)) == data
    assert len(store.mend(NAME)) == 6
    assert store.flaws(NAME) == []


def test_too_much_damage_is_named() -> None:
    members = memories()
    filled(over(members))
    for key in (NAME, "everstep.json"):
        inner = sharded.PREFIX + key if key == NAME else key
        for member in members[1:4]:
            change(member, inner, lambda data: bytes([255 - data[-100 % len(data)]]) * len(data))
        store = over(members)
        for verb in (store.get, store.flaws, store.mend):
            with pytest.raises(Damaged) as caught:
                verb(key)
            assert caught.value.key == key
            assert "it takes 4" in caught.value.problem


@pytest.mark.parametrize("key", [NAME, "heads/main/fffffffffffffffe"])
@pytest.mark.parametrize("done", [False, True])
def test_a_mend_killed_at_any_operation_is_completed_by_the_next(key: str, done: bool) -> None:
    inner = sharded.PREFIX + key if key == NAME else key
    for number in itertools.count():
        members = memories()
        filled(over(members))
        before = {entry.key: bytes(members[1].get(entry.key)) for entry in members[1].list()}
        change(members[1], inner, flipped(random.Random(number)))
        dying = FaultyStore(members[1], number, Died, done=done, verbs=frozenset({"put", "delete"}))
        store = ParityStore(Shape(4, 2), [members[0], dying, *members[2:]])
        try:
            store.mend(key)
        except Died:
            pass
        else:
            assert number > 2
            return
        store = over(members)
        assert_whole_but_spares(store, members)
        store.mend(key)
        assert store.flaws(key) == []
        after = {entry.key: bytes(members[1].get(entry.key)) for entry in members[1].list()}
        assert {name: after[name] for name in before} == before


def assert_whole_but_spares(store: ParityStore, members: Sequence[Store]) -> None:
    for key, data in OBJECTS.items():
        assert bytes(store.get(key)) == data
    assert not any(entry.key.startswith("repair/") for entry in store.list())


# -- races -------------------------------------------------------------------------------------------------

KEY = "heads/main/fffffffffffffffe"


@pytest.mark.parametrize("away", [(), (0,), (0, 1), (2, 5)])
@pytest.mark.parametrize("key", [KEY, NAME])
def test_exactly_one_of_many_creates(away: tuple[int, ...], key: str) -> None:
    for number in range(20):
        members = memories()
        contents = [f"{number} of {one}".encode() for one in range(8)]
        if key == NAME:
            contents = [pattern(SMALL_BYTES)] * 8
        won = in_threads(
            8, lambda one, members=members, contents=contents: over(members, away).put(key, [contents[one]])
        )  # type: ignore[misc]
        assert won.count(True) == 1, won
        assert won.count(False) == 7
        assert bytes(over(members, away).get(key)) == contents[won.index(True)]


def test_members_that_come_and_go_never_let_two_win() -> None:
    """Each racer sees other members away, at every moment. That nobody wins can happen; that two do, or that
    what was shown is another's later, never."""
    outcomes = []
    for seed in range(150):
        rng = random.Random(seed)
        lock = threading.Lock()
        members = memories()

        def away(rng: random.Random = rng, lock: threading.Lock = lock) -> bool:
            with lock:
                return rng.random() < 0.12

        def race(one: int, members: list[MemoryStore] = members) -> object:
            store = ParityStore(Shape(4, 2), [Flaky(member, away) for member in members], clock=no_waiting())
            try:
                return store.put(KEY, [f"by {one}".encode()])
            except Unavailable:
                return None

        won = in_threads(5, race)
        assert won.count(True) <= 1
        try:
            shown = bytes(over(members).get(KEY)).decode()
        except NotFound:
            shown = ""
            assert True not in won
            assert False not in won
        if True in won:
            assert shown == f"by {won.index(True)}"
        # Whoever comes later, while all are there, is told what had been shown, or is the first.
        again = over(members, clock=no_waiting())
        try:
            created = again.put(KEY, [b"late"])
        except Unavailable:
            created = None
            assert not shown
        if shown:
            assert not created
            assert bytes(again.get(KEY)).decode() == shown
        outcomes.append((True in won, bool(shown), created))
    assert sum(won for won, _, _ in outcomes) > 50


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("at", range(6))
def test_what_a_killed_putter_left_is_completed_by_the_next(at: int, done: bool) -> None:
    members = memories()
    killed = ParityStore(Shape(4, 2), [
        FaultyStore(member, 0, Died, done=done, verbs=frozenset({"put"})) if number == at else member
        for number, member in enumerate(members)
    ])  # fmt: skip
    with pytest.raises(Died):
        killed.put(KEY, [b"of the dead"])
    held = at + done
    store = over(members, clock=no_waiting())
    assert listed(store) == ([KEY] if held >= 4 else [])
    assert store.put(KEY, [b"of the living"]) is (held == 0)
    assert bytes(store.get(KEY)) == (b"of the living" if held == 0 else b"of the dead")
    store.mend(KEY)
    assert store.flaws(KEY) == []


def test_a_split_that_none_can_win_is_told_and_nothing_is_shown() -> None:
    members = memories()
    for number, member in enumerate(members):
        content = f"by {number // 2}".encode()
        member.put(KEY, [copy_of(KEY, Shape(4, 2), [content], bytes([number // 2] * 16))])
    store = over(members, clock=no_waiting())
    with pytest.raises(Unavailable, match="none of them can come to the 4 that it takes"):
        store.put(KEY, [b"3"])
    with pytest.raises(NotFound):
        store.get(KEY)
    # Who comes next sees that the number is taken, and takes the one after it.
    assert listed(store) == [KEY]
    assert store.put("heads/main/fffffffffffffffd", [b"4"])


def test_a_creation_that_was_killed_is_gone_on_with() -> None:
    members = memories()
    killed = [FaultyStore(members[0], 0, Died, done=True, verbs=frozenset({"put"})), *members[1:]]
    with pytest.raises(Died):
        Chain.create(ParityStore(Shape(4, 2), killed))
    chain = Chain.create(over(members, clock=no_waiting()))
    assert [entry.key for entry in members[0].list()] == ["everstep.json"]
    assert Chain(over(members)).about == chain.about


def test_a_listing_that_cannot_know_says_so() -> None:
    """A record that two of four members show may be a head that the two others have, too."""
    members = memories()
    over(members, away=(4, 5)).put(KEY, [b"x"])
    assert listed(over(members)) == [KEY]
    assert listed(over(members, away=(4, 5))) == [KEY]
    with pytest.raises(Unavailable):
        listed(over(members, away=(0, 1), clock=no_waiting()))
    with pytest.raises(Unavailable):
        over(members, away=(0, 4), clock=no_waiting()).get(KEY)


def test_a_member_that_is_slow_to_say_that_it_is_away_is_left_alone_for_a_while() -> None:
    members = memories(3)
    now, asked = [0.0], [0]

    def slow() -> bool:
        asked[0] += 1
        now[0] += 30
        return True

    clock = Clock(now=lambda: now[0], sleep=lambda seconds: None)
    store = ParityStore(Shape(2, 1), [members[0], Flaky(members[1], slow), members[2]], clock=clock)
    store.put("heads/main/a", [b"x"])
    assert asked == [1]
    for _ in range(5):
        assert bytes(store.get("heads/main/a")) == b"x"
        assert listed(store) == ["heads/main/a"]
    assert asked == [1]
    now[0] += 301
    store.get("heads/main/a")
    assert asked == [2]


def test_two_processes_with_a_set(tmp_path: Path) -> None:
    """One puts, and another one, in another directory, reads it by the address, with two members deleted."""
    places = [tmp_path / str(number) for number in range(6)]
    store = open_store("parity:4+2:" + ",".join(map(str, places)))
    assert isinstance(store, Addressed)
    store.put(NAME, [pattern(1_000_000)])
    for number in (0, 4):
        shutil.rmtree(places[number])
    code = (
        "import sys; from everstep.store.urls import open_store; "
        "sys.stdout.buffer.write(open_store(sys.argv[1]).get(sys.argv[2]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, store.address, NAME], capture_output=True, check=True, timeout=60
    )
    assert done.stdout == pattern(1_000_000)
    assert parse(store.address)[0] == Shape(4, 2)
    assert isinstance(store.members[0], LocalStore)
