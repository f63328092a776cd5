"""Giving up packs of which little is needed any more: what is needed of them is copied to new packs, and a
relocation record says where it is. Then nothing needs the old packs, and a prune deletes them as any other.

All that is added here is harmless wherever it stops: until the record is there the new packs are orphans, and
from then on a chunk is in two places. See docs/decisions/0021-repack.md.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from everstep.chain import names
from everstep.chain.history import Chain, now
from everstep.chain.packing import PACK_BYTES
from everstep.chain.reached import At, Reached
from everstep.chain.relocations import write_down
from everstep.errors import Damaged, NotFound, Unsupported
from everstep.format import keys, pack, record
from everstep.format.chunk import Buffer, Encoding, aligned, decode, digest
from everstep.format.manifest import RELOCATED
from everstep.format.record import NO_SNAPSHOT, HeadRecord, Spot
from everstep.store.parallel import in_parallel

MAX_SPOTS = 20_000
"""So many go into one record, which stays below `record.MAX_RECORD_BYTES`; what is more is for the next."""

THREADS = 8
"""Chunks of a pack that are read at once."""


@dataclass(frozen=True)
class Repack:
    """When packs are given up: while more than the share `max_unused` of what all packs take is needed by
    nothing, those of which most is not; and only if that frees `worth_bytes` at least."""

    max_unused: float = 0.1
    worth_bytes: int = 1024 * 1024


@dataclass(frozen=True)
class Move:
    """What is needed of a pack that is given up: by offset there, the places that manifests give it.
    `moved_bytes` is about what that takes elsewhere."""

    pack: str
    size_bytes: int
    moved_bytes: int
    live: Mapping[int, Collection[At]]

    @property
    def freed_bytes(self) -> int:
        return self.size_bytes - self.moved_bytes


def chosen(policy: Repack, reached: Reached, sizes: Mapping[str, int]) -> list[Move]:
    """The packs to give up, those of which least is needed first.

    Args:
        reached: what is needed, looked at closely.
        sizes: the sizes in bytes of the packs that there are.
    """
    moves = [
        _move(name, sizes[name], live, reached)
        for name, live in reached.live.items()
        if live and name in sizes
    ]
    moves = [one for one in moves if one.freed_bytes > 0]
    moves.sort(key=lambda one: (one.moved_bytes / one.size_bytes, one.pack))
    total = sum(sizes[name] for name in reached.packs if name in sizes)
    unused = sum(one.freed_bytes for one in moves)
    found = []
    for one in moves:
        if unused <= policy.max_unused * total:
            break
        found.append(one)
        unused -= one.freed_bytes
        total -= one.freed_bytes
    return found if sum(one.freed_bytes for one in found) >= max(policy.worth_bytes, 1) else []


def _move(name: str, size_bytes: int, live: Mapping[int, int], reached: Reached) -> Move:
    moved = sum(map(aligned, live.values())) + aligned(pack.footer_bytes(len(live)) + pack.TRAILER_BYTES)
    known = {offset: {(name, offset)} | reached.known_as.get((name, offset), set()) for offset in live}
    return Move(name, size_bytes, moved, known)


@dataclass
class Repacked:
    """What was copied: the packs that are given up, the new ones with their sizes in bytes, and sentences
    about what could not be read. `more`: not all that was asked for went into one record."""

    given_up: list[str] = field(default_factory=list)
    packs: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    more: bool = False

    @property
    def copied_bytes(self) -> int:
        return sum(self.packs.values())


def relocate(chain: Chain, moves: Sequence[Move]) -> Repacked:
    """Copy what is needed of packs to new ones, each chunk checked on the way, and write down where it is:
    durable on return. Deletes nothing. A pack that somebody else deletes meanwhile is left out, and so is one
    of which something that is needed is damaged.

    Blocks for reading and writing all that; takes the memory of one pack.

    Raises:
        Unavailable: the store has no room or does not answer; nothing that was there has changed.
    """
    done = Repacked()
    copying = _Copying(chain, done)
    for one in moves:
        if copying.spots >= MAX_SPOTS:
            done.more = True
            break
        copying.copy(one)
    copying.close_pack()
    if done.given_up:
        _mark(chain)
        write_down(chain.store, done.packs, copying.moved)
    return done


class _Copying:
    """Fills new packs, one at a time."""

    def __init__(self, chain: Chain, done: Repacked) -> None:
        self.chain = chain
        self.done = done
        self.moved: dict[str, list[Spot]] = {}
        self.spots = 0
        self._builder = pack.Builder()

    def copy(self, move: Move) -> None:
        """All that is needed of a pack, or nothing."""
        key = keys.pack(move.pack)
        try:
            entries = self._entries(move)
            for batch in _batches(entries):
                self._add(move, batch, self._read(key, batch))
        except NotFound:
            self._leave_out(move)
        except (Damaged, Unsupported) as error:
            self._leave_out(move)
            self.done.remarks.append(f"{key} was not repacked: {error.problem}")
        else:
            self.done.given_up.append(move.pack)

    def _entries(self, move: Move) -> list[pack.Entry]:
        """Those of the chunks that are needed, as the pack's own footer has them."""
        key, size = keys.pack(move.pack), move.size_bytes
        end = self.chain.store.get(key, size - pack.TRAILER_BYTES, pack.TRAILER_BYTES)
        trailer = pack.decode_trailer(end, size)
        tail = self.chain.store.get(key, trailer.footer_offset, trailer.tail_bytes)
        by_offset = {one.offset: one for one in pack.decode_tail(tail, size, move.pack).entries}
        if move.live.keys() - by_offset.keys():
            raise Damaged("its footer and a manifest disagree about what it holds")
        return [by_offset[offset] for offset in sorted(move.live)]

    def _read(self, key: str, entries: Sequence[pack.Entry]) -> list[Buffer]:
        found: dict[int, Buffer] = {}

        def read(one: pack.Entry) -> None:
            stored = self.chain.store.get(key, one.offset, one.stored_bytes)
            _check(one, stored)
            found[one.offset] = stored

        in_parallel(entries, THREADS, lambda: read)
        return [found[one.offset] for one in entries]

    def _add(self, move: Move, entries: Iterable[pack.Entry], stored: Iterable[Buffer]) -> None:
        for one, data in zip(entries, stored, strict=True):
            if self._builder.end >= PACK_BYTES:
                self.close_pack()
            spot = partial(Spot, pack=len(self.done.packs), offset=self._builder.end)
            for source, at in sorted(move.live[one.offset]):
                self.moved.setdefault(source, []).append(spot(at))
                self.spots += 1
            self._builder.add(one.digest, one.size_bytes, data, one.stored_bytes, one.encoding, one.base)

    def _leave_out(self, move: Move) -> None:
        """What was copied of it already does no harm; nobody is told of it."""
        for source, at in {place for places in move.live.values() for place in places}:
            spots = self.moved.get(source, [])
            self.moved[source] = [spot for spot in spots if spot.at != at]

    def close_pack(self) -> None:
        """Put what was gathered. Its name is one that nobody else ever gave: so no prune has it doomed."""
        if self._builder.entries:
            name, parts = self._builder.finish(salt=secrets.token_bytes(16))
            self.chain.store.put(keys.pack(name), parts)
            self.done.packs[name] = sum(map(len, parts))
            self._builder = pack.Builder()


def _batches(entries: Iterable[pack.Entry]) -> Iterator[list[pack.Entry]]:
    """Such as fit in memory together."""
    batch: list[pack.Entry] = []
    for one in entries:
        if batch and sum(each.stored_bytes for each in batch) + one.stored_bytes > PACK_BYTES:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _check(one: pack.Entry, stored: Buffer) -> None:
    """Raises Damaged where a chunk is not stored as it was written."""
    whole = pack.is_stored(one, stored)
    if whole and one.encoding != Encoding.RAW and not one.base:
        whole = digest(decode(stored, one.encoding, one.size_bytes)) == one.digest
    if not whole:
        raise Damaged(f"chunk {one.digest[:12]} is not stored as it was written")


def _mark(chain: Chain) -> None:
    """Make the newest head record of each branch one that who does not know relocations cannot read: such a
    one would miss packs, and take new ones for orphans."""
    listed = (entry.key for entry in chain.store.list(keys.HEADS))
    for branch in sorted({key.split("/")[1] for key in listed if names.is_object(key)}):
        _put_fence(chain, branch)


def _put_fence(chain: Chain, branch: str) -> None:
    while True:
        number = chain.head_number(branch)
        key = keys.numbered(keys.head(branch), number)
        try:
            newest = record.unseal(chain.store.get(key), HeadRecord, key) if number else None
        except NotFound:
            continue  # It has just gone: there is another, or none.
        if newest is not None and newest.fence is True and newest.format >= RELOCATED:
            return
        fence = HeadRecord(
            snapshot=newest.snapshot if newest is not None else NO_SNAPSHOT,
            step=newest.step if newest is not None else 0,
            writer=newest.writer if newest is not None else 0,
            nonce=secrets.token_hex(8),
            at=now(),
            branch=branch,
            number=number + 1,
            format=RELOCATED,
            fence=True,
        )
        if chain.store.put(fence.key, [record.seal(fence)]):
            return
