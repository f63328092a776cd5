from __future__ import annotations

import copy
import multiprocessing
import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from everstep.errors import Mismatch
from everstep.state import rng, workers
from everstep.state.data import MapTrack, ReplayTrack, StatefulTrack, Track, track

SAMPLES = 10
BATCH = 4

# --- Datasets, samplers and loaders


class Numbers(Dataset[int]):
    """Counts what was loaded; draws as an augmentation does, on demand."""

    def __init__(self, size: int = SAMPLES, augment: bool = False) -> None:
        self.size = size
        self.augment = augment
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.size:
            raise IndexError(index)
        self.loaded.append(index)
        return augmented(index) if self.augment else index


def augmented(index: int) -> torch.Tensor:
    return torch.tensor(
        [index, random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64
    )


class AtOnce(Numbers):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


class Stream(IterableDataset[Any]):
    def __init__(self, augment: bool = False, shuffled: bool = False) -> None:
        self.augment = augment
        self.shuffled = shuffled

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        numbers = list(range(SAMPLES))
        if self.shuffled:
            random.shuffle(numbers)
        for number in numbers[worker.id :: worker.num_workers] if worker else numbers:
            yield augmented(number) if self.augment else number


class Eager(Sampler[int]):
    """Draws from the global RNGs in `__iter__`, counts its epochs, keeps a generator."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.epoch = 0
        self.own = random.Random(seed)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        order = np.random.permutation(self.size).tolist()
        self.own.shuffle(order)
        return iter(order[self.epoch :] + order[: self.epoch])


class Lazy(Eager):
    def __iter__(self) -> Iterator[int]:
        yield from super().__iter__()


class Drawing(Sampler[int]):
    """Draws from a global RNG all along the epoch."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(SAMPLES):
            yield random.randrange(SAMPLES)

    def __len__(self) -> int:
        return SAMPLES


class Buckets(Sampler[list[int]]):
    """A user's own batch sampler, of uneven batches, whose state tells the place in the epoch."""

    def __init__(self) -> None:
        self.place = 0
        self.resume_at: int | None = None

    def __iter__(self) -> Iterator[list[int]]:
        self.place, self.resume_at = self.resume_at or 0, None
        order = torch.randperm(SAMPLES).tolist()
        for batch in (order[:1], order[1:4], order[4:6], order[6:])[self.place :]:
            self.place += 1
            yield batch

    def __len__(self) -> int:
        return 4

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.resume_at = state["place"]


class Generated(Buckets):
    """A batch sampler whose batches can be gone over only once."""

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            yield (index for index in batch)


class Jitter:
    """A transform with a generator of its own."""

    def __init__(self, seed: int) -> None:
        self.own = random.Random(seed)


class Jittered(IterableDataset[Any]):
    def __init__(self, seed: int) -> None:
        self.transform = Jitter(seed)

    def __iter__(self) -> Iterator[float]:
        return (self.transform.own.random() for _ in range(SAMPLES))


class Resumable:
    """A user's own stateful loader."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.place = 0

    def __iter__(self) -> Iterator[int]:
        if not self.order:
            self.order = torch.randperm(5).tolist()
        while self.place < len(self.order):
            self.place += 1
            yield self.order[self.place - 1]
        self.order, self.place = [], 0

    def state_dict(self) -> dict[str, Any]:
        return {"order": list(self.order), "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.place = list(state["order"]), state["place"]


class Reshuffled:
    """A plain iterable whose order grows from its own counter, generator and the global RNG."""

    def __init__(self, seed: int) -> None:
        self.epoch = 0
        self.own = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(6).tolist() + self.own.permutation(6).tolist() + [self.epoch]
        self.epoch += 1
        return (order[i : i + 2] for i in range(0, len(order), 2))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loader(dataset: Any = None, **options: Any) -> DataLoader[Any]:
    if not {"batch_size", "batch_sampler"} & set(options):
        options["batch_size"] = BATCH
    return DataLoader(dataset if dataset is not None else Numbers(), **options)


def stateful(dataset: Any = None, **options: Any) -> Any:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    dataset = dataset if dataset is not None else Numbers()
    return torchdata.StatefulDataLoader(dataset, batch_size=BATCH, **options)


def stateful_distributed(**options: Any) -> Any:
    sampler = pytest.importorskip("torchdata.stateful_dataloader.sampler")
    numbers = Numbers()
    return stateful(numbers, sampler=sampler.StatefulDistributedSampler(numbers, 2, 1), **options)


WEIGHTS = [float(i + 1) for i in range(SAMPLES)]

# Each takes a number that differs from process to process: a resume must not depend on it.
INLINE: dict[str, Callable[[int], Any]] = {
    "sequential": lambda salt: loader(),
    "shuffled": lambda salt: loader(shuffle=True),
    "drop last": lambda salt: loader(shuffle=True, drop_last=True),
    "generator": lambda salt: loader(shuffle=True, generator=generator(salt)),
    "one sample": lambda salt: loader(shuffle=True, batch_size=None),
    "with replacement": lambda salt: loader(sampler=RandomSampler(range(SAMPLES), True, 70), batch_size=30),
    "with replacement from a generator": lambda salt: loader(
        sampler=RandomSampler(range(SAMPLES), True, 70, generator(salt)), batch_size=30
    ),
    "weighted": lambda salt: loader(sampler=WeightedRandomSampler(WEIGHTS, 9)),
    "subset": lambda salt: loader(sampler=SubsetRandomSampler([1, 3, 5, 7, 9], generator(salt))),
    "distributed": lambda salt: loader(sampler=DistributedSampler(range(SAMPLES), 2, 1)),
    "batch sampler": lambda salt: loader(batch_sampler=BatchSampler(RandomSampler(range(9)), 2, True)),
    "eager sampler": lambda salt: loader(sampler=Eager(SAMPLES, salt)),
    "lazy sampler": lambda salt: loader(sampler=Lazy(SAMPLES, salt)),
    "stateful batch sampler": lambda salt: loader(batch_sampler=Buckets()),
    "batches gone over once": lambda salt: loader(batch_sampler=Generated()),
    "augmented": lambda salt: loader(Numbers(augment=True), shuffle=True),
    "augmented at once": lambda salt: loader(AtOnce(augment=True), shuffle=True, generator=generator(salt)),
    "stream": lambda salt: loader(Stream(shuffled=True)),
    "stream with a generator": lambda salt: loader(Stream(), generator=generator(salt)),
    "stream with a transform": lambda salt: loader(Jittered(salt)),
    "iterable with a transform": Jittered,
    "torchdata": lambda salt: stateful(shuffle=True),
    "torchdata, sequential": lambda salt: stateful(),
    "torchdata with a generator": lambda salt: stateful(shuffle=True, generator=generator(salt)),
    "torchdata, distributed": lambda salt: stateful_distributed(),
    "user's own stateful": lambda salt: Resumable(),
    "list": lambda salt: [[1, 2], [3], [4, 5]],
    "tuple": lambda salt: (1, 2, 3),
    "range": lambda salt: range(4),
    "empty list": lambda salt: [],
    "iterable": Reshuffled,
}

WORKERS: dict[str, Callable[[int], Any]] = {
    "shuffled": lambda salt: loader(shuffle=True, num_workers=2),
    "generator, far ahead": lambda salt: loader(
        shuffle=True, num_workers=2, batch_size=1, prefetch_factor=3, generator=generator(salt)
    ),
    "with replacement": lambda salt: loader(
        sampler=RandomSampler(range(SAMPLES), True, 170, generator(salt)), batch_size=16, num_workers=2
    ),
    "one sample": lambda salt: loader(shuffle=True, batch_size=None, num_workers=2),
    "persistent": lambda salt: loader(shuffle=True, num_workers=2, persistent_workers=True),
    "persistent with a generator": lambda salt: loader(
        shuffle=True, num_workers=1, persistent_workers=True, generator=generator(salt)
    ),
    "persistent, eager sampler": lambda salt: loader(
        sampler=Eager(SAMPLES, salt), num_workers=1, persistent_workers=True
    ),
    "eager sampler": lambda salt: loader(sampler=Eager(SAMPLES, salt), num_workers=2),
    "batch sampler": lambda salt: loader(batch_sampler=Buckets(), num_workers=2),
    "stream": lambda salt: loader(Stream(augment=True, shuffled=True), num_workers=2),
    "torchdata": lambda salt: stateful(shuffle=True, num_workers=2),
    "torchdata with a generator": lambda salt: stateful(
        shuffle=True, num_workers=2, generator=generator(salt)
    ),
    "torchdata, persistent": lambda salt: stateful(shuffle=True, num_workers=2, persistent_workers=True),
}

AUGMENTED: dict[str, Callable[[int], Any]] = {
    "augmented": lambda salt: loader(Numbers(augment=True), shuffle=True, num_workers=2),
    "augmented at once": lambda salt: loader(AtOnce(augment=True), shuffle=True, num_workers=2),
    "augmented, one sample": lambda salt: loader(Numbers(augment=True), batch_size=None, num_workers=2),
    "augmented, persistent": lambda salt: loader(
        Numbers(augment=True), shuffle=True, num_workers=2, persistent_workers=True
    ),
    "augmented, spawned": lambda salt: loader(
        AtOnce(augment=True), shuffle=True, num_workers=1, multiprocessing_context="spawn"
    ),
}

# --- The oracle: what a run sees, step by step


EPOCHS = 2


@dataclass
class Cut:
    """A snapshot: where it lies in the log, the position, the RNGs."""

    place: int
    position: dict[str, object]
    rngs: dict[str, object]


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def plain(batch: Any) -> Any:
    return batch.tolist() if isinstance(batch, torch.Tensor) else batch


def draws() -> tuple[float, float, float]:
    """A training step that draws, as dropout does."""
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def log_of(batches: Iterable[Any], epochs: int = EPOCHS) -> list[Any]:
    """What an undisturbed run sees."""
    log: list[Any] = []
    for _ in range(epochs):
        for batch in batches:
            log.append((plain(batch), draws()))
        log.append(("end", draws()))
    return log


def run(tracked: Track, log: list[Any], cuts: list[Cut] | None = None, until: int = EPOCHS) -> list[Any]:
    """Train on until the epochs are over, taking a snapshot at every step boundary."""

    def snapshot() -> None:
        if cuts is not None:
            cuts.append(Cut(len(log), copy.deepcopy(tracked.state()), rng.capture()))

    taken_up = tracked.on_ready is None  # before that, the RNGs are not those of the position
    while tracked.epoch < until:
        if taken_up:
            snapshot()
        taken_up = True
        for batch in tracked:
            assert tracked.open
            log.append((plain(batch), draws()))
            tracked.settle()
            assert not tracked.open
            snapshot()
        log.append(("end", draws()))
    return log


def resumed(build: Callable[[int], Any], cut: Cut, salt: int = 77) -> Track:
    """A new process, as far as it goes: new objects, other seeds."""
    seed_all(1000 + salt)
    tracked = track(build(salt))
    tracked.load(copy.deepcopy(cut.position))
    tracked.on_ready = lambda: rng.restore(cut.rngs) and None
    return tracked


def whole_run(build: Callable[[int], Any]) -> tuple[list[Any], list[Cut]]:
    seed_all(11)
    cuts: list[Cut] = []
    log = run(track(build(1)), [], cuts)
    return log, cuts


def assert_plain(value: Any) -> None:
    if isinstance(value, dict):
        assert all(type(key) is str for key in value)
        for inner in value.values():
            assert_plain(inner)
    elif isinstance(value, (list, tuple)):
        assert type(value) in (list, tuple)
        for inner in value:
            assert_plain(inner)
    else:
        assert value is None or type(value) in (bool, int, float, str, bytes, torch.Tensor, np.ndarray)


# --- Using it changes nothing


@pytest.mark.parametrize("name", INLINE)
def test_tracking_changes_nothing(name: str) -> None:
    seed_all(11)
    undisturbed = log_of(INLINE[name](1))
    seed_all(11)
    assert log_of(track(INLINE[name](1))) == undisturbed
    assert whole_run(INLINE[name])[0] == undisturbed  # nor do snapshots


@pytest.mark.process
@pytest.mark.parametrize("name", WORKERS)
def test_tracking_changes_nothing_with_workers(name: str) -> None:
    seed_all(11)
    undisturbed = log_of(WORKERS[name](1))
    assert whole_run(WORKERS[name])[0] == undisturbed


def test_two_loaders_at_once_draw_in_the_same_order() -> None:
    """`iter` of a DataLoader draws at once: a generator would draw at the first `next`."""

    def batches(wrap: Callable[[Any], Any]) -> list[Any]:
        seed_all(3)
        first, second = wrap(loader(shuffle=True)), wrap(loader(shuffle=True))
        return [(plain(a), plain(b), draws()) for a, b in zip(first, second, strict=True)]

    assert batches(track) == batches(lambda loader: loader)


def test_draws_between_iter_and_next_are_repeated() -> None:
    def build(salt: int) -> Any:
        return loader(sampler=WeightedRandomSampler(WEIGHTS, 9))

    seed_all(3)
    tracked = track(build(1))
    batches = iter(tracked)
    torch.rand(3)
    next(batches)
    cut = Cut(1, tracked.state(), rng.capture())
    rest = [plain(batch) for batch in batches]
    assert [plain(batch) for batch in resumed(build, cut)] == rest


def test_two_loaders_at_once_are_resumed_together() -> None:
    def build() -> tuple[Track, Track]:
        return track(loader(shuffle=True)), track(loader(Numbers(augment=True), shuffle=True))

    seed_all(3)
    first, second = build()
    log: list[Any] = []
    for a, b in zip(first, second, strict=True):
        log.append((plain(a), plain(b), draws()))
        if len(log) == 1:
            positions, rngs = (first.state(), second.state()), rng.capture()

    seed_all(4)
    first, second = build()
    first.load(positions[0])
    second.load(positions[1])
    first.on_ready = lambda: rng.restore(rngs) and None  # the first to fetch: once is right
    assert [(plain(a), plain(b), draws()) for a, b in zip(first, second, strict=True)] == log[1:]


def test_the_loader_stays_as_it_is() -> None:
    original = loader(shuffle=True)
    before = dict(vars(original))
    tracked = track(original)
    list(tracked)
    tracked.state()
    assert vars(original) == before
    assert len(tracked) == len(original) == 3


def test_an_iterable_without_a_length_has_none() -> None:
    with pytest.raises(TypeError):
        len(track(Reshuffled(1)))


def test_something_that_cannot_be_iterated_is_refused() -> None:
    with pytest.raises(Mismatch, match="type int cannot be iterated"):
        track(5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("shuffled", MapTrack), ("stream", ReplayTrack), ("torchdata", StatefulTrack), ("list", ReplayTrack)],
)
def test_the_kind_is_chosen_by_what_the_loader_can_do(name: str, kind: type) -> None:
    assert type(track(INLINE[name](1))) is kind


def test_a_loader_with_an_iteration_of_its_own_is_replayed() -> None:
    class Twice(DataLoader[Any]):
        def __iter__(self) -> Any:
            return (twice for batch in super().__iter__() for twice in (batch, batch))

    def build(salt: int) -> Any:
        return Twice(Numbers(), batch_size=BATCH, shuffle=True)

    assert type(track(build(1))) is ReplayTrack
    log, cuts = whole_run(build)
    assert run(resumed(build, cuts[3]), log[: cuts[3].place]) == log


# --- Resuming


@pytest.mark.parametrize("name", INLINE)
def test_a_resume_from_every_cut_is_exact(name: str) -> None:
    build = INLINE[name]
    log, cuts = whole_run(build)
    assert len(cuts) == len(log)
    for cut in cuts:
        tracked = resumed(build, cut)
        assert tracked.state().keys() == cut.position.keys()
        assert run(tracked, log[: cut.place]) == log
        assert tracked.reasons() == []


@pytest.mark.process
@pytest.mark.parametrize("name", [*WORKERS, *AUGMENTED])
def test_a_resume_with_workers_is_exact(name: str) -> None:
    build = {**WORKERS, **AUGMENTED}[name]
    log, cuts = whole_run(build)
    few = cuts[5:6] if name.endswith("spawned") else cuts  # spawning takes seconds
    ends = [cut.place for cut in cuts if log[cut.place - 1][0] == "end" or log[cut.place][0] == "end"]
    for cut in few:
        if cut.place in (1, 5, *ends[-2:]):
            assert run(resumed(build, cut), log[: cut.place]) == log


@pytest.mark.parametrize("name", INLINE)
def test_a_resume_of_a_resume_is_exact(name: str) -> None:
    build = INLINE[name]
    log, cuts = whole_run(build)
    first = cuts[len(cuts) // 4]
    again: list[Cut] = []
    assert run(resumed(build, first), log[: first.place], again) == log
    for cut in again:
        assert run(resumed(build, cut, salt=78), log[: cut.place]) == log


@pytest.mark.process
@pytest.mark.parametrize("name", ["augmented", "augmented, persistent"])
def test_a_resume_of_a_resume_with_workers_is_exact(name: str) -> None:
    build = AUGMENTED[name]
    log, cuts = whole_run(build)
    again: list[Cut] = []
    assert run(resumed(build, cuts[1]), log[: cuts[1].place], again) == log
    assert run(resumed(build, again[3], salt=78), log[: again[3].place]) == log


@pytest.mark.parametrize("name", INLINE)
def test_a_position_is_handed_on_before_it_is_taken_up(name: str) -> None:
    """Snapshots go on while, say, the loader of the validation is not at work."""
    build = INLINE[name]
    log, cuts = whole_run(build)
    cut = cuts[len(cuts) // 2]
    waiting = resumed(build, cut)
    assert (waiting.epoch, waiting.delivered) == (cut.position["epoch"], cut.position["delivered"])
    later = Cut(cut.place, waiting.state(), cut.rngs)
    assert run(resumed(build, later, salt=78), log[: cut.place]) == log


def test_without_on_ready_a_resume_leaves_the_global_rngs_alone() -> None:
    _, cuts = whole_run(INLINE["eager sampler"])
    tracked = resumed(INLINE["eager sampler"], cuts[2])
    tracked.on_ready = None
    before = rng.fingerprint()
    next(iter(tracked))
    assert rng.fingerprint() == before


def test_on_ready_is_called_once_after_load_only() -> None:
    tracked = track(loader())
    calls: list[int] = []
    tracked.on_ready = lambda: calls.append(tracked.delivered)
    list(tracked)
    assert calls == []
    state = tracked.state()
    tracked.load(state)
    list(tracked)
    list(tracked)
    assert calls == [0]


def test_nothing_is_loaded_to_skip() -> None:
    _, cuts = whole_run(lambda salt: loader(shuffle=True))
    original = loader(shuffle=True)
    tracked = track(original)
    tracked.load(cuts[2].position)
    last = [plain(batch) for batch in tracked]
    assert original.dataset.loaded == last[0]  # type: ignore[attr-defined]


def test_batches_that_must_be_loaded_to_be_skipped_are_reported() -> None:
    _, cuts = whole_run(INLINE["stream"])
    tracked = resumed(INLINE["stream"], cuts[2])
    progress: list[tuple[int, int]] = []
    tracked.on_skip = lambda done, total: progress.append((done, total))
    next(iter(tracked))
    assert progress == [(1, 2), (2, 2)]


@pytest.mark.parametrize("name", [*INLINE])
def test_a_position_is_made_of_plain_values(name: str) -> None:
    for cut in whole_run(INLINE[name])[1]:
        assert_plain(cut.position)


def test_an_iterator_is_consumed_once() -> None:
    tracked = track(iter([1, 2, 3]))
    assert list(tracked) == [1, 2, 3]
    assert list(tracked) == []
    assert tracked.epoch == 2
    first = track(iter([1, 2, 3]))
    next(iter(first))
    tracked = track(iter([1, 2, 3]))
    tracked.load(first.state())
    assert list(tracked) == [2, 3]


def test_the_epoch_of_a_distributed_sampler_is_in_the_position() -> None:
    def build(salt: int) -> Any:
        return loader(sampler=DistributedSampler(range(SAMPLES), 2, 0))

    tracked = track(build(1))
    tracked.loader.sampler.set_epoch(7)
    batches = [plain(batch) for batch in tracked]
    next(iter(tracked))
    position = tracked.state()

    other = track(build(2))
    other.load(position)
    assert [plain(batch) for batch in other] == batches[1:]
    # Between epochs, what the user sets after the load holds.
    position = other.state()
    other = track(build(3))
    other.load(position)
    assert other.loader.sampler.epoch == 7
    other.loader.sampler.set_epoch(8)
    next(iter(other))
    assert other.loader.sampler.epoch == 8


def test_a_generator_of_the_dataset_goes_on_where_it_was() -> None:
    class Noisy(Numbers):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.transforms = [random.Random(seed)]

        def __getitem__(self, index: int) -> float:
            return self.transforms[0].random()

    def build(salt: int) -> Any:
        return loader(Noisy(salt))

    log, cuts = whole_run(build)
    for cut in cuts:
        assert run(resumed(build, cut), log[: cut.place]) == log


def test_a_generator_of_the_dataset_goes_on_after_a_failed_batch() -> None:
    class Flaky(Numbers):
        def __init__(self, seed: int, broken: bool) -> None:
            super().__init__()
            self.own = random.Random(seed)
            self.broken = broken

        def __getitem__(self, index: int) -> float:
            drawn = self.own.random()
            if index == 5 and self.broken:
                self.broken = False
                raise OSError("the disk is away")
            return drawn

    first = track(loader(Flaky(1, broken=True)))
    with pytest.raises(OSError, match="the disk is away"):
        list(first)
    second = track(loader(Flaky(2, broken=False)))
    second.load(first.state())
    assert [plain(batch) for batch in second] == [plain(batch) for batch in first]


SHARED: dict[str, Callable[[torch.Generator], Any]] = {
    "map": lambda own: loader(shuffle=True, generator=own),
    "sampler": lambda own: loader(sampler=WeightedRandomSampler(WEIGHTS, 9, generator=own)),
    "stream": lambda own: loader(Stream(), generator=own),
    "torchdata": lambda own: stateful(shuffle=True, generator=own),
    "workers": lambda own: loader(shuffle=True, generator=own, num_workers=2, prefetch_factor=1),
    "persistent": lambda own: loader(shuffle=True, generator=own, num_workers=1, persistent_workers=True),
}


@pytest.mark.process
@pytest.mark.parametrize("name", SHARED)
def test_a_generator_that_the_training_draws_from_too_goes_on_where_it_was(name: str) -> None:
    def steps(tracked: Track, own: torch.Generator) -> Iterator[Any]:
        while tracked.epoch < EPOCHS:
            for batch in tracked:
                yield plain(batch), torch.rand((), generator=own).item()

    own = generator(1)
    tracked = track(SHARED[name](own))
    log: list[Any] = []
    positions: list[Any] = []
    for step in steps(tracked, own):
        log.append(step)
        positions.append(copy.deepcopy(tracked.state()))

    for cut in (1, 2, 3):
        own = generator(2)
        again = track(SHARED[name](own))
        again.load(positions[cut - 1])
        assert [*log[:cut], *steps(again, own)] == log
        assert again.reasons() == []


@pytest.mark.process
def test_another_number_of_workers_keeps_an_order_that_is_drawn_bit_by_bit() -> None:
    def build(seed: int, workers: int) -> Track:
        sampler = RandomSampler(range(SAMPLES), True, 170, generator(seed))  # drawn 32 at a time
        return track(loader(sampler=sampler, batch_size=16, num_workers=workers))

    first = build(1, workers=2)
    batches = iter(first)
    next(batches)
    second = build(2, workers=0)
    second.load(first.state())
    assert [plain(batch) for batch in second] == [plain(batch) for batch in batches]


# --- Leaving a loop early


@pytest.mark.parametrize("name", INLINE)
def test_an_abandoned_epoch_is_continued(name: str) -> None:
    build = INLINE[name]
    seed_all(11)
    undisturbed = log_of(build(1), epochs=1)
    seed_all(11)
    tracked = track(build(1))
    log: list[Any] = []
    while tracked.epoch < 1:
        for batch in tracked:
            log.append((plain(batch), draws()))
            break
    log.append(("end", draws()))
    assert log == undisturbed


@pytest.mark.process
def test_an_abandoned_epoch_keeps_its_workers() -> None:
    class Pids(Numbers):
        def __getitem__(self, index: int) -> int:
            worker = get_worker_info()
            assert worker is not None
            return worker.seed

    tracked = track(loader(Pids(), num_workers=1, batch_size=1))
    seeds = set()
    for _ in range(4):
        for batch in tracked:
            seeds.add(int(batch))
            break
    assert len(seeds) == 1
    assert tracked.delivered == 4


@pytest.mark.process
def test_close_ends_the_workers_and_keeps_the_position() -> None:
    tracked = track(loader(num_workers=1, persistent_workers=True))
    batches = iter(tracked)
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 1
    batches.close()
    tracked.close()
    assert multiprocessing.active_children() == []
    assert [plain(batch) for batch in tracked] == [[4, 5, 6, 7], [8, 9]]
    tracked.close()


def test_an_iteration_that_a_load_overtook_ends() -> None:
    tracked = track(loader())
    position = tracked.state()
    batches = iter(tracked)
    next(batches)
    tracked.load(position)
    assert list(batches) == []
    assert len(list(tracked)) == 3
    assert (tracked.epoch, tracked.delivered) == (1, 0)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.process)])
def test_a_batch_that_failed_is_not_lost(workers: int) -> None:
    class Flaky(Numbers):
        def __init__(self) -> None:
            super().__init__()
            self.broken = torch.ones((), dtype=torch.bool).share_memory_()

        def __getitem__(self, index: int) -> int:
            if index == 5 and self.broken:
                raise OSError("the disk is away")
            return index

    original = loader(Flaky(), num_workers=workers)
    tracked = track(original)
    batches = []
    with pytest.raises(OSError, match="the disk is away"):
        batches.extend(plain(batch) for batch in tracked)
    assert tracked.state()["delivered"] == 1
    original.dataset.broken.fill_(False)  # type: ignore[attr-defined]
    assert [plain(batch) for batch in tracked] == [[4, 5, 6, 7], [8, 9]]


# --- What does not fit


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (lambda: loader(Numbers(20)), lambda: loader(Numbers(21)), ["samples 20", "samples 21"]),
        (lambda: loader(batch_size=2), lambda: loader(batch_size=3), ["batch_size 2", "batch_size 3"]),
        (lambda: loader(), lambda: loader(drop_last=True), ["batches 3", "batches 2"]),
        (lambda: [1, 2, 3], lambda: [1, 2], ["batches 3", "batches 2"]),
        (lambda: [1, 2, 3], lambda: loader(), ["'replay'", "'map'"]),
        (lambda: loader(), lambda: stateful(), ["'map'", "'stateful'"]),
        (lambda: stateful(), lambda: stateful(num_workers=1), ["0 workers", "1 workers"]),
    ],
)
def test_a_position_that_does_not_fit_is_refused(before: Any, after: Any, words: list[str]) -> None:
    first = track(before())
    next(iter(first))
    second = track(after())
    with pytest.raises(Mismatch) as caught:
        second.load(first.state())
    assert all(word in str(caught.value) for word in words)
    assert (second.epoch, second.delivered) == (0, 0)
    assert not second.state()["begun"]


def test_between_epochs_the_sizes_may_change() -> None:
    first = track(loader(batch_size=2))
    list(first)
    second = track(loader(batch_size=5))
    second.load(first.state())
    assert len(list(second)) == 2
    assert second.epoch == 2


def test_a_sampler_that_became_shorter_is_refused() -> None:
    class Shrinking(Eager):
        def __iter__(self) -> Iterator[int]:
            return iter(range(self.shown))

    def build(shown: int) -> Any:
        sampler = Shrinking(SAMPLES, 1)
        vars(sampler)["shown"] = shown
        return loader(sampler=sampler)

    first = track(build(10))
    batches = iter(first)
    next(batches)
    next(batches)
    second = track(build(3))
    second.load(first.state())
    with pytest.raises(Mismatch, match="after 2 batches, this loader has a sampler that ends after 1"):
        iter(second)


def test_an_iterable_that_became_shorter_is_refused() -> None:
    first = track(iter(range(5)))
    batches = iter(first)
    for _ in range(3):
        next(batches)
    second = track(iter(range(2)))
    second.load(first.state())
    with pytest.raises(Mismatch, match="after 3 batches, this loader ends after 2"):
        iter(second)


# --- Why a resume is only approximate


def reasons_after_an_epoch_under_way(loader: Any, batches: int = 3) -> list[str]:
    tracked = track(loader)
    for _ in tracked:
        draws()
        if tracked.delivered == batches:
            break
    return tracked.reasons()


def test_a_sampler_that_keeps_drawing_is_a_reason() -> None:
    assert reasons_after_an_epoch_under_way(loader(sampler=Drawing())) == [
        "the sampler Drawing draws from the global RNG while the epoch runs"
    ]


def test_an_order_that_does_not_repeat_is_a_reason() -> None:
    class Cumulative(Eager):
        def __init__(self) -> None:
            super().__init__(SAMPLES, 1)
            self.order = np.arange(SAMPLES)

        def __iter__(self) -> Iterator[int]:
            np.random.shuffle(self.order)  # on top of the last epoch's order, which no snapshot holds
            return iter(self.order.tolist())

    def build(salt: int) -> Any:
        return loader(sampler=Cumulative())

    _, cuts = whole_run(build)
    tracked = resumed(build, cuts[1])
    next(iter(tracked))
    assert tracked.reasons() == []
    tracked = resumed(build, cuts[-1])
    list(tracked)
    tracked = resumed(build, cuts[-2])
    next(iter(tracked))
    assert tracked.reasons() == ["the sampler Cumulative did not repeat the order of the epoch"]


def test_an_order_that_others_draw_in_between_of_is_a_reason() -> None:
    def build(seed: int) -> tuple[torch.Generator, Track]:
        own = generator(seed)
        sampler = RandomSampler(range(SAMPLES), True, 170, own)  # drawn 32 at a time
        return own, track(loader(sampler=sampler, batch_size=16))

    own, tracked = build(1)
    for _ in tracked:
        torch.rand((), generator=own)
        if tracked.delivered == 5:
            break
    _, again = build(2)
    again.load(tracked.state())
    next(iter(again))
    assert again.reasons() == ["the sampler RandomSampler did not repeat the order of the epoch"]


def test_fetches_that_draw_in_between_the_training_are_a_reason() -> None:
    reason = "fetching from the DataLoader draws from the global RNG, in between the training's draws"
    assert reasons_after_an_epoch_under_way(loader(Stream(augment=True))) == [reason]
    assert reasons_after_an_epoch_under_way(loader(Stream(shuffled=True))) == []


def test_fetches_that_draw_are_exact_where_the_training_does_not() -> None:
    def build(salt: int) -> Any:
        return loader(Stream(augment=True))

    seed_all(11)
    tracked = track(build(1))
    batches = iter(tracked)
    next(batches)
    cut = Cut(0, tracked.state(), rng.capture())
    rest = [plain(batch) for batch in batches]

    again = resumed(build, cut)
    batches = iter(again)
    assert plain(next(batches)) == rest[0]
    assert again.reasons() == []
    draws()
    next(batches)
    assert len(again.reasons()) == 1


def test_generators_of_a_dataset_in_workers_are_reasons() -> None:
    class Transform:
        def __init__(self) -> None:
            self.rng = torch.Generator()

    class Noisy(Numbers):
        def __init__(self) -> None:
            super().__init__()
            self.rng = np.random.default_rng(1)
            self.transforms = [Transform()]

    assert track(loader(Noisy(), num_workers=1)).reasons() == [
        f"the dataset keeps a random generator of its own ({path}), which loader workers advance"
        for path in ("dataset.rng", "dataset.transforms[0].rng")
    ]
    assert track(loader(Noisy())).reasons() == []


def test_workers_out_of_order_are_a_reason() -> None:
    assert "in_order" in track(loader(num_workers=1, in_order=False)).reasons()[0]
    assert "in_order" in track(loader(Stream(), num_workers=1, in_order=False)).reasons()[0]


def test_workers_of_torchdata_are_a_reason() -> None:
    assert "workers of StatefulDataLoader start anew" in track(stateful(num_workers=1)).reasons()[0]


@pytest.mark.process
def test_another_number_of_workers_is_a_reason_and_keeps_the_order() -> None:
    log, cuts = whole_run(INLINE["shuffled"])
    tracked = resumed(WORKERS["shuffled"], cuts[1])
    assert tracked.reasons() == ["the snapshot was taken with 0 loader workers, there are 2 now"]
    assert run(tracked, log[: cuts[1].place]) == log


# --- Random numbers inside workers


@pytest.mark.process
def test_augmentation_in_workers_depends_on_seed_epoch_and_place_alone() -> None:
    def batches(workers: int, seed: int = 1) -> list[Any]:
        seed_all(seed)
        tracked = track(loader(Numbers(augment=True), num_workers=workers))
        return [plain(batch) for _ in range(2) for batch in tracked]

    one = batches(1)
    assert batches(2) == one
    assert batches(1, seed=2) != one
    samples = [tuple(sample) for batch in one for sample in batch]
    assert len({sample[1:] for sample in samples}) == len(samples) == 2 * SAMPLES
    assert len({value for sample in samples for value in sample[1:]}) == 3 * 2 * SAMPLES


def mark_dataset(worker_id: int) -> None:
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, Numbers)
    assert len(info.dataset) == SAMPLES
    assert info.dataset[3].shape == (4,)
    info.dataset.augment = False


@pytest.mark.process
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_worker_sees_the_dataset(context: str) -> None:
    tracked = track(
        loader(
            Numbers(augment=True), num_workers=1, worker_init_fn=mark_dataset, multiprocessing_context=context
        )
    )
    assert [plain(batch) for batch in tracked] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("kind", [Numbers, AtOnce])
def test_the_seeding_dataset_is_the_dataset(kind: type[Numbers]) -> None:
    inner = kind(augment=True)
    dataset: Any = pickle.loads(pickle.dumps(workers.seeding(inner)))
    assert isinstance(dataset, kind)
    assert len(dataset) == SAMPLES
    assert hasattr(dataset, "__getitems__") == (kind is AtOnce)
    dataset.extra = 3
    assert dataset.extra == 3
    del dataset.extra
    assert not hasattr(dataset, "extra")

    with rng.aside():
        one = dataset[workers.Seeded(2**64 - 1, 4)].tolist()
        assert dataset[workers.Seeded(2**64 - 1, 4)].tolist() == one
        assert dataset[workers.Seeded(5, 4)].tolist() != one
        assert one[0] == 4
        assert len(set(one)) == 4


def test_the_seeds_of_an_epoch_do_not_depend_on_the_batches() -> None:
    seeds = workers.seeds(2**64 - 1, 0, 100)
    assert workers.seeds(2**64 - 1, 0, 60) + workers.seeds(2**64 - 1, 60, 40) == seeds
    assert len(set(seeds)) == 100
    assert workers.seeds(0, 0, 1) == [0xE220A8397B1DCDAF]  # of the reference implementation
