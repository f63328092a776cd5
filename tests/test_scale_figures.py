"""docs/SCALE.md: its figures are those of the simulation, and of encoded objects."""

from __future__ import annotations

import re
from dataclasses import astuple
from pathlib import Path

import pytest
from bench.ranks import Job, Setting, Took, sizes

from everstep.format import manifest, record

PAGE = Path(__file__).resolve().parents[1] / "docs" / "SCALE.md"


def rows(what: str) -> list[list[str]]:
    """The cells of the table after a comment, without its two head lines."""
    table = PAGE.read_text().partition(f"<!-- {what} -->\n")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def row(ranks: int, took: Took) -> list[str]:
    listings = sum(count for what, count in took.requests.items() if what.startswith("list "))
    of_all = sum(took.requests.values()) / ranks
    return [
        f"{ranks:,}", str(took.of_a_rank), f"{took.of_rank_0:,}", str(listings), f"{of_all:.2f}",
        f"{took.last_part_s:.1f} s", f"{took.late_s:.1f} s",
    ]  # fmt: skip


def test_the_sizes_are_those_of_encoded_objects() -> None:
    for cells in rows("sizes"):
        ranks, of_record, head, part, parts, _, pages = astuple(sizes(int(cells[0].replace(",", ""))))
        assert cells == [f"{number:,}" for number in (ranks, of_record, head, part, parts, pages)]


def test_the_requests_are_those_of_the_simulation() -> None:
    """Of the smallest number of ranks here; `tests/chain/test_ranks_scale.py` has a larger one."""
    (first, *_) = rows("simulated")
    took = Job(Setting(1024)).take(1)
    assert took.committed
    assert first == row(1024, took)


@pytest.mark.parametrize("what", ["sizes", "simulated"])
def test_all_tables_speak_of_the_same_ranks(what: str) -> None:
    assert [cells[0] for cells in rows(what)] == ["1,024", "4,096", "16,384"]


def test_the_bounds_are_those_of_the_format() -> None:
    text = PAGE.read_text()
    most = int(re.findall(r"([\d,]+) ranks are the most", text)[0].replace(",", ""))
    assert most == manifest.MAX_RANKS
    assert sizes(most).record < record.MAX_RECORD_BYTES
