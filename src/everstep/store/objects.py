"""A store in a bucket: S3 and what speaks like it, Google Cloud Storage, Azure; through obstore.

A commit is one request, a create-only PUT. Each request is tried again where that may help, and an answer
that was lost on the way is settled by reading back: the same bytes are ours, as what is raced for carries a
nonce.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from everstep.errors import EverstepError, NotFound, Unsupported
from everstep.store import cloud
from everstep.store.answers import MISSING, PASSING, PAST_END, TAKEN, Answer, Place, sentence, understood
from everstep.store.base import Buffer, Entry, checked, is_key, is_named_by_digest, refuses_to_overwrite
from everstep.store.forks import note_use
from everstep.store.parallel import in_parallel
from everstep.store.patience import Clock, Patience
from everstep.store.reads import copy, scatter
from everstep.store.trying import Failed, Trying

SINGLE_BYTES = 32 * 1024 * 1024
"""Larger objects that are named by their digest go up in parts; all others always with one request."""

PART_BYTES = 8 * 1024 * 1024
PARTS_AT_ONCE = 8
PART_RETRIES = 6
RANGE_BYTES = 16 * 1024 * 1024
RANGES_AT_ONCE = 4
SMALL_AT_ONCE = 32
PAGE = 1000
"""A listing comes in pages of so many."""

LITTLE = 16
"""Fewer are not looked at: what is foreign may stand before what was meant."""

_LETTERS = "-.0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz"
"""What keys are made of, in the order of bytes."""

_LET_GO_S = 5.0
_INSIST = "another store, or everstep.open(..., unsafe_single_writer=True) if there is never a second writer"

Result = TypeVar("Result")


class ObjectStore:
    """Objects of a bucket whose keys begin with a prefix. Made without a request.

    All verbs block for as long as `patience` says, and raise `Unavailable` then. What the store itself says
    (no such bucket, not allowed) is raised at once. In a process that was forked from one that has used such
    a store, all raise `Unsupported`.

    Args:
        url: `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`; credentials, region and
            endpoint come from the environment.
        unsafe_single_writer: create without asking the store to refuse: for one that cannot. Two writers
            then destroy each other's snapshots.
        patience: how long to try.
        clock: for tests.

    Attributes:
        address, environment: what another process opens it by, and needs besides this one's variables.
        at_once: how many small requests are best made at once.

    Raises:
        Mismatch: the address is none.
        Unsupported: obstore is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        unsafe_single_writer: bool = False,
        patience: Patience | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._where = cloud.Address.parse(url)
        cloud.refuse_without_obstore()
        self.url = self.address = self._where.url
        self.unsafe_single_writer = unsafe_single_writer
        self.at_once = SMALL_AT_ONCE
        self.environment = {cloud.UNSAFE_SINGLE_WRITER: "1"} if unsafe_single_writer else {}
        self._patience = patience or Patience()
        self._clock = clock or Clock()
        self._place = Place(self.url, self._where.bucket, cloud.CREDENTIALS[self._where.scheme])
        self._trying = Trying(self._place, self._patience, self._clock)
        self._clients: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<ObjectStore {self.url}>"

    # -- requests -----------------------------------------------------------------------------------------

    def _client(self, retries: int = 0) -> Any:
        with self._lock:
            if retries not in self._clients:
                self._clients[retries] = cloud.client(self._where, self._patience, retries)
            return self._clients[retries]

    def _ask(self, request: Callable[[Any, Any], Result]) -> Result:
        """One request, once: it is given obstore and a client. Raises Failed."""
        note_use(self.url)
        import obstore

        try:
            return request(obstore, self._client())
        except Exception as error:
            answer = understood(error)
            if answer is None:
                raise
            # Not `from error`: its text may hold parts of credentials.
            raise Failed(answer) from None

    def _tried(
        self, verb: str, key: str, request: Callable[[Any, Any], Result], meant: Sequence[str] = ()
    ) -> Result:
        """A request that does no harm when it is made twice. Raises Failed for the answers in `meant`."""
        return self._trying.tried(verb, key, lambda: self._ask(request), meant)

    def _size_bytes(self, key: str) -> int | None:
        """None where there is no such object."""
        try:
            meta = self._tried("look at", key, lambda obs, client: obs.head(client, key), [MISSING])
        except Failed:
            return None
        return int(meta["size"])

    # -- put ----------------------------------------------------------------------------------------------

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        checked(key)
        views = [memoryview(part).cast("B") for part in parts if len(part)]
        size_bytes = sum(map(len, views))
        large = size_bytes > SINGLE_BYTES and is_named_by_digest(key)
        try:
            if large or self.unsafe_single_writer:
                return self._put_new(key, views, size_bytes, large)
            return self._create(key, views, size_bytes)
        finally:
            self._take_back(views)

    def _create(self, key: str, views: list[memoryview], size_bytes: int) -> bool:
        """The request that only creates; exactly one of several at the same time succeeds."""
        turns = self._trying.turns("write", key)
        lost = False
        for _ in turns:
            try:
                self._ask(
                    lambda obs, client: obs.put(
                        client, key, _payload(views), mode="create", use_multipart=False
                    )
                )
                return True
            except Failed as failed:
                answer = failed.answer
            if answer.kind == TAKEN:
                # Some stores say the same of a race that nobody has won yet: then it is tried again.
                stored = self._size_bytes(key)
                if stored is not None:
                    return lost and stored == size_bytes and self._holds(key, views)
            # It may have been carried out all the same.
            lost = lost or answer.kind == PASSING
            turns.note(answer, (PASSING, TAKEN))
        raise turns.given_up()

    def _put_new(self, key: str, views: list[memoryview], size_bytes: int, large: bool) -> bool:
        """Put an object where there is none as far as anybody can see. Who else puts it meanwhile puts the
        same bytes, which its name says; or there is nobody else, which the user says."""
        turns = self._trying.turns("write", key)
        lost = False
        for _ in turns:
            stored = self._size_bytes(key)
            if stored is not None:
                return lost and stored == size_bytes and self._holds(key, views)
            try:
                self._ask(lambda obs, _: self._upload(obs, key, views, large))
                return True
            except Failed as failed:
                answer = failed.answer
            turns.note(answer, (PASSING, MISSING))
            lost = True
        raise turns.given_up()

    def _upload(self, obstore: Any, key: str, views: list[memoryview], large: bool) -> None:
        # A part that is sent again replaces itself, so obstore may repeat those by itself.
        obstore.put(
            self._client(PART_RETRIES if large else 0),
            key,
            _payload(views),
            use_multipart=large,
            chunk_size=PART_BYTES,
            max_concurrency=PARTS_AT_ONCE,
        )

    def _holds(self, key: str, views: list[memoryview]) -> bool:
        """Whether the object is these bytes."""
        stored = memoryview(self.get(key))
        at = 0
        for view in views:
            if stored[at : at + len(view)] != view:
                return False
            at += len(view)
        return at == len(stored)

    def _take_back(self, views: list[memoryview]) -> None:
        """Wait until nobody looks at the caller's memory: obstore lets go of a request that has failed a
        moment later than it says so."""
        end = self._clock.now() + _LET_GO_S
        for view in views:
            while True:
                try:
                    view.release()
                    break
                except BufferError:
                    if self._clock.now() > end:
                        return
                    self._clock.sleep(0.001)

    # -- get and read_into --------------------------------------------------------------------------------

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        checked(key)
        if size_bytes == 0:
            self._refuse_missing(key)
            return b""
        asked = RANGE_BYTES if size_bytes is None else min(size_bytes, RANGE_BYTES)
        first, total = self._range(key, start, asked)
        end = total if size_bytes is None else min(total, start + size_bytes)
        if start + len(first) >= end:
            return bytes(first)
        whole = bytearray(end - start)
        view = memoryview(whole)
        copy(view[: len(first)], memoryview(first))
        self._fill(key, start + len(first), view[len(first) :])
        return whole

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        checked(key)
        wanted = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        size_bytes = sum(map(len, wanted))
        if not size_bytes:
            self._refuse_missing(key)
            return 0
        first, total = self._range(key, start, min(size_bytes, RANGE_BYTES))
        count = max(0, min(size_bytes, total - start))
        rest = scatter(memoryview(first), wanted)
        at, left = start + len(first), count - len(first)
        spans = []
        for buffer in rest:
            part = buffer[: max(left, 0)]
            spans += _cut(at, part)
            at, left = at + len(part), left - len(part)
        self._fill_all(key, spans)
        return count

    def _refuse_missing(self, key: str) -> None:
        if self._size_bytes(key) is None:
            raise sentence(Answer(MISSING, ""), self._place, "read", key)

    def _range(self, key: str, start: int, size_bytes: int) -> tuple[Buffer, int]:
        """Up to so many bytes from `start` on, with one request, and the size of the object (or less, where
        it ends before `start`). Raises NotFound."""

        def request(obstore: Any, client: Any) -> tuple[Any, int]:
            found = obstore.get(client, key, options={"range": (start, start + size_bytes)})
            total = int(found.meta["size"])
            return found.bytes(), total

        try:
            data, total = self._tried("read", key, request, [PAST_END])
        except Failed:
            return b"", start
        return memoryview(data), total

    def _fill(self, key: str, start: int, buffer: memoryview) -> None:
        self._fill_all(key, _cut(start, buffer))

    def _fill_all(self, key: str, spans: list[tuple[int, memoryview]]) -> None:
        """Fill memory with ranges of an object that is as long as that, several at once."""

        def fill(span: tuple[int, memoryview]) -> None:
            at, buffer = span
            data, _ = self._range(key, at, len(buffer))
            if len(data) != len(buffer):
                raise NotFound(f"{self.url}/{key} was taken away while it was read", key=key)
            copy(buffer, memoryview(data))

        in_parallel(spans, RANGES_AT_ONCE, lambda: fill)

    # -- list and delete ----------------------------------------------------------------------------------

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[Entry]:
        directory, _, _ = prefix.rpartition("/")
        if limit == 0 or (directory and not is_key(directory)):
            return
        count = 0
        page = PAGE if limit is None else min(PAGE, max(limit, LITTLE))
        for entry in self._entries(directory, prefix, page):
            if entry.key.startswith(prefix) and is_key(entry.key):
                yield entry
                count += 1
                if count == limit:
                    return
            elif entry.key > prefix and not entry.key.startswith(prefix):
                return

    def _entries(self, directory: str, prefix: str, count: int) -> Iterator[Entry]:
        """All below a directory, from shortly before `prefix` on, in order; taken up where it broke off."""
        after = _before(prefix) if prefix != f"{directory}/" else ""
        while True:
            page = self._tried(
                "list",
                directory,
                lambda obs, client, after=after: _page(obs, client, directory, after, count),  # type: ignore[misc]
            )
            for entry in page:
                if after and entry.key <= after:
                    raise Unsupported(
                        f"{self.url} does not list its objects in the order of their names",
                        kept="nothing was touched",
                        next="another store",
                    )
                after = entry.key
                yield entry
            if len(page) < count:
                return

    def delete(self, key: str) -> None:
        checked(key)
        try:
            self._tried("delete", key, lambda obs, client: obs.delete(client, key), [MISSING])
        except Failed:
            return

    def clear(self, keys: Sequence[str]) -> None:
        """A request takes away up to a thousand, where the store has such."""
        for start in range(0, len(keys), PAGE):
            some = [checked(key) for key in keys[start : start + PAGE]]

            def request(obs: Any, client: Any, some: Sequence[str] = some) -> None:
                obs.delete(client, some)

            try:
                self._tried("delete", some[0], request, [MISSING])
            except Failed:
                # One of them was not there, and what became of the others is not said.
                for key in some:
                    self.delete(key)

    # -- whether it can be one ----------------------------------------------------------------------------

    def probe(self) -> None:
        """Create an object twice and expect to be refused; take it away again. Four small requests.

        Raises:
            Unsupported: the store does not refuse, or cannot be asked to.
        """
        if self.unsafe_single_writer:
            return
        try:
            kept = refuses_to_overwrite(self)
        except EverstepError as error:
            raise self._cannot_create(error) from None
        if not kept:
            raise Unsupported(
                f"{self.url} overwrites objects although it was asked not to, so that two writers would "
                "destroy each other's snapshots",
                kept="nothing was created",
                next=_INSIST,
            )

    def _cannot_create(self, error: EverstepError) -> EverstepError:
        if not isinstance(error, Unsupported):
            return error
        return Unsupported(
            f"{self.url} cannot create an object on the condition that there is none ({error.problem})",
            kept="nothing was created",
            next=_INSIST,
        )


def _page(obstore: Any, client: Any, directory: str, after: str, count: int) -> list[Entry]:
    """The next `count` objects of a listing, fewer where it ends."""
    stream = obstore.list(client, directory or None, offset=after or None, chunk_size=count)
    found: list[dict[str, Any]] = next(iter(stream), [])
    return [Entry(meta["path"], int(meta["size"]), meta["last_modified"].timestamp()) for meta in found]


def _payload(views: list[memoryview]) -> Any:
    """What obstore sends without copying it."""
    return iter(views) if views else b""


def _before(prefix: str) -> str:
    """A text that sorts right before all keys with this prefix, "" where none is at hand."""
    if not prefix:
        return ""
    at = _LETTERS.find(prefix[-1])
    return f"{prefix[:-1]}{_LETTERS[at - 1]}zzzzzzzz" if at > 0 else ""


def _cut(start: int, buffer: memoryview) -> list[tuple[int, memoryview]]:
    """Ranges of a size that is asked for at once, and their memory."""
    return [(start + at, buffer[at : at + RANGE_BYTES]) for at in range(0, len(buffer), RANGE_BYTES)]
