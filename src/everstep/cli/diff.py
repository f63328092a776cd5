"""`everstep diff`: what differs between two snapshots, for people and for programs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everstep.chain.history import MAIN, Chain, Snapshot, find_anywhere
from everstep.cli import output
from everstep.cli.options import Branch, Json, Repo, chain_url
from everstep.events import size
from everstep.format.record import number

if TYPE_CHECKING:
    from everstep.chain.compare import Difference, LeafChange
    from everstep.chain.figures import Amount
    from everstep.chain.trees import ValueChange

_SIDE = "head, step:N, a tag, ... of this chain, or PATH@REF of another."
A = Annotated[str, typer.Argument(metavar="A", help=f"The snapshot before: {_SIDE}")]
B = Annotated[str, typer.Argument(metavar="B", help="The snapshot after, in the same way.")]
Limit = Annotated[str, typer.Option("-n", "--limit", metavar="N", help="Show so many leaves; 0: all.")]
NamesOnly = Annotated[
    bool, typer.Option("--names-only", "--no-values", help="Read no pack: say what changed, not by how much.")
]

_NUMBERED = re.compile(r"(?<=/)\d+(?=/)")
_FIGURES = ("relative>", "max abs>", "elements>")


def diff(
    context: typer.Context,
    a: A = "head~1",
    b: B = "head",
    limit: Limit = "20",
    names_only: NamesOnly = False,
    branch: Branch = MAIN,
    repo: Repo = None,
    as_json: Json = False,
) -> None:
    """Show what differs between two snapshots: leaves, values, metrics, environment."""
    from everstep.chain.compare import compare

    most = output.limit(limit, of="leaves")
    (chain_a, before), (chain_b, after) = (
        find_anywhere(text, lambda: Chain(chain_url(context, repo)), branch) for text in (a, b)
    )
    with output.progress("comparing", quiet=as_json) as on_progress:
        found = compare(chain_a, before, chain_b, after, values=not names_only, on_progress=on_progress)
    if as_json:
        output.document(_document(chain_a, chain_b, found))
        return
    for text in found.remarks:
        output.remark(text)
    _show(found, most)


# -- for people --------------------------------------------------------------------------------------------


def _show(found: Difference, most: int) -> None:
    before, after = found.before, found.after
    print(f"{before.short} step {before.step} -> {after.short} step {after.step}")
    if found.identical:
        print(f"identical: both are the state {after.record.state[:16]}, bit for bit")
    else:
        _show_leaves(found, most)
        _section("values", _value_lines(found))
    _section(
        "metrics", [(one.path, f"{_metric(one.before)} -> {_metric(one.after)}") for one in found.metrics]
    )
    _section("environment", [(one.kind, str(one)) for one in found.environment])


def _show_leaves(found: Difference, most: int) -> None:
    rows = [one for one in found.leaves if not _is_single(one)]
    shown = rows[:most] if most else rows
    if shown:
        print()
        marked = frozenset(n for n, one in enumerate(shown) if one.amount is not None and one.amount.broke)
        figures = _FIGURES if any(one.amount is not None for one in shown) else ()
        rows_of_text = [_row(one, len(figures)) for one in shown]
        output.table(("leaf", "dtype", "shape", *figures, "remarks"), rows_of_text, marked)
    if len(rows) > len(shown):
        print(f"... and {len(rows) - len(shown)} more; -n 0 shows all")
    read = f"; {size(found.read_bytes)} on each side were compared" if found.read_bytes else ""
    unsure = sum(one.kind == "may have changed" for one in found.leaves)
    counts = [f"{len(found.leaves) - unsure} differ"] + [f"{unsure} may differ"] * bool(unsure)
    print(f"\nleaves: {', '.join(counts)}, {found.same} are the same{read}")


def _row(one: LeafChange, columns: int) -> tuple[object, ...]:
    amount = one.amount
    remarks: list[str] = [] if one.kind == "changed" else [one.kind]
    remarks += [f"same bytes as {one.tied_to}"] if one.tied_to else []
    figures: tuple[str, ...] = ("",) * columns
    if amount is not None:
        for name, (was, now) in (("nan", amount.nans), ("inf", amount.infs)):
            remarks += [f"{name} {was} -> {now}"] if was or now else []
        share = "all" if amount.changed == amount.elements else f"{100 * amount.share:.3g}%"
        figures = (_figure(amount.relative), _figure(amount.max_abs), share)
    return one.name, _both(one.dtype), _both(one.shape), *figures, ", ".join(remarks)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _both(looks: tuple[Any, Any]) -> str:
    """What a leaf looks like, before and after where that differs."""
    texts = [str(list(one) if isinstance(one, tuple) else one) for one in looks if one is not None]
    return " -> ".join(dict.fromkeys(texts))


def _is_single(one: LeafChange) -> bool:
    """Whether it is but one number, which is shown as a value is."""
    return one.before is not None


def _value_lines(found: Difference) -> list[tuple[str, str]]:
    """Path and change; those that are alike but for a number in their path are one line."""
    from everstep.chain.trees import ValueChange

    singles = [ValueChange(one.name, one.before, one.after) for one in found.leaves if _is_single(one)]
    alike: dict[tuple[str, str], list[str]] = {}
    for one in (*found.values, *singles):
        path, text = _arrow(one)
        alike.setdefault((_NUMBERED.sub("*", path), text), []).append(path)
    lines = [
        (paths[0], text) if len(paths) == 1 else (f"{pattern} ({len(paths)})", text)
        for (pattern, text), paths in alike.items()
    ]
    return [*lines, *((path, "changed") for path in found.states)]


def _arrow(one: ValueChange) -> tuple[str, str]:
    from everstep.chain.trees import shown

    return one.path, f"{shown(one.before)} -> {shown(one.after)}"


def _metric(value: Any) -> str:
    from everstep.chain.trees import shown

    return f"{value:.6g}" if isinstance(value, float) else shown(value)


def _section(title: str, pairs: Sequence[tuple[str, str]]) -> None:
    if pairs:
        print(f"\n{title}")
        output.fields([(f"  {output.clean(name)}", text) for name, text in pairs])


# -- for programs ------------------------------------------------------------------------------------------


def _document(chain_a: Chain, chain_b: Chain, found: Difference) -> dict[str, Any]:
    return {
        "before": _side(chain_a, found.before),
        "after": _side(chain_b, found.after),
        "identical": found.identical,
        "leaves": [_leaf(one) for one in found.leaves],
        "same": found.same,
        "values": _changes(found.values),
        "states": list(found.states),
        "metrics": _changes(found.metrics),
        "environment": [
            {"class": one.kind, "fact": one.fact, "before": one.before, "after": one.after}
            for one in found.environment
        ],
        "remarks": list(found.remarks),
        "read_bytes": found.read_bytes,
    }


def _side(chain: Chain, snapshot: Snapshot) -> dict[str, object]:
    return {
        "chain": chain.url, "snapshot": snapshot.id, "step": snapshot.step, "state": snapshot.record.state
    }  # fmt: skip


def _leaf(one: LeafChange) -> dict[str, object]:
    from everstep.chain.trees import plain

    return {
        "name": one.name,
        "change": one.kind,
        "dtype": list(one.dtype),
        "shape": [None if shape is None else list(shape) for shape in one.shape],
        **_figures(one.amount),
        "before": plain(one.before),
        "after": plain(one.after),
        "tied_to": one.tied_to or None,
    }


def _figures(amount: Amount | None) -> dict[str, object]:
    names = ("elements", "changed", "share", "relative", "norm_before", "norm_change", "max_abs")
    found: dict[str, object] = {
        name: _in_json(None if amount is None else getattr(amount, name)) for name in names
    }
    for name in ("nans", "infs"):
        found[name] = None if amount is None else list(getattr(amount, name))
    return found


def _in_json(value: float | None) -> float | str | None:
    return None if value is None else number(value)


def _changes(changes: Iterable[ValueChange]) -> list[dict[str, object]]:
    from everstep.chain.trees import plain

    return [{"path": one.path, "before": plain(one.before), "after": plain(one.after)} for one in changes]
