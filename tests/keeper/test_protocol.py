"""What trainer and keeper say to each other, and what is made of what nobody should say."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import tracemalloc
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep import errors
from everstep.chain.history import Snapshot
from everstep.chain.parts import Part
from everstep.chain.steplog import EndedJournal
from everstep.chain.writer import Facts
from everstep.errors import Damaged, EverstepError, Unsupported
from everstep.format.layout import Slice, lay_out
from everstep.format.record import Origin, SnapshotRecord
from everstep.keeper import protocol
from everstep.keeper.base import Job, Outcome, Terms
from everstep.keeper.protocol import TO_KEEPER, TO_TRAINER, Connection, Message
from examples import examples

same_every_time = settings(deadline=None, derandomize=True, database=None, max_examples=examples(200))

LAYOUT = lay_out(
    [
        Slice("weight", "float32", (700, 500), (0, 0), (700, 500), "frozen"),
        Slice("bias", "bfloat16", (5,), (0,), (5,), "buffer"),
        Slice("tied", "float32", (700, 500), (0, 0), (700, 500), "frozen", "weight"),
        Slice("empty", "numpy:<f8", (0, 3), (0, 0), (0, 3)),
        Slice("scalar", "int64", (), (), ()),
    ]
)
FACTS = Facts(
    step=7,
    epoch=1,
    trigger="10m",
    note="ümlaut " * 1000,
    metrics={"loss": 0.1, "bad": "nan"},
    approximate=("why",),
    environment={"host": "here"},
    taken_at="2026-01-01T00:00:00.000000+00:00",
    begun=12.5,
    origin=Origin("ab", "runs/old", "ef" * 32, 5),
)
RECORD = SnapshotRecord(1, 7, 0, "ab" * 32, ("cd" * 32,), "now", "main", 3, costs={"stall": 0.125})
PROBLEM = protocol.Problem.of(errors.Unavailable("no room", kept="all", next="df -h", key="packs/x"))

PART = Part(3, 4, "ab" * 32, "cd" * 32, 12, 8, 4, ("world size",), ("ef" * 32,))
OF_MANY = protocol.Seated(3, 12, (protocol.Open(1, "joining", 5),), (4096,), ("ab" * 32,))

SAID_TO_KEEPER: list[Message] = [
    protocol.Hello(protocol.VERSION, "abc"),
    protocol.Leave(),
    protocol.Ask(),
    protocol.Settle(),
    protocol.Settle(3, 4),
    protocol.Read(1, "packs/ab/" + "ab" * 32, 4096, 1 << 20),
    protocol.Begin.under(Terms("main", 3, "", "all", rank=3, ranks=4, deadline_s=0.5, part="ab" * 32)),
    protocol.Begin.under(Terms("main", 3, "", "last 3")),
    protocol.Begin.under(Terms("main", 3, "ab" * 32, "all", True, (("s3://b/x", "s3://b/x"),))),
    protocol.Prepare(1, 4096),
    protocol.Bring(2),
    protocol.Discard(1),
    protocol.Submit(
        4,
        protocol.Said.of(FACTS),
        b"values",
        protocol.Cut.all_of([EndedJournal("main-0-0", (b"{}", b"[]"))]),
        protocol.pieces(LAYOUT),
        again=True,
    ),
    protocol.Submit(5, protocol.Said.of(FACTS), b"", (), None),
    protocol.Submit(6, protocol.Said.of(FACTS), b"", (), None, take=2, look=True),
    protocol.Fill(4, 1, 0, 4096, (0, 2)),
    protocol.Fill(4, 1, 0, 8192, (), 4096),
    protocol.Arrived(4, 8192),
    protocol.End(4, {"stall": 1.0}),
    protocol.Drop(4),
    protocol.Tidy(4, ()),
    protocol.Goodbye(),
]
SAID_TO_TRAINER: list[Message] = [
    protocol.Welcome(protocol.VERSION, 12),
    protocol.Status(protocol.VERSION, 1, "/chain", "now", 2, (protocol.Open(1, "storing", 5),), (4096,)),
    protocol.Status(protocol.VERSION, 1, "/chain", "now", ranks=4, seats=(OF_MANY,)),
    protocol.Busy(7),
    protocol.Settled(""),
    protocol.Settled("ab" * 32),
    protocol.Settled("", ("ab" * 32, "cd" * 32)),
    protocol.Got(1, True),
    protocol.Got(2, False),
    protocol.Refused(PROBLEM),
    protocol.Lent(1),
    protocol.NoMemory(1, PROBLEM),
    protocol.Freed(1),
    protocol.Done(4, 12.5, "ab" * 32, RECORD),
    protocol.Done(4, 12.5, problem=PROBLEM),
    protocol.Done(4, 12.5, part=protocol.Announced.of(PART)),
    protocol.Tidied(4),
    protocol.Warned("careful"),
    protocol.Stands("s3://b/x", "ab" * 32, 7, 2),
    protocol.Stands("s3://b/x", problem="away", fenced=PROBLEM),
]
SAID = [(TO_KEEPER, one) for one in SAID_TO_KEEPER] + [(TO_TRAINER, one) for one in SAID_TO_TRAINER]
NAMES = [f"{number}-{type(one).__name__}" for number, (_, one) in enumerate(SAID)]


def body(message: Message) -> bytes:
    return protocol.encode(message)[4:]


def is_refused(decoder: protocol.Decoder[Message], data: bytes) -> bool:
    try:
        decoder.decode(data)
    except (Damaged, Unsupported):
        return True
    return False


# -- messages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("decoder", "message"), SAID, ids=NAMES)
def test_a_message_arrives_as_it_was_sent(decoder: protocol.Decoder[Message], message: Message) -> None:
    assert decoder.decode(body(message)) == message


def test_every_message_is_tried_here() -> None:
    unions = (protocol.ToKeeper, protocol.ToTrainer)
    assert {type(one) for _, one in SAID} == {kind for union in unions for kind in union.__args__}


@pytest.mark.parametrize(("decoder", "message"), SAID, ids=NAMES)
def test_one_that_is_cut_off_or_changed_is_refused_or_another(
    decoder: protocol.Decoder[Message], message: Message
) -> None:
    data = body(message)[:3000]
    assert all(is_refused(decoder, data[:size]) for size in range(len(data)))
    for at, bit in itertools.product(range(min(len(data), 400)), range(8)):
        is_refused(decoder, data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])


@same_every_time
@given(st.binary(max_size=200))
def test_random_bytes_are_no_message(data: bytes) -> None:
    assert is_refused(TO_KEEPER, data)
    assert is_refused(TO_TRAINER, data)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)
FIELDS = sorted({field for _, one in SAID for field in one.__struct_fields__})
TAGS = [str(type(one).__struct_config__.tag) for _, one in SAID]


@same_every_time
@given(st.sampled_from(TAGS), st.dictionaries(st.sampled_from(FIELDS), PLAIN))
def test_fields_of_another_kind_are_refused(tag: str, fields: dict[str, Any]) -> None:
    data = msgspec.msgpack.encode({"type": tag, **fields})
    is_refused(TO_KEEPER, data)
    is_refused(TO_TRAINER, data)


def test_what_another_version_may_say() -> None:
    with pytest.raises(Unsupported, match="'teleport' is no message of this version"):
        TO_KEEPER.decode(msgspec.msgpack.encode({"type": "teleport", "where": 3}))
    more = {"type": "hello", "version": "9/9", "chain": "", "mood": "good"}
    assert TO_KEEPER.decode(msgspec.msgpack.encode(more)) == protocol.Hello("9/9", "")


@pytest.mark.parametrize("count", [1 << 20, (1 << 32) - 1])
@pytest.mark.parametrize(
    "opening", [b"\xdd", b"\xdf", b"\xc6", b"\xdb"], ids=["array", "map", "bytes", "text"]
)
@pytest.mark.parametrize("field", ["values", "journals", "slices", "facts", "job"])
def test_lengths_are_not_believed(field: str, opening: bytes, count: int) -> None:
    """A container that claims to be huge and is not there takes no memory to speak of."""
    fields = {"job": 1, "facts": {}, "values": b"", "journals": [], "slices": None}
    fields.pop(field)
    data = msgspec.msgpack.encode({"type": "submit", **fields, field: None})
    assert data.endswith(b"\xc0")
    data = data[:-1] + opening + struct.pack(">I", count)
    tracemalloc.start()
    try:
        assert is_refused(TO_KEEPER, data)
        assert tracemalloc.get_traced_memory()[1] < 32 * 1024 * 1024
    finally:
        tracemalloc.stop()


def test_deep_nesting_is_refused() -> None:
    assert is_refused(TO_KEEPER, b"\x91" * 100_000)
    assert is_refused(TO_KEEPER, b"\x82\xa4type\xa5hello\xa1x" + b"\x91" * 100_000)


def test_too_large_a_message_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_FRAME_BYTES", 100)
    with pytest.raises(Unsupported, match="larger than the 100 allowed"):
        protocol.encode(protocol.Warned("a" * 101))


# -- what they mean ----------------------------------------------------------------------------------------


def test_facts_and_terms_come_out_as_they_went_in() -> None:
    assert protocol.Said.of(FACTS).facts() == FACTS
    terms = Terms("main", 3, "ab" * 32, "last 3")
    assert protocol.Begin.under(terms).terms() == terms
    journal = EndedJournal("main-0-0", (b"{}",))
    assert [cut.journal() for cut in protocol.Cut.all_of([journal])] == [journal]


@pytest.mark.parametrize("kind", protocol.Problem.KINDS)
def test_errors_come_out_as_they_went_in(kind: str) -> None:
    error = getattr(errors, kind)("this is wrong", kept="that", next="do it", key="packs/ab/c")
    again = protocol.Problem.of(error).error()
    assert type(again) is type(error)
    assert (str(again), again.key, again.next) == (str(error), "packs/ab/c", "do it")


def test_every_kind_of_error_can_travel() -> None:
    kinds = {kind.__name__ for kind in EverstepError.__subclasses__()}
    assert kinds == set(protocol.Problem.KINDS)


def test_what_is_no_error_of_ours_is_named() -> None:
    error = protocol.Problem.of(ZeroDivisionError("division by zero")).error()
    assert type(error) is EverstepError
    assert str(error) == "the keeper failed (ZeroDivisionError: division by zero)."
    forged = protocol.Problem("SystemExit", "ha")
    assert type(forged.error()) is EverstepError


def test_an_outcome_comes_out_as_it_went_in() -> None:
    snapshot = Snapshot("ab" * 32, RECORD)
    good = protocol.Done.of(4, Outcome(Job(LAYOUT, FACTS), snapshot, None, 3.0))
    assert (good.taken(), good.error()) == (snapshot, None)
    assert protocol.Done.of(4, good.outcome(Job(LAYOUT, FACTS))) == good
    job = Job(LAYOUT, FACTS)
    part = protocol.Done.of(4, Outcome(job, None, None, 3.0, part=PART)).outcome(job)
    assert (part.snapshot, part.error, part.part) == (None, None, PART)
    bad = protocol.Done.of(4, Outcome(Job(LAYOUT, FACTS), None, errors.Fenced("gone"), 3.0))
    assert bad.taken() is None
    assert isinstance(bad.error(), errors.Fenced)
    assert protocol.Done(4, 1.0).error() is not None


DTYPES = st.sampled_from(["float32", "bfloat16", "int64", "bool", "numpy:<f8"])
SHAPES = st.lists(st.integers(0, 3000), max_size=3).map(tuple)


@same_every_time
@given(st.lists(st.tuples(DTYPES, SHAPES, st.sampled_from(["frozen", "buffer", "moving"])), max_size=8))
def test_a_layout_is_made_again_from_its_slices(shapes: list[Any]) -> None:
    slices = [
        Slice(str(number), dtype, shape, (0,) * len(shape), shape, kin)
        for number, (dtype, shape, kin) in enumerate(shapes)
    ]
    laid = lay_out(slices)
    if laid.arena_bytes <= protocol.MAX_ARENA_BYTES:
        assert protocol.layout(protocol.pieces(laid)) == laid


@pytest.mark.parametrize(
    "piece",
    [
        protocol.Piece("a", "float33", (1,), (0,), (1,), "moving", None),
        protocol.Piece("a", "float32", (1,), (0,), (1,), "moving", "nobody"),
        protocol.Piece("a", "float32", (1,), (0,), (1,), "moving", "a"),
        protocol.Piece("a", "float32", (1,), (0,), (1, 2), "moving", None),
        protocol.Piece("a", "float32", (1 << 50,), (0,), (1 << 50,), "moving", None),
    ],
    ids=["dtype", "alias", "itself", "dimensions", "size"],
)
def test_slices_that_make_no_layout(piece: protocol.Piece) -> None:
    with pytest.raises(Damaged):
        protocol.layout([piece])


# -- the socket --------------------------------------------------------------------------------------------


class Pair:
    def __init__(self, limit_bytes: int = protocol.MAX_FRAME_BYTES) -> None:
        self.raw, other = socket.socketpair()
        self.end = Connection(other, TO_KEEPER, limit_bytes)


@pytest.fixture
def pair() -> Iterator[Pair]:
    before = len(os.listdir("/proc/self/fd"))
    made = Pair()
    yield made
    made.raw.close()
    made.end.close()
    assert len(os.listdir("/proc/self/fd")) == before, "a descriptor was left open"


@same_every_time
@given(st.lists(st.sampled_from(range(len(SAID_TO_KEEPER))), max_size=6), st.lists(st.integers(1, 40)))
def test_frames_may_arrive_in_any_pieces(numbers: list[int], cuts: list[int]) -> None:
    wanted = [one for one in (SAID_TO_KEEPER[number] for number in numbers) if not one.descriptors()]
    data = b"".join(map(protocol.encode, wanted))
    pair, found, at = Pair(), [], 0
    for size in [*cuts, len(data)]:
        pair.raw.sendall(data[at : at + size])
        at += size
        found += pair.end.receive()
    pair.raw.close()
    found += pair.end.receive()
    assert [message for message, _ in found] == wanted
    assert pair.end.ended
    pair.end.close()


def test_what_the_socket_does_not_take_waits() -> None:
    left, right = socket.socketpair()
    sender, receiver = Connection(left, TO_TRAINER), Connection(right, TO_KEEPER)
    messages = [protocol.Submit(n, protocol.Said.of(FACTS), bytes(400_000), (), None) for n in range(20)]
    for message in messages:
        sender.send(message)
    assert sender.unsent_bytes > 1_000_000
    found = []
    while len(found) < len(messages):
        found += receiver.receive()
        sender.flush()
    assert [message for message, _ in found] == messages
    assert sender.unsent_bytes == 0
    receiver.close()
    sender.send(messages[0])
    assert sender.unsent_bytes == 0  # Nobody will ever take it.
    assert sender.receive() == []
    assert sender.ended
    sender.close()


def test_memory_travels_beside_its_message(pair: Pair) -> None:
    memory = os.memfd_create("test")
    os.write(memory, b"hello")
    frames = [protocol.encode(one) for one in (protocol.Ask(), protocol.Bring(1), protocol.Bring(2))]
    pair.raw.sendall(frames[0])
    for frame in frames[1:]:
        socket.send_fds(pair.raw, [frame], [memory])
    os.close(memory)
    (_, none), (first, ones), (second, twos) = pair.end.receive()
    assert (none, first, second) == ([], protocol.Bring(1), protocol.Bring(2))
    for descriptor in ones + twos:
        assert os.pread(descriptor, 10, 0) == b"hello"
        os.close(descriptor)


def test_descriptors_that_nobody_asked_for_are_closed(pair: Pair) -> None:
    socket.send_fds(pair.raw, [protocol.encode(protocol.Ask())], [0, 0, 0])
    assert pair.end.receive() == [(protocol.Ask(), [])]


def test_a_descriptor_that_is_missing(pair: Pair) -> None:
    pair.raw.sendall(protocol.encode(protocol.Bring(1)))
    with pytest.raises(Damaged, match="without its descriptor"):
        pair.end.receive()


def test_too_many_descriptors(pair: Pair) -> None:
    socket.send_fds(pair.raw, [b"\xff"], [0] * 200)
    with pytest.raises(Damaged, match="descriptors"):
        pair.end.receive()


def test_what_came_before_a_bad_frame_is_let_go_of(pair: Pair) -> None:
    socket.send_fds(pair.raw, [protocol.encode(protocol.Bring(1)) + b"\0\0\0\0"], [0])
    with pytest.raises(Damaged):
        pair.end.receive()


@pytest.mark.parametrize("size", [101, 1 << 20, (1 << 32) - 1])
def test_frames_are_bounded_before_they_are_read(size: int) -> None:
    pair = Pair(limit_bytes=100)
    pair.raw.sendall(struct.pack("<I", size) + bytes(50))
    with pytest.raises(Damaged, match="larger than the 100 allowed"):
        pair.end.receive()
    pair.raw.close()
    pair.end.close()


@same_every_time
@given(st.binary(min_size=1, max_size=400))
def test_random_bytes_on_the_socket(data: bytes) -> None:
    pair = Pair()
    pair.raw.sendall(data)
    pair.raw.close()
    try:
        assert pair.end.receive() == []
    except (Damaged, Unsupported):
        pass
    else:
        assert pair.end.ended
    pair.end.close()


def test_who_is_at_the_other_end(pair: Pair) -> None:
    assert protocol.peer(pair.raw) == protocol.Peer(os.getpid(), os.geteuid())
