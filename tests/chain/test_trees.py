"""Where two trees of plain values differ."""

from __future__ import annotations

import math
import struct
from collections import OrderedDict, deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.chain.trees import ABSENT, FEW, ValueChange, differences, number_of, plain, shown
from everstep.format.values import Leaf, Scalar, Symbol, encode
from examples import examples

same_every_time = settings(deadline=None, derandomize=True, database=None, max_examples=examples(150))

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=5)
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=3), inner, max_size=4),
    ),
    max_leaves=12,
)


def changes(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    return {one.path: (one.before, one.after) for one in differences(before, after)}


@same_every_time
@given(tree=TREES)
def test_a_tree_does_not_differ_from_itself(tree: Any) -> None:
    assert list(differences(tree, tree)) == []


@same_every_time
@given(before=TREES, after=TREES)
def test_trees_of_other_bytes_differ_somewhere(before: Any, after: Any) -> None:
    """Lists and dicts: what is said is nothing exactly where the encodings are the same."""
    ordered = _sorted(before), _sorted(after)
    assert bool(list(differences(*ordered))) == (encode(ordered[0]) != encode(ordered[1]))


def _sorted(tree: Any) -> Any:
    """The order of keys is no difference of a value."""
    if isinstance(tree, dict):
        return {key: _sorted(tree[key]) for key in sorted(tree)}
    return type(tree)(map(_sorted, tree)) if isinstance(tree, list | tuple) else tree


def test_paths_lead_to_what_differs() -> None:
    before = {
        "optimizer": {"param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "best": 1.0,
        "gone": {"a": 1},
    }
    after = {"optimizer": {"param_groups": [{"lr": 0.01, "betas": (0.9, 0.95)}]}, "best": 1, "new": [1]}
    assert changes(before, after) == {
        "optimizer/param_groups/0/lr": (0.1, 0.01),
        "optimizer/param_groups/0/betas/1": (0.99, 0.95),
        "best": (1.0, 1),
        "gone/a": (1, ABSENT),
        "new": (ABSENT, [1]),
    }


def test_leaves_are_not_values() -> None:
    tensors = {"a": Leaf("x/a"), "b": [Leaf("x/b")]}
    assert changes(tensors, {"a": Leaf("x/c"), "b": [Leaf("x/b")]}) == {}
    assert changes({}, {"a": Leaf("x/a")}) == {}
    assert changes({"state": {}, "a": 1}, {"state": {0: {"m": Leaf("m")}}, "a": 1}) == {}
    assert changes({"a": Leaf("x/a")}, {"a": 3}) == {"a": (Leaf("x/a"), 3)}


def test_a_list_that_differs_everywhere_is_one_difference() -> None:
    few, many = [0] * FEW, [0] * (FEW + 1)
    assert len(changes(few, [1] * FEW)) == FEW
    assert changes({"h": many}, {"h": [1] * (FEW + 1)}) == {"h": (many, [1] * (FEW + 1))}
    assert changes({"h": [0] * 3}, {"h": [0] * 4}) == {"h": ([0] * 3, [0] * 4)}
    assert changes({"h": [0] * 100}, {"h": [0] * 99 + [7]}) == {"h/99": (0, 7)}


def test_nan_is_nan_and_one_is_not_true() -> None:
    assert changes({"a": math.nan}, {"a": math.nan}) == {}
    assert changes({"a": 1}, {"a": True}) == {"a": (1, True)}
    assert changes({"a": 0.0}, {"a": -0.0}).keys() == {"a"}
    assert changes([1, 2], (1, 2)) == {"": ([1, 2], (1, 2))}
    assert changes(deque([1], 3), deque([2], 3)) == {"0": (1, 2)}
    assert changes({"a": {}}, {}) == {"a": ({}, ABSENT)}
    assert changes({"a": None}, {"a": OrderedDict(b=1)}) == {"a": (None, OrderedDict(b=1))}


@pytest.mark.parametrize(
    ("value", "text", "in_json"),
    [
        (0.1, "0.1", 0.1),
        (math.inf, "inf", "inf"),
        (None, "None", None),
        (True, "True", True),
        ("adam", "adam", "adam"),
        ("", "''", ""),
        (ABSENT, "-", None),
        (Leaf("x"), "a tensor", "a tensor"),
        (Symbol("torch.dtype", "bfloat16"), "torch.bfloat16", "torch.bfloat16"),
        (Scalar("<f4", struct.pack("<f", 0.5)), "0.5", 0.5),
        (Scalar(">i8", struct.pack(">q", -2)), "-2", -2),
        (Scalar("|b1", b"\1"), "True", True),
        (Scalar("<f4", b"short"), "numpy <f4 73686f7274", "numpy <f4 73686f7274"),
        (list(range(3)), "[0, 1, 2]", "[0, 1, 2]"),
        (list(range(100)), "100 items", "100 items"),
        ({"a": 1}, "1 entries", "1 entries"),
    ],
)
def test_values_are_shown(value: Any, text: str, in_json: object) -> None:
    assert shown(value) == text
    assert plain(value) == in_json


def test_what_is_long_is_cut() -> None:
    assert len(shown("x" * 1000)) == 60
    assert shown(b"x" * 1000).startswith("1000 bytes ")
    assert shown(b"x" * 1000) != shown(b"y" * 1000)
    assert number_of(Scalar("<U1", b"a\0\0\0")) == "numpy <U1 61000000"
    assert ValueChange("a", 1, 2) == next(differences({"a": 1}, {"a": 2}))
