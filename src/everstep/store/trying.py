"""Asking a store over a network again, as long as that may help."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from everstep.errors import Unavailable
from everstep.store.answers import PASSING, Answer, Place, given_up, sentence
from everstep.store.patience import Clock, Patience, tries

Result = TypeVar("Result")


class Failed(Exception):
    """A request was answered otherwise than hoped."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        self.answer = answer


@dataclass(frozen=True)
class Trying:
    """How the requests to one place are tried, and what is said when they fail."""

    place: Place
    patience: Patience
    clock: Clock

    def tried(self, verb: str, key: str, request: Callable[[], Result], meant: Sequence[str] = ()) -> Result:
        """A request that does no harm when it is made twice; it raises `Failed` where it fails.

        Raises:
            Failed: for the answers in `meant`.
            EverstepError: for all others: at once where another try changes nothing.
        """
        turns = self.turns(verb, key)
        for _ in turns:
            try:
                return request()
            except Failed as failed:
                if failed.answer.kind in meant:
                    raise
                turns.note(failed.answer)
        raise turns.given_up()

    def turns(self, verb: str, key: str) -> Turns:
        return Turns(self, verb, key)


class Turns:
    """The numbers of the tries of one verb, from 1 on, for who has more to do between them."""

    def __init__(self, trying: Trying, verb: str, key: str) -> None:
        self._trying = trying
        self._verb, self._key = verb, key
        self._begun = trying.clock.now()
        self._numbers = tries(trying.patience, trying.clock)
        self._answer = Answer(PASSING, "no answer")

    def __iter__(self) -> Turns:
        return self

    def __next__(self) -> int:
        return next(self._numbers)

    def note(self, answer: Answer, passing: Sequence[str] = (PASSING,)) -> None:
        """What this try was answered. Raises the sentence for what is none of `passing`."""
        if answer.kind not in passing:
            raise sentence(answer, self._trying.place, self._verb, self._key)
        self._answer = answer

    def given_up(self) -> Unavailable:
        """The error for the last answer, when there is no time for another try."""
        trying = self._trying
        after_s = trying.clock.now() - self._begun
        return given_up(self._answer, trying.place, self._verb, self._key, after_s)
