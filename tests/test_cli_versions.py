"""The verbs of versions, and the drawing of branches."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep import cli
from everstep.chain import versions
from everstep.chain.history import Chain
from everstep.chain.lease import Lease
from everstep.chain.writer import Captured, Facts, Writer
from everstep.cli.graph import draw
from everstep.errors import Conflict, Mismatch, NotFound
from everstep.format import keys, values
from everstep.format.layout import Slice, lay_out
from examples import examples

pytestmark = pytest.mark.slow

LAYOUT = lay_out([Slice("one", "uint8", (64,), (0,), (64,), "moving")])


def taken(chain: Chain, branch: str, steps: Sequence[int], parent: str = "") -> None:
    writer = Writer(chain, Lease.take(chain.store), branch, parent or "")
    for step in steps:
        arena = memoryview(bytearray(LAYOUT.arena_bytes))
        arena[:64] = random.Random(f"{branch} {step}").randbytes(64)
        captured = Captured.whole(LAYOUT, arena, values.encode({"step": step}))
        writer.write(captured, Facts(step=step, trigger="10 steps", metrics={"loss": 1 / step}))
    writer.lease.release()


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """Steps 10 to 40 on main, 25 and 26 on `try` from 20, the tag `good` on 30."""
    chain = Chain.create(tmp_path / "chain", 4096)
    taken(chain, "main", [10, 20, 30, 40])
    versions.branch(chain, "try", "step:20")
    taken(chain, "try", [25, 26], chain.find("try").id)
    versions.tag(chain, "good", "step:30")
    return tmp_path / "chain"


def run(repo: Path, *arguments: str) -> int:
    return cli.main(["-r", str(repo), *arguments])


def json_of(capsys: pytest.CaptureFixture[str], repo: Path, *arguments: str) -> Any:
    capsys.readouterr()
    assert run(repo, *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def id_of(repo: Path, ref: str) -> str:
    return Chain(repo).find(ref).id


# -- tag and branch ----------------------------------------------------------------------------------------


def test_tags_are_made_moved_listed_and_taken_away(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(repo, "tag", "best", "best:loss") == 0
    assert capsys.readouterr().out == f"tag best names {id_of(repo, 'step:40')[:8]} step 40\n"
    assert run(repo, "tag", "best", "step:10") == Mismatch.exit_code
    assert "tag --force best step:10" in capsys.readouterr().err
    assert run(repo, "tag", "best", "step:25", "--branch", "try", "--force") == 0
    found = json_of(capsys, repo, "tag")
    assert [(one["tag"], one["step"], one["damage"]) for one in found["tags"]] == [
        ("best", 25, None), ("good", 30, None),
    ]  # fmt: skip
    assert run(repo, "tag") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["tag", "id", "step", "taken", "age", "remarks"]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["best", id_of(repo, "best")[:8], "25"],
        ["good", id_of(repo, "good")[:8], "30"],
    ]
    assert json_of(capsys, repo, "tag", "-d", "best") == {"tag": "best", "id": None, "step": None}
    assert run(repo, "tag", "--delete", "good") == 0
    assert capsys.readouterr().out == "tag good is gone\n"
    assert run(repo, "tag", "-d", "good") == NotFound.exit_code
    assert json_of(capsys, repo, "tag")["tags"] == []
    assert run(repo, "tag") == 0
    assert "has no tags yet" in capsys.readouterr().err


def test_a_damaged_tag_or_head_is_listed_as_such(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key in (keys.numbered(keys.tag("good"), 1), keys.numbered(keys.head("try"), 3)):
        (repo / key).write_bytes(b"rot")
    (repo / keys.snapshot(id_of(repo, "step:10"))).unlink()
    assert run(repo, "tag", "lost", "step:20") == 0
    (repo / keys.snapshot(id_of(repo, "lost"))).unlink()
    tags = {one["tag"]: one for one in json_of(capsys, repo, "tag", )["tags"]}  # fmt: skip
    assert "does not match" in tags["good"]["damage"]
    assert tags["lost"]["id"] is not None
    assert tags["lost"]["damage"]
    branches = {one["branch"]: one for one in json_of(capsys, repo, "branch")["branches"]}
    assert (branches["main"]["step"], branches["main"]["damage"]) == (40, None)
    assert branches["try"]["damage"]
    assert run(repo, "branch") == 0
    assert "DAMAGED" in capsys.readouterr().out


def test_branches_are_made_listed_and_taken_away(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(repo, "branch", "lr-3e-4", "try@step:25") == 0
    assert capsys.readouterr().out == f"branch lr-3e-4 begins at {id_of(repo, 'try@step:25')[:8]} step 25\n"
    found = json_of(capsys, repo, "branch")
    assert [(one["branch"], one["step"]) for one in found["branches"]] == [
        ("lr-3e-4", 25), ("main", 40), ("try", 26),
    ]  # fmt: skip
    assert run(repo, "branch", "try") == Mismatch.exit_code
    assert "rollback --branch try head" in capsys.readouterr().err
    assert run(repo, "branch", "-d", "lr-3e-4") == 0
    assert run(repo, "branch", "-d", "try") == Mismatch.exit_code
    assert "2 snapshots are on no other branch" in capsys.readouterr().err
    assert run(repo, "branch", "-d", "--force", "try") == 0
    assert [one["branch"] for one in json_of(capsys, repo, "branch")["branches"]] == ["main"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("tag", "-d"),
        ("tag", "--force"),
        ("tag", "-d", "good", "head"),
        ("branch", "-d"),
        ("branch", "x", "head", "--force"),
        ("branch", "-d", "try", "head"),
        ("rollback",),
        ("reflog", "-n", "x"),
        ("log", "-n", "x"),
    ],
)
def test_wrong_usage(repo: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    assert run(repo, *arguments) == 2
    assert "--help" in capsys.readouterr().err


# -- rollback and reflog -----------------------------------------------------------------------------------


def test_a_rollback_says_what_it_did_and_how_to_undo_it(
    repo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twenty, forty = id_of(repo, "step:20"), id_of(repo, "head")
    assert run(repo, "rollback", "step:20") == 0
    told = capsys.readouterr()
    assert told.out == f"branch main goes back from step 40 to {twenty[:8]} step 20\n"
    undo = told.err.strip().partition("undo it with: everstep ")[2].split()
    assert id_of(repo, "head") == twenty
    assert cli.main(undo) == 0
    assert id_of(repo, "head") == forty
    capsys.readouterr()
    assert run(repo, "rollback", "head") == 0
    assert "is the head of branch main already" in capsys.readouterr().out
    found = json_of(capsys, repo, "rollback", "step:25", "--branch", "try")
    expected = {
        "branch": "try",
        "id": id_of(repo, "try@step:25"),
        "from_step": 26,
        "to_step": 25,
        "moved": True,
    }
    assert found == expected
    mine = Lease.take(Chain(repo).store)
    assert run(repo, "rollback", "step:10") == Conflict.exit_code
    mine.release()


def test_the_reflog_has_every_advance(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(repo, "rollback", "try@{1}", "--branch", "try") == 0
    (repo / keys.numbered(keys.head("try"), 3)).write_bytes(b"rot")
    capsys.readouterr()
    found = json_of(capsys, repo, "reflog", "--branch", "try")
    assert [(one["ref"], one["step"], one["move"], one["to"]) for one in found["advances"]] == [
        ("try@{0}", 25, "rollback", "try@{1}"),
        ("try@{1}", None, None, None),
        ("try@{2}", 25, None, None),
        ("try@{3}", 20, "branch", "step:20"),
    ]
    assert [one["trigger"] for one in found["advances"]] == [None, None, "10 steps", None]
    assert run(repo, "reflog", "--branch", "try", "-n", "0") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ref", "id", "step", "at", "age", "what"]
    assert [line.rpartition("  ")[2] for line in lines[1:]] == [
        "rolled back to try@{1}",
        "DAMAGED: a head record does not match its digest",
        "snapshot (10 steps)",
        "began at step:20",
    ]
    assert run(repo, "reflog", "-n", "2") == 0
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 3
    assert "everstep reflog -n 0 lists all" in told.err
    assert run(repo, "reflog", "--branch", "none") == NotFound.exit_code


def test_a_rollback_to_an_id_is_shown_short(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    id = id_of(repo, "step:10")
    assert run(repo, "rollback", id) == 0
    capsys.readouterr()
    assert run(repo, "reflog", "-n", "1") == 0
    assert capsys.readouterr().out.splitlines()[1].endswith(f"rolled back to {id[:8]}")


# -- log ---------------------------------------------------------------------------------------------------


def test_log_shows_what_led_to_the_head(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(repo, "rollback", "step:20") == 0
    capsys.readouterr()
    found = json_of(capsys, repo, "log")
    assert [(one["step"], one["branch"], one["heads"]) for one in found["snapshots"]] == [
        (20, "main", ["main"]), (10, "main", []),
    ]  # fmt: skip
    found = json_of(capsys, repo, "log", "--branch", "try")
    assert [(one["step"], one["branch"], one["heads"]) for one in found["snapshots"]] == [
        (26, "try", ["try"]), (25, "try", []), (20, "main", []),
    ]  # fmt: skip
    assert found["snapshots"][0]["parents"] == [id_of(repo, "try@step:25")]


def test_log_of_all_branches(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(repo, "rollback", "step:20") == 0
    capsys.readouterr()
    found = json_of(capsys, repo, "log", "--all")
    assert found["branch"] is None
    assert sorted(one["step"] for one in found["snapshots"]) == [10, 20, 25, 26, 30, 40]
    heads = {one["step"]: one["heads"] for one in found["snapshots"] if one["heads"]}
    assert heads == {20: ["main"], 26: ["try"]}
    assert json_of(capsys, repo, "log", "--all", "-n", "2")["more"] is True


def graph(capsys: pytest.CaptureFixture[str], repo: Path, *arguments: str) -> list[str]:
    """The drawing, each snapshot as its step, with what stands beside it in brackets."""
    assert run(repo, "log", "--graph", *arguments) == 0
    drawn = []
    for line in capsys.readouterr().out.splitlines()[1:]:
        drawing, star, rest = line.partition("*")
        words = rest.split()
        marks = [word for word in words[2:] if word[0] in "(["]
        drawn.append(" ".join([drawing + star + words[1], *marks]) if star else line.rstrip())
    return drawn


def test_the_graph_is_drawn_as_git_draws_it(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert graph(capsys, repo, "--all") == [
        "*26 (try)",
        "*25",
        "| *40 (main)",
        "| *30 [good]",
        "|/",
        "*20",
        "*10",
    ]
    assert graph(capsys, repo) == ["*40 (main)", "*30 [good]", "*20", "*10"]


def test_three_branches_of_one_snapshot(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = Chain(repo)
    versions.branch(chain, "third", "step:20")
    taken(chain, "third", [22], chain.find("third").id)
    versions.branch(chain, "named", "step:30")
    assert graph(capsys, repo, "--all") == [
        "*22 (third)",
        "| *26 (try)",
        "| *25",
        "| | *40 (main)",
        "| | *30 (named) [good]",
        "| |/",
        "|/",
        "*20",
        "*10",
    ]


def test_what_is_not_kept_any_more_leaves_the_line_whole(
    repo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pruned snapshot, and a record that is damaged."""
    (repo / keys.numbered(keys.head("main"), 3)).unlink()
    assert graph(capsys, repo) == ["*40 (main)", "*20", "*10"]
    (repo / keys.numbered(keys.head("main"), 2)).write_bytes(b"rot")
    assert run(repo, "log", "--graph") == 0
    out = capsys.readouterr().out
    assert out.count("*") == 3
    assert "DAMAGED" in out


def test_an_unrelated_line_has_a_root_of_its_own(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken(Chain(repo), "alone", [5])
    drawn = graph(capsys, repo, "--all")
    assert drawn[0] == "*5 (alone)"
    assert drawn[1:] == ["*26 (try)", "*25", "| *40 (main)", "| *30 [good]", "|/", "*20", "*10"]


forests = st.integers(1, 40).flatmap(
    lambda count: st.tuples(
        *[st.none() | st.integers(0, number - 1) if number else st.none() for number in range(count)]
    )
)


@given(forests, st.integers(0, 9))
@settings(derandomize=True, deadline=None, max_examples=examples(300))
def test_any_forest_is_drawn_so_that_it_can_be_read_again(parents: tuple[int | None, ...], seed: int) -> None:
    """Whoever follows the lines of the drawing downwards comes to the parent, and to nothing else."""
    ids = list(range(len(parents)))
    random.Random(seed).shuffle(ids)
    name = {number: f"s{ids[number]:02}" for number in range(len(parents))}
    wanted = {name[n]: None if p is None else name[p] for n, p in enumerate(parents)}
    lines = list(draw(wanted, {one: one for one in wanted}))
    assert sorted(line.id for line in lines if line.id) == sorted(wanted)
    read: dict[str, str | None] = dict.fromkeys(wanted)
    waiting: list[set[str]] = []
    """By column, those whose line comes down there."""
    for line in lines:
        if line.id is None:
            assert line.drawing == "| " * (len(waiting) - 2) + "|/"
            last = waiting.pop()
            waiting[-1] |= last
            continue
        column = len(line.drawing) // 2
        assert line.drawing == "| " * column + "*"
        assert column in (len(waiting), len(waiting) - 1)
        joined = wanted[next(iter(waiting[column]))] if column < len(waiting) else None
        for child in waiting.pop() if joined == line.id else ():
            read[child] = line.id
        # What is left of a line that ended here is drawn no further.
        assert len(waiting) == column
        if wanted[line.id] is not None:
            waiting.append({line.id})
    assert read == wanted
    assert waiting == []


@pytest.mark.process
def test_versions_work_where_neither_torch_nor_numpy_is(
    repo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import subprocess

    hook = repo.parent / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'numpy'):\n"
        "            raise ImportError(f'{name} is not to be imported')\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    source = str(Path(cli.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(hook), source])}
    for arguments in (
        ["tag", "new", "step:10"], ["tag"], ["branch", "more"], ["branch"], ["rollback", "step:20"],
        ["reflog"], ["log", "--graph", "--all"], ["branch", "-d", "more"],
    ):  # fmt: skip
        command = [sys.executable, "-m", "everstep", "-r", str(repo), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (arguments, done.stderr)
        assert done.stdout
