"""What this machine's user remembers of a chain between two checks of it: how far the last one came.

It is an aid and no part of the chain: a small file among the user's own state. Where it is lost, a check
begins at the beginning.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from everstep.chain.history import Chain
from everstep.chain.replicas import address_of
from everstep.chain.steplog import state_directory
from everstep.errors import Unavailable
from everstep.format.chunk import digest
from everstep.store.base import Store

MAX_BYTES = 64 * 1024
MAX_VERIFIED = 500
"""Of so many snapshots it is remembered that they were verified, the newest."""


class Checks(msgspec.Struct, omit_defaults=True):
    """`subsets`: by the number of parts, which was read last. `scrubbed`: the last pack of a scrub under way;
    `passes`: how many have come to their end; `passed_at`: when the last did, in seconds since 1970.
    `verified`: ids of snapshots that were whole when everything was last read in one go."""

    subsets: dict[str, int] = {}
    scrubbed: str = ""
    passes: int = 0
    passed_at: float = 0.0
    verified: tuple[str, ...] = ()


class Memory:
    """The checks of one chain at one place: its own, or the `store` that a replica of it is in. Reads and
    writes a small file."""

    def __init__(self, chain: Chain, store: Store | None = None) -> None:
        store = store or chain.store
        self._url = store.url
        try:
            place = state_directory() / chain.about.chain
        except RuntimeError as error:
            raise self._failed(error) from error
        # The same in any directory: what looks at a chain may be in another than the user.
        where = address_of(store) or store.url
        self._path = place / f"checks-{digest(where.encode())[:16]}.json"

    def load(self) -> Checks:
        """What was saved last; the beginning where that cannot be read."""
        try:
            with open(self._path, "rb") as file:
                return msgspec.json.decode(file.read(MAX_BYTES), type=Checks)
        except (FileNotFoundError, msgspec.MsgspecError, ValueError):
            return Checks()
        except OSError as error:
            raise self._failed(error) from error

    def note_verified(self, ids: Sequence[str]) -> None:
        """Everything was read, and these snapshots were whole, the newest first. Raises Unavailable."""
        self.save(msgspec.structs.replace(self.load(), verified=tuple(ids[:MAX_VERIFIED])))

    def save(self, checks: Checks) -> None:
        """Appears whole or not at all. Raises Unavailable."""
        fresh: Path = self._path.with_name(f".{self._path.name}-{secrets.token_hex(4)}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_bytes(msgspec.json.encode(checks))
            os.replace(fresh, self._path)
        except OSError as error:
            raise self._failed(error) from error

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether nobody else of this machine is at this, as long as it lasts: runs that write branches of
        one chain have a keeper each. Raises Unavailable."""
        descriptor, taken = self._taken()
        try:
            yield taken
        finally:
            # Not by closing alone: a child that was forked meanwhile has the descriptor too.
            if taken:
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _taken(self) -> tuple[int, bool]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            descriptor = os.open(self._path.with_suffix(".lock"), flags, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor, True
            except BlockingIOError:
                return descriptor, False
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> Unavailable:
        return Unavailable(
            f"how far the checks of {self._url} have come cannot be kept ({error})",
            kept="the chain is not touched by this",
            next="XDG_STATE_HOME=DIRECTORY, or name the part: --read-data-subset 1/20",
        )
