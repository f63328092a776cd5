"""What is used of a device that copies by itself: its streams, its events, and memory it can reach."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias

import torch


class Stream(Protocol):
    """Work of a device, done one after the other, beside that of its other streams."""

    def wait_stream(self, stream: Any) -> None:
        """What is asked from now on comes after all that `stream` was asked until now. Does not block."""

    def wait_event(self, event: Any) -> None:
        """What is asked from now on comes after what `event` marks. Does not block."""


class Event(Protocol):
    def record(self, stream: Any) -> None:
        """Mark all that `stream` was asked until now."""

    def synchronize(self) -> None:
        """Block until what it marks is done. Other threads run meanwhile."""


_Stream: TypeAlias = Stream
_Event: TypeAlias = Event


class Accelerator(Protocol):
    """A device's module of torch, such as `torch.cuda`; its names are torch's."""

    def Stream(self, device: Any) -> _Stream: ...

    def Event(self, *, blocking: bool) -> _Event: ...

    def stream(self, stream: Any) -> AbstractContextManager[Any]: ...

    def current_stream(self, device: Any) -> _Stream: ...

    def cudart(self) -> Any: ...


AcceleratorOf: TypeAlias = Callable[[torch.Tensor], "Accelerator | None"]


def accelerator_of(tensor: torch.Tensor) -> Accelerator | None:
    """What copies a tensor without the host; None for the host itself, and for devices whose copies the host
    waits for. ROCm goes by the name of CUDA too."""
    return torch.cuda if tensor.device.type == "cuda" else None


class PageLock:
    """Memory of the host that stays where it is as long as this lives. Only to such memory a device copies by
    itself and at its full speed; to other memory it takes a detour, and the thread that asks waits.

    Making one blocks, for a few tenths of a second a gigabyte, in which other threads run.

    Attributes:
        memory: what was locked; it stays mapped meanwhile.
        error: why it could not be, "" if it could.
    """

    _PORTABLE = 1  # For all devices, not only the one that is current.

    def __init__(self, memory: memoryview, accelerator: Accelerator) -> None:
        self.memory = memory
        self._whole = torch.frombuffer(memory, dtype=torch.uint8)
        self.error = ""
        try:
            runtime = accelerator.cudart()
            result = runtime.cudaHostRegister(self._whole.data_ptr(), len(memory), self._PORTABLE)
            if int(result):
                self.error = str(runtime.cudaGetErrorString(result))
        except (AttributeError, RuntimeError) as error:
            self.error = str(error)
            return
        if not self.error:
            # Not when the program ends: the system takes all back, and the device may be gone already.
            weakref.finalize(self, _unlock, runtime, self._whole.data_ptr(), os.getpid()).atexit = False


def _unlock(runtime: Any, address: int, owner: int) -> None:
    # A forked child has neither the memory nor the device.
    if os.getpid() == owner:
        with contextlib.suppress(RuntimeError):
            runtime.cudaHostUnregister(address)


def forget_error(like: torch.Tensor) -> None:
    """The runtime keeps the error of a call that failed and blames the thread's next kernel for it: let that
    be one that nobody needs. `like` is a tensor of the device."""
    with contextlib.suppress(RuntimeError):
        like.new_empty(2, dtype=torch.uint8).fill_(1)
