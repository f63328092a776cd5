"""State of many ranks, without a mesh: what they hold alike is written once, what differs is each one's
own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ranks import Ranks
from stored import Stored, joined, part_of, stored
from torch import nn

from everstep.errors import Mismatch
from everstep.state.capture import Capturer
from everstep.state.lazy import LazyState
from everstep.state.objects import named
from everstep.state.restore import restore
from everstep.state.sharing import have_parted


def training(rank: int, steps: int = 2, width: int = 40) -> dict[str, Any]:
    """What a rank of a DDP training has: the same weights, its own running mean, generator and history."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, 3))
    model[2].bias.requires_grad_(False)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": trained[:2], "weight_decay": 0.2}, {"params": trained[2:]}], lr=0.1
    )
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, width)).square().mean().backward()
        optimizer.step()
        model[1].running_mean.fill_(rank + step)
    generator = torch.Generator().manual_seed(rank)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
        "generator": generator,
        "history": [torch.full((2,), float(rank))],
        "shared": {"ema": torch.arange(9.0)},
        "best": 0.5,
    }


def blank(rank: int, steps: int = 0) -> dict[str, Any]:
    made = training(rank, steps)
    with torch.no_grad():
        for one in (*made["model"].parameters(), *made["model"].buffers()):
            one.zero_()
    return made


def state(objects: dict[str, Any]) -> dict[str, Any]:
    return {
        name: copy.deepcopy(
            value.state_dict()
            if hasattr(value, "state_dict")
            else value.get_state()
            if isinstance(value, torch.Generator)
            else value
        )
        for name, value in objects.items()
    }


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def written(parts: list[Stored]) -> int:
    return sum(leaf.size_bytes(one) for part in parts for leaf in part.manifest.leaves for one in leaf.slices)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_same_ranks_get_back_what_each_had(ranks: int) -> None:
    saved = Ranks([named(training(rank)) for rank in range(ranks)])
    parts = saved.stored()
    live = Ranks([named(blank(rank + 7)) for rank in range(ranks)])
    for rank, back in enumerate(live.restore(parts)):
        assert equal(state(dict(live.objects[rank])), state(training(rank)))
        assert back.approximate == []
        assert back.values == {"best": 0.5}


def test_what_all_hold_is_written_once() -> None:
    alone = written([stored(named(training(0)))])
    parts = Ranks([named(training(0)) for _ in range(8)]).stored()
    own = sum(
        leaf.size_bytes(leaf.slices[0])
        for part in parts
        for leaf in part.manifest.leaves
        if "/run/rng/" in leaf.name
    )
    assert written(parts) - own < alone
    sizes = [written([part]) for part in parts]
    assert max(sizes) - min(sizes) <= 40 * 40 * 4


@pytest.mark.parametrize(("before", "now"), [(4, 2), (2, 4), (3, 1), (1, 3), (4, 3)])
def test_another_number_of_ranks(before: int, now: int) -> None:
    if before == 1:
        parts = [stored(named(training(0)))]
    else:
        parts = Ranks([named(training(rank)) for rank in range(before)]).stored()
    live = [named(blank(rank + 7)) for rank in range(now)]
    if now == 1:
        whole = joined(parts)
        backs = [restore(whole.manifest, whole.fill, live[0], part=parts[0].manifest)]
    else:
        backs = Ranks(live).restore(parts)
    for rank, back in enumerate(backs):
        assert back.approximate == [f"world size {before} -> {now}"]
        has, had = state(live[rank]), state(training(rank % before))
        for name in ("optimizer", "schedule", "shared", "best"):
            assert equal(has[name], had[name]), name
        assert equal(has["model"], state(training(0))["model"])
        assert equal(has["history"], had["history"])
        assert equal(has["generator"], had["generator"]) == (rank < before)
    drawn = [str(back.rng) for back in backs]
    assert len(set(drawn)) == len(drawn) or before > 1


def test_optimizer_state_is_by_name() -> None:
    parts = Ranks([named(training(0)) for _ in range(2)]).stored()
    tree = parts[1].manifest.tree["objects"]["optimizer"]
    assert list(tree["state"]) == ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight"]
    assert tree["param_groups"][0]["params"] == ["0.weight", "0.bias"]
    assert "optimizer/state/2.weight/exp_avg" in joined(parts).manifest.by_name


def test_contents_that_part_are_seen_and_become_each_ranks_own() -> None:
    ranks = Ranks([named(training(0)) for _ in range(3)])
    first = ranks.collect()
    assert not have_parted([one.watch.now() for one in first])
    weight: Any = ranks.objects[1]["model"]
    with torch.no_grad():
        weight[0].weight += 1
    looks = ranks.collect(anew=False)
    assert all(one.fits for one in looks)
    assert have_parted([one.watch.now() for one in looks])
    parts = ranks.stored()
    names = [one.name for one in joined(parts).manifest.leaves if one.name.endswith("model/0.weight")]
    assert names == ["~rank/0/model/0.weight", "~rank/1/model/0.weight"]
    # And so they stay, though they may come to be the same again.
    with torch.no_grad():
        weight[0].weight -= 1
    assert "model/0.weight" not in joined(ranks.stored()).manifest.by_name


def test_a_capture_of_what_a_rank_writes_overlaps_and_tells_its_sample() -> None:
    ranks = Ranks([named(training(0, width=700)) for _ in range(2)])
    ranks.collect()
    samples = []
    for rank, collected in enumerate(ranks.collect(anew=False)):
        capturer = Capturer()
        layout = capturer.layout(collected)
        memory = memoryview(bytearray(layout.arena_bytes))
        capture = capturer.begin(collected, layout, memory, overlap=True, then=lambda capture: None)
        capture.fence()
        capture.done.wait(60)
        assert capture.error is None
        assert capture.changed == []
        expected = part_of(collected, rank, 2)
        for region, stored_bytes in zip(layout.regions, expected.regions, strict=True):
            assert memory[region.offset : region.offset + region.size_bytes] == stored_bytes
        assert capture.sample
        assert capture.sample == collected.watch.now()
        samples.append(capture.sample)
        capturer.close()
    assert not have_parted(samples)


def test_what_ranks_trained_for_themselves_is_not_given_to_others() -> None:
    made = [training(rank) for rank in range(2)]
    with torch.no_grad():
        made[1]["model"][0].weight += 1
    parts = Ranks([named(one) for one in made]).stored()
    live = Ranks([named(blank(rank)) for rank in range(4)])
    with pytest.raises(Mismatch, match=r"model/0.weight was not the same on all ranks.*start on 2 ranks"):
        live.restore(parts)
    backs = live.restore(parts, strict=False)
    assert "model/0.weight was not the same on all ranks" in backs[0].approximate
    same = Ranks([named(blank(rank)) for rank in range(2)])
    same.restore(parts)
    assert equal(state(dict(same.objects[1])), state(made[1]))


def test_a_leaf_that_nobody_was_told_of_is_no_part_of_a_snapshot() -> None:
    ranks = Ranks([named(training(0)) for _ in range(2)])
    ranks.collect()
    for objects in ranks.objects:
        model: Any = objects["model"]
        model[0].register_buffer("new", torch.ones(3))
    assert not any(one.fits for one in ranks.collect(anew=False))
    assert all(one.fits for one in ranks.collect())


def test_a_list_that_grows_needs_nobody_to_be_told() -> None:
    ranks = Ranks([named(training(0)) for _ in range(2)])
    ranks.collect()
    for objects in ranks.objects:
        history: Any = objects["history"]
        history.append(torch.ones(4))
    looks = ranks.collect(anew=False)
    assert all(one.fits for one in looks)
    assert "~rank/1/history/1" in looks[1].leaves


def test_what_changes_its_shape_is_each_ranks_own_from_then_on() -> None:
    ranks = Ranks([named(training(0)) for _ in range(2)])
    ranks.collect()
    shared: Any = [objects["shared"] for objects in ranks.objects]
    for one in shared:
        one["ema"] = torch.ones(4)
    assert not any(one.fits for one in ranks.collect(anew=False))
    assert all(one.fits for one in ranks.collect())
    for one in shared:
        one["ema"] = torch.ones(5)
    assert all(one.fits for one in ranks.collect(anew=False))


def test_stages_have_leaves_of_their_own() -> None:
    """Pipeline stages: each rank has a part of the model, under the names of the whole."""

    def stage(*numbers: int) -> dict[str, Any]:
        torch.manual_seed(numbers[0])
        model = nn.ModuleDict({str(number): nn.Linear(4, 4) for number in numbers})
        optimizer = torch.optim.AdamW(model.parameters())
        for one in model.parameters():
            one.grad = torch.full_like(one, numbers[0])
        optimizer.step()
        return {"model": model, "optimizer": optimizer}

    saved = [stage(0, 1), stage(2, 3)]
    parts = Ranks([named(one) for one in saved]).stored()
    whole = joined(parts)
    assert not any(leaf.name.startswith("~rank/0/model") for leaf in whole.manifest.leaves)
    for cut in ([(0,), (1, 2), (3,)], [(0, 1, 2), (3,)]):
        live = Ranks([named(stage(*numbers)) for numbers in cut])
        live.restore(parts)
        for objects, numbers in zip(live.objects, cut, strict=True):
            for number in numbers:
                of: Any = saved[number // 2]
                model: Any = objects["model"]
                optimizer: Any = objects["optimizer"]
                for key in ("weight", "bias"):
                    mine, theirs = getattr(model[str(number)], key), getattr(of["model"][str(number)], key)
                    assert torch.equal(mine, theirs)
                    for name, value in of["optimizer"].state[theirs].items():
                        assert torch.equal(optimizer.state[mine][name], value)


def test_a_snapshot_of_many_is_looked_into_as_one() -> None:
    parts = Ranks([named(training(rank, width=600)) for rank in range(2)]).stored()
    whole = joined(parts)
    assert any(len(leaf.slices) > 1 for leaf in whole.manifest.leaves)
    lazy = LazyState(whole.manifest, whole.fill, torch.device("cpu"))
    expected = training(0, width=600)
    assert equal(lazy.state("model"), expected["model"].state_dict())
    assert equal(lazy.state("optimizer"), expected["optimizer"].state_dict())
    fresh = training(5, 0, width=600)
    assert lazy.into(model=fresh["model"], optimizer=fresh["optimizer"]) == []
    assert equal(fresh["model"].state_dict(), expected["model"].state_dict())
    assert equal(fresh["optimizer"].state_dict(), expected["optimizer"].state_dict())


def test_tied_weights_are_written_once_and_stay_tied() -> None:
    def tied(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(600, 600), nn.Linear(600, 600))
        model[1].weight = model[0].weight
        return {"model": model}

    parts = Ranks([named(tied(1)) for _ in range(2)]).stored()
    places = {
        leaf.name: sorted((one.box, part.manifest.rank, one.region) for one in leaf.slices)
        for part in parts
        for leaf in part.manifest.leaves
    }
    assert places["model/0.weight"] == places["model/1.weight"]
    live = Ranks([named(tied(2)) for _ in range(3)])
    live.restore(parts)
    model: Any = live.objects[2]["model"]
    assert model[0].weight is model[1].weight
    assert equal(model.state_dict(), tied(1)["model"].state_dict())
