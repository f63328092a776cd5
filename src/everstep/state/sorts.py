"""Which leaves of a state change when, and which of them are the same memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from everstep.format.layout import Kin
from everstep.state.tree import Tensorlike


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


def memory(tensor: Tensorlike) -> tuple[object, ...] | None:
    """What two tensors have in common exactly when they are the same memory seen in the same way; None for
    what is never shared."""
    if not isinstance(tensor, torch.Tensor) or not tensor.numel():
        return None
    where = (tensor.data_ptr(), tensor.device, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return (tensor.dtype, tensor.shape, *where)
