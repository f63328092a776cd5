"""Replicas follow their chain: a thread for each, which sends what was committed and waits for no snapshot.

Nothing here holds an arena, and nothing waits for it: what is sent is read back from the chain's own store. A
replica that fails is tried again, later and later; what it lacks is found by looking, so also what an earlier
run has left unsent.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from everstep.chain.history import Chain
from everstep.chain.mirror import Mirror, Standing
from everstep.chain.retention import Keep
from everstep.errors import EverstepError, Fenced
from everstep.keeper.base import Followed
from everstep.store.base import Store

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
"""A replica that has failed is tried again after a pause, which doubles."""

TURN_S = 30.0
"""So long at most a pack waits for a snapshot that is being stored: the chain's own store comes first, but
where one follows right on the other a replica is not to wait for ever."""

_JOIN_S = 5.0


class _Stopped(Exception):
    """Nobody wants this any more."""


@dataclass(frozen=True)
class Target:
    """A replica: how the user calls it, and its store."""

    name: str
    store: Store


class Follower:
    """One replica. `once` is a pass, and says when the next is due; all else is for the thread that makes it.

    Attributes:
        pause_s: after a failure, how long to wait before the next pass; 0: none has failed since the last
            good one.
        fenced: what ended it: another writer has taken the branch over through this replica.
        behind: how many snapshots it lacks, as of the last look.
    """

    def __init__(
        self,
        mirror: Mirror,
        name: str,
        keep: Keep,
        tell: Callable[[Followed], None],
        warn: Callable[[str], None],
    ) -> None:
        self.name = name
        self.pause_s = 0.0
        self.fenced: Fenced | None = None
        self.behind = 0
        self._mirror = mirror
        self._keep = keep
        self._tell = tell
        self._warn = warn
        self._said: set[str] = set()

    def once(self) -> bool:
        """Send what the replica lacks, then drop there what does not stay. Whether all went well. Blocks."""
        try:
            standing = self._mirror.bring_up()
        except Fenced as error:
            self.fenced = error
            self._tell(Followed(self.name, problem=str(error), fenced=error))
            return False
        except _Stopped:
            raise
        except Exception as error:
            self._failed(error)
            return False
        self.pause_s = 0.0
        self.advanced(standing)
        try:
            self._mirror.prune(self._keep)
        except Fenced as error:
            self.fenced = error
            self._tell(Followed(self.name, problem=str(error), fenced=error))
            return False
        except Exception as error:
            self._mirror.forget()
            self._say(f"the replica {self.name} could not be tidied: {_sentence(error)}")
        return True

    def advanced(self, standing: Standing) -> None:
        self.behind = standing.behind
        for remark in standing.remarks:
            self._say(remark)
        self._tell(Followed(self.name, standing.snapshot, standing.step, standing.behind))

    def let_go(self) -> None:
        """All is sent, and nothing more comes."""
        try:
            self._mirror.let_go()
        except Exception as error:
            # The next writer takes the lease over as it would a dead one's.
            self._say(f"the lease in {self.name} was not released: {_sentence(error)}")

    def _failed(self, error: Exception) -> None:
        self._mirror.forget()
        if not isinstance(error, EverstepError):
            traceback.print_exception(error)
        self.pause_s = min(max(self.pause_s * 2, FIRST_PAUSE_S), LONGEST_PAUSE_S)
        self._tell(Followed(self.name, behind=self.behind, problem=_sentence(error)))

    def _say(self, text: str) -> None:
        """Once each."""
        if text not in self._said:
            self._said.add(text)
            self._warn(text)


def _sentence(error: Exception) -> str:
    return error.problem if isinstance(error, EverstepError) else f"{type(error).__name__}: {error}"


class Following:
    """The followers of one run, each in a thread. No method blocks but `close`.

    Args:
        chain: the chain's own store.
        branch, lease: whose writer's work is sent, and the number of the writer's lease.
        keep: what stays in the replicas, as in the chain.
        targets: the replicas.
        tell: is told how each stands, from its thread.
        warn: is told, a sentence each, what failed and did no harm.
        wake: called when something has changed that somebody may wait for.
        after: those of an earlier run in this process, which have been stopped: they end first.
    """

    def __init__(
        self,
        chain: Chain,
        branch: str,
        lease: int,
        keep: str,
        targets: Sequence[Target],
        tell: Callable[[Followed], None],
        warn: Callable[[str], None],
        wake: Callable[[], None] = lambda: None,
        after: Following | None = None,
    ) -> None:
        self.progress = 0
        """Grows with whatever is sent."""
        self._tell = tell
        self._wake = wake
        self._stopped = threading.Event()
        self._finishing = False
        self._turn = threading.Event()
        self._turn.set()
        self._after = after
        self._lines: list[_Line] = []
        for target in targets:
            line = _Line()
            mirror = Mirror(
                chain,
                target.store,
                branch,
                lease,
                before_pack=self._wait_for_turn,
                on_sent=self._sent,
                on_advance=lambda standing, line=line: line.follower.advanced(standing),  # type: ignore[misc]
            )
            line.follower = Follower(mirror, target.name, Keep.parse(keep), self._told, warn)
            line.thread = threading.Thread(
                target=self._run, args=(line,), name="everstep-replica", daemon=True
            )
            self._lines.append(line)
        for line in self._lines:
            line.thread.start()

    # -- from the keeper's other threads --------------------------------------------------------------------

    def news(self) -> None:
        """Something was committed, or pruned."""
        for line in self._lines:
            line.settled = False
            line.due.set()

    def storing(self, begins: bool) -> None:
        """A snapshot is being stored, or is so no more."""
        if begins:
            self._turn.clear()
        else:
            self._turn.set()

    @property
    def fenced(self) -> Fenced | None:
        """Why the run must stop, if it must."""
        return next((one.follower.fenced for one in self._lines if one.follower.fenced), None)

    @property
    def sending(self) -> bool:
        """Whether something is left to be sent, and may be."""
        return any(not one.settled and one.follower.fenced is None for one in self._lines if one.lives)

    def behind(self) -> dict[str, int]:
        """By replica, how many snapshots it lacks, of those that lack any or could not be looked at."""
        return {one.follower.name: one.follower.behind for one in self._lines if not one.settled}

    def finish(self) -> None:
        """Nothing more is committed: send what is left, release the leases in the replicas, and end."""
        self._finishing = True
        for line in self._lines:
            line.due.set()

    def stop(self) -> None:
        """Send no more than what is on its way."""
        self._stopped.set()
        self._turn.set()
        for line in self._lines:
            line.due.set()

    def close(self) -> None:
        """Stop, and wait a moment for what is on its way."""
        self.stop()
        self.join(_JOIN_S)

    def join(self, timeout_s: float | None) -> None:
        for line in self._lines:
            line.thread.join(timeout_s)

    # -- in the followers' threads --------------------------------------------------------------------------

    def _run(self, line: _Line) -> None:
        try:
            if self._after is not None:
                self._after.join(None)
            while not self._stopped.is_set():
                self._pass(line)
                if line.follower.fenced is not None or (line.settled and self._finishing):
                    return
                line.due.wait(line.follower.pause_s or None)
        except _Stopped:
            return
        finally:
            line.lives = False
            self._after = None
            self._wake()

    def _pass(self, line: _Line) -> None:
        line.due.clear()
        before = self.progress
        done = line.follower.once()
        # What was committed meanwhile has set it again.
        line.settled = done and not line.due.is_set()
        if line.settled and self._finishing:
            line.follower.let_go()
        if self.progress != before or line.settled:
            self._wake()

    def _wait_for_turn(self) -> None:
        self._turn.wait(TURN_S)
        if self._stopped.is_set():
            raise _Stopped

    def _sent(self, size_bytes: int) -> None:
        self.progress += 1

    def _told(self, followed: Followed) -> None:
        if not self._stopped.is_set():
            self._tell(followed)


class _Line:
    """A follower, its thread, and what the two agree on."""

    follower: Follower
    thread: threading.Thread

    def __init__(self) -> None:
        self.due = threading.Event()
        self.settled = False
        self.lives = True
