"""Reading objects that are cut into shards: from the parts themselves while they are whole, from any k
shards where they are not."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from everstep.errors import Damaged, EverstepError, NotFound, Unsupported
from everstep.store.agreed import AWAY, ON_ITS_WAY, unreachable
from everstep.store.base import MAX_KEY_CHARACTERS, Buffer, Store
from everstep.store.patience import Clock, tries
from everstep.store.reads import copy
from everstep.store.shards import (
    BLOCK_BYTES,
    HEAD_BYTES,
    Header,
    Shape,
    decode_header,
    head_bytes,
    joined,
)

PREFIX = "shards/"
"""The shard of an object lies with each member under this and the object's key."""

_NEAR_BYTES = 16 * 1024 * 1024
"""So much of headers is kept: they never change, and a reader needs those of a pack again and again."""


def can_have_shards(key: str) -> bool:
    return len(PREFIX + key) <= MAX_KEY_CHARACTERS


@dataclass
class Found:
    """The shards of an object: by index, whose they are and what they say. `absent`, `away` and `damaged` are
    the numbers of the other members that were asked."""

    shards: dict[int, tuple[int, Header]] = field(default_factory=dict)
    absent: list[int] = field(default_factory=list)
    away: dict[int, EverstepError] = field(default_factory=dict)
    damaged: dict[int, EverstepError] = field(default_factory=dict)

    @property
    def any(self) -> Header:
        return next(iter(self.shards.values()))[1]

    @property
    def asked(self) -> int:
        return len(self.shards) + len(self.absent) + len(self.away) + len(self.damaged)


class Sharded:
    """Objects over the members of a set, each in shards.

    Args:
        each: calls a function with each of some members' numbers, several at once where that pays.
    """

    def __init__(
        self,
        url: str,
        shape: Shape,
        members: Sequence[Store],
        each: Callable[[Sequence[int], Callable[[int], None]], None],
        clock: Clock,
    ) -> None:
        self._url = url
        self._shape = shape
        self._members = members
        self._each = each
        self._clock = clock
        self._near: OrderedDict[str, Found] = OrderedDict()
        self._near_bytes = 0
        self._lock = threading.Lock()

    # -- which there are ----------------------------------------------------------------------------------

    def forget(self, key: str) -> None:
        """What is known of its headers."""
        with self._lock:
            found = self._near.pop(key, None)
            self._near_bytes -= _kept_bytes(found) if found else 0

    def found(self, key: str) -> Found:
        """Shards enough to read an object. Raises NotFound, Unavailable, Damaged."""
        with self._lock:
            near = self._near.get(key)
            if near is not None:
                self._near.move_to_end(key)
                return near
        found = self.look(key, range(self._shape.k))
        if len(found.shards) < self._shape.k:
            found = self.look(key, range(self._shape.k, self._shape.members), found)
        for _ in tries(ON_ITS_WAY, self._clock):
            if not self._may_come(found):
                break
            found = self.all(key)
        self.refuse_few(key, found)
        with self._lock:
            if key not in self._near:
                self._near[key] = found
                self._near_bytes += _kept_bytes(found)
            while self._near_bytes > _NEAR_BYTES:
                self._near_bytes -= _kept_bytes(self._near.popitem(last=False)[1])
        return found

    def all(self, key: str) -> Found:
        """All shards that there are, looked for anew."""
        return self.look(key, range(self._shape.members))

    def look(self, key: str, numbers: Sequence[int], found: Found | None = None) -> Found:
        found = found or Found()
        answers: dict[int, Header | EverstepError] = {}

        def ask(number: int) -> None:
            try:
                answers[number] = self._header(key, number)
            except (NotFound, Damaged, *AWAY) as error:
                answers[number] = error

        self._each(numbers, ask)
        for number, answer in sorted(answers.items()):
            if isinstance(answer, Header):
                self._add(found, number, answer)
            elif isinstance(answer, NotFound):
                found.absent.append(number)
            elif isinstance(answer, Damaged):
                found.damaged[number] = answer
            else:
                found.away[number] = answer
        return found

    def _may_come(self, found: Found) -> bool:
        """Whether too few are there, and more may be with members that are away, or on their way."""
        there = len(found.shards)
        return 0 < there < self._shape.k <= there + len(found.away) and len(found.away) <= self._shape.m

    def _add(self, found: Found, number: int, header: Header) -> None:
        if header.shape != self._shape:
            found.damaged[number] = Damaged(f"it is a shard of a set of {header.shape}, not {self._shape}")
        elif header.index in found.shards:
            found.damaged[number] = Damaged(f"another member has shard {header.index + 1}, too")
        elif found.shards and found.any.size_bytes != header.size_bytes:
            found.damaged[number] = Damaged("the shards before it are of an object of another size")
        else:
            found.shards[header.index] = (number, header)

    def _header(self, key: str, number: int) -> Header:
        member = self._members[number]
        data = member.get(PREFIX + key, 0, HEAD_BYTES)
        try:
            wanted = head_bytes(data)
        except Unsupported as error:
            # A bit flipped in its version makes a shard look newer than it is; the others can tell.
            raise Damaged(error.problem) from error
        if wanted > len(data):
            data = bytes(data) + bytes(member.get(PREFIX + key, len(data), wanted - len(data)))
        return decode_header(data, key)

    def refuse_few(self, key: str, found: Found) -> None:
        """Raises what it means that there are fewer shards than it takes."""
        k, there = self._shape.k, len(found.shards)
        if there >= k:
            return
        if there + len(found.away) + len(found.damaged) < k:
            few = f"{there} of its shards are there, and it takes {k}" if there else ""
            raise NotFound(f"{self._url} has no object {key}", kept=few, key=key)
        if found.away:
            raise unreachable(self._url, key, list(found.away.values()), k, self._shape.members)
        raise self._too_few(key, there)

    def _too_few(self, key: str, there: int) -> Damaged:
        return Damaged(
            f"{there} shards of {key} in {self._url} are whole, and it takes {self._shape.k}",
            kept="nothing was touched",
            next=f"everstep -r {self._url} repair",
            key=key,
        )

    # -- reading ------------------------------------------------------------------------------------------

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        """As of a store. Every byte was held against its block's digest."""
        found = self.found(key)
        try:
            return self._read_into(key, found, start, buffers)
        except (Damaged, NotFound):
            # What is known of it may be old: it was deleted, or repaired with other members.
            self.forget(key)
            return self._read_into(key, self.found(key), start, buffers)

    def _read_into(self, key: str, found: Found, start: int, buffers: Sequence[memoryview]) -> int:
        size, part = found.any.size_bytes, found.any.part_bytes
        pieces: dict[int, list[tuple[int, memoryview]]] = defaultdict(list)
        at = start
        for buffer in buffers:
            done = 0
            while done < len(buffer) and at < size:
                index, offset = divmod(at, part)
                count = min(len(buffer) - done, part - offset, size - at)
                pieces[index].append((offset, buffer[done : done + count]))
                done, at = done + count, at + count
        self._each(list(pieces), lambda index: self._fill(key, found, index, pieces[index]))
        return at - start if at > start else 0

    def _fill(self, key: str, found: Found, index: int, pieces: list[tuple[int, memoryview]]) -> None:
        """Pieces of one part, one after the other."""
        first, end = pieces[0][0], pieces[-1][0] + len(pieces[-1][1])
        low = first // BLOCK_BYTES * BLOCK_BYTES
        high = min(-(-end // BLOCK_BYTES) * BLOCK_BYTES, found.any.part_bytes)
        straight = len(pieces) == 1 and (low, high) == (first, end)
        memory = pieces[0][1] if straight else memoryview(bytearray(high - low))
        for begin, stop in self._wanting(key, found, index, low, memory):
            data = self._rebuilt(key, found, index, low + begin, stop - begin)
            copy(memory[begin:stop], memoryview(data))
        if not straight:
            for offset, buffer in pieces:
                copy(buffer, memory[offset - low : offset - low + len(buffer)])

    def _wanting(
        self, key: str, found: Found, index: int, start: int, memory: memoryview
    ) -> Iterator[tuple[int, int]]:
        """Read a range of a part; gives the runs of blocks in it that did not come as they were written."""
        bad = []
        shard = found.shards.get(index)
        count = self._part(key, shard, start, memory) if shard is not None else 0
        for at in range(0, len(memory), BLOCK_BYTES):
            block = memory[at : at + BLOCK_BYTES]
            whole = count >= at + len(block) and shard is not None
            if not whole or not shard[1].is_block((start + at) // BLOCK_BYTES, block):  # type: ignore[index]
                bad.append((at, at + len(block)))
        run: tuple[int, int] | None = None
        for begin, stop in bad:
            if run is not None and run[1] == begin:
                run = (run[0], stop)
                continue
            if run is not None:
                yield run
            run = (begin, stop)
        if run is not None:
            yield run

    def _part(self, key: str, shard: tuple[int, Header], start: int, memory: memoryview) -> int:
        number, header = shard
        try:
            return self._members[number].read_into(PREFIX + key, header.payload_at + start, [memory])
        except (NotFound, Damaged, *AWAY):
            return 0

    def _rebuilt(self, key: str, found: Found, index: int, start: int, size: int) -> Buffer:
        """A range of a part, of whole blocks, out of the same of other shards."""
        everything = found if found.asked == self._shape.members else self.all(key)
        pieces: dict[int, Buffer] = {}
        for other in sorted(everything.shards):
            if len(pieces) < self._shape.k and other != index:
                memory = memoryview(bytearray(size))
                if not list(self._wanting(key, everything, other, start, memory)):
                    pieces[other] = memory
        if len(pieces) >= self._shape.k:
            return joined(self._shape, pieces)[index]
        if size <= BLOCK_BYTES:
            self.refuse_few(key, everything)
            raise self._too_few(key, len(pieces))
        # Of each block other shards may be whole.
        return b"".join(
            bytes(self._rebuilt(key, everything, index, start + at, min(BLOCK_BYTES, size - at)))
            for at in range(0, size, BLOCK_BYTES)
        )

    def is_whole(self, key: str, index: int, found: Found) -> bool:
        """Whether a shard is as it was written, its end included; all of it is read."""
        number, header = found.shards[index]
        stride = 64 * BLOCK_BYTES
        for at in range(0, header.part_bytes, stride):
            memory = memoryview(bytearray(min(stride, header.part_bytes - at)))
            if list(self._wanting(key, found, index, at, memory)):
                return False
        end = header.payload_at + header.part_bytes
        try:
            tail = self._members[number].get(PREFIX + key, end, header.length - end + 1)
        except (NotFound, Damaged, *AWAY):
            return False
        return bytes(tail) == bytes(header.length - end)


def _kept_bytes(found: Found) -> int:
    return sum(len(header.table) + 512 for _, header in found.shards.values())
