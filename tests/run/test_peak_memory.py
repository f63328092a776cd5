"""Peak memory: a resume needs the live state and a few chunks, not a second model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, sys
import torch
import everstep
torch.set_num_threads(1)
model = torch.nn.ModuleList(torch.nn.Linear(2048, 2048) for _ in range(20))
for parameter in model.parameters():
    parameter.requires_grad_()
    parameter.data.fill_(1.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run = everstep.open(sys.argv[1], model=model, every=None)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[2] == "take":
    run.tick()
    run.close()
else:
    assert run.step == 1
    print((after - before) * 1024)
    import os
    os._exit(0)
"""


@pytest.mark.process
@pytest.mark.slow
def test_restore_in_place(tmp_path: Path) -> None:
    def run(what: str) -> str:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), what]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout

    run("take")
    grown = int(run("restore"))
    state = 20 * 2048 * 2049 * 4
    assert grown < state / 3, f"{grown / 1e6:.0f} MB more for a state of {state / 1e6:.0f} MB"
