"""Restoring some objects, or some leaves of them, out of a snapshot that holds more."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from stored import Stored, stored
from torch import nn

from everstep.errors import Damaged, Mismatch, NotFound
from everstep.state.live import state_places
from everstep.state.objects import named
from everstep.state.restore import restore, restore_part
from everstep.state.tree import leaf_names


class Extra(nn.Linear):
    """A module that keeps something besides tensors."""

    def __init__(self, seen: int = 0) -> None:
        super().__init__(3, 3)
        self.seen = {"steps": seen, "mean": torch.full((2,), float(seen))}

    def get_extra_state(self) -> dict[str, Any]:
        return self.seen

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen = state


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    model[2].bias.requires_grad_(False)
    return model


def objects(seed: int, steps: int = 2) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = net()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.1 * seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3 + seed)
    return {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
        "mean": torch.full((3,), float(seed)),
        "best": 0.5 * seed,
        "history": [seed],
    }


def state_of(value: Any) -> Any:
    return copy.deepcopy(value.state_dict() if hasattr(value, "state_dict") else value)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return bool(one == other)


@pytest.fixture(name="made")
def _made() -> Stored:
    return stored(objects(1))


def bytes_under(made: Stored, name: str) -> int:
    return sum(leaf.size_bytes(leaf.slices[0]) for leaf in made.manifest.leaves if leaf.name.startswith(name))


def test_one_object_alone_is_read_and_touched(made: Stored) -> None:
    saved, live = objects(1), objects(2)
    before = {name: state_of(value) for name, value in live.items()}
    assert restore_part(made.manifest, made.fill, named({"model": live["model"]})) == []
    assert equal(state_of(live["model"]), state_of(saved["model"]))
    assert made.read_bytes == bytes_under(made, "model/")
    for name in live.keys() - {"model"}:
        assert equal(state_of(live[name]), before[name]), name


@pytest.mark.parametrize("steps", [0, 2])
def test_an_optimizer_alone(made: Stored, steps: int) -> None:
    saved, live = objects(1), objects(2, steps)
    restore_part(made.manifest, made.fill, {"optimizer": live["optimizer"]})
    assert equal(state_of(live["optimizer"]), state_of(saved["optimizer"]))
    assert not equal(state_of(live["model"]), state_of(saved["model"]))


def test_everything_that_can_be_changed_in_place(made: Stored) -> None:
    saved, live = objects(1), objects(2)
    given = {name: value for name, value in live.items() if name != "best"}
    restore_part(made.manifest, made.fill, named(given))
    for name in given:
        assert equal(state_of(live[name]), state_of(saved[name])), name


def test_a_pattern_takes_a_part_of_a_module(made: Stored) -> None:
    saved, live = objects(1)["model"], objects(2)["model"]
    before = state_of(live)
    restore_part(made.manifest, made.fill, {"model": live}, only="model/2.*")
    for key, value in state_of(live).items():
        assert equal(value, state_of(saved)[key] if key.startswith("2.") else before[key]), key
    assert made.read_bytes == bytes_under(made, "model/2.")


def test_objects_that_a_pattern_leaves_out_stay(made: Stored) -> None:
    saved, live = objects(1), objects(2)
    before = {name: state_of(value) for name, value in live.items()}
    given = {name: live[name] for name in ("model", "optimizer", "schedule", "mean", "history")}
    restore_part(made.manifest, made.fill, named(given), only="m*")
    for name in ("model", "mean"):
        assert equal(state_of(live[name]), state_of(saved[name])), name
    for name in ("optimizer", "schedule", "history"):
        assert equal(state_of(live[name]), before[name]), name
    restore_part(made.manifest, made.fill, named(given), only="hist*")
    assert live["history"] == [1]


@pytest.mark.parametrize(
    ("given", "only", "message"),
    [
        ("optimizer", "*exp_avg", r"fits 5 of the 15 leaves of optimizer; only a module"),
        ("best", "*", r"best is a float, which cannot be changed in place.*\.state\('best'\)"),
    ],
)
def test_what_cannot_be_restored_so_is_refused(made: Stored, given: str, only: str, message: str) -> None:
    live = objects(2)
    before = state_of(live[given])
    with pytest.raises(Mismatch, match=message):
        restore_part(made.manifest, made.fill, {given: live[given]}, only=only)
    assert made.calls == 0
    assert equal(state_of(live[given]), before)


@pytest.mark.parametrize("only", ["decoder.*", "model/9.*", "Model/*"])
def test_a_pattern_that_fits_nothing_says_what_there_is(made: Stored, only: str) -> None:
    live = objects(2)["model"]
    with pytest.raises(NotFound, match=r"nothing of model has a name that fits .*'model/0.weight'"):
        restore_part(made.manifest, made.fill, {"model": live}, only=only)
    with pytest.raises(NotFound, match="nothing of no objects"):
        restore_part(made.manifest, made.fill, {})


def test_an_object_that_the_snapshot_has_not(made: Stored) -> None:
    with pytest.raises(Mismatch, match=r"the snapshot has no ema.*model, optimizer, schedule"):
        restore_part(made.manifest, made.fill, {"ema": net()})
    (left,) = restore_part(made.manifest, made.fill, {"ema": net()}, strict=False)
    assert "the snapshot has no ema" in left


def test_what_is_missing_or_surplus_is_named_and_counts_under_the_pattern_only(made: Stored) -> None:
    wider = nn.Sequential(*net(), nn.Linear(4, 2))
    with pytest.raises(Mismatch, match=r"has no leaf model/3\.weight, model/3\.bias"):
        restore_part(made.manifest, made.fill, {"model": wider})
    with pytest.raises(Mismatch, match=r"has no leaf model/3\.weight"):
        restore_part(made.manifest, made.fill, {"model": wider}, only="model/3.weight")
    narrower = net()[:2]
    with pytest.raises(Mismatch, match=r"holds model/2\.weight, model/2\.bias, which the model has not"):
        restore_part(made.manifest, made.fill, {"model": narrower})
    assert made.calls == 0
    assert restore_part(made.manifest, made.fill, {"model": narrower}, only="model/[01].*") == []
    (left,) = restore_part(made.manifest, made.fill, {"model": wider}, strict=False)
    assert "model/3.weight" in left
    saved = objects(1)["model"]
    assert equal(state_of(wider[:3]), state_of(saved))
    assert equal(state_of(narrower), state_of(saved[:2]))


def test_another_shape_is_refused_and_left_alone_where_allowed(made: Stored) -> None:
    live = net()
    live[2] = nn.Linear(8, 5)
    with pytest.raises(Mismatch, match=r"model/2.weight has shape \[5, 8\], in the snapshot \[4, 8\]"):
        restore_part(made.manifest, made.fill, {"model": live})
    before = state_of(live[2])
    assert len(restore_part(made.manifest, made.fill, {"model": live}, strict=False)) == 2
    assert equal(state_of(live[2]), before)
    assert equal(state_of(live[:2]), state_of(objects(1)["model"][:2]))


def test_what_a_module_keeps_besides_tensors() -> None:
    made = stored({"model": nn.Sequential(Extra(3), Extra(4))})
    live = nn.Sequential(Extra(), Extra())
    restore_part(made.manifest, made.fill, {"model": live}, only="model/1.*")
    assert equal([one.seen["steps"] for one in live], [0, 4])
    assert live[1].seen["mean"].tolist() == [4, 4]
    restore_part(made.manifest, made.fill, {"model": live}, only="model/0.weight")
    assert live[0].seen["steps"] == 0
    restore_part(made.manifest, made.fill, {"model": live})
    assert equal([one.seen["steps"] for one in live], [3, 4])
    assert live[0].seen["mean"].tolist() == [3, 3]


def test_tied_weights_stay_tied_and_are_read_once() -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
        model[1].weight = model[0].weight
        return model

    saved, live = tied(), tied()
    made = stored({"model": saved})
    weight = live[0].weight
    restore_part(made.manifest, made.fill, {"model": live})
    assert live[0].weight is live[1].weight is weight
    assert equal(state_of(live), state_of(saved))
    assert made.read_bytes == 40 * 40 * 4 + 2 * 40 * 4


def test_damage_is_not_hidden(made: Stored) -> None:
    made.fails_at = 1
    with pytest.raises(Damaged):
        restore_part(made.manifest, made.fill, {"model": net()})


def test_a_whole_restore_wants_everything_handed_over(made: Stored) -> None:
    live = objects(2)
    with pytest.raises(Mismatch, match="the snapshot holds optimizer, schedule, mean"):
        restore(made.manifest, made.fill, named({"model": live["model"]}))
    back = restore(made.manifest, made.fill, named(live))
    assert back.progress == {"step": 7, "epoch": 1}
    assert back.values == {"best": 0.5}
    assert back.approximate == []


def test_new_state_of_an_optimizer_goes_where_its_parameters_are() -> None:
    live = objects(1)["optimizer"]
    saved = stored({"optimizer": live}).manifest.tree["objects"]["optimizer"]
    live.param_groups[0]["params"][1] = nn.Parameter(torch.empty(8, device="meta"))
    places = state_places(saved, live)
    assert all(isinstance(like, torch.Tensor) for like in places.values())
    assert {leaf for leaf, like in places.items() if like.device.type == "meta"} == {
        "optimizer/state/1/exp_avg",
        "optimizer/state/1/exp_avg_sq",
    }
    names = set(leaf_names(saved))
    assert names - set(places) == {f"optimizer/state/{number}/step" for number in range(5)}


class Unordered(nn.Module):
    """Parameters whose memory is not in the order of their dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.turned = nn.Parameter(torch.randn(6, 4).t())
        self.plain = nn.Parameter(torch.randn(2, 3))

    def forward(self) -> torch.Tensor:
        image = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
        return self.image(image).square().mean() + self.turned.square().sum() + self.plain.square().sum()


def test_what_belongs_to_a_parameter_lies_as_the_parameter_does() -> None:
    """An optimizer makes its state so, and kernels for tensors of two orders may round otherwise."""

    def made(steps: int) -> dict[str, Any]:
        torch.manual_seed(steps)
        model = Unordered()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
        return {"model": model, "optimizer": optimizer}

    saved, live = made(3), made(0)
    kept = stored(saved)
    restore(kept.manifest, kept.fill, named(live))
    for one, other in zip(live["model"].parameters(), saved["model"].parameters(), strict=True):
        back, there = live["optimizer"].state[one], saved["optimizer"].state[other]
        assert torch.equal(one, other)
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(back[name], there[name])
            assert back[name].stride() == there[name].stride() == one.stride()
        assert one.grad is None or one.grad.stride() == one.stride()
    assert not live["model"].turned.is_contiguous()
