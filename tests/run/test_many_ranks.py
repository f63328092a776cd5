"""Several ranks, each a real process: killed, frozen, asked to stop, started again in other numbers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bench import ranks_kill

from everstep.chain.history import Chain
from everstep.chain.verify import verify
from servers.fault_proxy import FaultProxy
from servers.fixtures import Bucket
from servers.running import S3

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"

SCRIPT = """
import os, sys, time
import torch
import everstep
rank = int(os.environ["RANK"])
torch.manual_seed(1)
torch.set_num_threads(1)
model = torch.nn.Linear(64, 64)
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
torch.manual_seed(100 + rank)
every = os.environ.get("EVERY")
run = everstep.open(sys.argv[1], model=model, optimizer=optimizer, every=every, keep="all")
print("open", run.step, flush=True)
pending = None
for line in sys.stdin:
    word = line.strip()
    if word == "take":
        pending = run.take()
        print("asked", flush=True)
    elif word == "begun":
        print("begun", pending.begun, flush=True)
    elif word == "durable":
        print("durable", pending.durable(100) and pending.snapshot.id, flush=True)
    elif word == "digest":
        state = torch.cat([one.detach().flatten() for one in model.parameters()])
        print("digest", state.sum().item().hex(), torch.rand(1).item().hex(), flush=True)
    elif word == "rollback":
        print("back", run.rollback().to_step, flush=True)
    elif word == "close":
        run.close()
        print("closed", flush=True)
        break
    else:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 64) * (run.step + 1)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        begun = time.monotonic()
        run.tick(loss=loss.item() * int(os.environ["WORLD_SIZE"]))
        print("step", run.step, time.monotonic() - begun, flush=True)
"""


class Rank:
    """A rank of a job whose TCPStore this process has, as torchrun's agent would."""

    def __init__(self, repo: Path | str, rank: int, ranks: int, port: int, start: int) -> None:
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(start),
            "EVERSTEP_RANKS_HOLD": "0.5",
        }
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(repo)],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            env={**os.environ, **environment},
        )

    def say(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def said(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def ended(self) -> tuple[int, str]:
        out, err = self.process.communicate(timeout=200)
        return self.process.returncode, out + err


class Job:
    def __init__(self, repo: Path | str) -> None:
        self.repo = repo
        make: Any = torch._C._distributed_c10d.TCPStore
        self.store = make("127.0.0.1", 0, None, True, timedelta(seconds=60), False)
        self.ranks: list[Rank] = []
        self._starts = 0

    def start(self, ranks: int) -> list[int]:
        """Start so many; the steps that they go on from."""
        self._starts += 1
        self.ranks = [Rank(self.repo, one, ranks, self.store.port, self._starts) for one in range(ranks)]
        said = [one.said() for one in self.ranks]
        assert all(one[:1] == ["open"] for one in said), [one.ended() for one in self.ranks]
        return [int(step) for _, step in said]

    def all(self, word: str) -> list[list[str]]:
        for one in self.ranks:
            one.say(word)
        return [one.said() for one in self.ranks]

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            assert all(said[0] == "step" for said in self.all("step"))

    def take(self) -> str:
        """A snapshot that rank 0 asks for, durable."""
        first = self.ranks[0]
        first.say("take")
        assert first.said() == ["asked"]
        said: list[str] = []
        while said != ["begun", "True"]:
            self.step()
            first.say("begun")
            said = first.said()
        first.say("durable")
        (_, id) = first.said()
        return id

    def head(self) -> str:
        head = Chain(self.repo).head()
        return "" if head is None else head.id

    def end(self) -> None:
        for one in self.ranks:
            if one.process.poll() is None:
                one.process.kill()
            one.process.wait(60)
        self.ranks.clear()


@pytest.fixture
def job(tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    monkeypatch.setenv("EVERSTEP_KEEPER_LINGER", "30")
    made = Job(tmp_path / "chain")
    yield made
    made.end()


@pytest.mark.process
@pytest.mark.slow
class TestProcesses:
    def test_a_snapshot_of_all_and_on_from_it_with_any_number(self, job: Job) -> None:
        assert job.start(3) == [0, 0, 0]
        job.step()
        id = job.take()
        taken = Chain(job.repo).snapshot(id)
        assert len(taken.record.manifests) == 3
        three = job.all("digest")
        assert len({one[1] for one in three}) == 1
        assert len({one[2] for one in three}) == 3, "generators of their own"
        assert job.all("close") == [["closed"]] * 3
        last = Chain(job.repo).find("head")
        assert verify(Chain(job.repo)).findings == []
        job.end()
        # With as many: exactly where each was.
        assert job.start(3) == [last.step] * 3
        assert job.all("digest") == three
        job.end()
        # With fewer, with one, with more.
        for ranks in (2, 1, 4):
            assert job.start(ranks) == [last.step] * ranks
            assert {one[1] for one in job.all("digest")} == {three[0][1]}
            job.end()

    @pytest.mark.parametrize("ranks", [2, 1])
    def test_only_as_many_ranks_repeat_what_was_trained(self, job: Job, ranks: int) -> None:
        job.start(2)
        job.step()
        job.take()
        step = Chain(job.repo).find("head").step
        job.step(5)
        job.end()
        assert job.start(ranks) == [step] * ranks
        job.step(5)
        assert job.all("close") == [["closed"]] * ranks
        _, said = job.ranks[0].ended()
        assert "parts from" not in said
        assert ("repeated" in said) == (ranks == 2)

    def test_what_all_have_is_stored_once(self, job: Job) -> None:
        job.start(4)
        job.step()
        taken = Chain(job.repo).snapshot(job.take()).record
        model_and_momentum = 2 * (64 * 64 + 64) * 4
        assert model_and_momentum <= taken.logical_bytes < model_and_momentum + 4 * 20_000, "and generators"

    def test_a_frozen_rank_costs_a_snapshot_and_no_step(self, job: Job) -> None:
        job.start(2)
        job.step()
        first = job.take()
        frozen = job.ranks[1].process
        frozen.send_signal(signal.SIGSTOP)
        job.ranks[0].say("take")
        assert job.ranks[0].said() == ["asked"]
        for _ in range(20):
            job.ranks[0].say("step")
            (_, _, seconds) = job.ranks[0].said()
            assert float(seconds) < 30, "it is bounded, and this machine is slow"
        assert job.head() == first
        frozen.send_signal(signal.SIGCONT)
        behind = 20
        for _ in range(behind):
            job.ranks[1].say("step")
            assert job.ranks[1].said()[0] == "step"
        assert job.take() != first
        assert job.all("close") == [["closed"]] * 2
        _, said = job.ranks[0].ended()
        assert "rank 1 did not answer in time" in said or "over before this rank heard of it" in said

    def test_a_rank_that_is_killed_leaves_the_older_snapshots(self, job: Job) -> None:
        job.start(2)
        job.step()
        first = job.take()
        job.ranks[1].process.kill()
        job.ranks[1].process.wait(60)
        job.ranks[0].say("take")
        assert job.ranks[0].said() == ["asked"]
        for _ in range(5):
            job.ranks[0].say("step")
            assert job.ranks[0].said()[0] == "step"
        assert job.head() == first
        job.end()
        step = Chain(job.repo).find("head").step
        assert job.start(2) == [step, step]

    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_signal_to_one_stops_all_at_the_same_step(self, job: Job, rank: int) -> None:
        job.start(2)
        job.step(3)
        job.ranks[rank].process.send_signal(signal.SIGTERM)
        deadline = iter(range(1000))
        while any(one.process.poll() is None for one in job.ranks):
            next(deadline)
            for one in job.ranks:
                with suppress(BrokenPipeError):  # It has left.
                    one.say("step")
            for one in job.ranks:
                one.said()
        assert [one.process.returncode for one in job.ranks] == [143, 143]
        head = Chain(job.repo).find("head")
        assert head.record.trigger == "SIGTERM"
        assert len(head.record.manifests) == 2
        job.end()
        assert job.start(2) == [head.step] * 2

    def test_all_go_back_together(self, job: Job) -> None:
        job.start(2)
        job.step()
        id = job.take()
        step = Chain(job.repo).snapshot(id).step
        job.step(3)
        assert job.all("rollback") == [["back", str(step)]] * 2
        job.step(2)
        assert job.take() != id
        assert job.all("close") == [["closed"]] * 2
        assert verify(Chain(job.repo)).findings == []

    def test_another_state_on_one_rank_is_refused_on_all(self, job: Job, tmp_path: Path) -> None:
        job.start(1)
        job.step()
        assert job.all("close") == [["closed"]]
        job.end()
        job.repo.rename(tmp_path / "other")
        job.repo.write_text("a file")
        job.ranks = [Rank(job.repo, one, 2, job.store.port, 77) for one in range(2)]
        ended = [one.ended() for one in job.ranks]
        assert [status for status, _ in ended] == [1, 1]
        assert "rank 0: " in ended[1][1].splitlines()[-1]


@pytest.mark.process
@pytest.mark.slow
def test_a_store_that_hangs_costs_snapshots_and_no_step(
    job: Job, moto: S3, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes what is asked, and answers nothing until enough steps have gone by."""
    job.repo = f"{bucket(moto)}/runs/gpt"
    monkeypatch.setenv("EVERY", "3 steps")
    with FaultProxy(moto.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        job.start(2)
        monkeypatch.setenv("AWS_ENDPOINT_URL", moto.endpoint)
        job.step()
        job.take()
        proxy.hang()
        job.step(30)  # What was asked before may still be answered.
        before = job.head()
        for _ in range(60):
            said = job.all("step")
            assert all(float(seconds) < 30 for _, _, seconds in said), (
                "it is bounded, and this machine is slow"
            )
        assert job.head() == before
        proxy.go_on()
        while job.head() == before:
            job.step()
        assert job.all("close") == [["closed"]] * 2
        _, said_0 = job.ranks[0].ended()
    assert "the last ones are not stored yet" in said_0
    assert "failed" not in said_0
    chain = Chain(job.repo)
    assert len(job.ranks) == len(chain.find("head").record.manifests)
    assert verify(chain).findings == []


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_killed_trainings_under_torchrun_end_as_if_nothing_had_happened(kind: str) -> None:
    dice, found = random.Random(1), ranks_kill.Found()
    reference = ranks_kill.campaign(kind, [2], [], dice, found, None)
    # After the first of them torchrun starts the ranks again by itself.
    ranks_kill.campaign(kind, [2], ["one rank", "all"], dice, found, reference, restarts=True)
    assert found.starts == {f"{kind} 2": 3}
    ranks_kill.campaign(kind, [2, 1], ["one rank"], dice, found, None)
    assert found.wrong == []
    assert found.finished == 3
    assert found.kills == {"one rank": 2, "all": 1}


def test_the_example_for_slurm_is_a_script() -> None:
    script = EXAMPLES / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "#SBATCH --signal=TERM@120" in text, (
        "to the step's processes: with B: the shell alone would get it"
    )
    assert "#SBATCH --requeue" in text


@pytest.mark.parametrize("name", ["pytorchjob.yaml", "trainjob.yaml"])
def test_the_examples_for_kubernetes_are_objects(name: str) -> None:
    objects = list(yaml.safe_load_all((EXAMPLES / name).read_text()))
    assert [one["kind"] for one in objects] == [{"pytorchjob.yaml": "PyTorchJob"}.get(name, "TrainJob")]
    assert objects[0]["apiVersion"].split("/")[0] in {"kubeflow.org", "trainer.kubeflow.org"}
    assert "terminationGracePeriodSeconds: 120" in (EXAMPLES / name).read_text()
