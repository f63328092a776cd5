"""The training states that are measured, each with a real step: forward, backward, optimizer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

SIZES = ("full", "small")


@dataclass
class State:
    """Live objects by name, as a user would hand them over, and what a step does with them.

    Attributes:
        loss: makes a batch of its own and returns the loss on it.
        device: where all of it is.
        trained_bytes: the trained parameters and their optimizer's state, where that is not everything.
    """

    objects: dict[str, nn.Module | torch.optim.Optimizer]
    loss: Callable[[], torch.Tensor] | None = None
    device: str = "cpu"
    trained_bytes: Callable[[], int] | None = None

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for one in self.objects.values() for tensor in tensors(one.state_dict()))

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [one for one in self.objects.values() if isinstance(one, torch.optim.Optimizer)]

    def plain(self) -> dict[str, object]:
        """What a user of torch.save would save. Plain dicts: DCP's stager of torch 2.11 copies no others."""
        return {name: dict(one.state_dict()) for name, one in self.objects.items()}

    def step(self, updating: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        """Train a step; the optimizers' part of it inside `updating()`. It ends where a device is done with
        it: as in a loop that looks at each loss."""
        assert self.loss is not None
        self.loss().backward()
        with updating():
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.settle()

    def settle(self) -> None:
        """Wait until a device has done all that it was asked."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def tensors(tree: object) -> list[torch.Tensor]:
    """All tensors of nested dicts and lists."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for item in items for tensor in tensors(item)]


@torch.no_grad()
def touch(state: State) -> None:
    """What the first optimizer step does to all state: read and write each byte."""
    for one in state.objects.values():
        for tensor in tensors(one.state_dict()):
            tensor.add_(0)
    state.settle()


# -- a language model --------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """A GPT-2 with its output tied to its embedding."""

    def __init__(
        self, width: int = 768, layers: int = 12, vocabulary: int = 50257, context: int = 1024
    ) -> None:
        super().__init__()
        self.heads = width // 64
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        with torch.no_grad():
            self.token.weight.mul_(0.02)
            self.place.weight.mul_(0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = x + block["out"](self._attend(block["qkv"](block["norm1"](x))))
            x = x + block["down"](functional.gelu(block["up"](block["norm2"](x))))
        return self.norm(x) @ self.token.weight.t()

    def _attend(self, qkv: torch.Tensor) -> torch.Tensor:
        query, key, value = (one.unflatten(-1, (self.heads, 64)).transpose(1, 2) for one in qkv.chunk(3, -1))
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return attended.transpose(1, 2).flatten(2)


class LowRank(nn.Module):
    """A frozen linear layer with a trained update of low rank."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(x) + self.up(self.down(x))


def _shape(size: str) -> dict[str, int]:
    return {} if size == "full" else {"width": 64, "layers": 2, "vocabulary": 512, "context": 64}


def _next_token(model: Transformer, tokens: int) -> Callable[[], torch.Tensor]:
    """Text in which the next token follows from the last, so that there is something to learn."""
    vocabulary, context = model.token.num_embeddings, min(tokens, model.place.num_embeddings)

    def loss() -> torch.Tensor:
        begin = torch.randint(vocabulary, (max(tokens // context, 1), 1))
        text = (begin + 17 * torch.arange(context + 1)) % vocabulary
        text = text.to(model.token.weight.device)
        return functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    return loss


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-4)


def gpt2(size: str = "full", tokens: int = 64, device: str = "cpu", **shape: int) -> State:
    """GPT-2 with AdamW in fp32: 1.5 GB once a step was trained."""
    torch.manual_seed(0)
    model = Transformer(**(shape if shape and size == "full" else _shape(size))).to(device)
    return State({"model": model, "optimizer": _adamw(model)}, _next_token(model, tokens), device)


def gpt2_on_cuda(size: str = "full", tokens: int = 16384) -> State:
    """The same on a device, where a step is to take longer than the copy too."""
    return gpt2(size, tokens, "cuda")


def medium_gpt2_on_cuda(size: str = "full", tokens: int = 16384) -> State:
    """The next larger GPT-2, 4.3 GB with AdamW."""
    return gpt2(size, tokens, "cuda", width=1024, layers=24)


def fresh_gpt2(size: str = "full", device: str = "cpu") -> State:
    """The same objects as a new process has them: parameters without meaning, an optimizer without state."""
    with torch.device("meta"):
        model = Transformer(**_shape(size))
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return State({"model": model, "optimizer": _adamw(model)}, device=device)


def third_gpt2(size: str = "full", tokens: int = 64) -> State:
    """A GPT-2 of half the width, with as many leaves and a third of the size: 0.5 GB with AdamW."""
    torch.manual_seed(0)
    shape = {"width": 384} if size == "full" else _shape(size)
    model = Transformer(**shape)
    return State({"model": model, "optimizer": _adamw(model)}, _next_token(model, tokens))


def lora(size: str = "full", tokens: int = 64) -> State:
    """GPT-2 with 1 % of trained parameters beside frozen ones."""
    torch.manual_seed(0)
    model = Transformer(**_shape(size)).requires_grad_(False)
    for block in model.blocks:
        for name in ("qkv", "out", "up", "down"):
            block[name] = LowRank(block[name], rank=8 if size == "full" else 2)
    optimizer = _adamw(model)

    def trained_bytes() -> int:
        weights = sum(one.nbytes for one in model.parameters() if one.requires_grad)
        return weights + sum(one.nbytes for one in tensors(optimizer.state_dict()["state"]))

    return State(
        {"model": model, "optimizer": optimizer}, _next_token(model, tokens), trained_bytes=trained_bytes
    )


# -- others ------------------------------------------------------------------------------------------------


class Recommender(nn.Module):
    """Embeddings of many items, and a small network on those that were looked up."""

    def __init__(self, items: int, width: int = 128) -> None:
        super().__init__()
        self.items = nn.Embedding(items, width, sparse=True)
        self.rank = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, looked_up: torch.Tensor) -> torch.Tensor:
        return self.rank(self.items(looked_up)).squeeze(-1)


def recommender(size: str = "full", tokens: int = 0) -> State:
    """1 GB of embeddings (and as much Adagrad state) of which a step changes 1 % of the rows."""
    torch.manual_seed(0)
    items = 2_000_000 if size == "full" else 20_000
    model = Recommender(items)

    def loss() -> torch.Tensor:
        looked_up = torch.randint(items, (items // 100,))
        liked = (looked_up % 3 == 0).float()
        return functional.binary_cross_entropy_with_logits(model(looked_up), liked)

    return State(
        {
            "model": model,
            "embedding": torch.optim.Adagrad(model.items.parameters(), lr=1e-2),
            "network": torch.optim.Adam(model.rank.parameters(), lr=1e-3),
        },
        loss,
    )


def many_tensors(size: str = "full", tokens: int = 0) -> State:
    """4,000 tensors of 16 to 256 elements, with AdamW."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(2000 if size == "full" else 50)))

    def loss() -> torch.Tensor:
        x = torch.randn(32, 16)
        return functional.mse_loss(model(x), x)

    return State({"model": model, "optimizer": _adamw(model)}, loss)


def only_model(state: State) -> State:
    """The model without its optimizer."""
    return State({"model": state.objects["model"]}, device=state.device)


STATES: dict[str, Callable[[str, int], State]] = {
    "gpt2": gpt2,
    "lora": lora,
    "recommender": recommender,
    "many_tensors": many_tensors,
    "third_gpt2": third_gpt2,
    "gpt2_on_cuda": gpt2_on_cuda,
    "medium_gpt2_on_cuda": medium_gpt2_on_cuda,
}
