"""The order of an epoch: what it grows from, and how it is repeated.

An order grows from a few states as of the epoch's start: the RNGs, and the generators and counters of the
samplers. `Origin` takes these states and puts them back. `Order` stands in the place of a loader's sampler:
it takes the origin of each epoch as that begins, and repeats an epoch by starting from its origin and
pulling the index batches that were delivered. To pull an index batch loads no sample.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from blake3 import blake3
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from everstep.errors import Mismatch
from everstep.state import rng, workers

State = dict[str, Any]
"""A part of a position: plain values, tensors and arrays, by name."""


class Origin:
    """The states that the order of an epoch grows from.

    Besides the global RNGs these are, of a loader and its samplers: the generators they carry; the
    counters, which are the scalar attributes that have changed since the start (`epoch` of a
    `DistributedSampler`); and their `state_dict`, where they have one.

    Args:
        parts: the loader, its samplers, and what else has a say in the order, by name.
        with_states: whether a part's `state_dict` belongs to it.
        nested: whether the attributes of the parts' attributes are searched for generators too.
    """

    def __init__(
        self, parts: Mapping[str, object], *, with_states: bool = True, nested: bool = False
    ) -> None:
        self._parts = dict(parts)
        self._nested = nested
        # The scalars of a DataLoader are settings, such as `num_workers`.
        self._counted = {name: part for name, part in parts.items() if not isinstance(part, DataLoader)}
        self._stateful: dict[str, Any] = {
            name: part
            for name, part in self._counted.items()
            if with_states and hasattr(part, "state_dict") and hasattr(part, "load_state_dict")
        }
        self._settings = self._scalars()

    def generators(self) -> State:
        """The states of the generators alone."""
        return workers.generator_states(self._generators())

    def draws(self) -> State:
        """What a draw can move: the generators and the global RNGs."""
        return {"generators": self.generators(), "rng": rng.capture(devices=False)}

    def carried(self) -> State:
        """All but the global RNGs."""
        return {
            "states": {name: copy.deepcopy(part.state_dict()) for name, part in self._stateful.items()},
            "counters": self._counters(),
            "generators": self.generators(),
        }

    def everything(self) -> State:
        """All that the order grows from."""
        return {**self.carried(), "rng": rng.capture(devices=False)}

    def put(self, state: State) -> None:
        """Put back what of `everything` is in `state`.

        Raises:
            Mismatch: a generator is of another type than its state.
        """
        # A sampler's `state_dict` at the end of an epoch asks to continue there, when it is the start of the
        # next one that is meant: the scalars stay what they are, or become what is on record.
        scalars = self._scalars()
        for name, part_state in state.get("states", {}).items():
            if name in self._stateful:
                self._stateful[name].load_state_dict(part_state)
        counters = state.get("counters", {})
        self._put_scalars({**scalars, **counters})
        for name in counters:
            self._settings.pop(name, None)  # what was on record once stays so
        workers.put_generators(self._generators(), state.get("generators", {}))
        rng.restore(state.get("rng", {}))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A block that leaves everything carried as it was."""
        scalars, before = self._scalars(), self.carried()
        try:
            yield
        finally:
            self.put(before)
            self._put_scalars(scalars)

    def _generators(self) -> dict[str, object]:
        found: dict[str, object] = {}
        seen: set[int] = set()  # a loader's generator is mostly its sampler's as well
        for name, part in self._parts.items():
            for path, generator in workers.generators_in(part, name, nested=self._nested).items():
                if id(generator) not in seen:
                    seen.add(id(generator))
                    found[path] = generator
        return found

    def _scalars(self) -> State:
        return {
            f"{name}/{attribute}": value
            for name, part in self._counted.items()
            for attribute, value in getattr(part, "__dict__", {}).items()
            if value is None or isinstance(value, (bool, int, float, str))
        }

    def _put_scalars(self, scalars: State) -> None:
        for name, value in scalars.items():
            part, _, attribute = name.rpartition("/")
            if part in self._counted:
                vars(self._counted[part])[attribute] = value

    def _counters(self) -> State:
        return {
            name: value
            for name, value in self._scalars().items()
            if name not in self._settings or self._settings[name] != value
        }


@dataclass
class Start:
    """An epoch's start: the states when the sampler's iterator was made, and at its first pull.

    Both, since what a sampler draws it may draw at either, and a loader draws a seed in between or not.

    Attributes:
        made: `Origin.everything` before the sampler's `__iter__`.
        pulled: `Origin.draws` before its first `next`; None: there was none yet.
        seed: 64 bits that the seeds of the epoch's samples grow from.
    """

    made: State
    pulled: State | None = None
    seed: int = 0


class Order:
    """The sampler of the copy of a loader: the loader's own, with the start of the epoch on record.

    It must not know the copy, nor the track: an iterator in a cycle of references would be left to the
    garbage collector, and that may run in the very thread that is to tell the workers to end.

    Args:
        loader: the loader whose sampler, or batch sampler, this stands for.
        origin: what the order of that sampler grows from.
        notes: where reasons are left, as keys. Shared with the track, which this must not know.

    Attributes:
        name: the type of the user's sampler, for messages.
        epoch: finished epochs, set by the track before each iteration.
        instead: what the next iteration goes by in the sampler's place; None: nothing.
        pulls: the latest iteration.
    """

    pulls: Pulls

    def __init__(self, loader: DataLoader[Any], origin: Origin, notes: dict[str, None]) -> None:
        self.sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self.name = type(_source(self.sampler)).__name__
        self.origin = origin
        self.notes = notes
        self.epoch = 0
        self.trusted = _draws_at_first_pull_only(self.sampler)
        self.workers = loader.num_workers
        self.at_once = loader.batch_sampler is None or workers.fetches_at_once(loader.dataset)
        self.ahead = self.workers * (loader.prefetch_factor or 0) + 1
        self.repeats: Start | None = None
        self.skips = 0
        self.instead: Any = None
        self._generator = loader.generator
        self._silent = False

    def __iter__(self) -> Iterator[Any]:
        if self._silent:
            return iter(())
        self.pulls = Pulls(self)
        return self.pulls

    def __len__(self) -> int:
        return len(self.sampler)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """A block in which the order looks empty, and the sampler is left alone."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

    @contextmanager
    def repeating(self, start: Start, skips: int) -> Iterator[None]:
        """A block in which an iterator that is made is that of the epoch of `start`, `skips` pulls on."""
        self.repeats, self.skips = start, skips
        try:
            yield
        finally:
            self.repeats = None

    def epoch_seed(self) -> int:
        """64 bits from where torch draws the seed of workers, without consuming it."""
        state = torch.get_rng_state() if self._generator is None else self._generator.get_state()
        digest = blake3(state.numpy().tobytes() + self.epoch.to_bytes(8, "little")).digest(8)
        return int.from_bytes(digest, "little")


class Pulls:
    """The index batches of one epoch, as they are pulled from the sampler.

    Attributes:
        start: where the epoch began.
        asked: how often the sampler was asked for its next index batch, the repeated pulls included.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._repeats = order.repeats
        if self._repeats is not None:
            order.origin.put(self._repeats.made)
        self.start = Start(made=order.origin.everything())
        self._inner = iter(order.sampler if order.instead is None else order.instead)
        self.asked = 0
        self._taken = 0
        self._samples = 0
        self._marks = deque([b""], maxlen=order.ahead + 1)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.catch_up()
        if self.start.pulled is None:
            self.start.pulled = self._order.origin.draws()
            self.start.seed = self._order.epoch_seed()
        first, batch = self._samples, self._pull()
        if not self._order.workers:
            return batch
        if self._order.at_once:
            return workers.Seeded(workers.seeds(self.start.seed, first, 1)[0], batch)
        return workers.SeededEach(self.start.seed, first, list(batch))

    def catch_up(self) -> None:
        """Repeat the pulls of the epoch that is repeated, if any. Loads nothing.

        Raises:
            Mismatch: the sampler has fewer index batches than were delivered.
        """
        repeats, self._repeats = self._repeats, None
        if repeats is None or repeats.pulled is None:
            return
        self._order.origin.put(repeats.pulled)
        self.start.pulled, self.start.seed = repeats.pulled, repeats.seed
        skip(self._pull, self._order.skips, "has a sampler that ends after")

    def mark(self, delivered: int) -> bytes:
        """A digest of the first `delivered` index batches; empty where the order needs no proof."""
        behind = self._taken - delivered
        return self._marks[-1 - behind] if 0 <= behind < len(self._marks) else b""

    def _pull(self) -> Any:
        self.asked += 1
        batch = self._next() if self._order.trusted else self._watched_next()
        self._taken += 1
        self._samples += 1 if self._order.at_once else len(batch)
        return batch

    def _next(self) -> Any:
        batch = next(self._inner)
        if self._order.at_once or isinstance(batch, Sized):
            return batch
        return list(batch)  # a generator, say, which counting and marking must not use up

    def _watched_next(self) -> Any:
        before = rng.fingerprint(devices=False)
        batch = self._next()
        if self._taken and rng.fingerprint(devices=False) != before:
            reason = f"the sampler {self._order.name} draws from the global RNG while the epoch runs"
            self._order.notes[reason] = None
        self._marks.append(blake3(self._marks[-1] + repr(batch).encode()).digest(8))
        return batch


def ordered(loader: DataLoader[Any], order: Order) -> DataLoader[Any]:
    """A copy of the loader that goes by `order`, and whose workers draw as it says."""
    twin = copy.copy(loader)
    key = "sampler" if loader.batch_sampler is None else "batch_sampler"
    # Past `DataLoader.__setattr__`, which refuses these attributes on a finished loader.
    vars(twin).update({key: order, "_iterator": None})
    if loader.num_workers:
        vars(twin)["dataset"] = workers.seeding(loader.dataset)
    return twin


def samplers(loader: DataLoader[Any]) -> dict[str, object]:
    """The samplers of a loader, and the one that its batch sampler batches, each once."""
    candidates = {
        "sampler": loader.sampler,
        "batch_sampler": loader.batch_sampler,
        "batch_sampler.sampler": getattr(loader.batch_sampler, "sampler", None),
    }
    found: dict[str, object] = {}
    for name, part in candidates.items():
        if part is not None and not any(part is other for other in found.values()):
            found[name] = part
    return found


def skip(
    fetch: Callable[[], Any], count: int, ending: str, report: Callable[[int, int], None] | None = None
) -> None:
    """Call `fetch` for each of the `count` batches that were delivered, and drop what it gives.

    Args:
        ending: what the loader does when there are fewer, in the words before their number.
        report: called with (done, total) after each.

    Raises:
        Mismatch: `fetch` raised StopIteration before.
    """
    for done in range(count):
        try:
            fetch()
        except StopIteration:
            raise misfit(f"after {count} batches", f"{ending} {done}") from None
        if report is not None:
            report(done + 1, count)


def misfit(then: str, now: str) -> Mismatch:
    """The error that a position is not one of this loader; `then` and `now` name what differs."""
    return Mismatch(
        f"The position in the data does not fit: the snapshot was taken {then}, this loader {now}",
        kept="nothing was changed",
        next="give the loader the dataset, sampler and sizes it had when the snapshot was taken.",
    )


def _source(sampler: Any) -> Any:
    """The sampler that a batch sampler of torch batches; else the sampler itself."""
    return sampler.sampler if type(sampler) is BatchSampler else sampler


def _draws_at_first_pull_only(sampler: Any) -> bool:
    """torch's own samplers are known to draw nothing later on; subclasses are not."""
    source = _source(sampler)
    if type(source) is RandomSampler and source.generator is not None:
        # Past the first permutation it goes on drawing, from a generator that others may draw from as well.
        return not source.replacement and source.num_samples <= len(source.data_source)
    return type(source) in (
        SequentialSampler,
        RandomSampler,
        SubsetRandomSampler,
        WeightedRandomSampler,
        DistributedSampler,
    )
