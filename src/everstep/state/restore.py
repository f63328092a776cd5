"""From a snapshot back to a living training state, in place.

First everything is held against the live objects, with nothing touched; then the bytes are read, straight
into the memory of the live tensors where that is possible, so that no second copy of a model is needed.

Of many ranks each brings back what its own objects ask for: of a DTensor its part, whoever has stored that.
As many ranks as have taken the snapshot get all that was each one's own; others what can be made of it, and
a reason why that is not all (`_Restoration.moved`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch

from everstep.errors import Damaged, EverstepError, Mismatch, NotFound
from everstep.format.manifest import CONFIG, OBJECTS, OWN, RUN, Manifest
from everstep.format.values import Leaf, Value
from everstep.state import leaves, rng
from everstep.state.leaves import Fill, stored_leaf
from everstep.state.live import keep_dtypes, live_leaves, replace_contents, sharded_leaves, state_places
from everstep.state.numbering import is_by_name, numbered
from everstep.state.objects import (
    both_names,
    is_container,
    is_stateful,
    module_key,
    optimizer_parameters,
    trained,
)
from everstep.state.sharding import is_sharded, local, sharded_like
from everstep.state.sorts import memory
from everstep.state.tree import Leaves, Tensorlike, dtype_name, join, leaf_names, located, unflatten
from everstep.state.world import World


@dataclass
class Restored:
    """What came back besides the objects, which were changed in place.

    `values` are the plain values handed over by name, as they were. `approximate` says why the result is not
    the state of the snapshot bit for bit; empty: it is.
    """

    progress: dict[str, Any]
    position: Any
    rng: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    approximate: list[str] = field(default_factory=list)


def restore(
    manifest: Manifest,
    fill: Fill,
    objects: Mapping[str, object],
    *,
    strict: bool = True,
    world: World | None = None,
    parts: Sequence[Manifest] = (),
) -> Restored:
    """Bring the objects to the state of a snapshot. The global RNGs are not touched: they are in the result.

    Args:
        manifest: the snapshot's; of several ranks the joined one, whose bytes `fill` reads.
        fill: reads its bytes, verified.
        objects: the live objects, by name (`objects.named`).
        strict: refuse what is missing or surplus; otherwise leave it as it is and say so in `approximate`. Of
            many ranks what is surplus is another's.
        world: the ranks that train together now, and which of them this is.
        parts: of a snapshot of N ranks the manifest of each; what was rank `world.rank` modulo N's own is
            this one's now.

    Raises:
        Mismatch: something does not fit; the message names it, and nothing was touched.
        Damaged: bytes could not be verified; the objects may be partly overwritten.
    """
    return _Restoration(manifest, fill, strict, world=world, parts=parts).run(objects)


def restore_part(
    manifest: Manifest, fill: Fill, objects: Mapping[str, object], *, only: str = "*", strict: bool = True
) -> list[str]:
    """Bring some objects, or some leaves of them, to what a snapshot holds of them; it may hold others too.

    Args:
        manifest: the snapshot's; of several ranks the joined one.
        fill: reads its bytes, verified.
        objects: the live objects, by name (`objects.named`).
        only: a pattern of leaf names (`model/encoder.*`); of anything else than a module either all leaves
            or none are to fit it. What it leaves out stays as it is and is not read.
        strict: refuse what is missing or surplus under the pattern; otherwise leave it as it is.

    Returns:
        What was left as it is because it does not fit, a sentence each; empty where `strict`.

    Raises:
        NotFound: no leaf or object fits the pattern; nothing was touched.
        Mismatch: something does not fit; the message names it, and nothing was touched.
        Damaged: bytes could not be verified; the objects may be partly overwritten.
    """
    restoration = _Restoration(manifest, fill, strict, only)
    restoration.run_part_of(objects)
    return restoration.approximate


def _part(tree: Value, key: str) -> Any:
    if type(tree) is not dict or key not in tree:
        raise Damaged(f"the snapshot's values have no {key!r}")
    return tree[key]


class _Restoration:
    """`only` is the pattern of the leaves that are wanted; None: all, and none may be left over."""

    def __init__(
        self,
        manifest: Manifest,
        fill: Fill,
        strict: bool,
        only: str | None = None,
        *,
        world: World | None = None,
        parts: Sequence[Manifest] = (),
    ) -> None:
        self.manifest = manifest
        self.fill = fill
        self.strict = strict
        self.only = only
        self.world = world or World.alone()
        self.many = not self.world.is_alone
        self.moved = manifest.ranks != self.world.ranks
        """Whether the snapshot is of another number of ranks than there are now."""

        self.whole: dict[str, Value] = _part(manifest.tree, OBJECTS)
        self.parts = parts if len(parts) > 1 else [manifest]
        own = self._part_of(self.world.rank)
        self.own: dict[str, Value] = _part(own.tree, OBJECTS)
        self.run_part: dict[str, Value] = _part(own.tree, RUN)
        self.saved: dict[str, Value] = dict(self.whole)
        self.approximate: list[str] = []
        self.destinations: Leaves = {}
        """Where the bytes of each leaf go."""

        self.fresh: dict[str, leaves.Like] = {}
        """The leaves that get new memory, and like what."""

        self.sharded: dict[str, torch.Tensor] = {}
        """Those that are a rank's own part of a DTensor, and like which they are placed."""

    def run(self, objects: Mapping[str, object]) -> Restored:
        self._choose(objects)
        wanted = self._matched(objects)
        self._check_all(wanted)
        if self.moved:
            self.approximate.insert(0, f"world size {self.manifest.ranks} -> {self.world.ranks}")
        needed = {key: part for key, part in self.run_part.items() if key not in (CONFIG, "gradients")}
        if self.moved:
            needed["rng"] = self._rng()
        for name in leaf_names(needed):
            self._new(name, leaves.CPU)
        self._check_gradients(objects)
        states = self._brought(wanted)
        self._apply_gradients(objects)
        run = unflatten(needed, self._leaf)
        return Restored(
            progress=run["progress"],
            position=run["data"],
            rng=self._own_rng(run["rng"]),
            values={name: states[name] for name, value in wanted.items() if is_plain(value)},
            approximate=self.approximate,
        )

    def _choose(self, objects: Mapping[str, object]) -> None:
        """Whose values count: this rank's own where there are as many ranks as there were. Else those of
        all, but what is neither a module's nor an optimizer's is the business of each rank."""
        if self.own is self.whole:
            return
        for name, own in self.own.items():
            value, whole = objects.get(name), self.whole[name]
            if self.moved and rng.is_generator(value):
                theirs = _part(self._part_of(self._first_alike(name)).tree, OBJECTS)
                self.saved[name] = theirs.get(name, own)
            elif not isinstance(value, torch.nn.Module | torch.optim.Optimizer):
                self.saved[name] = own
            elif not self.moved and type(own) is type(whole) is dict:
                # What only others had, too: stages may be cut elsewhere now.
                self.saved[name] = {**whole, **own}
                if isinstance(value, torch.optim.Optimizer):
                    self.saved[name]["state"] = {**whole.get("state", {}), **own.get("state", {})}

    def _part_of(self, rank: int) -> Manifest:
        """What a rank of this number had; of a new one that of another."""
        return self.parts[rank % len(self.parts)]

    def _first_alike(self, generator: str) -> int:
        """Whose a generator is to be on another number of ranks. Those that are alike now, as in the ranks of
        a tensor-parallel group, have to stay so; those that are not are not to draw the same."""
        return self.world.alike.get(generator, self.world.rank)

    def _is_new(self, rank: int) -> bool:
        """Whether there was no rank of this number: what it has of another's would be drawn twice."""
        return self.moved and rank >= self.manifest.ranks

    def _rng(self) -> dict[str, Any]:
        """The values of the global generators, each of the rank whose it is to be."""
        states: dict[str, Any] = {}
        for kind, own in _part(self.run_part, "rng").items():
            theirs = _part(_part(self._part_of(self._first_alike(f"{RUN}/{kind}")).tree, RUN), "rng")
            states[kind] = theirs.get(kind, own)
        return states

    def _own_rng(self, states: Mapping[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for kind, state in states.items():
            rank = self._first_alike(f"{RUN}/{kind}")
            made.update(rng.derived({kind: state}, rank) if self._is_new(rank) else {kind: state})
        return made

    def run_part_of(self, objects: Mapping[str, object]) -> None:
        wanted = {name: value for name, value in self._matched(objects).items() if self._takes(name, value)}
        if not wanted and not self.approximate:
            names = [*(leaf for name in objects for leaf in leaf_names(self.saved[name])), *objects]
            raise NotFound(
                f"nothing of {', '.join(objects) or 'no objects'} has a name that fits {self.only!r}",
                kept="nothing was touched",
                next=f"a pattern of names such as {names[0]!r}" if names else "name the objects to read into",
            )
        self._check_all(wanted)
        self._brought(wanted)

    def _check_all(self, objects: Mapping[str, object]) -> None:
        self._check_parameters(objects)
        for name, value in objects.items():
            self._check(name, value)

    def _brought(self, objects: Mapping[str, object]) -> dict[str, object]:
        """Read everything, and give the objects their states; returns those of plain values."""
        stored = {name: stored_leaf(self.manifest, name) for name in self.fresh}
        self.destinations.update(leaves.new(stored, self.fresh))
        leaves.read(self.manifest, self.fill, self.destinations, rank=self.world.rank if self.many else None)
        return {name: self._apply(name, value) for name, value in objects.items()}

    # -- checks, with nothing touched ---------------------------------------------------------------------

    def _matched(self, objects: Mapping[str, object]) -> dict[str, object]:
        """The objects that are in the snapshot too."""
        missing = [name for name in objects if name not in self.saved]
        surplus = [name for name in (self.whole if self.moved else self.own) if name not in objects]
        self._lacks(
            "the snapshot has no {}", missing, "hand over the objects it has: " + ", ".join(self.saved)
        )
        if self.only is None:
            self._lacks(
                "the snapshot holds {}, which is not given",
                surplus,
                f"everstep.open(..., {surplus[0]}=...)" if surplus else "",
            )
        return {name: value for name, value in objects.items() if name in self.saved}

    def _wants(self, leaf: str) -> bool:
        return self.only is None or fnmatchcase(leaf, self.only)

    def _takes(self, name: str, value: object) -> bool:
        """Whether the pattern means something of an object."""
        if is_plain(value):
            raise Mismatch(
                f"{name} is a {type(value).__name__}, which cannot be changed in place",
                kept="nothing was touched",
                next=f"take it from the snapshot: .state({name!r})",
            )
        held = [path for path, _ in located(name, self.saved[name])]
        taken = [path for path in held if self._wants(path)]
        if isinstance(value, torch.nn.Module):
            extras = [join(name, module_key(key)) for key in value.state_dict()]
            return any(map(self._wants, (*taken, *live_leaves(name, value), *extras)))
        if taken and len(taken) < len(held):
            raise Mismatch(
                f"{self.only!r} fits {len(taken)} of the {len(held)} leaves of {name}; only a module can be "
                "restored in part",
                kept="nothing was touched",
                next=f"a pattern that takes all of {name}, or none of it",
            )
        return bool(taken) if held else self._wants(name)

    def _lacks(self, sentence: str, names: list[str], next: str) -> None:
        if not names:
            return
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        problem = sentence.format(shown)
        if self.strict:
            raise Mismatch(
                problem, kept="nothing was touched", next=f"{next}, or strict=False to go on without"
            )
        self.approximate.append(problem)

    def _check_parameters(self, objects: Mapping[str, object]) -> None:
        """Optimizer state is by number: the order of the parameters must be the one it was saved in. Where
        it is by name, of many ranks, or is to be, it gets the numbers that it has here."""
        saved = self.run_part.get("parameters")
        for name, live in optimizer_parameters(objects).items():
            before = saved.get(name, live) if type(saved) is dict else live
            if self.many or is_by_name(self.saved[name]):
                self._check_groups(name)
                self._number(name, objects, before)
                continue
            for number, (was, now) in enumerate(zip(before, live, strict=False)):
                if was and now and was != now:
                    raise Mismatch(
                        f"parameter {number} of {name} is {now}, in the snapshot it is {was}",
                        kept="nothing was touched",
                        next="give the optimizer its parameters in the order of the snapshot",
                    )

    def _number(self, name: str, objects: Mapping[str, object], before: Any) -> None:
        found = numbered(name, self.saved[name], before, both_names(objects)[name])
        fix = "build the optimizer that the snapshot was taken of"
        self._lacks(f"{name} has parameters of which the snapshot has nothing: {{}}", [*found.missing], fix)
        if not self.many:
            self._lacks(
                f"the snapshot's {name} has parameters that are not here: {{}}", [*found.surplus], fix
            )
        self.saved[name] = found.tree

    def _check_groups(self, name: str) -> None:
        saved = self.saved[name]
        if type(saved) is not dict or type(saved.get("param_groups")) is not list:
            raise Mismatch(f"{name} is an optimizer, in the snapshot it is none", kept="nothing was touched")
        if type(saved.get("state")) is not dict:
            raise Damaged(f"the snapshot's values have no state of {name}")

    def _check(self, name: str, value: object) -> None:
        if isinstance(value, torch.nn.Module):
            self._check_module(name, value)
        elif isinstance(value, torch.optim.Optimizer):
            self._check_optimizer(name, value)
        elif isinstance(value, torch.Tensor | np.ndarray) and type(self.saved[name]) is Leaf:
            if self._fits(name, self.saved[name].name, value):
                self._into(self.saved[name].name, value)
        else:
            if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
                self._check_keys(name, value)
            self._check_kind(name, value)
            likes = sharded_leaves(name, value)
            for path, leaf in located(name, self.saved[name]):
                self._new_like(leaf, likes.get(path, leaves.CPU))

    def _check_module(self, name: str, module: torch.nn.Module) -> None:
        live = {path: one for path, one in live_leaves(name, module).items() if self._wants(path)}
        saved = {path: leaf for path, leaf in located(name, self.saved[name]) if self._wants(path)}
        fix = "build the model that the snapshot was taken of"
        # What shares its memory with a leaf that is there comes back with it (tied weights): not all who
        # write states write both names.
        held = {memory(local(live[path])) for path in saved if path in live} - {None}
        missing = [path for path in live if path not in saved and memory(local(live[path])) not in held]
        self._lacks("the snapshot has no leaf {}", missing, fix)
        if not self.many:
            self._lacks(
                "the snapshot holds {}, which the model has not",
                [path for path in saved if path not in live],
                fix,
            )
        trained = {join(name, module_key(key)) for key, _ in module.named_parameters(remove_duplicate=False)}
        self._refuse_own({path: leaf for path, leaf in saved.items() if path in trained})
        for path, leaf in saved.items():
            if path in live and self._fits(path, leaf, live[path]):
                self._into(leaf, live[path])

    def _refuse_own(self, saved: Mapping[str, str]) -> None:
        """What each rank trained for itself cannot be given to another number of ranks."""
        self._lacks(
            "{} was not the same on all ranks",
            [path for path, leaf in saved.items() if self.moved and leaf.startswith(OWN)],
            f"start on {self.manifest.ranks} ranks, as the snapshot was taken",
        )

    def _fits(self, path: str, leaf: str, tensor: Tensorlike) -> bool:
        stored = stored_leaf(self.manifest, leaf)
        for what, was, now in (
            ("shape", stored.shape, _shape(leaf, tensor)),
            ("dtype", stored.dtype, dtype_name(tensor)),
        ):
            if was != now:
                self._lacks(
                    f"{{}} has {what} {_shown(now)}, in the snapshot {_shown(was)}",
                    [path],
                    "build the same model",
                )
                return False
        return True

    def _into(self, leaf: str, tensor: Tensorlike) -> None:
        """Read a leaf into a live tensor: what was a rank's own into its own part of that."""
        self.destinations[leaf] = local(tensor) if leaf.startswith(OWN) else tensor

    def _check_optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        """Its state need not be there yet (it comes with the first step), its groups must fit."""
        saved = self.saved[name]
        groups = saved.get("param_groups") if type(saved) is dict else None
        if type(groups) is not list:
            raise Mismatch(f"{name} is an optimizer, in the snapshot it is none", kept="nothing was touched")
        sizes = [len(group.get("params", ())) for group in groups]
        here = [len(group["params"]) for group in optimizer.param_groups]
        if sizes != here:
            raise Mismatch(
                f"{name} has groups of {here} parameters, in the snapshot of {sizes}",
                kept="nothing was touched",
                next="build the optimizer that the snapshot was taken of",
            )
        live = live_leaves(name, optimizer)
        places = state_places(saved, optimizer)
        states = join(name, "state") + "/"
        held = dict(located(name, saved))
        self._refuse_own({path: leaf for path, leaf in held.items() if path.startswith(states)})
        for path, leaf in held.items():
            there, stored = live.get(path), stored_leaf(self.manifest, leaf)
            same = isinstance(there, torch.Tensor) and (
                _shape(leaf, there) == stored.shape and dtype_name(there) == stored.dtype
            )
            if same and there is not None:
                # Its own memory: the optimizer is handed the very tensor.
                self.sharded.update({leaf: there} if leaf.startswith(OWN) and is_sharded(there) else {})
                self._into(leaf, there)
            else:
                self._new_like(leaf, places.get(leaf, leaves.CPU))

    def _check_keys(self, name: str, scheduler: Any) -> None:
        """A scheduler takes any state without a word: hold the names of its fields against it."""
        saved = self.saved[name]
        live = {key for key in scheduler.state_dict() if not key.startswith("_")}
        there = {key for key in saved if not str(key).startswith("_")} if type(saved) is dict else set()
        different = sorted(live ^ there)
        if different:
            problem = f"{name} is a {type(scheduler).__name__}, which differs from the snapshot's in {{}}"
            self._lacks(problem, different, "build the scheduler that the snapshot was taken of")

    def _check_kind(self, name: str, value: object) -> None:
        saved = self.saved[name]
        if is_container(value) and type(saved) is not type(value):
            raise Mismatch(
                f"{name} is a {type(value).__name__}, in the snapshot a {type(saved).__name__}",
                kept="nothing was touched",
                next="hand over what the snapshot was taken of",
            )

    # -- reading ------------------------------------------------------------------------------------------

    def _new(self, name: str, like: leaves.Like) -> None:
        """New memory for a leaf that has no live tensor to go to."""
        stored_leaf(self.manifest, name)
        self.fresh[name] = like

    def _new_like(self, name: str, like: leaves.Like) -> None:
        """New memory for a leaf; where what it is like is a DTensor it is one, too."""
        if is_sharded(like) and name.startswith(OWN) and self._is_local(name, like):
            self.sharded[name] = like
            like = local(like)
        self._new(name, like)

    def _is_local(self, name: str, like: torch.Tensor) -> bool:
        return stored_leaf(self.manifest, name).shape == tuple(local(like).shape)

    def _leaf(self, name: str) -> Tensorlike:
        tensor = self.destinations[name]
        like = self.sharded.get(name)
        if like is None or not isinstance(tensor, torch.Tensor) or not is_sharded(like):
            return tensor
        return sharded_like(tensor, like)

    # -- handing over -------------------------------------------------------------------------------------

    def _apply(self, name: str, value: object) -> object:
        """Give an object its state; returns the state of a plain value."""
        saved = self.saved[name]
        if isinstance(value, torch.nn.Module):
            self._apply_module(name, value)
            return None
        state = unflatten(saved, self._leaf)
        try:
            if isinstance(value, torch.optim.Optimizer):
                value.load_state_dict(state)
                keep_dtypes(value, state)
            elif is_stateful(value):
                value.load_state_dict(state)  # type: ignore[attr-defined]
            elif rng.is_generator(value):
                rng.set_generator_state(value, state)
                if self._is_new(rank := self._first_alike(name)):
                    rng.reseed(value, state, rank)
            elif is_container(value):
                replace_contents(value, state)
        except EverstepError:
            raise
        except Exception as error:
            raise Mismatch(
                f"{name} ({type(value).__name__}) refused the state of the snapshot: {error}",
                kept="the snapshot is intact; the objects in memory are partly overwritten, do not train on",
                next="build the objects that the snapshot was taken of, and start again",
            ) from error
        return state

    def _apply_module(self, name: str, module: torch.nn.Module) -> None:
        """Its tensors were filled in place; what a module keeps besides them goes through the module."""
        saved = self.saved[name]
        live = module.state_dict()
        extras = {
            key: unflatten(saved[module_key(key)], self._leaf)
            for key, item in live.items()
            if not isinstance(item, torch.Tensor) and self._has_all(name, module_key(key), saved)
        }
        if extras:
            module.load_state_dict({**live, **extras})

    def _has_all(self, name: str, key: str, saved: Any) -> bool:
        """Whether something a module keeps besides tensors is in the snapshot and wanted."""
        if key not in saved:
            return False
        held = list(leaf_names(saved[key]))
        return all(leaf in self.destinations for leaf in held) if held else self._wants(join(name, key))

    def _check_gradients(self, objects: Mapping[str, object]) -> None:
        """Gradients go where their parameters are, and lie as these do."""
        saved = self.run_part.get("gradients")
        for name, gradients in saved.items() if type(saved) is dict else ():
            optimizer = objects.get(name)
            if not isinstance(optimizer, torch.optim.Optimizer):
                continue
            if self.moved:
                # A rank's share of a sum over ranks, by numbers that others need not have.
                self.approximate.append(f"the gradients that {name} had accumulated are dropped")
                continue
            for parameter, leaf in zip(trained(optimizer), gradients, strict=False):
                for one in leaf_names(leaf):
                    self._new_like(one, parameter.detach())

    def _apply_gradients(self, objects: Mapping[str, object]) -> None:
        saved = self.run_part.get("gradients")
        for name, gradients in saved.items() if type(saved) is dict else ():
            optimizer = objects.get(name)
            if isinstance(optimizer, torch.optim.Optimizer) and not self.moved:
                restored = unflatten(gradients, self._leaf)
                for parameter, gradient in zip(trained(optimizer), restored, strict=True):
                    parameter.grad = None if gradient is None else gradient.to(parameter.device)


def _shape(leaf: str, tensor: Tensorlike) -> tuple[int, ...]:
    """That which a leaf must have to be read into a tensor."""
    return tuple((local(tensor) if leaf.startswith(OWN) else tensor).shape)


def is_plain(value: object) -> bool:
    """Whether it cannot be restored in place: it comes back as a value."""
    special = is_stateful(value) or rng.is_generator(value) or is_container(value)
    return not special and not isinstance(value, torch.Tensor | np.ndarray)


def _shown(fact: object) -> str:
    return str(list(fact)) if isinstance(fact, tuple) else str(fact)
