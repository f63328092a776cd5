"""What a user may hand over by name, sorted by how it is captured and restored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch

from everstep.errors import Mismatch
from everstep.format.manifest import RUN
from everstep.state import rng


def is_stateful(value: object) -> bool:
    """Whether it has both `state_dict` and `load_state_dict`."""
    return all(callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict"))


def snapshot_of(value: object) -> object:
    """The plain state of one object: its `state_dict()`, a generator's state, or the value itself."""
    if isinstance(value, torch.nn.Module):
        return {module_key(key): item for key, item in value.state_dict().items()}
    if is_stateful(value):
        return value.state_dict()  # type: ignore[attr-defined]
    if rng.is_generator(value):
        return rng.generator_state(value)
    return value


def is_container(value: object) -> bool:
    """Whether it is restored by changing its contents."""
    return type(value) in (dict, list, set)


def unwrapped(value: object) -> object:
    """A module without what `torch.compile`, DataParallel or DDP put around it: its names stay the same."""
    *_, inmost = _wrapped(value)
    return inmost


def _wrapped(value: object) -> Iterator[object]:
    """A module, and what is in it, from the outside in; another value alone."""
    yield value
    while isinstance(value, torch.nn.Module):
        inner = getattr(value, "_orig_mod", None)
        if inner is None and isinstance(
            value, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel
        ):
            inner = value.module
        if inner is None:
            return
        value = inner
        yield value


def summed_anew(objects: Mapping[str, object]) -> list[str]:
    """Which of the objects are under a DDP that sums gradients in another order in the first step after a
    start than later: it lays them out anew by the order in which they came (`_rebuild_buckets` in torch's
    reducer). Of two ranks the sum is the same all the same, of more it is rounded otherwise.
    """
    return [
        name
        for name, value in objects.items()
        for item in _items(value).values() or [value]
        for one in _wrapped(item)
        if isinstance(one, torch.nn.parallel.DistributedDataParallel)
        and not one.find_unused_parameters
        and not getattr(one, "_has_rebuilt_buckets", False)
    ]


def named(objects: Mapping[str, object]) -> dict[str, object]:
    """The objects by name; a list, tuple or dict of stateful ones is taken apart (`optimizers/0`).

    Raises:
        Mismatch: a name is Everstep's own, or an object is None.
    """
    found: dict[str, object] = {}
    for name, value in objects.items():
        if name == RUN:
            raise Mismatch(
                f"{name!r} is a name of Everstep's own", kept="nothing was touched", next="another name"
            )
        found.update(_apart(name, value))
    return found


def _apart(name: str, value: object) -> Iterator[tuple[str, object]]:
    items = _items(value)
    if items:
        for key, item in items.items():
            yield f"{name}/{key}", unwrapped(item)
    else:
        yield name, unwrapped(value)


def _items(value: object) -> dict[Any, object]:
    """Of a list, tuple or dict of stateful objects these; of anything else nothing."""
    items: dict[Any, object] = {}
    if type(value) in (list, tuple):
        assert isinstance(value, list | tuple)
        items = dict(enumerate(value))
    elif type(value) is dict:
        items = value
    return items if all(is_stateful(item) for item in items.values()) else {}


def optimizers(objects: Mapping[str, object]) -> dict[str, torch.optim.Optimizer]:
    return {name: value for name, value in objects.items() if isinstance(value, torch.optim.Optimizer)}


def modules(objects: Mapping[str, object]) -> dict[str, torch.nn.Module]:
    return {name: value for name, value in objects.items() if isinstance(value, torch.nn.Module)}


def parameter_names(objects: Mapping[str, object]) -> dict[int, str]:
    """The names of the modules' parameters by `id`."""
    return {
        id(parameter): f"{module_name}.{name}"
        for module_name, module in modules(objects).items()
        for name, parameter in module.named_parameters()
    }


def module_key(key: str) -> str:
    """A name in a module's state without the traces of `torch.compile` on its parts."""
    return key.replace("_orig_mod.", "")


def trained(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The parameters of an optimizer, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_parameters(objects: Mapping[str, object]) -> dict[str, list[str]]:
    """The names of each optimizer's parameters in its own order, as far as modules handed over have them."""
    names = parameter_names(objects)
    return {
        name: [names.get(id(one), "") for one in trained(optimizer)]
        for name, optimizer in optimizers(objects).items()
    }


def both_names(objects: Mapping[str, object]) -> dict[str, list[list[tuple[str, str]]]]:
    """Of each group of each optimizer the names of its parameters: in their module, and with the module's
    name before it. Both are empty for a parameter that no module has."""
    names: dict[int, tuple[str, str]] = {}
    for module_name, module in modules(objects).items():
        for name, parameter in module.named_parameters():
            key = module_key(name)
            names.setdefault(id(parameter), (key, f"{module_name}.{key}"))
    return {
        name: [[names.get(id(one), ("", "")) for one in group["params"]] for group in optimizer.param_groups]
        for name, optimizer in optimizers(objects).items()
    }


def state_names(objects: Mapping[str, object]) -> dict[str, list[str | int]]:
    """By what the state of each optimizer's parameters is kept where there are many ranks, which need not
    have the same numbers of them: the parameter's name in its module where that is unambiguous among all
    modules, else with the module's own name before it; its number where no module has it."""
    count = Counter(
        module_key(name) for module in modules(objects).values() for name, _ in module.named_parameters()
    )
    return {
        name: [
            (short if count[short] == 1 else full) or number
            for number, (short, full) in enumerate(chain.from_iterable(groups))
        ]
        for name, groups in both_names(objects).items()
    }
