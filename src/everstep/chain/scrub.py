"""A scrub: everything in a chain is read again, at a rate that leaves the store to others; one that is
interrupted is gone on with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from everstep.chain.history import Chain
from everstep.chain.remembering import Memory
from everstep.chain.verify import Report, verify
from everstep.store.base import Buffer, Entry, Redundant, Store
from everstep.store.patience import Clock

SAVED_EVERY_S = 10.0


class Paced:
    """A store that is read no faster than so many bytes a second: who has read more waits.

    Writing is not held up: what a repair puts back is wanted soon.
    """

    def __init__(self, store: Store, bytes_per_s: float, clock: Clock) -> None:
        self.url = store.url
        self._store = store
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._free_at = clock.now()

    def pay(self, size_bytes: int) -> None:
        """Wait until so much may have been read."""
        now = self._clock.now()
        self._free_at = max(self._free_at, now) + size_bytes / self._bytes_per_s
        if self._free_at > now:
            self._clock.sleep(self._free_at - now)

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        return self._store.put(key, parts)

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        data = self._store.get(key, start, size_bytes)
        self.pay(len(data))
        return data

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        count = self._store.read_into(key, start, buffers)
        self.pay(count)
        return count

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[Entry]:
        return self._store.list(prefix, limit)

    def delete(self, key: str) -> None:
        self._store.delete(key)


class PacedRedundant(Paced):
    """The same for one that keeps more of each object than it takes: looking at that counts as well."""

    def __init__(self, store: Store, bytes_per_s: float, clock: Clock) -> None:
        super().__init__(store, bytes_per_s, clock)
        assert isinstance(store, Redundant)
        self._redundant: Redundant = store

    def flaws(self, key: str) -> Sequence[str]:
        found = self._redundant.flaws(key)
        self.pay(next((one.size_bytes for one in self._store.list(key, limit=1)), 0))
        return found

    def mend(self, key: str) -> Sequence[str]:
        return self._redundant.mend(key)

    def away(self) -> Sequence[str]:
        return self._redundant.away()


def paced(store: Store, bytes_per_s: float, clock: Clock) -> Store:
    """`store`, read at this rate."""
    return (PacedRedundant if isinstance(store, Redundant) else Paced)(store, bytes_per_s, clock)


def scrub(
    chain: Chain,
    bytes_per_s: float,
    memory: Memory,
    on_progress: Callable[[int, int], None] | None = None,
    clock: Clock | None = None,
    on_found: Callable[[str, str], None] | None = None,
    wall: Callable[[], float] = time.time,
) -> Report:
    """Verify a chain at `bytes_per_s`, from where the last scrub was interrupted to the end. Changes nothing
    but what is remembered.

    Records and manifests are read each time; of packs those that an interrupted scrub has read and found good
    are left out, but for their footers.

    Args:
        on_progress, on_found: see `verify`.
        clock: sleeps after each read.
        wall: seconds since 1970.

    Raises:
        Unavailable: the store does not answer, or what was read cannot be remembered.
    """
    clock = clock or Clock()
    cursor = _Cursor(memory, clock)
    slow = Chain(paced(chain.store, bytes_per_s, clock))

    def found(key: str, problem: str) -> None:
        cursor.stays = True
        if on_found is not None:
            on_found(key, problem)

    report = verify(slow, on_progress, cursor.wants, found)
    known = memory.load()
    known.scrubbed, known.passes, known.passed_at = "", known.passes + 1, wall()
    memory.save(known)
    return report


class _Cursor:
    """Packs come in the order of their names; one is done when the next is begun.

    Attributes:
        stays: something was found, which only the report of a scrub that comes to its end says: one that is
            interrupted is to find it again.
    """

    def __init__(self, memory: Memory, clock: Clock) -> None:
        self.stays = False
        self._began_at = memory.load().scrubbed
        self._memory = memory
        self._clock = clock
        self._at = ""
        self._saved_at = clock.now()

    def wants(self, pack: str, chunk: str) -> bool:
        if pack > self._at:
            done, self._at = self._at, pack
            now = self._clock.now()
            if done > self._began_at and not self.stays and now - self._saved_at >= SAVED_EVERY_S:
                self._saved_at = now
                known = self._memory.load()  # A verify may have noted something meanwhile.
                known.scrubbed = done
                self._memory.save(known)
        return pack > self._began_at
