"""State of many ranks, without a mesh: what they hold alike is written once, what differs is each one's
own."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from stored import Stored, joined, part_of, stored
from torch import nn

from everstep.errors import Damaged, Mismatch, Unavailable
from everstep.state import rng
from everstep.state.capture import Capturer
from everstep.state.collecting import Collector
from everstep.state.lazy import LazyState
from everstep.state.objects import named
from everstep.state.restore import restore
from everstep.state.sharing import have_parted
from everstep.state.world import World
from ranks import Ranks

compress = zstandard.ZstdCompressor().compress
BOMB = compress(bytes(80_000_000))


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
        backs = [restore(whole.manifest, whole.fill, live[0], parts=[part.manifest for part in parts])]
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


@pytest.mark.parametrize("ahead", [False, True])
def test_a_capture_of_what_a_rank_writes_overlaps_and_tells_its_sample(
    monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    monkeypatch.setattr("everstep.state.capture.AHEAD_FROM_BYTES", 1 if ahead else 1 << 60)
    monkeypatch.setattr("everstep.state.capture.AHEAD_BYTES", 4096)
    ranks = Ranks([named(training(0, width=700)) for _ in range(2)])
    ranks.collect()
    samples = []
    for rank, collected in enumerate(ranks.collect(anew=False)):
        capturer = Capturer()
        layout = capturer.layout(collected)
        memory = memoryview(bytearray(layout.arena_bytes))
        told: list[tuple[int, bytes]] = []

        def arrived(end: int, memory: memoryview = memory, told: list[tuple[int, bytes]] = told) -> None:
            told.append((end, bytes(memory[:end])))

        capture = capturer.begin(
            collected,
            layout,
            memory,
            overlap=True,
            then=lambda capture: None,
            ahead=lambda capture, arrived=arrived: arrived,
        )
        capture.fence()
        capture.done.wait(60)
        assert capture.error is None
        assert capture.changed == []
        assert (len(told) > 2) == ahead
        assert all(before == memory[:end] for end, before in told)
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


def test_a_rank_that_did_not_come_leaves_the_others_alone() -> None:
    """Some may have found out what others have not: then what they write does not belong together."""
    ranks = Ranks([named(training(0)) for _ in range(2)])
    before = ranks.collect()
    ranks.meeting.deadline_s = 0.0
    with pytest.raises(Unavailable, match="ranks 1 have not shared"):
        ranks.collectors[0].collect(ranks.objects[0], position=None, progress={}, anew="late")
    ranks.meeting.deadline_s = 60.0
    looks = ranks.collect(anew=False)
    assert [one.fits for one in looks] == [False, True]
    again = ranks.collect()
    assert all(one.fits for one in again)
    assert not have_parted([one.watch.now() for one in again])
    assert have_parted([before[0].watch.now(), again[1].watch.now()])


@pytest.mark.parametrize("answer", [b"", b"nothing of the kind", compress(b"\x01" * 20), BOMB])
def test_what_a_rank_cannot_mean_is_refused(answer: bytes) -> None:
    class Babel:
        def share(self, key: str, mine: bytes) -> list[bytes]:
            return [mine, answer]

    collector = Collector(World(0, 2, Babel()))
    with pytest.raises(Damaged, match="a rank says"):
        collector.collect(named(training(0)), position=None, progress={}, anew="1")


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


def test_a_leaf_that_one_rank_has_no_more_is_missed() -> None:
    """Others rely on the parts of it that it would have written."""
    ranks = Ranks([named(training(0)) for _ in range(2)])
    ranks.collect()
    optimizer: Any = ranks.objects[1]["optimizer"]
    optimizer.state.clear()
    assert [one.fits for one in ranks.collect(anew=False)] == [True, False]
    assert all(one.fits for one in ranks.collect())
    shared: Any = ranks.objects[0]["shared"]
    del shared["ema"]
    assert [one.fits for one in ranks.collect(anew=False)] == [False, True]


def test_a_buffer_that_grows_for_ever_does_not_keep_snapshots_away() -> None:
    ranks = Ranks([named(training(0)) for _ in range(2)])
    ranks.collect()
    # New; changed; changed once more: then it is each rank's own.
    for take, fits in enumerate([False, False, False, True, True]):
        for objects in ranks.objects:
            model: Any = objects["model"]
            model[0].register_buffer("queue", torch.ones(take + 1))
        looks = ranks.collect(anew=False)
        assert [one.fits for one in looks] == [fits, fits]
        if not fits:
            assert all(one.fits for one in ranks.collect())
    assert "~rank/1/model/0.queue" in looks[1].leaves


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
    for cut in ([(0,), (1, 2), (3,)], [(0, 1, 2), (3,)], [(2, 3), (0, 1)]):
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


def test_what_only_one_rank_has_is_not_given_to_others() -> None:
    saved = [{"notes": {"all": 1, str(rank): torch.full((2,), float(rank))}} for rank in range(2)]
    parts = Ranks([named(one) for one in saved]).stored()
    live: list[dict[str, Any]] = [{"notes": {}}, {"notes": {"9": 9}}]
    Ranks([named(one) for one in live]).restore(parts)
    assert equal(live, saved)


def test_an_object_that_is_not_given_is_missed_on_as_many_ranks_and_on_others() -> None:
    parts = Ranks([named(training(rank)) for rank in range(2)]).stored()
    for ranks in (2, 3):
        live = [{name: one for name, one in blank(0).items() if name != "optimizer"} for _ in range(ranks)]
        with pytest.raises(Mismatch, match="the snapshot holds optimizer, which is not given"):
            Ranks([named(one) for one in live]).restore(parts)


def test_an_accumulation_goes_on_where_it_was_and_is_dropped_by_others() -> None:
    def accumulating(rank: int) -> dict[str, Any]:
        made = training(rank)
        for one in made["optimizer"].param_groups[0]["params"]:
            one.grad = torch.full_like(one, float(rank))
        return made

    ranks = Ranks([named(accumulating(rank)) for rank in range(2)])
    parts = ranks.stored(gradients=["optimizer"])
    live = Ranks([named(blank(0)) for _ in range(2)])
    live.restore(parts)
    for rank, objects in enumerate(live.objects):
        model: Any = objects["model"]
        assert model[0].weight.grad.unique().tolist() == [float(rank)]
    (back, *_) = Ranks([named(blank(0)) for _ in range(3)]).restore(parts)
    assert back.approximate == [
        "world size 2 -> 3",
        "the gradients that optimizer had accumulated are dropped",
    ]


def test_generators_of_new_ranks_are_each_their_own_and_always_the_same() -> None:
    parts = Ranks([named(training(rank)) for rank in range(2)]).stored()

    def draws() -> list[float]:
        live = Ranks([named(blank(0)) for _ in range(5)])
        found = []
        for back, objects in zip(live.restore(parts), live.objects, strict=True):
            generator: Any = objects["generator"]
            with rng.aside():
                assert rng.restore(back.rng) == []
                drawn = [float(torch.rand(())), random.random(), float(np.random.rand())]
            found += [*drawn, float(torch.rand((), generator=generator))]
        return found

    first = draws()
    # Those of the ranks that were there are what they were: the processes' own is one, in these tests.
    assert len(set(first[8:])) == 12
    assert not set(first[:8]) & set(first[8:])
    assert draws() == first


@pytest.mark.parametrize("before", [1, 2, 3, 4])
def test_generators_that_are_alike_stay_alike_on_another_number_of_ranks(before: int) -> None:
    """As those of a tensor-parallel group, whose ranks have to draw the same: 0 and 1, 2 and 3, 4 and 5."""

    def seeded(seed: int, rank: int) -> None:
        torch.manual_seed(seed)
        random.seed(100 + rank)

    def taken(rank: int) -> Stored:
        ranks = Ranks([named(training(one)) for one in range(before)])
        # What ranks had drawn before has nothing to do with who is alike now.
        seeded(before + rank, rank)
        return ranks.stored()[rank]

    with rng.aside():
        parts = [stored(named(training(0)))] if before == 1 else [taken(rank) for rank in range(before)]
        live, described = Ranks([named(blank(rank)) for rank in range(6)]), []
        for rank, objects in enumerate(live.objects):
            seeded(7 + rank // 2, rank)
            generator: Any = objects["generator"]
            generator.manual_seed(30 + rank // 2)
            # An object of the name of a kind is not taken for it.
            objects = {**objects, "torch": torch.Generator().manual_seed(rank)}
            described.append(rng.described(objects))
        backs = live.restore(parts, described=described)
        drawn, own, python = [], [], []
        for back, objects in zip(backs, live.objects, strict=True):
            assert rng.restore(back.rng) == []
            generator = objects["generator"]
            drawn.append(float(torch.rand(())))
            own.append(float(torch.rand((), generator=generator)))
            python.append(random.random())
    for each in (drawn, own):
        assert each[0::2] == each[1::2]
        assert len(set(each)) == 3
    assert len(set(python)) == 6, "those that differ now differ"


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
