"""What modules and torch's optimizers told of their state, to be told again without asking them.

A `state_dict` runs through thousands of lines of Python to say what it said at the last snapshot: the same
tensors under the same names. Here it is held against what the object consists of now, by loops that run in C,
and is told again only if that is the same: all containers, names and tensors, and where the tensors' memory
is. An object with a `state_dict` of its own, or with hooks in torch's, cannot be known so and is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain, repeat
from operator import attrgetter, contains, is_, itemgetter
from typing import Any, Protocol

import torch

from everstep.format.values import Value
from everstep.state.sharding import is_sharded
from everstep.state.tree import PLAIN_TENSORS, Leaves, flatten, join

_CONTAINERS = attrgetter("_parameters", "_buffers", "_modules")
_HOOKS = attrgetter("_state_dict_hooks", "_state_dict_pre_hooks")
_NOT_KEPT = attrgetter("_non_persistent_buffers_set")
_OWN = ("state_dict", "_save_to_state_dict", "get_extra_state")
_LIES: tuple[Callable[[Any], object], ...] = (
    torch.Tensor.data_ptr,
    torch.Tensor.size,
    torch.Tensor.stride,
    torch.Tensor.is_conj,
    torch.Tensor.is_neg,
    attrgetter("dtype", "device", "layout"),
)
_NEEDS_GRAD = attrgetter("requires_grad")
_LOCAL = attrgetter("_local_tensor")
_SPEC = attrgetter("_spec")
_HARMLESS_HOOKS = "torch.distributed.fsdp."
"""Hooks of these modules only bring parameters back that were gathered from other ranks: while they are
gathered, a module holds others."""


class Remembered(Protocol):
    """What one object told."""

    @property
    def of(self) -> object:
        """The object."""

    @property
    def lasting(self) -> Leaves:
        """The leaves that are the same tensors as long as `is_still`."""

    def is_still(self) -> bool:
        """Whether the object would tell the same, but for the contents of its tensors."""

    def tell(self, leaves: Leaves) -> Value:
        """The object's tree; its leaves are put into `leaves`."""


def remembered(name: str, of: object, tree: Value, leaves: Leaves) -> Remembered | None:
    """Remember what an object has just told; None where it can tell something else without a trace.

    Args:
        tree, leaves: what `flatten` made of its `state_dict()`.
    """
    if isinstance(of, torch.nn.Module):
        return _OfModule(of, tree, leaves) if _OfModule.knows(of) else None
    if isinstance(of, torch.optim.Optimizer):
        return _OfOptimizer(name, of, tree, leaves) if _OfOptimizer.knows(of) else None
    return None


class _OfModule:
    def __init__(self, of: torch.nn.Module, tree: Value, leaves: Leaves) -> None:
        self.of: object = of
        self.lasting = leaves
        self._tree = tree
        self._parts = list(of.modules())
        self._containers = list(chain.from_iterable(map(_CONTAINERS, self._parts)))
        self._contents = _Contents(self._containers)
        self._kinds, self._not_kept = self._facts()

    @classmethod
    def knows(cls, module: torch.nn.Module) -> bool:
        parts = list(module.modules())
        plain = torch.nn.Module
        return (
            all(getattr(type(part), name) is getattr(plain, name) for part in parts for name in _OWN)
            and not _is_told_otherwise(parts)
            and all(isinstance(one, dict) for part in parts for one in _CONTAINERS(part))
            and _are_plain(value for part in parts for value in part._parameters.values())
            and _are_plain(value for part in parts for value in part._buffers.values())
        )

    def is_still(self) -> bool:
        return (
            not _is_told_otherwise(self._parts)
            and _all_same(chain.from_iterable(map(_CONTAINERS, self._parts)), self._containers)
            and self._facts() == (self._kinds, self._not_kept)
            and self._contents.are_still(self._containers)
        )

    def tell(self, leaves: Leaves) -> Value:
        leaves.update(self.lasting)
        return self._tree

    def _facts(self) -> tuple[list[type], list[frozenset[str]]]:
        return list(map(type, self._parts)), list(map(frozenset, map(_NOT_KEPT, self._parts)))


class _OfOptimizer:
    """The state of the parameters lasts; the groups are looked at each time."""

    def __init__(self, name: str, of: torch.optim.Optimizer, tree: Any, leaves: Leaves) -> None:
        self.of: object = of
        self._optimizer = of
        state = join(name, "state") + "/"
        self.lasting = {leaf: tensor for leaf, tensor in leaves.items() if leaf.startswith(state)}
        self._state = tree["state"]
        self._groups = join(name, "param_groups")
        self._numbers = [group["params"] for group in tree["param_groups"]]
        self._sizes = self._sizes_of_groups()
        self._held = self._holds()
        self._contents = _Contents(list(of.state.values()))

    @classmethod
    def knows(cls, optimizer: torch.optim.Optimizer) -> bool:
        return (
            type(optimizer).state_dict is torch.optim.Optimizer.state_dict
            and not cls._is_told_otherwise(optimizer)
            and all(isinstance(one, dict) for one in optimizer.state.values())
            and _are_plain(optimizer.state)
            and _are_plain(value for one in optimizer.state.values() for value in one.values())
        )

    @staticmethod
    def _is_told_otherwise(optimizer: torch.optim.Optimizer) -> bool:
        hooks = optimizer._optimizer_state_dict_pre_hooks or optimizer._optimizer_state_dict_post_hooks
        return bool(hooks) or "state_dict" in vars(optimizer)

    def is_still(self) -> bool:
        return (
            not self._is_told_otherwise(self._optimizer)
            and self._sizes_of_groups() == self._sizes
            and _all_same(self._holds(), self._held)
            and self._contents.are_still(list(self._optimizer.state.values()))
        )

    def tell(self, leaves: Leaves) -> Value:
        leaves.update(self.lasting)
        groups = [
            {**{key: value for key, value in group.items() if key != "params"}, "params": numbers}
            for group, numbers in zip(self._optimizer.param_groups, self._numbers, strict=True)
        ]
        return {"state": self._state, "param_groups": flatten(self._groups, groups, leaves)}

    def _sizes_of_groups(self) -> list[int]:
        return [len(group["params"]) for group in self._optimizer.param_groups]

    def _holds(self) -> list[object]:
        """Its parameters, and those that have a state with the containers of it."""
        trained = chain.from_iterable(map(itemgetter("params"), self._optimizer.param_groups))
        return [*trained, *self._optimizer.state, *self._optimizer.state.values()]


class _Contents:
    """What some containers, dicts of tensors and plain values, held, and where their tensors' memory was."""

    def __init__(self, containers: list[dict[Any, Any]]) -> None:
        self._names = list(chain.from_iterable(containers))
        self._sizes = list(map(len, containers))
        self._values = list(chain.from_iterable(map(dict.values, containers)))
        self._tensors = [one for one in self._values if isinstance(one, torch.Tensor)]
        self._needs = list(map(_NEEDS_GRAD, self._tensors))
        self._sharded = [one for one in self._tensors if is_sharded(one)]
        self._specs = list(map(_SPEC, self._sharded))
        self._locals: list[Any] = list(map(_LOCAL, self._sharded))
        self._memories = [*self._locals, *(one for one in self._tensors if not is_sharded(one))]
        self._lie = _lie(self._memories)

    def are_still(self, containers: list[dict[Any, Any]]) -> bool:
        """Whether the same containers hold the same now."""
        return (
            list(map(len, containers)) == self._sizes
            and list(chain.from_iterable(containers)) == self._names
            and _all_same(chain.from_iterable(map(dict.values, containers)), self._values)
            and list(map(_NEEDS_GRAD, self._tensors)) == self._needs
            and _all_same(map(_SPEC, self._sharded), self._specs)
            and _all_same(map(_LOCAL, self._sharded), self._locals)
            and _lie(self._memories) == self._lie
        )


def _is_told_otherwise(parts: list[torch.nn.Module]) -> bool:
    """Whether something was put between a module and torch's own way to tell its state."""
    hooks = list(chain.from_iterable(map(_HOOKS, parts)))
    hooked = any(hooks) and not all(_is_harmless(hook) for some in hooks for hook in some.values())
    return hooked or any(any(map(contains, map(vars, parts), repeat(name))) for name in _OWN)


def _is_harmless(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_HARMLESS_HOOKS)


def _are_plain(values: Iterable[object]) -> bool:
    """Whether all are tensors with a memory of their own, or values that cannot change."""
    return all(
        type(value) in (*PLAIN_TENSORS, type(None), bool, int, float) or is_sharded(value) for value in values
    )


def _all_same(some: Iterable[object], others: list[object]) -> bool:
    found = list(some)
    return len(found) == len(others) and all(map(is_, found, others))


def _lie(tensors: list[torch.Tensor]) -> list[object]:
    """Where the tensors' memory is, and how it is seen. An address can be no other memory's as long as the
    leaf that was made of it is held."""
    return [list(map(fact, tensors)) for fact in _LIES]
