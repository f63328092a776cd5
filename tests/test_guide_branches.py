"""The guide to branches, executed; what needs a logger's package is at least Python."""

from __future__ import annotations

from typing import Any

import pytest

from everstep.run.session import Run
from test_docs import ROOT, Section, execute, executed, here, seed

__all__ = ["here"]

pytestmark = pytest.mark.slow

BRANCHES = ROOT / "docs/guides/branches.md"


@pytest.mark.parametrize("part", executed(BRANCHES))
@pytest.mark.usefixtures("here")
def test_the_guide_to_branches_runs(part: Section, capsys: pytest.CaptureFixture[str]) -> None:
    seed()
    names: dict[str, Any] = {}
    execute(BRANCHES, part.blocks, capsys, names)
    for one in names.values():
        assert not isinstance(one, Run) or one._closed, f"{part.title} leaves its run open"
