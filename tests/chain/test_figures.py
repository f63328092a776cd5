"""By how much leaves changed, against a computation in plain Python, for every dtype of the format."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.chain import figures
from everstep.chain.figures import Amount, Figures, element
from everstep.errors import Unsupported
from everstep.format import layout
from everstep.format.layout import item_bytes
from examples import examples

TORCH = sorted(layout._ITEM_BYTES)
NUMPY = [
    "numpy:<f2", "numpy:<f4", "numpy:>f4", "numpy:>f8", "numpy:=f8", "numpy:|i1", "numpy:<i2", "numpy:>i8",
    "numpy:<u4", "numpy:>u8", "numpy:<c8", "numpy:>c16", "numpy:|b1", "numpy:<m8[s]", "numpy:>M8[ns]",
]  # fmt: skip
TEXTS = ["numpy:|S3", "numpy:<U2", "numpy:|S16"]
NO_TIME = -(1 << 63)

same_every_time = settings(deadline=None, derandomize=True, database=None, max_examples=examples(60))


def numbers(dtype: str, data: bytes) -> list[Any]:
    """The elements as Python's own numbers; None for nan and for no time."""
    if dtype in ("bool", "numpy:|b1"):
        return [int(byte != 0) for byte in data]
    if dtype == "complex32":
        halves = np.frombuffer(data, "<f2").tolist()
        found: list[Any] = [complex(*pair) for pair in zip(halves[0::2], halves[1::2], strict=True)]
    elif dtype.startswith("numpy:") and dtype[7] in "mM":
        found = np.frombuffer(data, f"{dtype[6]}i8").tolist()
        return [None if one == NO_TIME else one for one in found]
    elif dtype.startswith("numpy:"):
        found = np.frombuffer(data, dtype.removeprefix("numpy:")).tolist()
    else:
        tensor = torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype))
        if tensor.is_floating_point() and tensor.element_size() < 4:
            tensor = tensor.to(torch.float32)
        found = tensor.tolist()
    return [None if one != one else one for one in found]


def magnitude(number: Any) -> float:
    return math.hypot(number.real, number.imag) if isinstance(number, complex) else float(abs(number))


def endless(number: Any) -> bool:
    return number is not None and not isinstance(number, int) and math.isinf(magnitude(number))


def expected(dtype: str, before: bytes, after: bytes) -> Amount:
    item = item_bytes(dtype)
    count = len(before) // item
    changed = [n for n in range(count) if before[n * item :][:item] != after[n * item :][:item]]
    if dtype in TEXTS:
        return Amount(count, len(changed))
    sides = [[numbers(dtype, data)[n] for n in changed] for data in (before, after)]
    nans, infs = [tuple(sum(map(odd, side)) for side in sides) for odd in (lambda one: one is None, endless)]
    pairs = [
        pair for pair in zip(*sides, strict=True) if not any(one is None or endless(one) for one in pair)
    ]
    changes = [magnitude(new - old) for old, new in pairs]
    norms = math.hypot(*(magnitude(old) for old, _ in pairs)), math.hypot(*changes)
    return Amount(count, len(changed), *norms, max(changes, default=0.0), nans, infs)  # type: ignore[arg-type]


def measured(dtype: str, before: bytes, after: bytes, pieces: int = 1) -> Amount:
    item = item_bytes(dtype)
    count = len(before) // item
    size = -(-count // pieces) * item or item
    found = Figures(dtype)
    for start in range(0, len(before), size):
        found.add(memoryview(before)[start : start + size], memoryview(after)[start : start + size])
    return found.amount(count)


def assert_alike(got: Amount, wanted: Amount) -> None:
    assert (got.elements, got.changed, got.nans, got.infs) == (
        wanted.elements, wanted.changed, wanted.nans, wanted.infs
    )  # fmt: skip
    for name in ("norm_before", "norm_change", "max_abs"):
        one, other = getattr(got, name), getattr(wanted, name)
        assert one == (None if other is None else pytest.approx(other, rel=1e-9, abs=1e-300)), name


@pytest.mark.parametrize("dtype", [*TORCH, *NUMPY, *TEXTS])
@same_every_time
@given(data=st.data())
def test_every_dtype_comes_out_as_by_hand(dtype: str, data: st.DataObject) -> None:
    """Any bits: what is nan, infinite, denormal and extreme is among them."""
    item = item_bytes(dtype)
    element_of = st.binary(min_size=item, max_size=item)
    if dtype == "bool":  # torch's own are these, and a tensor of others is undefined.
        element_of = st.sampled_from([b"\0", b"\1"])
    before = data.draw(st.lists(element_of, max_size=20))
    after = [data.draw(st.one_of(st.just(one), element_of)) for one in before]
    joined = b"".join(before), b"".join(after)
    assert_alike(measured(dtype, *joined, pieces=data.draw(st.integers(1, 4))), expected(dtype, *joined))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int64", "complex64", "bool"])
def test_blocks_fit_together(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(dtype)
    item = item_bytes(dtype)
    before = rng.randbytes(1001 * item) if dtype != "bool" else bytes(rng.choices((0, 1), k=1001))
    after = bytearray(before)
    for number in rng.sample(range(1001), 300):
        after[number * item] ^= 1
    whole = measured(dtype, before, bytes(after))
    monkeypatch.setattr(figures, "BLOCK_ITEMS", 7)
    assert_alike(measured(dtype, before, bytes(after)), whole)
    assert whole.changed == 300


def test_a_model_s_weights_as_torch_has_it() -> None:
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(700, 500, generator=generator)
    after = before + 1e-3 * torch.randn(700, 500, generator=generator)
    got = measured("float32", before.numpy().tobytes(), after.numpy().tobytes())
    moved = before != after  # Some are too large to move.
    old, new = before[moved].double(), after[moved].double()
    assert got.relative == pytest.approx(((new - old).norm() / old.norm()).item(), rel=1e-6)
    assert got.max_abs == pytest.approx((new - old).abs().max().item(), rel=1e-12)
    assert got.share == (before != after).double().mean().item()


def test_eight_bits_are_those_of_torch() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    for dtype in (one for one in TORCH if one.startswith("float8")):
        theirs = every.view(getattr(torch, dtype)).to(torch.float32).double().tolist()
        ours = figures._EIGHT_BITS[dtype]()
        assert [str(one) for one in ours] == [str(one) for one in theirs], dtype


def test_integers_that_no_float_holds() -> None:
    before, after = np.array([10**18, -(2**63)]), np.array([10**18 + 1, 2**63 - 1])
    got = measured("int64", before.tobytes(), after.tobytes())
    assert got.max_abs == float(2**64 - 1)
    got = measured("int64", before[:1].tobytes(), after[:1].tobytes())
    assert (got.max_abs, got.norm_change) == (1.0, 1.0)


def test_what_cannot_be_divided() -> None:
    zero, one = np.zeros(3, "f4").tobytes(), np.ones(3, "f4").tobytes()
    assert measured("float32", zero, one).relative == math.inf
    assert measured("float32", one, zero).relative == 1.0
    assert measured("float32", zero, np.full(3, -0.0, "f4").tobytes()).relative == 0.0
    assert measured("float32", one, one).relative == 0.0
    assert Amount(0, 0).share == 0.0
    assert measured("numpy:|S3", b"abcabc", b"abcabd").relative is None


def test_what_became_nan_is_seen() -> None:
    before = np.array([1, 2, np.nan, np.inf, 5], "f4")
    after = np.array([1, np.nan, np.nan, 4, 5.5], "f4")
    got = measured("float32", before.tobytes(), after.tobytes())
    # A nan that stayed as it was has not changed.
    assert (got.changed, got.nans, got.infs, got.max_abs) == (3, (0, 1), (1, 0), 0.5)
    assert not got.broke
    assert measured("float32", before[:2].tobytes(), after[:2].tobytes()).broke


@pytest.mark.parametrize(
    ("dtype", "data", "value"),
    [
        ("float32", np.float32(0.25).tobytes(), 0.25),
        ("bfloat16", b"\x80\x3f", 1.0),
        ("float8_e5m2", b"\x3c", 1.0),
        ("int64", np.int64(-3).tobytes(), -3),
        ("bool", b"\1", True),
        ("complex64", np.complex64(1 - 2j).tobytes(), 1 - 2j),
        ("numpy:>u2", b"\1\0", 256),
        ("numpy:|S2", b"ab", None),
    ],
)
def test_one_element(dtype: str, data: bytes, value: object) -> None:
    found = element(memoryview(data), dtype)
    assert found == value
    assert type(found) is type(value)


def test_a_dtype_of_nobody_is_refused() -> None:
    with pytest.raises(Unsupported):
        Figures("float7")
