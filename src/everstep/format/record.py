"""Records: the small JSON objects of a chain, and what a step's record holds (FORMAT.md, "Records").

A snapshot record is named by its digest. The others (chain, head, tag, lease, prune, relocation)
are not, so they carry the digest of their own body and say at which key they belong; both are valid JSON.
"""

from __future__ import annotations

import math
from typing import Annotated, TypeAlias, TypeVar

import msgspec

from everstep.errors import Damaged, Unsupported
from everstep.format import keys
from everstep.format.chunk import ALIGNMENT_BYTES, GRID_BYTES, MAX_CHUNK_BYTES, Buffer, digest
from everstep.format.manifest import (
    FORMAT,
    MAX_COUNT,
    MAX_RANKS,
    RELOCATED,
    SEVERAL,
    Count,
    Digest,
    refuse_newer,
)

MAX_RECORD_BYTES = 4 * 1024 * 1024
MAX_SEGMENT_BYTES = 256 * 1024 * 1024
MAX_URL_CHARACTERS = 4096

Number: TypeAlias = float | str
"""A float; JSON has none for "nan", "inf" and "-inf", which are written as these texts."""

RecordNumber: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNT)]
"""Which record of its kind it is: heads of a branch, tags of a name, leases of a branch, prunes and
relocations are counted from 1."""


NO_SNAPSHOT = "0" * 64
"""What a fence on an empty branch names."""


class ChainRecord(msgspec.Struct, frozen=True):
    """`everstep.json`: what a chain is, created once."""

    chain: str
    created_at: str
    format: int = FORMAT
    grid_bytes: Annotated[int, msgspec.Meta(ge=ALIGNMENT_BYTES, le=MAX_CHUNK_BYTES)] = GRID_BYTES

    @property
    def key(self) -> str:
        return keys.CHAIN


class Origin(msgspec.Struct, frozen=True):
    """A snapshot of another chain: `chain` is that one's random name, `url` where it was then."""

    chain: str
    url: str
    snapshot: Digest
    step: Count


class SnapshotRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """A snapshot: immutable, complete, restorable.

    `step` counts finished steps over all epochs, `epoch` finished epochs. `state` is the state digest.
    `manifests` has one for each rank. `new_bytes` were not in the chain before (raw), `stored_bytes` is what
    they took in packs. `approximate` says why a resume from it cannot be exact (empty: it can). `costs` are
    milliseconds by phase, and bytes where the name ends in `_bytes`. `origin` is what the run began with,
    where that is in another chain.
    """

    format: int
    step: Count
    epoch: Count
    state: Digest
    manifests: Annotated[tuple[Digest, ...], msgspec.Meta(min_length=1, max_length=MAX_RANKS)]
    taken_at: str
    branch: str
    writer: Count
    parents: tuple[Digest, ...] = ()
    trigger: str = ""
    note: str = ""
    logical_bytes: Count = 0
    new_bytes: Count = 0
    stored_bytes: Count = 0
    metrics: dict[str, Number] = {}
    approximate: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    costs: dict[str, float] = {}
    origin: Origin | None = None


BRANCH, ROLLBACK, COPY = "branch", "rollback", "copy"
"""What moves a head without a snapshot being taken."""

DROP = "drop"
"""What a fence says of a branch that was taken away."""


class Move(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a head was moved to a snapshot that was there before: `what` is `branch` (the branch begins with
    it) or `rollback`, `ref` how it was asked for."""

    what: str
    ref: str = ""


class HeadRecord(msgspec.Struct, frozen=True):
    """The newest one of a branch says which snapshot is its head. `nonce` tells two writers apart. A `move`
    is there where the snapshot was not taken just then; else it is left out."""

    snapshot: Digest
    step: Count
    writer: Count
    nonce: str
    at: str
    branch: str
    number: RecordNumber
    format: int = FORMAT
    move: Move | msgspec.UnsetType = msgspec.UNSET
    fence: bool | msgspec.UnsetType = msgspec.UNSET
    """True: it lists nothing, and only takes its number, for ever. Then `snapshot` is that of the record
    before, or `NO_SNAPSHOT`."""

    @property
    def key(self) -> str:
        return keys.numbered(f"{keys.HEADS}{self.branch}/", self.number)

    @property
    def moved(self) -> Move | None:
        """The move, or None where a snapshot was taken."""
        return self.move if isinstance(self.move, Move) else None


class TagRecord(msgspec.Struct, frozen=True):
    """The newest one of a tag says which snapshot it names; "" when the tag was taken away."""

    snapshot: OptionalDigest
    nonce: str
    at: str
    name: str
    number: RecordNumber
    format: int = FORMAT

    @property
    def key(self) -> str:
        return keys.numbered(f"{keys.TAGS}{self.name}/", self.number)


class LeaseRecord(msgspec.Struct, frozen=True):
    """Who may write a branch. The newest one counts; its `number` is the writer's. `pid` 0: nobody does now.
    Without a branch: one of version 0.2, for all of them.

    `host` and `boot` name a machine since its last start, `started` is the process's start time in clock
    ticks since then, so that a recycled pid is not mistaken for the writer.
    """

    host: str
    boot: str
    pid: Count
    started: Count
    nonce: str
    at: str
    number: RecordNumber
    format: int = FORMAT
    branch: str | msgspec.UnsetType = msgspec.UNSET

    @property
    def key(self) -> str:
        return keys.numbered(f"{keys.LEASES}{self.branch}/" if self.branch else keys.LEASES, self.number)


OptionalDigest: TypeAlias = Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$", max_length=64)]


class PartRecord(msgspec.Struct, frozen=True):
    """What one rank has put of a snapshot that is not committed yet; or, with `withdrawn`, why it gives up.

    `relies` are the packs, and perhaps the manifest, that were there before the rank put them.
    """

    branch: str
    writer: Count
    take: Count
    rank: Count
    ranks: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANKS)]
    manifest: OptionalDigest
    state: OptionalDigest
    nonce: str
    at: str
    withdrawn: str = ""
    logical_bytes: Count = 0
    new_bytes: Count = 0
    stored_bytes: Count = 0
    approximate: tuple[str, ...] = ()
    relies: tuple[Digest, ...] = ()
    format: int = SEVERAL

    @property
    def key(self) -> str:
        return keys.part(self.branch, self.writer, self.take, self.rank)

    def is_sound(self) -> bool:
        """Whether it says what a part is, or why there is none."""
        there = bool(self.manifest and self.state)
        return self.rank < self.ranks and (there if not self.withdrawn else not (self.manifest or self.state))


class PruneRecord(msgspec.Struct, frozen=True):
    """What a prune is about to delete, so that nobody begins to rely on it: ids of snapshots, and names of
    manifests and packs. Whose it is as in a lease. Without any names: the prune before it is over.
    """

    snapshots: tuple[Digest, ...]
    manifests: tuple[Digest, ...]
    packs: tuple[Digest, ...]
    host: str
    boot: str
    pid: Count
    started: Count
    nonce: str
    begun_at: str
    number: RecordNumber
    format: int = FORMAT

    @property
    def key(self) -> str:
        return keys.numbered(keys.PRUNES, self.number)

    @property
    def names(self) -> frozenset[str]:
        return frozenset((*self.snapshots, *self.manifests, *self.packs))


class NewPack(msgspec.Struct, frozen=True, array_like=True):
    """A pack that chunks were copied to."""

    name: Digest
    size_bytes: Count


class Spot(msgspec.Struct, frozen=True, array_like=True):
    """What a manifest places at `at` is also in pack number `pack`, at `offset`: the same stored bytes."""

    at: Count
    pack: Count
    offset: Count


class RelocationRecord(msgspec.Struct, frozen=True):
    """Where chunks are whose pack was given up: `moved` has the spots by the pack that manifests name."""

    packs: tuple[NewPack, ...]
    moved: dict[Digest, tuple[Spot, ...]]
    nonce: str
    at: str
    number: RecordNumber
    format: int = RELOCATED

    @property
    def key(self) -> str:
        return keys.numbered(keys.RELOCATIONS, self.number)

    def is_sound(self) -> bool:
        """Whether each spot is one where a chunk can be."""
        return all(
            spot.pack < len(self.packs)
            and spot.offset < self.packs[spot.pack].size_bytes
            and not (spot.at % ALIGNMENT_BYTES or spot.offset % ALIGNMENT_BYTES)
            for spots in self.moved.values()
            for spot in spots
        )


class ReplicasRecord(msgspec.Struct, frozen=True):
    """Where the replicas of a chain are, as its last writer was told; or, in a replica, what it is one of.
    The newest one counts."""

    urls: tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_URL_CHARACTERS)], ...]
    nonce: str
    at: str
    number: RecordNumber
    source: Annotated[str, msgspec.Meta(max_length=MAX_URL_CHARACTERS)] = ""
    format: int = FORMAT

    @property
    def key(self) -> str:
        return keys.numbered(keys.REPLICAS, self.number)


SealedRecord: TypeAlias = (
    ChainRecord
    | HeadRecord
    | TagRecord
    | LeaseRecord
    | PartRecord
    | PruneRecord
    | RelocationRecord
    | ReplicasRecord
)
"""Each says with `key` where it belongs."""

SEALED_KINDS: dict[str, type[SealedRecord]] = {
    keys.CHAIN: ChainRecord,
    keys.HEADS: HeadRecord,
    keys.TAGS: TagRecord,
    keys.LEASES: LeaseRecord,
    keys.PARTS: PartRecord,
    keys.PRUNES: PruneRecord,
    keys.RELOCATIONS: RelocationRecord,
    keys.REPLICAS: ReplicasRecord,
}
"""By what a key begins with, the record that lies there."""


class StepRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one step was: compared when a resume trains it again.

    `metrics` are the bits of the logged floats in C's hexadecimal notation, `lr` those of the learning rates
    of every optimizer's groups, `delivered` the batches of this epoch so far, `rng` a fingerprint of the
    random number generators after the step.
    """

    step: Count
    epoch: Count
    delivered: Count = 0
    metrics: dict[str, str] = {}
    lr: tuple[str, ...] = ()
    rng: str = ""

    def differences(self, other: StepRecord) -> list[str]:
        """What differs, in words; empty when the two are the same bit for bit. A metric that only one of
        them has is no difference: logging more does not change the run."""
        found = [
            f"{name} {_shown(self.metrics[name])} was {_shown(other.metrics[name])}"
            for name in self.metrics.keys() & other.metrics.keys()
            if self.metrics[name] != other.metrics[name]
        ]
        if self.lr != other.lr:
            found.append(f"learning rate {_list(self.lr)} was {_list(other.lr)}")
        if (self.epoch, self.delivered) != (other.epoch, other.delivered):
            found.append(
                f"position epoch {self.epoch} batch {self.delivered} was "
                f"epoch {other.epoch} batch {other.delivered}"
            )
        if self.rng != other.rng:
            found.append("the random number generators differ")
        return found


def _shown(bits: str) -> str:
    return f"{float.fromhex(bits):.9g}"


def _list(bits: tuple[str, ...]) -> str:
    return ", ".join(map(_shown, bits)) or "none"


Record = TypeVar("Record", bound=msgspec.Struct)
Sealed = TypeVar("Sealed", bound=SealedRecord)

_PREFIX = b'{"blake3":"'
_MIDDLE = b'","record":'
_SUFFIX = b"}\n"
_BODY = len(_PREFIX) + 64 + len(_MIDDLE)


def encode(record: msgspec.Struct) -> bytes:
    """A record as JSON, without a digest of its own (snapshot records: their name is the digest).

    Raises:
        Unsupported: something in it is larger than can be, or no JSON (a metric that is nan must be
            `number(nan)`); what could not be read back is not written.
    """
    data = msgspec.json.encode(record)
    if len(data) > MAX_RECORD_BYTES:
        raise Unsupported(
            f"a {_name(type(record))} of {len(data)} bytes is larger than the {MAX_RECORD_BYTES} allowed",
            next="a shorter note, fewer metrics",
        )
    try:
        msgspec.json.decode(data, type=type(record))
    except msgspec.MsgspecError as error:
        raise Unsupported(f"a {_name(type(record))} cannot be stored: {error}") from error
    return data


def decode(data: Buffer, kind: type[Record]) -> Record:
    """Raises Damaged when `data` is no such record, Unsupported when a newer format wrote it."""
    if len(data) > MAX_RECORD_BYTES:
        raise Damaged(f"a record of {len(data)} bytes is larger than the {MAX_RECORD_BYTES} allowed")
    what = _name(kind)
    try:
        refuse_newer(data, what)
        record = msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise Damaged(f"a {what} cannot be read: {error}") from error
    if isinstance(record, SnapshotRecord) and len(record.manifests) > 1 and record.format < SEVERAL:
        raise Damaged(f"a snapshot record of format {record.format} is of {len(record.manifests)} ranks")
    if isinstance(record, PartRecord) and not record.is_sound():
        raise Damaged("a part record contradicts itself")
    if isinstance(record, RelocationRecord) and not record.is_sound():
        raise Damaged("a relocation record names a place where no chunk can be")
    return record


def _name(kind: type[msgspec.Struct]) -> str:
    return kind.__name__.removesuffix("Record").lower() + " record"


def seal(record: SealedRecord) -> bytes:
    """A record as JSON that carries the digest of its own body."""
    body = encode(record)
    return b"".join([_PREFIX, digest(body).encode(), _MIDDLE, body, _SUFFIX])


def unseal(data: Buffer, kind: type[Sealed], key: str) -> Sealed:
    """The record that lies at `key`.

    Raises:
        Damaged: one bit of `data` is not as `seal` made it; or it is whole, and belongs at another key.
        Unsupported: a newer format wrote it.
    """
    data = bytes(data)
    body = data[_BODY : -len(_SUFFIX)]
    if data != b"".join([_PREFIX, digest(body).encode(), _MIDDLE, body, _SUFFIX]):
        raise Damaged(f"a {_name(kind)} does not match its digest")
    record = decode(body, kind)
    if record.key != key:
        raise Damaged(f"a {_name(kind)} is the record of another place")
    return record


def seal_segment(steps: list[StepRecord]) -> bytes:
    """A step log segment: one line with the digest of what follows, then one line of JSON a step."""
    body = b"".join(encode(step) + b"\n" for step in steps)
    return b'{"blake3":"' + digest(body).encode() + b'"}\n' + body


def unseal_segment(data: Buffer) -> list[StepRecord]:
    """Raises Damaged when one bit of `data` is not as `seal_segment` made it."""
    if len(data) > MAX_SEGMENT_BYTES:
        raise Damaged(f"a step log segment of {len(data)} bytes is larger than allowed")
    first, newline, body = bytes(data).partition(b"\n")
    if not newline or first != b'{"blake3":"' + digest(body).encode() + b'"}':
        raise Damaged("a step log segment does not match its digest")
    return [decode_step(line) for line in body.splitlines()]


def decode_step(line: bytes) -> StepRecord:
    """One line of a step log. Raises Damaged."""
    try:
        step = msgspec.json.decode(line, type=StepRecord)
        for bits in (*step.metrics.values(), *step.lr):
            float.fromhex(bits)
    except (msgspec.MsgspecError, RecursionError, ValueError, OverflowError) as error:
        raise Damaged(f"a step record cannot be read: {error}") from error
    return step


def number(value: float) -> Number:
    """`value` as JSON can hold it."""
    return value if math.isfinite(value) else str(value)
