"""A small real training with all that makes exact resume hard, to run whole, in parts, or killed."""

from __future__ import annotations

import os
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

import everstep
from everstep.chain.history import Chain
from everstep.events import Event


class Noisy(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples that are augmented with all three global generators."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.rand(6) + random.random() + float(np.random.rand())
        return torch.full((6,), index / 40) + 0.1 * noise, torch.tensor(float(index % 3))


@dataclass
class Training:
    """The objects of one process, built the same way each time.

    `accumulate` batches make a step; `amp` is bfloat16 autocast.
    """

    workers: int = 0
    accumulate: int = 1
    amp: bool = False
    losses: dict[int, float] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        self.model = nn.Sequential(
            nn.Linear(6, 24), nn.Dropout(0.3), nn.Tanh(), nn.BatchNorm1d(24), nn.Linear(24, 1)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.05, total_steps=200)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.history: list[float] = []
        self.loader = DataLoader(Noisy(), 4, shuffle=True, num_workers=self.workers)

    def objects(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "ema": self.ema,
            "history": self.history,
        }

    def open(self, repo: Any, **settings: Any) -> everstep.run.session.Run:  # type: ignore[name-defined]
        from everstep.run.session import Run
        from everstep.run.settings import Settings

        settings = {"every": "3 steps", "keep": "all", **settings}
        return Run(
            Settings(repo, **settings).overridden(), self.objects(), self.loader, sink=self.events.append
        )

    def backward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, y = batch
        with torch.autocast("cpu", torch.bfloat16, enabled=self.amp):
            loss = ((self.model(x).squeeze(-1) - y) ** 2).mean() / self.accumulate
        loss.backward()
        return loss.detach()

    def update(self, loss: torch.Tensor, step: int) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.ema.update_parameters(self.model)
        self.history.append(loss.item())
        self.losses[step] = loss.item()

    def train(self, repo: Any, until: int, **settings: Any) -> everstep.run.session.Run:  # type: ignore[name-defined]
        """Open, train up to `until` steps, and return the open run."""
        run = self.open(repo, **settings)
        while run.step < until:
            self.epoch_of(run, until)
        return run

    def epoch_of(self, run: Any, until: int) -> None:
        if self.accumulate == 1:
            for batch in run.steps(self.loader, until=until):
                run.wait()  # So that every trigger finds room for its snapshot.
                loss = self.backward(batch)
                self.update(loss, run.step + 1)
                run.log(loss=loss)
            return
        for number, batch in enumerate(run.data):
            loss = self.backward(batch)
            if (number + 1) % self.accumulate == 0:
                self.update(loss, run.step + 1)
                run.tick(loss=loss)
            if run.step >= until:
                return

    def bits(self) -> dict[str, torch.Tensor]:
        """Copies of all tensors of the model."""
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def end_of(repo: Any, ref: str = "head") -> tuple[str, Any]:
    """The state digest and the loss of a chain's snapshot."""
    snapshot = Chain(repo).find(ref)
    return snapshot.record.state, snapshot.record.metrics.get("loss")


def in_a_process(action: Callable[[], object]) -> int:
    """Run `action` in a forked process that then ends without any clean-up, as a kill would; the status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def flip(path: Path, at: int) -> None:
    """Flip one bit of a file, in place."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)
