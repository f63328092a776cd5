"""Taking many objects away at once."""

from __future__ import annotations

from collections.abc import Sequence

from everstep.store.base import Clearing, Distant, Store
from everstep.store.parallel import in_parallel


def delete_all(store: Store, keys: Sequence[str]) -> None:
    """Delete objects of which none is needed for another: in no order, with few requests where the store can,
    several at once where each takes its time. Raises Unavailable when one could not be; others may be gone
    then."""
    if isinstance(store, Clearing):
        store.clear(keys)
    else:
        in_parallel(keys, store.at_once if isinstance(store, Distant) else 1, lambda: store.delete)
