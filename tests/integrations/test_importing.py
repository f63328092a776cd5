"""Other people's checkpoints become snapshots like any other."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file, save_model
from torch import nn

import everstep
from everstep import cli, errors
from everstep.chain.lease import Lease
from everstep.integrations import importing
from everstep.store.local import LocalStore
from everstep.testing.crash import RecordingFiles, build, states
from integrations.checkpoints import Tied, chain, flip_a_bit, same, save_dcp, save_hf, trained

SOURCE = str(Path(__file__).resolve().parents[2] / "src")


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main([str(one) for one in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# -- torch.save ---------------------------------------------------------------------------------------------


def many_kinds() -> dict[str, Any]:
    large = torch.arange(2000.0)
    return {
        "plain": [1, -5, 1 << 80, 0.5, float("inf"), True, None, "ä", b"\xff", 1 + 2j, (), {}],
        "nested": {"a": ({"b": [torch.ones(2)]},)},
        "od": OrderedDict(z=1, a=2),
        "dd": defaultdict(list, {"a": [1]}),
        "dq": deque([1, 2], 5),
        "counter": Counter("aab"),
        "sets": [{1, 2}, frozenset({3})],
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
        "device": torch.device("cuda:1"),
        "numpy": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "texts": np.array(["ab", "c"]),
        "times": np.array(["2020-01-01"], "M8[ns]"),
        "scalar": np.float32(1.5),
        "generator": np.random.get_state(),
        "transposed": torch.arange(12).view(3, 4).t(),
        "expanded": torch.ones(1).expand(7),
        "part": large[500:700],
        "overlapping": [large[0:600], large[300:900], large[0:600]],
        "last": torch.ones(2, 4, 5, 3).to(memory_format=torch.channels_last),
        "none": torch.zeros(0, 3),
        "one": torch.tensor(2.5),
        "parameter": nn.Parameter(torch.ones(3)),
        "bf16": torch.randn(5).to(torch.bfloat16),
        "complex": torch.randn(3, dtype=torch.complex64),
        "bool": torch.tensor([True, False]),
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_all_that_torch_saves_comes_back(tmp_path: Path, legacy: bool, protocol: int) -> None:
    state = many_kinds()
    if not legacy:
        state |= {"fp8": torch.randn(4).to(torch.float8_e4m3fn), "u16": torch.ones(3, dtype=torch.uint16)}
    path = tmp_path / "state.pt"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    c = chain(tmp_path / "c")
    done = c.import_(path)
    assert done.kind == "torch"
    loaded = c.load()
    assert loaded.objects == tuple(state)
    for name, value in state.items():
        found = loaded.state(name)
        assert same(found, value.detach() if isinstance(value, nn.Parameter) else value), name
    assert done.aliases == 1  # Of the overlapping ones two are the same.


def test_it_is_what_a_run_captures(tmp_path: Path) -> None:
    """The state of a module and an optimizer have the same digests as in a snapshot that a run took."""
    model, optimizer, schedule = trained()
    with everstep.open(
        tmp_path / "run", model=model, optimizer=optimizer, schedule=schedule, every=None
    ) as run:
        run.tick()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()},
        tmp_path / "state.pt",
    )
    c = chain(tmp_path / "c")
    c.import_(tmp_path / "state.pt", step=1)
    ran = everstep.Chain(tmp_path / "run")
    (ours, theirs) = (one.manifest(one.find("head")) for one in (c, ran))
    assert ours.tree["objects"] == theirs.tree["objects"]
    chunks = [
        {
            leaf.name: (leaf.dtype, leaf.shape, c.load()[leaf.name].numpy().tobytes())
            for leaf in one.leaves
            if not leaf.name.startswith("run/")
        }
        for one in (ours, theirs)
    ]
    assert chunks[0] == chunks[1]


def test_a_run_goes_on_from_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer, schedule = trained()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "schedule": schedule.state_dict()}, tmp_path / "step_2.pt")
    status, out, err = told(capsys, "-r", tmp_path / "c", "import", tmp_path / "step_2.pt")
    assert status == 0, err
    assert "(torch): 23 tensors and 1 tied name" in out
    assert "objects: model, optimizer, schedule" in out
    fresh, fresh_optimizer, fresh_schedule = trained(seed=9)
    with everstep.open(
        tmp_path / "c", model=fresh, optimizer=fresh_optimizer, schedule=fresh_schedule, every=None
    ) as run:
        assert run.step == 2
        assert same(dict(fresh.state_dict()), dict(model.state_dict()))
        assert same(fresh_optimizer.state_dict(), optimizer.state_dict())
        assert fresh_schedule.state_dict() == schedule.state_dict()
        run.tick()
    lacks = "generators and the loader's position did not come along"
    assert f"approximate: it was imported, and {lacks}" in capsys.readouterr().err
    assert everstep.Chain(tmp_path / "c").find("head").step == 3


def test_names_of_wrappers_go(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    state = {f"module._orig_mod.{name}": one for name, one in model.state_dict().items()}
    torch.save({"net": state}, tmp_path / "a.pt")
    c = chain(tmp_path / "c")
    done = c.import_(tmp_path / "a.pt")
    assert list(c.load()) == ["net/0.weight", "net/0.bias"]
    assert "the names in net are without module. and _orig_mod." in done.remarks
    # Not where only some have it, which is then a module of this name.
    torch.save({"net": {"module.a": torch.ones(1), "b": torch.ones(1)}}, tmp_path / "b.pt")
    c.import_(tmp_path / "b.pt", branch="other")
    assert list(c.load(branch="other")) == ["net/module.a", "net/b"]


def test_parts_are_taken_by_their_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {
        "net": {"encoder.w": torch.ones(2), "encoder.b": torch.zeros(2), "head.w": torch.ones(3)},
        "optimizers": [{"state": {}, "param_groups": [{"lr": 0.5, "params": []}]}],
        "args": argparse.Namespace(lr=0.5),
        "where": Path("/somewhere/else"),
        "iteration": 70,
    }
    torch.save(state, tmp_path / "all.pt")
    wanted = ["--as", "encoder=net.encoder", "--as", "optimizer=optimizers.0", "--as", "args=args"]
    status, out, err = told(capsys, "-r", tmp_path / "c", "import", tmp_path / "all.pt", *wanted, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert (found["step"], found["kind"], found["objects"]) == (70, "torch", ["encoder", "optimizer", "args"])
    loaded = everstep.load(str(tmp_path / "c"))
    assert list(loaded) == ["encoder/w", "encoder/b"]
    assert loaded.state("optimizer")["param_groups"] == [{"lr": 0.5, "params": []}]
    assert loaded.state("args") == {"lr": 0.5}
    status, _, err = told(capsys, "-r", tmp_path / "c", "import", tmp_path / "all.pt", "--as", "x=nothing")
    assert status == errors.NotFound.exit_code
    assert "nothing under 'nothing'; it has net, optimizers, args" in err
    assert told(capsys, "-r", tmp_path / "c", "import", tmp_path / "all.pt", "--as", "=net")[0] == 2
    status, _, err = told(capsys, "-r", tmp_path / "c", "import", tmp_path / "all.pt", "--as", "run=net")
    assert status == errors.Mismatch.exit_code


def test_the_state_of_one_object_gets_its_name(tmp_path: Path) -> None:
    model, optimizer, _ = trained()
    c = chain(tmp_path / "c")
    for name, value in (("model", model.state_dict()), ("optimizer", optimizer.state_dict())):
        torch.save(value, tmp_path / f"{name}.pt")
        assert c.import_(tmp_path / f"{name}.pt", branch=name).objects == (name,)
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    assert c.import_(tmp_path / "tensor.pt", {"mean": ""}, branch="t").objects == ("mean",)
    assert list(c.load(branch="t")) == ["mean"]


def test_a_record_that_was_damaged_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(100)}, path)
    data = bytearray(path.read_bytes())
    at = data.index(torch.ones(100).numpy().tobytes())
    data[at + 7] ^= 1
    path.write_bytes(data)
    with pytest.raises(errors.Damaged, match=r"data/0 does not match its checksum"):
        importing.read(path)


def test_records_without_checksums_are_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(100)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert importing.read(tmp_path / "x.pt").tree["w"].shape == (100,)


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (lambda: torch.ones(3).to_sparse(), "a sparse tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "a quantized tensor"),
        (lambda: torch.ones(3, device="meta"), "a tensor without data"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*quantize")
def test_tensors_that_a_chain_cannot_hold(
    tmp_path: Path, tensor: Callable[[], torch.Tensor], what: str
) -> None:
    torch.save({"model": {"odd": tensor()}}, tmp_path / "x.pt")
    with pytest.raises(errors.Unsupported, match=f"model.odd {what}"):
        importing.read(tmp_path / "x.pt")


def test_views_that_claim_more_than_a_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "_SLACK_BYTES", 0)
    one = torch.arange(1000)
    torch.save([one[n:] for n in range(100)], tmp_path / "x.pt")
    c = chain(tmp_path / "c")
    with pytest.raises(errors.Damaged, match="claims 760,400 bytes of tensors"):
        c.import_(tmp_path / "x.pt", {"x": ""})


# -- safetensors --------------------------------------------------------------------------------------------


def test_safetensors(tmp_path: Path) -> None:
    names = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
    names += ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "complex64"]
    tensors = {name: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in names}
    tensors |= {"none": torch.zeros(0, 2), "one": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "x.safetensors")
    c = chain(tmp_path / "c")
    assert c.import_(tmp_path / "x.safetensors").kind == "safetensors"
    assert same(dict(sorted(c.load().state("model").items())), dict(sorted(tensors.items())))
    save_model(Tied(), str(tmp_path / "tied.safetensors"))
    done = c.import_(tmp_path / "tied.safetensors", branch="tied")
    assert (done.tensors, done.aliases) == (8, 1)
    fresh = Tied()
    c.restore("head", into={"model": fresh}, branch="tied")


def test_a_sharded_set_by_its_index_or_folder(tmp_path: Path) -> None:
    model, _, _ = save_hf(tmp_path / "hf", trainer=False, sharded=True)
    c = chain(tmp_path / "c")
    for number, place in enumerate(["hf/model.safetensors.index.json", "hf"]):
        c.import_(tmp_path / place, branch=f"b{number}")
        fresh = Tied()
        c.restore("head", into={"model": fresh}, branch=f"b{number}")
        assert same(dict(fresh.state_dict()), dict(model.state_dict()))
    (tmp_path / "hf/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(errors.Damaged, match="model-00002"):
        importing.read(tmp_path / "hf")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / "d").mkdir()
    index = tmp_path / "d/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(errors.Damaged, match="which is not beside it"):
        importing.read(index)


# -- DCP ----------------------------------------------------------------------------------------------------


def test_dcp_of_one_process(tmp_path: Path) -> None:
    model, optimizer, schedule = trained()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "list": [torch.ones(2), {"a": 1}],
        "step": 11,
    }
    save_dcp(tmp_path / "d", state)
    c = chain(tmp_path / "c")
    done = c.import_(tmp_path / "d")
    assert (done.kind, done.snapshot.step) == ("dcp", 11)
    loaded = c.load()
    assert same(loaded.state("model"), dict(model.state_dict()))
    assert same(loaded.state("optimizer"), optimizer.state_dict())  # Numbers are numbers again.
    assert loaded.state("schedule") == schedule.state_dict()
    assert same(loaded.state("list"), state["list"])


def test_dcp_by_names_of_parameters(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer, _ = trained()
    of_model, of_optimizer = get_state_dict(model, optimizer)
    save_dcp(tmp_path / "d", {"model": of_model, "optimizer": of_optimizer})
    c = chain(tmp_path / "c")
    c.import_(tmp_path / "d", step=3)
    fresh, fresh_optimizer, _ = trained(seed=8)
    c.restore("head", into={"model": fresh, "optimizer": fresh_optimizer})
    assert same(dict(fresh.state_dict()), dict(model.state_dict()))
    assert same(fresh_optimizer.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/x.distcp", ".."])
def test_dcp_metadata_lead_nowhere_else(tmp_path: Path, name: str) -> None:
    import pickle

    save_dcp(tmp_path / "d", {"w": torch.ones(3)})
    path = tmp_path / "d/.metadata"
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = name
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(errors.Damaged, match="out of the directory"):
        importing.read(tmp_path / "d")


def test_dcp_that_lacks_a_file(tmp_path: Path) -> None:
    save_dcp(tmp_path / "d", {"w": torch.ones(3)})
    (tmp_path / "d/__0_0.distcp").unlink()
    with pytest.raises(errors.Damaged, match=r"__0_0\.distcp cannot be read"):
        importing.read(tmp_path / "d")


def test_dcp_in_other_formats_is_refused_by_name(tmp_path: Path) -> None:
    from torch.distributed.checkpoint._extension import ZStandard

    if ZStandard is not None:
        try:
            writer = dcp.FileSystemWriter(tmp_path / "z", _extensions=[ZStandard()])
            dcp.save({"w": torch.ones(3)}, storage_writer=writer, no_dist=True)
        except ImportError:
            pass
        else:
            with pytest.raises(errors.Unsupported, match="stored by an extension"):
                importing.read(tmp_path / "z")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/__0.metadata").write_bytes(b"")
    with pytest.raises(errors.Unsupported, match="without collectives"):
        importing.read(tmp_path / "alone")


# -- Hugging Face -------------------------------------------------------------------------------------------


def test_a_trainer_s_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random.seed(4)
    np.random.seed(4)
    model, optimizer, schedule = save_hf(tmp_path / "checkpoint-2")
    after = (random.random(), np.random.rand(), torch.rand(1).item())
    where = ("-r", tmp_path / "c", "import", tmp_path / "checkpoint-2")
    status, out, err = told(capsys, *where, "--note", "bought")
    assert status == 0, err
    assert "(hf): 26 tensors" in out
    assert "objects: model, optimizer, scheduler" in out
    assert "training_args.bin is left out" in err
    record = everstep.Chain(tmp_path / "c").find("head").record
    assert (record.step, record.epoch, record.note) == (2, 2, "bought")
    assert record.metrics == {"loss": 2.5, "learning_rate": 0.005, "grad_norm": "nan", "eval_loss": 2.25}
    fresh, fresh_optimizer, fresh_schedule = trained(seed=5)
    # The weights lack the tied name; the model ties it.
    with everstep.open(
        tmp_path / "c", model=fresh, optimizer=fresh_optimizer, scheduler=fresh_schedule, every=None
    ) as run:
        assert run.step == 2
        assert (random.random(), np.random.rand(), torch.rand(1).item()) == after
    assert same(dict(fresh.state_dict()), dict(model.state_dict()))
    assert same(fresh_optimizer.state_dict(), optimizer.state_dict())
    assert fresh_schedule.state_dict() == schedule.state_dict()


def test_a_folder_of_torch_files(tmp_path: Path) -> None:
    model, _, _ = save_hf(tmp_path / "one", trainer=False)
    (tmp_path / "one/model.safetensors").unlink()
    state = model.state_dict()
    torch.save(state, tmp_path / "one/pytorch_model.bin")
    names = list(state)
    (tmp_path / "many").mkdir()
    files = {name: f"pytorch_model-0000{1 + n % 2}-of-00002.bin" for n, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: state[name] for name in names if files[name] == file}, tmp_path / "many" / file)
    (tmp_path / "many/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    c = chain(tmp_path / "c")
    for name in ("one", "many"):
        c.import_(tmp_path / name, branch=name)
        assert same(c.load(branch=name).state("model"), dict(state)), name


def test_generators_of_several_processes_are_nobody_s(tmp_path: Path) -> None:
    save_hf(tmp_path / "x")
    (tmp_path / "x/rng_state.pth").rename(tmp_path / "x/rng_state_0.pth")
    (tmp_path / "x/rng_state_1.pth").write_bytes((tmp_path / "x/rng_state_0.pth").read_bytes())
    found = importing.read(tmp_path / "x")
    assert found.generators == {}
    assert any("generators of 2 processes" in one for one in found.remarks)


def test_large_files_beside_the_weights_stay_there(tmp_path: Path) -> None:
    save_hf(tmp_path / "x", trainer=False)
    (tmp_path / "x/tokenizer.json").write_bytes(b" " * (4 * 1024 * 1024 + 1))
    found = importing.read(tmp_path / "x")
    assert found.files.keys() == {"config.json", "tokenizer_config.json"}
    assert any("tokenizer.json is left out" in one for one in found.remarks)


# -- the chain ----------------------------------------------------------------------------------------------


def test_what_the_head_has_is_not_stored_again(tmp_path: Path) -> None:
    state = {"big": torch.randn(700_000), "small": torch.ones(5)}
    torch.save({"model": state, "step": 1}, tmp_path / "1.pt")
    torch.save({"model": {**state, "small": torch.zeros(5)}, "step": 2}, tmp_path / "2.pt")
    c = chain(tmp_path / "c")
    first, second = (c.import_(tmp_path / f"{n}.pt").snapshot for n in (1, 2))
    assert first.record.new_bytes > 2_800_000
    assert second.record.new_bytes < 1000
    assert second.record.parents == (first.id,)
    assert second.record.trigger == "import"
    assert second.record.note == "imported from 2.pt"


def test_nothing_is_shared_with_what_is_damaged(tmp_path: Path) -> None:
    torch.save({"model": {"big": torch.randn(500_000)}, "step": 1}, tmp_path / "1.pt")
    c = chain(tmp_path / "c")
    first = c.import_(tmp_path / "1.pt").snapshot
    flip_a_bit(tmp_path / "c")
    second = c.import_(tmp_path / "1.pt", step=2).snapshot
    assert second.record.new_bytes == first.record.new_bytes
    assert same(c.load("head").state("model"), torch.load(tmp_path / "1.pt")["model"])


def test_states_larger_than_a_wave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = 16 * 1024
    monkeypatch.setattr(importing, "WAVE_BYTES", 4 * 1024 * 1024)
    c = everstep.Chain.create(tmp_path / "c", grid_bytes=grid)
    state = {f"t{n}": torch.randn(1_500_000 + n) for n in range(3)}
    state |= {f"s{n}": torch.randn(999) for n in range(50)}
    state["turned"] = torch.randn(1200, 1300).t()
    torch.save(state, tmp_path / "x.pt")
    save_dcp(tmp_path / "d", state)
    seen: list[int] = []
    importing.import_(c, tmp_path / "x.pt", on_progress=lambda done, total: seen.append(done))
    assert len(seen) > 5
    c.import_(tmp_path / "d", branch="d")
    for branch in ("main", "d"):
        assert same(everstep.load(tmp_path / "c", branch=branch).state("model"), state)
    assert c.find("head").record.state == c.find("head", "d").record.state


def test_a_step_that_nobody_says_and_one_that_is_too_early(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "x.pt")
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "epoch3-step=500.pt")
    where = ("-r", tmp_path / "c", "import")
    assert told(capsys, *where, tmp_path / "epoch3-step=500.pt")[0] == 0
    status, _, err = told(capsys, *where, tmp_path / "x.pt")
    assert status == errors.Mismatch.exit_code
    assert "branch main" in err
    assert "is at step 500, and this is of step 0; nothing was imported" in err
    status, out, err = told(capsys, *where, tmp_path / "x.pt", "--branch", "other")
    assert status == 0
    assert "nothing says which step it is of" in err
    assert "step 0 on branch other" in out
    assert told(capsys, *where, tmp_path / "x.pt", "--step", "501")[0] == 0
    assert told(capsys, *where, tmp_path / "x.pt", "--step", "soon")[0] == 2


def test_nothing_is_made_of_what_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    names = {"none": "there is no", "text": "is neither", "empty": "is neither", "pipe": "is neither"}
    for name, said in names.items():
        status, _, err = told(capsys, "-r", tmp_path / "c", "import", tmp_path / name)
        assert status == errors.NotFound.exit_code
        assert said in err
    assert not (tmp_path / "c").exists()


def test_a_branch_that_is_written_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "x.pt")
    c = chain(tmp_path / "c")
    lease = Lease.take(c.store)
    status, _, err = told(capsys, "-r", tmp_path / "c", "import", tmp_path / "x.pt")
    assert status == errors.Conflict.exit_code
    assert "--branch NAME" in err
    assert c.head() is None
    lease.release()
    assert told(capsys, "-r", tmp_path / "c", "import", tmp_path / "x.pt")[0] == 0


@pytest.mark.slow
def test_a_crash_leaves_the_old_head_or_the_new(tmp_path: Path) -> None:
    for step in (1, 2):
        torch.save({"model": {"w": torch.full((40,), float(step))}, "step": step}, tmp_path / f"{step}.pt")
    files = RecordingFiles(tmp_path)
    c = everstep.Chain.create(LocalStore(tmp_path / "c", files=files))
    ids = [c.import_(tmp_path / f"{step}.pt").snapshot.id for step in (1, 2)]
    found = set()
    for number, state in enumerate(states(files.operations, samples=2)):
        place = tmp_path / "after" / str(number)
        place.mkdir(parents=True)
        build(state, place)
        try:
            after = everstep.Chain(place / "c")
        except errors.NotFound:
            continue
        head = after.head()
        found.add(head.id if head else "")
        if head is not None:
            weight = after.load("head")["model/w"]
            assert torch.equal(weight, torch.full((40,), float(head.step)))  # type: ignore[arg-type]
    assert found == {"", *ids}


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from everstep import cli
for kind in sys.argv[2:]:
    assert cli.main(["-r", sys.argv[1] + "/c-" + kind, "import", sys.argv[1] + "/" + kind]) == 0
    for format in ("dcp", "hf", "safetensors", "torch"):
        out = sys.argv[1] + "/out-" + kind + "-" + format
        assert cli.main(["-r", sys.argv[1] + "/c-" + kind, "export", "head", out, "--format", format]) == 0
"""


@pytest.mark.process
def test_no_torch_is_needed(tmp_path: Path) -> None:
    model, _, _ = save_hf(tmp_path / "hf")
    save_dcp(tmp_path / "dcp", {"model": model.state_dict()})
    torch.save({"model": model.state_dict()}, tmp_path / "torch")
    command = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path), "hf", "dcp", "torch"]
    env = {**os.environ, "PYTHONPATH": SOURCE}
    done = subprocess.run(command, env=env, timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


MAKE_LARGE = """
import sys, torch
state = {f"t{n}": torch.randn(25_000_000 // 4) for n in range(8)}
torch.save({"model": state}, sys.argv[1] + "/torch")
"""
IMPORT_LARGE = """
import sys
sys.modules["torch"] = None
from everstep import cli
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
import numpy, everstep.integrations.importing, everstep.integrations.exporting
everstep.integrations.importing.WAVE_BYTES = 16 * 1024 * 1024
before = peak()
assert cli.main(sys.argv[1:]) == 0
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.process
def test_importing_takes_little_memory_whatever_the_size(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", MAKE_LARGE, str(tmp_path)], env=env, check=True, timeout=300)

    def grown(*arguments: str) -> int:
        command = [sys.executable, "-c", IMPORT_LARGE, "-r", str(tmp_path / "c"), *arguments]
        done = subprocess.run(command, env=env, check=True, timeout=300, capture_output=True, text=True)
        return int(done.stdout.splitlines()[-1])

    assert 0 < grown("import", str(tmp_path / "torch")) < 120_000_000
    for format, more in (("dcp", ()), ("hf", ("--dtype", "bf16"))):
        out = str(tmp_path / f"out-{format}")
        found = grown("export", "head", out, "--format", format, *more)
        assert 0 < found < 120_000_000, format
