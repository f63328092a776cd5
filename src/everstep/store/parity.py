"""A store made of k+m others, any m of which may be lost: `parity:4+2:/disk1/x,/disk2/x,...`.

A large object that is named by its digest is cut into shards (`store/sharded`), one with each member; all
others are kept as copies by every member (`store/agreed`). Either is there when k members hold their part of
it, and not with fewer; so with m members away everything can be read, and written, too. Since k > m, no two
sets of k members are without a common one: of several who create one object exactly one wins, and what
members that were away have not heard of (a delete, for one) stays undone for good.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from everstep.errors import Conflict, Damaged, EverstepError, Mismatch, NotFound, Unavailable
from everstep.store.agreed import AWAY, ON_ITS_WAY, Agreed, unreachable
from everstep.store.base import (
    PROBES,
    Addressed,
    Buffer,
    Entry,
    Probing,
    Store,
    checked,
    is_key,
    is_named_by_digest,
)
from everstep.store.local import LocalStore
from everstep.store.mending import Mending
from everstep.store.parallel import in_parallel
from everstep.store.patience import Clock, Patience, tries
from everstep.store.resting import Resting
from everstep.store.sharded import PREFIX, Sharded, can_have_shards
from everstep.store.shards import (
    COPY_BYTES,
    MAX_MEMBERS,
    SMALL_BYTES,
    Shape,
    Whole,
    copy_of,
    cut,
    most,
    refuse_without_zfec,
    size_by_length,
)

SCHEME = "parity:"
PATIENCE = Patience(deadline_s=30.0)
"""How long a member over a network is tried: the others are there, too."""

_ADDRESS = re.compile(r"parity:([0-9]{1,2})\+([0-9]{1,2}):(.+)", re.DOTALL)

_MORE = 8
"""A member is asked for so many more than are wanted: what fewer than k hold may stand among them."""


def parse(address: str) -> tuple[Shape, list[str]]:
    """From `parity:4+2:/disk1/x,/disk2/x,s3://bucket/x,...`. Raises Mismatch."""
    match = _ADDRESS.fullmatch(address)
    members = match[3].split(",") if match else []
    if match is None or not all(members):
        raise Mismatch(
            f"{address!r} is no address of a parity set",
            kept="nothing was touched",
            next=f"{SCHEME}4+2:DIRECTORY,DIRECTORY,..., six directories or URLs, or any other k+m",
        )
    shape = Shape(int(match[1]), int(match[2]))
    _check(shape, address, members)
    return shape, members


def _check(shape: Shape, url: str, members: Sequence[object]) -> None:
    example = ""
    if shape.k <= shape.m or not shape.m or shape.members > MAX_MEMBERS:
        problem = (
            f"a parity set of {shape} is none: k is more than m, m at least 1, and k+m at most {MAX_MEMBERS}"
        )
        example = "4+2; for two or three whole copies, replicas are the thing"
    elif len(members) != shape.members:
        problem = f"{url} names {len(members)} members, and {shape} is {shape.members}"
    elif len(set(map(str, members))) != len(members):
        problem = f"{url} names a member twice"
    else:
        return
    raise Mismatch(problem, kept="nothing was touched", next=example or f"{SCHEME}{shape}:ONE,TWO,...")


@dataclass
class _Kept:
    """What a listing shows of an object: the members that have a part of it, how long that is, and when."""

    numbers: list[int]
    lengths: list[int]
    at: float = 0.0

    def add(self, number: int, entry: Entry) -> None:
        self.numbers.append(number)
        self.lengths.append(entry.size_bytes)
        # The newest part's: who goes by age is to wait rather than to hurry.
        self.at = max(self.at, entry.modified_at)


class _Listing:
    """What one member has, of copies or of shards, under the keys of the objects. `error` says why it ended
    early."""

    def __init__(self, member: Store, number: int, inner: str, prefix: str, most_each: int | None) -> None:
        self.number = number
        self.inner = inner
        self.error: EverstepError | None = None
        self._most = most_each
        self._list = partial(member.list, inner + prefix, most_each)
        self._entries: Iterator[Entry] = iter(())
        self._first: Entry | None = None
        self._cut: str | None = None

    def begin(self) -> None:
        try:
            self._entries = self._list()
        except AWAY as error:
            self.error = error
            return
        self._first = self._next()

    def _next(self) -> Entry | None:
        try:
            return next(self._entries, None)
        except AWAY as error:
            self.error = error
            return None

    def rest(self) -> Iterator[tuple[str, _Listing, Entry]]:
        entry, count, key = self._first, 0, ""
        while entry is not None:
            count, key = count + 1, entry.key[len(self.inner) :]
            if self.inner or not key.startswith(PREFIX):
                yield key, self, entry
            entry = self._next()
        if self._most is not None and count >= self._most:
            self._cut = key

    def ends_before(self, key: str) -> bool:
        """Whether it was not asked as far as that."""
        return self._cut is not None and self._cut < key


class ParityStore:
    """Objects over `members`, of which any `shape.m` may be away or lost. Made without a request.

    Blocks for as long as its members do. `Unavailable` is raised where more than m of them are away. What was
    put while members were away lacks their part, until `mend` (`everstep repair`) has put it there.

    Args:
        shape: k and m; k is more than m.
        members: in an order that all who use them share; each holds nothing else. A wiped or replaced one
            may simply be empty.
        url: as the user typed it.
        clock: for tests.

    Raises:
        Mismatch: these cannot be a set.
        Unsupported: zfec is not installed.
    """

    def __init__(
        self, shape: Shape, members: Sequence[Store], *, url: str = "", clock: Clock | None = None
    ) -> None:
        refuse_without_zfec()
        self.url = url or f"{SCHEME}{shape}:" + ",".join(member.url for member in members)
        _check(shape, self.url, [id(member) for member in members])
        self.shape = shape
        self.members = tuple(members)
        self._clock = clock or Clock()
        self._asked = tuple(Resting(member, self._clock) for member in members)
        self._agreed = Agreed(self.url, shape, self._asked, self._each, self._clock)
        self._sharded = Sharded(self.url, shape, self._asked, self._each, self._clock)
        self._mending = Mending(shape, self._asked, self._agreed, self._sharded, self._beside)
        self._distant = any(isinstance(member, Addressed) for member in members)

    def __repr__(self) -> str:
        return f"<ParityStore {self.url}>"

    def _each(self, numbers: Sequence[int], work: Callable[[int], None]) -> None:
        """Distant members are asked at the same time; for small files of this machine a thread costs more
        than it saves."""
        in_parallel(list(numbers), len(numbers) if self._distant else 1, lambda: work)

    def _beside(self, numbers: Sequence[int], work: Callable[[int], None]) -> None:
        """Of what takes long everywhere."""
        in_parallel(list(numbers), len(numbers), lambda: work)

    # -- put and delete -----------------------------------------------------------------------------------

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        whole = Whole(parts)
        if self._is_cut(checked(key), whole.size_bytes):
            return self._put_shards(key, whole)
        _refuse_reserved(key)
        return self._agreed.put(key, copy_of(key, self.shape, parts, secrets.token_bytes(16)))

    def _is_cut(self, key: str, size_bytes: int) -> bool:
        return is_named_by_digest(key) and can_have_shards(key) and size_bytes >= SMALL_BYTES

    def _put_shards(self, key: str, whole: Whole) -> bool:
        """All who put such an object put the same bytes, so their shards are those of one object. Who creates
        the first has created it."""
        self._sharded.forget(key)
        shards = cut(key, self.shape, whole)
        created: dict[int, bool] = {}
        away: dict[int, EverstepError] = {}

        def put(number: int) -> None:
            try:
                created[number] = self._asked[number].put(PREFIX + key, shards[number])
            except (Conflict, *AWAY) as error:
                away[number] = error

        self._beside(range(self.shape.members), put)
        if len(created) < self.shape.k:
            raise unreachable(self.url, key, list(away.values()), self.shape.k, self.shape.members)
        return created[min(created)]

    def delete(self, key: str) -> None:
        checked(key)
        self._sharded.forget(key)
        away: dict[int, EverstepError] = {}

        def delete(number: int) -> None:
            try:
                if is_named_by_digest(key) and can_have_shards(key):
                    self._asked[number].delete(PREFIX + key)
                if not key.startswith(PREFIX):
                    self._asked[number].delete(key)
            except AWAY as error:
                away[number] = error

        self._each(range(self.shape.members), delete)
        # What is left is with fewer than k then: it is not there any more.
        if len(away) > self.shape.m:
            raise unreachable(self.url, key, list(away.values()), self.shape.k, self.shape.members)

    # -- get and read_into --------------------------------------------------------------------------------

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        copied = self._copy(checked(key))
        if copied is not None:
            return copied[start:] if size_bytes is None else copied[start : start + size_bytes]
        total = self._shards_bytes(key)
        left = max(total - start, 0)
        data = bytearray(left if size_bytes is None else min(size_bytes, left))
        self._sharded.read_into(key, start, [memoryview(data)])
        return data

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        copied = self._copy(checked(key))
        if copied is None:
            wanted = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
            if not wanted:
                self._shards_bytes(key)
            return self._sharded.read_into(key, start, wanted)
        data = memoryview(copied)[start:]
        at = 0
        for buffer in buffers:
            part = data[at : at + len(buffer)]
            buffer[: len(part)] = part
            at += len(part)
        return at

    def _shards_bytes(self, key: str) -> int:
        return self._sharded.found(key).any.size_bytes

    def _copy(self, key: str) -> bytes | None:
        """The object, where it is kept as copies; None where it is in shards. Raises NotFound."""
        if not is_named_by_digest(key) or not can_have_shards(key):
            _refuse_reserved(key)
            return self._agreed.get(key)
        try:
            self._sharded.found(key)
            return None
        except NotFound as nothing:
            try:
                return self._agreed.get(key)
            except NotFound:
                raise nothing from None

    # -- list ---------------------------------------------------------------------------------------------

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[Entry]:
        directory = prefix.rpartition("/")[0]
        if limit == 0 or (directory and not is_key(directory)):
            return
        if limit is not None:
            some = list(itertools.islice(self._merged(prefix, limit + _MORE), limit))
            if len(some) == limit:
                yield from some
                return
        yield from itertools.islice(self._merged(prefix, None), limit)

    def _merged(self, prefix: str, most_each: int | None) -> Iterator[Entry]:
        """The objects that k members have a part of, in order. With `most_each` only as far as all members
        were asked."""
        listings = [
            _Listing(member, number, inner, prefix, most_each)
            for number, member in enumerate(self._asked)
            for inner in ("", PREFIX)
        ]
        # The first page of each, of all at once.
        in_parallel(listings, len(listings) if self._distant else 1, lambda: _Listing.begin)
        merged = heapq.merge(*(one.rest() for one in listings), key=lambda found: found[0])
        for key, group in itertools.groupby(merged, key=lambda found: found[0]):
            if any(one.ends_before(key) for one in listings):
                return
            copies, shards = _Kept([], []), _Kept([], [])
            for _, listing, entry in group:
                (shards if listing.inner else copies).add(listing.number, entry)
            away = {one.number: one.error for one in listings if one.error is not None}
            entry_of = self._entry(key, copies, shards, away)
            if entry_of is not None:
                yield entry_of
        away = {one.number: one.error for one in listings if one.error is not None}
        if len(away) > self.shape.m:
            raise unreachable(self.url, prefix, list(away.values()), self.shape.k, self.shape.members)

    def _entry(
        self, key: str, copies: _Kept, shards: _Kept, away: Mapping[int, EverstepError]
    ) -> Entry | None:
        for kept in (copies, shards):
            if len(kept.numbers) >= self.shape.k:
                size = self._size_bytes(key, kept, kept is shards)
                return None if size is None else Entry(key, size, kept.at)
        if copies.numbers and len(copies.numbers) + len(away) >= self.shape.k:
            return self._doubtful(key, copies)
        # (Of shards so few are of no use now. Who needs them asks for them, and is told why.)
        return None

    def _doubtful(self, key: str, kept: _Kept) -> Entry | None:
        """Members that are away may hold it, too. It must not be left out then, for it may be the head; but
        it may just be on its way."""
        for _ in tries(ON_ITS_WAY, self._clock):
            tally = self._agreed.look(key)
            decided = tally.decided(self.shape.k)
            if decided is not None:
                return Entry(key, len(decided) - COPY_BYTES, kept.at)
            if tally.most + len(tally.away) + len(tally.damaged) < self.shape.k:
                return None
            if not self._agreed.may_come(tally):
                break
        raise unreachable(self.url, key, list(tally.away.values()), self.shape.k, self.shape.members)

    def _size_bytes(self, key: str, kept: _Kept, are_shards: bool) -> int | None:
        """None where it has just been deleted."""
        length = most(kept.lengths)
        if not are_shards:
            return max(length - COPY_BYTES, 0)
        size = size_by_length(self.shape, length)
        if size is not None:
            return size
        try:
            return self._shards_bytes(key)
        except NotFound:
            return None
        except Damaged:
            return 0  # Whoever reads it is told.

    # -- whether it can be one ----------------------------------------------------------------------------

    def probe(self) -> None:
        """Do with each member what a commit needs of it. Raises Unsupported, Unavailable."""
        away: list[EverstepError] = []
        for member in self.members:
            try:
                if isinstance(member, Probing):
                    member.probe()
                found = [one.key for one in member.list(limit=16) if not one.key.startswith(PROBES)]
            except AWAY as error:
                away.append(error)
                continue
            # (A single object is what is left of a chain whose creation was killed; that is gone on with.)
            if len(found) > 1:
                raise Mismatch(
                    f"{member.url} holds {found[0]} already, and fewer than the {self.shape.k} members "
                    "that it takes hold the chain that it may belong to",
                    kept="nothing was touched",
                    next="bring the other members back, or name empty ones for a new chain",
                )
        if len(away) > self.shape.m:
            raise unreachable(self.url, "", away, self.shape.k, self.shape.members)

    # -- what is kept of an object ------------------------------------------------------------------------

    def sweep(self) -> int:
        """Take away what killed writers left half-written in directories; returns how many bytes."""
        freed = 0
        for member in self.members:
            if isinstance(member, LocalStore):
                with contextlib.suppress(Unavailable):  # One that is away has time.
                    freed += member.sweep()
        return freed

    def away(self) -> Sequence[str]:
        return self._mending.away()

    def flaws(self, key: str) -> Sequence[str]:
        return self._mending.flaws(key)

    def mend(self, key: str) -> Sequence[str]:
        return self._mending.mend(key, lambda: self.get(key))


def _refuse_reserved(key: str) -> None:
    if key.startswith(PREFIX):
        raise ValueError(f"{key!r} lies where shards do")


class AddressedParityStore(ParityStore):
    """One that another process opens by its address: each member is a directory, or is addressed itself."""

    @property
    def address(self) -> str:
        places = [
            str(member.root) if isinstance(member, LocalStore) else member.address
            for member in self.members
            if isinstance(member, LocalStore | Addressed)
        ]
        return f"{SCHEME}{self.shape}:" + ",".join(places)

    @property
    def environment(self) -> Mapping[str, str]:
        found: dict[str, str] = {}
        for member in self.members:
            if isinstance(member, Addressed):
                found |= member.environment
        return found
