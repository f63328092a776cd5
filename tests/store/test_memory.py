"""The store in memory keeps the contract."""

from __future__ import annotations

import pytest

from everstep.store.base import Store
from everstep.store.memory import MemoryStore
from everstep.testing.store import StoreContract


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


def test_two_stores_share_nothing() -> None:
    one, other = MemoryStore("one"), MemoryStore("other")
    one.put("key", [b"x"])
    assert list(other.list()) == []
    assert (one.url, other.url) == ("memory://one", "memory://other")
