"""Pickles as `torch.save` writes them, and DCP: opcode by opcode, without torch and the pickle module.

Of a values tree only what the weights-only loader accepts can come out.
"""

from __future__ import annotations

import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from everstep.chain import export
from everstep.chain.export import Memory
from everstep.format.layout import item_bytes
from everstep.format.manifest import Manifest, StoredLeaf
from everstep.format.values import Leaf, Symbol, Value

STORAGES = {
    "bool": "Bool", "uint8": "Byte", "int8": "Char", "int16": "Short", "int32": "Int", "int64": "Long",
    "float16": "Half", "bfloat16": "BFloat16", "float32": "Float", "float64": "Double",
    "complex64": "ComplexFloat", "complex128": "ComplexDouble",
}  # fmt: skip
"""The dtypes that have a storage class of their own, and its name without `Storage`."""

NEWER = frozenset({
    "uint16", "uint32", "uint64", "complex32",
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
})  # fmt: skip
"""The dtypes that torch pickles over an untyped storage."""

_OF_NUMPY = {
    "|b1": "bool", "|u1": "uint8", "|i1": "int8", "<u2": "uint16", "<i2": "int16", "<u4": "uint32",
    "<i4": "int32", "<u8": "uint64", "<i8": "int64", "<f2": "float16", "<f4": "float32", "<f8": "float64",
    "<c8": "complex64", "<c16": "complex128",
}  # fmt: skip


def torch_dtype(leaf: StoredLeaf) -> str | None:
    """torch's name for a leaf's dtype, or None where it has none."""
    name = leaf.dtype
    if name.startswith("numpy:"):
        return _OF_NUMPY.get(name.removeprefix("numpy:"))
    return name if name in STORAGES or name in NEWER else None


@dataclass(frozen=True)
class View:
    """A contiguous tensor that is all of storage `key`. `dtype` is torch's own name."""

    key: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """What a call of something of a module gives: a class, most of all. Without `args` it is the thing
    itself."""

    module: str
    name: str
    args: tuple[Any, ...] | None = None


@dataclass(frozen=True, eq=False)
class Instance:
    """An instance of a class, made without a call, that is then given its state."""

    module: str
    name: str
    state: Any


class Pickle:
    """A pickle of protocol 2, opcode by opcode, exactly as `torch.save` lays tensors out in one.

    `storages` are the (key, leaf) to write as records; leaves that are the same bytes have one together.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.storages: list[tuple[str, StoredLeaf]] = []
        self.tensors = 0
        self._keys: dict[Memory, str] = {}
        self._out = bytearray(b"\x80\x02")

    @property
    def finished(self) -> bytes:
        return bytes(self._out) + b"."

    def put(self, value: Value) -> None:
        kind = type(value)
        if value is None or kind is bool:
            self._out += {None: b"N", False: b"\x89", True: b"\x88"}[value]
        elif kind is int:
            self._out += _integer(value)
        elif kind is float:
            self._out += struct.pack(">cd", b"G", value)
        elif kind is str:
            data = value.encode()
            self._out += struct.pack("<cI", b"X", len(data)) + data
        elif kind is complex:
            self._call("__builtin__", "complex", value.real, value.imag)
        elif kind is bytes:
            self._call("_codecs", "encode", value.decode("latin1"), "latin1")
        elif kind is list:
            self._list(value)
        elif kind is tuple:
            self._tuple(value)
        elif kind is set:
            self._call("__builtin__", "set", list(value))
        elif kind is dict:
            self._out += b"}"
            self._items(value)
        elif kind is OrderedDict:
            self._call("collections", "OrderedDict")
            self._items(value)
        elif kind is Counter:
            self._call("collections", "Counter", dict(value))
        elif kind is Leaf:
            self._leaf(self.manifest.by_name[value.name])
        elif kind is View:
            self._view(value)
        elif kind is Call:
            if value.args is None:
                self._global(value.module, value.name)
            else:
                self._call(value.module, value.name, *value.args)
        elif kind is Instance:
            self._global(value.module, value.name)
            self._out += b")\x81"
            self.put(value.state)
            self._out += b"b"
        else:
            self._symbol(value)

    def _list(self, items: list[Value]) -> None:
        self._out += b"]("
        for item in items:
            self.put(item)
        self._out += b"e"

    def _tuple(self, items: Iterable[Value]) -> None:
        self._out += b"("
        for item in items:
            self.put(item)
        self._out += b"t"

    def _items(self, mapping: Any) -> None:
        self._out += b"("
        for key, item in mapping.items():
            self.put(key)
            self.put(item)
        self._out += b"u"

    def _global(self, module: str, name: str) -> None:
        self._out += f"c{module}\n{name}\n".encode()

    def _call(self, module: str, name: str, *arguments: Value) -> None:
        self._global(module, name)
        self._tuple(arguments)
        self._out += b"R"

    def _symbol(self, symbol: Symbol) -> None:
        if symbol.kind == "torch.dtype":
            self._global("torch", symbol.value)
        else:
            self._call("torch", symbol.kind.removeprefix("torch."), symbol.value)

    def _leaf(self, leaf: StoredLeaf) -> None:
        self.tensors += 1
        dtype = torch_dtype(leaf)
        assert dtype is not None, "only acceptable leaves come here"
        key = self._keys.setdefault(export.memory(leaf), str(len(self._keys)))
        if key == str(len(self.storages)):
            self.storages.append((key, leaf))
        self._view(View(key, dtype, leaf.shape))

    def _view(self, view: View) -> None:
        typed = view.dtype in STORAGES
        self._global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
        self._out += b"("
        self._storage(view)
        self.put(0)
        self._tuple(view.shape)
        self._tuple(_strides(view.shape))
        self.put(False)
        self._call("collections", "OrderedDict")
        if not typed:
            self._global("torch", view.dtype)
        self._out += b"tR"

    def _storage(self, view: View) -> None:
        self._out += b"("
        self.put("storage")
        count = math.prod(view.shape)
        if view.dtype in STORAGES:
            self._global("torch", f"{STORAGES[view.dtype]}Storage")
        else:
            self._global("torch.storage", "UntypedStorage")
            count *= item_bytes(view.dtype)
        self.put(view.key)
        self.put("cpu")
        self.put(count)
        self._out += b"tQ"


def _integer(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return struct.pack("<cB", b"K", value)
    if 0 <= value < 1 << 16:
        return struct.pack("<cH", b"M", value)
    if -(1 << 31) <= value < 1 << 31:
        return struct.pack("<ci", b"J", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return struct.pack("<cB", b"\x8a", len(data)) + data


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a contiguous tensor, in elements."""
    return tuple(math.prod(max(extent, 1) for extent in shape[number + 1 :]) for number in range(len(shape)))
