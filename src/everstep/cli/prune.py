"""`everstep prune`: what goes, what stays and why; then it goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from everstep.cli import output
from everstep.cli.options import Json, Repo, UnsafeSingleWriter, chain_url, writable_chain
from everstep.errors import Mismatch
from everstep.events import size
from everstep.format import keys

if TYPE_CHECKING:
    from everstep.chain.prune import Plan, Row

SHORT = 8

_KEEP = typer.Option(
    "--keep", metavar="POLICY", help='What stays: "last 3, hourly 24, daily 7, best val_loss 2, tags".'
)
_REPACK = typer.Option(
    "--repack/--no-repack", help="Also give up packs of which little is needed; else whole packs go only."
)
_MAX_UNUSED = typer.Option(
    "--max-unused", metavar="SHARE", help="So much of what packs take may be of no use before that: 10%."
)
_OF_BRANCH = typer.Option("--branch", metavar="NAME", help="Only snapshots of this branch go; else of all.")


def prune(
    context: typer.Context,
    keep: Annotated[str | None, _KEEP] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would go, and change nothing.")
    ] = False,
    branch: Annotated[str | None, _OF_BRANCH] = None,
    repack: Annotated[bool, _REPACK] = True,
    max_unused: Annotated[str, _MAX_UNUSED] = "10%",
    unsafe_single_writer: UnsafeSingleWriter = False,
    repo: Repo = None,
    as_json: Json = False,
) -> None:
    """Delete the snapshots that a policy does not keep, and what nothing needs any more."""
    from everstep.chain.census import Census
    from everstep.chain.prune import GRACE_S, Repack, consider
    from everstep.chain.prune import prune as delete
    from everstep.chain.replicas import source_of
    from everstep.chain.retention import EXAMPLE, Keep

    giving_up = Repack(_share(max_unused)) if repack else None
    url = chain_url(context, repo)
    chain = writable_chain(context, repo, unsafe_single_writer)
    if keep is None:
        raise Mismatch(
            "no policy says which snapshots stay, and none is stored with a chain",
            kept="nothing was touched",
            next=f'everstep -r {url} prune --dry-run --keep "{EXAMPLE}"',
        )
    policy = Keep.parse(keep)
    branches = None if branch is None else [keys.checked(branch, "branch")]
    census = Census(chain)  # What was read for the plan that is shown is not read again.
    plan = consider(chain, policy, branches=branches, window_s=GRACE_S, census=census, repack=giving_up)
    deleted: list[str] = []
    freed_bytes = copied_bytes = 0
    source = source_of(chain) if giving_up is not None else ""
    if not as_json:
        _show(plan)
        if source:
            print(f"{url} is a replica of {source}: packs are repacked there, and it follows")
    if not dry_run:
        for done in delete(
            chain, policy, branches=branches, window_s=GRACE_S, census=census, repack=giving_up
        ):
            deleted += done.keys
            freed_bytes += done.freed_bytes - done.copied_bytes
            copied_bytes += done.copied_bytes
            for remark in done.remarks:
                output.remark(f"{remark}; see what it means: everstep -r {url} verify")
    if as_json:
        output.document(_document(chain.url, str(policy), plan, dry_run, deleted, freed_bytes, copied_bytes))
    elif not dry_run:
        copied = f", {size(copied_bytes)} copied" if copied_bytes else ""
        print(f"{output.count(len(deleted), 'object')} deleted{copied}, {size(freed_bytes)} freed")


def _share(text: str) -> float:
    """`10%` is 0.1. Raises a usage error."""
    number = text.removesuffix("%")
    try:
        share = float(number) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise typer.BadParameter(f"{text!r} is not a share from 0% to 100%", param_hint="--max-unused")
    return share


def _show(plan: Plan) -> None:
    if plan.rows:
        gone = frozenset(number for number, row in enumerate(plan.rows) if not row.reasons)
        output.table(("id", "branch", "step>", "taken", "what", "why"), list(map(_cells, plan.rows)), gone)
    going = output.count(len(plan.snapshots), "snapshot")
    more = ", and more after these" if plan.more else ""
    print(f"{going} to go, {output.count(len(plan.sizes), 'object')}, {size(plan.freed_bytes)}{more}")
    if plan.moves:
        moved = sum(one.moved_bytes for one in plan.moves)
        packs = output.count(len(plan.moves), "pack")
        print(f"{packs} to repack, of which {size(moved)} is needed, {size(plan.repacked_bytes)} more")


def _cells(row: Row) -> tuple[object, ...]:
    what = "stays" if row.reasons else "goes"
    return row.id[:SHORT], row.branch, row.step, output.local_time(row.taken_at), what, "; ".join(row.reasons)


def _document(
    url: str,
    policy: str,
    plan: Plan,
    dry_run: bool,
    deleted: list[str],
    freed_bytes: int,
    copied_bytes: int,
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
        "repacking": [one.pack for one in plan.moves],
        "repacked_bytes": plan.repacked_bytes,
        "deleted": deleted,
        "copied_bytes": copied_bytes,
        "freed_bytes": freed_bytes,
    }
