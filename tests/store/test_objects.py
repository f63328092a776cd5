"""What an object store does with each answer; what real servers answer is in `test_object_servers`."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_bucket import Bucket, Fate, GenericError, OwnTime, install, no_answer, status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everstep.chain.history import Chain
from everstep.chain.steplog import StepLog
from everstep.cli import machine
from everstep.errors import EverstepError, Mismatch, NotFound, Unavailable, Unsupported
from everstep.format.record import StepRecord
from everstep.keeper import places
from everstep.store import cloud, objects
from everstep.store.base import PROBES, Addressed, Probing, Store, refuses_to_overwrite
from everstep.store.cloud import Address
from everstep.store.memory import MemoryStore
from everstep.store.objects import PART_RETRIES, SINGLE_BYTES, ObjectStore
from everstep.store.patience import Clock, Patience, tries
from everstep.store.urls import open_store
from everstep.testing.store import StoreContract, pattern
from examples import examples

URL = "s3://bucket/runs/gpt"
DIGEST = "ab" * 32
QUICK = Patience(deadline_s=10, first_wait_s=0.1, longest_wait_s=1)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    return install(Bucket(), monkeypatch)


@pytest.fixture
def time() -> OwnTime:
    return OwnTime()


@pytest.fixture
def store(bucket: Bucket, time: OwnTime) -> ObjectStore:
    return ObjectStore(URL, patience=QUICK, clock=time.clock())


class TestObjectStoreOverAFake(StoreContract):
    """Its own logic keeps the contract, where the server does."""

    @pytest.fixture
    def store(self, monkeypatch: pytest.MonkeyPatch) -> Store:
        lock = threading.Lock()
        bucket = Bucket()
        meet = bucket._meet

        def one_at_a_time(verb, work):  # type: ignore[no-untyped-def]
            with lock:
                return meet(verb, work)

        monkeypatch.setattr(bucket, "_meet", one_at_a_time)
        install(bucket, monkeypatch)
        return ObjectStore("s3://bucket")


# -- addresses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("s3://bucket", Address("s3", "bucket", "")),
        ("s3://bucket/", Address("s3", "bucket", "")),
        ("s3://bucket/runs/gpt-2_x.1", Address("s3", "bucket", "runs/gpt-2_x.1")),
        ("gs://bucket/a//", Address("gs", "bucket", "a")),
        ("az://container/a/b", Address("az", "container", "a/b")),
    ],
)
def test_addresses(url: str, address: Address, bucket: Bucket) -> None:
    assert Address.parse(url) == address
    store = open_store(url)
    assert isinstance(store, ObjectStore)
    assert store.url == store.address == address.url
    assert bucket.verbs == [], "opening asks nothing"


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///a", "s3://b", "s3://bucket/a//b", "s3://bucket/../a", "s3://bucket/a b"]
)
def test_what_is_no_address(url: str, bucket: Bucket) -> None:
    with pytest.raises(Mismatch, match="is no address of a chain"):
        open_store(url)


def test_credentials_in_an_address_are_refused_and_not_repeated(bucket: Bucket) -> None:
    with pytest.raises(Mismatch) as caught:
        open_store("s3://AKIAKEY:verysecret@bucket/a")
    assert "AKIAKEY" not in str(caught.value)
    assert "verysecret" not in str(caught.value)


def test_a_scheme_that_nobody_knows() -> None:
    with pytest.raises(Unsupported, match=r"stores of the kind ftp://.*s3://, gs://, az://, hdfs:// are"):
        open_store("ftp://host/a")


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match="Next: pip install obstore"):
        open_store(URL)


def test_opening_imports_nothing_heavy() -> None:
    """The command line starts without obstore, and a store that is not used does not import it."""
    code = (
        "import sys, everstep.cli, everstep.store.urls as urls\n"
        "urls.open_store('runs/a')\n"
        "assert 'everstep.store.objects' not in sys.modules\n"
        "assert 'obstore' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_it_says_what_it_is(store: ObjectStore) -> None:
    assert isinstance(store, Probing)
    assert isinstance(store, Addressed)
    assert (store.address, dict(store.environment)) == (URL, {})
    insisted = ObjectStore(URL, unsafe_single_writer=True)
    assert insisted.environment == {"EVERSTEP_UNSAFE_SINGLE_WRITER": "1"}


@pytest.mark.parametrize(("value", "insisted"), [("1", True), ("0", False), ("", False), (None, False)])
def test_the_variable_insists(
    value: str | None, insisted: bool, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv("EVERSTEP_UNSAFE_SINGLE_WRITER", value)
    store = open_store(URL)
    assert isinstance(store, ObjectStore)
    assert store.unsafe_single_writer is insisted


# -- tries -------------------------------------------------------------------------------------------------


def test_pauses_double_up_to_the_longest_and_end_at_the_deadline(time: OwnTime) -> None:
    patience = Patience(deadline_s=5, first_wait_s=0.1, longest_wait_s=1)
    assert list(tries(patience, time.clock())) == list(range(1, len(time.pauses) + 2))
    assert time.pauses[:5] == [0.1, 0.2, 0.4, 0.8, 1]
    assert 4 < time.at <= 5


def test_pauses_are_jittered(time: OwnTime) -> None:
    patience = Patience(first_wait_s=1)
    assert [patience.pause(1, share) for share in (0, 0.5, 1)] == [0.5, 0.75, 1]
    assert Clock().share() != Clock().share()


@pytest.mark.parametrize(
    "error",
    [
        status(503, "SlowDown"), status(500, "InternalError"), status(502), status(504), status(429),
        status(400, "RequestTimeout"), no_answer(), no_answer("operation timed out"),
        no_answer("tcp connect error: Connection refused"), status(409, "OperationAborted"),
    ],
)  # fmt: skip
def test_what_passes_is_tried_again(
    store: ObjectStore, bucket: Bucket, time: OwnTime, error: Exception
) -> None:
    bucket.objects["key"] = b"data"
    for use in (lambda: store.get("key"), lambda: list(store.list()), lambda: store.delete("other")):
        bucket.fates = [Fate(error)] * 3
        use()
    assert store.put("new", [b"x"]) is True
    assert len(time.pauses) == 9


def test_a_store_that_stays_away_is_unavailable_after_the_deadline(
    store: ObjectStore, bucket: Bucket, time: OwnTime
) -> None:
    for use in (
        lambda: store.put("key", [b"x"]),
        lambda: store.get("key"),
        lambda: store.read_into("key", 0, [memoryview(bytearray(3))]),
        lambda: list(store.list()),
        lambda: store.delete("key"),
    ):
        time.at = 0.0
        bucket.fates = [Fate(no_answer("connection refused"))] * 1000
        with pytest.raises(Unavailable) as caught:
            use()
        assert 8 < time.at <= QUICK.deadline_s
        assert URL in str(caught.value)
        assert "the connection was refused" in str(caught.value)
        assert "what was committed before is intact" in str(caught.value)
        assert caught.value.next == f"everstep doctor {URL}"


SECRET = "<AWSAccessKeyId>AKIAKEY</AWSAccessKeyId><StringToSign>verysecret</StringToSign>"


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (status(403, "AccessDenied", SECRET), Unavailable, "403 AccessDenied"),
        (status(403, "SignatureDoesNotMatch", SECRET), Unavailable, "403 SignatureDoesNotMatch"),
        (status(400, "ExpiredToken", SECRET), Unavailable, "400 ExpiredToken"),
        (status(301, "PermanentRedirect"), Unavailable, "301 PermanentRedirect"),
        (status(404, "NoSuchBucket"), Mismatch, "there is no bucket 'bucket'"),
        (status(501, "NotImplemented"), Unsupported, "501 NotImplemented"),
        (no_answer("invalid peer certificate: UnknownIssuer"), Unavailable, "certificate"),
        (
            GenericError("error getting credentials from 169.254.169.254 AKIAKEY"),
            Unavailable,
            "no credentials",
        ),
    ],
)
def test_what_does_not_pass_is_said_at_once_and_without_secrets(
    store: ObjectStore, bucket: Bucket, time: OwnTime, error: Exception, kind: type[EverstepError], said: str
) -> None:
    for use in (lambda: store.put("key", [b"x"]), lambda: store.get("key"), lambda: list(store.list())):
        bucket.fates = [Fate(error)]
        with pytest.raises(kind, match=said) as caught:
            use()
        assert caught.value.next
        seen: BaseException | None = caught.value
        while seen is not None:
            assert "AKIAKEY" not in str(seen)
            assert "verysecret" not in str(seen)
            seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    assert time.pauses == []


def test_a_bug_is_not_taken_for_an_answer(store: ObjectStore, bucket: Bucket, time: OwnTime) -> None:
    bucket.fates = [Fate(TypeError("a bug"))]
    with pytest.raises(TypeError, match="a bug"):
        store.get("key")


# -- put ---------------------------------------------------------------------------------------------------


def test_a_commit_is_one_request(store: ObjectStore, bucket: Bucket) -> None:
    assert store.put("heads/main/1", [b"x", b"", b"y"]) is True
    assert bucket.verbs == ["put"]
    assert bucket.objects == {"heads/main/1": b"xy"}
    assert bucket.retries == [0], "obstore itself repeats nothing: whether an answer was lost must be known"


def test_a_lost_answer_is_settled_by_reading_back(store: ObjectStore, bucket: Bucket) -> None:
    bucket.fates = [Fate(no_answer(), done=True)]
    assert store.put("key", [b"nonce 1"]) is True
    assert bucket.verbs == ["put", "put", "head", "get"]
    assert bucket.objects == {"key": b"nonce 1"}


def test_a_lost_request_that_another_overtook_is_a_lost_race(store: ObjectStore, bucket: Bucket) -> None:
    bucket.objects["key"] = b"nonce 2"
    bucket.fates = [Fate(status(500))]
    assert store.put("key", [b"nonce 1"]) is False
    assert bucket.objects == {"key": b"nonce 2"}


def test_an_object_that_is_there_is_not_ours_because_it_is_alike(store: ObjectStore, bucket: Bucket) -> None:
    bucket.objects["key"] = b"same"
    assert store.put("key", [b"same"]) is False
    assert "get" not in bucket.verbs


def test_a_race_that_nobody_has_won_is_run_again(store: ObjectStore, bucket: Bucket) -> None:
    """S3 answers 409 to a create that met another in flight; obstore says the same for both."""
    bucket.fates = [Fate(status(412, "ConditionalRequestConflict"))]
    assert store.put("key", [b"x"]) is True
    assert bucket.verbs == ["put", "head", "put"]


LARGE = bytes(SINGLE_BYTES + 1)


def test_what_is_named_by_its_digest_goes_up_in_parts(store: ObjectStore, bucket: Bucket) -> None:
    assert store.put(f"packs/ab/{DIGEST}", [LARGE]) is True
    assert store.put(f"packs/ab/{DIGEST}", [LARGE]) is False
    assert bucket.verbs == ["head", "put parts", "head"]
    assert PART_RETRIES in bucket.retries


def test_other_large_objects_are_one_conditional_request(store: ObjectStore, bucket: Bucket) -> None:
    assert store.put("steplog/main/1", [LARGE]) is True
    assert bucket.verbs == ["put"]


@pytest.mark.parametrize("done", [False, True])
def test_a_lost_answer_to_an_upload_is_settled(store: ObjectStore, bucket: Bucket, done: bool) -> None:
    bucket.fates = [Fate(), Fate(status(500), done=done)]
    assert store.put(f"packs/ab/{DIGEST}", [LARGE]) is True
    assert bucket.verbs.count("put parts") == (1 if done else 2)
    assert bucket.objects[f"packs/ab/{DIGEST}"] == LARGE


def test_an_insisting_user_gets_no_conditions(bucket: Bucket) -> None:
    bucket.conditional = False
    store = ObjectStore(URL, unsafe_single_writer=True)
    assert store.put("key", [b"first"]) is True
    assert store.put("key", [b"second"]) is False
    assert bucket.objects == {"key": b"first"}
    store.probe()
    assert list(bucket.objects) == ["key"]


def test_the_memory_is_the_caller_s_again(store: ObjectStore, bucket: Bucket) -> None:
    """Also where obstore keeps a view of it a moment longer than the request lasts."""
    kept: list[pickle.PickleBuffer] = []

    def keeping(client: Bucket, key: str, file: Any, **how: Any) -> None:
        kept.append(pickle.PickleBuffer(next(iter(file))))
        threading.Timer(0.05, kept.clear).start()

    sys.modules["obstore"].put = keeping  # type: ignore[attr-defined]
    assert ObjectStore(URL).put("key", [bytearray(100)]) is True
    assert kept == []


@settings(
    max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    fates=st.lists(
        st.sampled_from(
            [Fate(), Fate(no_answer()), Fate(no_answer(), done=True), Fate(status(503, "SlowDown")),
             Fate(status(500), done=True), Fate(status(412, "ConditionalRequestConflict"))]
        ),
        max_size=12,
    ),
    turns=st.lists(st.sampled_from("ab"), min_size=2, max_size=6),
)  # fmt: skip
def test_whatever_is_lost_each_key_has_one_winner(
    bucket: Bucket, fates: list[Fate], turns: list[str]
) -> None:
    """Writers take turns at the same keys, each with bytes of its own; whatever happens to their requests,
    who was told True has the object, and nobody else was."""
    bucket.objects.clear()
    bucket.fates = list(fates)
    stores = {name: ObjectStore(URL, patience=QUICK, clock=OwnTime().clock()) for name in "ab"}
    told: dict[str, list[str]] = {}
    for turn, name in enumerate(turns):
        for number in range(turn + 1):
            key, mine = f"heads/{number}", f"{name}{turn}"
            try:
                if stores[name].put(key, [mine.encode()]):
                    told.setdefault(key, []).append(mine)
            except Unavailable:
                continue
    for key, winners in told.items():
        assert [bucket.objects[key].decode()] == winners


# -- get ---------------------------------------------------------------------------------------------------


def test_small_reads_are_one_request(store: ObjectStore, bucket: Bucket) -> None:
    bucket.objects["key"] = pattern(5000)
    bucket.verbs.clear()
    assert store.get("key") == pattern(5000)
    assert store.get("key", 10, 20) == pattern(5000)[10:30]
    buffer = bytearray(100)
    assert store.read_into("key", 4950, [memoryview(buffer)]) == 50
    assert bucket.verbs == ["get"] * 3


def test_large_reads_are_cut_and_put_together(
    store: ObjectStore, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "RANGE_BYTES", 1000)
    data = bucket.objects["key"] = pattern(9999)
    assert store.get("key") == data
    assert store.get("key", 5, 8000) == data[5:8005]
    buffer = bytearray(12_000)
    view = memoryview(buffer)
    assert store.read_into("key", 3, [view[:1], view[1:5000], view[5000:]]) == 9996
    assert buffer[:9996] == data[3:]
    assert not any(buffer[9996:])


def test_stores_say_in_two_ways_that_a_range_begins_at_the_end(store: ObjectStore, bucket: Bucket) -> None:
    bucket.objects["key"] = b"x"
    bucket.fates = [Fate(GenericError("InvalidRangeRequest { source: StartTooLarge { requested: 1 } }"))]
    assert store.get("key", 1) == b""
    assert store.get("key", 1, 5) == b""


def test_an_object_that_goes_away_while_it_is_read(
    store: ObjectStore, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "RANGE_BYTES", 1000)
    bucket.objects["key"] = pattern(9999)
    bucket.fates = [Fate(), Fate(status(404, "NoSuchKey"))]
    with pytest.raises(NotFound):
        store.get("key")


# -- list --------------------------------------------------------------------------------------------------


def test_the_head_is_one_request(store: ObjectStore, bucket: Bucket) -> None:
    bucket.objects = {f"heads/main/{number:016x}": b"x" for number in range(10_000, 13_000)}
    assert [entry.key for entry in store.list("heads/main/", limit=1)] == [f"heads/main/{10_000:016x}"]
    exact = f"heads/main/{12_345:016x}"
    assert [entry.key for entry in store.list(exact, limit=1)] == [exact]
    assert bucket.verbs == ["list", "list"]


def test_a_listing_goes_on_where_it_broke_off(store: ObjectStore, bucket: Bucket, time: OwnTime) -> None:
    bucket.objects = {f"a/{number:05}": b"x" for number in range(2500)}
    bucket.fates = [Fate(), Fate(no_answer()), Fate(status(503)), Fate()]
    assert len({entry.key for entry in store.list("a/")}) == 2500
    assert bucket.verbs == ["list"] * 5
    assert len(time.pauses) == 2


def test_a_listing_out_of_order_is_refused(store: ObjectStore, bucket: Bucket) -> None:
    """As S3's directory buckets give it: the newest of a branch would not be found."""
    bucket.objects = {"a/1": b"", "a/2": b""}
    bucket.backwards = True
    with pytest.raises(Unsupported, match="in the order of their names"):
        list(store.list("a/"))


# -- probes ------------------------------------------------------------------------------------------------


def test_creating_a_chain_probes_and_leaves_nothing(store: ObjectStore, bucket: Bucket) -> None:
    Chain.create(store)
    assert list(bucket.objects) == ["everstep.json"]
    bucket.verbs.clear()
    Chain.create(store)
    assert bucket.verbs == ["get"], "a chain that is there is not probed"


def test_a_store_that_overwrites_is_refused(store: ObjectStore, bucket: Bucket) -> None:
    bucket.conditional = False
    with pytest.raises(Unsupported, match=f"^{URL} overwrites objects although it was asked not to"):
        Chain.create(store)
    assert bucket.objects == {}
    Chain.create(ObjectStore(URL, unsafe_single_writer=True))
    assert list(bucket.objects) == ["everstep.json"]


def test_a_store_that_knows_no_conditions_is_refused(
    store: ObjectStore, bucket: Bucket, time: OwnTime
) -> None:
    bucket.fates = [Fate(), Fate(), Fate(status(501, "NotImplemented"))]
    with pytest.raises(Unsupported, match="on the condition that there is none") as caught:
        Chain.create(store)
    assert "501 NotImplemented" in str(caught.value)
    assert "unsafe_single_writer=True" in str(caught.value)
    assert bucket.objects == {}
    assert time.pauses == []


def test_a_store_that_looks_first_and_writes_then_is_refused(store: ObjectStore, bucket: Bucket) -> None:
    """One after the other it refuses as it should; of two at once both are told that they were first."""
    bucket.hasty = True
    assert refuses_to_overwrite(store)
    with pytest.raises(Unsupported, match=f"^{URL} lets two create one object at the same moment") as caught:
        Chain.create(store)
    assert "nothing was created" in str(caught.value)
    assert "unsafe_single_writer=True" in caught.value.next
    assert bucket.objects == {}
    Chain.create(ObjectStore(URL, unsafe_single_writer=True))
    assert list(bucket.objects) == ["everstep.json"]


_ONE_AFTER_THE_OTHER = [Fate()] * len(["put", "put", "head", "get", "delete"])
"""The first requests of a probe."""


def test_a_probe_takes_no_lost_answer_for_a_second_winner(store: ObjectStore, bucket: Bucket) -> None:
    """Who has created the object and is not told so wins, and the other does not."""
    lost = [Fate(status(500), done=True), Fate(status(409, "OperationAborted")), Fate(no_answer(), done=True)]
    bucket.fates = _ONE_AFTER_THE_OTHER + lost * 2
    store.probe()
    assert bucket.verbs[:5] == ["put", "put", "head", "get", "delete"]
    assert bucket.fates == []
    assert bucket.objects == {}


def test_a_probe_of_a_store_that_is_away_says_so(store: ObjectStore, bucket: Bucket) -> None:
    bucket.fates = _ONE_AFTER_THE_OTHER + [Fate(status(403, "AccessDenied"))] * 20
    with pytest.raises(Unavailable, match="403 AccessDenied"):
        store.probe()


def test_what_a_probe_left_behind_is_not_foreign(store: ObjectStore, bucket: Bucket) -> None:
    bucket.objects[f"{PROBES}0123"] = b"x"
    Chain.create(store)
    assert "everstep.json" in bucket.objects


def test_a_chain_is_not_put_among_other_things(store: ObjectStore, bucket: Bucket) -> None:
    bucket.objects["model.pt"] = b"x"
    with pytest.raises(Mismatch, match=r"not empty either \(it holds model.pt\)"):
        Chain.create(store)
    assert list(bucket.objects) == ["model.pt"]


# -- around it ---------------------------------------------------------------------------------------------


def test_doctor_looks_at_a_store(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(url: str) -> dict[str, machine.Line]:
        return {line.name: line for line in machine.examine(url)}

    monkeypatch.setattr(machine, "_torch", lambda: iter([]))
    good = lines(URL)
    assert (good["store"].value, good["exclusive put"].status) == (URL, machine.OK)
    assert "path" not in good
    assert bucket.objects == {}
    bucket.conditional = False
    monkeypatch.setenv("EVERSTEP_UNSAFE_SINGLE_WRITER", "1")
    bad = lines(URL)["exclusive put"]
    assert bad.status == machine.MISSING
    assert "overwrites objects" in bad.hint
    bucket.fates = [Fate(status(403, "AccessDenied"))]
    refused = lines(URL)["answers"]
    assert (refused.status, "403 AccessDenied" in refused.value) == (machine.MISSING, True)
    assert lines("ftp://host")["exclusive put"].status == machine.MISSING


def test_the_journal_of_a_chain_elsewhere_is_among_the_user_s_state(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed writer's records are found by the next on this machine, and by no other chain's."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    chain = Chain.create(store)
    dead = StepLog(chain, "main", 1)
    for step in range(1, 4):
        dead.append(StepRecord(step, 0, 0))
    (left,) = (tmp_path / "state" / "everstep" / chain.about.chain / "journal").iterdir()
    StepLog(Chain.create(MemoryStore()), "main", 2).adopt()
    assert left.exists()
    following = StepLog(chain, "main", 2)
    following.adopt()
    assert not left.exists()
    assert sorted(following.after(0)) == [1, 2, 3]


def test_without_a_home_records_wait_in_memory(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setenv("XDG_STATE_HOME", "")
    monkeypatch.setattr(Path, "home", no_home)
    log = StepLog(Chain.create(store), "main", 1)
    log.append(StepRecord(1, 0, 0))
    log.seal(log.cut())
    assert sorted(log.after(0)) == [1]


def test_another_process_opens_it_by_its_address(store: ObjectStore) -> None:
    chain = Chain.create(store)
    assert places.address(chain) == URL
    assert places.environment(chain) == {}
    insisted = Chain(ObjectStore(URL, unsafe_single_writer=True))
    assert places.environment(insisted) == {"EVERSTEP_UNSAFE_SINGLE_WRITER": "1"}
    assert places.places(insisted) == places.places(chain)


# -- processes ---------------------------------------------------------------------------------------------


def test_a_forked_child_is_told_instead_of_left_waiting(store: ObjectStore, bucket: Bucket) -> None:
    bucket.objects["key"] = b"x"
    assert store.get("key") == b"x"
    child = os.fork()
    if child == 0:
        try:
            store.get("key")
        except Unsupported as error:
            os._exit(0 if "spawn" in error.next else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store.get("key") == b"x"
