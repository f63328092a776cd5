"""Folders of Hugging Face models and of their Trainer's checkpoints: weights, and beside them what the
training needs to go on. Needs neither torch nor their libraries; nothing of the pickles is run.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from everstep.errors import Damaged, NotFound
from everstep.format.record import number
from everstep.integrations import safetensors_reading, torch_reading
from everstep.integrations.checkpoint import Checkpoint, Tensor, array, refused
from everstep.integrations.safetensors_reading import weight_map
from everstep.integrations.torch_reading import opened

WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin",
)  # fmt: skip
OBJECTS = {
    "optimizer.pt": "optimizer", "optimizer.bin": "optimizer",
    "scheduler.pt": "scheduler", "scheduler.bin": "scheduler",
    "scaler.pt": "scaler",
}  # fmt: skip
TRAINER_STATE = "trainer_state.json"
CONFIG = "config.json"

MAX_FILE_BYTES = 4 * 1024 * 1024
MAX_FILES_BYTES = 16 * 1024 * 1024
"""Small files are kept with the snapshot, whose values they are part of: so much, and no more."""

_MAX_METRICS = 1000

_KEPT = (".json", ".txt", ".jinja", ".model")
_NOT_KEPT = (".index.json",)


def is_hf(directory: Path) -> bool:
    """Whether a folder is one of theirs."""
    return any((directory / name).exists() for name in (*WEIGHTS, TRAINER_STATE))


def read(directory: Path) -> Checkpoint:
    """The objects `model`, and `optimizer`, `scheduler`, `scaler` where they are there; the step, the last
    metrics and the generators of a Trainer; the small files that belong to the model.

    Raises:
        NotFound: there are no weights.
        Unsupported, Damaged: as for the files of each kind.
    """
    model = _weights(directory)
    found = Checkpoint("hf", {"model": model.tree}, model.size_bytes, remarks=model.remarks)
    for file, name in OBJECTS.items():
        if (directory / file).is_file() and name not in found.tree:
            part = torch_reading.read(directory / file)
            found.tree[name] = part.tree
            found.size_bytes += part.size_bytes
            found.remarks += part.remarks
    _take_trainer_state(directory, found)
    _take_generators(directory, found)
    _keep_files(directory, found)
    if (directory / "training_args.bin").exists():
        found.remarks.append("training_args.bin is left out: it is a pickle of the Trainer's own classes")
    return found


def _weights(directory: Path) -> Checkpoint:
    name = next((name for name in WEIGHTS if (directory / name).is_file()), None)
    if name is None:
        there = sorted(path.name for path in directory.iterdir())[:8]
        raise NotFound(
            f"{directory} has no weights that are known here ({', '.join(WEIGHTS[:2])}); it has "
            f"{', '.join(there) or 'nothing'}",
            kept="nothing was imported",
            next="everstep import a file or directory of it",
        )
    path = directory / name
    if "safetensors" in name:
        return safetensors_reading.read(path)
    return torch_reading.read(path) if name.endswith(".bin") else _sharded(path)


def _sharded(index: Path) -> Checkpoint:
    places = weight_map(index)
    tree: dict[str, Any] = {}
    found = Checkpoint("torch", tree, 0)
    for name in dict.fromkeys(places.values()):
        part = torch_reading.read(index.parent / name)
        for key in (key for key, place in places.items() if place == name):
            if type(part.tree) is not dict or type(part.tree.get(key)) is not Tensor:
                raise Damaged(f"{index.parent / name} lacks {key}, which {index.name} says it has")
            tree[key] = part.tree[key]
        found.size_bytes += part.size_bytes
        found.remarks += part.remarks
    found.tree = {key: tree[key] for key in places}
    return found


def _take_trainer_state(directory: Path, found: Checkpoint) -> None:
    path = directory / TRAINER_STATE
    if not path.is_file():
        return
    try:
        state = json.loads(_small(path) or b"null")
        found.step = int(state["global_step"])
        found.epoch = int(state.get("epoch") or 0)
        for row in state.get("log_history") or ():
            for name, value in row.items():
                if type(value) in (int, float) and name not in ("step", "epoch") and len(name) <= 100:
                    found.metrics[str(name)] = number(float(value))
        if len(found.metrics) > _MAX_METRICS or not 0 <= found.epoch < 1 << 53:
            raise ValueError(f"{len(found.metrics)} metrics, epoch {found.epoch}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Damaged(
            f"{path} is none that the Trainer writes: {error}", kept="nothing was imported"
        ) from error


def _take_generators(directory: Path, found: Checkpoint) -> None:
    states = sorted(directory.glob("rng_state*.pth"))
    if not states:
        return
    if len(states) > 1:
        found.remarks.append(f"the generators of {len(states)} processes are left out: a snapshot has one's")
        return
    part = torch_reading.read(states[0])
    try:
        found.generators = _generators(part.tree)
    except (KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise refused(
            str(states[0]), f"holds generators otherwise than the Trainer does ({error})"
        ) from error
    found.size_bytes += part.size_bytes


def _generators(states: dict[str, Any]) -> dict[str, Any]:
    """As `everstep.state.rng.capture` has them."""
    version, words, gauss = states["python"]
    name, keys, position, has_gauss, cached = states["numpy"]
    made = {
        "python": (version, array("<u4", (625,), struct.pack("<625I", *words)), gauss),
        "numpy": {
            "name": name,
            "keys": keys,
            "pos": position,
            "has_gauss": has_gauss,
            "cached_gaussian": cached,
        },
        "torch": states["cpu"],
    }
    cuda = states.get("cuda")
    if cuda is not None:
        made["cuda"] = [cuda] if type(cuda) is Tensor else list(cuda)
    for one in (made["torch"], keys, *made.get("cuda", ())):
        if type(one) is not Tensor:
            raise TypeError("a state is no tensor")
    return made


# -- small files --------------------------------------------------------------------------------------------


def small_files(directory: Path) -> Iterator[Path]:
    """The files of a model's folder that are no weights and are worth keeping: configuration, tokenizer."""
    for path in sorted(directory.iterdir()):
        if path.name.endswith(_KEPT) and not path.name.endswith(_NOT_KEPT) and path.is_file():
            yield path


def _keep_files(directory: Path, found: Checkpoint) -> None:
    left = MAX_FILES_BYTES
    for path in small_files(directory):
        data = _small(path, min(left, MAX_FILE_BYTES))
        if data is None:
            found.remarks.append(f"{path.name} is left out: it is larger than what is kept with a snapshot")
            continue
        found.files[path.name] = data
        left -= len(data)


def _small(path: Path, limit: int = safetensors_reading.MAX_INDEX_BYTES) -> bytes | None:
    """The bytes of a file; None where it is larger than that."""
    with opened(path) as file:
        data = file.read(limit + 1)
    return data if len(data) <= limit else None
