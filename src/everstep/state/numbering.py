"""The state of an optimizer by the numbers of its parameters, as torch has it, out of one by names.

Of many ranks each has its own parameters, so that a number means nothing to another; of one rank the state
is kept as torch tells it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from everstep.errors import Mismatch
from everstep.format.values import Value


@dataclass(frozen=True)
class Numbered:
    """A state by the numbers of some parameters.

    Attributes:
        tree: its values tree.
        missing: names of parameters of which nothing is known there.
        surplus: those that are known there, and are not among them.
    """

    tree: Value
    missing: Sequence[str] = ()
    surplus: Sequence[str] = field(default=())


def is_by_name(saved: Any) -> bool:
    """Whether a state is kept by names."""
    groups = saved.get("param_groups") if type(saved) is dict else None
    return type(groups) is list and any(
        type(key) is str for group in groups if type(group) is dict for key in group.get("params", ())
    )


def by_order(saved: Any) -> Value:
    """A state by names, with the numbers that the order of its groups gives them."""
    names = [key for group in saved["param_groups"] for key in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    groups = [
        {**group, "params": [numbers[key] for key in group["params"]]} for group in saved["param_groups"]
    ]
    state = {numbers.get(key, key): one for key, one in saved["state"].items()}
    return {**saved, "state": state, "param_groups": groups}


def numbered(
    name: str, saved: Any, of_numbers: Sequence[str], live: Sequence[Sequence[tuple[str, str]]]
) -> Numbered:
    """The state of an optimizer by the numbers of its parameters.

    Args:
        name: the optimizer's.
        saved: the values tree of a state, by names or by numbers.
        of_numbers: what the parameters with these numbers are called, with the module's name; "" where it
            is not known.
        live: of each group of the optimizer, its parameters: their names in their modules, and these with the
            module's name. Both are "" for one that no module has.

    Raises:
        Mismatch: the groups do not fit each other; nothing was touched.
    """
    groups = saved["param_groups"]
    keys = _keys(saved, of_numbers)
    group_of = {key: number for number, group in enumerate(groups) for key in group["params"]}
    number = 0
    state: dict[int, Value] = {}
    made, missing, used = [], [], set()
    for index, parameters in enumerate(live):
        found: set[int] = set()
        first = number
        for short, full in parameters:
            nameless = not full or (number < len(of_numbers) and not of_numbers[number])
            key = keys.get(full, keys.get(short, number if nameless else None))
            if key in saved["state"]:
                state[number] = saved["state"][key]
            elif key not in group_of and saved["state"]:
                missing.append(full or f"number {number}")
            found.update({group_of[key]} if key in group_of else ())
            used.add(key)
            number += 1
        if len(found) > 1 or (not found and index >= len(groups)):
            raise Mismatch(
                f"group {index} of {name} has parameters of {len(found)} groups of the snapshot",
                kept="nothing was touched",
                next="build the optimizer that the snapshot was taken of",
            )
        of = groups[next(iter(found), index)]
        made.append({**of, "params": list(range(first, number))})
    left = [str(key) for key in {*group_of, *saved["state"]} - used]
    return Numbered({**saved, "state": state, "param_groups": made}, missing, sorted(left))


def _keys(saved: Any, of_numbers: Sequence[str]) -> Mapping[str, object]:
    """The keys of a state by all names that its parameters may have."""
    found: dict[str, object] = {}
    every = {*saved["state"], *(key for group in saved["param_groups"] for key in group["params"])}
    short: dict[str, list[object]] = {}
    for key in every:
        if type(key) is str:
            found[key] = key
        elif type(key) is int and key < len(of_numbers) and of_numbers[key]:
            found[of_numbers[key]] = key
            short.setdefault(of_numbers[key].partition(".")[2], []).append(key)
    for name, keys in short.items():
        if len(keys) == 1:
            found.setdefault(name, keys[0])
    return found
