"""Trainings on a real store, over a network that fails, cuts, and is away for a while.

`OUTAGE_S` says for how many seconds it is away (`make soak`: 30).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from everstep.chain.history import Chain
from everstep.chain.verify import verify
from servers.fault_proxy import AWAY, CUT, DROPPED, FAILED, FaultProxy, Moods
from servers.fixtures import Bucket
from servers.running import S3

pytestmark = [pytest.mark.slow, pytest.mark.process]

OUTAGE_S = float(os.environ.get("OUTAGE_S", "4"))
FOREVER = 1 << 40
DEADLINE_S = 300

TRAINING = """
import sys, time
import torch, everstep
torch.manual_seed(0)
model = torch.nn.Linear(256, 256)
optimizer = torch.optim.AdamW(model.parameters())
run = everstep.open(sys.argv[1], model=model, optimizer=optimizer, every="10 steps", keep="all")
for step in range(1, 1_000_000):
    optimizer.zero_grad()
    model(torch.randn(64, 256)).square().mean().backward()
    optimizer.step()
    run.tick()
    print(step, flush=True)
    time.sleep(0.02)  # What a step of a larger model takes.
"""


class Training:
    """A training in a process of its own, and the newest step it has told."""

    def __init__(self, url: str, environment: dict[str, str]) -> None:
        self.step = 0
        self.said: list[str] = []
        self._stepped = threading.Condition()
        self._child = subprocess.Popen(
            [sys.executable, "-c", TRAINING, url], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._readers = [
            threading.Thread(target=self._read_steps, daemon=True),
            threading.Thread(target=self._read_words, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read_steps(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            with self._stepped:
                self.step = int(line)
                self._stepped.notify_all()

    def _read_words(self) -> None:
        assert self._child.stderr is not None
        for line in self._child.stderr:
            with self._stepped:
                self.said.append(line)
                self._stepped.notify_all()

    def wait_for_step(self, step: int) -> None:
        self._wait(lambda: self.step >= step)

    def wait_for_snapshots(self, count: int) -> None:
        self._wait(lambda: len(self.snapshots()) >= count)

    def _wait(self, ready) -> None:  # type: ignore[no-untyped-def]
        with self._stepped:
            assert self._stepped.wait_for(ready, DEADLINE_S), "".join(self.said)

    def snapshots(self) -> list[int]:
        """The steps of those it was told to be durable."""
        lines = "".join(self.said)
        return [int(step) for step in re.findall(r"snapshot [0-9a-f]+ step (\d+) ", lines)]

    def end(self) -> str:
        """As a scheduler ends it: it takes a last snapshot. Returns what it has said."""
        self._child.send_signal(signal.SIGTERM)
        assert self._child.wait(DEADLINE_S) == 143, "".join(self.said)
        for reader in self._readers:
            reader.join(60)
        return "".join(self.said)

    def kill(self) -> None:
        self._child.kill()
        self._child.wait(60)


@pytest.mark.parametrize("keeper", ["process", "thread"])
def test_a_training_over_a_bad_network_loses_nothing_and_never_stops(
    keeper: str, ceph: S3, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 % of the requests fail, of 1 % the answer is cut off, and for a while nobody is there."""
    url = f"{bucket(ceph)}/runs/gpt"
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    with FaultProxy(ceph.port, Moods(drop=0.01, fail=0.01, cut=0.01), seed=5) as proxy:
        training = Training(
            url,
            {
                **os.environ, "AWS_ENDPOINT_URL": proxy.endpoint, "EVERSTEP_KEEPER": keeper,
                "XDG_RUNTIME_DIR": str(runtime), "XDG_STATE_HOME": str(tmp_path / "state"),
            },
        )  # fmt: skip
        try:
            training.wait_for_snapshots(3)
            proxy.go_away(FOREVER)
            before = training.step
            threading.Timer(OUTAGE_S, proxy.come_back).start()
            # It is asked for while it is away, and the training goes on meanwhile.
            training.wait_for_step(before + int(OUTAGE_S * 10))
            there = len(training.snapshots())
            training.wait_for_snapshots(there + 3)
            said = training.end()
        finally:
            training.kill()
        assert not proxy.is_away
        assert proxy.done[AWAY] > 0
        assert proxy.done[DROPPED] + proxy.done[FAILED] + proxy.done[CUT] > 0
    assert "failed" not in said
    assert "is not stored" not in said
    chain = Chain(url)
    assert sorted(snapshot.step for snapshot in chain.snapshots()) == training.snapshots()
    points = list(chain.points())
    assert [point.number for point in points] == list(range(len(points), 0, -1))
    assert verify(chain).findings == []
