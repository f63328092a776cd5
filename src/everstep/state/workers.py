"""The random numbers that are drawn to fetch samples: in this process, or in a loader's workers.

Without workers they come from the global RNGs, which are not this module's affair, and from generators that
a dataset keeps for itself, whose states are looked up here. The RNGs inside a worker cannot be asked for
their state from outside. So with workers every sample travels with a seed, and the worker's copy of the
dataset seeds its RNGs from it: what is drawn is a function of the seed, and can be drawn again.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from everstep.state import rng

_LONGEST_LIST = 64  # transforms are listed in few items; a list of samples is not worth the search


# --- Seeds for the samples


@dataclass(slots=True)
class Seeded:
    """An index, or an index batch, and the seed of the random numbers drawn to fetch it."""

    seed: int
    index: Any


@dataclass(slots=True)
class SeededEach:
    """An index batch that is fetched sample by sample. The seeds are made in the worker, which has time."""

    seed: int
    first: int
    indices: list[Any]

    def __iter__(self) -> Iterator[Seeded]:
        return map(Seeded, seeds(self.seed, self.first, len(self.indices)), self.indices)


def seeds(seed: int, first: int, count: int) -> list[int]:
    """Numbers `first` and on of the splitmix64 sequence of `seed`, 64 bits each.

    Any number of the sequence is made without those before it, so the seed of a sample depends neither on
    how samples are batched nor on which worker fetches them.
    """
    place = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    mixed = place * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    sequence: list[int] = (mixed ^ (mixed >> np.uint64(31))).tolist()
    return sequence


def fetches_at_once(dataset: Any) -> bool:
    """Whether the dataset takes an index batch as a whole: torch looks for the method as it is done here."""
    return bool(getattr(dataset, "__getitems__", None))


# --- The dataset inside a worker


def seeding(dataset: Any) -> _Seeding:
    """The dataset, seeding the global RNGs of its process before each sample that comes with a seed."""
    return _SeedingBatches(dataset) if fetches_at_once(dataset) else _Seeding(dataset)


class _Seeding:
    """A dataset that seeds the global RNGs of its process before each sample; otherwise the dataset itself.

    In a worker, `get_worker_info().dataset` is this: attributes are read from, and set on, the dataset.
    """

    __slots__ = ("_everstep_dataset",)
    _everstep_dataset: Any

    def __init__(self, dataset: Any) -> None:
        object.__setattr__(self, "_everstep_dataset", dataset)  # past `__setattr__`, which hands on

    def __getitem__(self, item: Any) -> Any:
        return self._everstep_dataset[_unseeded(item)]

    def __len__(self) -> int:
        return len(self._everstep_dataset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._everstep_dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._everstep_dataset, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._everstep_dataset, name)

    def __reduce__(self) -> Any:
        return type(self), (self._everstep_dataset,)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # for `isinstance` in a user's `worker_init_fn`
        return type(self._everstep_dataset)


class _SeedingBatches(_Seeding):
    """One whose dataset fetches batches at once: torch looks for the method, and takes it if it is there."""

    __slots__ = ()

    def __getitems__(self, item: Any) -> Any:
        return self._everstep_dataset.__getitems__(_unseeded(item))


def _unseeded(item: Any) -> Any:
    if not isinstance(item, Seeded):
        return item  # the user's own code asks
    _seed_process(item.seed)
    return item.index


def _seed_process(seed: int) -> None:
    random.seed(seed)
    # The upper half: torch's twister is seeded by the lower one, and must not run in step with numpy's.
    np.random.seed(seed >> 32)
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would reach for every accelerator


# --- Generators that objects keep for themselves


def generators_in(obj: object, path: str, *, nested: bool = False) -> dict[str, object]:
    """The generators among the attributes of `obj`, and in short lists there, by their paths.

    With `nested`, the attributes of these are searched as well: the transforms of a dataset, say.
    """
    near = list(_members(obj, path))
    far = [member for inner, value in near for member in _members(value, inner)] if nested else []
    return {name: value for name, value in (*near, *far) if rng.is_generator(value)}


def generator_states(generators: Mapping[str, object]) -> dict[str, Any]:
    """The states of generators, by their paths, in plain values."""
    return {name: rng.generator_state(generator) for name, generator in generators.items()}


def put_generators(generators: Mapping[str, object], states: Mapping[str, Any]) -> None:
    """Put `generator_states` back; states of generators that are not there are passed over.

    Raises:
        Mismatch: a generator is of another type than its state.
    """
    for name, state in states.items():
        if name in generators:
            rng.set_generator_state(generators[name], state)


def fetched_from(loader: Any) -> dict[str, object]:
    """The private generators that fetching advances in this process, rather than in a worker."""
    if not isinstance(loader, DataLoader) or loader.num_workers:
        return {}
    return generators_in(loader.dataset, "dataset", nested=True)


def _members(obj: object, path: str) -> Iterator[tuple[str, object]]:
    for name, value in getattr(obj, "__dict__", {}).items():
        yield f"{path}.{name}", value
        if isinstance(value, (list, tuple)) and len(value) <= _LONGEST_LIST:
            yield from ((f"{path}.{name}[{index}]", item) for index, item in enumerate(value))


# --- What workers make approximate


def worker_reasons(loader: DataLoader[Any]) -> list[str]:
    """Why a resume of a loader with workers would only be approximate; empty: it is exact."""
    if not loader.num_workers:
        return []
    kept = [
        f"the dataset keeps a random generator of its own ({path}), which loader workers advance"
        for path in generators_in(loader.dataset, "dataset", nested=True)
    ]
    return kept + timing_reasons(loader)


def timing_reasons(loader: DataLoader[Any]) -> list[str]:
    """Why the order of the batches depends on timing; empty: it does not."""
    if loader.num_workers and not getattr(loader, "in_order", True):
        return ["the loader has in_order=False: which batches come first depends on timing"]
    return []


def need_no_worker(batches: object) -> None:
    """From now on a loader's iterator shares no lock with its workers but those of their queues.

    A scheduler that signals a whole process group may kill a worker which holds the lock of the event that is
    to end them all, and torch asks for it when it finds a worker dead: the process would wait forever.
    """
    if hasattr(batches, "_workers_done_event"):
        batches._workers_done_event = threading.Event()


def let_workers_end_with_the_process() -> None:
    """Tell torch's loaders, those that nobody tracks too, that the process is about to end: they then leave
    their workers to the exit of `multiprocessing`, which kills them, instead of asking them to stop."""
    from torch.utils.data import _utils

    flag = getattr(_utils, "_set_python_exit_flag", None)
    if flag is not None:
        flag()
