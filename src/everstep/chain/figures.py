"""By how much the elements of a leaf changed, from the bytes of before and after.

All figures are over the elements that changed, which are those whose bits differ: so they do not depend on
how a leaf was cut into chunks, and what did not change need not be read. numpy is imported where it is
needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

from everstep.errors import Unsupported
from everstep.format.layout import item_bytes

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

BLOCK_ITEMS = 1 << 16
"""So many elements are looked at at once: what is made of them stays in a processor's cache."""

_SAFE_MOST, _SAFE_LEAST = 1e140, 1e-140
"""Between these a square neither overflows nor vanishes."""


@dataclass(frozen=True)
class Amount:
    """By how much a leaf changed.

    Attributes:
        elements: how many it has.
        changed: how many of them have other bits.
        norm_before, norm_change: the L2 norms of what those were, and of after minus before; of those that
            are finite on both sides. None for a dtype that is no number.
        max_abs: the largest absolute difference of one of them.
        nans, infs: how many of those that changed were and are nan (or no time, of numpy's times), infinite.
    """

    elements: int
    changed: int
    norm_before: float | None = None
    norm_change: float | None = None
    max_abs: float | None = None
    nans: tuple[int, int] = (0, 0)
    infs: tuple[int, int] = (0, 0)

    @property
    def share(self) -> float:
        """Of the elements, those that changed: 0 to 1."""
        return self.changed / self.elements if self.elements else 0.0

    @property
    def relative(self) -> float | None:
        """The norm of the change to the norm of what changed; inf where that was all zero."""
        if self.norm_before is None or self.norm_change is None:
            return None
        if not self.norm_before:
            return math.inf if self.norm_change else 0.0
        return self.norm_change / self.norm_before

    @property
    def broke(self) -> bool:
        """Whether there are more elements that are not finite than before."""
        return sum((self.nans[1], self.infs[1])) > sum((self.nans[0], self.infs[0]))


class Figures:
    """Sums up what differs between two leaves of one dtype, piece by piece. Takes a few MB of memory."""

    def __init__(self, dtype: str) -> None:
        """Raises Unsupported where the dtype is not known, or numpy is missing."""
        self._item_bytes = item_bytes(dtype)
        self._kind = _kind(dtype)
        self._changed = 0
        self._before, self._change = _Norm(), _Norm()
        self._nans, self._infs = [0, 0], [0, 0]

    def add(self, before: memoryview, after: memoryview) -> None:
        """Bytes of the same whole elements, before and after."""
        block = BLOCK_ITEMS * self._item_bytes
        for start in range(0, len(before), block):
            self._add(before[start : start + block], after[start : start + block])

    def amount(self, elements: int) -> Amount:
        """What it came to, of a leaf of so many elements."""
        if not self._kind.is_number:
            return Amount(elements, self._changed)
        nans, infs = (self._nans[0], self._nans[1]), (self._infs[0], self._infs[1])
        change = self._change
        return Amount(elements, self._changed, self._before.total, change.total, change.top, nans, infs)

    def _add(self, before: memoryview, after: memoryview) -> None:
        import numpy as np

        differs = _differs(before, after, self._item_bytes)
        count = int(np.count_nonzero(differs))
        self._changed += count
        if not count or not self._kind.is_number:
            return
        old, new = (np.frombuffer(one, self._kind.stored) for one in (before, after))
        if count < len(differs):
            old, new = old[differs], new[differs]
        with np.errstate(all="ignore"):  # What overflows is inf, and shown.
            self._sum_up(self._kind.number(old), self._kind.number(new))

    def _sum_up(self, old: Array, new: Array) -> None:
        import numpy as np

        change = self._kind.distance(old, new)
        if self._kind.is_time or not np.isfinite(change).all():
            old, new = self._without_odd(old, new)
            change = self._kind.distance(old, new)
        self._before.add(np.abs(old.astype(self._kind.wide, copy=False)))
        self._change.add(change)

    def _without_odd(self, old: Array, new: Array) -> tuple[Array, Array]:
        """The elements that are finite on both sides; those that are not are counted."""
        import numpy as np

        bad = [self._kind.is_nan(one) for one in (old, new)]
        endless = [np.isinf(one) for one in (old, new)]
        for side in (0, 1):
            self._nans[side] += int(np.count_nonzero(bad[side]))
            self._infs[side] += int(np.count_nonzero(endless[side] & ~bad[side]))
        odd = bad[0] | bad[1] | endless[0] | endless[1]
        return old[~odd], new[~odd]


class _Norm:
    """An L2 norm that is summed up piece by piece, without overflow. `top` is the largest magnitude."""

    def __init__(self) -> None:
        self.total = 0.0
        self.top = 0.0

    def add(self, magnitudes: Array) -> None:
        """Magnitudes as float64, none of them nan."""
        import numpy as np

        top = float(magnitudes.max(initial=0.0))
        self.top = max(self.top, top)
        if top == 0.0:
            return
        if math.isinf(top):
            self.total = math.inf
            return
        scale = 1.0 if _SAFE_LEAST < top < _SAFE_MOST else top
        scaled = magnitudes if scale == 1.0 else magnitudes / scale
        # Not `dot`: its threads wait for each other where others have the cores.
        squares = float(np.square(scaled).sum())
        self.total = math.hypot(self.total, scale * math.sqrt(squares))


def element(data: memoryview, dtype: str) -> int | float | complex | bool | None:
    """The one number that `data` is; None for a dtype that is no number."""
    import numpy as np

    kind = _kind(dtype)
    if not kind.is_number:
        return None
    found = kind.number(np.frombuffer(data, kind.stored))[0].item()
    return bool(found) if dtype in _TRUTHS else found


def require_numpy() -> None:
    """Raises Unsupported where there is none."""
    try:
        import numpy  # noqa: F401
    except ImportError as error:
        raise Unsupported(
            "by how much leaves changed cannot be said without numpy",
            kept="nothing was read",
            next="pip install numpy, or everstep diff --names-only",
        ) from error


def _differs(before: memoryview, after: memoryview, item_bytes: int) -> Array:
    """Which elements have other bits."""
    import numpy as np

    if item_bytes in (1, 2, 4, 8):
        code = f"u{item_bytes}"
        words: Array = np.not_equal(np.frombuffer(before, code), np.frombuffer(after, code))
        return words
    old, new = (np.frombuffer(one, np.uint8).reshape(-1, item_bytes) for one in (before, after))
    differs: Array = np.any(old != new, axis=1)
    return differs


# -- what the bytes of each dtype mean ---------------------------------------------------------------------

_TRUTHS = ("bool", "numpy:|b1", "numpy:<b1", "numpy:>b1", "numpy:=b1")
_NATIVE = {
    "uint8": "u1", "int8": "i1", "uint16": "<u2", "int16": "<i2", "uint32": "<u4", "int32": "<i4",
    "uint64": "<u8", "int64": "<i8", "float16": "<f2", "float32": "<f4", "float64": "<f8",
    "complex64": "<c8", "complex128": "<c16",
}  # fmt: skip
_NO_TIME = -(1 << 63)
"""How numpy writes that a time is none."""


@dataclass(frozen=True)
class _Kind:
    """How the stored bytes of a dtype are read.

    `stored` is numpy's code for an element's bytes ("": they are no number), `number` makes numbers of them:
    float64 and complex128, or integers as they are. `wide` is what the magnitude of one is taken in.
    """

    stored: str = ""
    number: Callable[[Array], Array] = lambda stored: stored
    wide: str = "f8"
    distance: Callable[[Array, Array], Array] = lambda old, new: abs(new - old)
    is_time: bool = False

    def is_nan(self, numbers: Array) -> Array:
        bad: Array = numbers == _NO_TIME if self.is_time else numbers != numbers
        return bad

    @property
    def is_number(self) -> bool:
        return bool(self.stored)


@cache
def _kind(dtype: str) -> _Kind:
    require_numpy()
    import numpy as np

    if dtype in _TRUTHS:
        return _Kind("u1", lambda stored: (stored != 0).astype("i8"), distance=_apart)
    if dtype == "bfloat16":
        return _Kind("<u2", _from_bfloat16)
    if dtype == "complex32":
        return _Kind("<u4", lambda stored: _complex(stored.view("<f2")), wide="c16")
    if dtype in _EIGHT_BITS:
        table = np.array(_EIGHT_BITS[dtype](), "f8")
        return _Kind("u1", lambda stored: table[stored])
    code = _NATIVE.get(dtype) or dtype.removeprefix("numpy:")
    if code[1] in "mM":
        return _Kind(f"{code[0]}i8", _native, distance=_apart, is_time=True)
    try:
        kind = np.dtype(code).kind
    except TypeError:  # A long double of another machine.
        return _Kind()
    if kind in "iu":
        return _Kind(code, _native, distance=_apart)
    if kind == "f":
        return _Kind(code, lambda stored: stored.astype("f8", copy=False))
    return _Kind(code, lambda stored: stored.astype("c16"), wide="c16") if kind == "c" else _Kind()


def _native(stored: Array) -> Array:
    return stored.astype(stored.dtype.newbyteorder("="))


def _complex(halves: Array) -> Array:
    wide = halves.astype("f8")
    return wide[0::2] + 1j * wide[1::2]


def _from_bfloat16(stored: Array) -> Array:
    return (stored.astype("u4") << 16).view("f4").astype("f8")


def _apart(old: Array, new: Array) -> Array:
    """The distance of integers, exact before it is rounded: they need not fit into a float, nor their
    difference into their own type."""
    import numpy as np

    high, low = np.maximum(old, new), np.minimum(old, new)
    apart: Array = high.astype("u8") - low.astype("u8")
    return apart.astype("f8")


def _eight_bits(exponent_bits: int, bias: int, finite: Callable[[int, int], float | None]) -> list[float]:
    """The 256 numbers of a format of one sign bit, then exponent, then mantissa. `finite` gives, of exponent
    and mantissa, a number that is not made as the others are."""
    mantissa_bits = 7 - exponent_bits
    numbers = []
    for byte in range(128):
        exponent, mantissa = byte >> mantissa_bits, byte & (1 << mantissa_bits) - 1
        fraction = mantissa / (1 << mantissa_bits)
        special = finite(exponent, mantissa)
        if special is not None:
            numbers.append(special)
        elif exponent:
            numbers.append(math.ldexp(1 + fraction, exponent - bias))
        else:
            numbers.append(math.ldexp(fraction, 1 - bias))
    return [*numbers, *(-one for one in numbers)]


def _e4m3fn() -> list[float]:
    return _eight_bits(4, 7, lambda exponent, mantissa: math.nan if (exponent, mantissa) == (15, 7) else None)


def _e5m2() -> list[float]:
    def special(exponent: int, mantissa: int) -> float | None:
        if exponent < 31:
            return None
        return math.nan if mantissa else math.inf

    return _eight_bits(5, 15, special)


def _only_nan_is_minus_zero(exponent_bits: int, bias: int) -> list[float]:
    numbers = _eight_bits(exponent_bits, bias, lambda exponent, mantissa: None)
    numbers[0x80] = math.nan
    return numbers


_EIGHT_BITS: dict[str, Callable[[], list[float]]] = {
    "float8_e4m3fn": _e4m3fn,
    "float8_e5m2": _e5m2,
    "float8_e4m3fnuz": lambda: _only_nan_is_minus_zero(4, 8),
    "float8_e5m2fnuz": lambda: _only_nan_is_minus_zero(5, 16),
    "float8_e8m0fnu": lambda: [*(math.ldexp(1.0, byte - 127) for byte in range(255)), math.nan],
}
