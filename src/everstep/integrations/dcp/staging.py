"""A stager whose buffers are never those of a save that is under way."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import torch
from torch.distributed.checkpoint.staging import AsyncStager

from everstep.errors import Conflict, Unsupported

SETS = 2
"""So many saves may be under way at a time; for each there is a copy of the state in memory."""

PATIENCE_S = 1800.0


class Stager(AsyncStager):
    """Copies a state for `dcp.async_save`, so that no snapshot is ever torn.

        stager = everstep.dcp.Stager()
        dcp.async_save(state_dict, storage_writer=..., async_stager=stager)

    The copy is complete when `async_save` returns: the state may change from then on. Its memory is used
    again by later saves, page-locked where there is a CUDA device, but not while a save still reads it: a
    second save gets memory of its own, and a third waits until one of them has ended. So it needs the memory
    of one copy of the state, or of two where saves overlap.

    Keep one for the run, and `close` it when that ends. Needs torch 2.9 or newer.

    Args:
        patience_s: how long a third save waits, in seconds.

    Raises (`stage`):
        Conflict: two saves have not ended for so long; nothing was copied.
    """

    _synchronize_after_execute = False

    def __init__(self, *, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._sets: list[_Set] = []
        self._freed = threading.Condition()
        self._closed = False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Blocks until the copy is complete."""
        if self._closed:
            raise Conflict(
                "this stager is closed", kept="nothing was copied", next="everstep.dcp.Stager(), for the run"
            )
        return self._free().stage(state_dict)

    def synchronize_staging(self) -> None:
        """Nothing: `stage` has waited."""

    def close(self) -> None:
        """Let go of the memory; a save that is under way keeps what it reads."""
        self._closed = True
        for one in self._sets:
            one.close()
        self._sets.clear()

    def _free(self) -> _Set:
        found = next((one for one in self._sets if one.is_free), None)
        if found is None and len(self._sets) < SETS:
            found = _Set(self._freed)
            self._sets.append(found)
        if found is None:
            # A save that failed may be held by a cycle, with its traceback.
            gc.collect()
            with self._freed:
                self._freed.wait_for(lambda: any(one.is_free for one in self._sets), self._patience_s)
            found = next((one for one in self._sets if one.is_free), None)
        if found is None:
            raise Conflict(
                f"{SETS} saves are still under way after {self._patience_s:.0f} s",
                kept="nothing was copied, and the state is untouched",
                next="wait for the futures of async_save, and let go of those that failed",
            )
        return found


class _Staged(dict[str, Any]):
    """A copy of a state: whoever saves it holds this dict until that is done."""


class _Set:
    """The memory of one copy, and whether a save still reads it."""

    def __init__(self, freed: threading.Condition) -> None:
        try:
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
        except ImportError as error:
            raise Unsupported(
                f"everstep.dcp.Stager needs torch 2.9 or newer, this is {torch.__version__}",
                kept="nothing was copied",
                next="dcp.async_save without async_stager",
            ) from error
        self._freed = freed
        self._user: weakref.ref[_Staged] | None = None
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=torch.cuda.is_available(),
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=torch.accelerator.is_available(),
            )
        )

    @property
    def is_free(self) -> bool:
        return self._user is None or self._user() is None

    def stage(self, state_dict: dict[str, Any]) -> _Staged:
        staged = _Staged(self._stager.stage(state_dict))  # type: ignore[arg-type]
        self._user = weakref.ref(staged, self._released)
        return staged

    def _released(self, _: object) -> None:
        with self._freed:
            self._freed.notify_all()

    def close(self) -> None:
        self._stager.close()
