"""What happens to a run, as typed facts, and where they go.

A sink is any callable that takes an event. `lines` is the one a run has unless told otherwise: plain lines on
standard error, one for each snapshot, that do not disturb a tqdm bar.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

_SHOWN_DIFFERENCES = 6
"""So many differences of one class fit into a line."""


@dataclass(frozen=True)
class Opened:
    """A run was opened: what is captured with each snapshot, when, and what stays."""

    url: str
    captured: tuple[str, ...]
    every: str
    keep: str

    def __str__(self) -> str:
        return f"{self.url}: captures {', '.join(self.captured)} every {self.every}, keeps {self.keep}"


@dataclass(frozen=True)
class Started:
    """The run starts from the beginning: there is nothing to resume."""

    url: str
    why: str

    def __str__(self) -> str:
        return f"{self.url}: starts at step 0 ({self.why})"


@dataclass(frozen=True)
class Resumed:
    """The run goes on from a snapshot. `approximate` says why it is not exact; empty: it is. `began` is true
    where its branch begins with it."""

    url: str
    snapshot: str
    step: int
    epoch: int
    approximate: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    began: bool = False

    def __str__(self) -> str:
        text = (
            f"{self.url}: resumes from {self.snapshot[:8]} step {self.step} epoch {self.epoch} · {self.label}"
        )
        return text + "".join(f" · {remark}" for remark in self.remarks)

    @property
    def exact(self) -> bool:
        return not self.approximate

    @property
    def label(self) -> str:
        """`exact`, or `approximate: <why>`."""
        return f"approximate: {'; '.join(self.approximate)}" if self.approximate else "exact"


@dataclass(frozen=True)
class BroughtBack:
    """The chain's own store lacked the newest snapshot, and now has it from a replica."""

    url: str
    replica: str
    snapshot: str
    step: int
    size_bytes: int

    def __str__(self) -> str:
        what = f"{self.snapshot[:8]} step {self.step} ({size(self.size_bytes)})"
        return f"{self.url}: brings {what} back from {self.replica}"


@dataclass(frozen=True)
class Returned:
    """A replica that did not get anything does again; `behind` snapshots are sent now."""

    replica: str
    behind: int

    def __str__(self) -> str:
        left = f"{self.behind} more to go" if self.behind else "it has all there is"
        return f"the replica {self.replica} is back; {left}"


@dataclass(frozen=True)
class Unsent:
    """The run ends, or goes on, without a replica having all of it: `behind` snapshots are not there yet.
    `goes_on`: a keeper sends them; else the next run does."""

    replica: str
    behind: int
    goes_on: bool

    def __str__(self) -> str:
        lacks = f"{self.replica} lacks {self.behind} snapshot{'s' if self.behind != 1 else ''} yet"
        return f"{lacks}; " + ("the keeper goes on sending" if self.goes_on else "the next run sends them")


@dataclass(frozen=True)
class RolledBack:
    """The head of a branch was moved back to a snapshot, from that of another step. `from_step` and `to_step`
    are the same where it was there already."""

    url: str
    branch: str
    snapshot: str
    from_step: int
    to_step: int

    def __str__(self) -> str:
        steps = f"from step {self.from_step} to {self.snapshot[:8]} step {self.to_step}"
        return f"{self.url}: branch {self.branch} was rolled back {steps}"


@dataclass(frozen=True)
class Drifted:
    """Circumstances that differ between the snapshot a run goes on from and now, those of one class: `safe`,
    `changes the trajectory` or `breaks exactness`."""

    url: str
    kind: str
    differences: tuple[str, ...]

    def __str__(self) -> str:
        shown = "; ".join(self.differences[:_SHOWN_DIFFERENCES])
        more = len(self.differences) - _SHOWN_DIFFERENCES
        return f"{self.url}: {self.kind}: {shown}" + (f"; and {more} more" if more > 0 else "")

    @property
    def safe(self) -> bool:
        return self.kind == "safe"


@dataclass(frozen=True)
class Skipped:
    """A snapshot could not be restored and an older one is tried instead."""

    url: str
    snapshot: str
    why: str

    def __str__(self) -> str:
        return f"{self.url}: skips {self.snapshot}: {self.why}; nothing was deleted"


@dataclass(frozen=True)
class Taken:
    """A snapshot is durable. Sizes in bytes, times in milliseconds."""

    snapshot: str
    step: int
    trigger: str
    new_bytes: int
    logical_bytes: int
    stall_ms: float
    durable_ms: float
    behind: tuple[tuple[str, int], ...] = ()
    """By replica, how many steps its newest snapshot is behind this one."""

    def __str__(self) -> str:
        sizes = f"{size(self.new_bytes)} new of {size(self.logical_bytes)}"
        times = f"stalled {self.stall_ms:.0f} ms · durable in {self.durable_ms / 1e3:.2f} s"
        lags = "".join(f" · {replica} -{steps} steps" for replica, steps in self.behind if steps)
        return f"snapshot {self.snapshot[:6]} step {self.step} · {sizes} · {times}{lags}"


@dataclass(frozen=True)
class Missed:
    """A trigger fired while there was no room for another snapshot; none was taken."""

    step: int
    trigger: str
    count: int

    def __str__(self) -> str:
        return (
            f"no snapshot at step {self.step}: the last ones are not stored yet ({self.count} skipped so far)"
        )


@dataclass(frozen=True)
class Failed:
    """A snapshot could not be made durable. Training goes on; the error is raised at the next tick."""

    step: int
    why: str

    def __str__(self) -> str:
        return f"snapshot of step {self.step} failed: {self.why}"


@dataclass(frozen=True)
class Away:
    """A snapshot cannot be stored now: the store does not answer, or other ranks have no part of it. Training
    goes on, and its newest state waits in memory until it can be."""

    step: int
    why: str

    def __str__(self) -> str:
        kept = "training goes on, and its newest state waits in memory until it can be"
        return f"step {self.step} is not stored: {self.why}; {kept}"


@dataclass(frozen=True)
class Back:
    """The store answers again: a snapshot is durable. So many before it are not."""

    step: int
    lost: int

    def __str__(self) -> str:
        snapshots = "one snapshot was" if self.lost == 1 else f"{self.lost} snapshots were"
        return f"the store is back, and has step {self.step}; {snapshots} replaced by newer ones meanwhile"


@dataclass(frozen=True)
class Repeated:
    """Steps that had been trained before were trained again, with the same result bit for bit."""

    first: int
    last: int

    def __str__(self) -> str:
        steps = f"step {self.first}" if self.first == self.last else f"steps {self.first}-{self.last}"
        return f"{steps} repeated bit for bit"


@dataclass(frozen=True)
class Parted:
    """A step that was trained again came out otherwise than its record."""

    step: int
    differences: tuple[str, ...]

    def __str__(self) -> str:
        return f"step {self.step} parts from its record: {'; '.join(self.differences)}"


@dataclass(frozen=True)
class Skipping:
    """Batches are loaded to be dropped: a loader without a position of its own is brought to where it was."""

    done: int
    total: int

    def __str__(self) -> str:
        return f"loads {self.total} batches again to get back into the epoch: {self.done} done"


@dataclass(frozen=True)
class Signalled:
    """A signal asks for a last snapshot; the process ends after it."""

    signal: str

    def __str__(self) -> str:
        return f"{self.signal}: takes a snapshot at the end of this step and stops (once more: stops at once)"


@dataclass(frozen=True)
class Warned:
    """Something the user should know, and that stops nothing."""

    what: str

    def __str__(self) -> str:
        return f"warning: {self.what}"


Event: TypeAlias = (
    Opened
    | Started
    | Resumed
    | BroughtBack
    | Returned
    | Unsent
    | RolledBack
    | Drifted
    | Skipped
    | Taken
    | Missed
    | Failed
    | Away
    | Back
    | Repeated
    | Parted
    | Skipping
    | Signalled
    | Warned
)
Sink: TypeAlias = Callable[[Event], None]


def lines(event: Event) -> None:
    """One plain line on standard error; above a tqdm bar where there is one."""
    text = f"everstep: {event}"
    bar = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    if bar is not None and getattr(bar, "_instances", None):
        bar.write(text, file=sys.stderr)
    else:
        # One write: events come from several threads, and their lines must not run into each other.
        print(text + "\n", end="", file=sys.stderr, flush=True)


def json_lines(event: Event) -> None:
    """One JSON object a line on standard error: `event` is the kind, the rest its fields."""
    fields = {"event": type(event).__name__.lower(), **dataclasses.asdict(event)}
    print(json.dumps(fields) + "\n", end="", file=sys.stderr, flush=True)


def quiet(event: Event) -> None:
    """Nothing but what a user must not miss: warnings and failures."""
    if isinstance(event, Warned | Failed | Away | Back | Skipped | Parted | BroughtBack | Unsent) or (
        isinstance(event, Drifted) and not event.safe
    ):
        lines(event)


def default_sink() -> Sink:
    """By `EVERSTEP_LOG`: `lines` (also when unset), `json` or `quiet`."""
    return {"json": json_lines, "quiet": quiet}.get(os.environ.get("EVERSTEP_LOG", ""), lines)


def size(count_bytes: float) -> str:
    """A number of bytes for people, in powers of 1000: `1.2 MB`."""
    if count_bytes < 1000:
        return f"{count_bytes:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        count_bytes /= 1000
        if count_bytes < 999.95 or unit == "TB":
            break
    return f"{count_bytes:.1f} {unit}"
