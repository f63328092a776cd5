"""Reading pickles of other programs without running anything of them.

A pickle is a program that builds objects, and one that calls whatever it likes. Here its instructions build
plain values, and of everything else only a note of what was asked for: `Made`, which is never called. What a
note means, if anything, is for whoever reads it. Sizes are held against what is there before they are
believed, and neither deep nesting nor shared parts cost more than they take in the file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from everstep.errors import Damaged, Unsupported
from everstep.format.chunk import Buffer

MAX_PICKLE_BYTES = 256 * 1024 * 1024
MAX_OBJECTS = 16_000_000
"""Each takes some hundred bytes at most when it is read."""

_MAX_TUPLE_KEYS = 10_000
"""Tuples of the same hash are easily made, and a dict of a million of them would be busy for hours. Texts of
one hash cannot be made, and integers below the bound have none in common."""

_INT_BOUND = (1 << 61) - 1


@dataclass(frozen=True)
class Global:
    """Something of a module, by its name: `torch.float32`. It was not looked up."""

    name: str


@dataclass(eq=False, slots=True)
class Made:
    """An object that a pickle wants to have made: what it wants to be called for that, and with what.
    `state`, `items` and `pairs` are what it then wants to give to the object."""

    name: str
    args: Any
    state: Any = None
    items: list[Any] | None = None
    pairs: dict[Any, Any] | None = None


Allows = Callable[[str, str], bool]
"""Whether something of a module, by module and name, may be named in a pickle at all."""

PERSISTENT = "persistent"
"""The name of what a pickle takes from outside of itself; `args` say what."""

_MARK = object()


def read(data: Buffer, what: str, allows: Allows) -> tuple[Any, int]:
    """What the pickle at the beginning of `data` stands for, and where it ends.

    Args:
        what: names it in errors.

    Raises:
        Unsupported: it names something that is not allowed (the message says what), or it is larger than the
            bounds. Nothing of it was run.
        Damaged: it is no pickle of a protocol from 2 to 5.
    """
    reader = _Reader(memoryview(data), what, allows)
    try:
        return reader.run(), reader.at
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise Damaged(f"{what} is no pickle that can be read: {error}") from error


class _Reader:
    def __init__(self, data: memoryview, what: str, allows: Allows) -> None:
        self.data = data
        self.what = what
        self.allows = allows
        self.at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.objects = 0
        self.tuple_keys = 0
        self.globals: dict[tuple[str, str], Global] = {}

    def run(self) -> Any:
        if bytes(self.data[:1]) != b"\x80":
            self.damaged("it begins otherwise than a pickle of protocol 2 or newer")
        table, data = _OPERATIONS, self.data
        while True:
            code = data[self.at]
            self.at += 1
            self.objects += 1
            if self.objects > MAX_OBJECTS or self.at > MAX_PICKLE_BYTES:
                raise Unsupported(
                    f"{self.what} holds more than {MAX_OBJECTS:,} objects or {MAX_PICKLE_BYTES:,} bytes",
                    kept="nothing was imported",
                )
            if code == 0x2E:  # STOP
                return self.pop()
            operation = table.get(code)
            if operation is None:
                self.damaged(f"instruction {code:#04x} is none that torch writes")
            operation(self)

    def damaged(self, why: str) -> NoReturn:
        raise Damaged(f"{self.what} is no pickle that can be read: {why}", kept="nothing was imported")

    # -- bytes --------------------------------------------------------------------------------------------

    def take(self, size: int) -> memoryview:
        if size < 0 or size > len(self.data) - self.at:
            self.damaged("it ends too early")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> int:
        return int(struct.unpack(code, self.take(struct.calcsize(code)))[0])

    def line(self) -> str:
        end = self.at
        while self.data[end] != 0x0A:
            end += 1
            if end - self.at > 4096:
                self.damaged("a name does not end")
        text = str(self.data[self.at : end], "utf-8")
        self.at = end + 1
        return text

    # -- the stack ----------------------------------------------------------------------------------------

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            self.damaged("a mark is where a value must be")
        return value

    def top(self) -> Any:
        return self.stack[-1]

    def to_mark(self) -> list[Any]:
        """What lies above the last mark; both go."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                self.damaged("a mark is missing")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    # -- what is made -------------------------------------------------------------------------------------

    def named(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            self.damaged("a name is no text")
        if (module, name) not in self.globals:
            if not self.allows(module, name):
                raise Unsupported(
                    f"{self.what} asks for {module}.{name}, of which no state is made; it was not run",
                    kept="nothing was imported",
                    next="save the state anew as tensors and plain values, if you trust where it is from",
                )
            self.globals[module, name] = Global(f"{module}.{name}")
        self.push(self.globals[module, name])

    def make(self, args: object, of: object) -> None:
        if type(of) is not Global or type(args) is not tuple:
            self.damaged("it calls what is none of a module's things")
        self.push(Made(of.name, args))

    def build(self) -> None:
        state = self.pop()
        made = self.top()
        if type(made) is not Made or made.state is not None:
            self.damaged("it gives a state to what takes none")
        made.state = state

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is Made:
            target.items = target.items if target.items is not None else []
            target.items += items
        elif type(target) is list:
            target += items
        else:
            self.damaged("it appends to what is no list")

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is Made:
            target.pairs = pairs = target.pairs if target.pairs is not None else {}
        elif type(target) is dict:
            pairs = target
        else:
            self.damaged("it sets items of what is no dict")
        if len(items) % 2:
            self.damaged("a key lacks its value")
        for number in range(0, len(items), 2):
            pairs[self.key(items[number])] = items[number + 1]

    def add_items(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not set:
            self.damaged("it adds to what is no set")
        target.update(map(self.key, items))

    def key(self, key: Any, depth: int = 0) -> Any:
        """Something that may be a key of a dict."""
        kind = type(key)
        if kind is tuple:
            self.tuple_keys += 1
            if self.tuple_keys > _MAX_TUPLE_KEYS or depth > 4:
                raise Unsupported(f"{self.what} holds more than {_MAX_TUPLE_KEYS:,} tuples as keys")
            for one in key:
                self.key(one, depth + 1)
        elif kind is int:
            if not -_INT_BOUND < key < _INT_BOUND:
                raise Unsupported(f"{self.what} holds an integer of more than 60 bits as a key")
        elif kind not in (str, bytes, bool, float, type(None), Made, Global):
            self.damaged(f"a {kind.__name__} is a key")
        return key

    def text(self, size: int) -> None:
        self.push(str(self.take(size), "utf-8", "surrogatepass"))

    def old_text(self, size: int) -> None:
        data = bytes(self.take(size))
        try:
            self.push(data.decode())
        except UnicodeDecodeError:
            self.push(data)

    def put(self, number: int) -> None:
        self.memo[number] = self.top()

    def tuple_of(self, count: int) -> None:
        if count > len(self.stack) or any(one is _MARK for one in self.stack[len(self.stack) - count :]):
            self.damaged("a tuple lacks items")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.push(items)

    def make_with_names(self) -> None:
        names, args, of = self.pop(), self.pop(), self.pop()
        self.make((*args, names) if names else args, of)

    def duplicate(self) -> None:
        self.push(self.top())

    def discard(self) -> None:
        self.stack.pop()

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.named(module, name)

    def reduce(self) -> None:
        args, of = self.pop(), self.pop()
        self.make(args, of)

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def frozen(self) -> None:
        self.push(frozenset(map(self.key, self.to_mark())))

    def float(self) -> None:
        self.push(struct.unpack(">d", self.take(8))[0])

    def append_one(self) -> None:
        self.append([self.pop()])


_OPERATIONS: dict[int, Callable[[_Reader], object]] = {
    0x80: lambda r: r.take(1),  # PROTO
    0x95: lambda r: r.take(8),  # FRAME
    0x28: lambda r: r.push(_MARK),
    0x30: _Reader.discard,
    0x31: lambda r: r.to_mark(),
    0x32: _Reader.duplicate,
    0x4E: lambda r: r.push(None),
    0x88: lambda r: r.push(True),
    0x89: lambda r: r.push(False),
    0x4A: lambda r: r.push(r.number("<i")),
    0x4B: lambda r: r.push(r.number("<B")),
    0x4D: lambda r: r.push(r.number("<H")),
    0x8A: lambda r: r.push(int.from_bytes(r.take(r.number("<B")), "little", signed=True)),
    0x8B: lambda r: r.push(int.from_bytes(r.take(r.number("<i")), "little", signed=True)),
    0x47: _Reader.float,
    0x54: lambda r: r.old_text(r.number("<i")),
    0x55: lambda r: r.old_text(r.number("<B")),
    0x58: lambda r: r.text(r.number("<I")),
    0x8C: lambda r: r.text(r.number("<B")),
    0x8D: lambda r: r.text(r.number("<Q")),
    0x42: lambda r: r.push(bytes(r.take(r.number("<I")))),
    0x43: lambda r: r.push(bytes(r.take(r.number("<B")))),
    0x8E: lambda r: r.push(bytes(r.take(r.number("<Q")))),
    0x96: lambda r: r.push(bytes(r.take(r.number("<Q")))),
    0x5D: lambda r: r.push([]),
    0x29: lambda r: r.push(()),
    0x7D: lambda r: r.push({}),
    0x8F: lambda r: r.push(set()),
    0x61: _Reader.append_one,
    0x65: lambda r: r.append(r.to_mark()),
    0x73: _Reader.set_item,
    0x75: lambda r: r.set_items(r.to_mark()),
    0x90: lambda r: r.add_items(r.to_mark()),
    0x91: _Reader.frozen,
    0x74: lambda r: r.push(tuple(r.to_mark())),
    0x85: lambda r: r.tuple_of(1),
    0x86: lambda r: r.tuple_of(2),
    0x87: lambda r: r.tuple_of(3),
    0x63: lambda r: r.named(r.line(), r.line()),
    0x93: _Reader.stack_global,
    0x52: _Reader.reduce,
    0x81: _Reader.reduce,  # NEWOBJ
    0x92: _Reader.make_with_names,
    0x62: _Reader.build,
    0x51: lambda r: r.push(Made(PERSISTENT, r.pop())),
    0x68: lambda r: r.push(r.memo[r.number("<B")]),
    0x6A: lambda r: r.push(r.memo[r.number("<I")]),
    0x71: lambda r: r.put(r.number("<B")),
    0x72: lambda r: r.put(r.number("<I")),
    0x94: lambda r: r.put(len(r.memo)),
}
