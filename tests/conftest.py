"""What all tests share. One thread for torch, so that tests may fork."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from examples import QUICK
from servers.fixtures import azurite, bucket, ceph, container, directory, hdfs, liar, moto, peeker, refuser

__all__ = ["azurite", "bucket", "ceph", "container", "directory", "hdfs", "liar", "moto", "peeker", "refuser"]

torch.set_num_threads(1)
settings.register_profile("quick", max_examples=10)
if QUICK:
    settings.load_profile("quick")


@pytest.fixture(scope="session", autouse=True)
def _a_world_of_its_own() -> Iterator[None]:
    """No setting from outside, in fixtures of any scope; and nothing that the tests of another process
    leave in a shared directory, as a living keeper, is seen by these."""
    with (
        tempfile.TemporaryDirectory(prefix="everstep-tests-") as directory,
        pytest.MonkeyPatch.context() as patch,
    ):
        os.chmod(directory, 0o711)  # Some tests are another user, who has to pass through.
        for name in [name for name in os.environ if name.startswith("EVERSTEP_")]:
            patch.delenv(name)
        patch.delenv("XDG_RUNTIME_DIR", raising=False)
        patch.setenv("TMPDIR", directory)
        patch.setattr(tempfile, "tempdir", directory)
        patch.setenv("XDG_STATE_HOME", f"{directory}/state")
        # A process for each of a thousand runs takes its time; the tests of the keeper process ask for one.
        patch.setenv("EVERSTEP_KEEPER", "thread")
        # Torch's stores ask for the name of every address that connects, and a name server that does not
        # answer costs 5 s each time.
        patch.setenv("RES_OPTIONS", "timeout:1 attempts:1")
        yield


@pytest.fixture(autouse=True)
def _settings_of_a_test_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that code under test leaves in the environment too."""
    for name in [name for name in os.environ if name.startswith("EVERSTEP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("EVERSTEP_KEEPER", "thread")
