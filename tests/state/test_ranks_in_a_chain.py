"""From the live state of several ranks into a chain and back: rooms that do not know each other, together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

import everstep
from everstep.chain.history import Chain, Snapshot
from everstep.chain.lease import Lease
from everstep.chain.reader import Reader, Target
from everstep.chain.writer import Captured, Facts, Writer
from everstep.state.capture import Capturer
from everstep.state.lazy import LazyState
from everstep.state.objects import named
from everstep.state.restore import restore
from everstep.store.memory import MemoryStore
from ranks import Ranks

GRID_BYTES = 64 * 1024


def training(seed: int, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(300, 1000), nn.Linear(1000, 300))
    model[1].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
    made = {"model": model, "optimizer": optimizer}
    step(made, steps)
    return made


def step(objects: dict[str, Any], steps: int = 1) -> None:
    for number in range(steps):
        batch = torch.randn(3, 300, generator=torch.Generator().manual_seed(number))
        objects["model"](batch).square().mean().backward()
        objects["optimizer"].step()
        objects["optimizer"].zero_grad()


class Storing:
    """Ranks that store what they capture."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.chain = Chain.create(MemoryStore(), GRID_BYTES)
        lease = Lease.take(self.chain.store)
        self.writers = [Writer(self.chain, lease) for _ in ranks.objects]
        self.capturers = [Capturer() for _ in ranks.objects]
        self.arenas: list[memoryview] = []

    def take(self, at_step: int, *, anew: bool) -> Snapshot:
        parts = []
        for rank, collected in enumerate(self.ranks.collect(anew=anew)):
            assert collected.fits
            layout = self.capturers[rank].layout(collected)
            if len(self.arenas) == rank:
                self.arenas.append(memoryview(bytearray(layout.arena_bytes)))
            memory = self.arenas[rank]
            capture = self.capturers[rank].begin(
                collected, layout, memory, overlap=False, then=lambda capture: None
            )
            assert capture.error is None
            captured = Captured.whole(layout, memory, capture.values, capture.unchanged)
            parts.append(self.writers[rank].store_part(captured, rank, len(self.writers)))
        return self.writers[0].commit(parts, Facts(step=at_step))


def reading(chain: Chain, snapshot: Snapshot) -> Any:
    manifest, reader = chain.manifest(snapshot), Reader(chain.store)

    def fill(targets: Iterable[tuple[int, int, memoryview]]) -> None:
        assert reader.fill(manifest, [Target(*target) for target in targets]) == []

    return manifest, fill


@pytest.mark.parametrize(("before", "now"), [(3, 3), (3, 2), (2, 1)])
def test_what_ranks_hold_goes_into_a_chain_and_comes_back(before: int, now: int) -> None:
    saved = [training(1, 2) for _ in range(before)]
    storing = Storing(Ranks([named(one) for one in saved]))
    storing.take(2, anew=True)
    for one in saved:
        step(one)
    snapshot = storing.take(3, anew=False)
    # Frozen weights are not stored again.
    frozen = saved[0]["model"][1].weight.nbytes
    assert snapshot.record.logical_bytes - snapshot.record.new_bytes >= frozen
    manifest, fill = reading(storing.chain, snapshot)
    lazy = LazyState(manifest, fill, torch.device("cpu"))
    loaded = everstep.load(storing.chain.store)
    for key, value in saved[0]["model"].state_dict().items():
        assert torch.equal(lazy.state("model")[key], value)
        assert torch.equal(torch.as_tensor(loaded[f"model/{key}"]), value)
    live = [training(9, 0) for _ in range(now)]
    worlds = Ranks([named(one) for one in live])
    parts = storing.chain.manifests(snapshot)
    for rank, objects in enumerate(live):
        restore(manifest, fill, named(objects), world=worlds.world(rank), parts=parts)
        # They go on as those that were never stopped.
        step(objects)
    for one in saved:
        step(one)
    for objects in live:
        for mine, theirs in zip(objects["model"].parameters(), saved[0]["model"].parameters(), strict=True):
            assert torch.equal(mine, theirs)
