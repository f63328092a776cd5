"""The same on a CUDA device: what a fake device can promise, shown on a real one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import everstep
from everstep.chain.history import Chain
from everstep.chain.verify import verify
from everstep.events import Event, Failed, Resumed, Taken, Warned
from everstep.run.session import Run
from everstep.run.settings import Settings
from everstep.state.devices import PageLock

pytestmark = [
    pytest.mark.process,
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

WIDTH = 1100
STEPS = 6
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
}


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Net(nn.Module):
    """Large and small parameters, one whose memory is not in order, a frozen one, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, WIDTH)
        self.turned = nn.Parameter(torch.randn(WIDTH + 1, WIDTH).t())
        self.frozen = nn.Parameter(torch.randn(WIDTH, WIDTH + 2).t(), requires_grad=False)
        self.few = nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, 3), nn.Linear(3, 1)])
        self.short = nn.Parameter(torch.randn(7).to(torch.bfloat16))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(0.3)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        hidden = self.dropout(self.norm(torch.tanh(self.wide(batch))) @ self.turned)
        small = hidden[:, :3]
        for layer in self.few:
            small = torch.tanh(layer(small))
        return small.square().mean() + hidden.square().mean() + self.short.float().sum().square()


class Training:
    """Deterministic on one device; its random numbers are the device's."""

    def __init__(self, repo: Path, optimizer: dict[str, Any], **settings: Any) -> None:
        torch.manual_seed(11)
        plain = torch.randn(WIDTH, WIDTH, dtype=torch.complex64, device="cuda")
        # No optimizer changes these: a tensor that each step writes to, and views that are stored as
        # something else than what lies in memory.
        self.extra = {
            "seen": torch.zeros(9, device="cuda"),
            "conjugate": plain.conj(),
            "negative": plain[:, 7].conj().imag,
        }
        self.model = Net().to("cuda")
        self.optimizer = torch.optim.AdamW(
            [one for one in self.model.parameters() if one.requires_grad], lr=0.01, **optimizer
        )
        self.events: list[Event] = []
        objects = {"model": self.model, "optimizer": self.optimizer, "extra": self.extra}
        given = {"every": "1 step", "keep": "all", **settings}
        self.run = Run(Settings(repo, **given).overridden(), objects, sink=self.events.append)

    def step(self) -> None:
        """A step whose snapshot finds room: the one before is copied beside the forward and backward, and
        durable before this one's end."""
        batch = torch.randn(64, WIDTH, device="cuda")
        self.model(batch).backward()
        self.extra["seen"].add_(self.run.step + 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.run.wait()
        self.run.tick()

    def train(self, until: int) -> Training:
        while self.run.step < until:
            self.step()
        return self

    def all_of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def states(repo: Path) -> dict[int, str]:
    """The state digest of each step's snapshot."""
    return {one.step: one.record.state for one in Chain(repo).snapshots()}


@pytest.mark.parametrize("keeper", ["thread", "process"])
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_what_is_copied_beside_the_loop_is_the_state_where_the_step_ended(
    tmp_path: Path, kind: str, keeper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERSTEP_KEEPER", keeper)
    eager = Training(tmp_path / "eager", OPTIMIZERS[kind], overlap=False).train(STEPS)
    eager.run.close()
    beside = Training(tmp_path / "beside", OPTIMIZERS[kind]).train(STEPS)
    beside.run.close()
    assert not beside.all_of(Failed)
    assert not beside.all_of(Warned)
    assert len(beside.all_of(Taken)) == STEPS
    assert states(tmp_path / "beside") == states(tmp_path / "eager")
    assert not verify(Chain(tmp_path / "beside")).findings


def test_every_byte_is_compared_before_the_optimizers_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERSTEP_PARANOID", "1")
    training = Training(tmp_path, OPTIMIZERS["fused"]).train(STEPS)
    training.run.close()
    assert len(training.all_of(Taken)) == STEPS


def test_another_write_beside_the_copy_tears_no_snapshot(tmp_path: Path) -> None:
    training = Training(tmp_path, OPTIMIZERS["fused"]).train(2)
    training.run.wait()
    for _ in range(4):
        training.step()
        weight = training.model.wide.weight
        here = training.run.step, weight.detach().clone()
        weight.data.mul_(0.5)  # Torch does not count this one.
        training.run.wait()
        there = {one.step: one.id for one in Chain(tmp_path).snapshots()}
        if here[0] in there:
            kept = everstep.load(tmp_path, f"step:{here[0]}")["model/wide.weight"]
            assert torch.equal(kept, here[1].cpu())
        else:
            assert training.all_of(Failed)[-1].step == here[0]
    training.run.close()
    assert not verify(Chain(tmp_path)).findings


def test_the_pages_of_arenas_are_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locks: list[PageLock] = []
    made = PageLock.__init__

    def noted(self: PageLock, *arguments: Any) -> None:
        made(self, *arguments)
        locks.append(self)

    monkeypatch.setattr(PageLock, "__init__", noted)
    monkeypatch.setenv("EVERSTEP_KEEPER", "process")
    training = Training(tmp_path, OPTIMIZERS["foreach"]).train(STEPS)
    assert [lock.error for lock in locks] == ["", ""]
    assert all(torch.frombuffer(lock.memory, dtype=torch.uint8).is_pinned() for lock in locks)
    training.run.close()


def test_without_locked_pages_it_is_slower_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", unable_to_lock())
    training = Training(tmp_path, OPTIMIZERS["foreach"]).train(STEPS)
    training.run.close()
    assert any("could not be locked" in str(one) for one in training.all_of(Warned))
    assert len(training.all_of(Taken)) == STEPS
    assert not training.all_of(Failed)


def unable_to_lock() -> Any:
    """Another `torch.cuda.cudart`: the device's own, asked to lock what it cannot."""
    real = torch.cuda.cudart()

    class Runtime:
        cudaHostRegister = staticmethod(lambda address, size, flags: real.cudaHostRegister(0, size, flags))

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    return Runtime


@pytest.mark.parametrize("keeper", ["thread", "process"])
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_a_resume_goes_on_with_the_same_bits(
    tmp_path: Path, kind: str, keeper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERSTEP_KEEPER", keeper)
    whole = Training(tmp_path / "whole", OPTIMIZERS[kind]).train(STEPS)
    whole.run.close()
    Training(tmp_path / "cut", OPTIMIZERS[kind]).train(2).run.close()
    torch.cuda.manual_seed_all(99)
    torch.rand(7, device="cuda")
    again = Training(tmp_path / "cut", OPTIMIZERS[kind])
    assert [event.label for event in again.all_of(Resumed)] == ["exact"]
    again.train(STEPS).run.close()
    assert states(tmp_path / "cut") == states(tmp_path / "whole")
    assert all(
        tensor.device.type == "cuda" or name == "step"
        for kept in again.optimizer.state.values()
        for name, tensor in kept.items()
    )
    assert again.optimizer.state[again.model.turned]["exp_avg"].stride() == again.model.turned.stride()


def test_a_state_in_waves(tmp_path: Path) -> None:
    eager = Training(tmp_path / "eager", OPTIMIZERS["fused"], overlap=False).train(3)
    eager.run.close()
    waves = Training(tmp_path / "waves", OPTIMIZERS["fused"], max_arena_bytes=20_000_000).train(3)
    waves.run.close()
    assert states(tmp_path / "waves") == states(tmp_path / "eager")


def test_weights_for_inference_come_straight_to_the_device_or_to_the_host(tmp_path: Path) -> None:
    training = Training(tmp_path, OPTIMIZERS["foreach"]).train(2)
    training.run.close()
    for device in ("cuda", "cpu"):
        torch.manual_seed(5)
        model = Net().to(device)
        everstep.load(tmp_path).into(model=model)
        for name, tensor in model.state_dict().items():
            assert tensor.device.type == device
            assert torch.equal(tensor.cpu(), training.model.state_dict()[name].cpu()), name


SCRIPT = """
import json, os, random, sys
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
import everstep

class Noisy(Dataset):
    def __len__(self):
        return 320
    def __getitem__(self, index):
        return torch.full((256,), index / 320) + 0.1 * torch.rand(256), torch.tensor(float(index % 3))

if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    model = nn.Sequential(
        nn.Linear(256, 1024), nn.Dropout(0.3), nn.ReLU(), nn.Linear(1024, 1024), nn.BatchNorm1d(1024),
        nn.Dropout(0.1), nn.Linear(1024, 1),
    ).to("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=200)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40, growth_interval=5)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    loader = DataLoader(Noisy(), 8, shuffle=True, num_workers=2, pin_memory=True)
    run = everstep.open(
        sys.argv[1], model=model, optimizer=optimizer, schedule=schedule, scaler=scaler, ema=ema,
        data=loader, every="4 steps", keep="all",
    )
    while run.epoch < 4:
        for inputs, labels in run.steps():
            inputs, labels = inputs.to("cuda", non_blocking=True), labels.to("cuda", non_blocking=True)
            with torch.autocast("cuda", torch.float16):
                loss = ((model(inputs).squeeze(1) - labels) ** 2).mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            ema.update_parameters(model)
            optimizer.zero_grad()
            run.log(loss=loss)
            print(run.step + 1, flush=True)
    run.take("the end")
    run.close()
    print("end", flush=True)
"""


def test_killed_at_random_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 with a scaler that skips steps, fused AdamW, dropout, an average of the model, two workers."""
    monkeypatch.setenv("EVERSTEP_KEEPER", "process")
    monkeypatch.setenv("EVERSTEP_LOG", "json")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    assert _trained(script, tmp_path / "whole", None) == "end"
    chance = random.Random(3)
    for kill_after in (chance.randint(9, 40), chance.randint(20, 60), chance.randint(20, 60)):
        _trained(script, tmp_path / "killed", kill_after)
    assert _trained(script, tmp_path / "killed", None) == "end"
    heads = [Chain(tmp_path / name).find("head") for name in ("whole", "killed")]
    assert heads[0].step == heads[1].step == 160
    assert heads[0].record.state == heads[1].record.state
    assert heads[0].record.metrics == heads[1].record.metrics
    said = (tmp_path / "killed.log").read_text()
    events = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    kinds = [event.get("event") for event in events]
    assert kinds.count("resumed") == 3
    assert kinds.count("repeated") >= 1
    assert "parted" not in kinds


def _trained(script: Path, repo: Path, kill_after: int | None) -> str:
    """Run the script, to its end or until it has printed that many of its steps; its last line."""
    with open(f"{repo}.log", "a") as log:
        process = subprocess.Popen(
            [sys.executable, script, repo], stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line.strip())
            if len(lines) == kill_after:
                os.kill(process.pid, signal.SIGKILL)
                break
        process.stdout.close()
        status = process.wait()
    assert status == (0 if kill_after is None else -signal.SIGKILL), Path(f"{repo}.log").read_text()[-3000:]
    return lines[-1]
