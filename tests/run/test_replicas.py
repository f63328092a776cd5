"""A run with replicas: its disk is lost, damaged, behind; it is taken over; and it says what it waits for."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench.kill import keepers, wait_until

from everstep.chain import lease as leases
from everstep.chain import prune
from everstep.chain.history import Chain
from everstep.chain.lease import Lease
from everstep.chain.retention import Keep
from everstep.chain.verify import verify
from everstep.errors import Conflict, Fenced, Mismatch, NotFound, Unavailable
from everstep.events import BroughtBack, Event, Taken, Unsent, Warned
from everstep.format import keys, record
from everstep.keeper.client import living
from everstep.run.settings import Settings
from everstep.store.memory import MemoryStore
from everstep.testing.faults import FaultyStore
from servers.running import S3
from training import Training, end_of, flip

pytestmark = pytest.mark.slow

Bucket = Callable[[S3], str]

SOURCE = Path(__file__).resolve().parents[2]


def told(training: Training, kind: type[Event]) -> list[Any]:
    return [event for event in training.events if isinstance(event, kind)]


def closed(training: Training, repo: object, until: int, **settings: Any) -> Training:
    training.train(repo, until, **settings).close()
    return training


def assert_whole(path: object) -> list[int]:
    chain = Chain(path)  # type: ignore[arg-type]
    assert verify(chain).findings == []
    return [head.step for head in chain.heads()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    path = tmp_path_factory.mktemp("undisturbed") / "chain"
    closed(Training(), path, 20)
    return end_of(path)


def test_a_lost_disk_is_made_up_for_exactly(tmp_path: Path, undisturbed: tuple[str, Any]) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    closed(Training(), here, 11, replicas=[there])
    shutil.rmtree(here)
    again = closed(Training(), here, 20, replicas=[str(there)])
    (back,) = told(again, BroughtBack)
    assert (back.replica, back.step) == (str(there), 11)
    assert end_of(here) == end_of(there) == undisturbed
    assert assert_whole(here) == [20, 18, 15, 12, 11]
    assert assert_whole(there) == [20, 18, 15, 12, 11, 9, 6, 3]


def test_each_snapshot_says_how_far_the_replicas_are(tmp_path: Path) -> None:
    training = Training()
    run = training.train(tmp_path / "here", 9, replicas=[tmp_path / "there"])
    assert run.take("now").durable(str(tmp_path / "there"), 60)
    run.close()
    taken: list[Taken] = told(training, Taken)
    assert [one.behind[0][0] for one in taken] == [str(tmp_path / "there")] * len(taken)
    assert f" · {tmp_path / 'there'} -3 steps" in str(taken[0])


def test_damage_on_the_disk_is_got_round_and_not_built_on(
    tmp_path: Path, undisturbed: tuple[str, Any]
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    closed(Training(), here, 11, replicas=[there])
    head = Chain(here).find("head")
    for name in Chain(here).manifest(head).packs:
        flip(here / keys.pack(name), 100)
    again = Training()
    run = again.train(here, 11, replicas=[there])
    assert run.resumed.step == 11
    assert any(str(there) in remark for remark in run.resumed.remarks)
    damaged = set(Chain(here).manifest(head).packs)
    while run.step < 20:
        again.epoch_of(run, 20)
    run.close()
    newest = Chain(here).find("head")
    assert not damaged & set(Chain(here).manifest(newest).packs)
    assert end_of(here) == undisturbed


def test_a_damaged_record_of_the_head_is_got_round(tmp_path: Path, undisturbed: tuple[str, Any]) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    closed(Training(), here, 11, replicas=[there])
    flip(here / keys.manifest(Chain(here).find("head").record.manifests[0]), 60)
    again = closed(Training(), here, 20, replicas=[there])
    assert end_of(here) == end_of(there) == undisturbed
    assert told(again, BroughtBack) == []


def test_replicas_come_from_the_environment_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERSTEP_REPLICAS", f"{tmp_path / 'one'}, {tmp_path / 'two'}")
    closed(Training(), tmp_path / "here", 4)
    for name in ("one", "two"):
        assert assert_whole(tmp_path / name) == [4, 3]
    assert Settings("x", replicas="a, b,").replica_list == ("a", "b")
    with pytest.raises(Mismatch, match="EVERSTEP_REPLICA_WAIT"):
        Settings("x").overridden({"EVERSTEP_REPLICA_WAIT": "soon"})


def test_a_chain_is_no_replica_of_itself(tmp_path: Path) -> None:
    for replicas in ([tmp_path / "here"], [tmp_path / "a", tmp_path / "a"]):
        with pytest.raises(Mismatch, match="is named twice"):
            Training().train(tmp_path / "here", 1, replicas=replicas)
    assert list(tmp_path.iterdir()) == []


class Away(FaultyStore):
    away = True

    def _strikes(self, verb: str) -> bool:
        if self.away:
            raise Unavailable("it is away")
        return False


def test_closing_does_not_wait_for_who_is_away_and_says_what_is_left(tmp_path: Path) -> None:
    away = Away(MemoryStore("away"))
    closed(Training(), tmp_path / "here", 1)
    training = closed(Training(), tmp_path / "here", 7, replicas=[away])
    (unsent,) = told(training, Unsent)
    assert str(unsent) == "memory://away lacks 3 snapshots yet; the next run sends them"
    assert len([one for one in told(training, Warned) if "gets nothing now" in one.what]) == 1
    away.away = False
    closed(Training(), tmp_path / "here", 8, replicas=[away])
    assert assert_whole(away.inner) == [8, 7, 6, 3, 1]


def test_closing_waits_no_longer_than_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERSTEP_REPLICA_WAIT", "0")
    release = threading.Event()

    class Slow(FaultyStore):
        def put(self, key: str, parts: Any) -> bool:
            assert release.wait(60)
            return super().put(key, parts)

    monkeypatch.setattr("everstep.keeper.following._JOIN_S", 0.0)
    training = closed(Training(), tmp_path / "here", 4, replicas=[Slow(MemoryStore("slow"))])
    release.set()
    assert [one.behind for one in told(training, Unsent)] == [2]


def test_nothing_is_begun_anew_while_the_only_copy_does_not_answer(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="which may have the run, does not answer"):
        Training().train(tmp_path / "here", 1, replicas=[Away(MemoryStore("away"))])
    assert list(tmp_path.iterdir()) == []


def test_two_that_went_on_differently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split brain: the sentence says what to type, and typing it keeps both."""
    from everstep import cli

    here, there, other = tmp_path / "here", tmp_path / "there", tmp_path / "other"
    closed(Training(), here, 4, replicas=[there])
    closed(Training(), here, 7)  # Its replica was left out.
    closed(Training(), other, 9, replicas=[there])  # Another host took over.
    with pytest.raises(Conflict, match="has gone on differently") as caught:
        Training().train(here, 12, replicas=[there])
    before = [end_of(place) for place in (here, there)]
    command = caught.value.next.partition(", then")[0]
    assert cli.main(command.split()[1:]) == 0
    here.rename(tmp_path / "moved")
    run = Training().train(here, 12, replicas=[there])
    assert run.resumed.step == 9
    run.close()
    assert end_of(there, "main-here") == before[0]
    assert [head.step for head in Chain(there).heads()][:2] == [12, 9]
    assert verify(Chain(there)).findings == []


def test_who_is_taken_over_through_a_replica_stops_at_the_next_tick(tmp_path: Path) -> None:
    there = MemoryStore("there")
    training = Training()
    run = training.train(tmp_path / "here", 4, replicas=[there])
    assert run.take().durable(there.url, 60)
    taken = leases._owner(0, run._lease.number + 1, "main")
    there.put(taken.key, [record.seal(taken)])
    fenced = run._taking.errors
    run.take().durable(timeout=60)
    assert wait_until(lambda: bool(fenced))
    with pytest.raises(Fenced, match="by way of memory://there"):
        training.epoch_of(run, 20)
    run.close()
    assert told(training, Taken)[-1].step == 4


def test_resume_never_does_not_overlook_a_replica(tmp_path: Path) -> None:
    closed(Training(), tmp_path / "here", 4, replicas=[tmp_path / "there"])
    shutil.rmtree(tmp_path / "here")
    with pytest.raises(Mismatch, match="resume='never' forbids"):
        Training().train(tmp_path / "here", 5, replicas=[tmp_path / "there"], resume="never")
    with pytest.raises(NotFound):
        Training().train(tmp_path / "gone", 5, replicas=[tmp_path / "empty"], resume="must")
    run = Training().train(tmp_path / "here", 4, replicas=[tmp_path / "there"], resume="must")
    assert run.resumed.step == 4
    run.close()


def test_an_older_snapshot_that_only_a_replica_has(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    closed(Training(), here, 9, replicas=[there])
    store = Chain(here).store
    mine = Lease.take(store)
    plan = prune.plan(Chain(here), Keep.parse("last 1"), branches=["main"], mine=mine)
    assert plan is not None
    prune.execute(Chain(here), plan)
    mine.release()
    run = Training().train(here, 6, replicas=[there], resume="step:6")
    assert run.resumed.step == 6
    run.close()
    assert assert_whole(here) == [9]


def test_a_run_with_replicas_goes_back_in_place(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    training = Training()
    run = training.train(here, 9, replicas=[there])
    run.rollback("step:6")
    assert run.step == 6
    while run.step < 12:
        training.epoch_of(run, 12)
    run.close()
    assert assert_whole(here) == assert_whole(there) == [12, 9, 6, 9, 6, 3]


# -- real processes ----------------------------------------------------------------------------------------

SCRIPT = """
import os, sys
import torch
torch.set_num_threads(1)
sys.path[:0] = [{tests!r}]
from training import Training

until, here, there = int(sys.argv[1]), sys.argv[2], sys.argv[3]
training = Training()
run = training.open(here, replicas=[there], every="2 steps", keep="last 3")
pending = None
print("resumed", run.resumed.step if run.resumed else 0, flush=True)
while run.step < until:
    for batch in run.steps(training.loader, until=until):
        if pending is not None:
            pending.durable(there, 100)
        loss = training.backward(batch)
        training.update(loss, run.step + 1)
        run.log(loss=loss)
        print("step", run.step + 1, flush=True)
        pending = run.take() if run.step % 4 == 3 else None
run.close()
print("done", flush=True)
"""


@pytest.fixture
def _processes(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERSTEP_KEEPER_LINGER", "20")


def started(until: int, here: Path, there: Path) -> subprocess.Popen[str]:
    script = SCRIPT.format(tests=str(SOURCE / "tests"))
    command = [sys.executable, "-c", script, str(until), str(here), str(there)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def until_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.split() == ["step", str(step)]:
            return
    raise AssertionError(f"it ended before step {step}")


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.usefixtures("_processes")
@pytest.mark.parametrize("keeper", ["lives", "dies"])
def test_a_killed_run_whose_disk_is_lost_ends_as_if_nothing_had_happened(tmp_path: Path, keeper: str) -> None:
    whole = started(24, tmp_path / "whole", tmp_path / "whole-there")
    assert whole.wait(300) == 0
    here, there = tmp_path / "here", tmp_path / "there"
    killed = started(24, here, there)
    until_step(killed, 10)
    killed.kill()
    killed.wait(60)
    if keeper == "dies":
        for pid in keepers(tmp_path):
            os.kill(pid, signal.SIGKILL)
    else:
        # It has stored all that it was given: what it writes later would begin the directory anew.
        assert wait_until(lambda: any(status.held for status in living()))
    shutil.rmtree(here)
    again = started(24, here, there)
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 0
    resumed = int(out.splitlines()[0].split()[1])
    assert 8 <= resumed <= 10
    assert end_of(here) == end_of(there) == end_of(tmp_path / "whole")
    assert wait_until(lambda: not keepers(tmp_path))
    assert assert_whole(here)[0] == assert_whole(there)[0] == 24


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.usefixtures("_processes")
@pytest.mark.parametrize("server", ["moto", "ceph"])
def test_a_replica_in_a_bucket(
    tmp_path: Path, server: str, bucket: Bucket, request: pytest.FixtureRequest
) -> None:
    url = bucket(request.getfixturevalue(server)) + "/runs/gpt"
    here = tmp_path / "here"
    first = Training()
    run = first.train(here, 7, replicas=[url], keep="last 2")
    pending = run.take("last")
    assert pending.durable(url, 100)
    run.close()
    assert told(first, Unsent) == []
    assert assert_whole(url)[:2] == [7, 6]
    shutil.rmtree(here)
    again = closed(Training(), here, 10, replicas=[url])
    assert [one.step for one in told(again, BroughtBack)] == [7]
    assert wait_until(lambda: not keepers(tmp_path))
    assert end_of(here) == end_of(url)
    assert assert_whole(url)[0] == assert_whole(here)[0] == 10


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.usefixtures("_processes")
def test_a_keeper_that_is_killed_while_it_follows(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    trained = started(30, here, there)
    for step in (3, 7, 9, 14):
        until_step(trained, step)
        for pid in keepers(tmp_path):
            os.kill(pid, signal.SIGKILL)
        if (there / keys.CHAIN).exists():
            chain = Chain(there)
            assert all(point.damage is None for point in chain.points())
    assert trained.communicate(timeout=300)[0].splitlines()[-1] == "done"
    assert trained.returncode == 0
    assert wait_until(lambda: not keepers(tmp_path))
    assert assert_whole(here)[:3] == assert_whole(there)[:3]
    assert end_of(here) == end_of(there)
