"""Repair: damaged and missing objects of a chain are put back, from wherever they are still to be had.

First it is found out what is wrong and where each object can be had whole (`consider`), which changes
nothing; then it is done (`execute`). Nothing good is ever taken away: where a damaged object stands, the
right bytes are durable under another name before it goes (`store/replacing`), so that a repair that is killed
at any instant leaves what the next one completes.
"""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from everstep.chain import sources as elsewhere
from everstep.chain.doomed import Doomed
from everstep.chain.fence import fence_at
from everstep.chain.history import SHORT, Chain, now
from everstep.chain.lease import Lease, refuse_unreleased
from everstep.chain.names import exists, is_object, newest
from everstep.chain.rebuilding import Chunks
from everstep.chain.relocations import Relocations
from everstep.chain.sources import Have, Source, refuse_other
from everstep.chain.verify import Finding, Report, verify
from everstep.errors import Conflict, Damaged, EverstepError, Fenced, Mismatch, NotFound, Unsupported
from everstep.format import keys
from everstep.format import manifest as manifests
from everstep.format.manifest import Manifest
from everstep.format.record import LeaseRecord, NewPack, RelocationRecord, Spot, seal, unseal
from everstep.store.base import Buffer, Entry, Redundant, Store
from everstep.store.replacing import SPARES, holds, key_of_spare
from everstep.store.replacing import replace as put_in_place

MAX_ROUNDS = 6
"""So often what was found is looked through again: a head leads to a snapshot, that to a manifest."""

_ORDER = (
    keys.CHAIN, keys.PACKS, keys.RELOCATIONS, keys.MANIFESTS, keys.SNAPSHOTS, keys.STEPLOG, keys.TAGS,
    keys.REPLICAS, keys.PRUNES, keys.PARTS, keys.LEASES, keys.HEADS,
)  # fmt: skip
"""What an object needs is put before it."""


@dataclass(frozen=True)
class Step:
    """An object that is to be put back: what is wrong with it, and where it comes from. `lacks` are chunks of
    a pack that were nowhere to be had: all others are then there. `stood`: it was there, and damaged."""

    key: str
    problem: str
    how: str
    size_bytes: int
    lacks: tuple[str, ...] = ()
    stood: bool = False


@dataclass(frozen=True)
class Plan:
    """What `execute` will do, and what will be the case then.

    Attributes:
        steps: in the order in which they are done.
        mends: objects of which the store itself keeps enough, and what is not whole of each.
        lost: what cannot be repaired.
        before, after: the chain as it is, and as it will be.
        remarks: what a person should know besides, a sentence each.
    """

    steps: tuple[Step, ...]
    mends: tuple[Step, ...]
    lost: tuple[Finding, ...]
    before: Report
    after: Report
    remarks: tuple[str, ...]
    contents: dict[str, Callable[[], Sequence[Buffer]]] = field(repr=False, compare=False)
    store: Store = field(repr=False, compare=False)


@dataclass(frozen=True)
class Done:
    """What was done, and what was not, with the reason."""

    repaired: tuple[Step, ...]
    left: tuple[Finding, ...]


def consider(
    store: Store, others: Sequence[Store] = (), on_progress: Callable[[int, int], None] | None = None
) -> Plan:
    """What is wrong with the chain in `store`, and how it can be repaired. Reads all of it, and of the others
    what is needed; changes nothing.

    Args:
        others: stores that may have what is missing: copies of this chain, and other chains, of which only
            chunks are of use.

    Raises:
        NotFound: there is no chain, and none of the others has it.
        Unavailable: a store does not answer.
    """
    return _Considering(store, others, on_progress or (lambda done, total: None)).plan()


class _Considering:
    def __init__(
        self, store: Store, others: Sequence[Store], on_progress: Callable[[int, int], None]
    ) -> None:
        self.store = store
        self.on_progress = on_progress
        self.fixed = _Fixed(store)
        self.steps: dict[str, Step] = {}
        self.remarks: list[str] = []
        self.sources: list[elsewhere.Place] = [elsewhere.Spares(store), *map(Source, others)]
        self.others = [one for one in self.sources if isinstance(one, Source)]
        self.chunks = Chunks([store, *others], self._manifests)
        self.checked: set[str] = set()

    def plan(self) -> Plan:
        mends = tuple(self._mends())
        self._find_chain_record()
        chain = Chain(self.fixed)
        before = after = verify(chain, self.on_progress)
        self._absent(chain)
        for _ in range(MAX_ROUNDS):
            found = [self._fix(one) for one in after.findings]
            if not any(found) and len(self.steps) == len(self.checked):
                break
            self.checked = set(self.steps)
            after = verify(chain, self.on_progress)
        after = self._without_empty_heads(chain, after)
        steps = sorted(self.steps.values(), key=_order)
        return Plan(
            tuple(steps),
            mends,
            tuple(self._lost(one) for one in after.findings),
            before,
            after,
            tuple(self.remarks),
            {step.key: self.fixed.contents[step.key] for step in steps},
            self.store,
        )

    def _mends(self) -> Iterator[Step]:
        """What the store itself can make whole."""
        if not isinstance(self.store, Redundant):
            return
        self.remarks += self.store.away()
        for entry in list(self.store.list()):
            try:
                flaws = self.store.flaws(entry.key)
            except NotFound:
                continue
            except Damaged:
                continue  # There is too little of it: that is for the others.
            if flaws:
                yield Step(entry.key, "; ".join(flaws), "from the other members", entry.size_bytes)

    def _find_chain_record(self) -> None:
        """And which of the others are copies of this chain: the rest has nothing to say about its records."""
        try:
            Chain(self.store)
        except (NotFound, Damaged) as error:
            self._refuse_strangers()
            if not self._fix(Finding(keys.CHAIN, error.problem, (), "")):
                kind = NotFound if isinstance(error, NotFound) else Damaged
                where = ", ".join(one.url for one in self.others)
                none = f", and {where} cannot tell which chain it was" if where else ""
                raise kind(
                    error.problem + none,
                    kept=error.kept or "nothing was touched",
                    next=f"everstep -r {self.store.url} repair --from {COPY}",
                    key=keys.CHAIN,
                ) from error
        about, heads = Chain(self.fixed).about.chain, self._heads()
        for one in self.others:
            # Its own record of which chain it is may be what is damaged there.
            one.same = one.chain() == about or (not one.chain() and one.shares(self.store, heads) is True)
            if not one.same:
                what = (
                    "is another chain: only its chunks are"
                    if one.chain()
                    else "holds no chain: nothing in it is"
                )
                self.remarks.append(f"{one.url} {what} of use")

    def _refuse_strangers(self) -> None:
        """Nothing says which chain this is: a copy of it must have a record in common, if there are any."""
        heads = self._heads()
        for one in self.others:
            one.same = bool(one.chain()) and one.shares(self.store, heads) is not False
        named = {one.chain() for one in self.others if one.same}
        if len(named) > 1:
            raise Mismatch(
                f"{self.store.url} has no record of which chain it is, and those it may be repaired from are "
                f"{len(named)} different ones",
                kept="nothing was touched",
                next=f"everstep -r {self.store.url} repair --from {COPY}, one that is a copy of it",
            )

    def _heads(self) -> list[str]:
        return [entry.key for entry in self.store.list(keys.HEADS) if is_object(entry.key)]

    def _fix(self, finding: Finding) -> bool:
        """Whether there is news: something to put in the place of what is damaged."""
        key = finding.key
        if key in self.fixed.contents or not is_object(key):
            return False
        for one in self.sources:
            have = one.have(key)
            if have is not None and self._is_of_here(have):
                self._take(have, finding.problem)
                return True
        if key.startswith(keys.PACKS):
            return self._rebuild(key, finding.problem) or self._tell_where(finding)
        return key.startswith(keys.RELOCATIONS) and self._tell_where(finding)

    def _is_of_here(self, have: Have) -> bool:
        """A replica counts its own relocations: under a number may stand one that is about packs of there."""
        if not have.key.startswith(keys.RELOCATIONS):
            return True
        relocation = unseal(b"".join(have.content()), RelocationRecord, have.key)
        return all(exists(self.store, keys.pack(one.name)) for one in relocation.packs)

    def _tell_where(self, finding: Finding) -> bool:
        """Make a relocation record anew, out of what packs hold and what manifests place in packs that are
        gone: in the place of one that is damaged, or as the next one, for a pack that is missed."""
        relocated = Relocations(self.fixed)
        relocated.look()
        instead_of = finding.key if finding.key.startswith(keys.RELOCATIONS) else ""
        if not instead_of and relocated.damaged:
            # It may be had whole, which is better.
            key, error = min(relocated.damaged.items())
            return self._fix(replace(finding, key=key, problem=error.problem))
        sizes = {one.key.rpartition("/")[2]: one.size_bytes for one in self.fixed.list(keys.PACKS)}
        packs: dict[str, int] = {}
        moved: dict[str, dict[int, Spot]] = defaultdict(dict)
        for manifest in self._manifests():
            for chunk, place in zip(manifest.chunks, manifest.places, strict=True):
                known = relocated.table.moved(place.pack, place.offset)
                if place.pack in sizes or any(one.pack in sizes for one in known):
                    continue
                twin = self.chunks.twin(chunk, place)
                if twin is None and instead_of:
                    return False  # What is left of it may say more than that.
                if twin is not None:
                    packs.setdefault(twin[0], sizes[twin[0]])
                    moved[place.pack][place.offset] = Spot(place.offset, list(packs).index(twin[0]), twin[1])
        if finding.key.startswith(keys.PACKS) and finding.key.rpartition("/")[2] not in moved:
            return False
        made = RelocationRecord(
            packs=tuple(NewPack(name, size) for name, size in packs.items()),
            moved={name: tuple(spots.values()) for name, spots in sorted(moved.items())},
            nonce=secrets.token_hex(8),
            at=now(),
            number=keys.number_of(instead_of) or newest(self.fixed, keys.RELOCATIONS) + 1,
        )
        data = seal(made)
        self._take(Have(made.key, "of what the packs hold", len(data), lambda: [data]), finding.problem)
        return True

    def _take(self, have: Have, problem: str) -> None:
        self.fixed.contents[have.key] = have.content
        self.fixed.sizes[have.key] = have.size_bytes
        stood = _stands(self.store, have.key)
        self.steps[have.key] = Step(have.key, problem, have.how, have.size_bytes, stood=stood)

    def _rebuild(self, key: str, problem: str) -> bool:
        name = key.rpartition("/")[2]
        made = self.chunks.anew(name)
        footer = self.chunks.footer(name) if made is not None else None
        if made is None or footer is None:
            return False
        # A part of a pack is better than less of it, and never worse.
        if made.missing and made.good <= self.chunks.good_in(self.store, name, footer):
            return False
        size = sum(map(len, made.parts))
        self._take(Have(key, "of its chunks", size, partial(_rebuilt, self.chunks, name)), problem)
        self.steps[key] = replace(self.steps[key], lacks=made.missing)
        return True

    def _absent(self, chain: Chain) -> None:
        """Records that copies of this chain have and it has not: nothing else tells that it is gone."""
        for one in self.others:
            if one.same:
                for have in one.absent_from(chain, self.remarks):
                    if have.key not in self.fixed.contents:
                        self._take(have, "it is missing")

    def _without_empty_heads(self, chain: Chain, after: Report) -> Report:
        """A head record that was missing is put back only with its snapshot."""
        broken = {id for finding in after.findings for id in finding.snapshots}
        missing = {key for key, step in self.steps.items() if step.problem == "it is missing"}
        empty = [
            point.key
            for branch in chain.branches()
            for point in chain.points(branch)
            if point.key in missing and (point.head is None or point.head.snapshot in broken)
        ]
        for key in empty:
            self.remarks.append(f"{key} is not put back: its snapshot is nowhere to be had")
            del self.steps[key], self.fixed.contents[key], self.fixed.sizes[key]
        return verify(chain, self.on_progress) if empty else after

    def _manifests(self) -> Sequence[Manifest]:
        found = []
        for entry in self.fixed.list(keys.MANIFESTS):
            try:
                data = self.fixed.get(entry.key, 0, manifests.MAX_STORED_BYTES + 1)
                refuse_other(entry.key, data)
                found.append(manifests.decode(data))
            except (Damaged, NotFound, Unsupported):
                continue
        return found

    def _lost(self, finding: Finding) -> Finding:
        """What remains to be done is not the same repair again."""
        again = f"everstep -r {self.store.url} repair"
        next = finding.next.replace(f" --from {COPY}", "").replace(again, f"{again} --from {COPY}")
        return replace(finding, next=next)


COPY = "A_COPY_OF_THE_CHAIN"


def _rebuilt(chunks: Chunks, name: str) -> Sequence[Buffer]:
    made = chunks.anew(name)
    if made is None:
        raise NotFound(f"the chunks of pack {name[:SHORT]} are not there any more")
    return made.parts


def _order(step: Step) -> tuple[int, str]:
    """Packs first, heads last, and of these the oldest first."""
    rank = next((number for number, prefix in enumerate(_ORDER) if step.key.startswith(prefix)), 0)
    number = keys.number_of(step.key)
    return rank, step.key if number is None else f"{step.key.rpartition('/')[0]}/{number:016x}"


class _Fixed:
    """A store as it will be: with what is planned in the place of what is there."""

    def __init__(self, store: Store) -> None:
        self.url = store.url
        self.contents: dict[str, Callable[[], Sequence[Buffer]]] = {}
        self.sizes: dict[str, int] = {}
        self._store = store
        self._near: tuple[str, bytes] = ("", b"")

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        raise NotImplementedError("a plan changes nothing")

    def delete(self, key: str) -> None:
        raise NotImplementedError("a plan changes nothing")

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        if key not in self.contents:
            return self._store.get(key, start, size_bytes)
        if self._near[0] != key:
            self._near = key, b"".join(self.contents[key]())
        data = self._near[1]
        return data[start:] if size_bytes is None else data[start : start + size_bytes]

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        if key not in self.contents:
            return self._store.read_into(key, start, buffers)
        data, at = memoryview(self.get(key, start)), 0
        for buffer in buffers:
            part = data[at : at + len(buffer)]
            buffer[: len(part)] = part
            at += len(part)
        return at

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[Entry]:
        found = {entry.key: entry for entry in self._store.list(prefix)}
        for key, size in self.sizes.items():
            if key.startswith(prefix):
                found[key] = Entry(key, size, time.time())
        yield from [found[key] for key in sorted(found) if not key.startswith(SPARES)][:limit]


# -- doing it ----------------------------------------------------------------------------------------------


def execute(plan: Plan, on_progress: Callable[[int, int], None] | None = None) -> Done:
    """Do what was planned; each object is durable and verified before the next. May be interrupted at any
    point, and another repair goes on with it. Writers and prunes may be at work.

    Raises:
        Unavailable: a store does not answer. What was repaired until then stays repaired.
    """
    store = plan.store
    doomed = Doomed(store)
    doomed.look()
    repaired: list[Step] = []
    left = list(plan.lost)
    total = sum(step.size_bytes for step in (*plan.mends, *plan.steps))
    done = 0
    for step in plan.mends:
        done += step.size_bytes
        assert isinstance(store, Redundant)
        try:
            if store.mend(step.key):
                repaired.append(step)
        except NotFound:
            continue  # Pruned meanwhile.
        except Damaged as error:
            left.append(_failed(store, step, error))
        if on_progress is not None:
            on_progress(done, total)
    for step in plan.steps:
        done += step.size_bytes
        if step.key.rpartition("/")[2] in doomed.names or (step.stood and not _stands(store, step.key)):
            continue  # A prune is about to take it away, or has; nobody needs it.
        try:
            _put(store, step, plan.contents[step.key]())
            repaired.append(step)
        except (Conflict, Damaged, Fenced, NotFound, Unsupported) as error:
            left.append(_failed(store, step, error))
        if on_progress is not None:
            on_progress(done, total)
    _clean(store)
    return Done(tuple(repaired), tuple(left))


def _failed(store: Store, step: Step, error: EverstepError) -> Finding:
    next = error.next or f"everstep -r {store.url} repair"
    return Finding(step.key, f"{step.problem}; {error.problem}", (), next)


def _put(store: Store, step: Step, parts: Sequence[Buffer]) -> None:
    if not step.lacks:
        refuse_other(step.key, b"".join(parts))
    if _stands(store, step.key):
        _make_replaceable(store, step.key, parts)
    put_in_place(store, step.key, parts)
    if not holds(store, step.key, parts):
        raise Conflict(
            f"somebody else has put {step.key} meanwhile",
            kept="that was left as it is",
            next=f"everstep -r {store.url} verify",
        )


def _stands(store: Store, key: str) -> bool:
    return any(entry.key == key for entry in store.list(key, limit=1))


def _make_replaceable(store: Store, key: str, parts: Sequence[Buffer]) -> None:
    """While a record is being replaced its number is free for an instant, and must not be another's then. So
    the newest of a kind that counts by its number gets a successor first.

    Raises:
        Conflict: a living writer is about to put one: then it is to be asked again later.
    """
    number, prefix = keys.number_of(key), f"{key.rpartition('/')[0]}/"
    if number is None or not prefix.startswith((keys.HEADS, keys.LEASES)) or newest(store, prefix) > number:
        return
    if prefix == keys.LEASES:
        raise Conflict(
            f"{key} is the newest lease of version 0.2, and is left to its next writer",
            kept="no snapshot needs it",
            next=f"everstep -r {store.url} log",
        )
    branch, is_head = prefix.split("/")[1], prefix.startswith(keys.HEADS)
    # Who takes a lease from a writer stops it: for a repair nobody is to be stopped.
    refuse_unreleased(store, branch, None if is_head else unseal(b"".join(parts), LeaseRecord, key))
    mine = Lease.take(store, branch)
    try:
        if is_head:
            fence_at(store, mine, number + 1, parts)
    finally:
        mine.release()


def _clean(store: Store) -> None:
    """Take away what repairs that were killed have left, where the object is whole by now."""
    for entry in list(store.list(SPARES)):
        key = key_of_spare(entry.key)
        if key is not None and is_object(key):
            try:
                refuse_other(key, store.get(key))
            except (Damaged, NotFound, Unsupported):
                continue
            store.delete(entry.key)
