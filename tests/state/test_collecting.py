"""A look at a state by who has looked before: it must find what a first look finds, whatever was done in
between, and where nothing was done the same objects."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from everstep.errors import Mismatch
from everstep.state.capture import Capture, Capturer
from everstep.state.collecting import Collected, Collector


class Net(nn.Module):
    """Of every kind of leaf that a module has, tied weights among them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(3, 5).requires_grad_(False)
        self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.register_buffer("kept", torch.arange(5.0))
        self.register_buffer("passing", torch.arange(7.0), persistent=False)
        self.register_buffer("absent", None)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.tied(self.second(self.first(batch))).square().mean() + self.phase.abs().sum()


class Training:
    def __init__(self) -> None:
        torch.manual_seed(5)
        self.model: Any = Net()
        trained = [one for one in self.model.parameters() if one.requires_grad]
        self.optimizer: Any = torch.optim.AdamW(
            [{"params": trained[:3]}, {"params": trained[3:], "lr": torch.tensor(0.02)}], lr=0.01
        )
        self.extra = {"seen": torch.zeros(3), "words": [1, 2, "three"], "mixed": [1, torch.ones(2)]}
        self.history = [torch.ones(2)]
        self.step()

    @property
    def objects(self) -> dict[str, object]:
        return {"model": self.model, "optimizer": self.optimizer, "extra": self.extra}

    def step(self) -> None:
        self.model(torch.randn(4, 6)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.extra["seen"] = torch.randn(3)


def look(collector: Collector, training: Training) -> Collected:
    return collector.collect(training.objects, position=None, progress={"step": 1}, generators={"none": 0})


def plain(tree: Any) -> Any:
    """A tree of values with their types, to be compared."""
    if isinstance(tree, dict):
        return type(tree), [(key, plain(item)) for key, item in tree.items()]
    if isinstance(tree, list | tuple):
        return type(tree), [plain(item) for item in tree]
    return type(tree), tree


def assert_same(found: Collected, expected: Collected) -> None:
    assert list(found.leaves) == list(expected.leaves)
    assert found.rows() == expected.rows()
    for name, tensor in expected.leaves.items():
        assert isinstance(tensor, torch.Tensor)
        other = found.leaves[name]
        assert isinstance(other, torch.Tensor)
        assert torch.equal(other, tensor), name
        assert other.is_conj() == tensor.is_conj(), name
        if name in found.sorts.lasting:
            assert other.data_ptr() == tensor.data_ptr(), name
    assert plain(found.tree) == plain(expected.tree)
    for fact in ("kin", "late", "watched", "frozen"):
        assert getattr(found.sorts, fact) == getattr(expected.sorts, fact), fact


Change = Callable[[Training], object]


def other_memory(training: Training) -> None:
    training.model.first.weight.data = training.model.first.weight.data.clone()


def other_dtype(training: Training) -> None:
    training.model.second[1].running_mean = training.model.second[1].running_mean.double()


def other_shape(training: Training) -> None:
    training.model.kept.data = torch.arange(9.0)


def resized(training: Training) -> None:
    training.model.kept.resize_(2)


def other_storage(training: Training) -> None:
    training.model.kept.set_(torch.arange(10.0).untyped_storage(), 2, (5,), (1,))


def transposed(training: Training) -> None:
    weight = training.model.second[0].weight
    weight.data = weight.data.t()


def conjugated(training: Training) -> None:
    training.model.phase.data = training.model.phase.data.conj()


def all_at_half(training: Training) -> None:
    training.model.frozen.half()


def parametrized(training: Training) -> None:
    parametrize.register_parametrization(training.model.second[0], "weight", nn.Tanh())


def renamed(training: Training) -> None:
    buffers = training.model._buffers
    buffers["other"] = buffers.pop("kept")


def moved(training: Training) -> None:
    buffers = training.model._buffers
    training.model.first._buffers["kept"] = buffers.pop("kept")


def same_bits_of_another_dtype(training: Training) -> None:
    training.model.kept.data = training.model.kept.data.view(torch.int32)


def last_one_renamed(training: Training) -> None:
    buffers = training.model.second[1]._buffers
    buffers["count"] = buffers.pop("num_batches_tracked")


def other_container(training: Training) -> None:
    training.model._buffers = {**training.model._buffers, "new": torch.ones(2)}


def parameter_as_buffer(training: Training) -> None:
    first = training.model.first
    first._buffers["bias"] = first._parameters.pop("bias")


def kept_no_longer(training: Training) -> None:
    training.model._non_persistent_buffers_set.add("kept")


def kept_from_now_on(training: Training) -> None:
    training.model._non_persistent_buffers_set.clear()


def other_part(training: Training) -> None:
    training.model.second[0] = nn.Linear(6, 6)


def part_without_name(training: Training) -> None:
    training.model.second = training.model.second[0]


def untied(training: Training) -> None:
    training.model.tied.weight = nn.Parameter(training.model.tied.weight.detach().clone())


def tied(training: Training) -> None:
    training.model.second[0].weight = training.model.first.weight


def told_by_a_hook(training: Training) -> None:
    def hook(module: object, state: dict[str, object], *_: object) -> None:
        state["added"] = torch.ones(2)

    training.model.register_state_dict_post_hook(hook)


def told_by_a_hook_of_a_part(training: Training) -> None:
    training.model.second[1].register_state_dict_pre_hook(
        lambda module, *_: module.running_mean.fill_(float(module.num_batches_tracked))
    )


def told_by_itself(training: Training) -> None:
    training.model.state_dict = lambda: {"alone": torch.ones(2)}


def part_told_by_itself(training: Training) -> None:
    class Own(nn.Linear):
        def get_extra_state(self) -> object:
            return {"calls": 3}

    training.model.frozen.__class__ = Own


def frozen(training: Training) -> None:
    training.model.second[0].requires_grad_(False)


def thawed(training: Training) -> None:
    training.model.frozen.requires_grad_(True)


def trained_too(training: Training) -> None:
    training.model.frozen.requires_grad_(True)
    training.optimizer.add_param_group({"params": list(training.model.frozen.parameters())})


def moved_between_groups(training: Training) -> None:
    groups = training.optimizer.param_groups
    groups[0]["params"].append(groups[1]["params"].pop(0))


def swapped(training: Training) -> None:
    params = training.optimizer.param_groups[0]["params"]
    params[0], params[1] = params[1], params[0]


def other_rate(training: Training) -> None:
    training.optimizer.param_groups[0]["lr"] = 0.5
    training.optimizer.param_groups[1]["lr"].fill_(0.25)


def other_setting(training: Training) -> None:
    training.optimizer.param_groups[0]["new"] = [torch.ones(3), "text"]


def loaded(training: Training) -> None:
    training.optimizer.load_state_dict(training.optimizer.state_dict())


def loaded_clones(training: Training) -> None:
    training.model.load_state_dict(
        {k: v.clone() for k, v in training.model.state_dict().items()}, assign=True
    )


def other_moment(training: Training) -> None:
    parameter = training.model.phase
    training.optimizer.state[parameter]["exp_avg"] = torch.ones_like(parameter)


def another_moment(training: Training) -> None:
    training.optimizer.state[training.model.phase]["third"] = torch.ones(2)


def number_as_moment(training: Training) -> None:
    training.optimizer.state[training.model.phase]["count"] = 1


def renamed_moment(training: Training) -> None:
    state = training.optimizer.state[training.model.phase]
    state["average"] = state.pop("exp_avg")


def last_moment_renamed(training: Training) -> None:
    state = training.optimizer.state[training.model.phase]
    state["squares"] = state.pop("exp_avg_sq")


def bare_moment(training: Training) -> None:
    training.optimizer.state[training.model.phase] = torch.tensor(2.0)


def no_moments(training: Training) -> None:
    training.optimizer.state.clear()


def list_as_moment(training: Training) -> None:
    training.optimizer.state[training.model.phase]["history"] = training.history


def optimizer_with_a_hook(training: Training) -> None:
    training.optimizer.register_state_dict_post_hook(lambda _, state: {**state, "more": torch.ones(1)})


def optimizer_by_itself(training: Training) -> None:
    training.optimizer.state_dict = lambda: {"mine": torch.ones(1)}


def other_optimizer(training: Training) -> None:
    training.optimizer = torch.optim.SGD(training.model.second.parameters(), lr=0.1, momentum=0.9)
    training.step()


def other_model(training: Training) -> None:
    training.model = Net()


def state_of_another_kind(training: Training) -> None:
    training.extra = {"seen": torch.zeros(8, dtype=torch.int64), "new": torch.ones(1)}


def shared_with_a_value(training: Training) -> None:
    """What was a leaf with memory of its own is now another's."""
    training.extra["seen"] = training.model.kept


def nothing(training: Training) -> None:
    pass


CHANGES: list[Change] = [
    nothing, other_memory, other_dtype, other_shape, resized, other_storage, transposed, conjugated,
    all_at_half, parametrized, renamed, moved, kept_no_longer, kept_from_now_on, other_part,
    part_without_name, untied, tied, told_by_a_hook, told_by_a_hook_of_a_part, told_by_itself,
    part_told_by_itself, frozen, thawed, trained_too, moved_between_groups, swapped, other_rate,
    other_setting, loaded, loaded_clones, other_moment, another_moment, last_moment_renamed,
    bare_moment, same_bits_of_another_dtype, last_one_renamed, parameter_as_buffer, other_container,
    number_as_moment,
    renamed_moment, no_moments, list_as_moment, optimizer_with_a_hook, optimizer_by_itself,
    other_optimizer, other_model, state_of_another_kind, shared_with_a_value,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: Change) -> None:
    """Right after it, and when values have changed once more."""
    training, collector = Training(), Collector()
    for _ in range(2):
        look(collector, training)
    change(training)
    for _ in range(3):
        assert_same(look(collector, training), look(Collector(), training))
        with torch.no_grad():
            for tensor in training.model.parameters():
                tensor.mul_(1.5)
        training.extra["seen"] = torch.randn(5)
        training.history.append(torch.ones(2))


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_captured_after_a_change_is_the_state(change: Change) -> None:
    training, collector, capturer = Training(), Collector(), Capturer()
    arenas: dict[int, list[memoryview]] = {}
    for number in range(6):
        if number == 3:
            change(training)
        collected = look(collector, training)
        layout = capturer.layout(collected)
        pair = arenas.setdefault(layout.arena_bytes, [memory(layout.arena_bytes) for _ in range(2)])
        first = Capturer()
        expected_layout = first.layout(again := look(Collector(), training))
        expected = memory(expected_layout.arena_bytes)
        assert layout == expected_layout
        one = capturer.begin(collected, layout, pair[number % 2], overlap=False, then=passed_on)
        other = first.begin(again, expected_layout, expected, overlap=False, then=passed_on)
        assert (one.error, other.error) == (None, None)
        assert one.values == other.values
        assert pair[number % 2][: layout.arena_bytes] == expected
        with torch.no_grad():
            for tensor in training.model.parameters():
                if tensor.requires_grad:
                    tensor.mul_(1.5)
        training.extra["seen"] = training.extra["seen"] * 2 + 1


def memory(size_bytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size_bytes))


def passed_on(capture: Capture) -> None:
    pass


@pytest.mark.parametrize("change", [nothing, other_rate, state_of_another_kind])
def test_what_lasts_is_told_again(change: Change) -> None:
    """The very same tensors, in a layout that is not made anew."""
    training, collector, capturer = Training(), Collector(), Capturer()
    before = look(collector, training)
    layout = capturer.layout(before)
    training.step()
    change(training)
    after = look(collector, training)
    assert after.sorts is before.sorts
    state = {name for name in before.leaves if name.startswith(("model/", "optimizer/state/"))}
    assert after.sorts.lasting == state
    assert len(state) > 20
    assert all(after.leaves[name] is before.leaves[name] for name in state)
    if change is not state_of_another_kind:
        assert capturer.layout(after) is layout


def test_a_module_that_tells_by_itself_is_asked_each_time() -> None:
    class Counting(nn.Linear):
        told = 0

        def get_extra_state(self) -> object:
            self.told += 1
            return {"told": self.told}

        def set_extra_state(self, state: object) -> None:
            raise NotImplementedError

    training, collector = Training(), Collector()
    training.model.first = Counting(6, 6)
    for number in range(1, 4):
        tree: Any = look(collector, training).tree
        assert tree["objects"]["model"]["first._extra_state"] == {"told": number}


def test_two_leaves_of_one_name_are_refused() -> None:
    objects = {"one/two": torch.ones(1), "one": {"two": torch.zeros(1)}}
    with pytest.raises(Mismatch, match="two objects have a leaf of the name one/two"):
        Collector().collect(objects, position=None, progress={})
