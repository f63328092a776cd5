"""Capture from a device, on a fake one: what is captured is the state where the step ended, in whatever order
the device's streams go on; and every single one of the things that order them is needed for that."""

from __future__ import annotations

import gc
import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from fake_device import FakeDevice, FakeEvent, Order, Stuck
from torch import nn

from everstep.chain.history import Chain
from everstep.events import Event, Failed
from everstep.format.layout import Layout
from everstep.run import taking
from everstep.run.session import Run
from everstep.run.settings import Settings
from everstep.state import capture as capture_module
from everstep.state import streams
from everstep.state.capture import LOOK_AGAIN, Capture, Capturer
from everstep.state.collecting import Collector
from everstep.state.copying import Witness
from everstep.state.devices import PageLock
from everstep.state.streams import Side
from everstep.store.memory import MemoryStore

pytestmark = pytest.mark.slow

ORDERS: list[tuple[Order, int]] = [
    ("computing first", 0),
    ("copies first", 0),
    ("at once", 1),
    *[("any", seed) for seed in range(3)],  # type: ignore[list-item]
]
STEPS = 4
WIDTH = 530  # The weight of such a layer is more than a mebibyte, so it is copied by itself.
CPU = torch.device("cpu")


class Net(nn.Module):
    """Small and large parameters, one whose memory is not in order, a frozen one, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, WIDTH)
        self.turned = nn.Parameter(torch.randn(WIDTH + 1, WIDTH).t())
        self.frozen = nn.Parameter(torch.randn(WIDTH, WIDTH + 2).t(), requires_grad=False)
        self.few = nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, 3), nn.Linear(3, 1)])
        self.short = nn.Parameter(torch.randn(7).to(torch.bfloat16))
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(torch.tanh(self.wide(batch))) @ self.turned
        small = hidden[:, :3]
        for layer in self.few:
            small = torch.tanh(layer(small))
        return small.square().mean() + hidden.square().mean() + self.short.float().sum().square()


class Training:
    """A training on the host, or on fake devices: the first has the model, the last what else there is."""

    def __init__(self, *devices: FakeDevice, model: Callable[[], nn.Module] = Net) -> None:
        torch.manual_seed(11)
        self.devices = devices
        self.collector = Collector()
        self.model = model()
        # Not changed by an optimizer: a tensor that each forward writes to, and views that are stored as
        # something else than what lies in memory.
        plain = torch.randn(WIDTH, WIDTH, dtype=torch.complex64)
        self.extra = {
            "seen": torch.zeros(9),
            "conjugate": plain.conj(),
            "few": plain[:2, :3].conj(),
            "negative": plain[:, 7].conj().imag,
        }
        if devices:
            devices[0].adopt_module(self.model)
            devices[-1].adopt(self.extra["seen"], plain)
        with self.here():
            self.optimizer = torch.optim.AdamW(
                [one for one in self.model.parameters() if one.requires_grad], lr=0.01
            )

    def here(self) -> ExitStack:
        """Within it, what is done with tensors of the devices is asked of them."""
        stack = ExitStack()
        for device in self.devices:
            stack.enter_context(device.here())
        return stack

    def backward(self, step: int) -> None:
        batch = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))
        if self.devices:
            self.devices[0].adopt(batch)
        self.model(batch).backward()
        self.extra["seen"].add_(step + 0.5)
        self.extra["seen"].mul_(1.25)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def collected(self) -> Any:
        objects = {"model": self.model, "optimizer": self.optimizer, "extra": self.extra}
        return self.collector.collect(objects, position=None, progress={}, generators={"none": 0})

    def drain(self) -> None:
        for device in self.devices:
            device.drain()


def arena(size_bytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size_bytes))


def eager(training: Training) -> tuple[bytes, bytes]:
    """The arena and the values of a state of the host."""
    capturer = Capturer()
    collected = training.collected()
    layout = capturer.layout(collected)
    memory = arena(layout.arena_bytes)
    capture = capturer.begin(collected, layout, memory, overlap=False, then=lambda _: None)
    assert capture.error is None
    return bytes(memory), capture.values


@pytest.fixture(scope="module")
def reference() -> list[tuple[bytes, bytes]]:
    """What is to be captured after each step."""
    training = Training()
    found = []
    for step in range(STEPS):
        training.backward(step)
        training.update()
        found.append(eager(training))
    return found


@pytest.fixture(autouse=True)
def capturers() -> Iterator[list[Capturer]]:
    """Those of a test; their threads end with it."""
    yield Overlapped.capturers
    while Overlapped.capturers:
        Overlapped.capturers.pop().close()


class Overlapped:
    """Takes a snapshot after each step, of a training whose devices do what they are asked as late, or in as
    strange an order, as they may."""

    capturers: ClassVar[list[Capturer]] = []

    def __init__(self, training: Training) -> None:
        self.training = training
        self.capturer = Capturer(self._accelerator_of)
        self.capturers.append(self.capturer)
        self.arenas: list[memoryview] = []
        self.captures: list[Capture] = []
        self.found: list[tuple[bytes, bytes]] = []
        self.layout: Layout | None = None
        self.between: Callable[[], object] = lambda: None
        """What happens after each forward and backward."""

    def _accelerator_of(self, tensor: torch.Tensor) -> FakeDevice | None:
        return next((one for one in self.training.devices if one.owns(tensor)), None)

    def begin(self, overlap: bool = True) -> Capture:
        """As at the end of a step. When it returns, the copies are asked for and none need have been done."""
        for device in self.training.devices:
            device.is_waited_for.clear()
            if overlap:
                device.may_finish.clear()
        collected = self.training.collected()
        self.layout = self.capturer.layout(collected)
        while len(self.arenas) < 2:
            self.arenas.append(arena(self.layout.arena_bytes))
        memory = self.arenas[len(self.captures) % 2]
        capture = self.capturer.begin(collected, self.layout, memory, overlap=overlap, then=lambda _: None)
        self.captures.append(capture)
        if overlap:
            assert self.training.devices[0].is_waited_for.wait(60)
        return capture

    def finish(self) -> None:
        """Let the devices do what the capture waits for."""
        for device in self.training.devices:
            device.may_finish.set()
        capture = self.captures[-1]
        assert capture.done.wait(60)
        if capture.error is not None:
            raise capture.error
        self.found.append((bytes(self.arenas[(len(self.captures) - 1) % 2]), capture.values))

    def train(self, steps: int = STEPS) -> Overlapped:
        with self.training.here():
            for step in range(steps):
                self.training.backward(step)
                self.between()
                if self.captures:
                    self.captures[-1].fence()
                self.training.update()
                if self.captures:
                    self.finish()
                self.begin()
            self.training.backward(steps)
            self.captures[-1].fence()
            self.training.update()
            self.finish()
        self.capturer.close()
        self.training.drain()
        return self

    def torn(self, reference: list[tuple[bytes, bytes]]) -> set[str]:
        """The leaves that were captured as something else than they were; "" for what lies between them."""
        assert self.layout is not None
        wrong: set[str] = set()
        for (memory, values), (expected, expected_values) in zip(self.found, reference, strict=False):
            assert values == expected_values
            if memory == expected:
                continue
            differing = set()
            for one, (region, offset) in zip(self.layout.slices, self.layout.places, strict=True):
                start = self.layout.regions[region].offset + offset
                if memory[start : start + one.size_bytes] != expected[start : start + one.size_bytes]:
                    differing.add(one.name)
            wrong |= differing or {""}
        return wrong

    def changed(self) -> set[str]:
        return {name for capture in self.captures for name in capture.changed}


# -- in any order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_what_is_captured_is_the_state_where_the_step_ended(
    order: Order, seed: int, reference: list[tuple[bytes, bytes]]
) -> None:
    device = FakeDevice(order, seed)
    taken = Overlapped(Training(device)).train()
    assert taken.torn(reference) == set()
    assert taken.changed() == set()
    assert len(taken.found) == STEPS
    assert not device.misused
    assert device.done_copies == device.asked_copies > 0


@pytest.mark.parametrize(("order", "seed"), ORDERS[:4])
def test_each_device_of_a_state_has_its_own_order(
    order: Order, seed: int, reference: list[tuple[bytes, bytes]]
) -> None:
    devices = FakeDevice(order, seed), FakeDevice("any", seed + 1)
    taken = Overlapped(Training(*devices)).train()
    assert taken.torn(reference) == set()
    assert all(one.done_copies and len(one.streams) == 2 and not one.misused for one in devices)


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_without_overlap_all_is_there_at_once(
    order: Order, seed: int, reference: list[tuple[bytes, bytes]]
) -> None:
    taken = Overlapped(Training(FakeDevice(order, seed)))
    with taken.training.here():
        for step in range(STEPS):
            taken.training.backward(step)
            taken.training.update()
            assert taken.begin(overlap=False).copied.is_set()
            taken.finish()
    assert taken.torn(reference) == set()


@pytest.mark.parametrize("buffer_bytes", [64 * 1024, 700_000])
def test_a_small_buffer_will_do(
    buffer_bytes: int, reference: list[tuple[bytes, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "BUFFER_BYTES", buffer_bytes)
    taken = Overlapped(Training(FakeDevice("any", 3))).train()
    assert taken.torn(reference) == set()


def test_a_device_that_is_almost_full_is_copied_in_smaller_pieces(
    reference: list[tuple[bytes, bytes]],
) -> None:
    training = Training(FakeDevice("computing first"))
    taken = Overlapped(training)
    with training.here():
        training.backward(0)
        training.update()
        training.devices[0].room_bytes = 100_000
        taken.begin()
        taken.finish()
    assert taken.torn(reference) == set()


def test_a_loop_that_waits_for_all_waits_for_the_device(
    reference: list[tuple[bytes, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEvent, "synchronize", lambda self: None)
    taken = Overlapped(Training(FakeDevice("copies first")))
    with taken.training.here():
        taken.training.backward(0)
        taken.training.update()
        taken.begin(overlap=False)
        taken.finish()
    assert {"model/wide.weight", "model/few.0.weight", "extra/seen"} <= taken.torn(reference)


# -- what orders the streams ------------------------------------------------------------------------------

Mutation = Callable[[pytest.MonkeyPatch], None]


def no_follow(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Side, "follow", lambda self: None)


def no_mark_at_begin(patch: pytest.MonkeyPatch) -> None:
    fencing: list[bool] = []
    fence, hold_back = Capture.fence, Side.hold_back

    def fence_only(self: Capture) -> None:
        fencing.append(True)
        fence(self)
        fencing.pop()

    patch.setattr(Capture, "fence", fence_only)
    patch.setattr(Side, "hold_back", lambda self, mark: hold_back(self, mark) if fencing else None)


def no_mark_at_the_fence(patch: pytest.MonkeyPatch) -> None:
    note = Capture.note_asked
    patch.setattr(Capture, "note_asked", lambda self, marks: note(self, ()))


def no_wait_for_the_device(patch: pytest.MonkeyPatch) -> None:
    def hurried(self: FakeEvent) -> None:
        self._device.is_waited_for.set()
        self._device.may_finish.wait()

    patch.setattr(FakeEvent, "synchronize", hurried)


def held_too_early(patch: pytest.MonkeyPatch) -> None:
    finish = capture_module._finish

    def hurried(marks: Any, held: Any) -> None:
        capture_module.copy(held)
        finish(marks, ())

    patch.setattr(capture_module, "_finish", hurried)


def gaps_not_cleared(patch: pytest.MonkeyPatch) -> None:
    make = streams.Stretch
    patch.setattr(
        streams, "Stretch", lambda place, gathered, gaps, parts: make(place, gathered, False, parts)
    )


def copies_on_the_computing_stream_of_another_thread(patch: pytest.MonkeyPatch) -> None:
    """The capture's thread has a current stream of its own; to hold back that one holds nothing back."""
    patch.setattr(Side, "hold_back", lambda self, mark: self.accelerator.Stream(CPU).wait_event(mark))


MUTATIONS: list[tuple[Mutation, Order, str]] = [
    (no_follow, "copies first", "optimizer/state/0/exp_avg"),
    (no_mark_at_begin, "computing first", "extra/seen"),
    (no_mark_at_begin, "computing first", "model/norm.running_mean"),
    (no_mark_at_the_fence, "computing first", "model/wide.weight"),
    (no_mark_at_the_fence, "computing first", "optimizer/state/5/exp_avg_sq"),
    (no_wait_for_the_device, "copies first", "optimizer/state/0/step"),
    (held_too_early, "computing first", "optimizer/state/3/step"),
    (gaps_not_cleared, "any", ""),
    (copies_on_the_computing_stream_of_another_thread, "computing first", "model/turned"),
]


@pytest.mark.parametrize(
    ("mutation", "order", "leaf"), MUTATIONS, ids=[f"{one.__name__}-{leaf}" for one, _, leaf in MUTATIONS]
)
def test_without_any_one_of_them_a_copy_is_torn(
    mutation: Mutation,
    order: Order,
    leaf: str,
    reference: list[tuple[bytes, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutation(monkeypatch)
    taken = Overlapped(Training(FakeDevice(order)))
    taken.train(2)
    assert leaf in taken.torn(reference)


def test_a_step_that_no_fence_held_back_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    no_mark_at_the_fence(monkeypatch)
    taken = Overlapped(Training(FakeDevice("computing first"))).train()
    assert "model/wide.weight" in taken.changed()


def test_only_as_the_fence_settles_it_the_step_is_not_mistaken_for_a_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is counted by torch before the device has copied what was there before it."""
    monkeypatch.setattr(Capture, "fence", lambda self: [side.hold_back(mark) for side, mark in self._marks])
    taken = Overlapped(Training(FakeDevice("computing first"))).train()
    assert "model/wide.weight" in taken.changed()


@pytest.mark.parametrize("how", ["in place", "behind torch's back"])
def test_what_changes_while_it_is_copied_is_noticed(how: str) -> None:
    training = Training(FakeDevice("computing first"))
    taken = Overlapped(training)

    def write() -> None:
        weight = training.model.few[1].weight
        with torch.no_grad():
            (weight if how == "in place" else weight.data).mul_(0.5)

    taken.between = write
    taken.train(2)
    assert taken.changed() == {"model/few.1.weight"}


def test_freed_memory_is_found_by_the_fake_device() -> None:
    device = FakeDevice("computing first")
    tensor = torch.ones(8)
    device.adopt(tensor)
    side, there = device.Stream(CPU), torch.zeros(8)
    with device.stream(side):
        there.copy_(tensor, non_blocking=True)
    del tensor
    device.drain()
    assert len(device.misused) == 1


def test_what_the_loop_lets_go_of_is_held_until_it_is_copied(reference: list[tuple[bytes, bytes]]) -> None:
    device = FakeDevice("computing first")
    training = Training(device)
    taken = Overlapped(training)
    with training.here():
        training.backward(0)
        training.update()
        taken.begin()
        del training.model, training.optimizer, training.extra
        gc.collect()
        taken.finish()
    assert taken.torn(reference) == set()
    assert not device.misused


def test_streams_that_wait_for_each_other_are_found_by_the_fake_device() -> None:
    device = FakeDevice()
    side = device.Stream(CPU)
    event = device.Event()
    side.wait_stream(device.computing)
    device.computing.put(side.ticket())
    event.record(side)
    side.queue[0] = device.computing.ticket()
    with pytest.raises(Stuck):
        event.synchronize()


# -- what the loop waits for ------------------------------------------------------------------------------


def test_the_loop_goes_on_while_no_copy_is_done(reference: list[tuple[bytes, bytes]]) -> None:
    device = FakeDevice("computing first")
    training = Training(device)
    taken = Overlapped(training)
    with training.here():
        training.backward(0)
        training.update()
        capture = taken.begin()
        training.backward(1)
        capture.fence()
        training.update()
        assert device.asked_copies > 5
        assert device.done_copies == device.computing.done == 0
        assert not capture.copied.is_set()
        taken.finish()
    assert taken.torn(reference) == set()


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(5))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.one.square().sum()


def test_a_small_state_of_a_device_is_copied_beside_the_loop_too() -> None:
    """The host's is not: it takes less time than a thread. A device first does what it was asked before."""
    host, device = Training(model=Tiny), Training(FakeDevice("computing first"), model=Tiny)
    for one in (host, device):
        with one.here():
            one.backward(0)
            one.update()
        one.extra.clear()
    collected = host.collected()
    capturer = Capturer()
    layout = capturer.layout(collected)
    memory = arena(layout.arena_bytes)
    assert capturer.begin(collected, layout, memory, overlap=True, then=lambda _: None).done.is_set()
    taken = Overlapped(device)
    with device.here():
        assert not taken.begin().copied.is_set()
        assert device.devices[0].computing.done == 0
        taken.finish()
    assert taken.torn([(bytes(memory), taken.captures[0].values)]) == set()


class Crowd(nn.Module):
    """Hundreds of small parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.ParameterList([nn.Parameter(torch.randn(3 + number % 5)) for number in range(400)])

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.cat(list(self.all)).square().sum()


def test_many_small_tensors_are_copied_together() -> None:
    host, device = Training(model=Crowd), FakeDevice("any", 2)
    taken = Overlapped(Training(device, model=Crowd))
    host.backward(0)
    host.update()
    expected = [eager(host)]
    with taken.training.here():
        taken.training.backward(0)
        taken.training.update()
        # Adam's step counts, the host's, lie between all of them.
        assert not device.owns(taken.training.optimizer.state[taken.training.model.all[0]]["step"])
        taken.begin()
        taken.finish()
    assert taken.torn(expected) == set()
    assert device.asked_copies < 10


# -- frozen parameters ------------------------------------------------------------------------------------


def copied_by(device: FakeDevice, taken: Overlapped) -> int:
    before = device.asked_copies
    with taken.training.here():
        taken.begin()
        taken.finish()
    return device.asked_copies - before


def test_frozen_parameters_are_copied_once_into_each_arena(reference: list[tuple[bytes, bytes]]) -> None:
    device = FakeDevice("any")
    training = Training(device)
    taken = Overlapped(training)
    with training.here():
        training.backward(0)
        training.update()
    copies = [copied_by(device, taken) for _ in range(4)]
    assert copies[0] == copies[1] == copies[2] + 1 == copies[3] + 1
    assert taken.torn([reference[0]] * 4) == set()
    (frozen,) = (number for number, region in enumerate(taken.layout.regions) if region.kin == "frozen")
    assert [one.unchanged for one in taken.captures] == [frozenset()] * 2 + [frozenset([frozen])] * 2


@pytest.mark.parametrize("element", [0, WIDTH * (WIDTH + 2) // 2, -1])
def test_a_frozen_parameter_that_changes_behind_torchs_back_is_found_in_time(
    element: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "BUFFER_BYTES", 128 * 1024)  # It is compared in pieces.
    host, device = Training(), FakeDevice("any", 1)
    training = Training(device)
    taken = Overlapped(training)
    for one in (host, training):
        with one.here():
            one.backward(0)
            one.update()
    for _ in range(2):
        copied_by(device, taken)
    for one in (host, training):
        with one.here():
            one.model.frozen.data.t().view(-1)[element].add_(1)
    for _ in range(2 * LOOK_AGAIN):
        copied_by(device, taken)
    expected = eager(host)
    seen = [one.stale for one in taken.captures].index(["model/frozen"])
    assert taken.found[seen - 1] != expected
    assert taken.found[seen:] == [expected] * (len(taken.found) - seen)  # The other arena's too.


# -- paranoid ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["computing first", "copies first", "any"])
def test_differences_are_those_at_the_fence(order: Order) -> None:
    training = Training(FakeDevice(order))
    taken = Overlapped(training)
    with training.here():
        training.backward(0)
        training.update()
        capture = taken.begin()
        training.backward(1)
        capture.fence()
        taken.finish()
        assert capture.differences() == []
        training.optimizer.state[training.model.turned]["exp_avg"].data[3, 4] += 1
        assert capture.differences() == ["optimizer/state/0/exp_avg"]


# -- locked pages -----------------------------------------------------------------------------------------


def test_each_arena_is_locked_once_and_as_long_as_it_is_used() -> None:
    device = FakeDevice("any")
    training = Training(device)
    taken = Overlapped(training)
    with training.here():
        training.backward(0)
        training.update()
    for _ in range(3):
        copied_by(device, taken)
    assert sorted(device.runtime.locked.values()) == [len(one) for one in taken.arenas]
    with training.here():
        training.extra["another"] = torch.ones_like(
            training.extra["seen"]
        )  # Another layout, the same arenas.
    copied_by(device, taken)
    assert len(device.runtime.locked) == 2
    taken.capturer.close()
    assert not device.runtime.locked


def test_arenas_that_became_too_small_are_let_go_of_before_larger_ones_are_made() -> None:
    device = FakeDevice("any")
    training = Training(device)
    taken = Overlapped(training)
    with training.here():
        training.backward(0)
        training.update()
    for _ in range(2):
        copied_by(device, taken)
    with training.here():
        training.extra["another"] = torch.ones_like(training.model.wide.weight)
    taken.capturer._beside.close()  # Its thread has let go of the last capture when it has ended.
    taken.capturer.layout(training.collected())
    assert not device.runtime.locked
    for memory in taken.arenas:
        memory.release()  # Raises where something still looks into it.


def test_an_arena_that_cannot_be_locked_is_told_of_once_and_all_is_well(
    reference: list[tuple[bytes, bytes]],
) -> None:
    device = FakeDevice("any")
    device.runtime.refuses = True
    taken = Overlapped(Training(device)).train()
    assert taken.torn(reference) == set()
    assert not device.runtime.blamed
    remarks = [remark for one in taken.captures for remark in one.remarks]
    assert remarks == ["an arena's pages could not be locked (error 2): copies are slower"] * 2


def test_a_device_without_that_runtime_is_copied_from_all_the_same() -> None:
    class Bare:
        def cudart(self) -> Any:
            raise AttributeError("no cudart")

    assert PageLock(arena(4096), Bare()).error == "no cudart"  # type: ignore[arg-type]


# -- errors -----------------------------------------------------------------------------------------------


def test_a_capture_that_fails_leaves_no_copy_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arena will be another capture's, or nobody's."""
    device = FakeDevice("computing first")
    training = Training(device)
    taken = Overlapped(training)

    def broken(self: Witness, copies: Any) -> list[str]:
        raise RuntimeError("broken")

    def copy(pairs: Any) -> None:
        raise RuntimeError("broken too")

    with training.here():
        training.backward(0)
        training.update()
        with monkeypatch.context() as patch:
            patch.setattr(Witness, "changed", broken)
            capture = taken.begin()
            with pytest.raises(RuntimeError, match="broken"):
                taken.finish()
        assert device.done_copies == device.asked_copies
        capture.fence()  # Returns.
        monkeypatch.setattr(capture_module, "copy", copy)
        with pytest.raises(RuntimeError, match="broken too"):
            taken.begin(overlap=False)
        assert device.done_copies == device.asked_copies


# -- a whole run ------------------------------------------------------------------------------------------


def states(monkeypatch: pytest.MonkeyPatch, *devices: FakeDevice, overlap: bool) -> list[str]:
    training = Training(*devices)
    events: list[Event] = []
    if devices:
        monkeypatch.setattr(taking, "Capturer", partial(Capturer, devices[0].accelerator_of))
    store = MemoryStore()
    settings = Settings(store, every="1 steps", keep="all", overlap=overlap)
    objects = {"model": training.model, "optimizer": training.optimizer}
    torch.manual_seed(0)
    with training.here():
        run = Run(settings, objects, sink=events.append)
        for step in range(STEPS):
            training.backward(step)
            training.update()
            run.tick()
            run.wait()  # So that the next finds room.
        run.close()
    assert not [event for event in events if isinstance(event, Failed)]
    return [one.record.state for one in Chain(store).snapshots()]


@pytest.fixture(scope="module")
def host_states() -> Iterator[list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVERSTEP_KEEPER", "thread")
        yield states(patch, overlap=False)


@pytest.mark.parametrize("overlap", [True, False], ids=["overlapped", "eager"])
@pytest.mark.parametrize(("order", "seed"), ORDERS[:4])
def test_a_run_on_a_device_takes_what_one_on_the_host_takes(
    order: Order, seed: int, overlap: bool, host_states: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(set(host_states)) == STEPS
    assert states(monkeypatch, FakeDevice(order, seed), overlap=overlap) == host_states


def test_the_host_leaves_of_a_mixed_state_are_copied_before_the_fence_opens(
    monkeypatch: pytest.MonkeyPatch, reference: list[tuple[bytes, bytes]]
) -> None:
    """Adam's step counts, which its step changes on the host, at once."""
    training = Training(FakeDevice("computing first"))
    taken = Overlapped(training)
    fencing, copied = threading.Event(), []
    hold = streams.Plan.hold

    def late(self: streams.Plan, host: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            fencing.wait(60)
            copied.append(True)
        return hold(self, host)

    monkeypatch.setattr(streams.Plan, "hold", late)
    with training.here():
        training.backward(0)
        training.update()
        for device in training.devices:
            device.may_finish.clear()
        collected = training.collected()
        layout = taken.layout = taken.capturer.layout(collected)
        memory = arena(layout.arena_bytes)
        capture = taken.capturer.begin(collected, layout, memory, overlap=True, then=lambda _: None)
        assert not copied
        fencing.set()
        capture.fence()
        assert copied
        training.update()
        training.devices[0].may_finish.set()
        assert capture.done.wait(60)
    taken.found.append((bytes(memory), capture.values))
    assert taken.torn(reference) == set()
