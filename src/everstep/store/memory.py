"""A store in this process's memory: for tests, and for what need not outlive the process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

from everstep.errors import NotFound
from everstep.store.base import Buffer, Entry, checked


class MemoryStore:
    """Keeps objects in a dict. "Durable" means: as long as this object lives."""

    def __init__(self, name: str = "memory") -> None:
        self.url = f"memory://{name}"
        self._objects: dict[str, tuple[bytes, float]] = {}
        self._lock = threading.Lock()

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        data = b"".join(parts)
        with self._lock:
            if checked(key) in self._objects:
                return False
            self._objects[key] = (data, time.time())
            return True

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        with self._lock:
            if checked(key) not in self._objects:
                raise NotFound(f"{self.url} has no object {key}", key=key)
            data = self._objects[key][0]
        return data[start:] if size_bytes is None else data[start : start + size_bytes]

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        data = memoryview(self.get(key, start, sum(len(buffer) for buffer in buffers)))
        at = 0
        for buffer in buffers:
            part = data[at : at + len(buffer)]
            buffer[: len(part)] = part
            at += len(part)
        return at

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[Entry]:
        with self._lock:
            found = sorted((key, item) for key, item in self._objects.items() if key.startswith(prefix))
        for key, (data, modified_at) in found[:limit]:
            yield Entry(key, len(data), modified_at)

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(checked(key), None)
