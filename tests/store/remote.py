"""What every store over a network has to stand: a race for the head, and a run that is killed."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from everstep.chain.history import Chain
from everstep.chain.verify import verify
from everstep.format import keys, record
from everstep.format.record import HeadRecord
from everstep.store.urls import open_store

PROCESSES = 8
ROUNDS = 150
AT_ONCE = 5
"""So many rounds are begun together: some stores take half a second for one."""


def _racer(url: str, number: int, start: Any, told: Any) -> None:
    """Commit heads against the others; tell of those that were won."""
    store = open_store(url)

    def is_won(turn: int) -> bool:
        mine = HeadRecord(
            snapshot=f"{turn:032x}{number:032x}", step=turn, writer=number + 1, nonce=f"{number:016x}",
            at="2026-01-01T00:00:00.000000+00:00", branch="main", number=turn,
        )  # fmt: skip
        return store.put(mine.key, [record.seal(mine)])

    won: list[int] = []
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for first in range(1, ROUNDS + 1, AT_ONCE):
            turns = range(first, first + AT_ONCE)
            start.wait(300)
            won += [turn for turn, mine in zip(turns, threads.map(is_won, turns), strict=True) if mine]
    told.put((number, won))


def race(url: str) -> None:
    """Eight processes commit heads at the same time: each is one's, none is lost, and none is forked."""
    spawn = multiprocessing.get_context("spawn")
    start, told = spawn.Barrier(PROCESSES), spawn.Queue()
    racers = [spawn.Process(target=_racer, args=(url, number, start, told)) for number in range(PROCESSES)]
    for racer in racers:
        racer.start()
    won = dict(told.get(timeout=500) for _ in racers)
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    assert sorted(turn for turns in won.values() for turn in turns) == list(range(1, ROUNDS + 1))
    store = open_store(url)
    assert len(list(store.list(keys.HEADS))) == ROUNDS
    winner = {turn: number for number, turns in won.items() for turn in turns}
    for turn in range(1, ROUNDS + 1):
        key = keys.numbered(keys.head("main"), turn)
        assert record.unseal(store.get(key), HeadRecord, key).writer == winner[turn] + 1


_TRAINING = """
import os, signal, sys
import torch, everstep
torch.manual_seed(0)
model = torch.nn.Linear(64, 64)
optimizer = torch.optim.AdamW(model.parameters())
run = everstep.open(sys.argv[1], model=model, optimizer=optimizer, every=None, keep="all")
while run.step < 20:
    optimizer.zero_grad()
    loss = model(torch.full((1, 64), float(run.step))).sum()
    loss.backward()
    optimizer.step()
    run.tick(loss=loss.detach())
    if run.step in (4, 8):
        run.take()
    if run.step == 10 and run.resumed is None:
        if os.environ["EVERSTEP_KEEPER"] == "thread":
            run.wait()
        os.kill(os.getpid(), signal.SIGKILL)
run.close()
"""


def kill_and_go_on(url: str, keeper: str, directory: Path) -> None:
    """A run is killed. Its keeper makes durable what it was given, its records are found by the next, and the
    run goes on to its end.

    Args:
        directory: of this run alone, for what a user's sessions have.
    """
    runtime = directory / "runtime"
    runtime.mkdir(mode=0o700)
    environment = {
        **os.environ,
        "EVERSTEP_KEEPER": keeper,
        "XDG_RUNTIME_DIR": str(runtime),
        "XDG_STATE_HOME": str(directory / "state"),
    }

    def train() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", _TRAINING, url], env=environment, capture_output=True, text=True,
            timeout=200, check=False,
        )  # fmt: skip

    first = train()
    assert first.returncode == -9, first.stderr
    second = train()
    assert second.returncode == 0, second.stderr
    if keeper == "process":
        assert re.search(r"resumes from \w+ step 8 ", second.stderr), second.stderr
        assert "steps 9-10 repeated bit for bit" in second.stderr
        assert "out of the keeper's memory" in second.stderr
    head = Chain(url).head()
    assert head is not None
    assert head.step == 20
    assert verify(Chain(url)).findings == []
    assert not list((directory / "state").rglob("main-*")), "the journals were sealed"
