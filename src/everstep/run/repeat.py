"""The proof of a resume: steps that are trained again are held against the records of the first time."""

from __future__ import annotations

from everstep.events import Event, Parted, Repeated
from everstep.format.record import StepRecord


class Repeat:
    """Compares steps with their records, as long as there are records.

    Args:
        expected: the records by step, as `StepLog.after` finds them.
    """

    def __init__(self, expected: dict[int, StepRecord]) -> None:
        self._expected = expected
        self._first: int | None = None
        self.parted = False

    def compare(self, made: StepRecord) -> list[Event]:
        """What there is to tell after this step: that the last recorded step was repeated, or where they
        part (once: what comes after is another trajectory)."""
        if self.parted:
            return []
        record = self._expected.pop(made.step, None)
        if record is None:
            return self._told(made.step - 1)
        differences = made.differences(record)
        if differences:
            self.parted = True
            return [*self._told(made.step - 1), Parted(made.step, tuple(differences))]
        if self._first is None:
            self._first = made.step
        return [] if made.step + 1 in self._expected else self._told(made.step)

    def end(self, step: int) -> list[Event]:
        """The run ends after `step`: tell what was repeated so far."""
        return self._told(step)

    def _told(self, last: int) -> list[Event]:
        first, self._first = self._first, None
        return [] if first is None else [Repeated(first, last)]
