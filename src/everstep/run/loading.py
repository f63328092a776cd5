"""A snapshot to look into, without a run: no lease, no writer, nothing of the chain is touched."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike, fspath

import torch

from everstep.chain.history import Chain, Snapshot
from everstep.chain.reader import Reader, Target
from everstep.chain.refs import split
from everstep.errors import Damaged, Mismatch
from everstep.state.lazy import LazyState
from everstep.store.base import Store

HEAD = "head"


class Loaded(LazyState):
    """The state in a snapshot, read as it is asked for.

    A mapping of leaf names to tensors (`loaded["model/0.weight"]`); `state`, `read` and `into` get many at
    once. Every byte that comes out was verified. While it is in use the chain may grow; a snapshot that is
    pruned meanwhile is `NotFound`.

    Attributes:
        snapshot: which it is; its record has metrics and environment.
        remarks: damage of the chain that was seen and did not touch what was read, a sentence each.
    """

    def __init__(self, chain: Chain, snapshot: Snapshot, device: torch.device) -> None:
        self.snapshot = snapshot
        self.remarks: list[str] = []
        self._chain = chain
        self._reader = Reader(chain.store)
        super().__init__(chain.manifest(snapshot), self._fill_from_store, device)

    def __repr__(self) -> str:
        return f"<{self._chain.url}@{self.snapshot.short}: step {self.step}, {', '.join(self.objects)}>"

    @property
    def step(self) -> int:
        return self.snapshot.step

    def _fill_from_store(self, targets: Iterable[tuple[int, int, memoryview]]) -> None:
        try:
            self.remarks += self._reader.fill(self._manifest, [Target(*target) for target in targets])
        except Damaged:
            # What is missing is no damage where a prune took the snapshot away.
            self._chain.refuse_pruned(self.snapshot, "was read")
            raise


def load(repo: str | PathLike[str] | Store, ref: str, branch: str, device: torch.device | str) -> Loaded:
    """See `everstep.load`."""
    place: str | PathLike[str] | Store = repo
    if isinstance(repo, str):
        place, at = split(repo)
        if at and ref:
            raise Mismatch(
                f"{repo!r} and ref={ref!r} both name a snapshot",
                kept="nothing was touched",
                next=f"everstep.load({place!r}, {ref!r})",
            )
        ref = ref or at
    elif isinstance(repo, PathLike):
        place = fspath(repo)
    chain = Chain(place)
    return Loaded(chain, chain.find(ref or HEAD, branch), torch.device(device))
