from __future__ import annotations

from collections.abc import Callable

import pytest

from everstep.errors import NotFound, Unavailable
from everstep.store.base import Store
from everstep.store.local import LocalStore
from everstep.store.memory import MemoryStore
from everstep.store.replicated import AWAY_S, ReplicatedStore, copies_of
from everstep.testing.faults import READS, WRITES, FaultyStore
from everstep.testing.store import StoreContract


@pytest.mark.slow
class TestReplicatedPair(StoreContract):
    @pytest.fixture
    def store(self, tmp_path_factory: pytest.TempPathFactory) -> Store:
        return ReplicatedStore(LocalStore(tmp_path_factory.mktemp("first")), [MemoryStore("second")])


class Away(FaultyStore):
    """Answers nothing while `away`; counts what it was asked."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner, verbs=READS | WRITES)
        self.away = True

    def _strikes(self, verb: str) -> bool:
        self.count += 1
        if self.away:
            raise Unavailable(f"{self.url} is away")
        return False


def pair() -> tuple[MemoryStore, MemoryStore]:
    first, second = MemoryStore("first"), MemoryStore("second")
    first.put("both", [b"first's"])
    second.put("both", [b"second's"])
    first.put("a/1", [b"one"])
    second.put("b/2", [b"two"])
    return first, second


def test_what_the_first_lacks_comes_from_another() -> None:
    store = ReplicatedStore(*_split(pair()))
    assert bytes(store.get("both")) == b"first's"
    assert bytes(store.get("b/2", 1)) == b"wo"
    buffer = bytearray(3)
    assert store.read_into("b/2", 0, [memoryview(buffer)]) == 3
    assert buffer == b"two"
    with pytest.raises(NotFound):
        store.get("neither")


def test_a_listing_is_that_of_all_in_order() -> None:
    store = ReplicatedStore(*_split(pair()))
    assert [(entry.key, entry.size_bytes) for entry in store.list()] == [("a/1", 3), ("b/2", 3), ("both", 7)]
    assert [entry.key for entry in store.list("b", limit=1)] == ["b/2"]


def test_what_is_put_and_deleted_is_so_in_the_first_alone() -> None:
    first, second = pair()
    store = ReplicatedStore(first, [second])
    assert store.put("b/2", [b"own"])
    store.delete("both")
    assert bytes(store.get("b/2")) == b"own"
    assert bytes(store.get("both")) == b"second's"
    assert sorted(entry.key for entry in second.list()) == ["b/2", "both"]


ASKED: list[Callable[[Store], object]] = [
    lambda store: bytes(store.get("both")),
    lambda store: store.read_into("both", 0, [memoryview(bytearray(8))]),
    lambda store: [entry.key for entry in store.list()],
]


@pytest.mark.parametrize("ask", ASKED)
def test_a_first_that_is_away_is_got_round(ask: Callable[[Store], object]) -> None:
    first, second = pair()
    assert ask(ReplicatedStore(Away(first), [second])) == ask(second)
    assert ask(ReplicatedStore(first, [Away(second)])) == ask(first)
    with pytest.raises(Unavailable):
        ask(ReplicatedStore(Away(first), [Away(second)]))


def test_that_one_is_away_weighs_more_than_that_another_has_nothing() -> None:
    first, second = pair()
    for store in (ReplicatedStore(Away(first), [second]), ReplicatedStore(second, [Away(first)])):
        with pytest.raises(Unavailable):
            store.get("a/1")


def test_one_that_did_not_answer_is_asked_last_for_a_while() -> None:
    first, second = pair()
    away = Away(first)
    now = [0.0]
    store = ReplicatedStore(away, [second], clock=lambda: now[0])
    for _ in range(5):
        assert bytes(store.get("both")) == b"second's"
    assert away.count == 1
    away.away = False
    assert bytes(store.get("a/1")) == b"one", "it is asked where no other has it"
    assert bytes(store.get("both")) == b"first's", "it answered, so it is the first again"
    away.away = True
    store.get("both")
    away.away = False
    now[0] += AWAY_S
    assert bytes(store.get("both")) == b"first's"


def test_who_checks_digests_can_ask_each() -> None:
    first, second = pair()
    assert [bytes(one.get("both")) for one in copies_of(ReplicatedStore(first, [second]))] == [
        b"first's",
        b"second's",
    ]
    assert list(copies_of(first)) == [first]


def _split(stores: tuple[MemoryStore, MemoryStore]) -> tuple[Store, list[Store]]:
    return stores[0], [stores[1]]
