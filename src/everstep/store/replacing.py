"""Putting good bytes in the place of damaged ones, in a store that overwrites nothing."""

from __future__ import annotations

from collections.abc import Sequence

from blake3 import blake3

from everstep.store.base import Buffer, Redundant, Store, is_key

SPARES = "repair/"
"""Below it lie good bytes while the damaged ones are being replaced: `repair/<their digest>/<the key>`."""


def spare_of(key: str, parts: Sequence[Buffer]) -> str:
    """Where the bytes wait that are to become the object `key`."""
    made = blake3()
    for part in parts:
        made.update(part)
    name = f"{SPARES}{made.hexdigest()}"
    return f"{name}/{key}" if is_key(f"{name}/{key}") else name


def key_of_spare(spare: str) -> str | None:
    """The object that a spare was to become; None where the name tells none."""
    return spare.removeprefix(SPARES).partition("/")[2] or None


def replace(store: Store, key: str, parts: Sequence[Buffer]) -> None:
    """Make `parts`, of which the caller knows that they are right, the object `key`; durable on return.

    Where another stands there, it is taken away only once the right bytes are durable under another name. So
    whatever instant this is killed at, the damaged object, the right one or the spare is there, and who does
    it again comes to the same end. For an instant there is no such object: where others might then create one
    of their own, see to that before.
    """
    # In a store of several members some may still hold a part of another.
    stands = isinstance(store, Redundant) or any(one.key == key for one in store.list(key, limit=1))
    if not stands and store.put(key, parts):
        return
    spare = spare_of(key, parts)
    if not store.put(spare, parts) and not holds(store, spare, parts):
        store.delete(spare)
        store.put(spare, parts)
    store.delete(key)
    store.put(key, parts)
    store.delete(spare)


def holds(store: Store, key: str, parts: Sequence[Buffer]) -> bool:
    """Whether the object is these bytes. Raises NotFound where there is none."""
    size = sum(map(len, parts))
    return bytes(store.get(key, 0, size + 1)) == b"".join(parts)
