"""`everstep stats`: what a chain takes, and for what."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from everstep.cli import output
from everstep.cli.options import Json, Repo, chain_url
from everstep.events import size

if TYPE_CHECKING:
    from everstep.chain.stats import Stats

_KEEP = typer.Option("--keep", metavar="POLICY", help="Also say what a prune with this policy would free.")
_LEAVES = typer.Option("-n", "--leaves", metavar="N", help="Name so many leaves, those that take most.")


def stats(
    context: typer.Context,
    leaves: Annotated[str, _LEAVES] = "10",
    keep: Annotated[str | None, _KEEP] = None,
    repo: Repo = None,
    as_json: Json = False,
) -> None:
    """Show what the chain takes: by branch and by leaf, how fast it grows, and what a prune would free."""
    from everstep.chain.history import Chain
    from everstep.chain.prune import GRACE_S, Repack, consider
    from everstep.chain.retention import Keep
    from everstep.chain.stats import stats as count

    most = output.limit(leaves, of="leaves")
    chain = Chain(chain_url(context, repo))
    policy = None if keep is None else Keep.parse(keep)
    found = count(chain, most)
    plan = None if policy is None else consider(chain, policy, window_s=GRACE_S, repack=Repack())
    freed = None if plan is None else plan.freed_bytes + plan.repacked_bytes
    if as_json:
        pruned = {
            "keep": None if policy is None else str(policy),
            "freed_bytes": freed,
            "repacked_bytes": None if plan is None else plan.repacked_bytes,
        }
        output.document({"chain": chain.url, **dataclasses.asdict(found), "prune": pruned})
        return
    _show(found)
    if plan is not None and freed is not None:
        of_which = f", {size(plan.repacked_bytes)} of that by repacking" if plan.moves else ""
        print(f"\nprune --keep {str(policy)!r} would free {size(freed)}{of_which}")


def _show(found: Stats) -> None:
    kinds = ", ".join(f"{kind} {size(total)}" for kind, total in found.kinds.items())
    output.fields(
        [
            ("snapshots", found.snapshots),
            ("states", f"{size(found.logical_bytes)}, one by one"),
            ("stored", f"{size(found.stored_bytes)} ({kinds})"),
            ("unreached", f"{size(found.unreached_bytes)} that nothing listed needs"),
            ("growth", "" if found.daily_bytes is None else f"{size(int(found.daily_bytes))} a day"),
            ("free", "" if found.free_bytes is None else _room(found.free_bytes, found.full_days)),
            ("unreadable", ", ".join(found.unreadable)),
        ]
    )
    if found.branches:
        print()
        output.table(
            ("branch", "snapshots>", "states>", "stored>", "its own>"),
            [
                (
                    one.name,
                    one.snapshots,
                    size(one.logical_bytes),
                    size(one.stored_bytes),
                    size(one.own_bytes),
                )
                for one in found.branches
            ],
        )
    if found.leaves:
        print()
        output.table(
            ("leaf", "size>", "stored>", "versions>"),
            [
                (one.name, size(one.logical_bytes), size(one.stored_bytes), one.versions)
                for one in found.leaves
            ],
        )


def _room(free_bytes: int, full_days: float | None) -> str:
    when = "" if full_days is None else f", full in {full_days:.3g} days"
    return f"{size(free_bytes)}{when}"
