from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
