"""PyTorch's own tests of its checkpoints, with our writer and reader in the place of the file system's.

They are no part of this project, and are not changed: `pytorch.sh` gets them out of Debian's source package of PyTorch
into a cache, `EVERSTEP_PYTORCH_TESTS` names another directory that has them (`test/distributed/checkpoint` of the
release that is installed, best). `swap/sitecustomize.py` swaps the classes, in the processes that they spawn
too, and lets what asks for GPUs run on the CPU with gloo. It takes half an hour, so it runs only where it is asked for:

    tests/dcp/pytorch.sh
    EVERSTEP_REQUIRE_PYTORCH_TESTS=1 python -m pytest tests/dcp/test_pytorch.py -n 0
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.timeout(3600)]

HERE = Path(__file__).parent
REQUIRED = os.environ.get("EVERSTEP_REQUIRE_PYTORCH_TESTS", "0") not in ("", "0")
GIVEN = os.environ.get("EVERSTEP_PYTORCH_TESTS", "")
MINUTES = 40

FILES: dict[str, dict[str, str]] = {}
"""By file, the tests that are left out, and why."""
