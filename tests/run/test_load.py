"""Looking into a snapshot: lazily, in part, without a run, and never more than is asked for."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import everstep
from everstep.chain.history import Chain
from everstep.chain.refs import split
from everstep.errors import Damaged, Mismatch, NotFound
from everstep.format import keys
from everstep.store.base import Buffer
from everstep.store.local import LocalStore
from everstep.store.memory import MemoryStore

WIDTH = 600
FIRST = "step:1"
"""Nothing in a first snapshot builds on another's chunks, which would have to be read too."""


class Counting(LocalStore):
    """Counts the bytes of packs that are read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.pack_bytes = 0
        self.others: list[str] = []

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        data = super().get(key, start, size_bytes)
        self._note(key, len(data))
        return data

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        count = super().read_into(key, start, buffers)
        self._note(key, count)
        return count

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        raise AssertionError("looking writes nothing")

    def delete(self, key: str) -> None:
        raise AssertionError("looking deletes nothing")

    def _note(self, key: str, size_bytes: int) -> None:
        if key.startswith(keys.PACKS):
            self.pack_bytes += size_bytes


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))
    model.append(nn.Linear(WIDTH, WIDTH, bias=False))
    model[3].weight = model[0].weight
    return model


def objects(seed: int = 1) -> dict[str, Any]:
    model = net(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return {
        "model": model,
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.StepLR(optimizer, 5),
        "mask": np.arange(12.0).reshape(3, 4),
        "best": 0.25,
    }


@pytest.fixture(scope="module", name="trained")
def _trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    """A chain with snapshots of steps 1, 2 and 3, and the model's state at each."""
    root = tmp_path_factory.mktemp("load") / "gpt"
    held = objects()
    states = []
    with everstep.open(root, **held, every="1 steps", keep="all") as run:
        for _ in range(3):
            held["optimizer"].zero_grad()
            held["model"](torch.randn(4, WIDTH)).square().mean().backward()
            held["optimizer"].step()
            run.tick()
            run.wait()
            states.append({key: one.clone() for key, one in held["model"].state_dict().items()})
    return root, states


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


Trained = tuple[Path, list[dict[str, torch.Tensor]]]


# -- which snapshot ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ref", "step"), [("", 3), ("@head", 3), ("@step:2", 2), ("@head~2", 1), ("@main~1", 2)]
)
def test_a_reference_follows_the_place(trained: Trained, ref: str, step: int) -> None:
    root, states = trained
    loaded = everstep.load(f"{root}{ref}")
    assert loaded.step == step
    assert equal(loaded.state("model"), states[step - 1])


def test_a_reference_of_its_own_for_paths_and_stores(trained: Trained) -> None:
    root, _ = trained
    assert everstep.load(root).step == 3
    assert everstep.load(root, "step:1").step == 1
    assert everstep.load(LocalStore(root), "step:2").step == 2
    with pytest.raises(Mismatch, match="both name a snapshot"):
        everstep.load(f"{root}@head", "step:1")


@pytest.mark.parametrize(
    ("text", "place", "ref"),
    [
        ("runs/gpt", "runs/gpt", ""),
        ("runs/gpt@step:500", "runs/gpt", "step:500"),
        ("runs/a@b/gpt", "runs/a@b/gpt", ""),
        ("runs/a@b/gpt@head~2", "runs/a@b/gpt", "head~2"),
        ("s3://me@host/bucket", "s3://me@host/bucket", ""),
        ("@head", "@head", ""),
        ("runs/gpt@", "runs/gpt", ""),
    ],
)
def test_places_and_references(text: str, place: str, ref: str) -> None:
    assert split(text) == (place, ref)


def test_there_is_no_such_chain_or_snapshot(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="is not an Everstep chain"):
        everstep.load(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(NotFound, match="nearest are at 1, 2, 3"):
        everstep.load(f"{trained[0]}@step:9")
    empty = MemoryStore()
    Chain.create(empty)
    with pytest.raises(NotFound, match="no snapshot on branch"):
        everstep.load(empty)


# -- a mapping ---------------------------------------------------------------------------------------------


def test_it_is_a_mapping_of_leaves(trained: Trained) -> None:
    root, states = trained
    loaded = everstep.load(root)
    assert "model/0.weight" in loaded
    assert "model/9.weight" not in loaded
    assert len(loaded) == len(list(loaded)) == len(dict(loaded.items()))
    assert torch.equal(loaded["model/2.weight"], states[2]["2.weight"])
    assert np.array_equal(loaded["mask"], np.arange(12.0).reshape(3, 4))
    assert loaded.objects == ("model", "optimizer", "schedule", "mask", "best")
    assert loaded.progress["step"] == 3
    assert "step 3, model, optimizer" in repr(loaded)
    assert loaded.remarks == []


def test_an_unknown_leaf_is_not_found_and_missing_as_in_a_mapping(trained: Trained) -> None:
    loaded = everstep.load(trained[0])
    with pytest.raises(NotFound, match=r"no leaf 'model/0.weigth'; it has model/0.weight"):
        loaded["model/0.weigth"]
    assert loaded.get("model/0.weigth") is None
    with pytest.raises(NotFound, match=r"no leaf that fits 'modle/\*'; it has leaves of model, optimizer"):
        loaded.read("modle/*")
    with pytest.raises(NotFound, match="no object 'ema'; it has model, optimizer"):
        loaded.state("ema")


def test_what_comes_out_is_the_callers_own(trained: Trained) -> None:
    loaded = everstep.load(trained[0])
    loaded["model/0.bias"].zero_()
    assert torch.equal(loaded["model/0.bias"], trained[1][2]["0.bias"])


def test_a_pattern_reads_many_and_ties_what_was_tied(trained: Trained) -> None:
    root, states = trained
    read = everstep.load(root).read("model/*")
    assert equal({name.removeprefix("model/"): one for name, one in read.items()}, states[2])
    assert read["model/0.weight"] is read["model/3.weight"]


# -- a model for inference ---------------------------------------------------------------------------------


def test_a_model_takes_its_state_without_the_optimizers_bytes(trained: Trained) -> None:
    root, states = trained
    store = Counting(root)
    loaded = everstep.load(store, FIRST)
    assert store.pack_bytes == 0
    state = loaded.state("model")
    assert state["0.weight"] is state["3.weight"]
    model_bytes = sum(one.nbytes for key, one in state.items() if key != "3.weight")
    assert 0 < store.pack_bytes < model_bytes + 300_000
    model = net(7)
    model.load_state_dict(state)
    assert equal(model.state_dict(), states[0])
    with torch.device("meta"):
        empty = net(7)
    empty.load_state_dict(state, assign=True)
    assert equal(empty.state_dict(), states[0])


def test_into_live_parameters(trained: Trained) -> None:
    root, states = trained
    store = Counting(root)
    model = net(7)
    pointers = [one.data_ptr() for one in model.parameters()]
    assert everstep.load(store, FIRST).into(model=model) == []
    assert equal(model.state_dict(), states[0])
    assert [one.data_ptr() for one in model.parameters()] == pointers
    assert store.pack_bytes < sum(one.nbytes for one in model.parameters()) + 300_000


def test_into_a_part_by_pattern(trained: Trained) -> None:
    root, states = trained
    store = Counting(root)
    model = net(7)
    before = {key: one.clone() for key, one in model.state_dict().items()}
    everstep.load(store, FIRST).into(model=model, only="model/2.*")
    got = model.state_dict()
    for key, one in got.items():
        assert torch.equal(one, states[0][key] if key.startswith("2.") else before[key]), key
    assert store.pack_bytes < got["2.weight"].nbytes + 300_000


def test_into_refuses_what_does_not_fit_before_it_touches_anything(trained: Trained) -> None:
    model = net(7)
    model[2] = nn.Linear(WIDTH, 3)
    before = model[0].weight.clone()
    with pytest.raises(Mismatch, match=r"model/2.weight has shape \[3, 600\], in the snapshot"):
        everstep.load(trained[0]).into(model=model)
    assert torch.equal(model[0].weight, before)


def test_other_objects_and_values(trained: Trained) -> None:
    loaded = everstep.load(trained[0])
    assert loaded.state("best") == 0.25
    assert loaded.state("schedule")["step_size"] == 5
    held = objects(9)
    held["optimizer"].load_state_dict(loaded.state("optimizer"))
    assert len(held["optimizer"].state) == len(list(held["model"].parameters()))
    other = objects(9)
    loaded.into(optimizer=other["optimizer"], schedule=other["schedule"])
    assert equal(held["optimizer"].state_dict()["state"][0], other["optimizer"].state_dict()["state"][0])


def test_shapes_without_bytes(trained: Trained) -> None:
    store = Counting(trained[0])
    loaded = everstep.load(store, device="meta")
    shapes = {name: tuple(one.shape) for name, one in loaded.read("model/*").items()}
    assert shapes["model/2.weight"] == (WIDTH, WIDTH)
    assert loaded["model/2.weight"].dtype is torch.float32
    assert loaded["model/2.weight"].is_meta
    assert store.pack_bytes == 0


# -- beside others -----------------------------------------------------------------------------------------


def test_a_run_may_go_on_meanwhile_and_the_chain_is_left_as_it_is(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    with everstep.open(tmp_path, model=model, every="1 steps", keep="all") as run:
        run.tick()
        run.wait()
        before = {path for path in tmp_path.rglob("*") if path.is_file()}
        loaded = everstep.load(tmp_path)
        assert torch.equal(loaded["model/weight"], model.weight)
        assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
        with torch.no_grad():
            model.weight.zero_()
        run.tick()
        run.wait()
        assert loaded["model/weight"].any()
        assert not everstep.load(tmp_path)["model/weight"].any()


def copied(root: Path, to: Path) -> Path:
    for path in root.rglob("*"):
        if path.is_file():
            target = to / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return to


def test_damage_is_found_where_it_is_read(trained: Trained, tmp_path: Path) -> None:
    root = copied(trained[0], tmp_path / "chain")
    loaded = everstep.load(root)
    chain = Chain(root)
    manifest = chain.manifest(chain.find("head"))
    leaf = manifest.by_name["model/2.weight"]
    number = manifest.regions[leaf.slices[0].region].chunks[0]
    path = root / keys.pack(manifest.places[number].pack)
    data = bytearray(path.read_bytes())
    data[manifest.places[number].offset + 7] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged) as caught:
        loaded["model/2.weight"]
    assert caught.value.key == keys.pack(manifest.places[number].pack)
    assert torch.equal(loaded["model/0.weight"], trained[1][2]["0.weight"])


def test_a_snapshot_that_is_pruned_meanwhile_is_not_found(trained: Trained, tmp_path: Path) -> None:
    root = copied(trained[0], tmp_path / "chain")
    loaded = everstep.load(root)
    (root / keys.snapshot(loaded.snapshot.id)).unlink()
    for path in (root / "packs").rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(NotFound, match="was pruned while it was read"):
        loaded["model/2.weight"]


@pytest.mark.process
def test_importing_it_needs_no_torch() -> None:
    script = """
        import sys
        import everstep
        assert callable(everstep.load)
        print("torch" in sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == "False"
