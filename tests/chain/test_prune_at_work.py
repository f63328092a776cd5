"""Prunes with others at work: writers, tags, and those that stop in the middle and go on much later."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import pytest
from bench import prune_kills
from making import Content, content, restored, started

from everstep.chain import lease, names, prune
from everstep.chain.doomed import Doomed, announce, refuse_doomed
from everstep.chain.history import Chain, Snapshot, now
from everstep.chain.lease import Lease
from everstep.chain.prune import Repack
from everstep.chain.retention import Keep
from everstep.chain.verify import verify
from everstep.chain.writer import Facts, Writer
from everstep.errors import Conflict, Damaged, Fenced, NotFound
from everstep.format import keys, record
from everstep.format.manifest import Manifest
from everstep.format.record import RelocationRecord, TagRecord
from everstep.store.base import Buffer, Entry, Store
from everstep.store.memory import MemoryStore
from everstep.store.objects import ObjectStore
from everstep.testing.faults import READS, WRITES, Died, FaultyStore
from servers.fixtures import Bucket
from servers.running import S3

DEADLINE_S = 120.0
LAST = Keep.parse("last 1")
REPACK = Repack(max_unused=0.0, worth_bytes=1)
ALL = READS | WRITES


@pytest.fixture(autouse=True)
def _all_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if hours lay between any two things that happen."""
    monkeypatch.setattr(prune, "GRACE_S", -10.0)


def pruned(chain: Chain, keep: Keep = LAST) -> None:
    """An outsider's prune, which gives up every pack of which anything is dead."""
    for _ in prune.prune(chain, keep, repack=REPACK):
        pass


class Through:
    """A store that asks before each operation."""

    def __init__(self, inner: Store, ask: Callable[[], None]) -> None:
        self.inner = inner
        self.ask = ask

    @property
    def url(self) -> str:
        return self.inner.url

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        self.ask()
        return self.inner.put(key, parts)

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        self.ask()
        return self.inner.get(key, start, size_bytes)

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        self.ask()
        return self.inner.read_into(key, start, buffers)

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[Entry]:
        self.ask()
        return self.inner.list(prefix, limit)

    def delete(self, key: str) -> None:
        self.ask()
        self.inner.delete(key)


def states() -> list[Content]:
    """States that come again, so that a writer shares chunks with snapshots that are not the newest."""
    rng = random.Random(3)
    first = content(1)
    second = first.changed(rng, "dense", "mean")
    return [first, second, second.changed(rng, "moment", "frozen")]


STATES = states()


@dataclass
class World:
    """A chain with two writers at work, each on a branch of its own."""

    store: MemoryStore
    main: Writer
    other: Writer
    taken: dict[str, Content]

    @classmethod
    def begin(cls) -> World:
        """Five snapshots on main, three on `other`, which began with the third of them."""
        store = MemoryStore()
        main = started(store)
        world = cls(store, main, main, {})
        shots = [world.take(main, step) for step in range(5)]
        other = Writer(main.chain, Lease.take(store, "other"), "other", shots[2].id)
        other.build_on(main.chain.manifest(shots[2]))
        world.other = other
        for step in range(3, 6):
            world.take(other, step)
        return world

    def take(self, writer: Writer, step: int) -> Snapshot:
        state = STATES[step % len(STATES)]
        snapshot = writer.write(state.captured(), Facts(step=step))
        self.taken[snapshot.id] = state
        return snapshot

    @property
    def chain(self) -> Chain:
        return Chain(self.store)

    def release(self) -> None:
        self.main.lease.release()
        self.other.lease.release()

    def assert_whole(self, but: frozenset[str] = frozenset()) -> None:
        """All that is listed and tagged comes back, bit for bit; nothing that is listed lacks a part."""
        chain = self.chain
        assert [one for one in verify(chain).findings if one.snapshots] == []
        for branch in chain.branches():
            for point in chain.points(branch):
                assert point.damage is None
                assert point.snapshot is not None
                assert restored(chain, point.snapshot) == (self.taken[point.snapshot.id], [])
        for id in chain.tags().values():
            assert restored(chain, chain.snapshot(id)) == (self.taken[id], [])

    def assert_clean(self) -> None:
        """What is unreachable is gone, when nobody is at work any more."""
        self.release()
        pruned(self.chain)
        self.assert_whole()
        chain = self.chain
        assert {branch: len(list(chain.snapshots(branch))) for branch in chain.branches()}.keys() == {
            "main",
            "other",
        }
        ids = {one.id for branch in chain.branches() for one in chain.snapshots(branch)} | set(
            chain.tags().values()
        )
        needed: set[str] = set()
        for id in ids:
            snapshot = chain.snapshot(id)
            needed |= {keys.snapshot(id), *map(keys.manifest, snapshot.record.manifests)}
            needed |= self._needed_of_packs(chain.manifest(snapshot))
        kinds = (keys.SNAPSHOTS, keys.MANIFESTS, keys.PACKS, keys.RELOCATIONS)
        assert {entry.key for entry in self.store.list() if entry.key.startswith(kinds)} == needed

    def _needed_of_packs(self, manifest: Manifest) -> set[str]:
        """The packs in which a reader finds its chunks, and the relocation records that say so: an oracle of
        its own."""
        there = {entry.key for entry in self.store.list(keys.PACKS)}
        newest_first = [
            (entry.key, record.unseal(self.store.get(entry.key), RelocationRecord, entry.key))
            for entry in self.store.list(keys.RELOCATIONS)
        ]
        found: set[str] = set()
        for place in manifest.places:
            spots = (
                {keys.pack(one.packs[spot.pack].name), key}
                for key, one in newest_first
                for spot in one.moved.get(place.pack, ())
                if spot.at == place.offset and keys.pack(one.packs[spot.pack].name) in there
            )
            found |= next(spots, {keys.pack(place.pack)})
        return found


def tag(chain: Chain, name: str, id: str) -> bool:
    """Tag a snapshot as whoever does: write it down, then look. False: it was taken back."""
    made = TagRecord(id, name, now(), name, number=1)
    assert chain.store.put(made.key, [record.seal(made)])
    try:
        refuse_doomed(chain, id)
        chain.manifest(chain.snapshot(id))
    except (Conflict, NotFound, Damaged):
        gone = TagRecord("", name, now(), name, number=2)
        assert chain.store.put(gone.key, [record.seal(gone)])
        return False
    return True


def operations_of_a_prune() -> int:
    world = World.begin()
    store = FaultyStore(world.store, verbs=ALL)
    pruned(Chain(store))
    return store.count


def prune_with(world: World, at: int, act: Callable[[], None], dies_at: int | None = None) -> None:
    """An outsider's prune, `act` right before its operation number `at`; it may be killed."""
    counted = 0

    def ask() -> None:
        nonlocal counted
        counted += 1
        if counted == at + 1:
            act()

    store = FaultyStore(Through(world.store, ask), dies_at, verbs=ALL)
    with suppress(Died):
        pruned(Chain(store))


@pytest.mark.slow
@pytest.mark.parametrize("dies", [False, True])
def test_others_commit_and_tag_between_any_two_operations_of_a_prune(dies: bool) -> None:
    rng = random.Random(5)
    made = 0
    count = operations_of_a_prune()
    for at in range(count):
        world = World.begin()
        victims = [one.id for one in world.chain.snapshots()][1:]
        kept: dict[str, str] = {}

        def act(world: World = world, victims: list[str] = victims, kept: dict[str, str] = kept) -> None:
            world.take(world.main, 6)
            world.take(world.other, 7)
            for number, id in enumerate(victims):
                if tag(world.chain, f"tag{number}", id):
                    kept[f"tag{number}"] = id

        prune_with(world, at, act, rng.randrange(at, count + 20) if dies else None)
        assert world.chain.tags() == kept
        made += len(kept)
        world.assert_whole()
        world.take(world.main, 8)
        world.take(world.other, 9)
        world.assert_whole()
        assert {point.snapshot.step for point in world.chain.points() if point.snapshot} >= {8}
        world.assert_clean()
    # Some were early enough, and some were not.
    assert 0 < made < 4 * count


@pytest.mark.slow
def test_killed_at_any_operation_with_writers_at_work_and_done_again() -> None:
    for at in range(operations_of_a_prune()):
        world = World.begin()
        prune_with(world, -1, lambda: None, dies_at=at)
        world.assert_whole()
        world.take(world.main, 6)
        world.assert_whole()
        pruned(world.chain)
        world.take(world.other, 7)
        world.assert_whole()
        world.assert_clean()


@pytest.mark.slow
def test_a_prune_between_any_two_operations_of_a_commit() -> None:
    count = 1
    at = 0
    while at < count:
        world = World.begin()
        counted = 0

        def ask(world: World = world, at: int = at) -> None:
            nonlocal counted
            counted += 1
            if counted == at + 1:
                pruned(world.chain)

        writer = through(world.main, Through(world.store, ask))
        world.main = writer
        world.take(writer, 6)
        world.take(writer, 7)
        count = counted
        world.assert_whole()
        assert [one.step for one in world.chain.snapshots()][:2] == [7, 6]
        world.assert_clean()
        at += 1
    assert count > 20


def through(writer: Writer, store: Store) -> Writer:
    """The same writer, with its memory of what it has written, on another way to its store."""
    made = Writer(
        Chain(store), Lease(store, writer.lease.number, writer.branch), writer.branch, writer.parent
    )
    made.encodings = writer.encodings
    made._recent = writer._recent
    made._doomed._number = writer._doomed._number
    return made


class Turns:
    """Several do their operations in an order that only the seed decides: each waits until all others wait,
    or have ended."""

    def __init__(self, names: Sequence[str], seed: int) -> None:
        self._rng = random.Random(seed)
        self._names = list(names)
        self._waiting: dict[str, int] = dict.fromkeys(names, 0)
        self._turn = ""
        self._changed = threading.Condition()

    def wait(self, name: str) -> None:
        with self._changed:
            self._waiting[name] += 1
            self._choose()
            assert self._changed.wait_for(lambda: self._turn == name, DEADLINE_S)
            self._turn = ""
            self._waiting[name] -= 1

    def end(self, name: str) -> None:
        with self._changed:
            self._names.remove(name)
            self._choose()

    def _choose(self) -> None:
        if not self._turn and self._names and all(self._waiting[name] for name in self._names):
            self._turn = self._rng.choice(self._names)
            self._changed.notify_all()


def in_any_order(world: World, seed: int) -> list[BaseException]:
    """Two commits on each branch and two prunes, their operations in an order that the seed decides."""
    names = ("main", "other", "prune", "second")
    turns = Turns(names, seed)
    failed: list[BaseException] = []
    stores = {name: Through(world.store, partial(turns.wait, name)) for name in names}

    def commit(name: str, writer: Writer, first_step: int) -> None:
        mine = through(writer, stores[name])
        for step in (first_step, first_step + 1):
            world.take(mine, step)
        setattr(world, name, mine)

    def delete(name: str) -> None:
        pruned(Chain(stores[name]))

    def work(name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except BaseException as error:
            failed.append(error)
        finally:
            turns.end(name)

    jobs = {
        "main": partial(commit, "main", world.main, 6),
        "other": partial(commit, "other", world.other, 7),
        "prune": partial(delete, "prune"),
        "second": partial(delete, "second"),
    }
    threads = [threading.Thread(target=work, args=(name, do)) for name, do in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    # From now on nobody waits for a turn.
    world.main, world.other = through(world.main, world.store), through(world.other, world.store)
    return failed


@pytest.mark.slow
def test_operations_of_writers_and_prunes_in_any_order() -> None:
    for seed in range(60):
        world = World.begin()
        assert in_any_order(world, seed) == [], seed
        world.assert_whole()
        assert next(world.chain.snapshots()).step == 7
        assert next(world.chain.snapshots("other")).step == 8
        world.assert_clean()


# -- stopped for hours -----------------------------------------------------------------------------------


class Stopped:
    """Work in a thread that stops before one operation of its store, as a process that got SIGSTOP."""

    def __init__(self, inner: Store, at: int) -> None:
        self.store = Through(inner, self._ask)
        self.error: BaseException | None = None
        self.count = 0
        self._at = at
        self._stopped, self._go = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def _ask(self) -> None:
        self.count += 1
        if self.count == self._at + 1:
            self._stopped.set()
            assert self._go.wait(DEADLINE_S)

    def begin(self, do: Callable[[], object]) -> bool:
        """False: it ended before it came to that operation."""

        def work() -> None:
            try:
                do()
            except BaseException as error:
                self.error = error
            finally:
                self._stopped.set()

        self._thread = threading.Thread(target=work)
        self._thread.start()
        assert self._stopped.wait(DEADLINE_S)
        return self.count > self._at

    def go_on(self) -> None:
        self._go.set()
        assert self._thread is not None
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()


def follow(world: World, first_step: int) -> None:
    """Another takes main over, goes on from its head, commits and prunes, again and again."""
    chain = world.chain
    mine = Lease.take(world.store)
    head = chain.head()
    writer = Writer(chain, mine, parent=head.id if head else "")
    if head:
        writer.build_on(chain.manifest(head))
    for step in range(first_step, first_step + 3):
        world.take(writer, step)
        plan = prune.plan(chain, LAST, branches=["main"], mine=mine)
        if plan is not None:
            writer.forget_packs(set(plan.packs))
            writer.has_pruned(prune.execute(chain, plan).records)
    world.main = writer


@pytest.mark.slow
@pytest.mark.parametrize("empty", [False, True])
def test_a_writer_that_was_stopped_anywhere_in_a_commit_is_fenced(
    empty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = 0
    while True:
        if empty:
            store = MemoryStore()
            world = World(store, started(store), started_on_other(store), {})
        else:
            world = World.begin()
        stopped = Stopped(world.store, at)
        if not stopped.begin(partial(commit_through, world, stopped.store)):
            stopped.go_on()
            assert stopped.error is None
            break
        with monkeypatch.context() as patch:
            patch.setattr(lease, "_lives", lambda holder: False)
            follow(world, 7)
        stopped.go_on()
        assert isinstance(stopped.error, Fenced | Conflict), (at, stopped.error)
        world.assert_whole()
        assert next(world.chain.snapshots()).step == 9
        if not empty:
            world.assert_clean()
        at += 1
    assert at > 8


def commit_through(world: World, store: Store) -> None:
    world.take(through(world.main, store), 6)


def started_on_other(store: MemoryStore) -> Writer:
    return Writer(Chain(store), Lease.take(store, "other"), "other")


@pytest.mark.slow
def test_a_prune_that_was_stopped_anywhere_goes_on_and_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    at = 0
    while True:
        world = World.begin()
        stopped = Stopped(world.store, at)
        mine = Lease(stopped.store, world.main.lease.number)

        def tidy(stopped: Stopped = stopped, mine: Lease = mine) -> None:
            chain = Chain(stopped.store)
            plan = prune.plan(chain, LAST, branches=["main"], mine=mine)
            if plan is not None:  # None where all has gone while it was stopped.
                prune.execute(chain, plan)

        if not stopped.begin(tidy):
            stopped.go_on()
            assert stopped.error is None
            break
        world.take(world.other, 6)
        with monkeypatch.context() as patch:
            patch.setattr(lease, "_lives", lambda holder: False)
            follow(world, 7)
        stopped.go_on()
        assert stopped.error is None or isinstance(stopped.error, Fenced), (at, stopped.error)
        world.assert_whole()
        world.take(world.main, 10)
        world.assert_whole()
        world.assert_clean()
        at += 1
    assert at > 20


@pytest.mark.slow
@pytest.mark.parametrize(("mine", "others"), [("last 1", "last 3"), ("last 3", "last 1")])
def test_one_that_repacks_was_stopped_anywhere_while_another_did(mine: str, others: str) -> None:
    """They do not agree about what stays, and writers go on between any two operations of the first."""
    at = 0
    while True:
        world = World.begin()
        stopped = Stopped(world.store, at)

        def repack(store: Store = stopped.store) -> None:
            pruned(Chain(store), Keep.parse(mine))

        if not stopped.begin(repack):
            stopped.go_on()
            assert stopped.error is None
            break
        world.take(world.other, 6)
        pruned(world.chain, Keep.parse(others))
        world.assert_whole()
        world.take(world.main, 7)
        stopped.go_on()
        assert stopped.error is None, (at, stopped.error)
        world.assert_whole()
        world.take(world.main, 8)
        world.take(world.other, 9)
        world.assert_whole()
        world.assert_clean()
        at += 1
    assert at > 50


def test_a_prune_that_was_stopped_for_a_day_stops() -> None:
    world = World.begin()
    clock = iter([0.0, 10.0, 2 * 24 * 3600.0])
    from everstep.chain import doomed

    announced = doomed.announce(world.store, ["ab" * 32], [], [])
    announced._clock = lambda: next(clock)
    announced._until = announced._clock() + doomed.STOP_S
    announced.check()
    with pytest.raises(Conflict, match="stopped for too long"):
        announced.check()


@pytest.mark.slow
def test_killed_at_random_operations_while_others_work_in_threads() -> None:
    outcome = prune_kills.campaign(lambda number: MemoryStore(), 40, 3, lambda line: None)
    assert outcome.violations == []


@pytest.mark.slow
@pytest.mark.process
def test_killed_at_random_operations_on_a_real_object_store(ceph: S3, bucket: Bucket) -> None:
    """`python -m bench.prune_kills` does the same a hundred times."""
    url = bucket(ceph)
    outcome = prune_kills.campaign(lambda number: ObjectStore(f"{url}/{number}"), 8, 5, lambda line: None)
    assert outcome.violations == []
    assert outcome.kills == 8
    assert outcome.operations > 100
    assert outcome.copied_bytes > 0


def test_two_prunes_that_end_at_once_leave_the_newest_number() -> None:
    """It tells whoever looks next that there was one."""
    store = MemoryStore()
    first = announce(store, ["ab" * 32], [], [])
    ended = False

    def ask() -> None:
        """The second one begins and ends when the first has put its last record, and deletes then."""
        nonlocal ended
        if not ended and names.newest(store, keys.PRUNES) == 2:
            ended = True
            announce(store, ["cd" * 32], [], []).finish()

    first._store = Through(store, ask)
    first.finish()
    assert ended
    assert names.newest(store, keys.PRUNES) == 4
    assert Doomed(store).look()
