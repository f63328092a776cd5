"""The rest of an epoch, dealt to another number of ranks: every sample of it once, in a defined order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from everstep.errors import Mismatch
from everstep.format.values import decode, encode
from everstep.state.data import Track, track
from everstep.state.tree import flatten, unflatten


class Numbers(Dataset[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> int:
        return number


Make = Callable[..., Any]


def loader(
    kind: type[Any], ranks: int, rank: int, count: int, batch: int = 2, even: bool = False, **options: Any
) -> Any:
    sampler_of = StatefulDistributedSampler if options.pop("stateful_sampler", False) else DistributedSampler
    sampler = sampler_of(Numbers(count), ranks, rank, seed=3, drop_last=even)
    sampler.set_epoch(5)
    return kind(Numbers(count), batch_size=batch, sampler=sampler, **options)


def tracks(kind: type[Any], ranks: int, count: int, **options: Any) -> list[Track]:
    return [track(loader(kind, ranks, rank, count, **options)) for rank in range(ranks)]


def kept(one: Track) -> Any:
    """A position as a snapshot gives it back."""
    leaves: dict[str, Any] = {}
    tree = decode(encode(flatten("data", one.state(), leaves)))
    return unflatten(tree, lambda name: leaves[name])


def take(running: Sequence[Track], batches: int | None = None) -> list[list[int]]:
    """The samples that each rank gets in so many steps; None: in the rest of the epoch."""
    found = [
        [int(number) for batch in itertools.islice(iter(one), batches) for number in batch] for one in running
    ]
    for one in running:
        one.settle()
    return found


def flat(found: Sequence[Sequence[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(found))


def go_on(running: Sequence[Track], onto: Sequence[Track]) -> None:
    saved = [kept(one) for one in running]
    for rank, one in enumerate(onto):
        one.load(saved[rank % len(saved)], len(saved), len(onto))
    for one in running:
        one.close()


KINDS = [DataLoader, StatefulDataLoader]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "now", "batch"), [(4, 2, 2), (2, 4, 2), (4, 3, 1), (3, 1, 4), (1, 3, 2)])
def test_the_rest_of_the_epoch_once(kind: type[Any], before: int, now: int, batch: int) -> None:
    count = 48
    first = tracks(kind, before, count)
    seen = flat(take(first, 3))
    assert len(seen) == 3 * 2 * before
    second = tracks(kind, now, count, batch=batch)
    go_on(first, second)
    rest = take(second)
    assert sorted(seen + flat(rest)) == list(range(count))
    assert all(one.epoch == 1 for one in second)
    # And the next epoch is a whole one.
    assert sorted(flat(take(second))) == list(range(count))


@pytest.mark.parametrize("kind", KINDS)
def test_dealt_again_and_again(kind: type[Any]) -> None:
    """Killed and restarted with other numbers of ranks, in the same one, and with other batches."""
    count, seen = 62, []
    running = tracks(kind, 4, count)
    for ranks, batch in [(2, 2), (2, 2), (3, 1), (3, 1), (1, 3), (4, 1)]:
        seen += flat(take(running, 2))
        onto = tracks(kind, ranks, count, batch=batch)
        go_on(running, onto)
        running = onto
    seen += flat(take(running))
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_ranks_go_on_with_what_was_dealt_to_them(kind: type[Any]) -> None:
    first = tracks(kind, 4, 40)
    take(first, 2)
    saved = [kept(one) for one in first]

    def resumed() -> list[Track]:
        onto = tracks(kind, 2, 40)
        for rank, one in enumerate(onto):
            one.load(saved[rank], 4, 2)
        return onto

    whole = take(resumed())
    parted = resumed()
    begun = take(parted, 3)
    onto = tracks(kind, 2, 40)
    go_on(parted, onto)
    rest = take(onto)
    assert [one + other for one, other in zip(begun, rest, strict=True)] == whole


def test_it_is_dealt_like_cards() -> None:
    """The order is that of the whole epoch, and each rank has every N-th sample of what is left of it."""
    order = list(loader(DataLoader, 1, 0, 24).sampler)
    first = tracks(DataLoader, 4, 24)
    take(first, 1)
    second = tracks(DataLoader, 2, 24)
    go_on(first, second)
    assert take(second) == [order[8:][0::2], order[8:][1::2]]


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 40),
    worlds=st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 4)), min_size=2, max_size=4
    ),
    even=st.booleans(),
)
def test_no_sample_is_lost_whatever_the_numbers(
    count: int, worlds: list[tuple[int, int, int]], even: bool
) -> None:
    """Twice come only those that are needed to make it go round; with `drop_last` none, and those that do
    not go round in the last world are left out."""
    seen: list[int] = []
    running: list[Track] = []
    for number, (ranks, batch, steps) in enumerate(worlds):
        ranks = 1 if even and ranks > count else ranks
        if ranks == len(running):
            batch = running[0].loader.batch_size  # The same ranks go on as they were, or not at all.
        onto = tracks(DataLoader, ranks, count, batch=batch, even=even)
        if running:
            go_on(running, onto)
        running = onto
        last = number == len(worlds) - 1
        seen += flat(take(running, None if last else steps))
        if any(one.epoch for one in running):
            break
    missing = set(range(count)) - set(seen)
    doubled = len(seen) - len(set(seen))
    assert len(missing) < len(running) if even else not missing
    assert doubled == 0 if even else doubled < max(ranks for ranks, _, _ in worlds)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.process
def test_with_workers(kind: type[Any]) -> None:
    first = tracks(kind, 2, 32, num_workers=1)
    seen = flat(take(first, 2))
    second = tracks(kind, 1, 32, num_workers=2)
    go_on(first, second)
    seen += flat(take(second))
    assert sorted(seen) == list(range(32))
    for one in second:
        one.close()


def test_a_sampler_that_knows_its_position() -> None:
    first = tracks(StatefulDataLoader, 2, 26, stateful_sampler=True)
    seen = flat(take(first, 2))
    second = tracks(StatefulDataLoader, 3, 26, stateful_sampler=True)
    go_on(first, second)
    assert sorted(seen + flat(take(second))) == list(range(26))


def test_one_rank_needs_no_sampler_that_deals() -> None:
    first = tracks(DataLoader, 2, 24)
    seen = flat(take(first, 2))
    alone = track(DataLoader(Numbers(24), batch_size=3, shuffle=True))
    go_on(first, [alone])
    assert sorted(seen + flat(take([alone]))) == list(range(24))


def test_between_epochs_any_loader_will_do() -> None:
    first = [track(DataLoader(Numbers(8), batch_size=2)) for _ in range(2)]
    take(first)
    second = [track(DataLoader(Numbers(8), batch_size=2)) for _ in range(3)]
    go_on(first, second)
    assert [one.epoch for one in second] == [1, 1, 1]
    assert take(second)[0] == list(range(8))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(20))


class Own(DistributedSampler[int]):
    def __iter__(self) -> Any:
        return iter(range(self.rank, 20, self.num_replicas))


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Numbers(20), batch_size=2),
        lambda: DataLoader(Stream(), batch_size=2),
        lambda: DataLoader(Numbers(20), batch_size=2, sampler=Own(Numbers(20), 2, 0)),
        lambda: [[number] for number in range(20)],
        lambda: StatefulDataLoader(Stream(), batch_size=2),
    ],
)
def test_what_is_not_known_is_refused_or_approximate(make: Make) -> None:
    first = track(make())
    take([first], 2)
    saved = kept(first)
    second = track(make())
    with pytest.raises(Mismatch, match=r"by 2 ranks .* there are 3 now.*approximate_data=True"):
        second.load(saved, 2, 3)
    assert second.delivered == 0
    second.load(saved, 2, 3, approximate=True)
    assert "the data goes on after 2 batches on each of 3 ranks, which 2 ranks had" in second.reasons()
    (rest,) = take([second])
    assert len(rest) in (16, 18, 6)


def test_another_dataset_is_refused() -> None:
    first = tracks(DataLoader, 2, 24)
    take(first, 1)
    with pytest.raises(Mismatch, match=r"over 24 samples.* over 25"):
        tracks(DataLoader, 3, 25)[0].load(kept(first[0]), 2, 3)


def test_random_numbers_of_an_epoch_do_not_come_twice() -> None:
    class Noisy(Numbers):
        def __getitem__(self, number: int) -> Any:
            return number, torch.rand(())

    def made(ranks: int) -> list[Track]:
        return [
            track(
                DataLoader(
                    Noisy(24),
                    batch_size=2,
                    num_workers=1,
                    sampler=DistributedSampler(Noisy(24), ranks, rank, seed=1),
                )
            )
            for rank in range(ranks)
        ]

    def draws(running: Sequence[Track], batches: int | None) -> list[float]:
        return [float(x) for one in running for _, drawn in itertools.islice(one, batches) for x in drawn]

    first = made(1)
    before = draws(first, 3)
    for one in first:
        one.settle()
    second = made(2)
    go_on(first, second)
    assert not set(before) & set(draws(second, None))
    assert len(set(draws(second, None))) == 24
