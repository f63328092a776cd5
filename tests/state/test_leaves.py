"""Reading leaves into tensors: every dtype and shape, memory that cannot be read into, and devices."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import Stored, bytes_of, random_tensor, stored

from everstep.errors import Damaged
from everstep.format.layout import _ITEM_BYTES, SMALL_BYTES
from everstep.state import leaves
from everstep.state.leaves import CPU, DeviceCarrier, HostCarrier
from everstep.state.tree import Tensorlike, dtype_name
from examples import examples

SHAPES = [(), (0,), (3, 0, 2), (5,), (7, 11), (SMALL_BYTES + 3,)]


def read_back(made: Stored, destinations: dict[str, Tensorlike]) -> None:
    leaves.read(made.manifest, made.fill, {f"x/{name}": one for name, one in destinations.items()})


def fresh(made: Stored) -> dict[str, Tensorlike]:
    """New memory for all leaves of `x`."""
    wanted = {leaf.name: leaf for leaf in made.manifest.leaves if leaf.name.startswith("x/")}
    return {name.removeprefix("x/"): one for name, one in leaves.new(wanted, {}).items()}


def same(one: Tensorlike, other: Tensorlike) -> bool:
    return (
        tuple(one.shape) == tuple(other.shape)
        and dtype_name(one) == dtype_name(other)
        and bytes_of(one) == bytes_of(other)
    )


@pytest.mark.parametrize("dtype", sorted(_ITEM_BYTES))
def test_every_dtype_and_shape(dtype: str) -> None:
    state = {str(number): random_tensor(dtype, shape, number) for number, shape in enumerate(SHAPES)}
    made = stored({"x": state}, grid_bytes=64 * 1024)
    new = fresh(made)
    live: dict[str, Tensorlike] = {name: torch.zeros_like(one) for name, one in state.items()}
    for destinations in (new, live):
        read_back(made, destinations)
        assert [name for name, one in state.items() if not same(one, destinations[name])] == []


@pytest.mark.parametrize("dtype", ["<f8", ">i4", "|b1", "<c16", "<M8[ns]", "<U5", "|S3", "<f2"])
def test_arrays(dtype: str) -> None:
    rng = np.random.default_rng(1)
    state = {
        str(number): rng.integers(0, 100, shape).astype(np.dtype(dtype))
        for number, shape in enumerate(SHAPES)
    }
    made = stored({"x": state})
    new = fresh(made)
    read_back(made, new)
    assert [name for name, one in state.items() if not same(one, new[name])] == []
    for one in new.values():
        assert isinstance(one, np.ndarray)
        assert one.flags.writeable


# -- new memory --------------------------------------------------------------------------------------------


def test_large_leaves_lie_on_pages_of_one_piece_of_memory_that_goes_with_the_last() -> None:
    sizes = [SMALL_BYTES, SMALL_BYTES + 1, 3 * SMALL_BYTES + 77]
    made = stored({"x": {str(number): random_tensor("uint8", (size,)) for number, size in enumerate(sizes)}})
    new = fresh(made)
    pointers = [one.data_ptr() for one in new.values() if isinstance(one, torch.Tensor)]
    assert [pointer % 4096 for pointer in pointers] == [0, 0, 0]
    assert sorted(pointers)[2] - sorted(pointers)[0] < sum(sizes)
    last = new["1"]
    last.fill_(3)  # type: ignore[union-attr]
    alive = weakref.ref(new["0"].untyped_storage())  # type: ignore[union-attr]
    del new
    gc.collect()
    assert alive() is None
    assert int(last.sum()) == 3 * sizes[1]


def test_a_leaf_on_another_device_is_made_there() -> None:
    made = stored({"x": {"a": torch.ones(SMALL_BYTES), "b": torch.ones(2), "c": np.ones(2)}})
    wanted = {leaf.name: leaf for leaf in made.manifest.leaves if leaf.name.startswith("x/")}
    meta = torch.device("meta")
    new = leaves.new(wanted, {"x/a": meta, "x/c": meta})
    assert isinstance(new["x/a"], torch.Tensor)
    assert isinstance(new["x/b"], torch.Tensor)
    assert new["x/a"].device == meta
    assert new["x/b"].device == CPU
    assert isinstance(new["x/c"], np.ndarray)


# -- straight ----------------------------------------------------------------------------------------------


def test_what_can_be_read_into_is_filled_with_one_call_and_nothing_is_read_twice() -> None:
    tied = torch.randn(500)
    made = stored({"x": {"a": tied, "b": tied, "c": torch.randn(30, 40), "empty": torch.empty(0)}})
    live = torch.zeros(500)
    c = torch.zeros(30, 40, requires_grad=True)
    read_back(made, {"a": live, "b": live, "c": c, "empty": torch.empty(0)})
    assert (live == tied).all()
    assert made.calls == 1
    assert made.read_bytes == 500 * 4 + 30 * 40 * 4
    assert c.grad is None
    assert c.grad_fn is None


def test_bytes_that_two_tensors_want_go_to_both() -> None:
    tied = torch.randn(500)
    made = stored({"x": {"a": tied, "b": tied}})
    one, other = torch.zeros(500), torch.zeros(500)
    read_back(made, {"a": one, "b": other})
    assert (one == tied).all()
    assert (other == tied).all()


# -- through stages ----------------------------------------------------------------------------------------


def odd_memory(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of zeros that cannot be read into."""
    if kind == "transposed":
        return torch.zeros(shape[::-1]).permute(*reversed(range(len(shape))))
    if kind == "strided":
        return torch.zeros(*shape[:-1], shape[-1] * 2)[..., ::2]
    if kind == "conj":
        return torch.zeros(shape, dtype=torch.complex64).conj()
    return torch.zeros(shape, dtype=torch.complex64).conj().imag


ODD = ["transposed", "strided", "conj", "neg"]


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("shape", [(1,), (4, 5), (3, 1000, 7), (2, 2, 3000), (3000, 2), (1, 1, 9000)])
def test_memory_that_is_not_as_it_is_stored(
    kind: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is staged that is larger than a stage, and all of it arrives."""
    monkeypatch.setattr(leaves, "STAGE_BYTES", 4096)
    live = odd_memory(kind, shape)
    saved = random_tensor(dtype_name(live), shape, 3)
    if live.dtype.is_complex or live.dtype.is_floating_point:
        saved = torch.nan_to_num(saved, 1, 2, 3)
    made = stored({"x": {"a": saved, "b": torch.ones(10)}})
    before = (live.is_conj(), live.is_neg(), live.stride())
    b = torch.zeros(20)[::2]
    read_back(made, {"a": live, "b": b})
    assert torch.equal(live, saved)
    assert torch.equal(b, torch.ones(10))
    assert (live.is_conj(), live.is_neg(), live.stride()) == before
    if not live.is_contiguous() or live.is_conj() or live.is_neg():
        assert max(size for _, _, size in made.reads) <= 4096
    assert made.read_bytes == saved.nbytes + 40


@settings(max_examples=examples(150), deadline=None)
@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    limit=st.sampled_from([64, 128, 256]),
    offset=st.integers(0, 10).map(lambda number: number * 64),
)
def test_pieces_cover_a_tensor_once_and_in_order(
    shape: list[int], order: random.Random, limit: int, offset: int
) -> None:
    dims = list(range(len(shape)))
    order.shuffle(dims)
    plain = torch.arange(math.prod(shape), dtype=torch.float32).reshape([shape[dim] for dim in dims])
    back = [dims.index(dim) for dim in range(len(shape))]
    tensor = plain.permute(back)
    pieces = list(leaves._pieces(leaves._Part(tensor, 5, offset), limit))
    assert torch.equal(torch.cat([piece.tensor.reshape(-1) for piece in pieces]), tensor.reshape(-1))
    assert all(piece.size_bytes <= limit for piece in pieces)
    begins = [piece.offset for piece in pieces]
    assert begins == list(itertools.accumulate((piece.size_bytes for piece in pieces[:-1]), initial=offset))
    if tensor.is_contiguous() and len(pieces) > 1:
        assert [begin % limit for begin in begins[1:]] == [0] * (len(pieces) - 1)


@settings(max_examples=examples(200), deadline=None)
@given(st.data(), st.lists(st.integers(1, 12), max_size=3), st.sampled_from([512, 4096]), st.booleans())
def test_boxes_go_to_tensors_of_any_order_and_dtype(
    data: st.DataObject, shape: list[int], stage_bytes: int, far: bool
) -> None:
    """Also of a part of a tensor, of which the rest stays as it is."""
    whole = torch.arange(1, 1 + math.prod(shape), dtype=torch.float32).reshape(shape)
    made = stored({"w": whole, "other": 1}, grid_bytes=512)
    begin = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    sizes = tuple(data.draw(st.integers(1, size - at)) for size, at in zip(shape, begin, strict=True))
    order = data.draw(st.permutations(range(len(shape))))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    padded = torch.zeros([sizes[n] + 1 for n in order], dtype=dtype)
    inverse = [order.index(n) for n in range(len(shape))]
    tensor = padded.permute(inverse)[tuple(slice(0, size) for size in sizes)]
    (place,) = made.manifest.by_name["w"].slices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaves, "STAGE_BYTES", stage_bytes)
        patch.setattr(leaves, "STRETCH_BYTES", 16 if far else 4096)
        wanted = leaves.Wanted(place, torch.float32, begin, tensor)
        leaves.read_boxes(made.manifest, made.fill, [wanted])
    expected = whole[tuple(slice(a, a + s) for a, s in zip(begin, sizes, strict=True))]
    assert torch.equal(tensor, expected.to(dtype))
    assert padded.count_nonzero() == math.prod(sizes)


def test_small_leaves_share_a_stage() -> None:
    state = {str(number): torch.randn(number + 2) for number in range(200)}
    made = stored({"x": state})
    live = {name: torch.zeros(2 * len(one))[::2] for name, one in state.items()}
    read_back(made, dict(live))
    assert [name for name in state if not torch.equal(live[name], state[name])] == []
    assert made.calls == 1


def test_a_chunk_larger_than_a_stage_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaves, "STAGE_BYTES", 4096)
    saved = torch.randn(SMALL_BYTES)
    made = stored({"x": {"a": saved}}, grid_bytes=65536)
    late = torch.zeros(SMALL_BYTES).as_subclass(Late)
    carrier = HostCarrier()
    leaves.read(made.manifest, made.fill, {"x/a": late}, lambda _: carrier)
    assert {size for _, _, size in made.reads} == {65536}
    assert len(made.reads) == len(set(made.reads)) == saved.nbytes // 65536


# -- devices -----------------------------------------------------------------------------------------------


class Stream:
    """What is to be done on a device, which it does when somebody waits for it, and in any order."""

    def __init__(self, device: Any = None) -> None:
        self.waiting: list[Callable[[], object]] = []
        self.waited_for: list[Stream] = []
        self.lock = threading.Lock()

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)

    def wait_event(self, event: Event) -> None:
        raise AssertionError("the host waits, no stream does")


class Event:
    def __init__(self, *, blocking: bool) -> None:
        assert blocking

    def record(self, stream: Stream) -> None:
        with stream.lock:
            self.work, stream.waiting = stream.waiting, []
        self.stream = stream

    def synchronize(self) -> None:
        random.Random(len(self.work)).shuffle(self.work)
        for copy in self.work:
            copy()


class Device:
    """As `torch.cuda` is: a module with streams and events."""

    Stream = Stream
    Event = Event

    def __init__(self) -> None:
        self.default = Stream()
        self.now = threading.local()

    def current_stream(self, device: Any = None) -> Stream:
        return self.default

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.now.stream = stream
        yield
        del self.now.stream

    def cudart(self) -> Any:
        raise AssertionError("stages are page-locked by torch")


DEVICE = Device()


class Late(torch.Tensor):
    """A tensor that somebody else copies to, later."""

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> Late:  # type: ignore[override]
        memory = self.as_subclass(torch.Tensor)
        if not non_blocking:
            memory.copy_(source)
            return self
        stream: Stream = DEVICE.now.stream
        with stream.lock:
            stream.waiting.append(lambda: memory.copy_(source))
        return self


def to_device(made: Stored, destinations: dict[str, torch.Tensor]) -> DeviceCarrier:
    carrier = DeviceCarrier(CPU, DEVICE, pinned=False)
    leaves.read(
        made.manifest,
        made.fill,
        {f"x/{name}": one for name, one in destinations.items()},
        lambda tensor: carrier if isinstance(tensor, Late) else None,
    )
    return carrier


def test_a_device_gets_everything_before_read_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages are used again, so a copy that were not waited for would copy another tensor's bytes."""
    monkeypatch.setattr(leaves, "STAGE_BYTES", 8192)
    state = {
        "large": random_tensor("bfloat16", (300, 1001), 1),
        "half": random_tensor("float16", (5000,), 2),
        "flag": random_tensor("bool", (9999,), 3),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0),
        **{f"tiny{number}": random_tensor("int64", (number + 1,), number) for number in range(60)},
        "host": torch.randn(3000),
    }
    made = stored({"x": state})
    live = {name: torch.zeros_like(one).as_subclass(Late) for name, one in state.items()}
    live["host"] = torch.zeros(3000)
    carrier = to_device(made, live)
    assert [
        name for name in state if bytes_of(live[name].as_subclass(torch.Tensor)) != bytes_of(state[name])
    ] == []
    assert carrier._stream.waited_for == [DEVICE.default]
    assert carrier._stream.waiting == []
    assert max(size for region, _, size in made.reads if size != 12000) <= 8192


def test_stages_are_few_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """All lanes are at work at once, each with its stage, and there are no more of them."""
    monkeypatch.setattr(leaves, "STAGE_BYTES", 4096)
    saved = random_tensor("uint8", (40 * 4096,))
    made = stored({"x": {"a": saved}})
    at_once = threading.Barrier(leaves.LANES)
    made.on_fill = lambda: at_once.wait(60) if made.calls <= leaves.LANES else None
    stages: list[int] = []

    class Counted(HostCarrier):
        def stage(self, size_bytes: int) -> torch.Tensor:
            stages.append(size_bytes)
            return super().stage(size_bytes)

    live = torch.zeros(40 * 4096, dtype=torch.uint8)
    carrier = Counted()
    leaves.read(made.manifest, made.fill, {"x/a": live}, lambda _: carrier)
    assert torch.equal(live, saved)
    assert stages == [4096] * leaves.LANES


def test_damage_in_one_lane_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaves, "STAGE_BYTES", 4096)
    made = stored({"x": {"a": random_tensor("uint8", (100 * 4096,))}})
    made.fails_at = 5
    before = threading.active_count()
    with pytest.raises(Damaged, match="not the one"):
        to_device(made, {"a": torch.zeros(100 * 4096, dtype=torch.uint8).as_subclass(Late)})
    assert made.calls < 20
    assert threading.active_count() == before


def test_tensors_of_a_device_share_a_carrier_and_plain_memory_needs_none() -> None:
    carriers = leaves._Carriers()
    assert carriers(torch.zeros(4, 4)) is None
    carrier = carriers(torch.zeros(4, 4).T[1:])
    assert isinstance(carrier, HostCarrier)
    assert carriers(torch.zeros(3, dtype=torch.complex64).conj()) is carrier
    assert isinstance(carriers(torch.empty(3, device="meta")), HostCarrier)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
@pytest.mark.parametrize("dtype", sorted(_ITEM_BYTES))
def test_cuda(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaves, "STAGE_BYTES", 256 * 1024)
    state = {str(number): random_tensor(dtype, shape, number) for number, shape in enumerate(SHAPES)}
    made = stored({"x": state}, grid_bytes=64 * 1024)
    live: dict[str, Tensorlike] = {name: torch.zeros_like(one, device="cuda") for name, one in state.items()}
    read_back(made, live)
    back = {name: one.cpu() for name, one in live.items() if isinstance(one, torch.Tensor)}
    assert [name for name, one in state.items() if not same(one, back[name])] == []
