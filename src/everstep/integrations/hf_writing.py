"""A snapshot's model as a folder that `from_pretrained` reads: `config.json`, the weights as safetensors, in
one file or in shards with an index, and the tokenizer's small files if they came along. Needs no torch.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from everstep.chain import export
from everstep.chain.export import Exported, Memory, OnProgress, Pieces
from everstep.chain.history import Chain, Snapshot
from everstep.chain.reader import Reader
from everstep.errors import Damaged, Mismatch, NotFound
from everstep.format.manifest import FILES, OBJECTS, RUN, Manifest, StoredLeaf
from everstep.format.values import Leaf, Value
from everstep.integrations.checkpoint import plain_keys
from everstep.integrations.hf_reading import CONFIG, small_files
from everstep.integrations.safetensors_file import about, in_order, put, size_in_file
from everstep.integrations.safetensors_reading import beside

SHARD_BYTES = 5 * 10**9
"""A file of weights is not larger, unless one tensor is."""

INDEX = "model.safetensors.index.json"
_DTYPE_KEYS = ("dtype", "torch_dtype")


def write(
    chain: Chain,
    snapshot: Snapshot,
    path: Path,
    *,
    only: str = "",
    overwrite: bool = False,
    dtype: str = "",
    config: Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    on_progress: OnProgress = lambda done, total: None,
) -> Exported:
    """Write one object of a snapshot as a model to the folder `path`; durable on return. Blocks on I/O.

    Names are without `module.` and `_orig_mod.`. Tied weights are written once, under the first of their
    names, as the library does it; the files' metadata have the others.

    Args:
        only: the object; `model`, or the only one, unless given.
        dtype: what floating-point tensors become; `config.json` says so then.
        config: a `config.json`, or a folder that has one and the tokenizer's files. Else those that were
            imported with the state.
        max_shard_bytes: weights that are larger are several files.

    Raises:
        NotFound: there is no such object; or no `config`.
        Mismatch: `path` is taken; nothing was written.
        Unsupported: safetensors lacks a dtype.
        Damaged: a chunk is missing or is not the one that was written; nothing was written.
    """
    if overwrite:
        raise Mismatch(
            "a folder is never replaced", kept="nothing was written", next="another name, without --force"
        )
    manifest = export.manifest_of(chain, snapshot)
    export.check_free_folder(path)
    remarks: list[str] = []
    leaves, ties = _model(manifest, only, remarks)
    files = _files(manifest, config, remarks)
    shards = _shards(leaves, dtype, max_shard_bytes)
    total = sum(export.tensor_bytes(leaf) for leaf in leaves.values())
    pieces = Pieces(Reader(chain.store), manifest, total, on_progress)
    with export.new_folder(path) as folder:
        for name, data in files.items():
            if isinstance(data, Path):
                shutil.copyfile(data, folder / name)
            else:
                (folder / name).write_bytes(data)
        if dtype and CONFIG in files:
            _say_dtype(folder / CONFIG, dtype)
        for name, shard in shards.items():
            metadata = {**about(snapshot), **{tie: of for tie, of in ties.items() if of in shard}}
            with (folder / name).open("wb") as file:
                put(file, in_order(shard, dtype), metadata, pieces, dtype, remarks)
        if len(shards) > 1:
            (folder / INDEX).write_text(_index(shards, dtype), encoding="utf-8")
        size_bytes = sum(one.stat().st_size for one in folder.iterdir())
    return Exported(size_bytes, len(leaves), len(ties), (*remarks, *sorted(pieces.remarks)))


# -- the weights --------------------------------------------------------------------------------------------


def _model(manifest: Manifest, only: str, remarks: list[str]) -> tuple[dict[str, StoredLeaf], dict[str, str]]:
    """The leaves to write by their names in the file, in the module's order; and the names of tied ones."""
    tree = manifest.tree
    objects = tree.get(OBJECTS) if type(tree) is dict else None
    objects = objects if type(objects) is dict else {}
    name = only or ("model" if "model" in objects or len(objects) != 1 else next(iter(objects)))
    if name not in objects:
        raise NotFound(
            f"the snapshot has no object {name!r}; it has {', '.join(objects) or 'none'}",
            kept="nothing was written",
            next="--only NAME, with the name of the model",
        )
    found = dict(_leaves(objects[name], "", remarks))
    if not found:
        raise NotFound(
            f"{name} has no tensors", kept="nothing was written", next="--only NAME, another object"
        )
    renamed = plain_keys(list(found))
    leaves: dict[str, StoredLeaf] = {}
    ties: dict[str, str] = {}
    first: dict[Memory, str] = {}
    for key, one in found.items():
        leaf = manifest.by_name.get(one.name)
        if leaf is None:
            raise Damaged(f"the snapshot's values name a leaf {one.name} that it does not have")
        kept = first.setdefault(export.memory(leaf), renamed[key])
        if kept == renamed[key]:
            leaves[kept] = leaf
        else:
            ties[renamed[key]] = kept
    return leaves, ties


def _leaves(value: Value, path: str, remarks: list[str]) -> list[tuple[str, Leaf]]:
    """The leaves of a module's state by name; what else is in it has no place in such a file."""
    if type(value) is Leaf:
        return [(path, value)]
    if isinstance(value, dict):
        return [
            one
            for key, item in value.items()
            for one in _leaves(item, f"{path}.{key}" if path else str(key), remarks)
        ]
    remarks.append(f"{path or 'the object'} is left out: it is no tensor")
    return []


def _shards(leaves: dict[str, StoredLeaf], dtype: str, limit: int) -> dict[str, dict[str, StoredLeaf]]:
    """The leaves of each file, by its name: in their order, a new file where one would grow too large, and
    what is too large by itself in one of its own."""
    parts: list[dict[str, StoredLeaf]] = []
    growing: dict[str, StoredLeaf] = {}
    size = 0
    for name, leaf in leaves.items():
        added = size_in_file(leaf, dtype)
        if added > limit:
            parts.append({name: leaf})
            continue
        if size + added > limit:
            parts.append(growing)
            growing, size = {}, 0
        growing[name] = leaf
        size += added
    parts += [growing] if growing else []
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{n:05}-of-{len(parts):05}.safetensors": one for n, one in enumerate(parts, start=1)}


def _index(shards: dict[str, dict[str, StoredLeaf]], dtype: str) -> str:
    leaves = [leaf for shard in shards.values() for leaf in shard.values()]
    sums = {
        "total_parameters": sum(math.prod(leaf.shape) for leaf in leaves),
        "total_size": sum(size_in_file(leaf, dtype) for leaf in leaves),
    }
    places = {name: file for file, shard in shards.items() for name in shard}
    content = {"metadata": sums, "weight_map": places}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


# -- what belongs to them -----------------------------------------------------------------------------------


def _files(manifest: Manifest, config: Path | None, remarks: list[str]) -> dict[str, bytes | Path]:
    """The small files beside the weights, by name."""
    run = manifest.tree.get(RUN)
    kept = run.get(FILES, {}) if type(run) is dict else {}
    files: dict[str, bytes | Path] = {}
    for name, data in kept.items() if type(kept) is dict else ():
        if not beside(name) or type(data) is not bytes or name.endswith(".safetensors"):
            raise Damaged(f"the snapshot holds a file {str(name)[:80]!r} that cannot be")
        files[name] = data
    if config is not None:
        files.update(_given(config))
    if CONFIG not in files:
        remarks.append(
            "there is no config.json, without which from_pretrained does not know the model (--config PATH)"
        )
    return files


def _given(config: Path) -> dict[str, Path]:
    if config.is_dir():
        found = {path.name: path for path in small_files(config)}
        if CONFIG in found:
            return found
    elif config.is_file():
        return {CONFIG: config}
    raise NotFound(
        f"{config} is neither a config.json nor a folder that has one",
        kept="nothing was written",
        next="--config with the path of the model that was trained",
    )


def _say_dtype(path: Path, dtype: str) -> None:
    """What `from_pretrained` makes of the weights goes by this, not by what they are."""
    try:
        content: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Mismatch(
            f"config.json is no JSON: {error}", kept="nothing was written", next="--config with another"
        ) from error
    if isinstance(content, dict):
        there = [key for key in _DTYPE_KEYS if key in content] or ["torch_dtype"]
        content.update(dict.fromkeys(there, dtype))
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
