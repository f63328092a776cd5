"""Key names: the newest first, nothing outside the chain, and no name that is no key."""

from __future__ import annotations

import pytest
from hostile import same_every_time
from hypothesis import given
from hypothesis import strategies as st

from everstep.errors import Mismatch
from everstep.format import keys
from everstep.store.base import is_key

NAMES = ["main", "v1.0-rc", "_", "0", "A" * 100, "a.b_c-d"]
NO_NAMES = ["", ".", "..", "a/b", "-a", ".a", "a b", "a\n", "ä", "a" * 101, "a:b", "../a", "a\x00"]


@same_every_time
@given(st.lists(st.integers(1, 2**63), min_size=2, max_size=20, unique=True))
def test_the_newest_sorts_first(numbers: list[int]) -> None:
    made = [keys.numbered(keys.head("main"), number) for number in numbers]
    assert [keys.number_of(key) for key in sorted(made)] == sorted(numbers, reverse=True)
    assert all(is_key(key) for key in made)


@same_every_time
@given(st.lists(st.integers(0, 2**63), min_size=2, max_size=20, unique=True))
def test_segments_sort_in_the_order_of_steps(steps: list[int]) -> None:
    made = [keys.segment("main", 3, step) for step in steps]
    assert sorted(made) == [keys.segment("main", 3, step) for step in sorted(steps)]
    assert all(key.startswith(keys.steplog("main")) and is_key(key) for key in made)


@pytest.mark.parametrize(
    "key", ["heads/main/", "heads/main/x", "heads/main/FFFFFFFFFFFFFFFE", "a/ffe", "a/" + "f" * 17]
)
def test_keys_without_a_number(key: str) -> None:
    assert keys.number_of(key) is None


def test_objects_are_found_under_their_digests() -> None:
    digest = "ab" + "cd" * 31
    assert keys.pack(digest) == f"packs/ab/{digest}"
    assert keys.manifest(digest) == f"manifests/{digest}"
    assert keys.snapshot(digest) == f"snapshots/{digest}"


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    assert keys.head(name) == f"heads/{name}/"
    assert keys.tag(name) == f"tags/{name}/"
    assert is_key(keys.numbered(keys.head(name), 1))


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_that_cannot_be(name: str) -> None:
    for prefix in (keys.head, keys.tag, keys.steplog):
        with pytest.raises(Mismatch, match="cannot name"):
            prefix(name)
    with pytest.raises(Mismatch):
        keys.segment(name, 1, 1)
