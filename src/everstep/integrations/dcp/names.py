"""From the keys of torch.distributed.checkpoint to a snapshot's tree and leaves, and back.

It names what it stores by the path of keys, joined by dots (`model.0.weight`), and keeps the path beside it.
A snapshot's tree has the path as it is, and a leaf is named by it as everywhere: `model/0.weight`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from everstep.errors import Unsupported
from everstep.format.values import Leaf, Value
from everstep.state.tree import join

Path: TypeAlias = tuple[str | int, ...]
"""Keys of mappings are text, whatever they were; numbers are places in lists."""

IsTensor: TypeAlias = Callable[[Leaf], bool]


def leaf_name(path: Path) -> str:
    """The name of the leaf at a path."""
    name = ""
    for part in path:
        name = join(name, part)
    return name


def key_of(path: Path) -> str:
    """What torch.distributed.checkpoint calls what is at a path."""
    return ".".join(map(str, path))


def place(tree: dict[str, Value], path: Path, value: Value) -> None:
    """Put a value where its path leads to, making dicts and lists on the way.

    Raises:
        Unsupported: something else is in the way.
    """
    here: Any = tree
    for part, following in itertools.pairwise(path):
        made: Value = [] if type(following) is int else {}
        here = _entered(here, part, made, path)
    _entered(here, path[-1], value, path)


def _entered(here: Any, part: str | int, made: Value, path: Path) -> Value:
    """What is under one key; `made`, where nothing is there yet."""
    if type(part) is int and type(here) is list:
        here.extend([None] * (part + 1 - len(here)))
        if here[part] is None:
            here[part] = made
        return here[part]
    if type(here) is dict:
        return here.setdefault(part, made)
    raise Unsupported(
        f"{key_of(path)} cannot be stored: another value has a beginning of its name",
        kept="no snapshot was taken",
        next="give one of them another name",
    )


def number(tree: Value) -> None:
    """Give the states of optimizers back the numbers that planners made texts of, in place: that is how
    `load_state_dict` knows its parameters. States by name, as `get_optimizer_state_dict` has them, stay."""
    if type(tree) is dict:
        state = tree.get("state")
        is_of_optimizer = type(tree.get("param_groups")) is list
        if is_of_optimizer and type(state) is dict and all(map(_is_number, state)):
            tree["state"] = {int(key): value for key, value in state.items()}
        for value in tree.values():
            number(value)


def _is_number(key: Value) -> bool:
    return type(key) is str and key.isascii() and key.isdigit()


def items(tree: Value, *, flattened: bool, is_tensor: IsTensor) -> Iterator[tuple[Path, Value]]:
    """What a tree consists of for torch.distributed.checkpoint, each with its path: tensors, and values that
    hold none in a dict or list of theirs (the same that its planners look for when they save).

    Args:
        flattened: whether dicts and lists are looked into; else what is under the outermost keys.
        is_tensor: whether a leaf is a tensor to it; what is not, such as an array, is a value.
    """
    if type(tree) is not dict:
        return
    for key, value in tree.items():
        if flattened:
            yield from _below((str(key),), value, is_tensor)
        else:
            yield (str(key),), value


def _below(path: Path, value: Value, is_tensor: IsTensor) -> Iterator[tuple[Path, Value]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _below((*path, str(key)), item, is_tensor)
    elif type(value) is list and _is_looked_into(value, is_tensor):
        for number, item in enumerate(value):
            yield from _below((*path, number), item, is_tensor)
    else:
        yield path, value


def _is_looked_into(value: Value, is_tensor: IsTensor) -> bool:
    if isinstance(value, Mapping):
        return True
    if type(value) is list:
        return any(_is_looked_into(item, is_tensor) for item in value)
    return type(value) is Leaf and is_tensor(value)
