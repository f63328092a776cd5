"""A snapshot's objects as a file that `torch.load(path, weights_only=True)` reads, also with `mmap=True`.

Such a file is a zip archive of uncompressed records: `data.pkl`, a pickle in which tensors are views of
numbered storages, and one record `data/N` for each storage. It is written here without torch and without the
pickle module: only what the weights-only loader accepts can come out, and the bytes of the storages stream
from the chain into the archive.
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from everstep.chain import export
from everstep.chain.export import Exported, Memory, OnProgress, Pieces
from everstep.chain.history import Chain, Snapshot
from everstep.chain.reader import Reader
from everstep.errors import Damaged, Unsupported
from everstep.format.manifest import OBJECTS, Manifest, StoredLeaf
from everstep.format.values import Leaf, Scalar, Symbol, Value

_STORAGES = {
    "bool": "Bool", "uint8": "Byte", "int8": "Char", "int16": "Short", "int32": "Int", "int64": "Long",
    "float16": "Half", "bfloat16": "BFloat16", "float32": "Float", "float64": "Double",
    "complex64": "ComplexFloat", "complex128": "ComplexDouble",
}  # fmt: skip
"""The dtypes that have a storage class of their own, and its name without `Storage`."""

_NEWER = frozenset({
    "uint16", "uint32", "uint64", "complex32",
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
})  # fmt: skip
"""The dtypes that torch pickles over an untyped storage."""

_OF_NUMPY = {
    "|b1": "bool", "|u1": "uint8", "|i1": "int8", "<u2": "uint16", "<i2": "int16", "<u4": "uint32",
    "<i4": "int32", "<u8": "uint64", "<i8": "int64", "<f2": "float16", "<f4": "float32", "<f8": "float64",
    "<c8": "complex64", "<c16": "complex128",
}  # fmt: skip

_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:\d{1,4})?")


def write(
    chain: Chain,
    snapshot: Snapshot,
    path: Path,
    *,
    only: str = "",
    overwrite: bool = False,
    on_progress: OnProgress = lambda done, total: None,
) -> Exported:
    """Write the objects of a snapshot to `path`; durable on return. Blocks on I/O.

    The file holds `{name: its state dict}`, or with `only` that one's state dict itself. Tied weights share a
    storage. Whatever the weights-only loader refuses is left out, or written as the nearest thing it accepts;
    the result's `remarks` name each.

    Args:
        only: the name of one object.
        overwrite: replace what is at `path`.

    Raises:
        NotFound, Mismatch: `only` or `path` does not fit; nothing was written.
        Damaged: a chunk is missing or is not the one that was written; nothing was written.
    """
    manifest = export.manifest_of(chain, snapshot)
    export.check_free(path, overwrite)
    acceptable = _Acceptable(manifest)
    tree = acceptable.value(only, _objects(manifest, only))
    if tree is _LEFT_OUT:
        raise Unsupported(f"{only} is nothing that torch.load reads", kept="nothing was written")
    pickle = _Pickle(manifest)
    pickle.put(tree)
    storages = sorted(pickle.storages, key=lambda item: export.reading_order(item[1]))
    total = sum(export.tensor_bytes(leaf) for _, leaf in storages)
    order = [leaf for _, leaf in storages]
    pieces = Pieces(Reader(chain.store), manifest, total, on_progress, order)
    with export.new_file(path, overwrite) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            _record(archive, file, "data.pkl", len(pickle.finished), [pickle.finished])
            _record(archive, file, "byteorder", 6, [b"little"])
            for key, leaf in storages:
                _record(archive, file, f"data/{key}", export.tensor_bytes(leaf), pieces.of(leaf))
            _record(archive, file, "version", 2, [b"3\n"])
        size_bytes = file.seek(0, 2)
    remarks = (*acceptable.remarks, *sorted(pieces.remarks))
    return Exported(size_bytes, len(storages), pickle.tensors - len(storages), remarks)


def _objects(manifest: Manifest, only: str) -> Value:
    tree = manifest.tree
    objects = tree.get(OBJECTS) if type(tree) is dict else None
    if type(objects) is not dict:
        raise Unsupported(
            "the snapshot holds no objects, only leaves",
            kept="nothing was written",
            next="everstep export REF OUT --format safetensors",
        )
    if only and only not in objects:
        raise export.lacking(manifest, only)
    return objects[only] if only else objects


def _record(
    archive: zipfile.ZipFile, file: BinaryIO, name: str, size_bytes: int, pieces: Iterable[bytes | memoryview]
) -> None:
    """Add a record whose bytes begin on a multiple of 64, as torch's own do, so that they can be mapped."""
    info = zipfile.ZipInfo(f"archive/{name}")
    large = size_bytes >= 1 << 30
    begin = file.seek(0, 2) + 30 + len(info.filename) + 20 * large + 4
    gap = -begin % 64
    info.extra = struct.pack("<2sH", b"FB", gap) + b"Z" * gap
    with archive.open(info, "w", force_zip64=large) as record:
        for piece in pieces:
            record.write(piece)


# -- what the weights-only loader accepts --------------------------------------------------------------------

_LEFT_OUT: Any = object()
_MAPPINGS = (dict, OrderedDict, Counter, defaultdict)
_NEAREST: dict[type, type] = {defaultdict: dict, deque: list, frozenset: set}


class _Acceptable:
    """Turns a values tree into one that can be pickled for the weights-only loader; `remarks` say what was
    left out or changed on the way."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.remarks: list[str] = []

    def value(self, path: str, value: Value, hashed: bool = False) -> Value:
        """`value` or the nearest acceptable one, or `_LEFT_OUT`. `hashed`: as a key, or in a set."""
        kind = type(value)
        if kind is int and value.bit_length() > 2000:
            return self._left_out(path, "an integer of more than 2000 bits")
        if value is None or kind in (bool, int, float, complex, str, bytes):
            return value
        if kind is Leaf:
            return self._left_out(path, "a tensor as a key") if hashed else self._leaf(path, value)
        if kind is Scalar:
            return self._scalar(path, value)
        if kind is Symbol:
            return self._symbol(path, value)
        if kind is frozenset and hashed:
            return self._left_out(path, "a frozenset as a key")
        if kind in _NEAREST:
            self.remarks.append(
                f"{path} was a {kind.__name__} and is a {_NEAREST[kind].__name__} in the file"
            )
        if kind in _MAPPINGS:
            return self._mapping(path, value)
        if kind in (set, frozenset):
            items = [self.value(path, item, hashed=True) for item in value]
            return {item for item in items if item is not _LEFT_OUT}
        items = [self.value(_below(path, number), item, hashed) for number, item in enumerate(value)]
        items = [None if item is _LEFT_OUT else item for item in items]
        return tuple(items) if kind is tuple else items

    def _mapping(self, path: str, value: Any) -> Value:
        made: Any = {} if type(value) is defaultdict else type(value)()
        for key, item in value.items():
            below = _below(path, key)
            key, item = self.value(below, key, hashed=True), self.value(below, item)
            if key is not _LEFT_OUT and item is not _LEFT_OUT:
                made[key] = item
        return made

    def _leaf(self, path: str, value: Leaf) -> Value:
        leaf = self.manifest.by_name.get(value.name)
        if leaf is None:
            raise Damaged(f"the snapshot's values name a leaf {value.name} that it does not have")
        if _torch_dtype(leaf) is None:
            return self._left_out(path, f"an array of dtype {leaf.dtype.removeprefix('numpy:')}")
        if leaf.dtype.startswith("numpy:"):
            self.remarks.append(f"{path} was a numpy array and is a tensor in the file")
        return value

    def _scalar(self, path: str, value: Scalar) -> Value:
        made = number_of(value)
        if made is None:
            return self._left_out(path, f"a numpy scalar of dtype {value.dtype}")
        self.remarks.append(f"{path} was a numpy scalar and is a {type(made).__name__} in the file")
        return made

    def _symbol(self, path: str, value: Symbol) -> Value:
        plain = value.value
        if value.kind == "torch.Size" and type(plain) is tuple and all(type(one) is int for one in plain):
            return value
        if value.kind == "torch.dtype" and plain in (*_STORAGES, *_NEWER):
            return value
        if value.kind == "torch.device" and type(plain) is str and _DEVICE.fullmatch(plain):
            return value
        return self._left_out(path, f"a {value.kind}")

    def _left_out(self, path: str, what: str) -> Value:
        self.remarks.append(f"{path or 'a value'} is left out: torch.load would refuse {what}")
        return _LEFT_OUT


def _below(path: str, key: object) -> str:
    return f"{path}/{key}" if path else str(key)


def number_of(scalar: Scalar) -> bool | int | float | complex | None:
    """A numpy scalar as the Python number of the same value; None where there is none."""
    kind, order = scalar.dtype.lstrip("<>|=")[:1], ">" if scalar.dtype.startswith(">") else "<"
    size = len(scalar.data)
    if scalar.dtype.lstrip("<>|=") != f"{kind}{size}":
        return None
    if kind == "b" and size == 1:
        return scalar.data != b"\0"
    if kind in ("i", "u"):
        return int.from_bytes(scalar.data, "little" if order == "<" else "big", signed=kind == "i")
    code = {"f2": "e", "f4": "f", "f8": "d", "c8": "ff", "c16": "dd"}.get(f"{kind}{size}")
    if code is None:
        return None
    parts = struct.unpack(order + code, scalar.data)
    return complex(*parts) if kind == "c" else float(parts[0])


def _torch_dtype(leaf: StoredLeaf) -> str | None:
    """torch's name for a leaf's dtype, or None where it has none."""
    name = leaf.dtype
    if name.startswith("numpy:"):
        return _OF_NUMPY.get(name.removeprefix("numpy:"))
    return name if name in _STORAGES or name in _NEWER else None


# -- the pickle --------------------------------------------------------------------------------------------


class _Pickle:
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
            self._tensor(self.manifest.by_name[value.name])
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

    def _tensor(self, leaf: StoredLeaf) -> None:
        """A contiguous view of a whole storage."""
        self.tensors += 1
        dtype = _torch_dtype(leaf)
        assert dtype is not None, "only acceptable leaves come here"
        typed = dtype in _STORAGES
        self._global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
        self._out += b"("
        self._storage(leaf, dtype)
        self.put(0)
        self._tuple(leaf.shape)
        self._tuple(_strides(leaf.shape))
        self.put(False)
        self._call("collections", "OrderedDict")
        if not typed:
            self._global("torch", dtype)
        self._out += b"tR"

    def _storage(self, leaf: StoredLeaf, dtype: str) -> None:
        key = self._keys.setdefault(export.memory(leaf), str(len(self._keys)))
        if key == str(len(self.storages)):
            self.storages.append((key, leaf))
        self._out += b"("
        self.put("storage")
        if dtype in _STORAGES:
            self._global("torch", f"{_STORAGES[dtype]}Storage")
            count = math.prod(leaf.shape)
        else:
            self._global("torch.storage", "UntypedStorage")
            count = export.tensor_bytes(leaf)
        self.put(key)
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
