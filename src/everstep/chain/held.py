"""From memory that still holds a snapshot to where its bytes belong, each chunk checked on the copy.

A keeper keeps the arena of the newest snapshot after it is durable: who restores that one need not read the
store. The arena may be written to meanwhile, so nothing is believed but what was copied out of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate

from blake3 import blake3

from everstep.chain.reader import CORES, Job, Scratch, Target, in_parallel, jobs_of
from everstep.format.chunk import aligned
from everstep.format.manifest import Manifest
from everstep.store.reads import copy

THREADS = min(CORES, 8)
_STEP_BYTES = 512 * 1024
"""Copied and digested at once: what was copied is still in the processor's cache then."""


def fill(manifest: Manifest, arena: memoryview, targets: Iterable[Target]) -> list[Target]:
    """Fill memory with the bytes of a snapshot out of an arena that should hold them: the manifest's regions
    one after the other from 0 on, each at the next multiple of the alignment.

    Blocks until all is copied; takes no more memory than a chunk for each thread. Every byte of a target that
    does not come back was checked against its chunk's digest.

    Returns:
        What the arena does not hold, or not any more, to be read out of the store.
    """
    ends = list(accumulate(aligned(region.size_bytes) for region in manifest.regions))
    starts = [0, *ends]
    if len(arena) < starts[-1]:
        return list(targets)
    tasks = [
        partial(_take, job, starts[job.region] + job.offset, arena) for job in jobs_of(manifest, targets)
    ]
    return [target for left in in_parallel(tasks, THREADS) for target in left]


def _take(job: Job, at: int, arena: memoryview, scratch: Scratch) -> Sequence[Target]:
    """Copy one chunk to where it belongs; what could not be taken."""
    size = job.chunk.size_bytes
    memory = job.whole
    taken = scratch.take(size) if memory is None else memory
    hasher = blake3()
    for start in range(0, size, _STEP_BYTES):
        part = taken[start : min(start + _STEP_BYTES, size)]
        copy(part, arena[at + start : at + start + len(part)])
        hasher.update(part)
    if hasher.hexdigest() != job.chunk.digest:
        return job.targets()
    job.scatter(taken)
    return ()
