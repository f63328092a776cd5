"""The benchmark at a tiny size: every scenario gives its figures. What they are is not looked at."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench import __main__ as bench
from bench import niceness, overlap, report, storage
from bench.bars import BARS, Bar
from bench.kill import wait_until
from bench.processes import Peak, Tree
from bench.systems import DCP_BEST, OURS, SYSTEMS, TORCH_SAVE, missing

from servers import ceph, hdfs, small
from servers.fixtures import need

pytestmark = [pytest.mark.slow, pytest.mark.process]


def measured(name: str, directory: Path) -> dict[str, object]:
    arguments = ["--size", "small", "--repetitions", "2", "--directory", str(directory), "--only", name]
    assert bench.main(arguments) == 0
    assert [path.name for path in directory.iterdir()] == ["results"], "something was left behind"
    return json.loads((directory / "results" / f"{name}.json").read_text())  # type: ignore[no-any-return]


def reached(name: str, results: dict[str, object]) -> dict[str, float | None]:
    """The figures of the bars that this scenario measures."""
    return {bar.name: bar.figure({name: results}) for bar in BARS if bar.path[0] == name}


@pytest.mark.parametrize("name", ["storage", "every_step", "waves"])
def test_a_scenario_gives_the_figures_of_its_bars(name: str, tmp_path: Path) -> None:
    found = measured(name, tmp_path)
    for bar, figure in reached(name, found).items():
        assert figure is not None, bar
        assert math.isfinite(figure), bar
    assert "| bar |" in (tmp_path / "results/README.md").read_text()


def test_packs_to_and_from_a_bucket(tmp_path: Path) -> None:
    need("the Ceph object gateway", [*ceph.missing(), *small.missing("boto3")])
    found = measured("objects", tmp_path)
    for bar, figure in reached("objects", found).items():
        assert figure is not None, bar
        assert math.isfinite(figure), bar
    assert "## Packs to and from a bucket" in (tmp_path / "results/README.md").read_text()


def test_packs_to_and_from_hdfs(tmp_path: Path) -> None:
    need("HDFS", hdfs.missing())
    found = measured("hdfs", tmp_path)
    for bar, figure in reached("hdfs", found).items():
        assert figure is not None, bar
        assert math.isfinite(figure), bar
    assert "## Packs to and from HDFS" in (tmp_path / "results/README.md").read_text()


def test_each_niceness_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(niceness, "NICENESSES", (10, 19))
    measured("niceness", tmp_path)
    text = (tmp_path / "results/README.md").read_text()
    assert "| 10 (chosen) | " in text
    assert "| 19 | " in text


def test_restores_from_disk_and_from_the_arena(tmp_path: Path) -> None:
    found = measured("restore", tmp_path)
    times = found["times_s"]
    assert isinstance(times, dict)
    for what in ("cold", "warm"):
        for system in ("everstep", "torch.load(mmap)", "dcp.load"):
            assert (
                times[f"{system}, {what}, returned"]["median"] <= times[f"{system}, {what}, ready"]["median"]
            )
    assert {"everstep, model alone, cold", "safetensors, model alone, cold"} <= times.keys()
    arena = found["arena"]
    assert isinstance(arena, dict)
    # A keeper that is a thread dies with its training: then it says so instead.
    assert ("not measured" in arena) == (os.environ.get("EVERSTEP_KEEPER") == "thread"), arena


def test_overlap_measures_who_is_there_and_names_who_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = (OURS, DCP_BEST[0], TORCH_SAVE)
    absent = {"safetensors": "not installed (pip install it)"}
    monkeypatch.setattr(overlap, "GROUPS", {"gpt2": [(*group, *absent)], "third_gpt2": [(OURS,)]})
    monkeypatch.setattr(overlap, "missing", lambda name: absent.get(name, ""))
    found = measured("overlap", tmp_path)
    for bar, figure in reached("overlap", found).items():
        assert figure is not None, bar
        assert math.isfinite(figure), bar
    gpt2 = found["gpt2"]
    assert isinstance(gpt2, dict)
    assert gpt2["systems"].keys() == set(group)
    text = (tmp_path / "results/README.md").read_text()
    assert all(f"| {name}" in text for name in group)
    assert "| safetensors | not installed (pip install it) |" in text


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name not in (OURS, DCP_BEST[0], TORCH_SAVE)])
def test_a_system_saves_and_ends(name: str, tmp_path: Path) -> None:
    if missing(name):
        pytest.skip(f"{name}: {missing(name)}")
    from bench.trainer import Trainer

    with Trainer("many_tensors", name, tmp_path / "place", "small", 0) as trainer:
        for command in ("begin", "busy", "idle", "end"):
            answer = trainer.tell(command)
            if command != "end":
                assert answer["durable_s"] > 0
        assert trainer.tree.cpu_seconds() > 0
    assert wait_until(lambda: not trainer.tree.pids())


def test_a_system_that_fails_is_named_with_its_reason(tmp_path: Path) -> None:
    from bench.trainer import Trainer

    with (
        pytest.raises(RuntimeError, match="no such system: KeyError"),
        Trainer("many_tensors", "no such system", tmp_path / "place", "small", 0) as trainer,
    ):
        trainer.tell("begin")


HELD_BYTES = 128 << 20
ORPHAN = f"held = b'x' * {HELD_BYTES}; print(os.getpid(), flush=True); sys.stdin.read()"
LEAVES = (
    "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
)


def test_a_process_that_left_its_parent_is_counted(tmp_path: Path) -> None:
    tree = Tree("left", str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", LEAVES, f"import os, sys; {ORPHAN}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=tree.environment(),
        text=True,
    ) as parent:
        assert parent.wait() == 0
        assert parent.stdout is not None
        orphan = int(parent.stdout.readline())
        assert tree.pids() == [orphan]
        assert tree.cpu_seconds() > 0
        with Peak(tree) as peak:
            pass
        assert HELD_BYTES < peak.bytes < 2 * HELD_BYTES
        assert parent.stdin is not None
        parent.stdin.close()
        assert parent.stdout.read() == ""


def test_shared_memory_counts_once_and_unmapped(tmp_path: Path) -> None:
    tree = Tree("shared", str(tmp_path))
    code = (
        "import os; m = os.memfd_create('held'); os.posix_fallocate(m, 0, int(os.environ['BYTES'])); "
        "os.fork(); print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**tree.environment(), "BYTES": str(HELD_BYTES)},
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        assert len(tree.pids()) == 2
        assert HELD_BYTES < tree.memory_bytes() < 2 * HELD_BYTES
        process.communicate("\n\n")


def test_a_bar_is_met_or_not_on_its_side() -> None:
    low, high = Bar("low", "<=", 2, ("a", "b")), Bar("high", ">=", 2, ("a", "c"), 10)
    results = {"a": {"b": {"median": 2.5, "min": 1.0, "max": 3.0}, "c": 0.25}}
    assert low.figure(results) == 2.5
    assert low.spread(results) == (1.0, 3.0)
    assert not low.is_met(2.5)
    assert high.figure(results) == 2.5
    assert high.is_met(2.5)
    rows = report.table(["bar"], [[report._bar_row(bar, results)[-1]] for bar in (low, high)])
    assert rows.splitlines()[2:] == ["| **no** |", "| yes |"]
    absent = Bar("absent", "<=", 1, ("a", "d"))
    assert absent.figure(results) is None
    assert absent.reason({"a": {"not measured": "no GPU"}}) == "no GPU"


def test_the_slow_store_is_a_store(tmp_path: Path) -> None:
    from everstep.store.base import Store
    from everstep.store.local import LocalStore

    store = storage.Throttled(LocalStore(tmp_path), 1e9)
    assert isinstance(store, Store)
    assert store.put("a/b", [b"12", b"34"])
    assert not store.put("a/b", [b"5"])
    assert bytes(store.get("a/b", 1, 2)) == b"23"
    assert [entry.key for entry in store.list()] == ["a/b"]
