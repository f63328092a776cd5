"""Capture under the next forward and backward: what is captured is the state where the step ended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from everstep.chain import packing, steplog
from everstep.chain.history import Chain, Snapshot
from everstep.chain.verify import verify
from everstep.errors import Damaged, Unavailable, Unsupported
from everstep.events import Event, Failed, Missed, Taken, Warned
from everstep.format import keys
from everstep.run.session import Run
from everstep.run.settings import Settings
from everstep.state import capture
from everstep.store.base import Store
from everstep.store.local import LocalStore
from everstep.store.memory import MemoryStore

pytestmark = pytest.mark.slow

WIDTH = 600  # Its weight is more than a mebibyte, so both ways to copy are taken.


class Loop:
    """A model, its optimizer and a run, stepped by hand."""

    def __init__(self, store: Store | None = None, frozen: bool = False, **settings: Any) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 1)
        )
        if frozen:
            self.model[0].requires_grad_(False)
        trained = [one for one in self.model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2)
        self.before_fence: Callable[[], object] = lambda: None
        self.optimizer.register_step_pre_hook(lambda *_: self.before_fence())
        self.events: list[Event] = []
        self.store = store or MemoryStore()
        self.run = Run(
            Settings(self.store, **{"every": None, "keep": "all", **settings}).overridden(),
            {"model": self.model, "optimizer": self.optimizer},
            sink=self.events.append,
        )

    def backward(self) -> None:
        self.model(torch.randn(8, WIDTH)).square().mean().backward()

    def step(self) -> None:
        """Forward, backward, update: all of a step but the tick."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
            self.run.tick()

    def states(self) -> list[str]:
        """The state digests, oldest first."""
        self.run.close()
        return [one.record.state for one in reversed(list(self.snapshots()))]

    def snapshots(self) -> Iterator[Snapshot]:
        return iter(Chain(self.store).snapshots())

    def said(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While it is closed, nothing is copied beside the loop."""
    opened = threading.Event()
    real = capture.copy

    def held(pairs: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            opened.wait()
        real(pairs)

    monkeypatch.setattr(capture, "copy", held)
    yield opened
    opened.set()


def test_every_step_overlapped_is_every_step_eager() -> None:
    def states(overlap: bool) -> list[str]:
        loop = Loop(every="1 steps", overlap=overlap)
        for _ in range(6):
            loop.step()
            loop.run.wait()  # So that every trigger finds room.
            loop.run.tick()
        assert not loop.said(Failed)
        return loop.states()

    eager = states(overlap=False)
    assert len(set(eager)) == 6
    assert states(overlap=True) == eager


def reference(steps: int, **settings: Any) -> list[str]:
    """The states of the same training whose loop waits for every copy."""
    loop = Loop(overlap=False, **settings)
    for _ in range(steps):
        loop.train(1)
        loop.run.wait()  # So that every trigger finds room.
    return loop.states()


def test_the_optimizer_waits_for_the_copy_and_nothing_else_does(gate: threading.Event) -> None:
    loop = Loop(every="3 steps")
    loop.train(3)  # The last tick returned, and nothing that an optimizer owns is copied yet.
    loop.backward()
    assert not loop.said(Taken)
    assert not gate.is_set()
    loop.before_fence = gate.set
    loop.optimizer.step()
    states = loop.states()
    assert states == reference(3, every="3 steps")
    (taken,) = loop.snapshots()
    assert taken.record.costs["stall"] >= taken.record.costs["fence"]


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a small state is handed over while it is copied, in many pieces."""
    monkeypatch.setattr(capture, "AHEAD_FROM_BYTES", 1)
    monkeypatch.setattr(capture, "AHEAD_BYTES", 4096)


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("keeper", ["thread", "process"])
@pytest.mark.parametrize("frozen", [False, True])
def test_handed_over_while_it_is_copied_it_is_the_same(tmp_path: Path, keeper: str, frozen: bool) -> None:
    store: Any = MemoryStore() if keeper == "thread" else LocalStore(tmp_path / "chain")
    loop = Loop(store, frozen=frozen, every="1 steps")
    for _ in range(6):
        loop.train(1)
        loop.run.wait()
    assert not loop.said(Failed)
    assert loop.states() == reference(6, frozen=frozen, every="1 steps")
    assert not verify(Chain(store)).findings


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("keeper", ["thread", "process"])
def test_what_was_handed_over_and_changes_becomes_no_snapshot(
    tmp_path: Path, gate: threading.Event, keeper: str
) -> None:
    store: Any = MemoryStore() if keeper == "thread" else LocalStore(tmp_path / "chain")
    loop = Loop(store, every="2 steps")
    gate.set()
    loop.train(2)
    loop.run.wait()
    gate.clear()
    loop.train(2)
    loop.model[0].weight.data.zero_()
    gate.set()
    loop.run.wait()
    (failed,) = loop.said(Failed)
    assert "model/0.weight changed by something else than an optimizer's step" in str(failed)
    assert [one.step for one in loop.snapshots()] == [2]
    for _ in range(4):  # Both arenas are free again, and nothing of the torn copy is relied on.
        loop.train(1)
        loop.run.wait()
    assert [one.step for one in loop.snapshots()] == [8, 6, 5, 2]
    weight = loop.model[0].weight.clone()
    loop.run.close()
    assert not verify(Chain(store)).findings
    fresh = Loop(store)
    assert torch.equal(fresh.model[0].weight, weight)
    fresh.run.close()


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("keeper", ["thread", "process"])
@pytest.mark.parametrize("frozen", [False, True])
def test_what_was_handed_over_and_is_not_agreed_on_becomes_no_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeper: str, frozen: bool
) -> None:
    """Nothing is ended before the ranks have agreed; the steps of such a take are logged all the same."""
    store: Any = MemoryStore() if keeper == "thread" else LocalStore(tmp_path / "chain")
    why, asked = "", []

    def agree(sample: bytes, then: Callable[[str], None]) -> None:
        asked.append([one.step for one in loop.snapshots()])
        then(why)

    monkeypatch.setattr(Run, "_agree_of", lambda run, number: agree)
    monkeypatch.setattr(steplog, "SEAL_S", 0.0)
    loop = Loop(store, frozen=frozen, every="1 steps")
    for why in ("", "they differ", "", "they differ", "they differ", ""):  # noqa: B007
        loop.train(1)
        loop.run.wait()
    assert asked == [[], [1], [1], [3, 1], [3, 1], [3, 1]]
    assert [event.why for event in loop.said(Failed) if isinstance(event, Failed)] == ["they differ"] * 3
    assert loop.states() == [
        one for step, one in enumerate(reference(6, frozen=frozen, every="1 steps"), 1) if step in {1, 3, 6}
    ]
    assert not verify(Chain(store)).findings
    log = steplog.StepLog(Chain(store), "main", 1)
    assert list(log.after(0)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("ahead")
def test_a_keeper_that_fails_while_the_state_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure is told, what is copied meanwhile goes nowhere, and the next snapshot is a whole one."""
    monkeypatch.setattr(packing, "PACK_BYTES", 4096)
    store = MemoryStore()
    loop = Loop(store, every="1 steps")
    real, fails = store.put, True

    def put(key: str, parts: Any) -> bool:
        if fails and key.startswith(keys.PACKS):
            raise Unavailable("no room", kept="what was there")
        return real(key, parts)

    monkeypatch.setattr(store, "put", put)
    loop.train(1)
    with pytest.raises(Unavailable, match="no room"):
        loop.run.wait()
    fails = False
    for _ in range(3):
        loop.train(1)
        loop.run.wait()
    assert loop.states() == reference(4, every="1 steps")[1:]
    assert not verify(Chain(store)).findings


def test_a_snapshot_that_is_not_handed_over_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer's step waits for the copy; `wait` for all that comes after it, too."""
    encoding = threading.Event()
    real = capture.values.encode

    def held(tree: Any) -> bytes:
        if threading.current_thread() is not threading.main_thread():
            encoding.wait()
        return real(tree)

    monkeypatch.setattr(capture.values, "encode", held)
    loop = Loop(every="2 steps")
    loop.train(2)
    loop.step()
    assert not loop.run.wait(timeout=0.01)
    encoding.set()
    assert loop.run.wait()
    assert [one.step for one in loop.snapshots()] == [2]
    loop.run.close()


def test_a_trigger_is_skipped_while_a_capture_goes_on(gate: threading.Event) -> None:
    loop = Loop(every="1 steps")
    loop.train(1)
    loop.run.tick()  # An accumulating step: no optimizer has waited for the first capture.
    assert [event.step for event in loop.said(Missed)] == [2]  # type: ignore[attr-defined]
    gate.set()
    loop.run.close()
    assert [one.step for one in loop.snapshots()] == [2, 1]


@pytest.mark.parametrize("how", ["in place", "behind torch's back"])
def test_what_changes_while_it_is_copied_becomes_no_snapshot(gate: threading.Event, how: str) -> None:
    loop = Loop(every="2 steps")
    loop.train(2)
    weight = loop.model[0].weight
    with torch.no_grad():
        (weight if how == "in place" else weight.data).mul_(0.5)
    gate.set()
    loop.run.wait()
    (failed,) = loop.said(Failed)
    assert "model/0.weight changed by something else than an optimizer's step" in str(failed)
    assert not list(loop.snapshots())
    # The next step's end takes one, and the loop waits for the copy from now on.
    gate.clear()
    loop.step()
    loop.run.tick()
    loop.run.wait()
    (taken,) = loop.snapshots()
    assert taken.step == 3
    loop.run.close()
    fresh = Loop(loop.store)
    assert torch.equal(fresh.model[0].weight, weight)
    fresh.run.close()


def test_who_waits_for_a_snapshot_that_was_torn_is_told(gate: threading.Event) -> None:
    loop = Loop()
    loop.train(1)
    batches = iter(loop.run.steps([1, 2, 3]))
    next(batches)
    pending = loop.run.take()
    next(batches)
    loop.model[0].weight.data.zero_()
    gate.set()
    with pytest.raises(Unavailable, match="overlap=False"):
        pending.durable()
    batches.close()
    loop.run.close()


def test_gradients_of_an_accumulation_are_captured_at_once(gate: threading.Event) -> None:
    """They change in the next backward, before any optimizer's step."""
    loop = Loop(every="2 steps")
    loop.train(1)
    loop.backward()
    gradient = loop.model[3].weight.grad.clone()
    loop.run.tick()
    loop.backward()
    gate.set()
    loop.run.close()
    fresh = Loop(loop.store, resume="step:2")
    assert torch.equal(fresh.model[3].weight.grad, gradient)
    fresh.run.close()


def test_buffers_are_captured_at_once(gate: threading.Event) -> None:
    loop = Loop(every="1 steps")
    loop.train(1)
    mean = loop.model[2].running_mean.clone()
    loop.model(torch.randn(8, WIDTH))
    assert not torch.equal(loop.model[2].running_mean, mean)
    gate.set()
    loop.run.close()
    fresh = Loop(loop.store)
    assert torch.equal(fresh.model[2].running_mean, mean)
    fresh.run.close()


def test_without_overlap_nothing_is_copied_beside_the_loop(gate: threading.Event) -> None:
    loop = Loop(every="1 steps", overlap=False)
    loop.train(2)
    loop.run.close()
    assert [one.step for one in loop.snapshots()] == [2, 1]


def test_a_snapshot_asked_for_between_steps_is_captured_when_take_returns(gate: threading.Event) -> None:
    loop = Loop()
    loop.train(1)
    pending = loop.run.take()
    assert pending.released
    loop.model[0].weight.data.zero_()
    assert pending.durable()
    assert loop.states() == reference(1, every="1 steps")


def copied_names(monkeypatch: pytest.MonkeyPatch, loop: Loop) -> list[set[int]]:
    """Which parameters of the frozen layer each capture copies, by address."""
    frozen = {one.data_ptr() for one in loop.model[0].parameters()}
    found: list[set[int]] = []
    real = capture.copy

    def watched(pairs: Any) -> None:
        found.append({source.data_ptr() for _, source in pairs if isinstance(source, torch.Tensor)} & frozen)
        real(pairs)

    monkeypatch.setattr(capture, "copy", watched)
    return found


def test_frozen_parameters_are_copied_once_into_each_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(frozen=True, every="1 steps")
    copied = copied_names(monkeypatch, loop)
    for _ in range(6):
        loop.train(1)
        loop.run.wait()
    assert sum(map(len, copied)) <= 4, copied  # Two parameters, two arenas.
    states = loop.states()
    assert states == reference(6, frozen=True, every="1 steps")


def test_a_frozen_parameter_that_changes_is_captured() -> None:
    loop = Loop(frozen=True, every="1 steps")
    weight = loop.model[0].weight
    for _ in range(4):
        loop.train(1)
        loop.run.wait()
    with torch.no_grad():
        weight.add_(1)  # Torch counts this: the next snapshot has it.
    loop.train(1)
    loop.run.wait()
    loop.run.close()
    fresh = Loop(loop.store, frozen=True)
    assert torch.equal(fresh.model[0].weight, weight)
    fresh.run.close()


def test_a_frozen_parameter_that_changes_behind_torchs_back_is_found_in_time() -> None:
    loop = Loop(frozen=True, every="1 steps")
    weight = loop.model[0].weight
    for _ in range(4):
        loop.train(1)
        loop.run.wait()
    weight.data.add_(1)
    for _ in range(2 * capture.LOOK_AGAIN):  # Each arena's copy is looked at in turns.
        loop.train(1)
        loop.run.wait()
    assert any("model/0.weight is frozen, and changed" in str(event) for event in loop.said(Warned))
    loop.run.close()
    fresh = Loop(loop.store, frozen=True)
    assert torch.equal(fresh.model[0].weight, weight)
    fresh.run.close()


def test_paranoid_proves_each_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERSTEP_PARANOID", "1")
    sound = Loop(every="1 steps")
    sound.train(3)
    sound.run.close()
    real = capture.copy

    def forgetful(pairs: Any) -> None:
        real([pair for pair in pairs if getattr(pair[1], "data_ptr", int)() != exp_avg.data_ptr()])

    loop = Loop(every="2 steps")
    loop.train(1)
    exp_avg = loop.optimizer.state[loop.model[3].weight]["exp_avg"]
    monkeypatch.setattr(capture, "copy", forgetful)
    loop.train(1)
    with pytest.raises(
        Damaged, match="optimizer/state/4/exp_avg before the optimizer's step: not what was captured"
    ):
        loop.step()
    loop.run.close()


# -- in waves ----------------------------------------------------------------------------------------------


def test_a_state_larger_than_the_arenas_goes_through_them_in_waves() -> None:
    whole = Loop(every="1 steps")
    whole.train(2)
    small = Loop(every="1 steps", max_arena_bytes="4MB")
    small.train(2)
    small.run.wait()
    size = next(small.snapshots()).record.logical_bytes
    assert size > 4_000_000
    (said,) = small.said(Warned)
    assert "are more than the 4.0 MB that arenas may take: snapshots stream through them" in str(said)
    assert small.states()[-1:] == whole.states()[-1:]
    fresh = Loop(small.store, max_arena_bytes="4MB")
    for one, other in zip(fresh.model.state_dict().values(), small.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    fresh.run.close()


def test_a_limit_that_nothing_fits_in_is_refused_by_name() -> None:
    loop = Loop(every="1 steps", max_arena_bytes="100kB")
    for action in (lambda: loop.train(1), loop.run.close):
        with pytest.raises(Unsupported, match=r"this state needs waves of .* Next: max_arena_bytes="):
            action()
