"""What a trainer and a keeper process say to each other, and how it travels over their socket.

A frame is a length (4 bytes, little-endian) and so many bytes of msgpack: one message. Memory travels beside
its frame, as file descriptors. Both sides are processes of one user, of the same version, and even so nothing
that arrives is believed before it was checked: a frame is bounded before it is read, and what is no message
is `Damaged` or `Unsupported`.

`Hello`, `Welcome`, `Leave`, `Ask` and `Status` are understood by every version, so that one can tell a keeper
of another to finish and leave.
"""

from __future__ import annotations

import array
import itertools
import os
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, ClassVar, Generic, TypeAlias, TypeVar

import msgspec

from everstep import errors
from everstep.chain.history import Snapshot
from everstep.chain.parts import Part
from everstep.chain.steplog import EndedJournal
from everstep.chain.writer import Facts
from everstep.errors import Damaged, EverstepError, Unavailable, Unsupported
from everstep.format.layout import Kin, Layout, Slice, lay_out
from everstep.format.manifest import (
    MAX_DTYPE_CHARACTERS,
    MAX_NAME_CHARACTERS,
    MAX_RANKS,
    Count,
    Digest,
    Shape,
)
from everstep.format.record import Origin, SnapshotRecord
from everstep.keeper.arena import MAX_ARENA_BYTES
from everstep.keeper.base import DEADLINE_S, Followed, Job, Outcome, Terms
from everstep.keeper.reading import LARGEST_BYTES
from everstep.store.base import MAX_KEY_CHARACTERS
from everstep.version import __version__

PROTOCOL = 6
VERSION = f"{__version__}/{PROTOCOL}"
"""Both sides must be of the same: a keeper also writes the chain as its version does."""

MAX_FRAME_BYTES = 256 * 1024 * 1024
MAX_GREETING_BYTES = 64 * 1024
"""As long as nobody has said who he is."""
MAX_DESCRIPTORS = 8
MAX_ITEMS = 1 << 20
"""In a list or dict of a message."""
MAX_SHORT = 4096
MAX_REPLICAS = 64
MAX_DEADLINE_S = 7 * 24 * 3600.0
MAX_HELD = 2
"""Parts that lie in memory for the next trainer of a rank."""
MAX_TEXT = 4 * 1024 * 1024

_RECEIVE_BYTES = 256 * 1024
_TOGETHER = 16
"""So many frames are sent with one call."""

_TURN_BYTES = 64 * 1024 * 1024
_LENGTH = struct.Struct("<I")
_CREDENTIALS = struct.Struct("3i")

Short: TypeAlias = Annotated[str, msgspec.Meta(max_length=MAX_SHORT)]
Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Size: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=MAX_ARENA_BYTES)]
Address: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MAX_ARENA_BYTES)]
Rank: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=MAX_RANKS)]
Ranks: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=MAX_RANKS)]
Name: TypeAlias = Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$", max_length=64)]
"""A digest, or ""."""


class Message(msgspec.Struct, frozen=True):
    """Its tag is its name. `descriptors` is how many come with it."""

    def descriptors(self) -> int:
        return 0


# -- understood by every version ---------------------------------------------------------------------------


class Hello(Message, tag="hello", frozen=True):
    """The first thing that is said to a keeper."""

    version: Short
    chain: Short


class Welcome(Message, tag="welcome", frozen=True):
    """The answer. `trainer` is the process that the keeper works for, 0 for none."""

    version: Short
    pid: Number
    trainer: Number = 0


class Leave(Message, tag="leave", frozen=True):
    """Finish what was handed over, and go."""


class Ask(Message, tag="ask", frozen=True):
    """What are you doing?"""


class Open(msgspec.Struct, frozen=True):
    """A job that is not done. `phase` is "arriving", "waiting", "storing", "joining" or "tidying"."""

    step: Number
    phase: Short
    size_bytes: Number = 0


class Seated(msgspec.Struct, frozen=True):
    """A seat: what a keeper does for one rank. `trainer` is the process that has it, 0 for none; `held` are
    what lies in memory for the next one: the snapshot, or of many ranks the parts' manifests."""

    rank: Rank
    trainer: Number = 0
    jobs: Annotated[tuple[Open, ...], msgspec.Meta(max_length=MAX_ITEMS)] = ()
    arenas: Annotated[tuple[Number, ...], msgspec.Meta(max_length=MAX_ITEMS)] = ()
    held: Annotated[tuple[Short, ...], msgspec.Meta(max_length=MAX_HELD)] = ()


class Status(Message, tag="status", frozen=True):
    """What a keeper is doing. `since` is when it started (UTC), `nice` its niceness. `ranks` is how many the
    run has, and `seats` are those of this machine. `jobs` and `arenas` are those of all seats, `trainer` and
    `held` the first that any of them has: the process that it works for, 0 for none, and what it keeps in
    memory for the next."""

    version: Short
    pid: Number
    chain: Short
    since: Short
    trainer: Number = 0
    jobs: Annotated[tuple[Open, ...], msgspec.Meta(max_length=MAX_ITEMS)] = ()
    arenas: Annotated[tuple[Number, ...], msgspec.Meta(max_length=MAX_ITEMS)] = ()
    held: Short = ""
    nice: int = 0
    memory_bytes: Number = 0
    torch_imported: bool = False
    unsent: Annotated[dict[Short, Number], msgspec.Meta(max_length=MAX_REPLICAS)] = {}
    """By replica, how many snapshots it lacks, of those that lack any or could not be looked at."""
    ranks: Ranks = 1
    seats: Annotated[tuple[Seated, ...], msgspec.Meta(max_length=MAX_ITEMS)] = ()


# -- from the trainer --------------------------------------------------------------------------------------


def _refuse_rank(rank: int, ranks: int) -> None:
    if rank >= ranks:
        raise ValueError(f"rank {rank} of {ranks}")


class Settle(Message, tag="settle", frozen=True):
    """Finish what an earlier trainer of this rank has handed over, then say what is held of it."""

    rank: Rank = 0
    ranks: Ranks = 1

    def __post_init__(self) -> None:
        _refuse_rank(self.rank, self.ranks)


class Read(Message, tag="read", frozen=True):
    """Give me these bytes of an object, as you may have given them to another rank: `reading.Range`."""

    number: Number
    key: Annotated[str, msgspec.Meta(max_length=MAX_KEY_CHARACTERS)]
    start: Number
    size_bytes: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_BYTES)]


class Begin(Message, tag="begin", frozen=True):
    """Work for me from now on: `base.Terms`."""

    branch: Short
    lease: Number
    parent: Short
    keep: Short
    fresh: bool = False
    replicas: Annotated[tuple[tuple[Short, Short], ...], msgspec.Meta(max_length=MAX_REPLICAS)] = ()
    scrub_bytes_per_s: Number = 0
    rank: Rank = 0
    ranks: Ranks = 1
    deadline_s: float = DEADLINE_S
    part: Name = ""

    def __post_init__(self) -> None:
        _refuse_rank(self.rank, self.ranks)
        if not 0 <= self.deadline_s <= MAX_DEADLINE_S:
            raise ValueError(f"a deadline of {self.deadline_s} seconds")

    @classmethod
    def under(cls, terms: Terms) -> Begin:
        return cls(**{name: getattr(terms, name) for name in cls.__struct_fields__})

    def terms(self) -> Terms:
        return Terms(**{name: getattr(self, name) for name in self.__struct_fields__})


class Prepare(Message, tag="prepare", frozen=True):
    """Lend me an arena; it is to be called `arena`."""

    arena: Number
    size_bytes: Size


class Bring(Message, tag="bring", frozen=True):
    """Here is an arena that an earlier keeper lent."""

    arena: Number

    def descriptors(self) -> int:
        return 1


class Discard(Message, tag="discard", frozen=True):
    """The arena is not used any more."""

    arena: Number


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """`format.layout.Slice`."""

    name: Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARACTERS)]
    dtype: Annotated[str, msgspec.Meta(max_length=MAX_DTYPE_CHARACTERS)]
    shape: Shape
    at: Shape
    extent: Shape
    kin: Kin
    alias: Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARACTERS)] | None


class Said(msgspec.Struct, frozen=True):
    """`chain.writer.Facts`."""

    step: Count
    epoch: Count
    trigger: Short
    note: Text
    metrics: Annotated[dict[Short, float | Short], msgspec.Meta(max_length=MAX_ITEMS)]
    approximate: Annotated[tuple[Text, ...], msgspec.Meta(max_length=MAX_ITEMS)]
    environment: Annotated[dict[Short, Text], msgspec.Meta(max_length=MAX_ITEMS)]
    taken_at: Short
    begun: float | None
    origin: Origin | None = None

    @classmethod
    def of(cls, facts: Facts) -> Said:
        return cls(**{name: getattr(facts, name) for name in cls.__struct_fields__})

    def facts(self) -> Facts:
        return Facts(**{name: getattr(self, name) for name in self.__struct_fields__}, costs={})


class Cut(msgspec.Struct, frozen=True, array_like=True):
    """`chain.steplog.EndedJournal`."""

    name: Short
    unwritten: Annotated[
        tuple[Annotated[bytes, msgspec.Meta(max_length=MAX_TEXT)], ...], msgspec.Meta(max_length=MAX_ITEMS)
    ]

    @classmethod
    def all_of(cls, journals: Iterable[EndedJournal]) -> tuple[Cut, ...]:
        return tuple(cls(one.name, one.unwritten) for one in journals)

    def journal(self) -> EndedJournal:
        return EndedJournal(self.name, self.unwritten)


class Submit(Message, tag="submit", frozen=True):
    """A job. `slices` are its layout's, None where it is that of the job before. `again`: it may have been
    stored by a keeper that died before it could say so."""

    job: Number
    facts: Said
    values: Annotated[bytes, msgspec.Meta(max_length=MAX_FRAME_BYTES)]
    journals: Annotated[tuple[Cut, ...], msgspec.Meta(max_length=MAX_ITEMS)]
    slices: Annotated[tuple[Piece, ...], msgspec.Meta(max_length=MAX_ITEMS)] | None
    again: bool = False
    take: Number = 0
    look: bool = False


class Fill(Message, tag="wave", frozen=True):
    """The arena holds the bytes of addresses `begin` to `end` of the job's layout. Where that is all of the
    state it may hold those up to `filled` only: `Arrived` tells of the others."""

    job: Number
    arena: Number
    begin: Address
    end: Address
    unchanged: Annotated[tuple[Number, ...], msgspec.Meta(max_length=MAX_ITEMS)]
    filled: Address | None = None


class Arrived(Message, tag="arrived", frozen=True):
    """The job's arena is filled up to the address `end`."""

    job: Number
    end: Address


class End(Message, tag="end", frozen=True):
    """All waves were handed over; `costs` is what the trainer knows of them."""

    job: Number
    costs: Annotated[dict[Short, float], msgspec.Meta(max_length=MAX_ITEMS)]


class Drop(Message, tag="drop", frozen=True):
    """The job cannot be completed."""

    job: Number


class Tidy(Message, tag="tidy", frozen=True):
    """A job that a dead keeper has stored, and perhaps not tidied up after."""

    job: Number
    journals: Annotated[tuple[Cut, ...], msgspec.Meta(max_length=MAX_ITEMS)]


class Goodbye(Message, tag="goodbye", frozen=True):
    """The trainer has all it wanted."""


# -- to the trainer ----------------------------------------------------------------------------------------


class Busy(Message, tag="busy", frozen=True):
    """The answer to `Settle` where it takes a while: this step of the earlier trainer is to be stored."""

    step: Number


class Settled(Message, tag="settled", frozen=True):
    """The earlier trainer's jobs are done. Its newest snapshot ("" for none) lies in the arena that comes
    with this; or of many ranks its newest parts, which are called by their manifests, newest first, an arena
    each."""

    snapshot: Name
    parts: Annotated[tuple[Digest, ...], msgspec.Meta(max_length=MAX_HELD)] = ()

    def descriptors(self) -> int:
        return len(self.parts) + (1 if self.snapshot else 0)


class Got(Message, tag="got", frozen=True):
    """What was to be read, in memory that comes with this; or it is not there, and cannot be read here."""

    number: Number
    found: bool

    def descriptors(self) -> int:
        return 1 if self.found else 0


class Problem(msgspec.Struct, frozen=True):
    """An error, to be raised on the other side. `kind` is "" for what is none of the seven."""

    kind: Short
    problem: Text
    kept: Text = ""
    next: Text = ""
    key: Text = ""
    away: bool = False

    KINDS: ClassVar[tuple[str, ...]] = (
        "NotFound", "Conflict", "Fenced", "Unavailable", "Mismatch", "Unsupported", "Damaged"
    )  # fmt: skip

    @classmethod
    def of(cls, error: BaseException) -> Problem:
        kind = type(error).__name__
        if not isinstance(error, EverstepError) or kind not in cls.KINDS:
            return cls("", f"the keeper failed ({kind}: {error})"[:MAX_TEXT])
        problem, kept, next, key = (
            text[:MAX_TEXT] for text in (error.problem, error.kept, error.next, error.key)
        )
        away = isinstance(error, Unavailable) and error.away
        return cls(kind, problem, kept, next, key, away)

    def error(self) -> EverstepError:
        kind = getattr(errors, self.kind) if self.kind in self.KINDS else EverstepError
        made: EverstepError = kind(self.problem, kept=self.kept, next=self.next, key=self.key)
        if isinstance(made, Unavailable):
            made.away = self.away
        return made


class Refused(Message, tag="refused", frozen=True):
    """The keeper does not do what was asked for last, and lets go."""

    problem: Problem


class Lent(Message, tag="lent", frozen=True):
    """The arena that was asked for."""

    arena: Number

    def descriptors(self) -> int:
        return 1


class NoMemory(Message, tag="no-memory", frozen=True):
    """There is none for the arena that was asked for."""

    arena: Number
    problem: Problem


class Freed(Message, tag="freed", frozen=True):
    """The arena was stored, although its job is not done."""

    arena: Number


class Announced(msgspec.Struct, frozen=True):
    """`chain.parts.Part`."""

    rank: Rank
    ranks: Ranks
    manifest: Digest
    state: Digest
    logical_bytes: Number
    new_bytes: Number
    stored_bytes: Number
    approximate: Annotated[tuple[Text, ...], msgspec.Meta(max_length=MAX_ITEMS)] = ()
    relies: Annotated[tuple[Digest, ...], msgspec.Meta(max_length=MAX_ITEMS)] = ()

    @classmethod
    def of(cls, part: Part) -> Announced:
        return cls(**{name: getattr(part, name) for name in cls.__struct_fields__})

    def part(self) -> Part:
        return Part(**{name: getattr(self, name) for name in self.__struct_fields__})


class Done(Message, tag="done", frozen=True):
    """The job is durable, as a snapshot or as a part of one, or failed; the arenas it still had are free."""

    job: Number
    durable_ms: float
    snapshot: Digest | None = None
    record: SnapshotRecord | None = None
    problem: Problem | None = None
    part: Announced | None = None

    @classmethod
    def of(cls, number: int, outcome: Outcome) -> Done:
        if outcome.snapshot is not None:
            return cls(number, outcome.durable_ms, outcome.snapshot.id, outcome.snapshot.record)
        if outcome.part is not None:
            return cls(number, outcome.durable_ms, part=Announced.of(outcome.part))
        error = outcome.error or Damaged("a job ended without an outcome")
        return cls(number, outcome.durable_ms, problem=Problem.of(error))

    def taken(self) -> Snapshot | None:
        if self.snapshot is None or self.record is None:
            return None
        return Snapshot(self.snapshot, self.record)

    def outcome(self, job: Job) -> Outcome:
        part = None if self.part is None else self.part.part()
        return Outcome(job, self.taken(), self.error(), self.durable_ms, part=part)

    def error(self) -> EverstepError | None:
        if self.taken() is not None or self.part is not None:
            return None
        return (self.problem or Problem("", "the keeper failed and does not say why")).error()


class Tidied(Message, tag="tidied", frozen=True):
    """After `Done`: the step log is sealed, and what is not to stay is gone."""

    job: Number


class Warned(Message, tag="warned", frozen=True):
    """Something failed and did no harm."""

    text: Text


class Stands(Message, tag="stands", frozen=True):
    """How a replica stands: `base.Followed`."""

    replica: Short
    snapshot: Short = ""
    step: Number = 0
    behind: Number = 0
    problem: Text = ""
    fenced: Problem | None = None

    @classmethod
    def of(cls, one: Followed) -> Stands:
        fenced = None if one.fenced is None else Problem.of(one.fenced)
        return cls(one.replica, one.snapshot, one.step, one.behind, one.problem[:MAX_TEXT], fenced)

    def followed(self) -> Followed:
        fenced = None if self.fenced is None else self.fenced.error()
        return Followed(self.replica, self.snapshot, self.step, self.behind, self.problem, fenced)


ToKeeper: TypeAlias = (
    Hello | Leave | Ask
    | Settle | Read | Begin | Prepare | Bring | Discard
    | Submit | Fill | Arrived | End | Drop | Tidy | Goodbye
)  # fmt: skip
ToTrainer: TypeAlias = (
    Welcome
    | Status
    | Busy
    | Settled
    | Got
    | Refused
    | Lent
    | NoMemory
    | Freed
    | Done
    | Tidied
    | Warned
    | Stands
)

Received = TypeVar("Received", bound=Message)


# -- messages and bytes ------------------------------------------------------------------------------------


class _Tag(msgspec.Struct):
    type: str


class Decoder(Generic[Received]):
    """From the bytes of a frame to one of the messages of a union."""

    def __init__(self, messages: object, tags: Iterable[str]) -> None:
        self._decoder = msgspec.msgpack.Decoder(messages)
        self._tag = msgspec.msgpack.Decoder(_Tag)
        self._tags = frozenset(tags)

    def decode(self, data: bytes | bytearray | memoryview) -> Received:
        """Raises Unsupported for a message that this version does not know, Damaged for what is none."""
        try:
            message: Received = self._decoder.decode(data)
        except (msgspec.MsgspecError, RecursionError, ValueError, OverflowError) as error:
            self._refuse_unknown(data)
            raise Damaged(f"a message cannot be read: {error}"[:MAX_SHORT]) from error
        return message

    def _refuse_unknown(self, data: bytes | bytearray | memoryview) -> None:
        with suppress(msgspec.MsgspecError, RecursionError, ValueError, OverflowError):
            tag = self._tag.decode(data).type
            if tag not in self._tags:
                raise Unsupported(f"{tag[:60]!r} is no message of this version of Everstep ({VERSION})")


def _decoder(messages: object) -> Decoder[Message]:
    kinds: tuple[type[Message], ...] = messages.__args__  # type: ignore[attr-defined]
    return Decoder(messages, (str(kind.__struct_config__.tag) for kind in kinds))


TO_KEEPER: Decoder[Message] = _decoder(ToKeeper)
TO_TRAINER: Decoder[Message] = _decoder(ToTrainer)

_ENCODER = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """A frame. Raises Unsupported when it is larger than the other side takes."""
    data = _ENCODER.encode(message)
    if len(data) > MAX_FRAME_BYTES:
        raise Unsupported(
            f"a message of {len(data):,} bytes to the keeper is larger than the {MAX_FRAME_BYTES:,} allowed",
            next="keep large arrays as tensors or numpy arrays, not as lists of numbers",
        )
    return _LENGTH.pack(len(data)) + data


def pieces(layout: Layout) -> tuple[Piece, ...]:
    """A layout as it travels: its slices, of which the other side makes the same one."""
    return tuple(
        Piece(one.name, one.dtype, one.shape, one.at, one.extent, one.kin, one.alias) for one in layout.slices
    )


def layout(slices: Sequence[Piece]) -> Layout:
    """The layout that these are the slices of. Raises Damaged when they can be none's."""
    made = [Slice(one.name, one.dtype, one.shape, one.at, one.extent, one.kin, one.alias) for one in slices]
    for one in made:
        if len(one.shape) != len(one.extent) or len(one.shape) != len(one.at) or one.alias == one.name:
            raise Damaged(f"slice {one.name[:60]!r} contradicts itself")
    try:
        laid = lay_out(made)
    except (KeyError, ValueError, Unsupported) as error:
        raise Damaged(f"slices cannot be laid out: {error}"[:MAX_SHORT]) from error
    if laid.arena_bytes > MAX_ARENA_BYTES:
        raise Damaged("slices are larger than any arena")
    return laid


# -- the socket --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """The process at the other end of a socket, as the kernel says."""

    pid: int
    uid: int


Identify: TypeAlias = Callable[[socket.socket], Peer]


def peer(sock: socket.socket) -> Peer:
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    return Peer(pid, uid)


@dataclass
class _Unsent:
    data: memoryview
    descriptors: list[int]


class Connection:
    """One end of a socket between a trainer and a keeper. Nothing of it blocks but `drain`.

    `send` may be called from any thread; `receive` and `close` by the one that watches the socket.

    Args:
        limit_bytes: a larger frame is not accepted; may be raised later.

    Attributes:
        ended: the other end is gone, and all that it had sent was received.
        received_bytes: so many have come in all.
    """

    def __init__(
        self, sock: socket.socket, decoder: Decoder[Message], limit_bytes: int = MAX_FRAME_BYTES
    ) -> None:
        sock.setblocking(False)
        self.limit_bytes = limit_bytes
        self.ended = False
        self.received_bytes = 0
        self._sock = sock
        self._decoder = decoder
        self._arrived = bytearray()
        self._descriptors: deque[int] = deque()
        self._unsent: deque[_Unsent] = deque()
        self._emptied = threading.Condition()

    def fileno(self) -> int:
        return self._sock.fileno()

    # -- sending --------------------------------------------------------------------------------------------

    def send(self, message: Message, descriptors: Sequence[int] = (), *, more: bool = False) -> None:
        """Send what the socket takes now; the rest waits for `flush`. The descriptors stay the caller's.
        Where the other end is gone nothing happens: `receive` will tell.

        Args:
            more: another message follows at once, and is to arrive with this.
        """
        self.send_frame(encode(message), descriptors, more=more)

    def send_frame(self, frame: bytes, descriptors: Sequence[int] = (), *, more: bool = False) -> None:
        with self._emptied:
            if self.fileno() >= 0:
                self._unsent.append(_Unsent(memoryview(frame), [os.dup(one) for one in descriptors]))
                if not more:
                    self._flush()

    def flush(self) -> None:
        """Send more of what could not be sent at once."""
        with self._emptied:
            self._flush()

    @property
    def unsent_bytes(self) -> int:
        with self._emptied:
            return sum(len(one.data) for one in self._unsent)

    def drain(self) -> None:
        """Wait until the other end's system has all that was sent, or the other end is gone."""
        with self._emptied:
            self._emptied.wait_for(lambda: not self._unsent)

    def _flush(self) -> None:
        try:
            while self._unsent:
                together = self._next()
                first = together[0].descriptors
                sent = self._sock.sendmsg([one.data for one in together], _ancillary(first))
                _close(first)
                for one in together:
                    one.data, sent = one.data[sent:], max(sent - len(one.data), 0)
                    if one.data:
                        break
                    self._unsent.popleft()
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._forget_unsent()
        self._emptied.notify_all()

    def _next(self) -> list[_Unsent]:
        """Frames to be sent with one call: descriptors travel with the first."""
        first, *others = itertools.islice(self._unsent, _TOGETHER)
        return [first, *itertools.takewhile(lambda one: not one.descriptors, others)]

    def _forget_unsent(self) -> None:
        for one in self._unsent:
            _close(one.descriptors)
        self._unsent.clear()

    # -- receiving ------------------------------------------------------------------------------------------

    def receive(self) -> list[tuple[Message, list[int]]]:
        """The messages that have arrived and the descriptors that came with them, which are the caller's.

        Raises:
            Damaged, Unsupported: what arrived is no message; nothing more can be understood.
        """
        found: list[tuple[Message, list[int]]] = []
        taken = 0
        try:
            while taken < _TURN_BYTES and not self.ended:
                count = self._take()
                if not count:
                    break
                taken += count
                self._split(found)
        except BaseException:
            for _, descriptors in found:
                _close(descriptors)
            raise
        return found

    def _take(self) -> int:
        """Take what is there; returns how many bytes that was."""
        room = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(_RECEIVE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            self.ended = True
            return 0
        self._keep_descriptors(ancillary)
        if flags & socket.MSG_CTRUNC:
            raise Damaged("descriptors were lost on their way")
        if not data:
            self.ended = True
        self._arrived += data
        self.received_bytes += len(data)
        return len(data)

    def _keep_descriptors(self, ancillary: Iterable[tuple[int, int, bytes]]) -> None:
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers = array.array("i")
                numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
                self._descriptors.extend(numbers)
        if len(self._descriptors) > MAX_DESCRIPTORS:
            self._close_descriptors()
            raise Damaged("more descriptors came than any message carries")

    def _split(self, found: list[tuple[Message, list[int]]]) -> None:
        """Take whole frames off what has arrived."""
        at = 0
        while len(self._arrived) - at >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._arrived, at)
            if size > self.limit_bytes:
                raise Damaged(f"a frame of {size:,} bytes is larger than the {self.limit_bytes:,} allowed")
            start = at + _LENGTH.size
            if len(self._arrived) - start < size:
                break
            with memoryview(self._arrived) as view:
                message = self._decoder.decode(bytes(view[start : start + size]))
            found.append((message, self._claimed(message)))
            at = start + size
        if at:
            del self._arrived[:at]
        if not self._arrived:
            # What came with frames that carry none.
            self._close_descriptors()

    def _claimed(self, message: Message) -> list[int]:
        wanted = message.descriptors()
        if wanted > len(self._descriptors):
            raise Damaged(f"a {type(message).__name__} came without its descriptor")
        return [self._descriptors.popleft() for _ in range(wanted)]

    # -- ending ---------------------------------------------------------------------------------------------

    def close(self) -> None:
        with self._emptied:
            self._sock.close()
            self._forget_unsent()
            self._emptied.notify_all()
        self._close_descriptors()
        self.ended = True

    def disown(self) -> None:
        """In a forked child: close what it has of this, and take no lock that nobody will let go of."""
        with suppress(OSError):
            os.close(self._sock.detach())
        for one in self._unsent:
            _close(one.descriptors)

    def _close_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popleft())


def _ancillary(descriptors: list[int]) -> list[tuple[int, int, array.array[int]]]:
    if not descriptors:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def torch_is_imported() -> bool:
    return "torch" in sys.modules
