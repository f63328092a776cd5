"""A snapshot's tensors as a safetensors file. Needs neither torch nor the safetensors library.

The file is a little-endian 64-bit length, a JSON header of that length that gives each tensor's dtype, shape
and place, and then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import BinaryIO

from everstep.chain import export
from everstep.chain.export import Exported, Memory, OnProgress, Pieces
from everstep.chain.history import Chain, Snapshot
from everstep.chain.reader import Reader
from everstep.errors import Mismatch, Unsupported
from everstep.format.layout import item_bytes
from everstep.format.manifest import StoredLeaf
from everstep.integrations import casting

METADATA = "__metadata__"
MAX_HEADER_BYTES = 100_000_000
"""What the library reads at most."""

_FLOATS_OF_NUMPY = {"numpy:<f2": "float16", "numpy:<f4": "float32", "numpy:<f8": "float64"}

_CAST_BYTES = 4 * 1024 * 1024
"""So much is converted at once: it takes a few times its size meanwhile."""

DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16",
    "uint32": "U32", "int32": "I32", "uint64": "U64", "int64": "I64",
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "numpy:|b1": "BOOL", "numpy:|u1": "U8", "numpy:|i1": "I8", "numpy:<u2": "U16", "numpy:<i2": "I16",
    "numpy:<u4": "U32", "numpy:<i4": "I32", "numpy:<u8": "U64", "numpy:<i8": "I64",
    "numpy:<f2": "F16", "numpy:<f4": "F32", "numpy:<f8": "F64", "numpy:<c8": "C64",
}  # fmt: skip


def write(
    chain: Chain,
    snapshot: Snapshot,
    path: Path,
    *,
    only: str = "",
    overwrite: bool = False,
    dtype: str = "",
    on_progress: OnProgress = lambda done, total: None,
) -> Exported:
    """Write the tensors of a snapshot to `path`; durable on return. Blocks on I/O.

    Tied weights are written once: the other names are in the file's metadata, each with the name that it is
    written under, as the safetensors library's `save_model` does it.

    Args:
        only: take only the leaves under this name, without it in front.
        overwrite: replace what is at `path`.
        dtype: what floating-point tensors become; as they are, unless given.

    Raises:
        Unsupported: safetensors has no such dtype; the message names the leaf.
        NotFound, Mismatch: `only` or `path` does not fit; nothing was written.
        Damaged: a chunk is missing or is not the one that was written; nothing was written.
    """
    manifest = export.manifest_of(chain, snapshot)
    export.check_free(path, overwrite)
    leaves, aliases = once(export.chosen(manifest, only), dtype)
    total = sum(export.tensor_bytes(leaf) for leaf in leaves.values())
    pieces = Pieces(Reader(chain.store), manifest, total, on_progress, leaves.values())
    remarks: list[str] = []
    with export.new_file(path, overwrite) as file:
        put(file, leaves, {**about(snapshot), **aliases}, pieces, dtype, remarks)
        size_bytes = file.tell()
    return Exported(size_bytes, len(leaves), len(aliases), (*remarks, *sorted(pieces.remarks)))


def about(snapshot: Snapshot) -> dict[str, str]:
    """What a file's metadata say of where it is from."""
    return {"format": "pt", "everstep_snapshot": snapshot.id, "everstep_step": str(snapshot.step)}


def put(
    file: BinaryIO,
    leaves: dict[str, StoredLeaf],
    metadata: dict[str, str],
    pieces: Pieces,
    to: str,
    remarks: list[str],
) -> None:
    """Write a header and the bytes of leaves in their order, floating-point ones as dtype `to` if that is
    given. Raises as `write`; where a number is too large for that dtype, a remark says so."""
    file.write(_header(leaves, metadata, to))
    for name, leaf in leaves.items():
        infinite = 0
        for piece in pieces.of(leaf):
            for start in range(0, len(piece), _CAST_BYTES):
                part = piece[start : start + _CAST_BYTES]
                data, lost = casting.cast(part, torch_name(leaf), kept_as(leaf, to))
                file.write(data)
                infinite += lost
        if infinite:
            remarks.append(f"{name}: {infinite} of its numbers are too large for {to}, and are infinite")


def torch_name(leaf: StoredLeaf) -> str:
    """The name of a leaf's dtype, of numpy's floating-point ones that of torch's."""
    return _FLOATS_OF_NUMPY.get(leaf.dtype, leaf.dtype)


def kept_as(leaf: StoredLeaf, to: str) -> str:
    """The dtype of a leaf in a file of which the floating-point tensors are to be of dtype `to`."""
    name = torch_name(leaf)
    return to if to and name in casting.FLOATS else name


def size_in_file(leaf: StoredLeaf, to: str) -> int:
    """Its size in bytes there. Raises Unsupported."""
    size = export.tensor_bytes(leaf)
    return size // item_bytes(leaf.dtype) * item_bytes(kept_as(leaf, to))


def once(chosen: dict[str, StoredLeaf], to: str = "") -> tuple[dict[str, StoredLeaf], dict[str, str]]:
    """The leaves to write in the order of their places in the file, and the other names of some of them."""
    first: dict[Memory, str] = {}
    aliases: dict[str, str] = {}
    for name, leaf in chosen.items():
        kept = first.setdefault(export.memory(leaf), name)
        if kept != name:
            aliases[name] = kept
    return in_order({name: chosen[name] for name in first.values()}, to), aliases


def in_order(leaves: dict[str, StoredLeaf], to: str = "") -> dict[str, StoredLeaf]:
    """Leaves in the order in which a file has them: wide elements first, so that every tensor lies on a
    multiple of its element's size."""
    names = sorted(
        leaves,
        key=lambda name: (-item_bytes(kept_as(leaves[name], to)), export.reading_order(leaves[name])),
    )
    return {name: leaves[name] for name in names}


def _header(leaves: dict[str, StoredLeaf], metadata: dict[str, str], to: str) -> bytes:
    rows: dict[str, object] = {METADATA: metadata}
    at = 0
    for name, leaf in leaves.items():
        if name == METADATA:
            raise Mismatch(
                f"a tensor in a safetensors file cannot be called {name}", kept="nothing was written"
            )
        end = at + size_in_file(leaf, to)
        rows[name] = {"dtype": _dtype(leaf, to), "shape": leaf.shape, "data_offsets": (at, end)}
        at = end
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise Unsupported(
            f"{len(leaves)} tensors need a header larger than safetensors allows",
            kept="nothing was written",
            next="--only NAME, or --format torch",
        )
    return struct.pack("<Q", len(text)) + text


def _dtype(leaf: StoredLeaf, to: str) -> str:
    if leaf.dtype not in DTYPES:
        raise Unsupported(
            f"leaf {leaf.name} is of dtype {leaf.dtype}, which safetensors does not have",
            kept="nothing was written",
            next="--only NAME to leave it out, or --format torch",
        )
    return DTYPES[kept_as(leaf, to)]
