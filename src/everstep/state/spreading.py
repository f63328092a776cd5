"""Who of several ranks that hold the same writes what of it: pure functions, the same on all ranks."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from everstep.format.layout import SMALL_BYTES, Box

Holders: TypeAlias = "tuple[int, ...]"

SLIVER_BYTES = 64 * 1024
"""No cut leaves less than this on one of its sides, if the rows allow."""


def level(loads: Mapping[int, float], groups: Mapping[Holders, int]) -> dict[Holders, dict[int, float]]:
    """How many bytes each holder is to write of what a group of ranks holds, so that all write about as much.

    Args:
        loads: what ranks write in any case, in bytes; 0 for those that it does not name.
        groups: by the ranks that hold it, how many bytes there are to spread. Those with few holders are
            spread first.
    """
    loads, shares = dict(loads), {}
    for holders in sorted(groups, key=lambda holders: (len(holders), holders)):
        left = groups[holders]
        own = sorted((loads.get(rank, 0.0), rank) for rank in holders)
        # Like water: the lowest are filled until it is as high as the next, and so on.
        count, total = 0, 0.0
        height = 0.0
        for count, (load, _) in enumerate(own, 1):
            total += load
            height = (total + left) / count
            if count == len(own) or height <= own[count][0]:
                break
        shares[holders] = {
            rank: max(height - load, 0.0) if number < count else 0.0
            for number, (load, rank) in enumerate(own)
        }
        for rank, share in shares[holders].items():
            loads[rank] = loads.get(rank, 0.0) + share
    return shares


def spread(items: Sequence[tuple[Box, int]], shares: Mapping[int, float]) -> list[list[tuple[int, Box]]]:
    """The parts of each box, and the rank that writes it.

    Boxes of `SMALL_BYTES` or more are cut, along their first dimension that is longer than 1, so that each
    part is contiguous in its box. Each rank gets its share, but for less than a small box or one such row.

    Args:
        items: boxes, and the size of an element in bytes.
        shares: how many bytes each rank is to get; together as many as there are.
    """
    left = dict(sorted(shares.items()))
    found: list[list[tuple[int, Box]]] = [[] for _ in items]
    sizes = [_elements(box) * item for box, item in items]
    # The small ones first, the largest of them before others: what is cut makes up for what they leave.
    open_ranks = [(-share, rank) for rank, share in left.items()]
    heapq.heapify(open_ranks)
    for number in sorted(range(len(items)), key=lambda number: -sizes[number]):
        if sizes[number] < SMALL_BYTES:
            share, rank = open_ranks[0]
            heapq.heapreplace(open_ranks, (share + sizes[number], rank))
            left[rank] -= sizes[number]
            found[number].append((rank, items[number][0]))
    ranks = [rank for rank in left if left[rank] > 0] or [next(iter(left))]
    for number, (box, _) in enumerate(items):
        if sizes[number] >= SMALL_BYTES:
            found[number] = _cut(box, sizes[number], ranks, left)
    return found


def _cut(box: Box, size_bytes: int, ranks: list[int], left: dict[int, float]) -> list[tuple[int, Box]]:
    """Parts of one large box, for the first of `ranks`; those that are full are taken away."""
    extent = box[1]
    dim = next((dim for dim, size in enumerate(extent) if size > 1), 0)
    rows = extent[dim] if extent else 1
    row_bytes = size_bytes // rows
    least = -(-SLIVER_BYTES // row_bytes)
    parts, first = [], 0
    while first < rows:
        wanted = round(left[ranks[0]] / row_bytes)
        if len(ranks) == 1 or rows - first - wanted < least:
            wanted = rows - first
        if wanted >= min(least, rows - first):
            parts.append((ranks[0], _rows(box, dim, first, wanted)))
            left[ranks[0]] -= wanted * row_bytes
            first += wanted
        if len(ranks) > 1 and (first < rows or left[ranks[0]] < SLIVER_BYTES):
            # What it was short of, or had too much, is made up for by the next: so it does not add up.
            left[ranks[1]] += left[ranks.pop(0)]
    return parts


def _rows(box: Box, dim: int, first: int, count: int) -> Box:
    at, extent = box
    if not extent:
        return box
    return (
        (*at[:dim], at[dim] + first, *at[dim + 1 :]),
        (*extent[:dim], count, *extent[dim + 1 :]),
    )


def _elements(box: Box) -> int:
    count = 1
    for size in box[1]:
        count *= size
    return count
