"""A parity set with buckets of a server among its members, and a run on a set with a keeper of its own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

import everstep
from chain.making import content, restored, started, written
from everstep.chain.history import Chain
from everstep.chain.repair import consider, execute
from everstep.chain.verify import verify
from everstep.keeper.client import living
from everstep.run import session
from everstep.store.base import Addressed
from everstep.store.objects import ObjectStore
from everstep.store.parity import ParityStore
from everstep.store.urls import open_store
from everstep.testing.store import in_threads
from servers.fixtures import Bucket
from servers.running import S3

pytestmark = [pytest.mark.process]


def lost_and_filled_again(url: str, places: list[Path | ObjectStore]) -> None:
    """A chain on a set, then each member is emptied, and filled again."""
    store = open_store(url)
    assert isinstance(store, ParityStore)
    writer = started(store)
    contents = [content(1)]
    written(writer, contents)
    writer.lease.release()
    before = [{entry.key: bytes(one.get(entry.key)) for entry in one.list()} for one in store.members]
    for place in places:
        if isinstance(place, Path):
            shutil.rmtree(place)
        else:
            for entry in list(place.list()):
                place.delete(entry.key)
        chain = Chain(open_store(url))
        for snapshot in chain.snapshots():
            assert restored(chain, snapshot)[0] == contents[snapshot.step - 1]
        done = execute(consider(open_store(url)))
        assert done.repaired
        assert not done.left
        assert verify(chain).findings == []
    assert [{entry.key: bytes(one.get(entry.key)) for entry in one.list()} for one in store.members] == before


def test_buckets_and_a_directory(moto: S3, bucket: Bucket, tmp_path: Path) -> None:
    one, other = f"{bucket(moto)}/a", f"{bucket(moto)}/b"
    url = f"parity:2+1:{one},{tmp_path}/c,{other}"
    lost_and_filled_again(url, [ObjectStore(one)])


def test_a_bucket_that_is_not_there_is_a_member_that_is_away(
    moto: S3, bucket: Bucket, tmp_path: Path
) -> None:
    made = bucket(moto)
    url = f"parity:2+1:{made}/a,{tmp_path}/b,s3://nobody-has-made-this/c"
    writer = started(open_store(url))
    (snapshot,) = written(writer, [content(1)])
    assert restored(Chain(open_store(url)), snapshot)[0] == content(1)
    findings = verify(Chain(open_store(url))).findings
    assert [finding.problem for finding in findings if not finding.key] == [
        "s3://nobody-has-made-this/c is away (there is no bucket 'nobody-has-made-this' for "
        "s3://nobody-has-made-this/c)"
    ]


@pytest.mark.slow
def test_races_on_a_real_gateway(ceph: S3, bucket: Bucket, tmp_path: Path) -> None:
    made = bucket(ceph)
    url = f"parity:2+1:{made}/a,{made}/b,{tmp_path}/c"
    for number in range(10):
        won = in_threads(
            6, lambda one, number=number: open_store(url).put(f"heads/main/{number:016x}", [bytes([one])])
        )  # type: ignore[misc]
        assert won.count(True) == 1
        assert won.count(False) == 5
        assert bytes(open_store(url).get(f"heads/main/{number:016x}")) == bytes([won.index(True)])


def test_a_run_with_a_keeper_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper opens the set by its address, and goes on when two members are taken away."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVERSTEP_KEEPER", "process")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    url = "parity:4+2:" + ",".join("abcdef")
    assert isinstance(open_store(url), Addressed)
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters())
    with everstep.open(url, model=model, optimizer=optimizer, every="never") as run:
        run.tick()
        run.take().durable()
        (keeper,) = [one for one in living() if one.trainer == os.getpid()]
        assert keeper.pid != os.getpid()
        for gone in ("a", "d"):  # The keeper may just be writing there.
            (tmp_path / gone).rename(tmp_path / f"{gone}-gone")
        with torch.no_grad():
            model.weight.mul_(2)
        run.tick()
        run.take().durable()
        weight = model.weight.detach().clone()
    other = torch.nn.Linear(300, 300)
    with everstep.open(url, model=other, optimizer=torch.optim.AdamW(other.parameters())) as run:
        assert run.step == 2
        assert torch.equal(other.weight, weight)
    execute(consider(open_store(url)))
    assert verify(Chain(open_store(url))).findings == []


def test_a_run_says_which_members_are_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    model = torch.nn.Linear(2, 2)
    Path("b").symlink_to("b")  # Whatever is asked of it, the system says that it goes in circles.
    (tmp_path / "a/tmp").mkdir(parents=True)
    (tmp_path / "a/tmp/left-by-a-killed-writer").write_text("x")
    monkeypatch.setattr(session, "default_sink", lambda: lambda event: told.append(str(event)))
    with everstep.open("parity:2+1:a,b,c", model=model, every="never") as run:
        run.tick()
        run.take().durable()
    (warning,) = [one for one in told if "is away" in one]
    assert warning.startswith("warning: b is away")
    assert warning.endswith("Next: everstep -r parity:2+1:a,b,c repair, when it is back")
    assert not list((tmp_path / "a/tmp").iterdir())
