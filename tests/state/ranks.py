"""Many ranks in one process: a thread for each, and snapshots of them without a chain."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from stored import Stored, joined, part_of

from everstep.state import rng
from everstep.state.collecting import Collected, Collector
from everstep.state.restore import Restored, restore
from everstep.state.world import Meeting, World

Result = TypeVar("Result")
Objects = Mapping[str, object]


def together(ranks: int, work: Callable[[int], Result]) -> list[Result]:
    """What `work` does on each rank, at the same time; the first error is raised."""
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(ranks)]


@dataclass
class Ranks:
    """The ranks of a training, each with its objects.

    Attributes:
        looks: how often they have found out who holds what.
    """

    objects: Sequence[Objects]
    meeting: Meeting = field(init=False)
    collectors: list[Collector] = field(init=False)
    looks: int = 0

    def __post_init__(self) -> None:
        self.meeting = Meeting(len(self.objects))
        self.collectors = [Collector(self.world(rank)) for rank in range(len(self.objects))]

    def world(self, rank: int) -> World:
        return self.meeting.world(rank)

    def collect(
        self, *, anew: bool = True, position: Any = None, gradients: Sequence[str] = ()
    ) -> list[Collected]:
        self.looks += anew
        key = str(self.looks) if anew else ""

        def look(rank: int) -> Collected:
            return self.collectors[rank].collect(
                self.objects[rank],
                position=position,
                progress={"step": 7, "epoch": 1},
                gradients=gradients,
                anew=key,
            )

        return together(len(self.objects), look)

    def stored(self, *, anew: bool = True, **options: Any) -> list[Stored]:
        """The part of each rank of a snapshot."""
        ranks = len(self.objects)
        collected = self.collect(anew=anew, **options)
        assert all(one.fits for one in collected)
        return [part_of(one, rank, ranks) for rank, one in enumerate(collected)]

    def restore(
        self, parts: Sequence[Stored], *, strict: bool = True, described: Sequence[bytes] = ()
    ) -> list[Restored]:
        """Bring the objects of all ranks back. `described`: how each rank's generators are, of all ranks."""
        whole = joined(parts)

        def bring(rank: int) -> Restored:
            return restore(
                whole.manifest,
                whole.fill,
                self.objects[rank],
                strict=strict,
                world=replace(self.world(rank), alike=rng.alike(described, rank) if described else {}),
                parts=[part.manifest for part in parts],
            )

        return [bring(rank) for rank in range(len(self.objects))]
