"""`everstep diff`: what people read, what programs read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import everstep
from everstep import cli
from everstep.chain import compare as comparing
from everstep.chain.history import Chain

pytestmark = pytest.mark.slow

SOURCE = str(Path(everstep.__file__).parent.parent)


def train(repo: Path, until: int, seed: int = 1, **settings: Any) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 1))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[1].parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    run = everstep.open(
        repo, model=model, optimizer=optimizer, scheduler=scheduler, best=np.float32(1), every="10 steps",
        keep="all", **settings,
    )  # fmt: skip
    while run.step < until:
        run.wait()  # So that every trigger finds room for its snapshot.
        loss = model(torch.randn(4, 8)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        run.tick(loss=loss)
    run.close()


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Snapshots at steps 10 and 20."""
    path = tmp_path_factory.mktemp("diff") / "chain"
    train(path, 20, config={"width": 32})
    return path


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main([str(one) for one in arguments]) == 0
    return capsys.readouterr().out


def document(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    found = json.loads(told(capsys, *arguments, "--json"))
    assert isinstance(found, dict)
    return found


def test_what_changed_is_shown(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "-r", repo, "diff", "step:10", "step:20")
    lines = text.splitlines()
    assert lines[0].split()[1:3] == ["step", "10"]
    table = text.split("\n\n")[1].splitlines()
    assert table[0].split() == ["leaf", "dtype", "shape", "relative", "max", "abs", "elements", "remarks"]
    moments = {f"optimizer/state/{n}/{moment}" for n in (0, 1) for moment in ("exp_avg", "exp_avg_sq")}
    wanted = {"model/1.weight", "model/1.bias", *moments} - _singles(repo)
    assert {row.split()[0] for row in table[1:]} == wanted
    assert all(" all" in row for row in table[1:])
    values = text.split("values\n")[1].split("\n\n")[0]
    assert "optimizer/state/*/step (2)" in values
    assert "10.0 -> 20.0" in values
    assert "optimizer/param_groups/0/lr" in values
    assert "run/progress/step" in values
    assert "run/rng/torch" in values
    assert "changed" in values
    assert "loss" in text.split("metrics\n")[1]
    assert "environment" not in text
    assert "model/0" not in text  # Frozen.


def _singles(repo: Path) -> set[str]:
    chain = Chain(repo)
    leaves = chain.manifest(chain.find("head")).leaves
    return {leaf.name for leaf in leaves if leaf.shape in ((), (1,))}


def test_without_names_it_is_what_the_newest_changed(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "-r", repo, "diff") == told(capsys, "-r", repo, "diff", "step:10", "step:20")


def test_the_document_has_all_of_it(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "-r", repo, "diff", "step:10", "step:20")
    assert (found["before"]["step"], found["after"]["step"]) == (10, 20)
    assert found["before"]["chain"] == str(repo)
    leaves = {one["name"]: one for one in found["leaves"]}
    weight = leaves["model/1.weight"]
    loaded = [everstep.load(repo, f"step:{step}")["model/1.weight"].double() for step in (10, 20)]  # type: ignore[union-attr]
    assert weight["relative"] == pytest.approx(((loaded[1] - loaded[0]).norm() / loaded[0].norm()).item())
    assert weight["max_abs"] == (loaded[1] - loaded[0]).abs().max().item()
    assert (weight["elements"], weight["changed"], weight["share"]) == (32, 32, 1.0)
    assert leaves["optimizer/state/0/step"]["before"] == 10.0
    values = {one["path"]: (one["before"], one["after"]) for one in found["values"]}
    assert values["run/progress/step"] == (10, 20)
    assert values["scheduler/last_epoch"] == (10, 20)
    assert found["states"] == ["run/rng/torch"]
    assert [one["path"] for one in found["metrics"]] == ["loss"]
    assert (found["identical"], found["environment"], found["remarks"]) == (False, [], [])


def test_a_limit(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = told(capsys, "-r", repo, "diff", "-n", "1")
    every = told(capsys, "-r", repo, "diff", "-n", "0")
    assert "more; -n 0 shows all" in few
    assert "more; -n 0 shows all" not in every
    assert len(every.splitlines()) > len(few.splitlines())
    assert cli.main(["-r", str(repo), "diff", "-n", "x"]) == cli.output.USAGE


def test_names_only_read_no_pack(
    repo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> Any:
        raise AssertionError("a pack was read")

    monkeypatch.setattr(comparing.Reader, "fill", never)
    for option in ("--names-only", "--no-values"):
        found = document(capsys, "-r", repo, "diff", option)
        assert {one["change"] for one in found["leaves"]} <= {"changed", "may have changed"}
        assert found["leaves"][0]["relative"] is None
        assert found["read_bytes"] == 0


def test_identical_states(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "-r", repo, "diff", "head", "step:20")
    assert text.splitlines()[1].startswith("identical: both are the state ")
    found = document(capsys, "-r", repo, "diff", "head", "head")
    assert found["identical"]
    assert found["leaves"] == []


def test_other_chains(repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    train(other, 20, config={"width": 32})
    assert document(capsys, "-r", repo, "diff", "head", f"{other}@head")["identical"]
    assert document(capsys, "diff", f"{repo}@step:20", f"{other}@step:20")["identical"]
    train(tmp_path / "wider", 20, seed=2, config={"width": 48})
    found = document(capsys, "diff", f"{repo}@head", f"{tmp_path / 'wider'}@head")
    assert found["after"]["chain"] == str(tmp_path / "wider")
    assert {"path": "run/config/width", "before": 32, "after": 48} in found["values"]
    assert "model/0.weight" in {one["name"] for one in found["leaves"]}


def test_a_chain_beside_needs_no_slash(
    repo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repo.parent)
    assert document(capsys, "diff", f"{repo.name}@step:20", f"{repo.name}@")["identical"]


def test_what_is_not_there_is_said(repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-r", str(repo), "diff", "step:3", "head"]) == 10
    assert "no snapshot at step 3" in capsys.readouterr().err
    assert cli.main(["diff", f"{tmp_path}/none@head", "head"]) == 10
    assert "is not an Everstep chain" in capsys.readouterr().err


def test_environment_drift_is_classed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from everstep.run import environment

    here = environment.here()
    train(tmp_path / "a", 1)
    monkeypatch.setattr(environment, "here", lambda: {**here, "torch": "9.9", "host": "elsewhere"})
    train(tmp_path / "b", 1, seed=3)
    text = told(capsys, "diff", f"{tmp_path / 'a'}@head", f"{tmp_path / 'b'}@head")
    section = text.split("environment\n")[1].splitlines()
    assert section[0].split(maxsplit=2) == ["breaks", "exactness", f"torch {here['torch']} -> 9.9"]
    assert section[1].split(maxsplit=1) == ["safe", f"host {here['host']} -> elsewhere"]


FORBID = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "numpy"):
            raise ImportError(f"{name} is not to be imported")
sys.meta_path.insert(0, Absent())
"""


@pytest.mark.process
def test_names_need_neither_torch_nor_numpy(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FORBID)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{SOURCE}", "EVERSTEP_REPO": str(repo)}

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "everstep", "diff", *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    done = start("--names-only")
    assert (done.returncode, "model/1.weight" in done.stdout) == (0, True), done.stderr
    refused = start()
    assert refused.returncode == 15
    assert "pip install numpy, or everstep diff --names-only" in refused.stderr
