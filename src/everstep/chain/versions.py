"""Versions: tags, branches, and heads that are moved back. Each is one small record; no chunk is copied.

Tags and heads advance by exclusively creating the next number, so that of several at once exactly one wins,
and nothing that was ever named is forgotten before it is pruned: a rollback is undone by another one.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

from everstep.chain import lease as leases
from everstep.chain.doomed import refuse_doomed
from everstep.chain.fence import fence_former, put_fence
from everstep.chain.history import MAIN, Chain, Point, Snapshot, now
from everstep.chain.lease import Lease
from everstep.chain.names import exists, missing, newest, segment_of
from everstep.chain.refs import HEADS
from everstep.errors import Conflict, Damaged, Mismatch, NotFound, Unavailable
from everstep.events import RolledBack
from everstep.format import keys, record
from everstep.format.record import BRANCH, DROP, ROLLBACK, HeadRecord, Move, TagRecord

Made = TypeVar("Made", TagRecord, HeadRecord)


# -- tags --------------------------------------------------------------------------------------------------


def tag(chain: Chain, name: str, ref: str = "head", *, of: str = MAIN, force: bool = False) -> Snapshot:
    """Name a snapshot; durable on return. What is tagged is never pruned. Blocks for a few small requests;
    needs no right to write, so that a run may go on meanwhile.

    Args:
        ref: the snapshot, see `Chain.find`.
        of: the branch that `ref` speaks of.
        force: move the tag if it names another snapshot.

    Raises:
        NotFound: there is no such snapshot.
        Mismatch: the name cannot be a tag's, or names another snapshot; nothing was touched.
        Conflict: somebody else made or moved this tag at the same moment, or has pruned the snapshot; the
            tag is as they left it.
    """
    _refuse_name(name, "tag")
    if chain.is_branch(name):
        raise Mismatch(
            f"{name!r} is a branch of {chain.url}", kept="nothing was touched", next="another name"
        )
    snapshot = chain.find(ref, of)
    number = newest(chain.store, keys.tag(name))
    before = "" if force and not _is_readable(chain, name) else chain.tagged(name)
    if before == snapshot.id:
        return snapshot
    if before and not force:
        raise Mismatch(
            f"the tag {name!r} names {before[: len(snapshot.short)]} already",
            kept="it was not moved",
            next=f"everstep -r {chain.url} tag --force {name} {ref}",
        )
    made = _tag_record(name, number + 1, snapshot.id)
    if not _created(chain, made):
        raise _second(chain, f"tag {name!r}", "everstep tag")
    _refuse_pruned(chain, snapshot, lambda: _create_next(chain, name, number + 2, before))
    return snapshot


def untag(chain: Chain, name: str) -> None:
    """Take a tag away; durable on return. What it named stays until it is pruned.

    Raises:
        NotFound: there is no such tag.
        Conflict: somebody else has moved it at the same moment.
    """
    number = newest(chain.store, keys.tag(name))
    if not number or (_is_readable(chain, name) and not chain.tagged(name)):
        raise NotFound(f"{chain.url} has no tag {name!r}", next=f"everstep -r {chain.url} tag")
    if not _created(chain, _tag_record(name, number + 1, "")):
        raise _second(chain, f"tag {name!r}", "everstep tag")


def _tag_record(name: str, number: int, id: str) -> TagRecord:
    return TagRecord(snapshot=id, nonce=secrets.token_hex(8), at=now(), name=name, number=number)


def _create_next(chain: Chain, name: str, number: int, id: str) -> None:
    """Put a tag back to what it was; nothing where somebody has moved it already."""
    _created(chain, _tag_record(name, number, id))


def _is_readable(chain: Chain, name: str) -> bool:
    """Whether a tag's newest record is whole: a damaged one may be replaced."""
    try:
        chain.tagged(name)
    except Damaged:
        return False
    return True


# -- branches ----------------------------------------------------------------------------------------------


def branch(chain: Chain, name: str, ref: str = "head", *, of: str = MAIN) -> Snapshot:
    """Begin a branch at a snapshot: one head record, which shares all chunks. Durable on return. Blocks for a
    few small requests; needs no right to write.

    Args:
        ref: the snapshot, see `Chain.find`.
        of: the branch that `ref` speaks of.

    Raises:
        NotFound: there is no such snapshot.
        Mismatch: the name cannot be a branch's, or there is such a branch; nothing was touched.
        Conflict: somebody else began this branch at the same moment, or has pruned the snapshot.
    """
    _refuse_name(name, "branch")
    if chain.tagged(name):
        raise Mismatch(f"{name!r} is a tag of {chain.url}", kept="nothing was touched", next="another name")
    snapshot = chain.find(ref, of)
    if chain.is_branch(name):
        raise Mismatch(
            f"{chain.url} has a branch {name!r} already",
            kept="it was not touched",
            next=f"another name, or everstep -r {chain.url} rollback --branch {name} {ref}",
        )
    # Whoever trains on it holds a later lease than all that there were.
    writer = leases.newest(chain.store, name)
    number = chain.head_number(name) + 1  # What a branch of this name has left behind are fences.
    made = _head_record(name, number, snapshot, writer, Move(BRANCH, _spoken(ref, of)))
    if not _created(chain, made):
        raise _second(chain, f"branch {name!r}", "everstep branch")
    _refuse_pruned(chain, snapshot, lambda: chain.store.delete(made.key))
    return snapshot


def drop_branch(chain: Chain, name: str, *, force: bool = False) -> None:
    """Take a branch away: its head records, the oldest first, then its step log. Its snapshots are reachable
    no more unless something else names them, and go with a later prune. May be interrupted at any point and
    done again. Becomes the writer meanwhile.

    Args:
        force: also where snapshots are on no other branch and have no tag.

    Raises:
        NotFound: there is no such branch.
        Mismatch: there are snapshots that nothing else names; nothing was touched.
        Conflict: a living process writes; nothing was touched.
    """
    _refuse_no_branch(chain, name)
    lost = set() if force else _only_on(chain, name)
    if lost:
        raise Mismatch(
            f"{len(lost)} snapshots are on no other branch than {name!r}",
            kept="nothing was touched",
            next=f"everstep -r {chain.url} tag NAME {name}@head, to keep the newest, or "
            f"branch -d --force {name}",
        )
    mine = Lease.take(chain.store, name)
    try:
        # It stays, and says that the branch is none any more: to a writer that was replaced, and to replicas.
        fence = put_fence(chain, mine, Move(DROP))
        delete_branch(chain, fence, mine.check)
    finally:
        mine.release()


def delete_branch(
    chain: Chain, fence: HeadRecord, check: Callable[[], None] = lambda: None, spared: Collection[str] = ()
) -> None:
    """Delete what a branch was before it was taken away, as the fence says: its head records, the oldest
    first, then its step log; `check` is asked before each."""
    name = fence.branch
    going = [point.key for point in chain.points(name) if point.number < fence.number]
    segments = ((segment_of(entry.key), entry.key) for entry in chain.store.list(keys.steplog(name)))
    going[:0] = [key for segment, key in segments if segment is not None and segment[0] <= fence.writer]
    for key in reversed(going):
        if key not in spared:
            check()
            chain.store.delete(key)


def _only_on(chain: Chain, name: str) -> set[str]:
    others = [other for other in chain.branches() if other != name]
    named = {head.snapshot for other in others for head in chain.heads(other)} | set(chain.tags().values())
    return {head.snapshot for head in chain.heads(name)} - named


# -- moving a head back ------------------------------------------------------------------------------------


def rollback(chain: Chain, name: str, ref: str) -> RolledBack:
    """Move a branch's head to an earlier snapshot, or to any other of the chain; durable on return. Nothing
    is lost: the reflog has the head that was, and `rollback(chain, name, f"{name}@{{1}}")` goes back to it.
    The next run goes on from there. Becomes the writer meanwhile.

    Args:
        name: the branch.
        ref: the snapshot; what it does not say otherwise is said of this branch.

    Raises:
        NotFound: there is no such branch or snapshot.
        Conflict: a living process writes, which is named, or somebody has pruned the snapshot; the head is
            where it was.
        Fenced: another writer came in between; likewise.
    """
    _refuse_no_branch(chain, name)
    snapshot = chain.find(ref, name)
    newest = next(chain.points(name))
    if newest.snapshot is not None and newest.snapshot.id == snapshot.id:
        return RolledBack(chain.url, name, snapshot.id, snapshot.step, snapshot.step)
    mine = Lease.take(chain.store, name)
    try:
        return move_back(chain, mine, name, snapshot, ref)
    finally:
        mine.release()


def move_back(chain: Chain, mine: Lease, name: str, snapshot: Snapshot, ref: str) -> RolledBack:
    """The same by who holds the lease."""
    fence_former(chain, mine)
    while True:
        before = next(chain.heads(name), None)
        number = chain.head_number(name) + 1
        made = _head_record(name, number, snapshot, mine.number, Move(ROLLBACK, ref))
        mine.check()
        if _created(chain, made):
            break
    _refuse_pruned(chain, snapshot, lambda: chain.store.delete(made.key))
    return RolledBack(chain.url, name, snapshot.id, before.step if before else snapshot.step, snapshot.step)


def rolled_back(chain: Chain, name: str) -> RolledBack | None:
    """The rollback since the newest snapshot of a branch was taken; None where there was none. Reads as many
    head records as were put since then, and one more."""
    newest: HeadRecord | None = None
    for head in chain.heads(name):
        newest = newest or head
        if head.moved is None or head.moved.what != ROLLBACK:
            if head.snapshot == newest.snapshot:
                return None
            return RolledBack(chain.url, name, newest.snapshot, head.step, newest.step)
    return None


def reflog(chain: Chain, name: str = MAIN) -> Iterator[Point]:
    """All advances of a branch's head, the newest first, damaged ones included: number N of them is what
    `@{N}` means. Lazy.

    Raises:
        NotFound: there is no such branch.
    """
    _refuse_no_branch(chain, name)
    return chain.points(name)


# -- records -----------------------------------------------------------------------------------------------


def _head_record(name: str, number: int, snapshot: Snapshot, writer: int, move: Move) -> HeadRecord:
    return HeadRecord(
        snapshot=snapshot.id,
        step=snapshot.step,
        writer=writer,
        nonce=secrets.token_hex(8),
        at=now(),
        branch=name,
        number=number,
        move=move,
        format=snapshot.record.format,
    )


def _created(chain: Chain, made: Made) -> bool:
    """Put a record under its number. False: another has it. The nonce settles an answer that was lost."""
    try:
        if chain.store.put(made.key, [record.seal(made)]):
            return True
    except Unavailable:
        if not _is_there(chain, made):
            raise
        return True
    return _is_there(chain, made)


def _is_there(chain: Chain, made: Made) -> bool:
    try:
        there = record.unseal(chain.store.get(made.key), type(made), made.key)
    except (Damaged, NotFound):
        return False
    return there.nonce == made.nonce


def _second(chain: Chain, what: str, next: str) -> Conflict:
    return Conflict(
        f"somebody else made or moved the {what} of {chain.url} at the same moment",
        kept="it is as they left it",
        next=f"{next.replace('everstep', f'everstep -r {chain.url}')}, to see what it names",
    )


def _refuse_name(name: str, what: str) -> None:
    if keys.checked(name, what) in HEADS:
        raise Mismatch(
            f"{name!r} always means the newest snapshot and cannot name a {what}",
            kept="nothing was touched",
            next="another name",
        )


def _refuse_no_branch(chain: Chain, name: str) -> None:
    keys.checked(name, "branch")
    if not chain.is_branch(name):
        names = ", ".join(chain.branches()) or "none"
        raise NotFound(
            f"{chain.url} has no branch {name!r}; its branches: {names}",
            next=f"everstep -r {chain.url} branch",
        )


def _refuse_pruned(chain: Chain, snapshot: Snapshot, undo: Callable[[], None]) -> None:
    """After a record was made: whoever prunes has seen it, or has deleted the snapshot by now. Then the
    record is taken back. Raises Conflict."""
    try:
        refuse_doomed(chain, snapshot.id)
    except Conflict:
        undo()
        raise
    manifests = list(map(keys.manifest, snapshot.record.manifests))
    if exists(chain.store, keys.snapshot(snapshot.id)) and not missing(
        chain.store, keys.MANIFESTS, manifests
    ):
        return
    undo()
    raise Conflict(
        f"snapshot {snapshot.short} of {chain.url} was pruned at the same moment",
        kept="nothing was changed",
        next=f"everstep -r {chain.url} log",
    )


def _spoken(ref: str, of: str) -> str:
    """A reference that means the same whichever branch one is on."""
    return ref if of == MAIN or "@" in ref else f"{of}@{ref}"
