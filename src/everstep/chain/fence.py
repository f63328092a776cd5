"""Fences: head records that list nothing and only take a number, so that nobody else can ever have it.

A writer that was stalled right before it put its head record, and was replaced meanwhile, has passed all
checks: only that its number is taken stops it. The record that took it may be pruned, and the number would be
free again. So who takes a branch over from a writer that never released it first puts a fence there, which
no prune takes away.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from everstep.chain import lease
from everstep.chain.history import Chain, now
from everstep.chain.lease import Lease
from everstep.errors import Damaged, NotFound, Unsupported
from everstep.format import keys, record
from everstep.format.record import NO_SNAPSHOT, HeadRecord, Move
from everstep.store.base import Buffer, Store


def fence_former(chain: Chain, mine: Lease) -> None:
    """Make sure that no former writer of the lease's branch commits any more; durable on return. Where none
    may, which is the rule, nothing is written.

    Raises:
        Fenced: the lease was lost.
    """
    newest = _newest(chain, mine.branch)
    floor = newest.writer if newest is not None else 0
    if lease.may_be_followed_late(chain.store, mine.branch, floor, mine.number):
        put_fence(chain, mine)


def put_fence(chain: Chain, mine: Lease, move: Move | UnsetType = UNSET) -> HeadRecord:
    """Put a fence on the lease's branch; durable on return. Raises Fenced."""
    while True:
        newest = _newest(chain, mine.branch)
        fence = HeadRecord(
            snapshot=newest.snapshot if newest is not None else NO_SNAPSHOT,
            step=newest.step if newest is not None else 0,
            writer=mine.number,
            nonce=secrets.token_hex(8),
            at=now(),
            branch=mine.branch,
            number=chain.head_number(mine.branch) + 1,
            move=move,
            fence=True,
        )
        mine.check()
        # Where the former one was faster, it has committed once more, and that is its last.
        if chain.store.put(fence.key, [record.seal(fence)]):
            return fence


def fence_at(store: Store, mine: Lease, number: int, before: Sequence[Buffer]) -> None:
    """Put a fence with this number behind a head record whose bytes are `before`, unless somebody else has
    just taken the number. Durable on return. Raises Fenced, Damaged."""
    key = keys.numbered(keys.head(mine.branch), number - 1)
    former = record.unseal(b"".join(before), HeadRecord, key)
    fence = HeadRecord(
        snapshot=former.snapshot,
        step=former.step,
        writer=mine.number,
        nonce=secrets.token_hex(8),
        at=now(),
        branch=mine.branch,
        number=number,
        fence=True,
    )
    mine.check()
    store.put(fence.key, [record.seal(fence)])


def _newest(chain: Chain, branch: str) -> HeadRecord | None:
    """The newest head record, a fence too; None where there is none that can be read."""
    number = chain.head_number(branch)
    key = keys.numbered(keys.head(branch), number)
    try:
        return record.unseal(chain.store.get(key), HeadRecord, key) if number else None
    except (Damaged, NotFound, Unsupported):
        return None
