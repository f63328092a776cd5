"""Signals that ask a run to stop: SIGTERM (schedulers, spot instances) and SIGUSR1 (Slurm).

The handler only notes the signal; the run acts on it at the end of the step. A handler that was there before
is called too. The second signal ends the process at once.

Schedulers signal whole process groups, one process after the other: the loader's workers die of it, and what
torch does then (raise from its SIGCHLD handler, wherever the program is) must not break the last step,
whichever of them is signalled first.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

STOP = (signal.SIGTERM, signal.SIGUSR1)
EXIT_STATUS = 143
"""128 + SIGTERM, which schedulers take for "try again": never 0, which would say that the job is done."""

GROUP_S = 1.0
"""Where a loader's worker has died of such a signal, this process is given so much time to get it, too."""

_HANDLER_OF_TORCH = "torch.utils.data._utils.signal_handling"


class Signals:
    """Notes the stop signals of this process while installed."""

    def __init__(self, on_first: Callable[[str], None]) -> None:
        self.received: str | None = None
        self._on_first = on_first
        self._before: dict[int, Any] = {}
        self._owner = os.getpid()
        self._shield: partial[None] | None = None
        """Around torch's handler of SIGCHLD."""

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
        shield, self._shield = self._shield, None
        found = signal.getsignal(signal.SIGCHLD)
        if isinstance(found, partial) and found is shield:
            signal.signal(signal.SIGCHLD, found.args[0])

    def look_after_workers(self) -> None:
        """To be called now and then: a loader may have got its first workers, and torch its handler."""
        found = signal.getsignal(signal.SIGCHLD)
        if (
            getattr(found, "__module__", "") == _HANDLER_OF_TORCH
            and callable(found)
            and self._before
            and threading.current_thread() is threading.main_thread()
        ):
            self._shield = partial(self._child_died, found)
            signal.signal(signal.SIGCHLD, self._shield)

    def _child_died(
        self, of_torch: Callable[[int, FrameType | None], Any], number: int, frame: FrameType | None
    ) -> None:
        try:
            of_torch(number, frame)
        except RuntimeError as error:
            if not self._comes_for_all(str(error)):
                raise

    def _comes_for_all(self, death: str) -> bool:
        """Whether what a worker died of comes to this process, too. Waits for it, and handles it."""
        if not any(f"killed by signal: {signal.strsignal(one)}" in death for one in STOP):
            return False
        until = time.monotonic() + GROUP_S
        # In short pieces: a signal's handler runs during a sleep, and does not end it.
        while self.received is None and time.monotonic() < until:
            time.sleep(0.005)
        return self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A loader worker that was forked with this handler must die as if there were none.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self.received is not None:
            os._exit(EXIT_STATUS)
        self.received = signal.Signals(number).name
        # Workers that die from now on are nobody's business.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._on_first(self.received)
        before = self._before.get(number)
        if callable(before):
            before(number, frame)
