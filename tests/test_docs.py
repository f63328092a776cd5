"""The documents, executed: every block of Python runs, every command runs, every message quoted is the one
that comes out, every link leads somewhere, and every figure is that of the last measurement.

`python tests/test_docs.py` writes the figures of `bench/results` into both READMEs.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import everstep
from everstep import cli
from everstep.chain.history import Chain
from everstep.chain.lease import newest
from everstep.errors import EverstepError
from everstep.format import keys, record
from everstep.format.record import LeaseRecord
from everstep.keeper import start as starting
from everstep.keeper.arena import Arena
from everstep.keeper.client import living
from everstep.run.session import Run
from everstep.run.settings import Settings
from everstep.state import capture, objects
from everstep.state.tree import Leaves, flatten
from everstep.store.files import SystemFiles
from everstep.store.local import LocalStore

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
GUIDE, OPERATING = ROOT / "docs/GUIDE.md", ROOT / "docs/OPERATING.md"
DOCUMENTS = [README, CHINESE, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
KINDS = EverstepError.__subclasses__()
NOT_RUN = "<!-- not run -->"


# -- reading a document ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Block:
    language: str
    text: str
    line: int
    run: bool

    def commands(self) -> list[str]:
        return [line[2:] for line in self.text.splitlines() if line.startswith("$ ")]


@dataclasses.dataclass
class Section:
    """What stands under a heading of the second level; under the first level: what stands before them."""

    title: str
    headings: list[tuple[int, str]]
    blocks: list[Block]
    lines: list[str]

    def of(self, language: str) -> list[Block]:
        return [block for block in self.blocks if block.language == language]


def sections(path: Path) -> list[Section]:
    found = [Section("", [], [], [])]
    block: Block | None = None
    before = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if block is not None:
            if line == "```":
                block = None
            else:
                block.text += line + "\n"
        elif line.startswith("```"):
            block = Block(line[3:], "", number + 1, before != NOT_RUN)
            found[-1].blocks.append(block)
        else:
            heading = re.fullmatch(r"(#+) (.*)", line)
            if heading and len(heading[1]) == 2:
                found.append(Section(heading[2], [], [], []))
            if heading:
                found[-1].headings.append((len(heading[1]), heading[2]))
            found[-1].lines.append(line)
        before = line
    assert block is None, f"{path.name} ends within a block"
    return found


def section(path: Path, title: str) -> Section:
    return next(one for one in sections(path) if one.title == title)


def executed(path: Path) -> list[Any]:
    """The sections of a document that have something to execute, as parameters."""
    return [
        pytest.param(one, id=one.title.replace(" ", "-") or "beginning")
        for one in sections(path)
        if one.of("python")
    ]


def masked(text: str) -> list[str]:
    """The lines of an output without what differs from run to run: digits, ids, units, and spaces."""
    text = re.sub(r"\b[0-9a-f]{6,}\b", "#", text)
    text = re.sub(r"-?\d[\d.,:]*(e-?\d+)?", "#", text)
    text = re.sub(r"# (s|min|h|d|B|kB|MB|GB|TB)\b", "# _", text)
    lines = [re.sub(r"\s+", " ", line).strip() for line in text.splitlines()]
    return [line for line in lines if "no snapshot at step" not in line and line]


# -- every block runs --------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; what blocks set in the environment is taken back."""
    monkeypatch.chdir(tmp_path)
    environment = dict(os.environ)
    yield tmp_path
    os.environ.clear()
    os.environ.update(environment)


def seed() -> None:
    """As a process begins, for the generators that a block does not seed itself."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def execute(
    path: Path, blocks: list[Block], capsys: pytest.CaptureFixture[str], names: dict[str, Any]
) -> None:
    """Run Python and commands in their order, in one namespace."""
    names["__name__"] = "__main__"
    for block in blocks:
        if block.language == "python":
            # The lines of a traceback are those of the document.
            code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
            if block.run:
                exec(code, names)
        elif block.language == "console" and block.run:
            check_commands(block, capsys)


def check_commands(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    """Run each `everstep` command; where one is shown with its output, that is what must come out."""
    for shown in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, output = shown.partition("\n")
        arguments = shlex.split(command, comments=True)
        if arguments[0] != "everstep":
            continue
        capsys.readouterr()
        status = cli.main(arguments[1:])
        told = capsys.readouterr()
        assert status == 0, f"{command}: {told.err}"
        if output.strip():
            assert masked(told.out + told.err) == masked(output), command


@pytest.mark.parametrize("part", executed(GUIDE))
def test_the_guide_runs(part: Section, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed()
    names: dict[str, Any] = {}
    execute(GUIDE, part.blocks, capsys, names)
    for one in names.values():
        assert not isinstance(one, Run) or one._closed, f"{part.title} leaves its run open"


class Killed(BaseException):
    """Ends a block in the middle, as a kill does: nothing of the program runs after it."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Run.tick

    def tick(self: Run, **metrics: Any) -> None:
        plain(self, **metrics)
        if self.step == step:
            raise Killed

    monkeypatch.setattr(Run, "tick", tick)


def bits(names: dict[str, Any]) -> dict[str, object]:
    """The state of all that has one in a block, also of what the block forgot to hand over."""
    leaves: Leaves = {}
    given = {name: value for name, value in names.items() if name not in ("run", "loader", "__builtins__")}
    found: dict[str, object] = {
        name: flatten(name, value.state_dict(), leaves)
        for name, value in objects.named(given).items()
        if objects.is_stateful(value) and not isinstance(value, type)
    }
    return found | {name: np.asarray(leaf).tobytes() for name, leaf in leaves.items()}


GUIDES = [one for one in sorted((ROOT / "docs/guides").glob("*.md")) if one.stem != "branches"]


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_guides_of_their_own_run(path: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What stands in a block of text below Python is said on standard error by it."""
    names: dict[str, Any] = {}
    for part in sections(path):
        seed()
        capsys.readouterr()
        execute(path, part.blocks, capsys, names)
        told = masked(capsys.readouterr().err)
        for block in part.of("text"):
            assert all(line in told for line in masked(block.text)), (block.text, told)


RESUMED = [
    "Epochs and validation",
    "Gradient accumulation",
    "Mixed precision",
    "EMA",
    "Several optimizers",
    "An object of your own",
    "Plain values",
    "Iterable data",
    "Stateful loaders",
    "What is copied when",
    "Large states",
    "A full disk",
]


@pytest.mark.parametrize("title", RESUMED)
def test_recipes_go_on_bit_for_bit(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = section(GUIDE, title).of("python")
    ends = []
    names: dict[str, Any]
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "killed":
            with monkeypatch.context() as patch:
                killed_at(47, patch)
                names = {}
                seed()
                with pytest.raises(Killed):
                    execute(GUIDE, blocks, capsys, names)
                names["run"].__exit__(Killed, Killed(), None)
        capsys.readouterr()
        names = {}
        seed()
        execute(GUIDE, blocks, capsys, names)
        told = capsys.readouterr().err
        (chain,) = Path("runs").iterdir()
        head = Chain(chain).head()
        assert head is not None
        ends.append((head.step, head.record.state, head.record.metrics, bits(names)))
    assert re.search(r"resumes from \w+ step (20|40) epoch \d · exact", told), told
    assert re.search(r"steps (21|41)-47 repeated bit for bit", told), told
    assert ends[0] == ends[1]


LAST_WORDS = """
import os, runpy, signal, sys
from everstep.run.session import Run

plain = Run.tick

def tick(run, **metrics):
    plain(run, **metrics)
    if run.step == 200:
        run.wait()
        os.kill(os.getpid(), getattr(signal, name))

name = sys.argv.pop()  # The script has no arguments, as when a user starts it.
Run.tick = tick
runpy.run_path("train.py", run_name="__main__")
"""


def started(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process in `directory`, as a user starts one; its keeper is nobody else's."""
    paths = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    runtime = directory / "runtime"
    runtime.mkdir(mode=0o700, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "EVERSTEP_KEEPER": "process",
        "XDG_RUNTIME_DIR": str(runtime),
    }
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The script of the README's quick start, killed at step 200 and started again; and what it said."""
    directory = tmp_path_factory.mktemp("readme")
    script = section(README, "Quick start").of("python")[0].text
    (directory / "train.py").write_text(script)
    first = started(directory, "-c", LAST_WORDS, "SIGKILL")
    assert first.returncode == -9, first.stderr
    second = started(directory, "train.py")
    assert second.returncode == 0, second.stderr
    return directory, [first.stderr, second.stderr]


@pytest.mark.slow
@pytest.mark.process
def test_what_you_see_is_what_you_see(
    small: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, told = small
    monkeypatch.chdir(directory)
    seen, *commands = section(README, "What you see").of("console")
    parts = re.split(r"^\$ python train.py.*\n", seen.text, flags=re.MULTILINE)
    shown = [masked(part.replace("Killed\n", "")) for part in parts[1:]]
    assert shown == [masked(text) for text in told]
    for block in commands:
        check_commands(block, capsys)


@pytest.mark.slow
@pytest.mark.process
def test_a_signal_ends_the_quick_start_with_143(tmp_path: Path) -> None:
    script = section(README, "Quick start").of("python")[0].text
    (tmp_path / "train.py").write_text(script)
    done = started(tmp_path, "-c", LAST_WORDS, "SIGTERM")
    assert done.returncode == 143, done.stderr
    head = Chain(tmp_path / "runs/small").head()
    assert head is not None
    # The signal came at the end of step 200, so it is noted there and acted on when the next one ends.
    assert head.step == 201
    assert head.record.trigger == "SIGTERM"


def test_the_readme_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in sections(README):
        seed()
        execute(README, part.of("python"), capsys, {})


def test_the_three_lines_are_those_of_the_package() -> None:
    """The package's docstring, the README's lines and the arguments of `open` speak of the same thing."""
    doc = everstep.__doc__ or ""
    code = section(README, "Quick start").of("python")[0].text
    for call in ("everstep.open(", "in run.steps(loader):", "run.log(loss="):
        assert call in doc
        assert call in code
    lines = [line for line in code.splitlines() if re.search(r"everstep\.|run\.", line)]
    assert len(lines) == 5  # the three, `while run.epoch < 3`, and `run.close()`


@pytest.mark.slow
@pytest.mark.process
def test_commands_of_the_operating_manual_run(
    small: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, _ = small
    monkeypatch.chdir(directory)
    blocks = [block for part in sections(OPERATING) for block in part.of("console")]
    assert sum(len(block.commands()) for block in blocks) > 5
    for block in blocks:
        if block.run:
            check_commands(block, capsys)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^\$ make (\w+)", README.read_text(), flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


# -- errors ------------------------------------------------------------------------------------------------


class _Broken(SystemFiles):
    """A disk whose writes fail."""

    def __init__(self, number: int) -> None:
        self.number = number

    def write(self, path: str, parts: Any) -> None:
        raise OSError(self.number, os.strerror(self.number))


def a_run(**more: Any) -> Any:
    """A run on `runs/small` with a model; settings and other objects may be added."""
    model = more.pop("model", None) or nn.Linear(2, 1)
    return everstep.open("runs/small", model=model, **{"every": None, "keep": "all", **more})


def a_chain(**more: Any) -> None:
    """A chain of three snapshots, at steps 20, 30 and 40."""
    run = a_run(**more)
    for _ in range(20):
        run.tick()
    for _ in range(3):
        run.take().durable()
        for _ in range(10):
            run.tick()
    run.__exit__(Killed, Killed(), None)


def damage(pattern: str, newest_only: bool = False) -> None:
    """Flip the first byte of objects of `runs/small`."""
    found = sorted(Path("runs/small").glob(pattern))
    for path in found[:1] if newest_only else found:
        data = bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(data)


def fenced() -> None:
    run = a_run()
    run.tick()
    number = newest(run.chain.store) + 1
    other = LeaseRecord(host="elsewhere", boot="", pid=7, started=1, nonce="x", at="", number=number)
    run.chain.store.put(keys.numbered(keys.LEASES, number), [record.seal(other)])
    try:
        run.take().durable()
    finally:
        run.__exit__(Killed, Killed(), None)


def written_by_another() -> None:
    code = """if True:
        import everstep
        run = everstep.open("runs/small", values={}, every=None)
        print("open", flush=True)
        input()
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        try:
            a_run(values={})
        finally:
            other.kill()


def written_by_this() -> None:
    with a_run():
        a_run()


def newest_damaged() -> None:
    a_chain()
    damage("heads/main/*", newest_only=True)
    Chain("runs/small").head()


def all_damaged() -> None:
    a_chain()
    damage("packs/*/*")
    a_run()


def waited_for_inside_a_step() -> None:
    with a_run(data=[1, 2]) as run:
        for _ in run.steps():
            run.take().durable()


def other_model() -> None:
    a_chain()
    a_run(model=nn.Linear(3, 1))


def one_object_less() -> None:
    a_chain(ema=nn.Linear(2, 1))
    a_run()


def foreign() -> None:
    Path("runs/small").mkdir(parents=True)
    Path("runs/small/model.pt").write_text("")
    a_run()


def many_ranks() -> None:
    os.environ["WORLD_SIZE"] = "8"
    try:
        a_run()
    finally:
        del os.environ["WORLD_SIZE"]


class Tokenizer:
    """An object without a state."""


def unstorable() -> None:
    a_run(tokenizer=Tokenizer())


def newer_format() -> None:
    a_chain()
    path = Path("runs/small/everstep.json")
    body = json.loads(path.read_text())["record"]
    path.write_bytes(record.seal(record.ChainRecord(body["chain"], body["created_at"], format=4)))
    a_run()


def out_of_room() -> None:
    Chain.create(LocalStore("runs/small", _Broken(28)))


def not_allowed() -> None:
    Chain.create(LocalStore("runs/small", _Broken(13)))


def no_links() -> None:
    class NoLinks(SystemFiles):
        def link(self, path: str, to: str) -> None:
            raise OSError(1, os.strerror(1))

    Chain.create(LocalStore("runs/small", NoLinks()))


def own_keeper_process() -> None:
    """From now on a run has a keeper process, which is found here."""
    os.environ.update(EVERSTEP_KEEPER="process", XDG_RUNTIME_DIR=str(Path.cwd()))


def no_keeper() -> None:
    own_keeper_process()
    with pytest.MonkeyPatch.context() as patch:
        # As its own file system says it.
        patch.setattr(starting, "_PROGRAM", "raise SystemExit('[Errno 28] No space left on device')")
        with a_run() as run:
            run.tick()
            run.take().durable()


class _Training:
    """A model of some megabytes and its optimizer, which has its state."""

    def __init__(self) -> None:
        self.model = nn.Linear(600, 600)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.step()

    def step(self) -> None:
        self.model(torch.ones(1, 600)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, **settings: Any) -> Any:
        return a_run(model=self.model, optimizer=self.optimizer, **settings)


@contextmanager
def held_up() -> Iterator[threading.Event]:
    """Nothing is copied beside the loop before the event is set."""
    go = threading.Event()
    real = capture.copy

    def copy(pairs: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            go.wait()
        real(pairs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "copy", copy)
        yield go
        go.set()


def written_to_while_waited_for() -> None:
    training = _Training()
    with training.run(data=[1, 2]) as run, held_up() as go:
        batches = run.steps()
        next(batches)
        pending = run.take()
        next(batches)
        training.model.weight.data.zero_()
        go.set()
        pending.durable()


def written_to_before_the_step() -> None:
    os.environ["EVERSTEP_PARANOID"] = "1"
    training = _Training()
    with training.run(every="1 steps") as run:
        run.tick()
        run.wait()
        training.model.weight.data.zero_()
        training.step()


def in_too_small_waves() -> None:
    with a_run(model=nn.Linear(600, 600), max_arena_bytes="100kB") as run:
        run.tick()
        run.take()


def no_such_step() -> None:
    a_chain()
    Chain("runs/small").find("step:15")


def empty_and_must() -> None:
    a_run().close()
    a_run(resume="must")


def resume_never() -> None:
    a_chain()
    a_run(resume="never")


PROVOKED: dict[str, list[Callable[[], object]]] = {
    "NotFound": [lambda: Chain("runs/small"), no_such_step, empty_and_must],
    "Conflict": [written_by_another, written_by_this],
    "Fenced": [fenced],
    "Unavailable": [
        out_of_room,
        not_allowed,
        waited_for_inside_a_step,
        lambda: Arena.shared(1 << 45),
        written_to_while_waited_for,
        no_keeper,
    ],
    "Mismatch": [
        other_model,
        one_object_less,
        foreign,
        resume_never,
        lambda: a_run(every="ten minutes"),
        many_ranks,
    ],
    "Unsupported": [
        unstorable,
        lambda: Chain("ftp://host/run"),
        in_too_small_waves,
        newer_format,
        no_links,
    ],
    "Damaged": [newest_damaged, all_damaged, written_to_before_the_step],
}


def test_all_kinds_are_provoked() -> None:
    assert PROVOKED.keys() == {kind.__name__ for kind in KINDS}


def plain(message: str, directory: Path) -> str:
    """A message without what differs from run to run."""
    message = message.replace(f"{__name__}.", "__main__.").replace(str(directory), "...")
    message = re.sub(r"\d{4}-\d\d-\d\dT[\d:.+]+", "TIME", message)
    message = re.sub(r"\b[0-9a-f]{7,}\b", "ID", message)
    message = re.sub(r"process \d+ on|kill \d+", lambda found: re.sub(r"\d+", "PID", found[0]), message)
    message = re.sub(r"everstep-\d+", "everstep-UID", message)
    return re.sub(r"writer \d+", "writer N", message)


@pytest.mark.process
@pytest.mark.parametrize("name", PROVOKED)
def test_messages_in_the_operating_manual_come_out(
    name: str,
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    part = next(one for one in sections(OPERATING) if one.title.startswith(f"{name} "))
    quoted = [line for block in part.of("text") for line in block.text.splitlines()]
    told = []
    for number, provoke in enumerate(PROVOKED[name]):
        place = tmp_path / str(number)
        place.mkdir()
        monkeypatch.chdir(place)
        with pytest.raises(EverstepError) as caught:
            provoke()
        assert type(caught.value).__name__ == name
        told.append(plain(f"everstep.errors.{name}: {caught.value}", place))
    capsys.readouterr()
    assert [plain(line, tmp_path) for line in quoted] == told


def keeper_killed() -> None:
    own_keeper_process()
    with a_run() as run:
        run.tick()
        run.take().durable()
        (keeper,) = [one for one in living() if one.trainer == os.getpid()]
        os.kill(keeper.pid, signal.SIGKILL)
        run.tick()
        run.take().durable()


def written_to_while_copied() -> None:
    training = _Training()
    with training.run(every="1 steps") as run, held_up() as go:
        run.tick()
        training.model.weight.data.zero_()
        go.set()
        run.wait()


def in_waves() -> None:
    with _Training().run(max_arena_bytes="4MB") as run:
        run.tick()
        run.take().durable()


def frozen_and_written_to() -> None:
    model = nn.Linear(600, 600).requires_grad_(False)
    with a_run(model=model) as run:
        for number in range(2 * capture.LOOK_AGAIN + 4):
            if number == 4:  # It lies in both arenas.
                model.weight.data.add_(1)
            run.tick()
            run.take().durable()


def no_place_for_a_keeper() -> None:
    own_keeper_process()
    del os.environ["XDG_RUNTIME_DIR"]
    Path(f"everstep-{os.geteuid()}").mkdir(mode=0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(Path.cwd()))
        a_run().close()


WARNED: list[Callable[[], object]] = [
    keeper_killed,
    written_to_while_copied,
    in_waves,
    frozen_and_written_to,
    no_place_for_a_keeper,
]


@pytest.mark.process
def test_warnings_in_the_operating_manual_come_out(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quoted = section(OPERATING, "Warnings").of("text")[0].text.splitlines()
    told = []
    for number, provoke in enumerate(WARNED):
        os.environ["EVERSTEP_KEEPER"] = "thread"
        place = here / str(number)
        place.mkdir(mode=0o700)
        monkeypatch.chdir(place)
        capsys.readouterr()
        provoke()
        lines = capsys.readouterr().err.splitlines()
        told += [plain(line, place) for line in lines if re.search(r"warning: | failed: ", line)]
    assert [plain(line, here) for line in quoted] == told


def test_every_warning_quoted_is_one_of_the_code() -> None:
    code = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    rows = [line for line in section(OPERATING, "Warnings").lines if line.startswith("| `")]
    phrases = [phrase for row in rows for phrase in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(phrases) > 8
    for phrase in phrases:
        assert all(part in code for part in re.split(r" N\b|step N", phrase)), phrase


@pytest.mark.slow
@pytest.mark.process
def test_costs_are_documented(small: tuple[Path, list[str]]) -> None:
    directory, _ = small
    chain = Chain(directory / "runs/small")
    recorded = {name for snapshot in chain.snapshots() for name in snapshot.record.costs}
    rows = [line for line in section(OPERATING, "What a snapshot costs").lines if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])} == recorded


def test_every_kind_has_its_page_and_its_code() -> None:
    titles = [one.title for one in sections(OPERATING)]
    for kind in KINDS:
        assert f"{kind.__name__} ({kind.exit_code})" in titles
    text = OPERATING.read_text()
    assert re.search(r"\b143\b", text)


# -- links, names, versions --------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """The fragments of a document's headings, as GitHub makes them."""
    titles = [title for part in sections(path) for _, title in part.headings]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def prose(path: Path) -> str:
    return "\n".join(line for part in sections(path) for line in part.lines)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(path))):
        if re.match(r"\w+:", target):
            continue
        name, _, fragment = target.partition("#")
        other = (path.parent / name).resolve() if name else path
        assert other.exists(), f"{path.name}: {target}"
        assert not fragment or fragment in anchors(other), f"{path.name}: {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_no_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for pattern in (
        r"/(work|root|home|tmp/prep)\b",
        r"\b(pypi|pythonhosted|anaconda|npmjs|docker|ghcr|huggingface)\.(org|com|io|co)\b",
        r"\b[a-z0-9-]+\.(internal|local|corp)\b",
        r"\.\./shared\b",
    ):
        found = re.search(pattern, text)
        assert found is None, f"{path.name} names {found}"


def variables(text: str) -> set[str]:
    return set(re.findall(r"\bEVERSTEP_[A-Z]+(?:_[A-Z]+)*\b", text))


NOT_ARGUMENTS = {"keeper", "paranoid", "replica_wait", "ranks_wait", "ranks_hold", "ranks_parts"}
"""Settings that only a variable changes."""


@pytest.mark.parametrize("path", [README, CHINESE], ids=lambda path: path.name)
def test_variables_are_documented(path: Path) -> None:
    used = set().union(*(variables(source.read_text()) for source in (ROOT / "src").rglob("*.py")))
    named = {f"EVERSTEP_{one.name.upper()}": one.name for one in dataclasses.fields(Settings)}
    for variable, name in named.items():
        value = {
            "strict": "0",
            "overlap": "0",
            "paranoid": "1",
            "every": "never",
            "max_arena_bytes": "2GB",
            "keeper": "thread",
            "unsafe_single_writer": "1",
            "approximate_data": "1",
            "replica_wait": "5",
            "ranks_wait": "5",
            "ranks_hold": "5",
            "ranks_parts": "5",
            "scrub": "20MB/s",
        }.get(name, "all")
        changed = Settings("a").overridden({variable: value})
        assert getattr(changed, name) != getattr(Settings("a"), name), f"{variable} changes nothing"
    assert variables(path.read_text()) == used | named.keys()


def test_arguments_of_open_are_documented() -> None:
    table = [line for line in section(README, "Settings").lines if line.startswith("| `")]
    fields = {one.name: one for one in dataclasses.fields(Settings)}
    assert fields.keys() - NOT_ARGUMENTS == inspect.signature(everstep.open).parameters.keys() - {
        "data",
        "config",
        "objects",
    }
    for one in [one for name, one in fields.items() if name not in NOT_ARGUMENTS]:
        (row,) = [line for line in table if line.startswith(f"| `{one.name}` ")]
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[2] == f"`EVERSTEP_{one.name.upper()}`"
        default = "" if one.default is dataclasses.MISSING else f"`{json.dumps(one.default)}`"
        assert cells[3].lower() == default.replace("null", "none")


def test_the_chinese_readme_is_in_step() -> None:
    english, chinese = sections(README), sections(CHINESE)
    assert [[level for level, _ in one.headings] for one in english] == [
        [level for level, _ in one.headings] for one in chinese
    ]
    for one, other in zip(english, chinese, strict=True):
        assert [(b.language, b.text) for b in one.blocks] == [(b.language, b.text) for b in other.blocks]
        rows = [line.count("|") for line in one.lines if line.startswith("|")]
        assert rows == [line.count("|") for line in other.lines if line.startswith("|")], one.title
        links = [re.findall(r"\]\(([^)#]+)", "\n".join(part.lines)) for part in (one, other)]
        swapped = {"README.zh-CN.md": "README.md", "README.md": "README.zh-CN.md"}
        assert sorted(links[0]) == sorted(swapped.get(link, link) for link in links[1]), one.title


def test_the_changelog_has_this_version() -> None:
    titles = [one.title for one in sections(ROOT / "CHANGELOG.md")]
    released = [title for title in titles[1:] if title != "Unreleased"]
    assert released[0].split(" ")[0] == everstep.__version__
    assert f'version = "{everstep.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_decisions_are_numbered_and_complete() -> None:
    paths = sorted((ROOT / "docs/decisions").glob("*.md"))
    for number, path in enumerate(paths, start=1):
        assert path.name.startswith(f"{number:04}-")
        assert path.read_text().startswith(f"# {number:04} — ")
        titles = {title.split(" ")[0] for part in sections(path) for _, title in part.headings[0:1]}
        assert {"Context", "Decision", "Alternatives", "Consequences"} <= titles, path.name


# -- figures -----------------------------------------------------------------------------------------------

RESULTS = ROOT / "bench/results"


_GPT2 = ("gpt2",)


def _spread(unit: str, scale: float = 1.0, digits: int = 2) -> Callable[[Any], str]:
    """The median of the repetitions, and the lowest and highest."""

    def show(value: Any) -> str:
        median, low, high = (value[name] * scale for name in ("median", "min", "max"))
        return f"{median:.{digits}f} {unit}".rstrip() + f" ({low:.{digits}f}–{high:.{digits}f})"

    return show


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(len(value))


def _ratio(value: Any) -> str:
    return f"{value:.3f}"


ROWS: list[tuple[str, tuple[str, ...], Callable[[Any], str], str, str]] = [
    ("overlap", (*_GPT2, "floors", "memcpy", "GB_per_s"), _spread("GB/s", digits=1), "The machine: memcpy",
     "机器：memcpy"),
    ("overlap", (*_GPT2, "floors", "blake3", "GB_per_s"), _spread("GB/s", digits=1),
     "The machine: BLAKE3, one thread", "机器：BLAKE3，单线程"),
    ("overlap", (*_GPT2, "floors", "direct_write", "GB_per_s"), _spread("GB/s", digits=1),
     "The machine: direct write", "机器：直接写"),
    ("restore", ("floors", "direct_read", "GB_per_s"), _spread("GB/s", digits=1),
     "The machine: direct read", "机器：直接读"),
    ("overlap", (*_GPT2, "systems", "everstep", "busy", "blocked_s"), _spread("ms", 1e3, 1),
     "1.5 GB of GPT-2 and AdamW in training: the loop waits for a snapshot",
     "训练中的 1.5 GB GPT-2 加 AdamW：循环为一个快照等待"),
    ("overlap", (*_GPT2, "systems", r"torch\.save .*", "busy", "blocked_s"), _spread("ms", 1e3, 0),
     "The same for `torch.save` + fsync", "同上，`torch.save` + fsync"),
    ("overlap", (*_GPT2, "ours / DCP best", "blocked_s"), _spread(""),
     "of what it waits for DCP's best asynchronous mode", "与 DCP 最佳异步模式的等待之比"),
    ("overlap", (*_GPT2, "ours / DCP best", "lost_s"), _spread(""),
     "of the step-seconds that DCP's best mode loses until durable",
     "与 DCP 最佳模式到持久为止损失的步秒数之比"),
    ("overlap", (*_GPT2, "systems", "everstep", "busy", "durable_s"), _spread("s"),
     "Until it is durable, beside the training", "到持久为止，训练进行中"),
    ("overlap", (*_GPT2, "ours / DCP best", "durable_s"), _spread(""),
     "of what DCP's best mode takes", "与 DCP 最佳模式之比"),
    ("overlap", (*_GPT2, "systems", "everstep", "idle", "durable_s"), _spread("s"),
     "Until it is durable, nothing else at work", "到持久为止，空闲时"),
    ("overlap", (*_GPT2, "persist / direct write"), _spread(""),
     "of the rate of a direct write, nothing else at work", "与直接写速率之比，空闲时"),
    ("restore", (r"ours / torch\.load", "cold, ready"), _spread(""),
     "A restore, verified / `torch.load(mmap=True)` + `load_state_dict`, cold, until all bytes are there",
     "恢复，经校验 / `torch.load(mmap=True)` + `load_state_dict`，冷缓存，到所有字节就位为止"),
    ("restore", (r"ours / torch\.load", "warm, ready"), _spread(""), "The same, warm", "同上，热缓存"),
    ("restore", ("arena", r"ours / torch\.load, warm, ready"), _spread(""),
     "The same, from the memory of a killed training's keeper", "同上，取自被杀训练的 keeper 的内存"),
    ("storage", ("identical", "systems", "everstep", "further / full"), _spread("%", 100, 4),
     "Stored for another snapshot of the same state", "同一状态再存一个快照所存的字节"),
    ("storage", ("LoRA", "systems", "everstep", "further / trained"), _spread(""),
     "Stored for a step of LoRA: new bytes / the trained part's own state",
     "LoRA 的一步：新字节 / 可训练部分自身的状态"),
    ("storage", ("embeddings", "systems", "everstep", "further / full"), _spread("%", 100, 1),
     "Stored for embeddings of which 1 % of the rows changed", "1 % 行有改动的嵌入所存的字节"),
    ("kill", ("kills",), _count, "Trainings, their keepers, or both killed with SIGKILL at random instants",
     "在随机时刻以 SIGKILL 杀死训练、它的 keeper 或两者的次数"),
    ("kill", ("runs",), _count, "Runs these were spread over", "这些分布在多少个运行上"),
    ("kill", ("runs_killed",), _count, "of which were killed once or more", "其中至少被杀死一次的"),
    ("kill", ("identical",), _count, "Runs that ended as the undisturbed one, bit for bit",
     "结果与未受干扰者逐位相同的运行"),
    ("kill", ("handed_over",), _count,
     "Snapshots in a keeper's hands, not durable yet, when only the training was killed",
     "训练被杀死时在 keeper 手里、尚未持久的快照"),
    ("kill", ("handed_over_durable",), _count, "of which became durable", "其中后来持久的"),
    ("kill", ("from_memory",), _count, "Resumes out of a keeper's memory", "从 keeper 的内存恢复的次数"),
    ("kill", ("left_behind",), _count, "Processes, arenas and files left behind at the end of a run",
     "一次运行结束时遗留的进程、竞技场和文件"),
    ("kill", ("violations",), _count, "Violations of anything promised", "违反任何承诺的次数"),
    ("ranks_cost", ("75 MB", "stored_of_one_rank", "8"), _ratio,
     "Stored by 8 ranks of one DDP model / by one rank",
     "8 个 rank 的同一 DDP 模型所存的字节 / 1 个 rank 所存"),
    ("ranks_cost", ("1 GB", "durable_of_one_rank", "4"), _ratio,
     "Until a snapshot of 1 GB by 4 ranks is durable / by one rank, same disk",
     "4 个 rank 的 1 GB 快照到持久为止 / 1 个 rank，同一磁盘"),
    ("ranks_kill", ("kills",), _count,
     "Kills of trainings of 4, 2, 3 and 1 ranks (DDP, FSDP2, FSDP2 with tensor parallelism)",
     "对 4、2、3、1 个 rank 的训练（DDP、FSDP2、FSDP2 加张量并行）的击杀次数"),
    ("ranks_kill", ("resumed",), _count, "Resumes after them, each byte held against one process's reading",
     "其后的恢复次数，每个字节都与单进程读出的比对"),
    ("ranks_kill", ("wrong",), _count,
     "of these wrong, or trajectories that differ, or samples trained twice or not at all",
     "其中有误的，或轨迹不同的，或样本被训练两次或漏掉的"),
    ("fuzz", ("inputs",), _count, "Mutated inputs to all decoders", "喂给各解码器的变异输入"),
    ("fuzz", ("violations",), _count, "Other outcomes than decoded, Damaged, Unsupported",
     "解码成功、Damaged、Unsupported 以外的结果"),
]  # fmt: skip


def _look_up(tree: Any, path: tuple[str, ...]) -> Any:
    """What lies there; None where a measurement has no such figure."""
    for pattern in path:
        matching = [name for name in tree if re.fullmatch(pattern, name)] if isinstance(tree, dict) else []
        if not matching:
            return None
        tree = tree[min(matching, key=len)]
    return tree


def figures() -> list[tuple[str, str, str]]:
    """(English, Chinese, figure) of each row that has been measured."""
    results = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    looked_up = [(_look_up(results.get(file, {}), path), show, *texts) for file, path, show, *texts in ROWS]
    return [
        (english, chinese, show(value)) for value, show, english, chinese in looked_up if value is not None
    ]


def table(path: Path) -> str:
    column = 0 if path == README else 1
    return "".join(f"| {row[column]} | {row[2]} |\n" for row in figures())


TABLE = re.compile(r"(?<=<!-- figures -->\n)(\|.*\n\|---\|---\|\n)((?:\|.*\n)*)")


@pytest.mark.parametrize("path", [README, CHINESE], ids=lambda path: path.name)
def test_figures_are_those_of_the_last_measurement(path: Path) -> None:
    shown = TABLE.search(path.read_text(encoding="utf-8"))
    assert shown is not None
    assert shown[2] == table(path), "bench/results has changed: python tests/test_docs.py"


def main() -> None:
    for path in (README, CHINESE):
        text = path.read_text(encoding="utf-8")
        path.write_text(TABLE.sub(lambda found: found[1] + table(path), text), encoding="utf-8")  # noqa: B023


if __name__ == "__main__":
    main()
