"""Several branches as lines of text: which snapshot follows on which, drawn as git draws it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """A line of the drawing. `id` is the snapshot beside whose star the text goes; None for the lines between
    two snapshots."""

    drawing: str
    id: str | None


def draw(parents: Mapping[str, str | None], order: Mapping[str, str]) -> Iterator[Line]:
    """The lines, the newest first and each snapshot above the one it follows on.

    A snapshot follows on one at most, so this is a forest. Each line of snapshots is drawn whole before the
    next one, so that lines never cross: those that wait for the same snapshot are neighbours.

    Args:
        parents: the one that each follows on, as far as it is there too.
        order: something that is larger, the newer a snapshot is; of two lines the newer is drawn first.
    """
    waiting: list[str] = []
    for id in reversed(_oldest_first(parents, order)):
        parent = parents[id]
        same = sum(1 for one in waiting if one == id)
        for joined in range(same - 1):
            yield Line("| " * (len(waiting) - 2 - joined) + "|/", None)
        if same:
            del waiting[len(waiting) - same :]
        yield Line("| " * len(waiting) + "*", id)
        if parent is not None:
            waiting.append(parent)


def _oldest_first(parents: Mapping[str, str | None], order: Mapping[str, str]) -> Sequence[str]:
    """Each before all that follow on it; of what follows on the same the one with the newest end last."""
    children: dict[str | None, list[str]] = defaultdict(list)
    for id, parent in parents.items():
        children[parent].append(id)
    newest = dict(order)
    found: list[str] = []
    for id in reversed(_below(children)):
        newest[id] = max([newest[id], *(newest[child] for child in children[id])])
    waiting = sorted(children[None], key=newest.__getitem__, reverse=True)
    while waiting:
        id = waiting.pop()
        found.append(id)
        waiting += sorted(children[id], key=newest.__getitem__, reverse=True)
    return found


def _below(children: Mapping[str | None, list[str]]) -> list[str]:
    """All, each before those that follow on it."""
    found = list(children.get(None, ()))
    for id in found:
        found += children.get(id, ())
    return found
