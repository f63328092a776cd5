"""Metrics of a step as the bits of floats, without making an accelerator wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from everstep.errors import Mismatch


class Reading:
    """One metric on its way to a float: `ready` does not block, `value` does."""

    def __init__(self, name: str, value: Any) -> None:
        self._value: float | None = None
        self._ready: Callable[[], bool] = lambda: True
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            self._read_tensor(value.detach())
        elif isinstance(value, (bool, int, float)) or hasattr(value, "__float__"):
            self._value = float(value)
        else:
            raise Mismatch(
                f"the metric {name!r} is a {type(value).__name__}, not a number",
                kept="the run goes on",
                next=f"run.log({name}=float(...))",
            )

    def _read_tensor(self, value: torch.Tensor) -> None:
        if value.device.type != "cuda":
            self._value = float(value)
            return
        # A copy on the stream that made the value, into page-locked memory: the host does not wait for it.
        self._host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        self._host.copy_(value, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._ready = event.query
        self._wait = event.synchronize

    def ready(self) -> bool:
        return self._value is not None or self._ready()

    def value(self) -> float:
        if self._value is None:
            self._wait()
            self._value = float(self._host)
        return self._value
