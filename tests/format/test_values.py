"""Values: every type comes back as it was, bit for bit, and nothing else comes out of any bytes."""

from __future__ import annotations

import math
import struct
import time
import tracemalloc
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from format_vectors import values_cases
from hostile import bit_flips, is_refused, same_every_time, truncations
from hypothesis import example, given
from hypothesis import strategies as st

from everstep.errors import Damaged, Unsupported
from everstep.format import values
from everstep.format.values import FACTORIES, MAX_DEPTH, MAX_SAME_HASH, Leaf, Scalar, Symbol, varint

HASH_MODULUS = (1 << 61) - 1
"""Numbers that differ by it have the same hash in Python."""


def bits(value: Any) -> Any:
    """`value` as something that is equal only to what is the same in type, order and every bit."""
    kind = type(value)
    if kind is float:
        return kind, struct.pack("<d", value)
    if kind is complex:
        return kind, struct.pack("<dd", value.real, value.imag)
    if kind in (list, tuple):
        return kind, [bits(item) for item in value]
    if kind is deque:
        return kind, value.maxlen, [bits(item) for item in value]
    if kind in (set, frozenset):
        return kind, sorted((bits(item) for item in value), key=repr)
    if kind is defaultdict:
        return kind, value.default_factory, [(bits(key), bits(item)) for key, item in value.items()]
    if kind in (dict, OrderedDict, Counter):
        return kind, [(bits(key), bits(item)) for key, item in value.items()]
    if kind is Symbol:
        return kind, value.kind, bits(value.value)
    return kind, value


floats = st.floats() | st.builds(lambda raw: struct.unpack("<d", raw)[0], st.binary(min_size=8, max_size=8))
texts = st.text(st.characters(exclude_categories=["Cs"]))
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(2**300), max_value=2**300)
    | floats
    | st.builds(complex, floats, floats)
    | texts
    | st.binary()
    | st.builds(Leaf, texts)
    | st.builds(Scalar, st.sampled_from(["<f4", "|b1", "<U3"]), st.binary())
)
hashable = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4).map(tuple)
        | st.frozensets(inner, max_size=4)
        | st.builds(Symbol, texts, inner)
    ),
    max_leaves=6,
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    pairs = st.lists(st.tuples(hashable, inner), max_size=4)
    return (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.sets(hashable, max_size=5)
        | st.frozensets(hashable, max_size=5)
        | pairs.map(dict)
        | pairs.map(OrderedDict)
        | pairs.map(lambda items: Counter(dict(items)))
        | st.builds(defaultdict, st.sampled_from([None, *FACTORIES.values()]), pairs)
        | st.builds(
            lambda items, room: deque(items, None if room is None else len(items) + room),
            st.lists(inner, max_size=5),
            st.none() | st.integers(0, 2**31),
        )
        | st.builds(Symbol, texts, inner)
    )


anything = st.recursive(scalars | hashable, containers, max_leaves=25)


@same_every_time
@given(anything)
@example(struct.unpack("<d", b"\x01\0\0\0\0\0\xf4\xff")[0])
@example([-0.0, 0.0, math.inf, -math.inf, complex(-0.0, math.nan)])
@example({math.nan: 1, "nan": {math.nan, 1.5}})
@example([2**4000, -(2**4000), 2**63, -(2**63), 127, 128, -128, -129])
@example(Counter({"b": 2, "a": -1, "zero": 0}))
@example(deque([deque(maxlen=0)], maxlen=1))
def test_every_value_comes_back(value: Any) -> None:
    encoded = values.encode(value)
    decoded = values.decode(encoded)
    assert bits(decoded) == bits(value)
    assert values.encode(decoded) == encoded


@same_every_time
@given(st.lists(hashable, max_size=12, unique=True))
def test_a_set_encodes_the_same_in_every_order(items: list[Any]) -> None:
    """A set's own order depends on its history and, for text, on the process."""
    forth, back = set(items), set()
    for item in reversed(items):
        back.add(item)
    back.add("one more")
    back.discard("one more")
    if "one more" not in forth:
        assert values.encode(forth) == values.encode(back)


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_a_dict_keeps_its_order(kind: Callable[[Any], Any]) -> None:
    pairs = [("b", 1), ("a", 2), ("c", 3)]
    decoded = values.decode(values.encode(kind(pairs)))
    assert list(decoded.items()) == pairs
    assert values.encode(kind(pairs)) != values.encode(kind(pairs[::-1]))


def test_a_defaultdict_still_has_its_default() -> None:
    for factory in FACTORIES.values():
        decoded = values.decode(values.encode(defaultdict(factory)))
        assert decoded["missing"] == factory()


def test_types_that_look_alike_stay_apart() -> None:
    pairs = [
        (True, 1),
        (1, 1.0),
        (0.0, -0.0),
        ("a", b"a"),
        ([], ()),
        (set(), frozenset()),
        ({}, OrderedDict()),
    ]
    for one, other in pairs:
        assert values.encode(one) != values.encode(other)


class Text(str):
    pass


class Pairs(dict[str, int]):
    pass


@pytest.mark.parametrize(
    "value",
    [
        object(), Text("a"), Pairs(a=1), range(3), bytearray(b"a"), memoryview(b"a"), len, int, ..., iter(()),
        defaultdict(lambda: 0), defaultdict(partial(int)), defaultdict(bytes), "\ud800", {"a": ["\udfff"]},
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_cannot_be_stored_is_refused(value: Any) -> None:
    """Subclasses too: they would come back as something else."""
    for held in (value, [value], {"key": (value,)}, deque([value])):
        with pytest.raises(Unsupported, match="cannot be stored"):
            values.encode(held)


# -- depth, size and time ---------------------------------------------------------------------------------

NESTS: dict[str, Callable[[Any], Any]] = {
    "list": lambda inner: [inner],
    "tuple": lambda inner: (inner,),
    "dict": lambda inner: {"key": inner},
    "frozenset": lambda inner: frozenset({inner}),
    "symbol": lambda inner: Symbol("kind", inner),
    "deque": lambda inner: deque([inner]),
    "limited deque": lambda inner: deque([inner], maxlen=3),
    "default": lambda inner: defaultdict(int, key=inner),
}


@pytest.mark.parametrize("nest", NESTS)
def test_what_can_be_written_can_be_read(nest: str) -> None:
    """At every depth the encoder and the decoder agree on whether it is too deep."""
    value: Any = 0
    written = 0
    for _ in range(MAX_DEPTH + 20):
        try:
            encoded = values.encode(value)
        except Unsupported:
            break
        assert bits(values.decode(encoded)) == bits(value)
        written += 1
        value = NESTS[nest](value)
    assert MAX_DEPTH // 2 <= written <= MAX_DEPTH + 1


def test_a_value_in_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(Unsupported, match="nested deeper"):
        values.encode(loop)


@pytest.mark.parametrize("tag", range(0x10, 0x19))
def test_nesting_without_end_is_damage(tag: int) -> None:
    once = {0x15: bytes([0x15, 0x00, 0x10, 1]), 0x18: b"\x18\x04dict\x01"}.get(tag, bytes([tag, 1]))
    with pytest.raises(Damaged, match="deep"):
        values.decode(once * 100_000)


def test_too_many_values_are_refused_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "MAX_NODES", 1000)  # Of the millions that may be, each takes its time.
    too_many = [None] * values.MAX_NODES
    with pytest.raises(Unsupported, match="too many"):
        values.encode(too_many)
    with pytest.raises(Damaged, match="too many"):
        values.decode(b"\x10" + varint(len(too_many)) + bytes(len(too_many)))
    fits = [None] * (values.MAX_NODES - 1)
    assert values.decode(values.encode(fits)) == fits


def test_large_bytes_are_no_many_values() -> None:
    data = bytes(values.MAX_NODES + 100)
    assert values.decode(values.encode({"blob": data})) == {"blob": data}


def test_more_than_the_bound_is_not_even_looked_at() -> None:
    class Long(bytes):
        def __len__(self) -> int:
            return values.MAX_VALUES_BYTES + 1

    with pytest.raises(Damaged, match="allowed"):
        values.decode(Long(b"\0"))


CLAIMS = [
    (b"\x05", "text"), (b"\x06", "bytes"), (b"\x03", "int"), (b"\x10", "list"), (b"\x11", "tuple"),
    (b"\x12", "dict"), (b"\x13", "set"), (b"\x14", "frozenset"), (b"\x16", "ordered"), (b"\x17", "counter"),
    (b"\x18\x03int", "default"), (b"\x20", "leaf"), (b"\x21", "symbol"), (b"\x22\x03<f4", "scalar"),
    (b"\x15\x00\x10", "deque"),
]  # fmt: skip


@pytest.mark.parametrize("claimed", [2, 200, 1 << 20, 1 << 32, (1 << 62) - 1, (1 << 63) - 1])
@pytest.mark.parametrize("start", [start for start, _ in CLAIMS], ids=[name for _, name in CLAIMS])
def test_claimed_lengths_are_held_against_what_is_there(start: bytes, claimed: int) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(Damaged):
            values.decode(start + varint(claimed) + b"\0")
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("number", [b"\x80" * 9 + b"\x00", b"\xff" * 9 + b"\x01", b"\x80" * 1000, b"\x80"])
def test_numbers_without_end(number: bytes) -> None:
    for start, _ in CLAIMS:
        with pytest.raises(Damaged):
            values.decode(start + number)


def test_numbers_in_a_longer_form_are_taken() -> None:
    assert values.decode(b"\x05\x81\x00a") == "a"
    assert values.decode(b"\x03\x03\x05\x00\x00") == 5
    assert values.decode(b"\x13\x02\x03\x01\x02\x03\x01\x01") == {1, 2}


COLLIDING: dict[str, Callable[[int], Any]] = {
    "int": lambda number: number * HASH_MODULUS,
    "float": lambda number: math.ldexp(1.0, 61 * number - 900),
    "tuple": lambda number: (number * HASH_MODULUS,),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", COLLIDING)
def test_keys_made_to_collide_take_no_time(kind: str) -> None:
    """A dict looks through all keys of one hash: a few megabytes of them would take hours."""
    few = [COLLIDING[kind](number) for number in range(30)]
    assert len({hash(key) for key in few}) == 1
    assert values.decode(values.encode(set(few))) == set(few)
    if kind == "float":
        return  # There are no more of them.
    count = 200_000
    keys = b"".join(values.encode(COLLIDING[kind](number)) for number in range(count))
    begun = time.process_time()
    for tag in (0x13, 0x14):
        with pytest.raises(Damaged, match="hash"):
            values.decode(bytes([tag]) + varint(count) + keys)
    with pytest.raises(Damaged, match="hash"):
        values.decode(b"\x12" + varint(count // 2) + keys)
    assert time.process_time() - begun < 30


def test_keys_that_collide_are_refused_when_written() -> None:
    many = [COLLIDING["int"](number) for number in range(MAX_SAME_HASH + 1)]
    for value in (set(many), frozenset(many), dict.fromkeys(many), Counter(many)):
        with pytest.raises(Unsupported, match="one hash"):
            values.encode(value)
    fits = set(many[:-1])
    assert values.decode(values.encode(fits)) == fits


# -- hostile bytes ----------------------------------------------------------------------------------------

ALL = values.encode(list(values_cases().values()))


@pytest.mark.parametrize("name", values_cases())
def test_every_truncation_is_refused(name: str) -> None:
    for short in truncations(values.encode(values_cases()[name])):
        assert is_refused(values.decode, short)


def test_every_truncation_of_all_together_is_refused() -> None:
    assert all(is_refused(values.decode, short) for short in truncations(ALL))


@pytest.mark.slow
def test_every_flipped_bit_is_refused_or_another_value() -> None:
    """Never anything else. (The values lie in a manifest, whose name is a digest: no flip gets this far.)"""
    refused = 0
    for flipped in bit_flips(ALL):
        if is_refused(values.decode, flipped):
            refused += 1
        else:
            assert values.encode(values.decode(flipped)) != ALL
    assert refused > len(ALL)


@same_every_time
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    is_refused(values.decode, data)


@same_every_time
@given(
    st.lists(st.sampled_from([bytes([tag]) for tag in range(0x24)] + [b"\x01", b"\x02", b"\x7f", b"\x80"]))
)
def test_any_tags(tags: list[bytes]) -> None:
    is_refused(values.decode, b"".join(tags))


@pytest.mark.parametrize("follow", [b"\0", b"\x05\x00", bytes(100)])
def test_nothing_follows(follow: bytes) -> None:
    for value in values_cases().values():
        with pytest.raises(Damaged, match="follow"):
            values.decode(values.encode(value) + follow)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x08", b"\x0f", b"\x19", b"\x1f", b"\x23", b"\xff",
        b"\x05\x01\xff",                                # no UTF-8
        b"\x05\x03\xed\xa0\x80",                        # a lone surrogate
        b"\x13\x02\x02\x02",                            # an item twice
        b"\x13\x02\x02\x03\x01\x01",                    # True and 1 are one item
        b"\x12\x02\x05\x01a\x00\x05\x01a\x00",          # a key twice
        b"\x12\x01\x10\x00\x00",                        # a list as a key
        b"\x13\x01\x12\x00",                            # a dict in a set
        b"\x13\x01\x21\x01k\x10\x00",                   # a symbol that holds a list in a set
        b"\x18\x04eval\x00",                            # a factory that is none
        b"\x15\x00\x11\x00",                            # a deque of a tuple
        b"\x15\x05\x00\x10\x00",                        # a limit that is a text
        b"\x15\x03\x01\xff\x10\x00",                    # a negative limit
        b"\x15\x03\x01\x00\x10\x01\x00",                # more items than the limit
        b"\x15\x02\x10\x00",                            # True as a limit
        b"\x15\x03\x0a" + b"\xff" * 9 + b"\x00\x10\x00",  # a limit larger than memory
        b"\x20\x01\xff", b"\x21\x01\xff\x00", b"\x22\x01\xff\x00",
    ],
    ids=bytes.hex,
)  # fmt: skip
def test_damage(data: bytes) -> None:
    with pytest.raises(Damaged):
        values.decode(data)


def test_buffers_of_all_kinds_are_decoded() -> None:
    for data in (ALL, bytearray(ALL), memoryview(bytearray(ALL))):
        assert values.encode(values.decode(data)) == ALL
