"""The verbs `verify`, `repair` and `scrub`."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from everstep import cli
from everstep.chain.history import Chain
from everstep.chain.lease import Lease
from everstep.chain.replicas import remember
from everstep.chain.writer import Captured, Facts, Writer
from everstep.format import keys, values
from everstep.format.layout import Slice, lay_out
from everstep.store.local import LocalStore

pytestmark = pytest.mark.slow

LAYOUT = lay_out([Slice("w", "float32", (500_000,), (0,), (500_000,))])


def write(writer: Writer, step: int) -> None:
    arena = bytearray(LAYOUT.arena_bytes)
    arena[:2_000_000] = random.Random(step).randbytes(2_000_000)
    made = Captured.whole(LAYOUT, memoryview(arena), values.encode({}))
    writer.write(made, Facts(step=step))


def fill(url: str) -> None:
    chain = Chain.create(url)
    writer = Writer(chain, Lease.take(chain.store))
    for step in (1, 2, 3):
        write(writer, step)
    writer.lease.release()


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    fill(str(tmp_path / "chain"))
    return tmp_path / "chain"


def run(*arguments: object) -> int:
    return cli.main([str(one) for one in arguments])


def json_of(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    capsys.readouterr()
    assert run(*arguments, "--json") == code
    return json.loads(capsys.readouterr().out)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def a_pack(repo: Path) -> Path:
    head = Chain(repo).find("head")
    return repo / keys.pack(Chain(repo).manifest(head).places[0].pack)


def test_subsets_take_turns_and_say_what_they_left(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [json_of(capsys, "-r", repo, "verify", "--read-data-subset", "30%")["subset"] for _ in range(4)]
    assert parts == [{"number": number, "of": 3} for number in (1, 2, 3, 1)]
    assert json_of(capsys, "-r", repo, "verify", "--read-data-subset", "7/20")["subset"]["number"] == 7
    assert run("-r", repo, "verify", "--read-data-subset", "5%") == 0
    told = capsys.readouterr().out
    assert "part 1 of 20 of the data, and all records and footers" in told
    assert "of data were not read" in told
    assert json_of(capsys, "-r", repo, "verify")["subset"] is None


@pytest.mark.parametrize("text", ["0%", "101%", "5", "0/3", "4/3", "x/y", "1/0", "-1%"])
def test_what_is_no_part_is_refused(repo: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-r", repo, "verify", f"--read-data-subset={text}") == 2
    assert "is no part" in capsys.readouterr().err


def test_a_restore_test_restores_the_heads_or_what_is_named(
    repo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("-r", repo, "verify", "--restore-test") == 0
    assert "step 3: restored into memory, 1 leaf, 2.0 MB; the state that was taken" in capsys.readouterr().out
    found = json_of(capsys, "-r", repo, "verify", "--restore-test", "step:2")
    assert [(one["step"], one["ok"], one["leaves"]) for one in found["restored"]] == [(2, True, 1)]
    assert run("-r", repo, "verify", "head") == 2
    assert "only with --restore-test" in capsys.readouterr().err
    damage(a_pack(repo))
    assert run("-r", repo, "verify", "--restore-test", "head") == 20
    told = capsys.readouterr().out
    assert "step 3: cannot be restored: chunk" in told
    assert f"next: everstep -r {repo} repair" in told
    assert run("-r", repo, "verify", "--restore-test", "head~1") == 0


def test_repair_from_a_copy(repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(repo, copy)
    good = a_pack(repo).read_bytes()
    damage(a_pack(repo))
    assert run("-r", repo, "verify") == 20
    assert f"to have the rest back: everstep -r {repo} repair" in capsys.readouterr().out
    assert run("-r", repo, "repair") == 20
    told = capsys.readouterr().out
    assert f"everstep -r {repo} repair --from A_COPY_OF_THE_CHAIN" in told
    assert "0 repaired, 1 not; 2 of 3 snapshots whole" in told
    assert run("-r", repo, "repair", "--from", copy, "--dry-run") == 0
    assert "can be put back from" in capsys.readouterr().out
    assert a_pack(repo).read_bytes() != good
    found = json_of(capsys, "-r", repo, "repair", "--from", tmp_path / "none", "--from", copy)
    assert (found["ok"], found["whole"], len(found["repaired"])) == (True, 3, 1)
    assert a_pack(repo).read_bytes() == good
    assert run("-r", repo, "verify") == 0
    assert run("-r", repo, "repair") == 0


def test_repair_of_a_parity_set_and_a_scrub_that_repairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    url = "parity:2+1:" + ",".join(str(tmp_path / name) for name in "abc")
    fill(url)
    shutil.rmtree(tmp_path / "b")
    assert run("-r", url, "log") == 0
    assert run("-r", url, "verify", "--restore-test") == 0
    assert run("-r", url, "verify") == 20
    assert f"its part with {tmp_path}/b is missing" in capsys.readouterr().out
    assert run("-r", url, "scrub", "--rate", "1GB/s") == 20
    assert run("-r", url, "scrub", "--rate", "1GB/s", "--repair") == 0
    assert "3 of 3 snapshots whole" in capsys.readouterr().out
    assert run("-r", url, "verify") == 0
    found = json_of(capsys, "-r", url, "scrub", "--rate", "1GB/s")
    assert (found["ok"], found["passes"]) == (True, 3)


@pytest.mark.parametrize("rate", ["fast", "0MB/s", "-1", "MB/s"])
def test_what_is_no_rate_is_refused(repo: Path, rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-r", repo, "scrub", f"--rate={rate}") == 2
    assert "is no rate" in capsys.readouterr().err


def test_errors_name_the_next_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-r", tmp_path / "none", "repair") == 10
    assert "is not an Everstep chain" in capsys.readouterr().err
    assert run("-r", "parity:2+1:a,b", "repair") == 14
    assert "names 2 members" in capsys.readouterr().err


def test_a_listing_says_what_was_verified_where(
    repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there"
    assert run("-r", repo, "replicate", there) == 0
    chain = Chain(repo)
    remember(chain, [LocalStore(there)])
    assert [one["verified"] for one in json_of(capsys, "-r", repo, "log")["snapshots"]] == [[], [], []]
    assert run("-r", there, "verify") == 0
    write(Writer(chain, Lease.take(chain.store), "main", chain.find("head").id), 4)
    rows = json_of(capsys, "-r", repo, "log")["snapshots"]
    assert [one["verified"] for one in rows] == [[], *[[str(there)]] * 3]
    assert run("-r", repo, "verify") == 0
    rows = json_of(capsys, "-r", repo, "log")["snapshots"]
    assert [one["verified"] for one in rows] == [[str(repo)], *[[str(repo), str(there)]] * 3]
    capsys.readouterr()
    assert run("-r", repo, "log") == run("-r", repo, "show", "head~1") == 0
    said = capsys.readouterr().out
    assert said.count("local verified") == 5
    assert f"local verified, {there} verified" in " ".join(said.split())


def test_a_damaged_snapshot_and_one_that_was_not_read_are_not_verified(
    repo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chain = Chain(repo)
    assert run("-r", repo, "verify", "--read-data-subset", "1/2") == 0
    assert not any(one["verified"] for one in json_of(capsys, "-r", repo, "log")["snapshots"])
    (name,) = chain.manifest(chain.find("step:2")).packs
    damage(repo / keys.pack(name))
    assert run("-r", repo, "verify") == 20
    rows = json_of(capsys, "-r", repo, "log")["snapshots"]
    assert {one["step"]: bool(one["verified"]) for one in rows} == {1: True, 2: False, 3: True}
    assert json_of(capsys, "-r", repo, "show", "step:3")["verified"] == [str(repo)]
