"""What is read out of other programs' files, whichever: a tree of plain values with tensors in it that say
where their bytes lie. Nothing of the bytes is read yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everstep.errors import Damaged, Unsupported
from everstep.format.layout import item_bytes
from everstep.format.manifest import MAX_COUNT, MAX_DIMENSIONS
from everstep.format.record import Number


@dataclass(frozen=True)
class Source:
    """Where elements lie: in the file at `path`, or in `data`, the first at `offset` (in bytes), the next
    ones `strides` (in elements) further on."""

    path: Path | None
    offset: int
    strides: tuple[int, ...]
    data: bytes = b""


@dataclass(frozen=True)
class Box:
    """A part of a tensor: where it begins and how far it goes in each dimension, and where it lies."""

    at: tuple[int, ...]
    extent: tuple[int, ...]
    source: Source


@dataclass(frozen=True)
class Tensor:
    """A tensor or array. `dtype` is a name as leaves have it. `boxes` cover it exactly. Equal ones are the
    same memory seen in the same way: tied weights."""

    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * item_bytes(self.dtype)

    @classmethod
    def whole(cls, dtype: str, shape: tuple[int, ...], source: Source) -> Tensor:
        """A tensor that lies in one place."""
        check_shape(shape)
        return cls(dtype, shape, (Box((0,) * len(shape), shape, source),))


@dataclass(frozen=True)
class Alien:
    """Stands where there is an object that no state is made of. It matters only if it is asked for."""

    name: str


@dataclass
class Checkpoint:
    """What was found.

    Attributes:
        kind: `dcp`, `torch`, `safetensors` or `hf`.
        tree: dicts, lists and plain values, with `Tensor` where tensors are.
        size_bytes: of the files; how much they can hold at most.
        step, epoch: where the training was, if that is said.
        metrics: its last figures.
        generators: the states of random generators, by the names of `everstep.state.rng.capture`.
        files: small files that belong to it, by name.
        remarks: sentences about what was left out or came out otherwise than it was.
    """

    kind: str
    tree: Any
    size_bytes: int
    step: int | None = None
    epoch: int = 0
    metrics: dict[str, Number] = field(default_factory=dict)
    generators: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def array(dtype: str, shape: tuple[int, ...], data: bytes) -> Tensor:
    """An array whose bytes are at hand."""
    return Tensor.whole(f"numpy:{dtype}", shape, Source(None, 0, contiguous(shape), data))


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a tensor whose elements lie one after the other."""
    strides = [1] * len(shape)
    for number in range(len(shape) - 2, -1, -1):
        strides[number] = strides[number + 1] * max(shape[number + 1], 1)
    return tuple(strides)


def check_shape(shape: object) -> tuple[int, ...]:
    """Raises Damaged where it is none that a tensor can have."""
    if type(shape) is not tuple or len(shape) > MAX_DIMENSIONS:
        raise Damaged(f"a tensor has the shape {str(shape)[:60]}", kept="nothing was imported")
    if any(type(one) is not int or not 0 <= one <= MAX_COUNT for one in shape) or (
        math.prod(shape) > MAX_COUNT
    ):
        raise Damaged(f"a tensor has the shape {str(shape)[:60]}", kept="nothing was imported")
    return shape


def covering(name: str, tensor: Tensor) -> Tensor:
    """The tensor, if its boxes cover it exactly. Raises Damaged where they leave a gap or overlap."""
    volume = sum(math.prod(box.extent) for box in tensor.boxes)
    fits = all(
        len(box.at) == len(box.extent) == len(tensor.shape)
        and all(at + size <= whole for at, size, whole in zip(box.at, box.extent, tensor.shape, strict=True))
        for box in tensor.boxes
    )
    if not fits or volume != math.prod(tensor.shape) or _overlap(tensor.boxes):
        raise Damaged(
            f"the {len(tensor.boxes)} parts of {name} do not make up a tensor of shape {list(tensor.shape)}",
            kept="nothing was imported",
            next="look whether files of it are missing",
        )
    return tensor


def _overlap(boxes: tuple[Box, ...]) -> bool:
    """Whether any two have an element in common: swept along the first dimension."""
    open_ones: list[Box] = []
    for box in sorted((one for one in boxes if math.prod(one.extent)), key=lambda one: one.at):
        if not box.at:
            return len(boxes) > 1
        open_ones = [one for one in open_ones if one.at[0] + one.extent[0] > box.at[0]]
        if any(common(one, box) for one in open_ones):
            return True
        open_ones.append(box)
    return False


def common(one: Box, other: Box) -> bool:
    """Whether two boxes have an element in common."""
    return all(
        a < b + m and b < a + n for a, n, b, m in zip(one.at, one.extent, other.at, other.extent, strict=True)
    )


def plain_keys(keys: list[str]) -> dict[str, str]:
    """The names in a module's state without what `torch.compile`, DDP and DataParallel put in front of them.
    Where two would become the same, all stay as they are."""
    made = {key: key.replace("_orig_mod.", "") for key in keys}
    while made and all(name.startswith("module.") and name != "module." for name in made.values()):
        made = {key: name.removeprefix("module.") for key, name in made.items()}
    return made if len(set(made.values())) == len(made) else {key: key for key in keys}


def is_module_state(value: object) -> bool:
    """Whether it looks like what a module's `state_dict()` gives: tensors, most of all, under texts."""
    if not isinstance(value, Mapping) or not value or not all(type(key) is str for key in value):
        return False
    tensors = sum(type(one) is Tensor for one in value.values())
    return tensors > 0 and all(
        type(one) is Tensor or key.endswith("_extra_state") for key, one in value.items()
    )


def refused(what: str, why: str, next: str = "") -> Unsupported:
    """An error about something in a file that cannot be stored."""
    return Unsupported(f"{what} {why}", kept="nothing was imported", next=next)
