"""Signals that ask a run to stop: SIGTERM (schedulers, spot instances) and SIGUSR1 (Slurm).

The handler only notes the signal; the run acts on it at the end of the step. A handler that was there before
is called too. The second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

STOP = (signal.SIGTERM, signal.SIGUSR1)
EXIT_STATUS = 143
"""128 + SIGTERM, which schedulers take for "try again": never 0, which would say that the job is done."""


class Signals:
    """Notes the stop signals of this process while installed."""

    def __init__(self, on_first: Callable[[str], None]) -> None:
        self.received: str | None = None
        self._on_first = on_first
        self._before: dict[int, Any] = {}
        self._owner = os.getpid()

    def install(self) -> None:
        """Only the main thread may; in another thread nothing is installed and signals do what they did."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOP:
            self._before[number] = signal.signal(number, self._handle)

    def remove(self) -> None:
        """Put back what was there, unless somebody has put a handler on top of ours."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, before in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, before if before is not None else signal.SIG_DFL)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A loader worker that was forked with this handler must die as if there were none.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self.received is not None:
            os._exit(EXIT_STATUS)
        self.received = signal.Signals(number).name
        # Schedulers signal whole process groups: the loader's workers die of it, and what torch does then
        # (raise from its SIGCHLD handler, wherever the program is) must not break the last step.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._on_first(self.received)
        before = self._before.get(number)
        if callable(before):
            before(number, frame)
