"""Real trainings of several ranks under `torchrun`, killed with SIGKILL at random instants and started again,
with as many ranks or with others.

    python -m bench.ranks_kill --kills 50 --seed 1 --json ranks_kill.json

Three trainings (DDP; FSDP2; FSDP2 with tensor parallelism) of a small model with dropout, AdamW, a learning
rate schedule and a shuffled loader, on the CPU with gloo, with a snapshot every three steps. In turn one rank
is killed, torchrun and all ranks, all ranks, a keeper. At each start what came back is held, byte for byte,
against what one process reads out of the chain. With the same number of ranks, started by this program or by
`torchrun --max-restarts`, the losses and the final state are those of a training that nobody disturbed, bit
for bit. With another number each sample of an epoch is trained exactly once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from blake3 import blake3
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

import everstep
from everstep.chain.history import Chain
from everstep.chain.verify import verify

KINDS = ("ddp", "fsdp", "fsdp_tp")
WORLDS = (4, 2, 3, 1)
EPOCHS = 2
SAMPLES = 144
"""Of an epoch: a multiple of every number of ranks times the batch."""

BATCH = 4
FEATURES = 32
STARTS_S = 300.0


class Noisy(Dataset[tuple[torch.Tensor, int]]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((FEATURES,), float(index)) / SAMPLES + torch.randn(FEATURES) * 0.1, index


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(FEATURES, 4 * FEATURES)
        self.down = nn.Linear(4 * FEATURES, FEATURES)
        self.norm = nn.LayerNorm(FEATURES)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(torch.relu(self.up(self.norm(x)))))


def built(kind: str, ranks: int) -> nn.Module:
    """The model, as a training of this kind has it on this rank."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES), Block(), Block(), nn.Linear(FEATURES, 1))
    if kind == "ddp":
        # Without it DDP sums gradients in another order after a start's first step.
        exact = {"find_unused_parameters": True}
        return nn.parallel.DistributedDataParallel(model, **exact) if ranks > 1 else model
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    tensor = 2 if kind == "fsdp_tp" and ranks % 2 == 0 else 1
    mesh = init_device_mesh("cpu", (ranks // tensor, tensor), mesh_dim_names=("data", "tensor"))
    for block in (model[1], model[2]):
        if kind == "fsdp_tp":
            parallelize_module(block, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return model


def whole(value: Any) -> torch.Tensor:
    """A tensor as one process would have it. All ranks have to ask."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value.detach()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The whole state by leaf, gathered from all ranks."""
    module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    names = {id(one): name for name, one in module.named_parameters()}
    found = {f"model/{name}": whole(one) for name, one in module.state_dict().items()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            found[f"optimizer/state/{names[id(parameter)]}/{key}"] = whole(value)
    return found


def digest_of(state: dict[str, torch.Tensor]) -> str:
    hasher = blake3()
    for name, tensor in sorted(state.items()):
        hasher.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def stored_state(path: str, snapshot: str) -> dict[str, torch.Tensor]:
    """The same out of the chain, by one process."""
    loaded = everstep.load(path, snapshot)
    tree: Any = Chain(path).manifest(loaded.snapshot).tree
    names = [name.removeprefix("model.") for name in tree["run"]["parameters"]["optimizer"]]
    found = {}
    for name, tensor in loaded.read("model/*").items():
        found[name] = torch.as_tensor(tensor)
    for name, tensor in loaded.read("optimizer/*").items():
        parts = name.split("/")
        if parts[2].isdigit():
            parts[2] = names[int(parts[2])]
        found["/".join(parts)] = torch.as_tensor(tensor)
    return found


def train(kind: str, path: str, log: str, epochs: int) -> None:
    """A rank's training, to its end."""
    # What a start before this one has said stays.
    into = Path(f"{log}.{int(os.environ['TORCHELASTIC_RESTART_COUNT']):04d}")
    into.mkdir(exist_ok=True)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    model = built(kind, ranks)
    data_ranks, data_rank = (ranks // 2, rank // 2) if kind == "fsdp_tp" and ranks % 2 == 0 else (ranks, rank)
    # Ranks of one tensor-parallel group see the same samples, and drop the same.
    torch.manual_seed(100 + data_rank)
    data = Noisy()
    sampler = DistributedSampler(data, data_ranks, data_rank, shuffle=True, seed=3)
    loader = DataLoader(data, BATCH, sampler=sampler)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    run = everstep.open(
        path, model=model, optimizer=optimizer, schedule=schedule, data=loader, every="3 steps", keep="all"
    )
    out = open(into / f"{rank}.jsonl", "w", buffering=1)  # noqa: SIM115

    def say(**facts: Any) -> None:
        out.write(json.dumps({"rank": rank, "ranks": ranks, **facts}) + "\n")

    if run.resumed is not None:
        mine, stored = state_of(model, optimizer), stored_state(path, run.resumed.snapshot)
        wrong = sorted(mine.keys() ^ stored.keys())
        wrong += [one for one in mine.keys() & stored.keys() if not torch.equal(mine[one], stored[one])]
        say(resumed=run.step, wrong=wrong, exact=run.resumed.exact, snapshot=run.resumed.snapshot)
    say(started=run.step)
    while run.epoch < epochs:
        sampler.set_epoch(run.epoch)
        for inputs, numbers in run.steps():
            loss = ((model(inputs).squeeze(1) - numbers / SAMPLES) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            say(step=run.step + 1, epoch=run.epoch, samples=numbers.tolist(), loss=loss.item().hex())
            run.log(loss=loss)
    run.close()
    digest = digest_of(state_of(model, optimizer))
    say(done=run.step, digest=digest)
    dist.destroy_process_group()


# -- the campaign -------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What a campaign found. `wrong` is to be empty."""

    kills: Counter[str] = field(default_factory=Counter)
    starts: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    finished: int = 0
    wrong: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        return {**vars(self), "kills": dict(self.kills), "starts": dict(self.starts)}


def started(
    kind: str, ranks: int, path: Path, log: Path, epochs: int, restarts: int
) -> subprocess.Popen[bytes]:
    """A torchrun that starts its ranks again, after one died, so many times."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
        f"--max-restarts={restarts}",
        "-m", "bench.ranks_kill", "--train", kind, "--path", str(path), "--into", str(log),
        "--epochs", str(epochs),
    ]  # fmt: skip
    log.parent.mkdir(parents=True, exist_ok=True)
    output = open(f"{log}.out", "wb")  # noqa: SIM115
    # Else torch's own ranks may find addresses of those that were killed (pytorch/pytorch#135712).
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if restarts else None
    return subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, env=environment)


def ranks_of(torchrun: subprocess.Popen[bytes]) -> list[int]:
    """The processes of the ranks."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if parent == torchrun.pid and b"--train" in command:
                found.append(int(entry.name))
    return found


def keepers_of(path: Path) -> list[int]:
    from everstep.keeper.client import living

    return [one.pid for one in living() if one.chain == str(path)]


def lines(log: Path) -> list[dict[str, Any]]:
    found = []
    for file in sorted(log.glob("*/*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                found.append({"start": file.parent.name, **json.loads(line)})
            except json.JSONDecodeError:
                continue  # Torn by the kill.
    return found


def kill(how: str, torchrun: subprocess.Popen[bytes], path: Path, dice: random.Random) -> bool:
    """Whether there was anybody to kill."""
    ranks = ranks_of(torchrun)
    if how == "one rank" and ranks:
        victims = [dice.choice(ranks)]
    elif how == "a keeper":
        victims = keepers_of(path)[:1]
    else:
        victims = [*ranks, torchrun.pid] if how == "all" else ranks
    killed = 0
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed += 1
    return killed > 0


def progress(log: Path) -> int:
    return sum(1 for line in lines(log) if "step" in line)


def campaign(
    kind: str,
    worlds: list[int],
    kills: list[str],
    dice: random.Random,
    found: Found,
    reference: dict[str, Any] | None,
    *,
    epochs: int = EPOCHS,
    restarts: bool = False,
) -> dict[str, Any]:
    """One training with its kills; returns its end.

    Args:
        worlds: with how many ranks it is started, in turn.
        kills: who is killed, one after the other.
        reference: the end of a training of as many ranks and steps that nobody disturbed.
        restarts: torchrun starts the ranks again, as long as it lives.
    """
    scratch = Path(tempfile.mkdtemp(prefix="ranks-"))
    path, log = scratch / "chain", scratch / "log"
    left = list(kills)
    turn = 0
    try:
        while True:
            ranks = worlds[turn % len(worlds)]
            turn += 1
            torchrun = started(kind, ranks, path, log / f"{turn:04d}", epochs, len(kills) if restarts else 0)
            found.starts[f"{kind} {ranks}"] += 1
            while left and _runs(torchrun, log, dice.randrange(0, ranks * 10), f"{kind} {ranks}", found):
                time.sleep(dice.random() * 0.1)
                if torchrun.poll() is None and kill(left[0], torchrun, path, dice):
                    how = left.pop(0)
                    found.kills[how] += 1
                    if how != "a keeper" and (how == "all" or not restarts):
                        break
            if how_ended(torchrun) == 0:
                break
            if turn > 2 * len(kills) + 3:
                said = Path(f"{log}/{turn:04d}.out").read_text(errors="replace")[-2000:]
                found.wrong.append(f"{kind} {worlds}: does not come to its end: {said}")
                return {}
        found.wrong += [f"{kind} {worlds}: ended before it was killed by {left}"] if left else []
        return ended(kind, worlds, epochs, path, log, found, reference)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _runs(torchrun: subprocess.Popen[bytes], log: Path, lines: int, what: str, found: Found) -> bool:
    """Whether the training still runs after as many more lines of its log."""
    enough = progress(log) + lines
    deadline = time.monotonic() + STARTS_S
    while torchrun.poll() is None and progress(log) < enough:
        if time.monotonic() > deadline:
            found.wrong.append(f"{what}: no step for {STARTS_S:.0f} s")
            return False
        time.sleep(0.02)
    return torchrun.poll() is None


def how_ended(torchrun: subprocess.Popen[bytes]) -> int:
    try:
        status = torchrun.wait(STARTS_S)
    except subprocess.TimeoutExpired:
        os.killpg(torchrun.pid, signal.SIGKILL)
        status = torchrun.wait()
    # Those whose torchrun was killed go with it, or else hang on each other.
    with suppress(ProcessLookupError):
        os.killpg(torchrun.pid, signal.SIGKILL)
    return status


def ended(
    kind: str,
    worlds: list[int],
    epochs: int,
    path: Path,
    log: Path,
    found: Found,
    reference: dict[str, Any] | None,
) -> dict[str, Any]:
    said = lines(log)
    resumed = [line for line in said if "resumed" in line]
    found.resumed += sum(line["rank"] == 0 for line in resumed)
    found.wrong += [f"{kind}: {line} is not what is stored" for line in resumed if line["wrong"]]
    same_world = len(set(worlds)) == 1
    if same_world:
        found.wrong += [f"{kind}: {line} is approximate" for line in resumed if not line["exact"]]
    ends = {(line["done"], line["digest"]) for line in said if "digest" in line}
    if len(ends) != 1:
        found.wrong.append(f"{kind} {worlds}: ranks end differently: {ends}")
        return {}
    ((done, digest),) = ends
    steps = [line for line in said if "step" in line and line["step"] <= done]
    # Of a step that was trained several times the last counts.
    newest = {line["step"]: line["start"] for line in sorted(steps, key=lambda line: str(line["start"]))}
    last = {(line["step"], line["rank"]): line for line in steps if line["start"] == newest[line["step"]]}
    for epoch in range(epochs):
        data = [line for line in last.values() if line["epoch"] == epoch and _has_data(kind, line)]
        trained = Counter(one for line in data for one in line["samples"])
        if trained != Counter(range(SAMPLES)):
            twice = sum(count - 1 for count in trained.values() if count > 1)
            missing = SAMPLES - len(trained)
            found.wrong.append(f"{kind} {worlds}: epoch {epoch}: {twice} trained twice, {missing} not at all")
    report = verify(Chain(path))
    found.wrong += [f"{kind}: {one}" for one in report.findings]
    end = {
        "done": done,
        "digest": digest,
        "losses": {f"{step}-{rank}": line["loss"] for (step, rank), line in last.items()},
    }
    if reference is not None and same_world and end != reference:
        found.wrong.append(f"{kind} {worlds}: differs from the training that nobody disturbed")
    found.finished += 1
    return end


def _has_data(kind: str, line: dict[str, Any]) -> bool:
    """Of ranks that share their data, the first."""
    return not (kind == "fsdp_tp" and line["ranks"] % 2 == 0 and line["rank"] % 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--train", choices=KINDS)
    parser.add_argument("--path", default="")
    parser.add_argument("--into", default="")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.train:
        train(given.train, given.path, given.into, given.epochs)
        return
    dice = random.Random(given.seed)
    # Three trainings of each kind are killed.
    share = -(-given.kills // (3 * len(given.kinds)))
    kills = [("one rank", "all", "ranks", "a keeper")[one % 4] for one in range(share)]
    epochs = EPOCHS + 4 * share  # Each kill has some to come in.
    each: dict[str, dict[str, Any]] = {}
    if given.json and given.json.exists():
        each = json.loads(given.json.read_text())["kinds"]  # Those that are not measured now stand.
    for kind in given.kinds:
        found = Found()
        reference = campaign(kind, [4], [], dice, found, None, epochs=epochs)
        campaign(kind, [4], kills, dice, found, reference, epochs=epochs)
        campaign(kind, [4], ["one rank"] * share, dice, found, reference, epochs=epochs, restarts=True)
        campaign(kind, list(WORLDS), kills, dice, found, None, epochs=epochs)
        each[kind] = found.figures()
        print(kind, each[kind], flush=True)
    if given.json:
        result = {
            "kills": sum(sum(one["kills"].values()) for one in each.values()),
            "resumed": sum(one["resumed"] for one in each.values()),
            "wrong": [wrong for one in each.values() for wrong in one["wrong"]],
            "kinds": each,
        }
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any(one["wrong"] for one in each.values()))


if __name__ == "__main__":
    main()
