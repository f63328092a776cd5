"""A storage reader that loads the snapshots of a chain."""

from __future__ import annotations

import dataclasses
import io
import os
import warnings
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from everstep.chain.history import MAIN, Chain, Snapshot
from everstep.chain.reader import Reader as ChunkReader
from everstep.chain.reader import Target
from everstep.errors import Conflict, Damaged, Unsupported
from everstep.format.manifest import OBJECTS, RUN, Manifest, StoredLeaf, StoredSlice
from everstep.format.values import Leaf, Value
from everstep.integrations.dcp import verified
from everstep.integrations.dcp.names import Path, items, key_of
from everstep.integrations.dcp.planning import LoadPlanner as OwnLoadPlanner
from everstep.integrations.dcp.saving import Place
from everstep.state import leaves
from everstep.state.leaves import stored_leaf
from everstep.state.tree import Leaves, leaf_names, torch_dtype, unflatten
from everstep.store.base import Store
from everstep.store.urls import open_store

HEAD = "head"


class Reader(StorageReader):
    """Loads a snapshot of a chain with `torch.distributed.checkpoint`, whoever took it.

        dcp.load(state_dict, storage_reader=everstep.dcp.Reader("runs/gpt"))

    Each rank reads what it needs, several ranges at once, straight into its tensors where their memory
    allows, and each byte is checked against its chunk's digest. Ranks and placements may be others than those
    that the snapshot was taken with. All ranks load the same snapshot, also where a job saves meanwhile.

    What a snapshot holds under `model/0.weight` is `{"model": {"0.weight": ...}}` here, and `model.0.weight`
    in torch's own metadata. The state that a run keeps beside the objects (generators, the loader's position)
    is not part of it.

    Args:
        url: the chain, as for `everstep.open`.
        ref: which snapshot: `head` or `latest`, `step:500`, `best:loss`, a tag, an id; `checkpoint_id=` says
            so, too.
        branch: the one that `head` and `step:` speak of.

    Attributes:
        snapshot: the one that was loaded last.
        remarks: damage of the chain that was seen and did not touch what was read, a sentence each.

    Loading raises, wrapped in torch's `CheckpointException` that names the rank:
        NotFound: there is no such chain or snapshot.
        Damaged: bytes are missing or are not the ones that were written; tensors may be partly overwritten.
        Unsupported: a newer version wrote it.
        Conflict: the branch went on to a snapshot of other tensors while the ranks looked for the newest.
    """

    def __init__(self, url: str | os.PathLike[str] | Store, ref: str = HEAD, *, branch: str = MAIN) -> None:
        super().__init__()
        self._place: Place = os.fspath(url) if isinstance(url, str | os.PathLike) else url
        self._ref = ref
        self._branch = branch
        self._found: _Found | None = None
        self.remarks: list[str] = []

    def __repr__(self) -> str:
        return f"<Reader of {self._ref!r} of {self.checkpoint_id}>"

    @property
    def checkpoint_id(self) -> str:
        return self._place if isinstance(self._place, str) else self._place.url

    @property
    def snapshot(self) -> Snapshot | None:
        return None if self._found is None else self._found.snapshot

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return bool(os.fspath(checkpoint_id))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """`dcp.load(..., checkpoint_id="step:500")` says which snapshot."""
        self._found = None
        if checkpoint_id is not None:
            self._ref = os.fspath(checkpoint_id)

    # Where it is called `kwargs`, torch asks a second time after an error, for a file of one rank.
    def read_metadata(self, *args: Any, **ignored: Any) -> Metadata:
        """What there is to load. A few small requests, and each rank's manifest."""
        chain = Chain(open_store(self._place))
        self._found = _Found.of(chain, chain.find(self._ref, self._branch))
        return self._found.metadata

    # -- planning -----------------------------------------------------------------------------------------

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: all is known from `read_metadata`."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        assert self._found is not None
        return dataclasses.replace(plan, storage_data=self._found.snapshot.id)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """All ranks load what the coordinator has found: another may have come since."""
        return [dataclasses.replace(plan, storage_data=plans[0].storage_data) for plan in plans]

    # -- reading ------------------------------------------------------------------------------------------

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        found = self._found = self._agreed(plan.storage_data)
        reader = ChunkReader(found.chain.store)

        def fill(targets: Iterable[tuple[int, int, memoryview]]) -> None:
            wanted = [Target(*target) for target in targets]
            try:
                self._remark(reader.fill(found.manifest, wanted))
            except Damaged:
                # What is missing is no damage where a prune took the snapshot away.
                found.chain.refuse_pruned(found.snapshot, "was loaded")
                raise
            verified.note(found.chain, found.manifest, [(t.region, t.offset, len(t.buffer)) for t in wanted])

        tensors = [
            (item, planner.resolve_tensor(item).detach())
            for item in plan.items
            if item.type != LoadItemType.BYTE_IO
        ]
        leaves.read_boxes(found.manifest, fill, [found.wanted(item, tensor) for item, tensor in tensors])
        for item, tensor in tensors:
            planner.commit_tensor(item, tensor)
        self._hand_over(found, fill, [one for one in plan.items if one.type == LoadItemType.BYTE_IO], planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _agreed(self, snapshot: object) -> _Found:
        """What the coordinator has found. A plan stays right if it has the same tensors in the same boxes."""
        found = self._found
        assert found is not None
        if type(snapshot) is not str or snapshot == found.snapshot.id:
            return found
        agreed = _Found.of(found.chain, found.chain.snapshot(snapshot))
        if agreed.metadata.state_dict_metadata != found.metadata.state_dict_metadata:
            raise Conflict(
                f"{self._ref!r} of {self.checkpoint_id} became another snapshot while the ranks looked",
                kept="nothing was loaded",
                next=f"dcp.load(..., storage_reader=everstep.dcp.Reader(..., {snapshot[:8]!r}))",
            )
        return agreed

    def _hand_over(
        self, found: _Found, fill: leaves.Fill, wanted: list[ReadItem], planner: LoadPlanner
    ) -> None:
        """Give a planner the values that are no tensors."""
        values = {item: found.items[item.storage_index.fqn][1] for item in wanted}
        names = {name for value in values.values() for name in leaf_names(value)}
        made: Leaves = leaves.new({name: stored_leaf(found.manifest, name) for name in names}, {})
        leaves.read(found.manifest, fill, made)
        for item, value in values.items():
            told = unflatten(value, made.__getitem__)
            if isinstance(planner, OwnLoadPlanner):
                planner.load_value(item, told)
            else:
                # Others take what `torch.save` makes: of a plain value, in memory, that was decoded here.
                file = io.BytesIO()
                torch.save(told, file)
                file.seek(0)
                planner.load_bytes(item, file)

    def _remark(self, remarks: list[str]) -> None:
        for remark in remarks:
            if remark not in self.remarks:
                self.remarks.append(remark)
                warnings.warn(f"{self.checkpoint_id}: {remark}", stacklevel=2)


@dataclasses.dataclass(frozen=True)
class _Found:
    """A snapshot, and what there is in it for torch.distributed.checkpoint."""

    chain: Chain
    snapshot: Snapshot
    manifest: Manifest

    @classmethod
    def of(cls, chain: Chain, snapshot: Snapshot) -> _Found:
        return cls(chain, snapshot, chain.manifest(snapshot))

    @cached_property
    def flattened(self) -> bool:
        kept = self.manifest.tree[RUN].get("dcp")
        return not isinstance(kept, dict) or kept.get("flattened") is not False

    @cached_property
    def items(self) -> dict[str, tuple[Path, Value]]:
        found: dict[str, tuple[Path, Value]] = {}
        tree = self.manifest.tree[OBJECTS]
        for path, value in items(tree, flattened=self.flattened, is_tensor=self._is_tensor):
            if key_of(path) in found:
                raise Unsupported(
                    f"two things in snapshot {self.snapshot.short} are {key_of(path)!r} to "
                    "torch.distributed.checkpoint",
                    next=f"everstep.load({self.chain.url!r}, {self.snapshot.short!r})",
                )
            found[key_of(path)] = (path, value)
        return found

    @cached_property
    def metadata(self) -> Metadata:
        paths = {name: path for name, (path, _) in self.items.items()}
        return Metadata(
            state_dict_metadata={name: self._metadata_of(value) for name, (_, value) in self.items.items()},
            planner_data=paths if self.flattened else None,
            storage_data={},
            storage_meta=StorageMeta(checkpoint_id=f"{self.chain.url}@{self.snapshot.id}"),
        )

    def _is_tensor(self, leaf: Leaf) -> bool:
        return not self._leaf(leaf).dtype.startswith("numpy:")

    def _leaf(self, leaf: Leaf) -> StoredLeaf:
        stored = self.manifest.by_name.get(leaf.name)
        if stored is None:
            raise Damaged(f"the snapshot's values name a leaf {leaf.name!r} that it does not hold")
        return stored

    def _metadata_of(self, value: Value) -> STORAGE_TYPES:
        if type(value) is not Leaf or not self._is_tensor(value):
            return BytesStorageMetadata()
        stored = self._leaf(value)
        return TensorStorageMetadata(
            properties=TensorProperties(dtype=torch_dtype(stored.dtype)),
            size=torch.Size(stored.shape),
            chunks=[
                ChunkStorageMetadata(offsets=torch.Size(one.at), sizes=torch.Size(one.extent))
                for one in stored.slices
            ],
        )

    @cached_property
    def _slices(self) -> dict[tuple[str, tuple[int, ...]], StoredSlice]:
        """By the name of the leaf and where in it they begin."""
        return {(leaf.name, one.at): one for leaf in self.manifest.leaves for one in leaf.slices}

    def wanted(self, item: ReadItem, tensor: torch.Tensor) -> leaves.Wanted:
        """What a plan wants to be read into a tensor."""
        leaf = self.items[item.storage_index.fqn][1]
        assert isinstance(leaf, Leaf)
        stored = self._leaf(leaf)
        if tuple(tensor.shape) != tuple(item.lengths):
            raise ValueError(
                f"{item.storage_index.fqn}: the planner gives a tensor of shape {list(tensor.shape)} "
                f"for a box of {list(item.lengths)}"
            )
        part = self._slices[leaf.name, tuple(item.storage_index.offset or (0,) * len(stored.shape))]
        return leaves.Wanted(part, torch_dtype(stored.dtype), tuple(item.storage_offsets), tensor)
