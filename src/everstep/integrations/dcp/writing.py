"""A storage writer that makes each save a snapshot of a chain."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import time
import zipfile
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from everstep.chain.history import MAIN, Chain, Snapshot
from everstep.chain.parts import Part
from everstep.chain.retention import Keep
from everstep.chain.writer import Captured, Facts
from everstep.errors import Mismatch, Unsupported
from everstep.format import values
from everstep.format.keys import checked
from everstep.format.layout import Slice, item_bytes
from everstep.format.manifest import OBJECTS, OWN, RUN
from everstep.format.record import Number
from everstep.format.values import Leaf, Value
from everstep.integrations.dcp import planning
from everstep.integrations.dcp.names import Path, leaf_name, number, place
from everstep.integrations.dcp.saving import Saving, Seat, refuse_busy, saving
from everstep.integrations.dcp.waves import Source, Waves
from everstep.run import environment
from everstep.run.metrics import Reading
from everstep.state.tree import Leaves, Tensorlike, dtype_name, flatten
from everstep.store.base import Store
from everstep.store.urls import open_store

TRIGGER = "dcp"
LACKS = "saved by torch.distributed.checkpoint: without random generators and the loader's position"

_PART = MetadataIndex("~part")
"""The result under which a rank hands in its part."""


class Writer(StorageWriter):
    """Makes each save of `torch.distributed.checkpoint` a snapshot of a chain, the next of its branch.

        dcp.save(state_dict, storage_writer=everstep.dcp.Writer("runs/gpt", step=step))

    Every rank stores what its plan gives it, chunks that its last save has not had; then the coordinator
    makes it the branch's newest snapshot. Until then nothing has happened, whoever dies. It is the same
    snapshot that `everstep.open` takes of these objects, but for what it does not see: the random generators
    and the loader's position.

    Nothing is pickled: what is no tensor is stored as a plain value, or refused with its name. Tensors are
    brought into the host's memory a part after the other, 256 MiB at a time.

    A writer holds nothing open, and may be used for one save or for many, also by `dcp.async_save` in another
    process.

    Args:
        url: the chain, as for `everstep.open`; created where there is none.
        step: which training step the state is of; else `checkpoint_id="step:500"` says so, or it is one after
            the newest snapshot's. Another than the newest's may be given: it need not be larger.
        branch: whose head advances.
        keep: which snapshots of the branch stay, as for `everstep.open`; the others are dropped after each
            save.
        note: recorded with the snapshot.
        metrics: too, numbers or tensors of one element, for which this waits; `best:loss` is found by them.

    Attributes:
        snapshot: the last one that this writer has committed, in the coordinator's process.

    Saving raises, wrapped in torch's `CheckpointException` that names the rank:
        Unsupported: something cannot be stored, and the message names it; or ranks save without collectives.
        Conflict: another process is writing to the branch.
        Fenced: another job has saved to the branch since this one did.
        Unavailable: the store does not answer or has no room; the branch is as it was.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | Store,
        *,
        step: int | None = None,
        branch: str = MAIN,
        keep: str = "all",
        note: str = "",
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._place = _absolute(url)
        self._step = None if step is None else _checked_step(step)
        self._branch = checked(branch, "branch")
        self._keep = Keep.parse(keep)
        self._note = note
        self._metrics: dict[str, Number] = {
            name: one if type(one) is int else Reading(name, one).value()
            for name, one in (metrics or {}).items()
        }
        self._names: frozenset[str] | None = None
        """What this rank has of the state, by its planner's plan; None: all that the planner has."""
        self._facts: Facts | None = None
        self._saving: Saving | None = None
        self.snapshot: Snapshot | None = None

    def __repr__(self) -> str:
        return f"<Writer to branch {self._branch!r} of {self.checkpoint_id}>"

    def __getstate__(self) -> dict[str, Any]:
        if not isinstance(self._place, str):
            raise Unsupported(
                f"a writer to {self._place.url} cannot be handed to another process: it was given a store",
                kept="no snapshot was taken",
                next="everstep.dcp.Writer(URL)",
            )
        return {**self.__dict__, "_names": None, "_facts": None, "_saving": None, "snapshot": None}

    @property
    def checkpoint_id(self) -> str:
        return self._place if isinstance(self._place, str) else self._place.url

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return _step_of(checkpoint_id) is not None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """`dcp.save(..., checkpoint_id="step:500")` says which step it is. Raises Mismatch for others."""
        if checkpoint_id is None:
            return
        step = _step_of(checkpoint_id)
        if step is None:
            raise Mismatch(
                f"checkpoint_id={os.fspath(checkpoint_id)!r} names no step",
                kept="no snapshot was taken",
                next='checkpoint_id="step:500", or everstep.dcp.Writer(URL, step=500)',
            )
        self._step = step

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    # -- planning -----------------------------------------------------------------------------------------

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True) and dist.is_initialized() and dist.get_world_size() > 1:
            raise Unsupported(
                "ranks that save with use_collectives=False know nothing of each other, and a snapshot is "
                "one for all of them",
                kept="no snapshot was taken",
                next="use_collectives=True",
            )
        if is_coordinator:
            # Now, and not after everything was stored.
            refuse_busy(Chain.create(open_store(self._place)), self._branch)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        self._names = frozenset(item.index.fqn for item in plan.items) if plan.usable else None
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [
            dataclasses.replace(plan, storage_data=Seat(rank, len(plans))) for rank, plan in enumerate(plans)
        ]

    # -- writing ------------------------------------------------------------------------------------------

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        seat = plan.storage_data if isinstance(plan.storage_data, Seat) else Seat()
        mine = self._saving = saving(self._place, self._branch, seat)
        step = mine.next_step() if self._step is None else self._step
        told = _Told(plan, planner, self._names, seat.rank)
        sources = told.sources()
        layout = mine.layout([one.slice for one in sources])
        tree = {OBJECTS: told.tree, RUN: _run_part(step, told.flattened)}
        waves = Waves(layout, sources, mine.chain.about.grid_bytes)
        self._facts = Facts(
            step=step,
            trigger=TRIGGER,
            note=self._note,
            metrics=self._metrics,
            approximate=(LACKS,),
            environment=environment.here(),
            begun=time.monotonic(),
        )
        part = mine.store(Captured(layout, values.encode(tree), waves))
        results = [WriteResult(item.index, item.tensor_storage_size() or 0, None) for item in plan.items]
        done: Future[list[WriteResult]] = Future()
        done.set_result([*results, WriteResult(_PART, 0, part)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The one commit point, on the coordinator. Durable on return."""
        parts = [one.storage_data for mine in results for one in mine if isinstance(one.storage_data, Part)]
        assert self._facts is not None
        assert self._saving is not None
        self.snapshot = self._saving.commit(parts, self._facts, self._keep)
        metadata.storage_data = {}
        metadata.storage_meta = StorageMeta(checkpoint_id=f"{self.checkpoint_id}@{self.snapshot.id}")


def _absolute(url: str | os.PathLike[str] | Store) -> str | Store:
    """A path is the same one wherever the process is later."""
    if not isinstance(url, str | os.PathLike):
        return url
    place = os.fspath(url)
    is_path = "://" not in place and not place.startswith("parity:")
    return os.path.abspath(place) if is_path else place


def _checked_step(step: int) -> int:
    if step < 0:
        raise Mismatch(f"step={step} is none", kept="nothing was touched", next="a step from 0 on")
    return int(step)


def _step_of(checkpoint_id: str | os.PathLike[str]) -> int | None:
    text = os.fspath(checkpoint_id).removeprefix("step:")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def _run_part(step: int, flattened: bool) -> Value:
    """What a run keeps beside the objects, as far as there is something of it."""
    return {
        "progress": {"step": step, "epoch": 0},
        "rng": {},
        "data": None,
        "parameters": {},
        "gradients": {},
        "dcp": {"flattened": flattened},
    }


class _Told:
    """What a planner has to tell of this rank's state.

    Args:
        plan: the final one, of what this rank writes.
        names: all that this rank has; None for what the planner has.
        rank: this one.

    Attributes:
        tree: its values, and the names of its leaves.
        flattened: whether the planner has looked into dicts and lists.
    """

    def __init__(self, plan: SavePlan, planner: SavePlanner, names: frozenset[str] | None, rank: int) -> None:
        self._plan = plan
        self._planner = planner
        self._items = {item.index.fqn: item for item in plan.items}
        known: Mapping[str, Any] | None = None
        paths = plan.planner_data
        if isinstance(planner, DefaultSavePlanner):
            known = planner.state_dict
            paths = planner.mappings if planner.flatten_state_dict else None
        self.flattened = isinstance(paths, Mapping)
        self._paths: Mapping[str, Path] = paths if isinstance(paths, Mapping) else {}
        self.tree: dict[str, Value] = {}
        self._own = f"{OWN}{rank}/" if rank else ""
        self._within: Leaves = {}
        """The tensors and arrays in values that are none themselves. Each rank stores its own: of values that
        differ between ranks the lowest rank's count, whoever is planned to write them."""

        for name in self._items if known is None else known:
            if names is None or name in names or name in self._items:
                place(self.tree, self._path(name), self._value(name, known))
        if self.flattened:
            number(self.tree)

    def _path(self, name: str) -> Path:
        return tuple(self._paths.get(name, (name,)))

    def _value(self, name: str, known: Mapping[str, Any] | None) -> Value:
        path = self._path(name)
        is_tensor = (
            self._items[name].type != WriteItemType.BYTE_IO
            if name in self._items
            else known is not None and isinstance(known[name], torch.Tensor)
        )
        if is_tensor:
            return Leaf(leaf_name(path))
        return flatten(self._own + leaf_name(path), _object(self._planner, name), self._within)

    def sources(self) -> list[Source]:
        """What this rank is to write."""
        found: dict[object, Source] = {}
        for item in self._plan.items:
            if item.type != WriteItemType.BYTE_IO:
                source = self._source(item)
                found.setdefault((source.slice.name, source.slice.box), source)
        return [*found.values(), *(_whole(leaf, tensor) for leaf, tensor in self._within.items())]

    def _source(self, item: WriteItem) -> Source:
        data = item.tensor_data
        assert data is not None
        assert data.chunk is not None
        name, dtype = leaf_name(self._path(item.index.fqn)), str(data.properties.dtype).removeprefix("torch.")
        try:
            item_bytes(dtype)
        except Unsupported as error:
            raise Unsupported(f"{name}: {error.problem}", kept="no snapshot was taken") from error
        return Source(
            Slice(
                name=name,
                dtype=dtype,
                shape=tuple(data.size),
                at=tuple(data.chunk.offsets),
                extent=tuple(data.chunk.sizes),
            ),
            partial(_resolved, self._planner, item),
        )


def _whole(leaf: str, tensor: Tensorlike) -> Source:
    shape = tuple(tensor.shape)
    return Source(Slice(leaf, dtype_name(tensor), shape, (0,) * len(shape), shape), lambda: tensor)


def _resolved(planner: SavePlanner, item: WriteItem) -> torch.Tensor:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _object(planner: SavePlanner, name: str) -> object:
    """The value that a planner saves under a name. One that makes its own bytes of values is asked for them,
    and what `torch.save` made of plain values is taken apart again, without running anything of it.

    Raises:
        Unsupported: it cannot be had.
    """
    index = MetadataIndex(name)
    kind = type(planner)
    if isinstance(planner, DefaultSavePlanner) and _takes_as_it_is(type(planner)):
        return planner.lookup_object(index)
    made = planner.resolve_data(WriteItem(index=index, type=WriteItemType.BYTE_IO))
    assert isinstance(made, io.BytesIO)
    made.seek(0)
    if zipfile.is_zipfile(made):
        made.seek(0)
        try:
            return torch.load(made, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise _refused(name, kind, "holds more than plain values") from error
    raise _refused(name, kind, "is none that could be read again without it")


def _takes_as_it_is(planner: type[DefaultSavePlanner]) -> bool:
    """Whether a planner does nothing of its own with the values it finds."""
    own = planner.transform_object is not DefaultSavePlanner.transform_object
    known = (DefaultSavePlanner.resolve_data, planning.SavePlanner.resolve_data)
    return not own and any(planner.resolve_data is one for one in known)


def _refused(name: str, planner: type, why: str) -> Unsupported:
    return Unsupported(
        f"{name} cannot be stored: what {planner.__qualname__} makes of it {why} (nothing is pickled)",
        kept="no snapshot was taken",
        next="everstep.dcp.SavePlanner, or a planner that leaves transform_object as it is",
    )
