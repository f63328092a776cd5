"""The keeper process and its trainer: real processes, killed in all the ways they can be."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from handing import (
    DEADLINE_S,
    GRID_BYTES,
    LAYOUT,
    assert_stored,
    begun,
    hand_over,
    job_of,
    laid,
    state,
    until,
)

from everstep.chain.history import Chain
from everstep.chain.lease import Lease
from everstep.chain.verify import verify
from everstep.errors import Conflict, EverstepError, Fenced, Unavailable, Unsupported
from everstep.keeper import client, protocol
from everstep.keeper.base import Job, Outcome, Terms
from everstep.keeper.client import ProcessKeeper, living
from everstep.keeper.places import living_places, places
from everstep.keeper.protocol import Peer
from everstep.store.memory import MemoryStore

pytestmark = pytest.mark.process

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src"


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keepers of a test live in a directory of its own, and none outlives it."""
    directory = tmp_path / "runtime"
    directory.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    yield directory
    for status in living():
        os.kill(status.pid, signal.SIGKILL)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Chain.create(tmp_path / "chain", GRID_BYTES)
    return tmp_path / "chain"


class Told:
    """What a keeper tells its trainer."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.warnings: list[str] = []

    def keeper(self, path: Path, **seams: Any) -> ProcessKeeper:
        return ProcessKeeper(Chain(path), self.outcomes.append, self.warnings.append, **seams)


class Trainer:
    """A trainer in a process of its own, which does what it is told."""

    def __init__(self, path: Path, *rank: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "trainer_process.py"), str(path), *map(str, rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), str(HERE)])},
            text=True,
        )

    def do(self, word: str, *arguments: object) -> Any:
        self.ask(word, *arguments)
        return self.answer()

    def ask(self, word: str, *arguments: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, [word, *arguments])) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the trainer died"
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def trainer(path: Path) -> Iterator[Callable[[], Trainer]]:
    started: list[Trainer] = []

    def start() -> Trainer:
        started.append(Trainer(path))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture
def odd_keeper(path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a keeper with a fault where the next trainer finds it."""
    started: list[subprocess.Popen[str]] = []

    def start(*fault: object) -> subprocess.Popen[str]:
        place = places(Chain(path))[0]
        command = [sys.executable, str(HERE / "odd_keeper.py"), str(place.path), str(path), *map(str, fault)]
        environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True))
        said = started[-1].stdout
        assert said is not None
        assert said.readline() == "listening\n"
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.wait()


def dead(pid: int) -> bool:
    """Whether a process has ended; whoever should collect it may not have."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def lingering() -> protocol.Status:
    """The only living keeper, once it has done all that a dead trainer has left."""
    found: list[protocol.Status] = []

    def done() -> bool:
        found[:] = living()
        return len(found) == 1 and not found[0].trainer and not found[0].jobs

    until(done, "the keeper has done what it was given")
    return found[0]


def arenas_of(pid: int) -> list[str]:
    """The shared memory that a process has open or mapped."""
    found = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(descriptor))
        except FileNotFoundError:
            continue
    found += Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [one for one in found if "everstep-arena" in one]


def held_by(keeper: ProcessKeeper, chain: Chain) -> list[tuple[int, bool]]:
    """The steps that lie in memory, and whether they are what they should be."""
    return [
        (step, bytes(held.memory[: LAYOUT.arena_bytes]) == state(step))
        for held in keeper.held()
        for step in [chain.snapshot(held.snapshot).step]
    ]


# -- a run from its begin to its end -----------------------------------------------------------------------


def test_snapshots_are_made_durable_by_another_process(path: Path, runtime: Path) -> None:
    told = Told()
    keeper = told.keeper(path)
    assert keeper.held() == []
    lease = begun(keeper, Chain(path))
    for step in range(1, 6):
        hand_over(keeper, step)
    assert keeper.wait(DEADLINE_S)
    assert [outcome.job.facts.step for outcome in told.outcomes] == [1, 2, 3, 4, 5]
    assert all(outcome.job.pending.snapshot == outcome.snapshot for outcome in told.outcomes)
    until(lambda: living()[0].jobs == (), "the keeper has put its last job away")
    (status,) = living()
    assert (status.trainer, status.jobs, status.torch_imported) == (os.getpid(), (), False)
    assert status.pid != os.getpid()
    assert status.nice >= 10
    assert os.getsid(status.pid) == status.pid != os.getsid(0)
    keeper.close()
    lease.release()
    assert_stored(path, [5, 4, 3, 2, 1])
    assert told.warnings == []
    # Nothing stays: no process, not even as a zombie, no directory, no memory.
    assert not Path(f"/proc/{status.pid}").exists()
    assert list((runtime / "everstep").iterdir()) == []
    assert arenas_of(os.getpid()) == []


def test_the_record_says_what_it_cost(path: Path) -> None:
    told = Told()
    keeper = told.keeper(path)
    begun(keeper, Chain(path))
    arena = keeper.arena(LAYOUT.arena_bytes, wait=True)
    assert arena is not None
    job = job_of(1)
    keeper.submit(job)
    keeper.wave(job, arena, 0, LAYOUT.arena_bytes, frozenset())
    job.facts.costs.update(stall=1.5, capture=2)  # Known when all is captured, not before.
    keeper.end(job)
    assert job.pending.durable(DEADLINE_S)
    keeper.close()
    assert job.pending.snapshot is not None
    costs = job.pending.snapshot.record.costs
    assert (costs["stall"], costs["capture"]) == (1.5, 2.0)
    assert 0 < costs["durable"] <= told.outcomes[0].durable_ms + 0.001
    assert costs["cpu_keeper"] > 0
    assert 1e6 < costs["keeper_bytes"] < 500e6


def test_a_state_in_waves(path: Path) -> None:
    layout = laid(600_000)
    told = Told()
    keeper = told.keeper(path)
    begun(keeper, Chain(path))
    waves = layout.waves(512 * 1024, GRID_BYTES)
    assert len(waves) > 4
    for step in (1, 2):
        data = state(step, layout)
        job = job_of(step, layout)
        keeper.submit(job)
        for first, last in waves:
            arena = keeper.arena(512 * 1024, wait=True)
            assert arena is not None
            arena.memory[: last - first] = data[first:last]
            keeper.wave(job, arena, first, last, frozenset())
        keeper.end(job)
        assert job.pending.durable(DEADLINE_S)
    keeper.close()
    assert_stored(path, [2, 1], layout)


def test_a_snapshot_that_cannot_be_completed_is_none(path: Path) -> None:
    told = Told()
    keeper = told.keeper(path)
    begun(keeper, Chain(path))
    dropped = hand_over(keeper, 1, end=False)
    keeper.drop(dropped)
    hand_over(keeper, 2)
    keeper.wait()
    with pytest.raises(Unavailable, match="could not be completed"):
        dropped.pending.durable()
    # Its arena is free again: both can be had at once.
    assert all(keeper.arena(LAYOUT.arena_bytes, wait=False) for _ in range(2))
    assert keeper.arena(LAYOUT.arena_bytes, wait=False) is None
    assert not keeper.has_room()
    keeper.close()
    assert_stored(path, [2])


def test_arenas_grow_with_the_layout(path: Path) -> None:
    told = Told()
    keeper = told.keeper(path)
    begun(keeper, Chain(path))
    large = laid(400_000)
    for step, layout in enumerate([LAYOUT, LAYOUT, large, large], 1):
        assert hand_over(keeper, step, layout).pending.durable(DEADLINE_S)
    keeper.wait()
    until(lambda: living()[0].arenas == (large.arena_bytes,) * 2, "the small arenas are given back")
    assert len([one for one in arenas_of(os.getpid()) if "rw-s" in one]) == 2
    keeper.close()
    assert [one.step for one in Chain(path).snapshots()] == [4, 3, 2, 1]
    assert not verify(Chain(path)).findings


def test_more_memory_than_there_is(path: Path, odd_keeper: Callable[..., subprocess.Popen[str]]) -> None:
    odd_keeper("little", 4_000_000)
    told = Told()
    keeper = told.keeper(path)
    keeper.held()
    begun(keeper, Chain(path))
    for _ in range(2):
        with pytest.raises(Unavailable, match="no memory for an arena of 4,009,984 bytes"):
            keeper.arena(4_009_984, wait=True)
    assert hand_over(keeper, 1).pending.durable(DEADLINE_S)
    keeper.close()
    assert_stored(path, [1])


def test_what_cannot_travel_fails_and_the_next_does_not(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_FRAME_BYTES", 20_000)
    told = Told()
    keeper = told.keeper(path)
    begun(keeper, Chain(path))
    arena = keeper.arena(LAYOUT.arena_bytes, wait=True)
    assert arena is not None
    job = job_of(1)
    job.values = bytes(30_000)
    keeper.submit(job)
    keeper.wave(job, arena, 0, LAYOUT.arena_bytes, frozenset())
    keeper.end(job)
    with pytest.raises(Unsupported, match="larger than"):
        job.pending.durable(DEADLINE_S)
    assert hand_over(keeper, 2).pending.durable(DEADLINE_S)
    keeper.close()
    assert_stored(path, [2])


def test_closing_what_was_never_begun(path: Path, runtime: Path) -> None:
    keeper = Told().keeper(path)
    keeper.close()
    assert living() == []
    assert list((runtime / "everstep").iterdir()) == []


def test_another_run_in_the_same_process(path: Path) -> None:
    parent = ""
    for step in (1, 2, 3):
        told = Told()
        keeper = told.keeper(path)
        assert keeper.held() == []
        lease = begun(keeper, Chain(path), parent)
        job = hand_over(keeper, step)
        keeper.close()
        lease.release()
        assert job.pending.snapshot is not None
        parent = job.pending.snapshot.id
    assert_stored(path, [3, 2, 1])
    assert [one.record.parents for one in Chain(path).snapshots()][-1] == ()


def test_errors_keep_their_kind(path: Path) -> None:
    told = Told()
    keeper = told.keeper(path)
    begun(keeper, Chain(path))
    hand_over(keeper, 1)
    keeper.wait()
    Lease(Chain(path).store, 1).release()  # Whoever takes it over from elsewhere counts on from there.
    job = hand_over(keeper, 2)
    with pytest.raises(Fenced) as caught:
        job.pending.durable(DEADLINE_S)
    assert str(path) in str(caught.value)
    assert caught.value.next.startswith("everstep -r")
    keeper.close()
    assert_stored(path, [1])


def test_stores_of_this_process_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="store of this process"):
        ProcessKeeper(Chain.create(MemoryStore()), print, print)


# -- the trainer dies --------------------------------------------------------------------------------------


def test_a_killed_trainer_s_snapshot_becomes_durable_and_the_next_finds_it_in_memory(
    path: Path,
    trainer: Callable[[], Trainer],
    odd_keeper: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    there, go_on = tmp_path / "there", tmp_path / "go_on"
    for fifo in (there, go_on):
        os.mkfifo(fifo)
    odd_keeper("waits", there, go_on)
    first = trainer()
    first.do("held")
    first.do("begin")
    first.do("take", 7)
    assert there.read_text() == "there"  # The keeper is about to write the first file.
    first.kill()
    second = trainer()
    second.ask("held")
    assert_stored(path, [])
    go_on.write_text("")
    (held,) = second.answer()
    assert (held["step"], held["same"]) == (7, True)
    assert_stored(path, [7])
    second.do("begin", held["snapshot"])
    second.do("take", 8)
    assert second.do("wait") == [[8, ""]]
    assert not second.do("torch_imported")
    second.do("close")
    assert living() == []
    assert_stored(path, [8, 7])
    assert next(Chain(path).snapshots()).record.parents == (held["snapshot"],)


def test_waiting_for_the_keeper_is_told(
    path: Path,
    trainer: Callable[[], Trainer],
    odd_keeper: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    there, go_on = tmp_path / "there", tmp_path / "go_on"
    for fifo in (there, go_on):
        os.mkfifo(fifo)
    odd_keeper("waits", there, go_on)
    first = trainer()
    first.do("held")
    first.do("begin")
    first.do("take", 7)
    there.read_text()
    first.kill()
    warned = threading.Event()
    warnings: list[str] = []

    def warn(text: str) -> None:
        warnings.append(text)
        warned.set()

    keeper = ProcessKeeper(Chain(path), print, warn)
    waiting = threading.Thread(target=keeper.held)
    waiting.start()
    assert warned.wait(DEADLINE_S)
    go_on.write_text("")
    waiting.join()
    assert len(warnings) == 1
    assert "step 7" in warnings[0]
    keeper.close()


def test_what_a_killed_trainer_had_not_handed_over_is_dropped(
    path: Path, trainer: Callable[[], Trainer]
) -> None:
    first = trainer()
    first.do("begin")
    first.do("take", 1)
    first.do("wait")
    first.do("take_without_end", 2)
    first.kill()
    until(lambda: lingering().arenas == (LAYOUT.arena_bytes,), "the other arena is given back")
    second = trainer()
    (held,) = second.do("held")
    # The arena of step 2 is another one, so step 1 still lies in its own.
    assert (held["step"], held["same"]) == (1, True)
    second.do("close")
    assert_stored(path, [1])


def test_the_newest_of_several(path: Path, trainer: Callable[[], Trainer]) -> None:
    first = trainer()
    first.do("begin")
    for step in (1, 2, 3):
        first.do("take", step)
    first.kill()
    (held,) = trainer().do("held")
    assert (held["step"], held["same"]) == (3, True)
    assert_stored(path, [3, 2, 1])


def test_its_forked_children_do_not_hide_its_death(path: Path, trainer: Callable[[], Trainer]) -> None:
    first = trainer()
    first.do("begin")
    first.do("take", 1)
    first.do("wait")
    child = first.do("fork")
    try:
        until(lambda: arenas_of(child) == [], "the child has closed what it has of the keeper's")
        sockets = [os.readlink(one) for one in Path(f"/proc/{child}/fd").iterdir()]
        assert not any(name.startswith("socket:") for name in sockets)
        first.kill()
        until(lambda: bool(lingering().held), "it holds what it stored")
        (held,) = trainer().do("held")
        assert held["step"] == 1
        assert not dead(child)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_death_is_noticed_although_the_socket_stays_open(
    path: Path, trainer: Callable[[], Trainer]
) -> None:
    """As when a child was forked in a way that Python does not know of; here it is this process."""
    first = trainer()
    first.do("begin")
    first.do("take", 1)
    first.do("wait")
    life = os.pidfd_open(first.process.pid)
    copies = copied_sockets(life, first.process.pid)
    assert copies
    first.kill()
    until(lambda: bool(lingering().held), "it holds what it stored")
    for descriptor in (life, *copies):
        os.close(descriptor)


def copied_sockets(life: int, pid: int) -> list[int]:
    """Copies of a process's sockets (pidfd_getfd; x86 and ARM agree on its number)."""
    import ctypes

    call = ctypes.CDLL(None, use_errno=True).syscall
    found = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(descriptor).startswith("socket:"):
            copy = call(438, life, int(descriptor.name), 0)
            if copy < 0:
                pytest.skip("this system does not let one process copy another's sockets")
            found.append(copy)
    return found


def test_it_does_not_linger_when_told_not_to(
    path: Path, runtime: Path, trainer: Callable[[], Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERSTEP_KEEPER_LINGER", "0")
    first = trainer()
    first.do("begin")
    first.do("take", 1)
    (pid,) = first.do("keepers")
    first.kill()
    until(lambda: dead(pid), "the keeper has left")
    assert list((runtime / "everstep").iterdir()) == []
    assert_stored(path, [1])
    assert trainer().do("held") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_keeper_that_is_told_to_end_finishes_first(
    path: Path,
    runtime: Path,
    number: signal.Signals,
    odd_keeper: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    there, go_on = tmp_path / "there", tmp_path / "go_on"
    for fifo in (there, go_on):
        os.mkfifo(fifo)
    process = odd_keeper("waits", there, go_on)
    told = Told()
    keeper = told.keeper(path)
    keeper.held()
    begun(keeper, Chain(path))
    hand_over(keeper, 1)
    there.read_text()
    process.send_signal(number)
    go_on.write_text("")
    # The trainer gets such a signal too, where a machine goes down: it has a last snapshot to take.
    assert hand_over(keeper, 2).pending.durable(DEADLINE_S)
    keeper.close()
    assert process.wait(DEADLINE_S) == 0
    assert keeper.deaths == 0
    assert_stored(path, [2, 1])
    assert list((runtime / "everstep").iterdir()) == []


def test_an_interrupt_is_not_for_the_keeper(path: Path) -> None:
    told = Told()
    keeper = told.keeper(path)
    begun(keeper, Chain(path))
    assert hand_over(keeper, 1).pending.durable(DEADLINE_S)
    os.kill(living()[0].pid, signal.SIGINT)
    assert hand_over(keeper, 2).pending.durable(DEADLINE_S)
    keeper.close()
    assert keeper.deaths == 0


def test_a_full_disk_is_told_and_the_next_snapshot_finds_room(
    path: Path, odd_keeper: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    full = tmp_path / "full"
    odd_keeper("full", full)
    told = Told()
    keeper = told.keeper(path)
    keeper.held()
    begun(keeper, Chain(path))
    assert hand_over(keeper, 1).pending.durable(DEADLINE_S)
    full.touch()
    with pytest.raises(Unavailable, match="no room to write"):
        hand_over(keeper, 2).pending.durable(DEADLINE_S)
    full.unlink()
    assert hand_over(keeper, 3).pending.durable(DEADLINE_S)
    keeper.close()
    assert_stored(path, [3, 1])


def test_a_dead_trainer_s_last_snapshot_is_tried_once_more_when_the_next_trainer_asks(
    path: Path,
    trainer: Callable[[], Trainer],
    odd_keeper: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    full = tmp_path / "full"
    full.touch()
    process = odd_keeper("full", full)
    first = trainer()
    first.do("held")
    first.do("begin")
    first.do("ready")
    # Stopped, the keeper sees the job and the trainer's death at once.
    process.send_signal(signal.SIGSTOP)
    first.do("take", 1)
    first.kill()
    process.send_signal(signal.SIGCONT)
    assert not lingering().held
    assert_stored(path, [])
    assert trainer().do("held") == []  # Still no room.
    full.unlink()
    (held,) = trainer().do("held")
    assert (held["step"], held["same"]) == (1, True)
    assert_stored(path, [1])


# -- the keeper dies ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_keeper_that_dies_at_any_file_operation_loses_nothing_and_does_nothing_twice(path: Path) -> None:
    """Three snapshots, two of them pruned again; the keeper dies at every operation that this takes."""
    with subprocess.Popen(
        [sys.executable, str(HERE / "odd_keeper.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        text=True,
    ) as odd_keepers:
        assert odd_keepers.stdin is not None
        assert odd_keepers.stdout is not None
        at = 0
        while True:
            odd_keepers.stdin.write(f"{places(Chain(path))[0].path} {path} dies {at}\n")
            odd_keepers.stdin.flush()
            assert odd_keepers.stdout.readline() == "listening\n"
            told = Told()
            keeper = told.keeper(path)
            keeper.held()
            lease = begun(keeper, Chain(path), keep="last 1")
            for step in (1, 2, 3):
                hand_over(keeper, step)
            assert keeper.wait(DEADLINE_S)
            keeper.close()
            lease.release()
            outcomes = [(one.job.facts.step, one.error) for one in told.outcomes]
            assert outcomes == [(1, None), (2, None), (3, None)]
            assert_stored(path, [3])
            parents = [one.snapshot.record.parents for one in told.outcomes if one.snapshot]
            ids = [one.snapshot.id for one in told.outcomes if one.snapshot]
            assert parents == [(), (ids[0],), (ids[1],)]
            assert not verify(Chain(path)).findings
            assert keeper.deaths == (int(odd_keepers.stdout.readline()) == -signal.SIGKILL)
            if not keeper.deaths:
                break
            shutil.rmtree(path)
            Chain.create(path, GRID_BYTES)
            at += 1
    assert at > 30


@pytest.mark.slow
def test_keepers_that_are_killed_at_random(path: Path) -> None:
    rng = random.Random(7)
    told = Told()
    keeper = told.keeper(path)
    begun(keeper, Chain(path))
    killed = 0
    for step in range(1, 41):
        hand_over(keeper, step)
        if rng.random() < 0.5:
            threading.Event().wait(rng.random() * 0.05)
            for status in living():
                os.kill(status.pid, signal.SIGKILL)
                killed += 1
    assert keeper.wait(DEADLINE_S)
    keeper.close()
    failed = [one for one in told.outcomes if one.error]
    assert [one.job.facts.step for one in told.outcomes] == list(range(1, 41))
    # Three in a row may die before the first of them has stored anything: then that is said.
    assert all("in a row" in str(one.error) for one in failed)
    wrong = {one.job.facts.step for one in failed}
    assert_stored(path, [step for step in range(40, 0, -1) if step not in wrong])
    assert keeper.deaths >= killed / 2 > 2


def test_a_killed_keeper_is_followed_by_another(path: Path) -> None:
    told = Told()
    keeper = told.keeper(path)
    begun(keeper, Chain(path))
    assert hand_over(keeper, 1).pending.durable(DEADLINE_S)
    assert keeper.wait(DEADLINE_S)  # Its arena is free again.
    pid = living()[0].pid
    os.kill(pid, signal.SIGSTOP)
    jobs = [hand_over(keeper, step) for step in (2, 3)]
    assert keeper.arena(LAYOUT.arena_bytes, wait=False) is None
    os.kill(pid, signal.SIGKILL)
    assert all(job.pending.durable(DEADLINE_S) for job in jobs)
    assert keeper.deaths == 1
    assert told.warnings == ["the keeper died (signal 9); another takes over, and nothing is lost"]
    assert not Path(f"/proc/{pid}").exists()
    assert hand_over(keeper, 4).pending.durable(DEADLINE_S)
    keeper.close()
    assert_stored(path, [4, 3, 2, 1])


def test_a_killed_keeper_takes_an_unfinished_job_up_again(path: Path) -> None:
    """One whose waves still come, and whose memory is all there."""
    told = Told()
    keeper = told.keeper(path)
    begun(keeper, Chain(path))
    job = hand_over(keeper, 1, end=False)
    until(lambda: living() != [], "the keeper is there")
    os.kill(living()[0].pid, signal.SIGKILL)
    until(lambda: keeper.deaths == 1, "its death is noticed")
    keeper.end(job)
    assert job.pending.durable(DEADLINE_S)
    keeper.close()
    assert_stored(path, [1])


def test_a_killed_keeper_takes_up_what_is_still_being_filled(path: Path) -> None:
    told = Told()
    keeper = told.keeper(path)
    begun(keeper, Chain(path))
    arena = keeper.arena(LAYOUT.arena_bytes, wait=True)
    assert arena is not None
    job, data, half = job_of(1), state(1), LAYOUT.arena_bytes // 2
    keeper.submit(job)
    keeper.wave(job, arena, 0, LAYOUT.arena_bytes, frozenset(), filled=0)
    arena.memory[:half] = data[:half]
    keeper.arrived(job, half)
    until(lambda: any(one.jobs for one in living()), "the keeper has the job")
    os.kill(living()[0].pid, signal.SIGKILL)
    until(lambda: keeper.deaths == 1, "its death is noticed")
    arena.memory[half : LAYOUT.arena_bytes] = data[half:]
    keeper.arrived(job, LAYOUT.arena_bytes)
    keeper.end(job)
    assert job.pending.durable(DEADLINE_S)
    keeper.close()
    assert_stored(path, [1])


def test_an_arena_that_is_being_filled_is_not_lent_again_when_there_is_no_keeper(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    keeper = told.keeper(path)
    begun(keeper, Chain(path))
    arena = keeper.arena(LAYOUT.arena_bytes, wait=True)
    assert arena is not None
    monkeypatch.setattr(client, "MAX_DEATHS", 1)
    job = job_of(1)
    keeper.submit(job)
    keeper.wave(job, arena, 0, LAYOUT.arena_bytes, frozenset(), filled=0)
    until(lambda: any(one.jobs for one in living()), "the keeper has the job")
    os.kill(living()[0].pid, signal.SIGKILL)
    with pytest.raises(Unavailable, match="keepers in a row"):
        job.pending.durable(DEADLINE_S)
    assert keeper.arena(LAYOUT.arena_bytes, wait=False) is not arena
    assert keeper.arena(LAYOUT.arena_bytes, wait=False) is None
    keeper.arrived(job, LAYOUT.arena_bytes)
    keeper.end(job)
    assert keeper.arena(LAYOUT.arena_bytes, wait=False) is arena
    keeper.close()


def test_a_job_whose_waves_are_gone_with_the_keeper_fails(path: Path) -> None:
    layout = laid(600_000)
    waves = layout.waves(512 * 1024, GRID_BYTES)
    told = Told()
    keeper = told.keeper(path)
    begun(keeper, Chain(path))
    job = job_of(1, layout)
    keeper.submit(job)
    for number, (first, last) in enumerate(waves):
        arena = keeper.arena(512 * 1024, wait=True)
        assert arena is not None
        arena.memory[: last - first] = state(1, layout)[first:last]
        if number == 3:
            os.kill(living()[0].pid, signal.SIGKILL)
            until(lambda: keeper.deaths == 1, "its death is noticed")
        keeper.wave(job, arena, first, last, frozenset())
    keeper.end(job)
    with pytest.raises(Unavailable, match="in waves"):
        job.pending.durable(DEADLINE_S)
    assert hand_over(keeper, 2).pending.durable(DEADLINE_S)
    keeper.close()
    assert_stored(path, [2])


def test_a_keeper_that_cannot_be_started(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    with monkeypatch.context() as patch:
        patch.setattr("everstep.keeper.start._PROGRAM", "raise SystemExit('not today')")
        keeper = told.keeper(path)
        begun(keeper, Chain(path))
        for _ in range(2):
            with pytest.raises(Unavailable, match=r"cannot be started \(status 1\): not today"):
                keeper.arena(LAYOUT.arena_bytes, wait=True)
    assert hand_over(keeper, 1).pending.durable(DEADLINE_S)
    keeper.close()
    assert_stored(path, [1])


def test_a_keeper_that_dies_and_cannot_be_started_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    keeper = told.keeper(path)
    begun(keeper, Chain(path))
    assert hand_over(keeper, 1).pending.durable(DEADLINE_S)
    pid = living()[0].pid
    os.kill(pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr("everstep.keeper.start._PROGRAM", "raise SystemExit('not today')")
        job = hand_over(keeper, 2)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(Unavailable, match="not today"):
            job.pending.durable(DEADLINE_S)
    assert hand_over(keeper, 3).pending.durable(DEADLINE_S)
    keeper.close()
    assert_stored(path, [3, 1])


DYING = """
import json, os, sys
sys.path[:] = json.loads(sys.argv[3])
from everstep.keeper import service, work

def die(*_):
    print("this is why", file=sys.stderr)
    os.kill(os.getpid(), 9)

work.Work.submit = die
service.main(sys.argv[1], sys.argv[2])
"""


def test_keepers_that_die_of_what_they_are_given(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    with monkeypatch.context() as patch:
        patch.setattr("everstep.keeper.start._PROGRAM", DYING)
        keeper = told.keeper(path)
        begun(keeper, Chain(path))
        job = hand_over(keeper, 1)
        with pytest.raises(Unavailable, match=r"3 keepers in a row .*signal 9.*this is why"):
            job.pending.durable(DEADLINE_S)
    assert keeper.deaths == 3
    assert keeper.wait(DEADLINE_S)
    assert hand_over(keeper, 2).pending.durable(DEADLINE_S)
    keeper.close()
    assert_stored(path, [2])


def test_both_are_killed(path: Path, runtime: Path, trainer: Callable[[], Trainer]) -> None:
    first = trainer()
    first.do("begin")
    first.do("take", 1)
    first.do("wait")
    first.do("take", 2)
    (pid,) = first.do("keepers")
    os.kill(pid, signal.SIGKILL)
    first.kill()
    found = [one.step for one in Chain(path).snapshots()]
    assert found in ([1], [2, 1])
    second = trainer()
    assert second.do("held") == []
    second.do("begin")
    second.do("take", 3)
    assert second.do("wait") == [[3, ""]]
    second.do("close")
    assert_stored(path, [3, *found])
    # What the dead left there is gone too.
    assert list((runtime / "everstep").iterdir()) == []


@pytest.mark.slow
def test_trainers_and_keepers_that_are_killed_at_random(path: Path, trainer: Callable[[], Trainer]) -> None:
    """What was handed over while the keeper lives is never lost, and never there twice."""
    rng = random.Random(11)
    handed, parent = 0, ""
    for _ in range(15):
        one = trainer()
        held = one.do("held")
        found = [snapshot.step for snapshot in Chain(path).snapshots()]
        assert found == sorted(set(found), reverse=True)
        assert all(item["same"] and item["step"] == found[0] for item in held)
        assert not found or found[0] >= handed
        handed, parent = (found or [0])[0], next((one.id for one in Chain(path).snapshots()), "")
        one.do("begin", parent)
        for _ in range(rng.randrange(1, 4)):
            one.do("take", handed + 1)
            handed += 1
        threading.Event().wait(rng.random() * 0.05)
        if rng.random() < 0.3:
            for pid in one.do("keepers"):
                os.kill(pid, signal.SIGKILL)
            one.do("wait")  # It is handed over once more.
        one.kill()
    last = trainer()
    last.do("held")
    assert [snapshot.step for snapshot in Chain(path).snapshots()] == list(range(handed, 0, -1))
    assert_stored(path, list(range(handed, 0, -1)))
    last.do("close")


AT_EXIT = """
import atexit, os, signal, sys
from handing import begun, hand_over
from everstep.chain.history import Chain
from everstep.keeper.client import ProcessKeeper, living

chain = Chain(sys.argv[1])
keeper = ProcessKeeper(chain, lambda outcome: print(outcome.job.facts.step, outcome.error), print)
lease = begun(keeper, chain)
hand_over(keeper, 1).pending.durable()

@atexit.register
def end():
    os.kill(living()[0].pid, signal.SIGKILL)
    hand_over(keeper, 2)
    keeper.close()
    lease.release()
    print(keeper.deaths, len(living()))
"""


def test_a_keeper_that_dies_while_the_interpreter_ends(path: Path, runtime: Path) -> None:
    """No thread can be started any more then."""
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), str(HERE)])},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.stderr == ""
    first, died, second, last = done.stdout.splitlines()
    assert (first, second, last) == ("1 None", "2 None", "1 0")
    assert "signal 9" in died
    assert_stored(path, [2, 1])
    assert list((runtime / "everstep").iterdir()) == []


# -- others ------------------------------------------------------------------------------------------------


def test_a_second_trainer_is_refused(path: Path, trainer: Callable[[], Trainer]) -> None:
    first = trainer()
    first.do("held")
    first.do("begin")
    first.do("take", 1)
    first.do("wait")
    refused = trainer().do("held")
    assert refused["error"] == "Conflict"
    assert f"process {first.process.pid}" in refused["text"]
    first.do("take", 2)
    assert first.do("wait") == [[1, ""], [2, ""]]
    first.do("close")
    assert_stored(path, [2, 1])


def test_two_that_ask_at_once_agree_on_one_keeper(path: Path) -> None:
    keepers = [Told().keeper(path) for _ in range(3)]
    assert [keeper.held() for keeper in keepers] == [[], [], []]
    until(lambda: len(living()) == 1, "one is there")
    begun(keepers[1], Chain(path))
    assert hand_over(keepers[1], 1).pending.durable(DEADLINE_S)
    assert len(living()) == 1
    for keeper in (keepers[0], keepers[2], keepers[1]):
        keeper.close()
    assert living() == []


def test_a_keeper_of_another_version_finishes_and_is_replaced(
    path: Path, odd_keeper: Callable[..., subprocess.Popen[str]]
) -> None:
    process = odd_keeper("version", "0.0.9/1")
    told = Told()
    keeper = told.keeper(path)
    assert keeper.held() == []
    assert process.wait(DEADLINE_S) == 0
    begun(keeper, Chain(path))
    assert hand_over(keeper, 1).pending.durable(DEADLINE_S)
    keeper.close()
    assert_stored(path, [1])


def test_a_keeper_of_another_user_is_not_believed(path: Path) -> None:
    first = Told().keeper(path)
    begun(first, Chain(path))
    assert hand_over(first, 1).pending.durable(DEADLINE_S)
    second = Told().keeper(path, identify=lambda sock: Peer(protocol.peer(sock).pid, os.geteuid() + 1))
    with pytest.raises(Unsupported, match="the socket of user"):
        second.held()
    second.close()
    assert living(identify=lambda sock: Peer(1, os.geteuid() + 1)) == []
    first.close()


def test_hostile_bytes_do_not_hurt_it(path: Path) -> None:
    told = Told()
    keeper = told.keeper(path)
    begun(keeper, Chain(path))
    assert hand_over(keeper, 1).pending.durable(DEADLINE_S)
    rng = random.Random(3)
    hello = protocol.encode(protocol.Hello(protocol.VERSION, ""))
    for number in range(60):
        sock = living_places()[0].connect()
        assert sock is not None
        data = [rng.randbytes(300), b"\xff" * 8, hello + rng.randbytes(300), hello[:9], hello + b"\0\0\0\xf0"]
        try:
            socket.send_fds(sock, [data[number % 5]], [0] * (number % 4))
            sock.settimeout(0.01)
            sock.recv(100)
        except (TimeoutError, ConnectionError):
            pass
        sock.close()
    assert hand_over(keeper, 2).pending.durable(DEADLINE_S)
    assert len(os.listdir(f"/proc/{living()[0].pid}/fd")) < 20
    keeper.close()
    assert keeper.deaths == 0
    assert_stored(path, [2, 1])


def test_a_message_that_is_none_costs_the_trainer_its_keeper_and_nothing_else(path: Path) -> None:
    told = Told()
    keeper = told.keeper(path)
    begun(keeper, Chain(path))
    assert hand_over(keeper, 1).pending.durable(DEADLINE_S)
    assert keeper._link is not None
    keeper._link.connection.send(protocol.Discard(1))
    keeper._link.connection.send(protocol.Fill(5, 5, 0, 1, ()))
    assert hand_over(keeper, 2).pending.durable(DEADLINE_S)
    keeper.close()
    assert keeper.deaths == 1
    assert "there is no arena 5" in told.warnings[0]
    assert_stored(path, [2, 1])


def test_the_lease_is_the_trainer_s(path: Path, trainer: Callable[[], Trainer]) -> None:
    """A keeper that finishes a dead trainer's work does so in its name, and stops where another writes."""
    first = trainer()
    number = first.do("begin")
    first.do("take", 1)
    first.do("wait")
    pid = first.do("keepers")[0]
    os.kill(pid, signal.SIGSTOP)
    first.do("take", 2)
    first.kill()
    lease = Lease.take(Chain(path).store)
    assert lease.number == number + 1
    os.kill(pid, signal.SIGCONT)
    assert_stored(path, [1]) if lingering() else None
    assert next(Chain(path).snapshots()).record.writer == number


def test_no_error_of_the_keeper_is_swallowed(path: Path) -> None:
    told = Told()
    keeper = told.keeper(path)
    keeper.begin(Terms("main", 1, "", "last few"))
    with pytest.raises(EverstepError, match="keep='last few' is not understood"):
        hand_over(keeper, 1).pending.durable(DEADLINE_S)
    keeper.close()
    assert len(told.outcomes) == 1


def test_a_callback_that_fails_is_the_trainer_s_error(path: Path) -> None:
    def fail(outcome: Outcome) -> None:
        raise RuntimeError("mine")

    keeper = ProcessKeeper(Chain(path), fail, print)
    begun(keeper, Chain(path))
    job: Job = hand_over(keeper, 1)
    with pytest.raises(RuntimeError, match="mine"):
        job.pending.durable(DEADLINE_S)
    keeper.close()
    assert_stored(path, [1])


def test_conflict_names_the_living(path: Path) -> None:
    first, second = Told().keeper(path), Told().keeper(path)
    first.held()
    begun(first, Chain(path))
    assert hand_over(first, 1).pending.durable(DEADLINE_S)
    second.close()
    third = Told().keeper(path)
    with pytest.raises(Conflict, match=f"process {os.getpid()}"):
        third.held()
    third.close()
    first.close()
