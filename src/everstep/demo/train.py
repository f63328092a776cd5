"""The training that the demo kills: a small byte-level GPT on the sources of Python's standard library.

An ordinary script. What Everstep asks of it are the three lines that say `everstep` or `run`.
"""

from __future__ import annotations

import json
import math
import random
import sys
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import everstep
from everstep.demo import EVERY

CONTEXT = 96
BATCH = 8
TEXT_BYTES = 2_000_000


class Windows(Dataset[torch.Tensor]):
    """Windows of `CONTEXT + 1` bytes of text, moved by a random number of bytes every time one is seen."""

    def __init__(self, text: bytes) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.text) // CONTEXT - 2

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * CONTEXT + random.randrange(CONTEXT)
        return self.text[start : start + CONTEXT + 1].long()


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        split = (batch, length, 3, self.heads, width // self.heads)
        query, key, value = self.qkv(self.before_attention(x)).view(split).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
        moved: torch.Tensor = x + self.dropout(self.mlp(self.before_mlp(x)))
        return moved


class GPT(nn.Module):
    def __init__(self, width: int = 96, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """The mean loss of predicting each next byte; `text` is [batch, CONTEXT + 1] int64."""
        x = self.token(text[:, :-1]) + self.place.weight
        logits = self.head(self.norm(self.blocks(x)))
        return functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def standard_library() -> bytes:
    """The text: the standard library's own modules, in the order of their names."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return b"".join(path.read_bytes() for path in sources)[:TEXT_BYTES]


def main(directory: str, steps: int) -> None:
    torch.set_num_threads(1)  # The loader's two workers have the other core.
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    warm_up = 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * min(step / steps, 1.0))),
    )
    loader = DataLoader(Windows(standard_library()), BATCH, shuffle=True, num_workers=2, drop_last=True)

    run = everstep.open(
        directory,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        data=loader,
        every=f"{EVERY} steps",
        keep="all",
    )
    while run.step < steps:
        for batch in run.steps(loader, until=steps):
            loss = model(batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            run.log(loss=loss)
            print(json.dumps({"step": run.step + 1, "loss": loss.item()}), flush=True)
    run.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
