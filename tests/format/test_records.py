"""Records and the step log: they come back as they were, and a digest covers every bit of them."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest
from format_vectors import a_part, a_snapshot, sealed_records, steps
from hostile import bit_flips, is_refused, nested, same_every_time, truncations
from hypothesis import given
from hypothesis import strategies as st

from everstep.chain.steplog import read_journal
from everstep.errors import Damaged, Unsupported
from everstep.format import chunk, record
from everstep.format.record import (
    ChainRecord,
    HeadRecord,
    LeaseRecord,
    Move,
    NewPack,
    Origin,
    PartRecord,
    PruneRecord,
    RelocationRecord,
    SealedRecord,
    SnapshotRecord,
    Spot,
    StepRecord,
    TagRecord,
)

DIGEST = chunk.digest(b"snapshot")
SEALED: list[SealedRecord] = [*sealed_records(DIGEST).values(), a_part()]
RECORDS: list[msgspec.Struct] = [*SEALED, a_snapshot(DIGEST)]

digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
counts = st.integers(0, 2**62)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ordinals = st.integers(1, 2**62)
numbers = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(["nan", "inf", "-inf"])
floats = st.floats().map(float.hex)

snapshots = st.builds(
    SnapshotRecord,
    format=st.just(1),
    step=counts,
    epoch=counts,
    state=digests,
    manifests=st.tuples(digests),
    taken_at=texts,
    branch=texts,
    writer=counts,
    parents=st.lists(digests, max_size=2).map(tuple),
    trigger=texts,
    note=texts,
    metrics=st.dictionaries(texts, numbers, max_size=4),
    approximate=st.lists(texts, max_size=3).map(tuple),
    environment=st.dictionaries(texts, texts, max_size=4),
    costs=st.dictionaries(texts, st.floats(0, 1e9), max_size=4),
    origin=st.none() | st.builds(Origin, chain=texts, url=texts, snapshot=digests, step=counts),
)
offsets = st.integers(0, (1 << 28) - 1).map(lambda number: 4096 * number)
spots = st.builds(Spot, at=offsets, pack=st.integers(0, 1), offset=offsets)
sealed = (
    st.builds(
        ChainRecord, chain=texts, created_at=texts, grid_bytes=st.integers(4096, 1 << 26), format=st.just(1)
    )
    | st.builds(
        HeadRecord,
        snapshot=digests,
        step=counts,
        writer=counts,
        nonce=texts,
        at=texts,
        branch=texts,
        number=ordinals,
        format=st.just(1),
        move=st.just(msgspec.UNSET) | st.builds(Move, what=texts, ref=texts),
    )
    | st.builds(
        TagRecord,
        snapshot=digests | st.just(""),
        nonce=texts,
        at=texts,
        name=texts,
        number=ordinals,
        format=st.just(1),
    )
    | st.builds(
        LeaseRecord,
        host=texts,
        boot=texts,
        pid=counts,
        started=counts,
        nonce=texts,
        at=texts,
        number=ordinals,
        format=st.just(1),
        branch=texts | st.just(msgspec.UNSET),
    )
    | st.builds(
        PruneRecord,
        snapshots=st.lists(digests, max_size=3).map(tuple),
        manifests=st.lists(digests, max_size=3).map(tuple),
        packs=st.lists(digests, max_size=3).map(tuple),
        host=texts,
        boot=texts,
        pid=counts,
        started=counts,
        nonce=texts,
        begun_at=texts,
        number=ordinals,
        format=st.just(1),
    )
    | st.builds(
        RelocationRecord,
        packs=st.just((NewPack("cd" * 32, 1 << 40), NewPack("ef" * 32, 1 << 40))),
        moved=st.dictionaries(digests, st.lists(spots, max_size=3).map(tuple), max_size=3),
        nonce=texts,
        at=texts,
        number=ordinals,
        format=st.just(2),
    )
)
sealed |= st.builds(
    PartRecord,
    branch=texts,
    writer=counts,
    take=counts,
    rank=st.integers(0, 3),
    ranks=st.integers(4, 1 << 15),
    manifest=digests,
    state=digests,
    nonce=texts,
    at=texts,
    logical_bytes=counts,
    approximate=st.lists(texts, max_size=3).map(tuple),
    relies=st.lists(digests, max_size=3).map(tuple),
    format=st.just(3),
)
step_records = st.builds(
    StepRecord,
    step=counts,
    epoch=counts,
    delivered=counts,
    metrics=st.dictionaries(texts, floats, max_size=3),
    lr=st.lists(floats, max_size=3).map(tuple),
    rng=texts,
)


@same_every_time
@given(sealed)
def test_every_sealed_record_comes_back(one: Any) -> None:
    data = record.seal(one)
    assert record.unseal(data, type(one), one.key) == one
    whole = json.loads(data)
    formats = {RelocationRecord: 2, PartRecord: 3}
    assert whole["record"]["format"] == formats.get(type(one), 1)
    assert set(whole) == {"blake3", "record"}


@same_every_time
@given(snapshots)
def test_every_snapshot_record_comes_back(one: SnapshotRecord) -> None:
    assert record.decode(record.encode(one), SnapshotRecord) == one


@same_every_time
@given(st.lists(step_records, max_size=5))
def test_every_step_log_comes_back(log: list[StepRecord]) -> None:
    assert record.unseal_segment(record.seal_segment(log)) == log
    assert read_journal(journal(log)) == log


def journal(log: list[StepRecord]) -> bytes:
    lines = [record.encode(one) for one in log]
    return b"".join(chunk.digest(line)[:16].encode() + b" " + line + b"\n" for line in lines)


@pytest.mark.parametrize("value", [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan])
def test_numbers_keep_every_bit(value: float) -> None:
    log = [StepRecord(1, 0, metrics={"loss": value.hex()}, lr=(value.hex(),))]
    back = record.unseal_segment(record.seal_segment(log))[0]
    assert back.metrics["loss"] == value.hex()
    assert back.differences(log[0]) == []
    other = StepRecord(1, 0, metrics={"loss": (0.25).hex()}, lr=((0.5).hex(),))
    assert len(back.differences(other)) == 2


def test_what_differs_is_told_in_words() -> None:
    one = StepRecord(5, 1, 3, {"loss": (0.5).hex(), "only here": (1.0).hex()}, ((0.1).hex(),), "aa")
    other = StepRecord(5, 1, 4, {"loss": (0.25).hex()}, ((0.2).hex(), (0.3).hex()), "bb")
    assert one.differences(other) == [
        "loss 0.5 was 0.25",
        "learning rate 0.1 was 0.2, 0.3",
        "position epoch 1 batch 3 was epoch 1 batch 4",
        "the random number generators differ",
    ]
    assert one.differences(one) == []


@pytest.mark.parametrize(
    ("value", "stored"), [(1.5, 1.5), (math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")]
)
def test_numbers_that_json_lacks(value: float, stored: Any) -> None:
    assert record.number(value) == stored
    made = msgspec.structs.replace(a_snapshot(DIGEST), metrics={"loss": record.number(value)})
    assert record.decode(record.encode(made), SnapshotRecord).metrics == {"loss": stored}


# -- what could not be read back is not written -----------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"metrics": {"loss": math.nan}},
        {"costs": {"store": math.inf}},
        {"note": "x" * record.MAX_RECORD_BYTES},
        {"step": -1},
        {"writer": 2**62 + 1},
        {"state": "no digest"},
        {"manifests": ()},
        {"parents": ("AB" * 32,)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_snapshots_that_could_not_be_read(changed: dict[str, Any]) -> None:
    with pytest.raises(Unsupported):
        record.encode(msgspec.structs.replace(a_snapshot(DIGEST), **changed))


def test_sealed_records_that_could_not_be_read() -> None:
    head = HeadRecord(DIGEST, 1, 1, "", "", "main", 1)
    assert record.seal(head)
    replace = msgspec.structs.replace
    for one in (replace(head, snapshot=""), replace(head, step=-1), TagRecord("x", "", "", "best", 1)):
        with pytest.raises(Unsupported):
            record.seal(one)
    for one in (head, *SEALED[2:-1]):
        for number in (-1, 0, 2**62 + 1):
            with pytest.raises(Unsupported):
                record.seal(replace(one, number=number))


# -- versions ---------------------------------------------------------------------------------------------


def body_of(one: msgspec.Struct) -> Any:
    return json.loads(record.encode(one))


def sealed_body(body: Any) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return b'{"blake3":"' + chunk.digest(data).encode() + b'","record":' + data + b"}\n"


@pytest.mark.parametrize("one", SEALED, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("number", [4, 1000, 2**100])
def test_a_newer_format_is_unsupported(one: SealedRecord, number: int) -> None:
    """Whatever else is in it."""
    for body in ({**body_of(one), "format": number}, {"format": number}, {"format": number, "at": [7]}):
        with pytest.raises(Unsupported, match=f"format {number}"):
            record.unseal(sealed_body(body), type(one), one.key)


@pytest.mark.parametrize("one", SEALED, ids=lambda one: type(one).__name__)
def test_a_format_there_must_be(one: SealedRecord) -> None:
    body = body_of(one)
    del body["format"]
    for broken in (body, {**body, "format": 0}, {**body, "format": -1}, {**body, "format": "1"}):
        with pytest.raises(Damaged):
            record.unseal(sealed_body(broken), type(one), one.key)


@pytest.mark.parametrize("one", RECORDS, ids=lambda one: type(one).__name__)
def test_unknown_fields_are_ignored(one: msgspec.Struct) -> None:
    written = body_of(one)
    body = {"later": {"deep": [1, None]}, **dict(reversed(written.items())), "format": written["format"]}
    assert record.decode(json.dumps(body).encode(), type(one)) == one
    if one in SEALED:
        sealed = sealed_body(json.dumps(body, indent=2).encode())
        assert record.unseal(sealed, type(one), one.key) == one  # type: ignore[type-var, attr-defined]


def test_unknown_fields_of_steps_are_ignored() -> None:
    assert record.decode_step(b'{"step":1,"epoch":0,"later":[1]}') == StepRecord(1, 0)


def test_a_snapshot_of_several_ranks_is_of_format_3() -> None:
    body = {**body_of(a_snapshot(DIGEST)), "manifests": [DIGEST, DIGEST]}
    for number in (1, 2):
        with pytest.raises(Damaged, match="ranks"):
            record.decode(json.dumps({**body, "format": number}).encode(), SnapshotRecord)
    read = record.decode(json.dumps({**body, "format": 3}).encode(), SnapshotRecord)
    assert read.manifests == (DIGEST, DIGEST)


@pytest.mark.parametrize(
    "changed",
    [{"manifest": ""}, {"state": ""}, {"rank": 2}, {"withdrawn": "out of disk"}, {"ranks": 0}],
)
def test_a_part_record_that_contradicts_itself(changed: dict[str, object]) -> None:
    body = {**body_of(a_part()), **changed}
    with pytest.raises(Damaged):
        record.decode(json.dumps(body).encode(), PartRecord)


# -- hostile bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", SEALED, ids=lambda one: type(one).__name__)
def test_every_flipped_bit_of_a_sealed_record_is_damage(one: SealedRecord) -> None:
    for flipped in bit_flips(record.seal(one)):
        with pytest.raises(Damaged, match="digest"):
            record.unseal(flipped, type(one), one.key)


@pytest.mark.parametrize("one", SEALED, ids=lambda one: type(one).__name__)
def test_a_sealed_record_has_one_form(one: SealedRecord) -> None:
    """Not one byte before, between or behind it, however harmless JSON finds it."""
    data = record.seal(one)
    others = [data + b"\n", data + b" ", b" " + data, data[:-1], data[:-1] + b" ", data[:-2] + b" }\n"]
    others += [data.replace(b":", b": ", 1), data.replace(b",", b", ", 1), data.upper(), data + data]
    others += [data.replace(b'{"blake3"', b'{"x":1,"blake3"'), data.replace(b"}\n", b',"x":1}\n')]
    others += [*truncations(data), *(data[cut:] for cut in range(1, len(data)))]
    for other in others:
        with pytest.raises(Damaged, match="digest"):
            record.unseal(other, type(one), one.key)


def elsewhere() -> list[tuple[SealedRecord, SealedRecord]]:
    """Pairs of records of one kind that differ in nothing but where they belong."""
    replace = msgspec.structs.replace
    _, head, tag, gone, lease, branch_lease, prune, fence, _, relocation, _ = SEALED
    return [
        (head, replace(head, number=2)),
        (head, replace(head, branch="other")),
        (tag, replace(tag, number=2)),
        (tag, replace(tag, name="other")),
        (gone, replace(gone, number=1)),
        (lease, replace(lease, number=2)),
        (lease, replace(lease, number=2**62)),
        (lease, replace(lease, branch="main")),
        (branch_lease, replace(branch_lease, branch="other")),
        (branch_lease, replace(branch_lease, number=3)),
        (prune, replace(prune, number=2)),
        (fence, replace(fence, number=3)),
        (relocation, replace(relocation, number=2)),
    ]


@pytest.mark.parametrize("pair", elsewhere(), ids=lambda pair: pair[1].key)
def test_a_record_counts_only_where_it_belongs(pair: tuple[SealedRecord, SealedRecord]) -> None:
    one, other = pair
    kind = type(one)
    assert record.unseal(record.seal(other), kind, other.key) == other
    for lies, key in ((one, other.key), (other, one.key)):
        with pytest.raises(Damaged, match=r"^a \w+ record is the record of another place\.$"):
            record.unseal(record.seal(lies), kind, key)


@pytest.mark.parametrize(
    "name", ["", "/", "../heads/main", "main/fffffffffffffffe", "x" * 5000, "\0", "Main"]
)
def test_no_name_makes_a_record_belong_elsewhere(name: str) -> None:
    """A name that is none comes out of no key, and a name with a key in it makes no other key."""
    for one in SEALED[1:3]:
        field = "branch" if isinstance(one, HeadRecord) else "name"
        data = record.seal(msgspec.structs.replace(one, **{field: name}))
        with pytest.raises(Damaged, match="another place"):
            record.unseal(data, type(one), one.key)


def test_the_body_begins_where_the_document_says() -> None:
    data = record.seal(SEALED[1])
    assert data[86:-2] == record.encode(SEALED[1])


@pytest.mark.parametrize("one", RECORDS, ids=lambda one: type(one).__name__)
def test_every_flipped_bit_of_a_body_is_refused_or_another_record(one: msgspec.Struct) -> None:
    """A snapshot's name is its digest, so that no flip gets this far: here it must only do no harm."""
    body = record.encode(one)
    assert sum(is_refused(lambda it: record.decode(it, type(one)), bad) for bad in bit_flips(body)) > len(
        body
    )
    assert all(is_refused(lambda it: record.decode(it, type(one)), bad) for bad in truncations(body))


@pytest.mark.parametrize("one", RECORDS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize(
    "wrong", [None, [], {}, "x", -1, 0.5, 2**63, 2**5000, True, "\n" * 65, [["a"]]], ids=range(11)
)
def test_fields_of_wrong_kinds(one: msgspec.Struct, wrong: Any) -> None:
    body = body_of(one)
    for field in body:
        for kind in (type(one), SnapshotRecord, HeadRecord):
            text = json.dumps({**body, field: wrong}).encode()
            is_refused(lambda it, kind=kind: record.decode(it, kind), text)  # type: ignore[misc]


def test_one_kind_is_not_read_as_another() -> None:
    for one in RECORDS:
        for other in {type(two) for two in RECORDS} - {type(one)}:
            with pytest.raises(Damaged):
                record.decode(record.encode(one), other)


@pytest.mark.parametrize("name", ["../../x", "x", "AB" * 32, "ab" * 32 + "\n", "ab" * 31, " "])
def test_a_tag_names_a_snapshot_or_nothing(name: str) -> None:
    body = {**body_of(SEALED[2]), "snapshot": name}
    with pytest.raises(Damaged):
        record.unseal(sealed_body(body), TagRecord, SEALED[2].key)


@pytest.mark.parametrize(
    "kind", [*dict.fromkeys(type(one) for one in RECORDS)], ids=lambda kind: kind.__name__
)
def test_nesting_without_end(kind: type[msgspec.Struct]) -> None:
    for deep in (nested("[", "]"), nested('{"a":', "}", "1"), nested("[", "")):
        for text in (deep, b'{"format":1,"x":' + deep + b"}", b'{"x":' + deep + b',"format":1}'):
            with pytest.raises(Damaged):
                record.decode(text, kind)
            if kind is not SnapshotRecord:
                with pytest.raises(Damaged):
                    record.unseal(sealed_body(text), kind, "")  # type: ignore[type-var]


@pytest.mark.parametrize(
    "text", [b"", b"null", b"[]", b"7", b'"x"', b"{}", b"{", b"\xff", b'{"format":1e400}']
)
def test_no_records(text: bytes) -> None:
    for one in RECORDS:
        with pytest.raises(Damaged):
            record.decode(text, type(one))


def test_a_record_larger_than_may_be() -> None:
    text = b'{"format":1,"x":"' + b"x" * record.MAX_RECORD_BYTES + b'"}'
    for read in (record.decode, lambda data, kind: record.unseal(sealed_body(data), kind, "")):
        with pytest.raises(Damaged, match="larger"):
            read(text, HeadRecord)


# -- step log ---------------------------------------------------------------------------------------------

SEGMENT = record.seal_segment(steps())


def test_every_flipped_bit_of_a_segment_is_damage() -> None:
    for flipped in bit_flips(SEGMENT):
        with pytest.raises(Damaged, match="digest"):
            record.unseal_segment(flipped)


def test_every_truncation_of_a_segment_is_damage() -> None:
    assert all(is_refused(record.unseal_segment, short) for short in truncations(SEGMENT))


def test_a_segment_larger_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MAX_SEGMENT_BYTES", len(SEGMENT) - 1)
    with pytest.raises(Damaged, match="larger"):
        record.unseal_segment(SEGMENT)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"null",
        b"{}",
        b'{"step":1}',
        b'{"step":-1,"epoch":0}',
        b'{"step":1,"epoch":0,"metrics":{"loss":0.5}}',
        b'{"step":1,"epoch":0,"metrics":{"loss":"half"}}',
        b'{"step":1,"epoch":0,"metrics":{"loss":""}}',
        b'{"step":1,"epoch":0,"metrics":{"loss":"0x1p99999"}}',
        b'{"step":1,"epoch":0,"lr":["0x"]}',
        b'{"step":1,"epoch":0,"lr":"0x1p0"}',
        b'{"step":1,"epoch":0}{"step":2,"epoch":0}',
        nested("[", "]"),
        b'{"step":1,"epoch":0,"x":' + nested("[", "]") + b"}",
    ],
    ids=range(14),
)
def test_lines_that_are_no_steps(line: bytes) -> None:
    with pytest.raises(Damaged):
        record.decode_step(line)
    body = line + b"\n"
    with pytest.raises(Damaged):
        record.unseal_segment(b'{"blake3":"' + chunk.digest(body).encode() + b'"}\n' + body)
    with pytest.raises(Damaged):
        read_journal(chunk.digest(line)[:16].encode() + b" " + body)


def test_a_torn_last_line_of_a_journal_is_dropped() -> None:
    """Whatever a kill leaves of the last line; all lines before it count."""
    whole = journal(steps())
    first = journal(steps()[:1])
    for size in range(len(first), len(whole)):
        assert read_journal(whole[:size]) == steps()[:1]
    for size in range(len(first)):
        assert read_journal(whole[:size]) == []


def test_every_flipped_bit_of_a_journal_is_seen() -> None:
    """Those of the last line feed too: a kill leaves a part of a line, not a line with another end."""
    assert all(is_refused(read_journal, flipped) for flipped in bit_flips(journal(steps())))
