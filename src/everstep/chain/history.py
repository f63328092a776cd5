"""A chain as its history: what snapshots there are, and which one a reference means."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TypeVar

import msgspec

from everstep.chain import refs
from everstep.chain.names import exists, is_object, newest
from everstep.errors import Damaged, EverstepError, Mismatch, NotFound, Unavailable, Unsupported
from everstep.format import keys, record
from everstep.format import manifest as manifests
from everstep.format.chunk import GRID_BYTES, Buffer, digest
from everstep.format.joining import join
from everstep.format.manifest import Manifest
from everstep.format.record import (
    ROLLBACK,
    ChainRecord,
    HeadRecord,
    Number,
    Sealed,
    SnapshotRecord,
    TagRecord,
)
from everstep.store.base import PROBES, Distant, Probing, Store
from everstep.store.local import TEMPORARY, LocalStore
from everstep.store.parallel import in_parallel
from everstep.store.replicated import copies_of
from everstep.store.urls import open_store

MAIN = "main"
SHORT = 8
"""How many digits of a snapshot's id are shown."""

_ID_PREFIX = re.compile("[0-9a-f]{4,64}")

Kind = TypeVar("Kind", bound=msgspec.Struct)
Made = TypeVar("Made")

_WEIGHT: dict[type[EverstepError], int] = {NotFound: 0, Unavailable: 1, Damaged: 2}


@dataclass(frozen=True)
class Snapshot:
    """An immutable, complete, restorable point of a run. `id` is 64 hexadecimal digits."""

    id: str
    record: SnapshotRecord

    @property
    def short(self) -> str:
        return self.id[:SHORT]

    @property
    def step(self) -> int:
        return self.record.step


@dataclass(frozen=True)
class Point:
    """One advance of a branch's head. `head` and `snapshot` are None where they cannot be read; `damage`
    then says why."""

    number: int
    key: str
    head: HeadRecord | None
    snapshot: Snapshot | None
    damage: EverstepError | None = None

    def name(self) -> str:
        """How a person would call it."""
        if self.head is None:
            return f"head record {self.key}"
        return f"{self.head.snapshot[:SHORT]} (step {self.head.step})"


def now() -> str:
    """The time as records hold it: UTC, to the microsecond."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


class Chain:
    """The snapshots of a run, in a store. Opening one reads a single small object.

    All methods read the store each time (a chain grows while others look), may block on I/O, and raise
    `Damaged` where bytes are not the ones that were written, `Unavailable` where the store does not answer.
    """

    def __init__(self, url: str | PathLike[str] | Store) -> None:
        """Open the chain at `url`.

        Raises:
            NotFound: there is none.
            Unsupported: a newer format wrote it.
        """
        self.store = open_store(url)
        try:
            self.about = self._sealed(keys.CHAIN, ChainRecord)
        except NotFound as error:
            raise NotFound(
                f"{self.store.url} is not an Everstep chain (it has no {keys.CHAIN})",
                kept=error.kept,
                next="everstep -r PATH_OF_THE_CHAIN log",
                key=keys.CHAIN,
            ) from error

    @classmethod
    def create(cls, url: str | PathLike[str] | Store, grid_bytes: int = GRID_BYTES) -> Chain:
        """Open the chain at `url`, or create one where there is nothing yet; durable on return.

        A store that may not be able to keep a chain is probed before one is created.

        Raises:
            Mismatch: something else is there; nothing was touched.
            Unsupported: the store cannot keep a chain, as its probe has found.
        """
        fresh = ChainRecord(chain=secrets.token_hex(16), created_at=now(), grid_bytes=grid_bytes)
        return cls.create_as(url, record.seal(fresh))

    @classmethod
    def create_as(cls, url: str | PathLike[str] | Store, sealed: bytes) -> Chain:
        """The same with a given chain record: so a replica becomes the same chain as what it is one of."""
        store = open_store(url)
        try:
            return cls(store)
        except NotFound:
            refuse_foreign(store)
        if isinstance(store, Probing):
            store.probe()
        # Who loses this race finds the winner's chain just as well.
        store.put(keys.CHAIN, [sealed])
        return cls(store)

    @property
    def url(self) -> str:
        return self.store.url

    # -- reading one object -------------------------------------------------------------------------------

    def snapshot(self, id: str) -> Snapshot:
        """The snapshot with this full id. Raises NotFound, Damaged."""
        key = keys.snapshot(id)

        def accept(data: Buffer) -> Snapshot:
            if digest(data) != id:
                raise Damaged(f"snapshot record {id[:SHORT]} does not match its digest", key=key)
            return Snapshot(id, _located(lambda: record.decode(data, SnapshotRecord), key))

        return self._from_any(key, record.MAX_RECORD_BYTES, accept)

    def refuse_pruned(self, snapshot: Snapshot, what: str) -> None:
        """For who misses a part of a snapshot: raises NotFound where all of it was pruned while it `what`."""
        try:
            self.snapshot(snapshot.id)
        except NotFound as error:
            raise NotFound(
                f"snapshot {snapshot.short} of {self.url} was pruned while it {what}",
                next=f"everstep -r {self.url} log",
            ) from error

    def manifest(self, snapshot: Snapshot) -> Manifest:
        """What a snapshot consists of: its manifest, or those of all ranks joined, which takes the time and
        memory of all of them. Raises Damaged, also where one is missing."""
        return joined(snapshot, self.manifests(snapshot))

    def manifests(self, snapshot: Snapshot) -> tuple[Manifest, ...]:
        """The manifest of each rank of a snapshot, in order. Reads several at once where each takes its time.
        Raises Damaged, also where one is missing."""
        ranks = len(snapshot.record.manifests)
        found: dict[int, Manifest] = {}

        def read(rank: int) -> None:
            found[rank] = self.part(snapshot, rank)

        in_parallel(range(ranks), self.store.at_once if isinstance(self.store, Distant) else 1, lambda: read)
        parts = tuple(found[rank] for rank in range(ranks))
        if manifests.state_of_parts([part.state for part in parts]) != snapshot.record.state:
            key = keys.manifest(snapshot.record.manifests[0]) if ranks == 1 else keys.snapshot(snapshot.id)
            raise Damaged(
                f"snapshot {snapshot.short} and its manifest{'s' * (ranks > 1)} name different states",
                key=key,
            )
        return parts

    def part(self, snapshot: Snapshot, rank: int) -> Manifest:
        """The manifest of one rank of a snapshot. Raises Damaged, also where it is missing."""
        name = snapshot.record.manifests[rank]
        key = keys.manifest(name)

        def accept(data: Buffer) -> Manifest:
            if digest(data) != name:
                raise Damaged(f"manifest {name[:SHORT]} does not match its digest", key=key)
            return _located(lambda: manifests.decode(data), key)

        try:
            manifest = self._from_any(key, manifests.MAX_STORED_BYTES, accept)
        except NotFound as error:
            raise Damaged(f"manifest {name[:SHORT]} of {snapshot.short} is missing", key=key) from error
        if (manifest.rank, manifest.ranks) != (rank, len(snapshot.record.manifests)):
            raise Damaged(
                f"snapshot {snapshot.short} names a manifest of rank {manifest.rank} of {manifest.ranks} as "
                f"that of rank {rank} of {len(snapshot.record.manifests)}",
                key=keys.snapshot(snapshot.id),
            )
        return manifest

    def _sealed(self, key: str, kind: type[Sealed]) -> Sealed:
        def accept(data: Buffer) -> Sealed:
            return _located(lambda: record.unseal(data, kind, key), key)

        return self._from_any(key, record.MAX_RECORD_BYTES, accept)

    def _from_any(self, key: str, limit: int, accept: Callable[[Buffer], Made]) -> Made:
        """What `accept` makes of an object; where the store has several copies, of the first that is good. Of
        what is wrong with them damage weighs more than that one is away, and that more than that one lacks
        it.
        """
        failed: Damaged | Unavailable | NotFound | None = None
        for store in copies_of(self.store):
            try:
                return accept(store.get(key, 0, limit + 1))
            except (Damaged, Unavailable, NotFound) as error:
                if failed is None or _WEIGHT[type(error)] > _WEIGHT[type(failed)]:
                    failed = error
        assert failed is not None
        raise failed

    # -- history ------------------------------------------------------------------------------------------

    def points(self, branch: str = MAIN) -> Iterator[Point]:
        """The advances of a branch's head, newest first, damaged ones included. Lazy."""
        for entry in self.store.list(keys.head(branch)):
            number = keys.number_of(entry.key)
            if number is None or not is_object(entry.key):
                continue
            point = self._point(number, entry.key)
            if point is not None:
                yield point

    def _point(self, number: int, key: str) -> Point | None:
        """None where it is a fence, or has gone since it was listed: somebody prunes."""
        try:
            head = self._sealed(key, HeadRecord)
        except NotFound:
            return None
        except (Damaged, Unsupported) as error:
            return Point(number, key, None, None, error)
        if head.fence is True:
            return None
        try:
            return Point(number, key, head, self.snapshot(head.snapshot))
        except NotFound:
            if not exists(self.store, key):
                return None
            missing = keys.snapshot(head.snapshot)
            damage = Damaged(f"snapshot record {head.snapshot[:SHORT]} is missing", key=missing)
            return Point(number, key, head, None, damage)
        except (Damaged, Unsupported) as error:
            return Point(number, key, head, None, error)

    def heads(self, branch: str = MAIN) -> Iterator[HeadRecord]:
        """The readable head records of a branch, newest first: what `points` gives without a look at the
        snapshots. Lazy."""
        for entry in self.store.list(keys.head(branch)):
            if is_object(entry.key):
                try:
                    head = self._sealed(entry.key, HeadRecord)
                except (Damaged, NotFound, Unsupported):
                    continue
                if head.fence is not True:
                    yield head

    def line(self, branch: str = MAIN) -> Iterator[Point]:
        """The advances that led to a branch's head, newest first: those that a rollback took back are left
        out. Lazy.

        Where it is not known any more what a rollback went back to, nothing before it is part of the line.
        """
        back_to = ""
        for point in self.points(branch):
            if back_to:
                if point.head is None or point.head.snapshot != back_to:
                    continue
                back_to = "" if _rolled_back(point) is None else back_to
                # It was given already, by the advance that went back to it.
                continue
            yield point
            back_to = _rolled_back(point) or ""

    def snapshots(self, branch: str = MAIN) -> Iterator[Snapshot]:
        """The readable snapshots of a branch, newest first, each once; also those that a rollback took back.
        Lazy."""
        seen: set[str] = set()
        for point in self.points(branch):
            if point.snapshot is not None and point.snapshot.id not in seen:
                seen.add(point.snapshot.id)
                yield point.snapshot

    def head_number(self, branch: str = MAIN) -> int:
        """The number of the branch's newest head record; 0 where it has none. One listing."""
        return newest(self.store, keys.head(branch))

    def head(self, branch: str = MAIN) -> Snapshot | None:
        """The newest snapshot of a branch, or None. Raises Damaged when it is unreadable, Unsupported when a
        newer version wrote it."""
        for point in self.points(branch):
            if isinstance(point.damage, Unsupported):
                raise point.damage
            if point.damage is not None:
                raise Damaged(
                    f"the head of branch {branch!r} cannot be read ({point.damage.problem})",
                    kept="the snapshots before it are not touched by this",
                    next=f"everstep -r {self.url} log",
                    key=point.damage.key,
                )
            return point.snapshot
        return None

    def branches(self) -> list[str]:
        """The names of all branches, sorted."""
        found = (entry.key for entry in self.store.list(keys.HEADS))
        names = sorted({key.split("/")[1] for key in found if is_object(key)})
        return [name for name in names if self.is_branch(name)]

    def tags(self) -> dict[str, str]:
        """The tags and the ids they name."""
        named = {name: self._sealed(key, TagRecord).snapshot for name, key in self.tag_keys().items()}
        return {name: id for name, id in named.items() if id}

    def tag_keys(self) -> dict[str, str]:
        """The names of all tags that are or were, and the key of the newest record of each."""
        found: dict[str, str] = {}
        for entry in self.store.list(keys.TAGS):
            if is_object(entry.key):
                found.setdefault(entry.key.split("/")[1], entry.key)
        return found

    def find(self, ref: str, branch: str = MAIN) -> Snapshot:
        """The snapshot that a reference means.

        Args:
            ref: `head` or `latest` (newest of the branch), a branch's or tag's name, `tag:NAME`, `step:500`,
                `best:loss` (the lowest), `best:acc:max`, `@{2}` (where the head was two advances ago), the
                first four or more digits of an id; `NAME@REF` is one of these on another branch; each may be
                followed by `~` (its parent) or `~N` (N back). A name goes before the beginning of an id.
            branch: the branch that is meant where the reference names none.

        Raises:
            NotFound: it means none; the message names what there is.
            Mismatch: the prefix of an id, or a name, fits several; the message lists them.
        """
        meant = refs.parse(ref, branch)
        return self._ancestor(self._based(meant.base, ref), meant.back, ref)

    def _based(self, base: refs.Base, ref: str) -> Snapshot:
        match base:
            case refs.Head():
                return self._newest(base.branch)
            case refs.Advance():
                return self._advance(base)
            case refs.Step():
                return self._at_step(base.step, base.branch)
            case refs.Best():
                return self._best(base)
            case refs.Tag():
                return self._of_tag(base.name, self.tagged(base.name))
            case refs.Name():
                return self._named(base.text)

    def is_branch(self, name: str) -> bool:
        """Whether there is a branch of this name; fences alone make none."""
        number = self.head_number(name) if keys.can_name(name) else 0
        if not number:
            return False
        key = keys.numbered(keys.head(name), number)
        try:
            newest = self._sealed(key, HeadRecord)
        except (Damaged, NotFound, Unsupported):
            newest = None
        # All but the newest are looked at only where that is a fence, or has just gone.
        return (newest is not None and newest.fence is not True) or next(self.points(name), None) is not None

    def tagged(self, name: str) -> str:
        """The id that a tag names, or ""; other tags are not read, whatever has become of them."""
        if not keys.can_name(name):
            return ""
        number = newest(self.store, keys.tag(name))
        return self._sealed(keys.numbered(keys.tag(name), number), TagRecord).snapshot if number else ""

    def _named(self, name: str) -> Snapshot:
        branch, tagged = self.is_branch(name), self.tagged(name)
        if branch and tagged:
            head = next((head.snapshot[:SHORT] for head in self.heads(name)), "one that cannot be read")
            raise Mismatch(
                f"{name} is a branch, whose head is {head}, and a tag of {tagged[:SHORT]}",
                next=f"{name}@head, or tag:{name}",
            )
        if branch:
            return self._newest(name)
        if tagged:
            return self._of_tag(name, tagged)
        if _ID_PREFIX.fullmatch(name):
            return self._with_prefix(name)
        raise self._unknown(f"{self.url} has no snapshot {name!r}{self._choice()}")

    def _of_tag(self, name: str, id: str) -> Snapshot:
        if not id:
            raise self._unknown(f"{self.url} has no tag {name!r}{self._choice()}")
        try:
            return self.snapshot(id)
        except NotFound as error:
            raise NotFound(
                f"the tag {name!r} names snapshot {id[:SHORT]}, which is not there any more",
                next=f"everstep -r {self.url} tag -d {name}",
                key=error.key,
            ) from error

    def _newest(self, branch: str) -> Snapshot:
        newest = self.head(branch)
        if newest is None:
            raise self._unknown(f"{self.url} has no snapshot on branch {branch!r} yet{self._choice()}")
        return newest

    def _advance(self, ref: refs.Advance) -> Snapshot:
        listed = (entry.key for entry in self.store.list(keys.head(ref.branch)) if is_object(entry.key))
        found = list(islice(listed, ref.count + 1))
        if len(found) <= ref.count:
            raise NotFound(
                f"{self.url} knows of {len(found)} advances of branch {ref.branch!r}, and @{{{ref.count}}} "
                "is before the oldest of them",
                next=f"everstep -r {self.url} reflog --branch {ref.branch}",
            )
        return self.snapshot(self._sealed(found[-1], HeadRecord).snapshot)

    def _at_step(self, step: int, branch: str) -> Snapshot:
        steps: list[int] = []
        for head in self.heads(branch):
            if head.step == step:
                return self.snapshot(head.snapshot)
            steps.append(head.step)
        near = sorted(sorted(set(steps), key=lambda other: abs(other - step))[:3])
        hint = f"; the nearest are at {', '.join(map(str, near))}" if near else ""
        raise self._unknown(f"{self.url} has no snapshot at step {step}{hint}")

    def _best(self, ref: refs.Best) -> Snapshot:
        """The newest of those with the best value."""
        best: tuple[float, Snapshot] | None = None
        metrics: set[str] = set()
        for snapshot in self.snapshots(ref.branch):
            metrics |= snapshot.record.metrics.keys()
            value = _comparable(snapshot.record.metrics.get(ref.metric))
            if value is None:
                continue
            if best is None or (value > best[0] if ref.highest else value < best[0]):
                best = value, snapshot
        if best is not None:
            return best[1]
        if ref.metric in metrics:
            raise self._unknown(f"the metric {ref.metric!r} is nan in all snapshots of branch {ref.branch!r}")
        there = f"; they have {', '.join(sorted(metrics)[:8])}" if metrics else ""
        raise self._unknown(
            f"no snapshot of branch {ref.branch!r} of {self.url} has the metric {ref.metric!r}{there}"
        )

    def _with_prefix(self, prefix: str) -> Snapshot:
        listed_keys = (entry.key for entry in self.store.list(keys.snapshot(prefix)))
        found = [key.removeprefix(keys.SNAPSHOTS) for key in listed_keys if is_object(key)]
        if len(found) > 1:
            listed = ", ".join(id[: len(prefix) + 4] for id in found[:8])
            raise Mismatch(
                f"{prefix} is the beginning of {len(found)} snapshots ({listed})", next="give more digits"
            )
        if not found:
            raise self._unknown(f"{self.url} has no snapshot whose id begins with {prefix}{self._choice()}")
        return self.snapshot(found[0])

    def _ancestor(self, snapshot: Snapshot, generations: int, ref: str) -> Snapshot:
        for done in range(generations):
            try:
                snapshot = self.snapshot(snapshot.record.parents[0])
            except (IndexError, NotFound):
                reason = f"{snapshot.short} is {done} back and its parent is not kept"
                raise self._unknown(f"{self.url} has no snapshot {ref!r}: {reason}") from None
        return snapshot

    def _choice(self) -> str:
        """What there is, for a message about what there is not."""
        heads = [
            f"{branch} at step {point.head.step}"
            for branch in self.branches()
            for point in islice(self.points(branch), 1)
            if point.head
        ]
        names = [*heads, *(f"tag {name}" for name in self.tag_keys())]
        return f"; it has {', '.join(names[:8])}" if names else "; it has none at all"

    def _unknown(self, problem: str) -> NotFound:
        return NotFound(problem, next=f"everstep -r {self.url} log")


def joined(snapshot: Snapshot, parts: Sequence[Manifest]) -> Manifest:
    """The manifests of all ranks of a snapshot as one. Raises Damaged where they do not join."""
    return _located(lambda: join(parts), keys.snapshot(snapshot.id))


def _rolled_back(point: Point) -> str | None:
    """What an advance went back to; None where it did not."""
    if point.head is None or point.head.moved is None or point.head.moved.what != ROLLBACK:
        return None
    return point.head.snapshot


def _comparable(value: Number | None) -> float | None:
    """A metric that can be better or worse than another; nan is neither."""
    try:
        number = math.nan if value is None else float(value)
    except ValueError:
        return None
    return None if math.isnan(number) else number


def find_anywhere(text: str, here: Callable[[], Chain], branch: str = MAIN) -> tuple[Chain, Snapshot]:
    """The chain and the snapshot that `PATH@REF` means, or `REF` alone of the chain `here`.

    What stands before the `@` is a chain if it has a `/` or is the directory of one; no branch has a `/`.
    Raises as `Chain.find`.
    """
    place, ref = refs.split(text)
    elsewhere = "@" in text and ("/" in place or Path(place, keys.CHAIN).is_file())
    chain = Chain(place) if elsewhere else here()
    return chain, chain.find((ref if elsewhere else text) or "head", branch)


def _located(read: Callable[[], Kind], key: str) -> Kind:
    """What `read` returns; its errors get the key of the object they are about."""
    try:
        return read()
    except EverstepError as error:
        error.key = error.key or key
        raise


def refuse_foreign(store: Store) -> None:
    """A chain is created only where nothing else is: a mistyped path must not fill with packs. Raises
    Mismatch."""
    if isinstance(store, LocalStore):
        if store.root.exists() and not store.root.is_dir():
            raise Mismatch(f"{store.url} is a file, not a directory for a chain", kept="nothing was touched")
        names = sorted(path.name for path in store.root.iterdir()) if store.root.is_dir() else []
        others = [name for name in names if name != TEMPORARY]
    else:
        others = [entry.key for entry in store.list(limit=16) if not entry.key.startswith(PROBES)]
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise Mismatch(
            f"{store.url} is not an Everstep chain and not empty either (it holds {shown})",
            kept="nothing was touched",
            next=f"everstep.open({store.url.rstrip('/') + '/chain'!r}, ...), or another path",
        )
