"""What ranks tell each other of a snapshot under way, through the store alone: each puts one record when its
part is durable, or when it gives up, and rank 0 gathers them.

Nobody waits here for anybody but rank 0, which waits in its keeper and only for so long: a rank that has died
costs a snapshot, and no rank a step.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from everstep.chain.history import Chain, now
from everstep.chain.names import part_of
from everstep.errors import Conflict, Damaged, NotFound, Unavailable
from everstep.format import keys, record
from everstep.format.record import PartRecord
from everstep.store.base import Distant, Store
from everstep.store.deleting import delete_all
from everstep.store.parallel import in_parallel

FIRST_WAIT_S = 0.05
"""Between two looks for parts, at first, for each thousand ranks: so many fit on a page of a listing."""

WAIT_SHARE = 0.05
"""And later this share of the time that was waited already: looks get rarer, and the last comes as much later
than it could at most."""

LONGEST_WAIT_S = 10.0

MAX_WHY_CHARACTERS = 1000
SHOWN_RANKS = 8


@dataclass(frozen=True)
class Take:
    """A snapshot under way: the branch and the number of the lease under which it is to be committed, and
    which take under that lease it is, the same on all ranks and growing."""

    branch: str
    lease: int
    number: int


@dataclass(frozen=True)
class Part:
    """What a rank's part of a snapshot is known by; all of it is durable.

    Sizes are in bytes as in a snapshot record. `approximate` says why a resume of this rank cannot be exact.
    `relies` are the packs (and the manifest, if it is one of them) that were there before it.
    """

    rank: int
    ranks: int
    manifest: str
    state: str
    logical_bytes: int
    new_bytes: int
    stored_bytes: int
    approximate: tuple[str, ...] = ()
    relies: tuple[str, ...] = ()


def announce(chain: Chain, take: Take, part: Part) -> Part:
    """Tell rank 0 that a part is stored. One small put; durable on return.

    Returns:
        The part that counts: that of an earlier try of this rank, where one was told of already.

    Raises:
        Conflict: this rank has given the take up.
        Unavailable: the store does not answer.
        Unsupported: the part relies on more packs than a record can name.
    """
    mine = PartRecord(
        branch=take.branch,
        writer=take.lease,
        take=take.number,
        rank=part.rank,
        ranks=part.ranks,
        manifest=part.manifest,
        state=part.state,
        nonce=secrets.token_hex(8),
        at=now(),
        logical_bytes=part.logical_bytes,
        new_bytes=part.new_bytes,
        stored_bytes=part.stored_bytes,
        approximate=part.approximate,
        relies=part.relies,
    )
    if chain.store.put(mine.key, [record.seal(mine)]):
        return part
    there = read(chain.store, mine.key)
    if there.withdrawn:
        raise Conflict(
            f"rank {part.rank} has given take {take.number} of {chain.url} up ({there.withdrawn})",
            kept="the snapshots before it are intact",
            key=mine.key,
        )
    return _part(there)


def withdraw(chain: Chain, take: Take, rank: int, why: str) -> None:
    """Tell rank 0 that there will be no part of this rank, so that it does not wait for it. One small put;
    durable on return. Nothing happens where the rank's part was told of before.

    Raises:
        Unavailable: the store does not answer.
    """
    mine = PartRecord(
        branch=take.branch,
        writer=take.lease,
        take=take.number,
        rank=rank,
        ranks=rank + 1,
        manifest="",
        state="",
        nonce=secrets.token_hex(8),
        at=now(),
        withdrawn=why[:MAX_WHY_CHARACTERS] or "it says no more",
    )
    chain.store.put(mine.key, [record.seal(mine)])


def gather(
    chain: Chain,
    take: Take,
    ranks: int,
    deadline_s: float,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> list[Part]:
    """The parts of all ranks, in order, when all are stored. Blocks for `deadline_s` at most, and what the
    requests take that are under way then. Lists again and again, ever more seldom, and reads each record
    once. A store that does not answer is asked again until then.

    Raises:
        Unavailable: a rank gave up, or some were not there in time; the message names them.
        Damaged: a part record is not the one that was put, or is of another number of ranks.
    """
    begun = clock()
    prefix = keys.parts(take.branch, take.lease, take.number)
    found: dict[int, Part] = {}
    failed: Unavailable | None = None
    while True:
        try:
            gone = _look(chain.store, prefix, ranks, found)
        except Unavailable as error:
            gone, failed = [], error
        if gone:
            raise _withdrawn(gone)
        if len(found) == ranks:
            return [found[rank] for rank in range(ranks)]
        spent = clock() - begun
        if spent >= deadline_s:
            missing = [rank for rank in range(ranks) if rank not in found]
            raise _late(missing, ranks, deadline_s) from failed
        pause = max(FIRST_WAIT_S * (1 + ranks // 1000), min(LONGEST_WAIT_S, spent * WAIT_SHARE))
        wait(min(pause, deadline_s - spent))


def clear(chain: Chain, take: Take) -> None:
    """Take away the records of a take that was committed or given up, of those before it, and of former
    writers of its branch: nobody needs them. A listing, and as few deletes as the store can do it with.

    Raises:
        Unavailable: the store does not answer; what is left is taken away next time.
    """
    gone = []
    for entry in chain.store.list(keys.parts(take.branch)):
        named = part_of(entry.key)
        if named is not None and (named[1] < take.lease or named[1:3] <= (take.lease, take.number)):
            gone.append(entry.key)
    delete_all(chain.store, gone)


def read(store: Store, key: str) -> PartRecord:
    """The part record at `key`. Raises NotFound, Damaged, Unsupported."""
    try:
        return record.unseal(store.get(key, 0, record.MAX_RECORD_BYTES + 1), PartRecord, key)
    except Damaged as error:
        error.key = key
        raise


def _look(store: Store, prefix: str, ranks: int, found: dict[int, Part]) -> list[PartRecord]:
    """Add the parts that are new; returns the records of those who gave up."""
    fresh, gone = [], []
    for entry in store.list(prefix):
        named = part_of(entry.key)
        if named is not None and named[3] not in found:
            fresh.append(entry.key)

    def get(key: str) -> None:
        try:
            one = read(store, key)
        except NotFound:
            return
        if one.withdrawn:
            gone.append(one)
        elif one.ranks != ranks:
            raise Damaged(f"{key} is of rank {one.rank} of {one.ranks}, not of {ranks}", key=key)
        else:
            found[one.rank] = _part(one)

    in_parallel(fresh, store.at_once if isinstance(store, Distant) else 1, lambda: get)
    return gone


def _part(one: PartRecord) -> Part:
    return Part(
        rank=one.rank,
        ranks=one.ranks,
        manifest=one.manifest,
        state=one.state,
        logical_bytes=one.logical_bytes,
        new_bytes=one.new_bytes,
        stored_bytes=one.stored_bytes,
        approximate=one.approximate,
        relies=one.relies,
    )


def _withdrawn(gone: Sequence[PartRecord]) -> Unavailable:
    first = min(gone, key=lambda one: one.rank)
    others = f" ({len(gone) - 1} more gave up, too)" if len(gone) > 1 else ""
    return Unavailable(
        f"rank {first.rank} could not store its part of the snapshot{others}: {first.withdrawn}",
        kept="the snapshots before it are intact",
        next="nothing: the next snapshot is taken as usual",
        key=first.key,
    )


def _late(missing: Sequence[int], ranks: int, deadline_s: float) -> Unavailable:
    shown = ", ".join(map(str, missing[:SHOWN_RANKS]))
    more = f" and {len(missing) - SHOWN_RANKS} others" if len(missing) > SHOWN_RANKS else ""
    return Unavailable(
        f"of {ranks} ranks {len(missing)} had not stored their part of the snapshot after {deadline_s:g} s "
        f"({shown}{more})",
        kept="the snapshots before it are intact",
        next="nothing, if they are only slow: the next snapshot is taken as usual",
    )
