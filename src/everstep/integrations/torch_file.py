"""A snapshot's objects as a file that `torch.load(path, weights_only=True)` reads, also with `mmap=True`.

Such a file is a zip archive of uncompressed records: `data.pkl`, a pickle in which tensors are views of
numbered storages, and one record `data/N` for each storage. It is written here without torch, and the bytes
of the storages stream from the chain into the archive.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from everstep.chain import export
from everstep.chain.export import Exported, OnProgress, Pieces
from everstep.chain.history import Chain, Snapshot
from everstep.chain.reader import Reader
from everstep.errors import Damaged, Unsupported
from everstep.format.manifest import OBJECTS, Manifest
from everstep.format.values import Leaf, Scalar, Symbol, Value
from everstep.integrations.torch_pickle import NEWER, STORAGES, Pickle, torch_dtype

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
    acceptable = Acceptable(manifest)
    tree = acceptable.value(only, objects_of(manifest, only))
    if tree is LEFT_OUT:
        raise Unsupported(f"{only} is nothing that torch.load reads", kept="nothing was written")
    pickle = Pickle(manifest)
    pickle.put(tree)
    storages = sorted(pickle.storages, key=lambda item: export.reading_order(item[1]))
    total = sum(export.tensor_bytes(leaf) for _, leaf in storages)
    order = [leaf for _, leaf in storages]
    pieces = Pieces(Reader(chain.store), manifest, total, on_progress, order)
    with export.new_file(path, overwrite) as file:
        records = ((key, export.tensor_bytes(leaf), pieces.of(leaf)) for key, leaf in storages)
        archive(file, pickle.finished, records)
        size_bytes = file.seek(0, 2)
    remarks = (*acceptable.remarks, *sorted(pieces.remarks))
    return Exported(size_bytes, len(storages), pickle.tensors - len(storages), remarks)


def objects_of(manifest: Manifest, only: str) -> Value:
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


Storage: TypeAlias = tuple[str, int, Iterable[bytes | memoryview]]
"""A storage's key, its size in bytes, and its bytes in pieces."""


class Growing(Protocol):
    """What an archive is written to: a file, or the rest of one."""

    def write(self, data: bytes | memoryview, /) -> int: ...
    def seek(self, to: int, whence: int = 0, /) -> int: ...
    def tell(self) -> int: ...
    def flush(self) -> None: ...


def archive(file: Growing, pickle: bytes, storages: Iterable[Storage]) -> None:
    """Write an archive as `torch.save` does: a pickle, and the storages that it speaks of."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as made:  # type: ignore[call-overload]
        _record(made, file, "data.pkl", len(pickle), [pickle])
        _record(made, file, "byteorder", 6, [b"little"])
        for key, size_bytes, pieces in storages:
            _record(made, file, f"data/{key}", size_bytes, pieces)
        _record(made, file, "version", 2, [b"3\n"])


def _record(
    archive: zipfile.ZipFile, file: Growing, name: str, size_bytes: int, pieces: Iterable[bytes | memoryview]
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

LEFT_OUT: Any = object()
_MAPPINGS = (dict, OrderedDict, Counter, defaultdict)
_NEAREST: dict[type, type] = {defaultdict: dict, deque: list, frozenset: set}


class Acceptable:
    """Turns a values tree into one that can be pickled for the weights-only loader; `remarks` say what was
    left out or changed on the way."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.remarks: list[str] = []

    def value(self, path: str, value: Value, hashed: bool = False) -> Value:
        """`value` or the nearest acceptable one, or `LEFT_OUT`. `hashed`: as a key, or in a set."""
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
            return {item for item in items if item is not LEFT_OUT}
        items = [self.value(_below(path, number), item, hashed) for number, item in enumerate(value)]
        items = [None if item is LEFT_OUT else item for item in items]
        return tuple(items) if kind is tuple else items

    def _mapping(self, path: str, value: Any) -> Value:
        made: Any = {} if type(value) is defaultdict else type(value)()
        for key, item in value.items():
            below = _below(path, key)
            key, item = self.value(below, key, hashed=True), self.value(below, item)
            if key is not LEFT_OUT and item is not LEFT_OUT:
                made[key] = item
        return made

    def _leaf(self, path: str, value: Leaf) -> Value:
        leaf = self.manifest.by_name.get(value.name)
        if leaf is None:
            raise Damaged(f"the snapshot's values name a leaf {value.name} that it does not have")
        if torch_dtype(leaf) is None:
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
        if value.kind == "torch.dtype" and plain in (*STORAGES, *NEWER):
            return value
        if value.kind == "torch.device" and type(plain) is str and _DEVICE.fullmatch(plain):
            return value
        return self._left_out(path, f"a {value.kind}")

    def _left_out(self, path: str, what: str) -> Value:
        self.remarks.append(f"{path or 'a value'} is left out: torch.load would refuse {what}")
        return LEFT_OUT


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
