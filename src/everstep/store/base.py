"""The contract of a store: four verbs over immutable objects. `everstep.testing.store` is its test suite."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

Buffer: TypeAlias = bytes | bytearray | memoryview

PROBES = "probe/"
"""What lies below is what a probe has left behind: nobody looks at it."""

MAX_KEY_CHARACTERS = 512
MAX_PART_CHARACTERS = 255
_NAMED_BY_DIGEST = re.compile("(.*/)?[0-9a-f]{64}")
_PART = rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{MAX_PART_CHARACTERS - 1}}}"
_KEY = re.compile(f"{_PART}(/{_PART})*")


@dataclass(frozen=True)
class Entry:
    """An object as a listing shows it. `modified_at` is in seconds since 1970 by the store's own clock."""

    key: str
    size_bytes: int
    modified_at: float


@runtime_checkable
class Store(Protocol):
    """Immutable objects under keys: relative, '/'-separated, up to 512 characters; each part 1 to 255 of
    `[A-Za-z0-9._-]`, the first of them none of '.' and '-'.

    A key is not to be another's with something after a '/': some stores have directories.

    All verbs may block on I/O, may be called from several threads at once, and raise `Unavailable` when the
    store does not answer or has no room. A store keeps no state that a fork or a second process could spoil.
    """

    @property
    def url(self) -> str:
        """Where it is, as a user would type it."""

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        """Create an object from the bytes of `parts`, one after the other.

        Durable on return: the object survives a power cut, whole. It appears at once and whole, or not at
        all. Nothing is ever overwritten: where the key exists, nothing is changed and the answer is False
        (losing a race is a value, not an error). Of several at the same time exactly one gets True.
        Raises Conflict where `key` and an object's key cannot both be (`a` and `a/b`, in a store that has
        directories).
        """

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        """The bytes from `start` on, `size_bytes` of them or up to the end.

        Fewer come back where the object ends before that. Raises NotFound where there is no such object.
        """

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        """Fill the writable `buffers`, one after the other, with the bytes from `start` on.

        Returns how many bytes there were; fewer than the buffers hold where the object ends before that.
        Raises NotFound where there is no such object.
        """

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[Entry]:
        """The objects whose key begins with `prefix`, in the order of their keys' bytes, `limit` at most.

        What somebody else left there under a name that is no key is not listed.
        """

    def delete(self, key: str) -> None:
        """Take an object away; that there is none is no error."""


@runtime_checkable
class Probing(Protocol):
    """A store that may turn out not to keep the contract, and can find out."""

    def probe(self) -> None:
        """Do what a commit needs, once, and leave nothing behind. Blocks on I/O.

        Raises:
            Unsupported: the store does not keep the contract; no chain may be created there.
        """


@runtime_checkable
class Sweeping(Protocol):
    """A store in which killed writers leave something behind that no listing shows."""

    def sweep(self) -> int:
        """Take away what they left half-written; returns how many bytes that were. A writer at work may have
        to begin anew, or gets `Unavailable`, and has changed nothing.

        Raises:
            Unavailable: it cannot be read or changed.
        """


@runtime_checkable
class Addressed(Protocol):
    """A store that outlives this process and that another opens by a text."""

    @property
    def address(self) -> str:
        """What `everstep.store.urls.open_store` makes such a store of, in any process that has this one's
        environment."""

    @property
    def environment(self) -> Mapping[str, str]:
        """What that process needs in its environment besides."""


@runtime_checkable
class Distant(Protocol):
    """A store whose answers take their time: who asks for many small objects asks for several at once."""

    @property
    def at_once(self) -> int:
        """How many requests."""


@runtime_checkable
class Clearing(Protocol):
    """A store that takes many objects away with few requests."""

    def clear(self, keys: Sequence[str]) -> None:
        """What `delete` does, for all of them, in no order. Raises as that; some may be gone then."""


@runtime_checkable
class Redundant(Protocol):
    """A store that holds more of each object than it takes to read it, and can make that whole again."""

    def flaws(self, key: str) -> Sequence[str]:
        """What is not as it should be with what is kept of an object, a sentence each; all of it is read.
        Raises NotFound."""

    def mend(self, key: str) -> Sequence[str]:
        """Make what is kept of an object whole again where that can be; durable on return. Nothing good is
        taken away.

        Returns:
            What was mended, a sentence each.

        Raises:
            NotFound, Damaged: there is not enough of it.
        """

    def away(self) -> Sequence[str]:
        """Parts of the store that do not answer now, a sentence each. Blocks on I/O."""


def refuses_to_overwrite(store: Store) -> bool:
    """Create an object twice and look whether the second is refused; take it away again."""
    key = PROBES + secrets.token_hex(8)
    mine = secrets.token_bytes(16)
    store.put(key, [mine])
    try:
        return not store.put(key, [secrets.token_bytes(16)]) and bytes(store.get(key)) == mine
    finally:
        store.delete(key)


def is_key(key: str) -> bool:
    return len(key) <= MAX_KEY_CHARACTERS and _KEY.fullmatch(key) is not None


def is_named_by_digest(key: str) -> bool:
    """Whether all who put an object under this key put the same bytes."""
    return _NAMED_BY_DIGEST.fullmatch(key) is not None


def checked(key: str) -> str:
    """Raises ValueError when `key` is none: a bug of the caller, never a user's input."""
    if not is_key(key):
        raise ValueError(f"{key!r} is not a store key")
    return key
