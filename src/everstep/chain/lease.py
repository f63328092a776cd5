"""Who may write a branch of a chain: the holder of its newest lease, whose number grows with every writer.

A writer that lost its lease finds a higher number before it commits, and stops. Leases advance as heads do,
by exclusively creating the next number, so that two writers never hold the same one. Writers of different
branches do not meet. A chain of version 0.2 has one lease for all branches: it counts for each of them.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from everstep.chain import names
from everstep.chain.history import MAIN, now
from everstep.errors import Conflict, Damaged, Fenced, NotFound
from everstep.format import keys, record
from everstep.format.record import LeaseRecord
from everstep.store.base import Entry, Store

_OF_ALL_BRANCHES = keys.LEASES + "ffff"
"""The leases of version 0.2 begin so: they count down from the largest number."""


class Holder(Protocol):
    """A process, as a record names it."""

    @property
    def host(self) -> str: ...
    @property
    def boot(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def started(self) -> int: ...


class Lease:
    """The right to write a branch, from `take` to `release` or until another takes it."""

    def __init__(self, store: Store, number: int, branch: str = MAIN) -> None:
        self.store = store
        self.number = number
        self.branch = branch

    @classmethod
    def take(cls, store: Store, branch: str = MAIN, above: int = 0) -> Lease:
        """Become the writer; durable on return. A few small requests.

        Args:
            above: the number is to be higher: a writer that has it holds the branch elsewhere.

        Raises:
            Conflict: a living process of this machine is the writer. (A writer on another machine cannot
                be asked; it is fenced when it comes to its next commit.)
        """
        while True:
            refuse_living(store, branch)
            _retire_that_of_all_branches(store)
            mine = _owner(os.getpid(), max(newest(store, branch), above) + 1, branch)
            if store.put(mine.key, [record.seal(mine)]):
                return cls(store, mine.number, branch)

    def check(self) -> None:
        """Raises Fenced when another has become the writer. Two listings."""
        number = newest(self.store, self.branch)
        if number > self.number:
            raise Fenced(
                f"writer {number} has taken branch {self.branch!r} of {self.store.url} over from this one, "
                f"writer {self.number}",
                kept="nothing was changed, and all that was committed is intact",
                next=f"everstep -r {self.store.url} log",
            )

    def release(self) -> None:
        """Let the next writer in without a question; nothing happens when the lease was lost."""
        nobody = _owner(0, self.number + 1, self.branch)
        self.store.put(nobody.key, [record.seal(nobody)])


def newest(store: Store, branch: str = MAIN) -> int:
    """The number of a branch's newest lease, 0 where there was none."""
    return max(names.newest(store, keys.lease(branch)), _newest_of_all_branches(store))


def _newest_of_all_branches(store: Store) -> int:
    """That of version 0.2, 0 where it never wrote here."""
    found = (entry.key for entry in store.list(_OF_ALL_BRANCHES))
    return next(
        (keys.number_of(key) or 0 for key in found if names.is_object(key) and key.count("/") == 1), 0
    )


def refuse_living(store: Store, branch: str = MAIN) -> None:
    """Raises Conflict when a living process of this machine is the writer of the branch."""
    for number, key in _newest_keys(store, branch):
        holder = _holder(store, key) if number else None
        # Nobody yet, or nobody that can be asked: its next commit will be fenced.
        if holder is None or not _lives(holder):
            continue
        who = "this process" if holder.pid == os.getpid() else f"process {holder.pid} on this machine"
        raise Conflict(
            f"branch {branch!r} of {store.url} is being written by {who} (since {holder.at})",
            kept="nothing was touched",
            next="run.close()"
            if holder.pid == os.getpid()
            else f"kill {holder.pid}  # it takes a last snapshot",
        )


def refuse_unreleased(store: Store, branch: str, newest_one: LeaseRecord | None = None) -> None:
    """For who must not take a lease from anybody, on any machine: raises Conflict unless the newest lease
    of the branch was released, or was a process of this machine that is dead.

    Args:
        newest_one: the newest lease, where the caller knows better what is in it than the store.
    """
    number = names.newest(store, keys.lease(branch))
    holder = newest_one or (_holder(store, keys.numbered(keys.lease(branch), number)) if number else None)
    refuse_living(store, branch)
    if not number or (holder is not None and (not holder.pid or is_of_this_machine(holder))):
        return
    who = f"process {holder.pid} on {holder.host}" if holder is not None else "somebody"
    raise Conflict(
        f"branch {branch!r} of {store.url} may be being written by {who}",
        kept="nothing was touched",
        next=f"everstep -r {store.url} repair, when that has ended or taken its next snapshot",
    )


def _newest_keys(store: Store, branch: str) -> list[tuple[int, str]]:
    """Number and key of the branch's own newest lease, and of that of all branches."""
    own, of_all = names.newest(store, keys.lease(branch)), _newest_of_all_branches(store)
    return [(own, keys.numbered(keys.lease(branch), own)), (of_all, keys.numbered(keys.LEASES, of_all))]


def _holder(store: Store, key: str) -> LeaseRecord | None:
    """Who a lease names; None where that cannot be read."""
    try:
        return record.unseal(store.get(key, 0, record.MAX_RECORD_BYTES + 1), LeaseRecord, key)
    except (NotFound, Damaged):
        return None


def _retire_that_of_all_branches(store: Store) -> None:
    """A writer of version 0.2 looks for a newer lease in its own place only: it is to find one there."""
    number = _newest_of_all_branches(store)
    holder = _holder(store, keys.numbered(keys.LEASES, number)) if number else None
    if number and (holder is None or holder.pid):
        nobody = _owner(0, number + 1, "")
        store.put(nobody.key, [record.seal(nobody)])


# -- who may still commit ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holding:
    """A lease whose writer may still commit to its branch. `since` is by the store's clock; `dead`: it was a
    process of this machine, and is no more."""

    branch: str
    number: int
    since: float
    dead: bool


class Leases:
    """The leases there were when this was made: by one listing. Of each no more is read than is asked for."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._found: dict[str, dict[int, Entry]] = defaultdict(dict)
        for entry in store.list(keys.LEASES):
            number = keys.number_of(entry.key)
            if names.is_object(entry.key) and number is not None:
                branch = entry.key[len(keys.LEASES) :].rpartition("/")[0]
                self._found[branch][number] = entry

    def newest(self, branch: str) -> int:
        """The number of a branch's newest lease, 0 where there was none."""
        return max(self._found.get(branch, {0: None}))

    def since(self, branch: str, number: int) -> float | None:
        """When a lease was taken, by the store's clock; None where there is no record of it."""
        found = self._found.get(branch, {}).get(number)
        return None if found is None else found.modified_at

    def holding(self, floors: Mapping[str, int]) -> list[Holding]:
        """Those whose writers may still commit: not released, and of no writer whose successor has committed.

        Args:
            floors: by branch, the writer of its newest head record: those before it cannot commit any more.
        """
        held = []
        for branch, entries in self._found.items():
            # Of those of version 0.2 the newest alone may be at work.
            floor = floors.get(branch, 0) if branch else max(entries)
            held += _held(branch, {n: one for n, one in entries.items() if n >= floor}, self._store)
        return held


def _held(branch: str, entries: dict[int, Entry], store: Store) -> list[Holding]:
    held = []
    holders = {number: _holder(store, entry.key) for number, entry in entries.items()}
    for number, entry in entries.items():
        holder, follower = holders[number], holders.get(number + 1)
        released = follower is not None and follower.pid == 0
        if released or (holder is not None and holder.pid == 0):
            continue
        dead = holder is not None and is_of_this_machine(holder) and not _lives(holder)
        held.append(Holding(branch, number, entry.modified_at, dead))
    return held


def may_be_followed_late(store: Store, branch: str, floor: int, number: int) -> bool:
    """Whether a writer before `number`, not before `floor`, may still put a head record that it had begun to
    put when `number` was taken: one that never released its lease. A few small requests."""
    if floor >= number:
        return False
    entries = [entry for entry in store.list(keys.lease(branch)) if names.is_object(entry.key)]
    entries += [entry for entry in store.list(_OF_ALL_BRANCHES) if names.is_object(entry.key)]
    numbered = {keys.number_of(entry.key) or 0: entry for entry in entries}
    former = {n: entry for n, entry in numbered.items() if floor <= n < number}
    return bool(_held(branch, former, store))


# -- processes ---------------------------------------------------------------------------------------------


def is_of_this_machine(holder: Holder) -> bool:
    return (holder.host, holder.boot) == (socket.gethostname(), _boot())


def lives_here(holder: Holder) -> bool:
    """Whether it is a living process of this machine."""
    return _lives(holder)


def _owner(pid: int, number: int, branch: str) -> LeaseRecord:
    host, boot, _, started = process(pid)
    return LeaseRecord(
        host=host,
        boot=boot,
        pid=pid,
        started=started,
        nonce=secrets.token_hex(8),
        at=now(),
        number=number,
        branch=branch or msgspec.UNSET,
    )


def process(pid: int) -> tuple[str, str, int, int]:
    """A process of this machine as records name it: host, boot, pid, start."""
    return socket.gethostname(), _boot(), pid, _started(pid) or 0


def _lives(holder: Holder) -> bool:
    """Whether the holder is a living process of this machine, and not another with its recycled number."""
    if holder.pid == 0 or not is_of_this_machine(holder):
        return False
    started = _started(holder.pid)
    return started is not None and started == holder.started


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """The start time of a process in clock ticks since the machine's start; None when there is none."""
    if pid == 0:
        return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return _started_elsewhere(pid)
    fields = stat.rpartition(")")[2].split()
    # A zombie has ended; nobody has collected it yet.
    return None if fields[0] in "ZX" else int(fields[19])


def _started_elsewhere(pid: int) -> int | None:
    """Without /proc only the number can be asked for."""
    if Path("/proc/self").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0
