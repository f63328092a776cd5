"""What ranks tell each other, through the job's TCPStore. The words are those of `agreement` and `hub`."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

from everstep.errors import Damaged

MAX_MESSAGE_BYTES = 8 * 1024 * 1024
MAX_TEXT = 4096

Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Rank: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=1 << 20)]
Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


class Wish(msgspec.Struct, frozen=True, array_like=True):
    """Why a snapshot is to be taken. `at` is a step that is wished for: not before it. `wait`: somebody waits
    for it, and so for room. `stop`: it is the last, and then all ranks leave."""

    trigger: Text
    note: Text = ""
    at: Number = 0
    wait: bool = False
    stop: bool = False

    def and_also(self, other: Wish) -> Wish:
        """Both in one: what stops, or is waited for, gives it its name."""
        first, second = (self, other) if self._weight >= other._weight else (other, self)
        return Wish(
            first.trigger,
            first.note or second.note,
            max(self.at, other.at),
            self.wait or other.wait,
            self.stop or other.stop,
        )

    @property
    def _weight(self) -> tuple[bool, bool]:
        return self.stop, self.wait


# -- to the hub ---------------------------------------------------------------------------------------------


class Ask(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank that has finished `step` steps wants a snapshot of this one or of a later one."""

    rank: Rank
    step: Number
    wish: Wish


class Promise(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank does not go past `step` before it has heard what becomes of take `number`. `room`: whether it
    could take it at once. `fits`: whether it knows which other ranks hold what it holds."""

    rank: Rank
    number: Number
    step: Number
    room: bool
    fits: bool = True


class Late(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The promises for take `number` have taken as long as they may."""

    number: Number


class Became(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What became of take `number`: its snapshot and that one's record as it is stored, or why there is
    none. `parted`: ranks that held the same hold it no more."""

    number: Number
    snapshot: Text = ""
    record: Annotated[bytes, msgspec.Meta(max_length=MAX_MESSAGE_BYTES // 2)] = b""
    problem: Text = ""
    parted: bool = False


class Lost(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Somebody died before it could say what it had begun to say."""


class End(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The run is over."""


# -- to all ranks -------------------------------------------------------------------------------------------


class Propose(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Take `number` is to be agreed upon."""

    number: Number


class Decide(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Take `number` is taken when `step` steps are finished; or not at all, for the reason that `problem`
    says (`busy`: that there is no room). `anew`: all ranks find out first, together, who holds what."""

    number: Number
    step: Number
    wish: Wish
    problem: Text = ""
    anew: bool = False
    busy: bool = False


Request: TypeAlias = Ask | Promise | Late | Became | Lost | End
Message: TypeAlias = Propose | Decide | Became | End

encode = msgspec.msgpack.Encoder().encode
_REQUESTS = msgspec.msgpack.Decoder(Request)
_MESSAGES = msgspec.msgpack.Decoder(Message)


def request(data: bytes) -> Request:
    """Raises Damaged where `data` is none."""
    return _decoded(_REQUESTS, data)  # type: ignore[return-value]


def message(data: bytes) -> Message:
    """Raises Damaged where `data` is none."""
    return _decoded(_MESSAGES, data)  # type: ignore[return-value]


def _decoded(
    decoder: msgspec.msgpack.Decoder[Request] | msgspec.msgpack.Decoder[Message], data: bytes
) -> object:
    if len(data) > MAX_MESSAGE_BYTES:
        raise Damaged(f"a message between ranks of {len(data)} bytes")
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged(f"a message between ranks cannot be read: {error}") from error
