"""Which keeper a run has: a process beside it wherever that can be, or a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from everstep.chain.history import Chain
from everstep.errors import Unsupported
from everstep.keeper.base import Followed, Keeper, Outcome
from everstep.keeper.thread import ThreadKeeper
from everstep.store.base import Addressed, Store
from everstep.store.local import LocalStore


def find(
    chain: Chain,
    branch: str,
    kind: str,
    on_outcome: Callable[[Outcome], None],
    warn: Callable[[str], None],
    replicas: Sequence[Store] = (),
    on_followed: Callable[[Followed], None] = lambda followed: None,
    rank: int = 0,
    ranks: int = 1,
) -> Keeper:
    """The keeper of a branch of a chain, as `kind` says: `process` or `thread`; that of rank 0 sends to
    `replicas` what is new, and tells how they stand. Does not block. A process is the same for all ranks that
    a run has on this machine.

    A store that lives in this process can only be served by a thread. So can a system that lends no memory
    from process to process: this is told.
    """
    if kind == "process" and all(isinstance(one, LocalStore | Addressed) for one in (chain.store, *replicas)):
        from everstep.keeper.client import ProcessKeeper

        try:
            return ProcessKeeper(
                chain,
                on_outcome,
                warn,
                branch=branch,
                rank=rank,
                ranks=ranks,
                replicas=replicas,
                on_followed=on_followed,
            )
        except Unsupported as error:
            warn(f"snapshots are stored by a thread of this process: {error.problem}")
    return ThreadKeeper(chain, on_outcome, warn, replicas, on_followed)
