"""A device that is not there: the interface of `torch.cuda` over tensors of the CPU.

What is asked of a stream is put into its queue, and done only when somebody waits for it, in an order that
the test chooses among those that a device may choose: first in, first out within a stream, any order between
streams but for what events and `wait_stream` forbid. Results that are not there yet are poison. So code that
forgets to order two streams, or to wait, reads or writes the wrong bytes, every time.

Which tensors are the device's: those handed to `adopt`, all that share memory with them, and what operations
make of them. Tensors of the host are worked on at once, as ever.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

Order = Literal["computing first", "copies first", "any", "at once"]

POISON = 0xA5
_READS = {"_local_scalar_dense", "equal", "is_nonzero", "allclose"}
_MAKES = {"empty_like", "new_empty", "new_empty_strided"}


class Stuck(AssertionError):
    """Streams wait for each other, or for what nobody asked of them."""


@dataclass(frozen=True)
class Ticket:
    """All that a stream was asked until a moment."""

    stream: FakeStream
    count: int

    def is_done(self) -> bool:
        return self.stream.done >= self.count


class FakeStream:
    def __init__(self, device: FakeDevice, name: str) -> None:
        self.device = device
        self.name = name
        self.queue: deque[Callable[[], None] | Ticket] = deque()
        self.asked = self.done = 0

    def ticket(self) -> Ticket:
        return Ticket(self, self.asked)

    def put(self, item: Callable[[], None] | Ticket) -> None:
        with self.device.lock:
            self.queue.append(item)
            self.asked += 1

    def wait_stream(self, stream: FakeStream) -> None:
        self.put(stream.ticket())

    def wait_event(self, event: FakeEvent) -> None:
        if event.ticket is not None:
            self.put(event.ticket)

    @property
    def can_go_on(self) -> bool:
        if not self.queue:
            return False
        head = self.queue[0]
        return not isinstance(head, Ticket) or head.is_done()

    def go_on(self) -> None:
        head = self.queue.popleft()
        if not isinstance(head, Ticket):
            head()
        self.done += 1


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self.ticket: Ticket | None = None

    def record(self, stream: FakeStream) -> None:
        self.ticket = stream.ticket()

    def synchronize(self) -> None:
        self._device.is_waited_for.set()
        self._device.may_finish.wait()
        if self.ticket is not None:
            self._device.finish(self.ticket)


@dataclass
class Runtime:
    """What is used of the CUDA runtime: the ranges of memory whose pages are locked, by address.

    `blamed`: threads whose next kernel is told of an error that an earlier call has returned already.
    """

    refuses: bool = False

    def __post_init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.blamed: set[int] = set()

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
        if self.refuses:
            self.blamed.add(threading.get_ident())
            return 2
        assert address not in self.locked
        self.locked[address] = size_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0

    def cudaGetErrorString(self, error: int) -> str:
        return f"error {error}"


@dataclass
class _Memory:
    """Memory of the device. `stream` is the one it was taken for, which alone may use it when it is free."""

    storage: torch.UntypedStorage
    stream: FakeStream

    @property
    def is_free(self) -> bool:
        """Whether nobody but the device itself holds on to it."""
        return int(torch._C._storage_Use_Count(self.storage._cdata)) <= 1  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Handle:
    """A tensor as a queued operation remembers it: by address. Like a real device it does not keep the memory
    from being freed."""

    address: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    conjugated: bool
    negated: bool


class FakeDevice:
    """One device; two of them are two.

    Args:
        order: which stream goes on when several may: "any" is a random one, "at once" does everything as soon
            as it is asked and may be done.

    Attributes:
        computing: the stream that everything is asked of where nothing else is said.
        may_finish: cleared, whoever waits for an event waits until it is set.
        is_waited_for: set when somebody began to wait for an event.
        asked_copies, done_copies: how many copies to the host were asked for and done.
        room_bytes: the device has no room for anything larger.
        misused: memory that an operation found free although it was taken for another stream.
    """

    def __init__(self, order: Order = "any", seed: int = 0) -> None:
        self.lock = threading.RLock()
        self.computing = FakeStream(self, "computing")
        self.streams = [self.computing]
        self.may_finish = threading.Event()
        self.may_finish.set()
        self.is_waited_for = threading.Event()
        self.room_bytes = 1 << 40
        self.runtime = Runtime()
        self.asked_copies = self.done_copies = 0
        self.misused: list[int] = []
        self._order = order
        self._random = random.Random(seed)
        self._memory: dict[int, _Memory] = {}
        self._current = threading.local()

    # -- what torch.cuda has ------------------------------------------------------------------------------

    def Stream(self, device: torch.device) -> FakeStream:
        stream = FakeStream(self, f"side {len(self.streams)}")
        self.streams.append(stream)
        return stream

    def Event(self, *, blocking: bool = False) -> FakeEvent:
        return FakeEvent(self)

    def current_stream(self, device: torch.device) -> FakeStream:
        return getattr(self._current, "stream", self.computing)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before = getattr(self._current, "stream", None)
        self._current.stream = stream
        try:
            with _Asking(self):
                yield
        finally:
            if before is None:
                del self._current.stream
            else:
                self._current.stream = before

    def cudart(self) -> Runtime:
        return self.runtime

    # -- what tests need ----------------------------------------------------------------------------------

    def here(self) -> Any:
        """Within it, operations on the device's tensors are asked of it instead of done."""
        return self.stream(self.computing)

    def adopt(self, *tensors: torch.Tensor) -> None:
        """From now on these are the device's."""
        for tensor in tensors:
            self._own(tensor, self.computing)

    def adopt_module(self, module: torch.nn.Module) -> None:
        self.adopt(*module.parameters(), *module.buffers())

    def owns(self, tensor: torch.Tensor) -> bool:
        return bool(tensor.numel()) and tensor.untyped_storage().data_ptr() in self._memory

    def accelerator_of(self, tensor: torch.Tensor) -> FakeDevice | None:
        return self if self.owns(tensor) else None

    def finish(self, ticket: Ticket) -> None:
        """Do at least what a ticket stands for."""
        # Whatever thread waits does the work, and the number of threads in it may decide about the bits.
        torch.set_num_threads(1)
        with self.lock:
            while not ticket.is_done():
                self._one_more()

    def drain(self) -> None:
        """Do all that was asked."""
        for stream in self.streams:
            self.finish(stream.ticket())

    # -- operations ---------------------------------------------------------------------------------------

    def ask(self, operation: Callable[[], None]) -> Ticket:
        if threading.get_ident() in self.runtime.blamed:
            self.runtime.blamed.discard(threading.get_ident())
            raise RuntimeError("an earlier call has failed")
        stream = self.current_stream(torch.device("cpu"))
        stream.put(operation)
        if self._order == "at once":
            with self.lock:
                while any(one.can_go_on for one in self.streams):
                    self._one_more()
        elif self._order == "any":
            with self.lock:
                while self._random.random() < 0.3 and any(one.can_go_on for one in self.streams):
                    self._one_more()
        return stream.ticket()

    def _one_more(self) -> None:
        able = [stream for stream in self.streams if stream.can_go_on]
        if not able:
            raise Stuck({stream.name: len(stream.queue) for stream in self.streams})
        if self._order in ("any", "at once"):
            chosen = self._random.choice(able)
        else:
            first = self._order == "computing first"
            chosen = min(able, key=lambda stream: (stream is self.computing) != first)
        with _disable_current_modes():
            chosen.go_on()

    def _own(self, tensor: torch.Tensor, stream: FakeStream) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            self._memory[storage.data_ptr()] = _Memory(storage, stream)

    def handle(self, value: object) -> object:
        if not isinstance(value, torch.Tensor) or not self.owns(value):
            return value
        return _Handle(
            value.untyped_storage().data_ptr(),
            value.shape,
            value.stride(),
            value.storage_offset(),
            value.dtype,
            value.is_conj(),
            value.is_neg(),
        )

    def tensor(self, handle: object, stream: FakeStream) -> object:
        """What an operation of a stream finds where a handle points to."""
        if not isinstance(handle, _Handle):
            return handle
        memory = self._memory[handle.address]
        if memory.is_free and memory.stream is not stream:
            self.misused.append(handle.address)
        found = torch.empty(0, dtype=handle.dtype)
        found.set_(memory.storage, handle.offset, handle.size, handle.stride)  # type: ignore[call-overload]
        torch._C._set_conj(found, handle.conjugated)
        torch._C._set_neg(found, handle.negated)
        return found

    def dispatch(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if getattr(self._current, "inside", False):
            return function(*args, **kwargs)  # Part of an operation that came through an inner `stream`.
        self._current.inside = True
        try:
            return self._dispatch(function, args, kwargs)
        finally:
            self._current.inside = False

    def _dispatch(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        tensors: list[torch.Tensor] = []
        tree_map(lambda one: tensors.append(one) if isinstance(one, torch.Tensor) else None, (args, kwargs))
        own = [self.owns(one) for one in tensors]
        if not any(own) or function.is_view:
            return function(*args, **kwargs)
        stream = self.current_stream(torch.device("cpu"))
        name = function._schema.name.split("::")[1]
        if name in _READS:
            self.finish(stream.ticket())
            return function(*args, **kwargs)
        if not function._schema.is_mutable:
            return self._ask_for_new(function, args, kwargs, stream, made=name in _MAKES)
        to_host = not self._owns_target(args, kwargs)
        handles = tree_map(self.handle, (args, kwargs))

        def operate() -> None:
            real_args, real_kwargs = tree_map(lambda one: self.tensor(one, stream), handles)
            function(*real_args, **real_kwargs)
            self.done_copies += to_host

        waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if to_host and not waits and any(one.is_conj() or one.is_neg() for one in tensors):
            raise AssertionError("torch would conjugate or negate it on the host, before it has come")
        self.asked_copies += to_host
        ticket = self.ask(operate)
        if to_host and waits:
            self.finish(ticket)
        if "out" in kwargs:
            return kwargs["out"]
        return args[0] if function._schema.returns else None

    def _owns_target(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        target = kwargs.get("out", args[0])
        return self.owns(target[0] if isinstance(target, list | tuple) else target)

    def _ask_for_new(
        self, function: Any, args: Sequence[Any], kwargs: dict[str, Any], stream: FakeStream, made: bool
    ) -> Any:
        """The results have their memory at once, and what is in it later."""
        # Some write to their arguments though they do not say so (batch norm): to copies, this time.
        copies = tree_map(lambda one: one.clone() if isinstance(one, torch.Tensor) else one, (args, kwargs))
        results = function(*copies[0], **copies[1])
        for result in results if isinstance(results, list | tuple) else [results]:
            if result.nbytes > self.room_bytes:
                raise torch.OutOfMemoryError("the fake device is full")
            result.untyped_storage().fill_(POISON)
            self._own(result, stream)
        if made:
            return results
        handles = tree_map(self.handle, (args, kwargs))
        targets = tree_map(self.handle, results)

        def operate() -> None:
            real_args, real_kwargs = tree_map(lambda one: self.tensor(one, stream), handles)
            tree_map(
                lambda target, value: self.tensor(target, stream).copy_(value),  # type: ignore[attr-defined]
                targets,
                function(*real_args, **real_kwargs),
            )

        self.ask(operate)
        return results


class _Asking(TorchDispatchMode):
    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._device.dispatch(func, args, kwargs or {})
