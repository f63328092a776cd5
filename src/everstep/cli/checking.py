"""`everstep verify`, `repair` and `scrub`: what is damaged, and putting it back."""

from __future__ import annotations

import dataclasses
import re
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everstep.cli import output
from everstep.cli.options import Branch, Json, Repo, chain_url
from everstep.errors import Damaged, EverstepError, Unavailable
from everstep.events import size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from everstep.chain.history import Chain, Snapshot
    from everstep.chain.repair import Plan
    from everstep.chain.verify import Finding, Report, Subset

SHORT = 8
_PART = re.compile(r"([0-9]{1,4})/([0-9]{1,4})")
_PERCENT = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,2})?|100)%")

_SUBSET = typer.Option(
    "--read-data-subset",
    metavar="N%|N/T",
    help="Read so much of the data, another part each time; or the N-th of T parts.",
)
_TEST = typer.Option("--restore-test", help="Restore REF into memory; without one the head of every branch.")
_REHEARSED = typer.Argument(metavar="REF", help="For --restore-test: the snapshot.")
_FROM = typer.Option("--from", metavar="URL", help="Another store that may have what is missing; repeat it.")


def verify(
    context: typer.Context,
    ref: Annotated[str | None, _REHEARSED] = None,
    subset: Annotated[str | None, _SUBSET] = None,
    restore_test: Annotated[bool, _TEST] = False,
    branch: Branch = "main",
    repo: Repo = None,
    as_json: Json = False,
) -> int:
    """Read everything again and hold every byte against its digest."""
    from everstep.chain.history import Chain
    from everstep.chain.verify import verify as check

    if ref is not None and not restore_test:
        raise typer.BadParameter("a snapshot is named only with --restore-test")
    chain = Chain(chain_url(context, repo))
    if restore_test:
        return _rehearse(chain, ref, branch, as_json)
    part = _Part(chain, subset) if subset is not None else None
    with output.progress("reading", quiet=as_json) as on_progress:
        report = check(chain, on_progress, part.subset.wants if part else None)
    if part:
        part.done()
    else:
        _note_verified(chain, report)
    if as_json:
        read = {"number": part.subset.number, "of": part.subset.of} if part else None
        output.document(
            {"chain": chain.url, "ok": not report.findings, **_report_document(report), "subset": read}
        )
    else:
        _show(report.findings)
        _show_foreign(report)
        print(_summary(report, part.subset if part else None))
    return Damaged.exit_code if report.findings else 0


def _report_document(report: Report) -> dict[str, Any]:
    made = dataclasses.asdict(report)
    del made["sound"]  # `log` has it with each snapshot.
    return made


def _note_verified(chain: Chain, report: Report) -> None:
    from everstep.chain.remembering import Memory

    try:
        Memory(chain).note_verified(report.sound)
    except Unavailable as error:
        output.remark(str(error))


class _Part:
    """Which part of the data is read this time."""

    def __init__(self, chain: Chain, text: str) -> None:
        from everstep.chain.remembering import Memory
        from everstep.chain.verify import Subset

        named, share = _PART.fullmatch(text), _PERCENT.fullmatch(text)
        self._memory: Memory | None = None
        if named and 1 <= int(named[1]) <= int(named[2]):
            self.subset = Subset(int(named[1]), int(named[2]))
        elif share and float(share[1]):
            # No less than was asked for: 30 % are a third.
            of = max(int(100 / float(share[1])), 1)
            self._memory = Memory(chain)
            self.subset = Subset(self._memory.load().subsets.get(str(of), 0) % of + 1, of)
        else:
            raise typer.BadParameter(f"{text!r} is no part: 5%, or 3/20", param_hint="--read-data-subset")

    def done(self) -> None:
        """The next time it is the next one's turn."""
        if self._memory is not None:
            checks = self._memory.load()
            checks.subsets[str(self.subset.of)] = self.subset.number
            self._memory.save(checks)


def _show(findings: Sequence[Finding]) -> None:
    for finding in findings:
        hit = ", ".join(id[:SHORT] for id in finding.snapshots) or "none"
        print(output.clean(f"{finding.key}: {finding.problem}" if finding.key else finding.problem))
        print(f"  snapshots lost: {hit}")
        print(output.clean(f"  next: {finding.next}"))


def _show_foreign(report: Report) -> None:
    for key in report.foreign:
        output.remark(f"{key} is none of the chain's objects; it was left alone")


def _summary(report: Report, subset: Subset | None) -> str:
    text = (
        f"{report.objects} objects, {size(report.bytes)} read again: {len(report.findings)} damaged; "
        f"{report.whole} of {report.snapshots} snapshots whole"
    )
    if subset is None:
        return text
    return (
        f"{text}, as far as was looked: part {subset.number} of {subset.of} of the data, "
        f"and all records and footers; {size(report.left_bytes)} of data were not read"
    )


# -- verify --restore-test ---------------------------------------------------------------------------------


def _rehearse(chain: Chain, ref: str | None, branch: str, as_json: bool) -> int:
    from everstep.chain.states import rehearse

    rows: list[dict[str, Any]] = []
    for snapshot in _rehearsed(chain, ref, branch):
        about: dict[str, Any] = {"id": snapshot.id, "step": snapshot.step}
        try:
            with output.progress(f"restoring {snapshot.short}", quiet=as_json) as on_progress:
                done = rehearse(chain, snapshot, on_progress)
        except Damaged as error:
            next = f"everstep -r {chain.url} repair"
            rows.append({**about, "ok": False, "problem": error.problem, "key": error.key, "next": next})
            if not as_json:
                print(
                    output.clean(
                        f"{snapshot.short} step {snapshot.step}: cannot be restored: {error.problem}"
                    )
                )
                print(output.clean(f"  next: {next}"))
            continue
        rows.append(
            {**about, "ok": True, "leaves": done.leaves, "bytes": done.size_bytes, "remarks": done.remarks}
        )
        if not as_json:
            for text in done.remarks:
                output.remark(text)
            leaves = output.count(done.leaves, "leaf").replace("leafs", "leaves")
            print(
                f"{snapshot.short} step {snapshot.step}: restored into memory, {leaves}, "
                f"{size(done.size_bytes)}; the state that was taken"
            )
    ok = all(row["ok"] for row in rows)
    if as_json:
        output.document({"chain": chain.url, "ok": ok, "restored": rows})
    elif not rows:
        output.remark(f"{chain.url} has no snapshots")
    return 0 if ok else Damaged.exit_code


def _rehearsed(chain: Chain, ref: str | None, branch: str) -> list[Snapshot]:
    if ref is not None:
        return [chain.find(ref, branch)]
    found = {head.id: head for name in chain.branches() if (head := chain.head(name)) is not None}
    return list(found.values())


# -- repair ------------------------------------------------------------------------------------------------


def repair(
    context: typer.Context,
    others: Annotated[list[str] | None, _FROM] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, and change nothing.")
    ] = False,
    repo: Repo = None,
    as_json: Json = False,
) -> int:
    """Put back what is damaged or missing, from copies of the chain, parity, or other packs."""
    from everstep.chain.repair import consider
    from everstep.store.urls import open_store

    store = open_store(chain_url(context, repo))
    with output.progress("reading", quiet=as_json) as on_progress:
        plan = consider(store, [open_store(one) for one in others or ()], on_progress)
    return _repair(plan, dry_run, as_json)


def _repair(plan: Plan, dry_run: bool, as_json: bool) -> int:
    from everstep.chain.repair import Done, execute

    steps = (*plan.mends, *plan.steps)
    if not as_json:
        for text in plan.remarks:
            output.remark(text)
        for step in steps:
            print(output.clean(f"{step.key}: {step.problem}"))
            lacks = f"; {output.count(len(step.lacks), 'chunk')} of it cannot be had" if step.lacks else ""
            print(output.clean(f"  {'can be put' if dry_run else 'is put'} back {step.how}{lacks}"))
    if dry_run:
        done = Done((), plan.lost)
    else:
        with output.progress("repairing", quiet=as_json) as on_progress:
            done = execute(plan, on_progress)
    if as_json:
        output.document(_document(plan, done, dry_run))
    else:
        _show(done.left)
        what = f"{len(steps)} to be repaired" if dry_run else f"{len(done.repaired)} repaired"
        print(f"{what}, {len(done.left)} not; {plan.after.whole} of {plan.after.snapshots} snapshots whole")
    return Damaged.exit_code if done.left else 0


def _document(plan: Plan, done: Any, dry_run: bool) -> dict[str, Any]:
    return {
        "chain": plan.store.url,
        "ok": not done.left,
        "dry_run": dry_run,
        "steps": [dataclasses.asdict(step) for step in (*plan.mends, *plan.steps)],
        "repaired": [step.key for step in done.repaired],
        "left": [dataclasses.asdict(finding) for finding in done.left],
        "snapshots": plan.after.snapshots,
        "whole": plan.after.whole,
        "remarks": list(plan.remarks),
    }


# -- scrub -------------------------------------------------------------------------------------------------


def scrub(
    context: typer.Context,
    rate: Annotated[str, typer.Option("--rate", metavar="SIZE/s", help="Read no faster.")] = "20MB/s",
    mend: Annotated[bool, typer.Option("--repair", help="Then repair what was found.")] = False,
    others: Annotated[list[str] | None, _FROM] = None,
    repo: Repo = None,
    as_json: Json = False,
) -> int:
    """Read everything again, slowly, from where the last scrub was interrupted."""
    from everstep.chain.history import Chain
    from everstep.chain.remembering import Memory
    from everstep.chain.repair import consider
    from everstep.chain.scrub import paced
    from everstep.chain.scrub import scrub as read
    from everstep.store.patience import Clock
    from everstep.store.urls import open_store

    bytes_per_s = _rate(rate)
    chain = Chain(chain_url(context, repo))
    memory = Memory(chain)
    began = memory.load()
    with output.progress("reading", quiet=as_json) as on_progress:
        report = read(chain, bytes_per_s, memory, on_progress)
    if as_json and not (mend and report.findings):
        output.document(
            {
                "chain": chain.url,
                "ok": not report.findings,
                **dataclasses.asdict(report),
                "passes": began.passes + 1,
            }
        )
    elif not as_json:
        _show(report.findings)
        _show_foreign(report)
        before = (
            f"; {size(report.left_bytes)} had been read before it was interrupted" if began.scrubbed else ""
        )
        print(
            f"{report.objects} objects, {size(report.bytes)} read again: "
            f"{len(report.findings)} damaged{before}"
        )
    if not report.findings or not mend:
        return Damaged.exit_code if report.findings else 0
    with nullcontext() if as_json else output.progress("reading") as progress:
        store = paced(chain.store, bytes_per_s, Clock())
        plan = consider(store, [open_store(one) for one in others or ()], progress)
    return _repair(plan, False, as_json)


def _rate(text: str) -> float:
    """Bytes a second."""
    from everstep.run.settings import rate_in_bytes

    try:
        found = rate_in_bytes(text)
    except EverstepError:
        found = 0
    if not found:
        raise typer.BadParameter(f"{text!r} is no rate: 20MB/s", param_hint="--rate")
    return float(found)
