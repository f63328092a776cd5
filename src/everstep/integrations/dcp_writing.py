"""A snapshot's objects as a directory that `torch.distributed.checkpoint.load` reads with its own reader, on
any number of ranks. Needs no torch.

The state dict is flattened as DCP flattens it. Each tensor is an archive of `torch.save` in a data file, a
large one several, cut along its first dimension, so that a rank reads little more than what it needs; every
other value is one, too. `.metadata` says what lies where; it comes last.
"""

from __future__ import annotations

import math
import os
import secrets
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from everstep.chain import export
from everstep.chain.export import Exported, OnProgress, Pieces
from everstep.chain.history import Chain, Snapshot
from everstep.chain.reader import Reader
from everstep.errors import Mismatch, Unsupported
from everstep.format.layout import item_bytes
from everstep.format.manifest import OBJECTS, RUN, Manifest, StoredLeaf
from everstep.format.values import Leaf, Value
from everstep.integrations.torch_file import LEFT_OUT, Acceptable, Storage, archive, objects_of
from everstep.integrations.torch_pickle import Call, Instance, Pickle, View, torch_dtype

PART_BYTES = 128 * 1024 * 1024
"""Tensors are cut into parts of about this size."""

FILE_BYTES = 4 * 1024 * 1024 * 1024
"""A data file that has grown to this size is followed by the next."""

_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_VERSION = "1.0.0"
_MAPPINGS = (dict, OrderedDict, Counter, defaultdict)


def write(
    chain: Chain,
    snapshot: Snapshot,
    path: Path,
    *,
    only: str = "",
    overwrite: bool = False,
    on_progress: OnProgress = lambda done, total: None,
) -> Exported:
    """Write the objects of a snapshot to the directory `path`; durable on return. Blocks on I/O.

    It holds `{name: its state dict}`, or with `only` that one's state dict itself. The state of an optimizer
    is by the names of its parameters where the snapshot knows them all, as `get_optimizer_state_dict` has it.
    Tied weights are written once.

    Raises:
        NotFound, Mismatch: `only` or `path` does not fit; nothing was written.
        Damaged: a chunk is missing or is not the one that was written; nothing was written.
    """
    if overwrite:
        raise Mismatch(
            "a folder is never replaced", kept="nothing was written", next="another name, without --force"
        )
    manifest = export.manifest_of(chain, snapshot)
    export.check_free_folder(path)
    acceptable = Acceptable(manifest)
    tree = _by_name(manifest, only, objects_of(manifest, only), acceptable.remarks)
    if type(tree) not in _MAPPINGS:
        raise Unsupported(f"{only} is no dict, as DCP saves them", kept="nothing was written")
    entries = _flattened(tree, acceptable)
    leaves = {id(one): one for one in entries.values() if isinstance(one, StoredLeaf)}
    distinct = {export.memory(leaf): leaf for leaf in leaves.values()}
    total = sum(export.tensor_bytes(leaf) for leaf in distinct.values())
    pieces = Pieces(Reader(chain.store), manifest, total, on_progress)
    with export.new_folder(path) as folder:
        data = _Data(folder, manifest, pieces)
        written = {
            key: data.put_tensor(leaf)
            for key, leaf in sorted(distinct.items(), key=lambda item: export.reading_order(item[1]))
        }
        placed = {
            name: written[export.memory(one)] if isinstance(one, StoredLeaf) else data.put_value(one)
            for name, one in entries.items()
        }
        data.close()
        (folder / ".metadata").write_bytes(_metadata(manifest, path, entries, placed, _paths(tree)))
        size_bytes = sum(one.stat().st_size for one in folder.iterdir())
    remarks = (*acceptable.remarks, *sorted(pieces.remarks))
    tensors = sum(isinstance(one, StoredLeaf) for one in entries.values())
    return Exported(size_bytes, len(distinct), tensors - len(distinct), remarks)


# -- the state dict, flat -----------------------------------------------------------------------------------


def _flattened(tree: Value, acceptable: Acceptable) -> dict[str, Any]:
    """What is saved under each name: a leaf, or a value that the weights-only loader accepts."""
    entries: dict[str, Any] = {}
    for path, value in _walk(tree):
        name = _name(path)
        if name in entries:
            raise Mismatch(
                f"two values would both be called {name!r}", kept="nothing was written", next="--only NAME"
            )
        made = acceptable.value(name, value)
        if made is not LEFT_OUT:
            entries[name] = acceptable.manifest.by_name[made.name] if type(made) is Leaf else made
    return entries


def _paths(tree: Value) -> dict[str, tuple[str | int, ...]]:
    return {_name(path): path for path, _ in _walk(tree)}


def _name(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


def _walk(value: Value, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Value]]:
    """The values that DCP saves one by one: those of dicts, and of lists that hold dicts or tensors."""
    if type(value) in _MAPPINGS:
        for key, item in value.items():
            yield from _walk(item, (*path, str(key)))
    elif type(value) is list and not _is_terminal(value):
        for number, item in enumerate(value):
            yield from _walk(item, (*path, number))
    else:
        yield path, value


def _is_terminal(items: list[Value]) -> bool:
    return not any(
        type(one) is Leaf or type(one) in _MAPPINGS or (type(one) is list and not _is_terminal(one))
        for one in items
    )


def _by_name(manifest: Manifest, only: str, tree: Value, remarks: list[str]) -> Value:
    """The objects with the state of optimizers by the names of their parameters, not by numbers, which mean
    nothing where another rank has other parameters."""
    run = manifest.tree.get(RUN) or {}
    known = run.get("parameters") if type(run) is dict else None
    objects = manifest.tree[OBJECTS]
    if type(known) is not dict:
        return tree
    if only:
        return _named(only, tree, known.get(only), objects, remarks)
    return {name: _named(name, one, known.get(name), objects, remarks) for name, one in tree.items()}


def _named(object: str, state: Value, names: Value, objects: dict[str, Value], remarks: list[str]) -> Value:
    if type(names) is not list or type(state) is not dict or type(state.get("param_groups")) is not list:
        return state
    held, groups = state.get("state"), state["param_groups"]
    numbers = [one for group in groups for one in group.get("params", ())]
    if type(held) is not dict or any(type(one) is not int for one in (*held, *numbers)):
        return state
    if not all(names) or len(set(names)) != len(names) or sorted(numbers) != list(range(len(names))):
        remarks.append(f"the state of {object} is by number: the names of its parameters are not all known")
        return state
    short = [_without_module(name, objects) for name in names]
    names = short if len(set(short)) == len(short) else names
    groups = [{**group, "params": [names[one] for one in group.get("params", ())]} for group in groups]
    return {**state, "state": {names[key]: one for key, one in held.items()}, "param_groups": groups}


def _without_module(name: str, objects: dict[str, Value]) -> str:
    """A parameter's name in its own module."""
    return next((name[len(one) + 1 :] for one in objects if name.startswith(f"{one}.")), name)


# -- the data files -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Placed:
    """Where an archive lies, and of a tensor which part it is."""

    file: str
    offset: int
    size_bytes: int
    at: tuple[int, ...] | None = None
    extent: tuple[int, ...] | None = None


class _Data:
    """The data files of a directory, one open at a time."""

    def __init__(self, folder: Path, manifest: Manifest, pieces: Pieces) -> None:
        self._folder = folder
        self._manifest = manifest
        self._pieces = pieces
        self._number = -1
        self._file: BinaryIO | None = None

    def put_tensor(self, leaf: StoredLeaf) -> list[_Placed]:
        dtype = torch_dtype(leaf)
        assert dtype is not None, "only acceptable leaves come here"
        stream = _Stream(self._pieces.of(leaf))
        placed = []
        for at, extent in _parts(leaf.shape, item_bytes(leaf.dtype)):
            size = math.prod(extent) * item_bytes(leaf.dtype)
            pickle = Pickle(self._manifest)
            pickle.put(View("0", dtype, extent))
            place = self._put(pickle.finished, [("0", size, stream.take(size))])
            placed.append(replace(place, at=at, extent=extent))
        return placed

    def put_value(self, value: Value) -> list[_Placed]:
        pickle = Pickle(self._manifest)
        pickle.put(value)
        storages: list[Storage] = [
            (key, export.tensor_bytes(leaf), self._pieces.of(leaf)) for key, leaf in pickle.storages
        ]
        return [self._put(pickle.finished, storages)]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _put(self, pickle: bytes, storages: list[Storage]) -> _Placed:
        if self._file is None or self._file.tell() >= FILE_BYTES:
            self.close()
            self._number += 1
            self._file = (self._folder / self._name).open("w+b")
        rest = _Rest(self._file)
        archive(rest, pickle, storages)
        return _Placed(self._name, rest.begin, rest.seek(0, os.SEEK_END))

    @property
    def _name(self) -> str:
        return f"__0_{self._number}.distcp"


def _parts(shape: tuple[int, ...], item: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The parts (begin, extent) of a tensor, cut along its first dimension."""
    if not shape or math.prod(shape) * item <= PART_BYTES:
        return [((0,) * len(shape), shape)]
    row = math.prod(shape[1:]) * item
    rows = max(PART_BYTES // row, 1)
    return [
        ((first, *(0,) * (len(shape) - 1)), (min(rows, shape[0] - first), *shape[1:]))
        for first in range(0, shape[0], rows)
    ]


class _Stream:
    """Bytes that come in pieces, given out in other pieces."""

    def __init__(self, pieces: Iterator[memoryview]) -> None:
        self._pieces = pieces
        self._left = memoryview(b"")

    def take(self, size_bytes: int) -> Iterator[memoryview]:
        while size_bytes:
            if not len(self._left):
                self._left = next(self._pieces)
            piece, self._left = self._left[:size_bytes], self._left[size_bytes:]
            size_bytes -= len(piece)
            yield piece


class _Rest:
    """What follows in a file, from its end on, as a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.begin = file.seek(0, os.SEEK_END)

    def write(self, data: bytes | memoryview, /) -> int:
        return self._file.write(data)

    def seek(self, to: int, whence: int = 0, /) -> int:
        return self._file.seek(to + (self.begin if whence == os.SEEK_SET else 0), whence) - self.begin

    def tell(self) -> int:
        return self._file.tell() - self.begin

    def flush(self) -> None:
        self._file.flush()


# -- the metadata -------------------------------------------------------------------------------------------


def _metadata(
    manifest: Manifest,
    path: Path,
    entries: dict[str, Any],
    placed: dict[str, list[_Placed]],
    paths: dict[str, tuple[str | int, ...]],
) -> bytes:
    described = {name: _described(one, placed[name]) for name, one in entries.items()}
    stored = {
        _index(name, one): Instance(
            _FILESYSTEM,
            "_StorageInfo",
            {"relative_path": one.file, "offset": one.offset, "length": one.size_bytes},
        )
        for name in entries
        for one in placed[name]
    }
    about: dict[str, Any] = {
        "checkpoint_id": str(path),
        "save_id": secrets.token_hex(16),
        "load_id": None,
        "modules": [],
    }
    pickle = Pickle(manifest)
    pickle.put(
        Instance(
            _METADATA,
            "Metadata",
            {
                "state_dict_metadata": described,
                "planner_data": {name: paths[name] for name in entries},
                "storage_data": stored,
                "storage_meta": Instance(_METADATA, "StorageMeta", about),
                "version": _VERSION,
            },
        )
    )
    return pickle.finished


def _index(name: str, placed: _Placed) -> Instance:
    offset = {} if placed.at is None else {"offset": _size(placed.at)}
    return Instance(_METADATA, "MetadataIndex", {"fqn": name, "index": None, **offset})


def _described(entry: Any, placed: list[_Placed]) -> Instance:
    if not isinstance(entry, StoredLeaf):
        return Instance(_METADATA, "BytesStorageMetadata", {})
    dtype = torch_dtype(entry)
    assert dtype is not None, "only acceptable leaves come here"
    # As `TensorProperties.__getstate__` has it: dtype, layout, requires_grad, memory format, pinned.
    properties = (
        Call("torch", dtype),
        Call("torch.serialization", "_get_layout", ("torch.strided",)),
        False,
        Call(_METADATA, "_MEM_FORMAT_ENCODING", (0,)),
        False,
    )
    chunks = [
        Instance(_METADATA, "ChunkStorageMetadata", {"offsets": _size(one.at), "sizes": _size(one.extent)})
        for one in placed
    ]
    return Instance(
        _METADATA,
        "TensorStorageMetadata",
        {
            "properties": Instance(_METADATA, "TensorProperties", properties),
            "size": _size(entry.shape),
            "chunks": chunks,
        },
    )


def _size(shape: tuple[int, ...] | None) -> Call:
    assert shape is not None
    return Call("torch", "Size", (shape,))
