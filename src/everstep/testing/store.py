"""The contract of a store as a test suite.

Whoever writes a store runs it under pytest against their own:

    class TestMyStore(StoreContract):
        @pytest.fixture
        def store(self) -> Store:
            return MyStore(...)

The store must be empty at the start of each test. Nothing here needs a store to be fast, or a directory.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from everstep.errors import Conflict, NotFound
from everstep.store.base import Buffer, Store
from everstep.store.deleting import delete_all

THREADS = 8
ROUNDS = 60
LISTED = 100
LARGE_BYTES = 20 * 1024 * 1024

RANGES = [
    (0, None), (0, 0), (0, 1), (0, 4096), (1, None), (1, 1), (4095, 2), (4096, 4096), (4097, 5000),
    (9998, 1), (9998, None), (9999, 1), (9999, None), (9999, 0), (10_000, 1), (10_000, None), (123_456, 7),
    (0, 9999), (0, 10_000), (0, 1 << 40), (9000, 1 << 40),
]  # fmt: skip
"""(start, size) in an object of 9999 bytes: whole, within, up to the end, across it, and past it."""

BAD_KEYS = [
    "", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", ".hidden", "a/.hidden", "-a", "a/-b",
    "a b", "a\n", "a\x00", "a\\b", "ä", "a:b", "a*", "a?", "a%2e", "a" * 256, "/".join(["abcd"] * 103),
]  # fmt: skip

IN_ORDER = [
    "A", "A-b", "Z/a", "_", "a-b", "a-b0/c", "a-c/b", "a.b", "a.b0/c", "a/0b", "a/b", "a/b-c/d", "a/b.c/d",
    "a/b0", "a0/b", "a1", "aa", "ab", "b/00", "b/0a", "b/a0", "b/f", "b/ff",
]  # fmt: skip
"""Keys that sort otherwise where directories are gone through without thought; `_in_order` sorts them."""

PREFIXES = [
    "", "a", "a/", "a-", "a.", "a/b", "a/b/", "a/b-", "b/", "b/0", "b/ff", "b/fff", "zz", "A", "a-b/c",
]  # fmt: skip


def pattern(size_bytes: int, seed: int = 0) -> bytes:
    """Bytes that are the same in every run and in which no part looks like another."""
    return random.Random(f"{seed}/{size_bytes}").randbytes(size_bytes)


def odd_parts(data: bytes) -> list[Buffer]:
    """`data` in parts of odd sizes, of every kind a store must take, with empty ones between."""
    sizes = itertools.cycle([1, 4095, 0, 4096, 77_777, 4097, 1_048_576, 13, 65_536, 3])
    parts: list[Buffer] = []
    at = 0
    for number, size in enumerate(sizes):
        part = data[at : at + size]
        kinds: tuple[Buffer, ...] = (part, bytearray(part), memoryview(part))
        parts.append(kinds[number % 3])
        at += size
        if at >= len(data):
            return parts
    raise AssertionError("the sizes never end")


def in_threads(count: int, work: Callable[[int], object]) -> list[object]:
    """What `work(0)`, `work(1)`, ... return, begun at the same time in threads of their own."""
    start = threading.Barrier(count)

    def begin(number: int) -> object:
        start.wait(60)
        return work(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(begin, range(count)))


def listed(store: Store, prefix: str = "", limit: int | None = None) -> list[str]:
    return [entry.key for entry in store.list(prefix, limit)]


def put_all(store: Store, names: Iterable[str]) -> None:
    """Several at once: some stores take their time for each."""
    with ThreadPoolExecutor(THREADS) as threads:
        assert all(threads.map(lambda name: store.put(name, [name.encode()]) is True, names))


def _in_order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=str.encode)


class StoreContract:
    """Subclass it and override `store`."""

    @pytest.fixture
    def store(self) -> Store:
        """An empty store."""
        raise NotImplementedError("override the fixture `store` with one that gives an empty store")

    # -- put ----------------------------------------------------------------------------------------------

    def test_is_a_store_with_a_url(self, store: Store) -> None:
        assert isinstance(store, Store)
        assert isinstance(store.url, str)
        assert store.url

    def test_what_was_put_comes_back(self, store: Store) -> None:
        assert store.put("a/b", [b"one ", bytearray(b"two "), memoryview(b"three")]) is True
        assert bytes(store.get("a/b")) == b"one two three"

    def test_nothing_is_overwritten(self, store: Store) -> None:
        assert store.put("key", [b"first"]) is True
        for other in (b"second, and longer", b"1st", b"", b"first"):
            assert store.put("key", [other]) is False
        assert bytes(store.get("key")) == b"first"
        assert [(entry.key, entry.size_bytes) for entry in store.list()] == [("key", 5)]

    def test_an_object_is_its_own(self, store: Store) -> None:
        """Neither the buffers that were put nor those that came back are the object."""
        source = bytearray(b"before")
        store.put("key", [source, memoryview(source)])
        source[:] = b"after!"
        back = store.get("key")
        if not memoryview(back).readonly:
            memoryview(back)[:] = bytes(len(back))
        assert bytes(store.get("key")) == b"beforebefore"

    @pytest.mark.parametrize("parts", [[], [b""], [b"", bytearray(), memoryview(b"")]])
    def test_empty_objects(self, store: Store, parts: list[Buffer]) -> None:
        assert store.put("empty", parts) is True
        assert store.put("empty", [b"x"]) is False
        assert bytes(store.get("empty")) == b""
        assert bytes(store.get("empty", 0, 10)) == b""
        assert bytes(store.get("empty", 10)) == b""
        assert store.read_into("empty", 0, [memoryview(bytearray(4))]) == 0
        assert [(entry.key, entry.size_bytes) for entry in store.list()] == [("empty", 0)]

    @pytest.mark.parametrize("size_bytes", [1, 4095, 4096, 4097, 1_048_575, 1_048_576, 1_048_577, 5_000_001])
    def test_sizes_around_blocks(self, store: Store, size_bytes: int) -> None:
        data = pattern(size_bytes)
        assert store.put("key", odd_parts(data)) is True
        assert bytes(store.get("key")) == data

    def test_a_large_object_in_odd_parts(self, store: Store) -> None:
        data = pattern(LARGE_BYTES + 12_345)
        assert store.put("large", odd_parts(data)) is True
        assert [entry.size_bytes for entry in store.list()] == [len(data)]
        assert bytes(store.get("large")) == data
        middle = 8 * 1024 * 1024
        assert bytes(store.get("large", middle - 5, 4_000_000)) == data[middle - 5 : middle - 5 + 4_000_000]
        buffer = bytearray(len(data))
        assert store.read_into("large", 0, _cut(buffer, [7_000_001, 3, 9_000_000])) == len(data)
        assert buffer == data

    def test_thousands_of_parts(self, store: Store) -> None:
        data = pattern(30_000)
        assert store.put("key", [data[at : at + 7] for at in range(0, len(data), 7)]) is True
        assert bytes(store.get("key")) == data

    def test_parts_of_a_larger_buffer(self, store: Store) -> None:
        """As a writer puts chunks out of an arena: views of it, in any order."""
        arena = memoryview(bytearray(pattern(3_000_000)))
        parts = [arena[2_000_000:], arena[:1], arena[4096:8192], arena[1_000_001:2_000_000]]
        store.put("key", parts)
        assert bytes(store.get("key")) == b"".join(map(bytes, parts))

    # -- get and read_into --------------------------------------------------------------------------------

    def test_ranges(self, store: Store) -> None:
        data = pattern(9999)
        store.put("key", [data])
        for start, size_bytes in RANGES:
            end = len(data) if size_bytes is None else start + size_bytes
            assert bytes(store.get("key", start, size_bytes)) == data[start:end], (start, size_bytes)

    @pytest.mark.parametrize("start", [0, 1, 4096, 9000, 9998, 9999, 20_000])
    def test_reads_into_buffers(self, store: Store, start: int) -> None:
        """The buffers are filled one after the other; what the object does not reach stays as it is."""
        data = pattern(9999)
        store.put("key", [data])
        for sizes in ([], [0], [1], [0, 5, 0, 0, 3], [4096, 4096], [1, 9997, 1], [9000, 9000]):
            buffer = bytearray(b"\xaa" * sum(sizes))
            count = store.read_into("key", start, _cut(buffer, sizes))
            wanted = data[start : start + len(buffer)]
            assert count == len(wanted), sizes
            assert buffer == wanted + b"\xaa" * (len(buffer) - len(wanted)), sizes

    def test_reads_into_thousands_of_buffers(self, store: Store) -> None:
        data = pattern(9999)
        store.put("key", [data])
        buffer = bytearray(12_000)
        assert store.read_into("key", 0, _cut(buffer, [3] * 4000)) == 9999
        assert buffer == data + bytes(2001)

    def test_a_missing_object_is_not_found(self, store: Store) -> None:
        store.put("there", [b"x"])
        buffer = memoryview(bytearray(3))
        reads: list[Callable[[str], object]] = [
            store.get,
            lambda key: store.get(key, 5, 0),
            lambda key: store.get(key, 1 << 40),
            lambda key: store.read_into(key, 0, [buffer]),
            lambda key: store.read_into(key, 0, []),
        ]
        for read, key in itertools.product(reads, ["missing", "the", "there0", "a/b/c", "there/below"]):
            with pytest.raises(NotFound) as caught:
                read(key)
            assert caught.value.key == key

    # -- keys ---------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_bad_keys_are_the_callers_bug(self, store: Store, key: str) -> None:
        uses: list[Callable[[], object]] = [
            lambda: store.put(key, [b"x"]),
            lambda: store.get(key),
            lambda: store.read_into(key, 0, []),
            lambda: store.delete(key),
        ]
        for use in uses:
            with pytest.raises(ValueError):
                use()
        assert listed(store) == []

    @pytest.mark.parametrize(
        "key", ["a", "_", "0", "A.b-c_d", "a" * 255, "/".join(["a" * 255, "b" * 254, "c"])]
    )
    def test_keys_as_long_as_may_be(self, store: Store, key: str) -> None:
        assert store.put(key, [b"x"]) is True
        assert bytes(store.get(key)) == b"x"
        assert listed(store) == [key]
        store.delete(key)
        assert listed(store) == []

    def test_case_matters(self, store: Store) -> None:
        put_all(store, ["heads/Main/1", "heads/main/1"])
        assert bytes(store.get("heads/main/1")) == b"heads/main/1"
        assert listed(store, "heads/M") == ["heads/Main/1"]

    def test_a_prefix_is_no_object(self, store: Store) -> None:
        store.put("a/b/c", [b"x"])
        for prefix in ("a", "a/b"):
            with pytest.raises(NotFound):
                store.get(prefix)
            store.delete(prefix)
        assert listed(store, "a") == ["a/b/c"]

    @pytest.mark.parametrize(("there", "other"), [("a", "a/b"), ("a", "a/b/c"), ("a/b", "a"), ("a/b/c", "a")])
    def test_an_object_where_a_directory_would_be(self, store: Store, there: str, other: str) -> None:
        """It is put or refused, never taken for one that exists, and no harm is done."""
        store.put(there, [b"there"])
        try:
            assert store.put(other, [b"other"]) is True
            assert bytes(store.get(other)) == b"other"
        except Conflict:
            with pytest.raises(NotFound):
                store.get(other)
            assert listed(store) == [there]
        assert bytes(store.get(there)) == b"there"

    # -- list ---------------------------------------------------------------------------------------------

    def test_lists_nothing_where_nothing_is(self, store: Store) -> None:
        assert listed(store) == []
        assert listed(store, "a/b") == []
        assert listed(store, "a/b/", limit=1) == []

    def test_lists_in_the_order_of_bytes(self, store: Store) -> None:
        names = _in_order(IN_ORDER)
        put_all(store, random.Random(1).sample(names, len(names)))
        assert listed(store) == names
        assert [entry.size_bytes for entry in store.list()] == list(map(len, names))

    @pytest.mark.parametrize("names", list(itertools.permutations(["a-b", "a.b", "a/b"])))
    def test_a_slash_sorts_after_minus_and_dot(self, store: Store, names: Sequence[str]) -> None:
        put_all(store, [f"{name}/x" for name in names])
        assert listed(store) == ["a-b/x", "a.b/x", "a/b/x"]

    def test_prefixes(self, store: Store) -> None:
        """A prefix is of the key's text, not a directory."""
        put_all(store, IN_ORDER)
        for prefix in PREFIXES:
            wanted = [name for name in _in_order(IN_ORDER) if name.startswith(prefix)]
            assert listed(store, prefix) == wanted, prefix

    def test_a_prefix_that_no_key_has(self, store: Store) -> None:
        put_all(store, IN_ORDER)
        for prefix in ("/", "..", "../", "a//", "/etc/", "a/../", "%", "a\n"):
            assert listed(store, prefix) == [], prefix

    def test_limits(self, store: Store) -> None:
        put_all(store, IN_ORDER)
        for prefix in ("", "a", "b/"):
            there = listed(store, prefix)
            for limit in (0, 1, 2, 5, 22, 1000):
                assert listed(store, prefix, limit) == there[:limit], (prefix, limit)

    def test_the_newest_of_numbers_that_count_down_is_first(self, store: Store) -> None:
        for number in range(1, 20):
            store.put(f"heads/main/{0xFFFF_FFFF_FFFF_FFFF - number:016x}", [str(number).encode()])
            newest = listed(store, "heads/main/", limit=1)
            assert bytes(store.get(newest[0])) == str(number).encode()

    def test_entries_say_when(self, store: Store) -> None:
        put_all(store, ["a", "b"])
        times = [entry.modified_at for entry in store.list()]
        assert all(isinstance(time, float) and time > 1e9 for time in times)
        assert abs(times[0] - times[1]) < 600

    def test_a_listing_bears_changes(self, store: Store) -> None:
        """Pruning deletes while it lists, and others put: all that stays is listed once."""
        put_all(store, [f"a/{number:03}" for number in range(LISTED)])
        seen = []
        for number, entry in enumerate(store.list("a/")):
            seen.append(entry.key)
            store.delete(entry.key)
            store.put(f"a/{number:03}-", [b"new"])
            store.put(f"b/{number:03}", [b"new"])
        kept = [key for key in seen if not key.endswith("-")]
        assert kept == [f"a/{number:03}" for number in range(LISTED)]
        assert len(seen) == len(set(seen))

    # -- delete -------------------------------------------------------------------------------------------

    def test_delete_can_be_done_again(self, store: Store) -> None:
        put_all(store, ["a/b", "a/c", "a/b0"])
        for _ in range(3):
            store.delete("a/b")
            store.delete("never/was")
            store.delete("a/b/below")
            assert listed(store) == ["a/b0", "a/c"]
        with pytest.raises(NotFound):
            store.get("a/b")

    def test_many_are_deleted_at_once(self, store: Store) -> None:
        names = [f"many/{number:04}" for number in range(20)]
        put_all(store, [*names, "other/0001"])
        delete_all(store, [*names[::2], "many/never"])
        assert listed(store) == [*names[1::2], "other/0001"]
        delete_all(store, names)
        delete_all(store, [])
        assert listed(store) == ["other/0001"]

    def test_a_key_is_free_again_after_a_delete(self, store: Store) -> None:
        store.put("key", [b"old and long"])
        store.delete("key")
        assert store.put("key", [b"new"]) is True
        assert bytes(store.get("key")) == b"new"

    # -- several at once ----------------------------------------------------------------------------------

    def test_of_several_putting_one_key_exactly_one_gets_it(self, store: Store) -> None:
        for turn in range(ROUNDS):
            # Small objects and large ones may take different ways to the disk.
            size = 1_100_000 if turn % 20 == 0 else 100
            made = [pattern(size, seed=number) for number in range(THREADS)]
            answers = in_threads(
                THREADS,
                lambda number, made=made, turn=turn: store.put(f"race/{turn}", [made[number]]),  # type: ignore[misc]
            )
            assert sorted(map(bool, answers)) == [False] * (THREADS - 1) + [True]
            assert all(type(answer) is bool for answer in answers)
            assert bytes(store.get(f"race/{turn}")) == made[answers.index(True)]
        assert len(listed(store)) == ROUNDS

    def test_several_put_different_keys(self, store: Store) -> None:
        def work(number: int) -> int:
            return sum(store.put(f"deep/{turn}/{number}", [b"x" * number]) for turn in range(25))

        assert in_threads(THREADS, work) == [25] * THREADS
        assert len(listed(store)) == THREADS * 25

    def test_an_object_appears_whole(self, store: Store) -> None:
        """Readers at any instant find no object, or all of it."""
        data = pattern(2_500_000)
        for turn in range(6):
            key = f"whole/{turn}"

            def work(number: int, key: str = key) -> None:
                if number == 0:
                    assert store.put(key, odd_parts(data)) is True
                    return
                while not _seen_whole(store, key, data):
                    pass

            in_threads(3, work)


def _seen_whole(store: Store, key: str, data: bytes) -> bool:
    """Whether the object is there; where it is, it is whole by every verb."""
    for entry in store.list(key):
        assert entry.size_bytes == len(data)
        assert bytes(store.get(key)) == data
    try:
        assert bytes(store.get(key, len(data) - 3)) == data[-3:]
    except NotFound:
        return False
    return True


def _cut(buffer: bytearray, sizes: Sequence[int]) -> list[memoryview]:
    """Views of `buffer`, so large each and one after the other; the last takes the rest."""
    views = []
    rest = memoryview(buffer)
    for size in sizes:
        views.append(rest[:size])
        rest = rest[size:]
    return [*views, rest] if len(rest) else views
