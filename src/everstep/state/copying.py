"""From live tensors into an arena: at once, or beside the loop while forward and backward run. `streams` has
the same for tensors of a device.

What only `optimizer.step()` changes may be copied while the next forward and backward read it. A *fence*, a
hook that runs before that step, waits for what is left. So no copy can be torn as long as nothing else writes
to these tensors in between; a few elements of each and their versions are compared to notice if something
does (`Witness`).
"""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from everstep.format.chunk import aligned
from everstep.format.layout import Layout
from everstep.state.devices import PageLock
from everstep.state.samples import Samples
from everstep.state.sorts import Sorts
from everstep.state.tree import Tensorlike

if TYPE_CHECKING:
    from everstep.state.streams import Side

Pair: TypeAlias = tuple[Tensorlike, Tensorlike]
"""Where to, and what."""

LARGE_BYTES = 1024 * 1024
"""Leaves from this size on are copied one by one, smaller ones together."""


@dataclass(frozen=True, slots=True)
class Move:
    """A leaf on its way: `view` is its place in the arena, `side` the device's it comes from, None for the
    host."""

    number: int
    name: str
    view: Tensorlike
    source: Any
    side: Side | None


class Slot:
    """An arena as capture sees it: the place of each slice of a layout, zero between them.

    Attributes:
        whole: uint8 [bytes of the arena].
        starts: where each slice begins.
        views: the place of each slice as a tensor or array; None for empty slices and aliases.
        copied: what of the frozen slices lies there, by number.
        captures: how often it was filled.
        moves, sorts: how the lasting leaves of these sorts get there, by number.
        lock: set when it was tried to lock its pages for devices.
    """

    def __init__(self, layout: Layout, memory: memoryview) -> None:
        self.layout = layout
        self.arena = memory
        self.copied: dict[int, Copied] = {}
        self.captures = 0
        self.moves: dict[int, Move] = {}
        self.sorts: Sorts | None = None
        self.lock: PageLock | None = None
        self.frozen_regions = frozenset(
            number for number, region in enumerate(layout.regions) if region.kin == "frozen"
        )
        self._samples: dict[Side | None, tuple[Sequence[int], Samples]] = {}
        clear_gaps(layout, memory)
        whole = self.whole = torch.frombuffer(memory, dtype=torch.uint8)
        self.starts = [layout.regions[region].offset + offset for region, offset in layout.places]
        self.views: list[Tensorlike | None] = []
        for one, start in zip(layout.slices, self.starts, strict=True):
            if one.alias is not None or not one.size_bytes:
                self.views.append(None)
                continue
            place = whole[start : start + one.size_bytes]
            if one.dtype.startswith("numpy:"):
                array = place.numpy().view(one.dtype.removeprefix("numpy:"))
                self.views.append(array.reshape(one.extent))
            else:
                self.views.append(place.view(getattr(torch, one.dtype)).view(one.extent))

    def samples(self, witness: Witness) -> Samples:
        """A few elements of the copies of what a witness looks at."""
        numbers, samples = self._samples.get(witness.side, ((), None))
        if samples is None or numbers != witness.numbers:
            views = [
                view for number in witness.numbers if isinstance(view := self.views[number], torch.Tensor)
            ]
            samples = Samples(views)
            self._samples[witness.side] = (witness.numbers, samples)
        return samples


def clear_gaps(layout: Layout, memory: memoryview) -> None:
    """Zero what lies between and behind the slices of each region, which another layout may have used."""
    ends = [0] * len(layout.regions)
    zeros = bytes(4096)

    def clear(start: int, end: int) -> None:
        for at in range(start, end, len(zeros)):
            memory[at : min(at + len(zeros), end)] = zeros[: min(len(zeros), end - at)]

    for one, (number, offset) in zip(layout.slices, layout.places, strict=True):
        start = layout.regions[number].offset
        if offset > ends[number]:
            clear(start + ends[number], start + offset)
        ends[number] = max(ends[number], offset + one.size_bytes)
    for region, end in zip(layout.regions, ends, strict=True):
        clear(region.offset + end, region.offset + aligned(region.size_bytes))


@torch.no_grad()
def copy(pairs: Sequence[Pair]) -> None:
    """Copy all, blocking. Other threads run meanwhile."""
    targets, sources = [], []
    for view, source in pairs:
        if isinstance(view, torch.Tensor) and isinstance(source, torch.Tensor):
            if source.nbytes >= LARGE_BYTES and source.device.type == "cpu" and is_memory(source):
                ctypes.memmove(view.data_ptr(), source.data_ptr(), source.nbytes)
            else:
                targets.append(view)
                sources.append(source)
        elif isinstance(view, np.ndarray):
            np.copyto(view, source)
    if targets:
        # Gathered in one call: thousands of calls would cost more than what they copy.
        torch._foreach_copy_(targets, sources)


def is_memory(tensor: torch.Tensor) -> bool:
    """Whether it is stored as it lies in its memory, the host's or a device's."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


@torch.no_grad()
def copy_range(
    layout: Layout, sources: Sequence[Tensorlike], begin: int, end: int, memory: memoryview
) -> None:
    """Copy what lies at the addresses `begin` to `end` of a layout (one of its waves) to the beginning of
    `memory`, zero where nothing lies. Blocking. A leaf that is not contiguous is made so as a whole.

    Args:
        sources: the slices' tensors and arrays, in order.
    """
    pairs: list[Pair] = []
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    whole[: end - begin].zero_()
    for one, source, (number, offset) in zip(layout.slices, sources, layout.places, strict=True):
        start = layout.regions[number].offset + offset
        first, last = max(start, begin), min(start + one.size_bytes, end)
        if one.alias is None and first < last:
            part = bytes_of(source)[first - start : last - start]
            pairs.append((whole[first - begin : last - begin], part))
    copy(pairs)


def bytes_of(source: Tensorlike) -> torch.Tensor:
    """uint8 [bytes]: a tensor's or array's bytes in order, where they are if they lie so."""
    if isinstance(source, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(source).reshape(-1).view(np.uint8))
    plain = source.resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8)


class Copied:
    """A tensor as it was when it was copied. Holding on to it keeps its memory from being another's, so that
    the same address is the same memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._version = tensor._version

    def is_still(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is the same memory, and no operation that torch counts has written to it."""
        return (
            tensor.data_ptr() == self._tensor.data_ptr()
            and tensor.stride() == self._tensor.stride()
            and tensor.device == self._tensor.device
            and tensor._version == self._version
        )


class Witness:
    """Notices when tensors change while they are copied: it looks at a few elements of each before, and
    compares the copies with them afterwards. That sees writes to `tensor.data` too, which torch does not
    count; the versions see all that torch counts.

    Its tensors are all of one side, on whose stream all but `settle` is to be called.
    """

    def __init__(self, moves: Sequence[Move], side: Side | None = None) -> None:
        self.side = side
        self.numbers = [move.number for move in moves]
        self._names = [move.name for move in moves]
        self._sources = [move.source for move in moves]
        self._samples = Samples(self._sources)
        self._versions: list[int] = []
        self._moved: set[str] | None = None
        self._settling = threading.Lock()

    def is_of(self, moves: Sequence[Move]) -> bool:
        """Whether these are the tensors it looks at. It holds on to them, so the same address is the same
        memory."""
        return len(moves) == len(self._sources) and all(
            one.source is other or one.source.data_ptr() == other.data_ptr()
            for one, other in zip(moves, self._sources, strict=True)
        )

    def look(self) -> None:
        """Before the copy. Does not wait for a device."""
        self._versions = [source._version for source in self._sources]
        self._moved = None
        self._samples.gather()

    def settle(self) -> None:
        """What torch counts from now on does not matter any more: all is copied, or a device will have copied
        it before it does whatever it is asked next. Only the first call counts; any thread may call."""
        with self._settling:
            if self._moved is None:
                self._moved = {
                    name
                    for name, source, version in zip(self._names, self._sources, self._versions, strict=True)
                    if source._version != version
                }

    def changed(self, copies: Samples) -> list[str]:
        """After the copy, given the same elements of the copies: the names of those that changed."""
        self.settle()
        moved = set(self._moved or ())
        before, after = self._samples.taken(), copies.take()
        if not torch.equal(before, after):
            moved.update(self._names[number] for number in copies.different(before, after))
        return sorted(moved)


class Beside:
    """A thread that waits for work, so that giving it some costs the loop next to nothing."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Have `work` done; it must not raise."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="everstep-capture", daemon=True)
            self._thread.start()
        self._work.put(work)

    def close(self) -> None:
        """End the thread when all work is done."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            del work  # It holds on to tensors that the loop may have let go of.
