"""The verbs `prune` and `stats`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from everstep import cli, errors
from everstep.chain import prune
from everstep.chain.history import Chain, now
from everstep.chain.lease import Lease
from everstep.chain.verify import verify
from everstep.chain.writer import Captured, Facts, Writer
from everstep.format import keys, record, values
from everstep.format.layout import Slice, lay_out
from everstep.format.record import TagRecord

LAYOUT = lay_out([Slice("w", "float32", (5000,), (0,), (5000,))])


def write(writer: Writer, step: int, loss: float) -> str:
    arena = bytearray(LAYOUT.arena_bytes)
    arena[:8] = step.to_bytes(8, "little")
    made = Captured.whole(LAYOUT, memoryview(arena), values.encode({}))
    return writer.write(made, Facts(step=step, metrics={"loss": loss})).id


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six snapshots of main, the third of which is tagged, and one of `side`; nobody is at work."""
    monkeypatch.setattr(prune, "GRACE_S", 0.0)
    path = tmp_path / "chain"
    chain = Chain.create(path)
    writer = Writer(chain, Lease.take(chain.store))
    ids = [write(writer, step, abs(step - 4) + 0.5) for step in range(1, 7)]
    writer.lease.release()
    side = Writer(chain, Lease.take(chain.store, "side"), "side")
    write(side, 70, 9.0)
    side.lease.release()
    tag = TagRecord(ids[2], "n", now(), name="good", number=1)
    chain.store.put(tag.key, [record.seal(tag)])
    return path


def run(*arguments: object) -> int:
    return cli.main([str(one) for one in arguments])


def json_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def steps(path: Path, branch: str = "main") -> list[int]:
    return [one.step for one in Chain(path).snapshots(branch)]


def test_a_dry_run_shows_the_plan_with_reasons_and_changes_nothing(
    repo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path for path in repo.rglob("*") if path.is_file())
    assert run("-r", repo, "prune", "--keep", "last 1, best loss 1", "--dry-run") == 0
    head, *rows, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["id", "branch", "step", "taken", "what", "why"]
    shown = {int(row.split()[2]): row.partition("goes" if " goes" in row else "stays")[1:] for row in rows}
    assert {step: (what, why.strip()) for step, (what, why) in shown.items()} == {
        6: ("stays", "head of main; last 1"),
        5: ("goes", ""),
        4: ("stays", "best loss 1"),
        3: ("stays", "tag good"),
        2: ("goes", ""),
        1: ("goes", ""),
        70: ("stays", "head of side; last 1; best loss 1"),
    }
    assert last.startswith("3 snapshots to go, ")
    assert sorted(path for path in repo.rglob("*") if path.is_file()) == before


def test_it_deletes_what_it_showed(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("-r", repo, "prune", "--keep", "last 1, best loss 1")
    plan = json_of(capsys, *asked, "--dry-run")
    assert (plan["dry_run"], plan["deleted"], plan["freed_bytes"]) == (True, [], 0)
    done = json_of(capsys, *asked)
    assert done["going"] == plan["going"]
    assert done["freed_bytes"] == plan["planned_bytes"] > 3 * 20_000
    assert not any((repo / key).exists() for key in done["deleted"])
    assert len(done["deleted"]) == 3 * 4
    assert (steps(repo), steps(repo, "side")) == ([6, 4, 3], [70])
    assert verify(Chain(repo)).findings == []
    again = json_of(capsys, *asked)
    assert (again["going"], again["deleted"]) == ([], [])
    assert {row["step"]: bool(row["reasons"]) for row in again["snapshots"]} == {
        6: True,
        4: True,
        3: True,
        70: True,
    }


def test_only_one_branch(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-r", repo, "prune", "--keep", "last 1", "--branch", "side") == 0
    assert len(steps(repo)) == 6
    assert "0 objects deleted" in capsys.readouterr().out
    assert run("-r", repo, "prune", "--keep", "last 1", "--branch", "main") == 0
    assert steps(repo) == [6, 3]
    assert run("-r", repo, "prune", "--keep", "last 1", "--branch", "no/name") == errors.Mismatch.exit_code


def test_what_is_younger_than_the_window_stays(
    repo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune, "GRACE_S", 3600.0)
    found = json_of(capsys, "-r", repo, "prune", "--keep", "last 1")
    assert found["going"] == found["deleted"] == []
    assert all("younger than 1 h" in row["reasons"] for row in found["snapshots"])


def test_without_a_policy_it_asks_for_one(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-r", repo, "prune") == errors.Mismatch.exit_code
    told = capsys.readouterr().err
    assert "no policy" in told
    assert f"everstep -r {repo} prune --dry-run --keep" in told
    assert run("-r", repo, "prune", "--keep", "newest 3") == errors.Mismatch.exit_code
    assert "keep='newest 3' is not understood" in capsys.readouterr().err
    assert len(steps(repo)) == 6


def test_damage_in_what_stays_is_told_and_nothing_goes(
    repo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (repo / keys.snapshot(Chain(repo).find("head").id)).unlink()
    assert run("-r", repo, "prune", "--keep", "last 1") == errors.Damaged.exit_code
    told = capsys.readouterr().err
    assert "nothing was pruned" in told
    assert "verify" in told


def test_stats(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json_of(capsys, "-r", repo, "stats", "--keep", "last 1")
    assert found["snapshots"] == 7
    assert found["logical_bytes"] == 7 * LAYOUT.logical_bytes
    assert found["stored_bytes"] == sum(found["kinds"].values())
    assert [(one["name"], one["snapshots"]) for one in found["branches"]] == [("main", 6), ("side", 1)]
    assert [(one["name"], one["versions"]) for one in found["leaves"]] == [("w", 7.0)]
    assert found["prune"]["keep"] == "last 1"
    assert found["prune"]["freed_bytes"] > 4 * 20_000
    assert found["free_bytes"] > 0
    assert run("-r", repo, "stats", "-n", "0", "--keep", "last 1") == 0
    shown = capsys.readouterr().out
    assert "leaf" not in shown
    assert "prune --keep 'last 1' would free" in shown
    assert run("-r", repo, "stats", "-n", "few") == 2


PAIR = lay_out([Slice(name, "uint8", (1 << 21,), (0,), (1 << 21,)) for name in ("same", "other")])


@pytest.fixture
def half_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two snapshots of two leaves, of which the second has changed one."""
    monkeypatch.setattr(prune, "GRACE_S", 0.0)
    chain = Chain.create(tmp_path / "chain")
    writer = Writer(chain, Lease.take(chain.store))
    rng = random.Random(1)
    arena = memoryview(bytearray(rng.randbytes(PAIR.arena_bytes)))
    for step in (1, 2):
        writer.write(Captured.whole(PAIR, memoryview(bytes(arena)), values.encode({})), Facts(step=step))
        arena[PAIR.regions[1].offset :] = rng.randbytes(PAIR.regions[1].size_bytes)
    writer.lease.release()
    return tmp_path / "chain"


def test_it_repacks_where_that_frees_enough(half_dead: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("-r", half_dead, "prune", "--keep", "last 1")
    assert json_of(capsys, *asked, "--dry-run", "--no-repack")["repacking"] == []
    assert json_of(capsys, *asked, "--dry-run", "--max-unused", "60%")["repacking"] == []
    planned = json_of(capsys, *asked, "--dry-run")
    assert len(planned["repacking"]) == 1
    assert 2_000_000 < planned["repacked_bytes"] < 2_200_000
    found = json_of(capsys, "-r", half_dead, "stats", "--keep", "last 1")["prune"]
    assert found["freed_bytes"] == planned["planned_bytes"] + planned["repacked_bytes"]
    assert run(*asked, "--dry-run") == 0
    assert "1 pack to repack, of which 2.1 MB is needed, 2.1 MB more" in capsys.readouterr().out
    before = sum(one.stat().st_size for one in half_dead.rglob("packs/*/*"))
    assert run(*asked) == 0
    assert "2.1 MB copied, 2.1 MB freed" in capsys.readouterr().out
    after = sum(one.stat().st_size for one in half_dead.rglob("packs/*/*"))
    assert before - after == planned["repacked_bytes"]
    assert verify(Chain(half_dead)).findings == []
    assert run("-r", half_dead, "dump", f"relocations/{2**64 - 2:016x}") == 0
    assert json.loads(capsys.readouterr().out)["moved"].keys() == set(planned["repacking"])
    assert json_of(capsys, *asked)["deleted"] == []


@pytest.mark.parametrize("share", ["much", "-1%", "101%", "nan"])
def test_a_share_that_is_none(half_dead: Path, share: str) -> None:
    assert run("-r", half_dead, "prune", "--keep", "last 1", "--max-unused", share) == 2


def test_what_cannot_be_repacked_is_told(half_dead: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (name,) = json_of(capsys, "-r", half_dead, "prune", "--keep", "last 1", "--dry-run")["repacking"]
    path = half_dead / keys.pack(name)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    assert run("-r", half_dead, "prune", "--keep", "last 1") == 0
    assert f"packs/{name[:2]}/{name} was not repacked" in capsys.readouterr().err
    assert path.exists()
