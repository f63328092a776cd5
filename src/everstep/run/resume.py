"""From which snapshot a run goes on, and how it comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from everstep.chain import held as arenas
from everstep.chain.history import Chain, Point, Snapshot, joined
from everstep.chain.reader import Reader, Target
from everstep.errors import Damaged, Mismatch, NotFound
from everstep.events import Sink, Skipped, size
from everstep.format.manifest import Manifest
from everstep.keeper.base import Held
from everstep.state.restore import Restored, restore
from everstep.state.world import World
from everstep.store.base import Store


@dataclass(frozen=True)
class Resumption:
    """A state that came back. `remarks` is damage that was seen and did not matter; `from_arena`, whether the
    keeper still had it in memory, so that the store was read at most for a rest; `got_round`, whether a
    replica was read for what the chain's own store has not, or not whole."""

    snapshot: Snapshot
    manifest: Manifest
    restored: Restored
    remarks: tuple[str, ...]
    from_arena: bool = False
    got_round: bool = False


def refuse_unwanted(chain: Chain, resume: str, branch: str) -> None:
    """Raises Mismatch when nothing is to be resumed and there is something."""
    if resume == "never" and chain.head_number(branch):
        raise Mismatch(
            f"{chain.url} has snapshots on branch {branch!r}, and resume='never' forbids to go on from them",
            kept="nothing was touched",
            next="resume='auto', or another path",
        )


Restore: TypeAlias = Callable[[Chain, Snapshot], Resumption]
"""Brings the objects to what a snapshot of a chain holds. Raises as `restored` does."""


def bring_back(chain: Chain, resume: str, branch: str, restore: Restore, emit: Sink) -> Resumption | None:
    """Restore the objects from the snapshot that `resume` means; None where the run starts from nothing.

    `auto` and `must` take the newest snapshot that can be verified, and tell `emit` what they skip and why;
    what a rollback took back is not gone on from.

    Raises:
        NotFound: there is none, and it must be; or a reference means none.
        Damaged: there are snapshots, and none can be verified: a run never starts over by itself.
        Mismatch: the state does not fit the objects; nothing was touched.
    """
    if resume == "never":
        return None
    if resume not in ("auto", "must"):
        return restore(chain, _found(chain, resume, branch))
    skipped: list[Point] = []
    for point in chain.line(branch):
        try:
            return _at(chain, point, restore)
        except (Damaged, NotFound) as error:
            skipped.append(point)
            emit(Skipped(chain.url, point.name(), error.problem))
    if skipped:
        raise Damaged(
            f"none of the {len(skipped)} snapshots of {chain.url} can be restored",
            kept="nothing was deleted",
            next=f"everstep -r {chain.url} verify",
        )
    if resume == "must":
        raise NotFound(
            f"{chain.url} has no snapshot to resume from", next="resume='auto' to start from nothing"
        )
    return None


def _found(chain: Chain, ref: str, branch: str) -> Snapshot:
    try:
        return chain.find(ref, branch)
    except NotFound as error:
        if chain.is_branch(branch):
            raise
        next = f"everstep.open(..., branch={branch!r}, start={ref!r}), for a branch that begins there"
        raise NotFound(error.problem, kept="nothing was touched", next=next, key=error.key) from error


def _at(chain: Chain, point: Point, restore: Restore) -> Resumption:
    if point.damage is not None:
        raise point.damage
    assert point.snapshot is not None
    return restore(chain, point.snapshot)


def restored(
    chain: Chain,
    snapshot: Snapshot,
    objects: Mapping[str, object],
    strict: bool,
    held: Sequence[Held],
    world: World,
    reading: Store | None = None,
) -> Resumption:
    """Restore the objects from one snapshot; where it is `held` in an arena it is taken from there, verified,
    and from the store where it is not; `reading` is how to read that, if not as it is. Raises as `bring_back`
    does."""
    parts = chain.manifests(snapshot)
    manifest = joined(snapshot, parts)
    mine = world.rank % len(parts)
    name = snapshot.record.manifests[mine]
    arena = next((one.memory for one in held if snapshot.id == one.snapshot or name == one.manifest), None)
    first = sum(len(part.regions) for part in parts[:mine])
    own = range(first, first + len(parts[mine].regions))
    reader = Reader(reading or chain.store)
    remarks: list[str] = []

    taken = 0

    def fill(targets: Iterable[tuple[int, int, memoryview]]) -> None:
        nonlocal taken
        wanted = [Target(*target) for target in targets]
        if arena is not None:
            here = [replace(one, region=one.region - first) for one in wanted if one.region in own]
            left = arenas.fill(parts[mine], arena, here)
            lost = sum(len(target.buffer) for target in left)
            taken += sum(len(target.buffer) for target in here) - lost
            if lost:
                remarks.append(f"{size(lost)} in the keeper's memory were not the snapshot's any more")
            wanted = [one for one in wanted if one.region not in own]
            wanted += [replace(one, region=one.region + first) for one in left]
        remarks.extend(reader.fill(manifest, wanted))

    state = restore(manifest, fill, objects, strict=strict, world=world, parts=parts)
    return Resumption(snapshot, manifest, state, tuple(remarks), taken > 0, reader.got_round)
