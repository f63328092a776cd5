"""What a script hands over besides the state, as texts to hold against those of the next start: what its
optimizers are set to, how large its loader is, how much of its models is frozen; and its own configuration.

The facts are recorded in a snapshot's environment, under the name of the object and a dot.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch

from everstep.chain.drift import CLASSES, Drift, config_drift, drift
from everstep.errors import Unsupported
from everstep.events import Drifted
from everstep.format.manifest import CONFIG, RUN, Manifest
from everstep.format.values import Value
from everstep.state.data import Track
from everstep.state.objects import modules, optimizers
from everstep.state.tree import Leaves, flatten

MOST_FACTS = 64
"""So many are recorded: a script may have an optimizer for each parameter."""

_MOST_CHARACTERS = 200
_NOT_SETTINGS = ("params", "initial_lr")
_DATA = "data"
_FROZEN = "frozen"


def given(objects: Mapping[str, object], track: Track | None) -> dict[str, str]:
    """The facts as the script has them now: to be asked before anything is restored. Draws from no generator
    and waits for no accelerator."""
    facts: dict[str, str] = {}
    if track is not None:
        facts.update({f"{_DATA}.{key}": str(one) for key, one in track.sizes().items() if one is not None})
    for name, module in modules(objects).items():
        parameters = list(module.parameters())
        if parameters:
            frozen = sum(not one.requires_grad for one in parameters)
            facts[f"{name}.{_FROZEN}"] = f"{frozen} of {len(parameters)}"
    for name, optimizer in optimizers(objects).items():
        facts.update({f"{name}.{key}": text for key, text in _settings(optimizer).items()})
    return dict(islice(facts.items(), MOST_FACTS))


def overruled(
    objects: Mapping[str, object], before: Mapping[str, str], now: Mapping[str, str]
) -> dict[str, str]:
    """The facts of a run that goes on from a state with those of `before`: a restored optimizer has the
    settings of the snapshot, not the script's, and a later resume is to be held against these."""
    theirs = tuple(f"{name}." for name in optimizers(objects))
    return {**now, **{fact: text for fact, text in before.items() if theirs and fact.startswith(theirs)}}


def drifted(url: str, drifts: list[Drift], objects: Mapping[str, object]) -> list[Drifted]:
    """One event for each class, the gravest first."""
    theirs = tuple(f"{name}." for name in optimizers(objects))
    found = []
    for kind in CLASSES:
        texts = [
            f"{one} (the snapshot's {one.before} stays)"
            if theirs and one.fact.startswith(theirs)
            else str(one)
            for one in drifts
            if one.kind == kind
        ]
        if texts:
            found.append(Drifted(url, kind, tuple(texts)))
    return found


def drift_since(
    environment: Mapping[str, str], manifest: Manifest, now: Mapping[str, str], config: Value
) -> list[Drift]:
    """All that differs between a snapshot's circumstances and those of now."""
    tree = manifest.tree
    run = tree.get(RUN) if type(tree) is dict else None
    saved = run.get(CONFIG) if type(run) is dict else None
    return [*drift(environment, now), *config_drift(saved, config)]


def plain_config(config: Mapping[str, Any] | None) -> Value:
    """A configuration as it is kept: plain values. None where there is none.

    Raises:
        Unsupported: something in it is not plain; the message names it.
    """
    if config is None:
        return None
    leaves: Leaves = {}
    tree = flatten(CONFIG, dict(config), leaves)
    for name in leaves:
        raise Unsupported(
            f"{name} is a tensor or an array, and a configuration holds plain values",
            kept="nothing was touched",
            next="hand it over by a name of its own, as an object",
        )
    return tree


def _settings(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Each setting with its value in all groups, or one for each; those that are off are left out."""
    groups = optimizer.param_groups
    keys = dict.fromkeys(key for group in groups for key in group if key not in _NOT_SETTINGS)
    found = {}
    for key in keys:
        # Where there is a schedule, the learning rate that was given to the group has this name.
        given_as = "initial_lr" if key == "lr" else key
        texts = [_text(group.get(given_as, group.get(key))) for group in groups]
        if any(texts):
            text = texts[0] if len(set(texts)) == 1 else ", ".join(one or "-" for one in texts)
            found[key] = text[:_MOST_CHARACTERS]
    return found


def _text(value: object) -> str:
    """A setting as text; "" where it is off, or on an accelerator, which is not waited for."""
    if isinstance(value, torch.Tensor):
        return repr(float(value)) if value.numel() == 1 and value.device.type == "cpu" else ""
    if value is None or value is False or not isinstance(value, bool | int | float | str | list | tuple):
        return ""
    return repr(value) if not isinstance(value, str) else value
