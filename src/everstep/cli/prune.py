"""`everstep prune`: what goes, what stays and why; then it goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from everstep.cli import output
from everstep.cli.options import Json, Repo, chain_url
from everstep.errors import Mismatch
from everstep.events import size
from everstep.format import keys

if TYPE_CHECKING:
    from everstep.chain.prune import Plan, Row

SHORT = 8

_KEEP = typer.Option(
    "--keep", metavar="POLICY", help='What stays: "last 3, hourly 24, daily 7, best val_loss 2, tags".'
)
_OF_BRANCH = typer.Option("--branch", metavar="NAME", help="Only snapshots of this branch go; else of all.")


def prune(
    context: typer.Context,
    keep: Annotated[str | None, _KEEP] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would go, and change nothing.")
    ] = False,
    branch: Annotated[str | None, _OF_BRANCH] = None,
    repo: Repo = None,
    as_json: Json = False,
) -> None:
    """Delete the snapshots that a policy does not keep, and what nothing needs any more."""
    from everstep.chain.census import Census
    from everstep.chain.history import Chain
    from everstep.chain.prune import GRACE_S, consider
    from everstep.chain.prune import prune as delete
    from everstep.chain.retention import EXAMPLE, Keep

    url = chain_url(context, repo)
    chain = Chain(url)
    if keep is None:
        raise Mismatch(
            "no policy says which snapshots stay, and none is stored with a chain",
            kept="nothing was touched",
            next=f'everstep -r {url} prune --dry-run --keep "{EXAMPLE}"',
        )
    policy = Keep.parse(keep)
    branches = None if branch is None else [keys.checked(branch, "branch")]
    census = Census(chain)  # What was read for the plan that is shown is not read again.
    plan = consider(chain, policy, branches=branches, window_s=GRACE_S, census=census)
    deleted: list[str] = []
    freed_bytes = 0
    if not as_json:
        _show(plan)
    if not dry_run:
        for done in delete(chain, policy, branches=branches, window_s=GRACE_S, census=census):
            deleted += done.keys
            freed_bytes += done.freed_bytes
    if as_json:
        output.document(_document(chain.url, str(policy), plan, dry_run, deleted, freed_bytes))
    elif not dry_run:
        print(f"{output.count(len(deleted), 'object')} deleted, {size(freed_bytes)} freed")


def _show(plan: Plan) -> None:
    if plan.rows:
        gone = frozenset(number for number, row in enumerate(plan.rows) if not row.reasons)
        output.table(("id", "branch", "step>", "taken", "what", "why"), list(map(_cells, plan.rows)), gone)
    going = output.count(len(plan.snapshots), "snapshot")
    more = ", and more after these" if plan.more else ""
    print(f"{going} to go, {output.count(len(plan.sizes), 'object')}, {size(plan.freed_bytes)}{more}")


def _cells(row: Row) -> tuple[object, ...]:
    what = "stays" if row.reasons else "goes"
    return row.id[:SHORT], row.branch, row.step, output.local_time(row.taken_at), what, "; ".join(row.reasons)


def _document(
    url: str, policy: str, plan: Plan, dry_run: bool, deleted: list[str], freed_bytes: int
) -> dict[str, Any]:
    rows = [
        {
            "id": row.id,
            "branch": row.branch,
            "step": row.step,
            "taken_at": row.taken_at,
            "reasons": list(row.reasons),
        }
        for row in plan.rows
    ]
    return {
        "chain": url,
        "keep": policy,
        "dry_run": dry_run,
        "snapshots": rows,
        "going": list(plan.snapshots),
        "planned_bytes": plan.freed_bytes,
        "more": plan.more,
        "deleted": deleted,
        "freed_bytes": freed_bytes,
    }
