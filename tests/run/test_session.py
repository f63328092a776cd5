"""The object that a loop holds: ticks, snapshots, triggers, metrics, ends."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections import Counter, OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import everstep
from everstep import events
from everstep.chain.history import Chain
from everstep.errors import Fenced, Mismatch, Unavailable
from everstep.events import Failed, Missed, Taken
from everstep.run.session import Run
from everstep.run.settings import Settings
from everstep.store.memory import MemoryStore
from training import Training

pytestmark = pytest.mark.slow

# -- taking snapshots --------------------------------------------------------------------------------------


def steps_of(repo: Any) -> list[int]:
    return [one.step for one in Chain(repo).snapshots()]


def test_every_so_many_steps(tmp_path: Path) -> None:
    run = Training().open(tmp_path, every="4 steps")
    for _ in range(9):
        run.tick()
        run.wait()
    assert steps_of(tmp_path) == [8, 4]
    run.close()
    assert steps_of(tmp_path) == [9, 8, 4]


def test_every_so_many_seconds() -> None:
    now = 1000.0
    store = MemoryStore()
    run = Run(Settings(store, every="10m, 5 steps", keep="all"), {"a": {}}, clock=lambda: now)
    for at in (1000.0, 1599.0, 1600.0, 1601.0, 2199.0, 2200.0):
        now = at
        run.tick()
        run.wait()
    # 3: ten minutes; 5: five steps, from which the ten minutes count anew.
    assert steps_of(store) == [5, 3]
    run.close()


def test_keep_the_last_two(tmp_path: Path) -> None:
    run = Training().open(tmp_path, every="1 steps", keep="last 2")
    for _ in range(5):
        run.tick()
        run.wait()
    assert steps_of(tmp_path) == [5, 4]
    run.close()
    before = sum(1 for _ in Chain(tmp_path).store.list("packs/"))
    assert before <= 2
    assert Training().open(tmp_path, keep="last 2").step == 5


def test_a_trigger_that_finds_no_room_is_skipped_and_counted() -> None:
    class Slow(MemoryStore):
        held: Any = None

        def put(self, key: str, parts: Any) -> bool:
            if self.held is not None:
                self.held.wait()
            return super().put(key, parts)

    import threading

    training, store = Training(), Slow()
    run = training.open(store, every="1 steps")
    store.held = threading.Event()
    for _ in range(4):
        run.tick()
    assert [event.count for event in training.events if isinstance(event, Missed)] == [1, 2]
    store.held.set()
    run.wait()
    assert steps_of(store) == [2, 1]
    run.close()


def test_pending(tmp_path: Path) -> None:
    run = Training().open(tmp_path)
    run.tick()
    pending = run.take()
    assert pending.released
    assert pending.durable(timeout=60)
    assert pending.snapshot is not None
    assert pending.snapshot.id == run.chain.find("head").id
    run.close()


def test_in_the_middle_of_a_step_it_is_taken_when_the_step_ends(tmp_path: Path) -> None:
    training = Training()
    run = training.open(tmp_path, every=None)
    pendings = []
    for batch in run.steps(until=3):
        if run.step == 1:
            pendings.append(run.take(note="now"))
            assert not pendings[0].released
            with pytest.raises(Unavailable, match="taken when the step ends"):
                pendings[0].durable()
        training.update(training.backward(batch), run.step)
    assert pendings[0].durable(60)
    assert pendings[0].snapshot is not None
    assert pendings[0].snapshot.step == 2
    run.close()


def test_tick_inside_steps_is_refused(tmp_path: Path) -> None:
    run = Training().open(tmp_path)
    for _ in run.steps(until=1):
        with pytest.raises(Mismatch, match="ends each step by itself"):
            run.tick()
    run.close()


def test_an_unfinished_step_is_trained_again(tmp_path: Path) -> None:
    run = Training().open(tmp_path, every="1 steps")
    for _ in run.steps():
        if run.step == 2:
            break
    run.wait()
    assert run.step == 2
    run.close()
    assert steps_of(tmp_path) == [2, 1]


def test_the_same_state_twice_stores_nothing(tmp_path: Path) -> None:
    run = Training().open(tmp_path, every=None)
    run.tick()
    assert run.take().durable()
    second = run.take()
    assert second.durable()
    assert second.snapshot is not None
    assert second.snapshot.record.new_bytes == 0
    assert second.snapshot.record.state == run.chain.find("head~1").record.state
    run.close()


def test_close_takes_the_last_steps_and_nothing_twice(tmp_path: Path) -> None:
    with Training().open(tmp_path, every=None) as run:
        run.tick()
    assert steps_of(tmp_path) == [1]
    with Training().open(tmp_path, every=None):
        pass
    assert steps_of(tmp_path) == [1]
    with pytest.raises(Mismatch, match="this run is closed"):
        run.tick()
    run.close()


def test_an_exception_is_no_step_boundary(tmp_path: Path) -> None:
    def train() -> None:
        with Training().open(tmp_path, every=None) as run:
            run.tick()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert steps_of(tmp_path) == []


# -- metrics -----------------------------------------------------------------------------------------------


def test_metrics_keep_their_bits() -> None:
    store = MemoryStore()
    run = Training().open(store, every=None)
    run.log(loss=torch.tensor(0.1), accuracy=np.float32(0.5))
    run.tick(norm=3)
    assert run.take().durable()
    found = run.chain.find("head").record.metrics
    assert found == {"loss": torch.tensor(0.1).item(), "accuracy": 0.5, "norm": 3.0}
    run.tick(loss=math.nan, gain=math.inf)
    assert run.take().durable()
    assert run.chain.find("head").record.metrics == {"loss": "nan", "gain": "inf"}
    with pytest.raises(Mismatch, match="metric 'loss' is a str"):
        run.log(loss="low")
    run.close()


# -- failures in the background ----------------------------------------------------------------------------


class Full(MemoryStore):
    """A store that has no room while `full`."""

    full = False

    def put(self, key: str, parts: Any) -> bool:
        if self.full:
            raise Unavailable(
                f"no room to write {key}", kept="what was committed before is intact", next="df -h"
            )
        return super().put(key, parts)


def test_a_full_store_does_not_stop_training_and_is_not_forgotten() -> None:
    training, store = Training(), Full()
    run = training.open(store, every="2 steps")
    run.tick()
    run.tick()
    run.wait()
    store.full = True
    run.tick()

    def reach_the_trigger() -> None:
        run.tick()
        run.wait()

    with pytest.raises(Unavailable, match="what was committed before is intact"):
        reach_the_trigger()
    assert any(isinstance(event, Failed) for event in training.events)
    run.tick()
    store.full = False
    run.tick()
    run.wait()
    assert steps_of(store) == [6, 2]
    run.close()


def test_a_failure_comes_out_of_the_next_tick() -> None:
    store = Full()
    run = Training().open(store, every=None)
    run.tick()
    store.full = True
    run.take()
    assert run._taking.wait(60)
    with pytest.raises(Unavailable):
        run.tick()
    assert run.step == 2
    told = run.take()
    with pytest.raises(Unavailable):
        told.durable()
    run.tick()  # Who waited knows; nobody is told twice.
    store.full = False
    run.close()
    assert steps_of(store) == [3]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        model = nn.Linear(700, 700)
        run = everstep.open(tmp_path / "run", model=model, every=None, keep="all")
        taken = 0

        def train() -> None:
            nonlocal taken
            for _ in range(9):
                model.weight.data.add_(1.0)
                run.tick()
                run.take().durable()
                taken += 1

        with pytest.raises(Unavailable, match="no room to write"):
            train()
        assert taken == len(list(Chain(tmp_path / "run").snapshots())) >= 1
        run.tick()  # Who waited for the snapshot was told; training goes on.
        with pytest.raises(Unavailable):
            run.close()
        assert list((tmp_path / "run" / "tmp").iterdir()) == []
        with torch.no_grad():
            model.weight.fill_(0)
        again = everstep.open(tmp_path / "run", model=model, resume="must")
        assert again.step == taken
        again.close()
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_writer_that_was_away_is_fenced(tmp_path: Path) -> None:
    from everstep.chain.lease import newest
    from everstep.format import record
    from everstep.format.record import LeaseRecord

    run = Training().open(tmp_path, every=None)
    run.tick()
    number = newest(run.chain.store) + 1
    other = LeaseRecord(host="elsewhere", boot="", pid=7, started=1, nonce="x", at="", number=number)
    assert run.chain.store.put(other.key, [record.seal(other)])
    with pytest.raises(Fenced, match="has taken"):
        run.take().durable()
    assert steps_of(tmp_path) == []
    with pytest.raises(Fenced):
        run.close()


# -- ends of the program -----------------------------------------------------------------------------------

SCRIPT = """
import sys, everstep
run = everstep.open(sys.argv[1], history=[], every=None)
for _ in range(3):
    run.tick()
"""


@pytest.mark.process
@pytest.mark.parametrize(("ending", "steps"), [("", [3]), ("raise SystemExit(0)", [3]), ("1 / 0", [])])
def test_a_program_that_does_not_close(tmp_path: Path, ending: str, steps: list[int]) -> None:
    subprocess.run(
        [sys.executable, "-c", SCRIPT + ending, tmp_path / "run"], check=False, capture_output=True
    )
    assert steps_of(tmp_path / "run") == steps
    everstep.open(tmp_path / "run", history=[]).close()  # Nobody holds it any more.


# -- what can be handed over -------------------------------------------------------------------------------


def test_all_kinds_of_objects(tmp_path: Path) -> None:
    def build(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        return {
            "list": [seed, (1, 2)],
            "dict": {"a": seed, 3: {None: 1.5}},
            "set": {seed},
            "plain": seed,
            "text": f"seed {seed}",
            "tensor": torch.rand(3),
            "array": np.random.default_rng(seed).random((2, 2)),
            "generator": torch.Generator().manual_seed(seed),
            "python": random.Random(seed),
            "numpy": np.random.default_rng(seed),
            "scaler": torch.amp.GradScaler("cpu", init_scale=float(seed)),
            "models": [nn.Linear(2, 2), nn.Linear(3, 3)],
            "nested": {
                "counter": Counter("ab" * seed),
                "ordered": OrderedDict(b=1, a=2),
                "deque": deque([1, seed], 5),
                "dtype": torch.float16,
                "size": torch.Size([2, seed]),
                "device": torch.device("cpu"),
                "scalar": np.float32(seed),
                "complex": 1j * seed,
                "bytes": bytes([seed]),
            },
        }

    first = build(1)
    with everstep.open(tmp_path, **first) as run:
        run.tick()
    second = build(2)
    run = everstep.open(tmp_path, **second)
    for name in ("list", "dict", "set", "nested"):
        assert second[name] == first[name]
    assert type(second["nested"]["counter"]) is Counter
    assert run.values == {"plain": 1, "text": "seed 1"}
    assert torch.equal(second["tensor"], first["tensor"])
    assert np.array_equal(second["array"], first["array"])
    assert torch.rand(2, generator=second["generator"]).equal(torch.rand(2, generator=first["generator"]))
    assert second["python"].random() == first["python"].random()
    assert second["numpy"].random() == first["numpy"].random()
    assert second["scaler"].get_scale() == 1.0
    for a, b in zip(first["models"], second["models"], strict=True):
        assert torch.equal(a.weight, b.weight)
    run.values["plain"] = 7
    run.tick()
    run.close()
    assert everstep.open(tmp_path, **build(3)).values["plain"] == 7


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, torch.tensor(0.1), capturable=False, foreach=False),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, 0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, 0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_optimizers_go_on_bit_for_bit(name: str) -> None:
    def step(model: nn.Linear, optimizer: torch.optim.Optimizer, number: int) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model(torch.full((2, 4), 0.1 * number)) - number).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    def build() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(3)
        model = nn.Linear(4, 3)
        return model, OPTIMIZERS[name](model.parameters())

    store = MemoryStore()
    model, optimizer = build()
    for number in range(6):
        if number == 3:
            everstep.open(store, model=model, optimizer=optimizer).take().durable()
            store.delete(next(store.list("leases/")).key)
        step(model, optimizer, number)
    again, resumed = build()
    run = everstep.open(store, model=again, optimizer=resumed, resume="must")
    for number in range(3, 6):
        step(again, resumed, number)
    assert torch.equal(again.weight, model.weight)
    assert torch.equal(again.bias, model.bias)
    run.close()


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),
    "Cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 9),
    "Restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=20),
    "Cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "Lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "Plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "Sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.ConstantLR(o, 0.1, 2), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        [2],
    ),
}


@pytest.mark.parametrize("name", list(SCHEDULERS))
@pytest.mark.filterwarnings("ignore")
def test_schedulers_go_on(name: str) -> None:
    def step(scheduler: Any, number: int) -> None:
        scheduler.optimizer.step()
        scheduler.step(*[float(number > 2)] if name == "Plateau" else [])

    def build() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1, momentum=0.9)
        return optimizer, SCHEDULERS[name](optimizer)

    store = MemoryStore()
    optimizer, scheduler = build()
    rates = []
    for number in range(9):
        if number == 3:
            with everstep.open(store, optimizer=optimizer, scheduler=scheduler) as run:
                run.tick()
        step(scheduler, number)
        rates.append(optimizer.param_groups[0]["lr"])
    again, resumed = build()
    with everstep.open(store, optimizer=again, scheduler=resumed, resume="must"):
        for number in range(3, 9):
            step(resumed, number)
            assert again.param_groups[0]["lr"] == rates[number]


def test_optimizer_state_of_another_dtype_keeps_its_bits() -> None:
    """torch casts loaded state to the parameter's dtype; here nothing may be lost."""

    def build() -> tuple[nn.Linear, torch.optim.Optimizer]:
        model = nn.Linear(3, 3, dtype=torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters())
        return model, optimizer

    model, optimizer = build()
    for parameter in model.parameters():
        optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": torch.rand(parameter.shape)}
    store = MemoryStore()
    with everstep.open(store, model=model, optimizer=optimizer) as run:
        run.tick()
    again, resumed = build()
    everstep.open(store, model=again, optimizer=resumed).close()
    for parameter, other in zip(model.parameters(), again.parameters(), strict=True):
        loaded = resumed.state[other]["exp_avg"]
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, optimizer.state[parameter]["exp_avg"])


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(100, 8)
            self.head = nn.Linear(8, 100, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    with everstep.open(tmp_path, model=model) as run:
        run.tick()
        assert run.take().durable()
        head = run.chain.find("head")
        manifest = run.chain.manifest(head)
    places = [manifest.by_name[f"model/{name}.weight"].slices for name in ("embedding", "head")]
    assert places[0] == places[1]
    again = Tied()
    everstep.open(tmp_path, model=again).close()
    assert again.head.weight is again.embedding.weight
    assert torch.equal(again.head.weight, model.head.weight)


def test_a_compiled_or_wrapped_model_is_the_same_state(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(3, 3))
    with everstep.open(tmp_path, model=torch.compile(plain)) as run:
        run.tick()
    other = nn.Sequential(nn.Linear(3, 3))
    everstep.open(tmp_path, model=nn.DataParallel(other)).close()
    assert torch.equal(other[0].weight, plain[0].weight)
    inner = nn.Sequential(torch.compile(nn.Linear(3, 3)))
    everstep.open(tmp_path, model=inner).close()
    assert torch.equal(inner[0].weight, plain[0].weight)


def test_tensors_of_all_kinds(tmp_path: Path) -> None:
    def build() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        made = {
            str(dtype): torch.randn(5, 3).to(dtype)
            for dtype in (
                torch.float64,
                torch.float16,
                torch.bfloat16,
                torch.int8,
                torch.bool,
                torch.complex64,
            )
        }
        made["float8"] = torch.randn(4).to(torch.float8_e4m3fn)
        made["uint16"] = torch.tensor([1, 2, 65535], dtype=torch.uint16)
        made["transposed"] = torch.randn(4, 6).t()
        made["strided"] = torch.randn(10)[::2]
        made["channels last"] = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
        made["scalar"] = torch.tensor(1.5)
        made["empty"] = torch.empty(0, 3)
        made["conjugate"] = torch.randn(3, dtype=torch.complex64).conj()
        made["big"] = torch.randn(600_000)
        return made

    class Holder:
        def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
            self.tensors = tensors

        def state_dict(self) -> dict[str, torch.Tensor]:
            return self.tensors

        def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
            self.tensors = state

    first = build()
    with everstep.open(tmp_path, holder=Holder(first)) as run:
        run.tick()
    holder = Holder({})
    everstep.open(tmp_path, holder=holder).close()
    assert list(holder.tensors) == list(first)
    for name, tensor in first.items():
        loaded = holder.tensors[name]
        assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape), name
        assert _bits(loaded) == _bits(tensor), name


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_modules_that_are_not_contiguous_are_restored_in_place(tmp_path: Path) -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    before = model.weight.detach().clone()
    with everstep.open(tmp_path, model=model) as run:
        run.tick()
    pointer = model.weight.data_ptr()
    with torch.no_grad():
        model.weight.zero_()
    everstep.open(tmp_path, model=model).close()
    assert torch.equal(model.weight, before)
    assert model.weight.data_ptr() == pointer


def test_extra_state_of_a_module(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        calls = 0

        def get_extra_state(self) -> Any:
            return {"calls": self.calls}

        def set_extra_state(self, state: Any) -> None:
            self.calls = state["calls"]

    model = Counting(2, 2)
    model.calls = 5
    with everstep.open(tmp_path, model=model) as run:
        run.tick()
    again = Counting(2, 2)
    everstep.open(tmp_path, model=again).close()
    assert again.calls == 5
    assert torch.equal(again.weight, model.weight)


def test_an_object_that_refuses_is_named(tmp_path: Path) -> None:
    class Picky:
        def state_dict(self) -> dict[str, int]:
            return {"a": 1}

        def load_state_dict(self, state: dict[str, int]) -> None:
            raise KeyError("b")

    with everstep.open(tmp_path, picky=Picky()) as run:
        run.tick()
    with pytest.raises(Mismatch, match=r"picky \(Picky\) refused the state"):
        everstep.open(tmp_path, picky=Picky())


# -- settings and events -----------------------------------------------------------------------------------


def test_disabled_is_a_no_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERSTEP_DISABLE", "1")
    training = Training()
    run = everstep.open(tmp_path / "new", **training.objects(), data=training.loader)
    for batch in run.steps(training.loader, until=4):
        training.update(training.backward(batch), run.step + 1)
        run.log(loss=1.0)
    assert (run.step, run.epoch, run.resumed) == (4, 0, None)
    assert run.take().durable()
    assert run.wait()
    run.close()
    assert not (tmp_path / "new").exists()
    plain = Training()
    for number, batch in zip(range(4), plain.loader, strict=False):
        plain.update(plain.backward(batch), number + 1)
    assert training.losses == plain.losses


def test_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERSTEP_REPO", str(tmp_path / "there"))
    monkeypatch.setenv("EVERSTEP_EVERY", "1 steps")
    monkeypatch.setenv("EVERSTEP_KEEP", "last 1")
    monkeypatch.setenv("EVERSTEP_BRANCH", "other")
    run = everstep.open("runs/here", a={}, every="never")
    for _ in range(3):
        run.tick()
        run.wait()
    run.close()
    assert [one.step for one in Chain(tmp_path / "there").snapshots("other")] == [3]
    monkeypatch.setenv("EVERSTEP_RESUME", "never")
    with pytest.raises(Mismatch, match="forbids"):
        everstep.open("runs/here", a={})
    monkeypatch.setenv("EVERSTEP_STRICT", "perhaps")
    with pytest.raises(Mismatch, match="EVERSTEP_STRICT='perhaps'"):
        everstep.open("runs/here", a={})
    monkeypatch.delenv("EVERSTEP_STRICT")
    monkeypatch.delenv("EVERSTEP_RESUME")
    for name, odd in (
        ("NICE", "high"),
        ("NICE", "2.5"),
        ("NICE", "20"),
        ("LINGER", "-1"),
        ("LINGER", "5 min"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(f"EVERSTEP_KEEPER_{name}", odd)
            with pytest.raises(Mismatch, match=f"EVERSTEP_KEEPER_{name}='{odd}' is no number from 0 to"):
                everstep.open("runs/here", a={})


def test_the_line_of_a_snapshot(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = everstep.open(tmp_path, model=nn.Linear(100, 100))
    run.tick()
    run.take().durable()
    run.close()
    line = next(line for line in capfd.readouterr().err.splitlines() if "stalled" in line)
    id = Chain(tmp_path).find("head").id
    assert line.startswith(f"everstep: snapshot {id[:6]} step 1 · ")
    assert " new of " in line
    assert "stalled" in line
    assert "durable in" in line


def test_events_as_lines() -> None:
    taken = Taken("40dc15" + "0" * 58, 4210, "10m", 1_200_000, 41_000_000, 3.2, 210.0)
    expected = "snapshot 40dc15 step 4210 · 1.2 MB new of 41.0 MB · stalled 3 ms · durable in 0.21 s"
    assert str(taken) == expected
    assert events.size(999) == "999 B"
    assert events.size(1_000_000) == "1.0 MB"


def test_json_lines(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERSTEP_LOG", "json")
    events.default_sink()(Failed(3, "why"))
    assert capfd.readouterr().err == '{"event": "failed", "step": 3, "why": "why"}\n'
