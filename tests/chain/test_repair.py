from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from making import Content, compressible, content, restored, started, whole, written

from everstep.chain import lease, prune, repair
from everstep.chain.encoding import Always
from everstep.chain.history import Chain, now
from everstep.chain.lease import Lease
from everstep.chain.rebuilding import footer_of
from everstep.chain.repair import Done, Plan, consider, execute
from everstep.chain.retention import Keep
from everstep.chain.steplog import StepLog
from everstep.chain.verify import verify
from everstep.chain.writer import Facts, Writer
from everstep.errors import Mismatch, NotFound, Unavailable
from everstep.format import keys, pack, record
from everstep.format.chunk import Encoding, digest
from everstep.format.layout import lay_out
from everstep.format.record import StepRecord, TagRecord
from everstep.store.base import Store
from everstep.store.local import LocalStore
from everstep.store.memory import MemoryStore
from everstep.store.parity import ParityStore
from everstep.store.replacing import SPARES, replace
from everstep.store.shards import Shape
from everstep.testing.damage import HOW, damage, damage_some, files_of
from everstep.testing.faults import Died, FaultyStore

pytestmark = pytest.mark.slow

SEEDS = 30
"""Rounds of some six damages each; `bench/repair.py` does a thousand of them."""

SMALL = lay_out([whole("moving", "float32", (100,)), whole("still", "float32", (100,), "frozen")])


def states() -> list[Content]:
    rng = random.Random(3)
    first = content(1)
    second = first.changed(rng, "dense", "count")
    third = compressible(2)
    third.leaves["frozen"] = first.leaves["frozen"]
    return [first, second, third, second.changed(rng, "moment", "small")]


STATES = states()


def make(store: Store | str) -> Chain:
    """Four snapshots, one of them encoded, a tag, two segments of the step log, a released lease."""
    writer = started(store)
    chain = writer.chain
    log = StepLog(chain, "main", writer.lease.number)
    for step, one in enumerate(STATES, start=1):
        writer.encodings = Always(Encoding.SHUFFLE_ZSTD if step == 3 else Encoding.RAW)
        writer.write(one.captured(), Facts(step=step, metrics={"loss": 0.25}))
        log.append(StepRecord(step=step, epoch=0, rng="00" * 8))
        if step % 2 == 0:
            journal = log.cut()
            assert journal is not None
            log.seal(journal)
    tag = TagRecord(next(iter(chain.snapshots())).id, "00" * 8, now(), "best", number=1)
    assert chain.store.put(tag.key, [record.seal(tag)])
    writer.lease.release()
    return chain


def objects(store: Store) -> dict[str, bytes]:
    return {entry.key: bytes(store.get(entry.key)) for entry in store.list()}


def repaired(store: Store, *others: Store) -> tuple[Plan, Done]:
    plan = consider(store, others)
    return plan, execute(plan)


def assert_restores(chain: Chain) -> None:
    found = list(chain.snapshots())
    assert [snapshot.step for snapshot in found] == [4, 3, 2, 1]
    for snapshot in found:
        got, remarks = restored(chain, snapshot)
        assert got == STATES[snapshot.step - 1]
        assert not remarks


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("repair") / "sound"
    make(str(place))
    return place


def change(store: Store, key: str, data: bytes | None) -> None:
    store.delete(key)
    if data is not None:
        store.put(key, [data])


def flipped(data: bytes, at: int | None = None) -> bytes:
    changed = bytearray(data)
    changed[len(data) // 3 if at is None else at] ^= 8
    return bytes(changed)


# -- out of a copy -----------------------------------------------------------------------------------------


def test_damage_anywhere_in_two_copies_is_repaired_from_each_other(sound: Path, tmp_path: Path) -> None:
    """Each object is damaged in one of the two at most; the end is byte for byte as before."""
    before = {key: data for key, data in files_of(sound).items() if not key.startswith("tmp/")}
    for seed in range(SEEDS):
        rng = random.Random(seed)
        roots = [tmp_path / f"{seed}-{name}" for name in ("a", "b")]
        for root in roots:
            shutil.copytree(sound, root)
        done = damage_some(roots, rng, most=12)
        stores = [LocalStore(root) for root in roots]
        for here, there in (stores, stores[::-1]):
            plan, outcome = repaired(here, there)
            assert not outcome.left, (seed, done, outcome.left)
            hit = {key for key, (root, _) in done.items() if root == here.root}
            did = {step.key for step in outcome.repaired}
            assert did == {step.key for step in plan.steps}
            assert did & before.keys() == hit, seed
        for root, store in zip(roots, stores, strict=True):
            fences = [key for key in files_of(root) if key not in before]
            # The newest head or lease got a successor before it was replaced, and nothing else is new.
            assert all(key.startswith((keys.HEADS, keys.LEASES)) for key in fences)
            assert {key: data for key, data in files_of(root).items() if key in before} == before
            assert verify(Chain(store)).findings == []
            shutil.rmtree(root)


@pytest.mark.parametrize("kind", ["everything", "everstep.json", *HOW])
def test_a_wiped_copy_is_filled_again(kind: str, sound: Path, tmp_path: Path) -> None:
    root = tmp_path / "here"
    shutil.copytree(sound, root)
    if kind == "everything":
        shutil.rmtree(root)
    elif kind == "everstep.json":
        (root / kind).unlink()
    else:
        for key in files_of(root):
            damage(root, key, kind, random.Random(key))
    store = LocalStore(root)
    with pytest.raises((NotFound, repair.Damaged)):
        consider(store)
    _, done = repaired(store, LocalStore(sound))
    assert not done.left
    chain = Chain(store)
    assert verify(chain).findings == []
    assert_restores(chain)
    good = files_of(sound)
    assert {key: data for key, data in files_of(root).items() if key in good} == good


def test_which_chain_it_is_cannot_be_guessed(tmp_path: Path) -> None:
    here, copy, other = MemoryStore(), MemoryStore(), MemoryStore()
    make(copy)
    make(other)
    with pytest.raises(Mismatch, match="2 different ones"):
        consider(here, [copy, other])
    assert list(here.list()) == []
    for key, data in objects(copy).items():
        here.put(key, [data])
    here.delete(keys.CHAIN)
    _, done = repaired(here, other, copy)
    assert not done.left
    assert Chain(here).about == Chain(copy).about


def test_what_a_copy_has_beyond_what_is_here_was_lost_here() -> None:
    here, copy = MemoryStore(), MemoryStore()
    make(copy)
    for key, data in objects(copy).items():
        here.put(key, [data])
    newest = keys.numbered(keys.head("main"), 4)
    for key in (newest, keys.numbered(keys.lease("main"), 2), keys.numbered(keys.tag("best"), 1)):
        here.delete(key)
    assert verify(Chain(here)).findings == []
    plan, _ = repaired(here, copy)
    assert plan.steps[-1].key == newest
    assert objects(here) == objects(copy)


def test_a_copy_that_has_gone_another_way_is_not_followed() -> None:
    here, copy = MemoryStore(), MemoryStore()
    make(copy)
    for key, data in objects(copy).items():
        here.put(key, [data])
    for store, seed in ((here, 7), (copy, 8), (copy, 9)):
        chain = Chain(store)
        writer = Writer(chain, Lease.take(store), parent=chain.find("head").id)
        writer.write(content(seed).captured(), Facts(step=5))
        writer.lease.release()
    before = objects(here)
    plan, done = repaired(here, copy)
    assert not plan.steps
    assert not done.repaired
    assert any("has gone another way in heads/main/" in remark for remark in plan.remarks)
    assert objects(here) == before


def test_what_was_pruned_here_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "GRACE_S", 0.0)
    here, copy = MemoryStore(), MemoryStore()
    make(copy)
    for key, data in objects(copy).items():
        here.put(key, [data])
    chain = Chain(here)
    for _ in prune.prune(chain, Keep.parse("last 2")):
        pass
    before = objects(here)
    plan, _ = repaired(here, copy)
    assert not plan.steps
    assert objects(here) == before
    assert verify(chain).snapshots == 2


# -- out of chunks -----------------------------------------------------------------------------------------


def packs_of(store: Store) -> list[str]:
    return [entry.key for entry in store.list(keys.PACKS)]


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize("footer", ["here", "lost"])
def test_a_pack_is_rebuilt_of_chunks_that_other_packs_hold(encoding: Encoding, footer: str) -> None:
    """Another chain has the same bytes, in packs of its own, raw: there is no copy of the pack."""
    here, other = MemoryStore(), MemoryStore()
    contents = [compressible(1)]
    contents.append(contents[0].changed(random.Random(1), "small"))
    contents[1].leaves["dense"] = bytes([b ^ 1 for b in contents[0].leaves["dense"]])
    written(started(here, encoding=encoding), contents)
    others = [one.changed(random.Random(2), "mean", "moment") for one in contents]
    written(started(other), [others[0], contents[0], others[1], contents[1]])
    only_here = set(packs_of(here)) - set(packs_of(other))
    assert only_here
    before = objects(here)
    for key in sorted(only_here):
        data = before[key]
        if footer == "lost":
            change(here, key, None)
        else:
            change(here, key, flipped(data, 10))
        assert not consider(here).steps
        _, done = repaired(here, other)
        assert not done.left
        assert [step.how for step in done.repaired] == ["of its chunks"]
        assert objects(here) == before
    assert verify(Chain(here)).findings == []


def test_of_a_pack_that_cannot_be_had_whole_what_is_good_is_kept() -> None:
    here, copy = MemoryStore(), MemoryStore()
    make(here)
    for key, data in objects(here).items():
        copy.put(key, [data])
    key = packs_of(here)[0]
    good = objects(here)[key]
    assert footer_of(here, key[-64:]).entries[1].offset == 16384
    # Of its two chunks one is damaged here; in the copy both are, but another bit of it.
    change(here, key, flipped(flipped(good, 5), 16384 + 5))
    change(copy, key, flipped(good, 5))
    plan, done = repaired(here, copy)
    (step,) = done.repaired
    (lost,) = done.left
    assert len(step.lacks) == 1
    assert lost.key == key
    assert lost.snapshots
    assert "repair --from" in lost.next
    assert objects(here)[key] == flipped(good, 5)
    # Doing it again makes nothing better, and nothing worse.
    before = objects(here)
    plan, done = repaired(here, copy)
    assert not plan.steps
    assert not done.repaired
    assert objects(here) == before


def test_what_cannot_be_repaired_is_told_and_nothing_is_touched() -> None:
    store = MemoryStore()
    chain = make(store)
    head, first = chain.find("head"), chain.find("step:1")
    for key in (keys.manifest(head.record.manifests[0]), keys.snapshot(first.id)):
        change(store, key, flipped(objects(store)[key]))
    before = objects(store)
    plan, done = repaired(store)
    assert not plan.steps
    assert {finding.key: len(finding.snapshots) for finding in done.left} == {
        keys.manifest(head.record.manifests[0]): 1,
        keys.snapshot(first.id): 1,
    }
    assert all("everstep -r memory://memory repair --from" in finding.next for finding in done.left)
    assert objects(store) == before


# -- killed, and at work -----------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [False, True])
def test_killed_at_any_operation_and_done_again(done: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_lives", lambda holder: False)  # Who is killed is dead.
    copy = MemoryStore()
    make(copy)
    good = objects(copy)
    hit = [
        keys.CHAIN,
        packs_of(copy)[0],
        keys.manifest(Chain(copy).find("step:2").record.manifests[0]),
        keys.snapshot(Chain(copy).find("step:3").id),
        keys.numbered(keys.head("main"), 4),
        keys.numbered(keys.head("main"), 2),
        keys.numbered(keys.lease("main"), 2),
        keys.numbered(keys.tag("best"), 1),
    ]
    for number in itertools.count():
        here = MemoryStore()
        for key, data in good.items():
            here.put(key, [data])
        for key in hit:
            change(here, key, flipped(good[key]))
        change(here, packs_of(copy)[1], None)
        dying = FaultyStore(here, number, Died, done=done, verbs=frozenset({"put", "delete"}))
        plan = consider(dying, [copy])
        try:
            execute(plan)
        except Died:
            killed = True
        else:
            killed = False
        # Nothing that was good is gone, and of each damaged object the right bytes are somewhere.
        now_there = objects(here)
        spared = {data for key, data in now_there.items() if key.startswith(SPARES)}
        for key, data in good.items():
            assert key in hit or key == packs_of(copy)[1] or now_there[key] == data
            assert key in now_there or data in spared or key == packs_of(copy)[1]
        _, again = repaired(here, copy)
        assert not again.left
        end = objects(here)
        assert {key: end[key] for key in good} == good
        assert not any(key.startswith(SPARES) for key in end)
        assert verify(Chain(here)).findings == []
        if not killed:
            assert number > 30
            return


def test_a_spare_is_enough_where_the_copy_is_gone() -> None:
    """Killed between taking the damaged object away and putting the right one."""
    for cut in range(1, 4):
        store = MemoryStore()
        make(store)
        (key, *_) = packs_of(store)
        good = objects(store)[key]
        change(store, key, flipped(good))
        with pytest.raises(Died):
            replace(FaultyStore(store, cut, Died, verbs=frozenset({"put", "delete"})), key, [good])
        if cut > 1:
            _, done = repaired(store)
            assert not done.left
            assert objects(store)[key] == good


def test_the_newest_head_is_replaced_only_where_nobody_can_take_its_number() -> None:
    store, copy = MemoryStore(), MemoryStore()
    writer = started(store)
    snapshots = written(writer, [content(1, SMALL), content(2, SMALL)])
    for key, data in objects(store).items():
        copy.put(key, [data])
    key = keys.numbered(keys.head("main"), 2)
    good = objects(store)[key]
    change(store, key, flipped(good))
    # Its writer lives, and may be about to put the next: then it is left, and told.
    _, done = repaired(store, copy)
    assert [finding.key for finding in done.left] == [key]
    assert "is being written by this process" in done.left[0].problem
    writer.lease.release()
    _, done = repaired(store, copy)
    assert not done.left
    chain = Chain(store)
    assert chain.head() == snapshots[1]
    assert chain.head_number() == 3
    assert verify(chain).findings == []
    # The one who comes next goes on behind it.
    late = Writer(chain, Lease.take(store), parent=snapshots[1].id)
    late.write(content(3, SMALL).captured(), Facts(step=3))
    assert [snapshot.step for snapshot in chain.snapshots()] == [3, 2, 1]
    assert verify(chain).findings == []


def test_a_prune_and_a_writer_between_plan_and_execution(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was pruned since does not come back, and what was written since is not touched."""
    monkeypatch.setattr(prune, "GRACE_S", 0.0)
    store, copy = MemoryStore(), MemoryStore()
    chain = make(store)
    for key, data in objects(store).items():
        copy.put(key, [data])
    first, head = chain.find("step:1"), chain.find("head")
    old = [keys.snapshot(first.id), keys.manifest(first.record.manifests[0])]
    kept = keys.manifest(head.record.manifests[0])
    for key in (*old, kept):
        change(store, key, flipped(objects(store)[key]))
    plan = consider(store, [copy])
    assert {step.key for step in plan.steps} == {*old, kept}
    change(store, kept, objects(copy)[kept])  # A prune does not go on where what stays cannot be read.
    for _ in prune.prune(chain, Keep.parse("last 2")):
        pass
    change(store, kept, flipped(objects(copy)[kept]))
    late = Writer(chain, Lease.take(store), parent=head.id)
    late.write(content(9).captured(), Facts(step=5))
    before = objects(store)
    done = execute(plan)
    assert [step.key for step in done.repaired] == [kept]
    assert objects(store) == {**before, kept: objects(copy)[kept]}
    assert verify(chain).findings == []


@pytest.mark.parametrize("prefix", [keys.head("main"), keys.lease("main")])
def test_a_writer_on_another_machine_is_not_stopped(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be asked, and whoever took its lease would fence it."""
    store, copy = MemoryStore(), MemoryStore()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("everstep.chain.lease.socket.gethostname", lambda: "elsewhere")
        writer = started(store)
        (snapshot,) = written(writer, [content(1, SMALL)])
    for key, data in objects(store).items():
        copy.put(key, [data])
    key = keys.numbered(prefix, 1)
    change(store, key, flipped(objects(store)[key]))
    _, done = repaired(store, copy)
    assert [finding.key for finding in done.left] == [key]
    assert "may be being written by process" in done.left[0].problem
    assert "on elsewhere" in done.left[0].problem
    # It goes on, and what is not the newest any more is put back.
    writer.write(content(2, SMALL).captured(), Facts(step=2))
    if prefix == keys.head("main"):
        _, done = repaired(store, copy)
        assert not done.left
        assert Chain(store).find("head~1") == snapshot
        assert verify(Chain(store)).findings == []


def test_a_store_that_is_away_is_no_damage() -> None:
    store, copy = MemoryStore(), MemoryStore()
    make(store)
    for key, data in objects(store).items():
        copy.put(key, [data])
    change(store, packs_of(store)[0], None)
    away = FaultyStore(copy, 3, lambda: Unavailable("away"), verbs=frozenset({"get"}))
    with pytest.raises(Unavailable):
        consider(store, [away])


# -- parity ------------------------------------------------------------------------------------------------


def in_parity(members: Sequence[Store]) -> ParityStore:
    return ParityStore(Shape(4, 2), members)


LARGE = lay_out([whole("dense", "float32", (60, 1024)), whole("frozen", "uint8", (200_000,), "frozen")])


def test_any_two_of_six_members_wiped_are_filled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    members = [MemoryStore(str(number)) for number in range(6)]
    writer = started(in_parity(members))
    one = content(1, LARGE)
    contents = [one, one.changed(random.Random(1), "dense")]
    written(writer, contents)
    writer.lease.release()
    good = [objects(member) for member in members]
    assert any(key.startswith("shards/packs/") for key in good[0])
    for lost in itertools.combinations(range(6), 2):
        for number in lost:
            members[number] = MemoryStore(str(number))
        store = in_parity(members)
        chain = Chain(store)
        for snapshot in chain.snapshots():
            got, remarks = restored(chain, snapshot, LARGE)
            assert got == contents[snapshot.step - 1]
            assert not remarks
        report = verify(chain)
        assert report.whole == 2
        assert report.findings
        assert all(not finding.snapshots and "is missing" in finding.problem for finding in report.findings)
        plan, done = repaired(store)
        assert not plan.steps
        assert len(done.repaired) == len(report.findings)
        assert not done.left
        assert verify(chain).findings == []
        assert [objects(member) for member in members] == good


def test_too_little_in_parity_comes_from_a_copy() -> None:
    members = [MemoryStore(str(number)) for number in range(6)]
    copy = MemoryStore()
    writer = started(copy)
    written(writer, [content(1, LARGE)])
    writer.lease.release()
    for key, data in objects(copy).items():
        in_parity(members).put(key, [data])
    for key in (f"shards/{packs_of(copy)[0]}", keys.manifest(Chain(copy).find("head").record.manifests[0])):
        for member in members[:3]:
            change(member, key, flipped(objects(member)[key], 70))
    store = in_parity(members)
    assert verify(Chain(store)).whole == 0
    _, done = repaired(store, copy)
    assert not done.left
    assert verify(Chain(store)).findings == []
    assert objects(store) == objects(copy)


def test_what_was_put_damaged_into_a_set_and_is_not_whole_there_either() -> None:
    """Mending gives back what was put, which was not the manifest; a copy has it."""
    members = [MemoryStore(str(number)) for number in range(6)]
    copy = MemoryStore()
    written(started(copy), [content(1, LARGE)])
    key = keys.manifest(Chain(copy).find("head").record.manifests[0])
    for name, data in objects(copy).items():
        in_parity(members).put(name, [flipped(data) if name == key else data])
    members[5].delete(key)
    store = in_parity(members)
    plan, done = repaired(store, copy)
    assert [step.key for step in plan.mends] == [step.key for step in plan.steps] == [key]
    assert not done.left
    assert verify(Chain(store)).findings == []
    assert objects(store) == objects(copy)


def test_the_pack_that_comes_out_is_named_by_its_footer() -> None:
    store = MemoryStore()
    make(store)
    for key in packs_of(store):
        data = objects(store)[key]
        repair.refuse_other(key, data)
        trailer = pack.decode_trailer(data[-pack.TRAILER_BYTES :], len(data))
        assert digest(data[trailer.footer_offset :][: trailer.footer_bytes]) == key[-64:]
        for at in range(0, len(data), 997):
            with pytest.raises((repair.Damaged, repair.Unsupported)):
                repair.refuse_other(key, flipped(data, at))
