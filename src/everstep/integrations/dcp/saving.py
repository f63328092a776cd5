"""What a process knows of a chain that it saves to: kept from one save to the next, outside of the writers,
which are pickled into another process or made anew for each.

A lease is held only while a snapshot is committed, so that the trainer may save, and the process that it has
its asynchronous saves done by. That nobody else has come in between is looked at all the same.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from everstep.chain import lease as leases
from everstep.chain import prune
from everstep.chain.history import Chain, Snapshot
from everstep.chain.lease import Holder, Lease
from everstep.chain.parts import Part
from everstep.chain.retention import Keep
from everstep.chain.writer import Captured, Facts, Writer
from everstep.errors import Damaged, EverstepError, Fenced, NotFound, Unavailable
from everstep.format import keys, record
from everstep.format.layout import Layout, Slice, lay_out
from everstep.format.manifest import Manifest
from everstep.format.record import LeaseRecord
from everstep.integrations.dcp import verified
from everstep.store.base import Store
from everstep.store.urls import open_store

Place: TypeAlias = "str | Store"


@dataclass(frozen=True)
class Seat:
    """Which rank of how many one is in a save."""

    rank: int = 0
    ranks: int = 1


class Saving:
    """One rank's side of a branch. Saves may overlap: a part is stored after the other, and a commit does not
    wait for what is stored meanwhile."""

    def __init__(self, chain: Chain, branch: str, seat: Seat) -> None:
        self.chain = chain
        self.branch = branch
        self.seat = seat
        self._writer = Writer(chain, Lease(chain.store, 0, branch), branch)
        self._storing, self._committing = threading.Lock(), threading.Lock()
        self._layout: Layout | None = None
        self._stored: dict[str, Manifest] = {}
        """Of a single rank: what is not committed, by name."""
        self._good = verified.part_of(chain, branch, seat.rank, seat.ranks)
        """What the next part may share, if it is not known to the writer."""

    def layout(self, slices: Sequence[Slice]) -> Layout:
        """The same object as long as the slices are the same: then less is to be told anew."""
        if self._layout is None or self._layout.slices != tuple(slices):
            self._layout = lay_out(slices)
        return self._layout

    def next_step(self) -> int:
        """That of a snapshot of which nobody says it: one after the newest."""
        newest = next(self.chain.heads(self.branch), None)
        return 0 if newest is None else newest.step + 1

    def store(self, captured: Captured) -> Part:
        """Store this rank's part of a snapshot; durable on return."""
        with self._storing:
            good, self._good = self._good, None
            if good is not None:
                self._writer.build_on(good)
            # Whether the last part was committed is not known here, nor what was pruned since.
            self._writer.look_again()
            part = self._writer.store_part(captured, self.seat.rank, self.seat.ranks)
            if self.seat.ranks == 1:
                # Several ranks share with their last part anyway.
                assert self._writer.stored is not None
                self._stored = {part.manifest: self._writer.stored}
            return part

    def commit(self, parts: Sequence[Part], facts: Facts, keep: Keep) -> Snapshot:
        """Make the parts a snapshot, the head of the branch; then drop what is not to stay.

        Raises:
            Conflict: another process of this machine is at it.
            Fenced: somebody else has saved to this branch since this process has.
        """
        with self._committing:
            lease = _taken(self.chain, self.branch)
            try:
                writer = Writer(self.chain, lease, self.branch, self._parent())
                snapshot = writer.commit(parts, facts)
                self._good = self._stored.pop(parts[0].manifest, None)
                if keep != ALL:
                    self._tidy(lease, keep)
            finally:
                _give_back(self.chain, lease)
            return snapshot

    def _parent(self) -> str:
        """The newest snapshot that can be read: a save does not fail for a damaged one before it."""
        newest = next(self.chain.snapshots(self.branch), None)
        return "" if newest is None else newest.id

    def _tidy(self, lease: Lease, keep: Keep) -> None:
        """A failure is told, and the snapshot stands."""
        try:
            plan = prune.plan(self.chain, keep, branches=[self.branch], mine=lease)
            if plan is not None:
                prune.execute(self.chain, plan)
        except EverstepError as error:
            warnings.warn(str(error), stacklevel=2)


ALL = Keep.parse("all")

_savings: dict[tuple[object, ...], Saving] = {}
_left: dict[tuple[object, ...], int] = {}
"""The number of the lease that this process gave back last, by branch."""

_kept: dict[tuple[object, ...], int] = {}
"""That of one that it could not give back, because the store was away; or `_IN_DOUBT`, where it may have one:
it asked for it, and got no answer."""

_IN_DOUBT = -1

_lock = threading.Lock()


def saving(place: Place, branch: str, seat: Seat) -> Saving:
    """What this process knows of a branch. One small request: what it knew of another chain, which was here
    before, is of no use. Raises NotFound where there is no chain."""
    chain = Chain(open_store(place))
    with _lock:
        key = (os.getpid(), place if isinstance(place, str) else id(place), branch, seat)
        known = _savings.get(key)
        if known is None or known.chain.about.chain != chain.about.chain:
            known = _savings[key] = Saving(chain, branch, seat)
        return known


def _here(chain: Chain, branch: str) -> tuple[object, ...]:
    return (os.getpid(), chain.about.chain, branch)


def _taken(chain: Chain, branch: str) -> Lease:
    """The lease of a branch, for one commit."""
    here, store = _here(chain, branch), chain.store
    kept = _kept.get(here)
    if kept is not None:
        newest = leases.newest(store, branch)
        if newest == kept or (kept == _IN_DOUBT and _is_this_process(_holder(store, branch, newest))):
            return Lease(store, newest, branch)
    _refuse_replaced(store, branch, _left.get(here))
    try:
        return Lease.take(store, branch)
    except Unavailable:
        _kept[here] = _IN_DOUBT
        raise


def _give_back(chain: Chain, lease: Lease) -> None:
    here = _here(chain, lease.branch)
    try:
        lease.release()
    except Unavailable:
        # What was committed is committed. The next save of this process goes on under it.
        _kept[here] = lease.number
    else:
        _kept.pop(here, None)
        _left[here] = lease.number + 1


def refuse_busy(chain: Chain, branch: str) -> None:
    """Raises Conflict where another process of this machine writes to a branch, or a run of this one."""
    if _here(chain, branch) not in _kept:
        leases.refuse_living(chain.store, branch)


# -- who has saved meanwhile -------------------------------------------------------------------------------


def _refuse_replaced(store: Store, branch: str, left: int | None) -> None:
    """Raises Fenced where somebody else has had the branch since this process gave its lease back: a job that
    was thought dead does not go on beside the one that took its place."""
    if left is None:
        return
    for number in range(left + 1, leases.newest(store, branch) + 1):
        holder = _holder(store, branch, number)
        if holder is not None and holder.pid and not _is_of_this_job(holder):
            raise Fenced(
                f"branch {branch!r} of {store.url} was written by process {holder.pid} on {holder.host} "
                f"since this one saved (at {holder.at})",
                kept="nothing was changed, and all that was committed is intact",
                next=f"everstep -r {store.url} log",
            )


def _holder(store: Store, branch: str, number: int) -> LeaseRecord | None:
    """Who a lease names; None where that cannot be read."""
    key = keys.numbered(keys.lease(branch), number)
    try:
        return record.unseal(store.get(key, 0, record.MAX_RECORD_BYTES + 1), LeaseRecord, key)
    except (NotFound, Damaged):
        return None


def _is_this_process(holder: LeaseRecord | None) -> bool:
    return holder is not None and holder.pid == os.getpid() and leases.lives_here(holder)


def _is_of_this_job(holder: Holder) -> bool:
    """This process, its parent, or a child of one of them: one of them does the asynchronous saves. One of
    this machine that has ended is taken for one, too."""
    if not leases.is_of_this_machine(holder):
        return False
    if not leases.lives_here(holder):
        return True
    family = {os.getpid(), os.getppid()}
    return holder.pid in family or _parent_of(holder.pid) in family


def _parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0
