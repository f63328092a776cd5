"""What several verbs take: options, and the chain that a command is about."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everstep.errors import NotFound
from everstep.format import keys
from everstep.store.base import Store
from everstep.store.replicated import ReplicatedStore
from everstep.store.urls import open_store

if TYPE_CHECKING:
    from everstep.chain.history import Chain

_REPO = typer.Option(
    "--repo",
    "-r",
    metavar="PATH",
    help="The chain, a directory or a URL; else EVERSTEP_REPO, else the current directory.",
)
Repo = Annotated[str | None, _REPO]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, errors too.")]
Branch = Annotated[str, typer.Option("--branch", metavar="NAME", help="The branch that is meant.")]
Ref = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="head, step:N, best:METRIC, a branch, a tag, an id's beginning, BRANCH@REF, or REF~N.",
    ),
]


_INSIST = typer.Option(
    "--unsafe-single-writer",
    help="Write to an object store that cannot refuse to overwrite; there must never be a second writer.",
)
UnsafeSingleWriter = Annotated[bool, _INSIST]
Replica = Annotated[
    str | None,
    typer.Option("--replica", metavar="URL", help="Read from this replica what the chain's own place lacks."),
]


def read_place(context: typer.Context, repo: str | None, replica: str | None) -> str | Store:
    """Where a command reads: what the chain's own place lacks, or has damaged, out of a replica."""
    url = chain_url(context, repo)
    return ReplicatedStore(open_store(url), [open_store(replica)]) if replica else url


def chain_url(context: typer.Context, repo: str | None) -> str:
    """The chain that a command is about: what was typed, else what was set, else where we are."""
    named = repo or context.obj or os.environ.get("EVERSTEP_REPO")
    if named:
        return str(named)
    if Path(keys.CHAIN).is_file():
        return "."
    raise NotFound(
        "no chain was named, and the current directory is not one",
        next=f"everstep -r PATH_OF_THE_CHAIN {context.info_name}, or set EVERSTEP_REPO",
    )


def writable_chain(context: typer.Context, repo: str | None, unsafe_single_writer: bool) -> Chain:
    """That chain, for who writes to it."""
    from everstep.chain.history import Chain
    from everstep.store.urls import open_store

    return Chain(open_store(chain_url(context, repo), unsafe_single_writer=unsafe_single_writer))
