"""Typed plain values, without pickle (FORMAT.md, "Values").

A value is None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, deque, dict (and its
OrderedDict, Counter and defaultdict), a numpy scalar, a `Leaf` (where a tensor or array stands) or a
`Symbol` (a named thing of another package, such as a torch dtype). Decoding makes nothing else, and so
cannot run code. Encoding is deterministic: equal values in equal order give equal bytes.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from everstep.errors import Damaged, Unsupported
from everstep.format.chunk import Buffer

Value: TypeAlias = Any

MAX_DEPTH = 100
MAX_NODES = 4_000_000
MAX_VALUES_BYTES = 256 * 1024 * 1024
MAX_VARINT_BYTES = 9
MAX_SAME_HASH = 64
"""So many keys of a mapping, or items of a set, may have one hash. Numbers and tuples of the same hash are
easily made, and a million of them would keep a dict busy for hours."""

FACTORIES: dict[str, Callable[[], Any]] = {
    "list": list, "dict": dict, "set": set, "int": int, "float": float, "str": str
}  # fmt: skip

_NONE, _FALSE, _TRUE, _INT, _FLOAT, _STR, _BYTES, _COMPLEX = range(0x08)
_LIST, _TUPLE, _DICT, _SET, _FROZENSET, _DEQUE, _ORDERED, _COUNTER, _DEFAULT = range(0x10, 0x19)
_LEAF, _SYMBOL, _NUMPY = range(0x20, 0x23)


@dataclass(frozen=True)
class Leaf:
    """Stands in the tree where a tensor or array belongs; `name` is the leaf's name."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A named thing that this format does not know itself, such as ("torch.dtype", "float32")."""

    kind: str
    value: Value


@dataclass(frozen=True)
class Scalar:
    """A numpy scalar: its dtype in numpy's own notation, and its little-endian bytes."""

    dtype: str
    data: bytes


def encode(value: Value) -> bytes:
    """The bytes of `value`.

    Raises:
        Unsupported: something in it is none of the types above, and the message names the type; or it is
            more than `decode` takes.
    """
    out = bytearray()
    _put(out, value, 0)
    if len(out) > MAX_NODES:
        # A node takes a byte or more: only here can there be too many. What could not be read back must
        # not be written.
        try:
            decode(out)
        except Damaged as error:
            raise Unsupported(f"these values cannot be stored: {error.problem}") from error
    return bytes(out)


def decode(data: Buffer) -> Value:
    """The value that `data` encodes, all of it.

    Raises:
        Damaged: `data` is not an encoding. A few times its own size and less than 256 bytes for each of
            `MAX_NODES` are the most memory that is taken, whatever it claims.
    """
    if len(data) > MAX_VALUES_BYTES:
        raise Damaged(f"the values take {len(data)} bytes, more than the {MAX_VALUES_BYTES} allowed")
    reader = _Reader(memoryview(data))
    value = reader.value(0)
    if reader.at != len(data):
        raise Damaged(f"{len(data) - reader.at} bytes follow the values")
    return value


_SHORT = [bytes([number]) for number in range(0x80)]


def varint(number: int) -> bytes:
    """`number` >= 0 in LEB128: seven bits a byte, the low ones first."""
    if number < 0x80:
        return _SHORT[number]
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _put(out: bytearray, value: Value, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise Unsupported(f"values nested deeper than {MAX_DEPTH} cannot be stored")
    kind = type(value)
    scalar = _SCALARS.get(kind)
    if scalar is not None:
        scalar(out, value)
    elif kind in _SEQUENCES:
        _put_items(out, _SEQUENCES[kind], value, depth)
    elif kind is set or kind is frozenset:
        _put_set(out, _SET if kind is set else _FROZENSET, value, depth)
    elif kind in _MAPPINGS:
        out.append(_MAPPINGS[kind])
        _put_pairs(out, value, depth)
    elif kind is defaultdict:
        factory = getattr(value.default_factory, "__name__", "")
        if FACTORIES.get(factory) is not value.default_factory:
            raise Unsupported(f"a defaultdict of {value.default_factory!r} cannot be stored")
        out.append(_DEFAULT)
        _put_text(out, factory)
        _put_pairs(out, value, depth)
    elif kind is deque:
        out.append(_DEQUE)
        _put(out, value.maxlen, depth + 1)
        _put_items(out, _LIST, value, depth + 1)
    elif kind is Leaf:
        out.append(_LEAF)
        _put_text(out, value.name)
    elif kind is Symbol:
        out.append(_SYMBOL)
        _put_text(out, value.kind)
        _put(out, value.value, depth + 1)
    elif kind is Scalar:
        out.append(_NUMPY)
        _put_text(out, value.dtype)
        out += varint(len(value.data)) + value.data
    else:
        raise Unsupported(f"a value of type {kind.__module__}.{kind.__qualname__} cannot be stored")


def _put_text(out: bytearray, text: str) -> None:
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise Unsupported(f"the text {text!r} is not valid Unicode and cannot be stored") from error
    out += varint(len(data)) + data


def _put_items(out: bytearray, tag: int, items: Any, depth: int) -> None:
    out.append(tag)
    out += varint(len(items))
    for item in items:
        _put(out, item, depth + 1)


def _put_set(out: bytearray, tag: int, items: Iterable[Value], depth: int) -> None:
    """A set has no order of its own: the order of the items' encodings makes it deterministic."""
    encoded = []
    for item in items:
        one = bytearray()
        _put(one, item, depth + 1)
        encoded.append(bytes(one))
    _refuse_colliding(items)
    out.append(tag)
    out += varint(len(encoded)) + b"".join(sorted(encoded))


def _refuse_colliding(keys: Iterable[Value]) -> None:
    if _collide(keys):
        raise Unsupported(f"a dict or set with more than {MAX_SAME_HASH} keys of one hash cannot be stored")


def _collide(keys: Iterable[Value]) -> bool:
    return max(Counter(map(hash, keys)).values(), default=0) > MAX_SAME_HASH


def _put_pairs(out: bytearray, mapping: Any, depth: int) -> None:
    _refuse_colliding(mapping)
    out += varint(len(mapping))
    for key, value in mapping.items():
        _put(out, key, depth + 1)
        _put(out, value, depth + 1)


def _put_int(out: bytearray, value: int) -> None:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    out.append(_INT)
    out += varint(len(data)) + data


def _put_str(out: bytearray, value: str) -> None:
    out.append(_STR)
    _put_text(out, value)


_SCALARS: dict[type, Callable[[bytearray, Any], None]] = {
    type(None): lambda out, value: out.append(_NONE),
    bool: lambda out, value: out.append(_TRUE if value else _FALSE),
    int: _put_int,
    float: lambda out, value: out.extend(struct.pack("<Bd", _FLOAT, value)),
    complex: lambda out, value: out.extend(struct.pack("<Bdd", _COMPLEX, value.real, value.imag)),
    str: _put_str,
    bytes: lambda out, value: out.extend(bytes([_BYTES]) + varint(len(value)) + value),
}
_SEQUENCES: dict[type, int] = {list: _LIST, tuple: _TUPLE}
_MAPPINGS: dict[type, int] = {dict: _DICT, OrderedDict: _ORDERED, Counter: _COUNTER}


class _Reader:
    """Reads one value; every length is held against what is left before it is believed."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0
        self.nodes = 0

    def value(self, depth: int) -> Value:
        self.nodes += 1
        if depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise Damaged("the values are nested too deeply or too many")
        tag = self.take(1)[0]
        if tag <= _COMPLEX:
            return self.scalar(tag)
        if tag in (_LIST, _TUPLE, _SET, _FROZENSET):
            return self.sequence(tag, depth)
        if tag in (_DICT, _ORDERED, _COUNTER, _DEFAULT):
            return self.mapping(tag, depth)
        if tag == _DEQUE:
            maxlen, items = self.value(depth + 1), self.value(depth + 1)
            if type(items) is not list or not (
                maxlen is None or (type(maxlen) is int and maxlen >= len(items))
            ):
                raise Damaged("a deque is not a limit and a list within it")
            return _built(lambda: deque(items, maxlen))
        if tag == _LEAF:
            return Leaf(self.text())
        if tag == _SYMBOL:
            return Symbol(self.text(), self.value(depth + 1))
        if tag == _NUMPY:
            return Scalar(self.text(), bytes(self.take(self.number())))
        raise Damaged(f"the values hold an unknown tag {tag:#04x}")

    def scalar(self, tag: int) -> Value:
        if tag <= _TRUE:
            return (None, False, True)[tag]
        if tag == _INT:
            return int.from_bytes(self.take(self.number()), "little", signed=True)
        if tag == _FLOAT:
            return struct.unpack("<d", self.take(8))[0]
        if tag == _COMPLEX:
            return complex(*struct.unpack("<dd", self.take(16)))
        return self.text() if tag == _STR else bytes(self.take(self.number()))

    def sequence(self, tag: int, depth: int) -> Value:
        items = [self.value(depth + 1) for _ in range(self.count(1))]
        if tag == _LIST:
            return items
        if tag == _TUPLE:
            return tuple(items)
        _check_hashes(items)
        made = _built(lambda: set(items) if tag == _SET else frozenset(items))
        if len(made) != len(items):
            raise Damaged("a set holds an item twice")
        return made

    def mapping(self, tag: int, depth: int) -> Value:
        made: Any
        if tag == _DEFAULT:
            factory = self.text()
            if factory and factory not in FACTORIES:
                raise Damaged(f"a defaultdict of {factory[:40]!r}")
            made = defaultdict(FACTORIES.get(factory))
        else:
            made = {_DICT: dict, _ORDERED: OrderedDict, _COUNTER: Counter}[tag]()
        pairs = [(self.value(depth + 1), self.value(depth + 1)) for _ in range(self.count(2))]
        _check_hashes([key for key, _ in pairs])
        for key, value in pairs:
            made[key] = value
        if len(made) != len(pairs):
            raise Damaged("a dict holds a key twice")
        return made

    def text(self) -> str:
        try:
            return str(self.take(self.number()), "utf-8")
        except UnicodeDecodeError as error:
            raise Damaged("a text in the values is not UTF-8") from error

    def count(self, least_bytes: int) -> int:
        """A number of items that each take at least so many bytes."""
        count = self.number()
        if count * least_bytes > len(self.data) - self.at:
            raise Damaged(f"the values claim {count} items in {len(self.data) - self.at} bytes")
        return count

    def number(self) -> int:
        result = shift = 0
        while shift < 7 * MAX_VARINT_BYTES:
            byte = self.take(1)[0]
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                return result
            shift += 7
        raise Damaged(f"a number in the values is longer than {MAX_VARINT_BYTES} bytes")

    def take(self, size_bytes: int) -> memoryview:
        if size_bytes > len(self.data) - self.at:
            raise Damaged("the values end too early")
        self.at += size_bytes
        return self.data[self.at - size_bytes : self.at]


def _check_hashes(keys: list[Value]) -> None:
    if _built(lambda: _collide(keys)):
        raise Damaged(f"the values hold a dict or set with more than {MAX_SAME_HASH} keys of one hash")


def _built(make: Callable[[], Any]) -> Any:
    """What `make` makes; a key or item that has no hash is damage, not our bug."""
    try:
        return make()
    except (TypeError, OverflowError) as error:
        raise Damaged(f"the values hold a key or size that cannot be: {error}") from error
