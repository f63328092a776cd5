"""The ranks that train together, and how they tell each other what each has."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from everstep.errors import Mismatch, Unavailable


class Exchange(Protocol):
    """A way from each rank to all others, beside the training's own."""

    def share(self, key: str, mine: bytes) -> list[bytes]:
        """What all ranks have shared under `key`, in the order of the ranks. Blocks until all have, under a
        deadline; each rank shares once under a key. What many ranks share alike should cost little more than
        what one does.

        Raises:
            Unavailable: some have not by the deadline; the message names them.
        """


@dataclass(frozen=True)
class World:
    """Which of how many ranks this process is.

    Attributes:
        rank: 0 to `ranks` - 1.
        ranks: how many there are.
        exchange: None where there is nobody to exchange with.
        alike: by the name of a random generator the lowest rank on which it is in the same state as on this
            one, before anything is restored; where ranks have compared them.
    """

    rank: int = 0
    ranks: int = 1
    exchange: Exchange | None = None
    alike: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks or (self.ranks > 1 and self.exchange is None):
            raise Mismatch(f"rank {self.rank} of {self.ranks} is no place in a world")

    @classmethod
    def alone(cls) -> World:
        """The world of one rank."""
        return cls()

    @property
    def is_alone(self) -> bool:
        return self.ranks == 1

    def share(self, key: str, mine: bytes) -> list[bytes]:
        """See `Exchange.share`."""
        return [mine] if self.exchange is None else self.exchange.share(key, mine)


@dataclass
class Meeting:
    """An exchange within one process, for tests: a thread for each rank.

    Attributes:
        bytes_shared: by key, what all ranks have shared together.
    """

    ranks: int
    deadline_s: float = 60.0
    bytes_shared: dict[str, int] = field(default_factory=dict)
    _told: dict[str, dict[int, bytes]] = field(default_factory=dict)
    _news: threading.Condition = field(default_factory=threading.Condition)

    def world(self, rank: int) -> World:
        return World(rank, self.ranks, _Seat(self, rank) if self.ranks > 1 else None)

    def share(self, rank: int, key: str, mine: bytes) -> list[bytes]:
        with self._news:
            told = self._told.setdefault(key, {})
            if rank in told:
                raise Mismatch(f"rank {rank} has shared under {key!r} before")
            told[rank] = mine
            self.bytes_shared[key] = self.bytes_shared.get(key, 0) + len(mine)
            self._news.notify_all()
            if not self._news.wait_for(lambda: len(told) == self.ranks, self.deadline_s):
                missing = ", ".join(str(one) for one in range(self.ranks) if one not in told)
                raise Unavailable(f"ranks {missing} have not shared under {key!r}")
            return [told[one] for one in range(self.ranks)]


@dataclass(frozen=True)
class _Seat:
    meeting: Meeting
    rank: int

    def share(self, key: str, mine: bytes) -> list[bytes]:
        return self.meeting.share(self.rank, key, mine)
