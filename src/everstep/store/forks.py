"""The threads of a client library do not live on in a forked child: who would wait for them is told so."""

from __future__ import annotations

import os

from everstep.errors import Unsupported

_used = False
_orphaned = False


def note_use(url: str) -> None:
    """Called before each request of a store whose client has threads of its own.

    Raises:
        Unsupported: this process was forked from one that had made requests: it has none of the threads that
            answer them, and would wait for ever.
    """
    global _used
    _used = True
    if _orphaned:
        raise Unsupported(
            f"this process was forked from one that was using {url}, and cannot use it itself",
            kept="nothing was touched",
            next='multiprocessing.get_context("spawn"), for processes that open chains',
        )


def _after_fork() -> None:
    global _orphaned
    _orphaned = _used


os.register_at_fork(after_in_child=_after_fork)
