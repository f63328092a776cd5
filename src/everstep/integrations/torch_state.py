"""What the objects in torch's pickles mean, as plain values and tensors. Needs no torch, and calls nothing
that a pickle names: what is not known here stays a name.
"""

from __future__ import annotations

import math
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep.errors import Damaged
from everstep.format.layout import item_bytes
from everstep.format.values import FACTORIES, MAX_DEPTH, MAX_SAME_HASH, Scalar, Symbol
from everstep.integrations import torch_pickle
from everstep.integrations.checkpoint import Alien, Source, Tensor, check_shape, contiguous, refused
from everstep.integrations.pickles import PERSISTENT, Global, Made

DTYPES = frozenset({*torch_pickle.STORAGES, *torch_pickle.NEWER})
"""torch's dtypes that leaves have."""

_STORAGES = {f"torch.{prefix}Storage": dtype for dtype, prefix in torch_pickle.STORAGES.items()}
_UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")

_OTHER_TENSORS = {
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without data",
    "torch._utils._rebuild_wrapper_subclass": "a tensor without storage of its own",
}

_NUMPY = ("numpy", "numpy.core", "numpy._core")
_ARRAYS = {f"{root}.multiarray._reconstruct" for root in _NUMPY}
_SCALARS = {f"{root}.multiarray.scalar" for root in _NUMPY}
_BUFFERS = {f"{root}.numeric._frombuffer" for root in _NUMPY}

_ALLOWED = frozenset({
    "collections.OrderedDict", "collections.defaultdict", "collections.Counter", "collections.deque",
    "builtins.set", "builtins.frozenset", "builtins.list", "builtins.tuple", "builtins.dict",
    "builtins.complex", "builtins.bytearray", "builtins.bytes", "builtins.int", "builtins.float",
    "builtins.str", "builtins.object", "_codecs.encode", "copyreg._reconstructor",
    "torch.Size", "torch.device", "torch.Tensor", "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout", "torch.torch_version.TorchVersion",
    *(f"torch.{kind}Storage" for kind in ("QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4")),
    *(f"torch.{name}" for name in (
        "per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric",
        "per_channel_affine_float_qparams")),
    "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state",
    "torch._tensor._rebuild_from_type_v2",
    "numpy.ndarray", "numpy.dtype",
    "argparse.Namespace", "types.SimpleNamespace", "functools.partial", "uuid.UUID",
    "datetime.datetime", "datetime.date", "datetime.timedelta", "datetime.timezone",
    *(f"{module}.{kind}" for module in ("pathlib", "pathlib._local")
      for kind in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(f"torch.{name}" for name in DTYPES), *_STORAGES, *_UNTYPED, *_OTHER_TENSORS,
    *_ARRAYS, *_SCALARS, *_BUFFERS,
})  # fmt: skip

_CLOSED = frozenset({*sys.stdlib_module_names, "torch", "numpy", "nt", "posix"})
"""Packages of which nothing may be named but what is known: who writes a pickle to have something run asks
for what everybody has. A class of any other package is only a name here, which matters if it is wanted."""


def allows(module: str, name: str) -> bool:
    """Whether a pickle may name this at all. (What it names is not looked up, let alone called.)"""
    full = _today(module, name)
    return full in _ALLOWED or (full.partition(".")[0] not in _CLOSED and "." not in name)


def _today(module: str, name: str) -> str:
    """The full name of what older pickles, and those of protocol 2, know by the names of Python 2."""
    if (module, name) in NAME_MAPPING:
        return ".".join(NAME_MAPPING[module, name])
    return f"{IMPORT_MAPPING.get(module, module)}.{name}"


@dataclass(frozen=True)
class Storage:
    """Bytes that tensors are views of: `size_bytes` of them at `offset` of a file."""

    path: Path
    offset: int
    size_bytes: int


Storages = Callable[[Any], "tuple[Storage, str | None]"]
"""The storage, and its dtype if it has one, that a pickle takes from outside of itself; from what it says."""


class Meaning:
    """Turns what a pickle made into plain values, with `Tensor` for tensors and `Alien` for what is unknown.

    Args:
        what: names the file in errors.
        storages: finds the bytes of tensors.
    """

    def __init__(self, what: str, storages: Storages) -> None:
        self.what = what
        self.remarks: list[str] = []
        self._storages = storages
        self._known: dict[int, tuple[Any, Any]] = {}
        """What was made of an object before, by its id; the object too, so that the id stays its own."""

    def of(self, value: Any, path: str = "", depth: int = 0) -> Any:
        """The value that `value` stands for. Raises Unsupported, Damaged."""
        kind = type(value)
        if value is None or kind in (bool, int, float, str, bytes):
            return value
        if depth > MAX_DEPTH:
            raise refused(self.what, f"is nested deeper than {MAX_DEPTH} at {path[:80]}")
        known = self._known.get(id(value))
        if known is not None:
            return known[1]
        made = self._of(value, path, depth)
        self._known[id(value)] = (value, made)
        return made

    def _of(self, value: Any, path: str, depth: int) -> Any:
        kind = type(value)
        if kind is dict:
            return self._pairs(value, path, depth)
        if kind in (list, tuple, set, frozenset):
            return kind(self.of(one, f"{path}.{n}", depth + 1) for n, one in enumerate(value))
        if kind is Global:
            name = value.name.removeprefix("torch.")
            return Symbol("torch.dtype", name) if name in DTYPES else Alien(value.name)
        try:
            return self._made(value, path, depth)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise Damaged(
                f"{self.what} holds at {path or 'its top'} a {value.name} that cannot be: {error}",
                kept="nothing was imported",
            ) from error

    def items(self, made: Made, path: str, depth: int) -> list[Any]:
        """Those of a set, which comes as a call with a list."""
        found: list[Any] = self.of(list(made.args[0]), path, depth + 1)
        if max(Counter(map(hash, found)).values(), default=0) > MAX_SAME_HASH:
            raise ValueError("its items have all one hash")
        return found

    def _pairs(self, pairs: Mapping[Any, Any], path: str, depth: int) -> dict[Any, Any]:
        return {
            self.of(key, path, depth + 1): self.of(one, f"{path}.{key}".lstrip("."), depth + 1)
            for key, one in pairs.items()
        }

    def _made(self, made: Made, path: str, depth: int) -> Any:
        module, _, last = made.name.rpartition(".")
        name = _today(module, last)
        if name.startswith("torch._utils._rebuild") or name == "torch._tensor._rebuild_from_type_v2":
            return self._tensor(made, path)
        if name in _ARRAYS | _BUFFERS:
            return self._array(made, path)
        if name in _SCALARS:
            dtype, data = _numpy_dtype(made.args[0]), made.args[1]
            data = self.of(data, path) if type(data) is Made else data
            if type(data) is not bytes or len(data) != item_bytes(f"numpy:{dtype}"):
                raise ValueError("its bytes are not those of its dtype")
            return Scalar(dtype, data)
        if name.startswith("collections."):
            return self._collection(name, made, path, depth)
        plain = _PLAIN.get(name)
        if plain is not None:
            return plain(self, made, path, depth)
        return Alien(name)

    def _collection(self, name: str, made: Made, path: str, depth: int) -> Any:
        first = made.args[0] if made.args else ()
        if name == "collections.deque":
            items = self.of([*first, *(made.items or ())], path, depth + 1)
            return deque(items, made.args[1] if len(made.args) > 1 else None)
        if name == "collections.defaultdict":
            factory = first.name.rpartition(".")[2] if type(first) is Global else ""
            return defaultdict(FACTORIES[factory], self._pairs(made.pairs or {}, path, depth))
        pairs = first if type(first) is dict else {}
        if type(first) is list:  # As Python 2 pickled it.
            pairs = {str(key): value for key, value in first}
        held = self._pairs({**pairs, **(made.pairs or {})}, path, depth)
        if name == "collections.Counter":
            return Counter(held)
        # A module's state is an ordered dict that says so; in a snapshot it is a dict like any other.
        is_module = type(made.state) is dict and "_metadata" in made.state
        return held if is_module else OrderedDict(held)

    # -- tensors ------------------------------------------------------------------------------------------

    def _tensor(self, made: Made, path: str) -> Any:
        name = made.name.removeprefix("torch._utils.")
        if made.name in _OTHER_TENSORS:
            raise refused(
                f"{self.what} holds at {path or 'its top'}",
                f"{_OTHER_TENSORS[made.name]}, which a chain cannot",
            )
        if name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return self.of(made.args[0], path)
        if name == "torch._tensor._rebuild_from_type_v2":
            function, kind, args, _ = made.args
            if kind.name not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
                return Alien(kind.name)
            return self.of(Made(function.name, args), path)
        stored, offset, shape, strides = made.args[:4]
        if type(stored) is not Made or stored.name != PERSISTENT:
            raise ValueError("it has no storage")
        storage, dtype = self._storages(stored.args)
        if name == "_rebuild_tensor_v3":
            dtype = made.args[6].name.removeprefix("torch.")
            if dtype not in DTYPES:
                raise ValueError(f"a dtype {dtype[:40]!r}")
        if dtype is None:
            raise ValueError("its storage has no dtype")
        return view(dtype, _size(shape), _size(strides), offset, storage)

    def _array(self, made: Made, path: str) -> Tensor:
        if made.state is not None:
            _, shape, dtype, by_column, data = made.state
        else:
            data, dtype, shape, order = made.args
            by_column = order == "F"
        name = f"numpy:{_numpy_dtype(dtype)}"
        data = self.of(data, path) if type(data) is Made else data
        if type(data) is not bytes or len(data) != math.prod(check_shape(shape)) * item_bytes(name):
            raise ValueError("its bytes are not those of its shape")
        if by_column:
            import numpy as np

            data = np.frombuffer(data, f"V{item_bytes(name)}").reshape(shape, order="F").tobytes("C")
        return Tensor.whole(name, shape, Source(None, 0, contiguous(shape), data))


def view(
    dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], offset: object, storage: Storage
) -> Tensor:
    """A tensor that is a view of a storage, from element number `offset` on. Raises Damaged where it would
    reach out of it."""
    check_shape(shape)
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    if type(offset) is not int or offset < 0 or any(stride < 0 for stride in strides):
        raise ValueError(f"it begins at {offset} and goes on by {strides}")
    if math.prod(shape) and (offset + reach) * item_bytes(dtype) > storage.size_bytes:
        raise ValueError(f"it reaches out of its storage of {storage.size_bytes} bytes")
    if sum(size != 1 for size in shape) == 0 or not math.prod(shape):
        strides = contiguous(shape)
    source = Source(storage.path, storage.offset + offset * item_bytes(dtype), strides)
    return Tensor.whole(dtype, shape, source)


def storage_dtype(kind: object) -> str | None:
    """The dtype of a storage's class; None where it has none. Raises ValueError where it is no such class."""
    if type(kind) is not Global or (kind.name not in _STORAGES and kind.name not in _UNTYPED):
        raise ValueError("a storage of an unknown class")
    return _STORAGES.get(kind.name)


def _size(value: Any) -> tuple[int, ...]:
    """A shape or strides."""
    value = value.args[0] if type(value) is Made and value.name == "torch.Size" else value
    if type(value) is not tuple or any(type(one) is not int for one in value):
        raise ValueError("its shape is none")
    return value


# -- the rest -----------------------------------------------------------------------------------------------


def _numpy_dtype(made: Any) -> str:
    """A dtype in numpy's own notation, which the format must know."""
    if type(made) is not Made or made.name != "numpy.dtype":
        raise ValueError("a numpy dtype that is none")
    code = made.args[0]
    order = made.state[1] if made.state is not None else "|"
    if code[0] in "SUV":
        size = made.state[5] if made.state is not None and made.state[5] > 0 else 0
        code = f"{code[0]}{size // 4 if code[0] == 'U' else size}"
    # "|" is for what has no order: one byte an element.
    order = "|" if code[1:] == "1" or code[0] in "SV" else {"=": "<", "|": "<"}.get(order, order)
    dtype = f"{order}{code}"
    if made.state is not None and made.state[2] is not None:
        raise ValueError("a numpy dtype with subarrays")
    if code[0] in "mM" and len(made.state or ()) > 8:
        unit, count = made.state[8][1][:2]
        unit = unit.args[0] if type(unit) is Made else unit  # Bytes, as protocol 2 has them.
        unit = str(unit, "ascii") if type(unit) is bytes else unit
        dtype += f"[{'' if count == 1 else count}{unit}]" if unit != "generic" else ""
    item_bytes(f"numpy:{dtype}")
    return dtype


def _text_of_path(self: Meaning, made: Made, path: str, depth: int) -> str:
    self.remarks.append(f"{path} was a path and is a text")
    return "/".join(map(str, made.args)).replace("//", "/")


def _namespace(self: Meaning, made: Made, path: str, depth: int) -> dict[Any, Any]:
    self.remarks.append(f"{path} was a {made.name.rpartition('.')[2]} and is a dict")
    return self._pairs(made.state or {}, path, depth)


def _encoded(self: Meaning, made: Made, path: str, depth: int) -> bytes:
    text, encoding = made.args
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes as {encoding}")
    return bytes(str(text), "latin1")


def _device(self: Meaning, made: Made, path: str, depth: int) -> Symbol:
    text = ":".join(map(str, made.args))
    if not text.replace(":", "").isalnum() or len(text) > 40:
        raise ValueError(f"a device {text[:40]!r}")
    return Symbol("torch.device", text)


_PLAIN: dict[str, Callable[[Meaning, Made, str, int], Any]] = {
    "torch.Size": lambda self, made, path, depth: Symbol("torch.Size", check_shape(tuple(made.args[0]))),
    "torch.device": _device,
    "torch.torch_version.TorchVersion": lambda self, made, path, depth: str(made.args[0]),
    "_codecs.encode": _encoded,
    "builtins.set": lambda self, made, path, depth: set(self.items(made, path, depth)),
    "builtins.frozenset": lambda self, made, path, depth: frozenset(self.items(made, path, depth)),
    "builtins.complex": lambda self, made, path, depth: complex(float(made.args[0]), float(made.args[1])),
    "builtins.bytearray": lambda self, made, path, depth: _bytes(self.of(*made.args[:1] or (b"",))),
    "argparse.Namespace": _namespace,
    "types.SimpleNamespace": _namespace,
    **{f"{module}.{kind}": _text_of_path for module in ("pathlib", "pathlib._local")
       for kind in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")},
}  # fmt: skip


def _bytes(value: object) -> bytes:
    if type(value) is not bytes:
        raise ValueError("bytes that are none")
    return value
