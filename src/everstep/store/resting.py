"""A store over a network that is left alone for a while after it was away: who has others to ask is not to
wait for it at each request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from everstep.errors import Unavailable
from everstep.store.base import Buffer, Entry, Store
from everstep.store.patience import Clock

SLOW_S = 1.0
"""Who says within this time that it is away is asked again each time."""

TIMES = 10.0
MOST_S = 900.0
"""It rests so many times as long as it took to find out, and no longer than this."""

Result = TypeVar("Result")


class Resting:
    """`inner`; but for a time after it took long to find out that it does not answer, it is away at once."""

    def __init__(self, inner: Store, clock: Clock) -> None:
        self.inner = inner
        self.url = inner.url
        self._clock = clock
        self._until = 0.0
        self._why = ""

    def _ask(self, request: Callable[[], Result]) -> Result:
        begun = self._clock.now()
        if begun < self._until:
            raise Unavailable(self._why)
        try:
            return request()
        except Unavailable as error:
            took = self._clock.now() - begun
            if took > SLOW_S:
                self._why = error.problem
                self._until = self._clock.now() + min(TIMES * took, MOST_S)
            raise

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        return self._ask(lambda: self.inner.put(key, parts))

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        return self._ask(lambda: self.inner.get(key, start, size_bytes))

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        return self._ask(lambda: self.inner.read_into(key, start, buffers))

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[Entry]:
        entries = self._ask(lambda: self.inner.list(prefix, limit))
        while True:
            entry = self._ask(lambda: next(entries, None))
            if entry is None:
                return
            yield entry

    def delete(self, key: str) -> None:
        self._ask(lambda: self.inner.delete(key))
