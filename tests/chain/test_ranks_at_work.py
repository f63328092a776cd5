"""Several ranks at work: any of them dies at any operation, and others prune between any two."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest
from ranked import State, World, assert_restores, state
from test_prune_at_work import ALL, DEADLINE_S, LAST, Through, Turns, pruned

from everstep.chain import lease, parts, prune
from everstep.chain.history import Chain
from everstep.chain.parts import Part, Take
from everstep.chain.retention import Keep
from everstep.chain.verify import verify
from everstep.chain.writer import Facts
from everstep.errors import Conflict, Unavailable
from everstep.format import keys
from everstep.store.base import Store
from everstep.store.memory import MemoryStore
from everstep.testing.faults import Died, FaultyStore

RANKS = 2
KINDS = (keys.SNAPSHOTS, keys.MANIFESTS, keys.PACKS, keys.RELOCATIONS, keys.PARTS)


@pytest.fixture(autouse=True)
def _all_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if hours lay between any two things that happen."""
    monkeypatch.setattr(prune, "GRACE_S", -10.0)


def states() -> list[State]:
    first = state(1, RANKS)
    return [first, first.changed(2, "sharded"), first.changed(3, "bias", "frozen"), first, first.changed(4)]


STATES = states()


def assert_whole(store: Store) -> list[int]:
    """Everything that is listed comes back, bit for bit. Returns its steps, newest first."""
    chain = Chain(store)
    assert [one for one in verify(chain).findings if one.snapshots] == []
    found = []
    for point in chain.points():
        assert point.snapshot is not None, point.damage
        assert_restores(chain, point.snapshot, STATES[point.snapshot.step % len(STATES)])
        found.append(point.snapshot.step)
    return found


def assert_clean(world: World) -> None:
    """When nobody is at work any more, only what is listed needs stays."""
    world.lease.release()
    store = world.chain.store
    pruned(Chain(store))
    assert_whole(store)
    chain = Chain(store)
    needed: set[str] = set()
    for one in chain.snapshots():
        needed |= {keys.snapshot(one.id), *map(keys.manifest, one.record.manifests)}
        needed |= {keys.pack(name) for part in chain.manifests(one) for name in part.packs}
    there = {entry.key for entry in store.list() if entry.key.startswith(KINDS)}
    assert {key for key in there if not key.startswith((keys.RELOCATIONS, keys.PACKS))} == {
        key for key in needed if not key.startswith(keys.PACKS)
    }


def one_take(world: World, step: int) -> bool:
    """Whether a snapshot was committed; if not, all ranks look again, as they are told to."""
    try:
        world.take(STATES[step % len(STATES)], step)
    except Unavailable:
        for writer in world.writers:
            writer.look_again()
        return False
    return True


def restarted(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The job again, on another machine: nobody can tell whether the first is dead."""
    with monkeypatch.context() as patched:
        patched.setattr(lease, "_lives", lambda holder: False)
        return World(world.chain.store, RANKS)


@pytest.mark.slow
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_any_rank_dies_at_any_operation(done: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on as far as they can. The head is the old one or the new; the same job, started again,
    takes the next snapshot."""
    for rank in range(RANKS):
        at = 0
        while True:
            store = MemoryStore()
            faulty = FaultyStore(store, None, done=done, verbs=ALL)
            world = World(store, RANKS, through={rank: faulty})
            assert one_take(world, 0)
            assert one_take(world, 1)
            faulty.count, faulty.at = 0, at
            take = world.begin()
            died = 0
            for one in range(RANKS):
                try:
                    world.store(take, STATES[2], [one])
                except Died:
                    died += 1
            with suppress(Died, Unavailable):
                world.commit(take, 2)
                world.prune(LAST)
            assert assert_whole(store)[0] in (1, 2)
            again = restarted(world, monkeypatch)
            # Where a prune was killed, what is doomed may be what comes back: that is told once.
            assert one_take(again, 3) or (rank == 0 and one_take(again, 3))
            again.prune(LAST)
            assert assert_whole(store) == [3]
            assert_clean(again)
            if faulty.dead is None:
                break
            at += 1
        # Packs, manifest, part record; and rank 0's look, record and head, and the other ranks' records away.
        assert at >= (3 if rank else 15), "every operation was tried"


def takes(world: World) -> list[int]:
    """Four takes with a prune of one's own after each; the steps that were committed."""
    done = []
    for step in (2, 3, 4, 5):
        if one_take(world, step):
            done.append(step)
            world.prune(LAST)
    return done


@pytest.mark.slow
def test_an_outsider_prunes_between_any_two_operations_of_ranks() -> None:
    count, at, skipped = 1, 0, 0
    while at < count:
        store = MemoryStore()
        counted = 0

        def ask(store: MemoryStore = store, at: int = at) -> None:
            nonlocal counted
            counted += 1
            if counted == at + 1:
                pruned(Chain(store))

        way = Through(store, lambda: None)
        world = World(store, RANKS, through=dict.fromkeys(range(RANKS), way))
        for step in (0, 1):
            assert one_take(world, step)
        way.ask = ask
        done = takes(world)
        count = counted
        skipped += 4 - len(done)
        assert len(done) >= 3, "what is skipped is one"
        assert done[-1] == 5 or one_take(world, 6)
        assert assert_whole(store)[0] in (5, 6)
        assert_clean(world)
        at += 3
    assert count > 50
    assert skipped <= count // 20


def stored_ahead(world: World, step: int) -> Take:
    """Ranks 1 and up have stored their part of the next snapshot, and rank 0 has not."""
    take = world.begin()
    world.store(take, STATES[step % len(STATES)], range(1, RANKS))
    return take


def test_a_prune_of_rank_0_spares_what_other_ranks_are_storing() -> None:
    """They may have begun before the snapshot was committed that it follows on; and told of it or not."""
    for told in (True, False):
        world = World(MemoryStore(), RANKS)
        one_take(world, 0)
        first = world.begin()
        world.store(first, STATES[1])
        second = stored_ahead(world, 2)
        if not told:
            for entry in list(world.chain.store.list(keys.parts("main", world.lease.number, second.number))):
                world.chain.store.delete(entry.key)
        world.commit(first, 1)
        world.prune(LAST)
        before = {entry.key for entry in world.chain.store.list(keys.PACKS)}
        if not told:
            world.store(second, STATES[2], range(1, RANKS))
            assert {entry.key for entry in world.chain.store.list(keys.PACKS)} == before, "none was lost"
        world.store(second, STATES[2], [0])
        world.commit(second, 2)
        assert assert_whole(world.chain.store) == [2, 1]
        world.prune(LAST)
        assert assert_whole(world.chain.store) == [2]


def test_what_takes_that_failed_have_left_goes_after_three_that_did_not() -> None:
    world = World(MemoryStore(), RANKS)
    one_take(world, 0)
    lost = world.begin()
    world.store(lost, STATES[2])
    garbage = {entry.key for entry in world.chain.store.list(keys.MANIFESTS)}
    garbage -= set(map(keys.manifest, world.chain.head().record.manifests))  # type: ignore[union-attr]
    assert len(garbage) == 2

    def left() -> set[str]:
        return {entry.key for entry in world.chain.store.list(keys.MANIFESTS)} & garbage

    for step in (5, 6, 8):
        assert left() == garbage
        assert one_take(world, step)
        world.prune(LAST)
    one_take(world, 9)
    world.prune(LAST)
    assert not left()
    assert assert_whole(world.chain.store) == [9]


def building_on_the_last_but_one(world: World) -> list[Part]:
    """Parts that rely on a snapshot that may be pruned, as those of a resume from it do."""
    older = world.chain.manifests(list(world.chain.snapshots())[1])
    for writer, part in zip(world.writers, older, strict=True):
        writer._recent.clear()
        writer.build_on(part)
    found = world.store(world.begin(), STATES[0])
    assert any(one.relies for one in found)
    return found


def test_parts_of_a_living_writer_keep_what_they_rely_on_from_an_outsider() -> None:
    world = World(MemoryStore(), RANKS)
    for step in (0, 1):
        one_take(world, step)
    found = building_on_the_last_but_one(world)
    pruned(world.chain)
    assert assert_whole(world.chain.store) == [1]
    world.writers[0].commit(found, Facts(step=5))
    assert assert_whole(world.chain.store) == [5, 1]
    assert_clean(world)


def test_part_records_of_dead_writers_are_swept() -> None:
    world = World(MemoryStore(), RANKS)
    one_take(world, 0)
    stored_ahead(world, 1)
    pruned(world.chain)
    assert len(list(world.chain.store.list(keys.PARTS))) == RANKS - 1, "it may commit them yet"
    world.lease.release()
    pruned(world.chain)
    assert not list(world.chain.store.list(keys.PARTS))
    assert_clean(world)


def test_a_part_record_that_cannot_be_read_keeps_nobody_from_pruning() -> None:
    world = World(MemoryStore(), RANKS)
    for step in (0, 1):
        one_take(world, step)
    key = keys.part("main", world.lease.number, 9, 1)
    world.chain.store.put(key, [b"{}"])
    pruned(world.chain)
    assert assert_whole(world.chain.store) == [1]
    finding = next(one for one in verify(world.chain).findings if one.key == key)
    assert not finding.snapshots
    parts.clear(world.chain, Take("main", world.lease.number, 9))
    assert verify(world.chain).findings == []


def test_a_part_that_relies_on_what_was_pruned_is_not_committed() -> None:
    world = World(MemoryStore(), RANKS)
    for step in (0, 1):
        one_take(world, step)
    found = building_on_the_last_but_one(world)
    for entry in list(world.chain.store.list(keys.PARTS)):
        world.chain.store.delete(entry.key)
    pruned(world.chain)
    with pytest.raises(Unavailable, match="shares chunks with one that was pruned"):
        world.writers[0].commit(found, Facts(step=2))
    assert assert_whole(world.chain.store) == [1]
    for writer in world.writers:
        writer.look_again()
    assert one_take(world, 5)
    assert assert_whole(world.chain.store) == [5, 1]


def test_a_rank_that_gave_up_lets_the_next_take_go_on() -> None:
    world = World(MemoryStore(), RANKS)
    one_take(world, 0)
    take = world.begin()
    world.store(take, STATES[1], [0])
    parts.withdraw(world.chain, take, 1, "No space left on device")
    with pytest.raises(Unavailable, match="rank 1 could not store its part of the snapshot: No space left"):
        world.commit(take, 1)
    with pytest.raises(Conflict, match="given take"):
        world.store(take, STATES[1], [1])
    assert one_take(world, 2)
    assert assert_whole(world.chain.store) == [2, 0]
    world.prune(Keep.parse("last 1"))
    assert assert_whole(world.chain.store) == [2]


# -- in any order ------------------------------------------------------------------------------------------


class Ranks:
    """The ranks of a world, each in a thread of its own, and two who prune; a seed decides whose turn it is.
    The ranks run up to two takes ahead of what is committed, as their arenas let them."""

    def __init__(self, seed: int, first: int, last: int) -> None:
        names = [*map(str, range(RANKS)), "prune", "second"]
        self.store = MemoryStore()
        self.turns = Turns(names, seed)
        self.ways = {name: Through(self.store, lambda: None) for name in names}
        self.world = World(self.store, RANKS, through={rank: self.ways[str(rank)] for rank in range(RANKS)})
        self.settled = {step: step < first for step in range(last + 1)}
        """By step, whether its take is over."""
        self.failed: list[BaseException] = []
        self.lost: list[int] = []
        self.first, self.last = first, last

    def run(self) -> None:
        for step in range(self.first):
            assert one_take(self.world, step)
        for name, way in self.ways.items():
            way.ask = partial(self.turns.wait, name)
        jobs = {
            **{str(rank): partial(self.rank, rank) for rank in range(RANKS)},
            **{name: partial(self.prune, name) for name in ("prune", "second")},
        }
        threads = [threading.Thread(target=self.work, args=item) for item in jobs.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        for way in self.ways.values():
            way.ask = lambda: None

    def work(self, name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except BaseException as error:
            self.failed.append(error)
        finally:
            self.turns.end(name)

    def rank(self, rank: int) -> None:
        looked = 0
        for step in range(self.first, self.last + 1):
            while rank and not self.settled[max(step - 3, 0)]:
                self.turns.wait(str(rank))
            if looked < len(self.lost):
                looked = len(self.lost)
                self.world.writers[rank].look_again()
            take = Take("main", self.world.lease.number, 100 + step)
            self.world.store(take, STATES[step % len(STATES)], [rank])
            if rank == 0:
                self.commit(take, step)

    def commit(self, take: Take, step: int) -> None:
        chain, writer = self.world.chains[0], self.world.writers[0]
        waited = 0.0

        def wait(seconds: float) -> None:
            nonlocal waited
            waited += seconds
            self.turns.wait("0")

        found = parts.gather(chain, take, RANKS, 1e9, lambda: waited, wait)
        try:
            writer.commit(found, Facts(step=step))
        except Unavailable:
            self.lost.append(step)
            writer.look_again()
        self.settled[step] = True
        parts.clear(chain, take)
        self.world.prune(LAST)

    def prune(self, name: str) -> None:
        for _ in range(2):
            pruned(Chain(self.ways[name]))


@pytest.mark.slow
def test_operations_of_ranks_and_prunes_in_any_order() -> None:
    lost = 0
    for seed in range(25):
        ranks = Ranks(seed, first=2, last=6)
        ranks.run()
        assert ranks.failed == [], seed
        newest = next(step for step in range(6, 0, -1) if step not in ranks.lost)
        assert assert_whole(ranks.store)[0] == newest
        lost += len(ranks.lost)
        # Whoever was told that its part is not committed shares nothing that has gone.
        for writer in ranks.world.writers:
            writer.look_again()
        ranks.world.number = 200
        assert one_take(ranks.world, 8)
        assert_clean(ranks.world)
    assert lost < 25 * 5 // 4
