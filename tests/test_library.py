"""`everstep.Chain`: all of a chain in a program's hands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import everstep
from everstep.errors import Mismatch, NotFound


@pytest.fixture(name="trained")
def _trained(tmp_path: Path) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    """Three snapshots at steps 1 to 3, and the model's state at each."""
    torch.manual_seed(1)
    model = nn.Linear(3, 2)
    found = []
    with everstep.open(tmp_path / "run", model=model, every="1 steps", keep="all") as run:
        for number in range(3):
            nn.init.normal_(model.weight)
            run.tick(loss=abs(number - 1.0))
            run.wait()
            found.append({name: one.clone() for name, one in model.state_dict().items()})
    return tmp_path / "run", found


Trained = tuple[Path, list[dict[str, torch.Tensor]]]


def test_versions(trained: Trained) -> None:
    chain = everstep.Chain(trained[0])
    assert [one.step for one in chain.snapshots()] == [3, 2, 1]
    assert chain.tag("best", "best:loss").step == 2
    assert chain.tag("best", "head", force=True).step == 3
    assert chain.branch("try", "best~").step == 2
    assert chain.tag("of-try", of="try").step == 2
    told = chain.rollback("step:1")
    assert (told.from_step, told.to_step) == (3, 1)
    assert [point.head.step for point in chain.reflog() if point.head] == [1, 3, 2, 1]
    assert chain.rollback("main@{1}").to_step == 3
    assert [point.head.step for point in chain.reflog("try") if point.head] == [2]
    chain.untag("of-try")
    chain.drop_branch("try")
    assert (chain.branches(), list(chain.tags())) == (["main"], ["best"])


def test_states(trained: Trained, tmp_path: Path) -> None:
    root, states = trained
    chain = everstep.Chain(root)
    chain.branch("try", "step:2")
    assert torch.equal(chain.load("head~")["model/weight"], states[1]["weight"])  # type: ignore[arg-type]
    assert torch.equal(chain.load(branch="try").state("model")["weight"], states[1]["weight"])
    assert chain.load("step:1", device="meta")["model/weight"].device.type == "meta"  # type: ignore[union-attr]
    model = nn.Linear(3, 2)
    assert chain.restore("step:1", into={"model": model}) == []
    assert torch.equal(model.weight, states[0]["weight"])
    chain.restore(into={"model": model}, only="model/bias")
    assert torch.equal(model.weight, states[0]["weight"])
    with pytest.raises(Mismatch, match="shape"):
        chain.restore(into={"model": nn.Linear(2, 2)})
    assert chain.restore(into={"model": nn.Linear(2, 2)}, strict=False)
    with pytest.raises(NotFound, match="no snapshot at step 9"):
        chain.restore("step:9", into={"model": model})


def test_export(trained: Trained, tmp_path: Path) -> None:
    root, states = trained
    chain = everstep.Chain(root)
    done = chain.export("step:2", tmp_path / "model.safetensors", only="model")
    assert done.tensors == 2
    assert torch.equal(load_file(tmp_path / "model.safetensors")["weight"], states[1]["weight"])
    chain.export("head", str(tmp_path / "all.pt"), format="torch")
    loaded = torch.load(tmp_path / "all.pt", weights_only=True)
    assert torch.equal(loaded["model"]["weight"], states[2]["weight"])
    with pytest.raises(Mismatch, match="exists already"):
        chain.export("head", tmp_path / "all.pt", format="torch")
    with pytest.raises(Mismatch, match="none of dcp, hf, safetensors, torch"):
        chain.export("head", tmp_path / "all.onnx", format="onnx")
    assert not (tmp_path / "all.onnx").exists()
    chain.export("head", tmp_path / "all.pt", format="torch", overwrite=True)


def test_a_run_has_one(tmp_path: Path) -> None:
    with everstep.open(tmp_path, model=nn.Linear(2, 1), every=None) as run:
        assert isinstance(run.chain, everstep.Chain)
        run.tick()
        run.take().durable()
        run.chain.tag("mine")
        assert run.chain.find("mine").step == 1


@pytest.mark.process
def test_it_needs_no_torch_but_for_tensors(trained: Trained) -> None:
    code = (
        "import sys, everstep\n"
        "chain = everstep.Chain(sys.argv[1])\n"
        "chain.tag('a', 'step:2'); chain.branch('b', 'a'); list(chain.reflog('b'))\n"
        "chain.export('a', sys.argv[1] + '.safetensors')\n"
        "assert 'torch' not in sys.modules\n"
    )
    source = str(Path(everstep.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, str(trained[0])],
        env={"PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_differences(trained: Trained) -> None:
    chain = everstep.Chain(trained[0])
    found = chain.diff("step:1", "head")
    assert [leaf.name for leaf in found.leaves if leaf.name.startswith("model/")] == ["model/weight"]
    assert (found.before.step, found.after.step) == (1, 3)
    there = chain.diff(f"{trained[0]}@step:3", "head")
    assert there.identical
