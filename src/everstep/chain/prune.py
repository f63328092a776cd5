"""Dropping snapshots that are not to stay: first a plan, then its execution, in an order that a crash at any
point leaves harmless (head records first, so that nothing listed ever lacks a part).

Others may be at work meanwhile. What this relies on is told in docs/decisions/0016-prune.md:

* A prune writes down what is doomed, then looks once more at what is relied on, then deletes (`doomed`).
* What nothing reaches is left alone while it may belong to a snapshot that is being written: when it is
  younger than the grace window, or than a lease whose writer may still commit. Ages are by the store's clock.
* A manifest that is left alone keeps the packs that it names.
* What a rank has told of with a part record is left alone as long as its writer may commit it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from everstep.chain.census import Advance, Census
from everstep.chain.doomed import Announced, announce, doomed_by_others
from everstep.chain.fence import fence_former
from everstep.chain.history import SHORT, Chain
from everstep.chain.lease import Holding, Lease, Leases
from everstep.chain.names import is_object, part_of, segment_of
from everstep.chain.reached import Reached
from everstep.chain.repack import Move, Repack, chosen, relocate
from everstep.chain.replicas import source_of
from everstep.chain.retention import Keep, Listed, staying
from everstep.errors import Conflict, Damaged, EverstepError, Fenced, NotFound, Unsupported
from everstep.format import keys
from everstep.format.record import PartRecord

__all__ = ["GRACE_S", "Done", "Keep", "Plan", "Repack", "Row", "consider", "execute", "plan", "prune"]

GRACE_S = 3600.0
"""Unreachable objects younger than this may belong to a snapshot that is just being written."""

MAX_NAMES = 50_000
"""So many names go into one record of a prune, which stays below `record.MAX_RECORD_BYTES`."""


TAKES_AHEAD = 2
"""A rank may have stored parts of so many snapshots after the newest that is committed."""

MAX_LOOKS = 10
"""So often a plan is begun anew because somebody else deletes what it reads."""


@dataclass(frozen=True)
class Row:
    """A snapshot that is listed, and why it stays; without a reason it goes."""

    id: str
    branch: str
    step: int
    taken_at: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Second:
    """The look that follows when a prune was announced.

    Attributes:
        at: when that was, by the store's clock, in seconds since 1970.
        nonce: that of its record.
        only: no more than these keys may go: a head record that has come since stays, also where the policy
            would not keep what it lists, and so does all that it needs.
    """

    at: float
    nonce: str
    only: Collection[str]


@dataclass(frozen=True)
class Plan:
    """What is to go.

    Attributes:
        sizes: in bytes, of all objects that go, in the order in which they are deleted.
        snapshots: the ids that go.
        rows: all that is listed, by branch, newest first.
        more: whether this is a part, and another plan has to follow.
        mine: the lease of who prunes, if it has one.
        dead: leases of dead processes of this machine, which are to be fenced before anything goes.
        again: makes the same plan once more, for a second look.
        moves: the packs that are given up after that, where one repacks.
    """

    sizes: Mapping[str, int]
    snapshots: tuple[str, ...]
    rows: tuple[Row, ...]
    more: bool
    mine: Lease | None
    dead: tuple[Holding, ...]
    again: Callable[[Second], Plan] = field(repr=False, compare=False)
    moves: tuple[Move, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    @property
    def packs(self) -> frozenset[str]:
        """The names of the packs that go."""
        return frozenset(self.names(keys.PACKS))

    @property
    def freed_bytes(self) -> int:
        """By what is deleted; `moves` free more."""
        return sum(self.sizes.values())

    @property
    def repacked_bytes(self) -> int:
        """What giving packs up frees, about."""
        return sum(one.freed_bytes for one in self.moves)

    def names(self, prefix: str) -> list[str]:
        return [key.rpartition("/")[2] for key in self.sizes if key.startswith(prefix)]


def plan(
    chain: Chain,
    keep: Keep,
    *,
    branches: Collection[str] | None = None,
    mine: Lease | None = None,
    census: Census | None = None,
) -> Plan | None:
    """What a writer drops right after it has committed: `consider` without a window; None where nothing is to
    go, and, without looking, where all is to be kept."""
    if keep.everything:
        return None
    found = consider(chain, keep, branches=branches, mine=mine, census=census)
    return found if found.keys else None


def consider(
    chain: Chain,
    keep: Keep,
    *,
    branches: Collection[str] | None = None,
    window_s: float = 0.0,
    mine: Lease | None = None,
    census: Census | None = None,
    repack: Repack | None = None,
    now: float | None = None,
    second: Second | None = None,
) -> Plan:
    """What is to go. Reads the chain and changes nothing.

    Args:
        keep: the policy.
        branches: whose snapshots may go; None: all branches'.
        window_s: snapshots that were listed so short a time ago stay.
        mine: the lease of who asks, whose own writer is writing nothing now.
        census: what it has read before need not be read again.
        repack: when packs of which something is needed are given up, too; None: never. Then all that the
            manifests which stay say has to be looked at. In a replica never: its source is repacked, and it
            follows.
        now: by the store's clock, in seconds since 1970; by this machine's where it is not given: good enough
            to look, not to delete (`execute` asks the store).
        second: where it is asked once more.

    Raises:
        Damaged: something that stays cannot be read, so that it is not known what it needs: nothing may go.
        Unsupported: a newer version wrote something here: likewise.
    """
    census = census or Census(chain)
    repack = None if repack is not None and source_of(chain) else repack
    again = partial(consider, chain, keep, branches=branches, window_s=window_s, mine=mine, census=census)
    if second is not None:
        now = second.at
    for _ in range(MAX_LOOKS):
        look = _Look(census, mine, time.time() if now is None else now, second, repack)
        try:
            return _planned(look, keep, branches, window_s, lambda second: again(second=second))
        except Damaged:
            if look.is_still_so():
                raise
    raise Conflict(
        f"{chain.url} changes faster than it can be looked at",
        kept="nothing was touched",
        next=f"everstep -r {chain.url} prune",
    )


def _planned(
    look: _Look,
    keep: Keep,
    branches: Collection[str] | None,
    window_s: float,
    again: Callable[[Second], Plan],
) -> Plan:
    reasons = staying(look.lines, keep, tags=look.tags, now=look.now, window_s=window_s, branches=branches)
    going = look.going(reasons, branches)
    found = look.plan(reasons, branches, going, again)
    while len(found.sizes) > MAX_NAMES and len(going) > 1:
        going = going[: len(going) // 2]
        found = replace(look.plan(reasons, branches, going, again), more=True)
    if len(found.sizes) > MAX_NAMES:
        # What nothing has listed for long: what is left of it here is found by the next plan.
        found = replace(found, sizes=dict(itertools.islice(found.sizes.items(), MAX_NAMES)), more=True)
    return found


@dataclass(frozen=True)
class Done:
    """What a prune has deleted. `records` are the numbers of its own records. Where it has repacked, it was
    `copied_bytes` in new packs before, and `remarks` say what could not be."""

    keys: tuple[str, ...]
    freed_bytes: int
    records: list[int]
    copied_bytes: int = 0
    remarks: tuple[str, ...] = ()


def execute(chain: Chain, plan: Plan) -> Done:
    """Delete what the plan names, but for what somebody has begun to rely on since it was made. May be
    interrupted at any point, and another prune goes on with it.

    Blocks for a request or two for each object that goes; they are durably gone on return.

    Raises:
        Fenced: the lease was lost; nothing was deleted.
        Damaged, Unsupported: as `consider`; nothing was deleted.
        Conflict: this process was stopped for so long that others do not count on it any more.
    """
    snapshots = dict.fromkeys((*plan.snapshots, *plan.names(keys.SNAPSHOTS)))
    announced = announce(chain.store, snapshots, plan.names(keys.MANIFESTS), plan.names(keys.PACKS))
    try:
        going = _still_going(chain, plan, announced)
        for key in going:
            announced.check()
            chain.store.delete(key)
        announced.finish()
    finally:
        announced.leave()
    return Done(tuple(going), sum(going.values()), announced.numbers)


def prune(
    chain: Chain,
    keep: Keep,
    *,
    branches: Collection[str] | None = None,
    window_s: float = 0.0,
    census: Census | None = None,
    repack: Repack | None = None,
) -> Iterator[Done]:
    """Plan and execute until nothing more is to go; a very long chain takes several rounds, and each is given
    when it is done. What frees space without taking any comes first: then packs are given up, if `repack`
    says when. See `consider`, `execute` and `repack.relocate`."""
    again = partial(
        consider, chain, keep, branches=branches, window_s=window_s, census=census or Census(chain)
    )
    yield from _drop(chain, again)
    more = repack is not None
    while more:
        moves = again(repack=repack).moves
        if not moves:
            return
        done = relocate(chain, moves)
        yield Done((), 0, [], done.copied_bytes, tuple(done.remarks))
        yield from _drop(chain, again)
        more = done.more and bool(done.given_up)


def _drop(chain: Chain, again: Callable[[], Plan]) -> Iterator[Done]:
    more = True
    while more:
        found = again()
        if not found.sizes:
            return
        done = execute(chain, found)
        yield done
        more = found.more and bool(done.keys)


def _still_going(chain: Chain, plan: Plan, announced: Announced) -> dict[str, int]:
    """Look once more, now that everybody can know what is doomed."""
    try:
        if plan.mine is not None:
            plan.mine.check()
        for one in plan.dead:
            _bury(chain, one, plan.mine)
        left = plan.again(Second(announced.at, announced.nonce, plan.sizes.keys())).sizes
    except EverstepError:
        announced.finish()
        raise
    return {key: size for key, size in plan.sizes.items() if key in left}


def _bury(chain: Chain, dead: Holding, mine: Lease | None) -> None:
    """Its keeper may still be there: make sure that nothing is committed under this lease any more."""
    if mine is not None and mine.branch == dead.branch:
        fence_former(chain, mine)
        return
    try:
        taken = Lease.take(chain.store, dead.branch)
        fence_former(chain, taken)
        taken.release()
    except (Conflict, Fenced):
        return  # Another has taken it over, and is at work: the next look finds that.


class _Look:
    """A chain at an instant. The order matters: a writer that commits meanwhile is seen by its lease or by
    its head record, and what it wrote before its head is listed last."""

    def __init__(
        self,
        census: Census,
        mine: Lease | None,
        now: float,
        second: Second | None,
        repack: Repack | None,
    ) -> None:
        self.census = census
        self.mine = mine
        self.now = now
        self.second = second
        self.repack = repack
        store = census.chain.store
        leases = Leases(store)
        self.advances = census.advances()
        self.tags = census.chain.tags()
        told = [entry for entry in store.list(keys.PARTS) if is_object(entry.key)]
        # What was relocated counts where it cannot be deleted by somebody who does not know of that.
        census.relocations.look()
        self.table = census.relocations.table
        nonce = second.nonce if second is not None else ""
        doomed = doomed_by_others(store, nonce, now) if self.table.keys else frozenset()
        self.entries = {
            entry.key: entry
            for prefix in (keys.SNAPSHOTS, keys.MANIFESTS, keys.PACKS, keys.RELOCATIONS)
            for entry in store.list(prefix)
            if is_object(entry.key)
        }
        self.packs = {
            name: entry.size_bytes
            for key, entry in self.entries.items()
            if key.startswith(keys.PACKS) and (name := key.rpartition("/")[2]) not in doomed
        }
        census.forget_manifests(but=self.entries.keys())
        floors = {branch: max(one.writer for one in line[:1]) for branch, line in self.advances.items()}
        self.holding = [
            one
            for one in leases.holding(floors)
            if mine is None or (one.branch, one.number) != (mine.branch, mine.number)
        ]
        self.lines = {branch: _line(advances) for branch, advances in self.advances.items()}
        held = {(one.branch, one.number) for one in self.holding}
        held |= {(mine.branch, mine.number)} if mine is not None else set()
        under_way = {entry.key for entry in told if _may_be_committed(entry.key, held, leases)}
        self.over = {entry.key: entry.size_bytes for entry in told if entry.key not in under_way}
        """Part records that nobody commits any more, and their sizes."""
        self.parts = census.parts(under_way)
        self.ranks_since = self._ranks_since(leases)

    def _ranks_since(self, leases: Leases) -> float:
        """When the oldest thing may have been put that is the asking writer's own and still to be committed:
        its other ranks are storing while it is pruning, two takes ahead at most. Infinite where it has no
        other ranks."""
        if self.mine is None:
            return math.inf
        branch, number = self.mine.branch, self.mine.number
        newest = next((one.listed for one in self.advances.get(branch, ()) if one.writer == number), None)
        told = any((one.branch, one.writer) == (branch, number) for one in self.parts)
        if not told and (newest is None or not self._is_of_ranks(newest)):
            return math.inf
        committed = self.census.commits(branch, number)
        if len(committed) > TAKES_AHEAD:
            return committed[TAKES_AHEAD]
        return leases.since(branch, number) or 0.0

    def _is_of_ranks(self, one: Listed) -> bool:
        try:
            return len(self.census.manifests(one.id)) > 1
        except (Damaged, NotFound):
            return True

    def is_still_so(self) -> bool:
        """Whether the same head records are listed as when this was made."""
        listed = (one.key for one in self.census.chain.store.list(keys.HEADS) if is_object(one.key))
        return set(listed) == {one.key for line in self.advances.values() for one in line}

    def going(
        self, reasons: Mapping[str, tuple[str, ...]], branches: Collection[str] | None
    ) -> list[Advance]:
        """The head records that go, the oldest of each branch first. One that cannot be read goes where it is
        not one that the policy may keep; Damaged is raised where it is."""
        found: list[Advance] = []
        for branch, advances in self.advances.items():
            if branches is not None and branch not in branches:
                continue
            for one in reversed(advances):
                if self.second is not None and one.key not in self.second.only:
                    continue
                if one.listed is not None and one.listed.id not in reasons:
                    found.append(one)
                elif one.damage is not None:
                    raise Damaged(
                        f"{one.key} cannot be read, so nothing was pruned",
                        kept="nothing was touched",
                        next=f"everstep -r {self.census.chain.url} verify",
                        key=one.key,
                    )
        return found

    def plan(
        self,
        reasons: Mapping[str, tuple[str, ...]],
        branches: Collection[str] | None,
        going: Sequence[Advance],
        again: Callable[[Second], Plan],
    ) -> Plan:
        self._refuse_damaged_relocations()
        doomed = {one.listed.id: one.listed for one in going if one.listed is not None and not one.damage}
        # Some may have to wait for the next plan.
        listed = {one.id for line in self.lines.values() for one in line if one.step >= 0}
        reached = Reached(self.census, self.packs, closely=self.repack is not None)
        staying = sorted((listed | set(reasons)) - doomed.keys())
        self.census.read_ahead(staying, closely=self.repack is not None)
        records: set[str] = set()
        for id in staying:
            records |= self._need(id, reached) if id in reasons else self._need_readable(id, reached)
        for part in self.parts:
            records |= self._need_of(part, reached)
        needed = records | reached.keys()
        old, dead = self._old(needed, doomed)
        # Of packs that were given up, and of those that came instead, no writer is putting any.
        ours = {*map(keys.pack, self.table.sources | self.table.targets.keys()), *self.table.keys}
        young = [one for one in doomed.values() if one.listed_at >= old]
        self.census.read_ahead([one.id for one in young], closely=False)
        for one in young:
            ours |= self._ours(one)
        for key, entry in self.entries.items():
            if (
                key.startswith(keys.SNAPSHOTS)
                and entry.modified_at >= old
                and key not in needed
                and key not in ours
            ):
                # Of a writer at work, perhaps: all that it is about to commit is put.
                records |= self._need_readable(key.removeprefix(keys.SNAPSHOTS), reached)
        needed = records | reached.keys()
        # Where a pack is missing, one that nothing names may be where its chunks were copied to.
        lacking = any(keys.pack(name) not in self.entries for name in reached.packs)
        gone = {
            key: entry.size_bytes
            for key, entry in self.entries.items()
            if key not in needed
            and (key in ours or (entry.modified_at < old and not (lacking and key.startswith(keys.PACKS))))
        }
        heads = {one.key: one.size_bytes for one in going}
        return Plan(
            sizes={**heads, **gone, **self._segments(reasons, branches), **self.over},
            snapshots=tuple(sorted(doomed)),
            rows=tuple(self._rows(reasons)),
            more=False,
            mine=self.mine,
            dead=dead
            if any(self.entries[key].modified_at >= one.since for one in dead for key in gone)
            else (),
            again=again,
            moves=() if self.repack is None else tuple(self._moves(self.repack, reached)),
        )

    def _moves(self, repack: Repack, reached: Reached) -> Iterator[Move]:
        """Of a pack that a part under way relies on nobody has looked what it needs."""
        relied = {name for part in self.parts for name in part.relies}
        return (one for one in chosen(repack, reached, self.packs) if one.pack not in relied)

    def _refuse_damaged_relocations(self) -> None:
        for key, error in self.census.relocations.damaged.items():
            if isinstance(error, Unsupported):
                raise error
            raise Damaged(
                f"{key} cannot be read, so nothing was pruned",
                kept="nothing was touched",
                next=f"everstep -r {self.census.chain.url} verify",
                key=key,
            )

    def _need(self, id: str, reached: Reached) -> set[str]:
        """The keys of a snapshot's record and manifests; what those need is added to `reached`."""
        try:
            names = self.census.manifests(id)
            reached.add(names)
        except (Damaged, NotFound) as error:
            raise Damaged(
                f"snapshot {id[:SHORT]} cannot be read ({error.problem}), so nothing was pruned",
                kept="nothing was touched",
                next=f"everstep -r {self.census.chain.url} verify",
                key=error.key,
            ) from error
        return {keys.snapshot(id), *map(keys.manifest, names)}

    def _need_readable(self, id: str, reached: Reached) -> set[str]:
        """The same for a snapshot that is to go: what cannot be read is left out."""
        try:
            return self._need(id, reached)
        except Damaged:
            return {keys.snapshot(id)}

    def _need_of(self, part: PartRecord, reached: Reached) -> set[str]:
        """The same for a rank's part of a snapshot under way. What is new in it is younger than the lease."""
        if part.withdrawn:
            return set()
        try:
            if self.table.sources.isdisjoint(part.relies):
                reached.packs.update(name for name in part.relies if name != part.manifest)
            else:
                reached.add([part.manifest])
        except Damaged:
            return set()  # Who commits finds that, too.
        return {keys.manifest(part.manifest)}

    def _ours(self, doomed: Listed) -> set[str]:
        """The keys of all that a snapshot consists of, as far as that can be read."""
        try:
            names = self.census.manifests(doomed.id)
            packs = {keys.pack(pack) for name in names for pack in self.census.packs(name)}
        except (Damaged, NotFound):
            return {keys.snapshot(doomed.id)}
        return {keys.snapshot(doomed.id), *map(keys.manifest, names)} | packs

    def _old(self, needed: set[str], doomed: Collection[str]) -> tuple[float, tuple[Holding, ...]]:
        """Before when an object that nobody reaches must have been put to go, and which dead processes'
        leases that takes for granted."""
        grace = min(self.now - GRACE_S, self.ranks_since)
        old = min([grace, *(one.since for one in self.holding if not one.dead)])
        dead = tuple(one for one in self.holding if one.dead)
        fresh = any(one.since >= grace for one in dead) or any(
            entry.modified_at >= grace
            for key, entry in self.entries.items()
            if key not in needed and key.removeprefix(keys.SNAPSHOTS) not in doomed
        )
        if dead and fresh and GRACE_S > 0:
            # Its keeper may be storing what it was given.
            return min([old, *(one.since for one in dead)]), ()
        return old, tuple(one for one in dead if one.branch)

    def _segments(
        self, reasons: Mapping[str, tuple[str, ...]], branches: Collection[str] | None
    ) -> dict[str, int]:
        """Step log segments that end before the oldest step that stays on their branch."""
        found: dict[str, int] = {}
        for branch, line in self.lines.items():
            if branches is not None and branch not in branches:
                continue
            step = min((one.step for one in line if one.id in reasons), default=0)
            entries = list(self.census.chain.store.list(keys.steplog(branch)))
            segments = [(segment, one) for one in entries if (segment := segment_of(one.key)) is not None]
            for ((writer, _), entry), ((next_writer, next_first), _) in itertools.pairwise(segments):
                if writer == next_writer and next_first <= step:
                    found[entry.key] = entry.size_bytes
        return found

    def _rows(self, reasons: Mapping[str, tuple[str, ...]]) -> Iterator[Row]:
        for branch, line in self.lines.items():
            for one in line:
                yield Row(one.id, branch, one.step, one.taken_at, reasons.get(one.id, ()))


def _may_be_committed(key: str, held: Collection[tuple[str, int]], leases: Leases) -> bool:
    """Whether a writer may still commit what a part record tells of; also one that has taken its lease since
    those were listed."""
    named = part_of(key)
    return named is not None and (named[:2] in held or named[1] > leases.newest(named[0]))


def _line(advances: Sequence[Advance]) -> list[Listed]:
    """Each snapshot once, where its newest record lists it."""
    found: dict[str, Listed] = {}
    for one in advances:
        if one.listed is not None:
            found.setdefault(one.listed.id, one.listed)
    return list(found.values())
