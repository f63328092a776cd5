"""A few elements of each of many tensors, by which to tell that some have changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch

_SAMPLES = 64
_SAMPLE_ALIGNMENT_BYTES = 16


class Samples:
    """A few elements of each of some tensors, spread over all of it, gathered into bytes where they are."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._few = [_few(tensor) for tensor in tensors]
        sizes = [few.numel() * few.element_size() for few in self._few]
        self._starts = [
            0,
            *accumulate(-(-size // _SAMPLE_ALIGNMENT_BYTES) * _SAMPLE_ALIGNMENT_BYTES for size in sizes),
        ]
        like = tensors[0] if tensors else torch.empty(0)
        self._bytes = like.new_zeros(self._starts[-1], dtype=torch.uint8)
        self._views = [
            self._bytes[start : start + size].view(few.dtype).view(few.shape)
            for start, size, few in zip(self._starts, sizes, self._few, strict=False)
        ]

    @torch.no_grad()
    def gather(self) -> None:
        """Take them as they are now; on a device that is when its stream comes to it."""
        if self._few:
            torch._foreach_copy_(self._views, self._few)

    @torch.no_grad()
    def taken(self) -> torch.Tensor:
        """uint8 [bytes], on the host: what was gathered last. Blocks until it is there."""
        return torch.empty(self._bytes.shape, dtype=torch.uint8).copy_(self._bytes)

    def take(self) -> torch.Tensor:
        self.gather()
        return self.taken()

    def each(self, taken: torch.Tensor) -> Iterator[bytes]:
        """Those of each tensor, out of all."""
        data = taken.numpy().tobytes()
        for start, few in zip(self._starts, self._few, strict=False):
            yield data[start : start + few.numel() * few.element_size()]

    def different(self, one: torch.Tensor, other: torch.Tensor) -> Iterator[int]:
        """The numbers of the tensors whose elements differ."""
        for number, (start, end) in enumerate(pairwise(self._starts)):
            if not torch.equal(one[start:end], other[start:end]):
                yield number


def _few(tensor: torch.Tensor) -> torch.Tensor:
    """At most so many elements, evenly spread over every dimension, as a view."""
    few, left = tensor, _SAMPLES
    for dimension, size in enumerate(tensor.shape):
        wanted = max(1, min(size, round(left ** (1 / (tensor.dim() - dimension)))))
        left //= wanted
        step = max(1, size // wanted)
        few = few[(slice(None),) * dimension + (slice(size % step, None, step),)]
    return few
