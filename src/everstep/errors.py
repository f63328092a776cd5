"""What can go wrong, in seven kinds: one per response of the one who catches it.

A message is one clear sentence that names the thing, then what was kept safe, then the next command to
type. Details are fields, not subclasses. `docs/OPERATING.md` has a page for each kind.
"""

from __future__ import annotations

from typing import ClassVar


class EverstepError(Exception):
    """The base of the seven kinds.

    Args:
        problem: one sentence that names the thing that is wrong.
        kept: what is safe all the same ("the older snapshots are intact").
        next: the next command to type, or the call to make.
        key: the object of the store that is concerned, where there is one.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, problem: str, *, kept: str = "", next: str = "", key: str = "") -> None:
        self.problem = problem
        self.kept = kept
        self.next = next
        self.key = key
        parts = [problem.rstrip(".")]
        if kept:
            parts.append(kept.rstrip("."))
        message = "; ".join(parts) + "."
        if next:
            message += f" Next: {next}"
        super().__init__(message)


class NotFound(EverstepError):
    """There is no such chain, snapshot, branch, tag or object: check the name."""

    exit_code = 10


class Conflict(EverstepError):
    """Somebody else was first, or is at work: reread, then try again."""

    exit_code = 11


class Fenced(EverstepError):
    """Another writer has taken the chain over: stop at once. Nothing was changed."""

    exit_code = 12


class Unavailable(EverstepError):
    """The store does not answer or has no room: try again later, or make room.

    Args:
        away: it did not answer for as long as it was tried, and may be back by itself.
    """

    exit_code = 13

    def __init__(
        self, problem: str, *, kept: str = "", next: str = "", key: str = "", away: bool = False
    ) -> None:
        super().__init__(problem, kept=kept, next=next, key=key)
        self.away = away


class Mismatch(EverstepError):
    """This state, argument or path does not fit: nothing was touched."""

    exit_code = 14


class Unsupported(EverstepError):
    """This needs another version, a package, or is not something that can be stored."""

    exit_code = 15


class Damaged(EverstepError):
    """Bytes are missing or are not the ones that were written: take an older snapshot, or repair."""

    exit_code = 20
