"""How results reach a person or a program: tables, documents, progress, errors."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, TextIO

from everstep.errors import EverstepError

OnProgress = Callable[[int, int], None]

_LEAST_LAST = 24
"""So many characters of a table's last column go into a line, however narrow the terminal."""

UNEXPECTED, USAGE, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
"""The exit codes that no kind of error has."""


def on_terminal(stream: TextIO | None = None) -> bool:
    """Whether a person is looking: only then there are colours, and lines that are drawn over."""
    stream = stream or sys.stdout
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def clean(text: object) -> str:
    """One line of text that a terminal shows and does not obey, whatever a store holds."""
    return "".join(one if one.isprintable() else f"\\x{ord(one):02x}" for one in str(text))


def document(content: object) -> None:
    """One JSON document on standard output."""
    print(json.dumps(content, indent=2))


def table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], marked: frozenset[int] = frozenset()
) -> None:
    """Rows below their columns' names; a name that ends with `>` is aligned to the right.

    Args:
        marked: the numbers of the rows that must catch the eye.
    """
    names = [name.rstrip(">") for name in columns]
    right = [name.endswith(">") for name in columns]
    cells = [[clean(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    if on_terminal():
        _rich_table(names, right, widths, cells, marked)
        return
    for row in (names, *cells):
        padded = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        print("  ".join(padded).rstrip())


def _rich_table(
    names: list[str], right: list[bool], widths: list[int], cells: list[list[str]], marked: frozenset[int]
) -> None:
    """Only the last column folds: where a terminal is too narrow even so, its own wrapping loses nothing."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name, to_right, width in zip(names[:-1], right, widths, strict=False):
        made.add_column(name, justify="right" if to_right else "left", min_width=width)
    made.add_column(names[-1], justify="right" if right[-1] else "left", overflow="fold")
    for number, row in enumerate(cells):
        made.add_row(*map(Text, row), style="red" if number in marked else None)
    least = sum(widths[:-1]) + 2 * len(widths) + min(widths[-1], _LEAST_LAST)
    console.width = max(console.width, least)
    console.print(made)


def fields(pairs: Sequence[tuple[str, object]]) -> None:
    """Names and values below each other; those without a value are left out."""
    shown = [(name, clean(value)) for name, value in pairs if value not in ("", None)]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print(f"{name.ljust(width)}  {value}")


@contextmanager
def progress(label: str, quiet: bool = False) -> Iterator[OnProgress]:
    """A bar while the block runs, where a person is looking; nothing is left of it afterwards."""
    if quiet or not on_terminal():
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    parts = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*parts, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def remark(text: str) -> None:
    """Something a person should know, beside the result."""
    print(f"everstep: {clean(text)}", file=sys.stderr)


def limit(text: str, of: str = "lines") -> int:
    """How many a person wants to see; 0: all. Raises a usage error."""
    if not text.isdecimal():
        import typer

        raise typer.BadParameter(f"{text!r} is not a number of {of}")
    return int(text)


def shown_number(value: float | str) -> str:
    """A metric to six digits."""
    return f"{value:.6g}" if isinstance(value, float | int) else value


def count(number: int, word: str) -> str:
    """`1 pack`, `2 packs`."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


# -- times -------------------------------------------------------------------------------------------------


def local_time(text: str) -> str:
    """A record's time in the zone of this machine, to the second; as it is where it is none."""
    moment = _moment(text)
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S") if moment else text


def age(text: str) -> str:
    """How long ago a record's time is: `3 min`."""
    moment = _moment(text)
    if moment is None:
        return ""
    seconds = (datetime.now(timezone.utc) - moment).total_seconds()
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _moment(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


# -- errors ------------------------------------------------------------------------------------------------


def failed(error: EverstepError, as_json: bool) -> int:
    """Say what went wrong; returns the exit code."""
    details: dict[str, Any] = {
        "message": error.problem,
        "kept": error.kept,
        "next": error.next,
        "key": error.key,
    }
    _tell(type(error).__name__, str(error), details, as_json)
    return error.exit_code


def failed_otherwise(kind: str, message: str, next: str, code: int, as_json: bool) -> int:
    """The same for what is none of the seven kinds."""
    text = f"{message.rstrip('.')}. Next: {next}" if next else message
    _tell(kind, text, {"message": message, "kept": "", "next": next, "key": ""}, as_json)
    return code


def _tell(kind: str, text: str, details: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": kind, **details}), file=sys.stderr)
    else:
        remark(text)
