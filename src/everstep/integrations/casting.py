"""Elements of one floating-point type as elements of another, rounded to the nearest, ties to even, as torch
does it. Needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from everstep.errors import Mismatch

if TYPE_CHECKING:
    import numpy as np

FLOATS = ("float16", "bfloat16", "float32", "float64")
"""What is converted; all else stays as it is."""

_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_NUMPY = {"float16": "<f2", "float32": "<f4", "float64": "<f8"}

_Array: TypeAlias = "np.ndarray[Any, Any]"


def target(name: str) -> str:
    """The dtype that `bf16`, `fp16`, `fp32`, or its own name stands for. Raises Mismatch."""
    found = _NAMES.get(name, name)
    if found not in _NAMES.values():
        raise Mismatch(
            f"{name!r} is none of {', '.join(_NAMES)}", kept="nothing was written", next="--dtype bf16"
        )
    return found


def cast(data: memoryview, of: str, to: str) -> tuple[memoryview, int]:
    """Elements of dtype `of` as those of dtype `to`, and how many became infinite that were not."""
    if of == to:
        return data, 0
    import numpy as np  # Who converts nothing needs none.

    wide = _widened(data, of)
    with np.errstate(over="ignore"):
        narrow = _rounded(wide) if to == "bfloat16" else wide.astype(_NUMPY[to])
    lost = 0
    if to in ("float16", "bfloat16") or of == "float64":
        back = _widened(narrow.view("u1").data, to)
        lost = int(np.count_nonzero(np.isinf(back)) - np.count_nonzero(np.isinf(wide)))
    return narrow.view("u1").data, lost


def _widened(data: memoryview, of: str) -> _Array:
    """As float32 or float64, exactly."""
    import numpy as np

    if of == "bfloat16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, _NUMPY[of])


def _rounded(wide: _Array) -> _Array:
    """To bfloat16: the upper half of a float32, with the lower half rounded into it."""
    import numpy as np

    single = wide.astype("<f4")
    bits: _Array = single.view("<u4")
    rounded: _Array = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype("<u2")
    rounded[np.isnan(single)] = 0x7FC0
    return rounded
