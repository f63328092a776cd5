"""Random histories of a chain against a model of it: what is listed restores to what was captured."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from making import GRID_BYTES, LAYOUT, Content, content, restored

from everstep.chain import lease, prune
from everstep.chain.encoding import Always
from everstep.chain.history import Chain
from everstep.chain.lease import Lease
from everstep.chain.retention import Keep
from everstep.chain.verify import verify
from everstep.chain.writer import Facts, Writer
from everstep.errors import Damaged, Unavailable, Unsupported
from everstep.format import keys, pack
from everstep.format.chunk import Encoding
from everstep.store.memory import MemoryStore
from everstep.testing.faults import Died, FaultyStore
from examples import examples

LEAVES = sorted(one.name for one in LAYOUT.slices if one.alias is None)


class Histories(RuleBasedStateMachine):
    """`listed` is the model: what the head records should list, oldest first, as (step, content)."""

    @initialize(seed=st.integers(0, 3))
    def create(self, seed: int) -> None:
        self.inner = MemoryStore()
        self.current = content(seed)
        self.step = 0
        self.listed: list[tuple[int, Content]] = []
        self.reopen()

    def reopen(self) -> None:
        """A new process: it takes the lease and builds on the head, which it has restored and so verified."""
        self.store = FaultyStore(self.inner)
        self.chain = Chain.create(self.store, GRID_BYTES)
        self.writer = Writer(self.chain, Lease.take(self.store))
        head = self.chain.head()
        if head is not None:
            restored(self.chain, head)
            self.writer.parent = head.id
            self.writer.build_on(self.chain.manifest(head))

    # -- what happens --------------------------------------------------------------------------------

    def take_now(self) -> None:
        self.writer.write(self.current.captured(), Facts(step=self.step))

    @rule(
        seed=st.integers(0, 2**16), names=st.sets(st.sampled_from(LEAVES)), encoding=st.sampled_from(Encoding)
    )
    def train(self, seed: int, names: set[str], encoding: Encoding) -> None:
        """Change some of the state, or go back to one that was there before."""
        rng = random.Random(seed)
        if seed % 5 == 0 and self.listed:
            self.current = rng.choice(self.listed)[1]
        else:
            self.current = self.current.changed(rng, *names)
        # An xor needs a base, which a writer has none of.
        self.writer.encodings = Always(encoding)

    @rule()
    def take(self) -> None:
        self.step += 1
        self.take_now()
        self.listed.append((self.step, self.current))

    @rule(at=st.integers(0, 8), done=st.booleans())
    def take_and_die(self, at: int, done: bool) -> None:
        self.step += 1
        self.store.at, self.store.done = self.store.count + at, done
        try:
            self.take_now()
            committed = True
        except Died:
            committed = len(list(self.chain_outside().points())) > len(self.listed)
        if committed:
            self.listed.append((self.step, self.current))
        self.reopen()

    @rule(at=st.integers(0, 8), done=st.booleans())
    def take_with_a_lost_answer(self, at: int, done: bool) -> None:
        self.step += 1
        self.store.fault = lambda: Unavailable("away")
        self.store.at, self.store.done = self.store.count + at, done
        try:
            self.take_now()
        except Unavailable:
            if len(list(self.chain_outside().points())) > len(self.listed):
                self.listed.append((self.step, self.current))
            self.step += 1
            self.take_now()
        self.store.at, self.store.fault = None, Died
        self.listed.append((self.step, self.current))

    def prune_now(self, last: int) -> None:
        plan = prune.plan(self.chain, Keep.parse(f"last {last}"), branches=["main"], mine=self.writer.lease)
        if plan is not None:
            self.writer.forget_packs(set(plan.packs))
            prune.execute(self.chain, plan)

    @rule(last=st.integers(1, 4))
    def prune(self, last: int) -> None:
        self.prune_now(last)
        self.listed = self.listed[-last:]
        assert len(list(self.chain.points())) == len(self.listed)

    @rule(last=st.integers(1, 3), at=st.integers(0, 12), done=st.booleans())
    def prune_and_die(self, last: int, at: int, done: bool) -> None:
        self.store.at, self.store.done = self.store.count + at, done
        with suppress(Died):
            self.prune_now(last)
        left = sum(1 for _ in self.chain_outside().points())
        assert min(last, len(self.listed)) <= left <= len(self.listed)
        self.listed = self.listed[len(self.listed) - left :]
        self.reopen()

    @precondition(lambda self: self.listed)
    @rule(where=st.integers(0, 2**32))
    def flip(self, where: int) -> None:
        """One bit anywhere: found, and nothing wrong comes back. (Then it is put right again.)"""
        rng = random.Random(where)
        entries = [entry for entry in self.inner.list() if entry.size_bytes]
        key = rng.choice([entry.key for entry in entries])
        good = bytes(self.inner.get(key))
        bad = bytearray(good)
        bit = rng.randrange(8 * len(bad))
        bad[bit // 8] ^= 1 << bit % 8
        idle = self.has_idle_bits(key)
        self.replace(key, bytes(bad))
        # A chain whose first object is damaged is not opened; this one is open.
        findings = verify(self.chain).findings
        assert idle or key in {one.key for one in findings}
        lost = {id for one in findings for id in one.snapshots}
        for point in self.chain.points():
            if point.snapshot is None:
                continue
            try:
                got, _ = restored(self.chain, point.snapshot)
            except (Damaged, Unsupported):
                assert point.snapshot.id in lost
                continue
            assert got == dict(self.listed)[point.snapshot.step]
        self.replace(key, good)

    def has_idle_bits(self, key: str) -> bool:
        """Whether an object is a pack with a zstd frame, some bits of which mean nothing."""
        if not key.startswith(keys.PACKS):
            return False
        data = bytes(self.inner.get(key))
        trailer = pack.decode_trailer(data[-pack.TRAILER_BYTES :], len(data))
        footer = pack.decode_tail(data[trailer.footer_offset :], len(data), key.rpartition("/")[2])
        return any(entry.encoding != Encoding.RAW for entry in footer.entries)

    def replace(self, key: str, data: bytes) -> None:
        self.inner.delete(key)
        assert self.inner.put(key, [data])

    # -- what must hold ------------------------------------------------------------------------------

    def chain_outside(self) -> Chain:
        """As another process sees it."""
        return Chain(self.inner)

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        chain = self.chain_outside()
        points = list(chain.points())
        assert [point.head.step for point in points if point.head] == [s for s, _ in reversed(self.listed)]
        for point, (_, wanted) in zip(points, reversed(self.listed), strict=True):
            assert point.snapshot is not None
            assert restored(chain, point.snapshot) == (wanted, [])
        report = verify(chain)
        assert report.findings == []
        assert report.whole == len(self.listed)


Histories.TestCase.settings = settings(
    max_examples=examples(60),
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
class TestHistories(Histories.TestCase):  # type: ignore[misc]
    @pytest.fixture(autouse=True)
    def _the_dead_are_dead(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lease, "_lives", lambda holder: False)
        monkeypatch.setattr(prune, "GRACE_S", -10.0)
