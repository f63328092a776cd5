"""Which ranks hold what, found out together, and what of it each writes.

A tensor that several ranks hold under the same name, with the same dtype, shape and contents, is written
once, in parts spread over them. So are the boxes of DTensors. What has the same name and is not the same is
each rank's
own: its name gets a prefix. This is found out once, by one exchange of all ranks (`find_out`), and holds
    until the
leaves or their contents part; a `Watch` tells whether contents have.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeAlias

import msgspec
import zstandard
from blake3 import blake3

from everstep.errors import Damaged
from everstep.format.layout import Box, Kin, item_bytes
from everstep.format.manifest import OWN
from everstep.state.sharding import Shape, Spec, boxes_of, elements, table, whole
from everstep.state.spreading import Holders, level, spread
from everstep.state.world import World

_DIGEST_BYTES = 16
_MAX_ANSWER_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Row:
    """What a rank says of one of its leaves.

    Attributes:
        shape: over all ranks.
        spec: how it is spread; None for a tensor that is all there.
        first: the first leaf with the same memory; its own name if that is it.
        own: it is never to be taken for the same as other ranks'.
    """

    name: str
    dtype: str
    shape: Shape
    spec: Spec | None
    kin: Kin
    first: str
    own: bool = False


@dataclass(frozen=True)
class Offer:
    """All that a rank holds: its leaves in groups that are likely to be alike on all ranks, or not, together;
    and digests of their contents, in the same order: empty where nobody has to know."""

    rows: Mapping[str, Sequence[Row]]
    contents: Mapping[str, Sequence[bytes]]


@dataclass(frozen=True)
class Held:
    """What becomes of a leaf that this rank holds.

    Attributes:
        row: what was said of it.
        boxes: those that it holds.
        owner: None: it is the same on all ranks that hold it. Else it is written under a name of this
            rank's, by this rank.
        parts: the boxes that this rank writes, if it has no owner.
    """

    row: Row
    boxes: tuple[Box, ...]
    owner: int | None
    parts: tuple[Box, ...] = ()

    def name(self) -> str:
        """Under which it is stored."""
        return self.row.name if self.owner is None else own_name(self.owner, self.row.name)


@dataclass(frozen=True)
class Holdings:
    """What a rank holds and writes, by name.

    Attributes:
        watched: names of leaves by the ranks that hold their boxes together, where it has to be told whether
            the contents are still the same.
        parted: leaves that were the same on all ranks once and are not any more.
        found: by which those are told apart that were found out at another time; empty before anything was,
            and after a rank has not come.
    """

    held: Mapping[str, Held] = field(default_factory=dict)
    watched: Mapping[Holders, Sequence[str]] = field(default_factory=dict)
    parted: frozenset[str] = frozenset()
    found: bytes = b""


def own_name(rank: int, name: str) -> str:
    return f"{OWN}{rank}/{name}"


def find_out(world: World, key: str, offer: Offer, former: Holdings) -> Holdings:
    """Find out together who holds what. Blocks until all ranks have come to the same point: two exchanges
    under names that begin with `key`.

    First all tell a digest of each group's leaves, and one of their contents. Only of groups that are not
    alike on all ranks more is told: one rank tells the leaves for all that have the same, and one the
    contents.

    Args:
        offer: what this rank holds.
        former: what was found out before.

    Raises:
        Unavailable: some rank has not come in time.
        Damaged: what one says cannot be understood.
    """
    leaves = {group: _Leaves.of(rows) for group, rows in offer.rows.items()}
    digests = {
        group: (_digest(msgspec.msgpack.encode(one)), _digest(b"".join(offer.contents[group])))
        for group, one in leaves.items()
    }
    told = _share(world, f"{key}/groups", digests, dict[str, tuple[bytes, bytes]])
    groups = _grouped(told)
    mine = {
        group: _More(leaves[group] if tells_rows else None, offer.contents[group] if tells_contents else None)
        for group, (tells_rows, tells_contents) in _asked(groups, world).items()
    }
    more = _share(world, f"{key}/leaves", mine, dict[str, _More])
    kinds = [kind for group in sorted(groups) for kind in _kinds(group, groups[group], world, offer, more)]
    found = _digest(msgspec.msgpack.encode((key, told)))
    return _Deciding(world, kinds, former, found).holdings(offer)


# -- the exchange ------------------------------------------------------------------------------------------

_Digests: TypeAlias = "tuple[bytes, bytes]"
_Groups: TypeAlias = "dict[str, dict[_Digests, list[int]]]"
"""By group and digests of its leaves and their contents: the ranks that have it so."""


class _Leaves(msgspec.Struct, frozen=True, array_like=True):
    """Rows, with each spec once: `rows` have the number of theirs, `specs` meshes that may be of all
    ranks."""

    specs: list[Spec]
    rows: list[tuple[str, str, Shape, int | None, Kin, str, bool]]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> _Leaves:
        numbers: dict[Spec | None, int | None] = {None: None}
        specs: list[Spec] = []
        for row in rows:
            if row.spec is not None and row.spec not in numbers:
                numbers[row.spec] = len(specs)
                specs.append(row.spec)
        made = [
            (one.name, one.dtype, one.shape, numbers[one.spec], one.kin, one.first, one.own) for one in rows
        ]
        return cls(specs, made)

    def all(self) -> list[Row]:
        specs: dict[int | None, Spec | None] = {**dict(enumerate(self.specs)), None: None}
        return [
            Row(name, dtype, shape, specs[number], kin, first, own)
            for name, dtype, shape, number, kin, first, own in self.rows
        ]


class _More(msgspec.Struct, frozen=True, array_like=True):
    rows: _Leaves | None = None
    contents: Sequence[bytes] | None = None


@dataclass(frozen=True)
class _Kind:
    """Leaves that some ranks have in the same way, with the same contents."""

    rows: Sequence[Row]
    contents: Sequence[bytes]
    ranks: tuple[int, ...]


def _share(world: World, key: str, mine: object, kind: Any) -> list[Any]:
    """What all ranks say, of one type."""
    encoded = zstandard.ZstdCompressor(level=3).compress(msgspec.msgpack.encode(mine))
    decoder = msgspec.msgpack.Decoder(kind)
    known: dict[bytes, Any] = {}
    answers = world.share(key, encoded)
    for answer in answers:
        if answer not in known:
            try:
                size_bytes = zstandard.get_frame_parameters(answer).content_size
                if size_bytes > _MAX_ANSWER_BYTES:
                    raise Damaged(f"a rank says {size_bytes} bytes of its leaves, which is too much")
                raw = zstandard.ZstdDecompressor().decompress(answer, max_output_size=size_bytes)
                known[answer] = decoder.decode(raw)
            except (zstandard.ZstdError, msgspec.MsgspecError) as error:
                raise Damaged(f"a rank says of its leaves what cannot be understood: {error}") from error
    return [known[answer] for answer in answers]


def _digest(data: bytes) -> bytes:
    return blake3(data).digest(_DIGEST_BYTES)


def _grouped(told: Sequence[Mapping[str, _Digests]]) -> _Groups:
    groups: _Groups = {}
    for rank, digests in enumerate(told):
        for group, both in digests.items():
            groups.setdefault(group, {}).setdefault(both, []).append(rank)
    return groups


def _asked(groups: _Groups, world: World) -> dict[str, tuple[bool, bool]]:
    """Of which groups this rank is to tell more: its leaves, their contents."""
    found = {}
    for group, by_digests in groups.items():
        if _is_alike(by_digests, world):
            continue
        by_rows: dict[bytes, int] = {}
        for (rows, _), ranks in by_digests.items():
            by_rows[rows] = min(ranks[0], by_rows.get(rows, ranks[0]))
        asked = world.rank in by_rows.values(), any(ranks[0] == world.rank for ranks in by_digests.values())
        if any(asked):
            found[group] = asked
    return found


def _is_alike(by_digests: Mapping[_Digests, Sequence[int]], world: World) -> bool:
    return len(next(iter(by_digests.values()))) == world.ranks


def _kinds(
    group: str,
    by_digests: Mapping[_Digests, Sequence[int]],
    world: World,
    offer: Offer,
    more: Sequence[Mapping[str, _More]],
) -> list[_Kind]:
    """Those of a group, in the order of their lowest ranks."""
    if _is_alike(by_digests, world):
        return [_Kind(offer.rows[group], offer.contents[group], tuple(range(world.ranks)))]
    tellers: dict[bytes, int] = {}
    for (rows, _), ranks in by_digests.items():
        tellers[rows] = min(ranks[0], tellers.get(rows, ranks[0]))
    found = []
    for (rows, _), ranks in sorted(by_digests.items(), key=lambda pair: pair[1][0]):
        of_rows = more[tellers[rows]].get(group, _More()).rows
        contents = more[ranks[0]].get(group, _More()).contents
        if of_rows is None or contents is None or len(of_rows.rows) != len(contents):
            raise Damaged(f"rank {ranks[0]} does not say what it has of {group}")
        found.append(_Kind(of_rows.all(), contents, tuple(ranks)))
    return found


# -- what follows from it ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Variant:
    """A leaf as some ranks have it."""

    row: Row
    content: bytes
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class _Decision:
    """What becomes of a leaf: boxes and who holds each; or, by rank, whose own it is."""

    row: Row
    holders: Mapping[Box, Holders] = field(default_factory=dict)
    owners: Mapping[int, int] | None = None
    compared: bool = False
    is_alias: bool = False


class _Deciding:
    """From what all ranks have said, the same for all, to what one of them writes."""

    def __init__(self, world: World, kinds: Sequence[_Kind], former: Holdings, found: bytes) -> None:
        self._world = world
        self._found = found
        self._former = former
        self._variants: dict[str, list[_Variant]] = {}
        for kind in kinds:
            for row, content in zip(kind.rows, kind.contents, strict=True):
                self._variants.setdefault(row.name, []).append(_Variant(row, content, kind.ranks))
        self._everybody: dict[tuple[Shape, tuple[int, ...]], Mapping[Box, Holders]] = {}
        self._decided = {
            name: _decide(name, variants, self._everybody) for name, variants in self._variants.items()
        }
        for name, variants in self._variants.items():
            self._follow(name, variants)

    def _follow(self, name: str, variants: Sequence[_Variant]) -> None:
        """A leaf with the memory of another goes with that, if it does on all ranks."""
        firsts = {one.row.first for one in variants}
        first = next(iter(firsts))
        if len(firsts) > 1 or first == name or first not in self._decided:
            return
        if _ranks(variants) == _ranks(self._variants[first]):
            decided = self._decided[first]
            self._decided[name] = replace(decided, row=variants[0].row, is_alias=True)

    def holdings(self, offer: Offer) -> Holdings:
        rank = self._world.rank
        mine = {row.name: row for row in chain.from_iterable(offer.rows.values())}
        parts = self._parts(mine)
        held: dict[str, Held] = {}
        watched: dict[Holders, list[str]] = defaultdict(list)
        parted = set(self._former.parted)
        for row in mine.values():
            decided = self._decided[row.name]
            boxes = boxes_of(row.shape, row.spec, rank)
            if decided.owners is not None:
                held[row.name] = Held(row, boxes, decided.owners[rank])
                if self._were_the_same(row.name):
                    parted.add(row.name)
                continue
            own = row.first if decided.is_alias else row.name
            held[row.name] = Held(row, boxes, None, tuple(parts.get(own, ())))
            if decided.compared and not decided.is_alias:
                for holders in dict.fromkeys(decided.holders[box] for box in boxes):
                    if len(holders) > 1:
                        watched[holders].append(row.name)
        return Holdings(held, dict(watched), frozenset(parted), self._found)

    def _were_the_same(self, name: str) -> bool:
        former = self._former.held.get(name)
        return former is not None and former.owner is None

    def _parts(self, mine: Mapping[str, Row]) -> dict[str, list[Box]]:
        """The boxes that this rank writes, by leaf."""
        rank = self._world.rank
        loads: dict[Kin, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        totals: dict[Kin, dict[Holders, int]] = defaultdict(lambda: defaultdict(int))
        shared: dict[tuple[Kin, Holders], list[tuple[str, Box, int]]] = defaultdict(list)
        parts: dict[str, list[Box]] = defaultdict(list)
        # Of thousands of leaves most lie as others do: what follows from it is counted once.
        alike: Counter[tuple[Kin, int, int]] = Counter()
        tables: dict[int, Mapping[Box, Holders]] = {}
        for name, decided in self._decided.items():
            row, item = decided.row, item_bytes(decided.row.dtype)
            if decided.is_alias:
                continue
            if decided.owners is not None:
                for owner in set(decided.owners.values()):
                    of = self._row_of(name, owner)
                    loads[of.kin][owner] += _held_bytes(of, owner)
                continue
            tables[id(decided.holders)] = decided.holders
            alike[row.kin, item, id(decided.holders)] += 1
            own = mine.get(name)
            for box in boxes_of(own.shape, own.spec, rank) if own is not None else ():
                holders = decided.holders[box]
                if len(holders) > 1:
                    shared[row.kin, holders].append((name, box, item))
                else:
                    parts[name].append(box)
        for (kin, item, which), count in alike.items():
            for box, holders in tables[which].items():
                size_bytes = elements(box) * item * count
                if len(holders) > 1:
                    totals[kin][holders] += size_bytes
                else:
                    loads[kin][holders[0]] += size_bytes
        shares = {kin: level(loads[kin], totals[kin]) for kin in totals}
        for (kin, holders), items in shared.items():
            cut = spread([(box, item) for _, box, item in items], shares[kin][holders])
            for (name, _, _), written in zip(items, cut, strict=True):
                parts[name] += [box for writer, box in written if writer == rank]
        return parts

    def _row_of(self, name: str, rank: int) -> Row:
        return next(one.row for one in self._variants[name] if rank in one.ranks)


def _held_bytes(row: Row, rank: int) -> int:
    return sum(elements(box) for box in boxes_of(row.shape, row.spec, rank)) * item_bytes(row.dtype)


def _ranks(variants: Sequence[_Variant]) -> set[int]:
    return {rank for one in variants for rank in one.ranks}


def _decide(
    name: str, variants: Sequence[_Variant], everybody: dict[Any, Mapping[Box, Holders]]
) -> _Decision:
    first = variants[0].row
    same = all((one.row.dtype, one.row.shape) == (first.dtype, first.shape) for one in variants)
    ranks = tuple(sorted(_ranks(variants)))
    if same and not any(one.row.own for one in variants):
        if all(one.row.spec is None for one in variants):
            if len({one.content for one in variants}) == 1:
                key = first.shape, ranks
                holders = everybody.setdefault(key, {whole(first.shape): ranks})
                return _Decision(first, holders, compared=True)
        elif all(one.row.spec is not None for one in variants):
            found = _holders(first.shape, variants)
            if found is not None:
                return _Decision(first, found, compared=any(one.content for one in variants))
    # What is alike is written once all the same: by the lowest of those that have it.
    of = {rank: one for one in variants for rank in one.ranks}
    owners: dict[int, int] = {}
    lowest: dict[object, int] = {}
    for rank in ranks:
        row = of[rank].row
        alike = rank if row.spec is not None or row.own else (row.dtype, row.shape, of[rank].content)
        owners[rank] = lowest.setdefault(alike, rank)
    return _Decision(first, owners=owners)


def _holders(shape: Shape, variants: Sequence[_Variant]) -> Mapping[Box, Holders] | None:
    """Who holds each box of a DTensor; None where that is not one tensor: some have other contents in the
    same place, or boxes that overlap those of others, or something is missing."""
    if len(variants) == 1:
        (one,) = variants
        assert one.row.spec is not None
        return table(shape, one.row.spec) if set(one.row.spec.ranks) <= set(one.ranks) else None
    found: dict[Box, dict[int, bytes]] = defaultdict(dict)
    for one in variants:
        for rank in one.ranks:
            for box in boxes_of(shape, one.row.spec, rank):
                found[box][rank] = one.content
    if sum(map(elements, found)) != elements(whole(shape)):
        return None
    if any(len(set(contents.values())) > 1 for contents in found.values()):
        return None
    return {box: tuple(sorted(ranks)) for box, ranks in found.items()}
