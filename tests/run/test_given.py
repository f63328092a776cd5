"""What differs between the start of a run and the one before it, and what a run says of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import everstep
from everstep.chain.drift import EXACTNESS, SAFE, TRAJECTORY
from everstep.chain.history import Chain
from everstep.errors import Unsupported
from everstep.events import Drifted, Event, Resumed, quiet
from everstep.format.values import Symbol
from everstep.run import environment, session
from everstep.run.given import MOST_FACTS, given
from everstep.run.session import Run
from everstep.run.settings import Settings
from everstep.state import rng
from everstep.state.data import track
from everstep.store.memory import MemoryStore
from training import Training


class Script:
    """What a training script builds; `open` opens the run with it, and `end` ends that after an epoch."""

    def __init__(self, lr: float = 0.1, batch_size: int = 4, samples: int = 16, frozen: bool = False) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        self.model[0].requires_grad_(not frozen)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9)
        self.loader = DataLoader(TensorDataset(torch.ones(samples, 4)), batch_size)
        self.events: list[Event] = []

    def open(self, repo: Any, config: dict[str, Any] | None = None) -> Run:
        objects = {"model": self.model, "optimizer": self.optimizer}
        settings = Settings(repo, every=None, keep="all").overridden()
        return Run(settings, objects, self.loader, config=config, sink=self.events.append)

    def an_epoch(self, repo: Any, config: dict[str, Any] | None = None) -> dict[str, tuple[str, ...]]:
        """Open, train an epoch, close; returns what drifted, by class."""
        run = self.open(repo, config)
        for (x,) in run.steps():
            self.model(x).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        run.close()
        return {event.kind: event.differences for event in self.events if isinstance(event, Drifted)}


# -- at a resume -------------------------------------------------------------------------------------------


def test_the_same_script_does_not_drift() -> None:
    store = MemoryStore()
    assert Script().an_epoch(store, {"lr": 0.1}) == {}
    assert Script().an_epoch(store, {"lr": 0.1}) == {}


def test_a_scheduled_learning_rate_is_no_drift() -> None:
    store = MemoryStore()
    Training().train(store, 4).close()
    training = Training()
    training.train(store, 8).close()
    assert training.optimizer.param_groups[0]["lr"] != 0.05
    assert not [event for event in training.events if isinstance(event, Drifted)]


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ({"lr": 0.2}, "optimizer.lr 0.1 -> 0.2 (the snapshot's 0.1 stays)"),
        ({"batch_size": 8}, "data.batch_size 4 -> 8; data.batches 4 -> 2"),
        ({"samples": 20}, "data.samples 16 -> 20; data.batches 4 -> 5"),
        ({"frozen": True}, "model.frozen 0 of 4 -> 2 of 4"),
    ],
)
def test_what_a_script_changes_is_told(script: dict[str, Any], text: str) -> None:
    store = MemoryStore()
    Script().an_epoch(store)
    drifted = Script(**script).an_epoch(store)
    assert drifted.keys() == {TRAJECTORY}
    assert "; ".join(drifted[TRAJECTORY]) == text


def test_a_setting_that_the_snapshot_overrides_is_told_each_time() -> None:
    store = MemoryStore()
    Script(lr=0.1).an_epoch(store)
    for _ in range(2):
        script = Script(lr=0.2)
        assert TRAJECTORY in script.an_epoch(store)
        assert script.optimizer.param_groups[0]["lr"] == 0.1
    assert Script(lr=0.1).an_epoch(store) == {}


def test_what_takes_effect_is_told_once() -> None:
    store = MemoryStore()
    Script().an_epoch(store)
    assert TRAJECTORY in Script(batch_size=8).an_epoch(store)
    assert Script(batch_size=8).an_epoch(store) == {}


def test_each_class_has_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    here = environment.here()

    def train() -> None:
        model = nn.Linear(2, 1)
        with everstep.open(tmp_path / "run", model=model, config={"seed": train.seed}, every=None) as run:
            run.tick()

    train.seed = 1  # type: ignore[attr-defined]
    monkeypatch.setattr(environment, "here", lambda: {**here, "threads": "64", "host": "elsewhere"})
    train()
    monkeypatch.setattr(environment, "here", lambda: here)
    train.seed = 2  # type: ignore[attr-defined]
    capfd.readouterr()
    train()
    lines = [line.partition(f"{tmp_path / 'run'}: ")[2] for line in capfd.readouterr().err.splitlines()]
    assert lines[0].endswith(
        f"approximate: torch threads 64 -> {here['threads']} · " + lines[0].split(" · ")[-1]
    )
    assert lines[1:4] == [
        f"breaks exactness: torch threads 64 -> {here['threads']}",
        "changes the trajectory: config/seed 1 -> 2",
        f"safe: host elsewhere -> {here['host']}",
    ]


def test_a_long_line_says_how_much_more_there_is(capfd: pytest.CaptureFixture[str]) -> None:
    event = Drifted("runs/x", TRAJECTORY, tuple(f"config/{n} 1 -> 2" for n in range(9)))
    assert str(event).endswith("config/5 1 -> 2; and 3 more")
    quiet(event)
    quiet(Drifted("runs/x", SAFE, ("host a -> b",)))
    assert capfd.readouterr().err == f"everstep: {event}\n"


def test_exactness_is_part_of_the_label(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    here = environment.here()
    with monkeypatch.context() as patch:
        patch.setattr(environment, "here", lambda: {**here, "device": "NVIDIA H100"})
        Script().an_epoch(store)
    script = Script()
    assert script.an_epoch(store) == {EXACTNESS: ("device NVIDIA H100 -> cpu",)}
    (resumed,) = [event for event in script.events if isinstance(event, Resumed)]
    assert resumed.label == "approximate: device NVIDIA H100 -> cpu"


def test_snapshots_of_an_older_version_do_not_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    with monkeypatch.context() as patch:
        patch.setattr(session, "given", lambda objects, track: {})
        Script().an_epoch(store)
    assert Script(lr=0.5, batch_size=2).an_epoch(store, {"lr": 1}) == {}


# -- the configuration -------------------------------------------------------------------------------------


def test_a_configuration_is_kept_and_compared() -> None:
    store = MemoryStore()
    config = {"lr": 0.1, "layers": [4, 4], "dtype": torch.float32, "seed": None}
    Script().an_epoch(store, config)
    chain = Chain(store)
    kept = chain.manifest(chain.find("head")).tree["run"]["config"]
    assert kept == {"lr": 0.1, "layers": [4, 4], "dtype": Symbol("torch.dtype", "float32"), "seed": None}
    drifted = Script().an_epoch(store, {**config, "layers": [4, 8], "seed": 3})
    assert drifted == {TRAJECTORY: ("config/layers/1 4 -> 8", "config/seed None -> 3")}
    assert Script().an_epoch(store) == {}
    assert "config" not in chain.manifest(chain.find("head")).tree["run"]


def test_a_configuration_is_as_it_was_when_the_run_was_opened() -> None:
    store = MemoryStore()
    config = {"lr": 0.1}
    run = Script().open(store, config)
    config["lr"] = 0.5
    run.tick()
    run.close()
    assert run.chain.manifest(run.chain.find("head")).tree["run"]["config"] == {"lr": 0.1}


def test_nothing_in_a_configuration_can_hinder_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    with monkeypatch.context() as patch:
        patch.setattr(session, "plain_config", lambda config: {"kind": Symbol("of tomorrow", 1)})
        Script().an_epoch(store)
    drifted = Script().an_epoch(store, {"kind": 1})
    assert drifted == {TRAJECTORY: ("config/kind of tomorrow.1 -> 1",)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": {"mask": torch.ones(2)}}, "config/model/mask is a tensor or an array"),
        ({"path": Path("x")}, "config/path is a pathlib"),
    ],
)
def test_a_configuration_holds_plain_values(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        everstep.open(tmp_path / "run", model=nn.Linear(2, 1), config=config)
    assert not (tmp_path / "run").exists()


# -- what a script gives -----------------------------------------------------------------------------------


def test_settings_of_groups() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(
        [{"params": [model.weight], "lr": torch.tensor(0.5)}, {"params": [model.bias], "lr": 0.25}],
        weight_decay=0.0,
    )
    facts = given({"model": model, "optimizer": optimizer}, None)
    assert facts["optimizer.lr"] == "0.5, 0.25"
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5)
    assert (schedule.get_last_lr(), given({"optimizer": optimizer}, None)["optimizer.lr"]) == (
        [0.25, 0.125],
        "0.5, 0.25",
    )
    assert facts["optimizer.betas"] == "(0.9, 0.999)"
    assert facts["optimizer.weight_decay"] == "0.0"
    assert facts["model.frozen"] == "0 of 2"
    assert "optimizer.amsgrad" not in facts
    assert "optimizer.params" not in facts


def test_there_are_not_too_many() -> None:
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(100)]
    objects: dict[str, object] = {
        f"o/{n}": torch.optim.SGD([one], lr=1.0) for n, one in enumerate(parameters)
    }
    facts = given(objects, track([1, 2]))
    assert len(facts) == MOST_FACTS
    assert facts["data.batches"] == "2"


def test_looking_at_a_loader_draws_nothing() -> None:
    loader = track(Training().loader)
    before = rng.fingerprint()
    assert given({}, loader) == {"data.samples": "40", "data.batch_size": "4", "data.batches": "10"}
    assert rng.fingerprint() == before


# -- the program -------------------------------------------------------------------------------------------


def git(directory: Path, *arguments: str) -> str:
    names = {f"GIT_{who}_{what}": "x@y" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(
        ["git", "-C", str(directory), *arguments],
        env={**os.environ, **names, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@pytest.mark.process
def test_the_commit_of_a_script_s_directory(tmp_path: Path) -> None:
    assert environment.commit_of(tmp_path) == ""
    git(tmp_path, "init", "-q")
    (tmp_path / "part").mkdir()
    (tmp_path / "part/train.py").write_text("1")
    assert environment.commit_of(tmp_path) == ""  # Nothing is committed yet.
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert environment.commit_of(tmp_path / "part") == commit
    (tmp_path / "notes.txt").write_text("untracked")
    assert environment.commit_of(tmp_path) == commit
    (tmp_path / "part/train.py").write_text("2")
    assert environment.commit_of(tmp_path) == f"{commit}-dirty"


@pytest.mark.process
def test_git_can_be_missing_or_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert environment.commit_of(tmp_path) == ""
    (tmp_path / "slow").mkdir()
    slow = tmp_path / "slow/git"
    slow.write_text(f"#!{sys.executable}\nimport signal\nsignal.pause()\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "slow"))
    assert environment.commit_of(tmp_path, timeout_s=0.1) == ""


def test_the_script_is_known_by_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train.py"
    script.write_text("print(1)")
    first = environment.script_digest(script)
    assert len(first) == 16
    script.write_text("print(2)")
    assert environment.script_digest(script) not in ("", first)
    assert environment.script_digest(tmp_path / "none.py") == ""
    monkeypatch.setattr(environment, "_SCRIPT_BYTES", 7)
    assert environment.script_digest(script) == ""
    monkeypatch.setattr(environment, "_SCRIPT_BYTES", 8)
    monkeypatch.setattr(environment, "commit_of", lambda directory: f"at {directory.name}")
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__=str(script)))  # type: ignore[arg-type]
    facts = environment._program()
    assert facts == {"script": environment.script_digest(script), "commit": f"at {tmp_path.name}"}
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace())  # type: ignore[arg-type]
    assert environment._program() == {}


def test_facts_that_never_change_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    environment.here()

    def never(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", never)
    assert environment.here()["torch"] == str(torch.__version__)
