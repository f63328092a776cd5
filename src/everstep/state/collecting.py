"""A look at everything the next step depends on: leaves by name, their kin, and the tree of plain values.
Nothing is copied but generators' states.

A look holds the training loop up. So what modules and optimizers tell is remembered (`remembered`), and what
follows from it is the same object as long as they tell the same (`Sorts`).

Of many ranks each sees what it has: its part of a DTensor, all of other tensors. What it writes of that is
the business of `sharing`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from everstep.errors import Mismatch, Unsupported
from everstep.format.layout import Kin, Slice
from everstep.format.manifest import CONFIG, OBJECTS, RUN
from everstep.format.values import Value
from everstep.state import rng
from everstep.state.holding import own_name
from everstep.state.objects import (
    module_key,
    modules,
    optimizer_parameters,
    optimizers,
    snapshot_of,
    state_names,
    trained,
)
from everstep.state.remembered import Remembered, remembered
from everstep.state.sharding import is_sharded, local
from everstep.state.sharing import Place, Sharing, Watch
from everstep.state.sorts import Sorts, memory
from everstep.state.tree import Leaves, Tensorlike, dtype_name, flatten, join, renamed
from everstep.state.world import World

Row: TypeAlias = tuple[str, object, Any, object, Kin, str]
"""A leaf's name, dtype, shape and device, its kin, and the first leaf with the same memory."""

NOT_WATCHED = Watch()


@dataclass(frozen=True)
class Collected:
    """A state as it is, nothing copied; of many ranks, what this one writes of it.

    Attributes:
        leaves: by name; of a part of a leaf by a name of its own.
        places: by these names, where in a leaf what is a part of it lies.
        fits: whether all that this rank writes, and what others write, are a whole state together. False: no
            snapshot may be made of it before all ranks have found out anew who holds what.
        watch: tells whether what several ranks hold is still the same.
    """

    leaves: Leaves
    sorts: Sorts
    tree: Value
    places: Mapping[str, Place] = field(default_factory=dict)
    fits: bool = True
    watch: Watch = NOT_WATCHED

    def rows(self) -> list[Row]:
        """What the layout depends on, leaf by leaf; leaves with the same memory (tied weights) are one."""
        firsts: dict[object, str] = {}
        made: list[Row] = []
        for name, tensor in self.leaves.items():
            where = memory(tensor)
            if where is not None and name in self.places:
                where = (*where, self.places[name].box)
            first = firsts.setdefault(where or name, name)
            made.append(self.row(name, tensor, first))
        return made

    def row(self, name: str, tensor: Tensorlike, first: str) -> Row:
        """That of one leaf, whose memory is that of the leaf `first`."""
        device = tensor.device if isinstance(tensor, torch.Tensor) else None
        return name, tensor.dtype, tensor.shape, device, self.sorts.kin.get(first, "moving"), first

    def slices(self, rows: Sequence[Row]) -> tuple[Slice, ...]:
        """The leaves' slices, in the order of the leaves; `rows` are its own."""
        return tuple(self._slice(*row) for row in rows)

    def _slice(self, name: str, _: object, shape: Any, __: object, kin: Kin, first: str) -> Slice:
        place, dtype = self.places.get(name), dtype_name(self.leaves[name])
        if place is None:
            whole = tuple(shape)
            return Slice(name, dtype, whole, (0,) * len(whole), whole, kin, None if first == name else first)
        alias = None if first == name else self.places[first].name
        return Slice(place.name, dtype, place.shape, *place.box, kin, alias)


class Collector:
    """Looks at the objects of a run, again and again.

    Args:
        world: the ranks that train together. With others, who holds what must have been found out (`anew`)
            before what is collected can become a part of a snapshot.
    """

    def __init__(self, world: World | None = None) -> None:
        self._world = world or World.alone()
        self._sharing = Sharing(self._world)
        self._renamed: dict[str, _Renamed] = {}
        self._remembered: dict[str, Remembered] = {}
        self._sorted: list[str] | None = None
        """The modules and optimizers that the next two are of; None when one has told something new."""
        self._sorts = Sorts()
        self._parameters: dict[str, list[str]] = {}
        self._state_names: dict[str, list[str | int]] = {}

    def collect(
        self,
        objects: Mapping[str, object],
        *,
        position: object,
        progress: Mapping[str, object],
        gradients: Collection[str] = (),
        generators: object = None,
        config: Value = None,
        anew: str = "",
    ) -> Collected:
        """Look at everything the next step depends on. Does not block without `anew`.

        Args:
            objects: what the user handed over, by name (`objects.named`).
            position: the loader's, as plain values; None where there is no loader.
            progress: step, epoch and the like.
            gradients: the names of the optimizers whose gradients are taken too: in the middle of an
                accumulation the next step depends on them.
            generators: the states of the global RNGs, where they are not to be those of now.
            config: plain values of the user's own, as `flatten` made them; None where there are none.
            anew: of many ranks: find out first, all together, who holds what, under this key, which is new
                and the same on all ranks. Blocks while what others may hold too is read, and until all
                ranks have come.

        Raises:
            Unsupported: something cannot be stored; the message names it.
            Unavailable: with `anew`, other ranks have not come in time.
        """
        told: dict[str, Leaves] = {}
        # Modules first: what they are asked brings their parameters in order, by which optimizers have names.
        names = list(objects) if self._world.is_alone else [*modules(objects), *objects]
        trees = {name: self._told(name, objects, told) for name in dict.fromkeys(names)}
        leaves = _united(told)
        sorts = self._sort(objects, leaves)
        path = RUN if self._world.is_alone else own_name(self._world.rank, RUN)
        own: Leaves = {}
        run: dict[str, Value] = {
            "progress": flatten(f"{path}/progress", dict(progress), own),
            "rng": flatten(f"{path}/rng", generators or rng.capture(), own),
            "data": flatten(f"{path}/data", position, own),
            "parameters": self._parameters,
            "gradients": _gradients(path, objects, gradients, own),
            **({} if config is None else {CONFIG: config}),
        }
        tree: dict[str, Value] = {OBJECTS: {name: trees[name] for name in objects}, RUN: run}
        if self._world.is_alone:
            return Collected({**leaves, **own}, sorts, tree)
        steady = {*modules(objects), *optimizers(objects)}
        if anew:
            self._sharing.find_out(anew, told, sorts, steady)
        written = self._sharing.written({**told, "": own}, sorts, steady)
        for name in objects:
            renamed_leaves = written.names.keys() & told[name].keys()
            if renamed_leaves:
                names_of = {leaf: written.names[leaf] for leaf in renamed_leaves}
                trees[name] = self._rename(name, trees[name], names_of)
        tree[OBJECTS] = {name: trees[name] for name in objects}
        return Collected(written.leaves, written.sorts, tree, written.places, written.fits, written.watch)

    def _told(self, name: str, objects: Mapping[str, object], told: dict[str, Leaves]) -> Value:
        """The tree of one object; its leaves are put into `told`."""
        value = objects[name]
        own: Leaves = {}
        known = self._remembered.get(name)
        if known is not None and known.of is value and known.is_still():
            tree = known.tell(own)
        else:
            state = snapshot_of(value)
            if isinstance(value, torch.optim.Optimizer) and not self._world.is_alone:
                state = _by_name(state, self._names_of_state(name, objects))
            tree = flatten(name, state, own)
            if self._world.is_alone:
                own = {leaf: _undivided(leaf, tensor) for leaf, tensor in own.items()}
            self._remember(name, value, remembered(name, value, tree, own))
        told[name] = own
        return tree

    def _names_of_state(self, name: str, objects: Mapping[str, object]) -> list[str | int]:
        if self._sorted is None:
            self._state_names = state_names(objects)
        return self._state_names[name]

    def _remember(self, name: str, value: object, known: Remembered | None) -> None:
        self._remembered.pop(name, None)
        if known is not None:
            self._remembered[name] = known
        if isinstance(value, torch.nn.Module | torch.optim.Optimizer):
            self._sorted = None
        if isinstance(value, torch.nn.Module) and not self._world.is_alone:
            # What optimizers have told may name parameters as the module does no more.
            for other in [one for one, known in self._remembered.items() if _is_optimizer(known.of)]:
                del self._remembered[other]

    def _sort(self, objects: Mapping[str, object], leaves: Leaves) -> Sorts:
        """The sorts of the objects that were just told."""
        names = [*modules(objects), *optimizers(objects)]
        if self._sorted != names:
            known = [self._remembered[name] for name in names if name in self._remembered]
            lasting = frozenset(leaf for one in known for leaf in one.lasting)
            self._sorted, self._sorts = names, _sorts(objects, leaves, lasting)
            self._parameters = optimizer_parameters(objects)
        return self._sorts

    def _rename(self, name: str, tree: Value, names: Mapping[str, str]) -> Value:
        """The tree of an object, with the names under which its leaves are stored."""
        known = self._renamed.get(name)
        if known is None or known.tree is not tree or known.names != names:
            known = self._renamed[name] = _Renamed(tree, names, renamed(tree, names))
        return known.made


@dataclass(frozen=True)
class _Renamed:
    tree: Value
    names: Mapping[str, str]
    made: Value


def _united(told: Mapping[str, Leaves]) -> Leaves:
    leaves: Leaves = {}
    for own in told.values():
        if not leaves.keys().isdisjoint(own):
            twice = next(leaf for leaf in own if leaf in leaves)
            raise Mismatch(
                f"two objects have a leaf of the name {twice}",
                kept="no snapshot was taken, and the state is untouched",
                next="give one of them another name",
            )
        leaves.update(own)
    return leaves


def _is_optimizer(value: object) -> bool:
    return isinstance(value, torch.optim.Optimizer)


def _by_name(state: Any, names: Sequence[str | int]) -> Any:
    """The state of an optimizer, by the names of its parameters instead of their numbers."""
    named = {names[key] if type(key) is int else key: one for key, one in state["state"].items()}
    groups = [{**one, "params": [names[number] for number in one["params"]]} for one in state["param_groups"]]
    return {**state, "state": named, "param_groups": groups}


def _undivided(leaf: str, tensor: Tensorlike) -> Tensorlike:
    """A tensor without its mesh, where this process is all of that."""
    if is_sharded(tensor) and tensor.device_mesh.size() > 1:
        raise Unsupported(
            f"{leaf} is spread over {tensor.device_mesh.size()} ranks, and this state is collected of one",
            kept="no snapshot was taken, and the state is untouched",
            next="everstep.open(...) on each rank, under torchrun",
        )
    whole: Tensorlike = local(tensor)
    return whole


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


def _gradients(path: str, objects: Mapping[str, object], names: Collection[str], leaves: Leaves) -> Value:
    return {
        name: flatten(f"{path}/gradients/{name}", [one.grad for one in trained(optimizer)], leaves)
        for name, optimizer in optimizers(objects).items()
        if name in names
    }
