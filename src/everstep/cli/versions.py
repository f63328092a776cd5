"""The verbs of versions: tag, branch, rollback, reflog."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any

import typer

from everstep.chain.history import MAIN, SHORT, Chain, Point
from everstep.cli import output
from everstep.cli.options import Branch, Json, Repo, UnsafeSingleWriter, chain_url, writable_chain
from everstep.errors import EverstepError
from everstep.format.record import BRANCH, COPY, ROLLBACK

_Name = Annotated[str | None, typer.Argument(metavar="NAME", help="What it is to be called.")]
_Ref = Annotated[str | None, typer.Argument(metavar="REF", help="The snapshot; head unless given.")]
_Delete = Annotated[bool, typer.Option("-d", "--delete", help="Take it away.")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the application."""
    for verb in (tag, branch, rollback, reflog):
        app.command()(verb)


# -- tag and branch ----------------------------------------------------------------------------------------


def tag(
    context: typer.Context,
    name: _Name = None,
    ref: _Ref = None,
    delete: _Delete = False,
    force: Annotated[bool, typer.Option("--force", help="Move a tag that names another snapshot.")] = False,
    branch: Branch = MAIN,
    unsafe_single_writer: UnsafeSingleWriter = False,
    repo: Repo = None,
    as_json: Json = False,
) -> None:
    """List the tags, or name a snapshot, which then stays."""
    from everstep.chain import versions

    chain = writable_chain(context, repo, unsafe_single_writer)
    if name is None:
        _refuse_alone(delete or force)
        _list(chain, "tag", {name: _tagged(chain, name) for name in sorted(chain.tag_keys())}, as_json)
    elif delete:
        _refuse_ref(ref)
        versions.untag(chain, name)
        _tell({"tag": name, "id": None, "step": None}, f"tag {name} is gone", as_json)
    else:
        snapshot = versions.tag(chain, name, ref or "head", of=branch, force=force)
        text = f"tag {name} names {snapshot.short} step {snapshot.step}"
        _tell({"tag": name, "id": snapshot.id, "step": snapshot.step}, text, as_json)


def branch(
    context: typer.Context,
    name: _Name = None,
    ref: _Ref = None,
    delete: _Delete = False,
    force: Annotated[
        bool, typer.Option("--force", help="With -d: also where its snapshots are on no other branch.")
    ] = False,
    branch: Branch = MAIN,
    unsafe_single_writer: UnsafeSingleWriter = False,
    repo: Repo = None,
    as_json: Json = False,
) -> None:
    """List the branches, or begin one at a snapshot."""
    from everstep.chain import versions

    chain = writable_chain(context, repo, unsafe_single_writer)
    if name is None:
        _refuse_alone(delete or force)
        _list(chain, "branch", {name: _head(chain, name) for name in chain.branches()}, as_json)
    elif delete:
        _refuse_ref(ref)
        versions.drop_branch(chain, name, force=force)
        _tell({"branch": name, "id": None, "step": None}, f"branch {name} is gone", as_json)
    elif force:
        raise typer.BadParameter("a branch is moved with: everstep rollback --branch NAME REF")
    else:
        snapshot = versions.branch(chain, name, ref or "head", of=branch)
        text = f"branch {name} begins at {snapshot.short} step {snapshot.step}"
        _tell({"branch": name, "id": snapshot.id, "step": snapshot.step}, text, as_json)


def _refuse_alone(option: bool) -> None:
    if option:
        raise typer.BadParameter("it needs a NAME")


def _refuse_ref(ref: str | None) -> None:
    if ref is not None:
        raise typer.BadParameter("what is taken away needs no REF")


def _tell(content: dict[str, Any], text: str, as_json: bool) -> None:
    if as_json:
        output.document(content)
    else:
        print(output.clean(text))


def _tagged(chain: Chain, name: str) -> str | EverstepError:
    """The id that a tag names, "" if it was taken away; or why that is not known."""
    try:
        return chain.tagged(name)
    except EverstepError as error:
        return error


def _head(chain: Chain, name: str) -> str | EverstepError:
    """The id of a branch's head, or why that is not known."""
    try:
        newest = chain.head(name)
    except EverstepError as error:
        return error
    return "" if newest is None else newest.id


def _list(chain: Chain, what: str, named: dict[str, str | EverstepError], as_json: bool) -> None:
    rows = [_listed(chain, what, name, id) for name, id in named.items() if id]
    if as_json:
        output.document({"chain": chain.url, f"{what}es" if what == BRANCH else f"{what}s": rows})
        return
    if not rows:
        output.remark(f"{chain.url} has no {'branches' if what == BRANCH else 'tags'} yet")
        return
    output.table(
        (what, "id", "step>", "taken", "age>", "remarks"),
        [
            (
                row[what],
                row["id"][:SHORT] if row["id"] else "?" * SHORT,
                "?" if row["step"] is None else row["step"],
                output.local_time(row["taken_at"]) if row["taken_at"] else "?",
                output.age(row["taken_at"]) if row["taken_at"] else "?",
                f"DAMAGED: {row['damage']}" if row["damage"] else row["note"] or "",
            )
            for row in rows
        ],
        frozenset(number for number, row in enumerate(rows) if row["damage"]),
    )


def _listed(chain: Chain, what: str, name: str, id: str | EverstepError) -> dict[str, Any]:
    row: dict[str, Any] = {what: name, "id": None, "step": None, "taken_at": None, "note": None}
    try:
        if isinstance(id, EverstepError):
            raise id
        record = chain.snapshot(id).record
    except EverstepError as error:
        return {**row, "id": id if isinstance(id, str) else None, "damage": error.problem}
    facts = {"step": record.step, "taken_at": record.taken_at, "note": record.note}
    return {**row, "id": id, **facts, "damage": None}


# -- rollback and reflog -----------------------------------------------------------------------------------


def rollback(
    context: typer.Context,
    ref: Annotated[str, typer.Argument(metavar="REF", help="The snapshot that is to be the head.")],
    branch: Branch = MAIN,
    unsafe_single_writer: UnsafeSingleWriter = False,
    repo: Repo = None,
    as_json: Json = False,
) -> None:
    """Move the head of a branch back to a snapshot; the next run goes on from there."""
    from everstep.chain import versions

    chain = writable_chain(context, repo, unsafe_single_writer)
    before = chain.head_number(branch)
    told = versions.rollback(chain, branch, ref)
    moved = chain.head_number(branch) > before
    if as_json:
        steps = {"from_step": told.from_step, "to_step": told.to_step}
        output.document({"branch": branch, "id": told.snapshot, **steps, "moved": moved})
        return
    head = f"{told.snapshot[:SHORT]} step {told.to_step}"
    if not moved:
        print(f"{head} is the head of branch {branch} already")
        return
    print(f"branch {branch} goes back from step {told.from_step} to {head}")
    output.remark(
        f"nothing is lost; undo it with: everstep -r {chain.url} rollback {branch}@{{1}}{_on(branch)}"
    )


def _on(branch: str) -> str:
    return "" if branch == MAIN else f" --branch {branch}"


def reflog(
    context: typer.Context,
    limit: Annotated[str, typer.Option("-n", "--limit", metavar="N", help="Show so many; 0: all.")] = "20",
    branch: Branch = MAIN,
    repo: Repo = None,
    as_json: Json = False,
) -> None:
    """List where the head of a branch was, newest first."""
    from everstep.chain import versions

    most = output.limit(limit)
    chain = Chain(chain_url(context, repo))
    found = list(islice(versions.reflog(chain, branch), most + 1 if most else None))
    shown = found[:most] if most else found
    rows = [_advance(branch, number, point) for number, point in enumerate(shown)]
    more = len(found) > len(shown)
    if as_json:
        output.document({"chain": chain.url, "branch": branch, "more": more, "advances": rows})
        return
    output.table(
        ("ref", "id", "step>", "at", "age>", "what"),
        [_reflog_row(row) for row in rows],
        frozenset(number for number, row in enumerate(rows) if row["damage"]),
    )
    if more:
        output.remark("there are older ones: everstep reflog -n 0 lists all")


def _advance(branch: str, number: int, point: Point) -> dict[str, Any]:
    """One line of the reflog as data. All keys are always there; null is what cannot be known."""
    head = point.head
    move = head.moved if head else None
    record = point.snapshot.record if point.snapshot else None
    return {
        "ref": f"{branch}@{{{number}}}",
        "id": head.snapshot if head else None,
        "step": head.step if head else None,
        "at": head.at if head else None,
        "writer": head.writer if head else None,
        "move": move.what if move else None,
        "to": move.ref if move else None,
        "trigger": record.trigger if record and move is None else None,
        "head": point.key,
        "damage": point.damage.problem if point.damage else None,
    }


def _reflog_row(row: dict[str, Any]) -> tuple[object, ...]:
    return (
        row["ref"],
        row["id"][:SHORT] if row["id"] else "?" * SHORT,
        "?" if row["step"] is None else row["step"],
        output.local_time(row["at"]) if row["at"] else "?",
        output.age(row["at"]) if row["at"] else "?",
        _what(row),
    )


def _what(row: dict[str, Any]) -> str:
    """What an advance was, for a person."""
    if row["damage"]:
        return f"DAMAGED: {row['damage']}"
    if row["move"] is None:
        return f"snapshot ({row['trigger']})" if row["trigger"] else "snapshot"
    to = row["to"][:SHORT] if len(row["to"]) == 64 else row["to"]
    words = {ROLLBACK: "rolled back to", BRANCH: "began at", COPY: "copied from"}
    return f"{words.get(row['move'], row['move'])} {to}"
