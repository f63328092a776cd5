"""A look at everything the next step depends on: leaves by name, their kin, and the tree of plain values.
Nothing is copied but generators' states.

A look holds the training loop up. So what modules and optimizers tell is remembered (`remembered`), and what
follows from it is the same object as long as they tell the same (`Sorts`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from everstep.errors import Mismatch
from everstep.format.layout import Kin, Slice
from everstep.format.manifest import CONFIG, OBJECTS, RUN
from everstep.format.values import Value
from everstep.state import rng
from everstep.state.objects import (
    is_stateful,
    module_key,
    modules,
    optimizer_parameters,
    optimizers,
    trained,
)
from everstep.state.remembered import Remembered, remembered
from everstep.state.tree import Leaves, Tensorlike, dtype_name, flatten, join

Row: TypeAlias = tuple[str, object, Any, object, Kin, str]
"""A leaf's name, dtype, shape and device, its kin, and the first leaf with the same memory."""


@dataclass(frozen=True)
class Sorts:
    """What leaves there are of modules and optimizers. It is the same object in two looks of a `Collector`
    exactly when their leaves are the same tensors, whose memory is the same and seen in the same way.

    Attributes:
        lasting: leaves of which that is known; the others may be new tensors in each look.
        kin: that of the leaves of modules, where it is not "moving".
        late: leaves that change only when one of the optimizers handed over takes a step.
        watched: those of them that others might write to all the same: the parameters.
        frozen: leaves that nothing is expected to change: parameters that want no gradient and have no
            optimizer.
    """

    lasting: frozenset[str] = frozenset()
    kin: Mapping[str, Kin] = field(default_factory=dict)
    late: frozenset[str] = frozenset()
    watched: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Collected:
    """A state as it is, nothing copied."""

    leaves: Leaves
    sorts: Sorts
    tree: Value

    def rows(self) -> list[Row]:
        """What the layout depends on, leaf by leaf; leaves with the same memory (tied weights) are one."""
        firsts: dict[object, str] = {}
        made: list[Row] = []
        for name, tensor in self.leaves.items():
            first = firsts.setdefault(memory(tensor) or name, name)
            made.append(self.row(name, tensor, first))
        return made

    def row(self, name: str, tensor: Tensorlike, first: str) -> Row:
        """That of one leaf, whose memory is that of the leaf `first`."""
        device = tensor.device if isinstance(tensor, torch.Tensor) else None
        return name, tensor.dtype, tensor.shape, device, self.sorts.kin.get(first, "moving"), first

    def slices(self, rows: Sequence[Row]) -> tuple[Slice, ...]:
        """The leaves' slices, in the order of the leaves; `rows` are its own."""
        return tuple(
            Slice(
                name=name,
                dtype=dtype_name(self.leaves[name]),
                shape=tuple(shape),
                at=(0,) * len(shape),
                extent=tuple(shape),
                kin=kin,
                alias=None if first == name else first,
            )
            for name, _, shape, _, kin, first in rows
        )


class Collector:
    """Looks at the objects of a run, again and again."""

    def __init__(self) -> None:
        self._remembered: dict[str, Remembered] = {}
        self._sorted: list[str] | None = None
        """The modules and optimizers that the next two are of; None when one has told something new."""
        self._sorts = Sorts()
        self._parameters: dict[str, list[str]] = {}

    def collect(
        self,
        objects: Mapping[str, object],
        *,
        position: object,
        progress: Mapping[str, object],
        gradients: Collection[str] = (),
        generators: object = None,
        config: Value = None,
    ) -> Collected:
        """Look at everything the next step depends on.

        Args:
            objects: what the user handed over, by name (`objects.named`).
            position: the loader's, as plain values; None where there is no loader.
            progress: step, epoch and the like.
            gradients: the names of the optimizers whose gradients are taken too: in the middle of an
                accumulation the next step depends on them.
            generators: the states of the global RNGs, where they are not to be those of now.
            config: plain values of the user's own, as `flatten` made them; None where there are none.

        Raises:
            Unsupported: something cannot be stored; the message names it.
        """
        leaves: Leaves = {}
        told = {name: self._told(name, value, leaves) for name, value in objects.items()}
        sorts = self._sort(objects, leaves)
        tree: dict[str, Value] = {
            OBJECTS: told,
            RUN: {
                "progress": flatten(f"{RUN}/progress", dict(progress), leaves),
                "rng": flatten(f"{RUN}/rng", generators or rng.capture(), leaves),
                "data": flatten(f"{RUN}/data", position, leaves),
                "parameters": self._parameters,
                "gradients": _gradients(objects, gradients, leaves),
                **({} if config is None else {CONFIG: config}),
            },
        }
        return Collected(leaves, sorts, tree)

    def _told(self, name: str, value: object, leaves: Leaves) -> Value:
        """The tree of one object; its leaves are put into `leaves`."""
        own: Leaves = {}
        known = self._remembered.get(name)
        if known is not None and known.of is value and known.is_still():
            tree = known.tell(own)
        else:
            tree = flatten(name, snapshot_of(value), own)
            self._remember(name, value, remembered(name, value, tree, own))
        if not leaves.keys().isdisjoint(own):
            twice = next(leaf for leaf in own if leaf in leaves)
            raise Mismatch(
                f"two objects have a leaf of the name {twice}",
                kept="no snapshot was taken, and the state is untouched",
                next="give one of them another name",
            )
        leaves.update(own)
        return tree

    def _remember(self, name: str, value: object, known: Remembered | None) -> None:
        self._remembered.pop(name, None)
        if known is not None:
            self._remembered[name] = known
        if isinstance(value, torch.nn.Module | torch.optim.Optimizer):
            self._sorted = None

    def _sort(self, objects: Mapping[str, object], leaves: Leaves) -> Sorts:
        """The sorts of the objects that were just told."""
        names = [*modules(objects), *optimizers(objects)]
        if self._sorted != names:
            known = [self._remembered[name] for name in names if name in self._remembered]
            lasting = frozenset(leaf for one in known for leaf in one.lasting)
            self._sorted, self._sorts = names, _sorts(objects, leaves, lasting)
            self._parameters = optimizer_parameters(objects)
        return self._sorts


def _sorts(objects: Mapping[str, object], leaves: Leaves, lasting: frozenset[str]) -> Sorts:
    kin: dict[str, Kin] = {}
    watched: set[str] = set()
    frozen: set[str] = set()
    trainable = {id(one) for optimizer in optimizers(objects).values() for one in trained(optimizer)}
    for name, module in modules(objects).items():
        for key, parameter in module.named_parameters(remove_duplicate=False):
            leaf = join(name, module_key(key))
            if not parameter.requires_grad:
                kin[leaf] = "frozen"
            if id(parameter) in trainable:
                watched.add(leaf)
            elif not parameter.requires_grad:
                frozen.add(leaf)
        for key, _ in module.named_buffers(remove_duplicate=False):
            kin[join(name, module_key(key))] = "buffer"
    states = tuple(f"{join(name, 'state')}/" for name in optimizers(objects))
    late = watched | {leaf for leaf in leaves if leaf.startswith(states)} if states else watched
    return Sorts(lasting, kin, frozenset(late), frozenset(watched), frozenset(frozen))


def snapshot_of(value: object) -> object:
    """The plain state of one object: its `state_dict()`, a generator's state, or the value itself."""
    if isinstance(value, torch.nn.Module):
        return {module_key(key): item for key, item in value.state_dict().items()}
    if is_stateful(value):
        return value.state_dict()  # type: ignore[attr-defined]
    if rng.is_generator(value):
        return rng.generator_state(value)
    return value


def _gradients(objects: Mapping[str, object], names: Collection[str], leaves: Leaves) -> Value:
    return {
        name: flatten(f"{RUN}/gradients/{name}", [one.grad for one in trained(optimizer)], leaves)
        for name, optimizer in optimizers(objects).items()
        if name in names
    }


def memory(tensor: Tensorlike) -> tuple[object, ...] | None:
    """What two tensors have in common exactly when they are the same memory seen in the same way; None for
    what is never shared."""
    if not isinstance(tensor, torch.Tensor) or not tensor.numel():
        return None
    where = (tensor.data_ptr(), tensor.device, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return (tensor.dtype, tensor.shape, *where)
