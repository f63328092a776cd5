from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench.kill import lost

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(1000)
def test_trainings_whose_processes_are_killed_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """In a process of its own, because it forks trainings: pytest's has threads by now."""
    figures = tmp_path / "kill.json"
    command = [sys.executable, "-m", "bench.kill", "--kills", "36", "--seed", "5", "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads(figures.read_text())
    assert outcome["violations"] == []
    assert outcome["kinds"] == {"trainer": 12, "keeper": 12, "both": 12}
    assert {kind: sum(places.values()) for kind, places in outcome["kills_in"].items()} == outcome["kinds"]
    assert outcome["identical"] == outcome["runs"] >= 6
    assert outcome["events"].get("resumed", 0) > 0
    assert outcome["events"]["resumed"] == outcome["exact"]
    assert outcome["handed_over"] == outcome["handed_over_durable"]
    assert outcome["reported_durable"] > 0
    assert outcome["arenas"] > 0
    assert outcome["left_behind"] == 0


def said(*snapshots: tuple[str, int]) -> list[dict[str, Any]]:
    return [{"event": "taken", "snapshot": id, "step": step} for id, step in snapshots]


def listed(*snapshots: tuple[str, int]) -> list[Any]:
    return [SimpleNamespace(id=id, step=step) for id, step in snapshots]


def test_what_had_to_go_is_not_lost() -> None:
    events = [{"event": "started", "step": 0}, *said(("a", 3), ("b", 6), ("c", 6), ("d", 6), ("e", 6))]
    assert list(lost(events, listed(("e", 6), ("d", 6), ("c", 6)), 3)) == []
    # A snapshot that only the next life has heard of is newer, too.
    resumed = [*said(("b", 6)), {"event": "resumed", "snapshot": "c", "step": 6}, *said(("d", 6), ("e", 6))]
    assert list(lost(resumed, listed(("e", 6), ("d", 6), ("c", 6)), 3)) == []


@pytest.mark.parametrize(
    "there",
    [
        [("c", 9), ("b", 6)],
        [("c", 9), ("b", 6), ("older", 3)],
        # Of its own step, but told of before it, or by nobody.
        [("c", 9), ("b", 6), ("before", 6)],
        [("c", 9), ("b", 6), ("nobody's", 6)],
    ],
)
def test_what_need_not_go_is_lost(there: list[tuple[str, int]]) -> None:
    events = said(("older", 3), ("before", 6), ("gone", 6), ("b", 6), ("c", 9))
    assert [event["snapshot"] for event in lost(events, listed(*there), 3) if event["step"] > 3] == [
        one for one in ("before", "gone") if one not in dict(there)
    ]
    assert list(lost(said(("gone", 6)), listed(), float("inf")))
