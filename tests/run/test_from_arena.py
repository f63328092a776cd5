"""A resume takes from an arena what is still there, verified, and the rest from the store."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import nn

import everstep
from everstep.chain.history import Chain
from everstep.chain.reader import Reader, Target
from everstep.errors import Damaged
from everstep.events import Event
from everstep.format import keys
from everstep.format.chunk import aligned
from everstep.keeper.base import Held
from everstep.run.resume import Restore, Resumption, bring_back, restored
from everstep.state.world import World
from everstep.store.local import LocalStore

pytestmark = pytest.mark.slow


class Counting(LocalStore):
    """Counts the bytes that are read into buffers."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.read_bytes = 0

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        self.read_bytes += sum(map(len, buffers))
        return super().read_into(key, start, buffers)


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1500, 1500), nn.Linear(1500, 7))


@pytest.fixture(name="chain")
def _chain(tmp_path: Path) -> Chain:
    """A chain with two snapshots: of a model made with seed 0, then 1."""
    for seed in (0, 1):
        model = net(5)
        with everstep.open(tmp_path, model=model, every=None, keep="all") as run:
            model.load_state_dict(net(seed).state_dict())
            run.tick()
    return Chain(Counting(tmp_path))


def arena_of(chain: Chain, ref: str = "head") -> bytearray:
    manifest = chain.manifest(chain.find(ref))
    starts = [0, *accumulate(aligned(region.size_bytes) for region in manifest.regions)]
    arena = bytearray(starts[-1])
    Reader(chain.store).fill(
        manifest,
        [
            Target(number, 0, memoryview(arena)[start : start + region.size_bytes])
            for number, (start, region) in enumerate(zip(starts, manifest.regions, strict=False))
        ],
    )
    assert isinstance(chain.store, Counting)
    chain.store.read_bytes = 0
    return arena


def into(live: nn.Module, held: list[Held]) -> Restore:
    return lambda chain, snapshot: restored(chain, snapshot, {"model": live}, True, held, World.alone())


def brought_back(
    chain: Chain, live: nn.Module, held: list[Held], events: list[Event] | None = None
) -> Resumption:
    told: list[Event] = []
    emit = (told if events is None else events).append
    back = bring_back(chain, "must", "main", into(live, held), emit)
    assert back is not None
    return back


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def reads(chain: Chain) -> int:
    assert isinstance(chain.store, Counting)
    return chain.store.read_bytes


def test_all_of_it_comes_from_the_arena_even_where_the_packs_are_gone(chain: Chain, tmp_path: Path) -> None:
    arena = arena_of(chain)
    for path in (tmp_path / "packs").rglob("*"):
        if path.is_file():
            path.unlink()
    live = net(5)
    back = brought_back(chain, live, [Held(chain.find("head").id, memoryview(arena))])
    assert back.from_arena
    assert back.remarks == ()
    assert equal(live, net(1))
    assert reads(chain) == 0


def test_the_arena_of_another_snapshot_is_not_looked_at(chain: Chain) -> None:
    arena = arena_of(chain, "head~1")
    live = net(5)
    back = brought_back(chain, live, [Held(chain.find("head~1").id, memoryview(arena))])
    assert not back.from_arena
    assert equal(live, net(1))


def test_of_several_the_right_one_is_taken(chain: Chain) -> None:
    held = [Held(chain.find(ref).id, memoryview(arena_of(chain, ref))) for ref in ("head~1", "head")]
    live = net(5)
    assert brought_back(chain, live, held).from_arena
    assert equal(live, net(1))
    assert reads(chain) == 0


@pytest.mark.parametrize("what", ["a chunk", "its end", "everything"])
def test_what_was_written_over_comes_from_the_store_and_is_told(chain: Chain, what: str) -> None:
    arena = arena_of(chain)
    size = len(arena)
    if what == "a chunk":
        arena[10] ^= 1
    elif what == "its end":
        del arena[-1:]
    else:
        arena[:] = bytes(size)
    live = net(5)
    back = brought_back(chain, live, [Held(chain.find("head").id, memoryview(arena))])
    (remark,) = back.remarks
    assert "in the keeper's memory" in remark
    assert back.from_arena == (what == "a chunk")
    assert equal(live, net(1))
    assert 0 < reads(chain) <= size


def test_damage_in_both_is_damage(chain: Chain, tmp_path: Path) -> None:
    """Then the snapshot before it is taken, as ever."""
    arena = arena_of(chain)
    arena[:] = bytes(len(arena))
    newest = chain.find("head")
    older = set(chain.manifest(chain.find("head~1")).packs)
    for name in set(chain.manifest(newest).packs) - older:
        (tmp_path / keys.pack(name)).unlink()
    events: list[Event] = []
    live = net(5)
    back = brought_back(chain, live, [Held(newest.id, memoryview(arena))], events)
    assert back.snapshot.id == chain.find("head~1").id
    assert not back.from_arena
    assert [type(event).__name__ for event in events] == ["Skipped"]
    assert equal(live, net(0))
    with pytest.raises(Damaged):
        bring_back(chain, "head", "main", into(live, [Held(newest.id, memoryview(arena))]), events.append)
