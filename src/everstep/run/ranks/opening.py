"""What rank 0 tells of the chain that it has opened, and what the others make of it."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from everstep.chain.history import Chain
from everstep.format.record import Origin
from everstep.run.starting import Start

Opened = TypeVar("Opened", bound=Chain)


class _Told(msgspec.Struct):
    """`place` is where the snapshot is that the branch begins with; "": there is none to begin with."""

    chain: str
    place: str = ""
    snapshot: str = ""
    ref: str = ""


def described(chain: Chain, start: Start | None) -> bytes:
    told = _Told(chain.about.chain)
    if start is not None:
        told = _Told(chain.about.chain, start.chain.url, start.snapshot.id, start.ref)
    return msgspec.msgpack.encode(told)


def opened_as(told: bytes, chain: Opened) -> tuple[Opened, Start | None]:
    """The same on another rank, which has opened `chain`.

    Raises:
        NotFound: this rank does not see what rank 0 sees.
    """
    start = msgspec.msgpack.decode(told, type=_Told)
    if not start.place:
        return chain, None
    where: Chain = chain if start.place == chain.url else Chain(start.place)
    return chain, Start(where, where.snapshot(start.snapshot), start.ref)


def packed_origin(origin: Origin | None) -> bytes:
    return msgspec.msgpack.encode(origin)


def unpacked_origin(data: bytes) -> Origin | None:
    return msgspec.msgpack.decode(data, type=Origin | None)
