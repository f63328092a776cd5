"""How the samples of an epoch are dealt to ranks, and dealt anew to another number of them.

A `DistributedSampler` puts the whole dataset in one order, the same on all ranks, and deals it out like
cards: rank r of N gets every N-th from number r on. So after as many batches on each rank what is consumed
is the beginning of that order. The rest of it can be dealt to any number of ranks, and dealt once more
later on.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from blake3 import blake3
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

_KNOWN = ("torch.", "torchdata.")
"""Whose samplers are known to deal so. Others may do whatever they like."""


@dataclass(frozen=True)
class Deal:
    """What of an epoch one rank gets.

    Attributes:
        rank, ranks: among those that share the data, which need not be all that train.
        samples: in the dataset.
        batch: samples in a batch of one rank.
        epoch, seed, shuffle: what the order depends on.
        even: leave out what does not go round, instead of dealing some twice.
        before: how many samples of the order were consumed before it was dealt like this.
    """

    rank: int
    ranks: int
    samples: int
    batch: int
    epoch: int
    seed: int
    shuffle: bool
    even: bool
    before: int = 0

    @classmethod
    def of(cls, loader: Any) -> Deal | None:
        """How a loader's epoch is dealt; None where that is not known."""
        if not isinstance(loader, DataLoader) or not _is_known(loader.batch_sampler, BatchSampler):
            return None
        sampler = loader.sampler
        if not _is_known(sampler, DistributedSampler) or callable(
            getattr(loader.dataset, "state_dict", None)
        ):
            return None
        assert isinstance(sampler, DistributedSampler)
        return cls(
            rank=sampler.rank,
            ranks=sampler.num_replicas,
            samples=len(sampler.dataset),  # type: ignore[arg-type]
            batch=int(getattr(loader.batch_sampler, "batch_size", 0) or 0),
            epoch=sampler.epoch,
            seed=sampler.seed,
            shuffle=sampler.shuffle,
            even=sampler.drop_last,
        )

    @classmethod
    def read(cls, saved: Any) -> Deal | None:
        """The deal that `saved` says; None where it says none."""
        return cls(**saved) if isinstance(saved, Mapping) else None

    def saved(self) -> dict[str, Any]:
        """In plain values."""
        return asdict(self)

    def anew(self, delivered: int, live: Deal) -> Deal:
        """What is left after so many batches on each rank, as ranks like those of `live` get it."""
        return replace(
            self,
            rank=live.rank,
            ranks=live.ranks,
            batch=live.batch,
            even=live.even,
            before=self.consumed(delivered),
        )

    def consumed(self, delivered: int) -> int:
        """How many samples of the order are consumed after so many batches on each rank."""
        each = min(delivered * self.batch, self._each())
        return min(self.before + each * self.ranks, self.samples)

    def indices(self, loader: DataLoader[Any]) -> list[int]:
        """Which samples this rank gets, in order."""
        order = self._order(loader)
        rest, each = order[self.before :], self._each()
        # So that all ranks have as many: as the sampler does, which begins anew.
        padded = rest + [order[number % len(order)] for number in range(each * self.ranks - len(rest))]
        return padded[self.rank : each * self.ranks : self.ranks]

    def seeded(self, seed: int) -> int:
        """64 bits for this rank and this deal, out of a seed of the epoch."""
        text = f"{seed} {self.before} {self.rank} {self.ranks}"
        return int.from_bytes(blake3(text.encode()).digest(8), "little")

    def batches(self, loader: DataLoader[Any]) -> BatchSampler:
        """The index batches of this rank, for a loader."""
        return BatchSampler(self.indices(loader), self.batch, loader.drop_last)

    def _each(self) -> int:
        left = self.samples - self.before
        return left // self.ranks if self.even else -(-left // self.ranks)

    def _order(self, loader: DataLoader[Any]) -> list[int]:
        """The whole epoch's, of all ranks."""
        alone: DistributedSampler[int] = DistributedSampler(loader.dataset, 1, 0, self.shuffle, self.seed)
        alone.set_epoch(self.epoch)
        return list(alone)


def _is_known(sampler: Any, kind: type[Any]) -> bool:
    return isinstance(sampler, kind) and type(sampler).__module__.startswith(_KNOWN)


def dealt(loader: DataLoader[Any], batches: Sequence[Any] | BatchSampler) -> DataLoader[Any]:
    """A copy of a loader that goes by these index batches, for one epoch."""
    twin = copy.copy(loader)
    # Past `DataLoader.__setattr__`, which refuses these attributes on a finished loader.
    vars(twin).update({"batch_sampler": batches, "_iterator": None, "next_iter_state": None})
    return twin
