"""The systems that are compared, each used as its documentation says a careful user should.

Durable means the same for all: the bytes survive a power cut. A system that does not see to that itself is
given an fsync of its files, as late as its own interface allows.
"""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import distributed

import everstep
from bench.measure import sync
from bench.states import State

POLL_S = 0.001


@dataclass
class Saving:
    """A save that is under way. Times are those of `time.perf_counter()`."""

    begun: float = field(default_factory=time.perf_counter)
    released_at: float = 0.0
    durable_at: float = 0.0
    error: BaseException | None = None
    costs: dict[str, float] = field(default_factory=dict)
    _done: threading.Event = field(default_factory=threading.Event)

    def watch(self, released: Callable[[], object], durable: Callable[[], object]) -> Saving:
        """Note when two waits are over, in a thread that does nothing but wait."""

        def wait() -> None:
            try:
                released()
                self.released_at = time.perf_counter()
                durable()
                self.durable_at = time.perf_counter()
            except BaseException as error:
                self.error = error
            self._done.set()

        threading.Thread(target=wait, daemon=True).start()
        return self

    def finished(self) -> Saving:
        """A save that is durable already."""
        self.released_at = self.durable_at = time.perf_counter()
        self._done.set()
        return self

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def wait(self) -> None:
        self._done.wait()
        if self.error is not None:
            raise self.error


class System(Protocol):
    """Keeps a training state. Made after the first steps, when the optimizer's state is there."""

    package: ClassVar[str | None]

    def boundary(self, take: bool) -> Saving | None:
        """A step has ended; `take`: save it. Blocks the training as long as the system does."""

    def updating(self) -> AbstractContextManager[object]:
        """What goes around the optimizer's step, so that a save that is under way stays whole."""

    def close(self) -> None: ...


class Everstep:
    """A run of this project; the fence is inside the optimizer's step."""

    package: ClassVar[str | None] = None

    def __init__(self, state: State, directory: Path) -> None:
        self.run = everstep.open(directory / "chain", **state.objects, every=None, keep="last 2")
        self._steps = self.run.steps(range(1 << 30))
        next(self._steps)

    def boundary(self, take: bool) -> Saving | None:
        if not take:
            next(self._steps)
            return None
        saving = Saving()
        pending = self.run.take()
        next(self._steps)

        def released() -> None:
            while not pending.released:
                time.sleep(POLL_S)

        def durable() -> None:
            pending.durable()
            if pending.snapshot is not None:
                saving.costs = dict(pending.snapshot.record.costs)

        return saving.watch(released, durable)

    def updating(self) -> AbstractContextManager[object]:
        return nullcontext()

    def close(self) -> None:
        self._steps.close()
        self.run.close()


class _Synchronous:
    """A system that is done when its save returns."""

    package: ClassVar[str | None] = None

    def __init__(self, state: State, directory: Path) -> None:
        self.state, self.directory = state, directory
        self._numbers = itertools.count()

    def boundary(self, take: bool) -> Saving | None:
        if not take:
            return None
        saving = Saving()
        self.save()
        return saving.finished()

    def save(self) -> None:
        raise NotImplementedError

    def place(self) -> Path:
        """Where the next save goes; only the two newest stay, as with a careful user."""
        number = next(self._numbers)
        shutil.rmtree(self.directory / str(number - 2), ignore_errors=True)
        return self.directory / str(number)

    def updating(self) -> AbstractContextManager[object]:
        return nullcontext()

    def close(self) -> None:
        pass


class TorchSave(_Synchronous):
    """`torch.save` to a temporary file, fsync, rename."""

    def save(self) -> None:
        torch_save(self.state, self.directory / "state.pt")


def torch_save(state: State, file: Path) -> None:
    """What a careful user does: save, make durable, put in place."""
    temporary = file.with_suffix(".tmp")
    with open(temporary, "wb") as out:
        torch.save(state.plain(), out)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, file)
    sync(file.parent)


class SafeTensors(_Synchronous):
    """All tensors under flat names with `safetensors`, fsync, rename."""

    package: ClassVar[str | None] = "safetensors"

    def save(self) -> None:
        safetensors_save(self.state, self.directory / "state.safetensors")


def safetensors_save(state: State, file: Path) -> None:
    from safetensors.torch import save_file

    temporary = file.with_suffix(".tmp")
    save_file(dict(flat("", state.plain())), temporary)
    sync(temporary)
    os.replace(temporary, file)
    sync(file.parent)


def flat(name: str, tree: object) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of all leaves of nested dicts and lists that are tensors."""
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from flat(f"{name}.{key}" if name else str(key), value)


class DcpSave(_Synchronous):
    """`torch.distributed.checkpoint.save`, which does its own fsync."""

    def save(self) -> None:
        from torch.distributed import checkpoint

        checkpoint.save(self.state.plain(), checkpoint_id=self.place(), no_dist=True)


class DcpAsync(_Synchronous):
    """`torch.distributed.checkpoint.async_save` as it is without arguments."""

    def boundary(self, take: bool) -> Saving | None:
        from torch.distributed import checkpoint

        if not take:
            return None
        place, saving = self.place(), Saving()
        future: Any = checkpoint.async_save(self.state.plain(), checkpoint_id=place)
        return saving.watch(lambda: None, future.result)


class _DcpBest(_Synchronous):
    """`async_save` with a stager that is kept and copies into shared memory in a thread of its own.

    The documentation asks for CUDA for page-locked memory and copies that do not block; without it these two
    are off. The training waits for the staging right before the optimizer changes what is staged.
    """

    in_process: ClassVar[bool]

    def __init__(self, state: State, directory: Path) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        super().__init__(state, directory)
        self._staging: Any = None
        locked = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=locked,
                use_shared_memory=True,
                use_async_staging=True,
                use_non_blocking_copy=locked,
            )
        )
        if self.in_process:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            os.environ.setdefault("MASTER_PORT", "0")
            distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)

    def boundary(self, take: bool) -> Saving | None:
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        if not take:
            return None
        kind = AsyncCheckpointerType.PROCESS if self.in_process else AsyncCheckpointerType.THREAD
        place, saving = self.place(), Saving()
        response: Any = checkpoint.async_save(
            self.state.plain(),
            checkpoint_id=place,
            async_checkpointer_type=kind,
            async_stager=self._stager,
        )
        self._staging = response.staging_completion
        return saving.watch(response.staging_completion.result, response.upload_completion.result)

    def updating(self) -> AbstractContextManager[object]:
        if self._staging is not None:
            self._staging.result()
            self._staging = None
        return nullcontext()

    def close(self) -> None:
        self._stager.close()
        if self.in_process:
            distributed.destroy_process_group()


class DcpBestThread(_DcpBest):
    """DCP's staging in shared memory, written by a thread."""

    in_process = False


class DcpBestProcess(_DcpBest):
    """DCP's staging in shared memory, written by a process."""

    in_process = True


class TorchCheckpointing(_Synchronous):
    """`torch_checkpointing` with what it chooses itself on this machine, but for its direct I/O, which writes
    pieces of any size and fails on ext4 and xfs. It makes nothing durable, so its files get an fsync when it
    says that they are written."""

    package: ClassVar[str | None] = "torch_checkpointing"

    def __init__(self, state: State, directory: Path) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        super().__init__(state, directory)
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager: Any = CheckpointManager(CheckpointManager.Config(storage_config=storage))

    def boundary(self, take: bool) -> Saving | None:
        if not take:
            return None
        place, saving = self.place(), Saving()
        written = self._manager.save(str(place), self.state.plain())

        def durable() -> None:
            written.result()
            sync(place)

        return saving.watch(lambda: None, durable)

    def updating(self) -> AbstractContextManager[object]:
        return self._manager.lock()  # type: ignore[no-any-return]

    def close(self) -> None:
        self._manager.close()


class TorchSnapshot(_Synchronous):
    """`torchsnapshot.Snapshot.take`, and an fsync."""

    package: ClassVar[str | None] = "torchsnapshot"

    def save(self) -> None:
        from torchsnapshot import Snapshot

        place = self.place()
        Snapshot.take(str(place), self.state.objects)
        sync(place)


class TorchSnapshotAsync(_Synchronous):
    """`torchsnapshot.Snapshot.async_take`, and an fsync."""

    package: ClassVar[str | None] = "torchsnapshot"

    def boundary(self, take: bool) -> Saving | None:
        from torchsnapshot import Snapshot

        if not take:
            return None
        place, saving = self.place(), Saving()
        pending = Snapshot.async_take(str(place), self.state.objects)

        def durable() -> None:
            pending.wait()
            sync(place)

        return saving.watch(lambda: None, durable)


OURS = "everstep"
TORCH_SAVE = "torch.save + fsync"
DCP_BEST = ("dcp.async_save, staged, thread", "dcp.async_save, staged, process")

SYSTEMS: dict[str, Callable[[State, Path], System]] = {
    OURS: Everstep,
    TORCH_SAVE: TorchSave,
    "safetensors": SafeTensors,
    "dcp.save": DcpSave,
    "dcp.async_save": DcpAsync,
    DCP_BEST[0]: DcpBestThread,
    DCP_BEST[1]: DcpBestProcess,
    "torch_checkpointing": TorchCheckpointing,
    "torchsnapshot.take": TorchSnapshot,
    "torchsnapshot.async_take": TorchSnapshotAsync,
}


def missing(name: str) -> str:
    """Why a system cannot be measured here; empty when it can."""
    package = SYSTEMS[name].package  # type: ignore[attr-defined]
    if package is None:
        return ""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"not installed (pip install {package})"
    return ""
