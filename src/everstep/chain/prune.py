"""Dropping snapshots that are not to stay: first a plan, then its execution, in an order that a crash at any
point leaves harmless (head records first, so that nothing listed ever lacks a part).

Others may be at work meanwhile. What this relies on is told in docs/decisions/0016-prune.md:

* A prune writes down what is doomed, then looks once more at what is relied on, then deletes (`doomed`).
* What nothing reaches is left alone while it may belong to a snapshot that is being written: when it is
  younger than the grace window, or than a lease whose writer may still commit. Ages are by the store's clock.
* A manifest that is left alone keeps the packs that it names.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from everstep.chain.census import Advance, Census
from everstep.chain.doomed import Announced, announce
from everstep.chain.fence import fence_former
from everstep.chain.history import Chain
from everstep.chain.lease import Holding, Lease, Leases
from everstep.chain.names import is_object, segment_of
from everstep.chain.retention import Keep, Listed, staying
from everstep.errors import Conflict, Damaged, EverstepError, Fenced
from everstep.format import keys

__all__ = ["GRACE_S", "Done", "Keep", "Plan", "Row", "consider", "execute", "plan", "prune"]

GRACE_S = 3600.0
"""Unreachable objects younger than this may belong to a snapshot that is just being written."""

MAX_NAMES = 50_000
"""So many names go into one record of a prune, which stays below `record.MAX_RECORD_BYTES`."""


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
class Plan:
    """What is to go.

    Attributes:
        sizes: in bytes, of all objects that go, in the order in which they are deleted.
        snapshots: the ids that go.
        rows: all that is listed, by branch, newest first.
        more: whether this is a part, and another plan has to follow.
        mine: the lease of who prunes, if it has one.
        dead: leases of dead processes of this machine, which are to be fenced before anything goes.
        again: makes the same plan once more, at a time by the store's clock.
    """

    sizes: Mapping[str, int]
    snapshots: tuple[str, ...]
    rows: tuple[Row, ...]
    more: bool
    mine: Lease | None
    dead: tuple[Holding, ...]
    again: Callable[[float], Plan] = field(repr=False, compare=False)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    @property
    def packs(self) -> frozenset[str]:
        """The names of the packs that go."""
        return frozenset(self.names(keys.PACKS))

    @property
    def freed_bytes(self) -> int:
        return sum(self.sizes.values())

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
    now: float | None = None,
) -> Plan:
    """What is to go. Reads the chain and changes nothing.

    Args:
        keep: the policy.
        branches: whose snapshots may go; None: all branches'.
        window_s: snapshots that were listed so short a time ago stay.
        mine: the lease of who asks, whose own writer is writing nothing now.
        census: what it has read before need not be read again.
        now: by the store's clock, in seconds since 1970; by this machine's where it is not given: good enough
            to look, not to delete (`execute` asks the store).

    Raises:
        Damaged: something that stays cannot be read, so that it is not known what it needs: nothing may go.
        Unsupported: a newer version wrote something here: likewise.
    """
    census = census or Census(chain)
    again = partial(consider, chain, keep, branches=branches, window_s=window_s, mine=mine, census=census)
    for _ in range(MAX_LOOKS):
        look = _Look(census, mine, time.time() if now is None else now)
        try:
            return _planned(look, keep, branches, window_s, lambda at: again(now=at))
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
    again: Callable[[float], Plan],
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
    """What a prune has deleted. `records` are the numbers of its own records."""

    keys: tuple[str, ...]
    freed_bytes: int
    records: list[int]


def execute(chain: Chain, plan: Plan) -> Done:
    """Delete what the plan names, but for what somebody has begun to rely on since it was made. May be
    interrupted at any point, and another prune goes on with it.

    Blocks for a request or two for each object that goes; they are durably gone on return.

    Raises:
        Fenced: the lease was lost; nothing was deleted.
        Damaged, Unsupported: as `consider`; nothing was deleted.
        Conflict: this process was stopped for so long that others do not count on it any more.
    """
    announced = announce(chain.store, plan.snapshots, plan.names(keys.MANIFESTS), plan.names(keys.PACKS))
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
) -> Iterator[Done]:
    """Plan and execute until nothing more is to go; a very long chain takes several rounds, and each is given
    when it is done. See `consider` and `execute`."""
    census = census or Census(chain)
    more = True
    while more:
        found = consider(chain, keep, branches=branches, window_s=window_s, census=census)
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
        left = plan.again(announced.at).sizes
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

    def __init__(self, census: Census, mine: Lease | None, now: float) -> None:
        self.census = census
        self.mine = mine
        self.now = now
        store = census.chain.store
        leases = Leases(store)
        self.advances = census.advances()
        self.tags = census.chain.tags()
        self.entries = {
            entry.key: entry
            for prefix in (keys.SNAPSHOTS, keys.MANIFESTS, keys.PACKS)
            for entry in store.list(prefix)
            if is_object(entry.key)
        }
        census.forget_manifests(but=self.entries.keys())
        floors = {branch: max(one.writer for one in line[:1]) for branch, line in self.advances.items()}
        self.holding = [
            one
            for one in leases.holding(floors)
            if mine is None or (one.branch, one.number) != (mine.branch, mine.number)
        ]
        self.lines = {branch: _line(advances) for branch, advances in self.advances.items()}

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
        again: Callable[[float], Plan],
    ) -> Plan:
        doomed = {one.listed.id: one.listed for one in going if one.listed is not None and not one.damage}
        # Some may have to wait for the next plan.
        listed = {one.id for line in self.lines.values() for one in line if one.step >= 0}
        needed: set[str] = set()
        for id in sorted((listed | set(reasons)) - doomed.keys()):
            wanted = self.census.objects if id in reasons else self.census.readable_objects
            needed |= wanted(id)
        old, dead = self._old(needed, doomed)
        ours = {key for one in doomed.values() if one.listed_at >= old for key in self._ours(one)}
        for key, entry in self.entries.items():
            if (
                key.startswith(keys.SNAPSHOTS)
                and entry.modified_at >= old
                and key not in needed
                and key not in ours
            ):
                # Of a writer at work, perhaps: all that it is about to commit is put.
                needed |= self.census.readable_objects(key.removeprefix(keys.SNAPSHOTS))
        gone = {
            key: entry.size_bytes
            for key, entry in self.entries.items()
            if key not in needed and (key in ours or entry.modified_at < old)
        }
        heads = {one.key: one.size_bytes for one in going}
        return Plan(
            sizes={**heads, **gone, **self._segments(reasons, branches)},
            snapshots=tuple(sorted(doomed)),
            rows=tuple(self._rows(reasons)),
            more=False,
            mine=self.mine,
            dead=dead
            if any(self.entries[key].modified_at >= one.since for one in dead for key in gone)
            else (),
            again=again,
        )

    def _ours(self, doomed: Listed) -> set[str]:
        return self.census.readable_objects(doomed.id)

    def _old(self, needed: set[str], doomed: Collection[str]) -> tuple[float, tuple[Holding, ...]]:
        """Before when an object that nobody reaches must have been put to go, and which dead processes'
        leases that takes for granted."""
        grace = self.now - GRACE_S
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


def _line(advances: Sequence[Advance]) -> list[Listed]:
    """Each snapshot once, where its newest record lists it."""
    found: dict[str, Listed] = {}
    for one in advances:
        if one.listed is not None:
            found.setdefault(one.listed.id, one.listed)
    return list(found.values())
