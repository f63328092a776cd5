"""What a rank writes of what it holds: its parts of what it shares with others, and what is its own."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

import torch
from blake3 import blake3

from everstep.format.layout import Box
from everstep.format.manifest import OWN
from everstep.state.copying import bytes_of
from everstep.state.holding import Held, Holdings, Offer, Row, find_out, own_name
from everstep.state.samples import Samples
from everstep.state.sharding import (
    Shape,
    elements,
    is_sharded,
    local,
    overlap,
    spec_of,
    views,
    whole,
    within,
)
from everstep.state.sorts import Sorts, memory
from everstep.state.spreading import Holders
from everstep.state.tree import Leaves, Tensorlike, dtype_name
from everstep.state.world import World

_PIECE_BYTES = 16 * 1024 * 1024
_DIGEST_BYTES = 8

PATIENCE = 2
"""So many times it is found out anew who holds what because of the same leaf, or the same object."""


@dataclass(frozen=True)
class Place:
    """Where in a leaf what is written lies; `shape` is the leaf's over all ranks."""

    name: str
    shape: Shape
    box: Box


@dataclass(frozen=True)
class Written:
    """What a rank writes.

    Attributes:
        leaves: by a name of their own; of a part of a leaf that is not the leaf's.
        places: by these names, of those that are a part.
        sorts: of these names.
        names: under which leaves are stored that are not stored under their own names.
        fits: whether it is what was found out together: else parts may be missing.
        watch: of what several ranks hold.
    """

    leaves: Leaves
    places: dict[str, Place]
    sorts: Sorts
    names: dict[str, str]
    fits: bool
    watch: Watch


class Sharing:
    """Knows, from one look at a state to the next, what this rank writes of it.

    What becomes another thing again and again is not found out about again and again: a leaf that has
    changed its shape since, `PATIENCE` times, is this rank's own from then on; so are new leaves of an
    object that had new ones as often. Of what is neither a module nor an optimizer once is enough.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._holdings = Holdings()
        self._lasting: _Lasting | None = None
        self._changed: set[str] = set()
        self._grown: set[str] = set()
        self._changes: Counter[str] = Counter()
        """How often leaves have changed, and objects grown, each time since it was last found out who holds
        what."""

    def find_out(self, key: str, told: Mapping[str, Leaves], sorts: Sorts, steady: Collection[str]) -> None:
        """Find out together who holds what. Reads what other ranks may hold too, and blocks until all have.

        Args:
            key: the same on all ranks, and new.
            told: the leaves of each object.
            sorts: theirs.
            steady: see `written`.
        """
        self._changes.update(self._changed | self._grown)
        self._changed, self._grown = set(), set()
        own = {
            leaf
            for name, leaves in told.items()
            for leaf in self._changes.keys() & leaves.keys()
            if self._changes[leaf] >= (PATIENCE if name in steady else 1)
        }
        made = offer(told, sorts, own | self._holdings.parted, self._world)
        # Until it is found out: others may have found it out although this rank has not.
        former, self._holdings = self._holdings, replace(self._holdings, found=b"")
        self._lasting = None
        self._holdings = find_out(self._world, key, made, former)

    def written(self, told: Mapping[str, Leaves], sorts: Sorts, steady: Collection[str]) -> Written:
        """What this rank writes. Does not block.

        Args:
            told: the leaves of each object.
            sorts: theirs.
            steady: modules and optimizers: a leaf of theirs that nobody was told of would be written by
                each rank, as its own.
        """
        known = self._lasting
        if known is None or known.sorts is not sorts:
            known = self._lasting = self._begin(told, sorts)
        made = known.made.copy()
        passing: Leaves = {}
        for name, leaves in told.items():
            if name in steady and leaves.keys() <= sorts.lasting:
                continue
            for leaf, tensor in leaves.items():
                if leaf not in sorts.lasting:
                    passing[leaf] = tensor
                    made.add(leaf, tensor)
        news = known.news | (made.news & passing.keys())
        grown = {name for name in steady if news and not told[name].keys().isdisjoint(news)}
        self._changed |= made.changed
        self._grown |= grown
        found = self._holdings.found
        fits = bool(found) and not made.changed and known.missing <= passing.keys()
        fits = fits and all(self._changes[name] >= PATIENCE for name in grown)
        watch = Watch([*known.watched, *_watched(self._holdings, passing, sorts)], found)
        return Written(made.leaves, made.places, known.translated, made.names, fits, watch)

    def _begin(self, told: Mapping[str, Leaves], sorts: Sorts) -> _Lasting:
        made = _Making(self._world.rank, self._holdings)
        lasting = {
            leaf: tensor
            for leaves in told.values()
            for leaf, tensor in leaves.items()
            if leaf in sorts.lasting
        }
        for leaf, tensor in lasting.items():
            made.add(leaf, tensor)
        translated = _translated(sorts, partial(_labels, self._holdings, self._world.rank))
        watched = list(_watched(self._holdings, lasting, sorts))
        shared = {leaf for leaf, held in self._holdings.held.items() if not held.row.own}
        return _Lasting(sorts, made, translated, watched, frozenset(made.news), shared - lasting.keys())


@dataclass
class _Making:
    """What is written, leaf by leaf.

    Attributes:
        changed: leaves that are not what others were told.
        news: those that nobody was told of.
    """

    rank: int
    holdings: Holdings
    leaves: Leaves = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    news: set[str] = field(default_factory=set)

    def copy(self) -> _Making:
        return replace(
            self,
            leaves=dict(self.leaves),
            places=dict(self.places),
            names=dict(self.names),
            changed=set(self.changed),
            news=set(),
        )

    def add(self, leaf: str, tensor: Tensorlike) -> None:
        held = self.holdings.held.get(leaf)
        if leaf.startswith(OWN):
            self.leaves[leaf] = local(tensor)
        elif held is None or held.row.own or not _is_still(held, tensor, self.rank):
            if held is None:
                self.news.add(leaf)
            elif not held.row.own:
                self.changed.add(leaf)
            self.names[leaf] = own_name(self.rank, leaf)
            self.leaves[self.names[leaf]] = local(tensor)
        elif held.owner is not None:
            self.names[leaf] = held.name()
            if held.owner == self.rank:
                self.leaves[self.names[leaf]] = local(tensor)
        else:
            self._add_parts(held, tensor)

    def _add_parts(self, held: Held, tensor: Tensorlike) -> None:
        row = held.row
        pieces = views(local(tensor), held.boxes)
        for part in held.parts:
            label = _label(row, part)
            number = next(n for n, box in enumerate(held.boxes) if overlap(box, part) or not elements(part))
            view = self.leaves[label] = within(pieces[number], held.boxes[number], part)
            if tuple(view.shape) != row.shape:
                self.places[label] = Place(row.name, row.shape, part)


@dataclass(frozen=True)
class _Lasting:
    """What is written of the leaves that are the same tensors as long as `sorts` is the same object.
    `missing` are leaves that others know of and that are not among them."""

    sorts: Sorts
    made: _Making
    translated: Sorts
    watched: list[_Watched]
    news: frozenset[str]
    missing: set[str]


def _is_still(held: Held, tensor: Tensorlike, rank: int) -> bool:
    """Whether a leaf lies as was said."""
    row = held.row
    spec = spec_of(row.name, tensor, rank) if is_sharded(tensor) else None
    return (dtype_name(tensor), tuple(tensor.shape), spec) == (row.dtype, row.shape, row.spec)


def _label(row: Row, part: Box) -> str:
    """A name for what is written; that of a part no path can have."""
    return row.name if part == whole(row.shape) else f"{row.name}~{part[0]}+{part[1]}"


def _labels(holdings: Holdings, rank: int, leaf: str) -> list[str]:
    """The names under which a leaf is written."""
    held = holdings.held.get(leaf)
    if held is None:
        return [own_name(rank, leaf)]
    if held.owner is not None:
        return [held.name()]
    return [_label(held.row, part) for part in held.parts]


def _translated(sorts: Sorts, labels: Callable[[str], Sequence[str]]) -> Sorts:
    def those(leaves: Collection[str]) -> frozenset[str]:
        return frozenset(label for leaf in leaves for label in labels(leaf))

    kin = {label: kin for leaf, kin in sorts.kin.items() for label in labels(leaf)}
    return Sorts(those(sorts.lasting), kin, *map(those, (sorts.late, sorts.watched, sorts.frozen)))


# -- what is told others -----------------------------------------------------------------------------------


def offer(told: Mapping[str, Leaves], sorts: Sorts, own: Collection[str], world: World) -> Offer:
    """What this rank holds, and digests of what others may hold too. Blocks while it is read.

    Args:
        own: leaves that are this rank's own, whatever others have.

    Raises:
        Unsupported: something is placed in a way that cannot be stored; the message names it.
    """
    rows: dict[str, list[Row]] = defaultdict(list)
    contents: dict[str, list[bytes]] = defaultdict(list)
    firsts: dict[object, str] = {}
    known: dict[str, bytes] = {}
    for name, leaves in told.items():
        for leaf, tensor in leaves.items():
            if leaf.startswith(OWN):
                continue
            spec = spec_of(leaf, tensor, world.rank) if is_sharded(tensor) else None
            kin = sorts.kin.get(leaf, "moving")
            first = firsts.setdefault(memory(local(tensor)) or leaf, leaf)
            row = Row(leaf, dtype_name(tensor), tuple(tensor.shape), spec, kin, first, leaf in own)
            if first not in known:
                # A DTensor is by contract the same wherever its mesh says so; and it may be all there is.
                alike = spec is not None and len(spec.ranks) == world.ranks
                known[first] = b"" if row.own or alike else fingerprint(local(tensor))
            rows[f"{name}:{kin}"].append(row)
            contents[f"{name}:{kin}"].append(known[first])
    return Offer(rows, contents)


def fingerprint(tensor: Tensorlike) -> bytes:
    """16 bytes by which its contents are told from others, all of them. Blocks while they are read."""
    hasher = blake3(max_threads=blake3.AUTO)
    for piece in _pieces(tensor):
        hasher.update(bytes_of(piece).cpu().numpy().data)
    return hasher.digest(16)


def _pieces(tensor: Tensorlike) -> Iterator[Tensorlike]:
    """Parts of a tensor in order, so small that little memory is taken to bring them here."""
    if tensor.nbytes <= _PIECE_BYTES or not tensor.shape:
        yield tensor
        return
    rows = max(_PIECE_BYTES * tensor.shape[0] // tensor.nbytes, 1)
    for first in range(0, tensor.shape[0], rows):
        if rows > 1 or tensor.nbytes // tensor.shape[0] <= _PIECE_BYTES:
            yield tensor[first : first + rows]
        else:
            yield from _pieces(tensor[first])


# -- whether it is still the same --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Watched:
    """Leaves on one device that the same ranks hold. `is_late`: they change only with an optimizer's step."""

    holders: Holders
    names: tuple[str, ...]
    samples: Samples
    device: torch.device
    is_late: bool


def _watched(holdings: Holdings, leaves: Leaves, sorts: Sorts) -> Iterator[_Watched]:
    for holders, names in holdings.watched.items():
        found: dict[tuple[torch.device, bool], dict[str, torch.Tensor]] = defaultdict(dict)
        for name in names:
            tensor = local(leaves[name]) if name in leaves else None
            if tensor is not None and tensor.nbytes:
                tensor = tensor if isinstance(tensor, torch.Tensor) else bytes_of(tensor)
                is_late = name in sorts.late or name in sorts.frozen
                found[tensor.device, is_late][name] = tensor
        for (device, is_late), tensors in found.items():
            yield _Watched(holders, tuple(tensors), Samples(list(tensors.values())), device, is_late)


Where: TypeAlias = "Callable[[torch.device], AbstractContextManager[None]]"
"""Within what a device is asked for something."""


def _anywhere(device: torch.device) -> AbstractContextManager[None]:
    return nullcontext()


class Watch:
    """Looks at a few elements of what several ranks hold, at the moment that a snapshot is of."""

    def __init__(self, watched: Sequence[_Watched] = (), found: bytes = b"") -> None:
        self._watched = watched
        self._found = found

    def look(self, *, late: bool, where: Where = _anywhere) -> None:
        """Take what changes only with an optimizer's step, or the rest. Does not wait for a device."""
        for one in self._watched:
            if one.is_late == late:
                with where(one.device):
                    one.samples.gather()

    def sample(self, where: Where = _anywhere) -> bytes:
        """When it was found out who holds what, and a digest for each group of ranks that hold something
        together; see `have_parted`. Blocks until devices have done what `look` asked for."""
        found: dict[Holders, dict[str, bytes]] = defaultdict(dict)
        for one in self._watched:
            with where(one.device):
                taken = one.samples.taken()
            found[one.holders].update(zip(one.names, one.samples.each(taken), strict=True))
        # By name: which are remembered, or on which device, may differ from rank to rank.
        since = _group_id(()) + self._found[:_DIGEST_BYTES] if self._found else b""
        return since + b"".join(
            _group_id(holders) + blake3(repr(sorted(few.items())).encode()).digest(_DIGEST_BYTES)
            for holders, few in sorted(found.items())
        )

    def now(self) -> bytes:
        """All of it: look, and what is there. Blocks."""
        self.look(late=False)
        self.look(late=True)
        return self.sample()


def _group_id(holders: Holders) -> bytes:
    return blake3(repr(holders).encode()).digest(_DIGEST_BYTES)


def have_parted(samples: Sequence[bytes]) -> bool:
    """Whether what ranks held alike is not alike any more, or some have found out anew who holds what and
    others not: given the samples of all, taken at one step. Then no snapshot may be made of their parts, and
    all have to find out anew."""
    known: dict[bytes, bytes] = {}
    size = 2 * _DIGEST_BYTES
    for sample in samples:
        for at in range(0, len(sample), size):
            group, digest = sample[at : at + _DIGEST_BYTES], sample[at + _DIGEST_BYTES : at + size]
            if known.setdefault(group, digest) != digest:
                return True
    return False
