"""`everstep export` and `import`: to and from the files of other programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from everstep.chain.history import MAIN, Chain
from everstep.cli import output
from everstep.cli.options import (
    Branch,
    Json,
    Ref,
    Replica,
    Repo,
    UnsafeSingleWriter,
    chain_url,
    read_place,
)
from everstep.errors import Mismatch
from everstep.events import size

_REMARKS = 20
"""So many sentences about one export or import are shown to a person."""

_FORMAT = typer.Option("--format", metavar="hf|dcp|safetensors|torch", help="What to write.")
_CONFIG = typer.Option(
    "--config", metavar="PATH", help="A config.json, or a folder with one and the tokenizer's files (hf)."
)
_AS = typer.Option(
    "--as", metavar="NAME=KEY", help="Take this, under this name; more than once. NAME alone: all of it."
)


def export(
    context: typer.Context,
    ref: Ref,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The file or folder to write.")],
    format: Annotated[str, _FORMAT],
    only: Annotated[
        str, typer.Option("--only", metavar="NAME", help="Only this object, without its name in front.")
    ] = "",
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", metavar="bf16|fp16|fp32", help="Of floating-point tensors (hf, safetensors)."
        ),
    ] = "",
    config: Annotated[str | None, _CONFIG] = None,
    max_shard_size: Annotated[
        str | None, typer.Option("--max-shard-size", metavar="SIZE", help="Of one file of weights (hf): 5GB.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file OUT where it exists.")] = False,
    branch: Branch = MAIN,
    replica: Replica = None,
    repo: Repo = None,
    as_json: Json = False,
) -> None:
    """Write a snapshot to a file or folder that other programs read."""
    from everstep.integrations import exporting

    if format not in exporting.FORMATS:
        raise typer.BadParameter(f"{format!r} is none of {', '.join(exporting.FORMATS)}")
    chain = Chain(read_place(context, repo, replica))
    snapshot = chain.find(ref, branch)
    path = Path(out)
    with output.progress(path.name, quiet=as_json) as on_progress:
        done = exporting.export(
            chain,
            snapshot,
            path,
            format,
            only=only or "",
            overwrite=force,
            dtype=dtype or "",
            config=Path(config) if config else None,
            max_shard_bytes=_bytes(max_shard_size) if max_shard_size else None,
            on_progress=on_progress,
        )
    if as_json:
        about = {"snapshot": snapshot.id, "step": snapshot.step, "format": format, "out": out}
        output.document({**about, **dataclasses.asdict(done)})
        return
    _tell(done.remarks)
    source = f"{snapshot.short} step {snapshot.step}"
    print(f"{out}: {_tensors(done.tensors, done.aliases)}, {size(done.size_bytes)}, of {source}")


def import_(
    context: typer.Context,
    path: Annotated[str, typer.Argument(metavar="PATH", help="The file, directory or folder to read.")],
    objects: Annotated[list[str] | None, _AS] = None,
    step: Annotated[
        str | None, typer.Option("--step", metavar="N", help="Which step it is of; else as it says itself.")
    ] = None,
    note: Annotated[str, typer.Option("--note", metavar="TEXT", help="Kept with the snapshot.")] = "",
    branch: Branch = MAIN,
    unsafe_single_writer: UnsafeSingleWriter = False,
    repo: Repo = None,
    as_json: Json = False,
) -> None:
    """Make a snapshot of other people's checkpoint: torch.save, safetensors, DCP, Hugging Face."""
    from everstep.integrations import importing
    from everstep.store.urls import open_store

    wanted = _wanted(objects or ())
    at = output.limit(step, "a step") if step else None
    place = open_store(chain_url(context, repo), unsafe_single_writer=unsafe_single_writer)
    # Looked at before a chain is created for it.
    found = importing.read(Path(path))
    chain = Chain.create(place)
    with output.progress(Path(path).name, quiet=as_json) as on_progress:
        done = importing.take(
            chain,
            Path(path),
            found,
            objects=wanted,
            step=at,
            branch=branch,
            note=note or "",
            on_progress=on_progress,
        )
    record = done.snapshot.record
    if as_json:
        about = {"snapshot": done.snapshot.id, "step": record.step, "branch": branch, "path": path}
        made = {name: value for name, value in dataclasses.asdict(done).items() if name != "snapshot"}
        output.document({**about, **made, "new_bytes": record.new_bytes, "metrics": record.metrics})
        return
    _tell(done.remarks)
    what = f"{_tensors(done.tensors, done.aliases)}, {size(done.size_bytes)}"
    print(f"{path} ({done.kind}): {what}, are {done.snapshot.short} step {record.step} on branch {branch}")
    print(f"objects: {', '.join(done.objects)}")


def _wanted(asked: Sequence[str]) -> dict[str, str]:
    """What to take, by its name."""
    found: dict[str, str] = {}
    for one in asked:
        name, _, key = one.partition("=")
        if not name or name in found:
            raise typer.BadParameter(f"--as {one!r} names nothing, or what is named already")
        found[name] = key
    return found


def _bytes(text: str) -> int:
    from everstep.run.settings import size_in_bytes

    try:
        found = size_in_bytes(text)
    except Mismatch as error:
        raise typer.BadParameter(f"{text!r} is no size, such as 5GB") from error
    if not found:
        raise typer.BadParameter("no file can be as small as that")
    return found


def _tensors(tensors: int, aliases: int) -> str:
    ties = f" and {output.count(aliases, 'tied name')}" if aliases else ""
    return f"{output.count(tensors, 'tensor')}{ties}"


def _tell(remarks: Sequence[Any]) -> None:
    for text in remarks[:_REMARKS]:
        output.remark(text)
    if len(remarks) > _REMARKS:
        output.remark(f"and {len(remarks) - _REMARKS} more like these; --json lists all")
