"""Faults at chosen operations of a store: the process dies there, the answer is lost, the store is away."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from everstep.store.base import Buffer, Entry, Store

WRITES = frozenset({"put", "delete"})
READS = frozenset({"get", "read_into", "list"})


class Died(BaseException):
    """The process is gone. Nothing catches it by accident: it is no `Exception`."""


class FaultyStore:
    """A store that works as `inner` does, but for one operation.

    Args:
        inner: the store that keeps the objects.
        at: the number of the operation, from 0 on, at which the fault happens; None: never.
        fault: what is raised there. With `Died` every later operation raises it too: a dead process does
            nothing more, in none of its threads.
        done: whether the operation was carried out all the same, and only its answer is lost.
        verbs: which operations are counted.
    """

    def __init__(
        self,
        inner: Store,
        at: int | None = None,
        fault: Callable[[], BaseException] = Died,
        *,
        done: bool = False,
        verbs: frozenset[str] = WRITES,
    ) -> None:
        self.inner = inner
        self.at = at
        self.fault = fault
        self.done = done
        self.verbs = verbs
        self.count = 0
        self.dead: BaseException | None = None

    @property
    def url(self) -> str:
        return self.inner.url

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        strikes = self._strikes("put")
        if strikes and not self.done:
            raise self._raised()
        created = self.inner.put(key, parts)
        if strikes:
            raise self._raised()
        return created

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        if self._strikes("get"):
            raise self._raised()
        return self.inner.get(key, start, size_bytes)

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        if self._strikes("read_into"):
            raise self._raised()
        return self.inner.read_into(key, start, buffers)

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[Entry]:
        if self._strikes("list"):
            raise self._raised()
        return self.inner.list(prefix, limit)

    def delete(self, key: str) -> None:
        strikes = self._strikes("delete")
        if strikes and not self.done:
            raise self._raised()
        self.inner.delete(key)
        if strikes:
            raise self._raised()

    def _strikes(self, verb: str) -> bool:
        if self.dead is not None:
            raise self.dead
        if verb not in self.verbs:
            return False
        self.count += 1
        return self.at is not None and self.count == self.at + 1

    def _raised(self) -> BaseException:
        error = self.fault()
        if isinstance(error, Died):
            self.dead = error
        return error
