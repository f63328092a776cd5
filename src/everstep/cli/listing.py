"""Snapshots as `log` lists them: which, as data, and how a person sees them."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everstep.chain.history import SHORT, Chain, Point
from everstep.cli import output
from everstep.cli.graph import draw
from everstep.events import size

_COLUMNS = ("id", "step>", "epoch>", "taken", "age>", "trigger", "new>", "of>", "loss>", "remarks")


@dataclass(frozen=True)
class Listed:
    """An advance of a branch's head."""

    branch: str
    point: Point


def listed(chain: Chain, branches: Sequence[str], every: bool) -> Iterator[Listed]:
    """The advances of branches, newest first as far as clocks tell, each snapshot once; what cannot be read
    stays in. Lazy.

    Args:
        every: also those that a rollback took back.
    """
    lines = [_dated(name, chain.points(name) if every else chain.line(name)) for name in branches]
    seen: set[str] = set()
    for _, one in heapq.merge(*lines, key=lambda pair: pair[0], reverse=True):
        head = one.point.head
        if head is None or head.snapshot not in seen:
            if head is not None:
                seen.add(head.snapshot)
            yield one


def _dated(branch: str, points: Iterable[Point]) -> Iterator[tuple[str, Listed]]:
    """With the time of each; what cannot be read stays behind the one after it."""
    at = "~"
    for point in points:
        at = point.head.at if point.head is not None else at
        yield at, Listed(branch, point)


def heads(chain: Chain, branches: Iterable[str]) -> dict[str, list[str]]:
    """The branches by the id of their head."""
    found: dict[str, list[str]] = {}
    for name in branches:
        head = next(chain.heads(name), None)
        if head is not None and head.number == chain.head_number(name):
            found.setdefault(head.snapshot, []).append(name)
    return found


def entries(
    shown: Iterable[Listed], tags: Mapping[str, list[str]], heads: Mapping[str, list[str]]
) -> list[dict[str, Any]]:
    """Each as data. All keys are always there; null is what cannot be known."""
    return [_entry(one, tags, heads) for one in shown]


def _entry(one: Listed, tags: Mapping[str, list[str]], heads: Mapping[str, list[str]]) -> dict[str, Any]:
    point = one.point
    id = point.head.snapshot if point.head else None
    record = point.snapshot.record if point.snapshot else None
    return {
        "id": id,
        "step": point.head.step if point.head else None,
        "epoch": record.epoch if record else None,
        "taken_at": record.taken_at if record else None,
        "trigger": record.trigger if record else None,
        "new_bytes": record.new_bytes if record else None,
        "stored_bytes": record.stored_bytes if record else None,
        "logical_bytes": record.logical_bytes if record else None,
        "ranks": len(record.manifests) if record else None,
        "metrics": record.metrics if record else {},
        "approximate": list(record.approximate) if record else [],
        "note": record.note if record else None,
        "tags": tags.get(id, []) if id else [],
        "branch": record.branch if record else one.branch,
        "heads": heads.get(id, []) if id else [],
        "parents": list(record.parents) if record else [],
        "head": point.key,
        "damage": point.damage.problem if point.damage else None,
    }


# -- for people --------------------------------------------------------------------------------------------


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A table."""
    cells = [_row(row, [_bracketed(row["tags"])]) for row in rows]
    output.table(_columns(rows), cells, frozenset(n for n, row in enumerate(rows) if row["damage"]))


def show_graph(rows: Sequence[dict[str, Any]]) -> None:
    """A table with a drawing before it; heads and tags beside the snapshots."""
    by_name = {_node(row): row for row in rows}
    order = {name: row["taken_at"] or "" for name, row in by_name.items()}
    cells: list[tuple[str, ...]] = []
    marked: set[int] = set()
    for line in draw(_parents(rows), order):
        row = by_name[line.id] if line.id is not None else None
        if row is None:
            cells.append((line.drawing, *[""] * len(_columns(rows))))
            continue
        names = f"({', '.join(row['heads'])})" if row["heads"] else ""
        marked |= {len(cells)} if row["damage"] else set()
        cells.append((line.drawing, *_row(row, [names, _bracketed(row["tags"])])))
    output.table(("", *_columns(rows)), cells, frozenset(marked))


def _columns(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """With where each is, where there are replicas."""
    return (*_COLUMNS[:-1], "durable", _COLUMNS[-1]) if any("where" in row for row in rows) else _COLUMNS


def _node(row: Mapping[str, Any]) -> str:
    return str(row["id"] or row["head"])


def _parents(rows: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """What each follows on, of those that are shown. Where its parent is not kept any more, that is the next
    older one of its branch."""
    there = {_node(row) for row in rows}
    found: dict[str, str | None] = {}
    for number, row in enumerate(rows):
        parent = next((id for id in row["parents"][:1] if id in there), None)
        found[_node(row)] = parent or (_older(row, rows[number + 1 :]) if _is_cut(row) else None)
    return found


def _is_cut(row: Mapping[str, Any]) -> bool:
    """Whether it follows on something that is not shown."""
    return bool(row["parents"]) or row["damage"] is not None


def _older(row: Mapping[str, Any], rest: Sequence[Mapping[str, Any]]) -> str | None:
    """Steps only grow along a line, so what is drawn so is no circle."""
    for other in rest:
        same = other["branch"] == row["branch"] and other["step"] is not None
        if same and row["step"] is not None and other["step"] < row["step"]:
            return _node(other)
    return None


def _bracketed(names: Sequence[str]) -> str:
    return f"[{', '.join(names)}]" if names else ""


def _row(entry: Mapping[str, Any], marks: Sequence[str]) -> tuple[str, ...]:
    taken = entry["taken_at"]
    remarks = [*marks, entry["note"]]
    remarks += ["verified"] if "where" not in entry and entry["verified"] else []
    remarks += [f"{entry['ranks']} ranks"] if (entry["ranks"] or 1) > 1 else []
    remarks += ["approximate"] if entry["approximate"] else []
    remarks += [f"DAMAGED: {entry['damage']}"] if entry["damage"] else []
    return (
        entry["id"][:SHORT] if entry["id"] else "?" * SHORT,
        _known(entry["step"]),
        _known(entry["epoch"]),
        output.local_time(taken) if taken else "?",
        output.age(taken) if taken else "?",
        _known(entry["trigger"]),
        size(entry["new_bytes"]) if entry["new_bytes"] is not None else "?",
        size(entry["logical_bytes"]) if entry["logical_bytes"] is not None else "?",
        output.shown_number(entry["metrics"].get("loss", "")),
        *([entry["where"]] if "where" in entry else []),
        " ".join(remark for remark in remarks if remark),
    )


def _known(value: object) -> str:
    return "?" if value is None else str(value)
