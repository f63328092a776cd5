"""What differs between two snapshots: of one chain, or of two in different stores.

Which leaves changed is known by the digests of their chunks, and so is which parts of them; only those parts
are read. Needs no torch, and numpy only to say by how much.
"""

from __future__ import annotations

import math
import mmap
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

from everstep.chain.boxes import Window, gather, windows
from everstep.chain.drift import Drift, drift
from everstep.chain.figures import Amount, Figures, element, require_numpy
from everstep.chain.history import Chain, Snapshot
from everstep.chain.reader import Reader, Target
from everstep.chain.trees import ValueChange, differences
from everstep.errors import Damaged
from everstep.format.chunk import aligned
from everstep.format.layout import Box, item_bytes
from everstep.format.manifest import OBJECTS, OWN, RUN, Manifest, StoredLeaf, StoredSlice
from everstep.format.values import Value

AHEAD_BYTES = 32 * 1024 * 1024
"""So many bytes of chunks are read at once on each side, or what one element needs."""

NEAR_BYTES = 48 * 1024 * 1024
"""So many bytes of chunks are kept on each side: small leaves share them."""

OnProgress: TypeAlias = Callable[[int, int], None]
"""Called with (bytes compared, bytes to compare)."""

Kind: TypeAlias = Literal["changed", "may have changed", "added", "removed", "reshaped", "retyped"]
Shape: TypeAlias = tuple[int, ...]

GENERATORS, POSITION = f"{RUN}/rng", f"{RUN}/data"
_PLACE = ("kind", "epoch", "delivered", "workers", "sizes")
"""What a person can read of a loader's position."""


@dataclass(frozen=True)
class LeafChange:
    """A leaf that is not the same on both sides.

    `may have changed`: it shares a chunk with leaves of which at least one changed, and nothing was read.
    `dtype` and `shape` are (before, after), None on a side that lacks it. `amount` is there where the leaf
    changed and was read; `before` and `after` where it then has one element. `tied_to` names another leaf
    with the same bytes on both sides.
    """

    name: str
    kind: Kind
    dtype: tuple[str | None, str | None]
    shape: tuple[Shape | None, Shape | None]
    amount: Amount | None = None
    before: Value = None
    after: Value = None
    tied_to: str = ""


@dataclass(frozen=True)
class Difference:
    """What differs between two snapshots.

    Attributes:
        before, after: the snapshots.
        identical: whether their states are the same, bit for bit; then nothing else was looked at but their
            records, and `leaves` to `states` are empty.
        leaves: those that differ; the ones that came, went or look otherwise first, then by how much they
            changed.
        same: how many leaves are the same on both sides.
        values: the plain values that differ.
        states: of generators and of the loader, whose states nobody reads: the paths of those that differ.
        metrics: what the two records say of the last step before them.
        environment: what differs in the circumstances, the gravest first.
        remarks: damage that was seen and did not touch the bytes compared, a sentence each.
        read_bytes: how much of the leaves was compared byte by byte; of each side so much was read.
    """

    before: Snapshot
    after: Snapshot
    identical: bool
    leaves: tuple[LeafChange, ...] = ()
    same: int = 0
    values: tuple[ValueChange, ...] = ()
    states: tuple[str, ...] = ()
    metrics: tuple[ValueChange, ...] = ()
    environment: tuple[Drift, ...] = ()
    remarks: tuple[str, ...] = ()
    read_bytes: int = 0


def compare(
    chain_a: Chain,
    a: Snapshot,
    chain_b: Chain,
    b: Snapshot,
    *,
    values: bool = True,
    on_progress: OnProgress = lambda done, total: None,
) -> Difference:
    """What became of snapshot `a` in snapshot `b`.

    Reads the manifests of both (none where both are the same state), and of the chunks only those that are
    not on both sides; but all of a leaf that is in other slices there. Takes memory for a few chunks,
    whatever the size of a leaf. Blocks on I/O; touches nothing.

    Args:
        values: read what changed, and say by how much. Without it no pack is read, and of leaves that share a
            chunk it is only known that they may have changed.

    Raises:
        Damaged: something is missing or is not what was written; the message names the leaf.
        NotFound: a snapshot was pruned meanwhile.
        Unsupported: numpy is missing.
    """
    metrics = tuple(differences(a.record.metrics, b.record.metrics))
    environment = tuple(drift(a.record.environment, b.record.environment))
    if a.record.state == b.record.state:
        return Difference(a, b, True, metrics=metrics, environment=environment)
    before, after = _Side(chain_a, a), _Side(chain_b, b)
    pairs = _pairs(before.manifest, after.manifest)
    read = values and any(pair.may_differ for pair in pairs)
    changes = _measured(pairs, before, after, on_progress) if read else _unread(pairs)
    changes += _come_and_gone(before.manifest, after.manifest)
    trees = list(_readable(differences(before.manifest.tree, after.manifest.tree)))
    every: list[LeafChange | ValueChange] = [*changes, *trees]
    parts = [one for one in every if _is_part_of_a_state(one)]
    return Difference(
        a,
        b,
        False,
        leaves=tuple(sorted((one for one in changes if not _is_part_of_a_state(one)), key=_order)),
        same=len(before.manifest.leaves) - len([one for one in changes if one.kind != "added"]),
        values=tuple(one for one in trees if not _is_part_of_a_state(one)),
        states=tuple(sorted(set(map(_state_of, parts)))),
        metrics=metrics,
        environment=environment,
        remarks=tuple(sorted(before.remarks | after.remarks)),
        read_bytes=sum(pair.differing_bytes for pair in pairs) if read else 0,
    )


def _order(change: LeafChange) -> tuple[bool, bool, float, str]:
    """What came, went or looks otherwise first; then what broke; then what changed most."""
    amount = change.amount
    relative = amount.relative if amount is not None else None
    share = amount.share if amount is not None else 0.0
    return (
        change.kind in ("changed", "may have changed"),
        not (amount is not None and amount.broke),
        -(share if relative is None else relative),
        change.name,
    )


# -- leaves ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stretch:
    """Elements of a slice from `begin` up to `end`, that differ or may, and where the slice lies on each
    side. `certain`: by the digests they do."""

    mine: StoredSlice
    theirs: StoredSlice
    begin: int
    end: int
    certain: bool


@dataclass(frozen=True)
class _Pair:
    """A leaf that is on both sides with one dtype and shape, and what of it is to be compared: `differing`,
    or where it is in other slices on each side (`respread`) all of it."""

    before: StoredLeaf
    after: StoredLeaf
    elements: int
    differing: tuple[_Stretch, ...]
    respread: bool
    tied_to: str

    @property
    def name(self) -> str:
        return self.before.name

    @property
    def item_bytes(self) -> int:
        return _item_bytes(self.before.dtype)

    @property
    def differing_bytes(self) -> int:
        """To compare, of each side; those of a tied leaf are compared under its other name."""
        items = self.elements if self.respread else sum(one.end - one.begin for one in self.differing)
        return 0 if self.tied_to else items * self.item_bytes

    @property
    def may_differ(self) -> bool:
        return self.respread or bool(self.differing)

    def change(
        self, kind: Kind, amount: Amount | None = None, before: Value = None, after: Value = None
    ) -> LeafChange:
        dtype, shape = self.before.dtype, self.before.shape
        return LeafChange(
            self.name, kind, (dtype, dtype), (shape, shape), amount, before, after, self.tied_to
        )


def _pairs(before: Manifest, after: Manifest) -> list[_Pair]:
    """The leaves of both sides that can be compared, in the order in which `before` has their bytes."""
    firsts: dict[tuple[object, ...], str] = {}
    pairs = []
    for leaf in sorted(before.leaves, key=lambda leaf: (leaf.slices[0].region, leaf.slices[0].offset)):
        other = after.by_name.get(leaf.name)
        if other is None or (other.dtype, other.shape) != (leaf.dtype, leaf.shape):
            continue
        elements, item = math.prod(leaf.shape), _item_bytes(leaf.dtype)
        place = (_places(leaf), _places(other), leaf.dtype, leaf.shape)
        first = firsts.setdefault(place, leaf.name) if elements else leaf.name
        tied_to = "" if first == leaf.name else first
        boxes = [[part.box for part in one.slices] for one in (leaf, other)]
        respread = boxes[0] != boxes[1] and item_bytes(leaf.dtype) > 0
        differing: list[_Stretch] = []
        for mine, theirs in zip(leaf.slices, other.slices, strict=False) if boxes[0] == boxes[1] else ():
            differing += _differing(before, mine, after, theirs, leaf.size_bytes(mine), item)
        pairs.append(_Pair(leaf, other, elements, tuple(differing), respread, tied_to))
    return pairs


def _places(leaf: StoredLeaf) -> tuple[tuple[int, int], ...]:
    return tuple((part.region, part.offset) for part in leaf.slices)


def _item_bytes(dtype: str) -> int:
    """Some dtypes of numpy take no bytes at all; nothing of them can differ."""
    return max(item_bytes(dtype), 1)


def _unread(pairs: Sequence[_Pair]) -> list[LeafChange]:
    """What the digests alone say."""
    return [
        pair.change("changed" if any(one.certain for one in pair.differing) else "may have changed")
        for pair in pairs
        if pair.may_differ
    ]


def _come_and_gone(before: Manifest, after: Manifest) -> list[LeafChange]:
    """The leaves that cannot be compared."""
    found = []
    for leaf in before.leaves:
        other = after.by_name.get(leaf.name)
        if other is None:
            found.append(LeafChange(leaf.name, "removed", (leaf.dtype, None), (leaf.shape, None)))
        elif (other.dtype, other.shape) != (leaf.dtype, leaf.shape):
            kind: Kind = "reshaped" if other.shape != leaf.shape else "retyped"
            looks = (leaf.dtype, other.dtype), (leaf.shape, other.shape)
            found.append(LeafChange(leaf.name, kind, *looks))
    for leaf in after.leaves:
        if leaf.name not in before.by_name:
            found.append(LeafChange(leaf.name, "added", (None, leaf.dtype), (None, leaf.shape)))
    return found


@dataclass(frozen=True)
class _Piece:
    """A part of a chunk: `size_bytes` from `start` on."""

    number: int
    start: int
    size_bytes: int


def _pieces(manifest: Manifest, part: StoredSlice, begin: int, end: int) -> list[_Piece]:
    """Where the bytes of a slice from `begin` up to `end` lie."""
    region, grid = manifest.regions[part.region], manifest.grid_bytes
    at, stop = part.offset + begin, part.offset + end
    found = []
    while at < stop:
        number, start = region.chunks[at // grid], at % grid
        size = min(stop - at, grid - start)
        found.append(_Piece(number, start, size))
        at += size
    return found


def _differing(
    before: Manifest, mine: StoredSlice, after: Manifest, theirs: StoredSlice, size_bytes: int, item: int
) -> Iterator[_Stretch]:
    """The elements of a slice whose bytes are not known to be the same, chunk by chunk."""
    cuts = {0, size_bytes // item}
    for manifest, part in ((before, mine), (after, theirs)):
        grid = manifest.grid_bytes
        for byte in range(grid - part.offset % grid, size_bytes, grid):
            # An element may lie across the end of a chunk: it is a stretch of its own.
            cuts |= {byte // item, -(-byte // item)}
    ordered = sorted(cuts)
    for begin, end in pairwise(ordered):
        pieces = [
            _pieces(manifest, part, begin * item, end * item)
            for manifest, part in ((before, mine), (after, theirs))
        ]
        if _named(before, pieces[0]) != _named(after, pieces[1]):
            fills = _fills(before, pieces[0]) and _fills(after, pieces[1])
            yield _Stretch(mine, theirs, begin, end, certain=fills)


def _named(manifest: Manifest, pieces: Sequence[_Piece]) -> list[tuple[str, int, int]]:
    """What two places have in common only if they hold the same bytes."""
    return [(manifest.chunks[one.number].digest, one.start, one.size_bytes) for one in pieces]


def _fills(manifest: Manifest, pieces: Sequence[_Piece]) -> bool:
    """Whether they are one whole chunk, so that another digest means other bytes of this leaf."""
    return len(pieces) == 1 and pieces[0].size_bytes == manifest.chunks[pieces[0].number].size_bytes


# -- by how much -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """Elements of a leaf to compare, and where they lie on each side."""

    pair: _Pair
    items: int
    before: list[_Piece]
    after: list[_Piece]


class _Measure:
    """What is known of one leaf by and by. Where it has one element, `one` is what that was and is."""

    def __init__(self, pair: _Pair) -> None:
        self.pair = pair
        self.one: tuple[Value, Value] = (None, None)
        self._figures = Figures(pair.before.dtype)

    def add(self, before: memoryview, after: memoryview) -> None:
        self._figures.add(before, after)
        if self.pair.elements == 1:
            dtype = self.pair.before.dtype
            self.one = (element(before, dtype), element(after, dtype))

    def of(self, pair: _Pair) -> LeafChange | None:
        """The leaf, or one that is tied to it, as it changed; None where no bit did."""
        amount = self._figures.amount(pair.elements)
        return pair.change("changed", amount, *self.one) if amount.changed else None


def _measured(
    pairs: Sequence[_Pair], before: _Side, after: _Side, on_progress: OnProgress
) -> list[LeafChange]:
    """The leaves that changed, by how much."""
    require_numpy()
    measures = {pair.name: _Measure(pair) for pair in pairs if pair.may_differ and not pair.tied_to}
    done, total = 0, sum(pair.differing_bytes for pair in pairs)
    for batch in _batches(_tasks(pairs, before.manifest, after.manifest), before, after):
        before.bring({piece.number: task.pair.name for task in batch for piece in task.before})
        after.bring({piece.number: task.pair.name for task in batch for piece in task.after})
        for task in batch:
            measures[task.pair.name].add(before.bytes_of(task.before), after.bytes_of(task.after))
            done += task.items * task.pair.item_bytes
            on_progress(done, total)
    for pair in pairs:
        for box in windows(pair.before.shape, pair.item_bytes, AHEAD_BYTES) if pair.respread else ():
            if pair.tied_to:
                break
            measures[pair.name].add(before.gather(pair.before, box), after.gather(pair.after, box))
            done += math.prod(box[1]) * pair.item_bytes
            on_progress(done, total)
    changes = (measures[pair.tied_to or pair.name].of(pair) for pair in pairs if pair.may_differ)
    return [one for one in changes if one is not None]


def _tasks(pairs: Sequence[_Pair], before: Manifest, after: Manifest) -> Iterator[_Task]:
    for pair in pairs:
        if pair.tied_to:
            continue
        for stretch in pair.differing:
            ends = stretch.begin * pair.item_bytes, stretch.end * pair.item_bytes
            mine = _pieces(before, stretch.mine, *ends)
            theirs = _pieces(after, stretch.theirs, *ends)
            yield _Task(pair, stretch.end - stretch.begin, mine, theirs)


def _batches(tasks: Iterator[_Task], before: _Side, after: _Side) -> Iterator[list[_Task]]:
    """Tasks that together take no more than `AHEAD_BYTES` of chunks on a side, or one alone."""
    batch: list[_Task] = []
    sides = ((before, set[int]()), (after, set[int]()))
    taken = [0, 0]
    for task in tasks:
        wanted = [{piece.number for piece in pieces} for pieces in (task.before, task.after)]
        more = [side.size_of(new - held) for (side, held), new in zip(sides, wanted, strict=True)]
        if batch and max(taken[0] + more[0], taken[1] + more[1]) > AHEAD_BYTES:
            yield batch
            batch, taken = [], [0, 0]
            for _, held in sides:
                held.clear()
            more = [side.size_of(new) for (side, _), new in zip(sides, wanted, strict=True)]
        batch.append(task)
        for number, (_, held) in enumerate(sides):
            held |= wanted[number]
            taken[number] += more[number]
    if batch:
        yield batch


class _Side:
    """One of the two snapshots: its manifest, and a few of its chunks."""

    def __init__(self, chain: Chain, snapshot: Snapshot) -> None:
        self.chain = chain
        self.snapshot = snapshot
        self.manifest = chain.manifest(snapshot)
        self.remarks: set[str] = set()
        self._reader = Reader(chain.store)
        self._near: OrderedDict[int, memoryview] = OrderedDict()
        self._near_bytes = 0
        self._lies = {
            number: (region, index * self.manifest.grid_bytes)
            for region, stored in enumerate(self.manifest.regions)
            for index, number in enumerate(stored.chunks)
        }

    def size_of(self, numbers: Iterable[int]) -> int:
        return sum(self.manifest.chunks[number].size_bytes for number in numbers)

    def bring(self, wanted: Mapping[int, str]) -> None:
        """Have these chunks in memory, each with the leaf that needs it; others may go.

        Raises Damaged, which names the leaf; NotFound where the snapshot was pruned.
        """
        fresh = {number: leaf for number, leaf in wanted.items() if number not in self._near}
        for number in wanted:
            if number in self._near:
                self._near.move_to_end(number)
        self._make_room(self.size_of(fresh), len(wanted) - len(fresh))
        try:
            self._read(list(fresh))
        except Damaged:
            self.chain.refuse_pruned(self.snapshot, "was compared")
            self._read_one_by_one(fresh)

    def _make_room(self, size_bytes: int, wanted: int) -> None:
        """Let go of what was not needed for longest, but not of the last ones that are `wanted`."""
        while len(self._near) > wanted and self._near_bytes + size_bytes > NEAR_BYTES:
            self._near_bytes -= len(self._near.popitem(last=False)[1])

    def _read(self, numbers: Sequence[int]) -> None:
        targets = []
        for number in numbers:
            size = self.manifest.chunks[number].size_bytes
            # Whole pages: a chunk that is stored raw is read straight into them.
            memory = memoryview(mmap.mmap(-1, aligned(size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            targets.append(Target(*self._lies[number], memory[:size]))
        self.remarks.update(self._reader.fill(self.manifest, targets))
        self._near.update(zip(numbers, (target.buffer for target in targets), strict=True))
        self._near_bytes += self.size_of(numbers)

    def _read_one_by_one(self, wanted: Mapping[int, str]) -> None:
        """Raises Damaged of the first chunk that cannot be read, with the name of its leaf."""
        for number, leaf in wanted.items():
            try:
                self._read([number])
            except Damaged as error:
                raise self._unreadable(leaf, error) from error

    def _unreadable(self, leaf: str, error: Damaged) -> Damaged:
        return Damaged(
            f"leaf {leaf} of snapshot {self.snapshot.short} cannot be read: {error.problem}",
            kept="nothing was touched",
            next=f"everstep -r {self.chain.url} verify",
            key=error.key,
        )

    def gather(self, leaf: StoredLeaf, box: Box) -> memoryview:
        """The bytes of a box of a leaf, whatever slices it is in. Raises as `bring`."""
        memory = memoryview(bytearray(math.prod(box[1]) * _item_bytes(leaf.dtype)))
        try:
            self.remarks.update(gather(self._reader, self.manifest, [Window(leaf, box, memory)]))
        except Damaged as error:
            self.chain.refuse_pruned(self.snapshot, "was compared")
            raise self._unreadable(leaf.name, error) from error
        return memory

    def bytes_of(self, pieces: Sequence[_Piece]) -> memoryview:
        """Bytes of chunks that were brought."""
        parts = [self._near[one.number][one.start : one.start + one.size_bytes] for one in pieces]
        return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))


# -- values ------------------------------------------------------------------------------------------------


def _readable(changes: Iterator[ValueChange]) -> Iterator[ValueChange]:
    """Paths as leaves have them: what is in an object by the object's name."""
    for one in changes:
        yield ValueChange(one.path.removeprefix(f"{OBJECTS}/"), one.before, one.after)


def _path_of(change: LeafChange | ValueChange) -> str:
    return change.name if isinstance(change, LeafChange) else change.path


def _bare(path: str) -> str:
    """A path without the rank whose own it is: each has generators, and nobody compares them one by one."""
    return path.split("/", 2)[2] if path.startswith(OWN) and path.count("/") > 1 else path


def _is_part_of_a_state(change: LeafChange | ValueChange) -> bool:
    """Whether it belongs to the state of a generator or a loader that differs, and says nothing to anybody by
    itself."""
    if isinstance(change, LeafChange) and change.kind == "may have changed":
        return False
    path = _bare(_path_of(change))
    if path.startswith(f"{POSITION}/"):
        return path.split("/")[2] not in _PLACE
    return path.startswith(f"{GENERATORS}/")


def _state_of(change: LeafChange | ValueChange) -> str:
    """Which generator's or loader's: `run/rng/torch`, `run/data`."""
    path = _bare(_path_of(change))
    return POSITION if path.startswith(POSITION) else "/".join(path.split("/")[:3])
