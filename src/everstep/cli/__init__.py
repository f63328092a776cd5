"""The command line: thin verbs over the library (docs/CLI.md).

It starts fast and where neither torch nor numpy is there: what costs is imported by the verb that needs it.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from everstep.chain.history import MAIN, SHORT, Chain, Snapshot
from everstep.cli import checking, diff, files, output, replicas, versions
from everstep.cli import copy as copying
from everstep.cli import prune as pruning
from everstep.cli import stats as statistics
from everstep.cli.options import Branch, Json, Ref, Replica, Repo, chain_url, read_place
from everstep.errors import Damaged, EverstepError, Unsupported
from everstep.events import size
from everstep.format import keys
from everstep.version import __version__

if TYPE_CHECKING:
    from everstep.format.manifest import Manifest
    from everstep.keeper.protocol import Status

app = typer.Typer(
    name="everstep",
    help="Look at, check and export the snapshots of a training run.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

versions.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Prints errors instead of raising them."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    as_json = "--json" in given
    try:
        status = _run(given or ["--help"])
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Who read our output has seen enough; the interpreter must not try to write the rest at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return output.BROKEN_PIPE
    except (KeyboardInterrupt, typer.Abort):
        return output.failed_otherwise("Interrupted", "interrupted", "", output.INTERRUPTED, as_json)
    except EverstepError as error:
        _debug()
        return output.failed(error, as_json)
    except Exception as error:
        _debug()
        if _is_usage(error):
            return _failed_usage(error, as_json)
        message = f"{type(error).__name__}: {error}"
        next = "the same with EVERSTEP_DEBUG=1 shows where"
        return output.failed_otherwise("Unexpected", message, next, output.UNEXPECTED, as_json)


def _run(arguments: list[str]) -> int:
    if hasattr(sys.stdout, "reconfigure"):
        # A note may hold letters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    command = _command()
    try:
        with command.make_context("everstep", arguments) as context:
            return int(command.invoke(context) or 0)
    except typer.Exit as ended:
        return ended.exit_code


def _command() -> Any:
    """The application, with all values left as the texts that they were typed as.

    Newer typers convert every value with pydantic, a text to a text too, and importing that takes longer than
    most commands. So the verbs convert for themselves.
    """
    command: Any = typer.main.get_command(app)
    for one in (command, *command.commands.values()):
        for parameter in one.params:
            if not getattr(parameter, "is_flag", False):
                parameter.process_value = partial(_as_typed, parameter)
    return command


def _as_typed(parameter: Any, context: Any, value: object) -> str | list[str] | None:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and value:
        return [str(one) for one in value]
    if parameter.required:
        raise typer.BadParameter("it is missing", ctx=context, param=parameter)
    return None


def _failed_usage(error: Any, as_json: bool) -> int:
    where = getattr(error.ctx, "command_path", "everstep")
    message = error.format_message().replace("\n", " ")
    return output.failed_otherwise("Usage", message, f"{where} --help", output.USAGE, as_json)


def _is_usage(error: Exception) -> bool:
    """Some typers have a click of their own and some use the package: the class is found by its heirs."""
    return any(kind.__name__ == "ClickException" for kind in type(error).__mro__)


def _debug() -> None:
    if os.environ.get("EVERSTEP_DEBUG", "0") not in ("", "0"):
        traceback.print_exc()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"everstep {__version__}")
        raise typer.Exit


@app.callback()
def everstep(
    context: typer.Context,
    repo: Repo = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    context.obj = repo


# -- log ---------------------------------------------------------------------------------------------------


@app.command()
def log(
    context: typer.Context,
    limit: Annotated[str, typer.Option("-n", "--limit", metavar="N", help="Show so many; 0: all.")] = "20",
    every: Annotated[bool, typer.Option("--all", help="Of all branches, and what was rolled back.")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="Draw what follows on what.")] = False,
    branch: Branch = MAIN,
    replica: Replica = None,
    repo: Repo = None,
    as_json: Json = False,
) -> None:
    """List the snapshots that led to a branch's head, newest first."""
    from everstep.cli import listing

    most = output.limit(limit)
    chain = Chain(read_place(context, repo, replica))
    branches = chain.branches() if every else [keys.checked(branch, "branch")]
    found = list(islice(listing.listed(chain, branches, every), most + 1 if most else None))
    shown = found[:most] if most else found
    rows = listing.entries(shown, _tags(chain), listing.heads(chain, branches))
    there = replicas.look(chain)
    replicas.add_durable(rows, chain, there)
    standings = replicas.documents(chain, branch, there)
    more = len(found) > len(shown)
    if as_json:
        on = None if every else branch
        about = {"chain": chain.url, "branch": on, "more": more}
        output.document({**about, "replicas": standings, "snapshots": rows})
        return
    if not found:
        names = ", ".join(chain.branches()) or "none"
        on = "" if every else f" on branch {branch}"
        output.remark(f"{chain.url} has no snapshots{on}; its branches: {names}")
        return
    for row in rows if there else ():
        row["where"] = replicas.shown(row, chain.url, there)
    (listing.show_graph if graph else listing.show)(rows)
    replicas.tell(standings)
    if more:
        output.remark("there are older ones: everstep log -n 0 lists all")


def _tags(chain: Chain) -> dict[str, list[str]]:
    """The tags by the id they name. One that is damaged must not hide the snapshots."""
    found: dict[str, list[str]] = {}
    try:
        for name, id in chain.tags().items():
            found.setdefault(id, []).append(name)
    except Damaged as error:
        output.remark(f"the tags cannot be read: {error}")
    return found


# -- show --------------------------------------------------------------------------------------------------


@app.command()
def show(
    context: typer.Context,
    ref: Ref = "head",
    leaves: Annotated[bool, typer.Option("--leaves", help="List the tensors, too.")] = False,
    branch: Branch = MAIN,
    replica: Replica = None,
    repo: Repo = None,
    as_json: Json = False,
) -> None:
    """Show all that is known about one snapshot."""
    chain = Chain(read_place(context, repo, replica))
    snapshot = chain.find(ref, branch)
    damage: EverstepError | None = None
    manifest: Manifest | None = None
    try:
        manifest = chain.manifest(snapshot)
    except EverstepError as error:
        # The record is whole, and worth seeing when the rest is not.
        damage = error
    tags = _tags(chain).get(snapshot.id, [])
    there = replicas.look(chain)
    durable = _durable(chain, snapshot, branch, there)
    known = replicas.verified_in(chain, there)
    where = {"durable": durable, "verified": [url for url in durable if snapshot.id in known[url]]}
    if as_json:
        made = _snapshot_document(snapshot, manifest, tags, leaves, damage)
        output.document({**made, **where})
    else:
        known_where = there or where["verified"]
        _show_record(snapshot, tags, replicas.shown(where, chain.url, there) if known_where else "")
        if manifest is not None:
            _show_manifest(manifest, leaves)
    if damage is not None:
        raise damage


def _snapshot_document(
    snapshot: Snapshot, manifest: Manifest | None, tags: list[str], leaves: bool, damage: EverstepError | None
) -> dict[str, Any]:
    record = {name: getattr(snapshot.record, name) for name in snapshot.record.__struct_fields__}
    made = {"id": snapshot.id, **record, "tags": tags, "damage": damage.problem if damage else None}
    if manifest is not None:
        made["packs"] = _packs(manifest)
        made["leaf_count"] = len(manifest.leaves)
    if manifest is not None and leaves:
        names = ("name", "dtype", "shape", "size_bytes", "same_bytes_as")
        made["leaves"] = [dict(zip(names, row, strict=True)) for row in _leaves(manifest)]
    return made


def _durable(chain: Chain, snapshot: Snapshot, branch: str, there: Sequence[replicas.Replica]) -> list[str]:
    """Where a snapshot is: a replica has it that has a head record of it."""
    names = {branch, snapshot.record.branch} if there else set()
    heads = [head for name in names for head in chain.heads(name) if head.snapshot == snapshot.id]
    found = (one.url for one in there if any(one.has(head.branch, head.number) for head in heads))
    return [chain.url, *found]


def _show_record(snapshot: Snapshot, tags: list[str], durable: str) -> None:
    record = snapshot.record
    output.fields(
        [
            ("snapshot", snapshot.id),
            ("state", record.state),
            ("step", record.step),
            ("epoch", record.epoch),
            ("branch", record.branch),
            ("tags", ", ".join(tags)),
            ("parents", ", ".join(record.parents)),
            ("taken", f"{output.local_time(record.taken_at)} ({output.age(record.taken_at)} ago)"),
            ("trigger", record.trigger),
            ("note", record.note),
            ("writer", record.writer),
            ("ranks", len(record.manifests) if len(record.manifests) > 1 else ""),
            ("resume", f"approximate: {'; '.join(record.approximate)}" if record.approximate else "exact"),
            ("size", f"{size(record.logical_bytes)}, of which {size(record.new_bytes)} were new"),
            ("stored", f"{size(record.stored_bytes)} were written"),
            ("durable", durable),
        ]
    )
    _section("metrics", [(name, output.shown_number(value)) for name, value in record.metrics.items()])
    _section("costs", [(name, _shown_cost(name, cost)) for name, cost in record.costs.items()])
    _section("environment", list(record.environment.items()))


def _shown_cost(name: str, cost: float) -> str:
    return size(int(cost)) if name.endswith("_bytes") else f"{cost:.1f} ms"


def _section(title: str, pairs: Sequence[tuple[str, object]]) -> None:
    if pairs:
        print(f"\n{title}")
        output.fields([(f"  {output.clean(name)}", value) for name, value in pairs])


def _packs(manifest: Manifest) -> list[dict[str, Any]]:
    """The packs that a snapshot needs, and how much of each it uses."""
    used: dict[str, list[int]] = {name: [] for name in manifest.packs}
    for place in manifest.places:
        used[place.pack].append(place.stored_bytes)
    return [
        {"pack": name, "size_bytes": total, "used_bytes": sum(used[name]), "chunks": len(used[name])}
        for name, total in manifest.packs.items()
    ]


def _leaves(manifest: Manifest) -> list[tuple[str, str, tuple[int, ...], int, str]]:
    """(name, dtype, shape, size in bytes, the name of an earlier leaf with the same bytes or "")."""
    first: dict[tuple[object, ...], str] = {}
    rows = []
    for leaf in manifest.leaves:
        total = sum(leaf.size_bytes(part) for part in leaf.slices)
        place = tuple((part.region, part.offset) for part in leaf.slices)
        kept = first.setdefault((place, leaf.dtype, leaf.shape), leaf.name) if total else leaf.name
        rows.append((leaf.name, leaf.dtype, leaf.shape, total, kept if kept != leaf.name else ""))
    return rows


def _show_manifest(manifest: Manifest, leaves: bool) -> None:
    chunks, packs = output.count(len(manifest.chunks), "chunk"), output.count(len(manifest.packs), "pack")
    print(f"\nleaves: {len(manifest.leaves)}, in {chunks} in {packs}")
    rows = [
        (one["pack"], size(one["size_bytes"]), size(one["used_bytes"]), one["chunks"])
        for one in _packs(manifest)
    ]
    if rows:
        output.table(("pack", "size>", "used>", "chunks>"), rows)
    if leaves:
        print()
        output.table(
            ("leaf", "dtype", "shape", "bytes>", "same bytes as"),
            [
                (name, dtype, list(shape), total, same)
                for name, dtype, shape, total, same in _leaves(manifest)
            ],
        )


app.command("diff")(diff.diff)


# -- verify, repair, scrub ---------------------------------------------------------------------------------


app.command()(checking.verify)
app.command()(checking.repair)
app.command()(checking.scrub)


# -- export, import ----------------------------------------------------------------------------------------


app.command("export")(files.export)
app.command("import")(files.import_)


# -- keeper ------------------------------------------------------------------------------------------------


@app.command()
def keeper(as_json: Json = False) -> None:
    """Show the keepers of this machine: the processes that store what runs have captured."""
    from everstep.keeper.client import living

    found = living()
    if as_json:
        output.document(
            [
                {
                    **msgspec.structs.asdict(one),
                    "jobs": msgspec.to_builtins(one.jobs),
                    "seats": msgspec.to_builtins(one.seats),
                }
                for one in found
            ]
        )
        return
    if not found:
        print("no keeper is at work: one starts with everstep.open and ends with the run")
        return
    columns = ("pid>", "trainer>", "arenas>", "memory>", "nice>", "work", "chain")
    output.table(columns, [row for one in found for row in _keeper_rows(one)])


def _keeper_rows(one: Status) -> list[tuple[object, ...]]:
    """One; or of many ranks, one for each that is on this machine."""
    sends = [
        f"sends {output.count(count, 'snapshot')} to {url}" if count else f"looks what {url} lacks"
        for url, count in one.unsent.items()
    ]
    from everstep.keeper.protocol import Seated

    held = (one.held,) if one.held else ()
    rows: list[tuple[object, ...]] = []
    # Another version may know of no seats.
    for seat in one.seats or (Seated(0, one.trainer, one.jobs, one.arenas, held),):
        rank = f"rank {seat.rank} of {one.ranks}: " if one.ranks > 1 else ""
        work = ", ".join([*(f"{job.phase} step {job.step}" for job in seat.jobs), *sends])
        work = work or (f"holds {seat.held[0][:SHORT]}" if seat.held else "nothing to do")
        # What is the process's own stands in its first row.
        memory = "" if rows else size(one.memory_bytes)
        arenas = size(sum(seat.arenas))
        rows.append((one.pid, seat.trainer or "-", arenas, memory, one.nice, rank + work, one.chain))
        sends = []
    return rows


# -- prune, copy, replicate, stats -------------------------------------------------------------------------

app.command()(pruning.prune)
app.command()(copying.copy)
app.command()(replicas.replicate)
app.command()(statistics.stats)


# -- dump, demo, doctor ------------------------------------------------------------------------------------


@app.command()
def dump(
    context: typer.Context,
    key: Annotated[str, typer.Argument(metavar="KEY", help="The object's name, as verify shows it.")],
    repo: Repo = None,
    as_json: Json = False,
) -> None:
    """Print any object of the store in readable form."""
    from everstep.cli.readable import dump as print_object
    from everstep.store.urls import open_store

    print_object(open_store(chain_url(context, repo)), key, as_json)


@app.command()
def demo(
    directory: Annotated[
        str | None,
        typer.Argument(metavar="DIRECTORY", help="Where its chains go; else a temporary directory."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Train, kill, resume, and compare with a run that nobody killed. Needs torch."""
    from contextlib import nullcontext, redirect_stdout

    from everstep import demo

    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        status = demo.main(directory)
    if as_json:
        output.document({"identical": status == 0})
    return status


@app.command()
def doctor(
    context: typer.Context,
    path: Annotated[
        str | None,
        typer.Argument(metavar="PATH", help="Where a chain is, or is to be."),
    ] = None,
    repo: Repo = None,
    as_json: Json = False,
) -> int:
    """Look at what this machine, and a directory or a store, have of what Everstep needs."""
    from everstep.cli.machine import MISSING, examine

    place = str(path or repo or context.obj or os.environ.get("EVERSTEP_REPO") or ".")
    lines = []
    for line in examine(place):
        lines.append(line)
        if not as_json:
            hint = f"  ({line.hint})" if line.hint else ""
            print(f"{line.status:<7}  {line.name:<14}  {output.clean(line.value)}{hint}", flush=True)
    missing = any(line.status == MISSING for line in lines)
    if as_json:
        output.document({"ok": not missing, "checks": [dataclasses.asdict(line) for line in lines]})
    return Unsupported.exit_code if missing else 0
