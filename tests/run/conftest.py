"""What the tests of runs share: keeper processes of a test's own."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.kill import keepers


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keepers are processes, live in a directory of this test alone, and none outlives it."""
    directory = tmp_path / "runtime"
    directory.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", str(directory))  # Where others' keepers are not seen.
    monkeypatch.setenv("EVERSTEP_KEEPER", "process")
    yield directory / "everstep"
    for pid in keepers(tmp_path):
        os.kill(pid, signal.SIGKILL)
