"""The keeper scrubs: a thread that reads the chain again, slowly, while there is nothing to be stored.

Nothing waits for it. What it finds is told, and changes nothing: putting it back is for the user to ask for.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

from everstep.chain.history import SHORT, Chain
from everstep.chain.names import exists
from everstep.chain.remembering import Checks, Memory
from everstep.chain.scrub import scrub
from everstep.chain.verify import Finding
from everstep.errors import Damaged, EverstepError, Unavailable
from everstep.store.patience import Clock

REST_S = 24 * 3600.0
"""Between two passes, whoever made the last: `everstep scrub` counts too."""

FIRST_PAUSE_S = 60.0
LONGEST_PAUSE_S = 3600.0
"""A pass that has failed is gone on with after a pause, which doubles."""

OTHER_S = 60.0
"""Where another keeper of this machine scrubs the chain, that may end at any time."""

MAX_TOLD = 10
"""Where a whole disk has gone bad, the first findings say it."""


class Stopped(Exception):
    """Nobody wants this any more."""


class Scrubber:
    """The passes over one chain. `once` is one, and says when the next is due; all is for the thread that
    makes it.

    Args:
        chain: what is read.
        bytes_per_s: how fast at most.
        warn: is told each finding once, a sentence that ends with the next command, when it is found.
        clock: sleeps after each read; may raise `Stopped` there.
        wall: seconds since 1970.
    """

    def __init__(
        self,
        chain: Chain,
        bytes_per_s: float,
        warn: Callable[[str], None],
        clock: Clock,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._chain = chain
        self._bytes_per_s = bytes_per_s
        self._warn = warn
        self._clock = clock
        self._wall = wall
        self._pause_s = 0.0
        self._told: set[str] = set()
        self._failures: set[str] = set()

    def once(self) -> float:
        """Make a pass if one is due, or go on with one that was interrupted. Blocks. Returns how many seconds
        later there may be something to do again. Raises only `Stopped`."""
        try:
            memory = Memory(self._chain)
            with memory.alone() as alone:
                rest_s = self._rest_s(memory.load()) if alone else OTHER_S
                if rest_s > 0:
                    return rest_s
                report = scrub(
                    self._chain,
                    self._bytes_per_s,
                    memory,
                    clock=self._clock,
                    on_found=self._found,
                    wall=self._wall,
                )
        except Stopped:
            raise
        except Exception as error:
            return self._failed(error)
        for finding in report.findings:
            self._report(finding)
        self._pause_s = 0.0
        return REST_S

    def _rest_s(self, known: Checks) -> float:
        """A wall clock may have been set back: no rest is longer than it should be."""
        return 0.0 if known.scrubbed else min(known.passed_at + REST_S - self._wall(), REST_S)

    def _found(self, key: str, problem: str) -> None:
        """What is not there any more may have been pruned meanwhile: that, the report knows."""
        if key not in self._told and exists(self._chain.store, key):
            self._tell(key, f"{key}: {problem}", "")

    def _report(self, finding: Finding) -> None:
        if not finding.key:
            self._tell(finding.problem, finding.problem, "")
        elif finding.key not in self._told:
            lost = ", ".join(one[:SHORT] for one in finding.snapshots)
            self._tell(finding.key, f"{finding.key}: {finding.problem}", lost)

    def _tell(self, name: str, problem: str, lost: str) -> None:
        if name in self._told:
            return
        self._told.add(name)
        if len(self._told) > MAX_TOLD + 1:
            return
        here = f"everstep -r {self._chain.url}"
        sentence, next = f"the scrub of {self._chain.url} found {problem}", f"{here} repair"
        if lost:
            sentence += f"; it takes the snapshots {lost} with it"
        if len(self._told) > MAX_TOLD:
            sentence = f"the scrub of {self._chain.url} found more than {MAX_TOLD} damaged objects"
            next = f"{here} verify"
        self._warn(str(Damaged(sentence, kept="nothing was changed, and training goes on", next=next)))

    def _failed(self, error: Exception) -> float:
        sentence = error.problem if isinstance(error, EverstepError) else f"{type(error).__name__}: {error}"
        if sentence not in self._failures:
            self._failures.add(sentence)
            if not isinstance(error, EverstepError):
                traceback.print_exception(error)
            next = f"everstep -r {self._chain.url} scrub"
            told = f"the scrub of {self._chain.url} was interrupted ({sentence})"
            self._warn(str(Unavailable(told, kept="it is gone on with later", next=next)))
        self._pause_s = min(max(self._pause_s * 2, FIRST_PAUSE_S), LONGEST_PAUSE_S)
        return self._pause_s


class Scrubbing:
    """The scrubs beside one run, in a thread. No method blocks, and nothing waits for the thread: once it is
    stopped it reads at most what is on its way.

    Args:
        chain: the chain's own store.
        bytes_per_s: how fast it is read at most.
        warn: is told what is found, from the thread.
    """

    def __init__(self, chain: Chain, bytes_per_s: float, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._stopped = threading.Event()
        self._turn = threading.Event()
        self._turn.set()
        self._scrubber = Scrubber(chain, bytes_per_s, self._tell, Clock(sleep=self._pause))
        self.thread = threading.Thread(target=self._run, name="everstep-scrub", daemon=True)
        self.thread.start()

    def storing(self, begins: bool) -> None:
        """A snapshot is being stored, or the chain tidied; or is so no more."""
        if begins:
            self._turn.clear()
        else:
            self._turn.set()

    def stop(self) -> None:
        self._stopped.set()
        self._turn.set()

    # -- in the thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        with suppress(Stopped):
            while True:
                self._pause(self._scrubber.once())

    def _pause(self, seconds: float) -> None:
        """After each read: as long as the rate asks for, then until nothing is being stored."""
        self._stopped.wait(seconds)
        if not self._stopped.is_set():
            self._turn.wait()
        if self._stopped.is_set():
            raise Stopped

    def _tell(self, text: str) -> None:
        if not self._stopped.is_set():
            self._warn(text)
