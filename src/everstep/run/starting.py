"""Where a branch begins that is not there yet: at a snapshot of the same chain, or of another."""

from __future__ import annotations

from dataclasses import dataclass

from everstep.chain import versions
from everstep.chain.history import MAIN, Chain, Snapshot
from everstep.chain.lease import Lease
from everstep.chain.names import exists
from everstep.chain.refs import split
from everstep.errors import Conflict, NotFound
from everstep.format import keys
from everstep.format.record import Origin
from everstep.run.settings import Settings


@dataclass(frozen=True)
class Start:
    """The snapshot that a branch begins with, and the chain that has it. `ref` is how it was asked for."""

    chain: Chain
    snapshot: Snapshot
    ref: str

    def begin(self, chain: Chain, mine: Lease, branch: str) -> Origin | None:
        """Begin the branch, once its state was restored: with a head record where the chain has the snapshot;
        where another has it, the branch begins with the first snapshot taken, whose record is to name what
        this returns.

        Raises:
            Conflict, Mismatch: somebody else has begun it meanwhile.
        """
        if self.chain is chain:
            versions.branch(chain, branch, self.snapshot.id)
            return None
        if chain.is_branch(branch):
            raise Conflict(
                f"somebody else has begun branch {branch!r} of {chain.url} meanwhile",
                kept="the branch is as they left it",
                next="start again: the run then goes on with that branch",
            )
        about = self.chain.about
        return Origin(about.chain, self.chain.url, self.snapshot.id, self.snapshot.step)


@dataclass(frozen=True)
class Return:
    """The snapshot that a branch goes back to while its run goes on."""

    chain: Chain
    snapshot: Snapshot
    ref: str

    def begin(self, chain: Chain, mine: Lease, branch: str) -> Origin | None:
        """Move the branch's head, once the state was restored; nothing of it is in another chain. Raises
        Conflict, Fenced."""
        versions.move_back(chain, mine, branch, self.snapshot, self.ref)
        return None


def find(settings: Settings, chain: Chain | None) -> Start | None:
    """What `settings.start` means; None where there is nothing to start: it is not set, or the branch is
    there already. Reads records only.

    Args:
        chain: the run's; None where there is none yet.

    Raises:
        NotFound: there is no such chain or snapshot.
    """
    if not settings.start or (chain is not None and chain.is_branch(settings.branch)):
        return None
    place, ref = _apart(settings.start, chain)
    if place:
        return _of_another(Chain(place), ref, settings.start, chain)
    if chain is None:
        raise NotFound(
            f"start={settings.start!r} is a snapshot of the chain itself, and there is none yet",
            kept="nothing was touched",
            next="start='PATH_OF_A_CHAIN@REF', or another path",
        )
    return Start(chain, chain.find(ref, MAIN), settings.start)


def _apart(start: str, chain: Chain | None) -> tuple[str, str]:
    """The place, "" for the run's own chain, and the reference. `main@step:500` is of the chain itself if
    that has such a branch."""
    place, ref = split(start)
    if not ref:
        return (start, "head") if "/" in start else ("", start)
    if chain is not None and chain.is_branch(place):
        return "", start
    return place, ref


def _of_another(other: Chain, ref: str, asked: str, chain: Chain | None) -> Start:
    snapshot = other.find(ref, MAIN)
    key = keys.snapshot(snapshot.id)
    # A snapshot of the same name here is the same one.
    if chain is not None and chain.about.chain == other.about.chain and exists(chain.store, key):
        return Start(chain, snapshot, asked)
    return Start(other, snapshot, asked)
