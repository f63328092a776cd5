"""The main job, to watch: a training is killed at random instants, goes on from where it was each time, and
ends bit-identical to the same training that nobody killed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from everstep.chain.history import Chain, Snapshot
from everstep.chain.verify import verify
from everstep.events import size
from everstep.store.local import TEMPORARY

STEPS = 180
KILLS = 3
EVERY = 20
"""The training takes a snapshot every so many steps."""

CLEAR = "\r\x1b[K"
_DEADLINE_S = 600.0


def main(
    directory: str | None = None, steps: int = STEPS, kills: int = KILLS, seed: int | None = None
) -> int:
    """Run the demo and print what happens; returns the exit status: 0 when both runs end identical.

    Args:
        directory: where the chains go (and stay); None: a temporary one, which stays too and is named.
        steps: how long to train.
        kills: how often to kill, the one in the middle of a snapshot included; at least 2.
        seed: of the instants to kill at; None: other instants each time.
    """
    root = Path(directory or tempfile.mkdtemp(prefix="everstep-demo-"))
    for name in ("undisturbed", "killed"):
        shutil.rmtree(root / name, ignore_errors=True)
    began = time.monotonic()
    print(
        f"Everstep demo: trains a small GPT twice for {steps} steps and kills the second run {kills} times\n"
    )
    print("run A, undisturbed")
    _train(root / "undisturbed", steps, _Never())
    print("\nrun B, the same command, killed with SIGKILL and started again")
    _kill_often(root / "killed", steps, kills, random.Random(seed))
    same = _compare(root, steps)
    _show(root / "killed")
    print(f"\n{time.monotonic() - began:.0f} s. The chains are in {root}")
    print(f"look around: everstep -r {root / 'killed'} log")
    return 0 if same else 1


def _kill_often(chain: Path, steps: int, kills: int, dice: random.Random) -> None:
    """Start the training again and again until it ends; the second kill hits a snapshot being written, unless
    they are written too fast for that."""
    hit = False
    for number in range(kills):
        # Each life gets its share of the steps that are left, and dies somewhere in it.
        done = _head_step(chain)
        share = max((steps - done) // (kills - number + 1), 2)
        if number == 1:
            while not hit and _head_step(chain) < steps // 2:
                hit = _train(chain, steps, _WhileWriting(chain, after=done + 1))
        else:
            life = dice.randint(min(EVERY + 2, share), share)
            _train(chain, steps, _AtRandom(done + life, dice.uniform(0.0, 0.05)))
    _train(chain, steps, _Never())


def _head_step(chain: Path) -> int:
    try:
        head = Chain(chain).head()
    except Exception:
        return 0
    return head.step if head else 0


# -- one life of the training ------------------------------------------------------------------------------


class Show(Protocol):
    def __call__(self, life: _Life, last: bool = False) -> None: ...


class _Never:
    """Nobody kills this one."""

    def now(self, step: int) -> str:
        return ""


@dataclass
class _AtRandom:
    """Kills at some instant after a step."""

    step: int
    delay_s: float
    since: float = 0.0

    def now(self, step: int) -> str:
        if step < self.step:
            return ""
        self.since = self.since or time.monotonic()
        return "at a random instant" if time.monotonic() - self.since >= self.delay_s else ""


@dataclass
class _WhileWriting:
    """Kills when a snapshot is half written: while there is a temporary file of the store."""

    chain: Path
    after: int

    def now(self, step: int) -> str:
        if step <= self.after or not _half_written(self.chain):
            return ""
        return "while a snapshot was being written"


def _half_written(chain: Path) -> bool:
    try:
        return any(item.stat().st_size > 0 for item in os.scandir(chain / TEMPORARY))
    except OSError:
        return False


@dataclass
class _Life:
    """What a training process says about itself."""

    process: subprocess.Popen[str]
    step: int = 0
    loss: float = 0.0
    remarks: list[str] = field(default_factory=list)

    def listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if not line.startswith("{"):
                self.remarks.append(line.rstrip())
                continue
            said = json.loads(line)
            if "event" not in said:
                self.step, self.loss = said["step"], said["loss"]
            elif said["event"] in ("resumed", "repeated", "parted", "skipped", "warned", "failed"):
                self.remarks.append(_remark(said))


def _remark(said: dict[str, object]) -> str:
    from everstep import events

    kind = getattr(events, str(said.pop("event")).capitalize())
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    return str(kind(**fields)).replace(f"{said.get('url')}: ", "")


def _train(chain: Path, steps: int, killer: _Never | _AtRandom | _WhileWriting) -> bool:
    """One life; returns whether it was killed in the way it was meant to be."""
    command = [sys.executable, "-m", "everstep.demo.train", str(chain), str(steps)]
    environment = {**os.environ, "EVERSTEP_LOG": "json"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    life = _Life(process)
    listener = threading.Thread(target=life.listen, daemon=True)
    listener.start()
    deadline = time.monotonic() + _DEADLINE_S
    written = False
    with _progress(steps) as show:
        while process.poll() is None:
            why = killer.now(life.step)
            if why or time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                # Looked at before it is waited for: the keeper lives on and finishes what it writes.
                written = not _half_written(chain)
                process.wait()
                break
            show(life)
            time.sleep(0.0005 if isinstance(killer, _WhileWriting) else 0.02)
        else:
            why = ""
        listener.join()
        show(life, last=True)
    if time.monotonic() > deadline:
        raise SystemExit(f"the training took longer than {_DEADLINE_S:.0f} s")
    if not why:
        if process.returncode:
            raise SystemExit(f"the training ended with status {process.returncode}")
        return False
    if isinstance(killer, _WhileWriting) and written:
        print(f"  kill -9 after step {life.step}, just too late for the snapshot; once more")
        return False
    print(f"  kill -9 after step {life.step}, {why}")
    return True


@contextmanager
def _progress(steps: int) -> Iterator[Show]:
    """Remarks as they come, and how far the training is: a line that is drawn over on a terminal, and a line
    every fifth of the way elsewhere."""
    terminal = sys.stdout.isatty()
    shown = (0, "")

    def show(life: _Life, last: bool = False) -> None:
        nonlocal shown
        while life.remarks:
            print(f"{CLEAR * terminal}  {life.remarks.pop(0)}", flush=True)
        fifth = life.step * 5 // steps
        text = f"  step {life.step:>4} of {steps} · loss {life.loss:.4f}" if life.step else "  starting"
        if terminal:
            print(f"{CLEAR}{text}", end="\n" if last else "", flush=True)
        elif text != shown[1] and (last or (life.step and fifth != shown[0])):
            print(text, flush=True)
            shown = (fifth, text)

    yield show


# -- the comparison ----------------------------------------------------------------------------------------


def _compare(root: Path, steps: int) -> bool:
    ends = [_end(root / name, steps) for name in ("undisturbed", "killed")]
    print()
    for name, end in zip(("run A (undisturbed)", "run B (killed)     "), ends, strict=True):
        loss = float(end.record.metrics["loss"])
        print(f"{name}  step {end.step}  loss {loss!r}  state {end.record.state[:16]}")
    same = ends[0].record.state == ends[1].record.state and ends[0].record.metrics == ends[1].record.metrics
    print("IDENTICAL: loss and state, bit for bit" if same else "DIFFERENT")
    return same


def _end(chain: Path, steps: int) -> Snapshot:
    head = Chain(chain).head()
    if head is None or head.step != steps:
        raise SystemExit(f"{chain} does not end at step {steps}")
    return head


def _show(path: Path) -> None:
    chain = Chain(path)
    snapshots = list(chain.snapshots())
    logical = sum(snapshot.record.logical_bytes for snapshot in snapshots)
    stored = sum(entry.size_bytes for entry in chain.store.list())
    print(f"\n{len(snapshots)} snapshots: {size(stored)} stored for {size(logical)} of state")
    print("(AdamW changes all of a dense model in every step; what does not change is stored once)")
    report = verify(chain)
    print(
        f"verify: {report.objects} objects, {size(report.bytes)} read again, {len(report.findings)} damaged\n"
    )
    for snapshot in snapshots[:5]:
        one = snapshot.record
        new = f"{size(one.new_bytes):>8} new of {size(one.logical_bytes)}"
        print(f"  {snapshot.short}  step {one.step:>4}  {new}  loss {float(one.metrics['loss']):.4f}")
    if len(snapshots) > 5:
        print(f"  ... and {len(snapshots) - 5} before them")
