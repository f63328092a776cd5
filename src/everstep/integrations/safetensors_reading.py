"""What safetensors files hold, one or a sharded set with its index. Needs neither torch nor the library."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Annotated, Any

import msgspec

from everstep.errors import Damaged, Unsupported
from everstep.format.layout import item_bytes
from everstep.format.manifest import Count, Shape
from everstep.integrations import safetensors_file
from everstep.integrations.checkpoint import Checkpoint, Source, Tensor, contiguous
from everstep.integrations.safetensors_file import MAX_HEADER_BYTES, METADATA
from everstep.integrations.torch_reading import opened

INDEX = ".safetensors.index.json"
MAX_INDEX_BYTES = 256 * 1024 * 1024

_DTYPES = {
    code: name for name, code in safetensors_file.DTYPES.items() if not name.startswith("numpy:")
}  # fmt: skip


class _Entry(msgspec.Struct):
    dtype: Annotated[str, msgspec.Meta(max_length=32)]
    shape: Shape
    data_offsets: tuple[Count, Count]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read(path: Path) -> Checkpoint:
    """The tensors of a file, or of all files that an index (`....safetensors.index.json`) names, by name.

    Tied names that the file's metadata gives, as `safetensors.torch.save_model` writes them, are there too.

    Raises:
        Damaged: it is no whole safetensors file; or one that the index names is missing, or not what it says.
        Unsupported: a chain has no such dtype.
    """
    if path.name.endswith(".json"):
        return _sharded(path)
    tensors, ties, size_bytes = _one(path)
    return Checkpoint("safetensors", _tied(tensors, ties), size_bytes)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as a safetensors file does."""
    with opened(path) as file:
        begin = file.read(9)
    return len(begin) == 9 and begin[8:] == b"{" and struct.unpack("<Q", begin[:8])[0] <= MAX_HEADER_BYTES


def _one(path: Path) -> tuple[dict[str, Tensor], dict[str, str], int]:
    """Tensors and tied names of a file, and its size in bytes."""
    with opened(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        begin = file.read(8)
        header_bytes = struct.unpack("<Q", begin)[0] if len(begin) == 8 else size_bytes
        if header_bytes > min(MAX_HEADER_BYTES, size_bytes - 8):
            raise _damaged(path, "it is shorter than its header says")
        header = file.read(header_bytes)
    try:
        rows = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        about = msgspec.json.decode(rows.pop(METADATA, msgspec.Raw(b"{}")), type=dict[str, str] | None) or {}
        entries = {name: msgspec.json.decode(row, type=_Entry) for name, row in rows.items()}
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _damaged(path, f"its header cannot be read: {error}") from error
    end = 0
    for name, entry in sorted(entries.items(), key=lambda pair: pair[1].data_offsets):
        if entry.dtype not in _DTYPES:
            raise Unsupported(
                f"{path}: {name} is of dtype {entry.dtype}, which a chain does not have",
                kept="nothing was imported",
            )
        size = math.prod(entry.shape) * item_bytes(_DTYPES[entry.dtype])
        if entry.data_offsets != (end, end + size):
            raise _damaged(path, f"{name} does not follow on the tensor before it, or is not of its size")
        end += size
    if 8 + header_bytes + end != size_bytes:
        raise _damaged(path, f"it has {size_bytes} bytes instead of {8 + header_bytes + end}")
    tensors = {name: _tensor(path, 8 + header_bytes, entry) for name, entry in entries.items()}
    ties = {name: of for name, of in about.items() if of in tensors and name not in tensors}
    return tensors, ties, size_bytes


def _tensor(path: Path, begin: int, entry: _Entry) -> Tensor:
    source = Source(path, begin + entry.data_offsets[0], contiguous(entry.shape))
    return Tensor.whole(_DTYPES[entry.dtype], entry.shape, source)


def _tied(tensors: dict[str, Tensor], ties: dict[str, str]) -> dict[str, Any]:
    return {**tensors, **{name: tensors[of] for name, of in ties.items()}}


def _sharded(index: Path) -> Checkpoint:
    places = weight_map(index)
    found: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    total = 0
    for name in dict.fromkeys(places.values()):
        tensors, tied, size_bytes = _one(index.parent / name)
        wanted = {key for key, place in places.items() if place == name}
        lacking = sorted(wanted - tensors.keys())
        if lacking:
            raise _damaged(index.parent / name, f"it lacks {lacking[0]}, which {index.name} says it has")
        found.update({key: tensors[key] for key in tensors if key in wanted})
        ties.update({key: of for key, of in tied.items() if of in wanted})
        total += size_bytes
    ordered = {key: found[key] for key in places}
    return Checkpoint("safetensors", _tied(ordered, ties), total)


def weight_map(index: Path) -> dict[str, str]:
    """Which file beside an index has which tensor. Raises Damaged; also where it leads out of the folder."""
    with opened(index) as file:
        data = file.read(MAX_INDEX_BYTES + 1)
    try:
        places = msgspec.json.decode(data, type=_Index).weight_map
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _damaged(index, f"it is no index that can be read: {error}") from error
    for name in places.values():
        if not beside(name):
            raise _damaged(index, f"it names {name[:80]!r}, which is not beside it")
    return places


def beside(name: object) -> bool:
    """Whether it is the plain name of a file, which leads nowhere else."""
    return type(name) is str and bool(name) and name not in (".", "..") and not set(name) & {"/", "\\", "\0"}


def _damaged(path: Path, why: str) -> Damaged:
    return Damaged(f"{path} is no whole safetensors file: {why}", kept="nothing was imported")
