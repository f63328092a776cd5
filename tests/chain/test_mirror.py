"""A replica is a whole chain at every moment, and comes to hold what its source holds."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making import GRID_BYTES, Content, assert_restores, content, started, written

from everstep.chain import lease as leases
from everstep.chain import prune, versions
from everstep.chain.doomed import announce
from everstep.chain.history import Chain
from everstep.chain.lease import Lease
from everstep.chain.mirror import Mirror, hold
from everstep.chain.retention import Keep
from everstep.chain.sending import check, fetched
from everstep.chain.steplog import StepLog
from everstep.chain.verify import verify
from everstep.chain.writer import Facts, Writer
from everstep.errors import Conflict, Damaged, EverstepError, Fenced, Mismatch, NotFound, Unavailable
from everstep.format import keys, record
from everstep.format.record import HeadRecord, StepRecord
from everstep.store.base import Store
from everstep.store.memory import MemoryStore
from everstep.testing.faults import READS, WRITES, Died, FaultyStore
from examples import examples

LAST = Keep.parse("last 2")


def listed(store: Store, *prefixes: str) -> list[str]:
    return [entry.key for prefix in prefixes for entry in store.list(prefix)]


def assert_whole(store: Store) -> Chain:
    """All that it lists can be restored."""
    chain = Chain(store)
    report = verify(chain)
    assert report.findings == []
    assert report.whole == report.snapshots
    return chain


def mirror(writer: Writer, target: Store) -> Mirror:
    return Mirror(writer.chain, target, writer.branch, writer.lease.number)


def source(count: int = 3) -> tuple[Writer, list[Content]]:
    writer = started(MemoryStore("source"))
    rng = random.Random(3)
    contents = [content(1)]
    while len(contents) < count:
        contents.append(contents[-1].changed(rng, rng.choice(["dense", "moment", "mean"])))
    written(writer, contents)
    return writer, contents


# -- what comes over ---------------------------------------------------------------------------------------


def test_a_replica_is_the_same_chain_and_restores_alone() -> None:
    writer, contents = source()
    target = MemoryStore("target")
    standing = mirror(writer, target).bring_up()
    assert (standing.number, standing.step, standing.behind, standing.remarks) == (3, 3, 0, ())
    chain = assert_whole(target)
    assert chain.about == writer.chain.about
    assert listed(target, "heads", "packs", "manifests", "snapshots") == listed(
        writer.chain.store, "heads", "packs", "manifests", "snapshots"
    )
    for snapshot, wanted in zip(reversed(list(chain.snapshots())), contents, strict=True):
        assert_restores(chain, snapshot, wanted)


def test_a_second_pass_sends_only_what_is_new() -> None:
    writer, contents = source()
    target = FaultyStore(MemoryStore("target"))
    one = mirror(writer, target)
    one.bring_up()
    before, sent = target.count, one.sending.sent.size_bytes
    one.bring_up()
    assert target.count == before
    written(writer, [contents[-1].changed(random.Random(1), "count")], 4)
    one.bring_up()
    assert one.sending.sent.size_bytes - sent < 20_000, "the rest of the state was there"
    # So it is for one that knows nothing yet.
    again = mirror(writer, target)
    before = target.count
    again.bring_up()
    assert target.count == before


def test_tags_branches_rollbacks_and_the_step_log_follow() -> None:
    writer, _ = source()
    target = MemoryStore("target")
    one = mirror(writer, target)
    one.bring_up()
    chain = writer.chain
    versions.tag(chain, "good", "step:2")
    versions.branch(chain, "try", "step:1")
    versions.move_back(chain, writer.lease, "main", chain.find("step:2"), "step:2")
    log = StepLog(chain, "main", writer.lease.number)
    log.append(StepRecord(step=3, epoch=0))
    log.seal(log.cut())
    one.bring_up()
    there = assert_whole(target)
    assert there.tags() == chain.tags()
    assert there.branches() == ["main", "try"]
    assert there.find("head").step == 2
    assert versions.rolled_back(there, "main") is not None
    assert listed(target, "steplog") == listed(chain.store, "steplog") != []
    versions.untag(chain, "good")
    versions.drop_branch(chain, "try", force=True)
    one.bring_up()
    assert there.tags() == {}
    assert there.branches() == ["main"]
    versions.branch(chain, "try", "step:3")
    one.bring_up()
    assert there.find("try").step == 3


def test_what_was_pruned_before_it_was_sent_is_skipped() -> None:
    writer, _ = source(5)
    plan = prune.plan(writer.chain, LAST, branches=["main"], mine=writer.lease)
    assert plan is not None
    prune.execute(writer.chain, plan)
    target = MemoryStore("target")
    mirror(writer, target).bring_up()
    assert [one.step for one in assert_whole(target).snapshots()] == [5, 4]


def test_what_is_pruned_while_it_is_sent_is_skipped() -> None:
    writer, contents = source(4)
    target = MemoryStore("target")

    class Pruning(FaultyStore):
        done = False

        def put(self, key: str, parts: list[bytes]) -> bool:  # type: ignore[override]
            if key.startswith(keys.MANIFESTS) and not self.done:
                self.done = True
                plan = prune.plan(writer.chain, LAST, branches=["main"], mine=writer.lease)
                assert plan is not None
                writer.forget_packs(set(plan.packs))
                prune.execute(writer.chain, plan)
            return super().put(key, parts)

    standing = mirror(writer, Pruning(target)).bring_up()
    assert standing.behind == 0
    chain = assert_whole(target)
    assert next(chain.snapshots()).step == 4
    assert_restores(chain, next(chain.snapshots()), contents[-1])


def test_a_replica_keeps_what_the_policy_keeps_and_what_its_source_lists() -> None:
    writer, _ = source(5)
    target = MemoryStore("target")
    one = mirror(writer, target)
    one.bring_up()
    versions.tag(writer.chain, "good", "step:1")
    one.bring_up()
    # Its source still lists all of them.
    one.prune(LAST)
    assert [head.step for head in Chain(target).heads()] == [5, 4, 3, 2, 1]
    for head in list(writer.chain.heads())[2:]:
        writer.chain.store.delete(head.key)
    one.prune(LAST)
    assert [head.step for head in Chain(target).heads()] == [5, 4, 1]
    assert_whole(target)


def test_damage_is_not_sent_on_and_what_follows_is() -> None:
    writer, contents = source(3)
    store = writer.chain.store
    second = writer.chain.manifest(writer.chain.find("step:2"))
    first = writer.chain.manifest(writer.chain.find("step:1"))
    third = writer.chain.manifest(writer.chain.find("step:3"))
    (name,) = second.packs.keys() - first.packs.keys() - third.packs.keys()
    key = keys.pack(name)
    data = bytearray(store.get(key))
    data[100] ^= 1
    store.delete(key)
    store.put(key, [data])
    target = MemoryStore("target")
    standing = mirror(writer, target).bring_up()
    assert standing.behind == 0
    assert len(standing.remarks) == 1
    assert "heads/main/fffffffffffffffd was not sent: chunk" in standing.remarks[0]
    chain = assert_whole(target)
    assert [one.step for one in chain.snapshots()] == [3, 1]
    assert_restores(chain, chain.find("head"), contents[2])


def test_a_replica_that_somebody_took_away_is_made_anew() -> None:
    writer, contents = source()
    target = MemoryStore("target")
    one = mirror(writer, target)
    one.bring_up()
    for key in listed(target, ""):
        target.delete(key)
    written(writer, [contents[-1].changed(random.Random(1), "count")], 4)
    assert one.bring_up().behind == 0
    assert [one.step for one in assert_whole(target).snapshots()] == [4, 3, 2, 1]


def test_what_the_replica_has_under_the_same_name_is_not_taken_for_the_same() -> None:
    writer, _ = source(1)
    target = MemoryStore("target")
    Chain.create_as(target, bytes(writer.chain.store.get(keys.CHAIN)))
    key = listed(writer.chain.store, "packs")[0]
    target.put(key, [b"cut short"])
    with pytest.raises(Damaged, match="of memory://target has 9 bytes"):
        mirror(writer, target).bring_up()
    assert listed(target, "heads") == []


# -- what stops it -----------------------------------------------------------------------------------------


def test_another_chain_is_no_replica() -> None:
    writer, _ = source()
    other = started(MemoryStore("other"))
    with pytest.raises(Mismatch, match="is another chain than"):
        mirror(writer, other.chain.store).bring_up()
    foreign = MemoryStore("foreign")
    foreign.put("something", [b""])
    with pytest.raises(Mismatch, match="not empty"):
        mirror(writer, foreign).bring_up()


def test_a_source_that_is_gone_takes_nothing_along() -> None:
    writer, _ = source()
    target = MemoryStore("target")
    one = mirror(writer, target)
    one.bring_up()
    before = listed(target, "")
    for key in listed(writer.chain.store, ""):
        writer.chain.store.delete(key)
    with pytest.raises(Unavailable, match="is gone"):
        one.bring_up()
    Chain.create(writer.chain.store, GRID_BYTES)
    with pytest.raises(Unavailable, match="another chain by now"):
        one.bring_up()
    assert listed(target, "") == before


def test_who_took_the_run_over_through_the_replica_fences_its_source() -> None:
    writer, contents = source()
    target = MemoryStore("target")
    one = mirror(writer, target)
    one.bring_up()
    taken = Lease(target, writer.lease.number + 1)
    other = leases._owner(0, taken.number, "main")
    target.put(other.key, [b"whatever"])
    written(writer, [contents[0]], 4)
    before = listed(target, "")
    with pytest.raises(Fenced, match=r"writer 2 has taken branch 'main' over"):
        one.bring_up()
    with pytest.raises(Fenced):
        mirror(writer, target).bring_up()
    assert listed(target, "") == before


def test_one_that_holds_the_same_number_elsewhere_is_not_this_one() -> None:
    writer, _ = source()
    target = MemoryStore("target")
    Chain.create_as(target, bytes(writer.chain.store.get(keys.CHAIN)))
    other = leases._owner(0, writer.lease.number, "main")
    target.put(other.key, [b"whatever"])
    with pytest.raises(Fenced):
        mirror(writer, target).bring_up()
    assert listed(target, "heads") == []


def test_a_living_writer_of_this_machine_is_not_replaced() -> None:
    writer, _ = source()
    target = MemoryStore("target")
    Chain.create_as(target, bytes(writer.chain.store.get(keys.CHAIN)))
    Lease.take(target)
    second = leases._owner(0, 2, "main")
    writer.chain.store.put(second.key, [record.seal(second)])
    with pytest.raises(Conflict, match="being written by process"):
        hold(writer.chain.store, target, "main", 2)
    assert leases.newest(target) == 1


def test_two_that_went_on_differently_are_left_as_they_are() -> None:
    writer, _ = source(2)
    target = MemoryStore("target")
    mirror(writer, target).bring_up()
    # Somebody writes there by the same number, and somebody here.
    there = Writer(Chain(target), Lease(target, writer.lease.number))
    there.write(content(50).captured(), Facts(step=50))
    written(writer, [content(60)], 60)
    before = listed(target, "")
    standing = mirror(writer, target).bring_up()
    assert any("that source lacks" in remark or "lacks: somebody" in remark for remark in standing.remarks)
    assert listed(target, "") == before
    # Also where it is only ahead.
    ahead = MemoryStore("ahead")
    short, _ = source(2)
    mirror(short, ahead).bring_up()
    Writer(Chain(ahead), Lease(ahead, 1)).write(content(9).captured(), Facts(step=9))
    assert mirror(short, ahead).bring_up().remarks


def test_what_somebody_prunes_in_the_replica_is_not_listed() -> None:
    writer, _ = source(2)
    target = MemoryStore("target")
    one = mirror(writer, target)
    one.bring_up()
    new = versions.tag(writer.chain, "late", "step:1")
    announced = announce(target, [new.id], [], [])
    with pytest.raises(Unavailable, match="being pruned"):
        one.bring_up()
    assert Chain(target).tags() == {}
    announced.finish()
    announced.leave()
    one.bring_up()
    assert Chain(target).tags() == {"late": new.id}


# -- crashes and outages -----------------------------------------------------------------------------------


def story(writer: Writer, contents: list[Content], follow: Callable[[], None]) -> None:
    """What a run does, with its replica following."""
    chain = writer.chain
    follow()
    written(writer, contents[2:3], 3)
    versions.tag(chain, "kept", "step:2")
    follow()
    versions.branch(chain, "try", "step:3")
    written(writer, contents[3:5], 4)
    plan = prune.plan(chain, LAST, branches=["main"], mine=writer.lease)
    assert plan is not None
    writer.forget_packs(set(plan.packs))
    prune.execute(chain, plan)
    follow()
    versions.drop_branch(chain, "try", force=True)
    versions.move_back(chain, writer.lease, "main", chain.find("step:4"), "step:4")
    follow()


STORY = [content(1)]
for _name in ("dense", "moment", "mean", "count"):
    STORY.append(STORY[-1].changed(random.Random(_name), _name))


def writes_of_the_story() -> int:
    writer = started(MemoryStore("source"))
    written(writer, STORY[:2])
    target = FaultyStore(MemoryStore("target"))
    one = mirror(writer, target)
    story(writer, STORY, partial(follow, one))
    return target.count


def follow(one: Mirror) -> None:
    one.bring_up()
    one.prune(LAST)


@pytest.mark.slow
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_follower_that_dies_at_any_write_leaves_a_whole_chain(done: bool) -> None:
    deaths: list[int] = []

    def dies(one: Mirror, inner: Store, at: int) -> None:
        try:
            follow(one)
        except Died:
            deaths.append(at)
            if list(inner.list(keys.CHAIN)):
                assert_whole(inner)

    for at in range(writes_of_the_story()):
        writer = started(MemoryStore("source"))
        written(writer, STORY[:2])
        inner = MemoryStore("target")
        story(writer, STORY, partial(dies, mirror(writer, FaultyStore(inner, at, done=done)), inner, at))
        assert at in deaths
        follow(mirror(writer, inner))
        assert_converged(writer.chain, inner)


@pytest.mark.slow
@pytest.mark.parametrize("verbs", [READS, WRITES], ids=["reads", "writes"])
def test_a_replica_that_fails_once_at_any_request_goes_on(verbs: frozenset[str]) -> None:
    def tries(one: Mirror, inner: Store) -> None:
        try:
            follow(one)
        except Unavailable:
            one.forget()
            if list(inner.list(keys.CHAIN)):
                assert_whole(inner)
            follow(one)

    at, over = 0, False
    while not over:
        writer = started(MemoryStore("source"))
        written(writer, STORY[:2])
        inner = MemoryStore("target")
        faulty = FaultyStore(inner, at, lambda: Unavailable("away"), verbs=verbs, done=at % 2 == 1)
        one = mirror(writer, faulty)
        story(writer, STORY, partial(tries, one, inner))
        assert_converged(writer.chain, inner)
        over = faulty.count <= at
        at += 3  # Each third, for the time it takes.


def assert_converged(chain: Chain, target: Store) -> None:
    there = assert_whole(target)
    assert listed(target, keys.HEADS, keys.TAGS) == listed(chain.store, keys.HEADS, keys.TAGS)
    assert there.tags() == chain.tags()
    for branch in chain.branches():
        ours, theirs = list(chain.snapshots(branch)), list(there.snapshots(branch))
        assert ours == theirs


OPERATIONS = [
    "commit",
    "commit",
    "commit",
    "tidy",
    "tag",
    "untag",
    "branch",
    "drop",
    "rollback",
    "follow",
    "die",
]


class World:
    """A run with a replica, to which anything happens."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.writer = started(MemoryStore("source"))
        self.inner = MemoryStore("target")
        self.mirror = mirror(self.writer, self.inner)
        self.content = content(1)
        self.step = 0
        self.commit()

    def commit(self) -> None:
        names = ("dense", "moment", "mean", "count", "small")
        self.content = self.content.changed(self.rng, self.rng.choice(names))
        self.step += 1
        self.writer.write(self.content.captured(), Facts(step=self.step))

    def tidy(self) -> None:
        plan = prune.plan(self.writer.chain, LAST, branches=["main"], mine=self.writer.lease)
        if plan is not None:
            self.writer.forget_packs(set(plan.packs))
            self.writer.has_pruned(prune.execute(self.writer.chain, plan).records)

    def _any(self) -> str:
        return self.rng.choice(list(self.writer.chain.snapshots())).id

    def tag(self) -> None:
        versions.tag(self.writer.chain, self.rng.choice("ab"), self._any(), force=True)

    def untag(self) -> None:
        with suppress(NotFound):
            versions.untag(self.writer.chain, self.rng.choice("ab"))

    def branch(self) -> None:
        with suppress(Mismatch):
            versions.branch(self.writer.chain, self.rng.choice(["x", "y"]), self._any())

    def drop(self) -> None:
        with suppress(NotFound):
            versions.drop_branch(self.writer.chain, self.rng.choice(["x", "y"]), force=True)

    def rollback(self) -> None:
        chosen = self.writer.chain.snapshot(self._any())
        versions.move_back(self.writer.chain, self.writer.lease, "main", chosen, "")
        self.writer.parent = chosen.id

    def follow(self) -> None:
        follow(self.mirror)

    def die(self) -> None:
        """The follower dies, or its replica is away, in the middle; another goes on."""
        fault = self.rng.choice([Died, lambda: Unavailable("away")])
        verbs = self.rng.choice([WRITES, READS, READS | WRITES])
        at = self.rng.randrange(25)
        faulty = FaultyStore(self.inner, at, fault, done=self.rng.random() < 0.5, verbs=verbs)
        self.mirror = mirror(self.writer, faulty)
        try:
            self.follow()
        except (Died, EverstepError):
            if list(self.inner.list(keys.CHAIN)):
                assert_whole(self.inner)
        self.mirror = mirror(self.writer, self.inner)


@settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 32), what=st.lists(st.sampled_from(OPERATIONS), max_size=25))
def test_whatever_happens_a_replica_is_whole_and_converges(seed: int, what: list[str]) -> None:
    world = World(random.Random(seed))
    for one in what:
        getattr(world, one)()
        if one in ("follow", "die") and list(world.inner.list(keys.CHAIN)):
            assert_whole(world.inner)
    world.tidy()
    for _ in range(2):
        world.follow()
    chain, there = world.writer.chain, assert_whole(world.inner)
    # It may keep one more that a branch begins with, which its source had pruned when the branch was made.
    kept = {
        row.id for row in prune.consider(there, LAST).rows if any("start of" in why for why in row.reasons)
    }
    more = set(listed(world.inner, keys.HEADS)) - set(listed(chain.store, keys.HEADS))
    assert {record.unseal(world.inner.get(key), HeadRecord, key).snapshot for key in more} <= kept
    assert set(listed(chain.store, keys.HEADS)) <= set(listed(world.inner, keys.HEADS))
    assert listed(world.inner, keys.TAGS) == listed(chain.store, keys.TAGS)
    assert there.branches() == chain.branches()
    for branch in chain.branches():
        assert there.head(branch) == chain.head(branch)


def test_fetched_objects_are_held_against_what_they_must_be() -> None:
    writer, _ = source(1)
    store = writer.chain.store
    for key in listed(store, "packs", "manifests", "snapshots", "heads", "leases", keys.CHAIN):
        data = bytearray(fetched(store, key))
        for at in (0, len(data) // 2, len(data) - 1):
            broken = bytearray(data)
            broken[at] ^= 4
            with pytest.raises(Damaged):
                check(key, broken)
        with pytest.raises(Damaged):
            check(key, data[:-1])
