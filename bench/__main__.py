"""`python -m bench`: everything that has a bar, beside the systems that do the same, in one run.

Writes JSON, a table and plots to bench/results. Takes some half an hour, 20 GB of memory, 30 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench import cuda, every_step, hdfs, niceness, objects, overlap, report, restore, storage, waves
from bench.measure import machine
from bench.setting import Setting, tell
from bench.states import SIZES

SCENARIOS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "overlap": overlap.measure,
    "restore": restore.measure,
    "storage": storage.measure,
    "every_step": every_step.measure,
    "waves": waves.measure,
    "niceness": niceness.measure,
    "objects": objects.measure,
    "hdfs": hdfs.measure,
    "cuda": cuda.measure,
    "cuda_medium": cuda.measure_medium,
    "cuda_restore": cuda.measure_restore,
}
BENCH = Path(__file__).parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", choices=SCENARIOS, action="append", help="may be given several times")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--size", choices=SIZES, default="full", help="small: does everything work?")
    parser.add_argument("--tokens", type=int, default=64, help="of a language model's step")
    parser.add_argument("--directory", type=Path, default=BENCH / "scratch", help="on the disk to measure")
    parser.add_argument("--results", type=Path, default=None)
    chosen = parser.parse_args(arguments)
    # Small figures say nothing: they do not replace those that do.
    results = chosen.results or (BENCH / "results" if chosen.size == "full" else chosen.directory / "results")
    results.mkdir(parents=True, exist_ok=True)
    chosen.directory.mkdir(parents=True, exist_ok=True)
    facts = {"run": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": machine()}
    for name in chosen.only or SCENARIOS:
        _measure(name, chosen, results, facts)
    print(report.write(results))
    print(f"\nwritten to {results}")
    return 0


def _measure(name: str, chosen: argparse.Namespace, results: Path, facts: dict[str, Any]) -> None:
    begun = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=chosen.directory)).resolve()
    try:
        setting = Setting(scratch, chosen.size, chosen.repetitions, chosen.tokens)
        measured = SCENARIOS[name](setting)
    finally:
        shutil.rmtree(scratch)
    if isinstance(measured.get("not measured"), str):
        # What was measured elsewhere, or before, stands.
        tell(f"{name}: not measured, {measured['not measured']}")
        return
    found = {**facts, "size": setting.size, **measured}
    found["took_s"] = round(time.monotonic() - begun, 1)
    (results / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    tell(f"{name}: {found['took_s']:.0f} s")


if __name__ == "__main__":
    # What was started is ended on the way out, also when somebody asks for that.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise SystemExit(main())
