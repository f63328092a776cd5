"""Where a chain's snapshots are besides, as far as its replicas answer; and `everstep replicate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from everstep.chain.history import Chain
from everstep.chain.replicas import remembered
from everstep.cli import output
from everstep.cli.options import Json, Repo, chain_url
from everstep.errors import EverstepError, Mismatch, Unavailable
from everstep.events import size
from everstep.store.urls import open_store

ANSWER_S = 3.0
"""A listing does not wait longer for a replica."""


@dataclass(frozen=True)
class Replica:
    """What a replica has: by branch, the numbers of its head records; None where it did not answer, and
    `problem` says why."""

    url: str
    numbers: dict[str, set[int]] | None
    problem: str | None

    def has(self, branch: str, number: int) -> bool:
        return self.numbers is not None and number in self.numbers.get(branch, ())


def look(chain: Chain) -> list[Replica]:
    """Ask the replicas that the chain's last writer named. Blocks a few seconds at most."""
    urls = remembered(chain)
    if not urls:
        return []
    from everstep.chain.adoption import ask_all
    from everstep.chain.mirror import numbers

    found = []
    stores = []
    for url in urls:
        try:
            stores.append(open_store(url))
        except EverstepError as error:
            found.append(Replica(url, None, error.problem))
    for asked in ask_all(stores, numbers, ANSWER_S):
        problem = None if asked.error is None else asked.error.problem
        found.append(Replica(asked.store.url, asked.answer, problem))
    return found


def label(url: str, others: Sequence[str] = ()) -> str:
    """What a table calls a place: `local`, or its scheme, where that says which it is."""
    scheme, separator, _ = url.partition("://")
    if not separator:
        return url
    return scheme if sum(one.startswith(f"{scheme}://") for one in others) <= 1 else url


def add_durable(rows: Sequence[dict[str, Any]], chain: Chain, replicas: Sequence[Replica]) -> None:
    """Say of each snapshot where it is: in the chain's own store, as it is listed there, and where else; and
    in which of these `everstep verify` has found it whole."""
    from everstep.format import keys

    verified = verified_in(chain, replicas)
    for row in rows:
        branch, number = row["head"].split("/")[1], keys.number_of(row["head"]) or 0
        row["durable"] = [chain.url, *(one.url for one in replicas if one.has(branch, number))]
        row["verified"] = [url for url in row["durable"] if row["id"] in verified[url]]


def verified_in(chain: Chain, replicas: Sequence[Replica]) -> dict[str, frozenset[str]]:
    """By URL, the ids of the snapshots that the last `everstep verify` of this user's found whole there."""
    from everstep.chain.remembering import Memory

    found: dict[str, frozenset[str]] = {}
    for url in (chain.url, *(one.url for one in replicas)):
        try:
            store = chain.store if url == chain.url else open_store(url)
            found[url] = frozenset(Memory(chain, store).load().verified)
        except EverstepError:
            found[url] = frozenset()  # It is not known, then.
    return found


def shown(row: Mapping[str, Any], first: str, replicas: Sequence[Replica]) -> str:
    """`local verified, s3`."""
    urls = [first, *(one.url for one in replicas)]
    names = {url: label(url, urls) for url in row["durable"]}
    names[first] = "local" if "://" not in first else names[first]
    return ", ".join(f"{name} verified" if url in row["verified"] else name for url, name in names.items())


def documents(chain: Chain, branch: str, replicas: Sequence[Replica]) -> list[dict[str, Any]]:
    """How each stands to the head of a branch."""
    steps = {head.number: head.step for head in chain.heads(branch)} if replicas else {}
    newest = max(steps, default=0)
    found = []
    for one in replicas:
        theirs = [number for number in (one.numbers or {}).get(branch, ()) if number in steps]
        step = steps[max(theirs)] if theirs else None
        behind = sum(number not in theirs for number in steps) if one.numbers is not None else None
        lag = steps[newest] - step if step is not None else None
        found.append(
            {"url": one.url, "step": step, "lag_steps": lag, "lacks": behind, "problem": one.problem}
        )
    return found


def tell(rows: Sequence[dict[str, Any]]) -> None:
    """A sentence for each replica that lacks something."""
    for row in rows:
        if row["problem"] is not None:
            output.remark(f"the replica {row['url']} does not answer: {row['problem']}")
        elif row["lacks"]:
            lag = f", {row['lag_steps']} steps behind" if row["lag_steps"] else ""
            output.remark(f"the replica {row['url']} lacks {output.count(row['lacks'], 'snapshot')}{lag}")


# -- replicate ---------------------------------------------------------------------------------------------


def replicate(
    context: typer.Context,
    url: Annotated[
        str | None, typer.Argument(metavar="URL", help="One place; else those that the last run named.")
    ] = None,
    repo: Repo = None,
    as_json: Json = False,
) -> int:
    """Bring replicas up to the chain now, or make one: the same chain, in another place."""
    from everstep.chain.mirror import Mirror

    chain = Chain(chain_url(context, repo))
    urls = [url] if url else list(remembered(chain))
    if not urls:
        raise Mismatch(
            f"{chain.url} has no replicas, and no place for one was named",
            kept="nothing was touched",
            next=f"everstep -r {chain.url} replicate URL",
        )
    rows: list[dict[str, Any]] = []
    status = 0
    for place in urls:
        mirror = None
        problem: EverstepError | None = None
        remarks: tuple[str, ...] = ()
        try:
            mirror = Mirror(chain, open_store(place))
            with output.progress(place, quiet=as_json) as on_progress:
                mirror.sending.on_sent = lambda sent, m=mirror: on_progress(*[m.sending.sent.size_bytes] * 2)  # type: ignore[misc]
                remarks = mirror.bring_up().remarks
        except EverstepError as error:
            problem, status = error, error.exit_code
        sent = mirror.sending.sent if mirror is not None else None
        if remarks and not status:
            status = Unavailable.exit_code
        rows.append(
            {
                "url": place,
                "objects": sent.objects if sent else 0,
                "sent_bytes": sent.size_bytes if sent else 0,
                "remarks": list(remarks),
                "problem": None if problem is None else problem.problem,
            }
        )
        if not as_json:
            if problem is not None:
                output.remark(f"{place}: {problem}")
            for text in remarks:
                output.remark(text)
            print(
                f"{place}: {output.count(rows[-1]['objects'], 'object')}, {size(rows[-1]['sent_bytes'])} sent"
            )
    if as_json:
        output.document({"chain": chain.url, "replicas": rows})
    return status
