"""A run that asks for a scrub is told what is damaged while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench.kill import DEADLINE_S, keepers, wait_until
from torch import nn

from everstep.chain.history import Chain
from everstep.chain.remembering import Memory
from everstep.errors import Mismatch
from everstep.events import Event, Warned
from everstep.format import keys
from everstep.run.session import Run
from everstep.run.settings import Settings
from everstep.store.base import Store
from everstep.store.parity import ParityStore
from servers.fixtures import Bucket


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


class Training:
    def __init__(self, repo: str, **settings: Any) -> None:
        torch.manual_seed(3)
        self.events: list[Event] = []
        self.model = nn.Linear(400, 100)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.01)
        self.run = Run(
            Settings(repo, every="1 step", keep="all", **settings).overridden(),
            {"model": self.model, "optimizer": self.optimizer},
            sink=self.events.append,
        )

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            self.model(torch.full((1, 400), 1.0 + self.run.step)).sum().backward()
            self.optimizer.step()
            self.run.tick()
            assert self.run.wait(DEADLINE_S)

    def told(self) -> list[str]:
        return [str(event) for event in self.events if isinstance(event, Warned)]


@pytest.fixture(params=["disk", "parity", "bucket"])
def repo(request: pytest.FixtureRequest, tmp_path: Path, bucket: Bucket) -> str:
    if request.param == "bucket":
        return f"{bucket(request.getfixturevalue('moto'))}/run"
    return {"disk": "{}/chain", "parity": "parity:2+1:{0}/a,{0}/b,{0}/c"}[request.param].format(tmp_path)


def damage(store: Store, key: str) -> None:
    if isinstance(store, ParityStore):
        damage(store.members[1], f"shards/{key}")
        return
    data = bytearray(store.get(key))
    data[5000] ^= 1
    store.delete(key)
    assert store.put(key, [bytes(data)])


@pytest.mark.process
@pytest.mark.usefixtures("runtime")
def test_a_run_is_told_of_damage_while_it_trains(repo: str, tmp_path: Path) -> None:
    first = Training(repo)
    first.steps(3)
    first.run.close()
    chain = Chain(repo)
    oldest = list(chain.snapshots())[-1]
    # What only the oldest snapshot needs: the run itself goes on.
    key = keys.pack(chain.manifest(oldest).places[0].pack)
    damage(chain.store, key)
    second = Training(repo, scrub="1GB/s")
    assert wait_until(lambda: second.told() != [])
    second.steps(2)
    assert wait_until(lambda: Memory(chain).load().passes == 1)
    second.run.close()
    (told,) = second.told()
    assert key in told
    assert told.endswith(f"everstep -r {repo} repair")
    assert next(chain.snapshots()).step == 5
    assert wait_until(lambda: keepers(tmp_path) == [])


def test_rates_of_a_scrub() -> None:
    assert Settings("a").scrub_bytes_per_s == 0
    assert Settings("a", scrub="20MB/s").scrub_bytes_per_s == 20_000_000
    assert Settings("a", scrub="1GiB").scrub_bytes_per_s == 2**30
    given = Settings("a", scrub="20MB/s")
    assert given.overridden({"EVERSTEP_SCRUB": "5kB/s"}).scrub_bytes_per_s == 5000
    assert given.overridden({"EVERSTEP_SCRUB": "0"}).scrub_bytes_per_s == 0
    assert given.overridden({"EVERSTEP_SCRUB": ""}).scrub_bytes_per_s == 20_000_000
    for wrong in ("fast", "20MB/h", "-1MB/s", "nan", "9" * 400 + "TB/s"):
        with pytest.raises(Mismatch, match=r"is no rate.*scrub='20MB/s'"):
            Settings("a").overridden({"EVERSTEP_SCRUB": wrong})
