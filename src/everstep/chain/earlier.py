"""States that were written, as far as the memory that they lay in may still hold them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from everstep.chain.packing import Draft
from everstep.format.layout import Layout
from everstep.format.manifest import Manifest


@dataclass(frozen=True)
class Earlier:
    """A state that was written, and the memory that it lay in, which may hold another by now or be no more:
    it is not kept alive for this."""

    layout: Layout
    manifest: Manifest
    digests: list[list[str]]
    owner: weakref.ref[Any]
    start: int

    @classmethod
    def of(cls, memory: memoryview, draft: Draft, manifest: Manifest) -> Earlier | None:
        try:
            owner = weakref.ref(memory.obj)
        except TypeError:
            # A bytearray, say, of which nobody could tell whether it is still there.
            return None
        return cls(draft.layout, manifest, draft.digests, owner, _start(memory))

    def is_at(self, memory: memoryview) -> bool:
        return self.owner() is memory.obj and self.start == _start(memory)

    def memory(self) -> memoryview | None:
        """The memory, if it is still there."""
        owner = self.owner()
        try:
            whole = None if owner is None else memoryview(owner).cast("B")
        except ValueError:
            # A mapping that was closed.
            return None
        end = self.start + self.layout.arena_bytes
        return whole[self.start : end] if whole is not None and len(whole) >= end else None


def _start(memory: memoryview) -> int:
    """Where a view begins in the object that it is a view of."""
    import numpy as np

    whole = memoryview(memory.obj).cast("B")
    if not len(memory):
        return 0
    return int(np.frombuffer(memory, np.uint8).ctypes.data - np.frombuffer(whole, np.uint8).ctypes.data)
