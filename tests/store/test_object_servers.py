"""Object stores against servers that are real, or as good as."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from chain.making import GRID_BYTES, Content, content, restored
from everstep import cli
from everstep.chain.history import Chain
from everstep.chain.lease import Lease
from everstep.chain.verify import verify
from everstep.chain.writer import Facts, Writer
from everstep.errors import Mismatch, NotFound, Unavailable, Unsupported
from everstep.store.base import Store, refuses_to_overwrite
from everstep.store.objects import SINGLE_BYTES, ObjectStore
from everstep.store.patience import Patience
from everstep.store.urls import open_store
from everstep.testing.store import StoreContract, odd_parts, pattern
from servers.fault_proxy import AWAY, CUT, DROPPED, FAILED, FaultProxy, Moods
from servers.fixtures import Bucket
from servers.running import S3
from store.remote import kill_and_go_on, race

pytestmark = [pytest.mark.process]

DIGEST = "cd" * 32
SNAPSHOTS = 40
PARTS_BYTES = SINGLE_BYTES + 9_000_001
HASTY = Patience(deadline_s=30, first_wait_s=0.005, longest_wait_s=0.1, request_s=20)


class TestMoto(StoreContract):
    @pytest.fixture
    def store(self, moto: S3, bucket: Bucket) -> Store:
        return ObjectStore(f"{bucket(moto)}/runs/gpt", patience=HASTY)


class TestCeph(StoreContract):
    @pytest.fixture
    def store(self, ceph: S3, bucket: Bucket) -> Store:
        return ObjectStore(f"{bucket(ceph)}/runs/gpt", patience=HASTY)


class TestCephWithoutAPrefix(StoreContract):
    @pytest.fixture
    def store(self, ceph: S3, bucket: Bucket) -> Store:
        return ObjectStore(bucket(ceph), patience=HASTY)


class TestSwiftOfWhoInsists(StoreContract):
    """Swift's S3 interface, as a user has it who says that nobody else ever writes."""

    @pytest.fixture
    def store(self, refuser: S3, bucket: Bucket) -> Store:
        return ObjectStore(f"{bucket(refuser)}/runs/gpt", unsafe_single_writer=True, patience=HASTY)

    def test_of_several_putting_one_key_exactly_one_gets_it(self, store: Store) -> None:
        pytest.skip("that there are not several is what the user says")


class TestAzurite(StoreContract):
    """Azure's emulator."""

    @pytest.fixture
    def store(self, container: str) -> Store:
        return ObjectStore(f"{container}/runs/gpt", patience=HASTY)


def test_azure_keeps_a_chain(container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(container)
    data = pattern(PARTS_BYTES)
    key = f"packs/cd/{DIGEST}"
    assert store.put(key, odd_parts(data)) is True
    assert store.put(key, [b"other"]) is False
    assert bytes(store.get(key, 12_345_678, 20_000_000)) == data[12_345_678:32_345_678]
    chain = Chain.create(f"{container}/runs/gpt", GRID_BYTES)
    written = _write(chain, 3)
    assert [snapshot.id for snapshot in chain.snapshots()] == [id for id, _ in reversed(written)]
    assert verify(chain).findings == []
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc=")
    with pytest.raises(Unavailable, match=r"403.*check AZURE_STORAGE_ACCOUNT_NAME"):
        Chain(f"{container}/runs/gpt")


@pytest.mark.parametrize("server", ["moto", "ceph", "refuser"])
def test_large_objects_in_parts(server: str, bucket: Bucket, request: pytest.FixtureRequest) -> None:
    url = bucket(request.getfixturevalue(server))
    store = open_store(url, unsafe_single_writer=server == "refuser")
    data = pattern(PARTS_BYTES)
    key = f"packs/cd/{DIGEST}"
    assert store.put(key, odd_parts(data)) is True
    assert store.put(key, [b"other"]) is False
    assert bytes(store.get(key)) == data
    assert bytes(store.get(key, 12_345_678, 20_000_000)) == data[12_345_678:32_345_678]
    buffer = bytearray(len(data) + 5)
    assert store.read_into(key, 0, [memoryview(buffer)]) == len(data)
    assert buffer[: len(data)] == data
    assert [entry.size_bytes for entry in store.list("packs/")] == [len(data)]


@pytest.mark.parametrize("server", ["moto", "ceph"])
def test_what_a_server_refuses_is_a_sentence(
    server: str, bucket: Bucket, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket(request.getfixturevalue(server))
    for use in (Chain, Chain.create):
        with pytest.raises(Mismatch, match="there is no bucket 'nobody-has-this'"):
            use("s3://nobody-has-this/a")


def test_wrong_credentials(ceph: S3, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    url = bucket(ceph)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(Unavailable, match=r"403.*check AWS_ACCESS_KEY_ID") as caught:
        Chain.create(url)
    assert ceph.access_key not in str(caught.value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(Unavailable, match="403"):
        Chain(url)


def test_nobody_there(bucket: Bucket, moto: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    url = bucket(moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    store = ObjectStore(url, patience=Patience(deadline_s=0.3, first_wait_s=0.1))
    with pytest.raises(Unavailable, match=f"cannot read {url}/key: the connection was refused, tried for"):
        store.get("key")


# -- stores that cannot keep a chain -----------------------------------------------------------------------


def test_the_liar_is_refused(liar: S3, bucket: Bucket) -> None:
    url = bucket(liar)
    with pytest.raises(Unsupported, match=f"^{url} overwrites objects although it was asked not to"):
        Chain.create(url)
    assert list(open_store(url).list()) == []


def test_the_refuser_is_refused(refuser: S3, bucket: Bucket) -> None:
    url = bucket(refuser)
    with pytest.raises(Unsupported, match=f"^{url} cannot create an object on the condition") as caught:
        Chain.create(url)
    assert "501" in str(caught.value)
    assert list(open_store(url).list()) == []


def test_who_looks_first_is_refused(peeker: S3, bucket: Bucket) -> None:
    url = bucket(peeker)
    assert refuses_to_overwrite(open_store(url)), "one after the other it does"
    with pytest.raises(Unsupported, match=f"^{url} lets two create one object at the same moment") as caught:
        Chain.create(url)
    assert "unsafe_single_writer=True" in caught.value.next
    assert list(open_store(url).list()) == []


@pytest.mark.parametrize("server", ["refuser", "peeker"])
def test_swift_is_used_by_who_insists(server: str, bucket: Bucket, request: pytest.FixtureRequest) -> None:
    url = bucket(request.getfixturevalue(server))
    chain = Chain.create(open_store(url, unsafe_single_writer=True), GRID_BYTES)
    snapshot = Writer(chain, Lease.take(chain.store)).write(content(1).captured(), Facts(step=1))
    assert restored(Chain(url), snapshot)[0] == content(1)
    for verb in (["tag", "good"], ["branch", "try"]):
        if server == "refuser":
            assert cli.main(["-r", url, *verb]) == Unsupported.exit_code
        assert cli.main(["-r", url, *verb, "--unsafe-single-writer"]) == 0
    assert Chain(url).tags() == {"good": snapshot.id}


def test_a_run_on_the_refuser_is_killed_and_goes_on(
    refuser: S3, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keeper, a process of its own, insists as the run does."""
    monkeypatch.setenv("EVERSTEP_UNSAFE_SINGLE_WRITER", "1")
    kill_and_go_on(f"{bucket(refuser)}/runs/gpt", "process", tmp_path)


# -- chains ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["moto", "ceph"])
def test_a_chain_in_a_bucket(server: str, bucket: Bucket, request: pytest.FixtureRequest) -> None:
    url = f"{bucket(request.getfixturevalue(server))}/runs/gpt"
    with pytest.raises(NotFound, match=f"{url} is not an Everstep chain"):
        Chain(url)
    chain = Chain.create(url, GRID_BYTES)
    written = _write(chain, 5)
    again = Chain(url)
    assert [snapshot.id for snapshot in again.snapshots()] == [id for id, _ in reversed(written)]
    for id, state in written:
        assert restored(again, again.snapshot(id))[0] == state
    assert again.find("step:3").id == written[2][0]
    assert verify(again).findings == []


def _write(chain: Chain, count: int) -> list[tuple[str, Content]]:
    writer = Writer(chain, Lease.take(chain.store))
    rng = random.Random(1)
    state, written = content(0), []
    for step in range(1, count + 1):
        state = state.changed(rng, "dense", "count")
        written.append((writer.write(state.captured(), Facts(step=step)).id, state))
    return written


@pytest.mark.slow
def test_of_eight_processes_exactly_one_commits_each_time(ceph: S3, bucket: Bucket) -> None:
    race(bucket(ceph))


# -- a bad network -----------------------------------------------------------------------------------------


@pytest.fixture
def proxy(ceph: S3) -> Iterator[FaultProxy]:
    with FaultProxy(ceph.port, Moods(drop=0.01, fail=0.01, cut=0.01, delay=0.02), seed=7) as proxy:
        yield proxy


@pytest.mark.slow
def test_a_bad_network_loses_nothing(
    ceph: S3, proxy: FaultProxy, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 % of all requests fail, of 1 % the answer is lost, and in the middle nobody is there for a while."""
    url = f"{bucket(ceph)}/runs/gpt"
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    chain = Chain.create(ObjectStore(url, patience=HASTY), GRID_BYTES)
    writer = Writer(chain, Lease.take(chain.store))
    rng = random.Random(3)
    state, written = content(0), []
    for step in range(1, SNAPSHOTS + 1):
        if step == SNAPSHOTS // 2:
            proxy.go_away(connections=25)
        state = state.changed(rng, "dense", "moment")
        written.append((writer.write(state.captured(), Facts(step=step)).id, state))
    assert not proxy.is_away
    assert proxy.done[AWAY] == 25
    assert proxy.done[CUT] > 0
    assert proxy.done[DROPPED] + proxy.done[FAILED] > 0
    monkeypatch.setenv("AWS_ENDPOINT_URL", ceph.endpoint)
    straight = Chain(url)
    points = list(straight.points())
    assert [point.number for point in points] == list(range(SNAPSHOTS, 0, -1)), "a head was lost or forked"
    assert [point.snapshot.id for point in points if point.snapshot] == [id for id, _ in reversed(written)]
    assert verify(straight).findings == []
    for id, one in written[:: SNAPSHOTS // 8]:
        assert restored(straight, straight.snapshot(id))[0] == one


@pytest.mark.slow
def test_large_objects_over_a_bad_network(ceph: S3, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    url = bucket(ceph)
    data = pattern(PARTS_BYTES)
    with FaultProxy(ceph.port, Moods(drop=0.05, fail=0.1, cut=0.05), seed=11) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = ObjectStore(url, patience=HASTY)
        for number in range(4):
            key = f"packs/{number:02x}/{number:02x}{DIGEST[2:]}"
            assert store.put(key, odd_parts(data)) is True
            assert bytes(store.get(key)) == data
        assert sum(proxy.done[mood] for mood in (DROPPED, FAILED, CUT)) > 5


def test_finding_the_head_takes_three_requests(
    ceph: S3, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the chain is: the chain's record, one listing, the head and its snapshot."""
    url = bucket(ceph)
    chain = Chain.create(url, GRID_BYTES)
    _write(chain, 3)
    with FaultProxy(ceph.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        chain = Chain(url)
        proxy.log.clear()
        assert chain.head_number() == 3
        assert len(proxy.log) == 1
        head = chain.head()
        assert head is not None
        assert head.step == 3
        assert len(proxy.log) == 4, "a listing, the head record, the snapshot's"


# -- runs --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("keeper", ["process", "thread"])
def test_a_killed_run_in_a_bucket_goes_on(keeper: str, ceph: S3, bucket: Bucket, tmp_path: Path) -> None:
    kill_and_go_on(f"{bucket(ceph)}/runs/gpt", keeper, tmp_path)
