"""Checkpoints as the real libraries write them, and hostile ones."""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

import everstep


class Tied(nn.Module):
    """A model with tied weights, buffers and a tensor of another order in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(x)))  # type: ignore[no-any-return]


def trained(seed: int = 0, steps: int = 2) -> tuple[Tied, torch.optim.Optimizer, Any]:
    """A model, its optimizer and schedule after a few steps."""
    torch.manual_seed(seed)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(20)).square().mean().backward()
        optimizer.step()
        schedule.step()
    return model, optimizer, schedule


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def same(one: object, other: object) -> bool:
    """Whether two states are the same, bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        pairs = zip(one, other, strict=False)
        return type(one) is type(other) and len(one) == len(other) and all(same(a, b) for a, b in pairs)
    return type(one) is type(other) and one == other


def chain(path: Path) -> everstep.Chain:
    return everstep.Chain.create(path)  # type: ignore[return-value]


def flip_a_bit(root: Path) -> None:
    """Of a chunk in the largest pack of a chain."""
    packs = [one for one in (root / "packs").rglob("*") if one.is_file()]
    path = max(packs, key=lambda one: one.stat().st_size)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def save_dcp(path: Path, state: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That there is one process.
        dcp.save(state, checkpoint_id=path, no_dist=True)


def save_hf(path: Path, *, trainer: bool = True, sharded: bool = False) -> tuple[Tied, Any, Any]:
    """A folder laid out as the Trainer of transformers does it."""
    model, optimizer, schedule = trained()
    path.mkdir(parents=True)
    weights = {name: one for name, one in model.state_dict().items() if name != "head.weight"}
    if sharded:
        names = list(weights)
        files = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(names)}
        for file in set(files.values()):
            part = {name: weights[name] for name in names if files[name] == file}
            save_file(part, path / file, metadata={"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": files}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text('{"model_type": "tied", "dtype": "float32"}\n')
    (path / "tokenizer_config.json").write_text('{"padding": "left"}\n')
    if trainer:
        torch.save(optimizer.state_dict(), path / "optimizer.pt")
        torch.save(schedule.state_dict(), path / "scheduler.pt")
        states = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "cpu": torch.random.get_rng_state(),
        }
        torch.save(states, path / "rng_state.pth")
        history = [
            {"loss": 3.5, "learning_rate": 0.01, "epoch": 1.0, "step": 1},
            {"loss": 2.5, "grad_norm": float("nan"), "learning_rate": 0.005, "epoch": 2.5, "step": 2},
            {"eval_loss": 2.25, "epoch": 2.5, "step": 2},
        ]
        state = {"global_step": 2, "epoch": 2.5, "log_history": history, "max_steps": 10}
        (path / "trainer_state.json").write_text(json.dumps(state))
        torch.save({"anything": 1}, path / "training_args.bin")
    return model, optimizer, schedule


# -- hostile ones -------------------------------------------------------------------------------------------


def with_pickle(evil: bytes, path: Path) -> Path:
    """A file of `torch.save` with another pickle in it."""
    plain = io.BytesIO()
    torch.save({"weight": torch.ones(4)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w") as target:
        for one in source.namelist():
            target.writestr(one, evil if one.endswith("data.pkl") else source.read(one))
    return path


def with_old_pickle(evil: bytes, path: Path) -> Path:
    """A file as torch before 1.6 wrote it, with another pickle in it."""
    head = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    path.write_bytes(b"".join(pickle.dumps(one, 2) for one in head) + evil + pickle.dumps([], 2))
    return path


def dcp_with(evil: bytes, path: Path) -> Path:
    """A directory of DCP with other metadata."""
    save_dcp(path, {"weight": torch.ones(4)})
    (path / ".metadata").write_bytes(evil)
    return path


def hf_with(evil: bytes, path: Path) -> Path:
    """A Trainer's folder with another optimizer."""
    save_hf(path)
    with_pickle(evil, path / "optimizer.pt")
    return path


def dcp_item_with(evil: bytes, path: Path) -> Path:
    """A directory of DCP whose metadata are its own, with another object in it."""
    shutil.rmtree(path, ignore_errors=True)
    save_dcp(path, {"weight": torch.ones(4), "note": "x" * 400})
    metadata = pickle.loads((path / ".metadata").read_bytes())
    info = metadata.storage_data[next(one for one in metadata.storage_data if one.fqn == "note")]
    item = with_pickle(evil, path / "item").read_bytes()
    (path / "item").unlink()
    file = path / info.relative_path
    info.offset, info.length = file.stat().st_size, len(item)
    with file.open("ab") as stream:
        stream.write(item)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path
