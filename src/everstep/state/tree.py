"""A state as leaves (tensors and arrays, by name) and a tree of plain values in which `Leaf` stands for each.

A leaf's name is its path: `optimizer/state/0/exp_avg`. In a part of it, `~` is written `~0` and `/` is `~1`.
"""

from __future__ import annotations

import io
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from everstep.errors import Damaged, Unsupported
from everstep.format.layout import item_bytes
from everstep.format.naming import join as join
from everstep.format.values import Leaf, Scalar, Symbol, Value
from everstep.state.sharding import is_sharded, local

Tensorlike: TypeAlias = "torch.Tensor | np.ndarray[Any, Any]"
Leaves: TypeAlias = dict[str, Tensorlike]

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})
_MAPPINGS: tuple[type, ...] = (dict, OrderedDict, Counter, defaultdict)
_SEQUENCES: tuple[type, ...] = (list, tuple, set, frozenset)
_SCALAR_KINDS = "biufcSUmM"


def dtype_name(tensor: Tensorlike) -> str:
    """The name of a dtype as the format has it."""
    if isinstance(tensor, torch.Tensor):
        return _name_of(tensor.dtype)
    return f"numpy:{tensor.dtype.str}"


@cache
def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _known(dtype: torch.dtype) -> torch.dtype:
    """Raises Unsupported when the format has no such dtype."""
    item_bytes(_name_of(dtype))
    return dtype


def torch_dtype(name: str) -> torch.dtype:
    """Raises Unsupported when this torch has no such dtype."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise Unsupported(
            f"this torch ({torch.__version__}) has no dtype {name!r}", next="pip install -U torch"
        )
    return dtype


def flatten(path: str, value: object, leaves: Leaves) -> Value:
    """The values tree of `value`; its tensors and arrays are put into `leaves`, not copied.

    Raises:
        Unsupported: something in it cannot be stored; the message names it. Nothing is ever pickled.
    """
    if isinstance(value, torch.Tensor):
        return _leaf(path, _storable(path, value), leaves)
    if isinstance(value, np.ndarray):
        return _leaf(path, _storable_array(path, value), leaves)
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind in _MAPPINGS:
        return _flatten_mapping(path, value, leaves)
    if isinstance(value, list | tuple | set | frozenset) and kind in _SEQUENCES:
        if _PLAIN.issuperset(map(type, value)):  # As the six hundred words of a generator.
            return type(value)(value)
        return type(value)(flatten(join(path, number), item, leaves) for number, item in enumerate(value))
    if isinstance(value, deque) and kind is deque:
        return deque((flatten(join(path, n), item, leaves) for n, item in enumerate(value)), value.maxlen)
    if isinstance(value, np.generic) and value.dtype.kind in _SCALAR_KINDS:
        return Scalar(value.dtype.str, value.tobytes())
    if isinstance(value, io.BytesIO) and kind is io.BytesIO:
        return Symbol("io.BytesIO", (value.getvalue(), value.tell()))
    if isinstance(value, torch.Size):
        return Symbol("torch.Size", tuple(value))
    if isinstance(value, torch.dtype):
        return Symbol("torch.dtype", str(value).removeprefix("torch."))
    if isinstance(value, torch.device):
        return Symbol("torch.device", str(value))
    if isinstance(value, np.dtype):
        return Symbol("numpy.dtype", value.str)
    raise _refused(path, f"is a {kind.__module__}.{kind.__qualname__}")


def _flatten_mapping(path: str, value: Any, leaves: Leaves) -> Value:
    made = {flatten(path, key, {}): flatten(join(path, key), item, leaves) for key, item in value.items()}
    if isinstance(value, defaultdict):
        return defaultdict(value.default_factory, made)
    return type(value)(made)


def _leaf(path: str, tensor: Tensorlike, leaves: Leaves) -> Leaf:
    if path in leaves:
        raise _refused(
            path, "and another value have the same name (a text and a number as keys of one dict?)"
        )
    leaves[path] = tensor
    return Leaf(path)


def _storable(path: str, tensor: torch.Tensor) -> torch.Tensor:
    if is_sharded(tensor):
        _storable(path, local(tensor))
        return tensor.detach() if tensor.requires_grad else tensor
    if type(tensor) not in PLAIN_TENSORS and is_traceable_wrapper_subclass(tensor):
        raise _refused(path, f"is a {type(tensor).__qualname__}, a tensor without storage of its own")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise _refused(path, f"is a tensor of layout {tensor.layout}, not a dense one")
    if tensor.is_meta or torch.nn.parameter.is_lazy(tensor):
        raise _refused(path, "is a tensor without data yet")
    _known(tensor.dtype)
    return tensor.detach()


def _storable_array(path: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if array.dtype.kind not in _SCALAR_KINDS or not array.dtype.itemsize:
        raise _refused(path, f"is an array of dtype {array.dtype}")
    return array


def _refused(path: str, what: str) -> Unsupported:
    return Unsupported(
        f"{path} {what} and cannot be stored (nothing is pickled)",
        kept="no snapshot was taken, and the state is untouched",
        next="give it a state_dict() of tensors and plain values, or leave it out",
    )


def unflatten(tree: Value, leaf: Callable[[str], object]) -> Any:
    """The value that `tree` stands for, with `leaf(name)` in the place of each leaf.

    Raises:
        Damaged: the tree holds a symbol that cannot be.
        Unsupported: it needs a newer torch or Everstep.
    """
    kind = type(tree)
    if kind is Leaf:
        return leaf(tree.name)
    if kind in _MAPPINGS:
        pairs = {unflatten(key, leaf): unflatten(item, leaf) for key, item in tree.items()}
        return defaultdict(tree.default_factory, pairs) if kind is defaultdict else kind(pairs)
    if kind in _SEQUENCES:
        return kind(unflatten(item, leaf) for item in tree)
    if kind is deque:
        return deque((unflatten(item, leaf) for item in tree), tree.maxlen)
    if kind is Scalar:
        return _scalar(tree)
    return _symbol(tree) if kind is Symbol else tree


def _scalar(scalar: Scalar) -> object:
    if not scalar.dtype.lstrip("<>|=")[:1] or scalar.dtype.lstrip("<>|=")[0] not in _SCALAR_KINDS:
        raise Damaged(f"a numpy scalar of dtype {scalar.dtype[:40]!r}")
    try:
        return np.frombuffer(scalar.data, np.dtype(scalar.dtype))[0]
    except (TypeError, ValueError, IndexError) as error:
        raise Damaged(f"a numpy scalar of dtype {scalar.dtype[:40]!r}: {error}") from error


def _symbol(symbol: Symbol) -> object:
    value = symbol.value
    try:
        if symbol.kind == "torch.Size" and isinstance(value, tuple):
            return torch.Size(value)
        if symbol.kind == "io.BytesIO" and type(value) is tuple and len(value) == 2:
            return _file(*value)
        if symbol.kind == "torch.dtype" and isinstance(value, str):
            return torch_dtype(value)
        if symbol.kind == "torch.device" and isinstance(value, str):
            return torch.device(value)
        if (
            symbol.kind == "numpy.dtype"
            and isinstance(value, str)
            and value.lstrip("<>|=")[:1] in _SCALAR_KINDS
        ):
            return np.dtype(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Damaged(f"a {symbol.kind} that cannot be: {error}") from error
    raise Unsupported(
        f"a value of kind {symbol.kind[:40]!r} is not known here", next="pip install -U everstep"
    )


def renamed(tree: Value, names: Mapping[str, str]) -> Value:
    """A values tree in which leaves have other names; those that `names` does not have stay."""
    kind = type(tree)
    if kind is Leaf:
        return Leaf(names[tree.name]) if tree.name in names else tree
    if kind in _MAPPINGS:
        made = {key: renamed(item, names) for key, item in tree.items()}
        return defaultdict(tree.default_factory, made) if kind is defaultdict else kind(made)
    if kind is list or kind is tuple:
        return kind(renamed(item, names) for item in tree)
    if kind is deque:
        return deque((renamed(item, names) for item in tree), tree.maxlen)
    return tree


def located(path: str, tree: Value) -> Iterator[tuple[str, str]]:
    """Where each leaf of a values tree is, as `flatten` names it, and its name: another where that is a
    rank's own, or belongs to a parameter that has a number here."""
    kind = type(tree)
    if kind is Leaf:
        yield path, tree.name
    elif kind in _MAPPINGS:
        for key, item in tree.items():
            yield from located(join(path, key), item)
    elif kind in _SEQUENCES or kind is deque:
        for number, item in enumerate(tree):
            yield from located(join(path, number), item)


def _file(data: object, at: object) -> io.BytesIO:
    """A file in memory, as far on as it was."""
    if type(data) is not bytes or type(at) is not int or not 0 <= at < 1 << 62:
        raise ValueError("it is none")
    file = io.BytesIO(data)
    file.seek(at)
    return file


def leaf_names(tree: Value) -> Iterator[str]:
    """The names of all leaves of a values tree, in order."""
    kind = type(tree)
    if kind is Leaf:
        yield tree.name
    elif kind in _MAPPINGS:
        for item in tree.values():
            yield from leaf_names(item)
    elif kind in _SEQUENCES or kind is deque:
        for item in tree:
            yield from leaf_names(item)
