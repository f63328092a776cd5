"""Which keys of a store are objects of a chain.

What else lies in its place (`.DS_Store`, a copy made by hand, what NFS leaves of an open file) is foreign:
nobody stumbles over it, and nobody deletes it.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from everstep.format import keys
from everstep.store.base import Store

_NAME = "[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"
_NUMBER = "[0-9a-f]{16}"
_DIGEST = "[0-9a-f]{64}"
_SEGMENT = re.compile(f"{keys.STEPLOG}{_NAME}/({_NUMBER})/({_NUMBER})")
_PART = re.compile(f"{keys.PARTS}({_NAME})/({_NUMBER})/({_NUMBER})/({_NUMBER})")
_OBJECT = re.compile(
    "|".join(
        [
            re.escape(keys.CHAIN),
            f"{keys.PACKS}([0-9a-f]{{2}})/\\1[0-9a-f]{{62}}",
            f"(?:{keys.MANIFESTS}|{keys.SNAPSHOTS}){_DIGEST}",
            f"(?:{keys.HEADS}|{keys.TAGS}){_NAME}/{_NUMBER}",
            f"{keys.LEASES}(?:{_NAME}/)?{_NUMBER}",
            f"(?:{keys.PRUNES}|{keys.RELOCATIONS}|{keys.REPLICAS}){_NUMBER}",
            _SEGMENT.pattern.replace("(", "(?:"),
            _PART.pattern.replace("(", "(?:"),
        ]
    )
)


MANY = 32


def is_object(key: str) -> bool:
    """Whether `key` can name an object of a chain."""
    return _OBJECT.fullmatch(key) is not None


def newest(store: Store, prefix: str) -> int:
    """The number of the newest numbered record under `prefix`, 0 where there is none.

    One listing of one entry where nothing foreign sorts before it.
    """
    for limit in (1, None):
        for entry in store.list(prefix, limit=limit):
            if is_object(entry.key) and "/" not in entry.key[len(prefix) :]:
                return keys.number_of(entry.key) or 0
    return 0


def exists(store: Store, key: str) -> bool:
    """Whether there is such an object. One listing of one entry."""
    return any(entry.key == key for entry in store.list(key, limit=1))


def missing(store: Store, prefix: str, wanted: Collection[str]) -> set[str]:
    """Those of the keys under a prefix of which there is no object. A listing of one entry for each; of
    many, one of all that is there."""
    if len(wanted) < MANY:
        return {key for key in wanted if not exists(store, key)}
    return set(wanted) - {entry.key for entry in store.list(prefix)}


def segment_of(key: str) -> tuple[int, int] | None:
    """The (writer, first step) of a step log segment; None where `key` names none."""
    match = _SEGMENT.fullmatch(key)
    return (int(match[1], 16), int(match[2], 16)) if match else None


def part_of(key: str) -> tuple[str, int, int, int] | None:
    """The (branch, writer, take, rank) of a part record; None where `key` names none."""
    match = _PART.fullmatch(key)
    return (match[1], int(match[2], 16), int(match[3], 16), int(match[4], 16)) if match else None
