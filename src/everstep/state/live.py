"""What live objects hold, as a restore needs to know it, and what only the object itself can be told."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from everstep.errors import Unsupported
from everstep.state import leaves
from everstep.state.objects import is_container, is_stateful, snapshot_of, trained
from everstep.state.sharding import is_sharded, may_be_sharded
from everstep.state.tree import Leaves, flatten, leaf_names


def live_leaves(name: str, value: Any) -> Leaves:
    """The tensors in the state of an object, by their paths."""
    live: Leaves = {}
    flatten(name, snapshot_of(value), live)
    return live


def sharded_leaves(name: str, value: object) -> dict[str, torch.Tensor]:
    """The DTensors in the state of an object, which gets others like them."""
    live: Leaves = {}
    if may_be_sharded() and (is_stateful(value) or is_container(value)):
        # What cannot be stored is not for a restore to refuse.
        with contextlib.suppress(Unsupported):
            flatten(name, snapshot_of(value), live)
    return {path: one for path, one in live.items() if isinstance(one, torch.Tensor) and is_sharded(one)}


def state_places(saved: Any, optimizer: torch.optim.Optimizer) -> dict[str, leaves.Like]:
    """Where an optimizer's own `load_state_dict` puts the state of each parameter: read to there at once, a
    state on a device needs no copy of itself on the host. It lies as its parameter does, for so the optimizer
    has made it (`zeros_like`)."""
    state = saved.get("state")
    places: dict[str, leaves.Like] = {}
    for number, parameter in enumerate(trained(optimizer)):
        kept = state.get(number) if isinstance(state, dict) else None
        for key, value in kept.items() if isinstance(kept, dict) else ():
            if key != "step":
                places.update(dict.fromkeys(leaf_names(value), parameter.detach()))
    return places


def keep_dtypes(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`Optimizer.load_state_dict` casts state to its parameter's dtype, which loses bits of a state that is
    kept in another one: put the tensors back as they were saved."""
    for number, parameter in enumerate(trained(optimizer)):
        for key, saved in state["state"].get(number, {}).items():
            loaded = optimizer.state[parameter].get(key)
            if (
                isinstance(saved, torch.Tensor)
                and isinstance(loaded, torch.Tensor)
                and saved.dtype != loaded.dtype
            ):
                optimizer.state[parameter][key] = saved.to(loaded.device)


def replace_contents(container: Any, state: Any) -> None:
    """Give a dict, list or set the contents of another, in place."""
    container.clear()
    if isinstance(container, list):
        container.extend(state)
    else:
        container.update(state)
