"""Directories of `torch.distributed.checkpoint`: a `.metadata`, which is a pickle, and files in which each
tensor, or part of a sharded one, is an archive of its own. Needs no torch; nothing of the pickles is run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from everstep.errors import Damaged
from everstep.integrations import pickles
from everstep.integrations.checkpoint import Box, Checkpoint, Tensor, check_shape, covering, refused
from everstep.integrations.pickles import Global, Made
from everstep.integrations.safetensors_reading import beside
from everstep.integrations.torch_reading import archived, opened
from everstep.integrations.torch_state import DTYPES

METADATA = ".metadata"

_DCP = "torch.distributed.checkpoint"
_ALLOWED = frozenset({
    *(f"{_DCP}.metadata.{name}" for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")),
    f"{_DCP}.filesystem._StorageInfo",
    "torch.Size", "torch.serialization._get_layout", "torch.strided",
    "collections.OrderedDict", "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath",
    "pathlib._local.PosixPath", "pathlib._local.WindowsPath",
    *(f"torch.{name}" for name in DTYPES),
})  # fmt: skip
"""All that stock DCP puts into a `.metadata`."""

_OPEN_FILES = 64

_ITEMS_PER_VALUE = 64
"""A list's items that were empty dicts are not in DCP's files; more of them than this are not believed."""


def read(directory: Path) -> Checkpoint:
    """The state dict that was saved, nested as it was where the planner's data tell. Reads the metadata, and
    all parts to check their sums.

    Raises:
        Unsupported: what is in it is not what stock DCP writes, or no state is made of it.
        Damaged: it is not whole: the parts of a tensor do not make it up, or are not what they should be.
    """
    metadata, size_bytes = _metadata(directory / METADATA)
    try:
        return _Directory(directory, metadata, size_bytes).read()
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise Damaged(
            f"{directory / METADATA} is otherwise than DCP writes it: {type(error).__name__} {error}",
            kept="nothing was imported",
        ) from error


def _metadata(path: Path) -> tuple[dict[str, Any], int]:
    with opened(path) as file:
        data = file.read(pickles.MAX_PICKLE_BYTES + 1)
    made, _ = pickles.read(data, str(path), lambda module, name: f"{module}.{name}" in _ALLOWED)
    if type(made) is not Made or made.name != f"{_DCP}.metadata.Metadata" or type(made.state) is not dict:
        raise refused(str(path), "is no metadata of torch.distributed.checkpoint")
    return made.state, len(data)


class _Directory:
    def __init__(self, directory: Path, metadata: dict[str, Any], size_bytes: int) -> None:
        self.directory = directory
        self.entries: dict[str, Made] = metadata["state_dict_metadata"]
        self.paths = metadata.get("planner_data") or {}
        self.sizes = {METADATA: size_bytes}
        self.remarks: list[str] = []
        self.places: dict[tuple[str, tuple[int, ...] | None], dict[str, Any]] = {}
        for index, info in metadata["storage_data"].items():
            offset = index.state.get("offset")
            self.places[index.state["fqn"], None if offset is None else _numbers(offset)] = info.state
        self.files: dict[str, BinaryIO] = {}
        self.stack = ExitStack()

    def read(self) -> Checkpoint:
        with self.stack:
            values = {name: self._entry(name, entry) for name, entry in self.entries.items()}
        nested = _Nested(_ITEMS_PER_VALUE * len(values) + _ITEMS_PER_VALUE)
        for name, value in values.items():
            nested.set(_path(self.paths.get(name, (name,)), name), value)
        return Checkpoint("dcp", nested.root, sum(self.sizes.values()), remarks=self.remarks)

    def _entry(self, name: str, entry: Made) -> Any:
        kind = entry.name.rpartition(".")[2]
        if type(name) is not str:
            raise TypeError("a name is no text")
        if kind == "BytesStorageMetadata":
            return self._archived(name, None)
        if kind != "TensorStorageMetadata":
            raise TypeError(f"{name} is a {kind}")
        shape = check_shape(_numbers(entry.state["size"]))
        dtype = _dtype(entry.state["properties"])
        boxes = tuple(box for chunk in entry.state["chunks"] for box in self._boxes(name, dtype, chunk.state))
        return covering(name, Tensor(dtype, shape, boxes))

    def _boxes(self, name: str, dtype: str, chunk: dict[str, Any]) -> Iterator[Box]:
        at, extent = check_shape(_numbers(chunk["offsets"])), check_shape(_numbers(chunk["sizes"]))
        part = self._archived(name, at)
        if type(part) is not Tensor or part.shape != extent or part.dtype != dtype:
            raise Damaged(
                f"the part of {name} at {list(at)} is not the tensor of {list(extent)} that it is said to be",
                kept="nothing was imported",
            )
        yield Box(at, extent, part.boxes[0].source)

    def _archived(self, name: str, at: tuple[int, ...] | None) -> Any:
        info = self.places.get((name, at))
        if info is None:
            raise Damaged(f"{self.directory} does not say where {name} is", kept="nothing was imported")
        if info.get("transform_descriptors"):
            raise refused(f"{self.directory}: {name}", "is stored by an extension, such as a compression")
        file, offset, size = info["relative_path"], info["offset"], info["length"]
        if not beside(file):
            raise Damaged(
                f"{self.directory / METADATA} places {name} in {str(file)[:80]!r}, out of the directory",
                kept="nothing was imported",
            )
        stream = self._file(file)
        if type(offset) is not int or type(size) is not int or offset < 0 or size < 0:
            raise ValueError(f"{name} lies at {offset}")
        if offset + size > os.fstat(stream.fileno()).st_size:
            raise Damaged(f"{self.directory / file} ends before {name}", kept="nothing was imported")
        value, remarks = archived(stream, self.directory / file, offset, size, f"{file}: {name}")
        self.remarks += remarks
        return value

    def _file(self, name: str) -> BinaryIO:
        if name not in self.files:
            if len(self.files) >= _OPEN_FILES:
                self.files.clear()
                self.stack.close()
            self.files[name] = stream = self.stack.enter_context(opened(self.directory / name))
            self.sizes[name] = os.fstat(stream.fileno()).st_size
        return self.files[name]


def _numbers(made: Any) -> tuple[int, ...]:
    """A `torch.Size`."""
    value = made.args[0] if type(made) is Made and made.name == "torch.Size" else made
    if type(value) is not tuple:
        raise TypeError("a size is none")
    return value


def _dtype(properties: Made) -> str:
    dtype = properties.state[0] if type(properties.state) is tuple else properties.state["dtype"]
    if type(dtype) is not Global:
        raise TypeError("a dtype is none")
    return dtype.name.removeprefix("torch.")


# -- the nesting --------------------------------------------------------------------------------------------


def _path(path: Any, name: str) -> tuple[str | int, ...]:
    if type(path) is not tuple or not path or any(type(part) not in (str, int) for part in path):
        raise TypeError(f"the path of {name} is none")
    return path


class _Nested:
    """Nested dicts (under texts) and lists (under numbers), as DCP nests them. `room` is how many items lists
    may have in all."""

    def __init__(self, room: int) -> None:
        self.root: dict[Any, Any] = {}
        self._room = room

    def set(self, path: tuple[str | int, ...], value: Any) -> None:
        here: Any = self.root
        for part, following in zip(path, [*path[1:], None], strict=True):
            last = following is None
            below = value if last else ([] if type(following) is int else {})
            if type(here) is list and type(part) is int and part >= 0:
                self._grow(here, part + 1)
                if here[part] is None or last:
                    here[part] = below
            elif type(here) is dict and type(part) is str:
                if part not in here or last:
                    here[part] = below
            else:
                raise TypeError(f"{'.'.join(map(str, path))} lies within another value")
            here = here[part]

    def _grow(self, items: list[Any], count: int) -> None:
        self._room -= max(count - len(items), 0)
        if self._room < 0:
            raise ValueError("lists of more items than there are values")
        items += [None] * (count - len(items))
