"""Where a chain's replicas are, as its last writer was told, and which chain a replica is one of: a small
record in the chain's own store."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence

from everstep.chain import names
from everstep.chain.history import Chain, now
from everstep.errors import Damaged, NotFound
from everstep.format import keys, record
from everstep.format.record import ReplicasRecord
from everstep.store.base import Addressed, Store
from everstep.store.local import LocalStore


def address_of(store: Store) -> str:
    """What a store is opened by in any directory and process of this machine; "" where it cannot be."""
    if isinstance(store, LocalStore):
        return os.path.realpath(store.root)
    return store.address if isinstance(store, Addressed) else ""


def remember(chain: Chain, stores: Sequence[Store]) -> None:
    """Write down where the replicas are, unless the newest record says just that. Durable on return. Stores
    of this process alone cannot be found again, and are left out."""
    _say(chain, tuple(url for url in map(address_of, stores) if url), "")


def remembered(chain: Chain) -> tuple[str, ...]:
    """The addresses of the replicas; none where that was never written down or cannot be read."""
    return _newest(chain)[0]


def note_source(replica: Chain, source: Chain) -> None:
    """Write down in a replica what it is one of: as long as nobody goes on in the replica itself. Durable on
    return."""
    _say(replica, (), address_of(source.store) or source.url)


def source_of(chain: Chain) -> str:
    """The address of the chain that this is a replica of; "" where it is none, or nobody knows."""
    return _newest(chain)[1]


def _say(chain: Chain, urls: tuple[str, ...], source: str) -> None:
    while (urls, source) != _newest(chain):
        number = names.newest(chain.store, keys.REPLICAS) + 1
        made = ReplicasRecord(urls, secrets.token_hex(8), now(), number, source)
        if chain.store.put(made.key, [record.seal(made)]):
            return


def _newest(chain: Chain) -> tuple[tuple[str, ...], str]:
    number = names.newest(chain.store, keys.REPLICAS)
    key = keys.numbered(keys.REPLICAS, number)
    try:
        data = chain.store.get(key, 0, record.MAX_RECORD_BYTES + 1) if number else b""
        found = record.unseal(data, ReplicasRecord, key) if number else None
    except (Damaged, NotFound):
        return (), ""
    return (found.urls, found.source) if found is not None else ((), "")
