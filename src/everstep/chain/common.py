"""Chunks that several writers of one process have: the first stores them, the others point to them."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from everstep.format.manifest import Place, StoredChunk


@dataclass(frozen=True)
class Found:
    """A chunk that another writer has put, and what it builds on, with the sizes of the packs they lie in."""

    line: tuple[tuple[StoredChunk, Place], ...]
    packs: dict[str, int]


class Common:
    """Chunks of one take. For several threads; a writer is whatever object it calls itself by."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._claimed: dict[str, object] = {}
        self._found: dict[str, Found] = {}

    def claim(self, name: str, writer: object) -> bool:
        """Whether it is this writer's to store a chunk. Whoever claims one puts it, or gives it up, before he
        waits for anybody."""
        with self._changed:
            return name not in self._found and self._claimed.setdefault(name, writer) is writer

    def put(self, chunks: Iterable[tuple[str, Found]]) -> None:
        """These are durable."""
        with self._changed:
            self._found.update(chunks)
            self._changed.notify_all()

    def leave(self, writer: object) -> None:
        """What this writer has claimed and not put it puts no more. It is not known any more then."""
        with self._changed:
            for name in [name for name, owner in self._claimed.items() if owner is writer]:
                del self._claimed[name]
            self._changed.notify_all()

    def find(self, name: str) -> Found | None:
        """Where a chunk is. Does not block."""
        with self._changed:
            return self._found.get(name)

    def wait(self, name: str) -> Found | None:
        """Where a chunk is, once whoever has claimed it has put it; None where he gave it up."""
        with self._changed:
            self._changed.wait_for(lambda: name in self._found or name not in self._claimed)
            return self._found.get(name)
