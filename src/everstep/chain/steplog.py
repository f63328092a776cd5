"""The step log: what every step was, so that a resume can prove that it trains the same steps again.

While a run goes on its records are appended to a *journal*, a local file that outlives the process. With each
snapshot the journal is sealed into a segment, an object of the chain; what a killed run leaves is sealed by
the next writer.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from everstep.chain.history import Chain
from everstep.chain.names import segment_of
from everstep.errors import Damaged, NotFound
from everstep.format import keys, record
from everstep.format.chunk import Buffer, digest
from everstep.format.record import StepRecord
from everstep.store.base import Addressed
from everstep.store.local import LocalStore

JOURNAL = "journal"
_CHECK = 16
_JOURNAL_NAME = re.compile("(?P<branch>.+)-(?P<writer>[0-9a-f]{16})-[0-9a-f]{16}")
MAX_JOURNAL_BYTES = record.MAX_SEGMENT_BYTES
SEGMENT_STEPS = 10_000
"""A journal that has grown to so many records is followed by another, so that no segment grows too large."""

SEAL_S = 1.0
"""A snapshot so soon after one that took the journal along leaves it to a later one: a segment for each costs
a fifth of what a small snapshot does."""


class StepLog:
    """The step log of one branch, as one writer keeps it.

    `append` costs one small write to the page cache (nothing is waited for); records survive the death of the
    process. In a power cut those since the last snapshot may be lost, and of up to `SEAL_S` before it.

    Args:
        clock: in seconds.
    """

    def __init__(
        self, chain: Chain, branch: str, writer: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.chain = chain
        self.branch = branch
        self.writer = writer
        self._directory = _journal_directory(chain)
        self._journals: list[Journal] = []
        self._clock = clock
        self._cut_at = -SEAL_S

    def append(self, step: StepRecord) -> None:
        if not self._journals or self._journals[-1].count >= SEGMENT_STEPS:
            name = f"{self.branch}-{self.writer:016x}-{step.step:016x}"
            self._journals.append(Journal(self._directory, name))
        self._journals[-1].append(step)

    def cut(self) -> list[EndedJournal]:
        """End the journals here: the records up to now, to be handed to `seal`, in this process or another
        one of this machine."""
        cut, self._journals = [journal.end() for journal in self._journals], []
        self._cut_at = self._clock()
        return cut

    def cut_in_time(self) -> list[EndedJournal]:
        """The same for a snapshot: nothing where the last cut was less than `SEAL_S` ago."""
        return self.cut() if self._clock() - self._cut_at >= SEAL_S else []

    def seal(self, journals: Sequence[EndedJournal]) -> None:
        """Make ended journals segments of the chain, and take them away. Durable on return; sealing one that
        was sealed before does nothing."""
        for journal in journals:
            self._seal(self.writer, journal.steps(self._directory))
            journal.remove(self._directory)

    def adopt(self) -> None:
        """Seal the journals that dead writers of this branch left behind."""
        if self._directory is None or not self._directory.is_dir():
            return
        for path in sorted(self._directory.iterdir()):
            match = _JOURNAL_NAME.fullmatch(path.name)
            if match and match["branch"] == self.branch and int(match["writer"], 16) != self.writer:
                self._seal(int(match["writer"], 16), _readable(path.read_bytes()))
                path.unlink()

    def _seal(self, writer: int, steps: list[StepRecord]) -> None:
        if steps:
            key = keys.segment(self.branch, writer, steps[0].step)
            self.chain.store.put(key, [record.seal_segment(steps)])

    def after(self, step: int) -> dict[int, StepRecord]:
        """The records of the steps after `step`, each as its latest writer trained it; those from before the
        branch's head was moved are none of them: after a rollback steps are trained anew on purpose. Damaged
        segments are left out: without a record a step is just not compared."""
        segments = list(self._segments(step))
        void = self._moved_by(min(writer for writer, _ in segments)) if segments else 0
        found: dict[int, StepRecord] = {}
        for writer, steps in segments:
            if writer >= void:
                found.update({one.step: one for one in steps if one.step > step})
        return found

    def _moved_by(self, writer: int) -> int:
        """The number of the lease under which the branch's head was last moved, where that is not before
        `writer`; else 0. Reads no head record that is older."""
        for head in self.chain.heads(self.branch):
            if head.writer < writer:
                return 0
            if head.moved is not None:
                return head.writer
        return 0

    def _segments(self, step: int) -> Iterator[tuple[int, list[StepRecord]]]:
        listed = ((segment_of(entry.key), entry.key) for entry in self.chain.store.list(self._prefix))
        segments = [(*segment, key) for segment, key in listed if segment is not None]
        following = [*segments, (-1, 0, "")][1:]
        for (writer, _, key), (next_writer, next_first, _) in zip(segments, following, strict=True):
            if next_writer == writer and next_first <= step + 1:
                continue
            try:
                data = self.chain.store.get(key, 0, record.MAX_SEGMENT_BYTES + 1)
                yield writer, record.unseal_segment(data)
            except (Damaged, NotFound):
                continue

    @property
    def _prefix(self) -> str:
        return keys.steplog(self.branch)


class Journal:
    """An append-only file of records, one a line, each led by a check (a kill may tear the last).

    What cannot be written (no directory, no room) is kept in memory: a full disk stops no training.
    """

    def __init__(self, directory: Path | None, name: str) -> None:
        self.count = 0
        self._unwritten: list[StepRecord] = []
        self._path: Path | None = None
        self._descriptor: int | None = None
        if directory is not None:
            with suppress(OSError):
                self._descriptor = _opened(directory / name)
                self._path = directory / name

    def append(self, step: StepRecord) -> None:
        """Add a record: one small write, which waits for no disk."""
        self.count += 1
        if not self._write(step):
            # What was written of the line is torn, so nothing may follow it in the file.
            self._close()
            self._unwritten.append(step)

    def _write(self, step: StepRecord) -> bool:
        if self._descriptor is None:
            return False
        text = record.encode(step)
        line = digest(text)[:_CHECK].encode() + b" " + text + b"\n"
        try:
            return os.write(self._descriptor, line) == len(line)
        except OSError:
            return False

    def end(self) -> EndedJournal:
        """Close the file: nothing is appended any more."""
        self._close()
        name = "" if self._path is None else self._path.name
        return EndedJournal(name, tuple(record.encode(step) for step in self._unwritten))

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _opened(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o666)


@dataclass(frozen=True)
class EndedJournal:
    """A journal to be sealed. `name` is its file's ("" where there is none), `unwritten` are the encoded
    records that could not be written to it."""

    name: str
    unwritten: tuple[bytes, ...] = ()

    def steps(self, directory: Path | None) -> list[StepRecord]:
        """All records, in order. Reads the file."""
        written: list[StepRecord] = []
        path = self._path(directory)
        if path is not None:
            with suppress(OSError):
                written = _readable(path.read_bytes())
        return [*written, *map(record.decode_step, self.unwritten)]

    def remove(self, directory: Path | None) -> None:
        path = self._path(directory)
        if path is not None:
            path.unlink(missing_ok=True)

    def _path(self, directory: Path | None) -> Path | None:
        if directory is None or not self.name:
            return None
        if not _JOURNAL_NAME.fullmatch(self.name) or "/" in self.name:
            raise Damaged(f"{self.name[:60]!r} is not the name of a journal")
        return directory / self.name


def read_journal(data: Buffer) -> list[StepRecord]:
    """The records of a journal up to a torn last line.

    Raises:
        Damaged: a line is not as it was written, and that is not a last one which a kill has torn.
    """
    if len(data) > MAX_JOURNAL_BYTES:
        raise Damaged(f"a journal of {len(data)} bytes is larger than allowed")
    *lines, torn = bytes(data).split(b"\n")
    if _is_line(torn[:-1]):
        raise Damaged("the last line of a journal is whole but for its end, which no kill leaves behind")
    return [_step(line) for line in lines]


def _is_line(line: bytes) -> bool:
    check, _, text = line.partition(b" ")
    return check == digest(text)[:_CHECK].encode()


def _step(line: bytes) -> StepRecord:
    if not _is_line(line):
        raise Damaged("a line of a journal does not match its check")
    return record.decode_step(line[_CHECK + 1 :])


def _readable(data: bytes) -> list[StepRecord]:
    """The records of a dead writer's journal, up to the first that cannot be read."""
    steps = []
    for line in data[:MAX_JOURNAL_BYTES].split(b"\n")[:-1]:
        try:
            steps.append(_step(line))
        except Damaged:
            break
    return steps


def _journal_directory(chain: Chain) -> Path | None:
    """Where the next process of this machine finds it: beside the objects of a local chain, among the user's
    own state for one that is elsewhere. Memory must do for a chain that ends with the process."""
    if isinstance(chain.store, LocalStore):
        return chain.store.root / JOURNAL
    if isinstance(chain.store, Addressed):
        # Where there is no home, memory must do as well.
        with suppress(RuntimeError):
            return state_directory() / chain.about.chain / JOURNAL
    return None


def state_directory() -> Path:
    """Where programs keep what is this machine's and outlives them. Raises RuntimeError."""
    named = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".local" / "state") / "everstep"
