"""PyTorch's own tests of its checkpoints, with our writer and reader in the place of the file system's.

They are no part of this project, and are not changed: `pytorch.sh` gets them out of Debian's source package
of PyTorch into a cache, `EVERSTEP_PYTORCH_TESTS` names another directory that has them (best, the
`test/distributed/checkpoint` of the installed release). `swap/sitecustomize.py` swaps the classes, in
spawned processes too, and lets what asks for GPUs run on the CPU with gloo. That takes most of an hour, so
it is done only where it is asked for:

    pip install expecttest && tests/dcp/pytorch.sh
    EVERSTEP_REQUIRE_PYTORCH_TESTS=1 python -m pytest tests/dcp/test_pytorch.py -n 0

As a program it prints what came of each file: `python tests/dcp/test_pytorch.py [everstep|none] [FILE...]`;
with `none` nothing is swapped, which tells what passes on this machine at all.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.timeout(3600)]

HERE = Path(__file__).parent
GIVEN = os.environ.get("EVERSTEP_PYTORCH_TESTS", "")
REQUIRED = os.environ.get("EVERSTEP_REQUIRE_PYTORCH_TESTS", "0") not in ("", "0")
FILE_S = 1800
TEST_S = 300

OVERWRITES = (
    "a save overwrites nothing, but is the chain's next snapshot: there is no overwrite=False to refuse"
)

FILES: dict[str, dict[str, str]] = {
    "test_file_system_checkpoint_cpu.py": {},
    "test_dtensor_resharding.py": {},
    "test_dtensor_checkpoint.py": {},
    "e2e/test_e2e_save_and_load.py": {
        "TestE2ESaveAndLoad::test_overwrite": OVERWRITES,
        "TestNoCPU::test_no_cpu": "asks for a group without the CPU, and here all are of the CPU",
    },
    "test_planner.py": {},
    "test_save_load_api.py": {},
    "test_hsdp_checkpoint.py": {},
    "test_tp_checkpoint.py": {},
    "test_fsdp_tp_checkpoint_conversion.py": {},
    "test_format_utils.py": {},
}
"""By file, the tests that are left out, and why.

Files that are not run: `test_checkpoint.py` (its writers and readers are its own, and it skips itself
without two GPUs); `test_fsdp_model_state.py`, `test_fsdp_optim_state.py` (FSDP1 looks for an accelerator in
loading: they fail with nothing swapped); `test_fsspec.py`, `test_hf_storage.py` and the like (of other
storages); what saves nothing (`test_nested_dict.py`, `test_state_dict.py`, `test_traverse.py`, ...).
"""


@dataclass(frozen=True)
class Result:
    passed: tuple[str, ...]
    failed: tuple[str, ...]
    skipped: tuple[str, ...]
    told: str

    def __str__(self) -> str:
        counts = f"{len(self.passed)} passed, {len(self.failed)} failed, {len(self.skipped)} skipped"
        return "\n    ".join([counts, *(f"failed: {one}" for one in self.failed)])


def directory() -> Path | None:
    """Where the tests are."""
    if GIVEN:
        return Path(GIVEN)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    found = Path(cache) / "everstep-pytorch/tests"
    return found if (found / "complete").exists() else None


def run(where: Path, file: str, swap: str = "everstep", without: tuple[str, ...] = ()) -> Result:
    """Run one file's tests in a process of their own."""
    environment = {
        **os.environ,
        "EVERSTEP_TEST_SWAP": swap,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE / "swap"), os.environ.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        ),
    }
    with tempfile.TemporaryDirectory(prefix="everstep-pytorch-") as work:
        report = Path(work) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        command += ["-o", "addopts=", "-o", "filterwarnings=ignore", f"--timeout={TEST_S}", "--tb=short"]
        command += [f"--junitxml={report}", *(f"--deselect={file}::{one}" for one in without), file]
        environment["TMPDIR"] = work
        done = subprocess.run(
            command, cwd=where, env=environment, timeout=FILE_S, capture_output=True, text=True, check=False
        )
        told = done.stdout[-20_000:] + done.stderr[-2_000:]
        if not report.exists():
            return Result((), (f"{file} did not run",), (), told)
        found: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
        for case in ET.parse(report).getroot().iter("testcase"):
            kinds = {child.tag for child in case}
            kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            found[kind].append(f"{(case.get('classname') or '').rpartition('.')[2]}::{case.get('name')}")
    return Result(tuple(found["passed"]), tuple(found["failed"]), tuple(found["skipped"]), told)


@pytest.mark.parametrize("file", FILES)
def test_pytorchs_own(file: str) -> None:
    if not (GIVEN or REQUIRED):
        pytest.skip("PyTorch's own tests take most of an hour: see tests/dcp/test_pytorch.py")
    where = directory()
    missing = "PyTorch's own tests are not here" if where is None else ""
    if importlib.util.find_spec("expecttest") is None:
        missing = "they need the package expecttest"
    if missing:
        assert not REQUIRED, missing
        pytest.skip(f"{missing}: see tests/dcp/test_pytorch.py")
    assert where is not None
    if not (where / file).exists():
        pytest.skip(f"{where} has no {file}")
    result = run(where, file, without=tuple(FILES[file]))
    assert not result.failed, f"{result}\n{result.told}"
    assert result.passed, f"{result}\n{result.told}"


if __name__ == "__main__":
    there = directory()
    assert there is not None, "run tests/dcp/pytorch.sh first"
    how, chosen = (sys.argv[1:2] or ["everstep"])[0], sys.argv[2:] or list(FILES)
    for one in chosen:
        print(one, run(there, one, how, tuple(FILES.get(one, ()))), flush=True)
