"""Real trainings and their keepers, killed with SIGKILL at random instants until the trainings are through.

    python -m bench.kill --kills 300 --seed 1 --json kill.json

Each run trains the same small model, or a larger one (dropout, AdamW, a learning rate schedule, a shuffled
loader with random augmentation), with a snapshot every three steps. It is killed a few times, in turn the
trainer, the keeper and both, wherever they then are: opening, between steps, capturing, closing; starting,
storing, tidying. At last it is left to finish, and its losses, weights and state digest must be those of a
run that nobody disturbed, bit for bit. After each kill all that is listed must be whole, and all that was
ever reported durable must be listed; what a killed trainer had handed over to a keeper that lives must become
durable by itself. At the end of each run no process, no shared memory and no file of a keeper may be left.
Torch is imported once, by the
parent; trainings are forked.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import random
import re
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch.utils.data import DataLoader, Dataset

import everstep
from everstep.chain.history import Chain, Snapshot
from everstep.chain.steplog import JOURNAL
from everstep.chain.verify import verify
from everstep.errors import NotFound
from everstep.keeper import start as starting
from everstep.keeper.base import Job
from everstep.keeper.client import ProcessKeeper, living
from everstep.keeper.protocol import Status
from everstep.run.session import Run
from everstep.run.taking import Taking
from everstep.state.capture import Capturer
from everstep.store.local import TEMPORARY

EPOCHS = 4
STEPS = 120
DEADLINE_S = 120.0
"""No training of this size takes so long; one that does hangs."""

KINDS = ("trainer", "keeper", "both")
MAX_KEEPERS_KILLED = 2
"""Of one trainer, between two starts of it: the third in a row that dies is said to die not by accident."""


@dataclass(frozen=True)
class Variant:
    """A training. `keep` is how many snapshots stay; `width` its model's."""

    name: str
    workers: int
    keep: float
    width: int = 400


VARIANTS = (
    Variant("plain", 0, 3),
    Variant("all kept", 0, math.inf),
    Variant("workers", 2, 3),
    Variant("large", 0, 3, 24_000),  # 75 MB: the keeper stores it while it is still being captured.
)
IN_TURN = (0, 2, 3, 1, 0, 3, 1)
"""Spread evenly, so that a short campaign has all variants too."""
SHORT = (0, 2, 1, 0, 1)
"""Without the large one, for campaigns of fewer than a hundred kills."""


class Noisy(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples that are different each time: their noise comes out of the random generators."""

    def __len__(self) -> int:
        return 8 * STEPS // EPOCHS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        sample = torch.full((64,), float(index)) / 100 + torch.randn(64) * 0.1 + random.random() * 0.1
        return sample, torch.tensor(float(index % 5))


def train(path: str, variant: Variant) -> dict[str, Any]:
    """Train to the end, from where the chain at `path` is."""
    torch.manual_seed(7)
    random.seed(7)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(256, variant.width),
        torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(variant.width, 1),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    losses: list[str] = []
    loader = DataLoader(Noisy(), 8, shuffle=True, num_workers=variant.workers)
    with flagged("opening"):
        run = everstep.open(
            path,
            model=model,
            optimizer=optimizer,
            schedule=schedule,
            losses=losses,
            data=loader,
            every="3 steps",
            keep="all" if variant.keep == math.inf else f"last {variant.keep}",
        )
    while run.epoch < EPOCHS:
        for inputs, labels in run.steps():
            loss = ((model(inputs).squeeze(1) - labels) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item().hex())
            run.log(loss=loss)
    # Whether the last step's trigger found an arena free is a matter of time: the state that is compared is
    # that after the last epoch's end.
    run.take("the end")
    run.close()
    weights = blake3()
    for _, tensor in sorted(model.state_dict().items()):
        weights.update(tensor.numpy().tobytes())
    for one in optimizer.state.values():
        for _, tensor in sorted(one.items()):
            weights.update(tensor.numpy().tobytes())
    result = {"losses": losses, "weights": weights.hexdigest(), "step": len(losses)}
    if os.environ.get("EVERSTEP_DISABLE") != "1":
        head = Chain(path).head()
        assert head is not None
        result["state"] = head.record.state
    return result


def warm_up() -> None:
    """Have torch import what it imports late (seconds), so that the trainings do not."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 1)).sum().backward()
    optimizer.step()
    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)


def lost(events: list[dict[str, Any]], there: Sequence[Snapshot], keep: float) -> Iterator[dict[str, Any]]:
    """What trainings said to be durable and is not listed, though fewer than `keep` newer snapshots are.

    Newer is what is of a later step, or of the same and first spoken of later: who is killed after the last
    step takes that step again in the next life.

    Args:
        events: all that they said, in this order.
        there: what is listed.
    """
    first: dict[str, int] = {}
    for at, event in enumerate(events):
        first.setdefault(event.get("snapshot", ""), at)
    ids = {one.id for one in there}
    for event in events:
        if event["event"] != "taken" or event["snapshot"] in ids:
            continue
        step, told = event["step"], first[event["snapshot"]]
        newer = sum(one.step > step or (one.step == step and first.get(one.id, -1) > told) for one in there)
        if newer < keep:
            yield event


# -- where a kill falls --------------------------------------------------------------------------------

AT_TRAINER = ("opening", "closing", "capturing")
AT_KEEPER = ("starting", "storing", "tidying")
_HANDED = struct.Struct("Q")
_HANDED_AT = 64


class Flags:
    """Memory that outlives trainings and keepers: a byte for each place, 1 while they are there, and what was
    handed over last. A file, so that keepers, which are started and not forked, can map it.
    """

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(mmap.PAGESIZE))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)

    def set(self, place: str, value: int) -> None:
        self._memory[(AT_TRAINER + AT_KEEPER).index(place)] = value

    def clear(self, places: tuple[str, ...]) -> None:
        for place in places:
            self.set(place, 0)

    def place(self, places: tuple[str, ...]) -> str:
        """Where one is. Capturing while the run is opened or closed counts as that."""
        return next((place for place in places if self._memory[(AT_TRAINER + AT_KEEPER).index(place)]), "")

    @property
    def handed(self) -> tuple[int, int]:
        """The process and the step of the snapshot that a keeper was given last; all of it has left us."""
        (packed,) = _HANDED.unpack_from(self._memory, _HANDED_AT)
        return packed >> 32, packed & 0xFFFFFFFF

    @handed.setter
    def handed(self, handed: tuple[int, int]) -> None:
        # One store of eight bytes, which a kill cannot tear.
        self._memory[_HANDED_AT : _HANDED_AT + 8] = _HANDED.pack(handed[0] << 32 | handed[1])


def where() -> str:
    """What trainer and keeper were at."""
    trainer, keeper = _FLAGS[0].place(AT_TRAINER), _FLAGS[0].place(AT_KEEPER)
    return f"trainer {trainer or 'between'}, keeper {keeper or 'waiting'}"


@contextmanager
def flagged(place: str) -> Iterator[None]:
    _FLAGS[0].set(place, 1)
    try:
        yield
    finally:
        _FLAGS[0].set(place, 0)


_FLAGS: list[Flags] = []
"""Those of the campaign."""

KEEPER = """
import json, mmap, sys
sys.path[:] = json.loads(sys.argv[3])
with open(%r, "r+b") as file:
    flags = mmap.mmap(file.fileno(), mmap.PAGESIZE)

def flag(owner, name, number):
    original = getattr(owner, name)
    def wrapper(*args, **kwargs):
        flags[number] = 1
        try:
            return original(*args, **kwargs)
        finally:
            flags[number] = 0
    setattr(owner, name, wrapper)

flags[%d] = 1
from everstep.chain.writer import Writer
from everstep.keeper.keeping import Keeping
from everstep.keeper.service import Service, main
flag(Writer, "write", %d)
flag(Keeping, "tidy", %d)
run = Service.run
def listening(service):
    flags[%d] = 0
    run(service)
Service.run = listening
main(sys.argv[1], sys.argv[2])
"""
"""A keeper as any other, that says where it is."""


def instrument(flags: Path) -> None:
    """Have this process's trainings, and their keepers, say where they are."""
    _FLAGS[:] = [Flags(flags)]
    numbers = [(AT_TRAINER + AT_KEEPER).index(place) for place in ("starting", "storing", "tidying")]
    starting._PROGRAM = KEEPER % (str(flags), *numbers, numbers[0])
    begin, captured, close, end = Capturer.begin, Taking._captured, Run.close, ProcessKeeper.end

    @wraps(begin)
    def flagged_begin(*args: Any, **kwargs: Any) -> Any:
        _FLAGS[0].set("capturing", 1)
        return begin(*args, **kwargs)

    @wraps(captured)
    def flagged_captured(*args: Any, **kwargs: Any) -> None:
        captured(*args, **kwargs)
        _FLAGS[0].set("capturing", 0)

    @wraps(close)
    def flagged_close(run: Run) -> None:
        with flagged("closing"):
            close(run)

    @wraps(end)
    def noted_end(keeper: ProcessKeeper, job: Job) -> None:
        link = keeper._link
        end(keeper, job)
        if link is not None and link.begun and link is keeper._link and not link.connection.unsent_bytes:
            _FLAGS[0].handed = link.pid, job.facts.step

    Capturer.begin = flagged_begin  # type: ignore[method-assign]
    Taking._captured = flagged_captured  # type: ignore[method-assign]
    Run.close = flagged_close  # type: ignore[method-assign]
    ProcessKeeper.end = noted_end  # type: ignore[method-assign]


# -- a training as a process ---------------------------------------------------------------------------


def start(path: str, variant: Variant, log: Path, result: Path, disabled: bool = False) -> int:
    """Fork a training into a process group of its own. Returns its pid."""
    _FLAGS[0].clear(AT_TRAINER)
    pid = os.fork()
    if pid:
        _lead(pid)
        return pid
    try:
        _lead(0)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), 2)
        os.environ.update(EVERSTEP_LOG="json", EVERSTEP_KEEPER="process")
        os.environ["EVERSTEP_DISABLE"] = "1" if disabled else ""
        told = json.dumps(train(path, variant))
        result.write_text(told)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def _lead(pid: int) -> None:
    """Both sides do it, so that it is done whoever comes first."""
    try:
        os.setpgid(pid, pid)
    except (PermissionError, ProcessLookupError):
        return


def ended(pid: int, within_s: float) -> int | None:
    """The exit status of a training that ends by itself within this time; else None."""
    descriptor = os.pidfd_open(pid)
    try:
        if not select.select([descriptor], [], [], within_s)[0]:
            return None
    finally:
        os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid: int) -> None:
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


# -- a keeper as a process -----------------------------------------------------------------------------


def keepers(directory: Path) -> list[int]:
    """The keepers that live in a directory or keep a chain in it, also those that only start or end."""
    path = f"{directory}/".encode()
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            place_and_chain = words[4:6] if words[1:3] == [b"-I", b"-c"] else []
            if any(word.startswith(path) for word in place_and_chain) and not _is_dead(int(name)):
                found.append(int(name))
    return found


def _is_dead(pid: int) -> bool:
    """Whether it has ended; whoever should collect it may not have."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def kill_keepers(pids: list[int]) -> int:
    """Returns how many were there to be killed, once they are dead."""
    killed = 0
    for pid in pids:
        with suppress(ProcessLookupError):
            life = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(life, signal.SIGKILL)
                select.select([life], [], [])
                killed += 1
            finally:
                os.close(life)
    return killed


def arenas(pids: Iterable[int | str]) -> set[int]:
    """The shared memory of everstep that processes have, by its number."""
    found = set()
    for pid in pids:
        with suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    if "everstep-arena" in os.readlink(entry.path):
                        found.add(os.stat(entry.path).st_ino)
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                if "everstep-arena" in line:
                    found.add(int(line.split()[4]))
    return found


def wait_until(condition: Callable[[], bool], within_s: float = DEADLINE_S) -> bool:
    """For what tells nobody."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        select.select([], [], [], 0.005)
    return True


# -- the campaign --------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came out.

    `identical` of `runs` ended as the undisturbed run; `runs_killed` were killed once or more. `kinds` says
    how many kills were of whom, `kills_in` what trainer and keeper were at then. `resumes` counts the
    trainings that were started where there was a snapshot (some were killed before they had opened it),
    `exact` those that said they resumed exactly, `from_memory` those that read from the keeper's memory. Of
    the kills of a trainer alone, `handed_over` fell when a snapshot was in the keeper's hands and not yet
    durable, and the keeper was left to finish: as many must have become durable. `arenas` counts the pieces
    of shared memory that were seen, `left_behind` what was still there of them, of processes and of their
    files at the end of a run.
    """

    seed: int
    kills: int = 0
    kinds: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    runs: int = 0
    runs_killed: int = 0
    identical: int = 0
    resumes: int = 0
    exact: int = 0
    from_memory: int = 0
    reported_durable: int = 0
    handed_over: int = 0
    handed_over_durable: int = 0
    kills_in: dict[str, dict[str, int]] = field(default_factory=dict)
    kills_with_temporary_files: int = 0
    most_kills_of_a_run: int = 0
    arenas: int = 0
    left_behind: int = 0
    events: dict[str, int] = field(default_factory=dict)
    undisturbed_s: dict[str, float] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    took_s: float = 0.0


@dataclass
class Ran:
    """A run on its way to its end.

    `owed` is the step that a living keeper has in hand for a trainer that is dead: the next one must not
    resume from before it. `heard` is how much of the log was looked at for that. `littered`: a keeper was
    killed since the last start; the next start takes its half-written files away.
    """

    place: Path
    variant: Variant
    killed: int = 0
    owed: int = 0
    heard: int = 0
    littered: bool = False

    @property
    def chain(self) -> str:
        return str(self.place / "chain")

    @property
    def log(self) -> Path:
        return self.place / "log"

    def snapshots(self) -> list[Snapshot]:
        """All, newest first."""
        try:
            return list(Chain(self.chain).snapshots())
        except NotFound:
            return []

    def head_step(self) -> int:
        return next((snapshot.step for snapshot in self.snapshots()), 0)

    def events(self) -> list[dict[str, Any]]:
        """What the trainings have said; a last line that a kill has cut is none."""
        said = self.log.read_text().split("\n")[:-1] if self.log.exists() else []
        return [json.loads(line) for line in said if line.startswith("{") and line.endswith("}")]


class Campaign:
    """Kills trainings and keepers under `directory`.

    Args:
        kills: how many in all, a third of each kind.
        tell: called with a line now and then.
    """

    def __init__(self, directory: Path, kills: int, seed: int, tell: Callable[[str], None] = print) -> None:
        self.directory = directory
        self.kills = kills
        self.tell = tell
        self.outcome = Outcome(seed)
        self._runtime = directory / "runtime"
        self._rng = random.Random(seed)
        self._in: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        self._events: Counter[str] = Counter()
        self._arenas: set[int] = set()
        self._wanted: dict[str, dict[str, Any]] = {}

    def run(self) -> Outcome:
        begun = time.monotonic()
        torch.set_num_threads(1)
        warm_up()
        self._runtime.mkdir(mode=0o700)
        os.environ["XDG_RUNTIME_DIR"] = str(self._runtime)
        instrument(self.directory / "flags")
        in_turn = IN_TURN if self.kills >= 100 else SHORT
        for number in sorted(set(in_turn)):
            self._undisturbed(VARIANTS[number])
        while self.outcome.kills < self.kills:
            number = self.outcome.runs
            variant = VARIANTS[in_turn[number % len(in_turn)]]
            self._one(number, variant, min(self._rng.randint(1, 6), self.kills - self.outcome.kills))
            self.tell(
                f"{self.outcome.kills} kills, {self.outcome.runs} runs, {self.outcome.identical} identical"
            )
        self.outcome.kills_in = {kind: dict(sorted(places.items())) for kind, places in self._in.items()}
        self.outcome.events = dict(sorted(self._events.items()))
        self.outcome.arenas = len(self._arenas)
        self.outcome.took_s = round(time.monotonic() - begun, 1)
        return self.outcome

    def _undisturbed(self, variant: Variant) -> None:
        """What every run of the variant must come to."""
        took_s = []
        for time_number in (1, 2):  # The first takes longer: it is not the one to go by.
            ran = Ran(self.directory / f"undisturbed {variant.name} {time_number}", variant)
            ran.place.mkdir()
            begun = time.monotonic()
            wanted = self._finish(ran)
            took_s.append(time.monotonic() - begun)
            assert wanted is not None, ran.log.read_text()
            assert wanted["step"] == STEPS
            if self._wanted.setdefault(variant.name, wanted) != wanted:
                self._violation(f"{variant.name}: two trainings that nobody disturbed differ")
        self.outcome.undisturbed_s[variant.name] = round(min(took_s), 3)
        if variant.workers == 0:
            # Everstep itself must not have changed the training either.
            pid = start("", variant, ran.log, ran.place / "bare", disabled=True)
            assert ended(pid, DEADLINE_S) == 0, ran.log.read_text()
            bare = json.loads((ran.place / "bare").read_text())
            if any(bare[name] != wanted[name] for name in bare):
                self._violation(f"{variant.name}: a training with Everstep differs from one without")

    def _one(self, number: int, variant: Variant, kills: int) -> None:
        """One run: killed so many times, then left to finish."""
        ran = Ran(self.directory / str(number), variant)
        ran.place.mkdir()
        result: dict[str, Any] | None = None
        status: int | None = None
        while status is None and ran.killed < kills:
            self.outcome.resumes += ran.head_step() > 0
            status = self._kill_some(ran, kills)
        if status is None:
            self.outcome.resumes += ran.head_step() > 0
            result = self._finish(ran)
        else:
            result = self._result(ran, status)
        self.outcome.kills += ran.killed
        self.outcome.runs += 1
        self.outcome.runs_killed += ran.killed > 0
        self.outcome.most_kills_of_a_run = max(self.outcome.most_kills_of_a_run, ran.killed)
        self._judge(ran, result)
        shutil.rmtree(ran.place)

    def _kill_some(self, ran: Ran, kills: int) -> int | None:
        """Start a training and kill: its keepers perhaps, and at last itself. The status of one that ended by
        itself, else None."""
        pid = self._start(ran)
        keepers_killed = 0
        while ran.killed < kills:
            status = ended(pid, self._instant(ran))
            if status is not None:
                return status
            kind = KINDS[(self.outcome.kills + ran.killed) % len(KINDS)]
            if kind == "keeper" and keepers_killed < MAX_KEEPERS_KILLED:
                keepers_killed += self._kill_keeper(ran, pid)
            else:
                self._kill_trainer(ran, pid, alone=kind != "both")
                return None
        # Only its keepers were killed of late.
        return self._ended(ran, pid)

    def _start(self, ran: Ran) -> int:
        ran.littered = False
        return start(ran.chain, ran.variant, ran.log, ran.place / "result")

    def _instant(self, ran: Ran) -> float:
        """Uniform over how long the rest of the training takes."""
        left = 1 - ran.head_step() / STEPS
        return self._rng.uniform(0, self.outcome.undisturbed_s[ran.variant.name] * max(left, 0.1))

    # -- kills ------------------------------------------------------------------------------------------

    def _kill_keeper(self, ran: Ran, pid: int) -> bool:
        """While the trainer stands still, so that what is left can be looked at. False: there is none."""
        os.killpg(pid, signal.SIGSTOP)
        try:
            there = keepers(ran.place)
            self._arenas |= arenas([pid, *there])
            if not kill_keepers(there):
                return False
            self._check_owed(ran)
            self._note_kill(ran, "keeper", where())
            ran.littered = True
            _FLAGS[0].clear(AT_KEEPER)
        finally:
            os.killpg(pid, signal.SIGCONT)
        return True

    def _kill_trainer(self, ran: Ran, pid: int, alone: bool) -> None:
        """And, unless alone, its keeper, the one or the other first."""
        there = keepers(ran.place)
        self._arenas |= arenas([pid, *there])
        keeper_first = self._rng.random() < 0.5
        if not alone and keeper_first:
            kill_keepers(there)
        kill(pid)
        place = where()
        head_step = ran.head_step()
        if alone:
            self._note_handed_over(ran, there, head_step)
            if self._rng.random() < 0.5:
                self._wait_for_keeper(ran)
        else:
            # One may have been started meanwhile.
            kill_keepers([*there, *keepers(ran.place)])
            self._check_owed(ran)
        self._note_kill(ran, "trainer" if alone else "both", place)
        if not alone:
            _FLAGS[0].clear(AT_KEEPER)

    def _note_handed_over(self, ran: Ran, there: list[int], head_step: int) -> None:
        self._check_owed(ran)
        keeper, step = _FLAGS[0].handed
        if keeper in there and step > head_step:
            ran.owed, ran.heard = step, len(ran.events())
            self.outcome.handed_over += 1

    def _wait_for_keeper(self, ran: Ran) -> None:
        """Nobody is there but the keeper: it must finish by itself, and keep one arena at most."""

        def rests() -> bool:
            return all(not one.trainer and not one.jobs and len(one.arenas) <= 1 for one in self._living(ran))

        if not wait_until(rests):
            self._violation(f"{ran.place.name}: a keeper does not come to rest: {self._living(ran)}")
        if ran.owed and ran.head_step() < ran.owed:
            self._violation(f"{ran.place.name}: step {ran.owed} was handed over, and did not become durable")
        self._pay(ran)

    def _living(self, ran: Ran) -> list[Status]:
        return [status for status in living() if status.chain == ran.chain]

    def _check_owed(self, ran: Ran) -> None:
        """Whether the next trainer, if one has come to open, has resumed from what was owed to it."""
        if not ran.owed:
            return
        resumed = [event for event in ran.events()[ran.heard :] if event["event"] in ("resumed", "started")]
        if resumed and resumed[0].get("step", 0) < ran.owed:
            self._violation(f"{ran.place.name}: step {ran.owed} was handed over, then: {resumed[0]}")
        elif not resumed:
            # It was killed while it waited for that, or its keeper with it.
            self.outcome.handed_over -= ran.head_step() < ran.owed
        self._pay(ran)

    def _pay(self, ran: Ran) -> None:
        self.outcome.handed_over_durable += ran.owed > 0 and ran.head_step() >= ran.owed
        ran.owed = 0

    def _note_kill(self, ran: Ran, kind: str, where: str) -> None:
        ran.killed += 1
        self.outcome.kinds[kind] += 1
        self._in[kind][where] += 1
        temporary = Path(ran.chain) / TEMPORARY
        self.outcome.kills_with_temporary_files += temporary.is_dir() and any(temporary.iterdir())
        try:
            chain = Chain(ran.chain)
        except NotFound:
            return
        for finding in verify(chain).findings:
            self._violation(f"after a kill of {kind} ({where}): {finding.key}: {finding.problem}")
        self._check_reported(ran, where)

    def _check_reported(self, ran: Ran, where: str) -> None:
        there = ran.snapshots()
        for event in lost(ran.events(), there, ran.variant.keep):
            listed = [(one.step, one.id) for one in there]
            self._violation(f"{ran.place.name}: lost after a kill ({where}): {event}; listed: {listed}")

    # -- the end of a run -------------------------------------------------------------------------------

    def _finish(self, ran: Ran) -> dict[str, Any] | None:
        status = self._ended(ran, self._start(ran))
        return None if status is None else self._result(ran, status)

    def _ended(self, ran: Ran, pid: int) -> int | None:
        status = ended(pid, DEADLINE_S)
        if status is None:
            kill(pid)
            self._violation(f"{ran.place.name}: a training hung: {ran.log.read_text()[-3000:]}")
            return -signal.SIGKILL
        return status

    def _result(self, ran: Ran, status: int) -> dict[str, Any] | None:
        if status != 0:
            self._violation(
                f"{ran.place.name}: a training ended with {status}: {ran.log.read_text()[-3000:]}"
            )
            return None
        made: dict[str, Any] = json.loads((ran.place / "result").read_text())
        return made

    def _judge(self, ran: Ran, result: dict[str, Any] | None) -> None:
        name, variant = ran.place.name, ran.variant
        self._check_owed(ran)
        if result == self._wanted[variant.name]:
            self.outcome.identical += 1
        else:
            self._violation(f"run {name} ({variant.name}) {_parting(result, self._wanted[variant.name])}")
        report = verify(Chain(ran.chain))
        for finding in report.findings:
            self._violation(f"run {name}: {finding.key}: {finding.problem}")
        if report.foreign or not report.whole:
            self._violation(f"run {name}: foreign {report.foreign}, {report.whole} whole snapshots")
        self._check_reported(ran, "at the end")
        self._check_left_behind(ran)
        self._count_events(ran)

    def _check_left_behind(self, ran: Ran) -> None:
        left: list[object] = []
        for folder in (JOURNAL,) if ran.littered else (JOURNAL, TEMPORARY):
            left += (ran.place / "chain" / folder).glob("*")
        # A trainer that was killed while it started a keeper leaves one that nobody has asked for anything.
        left += keepers(ran.place)
        left += (self._runtime / "everstep").iterdir()
        left += self._arenas & arenas(filter(str.isdigit, os.listdir("/proc")))
        self.outcome.left_behind += len(left)
        if left:
            self._violation(f"run {ran.place.name}: left behind {left}")

    def _count_events(self, ran: Ran) -> None:
        for line in ran.log.read_text().splitlines():
            if not line.startswith("{"):
                self._violation(f"a training said: {line}")
                continue
            event = json.loads(line)
            kind = event["event"]
            self._events[kind] += 1
            self.outcome.exact += kind == "resumed" and not event["approximate"]
            remarks = event.get("remarks", [])
            self.outcome.from_memory += FROM_MEMORY in remarks
            self.outcome.reported_durable += kind == "taken"
            expected = kind == "warned" and EXPECTED.match(event["what"])
            odd = kind in ("parted", "failed", "skipped", "warned") and not expected
            if odd or event.get("approximate") or any(remark != FROM_MEMORY for remark in remarks):
                self._violation(f"event {line}")

    def _violation(self, what: str) -> None:
        self.outcome.violations.append(what)
        self.tell(f"VIOLATION {what}")


EXPECTED = re.compile("the keeper died|waiting for the keeper to store")
"""Warnings that a user must see, and that are no fault."""

FROM_MEMORY = "out of the keeper's memory"


def _parting(result: dict[str, Any] | None, wanted: dict[str, Any]) -> str:
    """What differs, in words."""
    if result is None:
        return "did not end well"
    parts = [name for name in wanted if result.get(name) != wanted[name]]
    pairs = zip(result["losses"], wanted["losses"], strict=False)
    first = next((step for step, (one, other) in enumerate(pairs, start=1) if one != other), None)
    return f"came out with other {', '.join(parts)}; its first other loss is that of step {first}"


def campaign(kills: int, seed: int, tell: Callable[[str], None] = print) -> Outcome:
    """Run one in a temporary directory, which is taken away at the end."""
    directory = Path(tempfile.mkdtemp(prefix="everstep-kill-"))
    try:
        return Campaign(directory, kills, seed, tell).run()
    finally:
        kill_keepers(keepers(directory))
        shutil.rmtree(directory, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="OUT", help="where the figures go, too")
    chosen = parser.parse_args(arguments)
    outcome = campaign(chosen.kills, chosen.seed, lambda line: print(line, file=sys.stderr, flush=True))
    text = json.dumps(asdict(outcome), indent=1)
    print(text)
    if chosen.json:
        Path(chosen.json).write_text(text + "\n")
    return 1 if outcome.violations or outcome.identical != outcome.runs else 0


if __name__ == "__main__":
    sys.exit(main())
