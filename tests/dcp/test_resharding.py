"""Resharding: whatever boxes a state is saved in, whatever boxes it is loaded into, it is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from by_hand import Boxed, load, mesh, numbered, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from everstep import dcp
from everstep.chain.history import Chain
from everstep.format.layout import Box, Slice, lay_out
from everstep.integrations.dcp import waves
from everstep.integrations.dcp.planning import spread
from everstep.store.memory import MemoryStore
from examples import examples

GRID_BYTES = 4096
DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.complex64]
SHAPES = st.lists(st.integers(1, 12), min_size=0, max_size=3).map(tuple)


@st.composite
def meshes(draw: st.DrawFn, shape: tuple[int, ...]) -> list[list[Box]]:
    cuts = [draw(st.lists(st.integers(0, size), max_size=3)) for size in shape]
    return mesh(shape, cuts, draw(st.integers(1, 4)))


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), SHAPES, st.sampled_from(DTYPES), st.booleans())
def test_any_boxes_to_any_others(data: Any, shape: tuple[int, ...], dtype: torch.dtype, own: bool) -> None:
    whole = numbered(shape, dtype)
    before = data.draw(meshes(shape))
    after = data.draw(meshes(shape))
    store = MemoryStore()
    Chain.create(store, GRID_BYTES)
    states = [{"w": Boxed.of(whole, mine)} for mine in before]
    writers = [dcp.Writer(store) for _ in before]
    if own:
        save(states, writers, dcp.SavePlanner)
    else:
        save(states, writers)
    there = [{"w": Boxed.of(torch.zeros_like(whole), mine)} for mine in after]
    load(there, [dcp.Reader(store) for _ in after])
    for state, mine in zip(there, after, strict=True):
        for part, expected in zip(state["w"].parts, Boxed.of(whole, mine).parts, strict=True):
            assert torch.equal(part, expected)


# -- waves -------------------------------------------------------------------------------------------------


@settings(max_examples=examples(60), deadline=None)
@given(st.data(), st.lists(st.tuples(st.integers(0, 3000), st.sampled_from(DTYPES)), max_size=6))
def test_waves_are_the_memory_of_the_layout(data: Any, sizes: list[tuple[int, torch.dtype]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("everstep.format.layout.SMALL_BYTES", 2048)
        tensors = [numbered((size, 2), dtype).t() for size, dtype in sizes]
        slices = [
            Slice(str(n), str(one.dtype)[6:], tuple(one.shape), (0, 0), tuple(one.shape))
            for n, one in enumerate(tensors)
        ]
        layout = lay_out(slices)
        sources = [waves.Source(s, lambda t=t: t) for s, t in zip(slices, tensors, strict=True)]
        limit = data.draw(st.sampled_from([1, 2, 8])) * max(
            [GRID_BYTES, *(region.size_bytes + 4096 for region in layout.regions)]
        )
        made = bytearray(layout.arena_bytes)
        end = 0
        for wave in waves.Waves(layout, sources, GRID_BYTES, limit):
            assert wave.begin == end
            end += len(wave.memory)
            made[wave.begin : end] = wave.memory
    expected = bytearray(layout.arena_bytes)
    for (region, offset), one in zip(layout.places, tensors, strict=True):
        start = layout.regions[region].offset + offset
        expected[start : start + one.nbytes] = (
            one.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    assert end == layout.arena_bytes
    assert made == expected


# -- spreading ---------------------------------------------------------------------------------------------


def item(name: str, at: tuple[int, ...], size: tuple[int, ...], shape: tuple[int, ...]) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(at), torch.Size(size))
    data = TensorWriteData(chunk, TensorProperties(dtype=torch.float32), torch.Size(shape))
    return WriteItem(MetadataIndex(name, at), WriteItemType.SHARD, tensor_data=data)


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.tuples(SHAPES, st.sets(st.integers(0, 3), min_size=1)), max_size=8))
def test_what_is_spread_is_written_once_by_who_has_it(
    leaves: list[tuple[tuple[int, ...], set[int]]],
) -> None:
    plans = [
        SavePlan([item(str(n), (0,) * len(s), s, s) for n, (s, ranks) in enumerate(leaves) if rank in ranks])
        for rank in range(4)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("everstep.state.spreading.SMALL_BYTES", 64)
        patch.setattr("everstep.state.spreading.SLIVER_BYTES", 16)
        made = spread(plans)
        assert made == spread(plans)
    count = [torch.zeros(shape) for shape, _ in leaves]
    for rank, plan in enumerate(made):
        for one in plan.items:
            number = int(one.index.fqn)
            assert rank in leaves[number][1]
            assert one.tensor_data is not None
            chunk = one.tensor_data.chunk
            assert tuple(one.index.offset or ()) == tuple(chunk.offsets)
            box = tuple(slice(a, a + s) for a, s in zip(chunk.offsets, chunk.sizes, strict=True))
            count[number][box] += 1
    assert all(torch.equal(one, torch.ones_like(one)) for one in count)
