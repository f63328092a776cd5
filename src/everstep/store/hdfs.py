"""A store in a directory of an HDFS, through hdfs-native.

A put writes a temporary file, has the DataNodes make its bytes durable, and renames it without overwriting:
that is the exclusive creation, and the NameNode's own. So a final name never shows anything but a whole
object, whatever dies at whatever instant. A write that loses a DataNode is begun anew, with another file; an
answer that was lost on the way is settled by reading back.
"""

from __future__ import annotations

import heapq
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import dropwhile, islice
from typing import Any, TypeVar

from everstep.errors import Conflict, NotFound, Unsupported
from everstep.store import namenode
from everstep.store.answers import MISSING, PASSING, TAKEN, UNABLE, Answer, Place
from everstep.store.base import Buffer, Entry, checked, is_key, refuses_to_overwrite
from everstep.store.forks import note_use
from everstep.store.namenode import OBSTRUCTED, understood, within
from everstep.store.parallel import in_parallel
from everstep.store.patience import Clock, Patience
from everstep.store.reads import copy
from everstep.store.trying import Failed, Trying, Turns

SMALL_AT_ONCE = 16
TEMPORARY = "tmp"
"""The directory of unfinished files, directly under the root; no key begins with it."""

PIECE_BYTES = 4 * 1024 * 1024
RANGE_BYTES = 16 * 1024 * 1024
RANGES_AT_ONCE = 4
PAGE = 1000
LITTLE = 16

FEWER_COPIES_FROM = 3
"""From this try on a file is written with two copies, where three or more are meant: hdfs-native asks for
DataNodes that the NameNode does not know to be dead again and again. The others are made afterwards."""

FEWER_COPIES = 2

FIRST_SYNC_SHARE = 0.25
"""The first sync of a file may take this share of a request's time, that of the second try twice as much, and
so on: after the death of a DataNode hdfs-native waits for a sync that never comes."""

Result = TypeVar("Result")


class HdfsStore:
    """Objects as files under a directory of an HDFS, which is created with the first put. Made without a
    request.

    All verbs block for as long as `patience` says, and raise `Unavailable` then. What the NameNode itself
    says (not allowed, no such user) is raised at once. In a process that was forked from one that has used
    such a store, all raise `Unsupported`.

    Args:
        url: `hdfs://HOST:PORT/path`, `hdfs://SERVICE/path`, or `hdfs:///path` for the default of the
            configuration. The rest comes from the environment, as for Hadoop's own tools.
        patience: how long to try.
        clock: for tests.

    Attributes:
        address, environment: what another process opens it by; it needs this one's variables.
        at_once: how many small requests are best made at once.

    Raises:
        Mismatch: the address is none.
        Unsupported: hdfs-native is not installed.
    """

    def __init__(self, url: str, *, patience: Patience | None = None, clock: Clock | None = None) -> None:
        self._where = namenode.Address.parse(url)
        namenode.refuse_without_package()
        self.url = self.address = self._where.url
        self.environment: dict[str, str] = {}
        self.at_once = SMALL_AT_ONCE
        self._patience = patience or Patience()
        place = Place(self.url, "", namenode.ACCESS, "another directory, or another store")
        self._trying = Trying(place, self._patience, clock or Clock())
        self._made: Any = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<HdfsStore {self.url}>"

    # -- requests -----------------------------------------------------------------------------------------

    def _client(self) -> Any:
        with self._lock:
            if self._made is None:
                self._made = namenode.client(self._where, self._patience)
            return self._made

    def _ask(self, request: Callable[[Any], Result], share: float = 1.0) -> Result:
        """One request, once, in a share of the time that one may take; it is given a client. Raises
        Failed."""
        note_use(self.url)
        seconds = self._patience.request_s * share
        return _answered(lambda: within(seconds, lambda: request(self._client())))

    def _tried(
        self, verb: str, key: str, request: Callable[[Any], Result], meant: Sequence[str] = ()
    ) -> Result:
        """A request that does no harm when it is made twice. Raises Failed for the answers in `meant`."""
        return self._trying.tried(verb, key, lambda: self._ask(request), meant)

    def _path(self, key: str) -> str:
        if checked(key).partition("/")[0] == TEMPORARY:
            raise ValueError(f"{key!r} lies where unfinished files do")
        return f"{self._where.path}/{key}"

    # -- put ----------------------------------------------------------------------------------------------

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        final = self._path(key)
        views = [memoryview(part).cast("B") for part in parts if len(part)]
        size_bytes = sum(map(len, views))
        turns = self._trying.turns("write", key)
        lost, meant = False, None
        for number in turns:
            stored = self._stored(key)
            if stored is not None:
                # Ours, where it was carried out and only the answer was lost.
                return lost and stored == size_bytes and self._holds(key, views)
            file = _File(self._ask, f"{self._where.path}/{TEMPORARY}/{secrets.token_hex(16)}")
            try:
                file.write(views, size_bytes, meant, min(1.0, number * FIRST_SYNC_SHARE))
                published = self._publish(file, final, key, turns)
                if published or (published is False and not lost):
                    return published
                lost = True
            except Failed as failed:
                turns.note(failed.answer, (PASSING, TAKEN, MISSING))
                if number + 1 >= FEWER_COPIES_FROM:
                    meant = meant or file.copies()
            finally:
                file.discard()
        raise turns.given_up()

    def _publish(self, file: _File, final: str, key: str, turns: Turns) -> bool | None:
        """Give a whole file its name. True: it has it. False: somebody else has. None: it may have it, or
        somebody has swept it. Raises Conflict."""
        parent = final.rpartition("/")[0]
        for _ in range(2):
            try:
                self._ask(lambda client: client.rename(file.path, final, False))
                file.there = False
                return True
            except Failed as failed:
                answer = failed.answer
            if answer.kind == OBSTRUCTED:
                raise _obstructed(self.url, key)
            if answer.kind == TAKEN:
                return False
            if answer.kind != MISSING:
                turns.note(answer)
                return None
            # There is no such directory yet; or no such file any more, and then a look tells whether it has
            # got its name: hdfs-native repeats a request whose answer was lost.
            try:
                self._tried(
                    "write", key, lambda client: client.mkdirs(parent, 0o755, True), [TAKEN, OBSTRUCTED]
                )
            except Failed:
                raise _obstructed(self.url, key) from None
        return None

    def _stored(self, key: str) -> int | None:
        """The size of an object; None where there is none. Raises Conflict for a directory."""
        path = self._path(key)
        try:
            found = self._tried("look at", key, lambda client: client.get_file_info(path), [MISSING])
        except Failed:
            return None
        if found.isdir:
            raise Conflict(f"{self.url}/{key} cannot be written: a directory stands in its place", key=key)
        return int(found.length)

    def _holds(self, key: str, views: list[memoryview]) -> bool:
        """Whether the object is these bytes."""
        stored = memoryview(self.get(key))
        at = 0
        for view in views:
            if stored[at : at + len(view)] != view:
                return False
            at += len(view)
        return at == len(stored)

    # -- get and read_into --------------------------------------------------------------------------------

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        reader = self._reader(key)
        left = max(len(reader) - start, 0)
        whole = bytearray(left if size_bytes is None else min(size_bytes, left))
        self._fill(key, reader, start, [memoryview(whole)])
        return whole

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        reader = self._reader(key)
        left = max(len(reader) - start, 0)
        wanted, count = [], 0
        for buffer in buffers:
            view = memoryview(buffer).cast("B")[: left - count]
            wanted.append(view)
            count += len(view)
        self._fill(key, reader, start, wanted)
        return count

    def _reader(self, key: str) -> Any:
        """What reads an object's ranges, as long as its blocks stay where they are. Raises NotFound."""
        path = self._path(key)
        return self._tried("read", key, lambda client: client.read(path))

    def _fill(self, key: str, reader: Any, start: int, buffers: Sequence[memoryview]) -> None:
        """Fill memory with bytes that the object has, several ranges at once."""
        spans = []
        for buffer in buffers:
            spans += [
                (start + at, buffer[at : at + RANGE_BYTES]) for at in range(0, len(buffer), RANGE_BYTES)
            ]
            start += len(buffer)

        def fill(span: tuple[int, memoryview]) -> None:
            self._fill_one(key, reader, *span)

        if spans:
            in_parallel(spans, RANGES_AT_ONCE, lambda: fill)

    def _fill_one(self, key: str, reader: Any, start: int, buffer: memoryview) -> None:
        turns = self._trying.turns("read", key)
        for number in turns:
            if number > 1:
                # Where its blocks are now.
                reader = self._reader(key)
                if len(reader) < start + len(buffer):
                    raise NotFound(f"{self.url}/{key} was taken away while it was read", key=key)
            try:
                note_use(self.url)
                return _answered(lambda reader=reader: _read(reader, start, buffer))  # type: ignore[misc]
            except Failed as failed:
                turns.note(failed.answer)
        raise turns.given_up()

    # -- list and delete ----------------------------------------------------------------------------------

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[Entry]:
        directory, _, _ = prefix.rpartition("/")
        if limit == 0 or (directory and not is_key(directory)):
            return
        page = PAGE if limit is None else min(PAGE, max(limit, LITTLE))
        yield from islice(self._walk(directory, prefix, page), limit)

    def _walk(self, directory: str, prefix: str, page: int) -> Iterator[Entry]:
        """The objects with `prefix` in a directory and those below, in the order of their keys."""
        # A directory sorts as its keys do: with the slash that follows its name. So it waits for those names
        # that come after its own, and before that.
        waiting: list[tuple[str, Any]] = []
        for name, found in self._names(directory, page):
            key = f"{directory}/{name}" if directory else name
            while waiting and waiting[0][0] < key:
                yield from self._walk(heapq.heappop(waiting)[1], prefix, page)
            if not is_key(key) or key == TEMPORARY:
                continue
            if found.isdir:
                if f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                    heapq.heappush(waiting, (f"{key}/", key))
            elif key.startswith(prefix):
                yield Entry(key, int(found.length), found.modification_time / 1e3)
        while waiting:
            yield from self._walk(heapq.heappop(waiting)[1], prefix, page)

    def _names(self, directory: str, page: int) -> Iterator[tuple[str, Any]]:
        """What is in a directory, in the order of names; taken up where it broke off."""
        path = f"{self._where.path}/{directory}".rstrip("/") or "/"
        after = ""
        listing: Iterator[Any] | None = None

        def next_page(client: Any) -> list[Any]:
            nonlocal listing
            mine, listing = listing, None  # One that has failed, or hangs, is of no use to the next try.
            if mine is None:
                mine = dropwhile(lambda one: _name(one) <= after, client.list_status(path, False))
            found = list(islice(mine, page))
            listing = mine
            return found

        while True:
            try:
                found = self._tried("list", directory, next_page, [MISSING, OBSTRUCTED])
            except Failed:
                return
            for one in found:
                if one.path == path:
                    return  # It is a file, which has nothing below it.
                if _name(one) <= after:
                    raise Unsupported(
                        f"{self.url} does not list its files in the order of their names",
                        kept="nothing was touched",
                        next="another store",
                    )
                after = _name(one)
                yield after, one
            if len(found) < page:
                return

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            self._tried("delete", key, lambda client: client.delete(path, False), [MISSING, OBSTRUCTED])
        except Failed:
            return

    def sweep(self) -> int:
        """Take away what killed writers left half-written; returns how many bytes that were, as far as the
        NameNode knows.

        A writer at work whose temporary file is taken writes it anew. Raises Unavailable where the directory
        cannot be read or changed.
        """
        freed = 0
        for name, found in list(self._names(TEMPORARY, PAGE)):
            if not found.isdir:
                self._sweep(f"{self._where.path}/{TEMPORARY}/{name}")
                freed += int(found.length)
        return freed

    def _sweep(self, path: str) -> None:
        with suppress(Failed):
            self._tried("sweep", TEMPORARY, lambda client: client.delete(path, False), [MISSING])

    # -- whether it can be one ----------------------------------------------------------------------------

    def probe(self) -> None:
        """Create an object twice and expect to be refused; take it away again.

        Raises:
            Unsupported: it does not refuse, or cannot be asked to.
        """
        if not refuses_to_overwrite(self):
            raise Unsupported(
                f"{self.url} overwrites files although it was asked not to, so that two writers would "
                "destroy each other's snapshots",
                kept="nothing was created",
                next="another store",
            )


class _File:
    """A file on its way to become an object. `there`: it may be in the way."""

    def __init__(self, ask: Callable[..., Any], path: str) -> None:
        self.path = path
        self.there = False
        self._ask = ask

    def write(
        self, views: Sequence[memoryview], size_bytes: int, meant: int | None, sync_share: float
    ) -> None:
        """Create it, with all its bytes; durable on return. Raises Failed.

        Args:
            meant: so many copies are meant, and fewer will do for now.
            sync_share: how much of a request's time the sync may take.
        """
        fewer = None if meant is None else min(meant, FEWER_COPIES)
        self.there = True
        writer = self._ask(lambda client: client.create(self.path, namenode.options(size_bytes, fewer)))
        for piece in _pieces(views):
            self._ask(partial(_write, writer, piece))
        if size_bytes:
            try:
                self._ask(lambda _: writer.hsync(), sync_share)
            except Failed as failed:
                # Erasure-coded files are as durable as they get when they are closed.
                if failed.answer.kind != UNABLE:
                    raise
        self._ask(lambda _: writer.close())
        if fewer != meant:
            self._ask(lambda client: client.set_replication(self.path, meant))

    def copies(self) -> int | None:
        """How many of it are meant; None where nobody can say just now."""
        try:
            return int(self._ask(lambda client: client.get_file_info(self.path)).replication) or None
        except Failed:
            return None

    def discard(self) -> None:
        """What is left behind where the NameNode is away is swept by the next writer."""
        if self.there:
            with suppress(Failed):
                self._ask(lambda client: client.delete(self.path, False))


def _answered(request: Callable[[], Result]) -> Result:
    """What a request returns. Raises Failed."""
    try:
        return request()
    except BaseException as error:
        answer = understood(error)
        if answer is None:
            raise
        raise Failed(answer) from error


def _pieces(views: Sequence[memoryview]) -> Iterator[bytes]:
    """All bytes, in pieces of a size that is sent with one call. hdfs-native takes bytes faster than views,
    and they are nobody else's when a call is not waited for any more."""
    waiting: list[memoryview] = []
    size_bytes = 0
    for view in views:
        while len(view):
            taken = view[: PIECE_BYTES - size_bytes]
            view = view[len(taken) :]
            waiting.append(taken)
            size_bytes += len(taken)
            if size_bytes == PIECE_BYTES:
                yield b"".join(waiting)
                waiting, size_bytes = [], 0
    if waiting:
        yield b"".join(waiting)


def _write(writer: Any, piece: bytes, _: Any) -> None:
    writer.write(piece)


def _read(reader: Any, start: int, buffer: memoryview) -> None:
    """Fill memory with bytes that the file has, as they come."""
    at = 0
    for part in reader.read_range_stream(start, len(buffer)):
        copy(buffer[at : at + len(part)], memoryview(part))
        at += len(part)
    if at != len(buffer):
        raise Failed(Answer(PASSING, "fewer bytes came than there are"))


def _name(found: Any) -> str:
    return str(found.path).rpartition("/")[2]


def _obstructed(url: str, key: str) -> Conflict:
    return Conflict(f"{url}/{key} cannot be written: a file stands where a directory belongs", key=key)
