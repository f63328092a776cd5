"""From tensors of a device into an arena, on a stream beside the one that computes.

The host only asks. What computes waits for a copy on the device, where it must: before the next forward for
what may change any time, before `optimizer.step()` for the rest. So the loop runs ahead of the device as it
does without a snapshot.

A tensor's memory must not become another's before it is copied. Whoever asks for a copy holds on to the
tensor until the host has seen the copy's end; so the allocator need not be told of the second stream
(`record_stream`), which would make it look for that end at every allocation.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from everstep.format.layout import SLICE_ALIGNMENT_BYTES
from everstep.state.copying import LARGE_BYTES, Move, Pair, Slot, bytes_of, is_memory
from everstep.state.devices import Accelerator, Event, forget_error

BUFFER_BYTES = 16 * 1024 * 1024
"""What a side takes of its device's memory, for what must be brought in order before it is copied."""

_LEAST_BUFFER_BYTES = 64 * 1024
_HELD_BYTES = 4096
"""Leaves of the host up to this size may lie within a stretch of a device's: they are copied after it."""


class Side:
    """The copies of one device's tensors, on a stream of its own. One thread at a time may use it.

    Nothing here waits for the device but `same`.
    """

    def __init__(self, accelerator: Accelerator, device: torch.device) -> None:
        self.accelerator = accelerator
        self.device = device
        self._stream = accelerator.Stream(device)
        self._buffer: torch.Tensor | None = None
        self._plans: weakref.WeakKeyDictionary[Slot, dict[str, Plan]] = weakref.WeakKeyDictionary()

    @contextmanager
    def here(self) -> Iterator[None]:
        """Within it, what is asked of the device is asked of the side's stream."""
        with self.accelerator.stream(self._stream), torch.no_grad():
            yield

    # -- order --------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """What the side is asked from now on comes after all that the device was asked until now."""
        self._stream.wait_stream(self.accelerator.current_stream(self.device))

    def mark(self) -> Event:
        """Marks all that the side was asked until now."""
        # A thread that waits for it sleeps: spinning would take a core from the loop.
        event = self.accelerator.Event(blocking=True)
        event.record(self._stream)
        return event

    def hold_back(self, mark: Event) -> None:
        """What the device is asked from now on, by this thread, comes after `mark`."""
        self.accelerator.current_stream(self.device).wait_event(mark)

    # -- copies -------------------------------------------------------------------------------------------

    def plan(self, slot: Slot, occasion: str, own: Sequence[Move], host: Sequence[Move]) -> Plan:
        """How to copy these tensors; the same one as long as they are the same for an occasion.

        Args:
            own: tensors of this side.
            host: those of the host that are copied at the same occasion.
        """
        plans = self._plans.setdefault(slot, {})
        plan = plans.get(occasion)
        if plan is None or not plan.is_of(own, host):
            plan = plans[occasion] = Plan(slot, own, host, self._room(own[0].source))
        return plan

    def copy(self, plan: Plan, own: Sequence[Move]) -> None:
        """Ask for the copies; `own` must be held on to, and the arena left alone, until they are done."""
        with self.here():
            for one in plan.stretches:
                if one.has_gaps:
                    one.gathered.zero_()
                for targets, which in one.parts:
                    torch._foreach_copy_(targets, [own[at].source for at in which])
                one.place.copy_(one.gathered, non_blocking=True)
            for at in plan.alone:
                self._copy_alone(own[at])

    def _copy_alone(self, move: Move) -> None:
        assert isinstance(move.view, torch.Tensor)
        if is_memory(move.source):
            move.view.copy_(move.source, non_blocking=True)
            return
        # Piece by piece: in order as a whole, it would take as much of the device's memory once more. What is
        # conjugated or negated must become so on the device, for torch would do it here before it has come.
        for view, source in self._pieces(move.view, move.source):
            staged = self._staged(source)
            staged.copy_(source)
            view.copy_(staged, non_blocking=True)

    def same(self, move: Move) -> bool:
        """Whether a tensor is, bit for bit, as it lies in the arena. Blocks until the device has compared
        them; both must not change meanwhile."""
        assert isinstance(move.view, torch.Tensor)
        with self.here():
            for view, source in self._pieces(move.view, move.source):
                staged = self._staged(source)
                staged.copy_(view, non_blocking=True)
                if not torch.equal(bytes_of(staged), bytes_of(source)):
                    return False
        return True

    def _pieces(
        self, view: torch.Tensor, source: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Parts of an arena's place and of a tensor, in order, each small enough for the buffer."""
        room = len(self._room(source))
        if source.nbytes <= room:
            yield view, source
            return
        row_bytes = source.nbytes // source.shape[0]
        rows = room // row_bytes
        if not rows:
            for number in range(source.shape[0]):
                yield from self._pieces(view[number], source[number])
            return
        for first in range(0, source.shape[0], rows):
            yield view[first : first + rows], source[first : first + rows]

    def _staged(self, source: torch.Tensor) -> torch.Tensor:
        """A place for it in the buffer, contiguous. What was there before is copied by then: the stream sees
        to it."""
        return self._room(source)[: source.nbytes].view(source.dtype).view(source.shape)

    def _room(self, like: torch.Tensor) -> torch.Tensor:
        """uint8 [bytes]: the buffer, made when it is first needed. Where the device is almost full it is
        smaller; what is copied then takes more calls."""
        size_bytes = BUFFER_BYTES
        while self._buffer is None:
            try:
                with self.here():
                    self._buffer = like.new_empty(size_bytes, dtype=torch.uint8)
            except torch.OutOfMemoryError:
                if size_bytes == _LEAST_BUFFER_BYTES:
                    raise
                size_bytes = max(size_bytes // 4, _LEAST_BUFFER_BYTES)
        return self._buffer

    def forget_error(self, like: torch.Tensor) -> None:
        with self.here():
            forget_error(like)


@dataclass(frozen=True)
class Stretch:
    """Small tensors that lie next to each other in the arena: gathered on the device by a few calls, and
    copied by one.

    `parts`: for each dtype, the places in the buffer and the numbers of the tensors that belong there.
    """

    place: torch.Tensor
    gathered: torch.Tensor
    has_gaps: bool
    parts: list[tuple[list[torch.Tensor], list[int]]]


class Plan:
    """Which tensors are copied together.

    Small leaves of the host may lie between those of a device: the step counts of Adam do, a few bytes in
    every third place. Rather than to part the stretch there, it goes over them, and they are put where they
    belong after it.

    Attributes:
        stretches: those that are gathered.
        alone: the numbers, in the order of the tensors, of those that are not.
        held: the host's leaves that a stretch goes over, by their number in the layout.
    """

    def __init__(self, slot: Slot, own: Sequence[Move], host: Sequence[Move], buffer: torch.Tensor) -> None:
        self._own = [move.number for move in own]
        self._host = [move.number for move in host]
        self.stretches: list[Stretch] = []
        self.alone: list[int] = []
        self.held: frozenset[int] = frozenset()
        self._scratch: dict[int, torch.Tensor] = {}
        self._build(slot, own, host, buffer)

    def is_of(self, own: Sequence[Move], host: Sequence[Move]) -> bool:
        return self._own == [move.number for move in own] and self._host == [move.number for move in host]

    def hold(self, host: Sequence[Move]) -> list[Pair]:
        """Copy what a stretch goes over aside; returns what is to be copied when the stretch is there."""
        pairs: list[Pair] = []
        targets, sources = [], []
        for move in host:
            if move.number in self.held:
                scratch = self._scratch[move.number]
                targets.append(scratch)
                sources.append(move.source)
                pairs.append((move.view, scratch))
        if targets:
            with torch.no_grad():
                torch._foreach_copy_(targets, sources)
        return pairs

    def _build(self, slot: Slot, own: Sequence[Move], host: Sequence[Move], buffer: torch.Tensor) -> None:
        joined: list[_Piece] = []
        for piece in sorted(_pieces(slot, own, host), key=lambda piece: piece.start):
            if joined and not _adjoins(joined, piece, len(buffer)):
                self._add(slot, joined, buffer)
                joined = []
            if joined or piece.number is not None:
                joined.append(piece)
        self._add(slot, joined, buffer)
        gathered = {number for part in self.stretches for _, which in part.parts for number in which}
        self.alone = [number for number in range(len(own)) if number not in gathered]
        self.held = frozenset(self._scratch)

    def _add(self, slot: Slot, pieces: list[_Piece], buffer: torch.Tensor) -> None:
        """Make a stretch of adjoining pieces, of which the first is the device's, if that saves a copy."""
        while pieces and pieces[-1].number is None:
            pieces.pop()
        if sum(piece.number is not None for piece in pieces) < 2:
            return
        start, end = pieces[0].start, pieces[-1].end
        parts: dict[torch.dtype, tuple[list[torch.Tensor], list[int]]] = defaultdict(lambda: ([], []))
        for piece in pieces:
            view = piece.view
            if piece.number is None:
                self._scratch[piece.place] = torch.empty_like(view)
                continue
            place = buffer[piece.start - start : piece.end - start].view(view.dtype).view(view.shape)
            targets, which = parts[view.dtype]
            targets.append(place)
            which.append(piece.number)
        filled = sum(piece.end - piece.start for piece in pieces if piece.number is not None)
        self.stretches.append(
            Stretch(slot.whole[start:end], buffer[: end - start], filled != end - start, list(parts.values()))
        )


@dataclass(frozen=True)
class _Piece:
    """A small leaf in the arena: `place` is its number in the layout, `number` that among the device's own,
    None for one of the host."""

    start: int
    end: int
    view: torch.Tensor
    place: int
    number: int | None


def _pieces(slot: Slot, own: Sequence[Move], host: Sequence[Move]) -> Iterator[_Piece]:
    for number, move in enumerate(own):
        if isinstance(move.view, torch.Tensor) and move.view.nbytes < LARGE_BYTES:
            start = slot.starts[move.number]
            yield _Piece(start, start + move.view.nbytes, move.view, move.number, number)
    for move in host:
        if isinstance(move.view, torch.Tensor) and move.view.nbytes <= _HELD_BYTES:
            start = slot.starts[move.number]
            yield _Piece(start, start + move.view.nbytes, move.view, move.number, None)


def _adjoins(joined: Sequence[_Piece], piece: _Piece, limit_bytes: int) -> bool:
    """Whether a piece follows on these, with nothing between, and all of them fit the buffer."""
    next_start = -(-joined[-1].end // SLICE_ALIGNMENT_BYTES) * SLICE_ALIGNMENT_BYTES
    return piece.start == next_start and piece.end - joined[0].start <= limit_bytes
