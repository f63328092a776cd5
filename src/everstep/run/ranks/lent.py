"""What a rank above 0 has in the place of what only rank 0 has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from everstep.chain.steplog import EndedJournal
from everstep.format.record import StepRecord


@dataclass(frozen=True)
class LentLease:
    """Rank 0's lease, by number: it is not this rank's to give away."""

    number: int

    def release(self) -> None:
        """Does nothing."""


class NoLog:
    """Steps are logged by rank 0."""

    def adopt(self) -> None:
        """Does nothing."""

    def append(self, step: StepRecord) -> None:
        """Does nothing."""

    def cut(self) -> list[EndedJournal]:
        return []

    def cut_in_time(self) -> list[EndedJournal]:
        return []

    def seal(self, journals: Sequence[EndedJournal]) -> None:
        """Does nothing."""

    def after(self, step: int) -> dict[int, StepRecord]:
        return {}
