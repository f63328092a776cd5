"""From a snapshot's leaves into tensors: straight into their memory where it can be written as it is stored,
else piece by piece through small stages, page-locked ones where the tensors are on a device.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, TypeGuard

import numpy as np
import torch

from everstep.errors import Damaged
from everstep.format.chunk import aligned
from everstep.format.layout import SLICE_ALIGNMENT_BYTES, SMALL_BYTES, Box, item_bytes
from everstep.format.manifest import Manifest, StoredLeaf, StoredSlice
from everstep.state.devices import Accelerator, accelerator_of
from everstep.state.sharding import (
    boxes_of,
    is_sharded,
    local,
    overlap,
    sharded_like,
    spec_of,
    views,
    whole,
    within,
)
from everstep.state.tree import Tensorlike, torch_dtype

CPU = torch.device("cpu")
STAGE_BYTES = 16 * 1024 * 1024
"""What goes through a stage at once, or a chunk of the chain's grid where that is larger."""

STRETCH_BYTES = 64 * 1024
"""Where a tensor takes stretches of a slice with gaps between them, from this length on each is read by
itself; of shorter ones the gaps are read too, into a stage."""

_MANY = 16
"""Slices of a leaf that are not worth a search."""

LANES = 3
"""So many stages are in use at a time: while one is copied to the device the others are read into."""


class Fill(Protocol):
    """Reads bytes of the snapshot: fills each (region, offset in it, writable memory), verified. Blocks; may
    be called from several threads at once. Raises Damaged."""

    def __call__(self, targets: Iterable[tuple[int, int, memoryview]]) -> None: ...


class Carrier(Protocol):
    """Brings bytes from the host's memory to tensors that cannot be read into."""

    def stage(self, size_bytes: int) -> torch.Tensor:
        """Host memory to read into, as bytes, from which `carry` is fast."""

    def carry(self, cargo: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy the second of each pair to the first; blocks until the stage may be used again. May be called
        from several threads at once."""


Like: TypeAlias = torch.device | torch.Tensor
"""What new memory is made like: on a device; or where a tensor is and, if it has its shape, in the order in
which its memory lies. Kernels for two tensors of one order may round otherwise than those for two orders."""

CarrierOf: TypeAlias = Callable[[torch.Tensor], "Carrier | None"]
"""Who brings bytes to a tensor; None where they are read straight into its memory."""


def stored_leaf(manifest: Manifest, name: str) -> StoredLeaf:
    """The leaf of this name. Raises Damaged where the values name one that is not there."""
    leaf = manifest.by_name.get(name)
    if leaf is None:
        raise Damaged(f"the snapshot's values name a leaf {name!r} that it does not hold")
    return leaf


def same_bytes(leaf: StoredLeaf) -> tuple[object, ...]:
    """What two leaves have in common exactly when they are the same bytes seen in the same way (tied
    weights)."""
    if not size_bytes_of(leaf):
        return (leaf.name,)
    return (leaf.slices, leaf.dtype, leaf.shape)


def size_bytes_of(leaf: StoredLeaf) -> int:
    """Of all of it, over all ranks."""
    return math.prod(leaf.shape) * item_bytes(leaf.dtype)


# -- new memory -------------------------------------------------------------------------------------------


def new(leaves: Mapping[str, StoredLeaf], likes: Mapping[str, Like]) -> dict[str, Tensorlike]:
    """A tensor or array for each leaf, of undefined contents; on the CPU and contiguous but for those that
    `likes` names. What is like a DTensor and has its shape is one too, placed as that is.

    Large ones of the CPU lie in one piece of memory, made for being read into: on page boundaries, which
    spares a copy, and of large pages where the system has them, for the first touch of fresh memory takes
    longer than the read. It is freed when the last of them is.
    """
    made: dict[str, Tensorlike] = {}
    large: dict[str, StoredLeaf] = {}
    for name, leaf in leaves.items():
        like = likes.get(name, CPU)
        if is_sharded(like) and tuple(like.shape) == leaf.shape:
            own = torch.empty_like(local(like), dtype=torch_dtype(leaf.dtype))
            made[name] = sharded_like(own, like)
            continue
        device = like if isinstance(like, torch.device) else like.device
        if _has_an_order(like, leaf):
            made[name] = torch.empty_like(like, dtype=torch_dtype(leaf.dtype))
        elif leaf.dtype.startswith("numpy:") or device == CPU:
            if size_bytes_of(leaf) >= SMALL_BYTES:
                large[name] = leaf
            elif leaf.dtype.startswith("numpy:"):
                made[name] = np.empty(leaf.shape, _numpy_dtype(leaf))
            else:
                made[name] = torch.empty(leaf.shape, dtype=torch_dtype(leaf.dtype))
        else:
            made[name] = torch.empty(leaf.shape, dtype=torch_dtype(leaf.dtype), device=device)
    made.update(_together(large))
    return made


def _has_an_order(like: Like, leaf: StoredLeaf) -> TypeGuard[torch.Tensor]:
    """Whether a leaf's memory is to lie in another order than it is stored in."""
    if isinstance(like, torch.device) or leaf.dtype.startswith("numpy:") or is_sharded(like):
        return False
    return tuple(like.shape) == leaf.shape and not like.is_contiguous()


def _together(leaves: Mapping[str, StoredLeaf]) -> Iterator[tuple[str, Tensorlike]]:
    sizes = {name: aligned(size_bytes_of(leaf)) for name, leaf in leaves.items()}
    if not sizes:
        return
    memory = mmap.mmap(-1, sum(sizes.values()), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A system without large pages refuses, and everything is the same but slower.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    start = 0
    for name, leaf in leaves.items():
        count = math.prod(leaf.shape)
        if leaf.dtype.startswith("numpy:"):
            flat = np.frombuffer(memory, _numpy_dtype(leaf), count, start)
            yield name, flat.reshape(leaf.shape)
        else:
            tensor = torch.frombuffer(memory, dtype=torch_dtype(leaf.dtype), count=count, offset=start)
            yield name, tensor.view(leaf.shape)
        start += sizes[name]


def _numpy_dtype(leaf: StoredLeaf) -> np.dtype[Any]:
    return np.dtype(leaf.dtype.removeprefix("numpy:"))


# -- reading ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A tensor, or a part of one, and where its bytes lie in the snapshot: one after the other; or, where
    there are `strides` (in elements), with others between them. `dtype` is what is stored, where that is
    another than the tensor's: then it is converted."""

    tensor: torch.Tensor
    region: int
    offset: int
    strides: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None

    @property
    def item_bytes(self) -> int:
        return self.tensor.itemsize if self.dtype is None else self.dtype.itemsize

    @property
    def size_bytes(self) -> int:
        """What is to be read for it."""
        if self.strides is None:
            return self.tensor.numel() * self.item_bytes
        last = sum((size - 1) * stride for size, stride in zip(self.tensor.shape, self.strides, strict=True))
        return (last + 1) * self.item_bytes

    def source(self, stage: torch.Tensor) -> torch.Tensor:
        """Its elements, out of what was read for it."""
        elements = stage.view(self.dtype or self.tensor.dtype)
        if self.strides is None:
            return elements.view(self.tensor.shape)
        return elements.as_strided(self.tensor.shape, self.strides)


class _Carriers:
    """Those of one read: one for each device."""

    def __init__(self) -> None:
        self._made: dict[torch.device, Carrier] = {}

    def __call__(self, tensor: torch.Tensor) -> Carrier | None:
        on_cpu = tensor.device.type == "cpu"
        if on_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
            return None
        if tensor.device not in self._made:
            accelerator = accelerator_of(tensor)
            self._made[tensor.device] = (
                HostCarrier() if accelerator is None else DeviceCarrier(tensor.device, accelerator)
            )
        return self._made[tensor.device]


def read(
    manifest: Manifest,
    fill: Fill,
    destinations: Mapping[str, Tensorlike],
    carrier_of: CarrierOf | None = None,
    *,
    rank: int | None = None,
) -> None:
    """Fill tensors and arrays with the leaves they are named after, whose shapes and dtypes they have; of a
    DTensor what this process holds of it.

    What lies in one stretch both in the snapshot and in memory is read straight there, and so is what lies in
    stretches of `STRETCH_BYTES` or more; the rest goes through stages.

    Args:
        rank: which rank this is; None: as torch says.

    Blocks until all is there, on devices too. Besides the tensors it takes `LANES` stages of `STAGE_BYTES`,
    and that only if there are tensors which cannot be read into. Raises Damaged: some are overwritten then,
    with verified bytes or with none.
    """
    targets: list[tuple[int, int, memoryview]] = []
    parts: list[_Part] = []
    aside: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    for name, tensor in destinations.items():
        leaf = stored_leaf(manifest, name)
        if isinstance(tensor, np.ndarray):
            array = tensor
            if not array.flags.c_contiguous:
                array = np.empty(array.shape, array.dtype)
                aside.append((tensor, array))
            targets += _of_array(leaf, array)
            continue
        parts += _parts(leaf, tensor, rank)
    _read_parts(manifest, fill, parts, targets, carrier_of)
    for array, made in aside:
        np.copyto(array, made)


@dataclass(frozen=True)
class Wanted:
    """A tensor that takes a box of a slice, whose shape it has: `begin` is where in the slice that begins.
    The tensor's dtype may be another than `dtype`, what is stored: then it is converted, as `copy_` does."""

    place: StoredSlice
    dtype: torch.dtype
    begin: tuple[int, ...]
    tensor: torch.Tensor


def read_boxes(
    manifest: Manifest, fill: Fill, wanted: Iterable[Wanted], carrier_of: CarrierOf | None = None
) -> None:
    """Fill tensors with boxes of slices; else as `read`."""
    parts: list[_Part] = []
    for one in wanted:
        tensor = one.tensor.detach()
        if tensor.numel():
            at = tuple(a + b for a, b in zip(one.place.at, one.begin, strict=True))
            dtype = None if tensor.dtype == one.dtype else one.dtype
            parts += _of_slice(one.place, (at, tuple(tensor.shape)), tensor, dtype)
    _read_parts(manifest, fill, parts, [], carrier_of)


def _read_parts(
    manifest: Manifest,
    fill: Fill,
    parts: Iterable[_Part],
    targets: list[tuple[int, int, memoryview]],
    carrier_of: CarrierOf | None,
) -> None:
    """Read parts, each to where it belongs, and what is to be read straight to `targets`."""
    carrier_of = carrier_of or _Carriers()
    gathered = HostCarrier()
    staged: dict[Carrier, list[_Part]] = defaultdict(list)
    seen: set[tuple[object, ...]] = set()
    for part in parts:
        if _is_twin(part, seen):
            continue
        carrier = carrier_of(part.tensor)
        if carrier is not None:
            staged[carrier].append(part)
        elif part.strides is None and part.dtype is None:
            targets.append((part.region, part.offset, _memory(part.tensor)))
        else:
            staged[gathered].append(part)
    if targets:
        fill(targets)
    limit = max(STAGE_BYTES, manifest.grid_bytes)
    for carrier, some in staged.items():
        _through_stages(fill, carrier, list(_loads(some, limit)), limit)


def _of_array(leaf: StoredLeaf, array: np.ndarray[Any, Any]) -> Iterator[tuple[int, int, memoryview]]:
    """An array is all there, and so its slices are rows of it."""
    for place in leaf.slices:
        if math.prod(place.extent):
            yield (
                place.region,
                place.offset,
                _memory(within(array, whole(leaf.shape), (place.at, place.extent))),
            )


def _parts(leaf: StoredLeaf, tensor: torch.Tensor, rank: int | None) -> Iterator[_Part]:
    """What a tensor, or this rank's part of one, takes of each slice of a leaf."""
    if leaf.whole is not None and not is_sharded(tensor):
        if tensor.numel():
            yield _Part(tensor.detach(), leaf.whole.region, leaf.whole.offset)
        return
    if is_sharded(tensor):
        at = tensor.device_mesh.get_rank() if rank is None else rank
        boxes = boxes_of(leaf.shape, spec_of(leaf.name, tensor, at), at)
    else:
        boxes = (whole(leaf.shape),)
    own = local(tensor).detach()
    if not own.numel():
        return
    for box, view in zip(boxes, views(own, boxes), strict=True):
        for place in _near(leaf.slices, box):
            common = overlap(box, (place.at, place.extent))
            if common is not None:
                yield from _of_slice(place, common, within(view, box, common))


def _near(slices: Sequence[StoredSlice], box: Box) -> Sequence[StoredSlice]:
    """Those that may overlap a box: of thousands of slices, which are in order, few do."""
    if len(slices) < _MANY or not box[0]:
        return slices
    begin, end = box[0][0], box[0][0] + box[1][0]
    longest = max(one.extent[0] for one in slices)
    first = bisect_left(slices, begin - longest + 1, key=lambda one: one.at[0])
    return slices[first : bisect_left(slices, end, key=lambda one: one.at[0])]


def _of_slice(
    place: StoredSlice, part: Box, tensor: torch.Tensor, dtype: torch.dtype | None = None
) -> Iterator[_Part]:
    """How the `part` of a slice gets into `tensor`, which has its shape; for `dtype` see `_Part`."""
    item_bytes = tensor.itemsize if dtype is None else dtype.itemsize
    strides = _strides(place.extent)
    start = sum((at - begin) * stride for at, begin, stride in zip(part[0], place.at, strides, strict=True))
    offset = place.offset + start * item_bytes
    # From the innermost dimension on as far as all of the slice is wanted, and one more: that is a stretch.
    dim = len(part[1])
    while dim > 0 and part[1][dim - 1] == place.extent[dim - 1]:
        dim -= 1
    outer = max(dim - 1, 0)
    if all(size == 1 for size in part[1][:outer]):
        yield _Part(tensor, place.region, offset, None, dtype)
    elif math.prod(part[1][outer:]) * item_bytes >= STRETCH_BYTES:
        for index in itertools.product(*map(range, part[1][:outer])):
            further = sum(number * stride for number, stride in zip(index, strides, strict=False))
            yield _Part(tensor[index], place.region, offset + further * item_bytes, None, dtype)
    else:
        yield _Part(tensor, place.region, offset, strides, dtype)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Those of a tensor whose elements lie one after the other."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _is_twin(part: _Part, seen: set[tuple[object, ...]]) -> bool:
    """Whether the same bytes go to the same memory already: tied weights are read once."""
    tensor = part.tensor
    where = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    seen_as = (part.region, part.offset, part.strides, *where, tensor.is_conj(), tensor.is_neg())
    if seen_as in seen:
        return True
    seen.add(seen_as)
    return False


def _memory(tensor: Tensorlike) -> memoryview:
    """The memory of a contiguous CPU tensor or array, as bytes."""
    if isinstance(tensor, torch.Tensor):
        # A single element counts as contiguous whatever its stride is.
        flat = tensor.detach().as_strided((tensor.numel(),), (1,))
        tensor = flat.view(torch.uint8).numpy()
    return tensor.reshape(-1).view(np.uint8).data


# -- through stages ---------------------------------------------------------------------------------------


def _loads(parts: Sequence[_Part], limit: int) -> Iterator[list[_Part]]:
    """What goes through a stage together, in the order in which it is stored."""
    load: list[_Part] = []
    room = limit
    for part in sorted(parts, key=lambda part: (part.region, part.offset)):
        for piece in _pieces(part, limit):
            taken = _spaced(piece.size_bytes)
            if taken > room and load:
                yield load
                load, room = [], limit
            load.append(piece)
            room -= taken
    if load:
        yield load


def _spaced(size_bytes: int) -> int:
    return -(-size_bytes // SLICE_ALIGNMENT_BYTES) * SLICE_ALIGNMENT_BYTES


def _pieces(part: _Part, limit: int) -> Iterator[_Part]:
    """A part in pieces of `limit` bytes at most; they end where chunks do, as far as its memory allows."""
    tensor, item = part.tensor, part.item_bytes
    if part.size_bytes <= limit:
        yield part
    elif part.strides is not None:
        yield from _rows(part, limit, part.strides[0] * item)
    elif tensor.is_contiguous():
        flat, start = tensor.view(-1), 0
        while start < part.size_bytes:
            end = min(part.size_bytes, (part.offset + start) // limit * limit + limit - part.offset)
            yield replace(part, tensor=flat[start // item : end // item], offset=part.offset + start)
            start = end
    else:
        yield from _rows(part, limit, part.size_bytes // tensor.shape[0])


def _rows(part: _Part, limit: int, row_bytes: int) -> Iterator[_Part]:
    """A part in pieces of some rows, or of parts of one; a row begins so many bytes after the one before."""
    rows = max(limit // row_bytes, 1)
    for first in range(0, part.tensor.shape[0], rows):
        offset = part.offset + first * row_bytes
        if rows > 1 or row_bytes <= limit:
            some = replace(part, tensor=part.tensor[first : first + rows], offset=offset)
        else:
            inner = None if part.strides is None else part.strides[1:]
            some = replace(part, tensor=part.tensor[first], offset=offset, strides=inner)
        yield from _pieces(some, limit)


def _through_stages(fill: Fill, carrier: Carrier, loads: Sequence[list[_Part]], limit: int) -> None:
    waiting = iter(loads)
    lock = threading.Lock()
    errors: list[BaseException] = []

    def lane() -> None:
        try:
            with torch.no_grad():
                stage = carrier.stage(min(limit, max(map(_load_bytes, loads))))
                while not errors:
                    with lock:
                        load = next(waiting, None)
                    if load is None:
                        return
                    _bring(fill, carrier, load, stage)
        except BaseException as error:
            errors.append(error)

    lanes = [threading.Thread(target=lane, name="everstep-stage") for _ in range(min(LANES, len(loads)) - 1)]
    for one in lanes:
        one.start()
    lane()
    for one in lanes:
        one.join()
    if errors:
        raise errors[0]


def _load_bytes(load: Sequence[_Part]) -> int:
    return sum(_spaced(part.size_bytes) for part in load)


def _bring(fill: Fill, carrier: Carrier, load: Sequence[_Part], stage: torch.Tensor) -> None:
    targets, cargo = [], []
    memory: memoryview = stage.numpy().data
    at = 0
    for part in load:
        end = at + part.size_bytes
        targets.append((part.region, part.offset, memory[at:end]))
        cargo.append((part.tensor, part.source(stage[at:end])))
        at += _spaced(part.size_bytes)
    fill(targets)
    carrier.carry(cargo)


class HostCarrier:
    """For tensors of the CPU whose memory is not as it is stored, and for devices whose copies the host
    waits for."""

    def stage(self, size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8)

    def carry(self, cargo: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for tensor, source in cargo:
            tensor.copy_(source)


class DeviceCarrier:
    """For a device that copies by itself: from page-locked memory, on a stream of its own.

    Args:
        pinned: whether stages are page-locked.
    """

    def __init__(self, device: torch.device, accelerator: Accelerator, *, pinned: bool = True) -> None:
        self._accelerator = accelerator
        self._pinned = pinned
        self._stream = accelerator.Stream(device)
        # What was done to the tensors before, such as their making, is done before they are written to.
        self._stream.wait_stream(accelerator.current_stream(device))

    def stage(self, size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self._pinned)

    def carry(self, cargo: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        with self._accelerator.stream(self._stream):
            for tensor, source in cargo:
                tensor.copy_(source, non_blocking=True)
            done = self._accelerator.Event(blocking=True)
            done.record(self._stream)
        done.synchronize()
