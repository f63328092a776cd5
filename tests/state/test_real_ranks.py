"""Ranks in processes of their own: what each stores and gets back is what torch gathers, bit for bit."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_process import made, parts_of, same, train
from stored import joined

from everstep.state.lazy import LazyState
from everstep.state.objects import named
from everstep.state.restore import restore

HERE = Path(__file__).parent


def launch(directory: Path, ranks: int, *work: str) -> None:
    """A process for each rank; all are gone when this returns."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    logs = [directory / f"log-{rank}" for rank in range(ranks)]
    running = []
    try:
        for rank, log in enumerate(logs):
            command = [
                sys.executable,
                str(HERE / "rank_process.py"),
                str(directory),
                str(rank),
                str(ranks),
                port,
            ]
            with log.open("wb") as out:
                running.append(
                    subprocess.Popen(
                        [*command, *work],
                        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )
        statuses = [process.wait(180) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert statuses == [0] * ranks, "\n".join(log.read_text()[-3000:] for log in logs)


@pytest.mark.slow
@pytest.mark.process
def test_what_ranks_store_is_what_torch_gathers(tmp_path: Path) -> None:
    works = ["ddp", "fsdp", "fsdp-tp", "hsdp"]
    launch(tmp_path, 4, ",".join(works))
    for work in works:
        parts, expected = parts_of(tmp_path, f"{work}-4")
        snapshot = joined(parts)
        lazy = LazyState(snapshot.manifest, snapshot.fill, torch.device("cpu"))
        same("model", lazy.state("model"), expected[0]["model"])
        same("optimizer", lazy.state("optimizer"), expected[0]["optimizer"])
        # Into one rank, whose model is not spread at all.
        alone = made("", 9, 1)
        train(alone, 0, 1)
        back = restore(
            snapshot.manifest, snapshot.fill, named(alone), parts=[part.manifest for part in parts]
        )
        assert back.approximate == ["world size 4 -> 1"]
        same("model", alone["model"].state_dict(), expected[0]["model"])
        same("optimizer", alone["optimizer"].state_dict(), expected[0]["optimizer"])
    # From each to another, on as many ranks and on others; the optimizers have a state already, or none.
    launch(tmp_path, 4, "fsdp-tp,ddp,fsdp", "fsdp-4")
    launch(tmp_path, 2, "fsdp,fsdp-tp,ddp", "fsdp-tp-4")
