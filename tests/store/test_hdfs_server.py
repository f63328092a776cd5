"""HDFS, the real one: a NameNode and three DataNodes."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import everstep
from chain.making import GRID_BYTES, content, restored
from everstep.chain.history import Chain
from everstep.chain.lease import Lease
from everstep.chain.verify import verify
from everstep.chain.writer import Facts, Writer
from everstep.cli import machine
from everstep.errors import Conflict, Mismatch, NotFound, Unavailable, Unsupported
from everstep.store import hdfs as store_module
from everstep.store import namenode
from everstep.store.base import Addressed, Probing, Store, Sweeping
from everstep.store.hdfs import PIECE_BYTES, RANGE_BYTES, TEMPORARY, HdfsStore
from everstep.store.patience import Patience
from everstep.store.urls import open_store
from everstep.testing import store as contract
from everstep.testing.store import StoreContract, in_threads, listed, odd_parts, pattern
from servers.fixtures import Directory
from servers.hdfs import HDFS
from store.remote import kill_and_go_on, race

pytestmark = [pytest.mark.process]

HASTY = Patience(deadline_s=60, first_wait_s=0.05, longest_wait_s=1, request_s=20)
DIGEST = "cd" * 32


class TestHdfs(StoreContract):
    @pytest.fixture
    def store(self, directory: Directory, monkeypatch: pytest.MonkeyPatch) -> Store:
        # Closing a file may take half a second; the race of processes below has more of them.
        monkeypatch.setattr(contract, "ROUNDS", 20)
        monkeypatch.setattr(contract, "LISTED", 30)
        return HdfsStore(directory(), patience=HASTY)


@pytest.fixture
def store(directory: Directory) -> HdfsStore:
    return HdfsStore(directory(), patience=HASTY)


def unfinished(store: HdfsStore) -> list[str]:
    return [name for name, _ in store._names(TEMPORARY, 1000)]


def half_written(store: HdfsStore) -> Any:
    """What writes a file that is never finished."""
    return store._client().create(f"{store._where.path}/{TEMPORARY}/half", namenode.options(9, None))


def test_what_it_is(store: HdfsStore) -> None:
    assert isinstance(store, Probing | Addressed | Sweeping)
    again = open_store(store.address)
    assert isinstance(again, HdfsStore)
    assert again.url == store.url


def test_large_objects(store: HdfsStore) -> None:
    data = pattern(2 * RANGE_BYTES + 3 * PIECE_BYTES + 12_345)
    key = f"packs/cd/{DIGEST}"
    assert store.put(key, odd_parts(data)) is True
    assert store.put(key, [b"other"]) is False
    assert bytes(store.get(key)) == data
    assert bytes(store.get(key, 12_345_678, 20_000_000)) == data[12_345_678:32_345_678]
    buffer = bytearray(len(data) + 5)
    assert store.read_into(key, 0, [memoryview(buffer)[:7], memoryview(buffer)[7:]]) == len(data)
    assert buffer[: len(data)] == data
    assert unfinished(store) == []


def test_the_memory_of_what_was_put_is_free_again(store: HdfsStore) -> None:
    """Also where it was tried more than once."""
    gc.disable()
    try:
        for number in range(3):
            data = bytearray(100_000)
            assert store.put(f"new/{number}/key", [data, memoryview(data)[5:]]) is True
            data.append(1)
    finally:
        gc.enable()


def test_the_default_of_the_configuration(hdfs: HDFS, store: HdfsStore) -> None:
    store.put("key", [b"x"])
    path = store.url.removeprefix(hdfs.url)
    assert bytes(HdfsStore(f"hdfs://{path}").get("key")) == b"x"


def test_another_user_is_told_that_it_may_not(store: HdfsStore, monkeypatch: pytest.MonkeyPatch) -> None:
    Chain.create(store)
    monkeypatch.setenv("HADOOP_USER_NAME", "nobody-special")
    other = HdfsStore(store.url)
    assert Chain(other).head() is None
    with pytest.raises(Unavailable, match=r"cannot write .*permission denied.*check HADOOP_CONF_DIR"):
        other.put("key", [b"x"])
    with pytest.raises(Unavailable, match=r"cannot delete .*permission denied"):
        other.delete("everstep.json")


def test_where_no_namenode_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hdfs_native")
    nobody = HdfsStore("hdfs://127.0.0.1:9/runs/gpt", patience=Patience(deadline_s=0.2, first_wait_s=0.05))
    with pytest.raises(
        Unavailable, match=r"cannot read hdfs://.*/key: the connection was refused, tried for"
    ):
        nobody.get("key")
    with pytest.raises(Unavailable, match="no NameNode is known by that name: give HOST:PORT"):
        HdfsStore("hdfs://service/runs/gpt").get("key")


def test_a_file_where_the_chain_should_be(store: HdfsStore) -> None:
    store.put("a", [b"x"])
    below = HdfsStore(f"{store.url}/a/b", patience=HASTY)
    with pytest.raises(Unavailable, match="a file stands where a directory belongs"):
        below.put("key", [b"x"])
    with pytest.raises(NotFound):
        below.get("key")
    assert listed(below) == []


def test_a_directory_in_the_place_of_an_object(store: HdfsStore) -> None:
    store.put("a/b", [b"x"])
    with pytest.raises(Conflict, match="a directory stands in its place"):
        store.put("a", [b"x"])
    assert unfinished(store) == []


def test_doctor(store: HdfsStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_torch", lambda: iter([]))
    lines = {line.name: line for line in machine.examine(store.url)}
    assert lines["exclusive put"].status == machine.OK
    assert listed(store) == []


def test_a_chain_is_not_put_among_other_things(store: HdfsStore) -> None:
    store.put("model.pt", [b"x"])
    with pytest.raises(Mismatch, match=r"not empty either \(it holds model.pt\)"):
        Chain.create(store)


# -- what is left behind -----------------------------------------------------------------------------------


def test_half_written_files_are_no_objects_and_are_swept(store: HdfsStore) -> None:
    """As a killed writer leaves them: still open, with bytes that the DataNodes have."""
    Chain.create(store)
    writer = store._client().create(
        f"{store._where.path}/{TEMPORARY}/half", store_module.namenode.options(9, None)
    )
    writer.write(b"123456789")
    writer.hsync()
    assert listed(store) == ["everstep.json"]
    assert Chain(store.url).head() is None
    assert unfinished(store) == ["half"]
    store.sweep()
    assert unfinished(store) == []
    assert store.sweep() == 0


def test_who_opens_a_run_sweeps(store: HdfsStore) -> None:
    Chain.create(store)
    half_written(store)
    model = torch.nn.Linear(2, 2)
    with everstep.open(store.url, model=model, every=None):
        assert unfinished(store) == []


def test_a_writer_whose_file_is_swept_writes_it_anew(
    store: HdfsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = store_module._pieces
    swept = []

    def sweeping(views: list[memoryview]) -> Iterator[bytes]:
        for piece in pieces(views):
            yield piece
            if not swept:
                store.sweep()
                swept.append(True)

    monkeypatch.setattr(store_module, "_pieces", sweeping)
    assert store.put("key", [pattern(10_000)]) is True
    assert swept
    assert bytes(store.get("key")) == pattern(10_000)


# -- answers that are lost ---------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [True, False])
def test_the_lost_answer_of_a_commit_is_settled(
    store: HdfsStore, done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the NameNode had carried it out or not."""
    client = store._client()
    lost = []

    def rename(path: str, final: str, overwrite: bool) -> None:
        if lost:
            return client.__class__.rename(client, path, final, overwrite)
        lost.append(path)
        if done:
            client.__class__.rename(client, path, final, overwrite)
        raise OSError("connection reset by peer")

    monkeypatch.setattr(client, "rename", rename)
    assert store.put("heads/main/1", [b"mine"]) is True
    assert lost
    assert store.put("heads/main/1", [b"mine"]) is False
    assert bytes(store.get("heads/main/1")) == b"mine"
    assert unfinished(store) == []


def test_who_loses_a_race_whose_answer_was_lost_is_told(
    store: HdfsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, other = store._client(), HdfsStore(store.url)

    def rename(path: str, final: str, overwrite: bool) -> None:
        assert other.put("heads/main/1", [b"theirs"])
        raise OSError("connection reset by peer")

    monkeypatch.setattr(client, "rename", rename)
    assert store.put("heads/main/1", [b"mine"]) is False
    assert bytes(store.get("heads/main/1")) == b"theirs"


def test_of_two_with_the_same_bytes_one_was_first(store: HdfsStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no answer was lost, nothing is taken for lost."""
    client, other = store._client(), HdfsStore(store.url)

    def rename(path: str, final: str, overwrite: bool) -> None:
        assert other.put(f"packs/{DIGEST}", [b"the same"])
        client.__class__.rename(client, path, final, overwrite)

    monkeypatch.setattr(client, "rename", rename)
    assert store.put(f"packs/{DIGEST}", [b"the same"]) is False
    assert unfinished(store) == []


def test_a_namenode_that_hangs_is_given_up(store: HdfsStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("key", [b"x"])
    hasty = HdfsStore(store.url, patience=Patience(deadline_s=0.3, first_wait_s=0.1, request_s=0.2))
    forever = threading.Event()
    monkeypatch.setattr(hasty._client(), "read", lambda path: forever.wait())
    with pytest.raises(Unavailable, match="no answer in time, tried for"):
        hasty.get("key")
    forever.set()


def test_a_listing_goes_on_where_it_broke_off(store: HdfsStore, monkeypatch: pytest.MonkeyPatch) -> None:
    in_threads(8, lambda number: [store.put(f"a/{number}{turn}", [b"x"]) for turn in range(3)])
    client = store._client()
    begun = []

    def list_status(path: str, recursive: bool) -> Iterator[object]:
        begun.append(path)
        for count, one in enumerate(client.__class__.list_status(client, path, recursive)):
            if len(begun) == 1 and count == 20:
                raise OSError("connection reset by peer")
            yield one

    monkeypatch.setattr(client, "list_status", list_status)
    monkeypatch.setattr(store_module, "PAGE", 7)
    assert listed(store, "a/") == sorted(f"a/{number}{turn}" for number in range(8) for turn in range(3))
    assert len(begun) == 2


def test_finding_the_head_lists_one_directory(store: HdfsStore, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain.create(store, GRID_BYTES)
    writer = Writer(chain, Lease.take(chain.store))
    state = content(0)
    for step in range(1, 4):
        state = state.changed(random.Random(step), "count")
        writer.write(state.captured(), Facts(step=step))
    client, listings = store._client(), []

    def list_status(path: str, recursive: bool) -> Iterator[object]:
        listings.append(path)
        return client.__class__.list_status(client, path, recursive)  # type: ignore[no-any-return]

    monkeypatch.setattr(client, "list_status", list_status)
    head = chain.head()
    assert head is not None
    assert head.step == 3
    assert [path.removeprefix(store._where.path) for path in listings] == ["/heads/main"]
    assert restored(chain, head)[0] == state


# -- processes ---------------------------------------------------------------------------------------------


def test_a_forked_child_is_told_instead_of_left_waiting(store: HdfsStore) -> None:
    store.put("key", [b"x"])
    child = os.fork()
    if child == 0:
        try:
            store.get("key")
        except Unsupported as error:
            os._exit(0 if "spawn" in error.next else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bytes(store.get("key")) == b"x"


@pytest.mark.slow
def test_of_eight_processes_exactly_one_commits_each_time(directory: Directory) -> None:
    race(directory())


@pytest.mark.slow
def test_a_killed_run_on_hdfs_goes_on(directory: Directory, tmp_path: Path) -> None:
    kill_and_go_on(directory(), "process", tmp_path)


# -- a DataNode dies ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_that_loses_a_datanode_in_the_middle_of_a_write(
    hdfs: HDFS, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three copies are meant, and three nodes there are: no other can take its place."""
    url = directory()
    pieces = store_module._pieces
    about_to_die, dead = threading.Event(), threading.Event()

    def losing(views: list[memoryview]) -> Iterator[bytes]:
        for piece in pieces(views):
            yield piece
            if about_to_die.is_set() and not dead.is_set() and len(piece) == store_module.PIECE_BYTES:
                hdfs.kill_node(1)
                dead.set()

    monkeypatch.setattr(store_module, "PIECE_BYTES", 64 * 1024)
    monkeypatch.setattr(store_module, "_pieces", losing)
    torch.manual_seed(0)
    model = torch.nn.Linear(1024, 1024)
    optimizer = torch.optim.AdamW(model.parameters())
    store = HdfsStore(url, patience=replace(HASTY, request_s=8))  # A sync that hangs is given up after 2 s.
    run = everstep.open(store, model=model, optimizer=optimizer, every=None, keep="all")
    taken = {}
    try:
        for step in range(1, 13):
            optimizer.zero_grad()
            model(torch.randn(8, 1024)).square().sum().backward()
            optimizer.step()
            run.tick()
            if step % 3 == 0:
                if step == 6:
                    run.wait()
                    about_to_die.set()
                run.take()
                taken[step] = {name: value.clone() for name, value in model.state_dict().items()}
        run.wait()
        run.close()
        assert dead.is_set()
        chain = Chain(url)
        assert sorted(snapshot.step for snapshot in chain.snapshots()) == [3, 6, 9, 12]
        assert verify(chain).findings == []
        for snapshot in chain.snapshots():
            loaded = everstep.Chain(url).load(snapshot.id)
            for name, value in taken[snapshot.step].items():
                assert torch.equal(torch.as_tensor(loaded[f"model/{name}"]), value)
    finally:
        if dead.is_set():
            hdfs.revive_node(1)
