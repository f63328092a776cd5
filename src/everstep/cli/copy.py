"""`everstep copy`: snapshots into another chain, sending what is missing there."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from everstep.chain.history import MAIN, SHORT, Chain
from everstep.cli import output
from everstep.cli.options import Branch, Json, Repo, chain_url
from everstep.errors import Mismatch
from everstep.events import size

if TYPE_CHECKING:
    from everstep.chain.copying import Row

_PLACES = typer.Argument(
    metavar="REF... TARGET", help="The snapshots, if not a whole branch; last, the chain they go to."
)
_AS = typer.Option("--as", metavar="NAME", help="The branch of the target; of the same name unless given.")


def copy(
    context: typer.Context,
    places: Annotated[list[str], _PLACES],
    every: Annotated[bool, typer.Option("--all", help="All branches.")] = False,
    to: Annotated[str | None, _AS] = None,
    tags: Annotated[bool, typer.Option("--tags", help="With the tags that they have.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent.")] = False,
    branch: Branch = MAIN,
    repo: Repo = None,
    as_json: Json = False,
) -> None:
    """Copy snapshots into another chain: a branch, some, or all; what is there is not sent."""
    from everstep.chain import copying
    from everstep.store.urls import open_store

    *refs, target = places
    chain = Chain(chain_url(context, repo))
    if every and (refs or to):
        raise Mismatch(
            "--all copies all branches under their own names",
            kept="nothing was touched",
            next=f"everstep -r {chain.url} copy --all {target}",
        )
    if every:
        wanted = [one for name in chain.branches() for one in copying.of_branch(chain, name)]
    elif refs:
        wanted = copying.of_refs(chain, refs, branch, to or "")
    else:
        wanted = copying.of_branch(chain, branch, to or "")
    with output.progress("copying", quiet=as_json) as on_progress:
        done = copying.copy(
            chain, open_store(target), wanted, tags=tags, dry_run=dry_run, on_progress=on_progress
        )
    if as_json:
        about = {"chain": chain.url, "target": target, "dry_run": dry_run}
        output.document({**about, "sent_bytes": done.sent_bytes, **dataclasses.asdict(done)})
        return
    for text in done.remarks:
        output.remark(text)
    columns = ("id", "as", "branch", "step>", "sent>", "shared>", "remarks")
    output.table(columns, [_cells(row, dry_run) for row in done.rows])
    count = output.count(sum(not row.why for row in done.rows), "snapshot")
    print(f"{target}: {count}, {size(done.sent_bytes)} {'to be sent' if dry_run else 'sent'}")


def _cells(row: Row, dry_run: bool) -> tuple[object, ...]:
    sizes = ("", "") if row.why else (size(row.sent_bytes), size(row.shared_bytes))
    id = row.id[:SHORT] or ("?" if dry_run else "-")
    return row.source[:SHORT], id, row.branch, row.step, *sizes, row.why
