"""Packs of which little is needed are given up: what is needed of them goes elsewhere, and is found."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from making import (
    GRID_BYTES,
    Content,
    Slots,
    assert_restores,
    content,
    restored,
    started,
    whole,
    written,
)

from everstep.chain import doomed, prune
from everstep.chain.history import Chain, Snapshot
from everstep.chain.lease import Lease
from everstep.chain.prune import Done, Repack
from everstep.chain.reader import Reader, Target
from everstep.chain.relocations import Relocations
from everstep.chain.repack import relocate
from everstep.chain.retention import Keep
from everstep.chain.stats import stats
from everstep.chain.verify import verify
from everstep.chain.versions import branch, rollback
from everstep.chain.writer import Facts, Writer
from everstep.errors import Damaged, Unsupported
from everstep.format import keys, manifest, record
from everstep.format.chunk import Encoding, aligned
from everstep.format.layout import lay_out
from everstep.format.record import HeadRecord, NewPack, RelocationRecord, Spot
from everstep.store.memory import MemoryStore
from everstep.testing.faults import READS, FaultyStore

LAST = Keep.parse("last 1")
ALWAYS = Repack(max_unused=0.0, worth_bytes=1)


@pytest.fixture(autouse=True)
def _all_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "GRACE_S", -10.0)


def states(count: int = 4) -> list[Content]:
    """Of each of which a part lives on in the next."""
    rng = random.Random(2)
    made = [content(0)]
    for number in range(count - 1):
        made.append(made[-1].changed(rng, ("moment", "dense", "count")[number % 3]))
    return made


STATES = states()


def a_chain(store: MemoryStore | FaultyStore | None = None) -> tuple[Chain, Writer, list[Snapshot]]:
    writer = started(store or MemoryStore())
    return writer.chain, writer, written(writer, STATES)


def packs_of(chain: Chain) -> dict[str, int]:
    return {one.key.rpartition("/")[2]: one.size_bytes for one in chain.store.list(keys.PACKS)}


def repacked(chain: Chain, keep: Keep = LAST, policy: Repack = ALWAYS) -> list[Done]:
    return list(prune.prune(chain, keep, repack=policy))


def records(chain: Chain) -> list[str]:
    return [one.key for one in chain.store.list(keys.RELOCATIONS)]


def test_what_is_needed_of_a_pack_goes_elsewhere_and_the_pack_goes() -> None:
    chain, writer, shots = a_chain()
    writer.lease.release()
    named = chain.manifest(shots[-1])
    list(prune.prune(chain, LAST))
    before = packs_of(chain)
    plan = prune.consider(chain, LAST, repack=ALWAYS)
    assert plan.sizes == {}
    assert plan.moves
    copied, dropped = repacked(chain)
    assert (copied.keys, copied.remarks) == ((), ())
    assert set(dropped.keys) == {keys.pack(one.pack) for one in plan.moves}
    after = packs_of(chain)
    assert sum(after.values()) == sum(before.values()) - plan.repacked_bytes
    assert sum(before.values()) - dropped.freed_bytes + copied.copied_bytes == sum(after.values())
    # All that is left is needed.
    live = sum(aligned(place.stored_bytes) for place in named.places)
    assert sum(after.values()) - live <= 2 * GRID_BYTES
    assert chain.manifest(shots[-1]) == named
    assert_restores(chain, shots[-1], STATES[-1])
    assert verify(chain).findings == []
    assert records(chain) == [keys.numbered(keys.RELOCATIONS, 1)]
    assert prune.consider(chain, LAST, repack=ALWAYS).moves == ()
    assert repacked(chain) == []


def test_a_plan_without_repacking_says_nothing_of_it() -> None:
    chain, _, _ = a_chain()
    assert prune.consider(chain, LAST).moves == ()


def test_how_much_may_be_unused() -> None:
    chain, writer, _ = a_chain()
    writer.lease.release()
    list(prune.prune(chain, LAST))

    def plan(max_unused: float, worth_bytes: int = 1) -> tuple[int, int]:
        moves = prune.consider(chain, LAST, repack=Repack(max_unused, worth_bytes)).moves
        return len(moves), sum(one.freed_bytes for one in moves)

    count, freed = plan(0.0)
    total = sum(packs_of(chain).values())
    assert plan(1.0) == (0, 0)
    assert plan(freed / total) == (0, 0)
    some = plan(freed / total - 0.01)
    assert 0 < some[0] <= count
    # The worst come first, and no more than it takes.
    shares = [one.moved_bytes / one.size_bytes for one in prune.consider(chain, LAST, repack=ALWAYS).moves]
    assert shares == sorted(shares)
    assert plan(0.0, worth_bytes=freed) == (count, freed)
    assert plan(0.0, worth_bytes=freed + 1) == (0, 0)
    for share in (0.05, 0.1, 0.2, 0.4):
        moves = prune.consider(chain, LAST, repack=Repack(share, 1)).moves
        left = freed - sum(one.freed_bytes for one in moves)
        assert left <= share * (total - sum(one.freed_bytes for one in moves))


def test_what_was_relocated_is_relocated_again_and_no_record_is_left_that_nothing_needs() -> None:
    chain, writer, shots = a_chain()
    repacked(chain, Keep.parse("last 2"))
    assert len(records(chain)) == 1
    first = set(packs_of(chain))
    # The second to last goes, so that a part of the new packs is dead.
    repacked(chain, LAST)
    assert records(chain) == [keys.numbered(keys.RELOCATIONS, 2)]
    assert first - set(packs_of(chain))
    assert_restores(chain, shots[-1], STATES[-1])
    assert verify(chain).findings == []
    # A state of which nothing is shared: when that is all, nothing tells of relocations any more.
    writer.write(content(99).captured(), Facts(step=99))
    repacked(chain, LAST)
    assert records(chain) == []
    assert sum(packs_of(chain).values()) > 0
    assert verify(chain).findings == []


def test_a_reader_that_knows_of_nothing_finds_what_moves_meanwhile() -> None:
    """Again and again, and asks for no more than it must."""
    chain, writer, shots = a_chain()
    writer.lease.release()
    store = FaultyStore(chain.store, verbs=READS)
    reader, named = Reader(store), chain.manifest(shots[-1])
    regions = [bytearray(region.size_bytes) for region in named.regions]

    def requests() -> int:
        before = store.count
        targets = [Target(number, 0, memoryview(one)) for number, one in enumerate(regions)]
        assert reader.fill(named, targets) == []
        assert all(bytes(reader.chunk(named, one.digest)) for one in named.chunks)
        return store.count - before

    requests()
    still = requests()
    for count, keep in enumerate(("last 3", "last 2", "last 1"), start=1):
        repacked(chain, Keep.parse(keep))
        assert len(records(chain)) >= 1, count
        requests()
    assert_restores(chain, shots[-1], STATES[-1])
    # Once it knows where all is there is no request more than there are more pieces.
    assert requests() <= still + len(named.packs)


def test_no_request_is_made_for_relocations_where_there_are_none() -> None:
    chain, _, shots = a_chain()
    asked: list[str] = []

    class Asking(MemoryStore):
        def list(self, prefix: str = "", limit: int | None = None):  # type: ignore[no-untyped-def]
            asked.append(prefix)
            return chain.store.list(prefix, limit)

        def get(self, key: str, start: int = 0, size_bytes: int | None = None):  # type: ignore[no-untyped-def]
            asked.append(key)
            return chain.store.get(key, start, size_bytes)

        def read_into(self, key, start, buffers):  # type: ignore[no-untyped-def]
            return chain.store.read_into(key, start, buffers)

    assert restored(Chain(Asking()), shots[-1]) == (STATES[-1], [])
    assert not [one for one in asked if one.startswith(keys.RELOCATIONS)]


@pytest.mark.parametrize("encoding", [Encoding.ZSTD, Encoding.XOR_SHUFFLE_ZSTD])
def test_encoded_chunks_and_what_they_build_on_are_copied_as_they_are(encoding: Encoding) -> None:
    names = ("a", "b", "noise")
    layout = lay_out([whole(name, "float32", (9000,)) for name in names])
    # Words that differ little, so that the second leaf is stored as a difference where that is asked for.
    rng = random.Random(4)
    smooth = [bytes(rng.choices(range(9), k=36_000)) for _ in range(3)]
    shown = [
        Content(layout, {"a": smooth[at // 2], "b": smooth[2], "noise": rng.randbytes(36_000)}, at)
        for at in range(4)
    ]
    writer = started(MemoryStore(), encoding=encoding)
    slots = Slots(layout)
    shots = [slots.write(writer, one, step) for step, one in enumerate(shown)]
    writer.lease.release()
    chain = writer.chain
    named = chain.manifest(shots[-1])
    assert any(place.base for place in named.places) is (encoding is Encoding.XOR_SHUFFLE_ZSTD)
    assert sum(one.copied_bytes for one in repacked(chain)) > 0
    relocations = Relocations(chain.store)
    relocations.look()
    found = relocations.table.without(named, lambda pack: pack not in packs_of(chain))
    assert found is not None
    moved = {
        chunk.digest: here.base
        for chunk, here, before in zip(named.chunks, found.places, named.places, strict=True)
        if here.pack != before.pack
    }
    assert moved
    if encoding is Encoding.XOR_SHUFFLE_ZSTD:
        assert moved.keys() & {place.base for place in named.places}
    assert restored(chain, shots[-1], layout) == (shown[-1], [])
    assert verify(chain).findings == []


def test_a_writer_goes_on_sharing_what_was_relocated() -> None:
    chain, writer, shots = a_chain()
    repacked(chain)
    again = writer.write(STATES[-1].captured(), Facts(step=9))
    assert (again.record.new_bytes, again.record.stored_bytes) == (0, 0)
    named = chain.manifest(again)
    assert set(named.packs) == set(packs_of(chain))
    assert named.state == chain.manifest(shots[-1]).state
    assert_restores(chain, again, STATES[-1])
    # Nothing names the old places any more when the older one goes, and what the writer had put before it
    # looked.
    writer.lease.release()
    repacked(chain)
    assert records(chain) == []
    assert_restores(chain, again, STATES[-1])
    assert verify(chain).findings == []


def test_what_is_damaged_is_left_alone() -> None:
    chain, writer, shots = a_chain()
    writer.lease.release()
    list(prune.prune(chain, LAST))
    (move, *_) = prune.consider(chain, LAST, repack=ALWAYS).moves
    key = keys.pack(move.pack)
    data = bytearray(chain.store.get(key))
    data[min(move.live)] ^= 1
    chain.store.delete(key)
    chain.store.put(key, [data])
    done = repacked(chain)
    assert [remark for one in done for remark in one.remarks] == [
        f"{key} was not repacked: chunk {chunk_at(chain, shots[-1], move.pack, min(move.live))[:12]} "
        "is not stored as it was written"
    ]
    assert move.pack in packs_of(chain)
    (finding,) = verify(chain).findings
    assert (finding.key, finding.snapshots) == (key, (shots[-1].id,))


def chunk_at(chain: Chain, snapshot: Snapshot, pack: str, offset: int) -> str:
    named = chain.manifest(snapshot)
    pairs = zip(named.chunks, named.places, strict=True)
    return next(one.digest for one, place in pairs if (place.pack, place.offset) == (pack, offset))


def test_a_pack_that_somebody_else_deletes_meanwhile_is_left_out() -> None:
    chain, writer, shots = a_chain()
    writer.lease.release()
    moves = prune.consider(chain, LAST, repack=ALWAYS).moves
    chain.store.delete(keys.pack(moves[0].pack))
    done = relocate(chain, moves)
    assert moves[0].pack not in done.given_up
    assert done.remarks == []
    table = Relocations(chain.store)
    table.look()
    assert moves[0].pack not in table.table.sources
    assert shots


def test_branches_and_rollbacks_of_what_was_relocated() -> None:
    chain, writer, shots = a_chain()
    writer.lease.release()
    repacked(chain, Keep.parse("last 2"))
    branch(chain, "try", "head~1")
    rollback(chain, "main", "head~1")
    for one in (*chain.snapshots(), *chain.snapshots("try")):
        assert_restores(chain, one, STATES[shots.index(one)])
    assert verify(chain).findings == []
    found = stats(chain, leaves=5)
    assert found.unreadable == ()
    assert found.unreached_bytes == 0
    assert sum(one.own_bytes for one in found.branches) < found.kinds["packs"]
    assert max(one.stored_bytes for one in found.branches) == sum(packs_of(chain).values())


# -- who does not know of it --------------------------------------------------------------------------------


def test_one_of_the_format_before_refuses_to_delete_and_to_read_the_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chain, writer, _ = a_chain()
    branch(chain, "try", "head~1")
    repacked(chain)
    marked = [heads(chain, name)[0] for name in ("main", "try")]
    assert [(one.format, one.fence) for one in marked] == [(2, True)] * 2
    # A writer goes on, and is not stopped by the fence.
    writer.write(content(7).captured(), Facts(step=9))
    assert heads(chain, "main")[0].format == 1
    fences = len([one for one in heads(chain, "main") if one.fence is True])
    repacked(chain)
    assert len([one for one in heads(chain, "main") if one.fence is True]) <= fences + 1
    monkeypatch.setattr(manifest, "NEWEST_FORMAT", 1)
    with pytest.raises(Unsupported):
        prune.consider(chain, LAST)
    with pytest.raises(Unsupported):
        chain.head("try")


def heads(chain: Chain, name: str) -> list[HeadRecord]:
    return [
        record.unseal(chain.store.get(one.key), HeadRecord, one.key)
        for one in chain.store.list(keys.head(name))
    ]


def test_a_mark_that_takes_a_writers_number_does_not_stop_it() -> None:
    chain, writer, _ = a_chain()

    class Marking(MemoryStore):
        """Puts the mark right before the head record."""

        done = False

        def __getattribute__(self, name: str) -> object:
            if name in ("done", "put", "_mark"):
                return super().__getattribute__(name)
            return getattr(chain.store, name)

        def put(self, key: str, parts: list[bytes]) -> bool:  # type: ignore[override]
            if key.startswith(keys.HEADS) and not self.done:
                Marking.done = True
                from everstep.chain import repack

                repack._mark(chain)
            return chain.store.put(key, parts)

    made = Writer(Chain(Marking()), Lease(chain.store, writer.lease.number), parent=writer.parent)
    snapshot = made.write(content(8).captured(), Facts(step=8))
    assert chain.head() == snapshot
    assert heads(chain, "main")[1].fence is True
    assert verify(chain).findings == []


# -- records that are damaged, void, or lie -----------------------------------------------------------------


def damaged(chain: Chain, key: str) -> None:
    data = bytearray(chain.store.get(key))
    data[100] ^= 1
    chain.store.delete(key)
    chain.store.put(key, [data])


@pytest.mark.parametrize("harm", [damaged, lambda chain, key: chain.store.delete(key)])
def test_a_relocation_that_cannot_be_read_is_found_and_nothing_is_deleted(
    harm: Callable[[Chain, str], None],
) -> None:
    chain, writer, shots = a_chain()
    writer.lease.release()
    repacked(chain)
    (key,) = records(chain)
    harm(chain, key)
    with pytest.raises(Damaged, match="is missing"):
        restored(chain, shots[-1])
    report = verify(chain)
    assert report.whole == 0
    found = {one.key: one.snapshots for one in report.findings}
    assert set(found.values()) == {(shots[-1].id,)}
    assert (key in found) is (harm is damaged)
    assert stats(chain).unreadable == ()
    before = {one.key for one in chain.store.list()}
    if harm is not damaged:
        # What was copied is all that there is of it: it stays, although nothing names it any more.
        repacked(chain)
    else:
        with pytest.raises(Damaged, match="nothing was pruned"):
            repacked(chain)
    assert {one.key for one in chain.store.list() if one.key.startswith(keys.PACKS)} == {
        key for key in before if key.startswith(keys.PACKS)
    }


def test_a_record_whose_packs_are_gone_or_doomed_does_not_count() -> None:
    chain, writer, shots = a_chain()
    writer.lease.release()
    list(prune.prune(chain, LAST))
    moves = prune.consider(chain, LAST, repack=ALWAYS).moves
    done = relocate(chain, moves)
    other = doomed.announce(chain.store, [], [], list(done.packs))
    # Another prune is about to delete the new packs: the old ones stay.
    going = set(prune.consider(chain, LAST).keys)
    assert not going & {keys.pack(one.pack) for one in moves}
    for name in done.packs:
        chain.store.delete(keys.pack(name))
    other.finish()
    other.leave()
    assert not set(prune.consider(chain, LAST).keys) & {keys.pack(one.pack) for one in moves}
    list(prune.prune(chain, LAST))
    assert_restores(chain, shots[-1], STATES[-1])
    assert verify(chain).findings == []
    repacked(chain)
    assert_restores(chain, shots[-1], STATES[-1])
    assert verify(chain).findings == []


def test_a_lying_record_makes_a_reader_fail_and_no_more() -> None:
    chain, writer, shots = a_chain()
    writer.lease.release()
    repacked(chain, Keep.parse("last 2"))
    (key,) = records(chain)
    there = record.unseal(chain.store.get(key), RelocationRecord, key)
    spots = [(name, spot) for name, found in there.moved.items() for spot in found]
    moved: dict[str, tuple[Spot, ...]] = {}
    for (name, spot), (_, other) in zip(spots, [*spots[1:], spots[0]], strict=True):
        moved[name] = (*moved.get(name, ()), Spot(spot.at, other.pack, other.offset))
    chain.store.delete(key)
    lie = RelocationRecord(there.packs, moved, there.nonce, there.at, there.number)
    chain.store.put(key, [record.seal(lie)])
    with pytest.raises(Damaged):
        restored(chain, shots[-1])
    assert verify(chain).whole == 0


@pytest.mark.parametrize(
    ("packs", "spot"),
    [
        ((NewPack("cd" * 32, 8192),), Spot(0, 1, 0)),
        ((NewPack("cd" * 32, 8192),), Spot(0, 0, 8192)),
        ((NewPack("cd" * 32, 8192),), Spot(1, 0, 0)),
        ((NewPack("cd" * 32, 8192),), Spot(0, 0, 1)),
    ],
)
def test_a_record_that_names_an_impossible_place_is_damaged(packs: tuple[NewPack, ...], spot: Spot) -> None:
    made = RelocationRecord(packs, {"ab" * 32: (spot,)}, "", "", number=1)
    with pytest.raises(Damaged, match="no chunk can be"):
        record.unseal(record.seal(made), RelocationRecord, made.key)


# -- somebody looks meanwhile ------------------------------------------------------------------------------


def test_verify_while_packs_are_given_up() -> None:
    for at in range(200):
        chain, writer, shots = a_chain()
        writer.lease.release()
        store = Between(chain.store, at, lambda chain=chain: repacked(chain))  # type: ignore[misc]
        report = verify(Chain(store))
        assert [one for one in report.findings if one.snapshots] == [], at
        if store.count <= at:
            break
    assert at > 30
    assert shots


class Between(MemoryStore):
    """Does something right before its operation number `at`."""

    def __init__(self, inner: object, at: int, act: Callable[[], object]) -> None:
        self.inner = inner
        self.count = 0
        self._at, self._act = at, act
        self.url = "memory://between"

    def _ask(self) -> object:
        self.count += 1
        if self.count == self._at + 1:
            self._act()
        return self.inner

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> bytes:
        return self._ask().get(key, start, size_bytes)  # type: ignore[attr-defined,no-any-return]

    def read_into(self, key: str, start: int, buffers: object) -> int:  # type: ignore[override]
        return self._ask().read_into(key, start, buffers)  # type: ignore[attr-defined,no-any-return]

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[object]:  # type: ignore[override]
        return self._ask().list(prefix, limit)  # type: ignore[attr-defined,no-any-return]
