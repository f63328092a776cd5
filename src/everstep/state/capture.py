"""From a training state to a filled arena."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch

from everstep.format import values
from everstep.format.layout import Layout, lay_out
from everstep.state.collecting import Collected, Row
from everstep.state.copying import Beside, Copied, Move, Pair, Slot, Witness, bytes_of, copy
from everstep.state.devices import Accelerator, AcceleratorOf, Event, PageLock, accelerator_of
from everstep.state.sorts import memory
from everstep.state.streams import Side
from everstep.state.tree import Tensorlike

LOOK_AGAIN = 10
"""Each frozen leaf is compared with its copy in every so many-th capture of an arena, in turns."""

BESIDE_FROM_BYTES = 1024 * 1024
"""What is less is copied while the loop waits: that takes less than a millisecond."""

AHEAD_FROM_BYTES = 64 * 1024 * 1024
"""From this size on it is worth telling how far a copy has come: what is less is there before it was used."""

AHEAD_BYTES = 32 * 1024 * 1024
"""It is told after so many bytes."""

Arrived: TypeAlias = Callable[[int], None]
"""Is told up to which address of the layout all is there, and stays as it is."""


class Capture:
    """A state on its way into an arena.

    Attributes:
        values: the encoded tree.
        copied: set when it is all there.
        done: set when it was passed on.
        unchanged: the numbers of regions that are as the arena's last capture left them.
        changed: leaves that were written to while they were copied: then the arena is of no use.
        stale: frozen leaves that had changed although nothing said so; they were captured as they are now.
        sample: of many ranks, by which they tell whether what they hold alike is still alike (`have_parted`);
            empty before `copied`, and where nothing is held alike.
        remarks: what went less well than it could, a sentence each.
        copy_ms, cpu_ms: how long the copy took, and the time its threads worked.
        handed_at: the `time.monotonic()` when the loop could go on.
        fence_ms: how long `fence` waited for it. What a device waited, while its host went on, is not in it.
        error: what went wrong; None when all is well.
    """

    def __init__(self) -> None:
        self.values = b""
        self.sample = b""
        self.copied = threading.Event()
        self.done = threading.Event()
        self.unchanged: frozenset[int] = frozenset()
        self.changed: list[str] = []
        self.stale: list[str] = []
        self.remarks: list[str] = []
        self.copy_ms = self.cpu_ms = self.fence_ms = 0.0
        self.handed_at = 0.0
        self.error: BaseException | None = None
        self._late: list[Move] = []
        self._witnesses: list[Witness] = []
        self._asked = threading.Event()
        self._marks: list[tuple[Side, Event]] = []
        self._fence_began: float | None = None

    @property
    def is_of_use(self) -> bool:
        """Once it is all there: whether it may become a snapshot."""
        return self.error is None and not self.changed

    def differences(self) -> list[str]:
        """The leaves that an optimizer's step may change and that are not, now, what was captured: none
        before that step, and none where the capture is of no use. Compares every byte, and blocks as long."""
        self.copied.wait()
        if self.error is not None or self.changed:
            return []
        for side in {move.side for move in self._late if move.side is not None}:
            side.follow()
        return [move.name for move in self._late if not _same(move)]

    def fence(self) -> None:
        """Before an optimizer's step: from now on the state may change. The host's at once, for which this
        blocks until that is copied; a device's by what it is asked from now on, which waits on the device."""
        if not self._asked.is_set():
            self._fence_began = time.perf_counter()
            self._asked.wait()
        if self.copied.is_set():
            return
        for witness in self._witnesses:
            witness.settle()
        for side, mark in self._marks:
            side.hold_back(mark)

    def note_asked(self, marks: Sequence[tuple[Side, Event]]) -> None:
        """All is copied but what devices are at work on: each side's copies are done when its mark is."""
        self._marks = list(marks)
        if self._asked.is_set():
            return
        if self._fence_began is not None:
            self.fence_ms = (time.perf_counter() - self._fence_began) * 1e3
        self._asked.set()


class Capturer:
    """Copies collected states into arenas. The layout and the views of an arena are made once and used as
    long as the leaves' names, shapes, dtypes and devices stay the same.

    Args:
        accelerator_of: what copies a tensor beside its device's other work.
    """

    def __init__(self, accelerator_of: AcceleratorOf = accelerator_of) -> None:
        self._accelerator_of = accelerator_of
        self._layout: Layout | None = None
        self._laid: _Laid | None = None
        self._slots: list[Slot] = []
        self._locks: list[PageLock] = []
        self._made: dict[tuple[Accelerator, torch.device], Side] = {}
        self._side_of: list[Side | None] = []
        self._sides: list[Side] = []
        self._witnesses: dict[Side | None, Witness] = {}
        self._beside = Beside()

    def layout(self, collected: Collected) -> Layout:
        """The layout for a state: the same object as long as nothing changed."""
        if self._layout is None or self._laid is None or not self._laid.holds(collected):
            rows = collected.rows()
            if self._layout is None or self._laid is None or self._laid.rows != rows:
                self._layout = lay_out(collected.slices(rows))
                self._slots.clear()
                # Smaller memory will be exchanged for larger: it must be free to go before that.
                size = self._layout.arena_bytes
                self._locks = [lock for lock in self._locks if len(lock.memory) >= size]
                self._witnesses.clear()
                self._side_of = [self._side(tensor) for tensor in collected.leaves.values()]
                self._sides = list(dict.fromkeys(side for side in self._side_of if side is not None))
            self._laid = _Laid(collected, rows, self._layout)
        return self._layout

    def _side(self, tensor: Tensorlike) -> Side | None:
        if not isinstance(tensor, torch.Tensor):
            return None
        accelerator = self._accelerator_of(tensor)
        if accelerator is None:
            return None
        key = (accelerator, tensor.device)
        if key not in self._made:
            self._made[key] = Side(accelerator, tensor.device)
        return self._made[key]

    @property
    def arena_bytes(self) -> int:
        """What the last layout needs; 0 before there is one."""
        return self._layout.arena_bytes if self._layout is not None else 0

    def begin(
        self,
        collected: Collected,
        layout: Layout,
        memory: memoryview,
        *,
        overlap: bool,
        then: Callable[[Capture], None],
        ahead: Callable[[Capture], Arrived] | None = None,
    ) -> Capture:
        """Copy a state into an arena.

        With `overlap` this blocks for what may change any time, as far as it is the host's; on a device it is
        copied before whatever this thread asks the device next. What only an optimizer's step changes is
        copied by a thread, and `Capture.fence` is to be called before that step. Without `overlap` it blocks
        until all is copied, on devices too.

        Args:
            layout: that of the state.
            memory: `layout.arena_bytes` or more; the same object for the same arena.
            then: called when all is there (or was found to be of no use), in the thread if there is one. It
                must not raise.
            ahead: where what is copied is large and all the host's, it is called in the same thread before
                that, with `values` and `unchanged` of the capture set. What it returns is told how far the
                copy has come. Whether that is of use is known at the end only.
        """
        worked = time.thread_time()
        capture = Capture()
        slot = self._slot(layout, memory)
        work = self._work(collected, slot)
        capture._late = work.late
        beside = overlap and work.is_worth_a_thread
        try:
            for side in work.sides:
                side.follow()
            if beside:
                # Of this moment on a device too: what it is asked next waits for these.
                capture._witnesses = self._witnesses_of(work)
                for witness in capture._witnesses:
                    with _on(witness.side):
                        witness.look()
            # At once in any case: what may change while the loop goes on.
            collected.watch.look(late=False, where=work.on)
            held = _copy(slot, "now", work.now, work.sides)
            for side, mark in _marks(work.sides):
                side.hold_back(mark)
        except BaseException:
            _stop(work.sides)
            slot.copied.clear()
            raise
        complete = partial(self._complete, capture, collected, slot, work, held, then, ahead)
        capture.cpu_ms = (time.thread_time() - worked) * 1e3
        if beside:
            capture.handed_at = time.monotonic()
            self._beside.start(complete)
        else:
            complete()
        return capture

    def forget(self, memory: memoryview) -> None:
        """What lies in an arena did not become a snapshot: its next capture is to copy everything."""
        for slot in self._slots:
            if slot.arena is memory:
                slot.copied.clear()

    def close(self) -> None:
        """Let go of the arenas, and end the thread."""
        self._beside.close()
        self._slots.clear()
        self._locks.clear()

    def _slot(self, layout: Layout, memory: memoryview) -> Slot:
        for slot in self._slots:
            if slot.arena is memory:
                return slot
        # There are two arenas: what is older than the newest of them is gone.
        self._slots = [*self._slots[-1:], Slot(layout, memory)]
        return self._slots[-1]

    def _work(self, collected: Collected, slot: Slot) -> _Work:
        """What to copy, by when and whether it must be."""
        laid = self._laid
        assert laid is not None
        slot.captures += 1
        sources = list(collected.leaves.values())
        if slot.sorts is not collected.sorts:
            slot.moves, slot.sorts = self._moves(slot, sources, laid.lasting), collected.sorts
        moves = slot.moves | self._moves(slot, sources, laid.passing)
        work = _Work(self._sides, late=[moves[number] for number in laid.late], late_bytes=laid.late_bytes)
        work.now = [moves[number] for number in laid.now]
        work.watched = {side: [moves[number] for number in one] for side, one in self._watched(laid).items()}
        for number in laid.frozen:
            one = moves[number]
            if number not in slot.copied or not slot.copied[number].is_still(one.source):
                work.frozen.append(one)
                slot.copied[number] = Copied(one.source)
            elif (number + slot.captures) % LOOK_AGAIN == 0:
                work.again.append(one)
        return work

    def _moves(self, slot: Slot, sources: Sequence[Tensorlike], numbers: Iterable[int]) -> dict[int, Move]:
        slices = slot.layout.slices
        return {
            number: Move(number, slices[number].name, view, sources[number], self._side_of[number])
            for number in numbers
            if (view := slot.views[number]) is not None
        }

    def _watched(self, laid: _Laid) -> dict[Side | None, list[int]]:
        """The parameters, by side: to an optimizer's own tensors nobody else writes."""
        found: dict[Side | None, list[int]] = {}
        for number in laid.watched:
            found.setdefault(self._side_of[number], []).append(number)
        return found

    def _witnesses_of(self, work: _Work) -> list[Witness]:
        for side, moves in work.watched.items():
            if side not in self._witnesses or not self._witnesses[side].is_of(moves):
                with _on(side):
                    self._witnesses[side] = Witness(moves, side)
        return [self._witnesses[side] for side in work.watched]

    def _complete(
        self,
        capture: Capture,
        collected: Collected,
        slot: Slot,
        work: _Work,
        held: list[Pair],
        then: Callable[[Capture], None],
        ahead: Callable[[Capture], Arrived] | None,
    ) -> None:
        """Copy the rest, in whatever thread."""
        begun, worked = time.perf_counter(), time.thread_time()
        try:
            if work.sides and slot.lock is None:
                self._lock(capture, slot, work)
            collected.watch.look(late=True, where=work.on)
            if ahead is not None and work.is_worth_telling:
                self._copy_in_order(capture, collected, slot, work, ahead)
            else:
                held += _copy(slot, "late", work.late + work.frozen, work.sides)
            for witness in capture._witnesses:
                if witness.side is None:
                    witness.settle()
            marks = _marks(work.sides)
            capture.note_asked(marks)
            _finish(marks, held)
            if not capture.values:
                self._describe(capture, collected, slot, work)
            for witness in capture._witnesses:
                with _on(witness.side):
                    capture.changed += witness.changed(slot.samples(witness))
            capture.sample = collected.watch.sample(work.on)
        except BaseException as error:
            capture.error = error
            capture.note_asked(())  # Nothing is to wait for a copy that is of no use.
            _stop(work.sides)
        if not capture.is_of_use:
            slot.copied.clear()
        capture.handed_at = capture.handed_at or time.monotonic()
        capture.copy_ms += (time.perf_counter() - begun) * 1e3
        capture.cpu_ms += (time.thread_time() - worked) * 1e3
        capture.copied.set()
        try:
            then(capture)
        finally:
            capture.done.set()

    def _describe(self, capture: Capture, collected: Collected, slot: Slot, work: _Work) -> None:
        """What is told of a state besides its bytes; frozen leaves are looked after on the way."""
        capture.stale = _copy_stale(slot, work)
        for other in self._slots:
            if other is not slot:
                for one in work.stale:
                    other.copied.pop(one.number, None)
        touched = {slot.layout.places[one.number][0] for one in work.copied}
        capture.unchanged = slot.frozen_regions - touched
        # The tree is this capture's own, of values that nobody changes: it has time until now.
        capture.values = values.encode(collected.tree)

    def _copy_in_order(
        self,
        capture: Capture,
        collected: Collected,
        slot: Slot,
        work: _Work,
        ahead: Callable[[Capture], Arrived],
    ) -> None:
        """Copy in the order of addresses, and tell how far that has come. The first piece comes before all
        that takes the interpreter's lock: the loop is about to go on."""
        pieces = self._in_order(slot, work.late)
        first = next(pieces)
        copy([*first.pairs, *((one.view, one.source) for one in work.frozen)])
        self._describe(capture, collected, slot, work)
        arrived = ahead(capture)
        arrived(first.end)
        for piece in pieces:
            copy(piece.pairs)
            arrived(piece.end)

    def _in_order(self, slot: Slot, moves: Sequence[Move]) -> Iterator[_Copies]:
        """The copies to be made, in pieces: all that lies before the end of one is there with it."""
        pairs: list[Pair] = []
        size_bytes = 0
        for one in sorted(moves, key=lambda one: slot.starts[one.number]):
            if size_bytes >= AHEAD_BYTES:
                yield _Copies(pairs, slot.starts[one.number])
                pairs, size_bytes = [], 0
            pairs.append((one.view, one.source))
            size_bytes += slot.layout.slices[one.number].size_bytes
        yield _Copies(pairs, slot.layout.arena_bytes)

    def _lock(self, capture: Capture, slot: Slot, work: _Work) -> None:
        """Lock an arena's pages, once as long as it is there; layouts may come and go."""
        slot.lock = next((lock for lock in self._locks if lock.memory is slot.arena), None)
        if slot.lock is not None:
            return
        side = work.sides[0]
        with side.here():
            slot.lock = PageLock(slot.arena, side.accelerator)
        self._locks = [*self._locks[-1:], slot.lock]
        if slot.lock.error:
            like = next(one.source for one in work.copied + work.again if one.side is side)
            side.forget_error(like)
            reason = slot.lock.error
            capture.remarks.append(f"an arena's pages could not be locked ({reason}): copies are slower")


@dataclass(frozen=True)
class _Copies:
    """Some of a state's copies; all that lies at addresses before `end` is there when they are made."""

    pairs: Sequence[Pair]
    end: int


class _Laid:
    """What a layout was made of; the leaves that a slice of its own has bytes for, by number and sort.

    Attributes:
        lasting, passing: those that are the same tensors as long as the sorts are, and the others.
        late, watched, frozen, now: the sorts; `now` is whatever may change any time.
        late_bytes: the size of what is late.
    """

    def __init__(self, collected: Collected, rows: list[Row], layout: Layout) -> None:
        self.rows = rows
        self._sorts = sorts = collected.sorts
        self._names = list(collected.leaves)
        sources = list(collected.leaves.values())
        self._passing = [number for number, name in enumerate(self._names) if name not in sorts.lasting]
        lasting = (source for name, source in collected.leaves.items() if name in sorts.lasting)
        self._memories = {where for source in lasting if (where := memory(source)) is not None}
        numbers = [number for number, one in enumerate(layout.slices) if one.alias is None and one.size_bytes]
        tensors = {number for number in numbers if isinstance(sources[number], torch.Tensor)}
        self.lasting = self._those(numbers, sorts.lasting)
        self.passing = [number for number in numbers if self._names[number] not in sorts.lasting]
        self.late = self._those(numbers, sorts.late)
        self.watched = self._those(numbers, sorts.watched)
        self.frozen = [one for one in self._those(numbers, sorts.frozen) if one in tensors]
        others = {*self.late, *self.frozen}
        self.now = [number for number in numbers if number not in others]
        self.late_bytes = sum(layout.slices[number].size_bytes for number in self.late)

    def _those(self, numbers: Iterable[int], names: frozenset[str]) -> list[int]:
        return [number for number in numbers if self._names[number] in names]

    def holds(self, collected: Collected) -> bool:
        """Whether the rows of a state are these, as far as that can be told without a look at those leaves
        that are the same as before."""
        if collected.sorts is not self._sorts or list(collected.leaves) != self._names:
            return False
        sources = list(collected.leaves.values())
        memories = set(self._memories)
        for number in self._passing:
            name, source = self._names[number], sources[number]
            where = memory(source)
            if where is not None and where in memories:
                return False
            if self.rows[number] != collected.row(name, source, name):
                return False
            if where is not None:
                memories.add(where)
        return True


@dataclass
class _Work:
    """What to copy: `now` may change any time, `late` only with an optimizer's step, `frozen` is not expected
    to change, and `again` was copied before: it is only compared."""

    sides: Sequence[Side] = ()
    late_bytes: int = 0
    watched: dict[Side | None, list[Move]] = field(default_factory=dict)
    now: list[Move] = field(default_factory=list)
    late: list[Move] = field(default_factory=list)
    frozen: list[Move] = field(default_factory=list)
    again: list[Move] = field(default_factory=list)
    stale: list[Move] = field(default_factory=list)

    @property
    def copied(self) -> list[Move]:
        return [*self.now, *self.late, *self.frozen, *self.stale]

    def on(self, device: torch.device) -> AbstractContextManager[None]:
        """Within it, what is asked of a device is asked beside the loop, if it has a side."""
        return _on(next((side for side in self.sides if side.device == device), None))

    @property
    def is_worth_a_thread(self) -> bool:
        """Whether it takes longer to copy what may be copied beside the loop than to hand it over; with a
        device it always does, which first does all that it was asked before."""
        if self.sides:
            return bool(self.late)
        return self.late_bytes >= BESIDE_FROM_BYTES

    @property
    def is_worth_telling(self) -> bool:
        """Whether somebody may begin with what is there before all is; a device's copies come all at once."""
        return not self.sides and self.late_bytes >= AHEAD_FROM_BYTES


def _copy(slot: Slot, occasion: str, moves: Sequence[Move], sides: Sequence[Side]) -> list[Pair]:
    """Copy what is the host's, and ask the devices for the rest. Returns what is to be copied when they are
    done, from where nobody changes it."""
    held: list[Pair] = []
    host = [one for one in moves if one.side is None] if sides else moves
    for side in sides:
        own = [one for one in moves if one.side is side]
        if own:
            plan = side.plan(slot, occasion, own, host)
            side.copy(plan, own)
            held += plan.hold(host)
            host = [one for one in host if one.number not in plan.held]
    copy([(one.view, one.source) for one in host])
    return held


def _marks(sides: Sequence[Side]) -> list[tuple[Side, Event]]:
    return [(side, side.mark()) for side in sides]


def _finish(marks: Sequence[tuple[Side, Event]], held: Sequence[Pair]) -> None:
    """Wait for the devices, and copy what had to wait for them."""
    for _, mark in marks:
        mark.synchronize()
    if held:
        copy(held)


def _copy_stale(slot: Slot, work: _Work) -> list[str]:
    """Copy frozen leaves again that are not what was copied; returns their names."""
    work.stale = [one for one in work.again if not _same(one)]
    if work.stale:
        held = _copy(slot, "stale", work.stale, work.sides)
        _finish(_marks(work.sides), held)
    return [one.name for one in work.stale]


def _stop(sides: Sequence[Side]) -> None:
    """Nothing writes to the arena any more. A device that has failed does not either."""
    for side in sides:
        with contextlib.suppress(Exception):
            side.mark().synchronize()


def _on(side: Side | None) -> AbstractContextManager[None]:
    return contextlib.nullcontext() if side is None else side.here()


def _same(one: Move) -> bool:
    """Bit for bit, where NaN equals NaN."""
    if one.side is not None:
        return one.side.same(one)
    return torch.equal(bytes_of(one.view), bytes_of(one.source).to("cpu"))
