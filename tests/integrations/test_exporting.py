"""Snapshots as folders of Hugging Face and directories of DCP, read back by the real libraries."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import everstep
from everstep import cli, errors
from everstep.chain.export import Pieces
from everstep.integrations import casting, dcp_writing
from integrations.checkpoints import Tied, chain, flip_a_bit, same, save_hf, trained
from integrations.test_importing import SOURCE, told


@pytest.fixture
def run_of(tmp_path: Path) -> tuple[Path, Tied, torch.optim.Optimizer, Any]:
    """A chain with a snapshot that a run took, and what it took."""
    model, optimizer, schedule = trained()
    place = tmp_path / "run"
    notes = {"best": np.float32(0.5), "names": ("a", [1, 2])}
    with everstep.open(
        place, model=model, optimizer=optimizer, schedule=schedule, notes=notes, every=None
    ) as run:
        run.tick()
    return place, model, optimizer, schedule


def export(place: Path, out: Path, *more: object) -> int:
    return cli.main([str(one) for one in ("-r", place, "export", "head", out, *more)])


# -- DCP ----------------------------------------------------------------------------------------------------


def test_stock_dcp_loads_model_and_optimizer(
    run_of: tuple[Path, Tied, torch.optim.Optimizer, Any], tmp_path: Path
) -> None:
    place, model, optimizer, schedule = run_of
    assert export(place, tmp_path / "d", "--format", "dcp") == 0
    fresh, fresh_optimizer, _ = trained(seed=7)
    of_model, of_optimizer = get_state_dict(fresh, fresh_optimizer)
    state = {"model": of_model, "optimizer": of_optimizer, "schedule": {}, "notes": {"names": None}}
    dcp.load(state, checkpoint_id=tmp_path / "d", no_dist=True)
    set_state_dict(
        fresh, fresh_optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    assert same(dict(fresh.state_dict()), dict(model.state_dict()))
    assert same(fresh_optimizer.state_dict()["state"], optimizer.state_dict()["state"])
    assert fresh_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert state["notes"]["names"] == ("a", [1, 2])
    dcp_to_torch_save(tmp_path / "d", tmp_path / "all.pt")
    whole = torch.load(tmp_path / "all.pt", weights_only=True)
    assert whole["schedule"] == schedule.state_dict()
    assert whole["notes"]["best"] == 0.5


def test_its_metadata_are_what_stock_dcp_writes(
    run_of: tuple[Path, Tied, torch.optim.Optimizer, Any], tmp_path: Path
) -> None:
    place, model, _, _ = run_of
    assert export(place, tmp_path / "ours", "--format", "dcp", "--only", "model") == 0
    dcp.save(dict(model.state_dict()), checkpoint_id=tmp_path / "theirs", no_dist=True)
    ours, theirs = (pickle.loads((tmp_path / name / ".metadata").read_bytes()) for name in ("ours", "theirs"))
    assert type(ours) is type(theirs)
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    assert set(ours.storage_data) == set(theirs.storage_data)
    assert ours.version == theirs.version
    assert type(ours.storage_meta) is type(theirs.storage_meta)
    assert vars(ours.storage_meta).keys() == vars(theirs.storage_meta).keys()
    tied = [info for index, info in ours.storage_data.items() if index.fqn in ("embed.weight", "head.weight")]
    assert tied[0] == tied[1]  # Written once.


def test_large_tensors_are_cut_and_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp_writing, "PART_BYTES", 10_000)
    monkeypatch.setattr(dcp_writing, "FILE_BYTES", 60_000)
    state = {"a": torch.randn(333, 30), "b": torch.randn(7), "c": torch.tensor(1.0), "d": torch.zeros(0, 3)}
    state |= {"e": torch.randn(2, 5000), "f": torch.randn(5).to(torch.float8_e5m2)}
    torch.save(state, tmp_path / "x.pt")
    chain(tmp_path / "c").import_(tmp_path / "x.pt")
    assert export(tmp_path / "c", tmp_path / "d", "--format", "dcp", "--only", "model") == 0
    assert len(list((tmp_path / "d").glob("__0_*.distcp"))) > 1
    metadata = pickle.loads((tmp_path / "d/.metadata").read_bytes())
    assert len(metadata.state_dict_metadata["a"].chunks) == 5
    fresh = {name: torch.zeros_like(one) for name, one in state.items()}
    dcp.load(fresh, checkpoint_id=tmp_path / "d", no_dist=True)
    assert same(fresh, state)
    back = chain(tmp_path / "back").import_(tmp_path / "d")
    assert same(everstep.load(tmp_path / "back").state("model"), state)
    assert back.snapshot.record.state == everstep.Chain(tmp_path / "c").find("head").record.state


# -- Hugging Face -------------------------------------------------------------------------------------------


def test_a_folder_comes_back_as_it_was(tmp_path: Path) -> None:
    save_hf(tmp_path / "hf")
    chain(tmp_path / "c").import_(tmp_path / "hf")
    assert export(tmp_path / "c", tmp_path / "out", "--format", "hf") == 0
    for name in ("config.json", "tokenizer_config.json", "trainer_state.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "hf"))
    assert same(dict(sorted(ours.items())), dict(sorted(theirs.items())))


def test_shards_and_their_index(
    run_of: tuple[Path, Tied, torch.optim.Optimizer, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place, model, _, _ = run_of
    out = tmp_path / "out"
    status, text, err = told(
        capsys, "-r", place, "export", "head", out, "--format", "hf", "--max-shard-size", "1kB"
    )
    assert status == 0
    assert "8 tensors and 1 tied name" in text
    assert "there is no config.json" in err
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(one.name for one in out.glob("*.safetensors"))
    assert files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 1
    assert set(index["weight_map"].values()) == set(files)
    state = model.state_dict()
    found: dict[str, torch.Tensor] = {}
    for file in files:
        part = load_file(out / file)
        assert all(index["weight_map"][name] == file for name in part)
        assert len(part) == 1 or sum(one.nbytes for one in part.values()) <= 1000
        with safe_open(out / file, "pt") as one:
            assert one.metadata()["format"] == "pt"
        found |= part
    assert found.keys() == index["weight_map"].keys() == state.keys() - {"head.weight"}
    assert all(same(found[name], state[name]) for name in found)
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in found.values())
    # It comes back with its tie.
    c = chain(tmp_path / "c")
    assert c.import_(out).aliases == 1
    assert same(dict(sorted(c.load().state("model").items())), dict(sorted(state.items())))


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_other_dtypes(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    state = {
        of: torch.cat([torch.randn(3000, dtype=torch.float64) * 10.0**n for n in range(-40, 5, 4)]).to(
            getattr(torch, of)
        )
        for of in ("float16", "bfloat16", "float32", "float64")
    }
    state |= {"int": torch.arange(5), "bool": torch.ones(3, dtype=torch.bool)}
    (tmp_path / "config.json").write_text('{"a": 1, "dtype": "float64"}')
    torch.save(state, tmp_path / "x.pt")
    chain(tmp_path / "c").import_(tmp_path / "x.pt")
    config = ("--config", tmp_path / "config.json")
    assert export(tmp_path / "c", tmp_path / "hf", "--format", "hf", "--dtype", name, *config) == 0
    assert export(tmp_path / "c", tmp_path / "x.safetensors", "--format", "safetensors", "--dtype", name) == 0
    expected = {key: one.to(dtype) if one.is_floating_point() else one for key, one in state.items()}
    found = load_file(tmp_path / "hf/model.safetensors")
    assert same(dict(sorted(found.items())), dict(sorted(expected.items())))
    found = load_file(tmp_path / "x.safetensors")
    assert all(same(found[f"model.{key}"], one) for key, one in expected.items())
    text = str(dtype).removeprefix("torch.")
    assert json.loads((tmp_path / "hf/config.json").read_text()) == {"a": 1, "dtype": text}


def test_numbers_that_are_too_large_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": torch.tensor([1.0, 1e6, float("inf"), float("nan"), -7e4])}, tmp_path / "x.pt")
    chain(tmp_path / "c").import_(tmp_path / "x.pt")
    status, _, err = told(
        capsys, "-r", tmp_path / "c", "export", "head", tmp_path / "o", "--format", "hf", "--dtype", "fp16"
    )
    assert status == 0
    assert "w: 2 of its numbers are too large for float16, and are infinite" in err


def test_every_float_is_rounded_as_torch_does_it() -> None:
    rng = np.random.default_rng(3)
    words = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    edges = np.array([0x7F7FFFFF, 0x7F7F8000, 0x3F808000, 0x3F818000, 1, 0x80000001, 0x7F800000], np.uint32)
    single = np.concatenate([words, edges]).view(np.float32)
    single = single[~np.isnan(single)]
    data, _ = casting.cast(memoryview(single).cast("B"), "float32", "bfloat16")
    theirs = torch.from_numpy(single.copy()).to(torch.bfloat16).view(torch.int16).numpy()
    assert bytes(data) == theirs.tobytes()
    nan = np.array([np.nan], np.float32)
    data, lost = casting.cast(memoryview(nan).cast("B"), "float32", "bfloat16")
    assert torch.frombuffer(bytearray(data), dtype=torch.bfloat16).isnan().all()
    assert lost == 0


def test_names_of_wrappers_do_not_come_out(tmp_path: Path) -> None:
    """A state dict of DDP that was handed over as a plain dict."""
    state = {f"module.{name}": one for name, one in nn.Linear(2, 3).state_dict().items()}
    with everstep.open(tmp_path / "c", net=state, every=None) as run:
        run.tick()
    assert export(tmp_path / "c", tmp_path / "out", "--format", "hf") == 0
    assert load_file(tmp_path / "out/model.safetensors").keys() == {"weight", "bias"}


def test_a_folder_of_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_hf(tmp_path / "hf", trainer=False)
    (tmp_path / "hf/tokenizer.json").write_bytes(b" " * (5 * 1024 * 1024))
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")
    chain(tmp_path / "c").import_(tmp_path / "x.pt")
    where = ("-r", tmp_path / "c", "export", "head")
    status, _, err = told(capsys, *where, tmp_path / "o", "--format", "hf", "--config", tmp_path / "hf")
    assert (status, err) == (0, "")
    names = {"config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"}
    assert {one.name for one in (tmp_path / "o").iterdir()} == names
    status, _, err = told(capsys, *where, tmp_path / "p", "--format", "hf", "--config", tmp_path / "none")
    assert status == errors.NotFound.exit_code
    assert not (tmp_path / "p").exists()


def test_transformers_reads_and_trains_what_was_exported(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 100}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    c = chain(tmp_path / "c")
    c.import_(tmp_path / "theirs")
    fresh = transformers.GPT2LMHeadModel(config)
    c.restore("head", into={"model": fresh})
    assert same(dict(fresh.state_dict()), dict(model.state_dict()))
    c.export("head", tmp_path / "ours", format="hf", max_shard_bytes=10_000)
    ours, theirs = (
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        for name in ("ours", "theirs")
    )
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    with everstep.open(tmp_path / "run", model=model, every=None) as run:
        run.tick()
    half = everstep.Chain(tmp_path / "run")
    half.export("head", tmp_path / "half", format="hf", dtype="bf16", config=tmp_path / "theirs")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert same(dict(loaded.state_dict()), dict(model.to(torch.bfloat16).state_dict()))


@pytest.mark.slow
def test_a_folder_that_the_real_trainer_wrote(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 100}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    rows = [{"input_ids": list(range(n, n + 8)), "labels": list(range(n, n + 8))} for n in range(16)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), max_steps=4, save_steps=4, logging_steps=2, report_to=[], use_cpu=True,
        per_device_train_batch_size=2, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    c = chain(tmp_path / "c")
    done = c.import_(tmp_path / "out/checkpoint-4")
    assert done.objects == ("model", "optimizer", "scheduler")
    assert done.snapshot.step == 4
    assert done.snapshot.record.metrics["learning_rate"] > 0
    loaded = c.load()
    fresh = transformers.GPT2LMHeadModel(model.config)
    c.restore("head", into={"model": fresh})
    assert same(dict(fresh.state_dict()), dict(model.state_dict()))
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert same(loaded.state("optimizer")["state"], inner.state_dict()["state"])
    run = c.manifest(c.find("head")).tree["run"]
    assert run["rng"].keys() >= {"python", "numpy", "torch"}
    c.export("head", tmp_path / "again", format="hf")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")


# -- whole, or not at all -----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["hf", "dcp"])
def test_a_folder_is_taken_or_empty(
    run_of: tuple[Path, Tied, torch.optim.Optimizer, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    format: str,
) -> None:
    place = run_of[0]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("full", "file", "link"):
        for more in ((), ("--force",)):
            assert export(place, tmp_path / name, "--format", format, *more) == errors.Mismatch.exit_code
    assert (tmp_path / "full/mine").read_text() == (tmp_path / "file").read_text() == "precious"
    assert list((tmp_path / "empty").iterdir()) == []
    assert export(place, tmp_path / "no/out", "--format", format) == errors.NotFound.exit_code
    assert export(place, tmp_path / "empty", "--format", format) == 0
    assert len(list((tmp_path / "empty").iterdir())) >= 1
    assert not list(tmp_path.glob(".everstep-*"))


@pytest.mark.parametrize("format", ["hf", "dcp"])
def test_what_goes_wrong_leaves_nothing(
    run_of: tuple[Path, Tied, torch.optim.Optimizer, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
) -> None:
    place, out = run_of[0], tmp_path / "out"

    def interrupted(*_: object) -> Any:
        yield memoryview(b"half")
        assert len(list(tmp_path.glob(".everstep-*"))) == 1
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Pieces, "of", interrupted)
        assert export(place, out, "--format", format) == 130
    assert {one.name for one in tmp_path.iterdir()} == {"run"}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert export(place, out, "--format", format) == errors.Unavailable.exit_code
    assert {one.name for one in tmp_path.iterdir()} == {"run"}
    flip_a_bit(place)
    assert export(place, out, "--format", format) == errors.Damaged.exit_code
    assert {one.name for one in tmp_path.iterdir()} == {"run"}


def test_somebody_else_s_folder_that_comes_meanwhile_stays(
    run_of: tuple[Path, Tied, torch.optim.Optimizer, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, out = run_of[0], tmp_path / "out"
    real = Pieces.of

    def theirs(*rest: Any) -> Any:
        out.mkdir(exist_ok=True)
        (out / "mine").write_text("precious")
        return real(*rest)

    monkeypatch.setattr(Pieces, "of", theirs)
    assert export(place, out, "--format", "hf") == errors.Mismatch.exit_code
    assert [one.name for one in out.iterdir()] == ["mine"]


KILLED = """
import os, signal, sys
from everstep import cli
from everstep.chain import export
real = export.Pieces.of
def of(self, leaf):
    os.kill(os.getpid(), signal.SIGKILL)
    yield from real(self, leaf)
export.Pieces.of = of
cli.main(sys.argv[1:])
"""


@pytest.mark.process
@pytest.mark.parametrize("format", ["hf", "dcp"])
def test_a_kill_leaves_no_half_folder(
    run_of: tuple[Path, Tied, torch.optim.Optimizer, Any], tmp_path: Path, format: str
) -> None:
    place = run_of[0]
    command = [sys.executable, "-c", KILLED, "-r", str(place), "export", "head", str(tmp_path / "out")]
    env = {**os.environ, "PYTHONPATH": SOURCE}
    done = subprocess.run([*command, "--format", format], env=env, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob(".everstep-*"))) == 1
    assert export(place, tmp_path / "out", "--format", format) == 0


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--format", "onnx"], 2),
        (["--format", "hf", "--dtype", "int8"], errors.Mismatch.exit_code),
        (["--format", "torch", "--dtype", "bf16"], errors.Mismatch.exit_code),
        (["--format", "dcp", "--max-shard-size", "1GB"], errors.Mismatch.exit_code),
        (["--format", "hf", "--max-shard-size", "large"], 2),
        (["--format", "hf", "--max-shard-size", "0"], 2),
        (["--format", "hf", "--only", "nothing"], errors.NotFound.exit_code),
        (["--format", "hf", "--only", "notes"], errors.NotFound.exit_code),
        (["--format", "dcp", "--only", "nothing"], errors.NotFound.exit_code),
    ],
)
def test_what_does_not_fit_is_refused(
    run_of: tuple[Path, Tied, torch.optim.Optimizer, Any], tmp_path: Path, arguments: list[str], status: int
) -> None:
    assert export(run_of[0], tmp_path / "out", *arguments) == status
    assert not (tmp_path / "out").exists()


# -- there and back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["torch", "dcp", "safetensors", "hf"])
def test_export_and_import_give_the_same_state(tmp_path: Path, format: str) -> None:
    model, optimizer, _ = trained()
    objects: dict[str, Any] = {"model": model.state_dict()}
    if format in ("torch", "dcp"):
        objects["optimizer"] = optimizer.state_dict()
    torch.save(objects, tmp_path / "x.pt")
    c = chain(tmp_path / "c")
    first = c.import_(tmp_path / "x.pt", step=5).snapshot
    out = tmp_path / "step-5"
    c.export("head", out, format=format, only="model" if format == "safetensors" else "")
    second = c.import_(out, branch="back").snapshot
    assert second.step == first.step
    manifests = [c.manifest(one) for one in (first, second)]
    if format in ("torch", "dcp"):
        assert second.record.state == first.record.state
        return
    # These have an order of their own.
    states = [c.load(one.id).state("model") for one in (first, second)]
    assert same(*(dict(sorted(one.items())) for one in states))
    assert [len(one.leaves) for one in manifests] == [9, 9]
