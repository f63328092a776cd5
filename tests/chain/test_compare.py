"""What differs between two snapshots, and that no more is read than what does."""

from __future__ import annotations

import math
import mmap
import random
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making import whole

from everstep.chain import compare as comparing
from everstep.chain.compare import Difference, LeafChange, compare
from everstep.chain.encoding import Always
from everstep.chain.figures import Amount, Figures
from everstep.chain.history import Chain, Snapshot
from everstep.chain.lease import Lease
from everstep.chain.writer import Captured, Facts, Writer
from everstep.errors import Damaged, NotFound
from everstep.format import keys, layout, values
from everstep.format.chunk import Encoding
from everstep.format.layout import item_bytes, lay_out
from everstep.format.manifest import StoredSlice
from everstep.format.values import Leaf
from everstep.store.base import Buffer
from everstep.store.local import LocalStore
from everstep.store.memory import MemoryStore
from examples import examples

GRID_BYTES = 4096
OWN_BYTES = 10_000
"""Leaves of this size have a region of their own here, so that small states have some of each sort."""


@pytest.fixture(autouse=True)
def small_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SMALL_BYTES", OWN_BYTES)
    monkeypatch.setattr(comparing, "AHEAD_BYTES", 3 * GRID_BYTES)
    monkeypatch.setattr(comparing, "NEAR_BYTES", 5 * GRID_BYTES)


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    data: bytes
    kin: str = "moving"
    alias: str | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


State = dict[str, Tensor]


def random_tensor(rng: random.Random, dtype: str, *shape: int, kin: str = "moving") -> Tensor:
    size = math.prod(shape) * item_bytes(dtype)
    data = bytes(rng.choices((0, 1), k=size)) if dtype == "bool" else rng.randbytes(size)
    return Tensor(dtype, shape, data, kin)


def floats(*numbers: float) -> Tensor:
    return Tensor("float32", (len(numbers),), np.array(numbers, "f4").tobytes())


def altered(tensor: Tensor, *elements: int) -> Tensor:
    """With one bit of these elements flipped, a low one of a number's last byte but one."""
    item = item_bytes(tensor.dtype)
    data = bytearray(tensor.data)
    for number in elements:
        data[number * item + max(item - 2, 0)] ^= 1
    return Tensor(tensor.dtype, tensor.shape, bytes(data), tensor.kin, tensor.alias)


class Series:
    """Snapshots of a chain, taken of states one after the other."""

    def __init__(
        self, store: Any = None, encoding: Encoding = Encoding.RAW, grid_bytes: int = GRID_BYTES
    ) -> None:
        self.chain = Chain.create(MemoryStore() if store is None else store, grid_bytes)
        self.writer = Writer(self.chain, Lease.take(self.chain.store), encodings=Always(encoding))
        self._arenas: list[memoryview] = []

    def take(self, state: State, tree: object = None, **facts: Any) -> Snapshot:
        slices = [whole(name, one.dtype, one.shape, one.kin, one.alias) for name, one in state.items()]
        made = lay_out(slices)
        arena = memoryview(mmap.mmap(-1, max(made.arena_bytes, mmap.PAGESIZE)))
        for (name, one), (region, offset) in zip(state.items(), made.places, strict=True):
            start = made.regions[region].offset + offset
            arena[start : start + len(one.data)] = state[one.alias or name].data
        self._arenas.append(arena)  # A base for differences is looked for where the parent's bytes were.
        return self.writer.write(
            Captured.whole(made, arena, values.encode(tree)), Facts(**{"step": 1, **facts})
        )

    def compare(self, before: State, after: State, **options: Any) -> Difference:
        one, other = self.take(before), self.take(after)
        return compare(self.chain, one, self.chain, other, **options)


def amount_of(before: Tensor, after: Tensor) -> Amount:
    figures = Figures(before.dtype)
    figures.add(memoryview(before.data), memoryview(after.data))
    return figures.amount(before.elements)


def by_name(found: Difference) -> dict[str, LeafChange]:
    return {one.name: one for one in found.leaves}


# -- figures -----------------------------------------------------------------------------------------------

DTYPES = ["float32", "bfloat16", "int64", "uint8", "complex64", "numpy:<U3", "float8_e4m3fn", "numpy:|S5"]
"""Elements of 12 and 5 bytes lie across the ends of chunks."""


@st.composite
def two_states(draw: st.DrawFn) -> tuple[State, State]:
    rng = random.Random(draw(st.integers(0, 2**16)))
    before: State = {}
    after: State = {}
    for number in range(draw(st.integers(1, 7))):
        name, dtype = f"leaf{number}", draw(st.sampled_from(DTYPES))
        size = draw(st.sampled_from([0, 1, 40, 3000, OWN_BYTES + 7000]))
        kin = draw(st.sampled_from(["moving", "buffer", "frozen"]))
        one = random_tensor(rng, dtype, size // item_bytes(dtype) or min(size, 1), kin=kin)
        fate = draw(st.sampled_from(["stays", "changes", "changes", "goes", "comes", "looks otherwise"]))
        if fate != "comes":
            before[name] = one
        if fate == "stays" or (fate == "changes" and not one.elements):
            after[name] = one
        elif fate == "changes":
            after[name] = altered(one, *rng.sample(range(one.elements), rng.randint(1, one.elements)))
        elif fate in ("comes", "looks otherwise"):
            after[name] = random_tensor(rng, dtype, one.elements + (fate != "comes"), kin=kin)
    if draw(st.booleans()):
        after = dict(reversed(after.items()))
    return before, after


@settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=examples(120),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    states=two_states(),
    encoding=st.sampled_from(Encoding),
    grid_bytes=st.sampled_from([None, GRID_BYTES, 2 * GRID_BYTES, 5000]),
)
def test_any_two_states(states: tuple[State, State], encoding: Encoding, grid_bytes: int | None) -> None:
    """In one chain, or in two with or without the same grid."""
    before, after = states
    series = Series(encoding=encoding)
    other = series if grid_bytes is None else Series(encoding=encoding, grid_bytes=grid_bytes)
    one, two = series.take(before), other.take(after)
    found = compare(series.chain, one, other.chain, two)
    expected: dict[str, tuple[str, Amount | None]] = {}
    for name in before | after:
        if name not in after:
            expected[name] = ("removed", None)
        elif name not in before:
            expected[name] = ("added", None)
        elif before[name].shape != after[name].shape:
            expected[name] = ("reshaped", None)
        elif before[name].data != after[name].data:
            expected[name] = ("changed", amount_of(before[name], after[name]))
    got = {name: (change.kind, change.amount) for name, change in by_name(found).items()}
    assert got.keys() == expected.keys()
    for name, (kind, amount) in expected.items():
        assert got[name][0] == kind
        assert_alike(got[name][1], amount)
    assert found.identical or found.same == len(before) - sum(
        kind != "added" for kind, _ in expected.values()
    )
    assert found.identical == (one.record.state == two.record.state)
    unread = compare(series.chain, one, other.chain, two, values=False)
    certain = {name for name, (kind, _) in expected.items() if kind != "changed"}
    assert by_name(unread).keys() >= expected.keys()  # It may name more, and misses none.
    for name, change in by_name(unread).items():
        wanted = {expected[name][0]} if name in certain else {"changed", "may have changed"}
        assert change.kind in wanted
        assert change.kind != "changed" or name in expected


def assert_alike(one: Amount | None, other: Amount | None) -> None:
    """Norms are summed up in another order."""
    if one is None or other is None:
        assert one is other
        return
    exact = ("elements", "changed", "max_abs", "nans", "infs")
    assert [getattr(one, name) for name in exact] == [getattr(other, name) for name in exact]
    for name in ("norm_before", "norm_change"):
        wanted = getattr(other, name)
        assert getattr(one, name) == (None if wanted is None else pytest.approx(wanted, rel=1e-9))


def test_what_changed_most_comes_first() -> None:
    rng = random.Random(3)
    still = random_tensor(rng, "uint8", 20_000, kin="frozen")
    before = {
        "a/little": floats(1, 1, 1), "a/much": floats(1, 1, 1), "a/broken": floats(1, 1, 1),
        "b/gone": floats(1), "b/cast": floats(1), "still": still,
    }  # fmt: skip
    after = {
        "a/little": floats(1, 1, 1.25), "a/much": floats(3, 1, 1), "a/broken": floats(1, 1, math.nan),
        "b/new": floats(1), "b/cast": Tensor("bfloat16", (1,), b"\x80\x3f"), "still": still,
    }  # fmt: skip
    found = Series().compare(before, after)
    assert [(one.name, one.kind) for one in found.leaves] == [
        ("b/cast", "retyped"), ("b/gone", "removed"), ("b/new", "added"),
        ("a/broken", "changed"), ("a/much", "changed"), ("a/little", "changed"),
    ]  # fmt: skip
    assert found.same == 1
    little = by_name(found)["a/little"].amount
    assert little is not None
    assert (little.relative, little.max_abs, little.share) == (0.25, 0.25, 1 / 3)
    assert by_name(found)["b/cast"].dtype == ("float32", "bfloat16")


def test_one_element_is_shown_as_it_was_and_is() -> None:
    found = Series().compare({"step": Tensor("float32", (), np.float32(20).tobytes())},
                             {"step": Tensor("float32", (), np.float32(40).tobytes())})  # fmt: skip
    (step,) = found.leaves
    assert (step.before, step.after) == (20.0, 40.0)


def test_tied_leaves_are_read_once_and_both_named() -> None:
    rng = random.Random(5)
    one = random_tensor(rng, "float32", 5000)

    def state(tensor: Tensor) -> State:
        return {"embed": tensor, "head": Tensor(tensor.dtype, tensor.shape, tensor.data, alias="embed")}

    found = Series().compare(state(one), state(altered(one, *range(5000))))
    embed, head = by_name(found)["embed"], by_name(found)["head"]
    assert embed.amount == head.amount
    assert (embed.tied_to, head.tied_to) == ("", "embed")
    assert found.read_bytes == 20_000


# -- what is read ------------------------------------------------------------------------------------------


class Counting(LocalStore):
    """Notes what is read of packs."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.others: list[str] = []
        self.spans: list[int] = []

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        if not key.startswith(keys.PACKS):
            self.others.append(key)
        return super().get(key, start, size_bytes)

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        self.spans.append(sum(map(len, buffers)))
        return super().read_into(key, start, buffers)


@pytest.fixture
def counting(tmp_path: Path) -> Counting:
    return Counting(tmp_path)


def sparse(rng: random.Random) -> tuple[State, State]:
    """A leaf of 50 chunks, of which three differ."""
    one = random_tensor(rng, "float32", 50 * GRID_BYTES // 4)
    per_chunk = GRID_BYTES // 4
    return {"embed": one}, {"embed": altered(one, 3 * per_chunk, 4 * per_chunk + 9, 40 * per_chunk)}


def test_only_chunks_that_differ_are_read(counting: Counting) -> None:
    before, after = sparse(random.Random(1))
    told: list[tuple[int, int]] = []
    found = Series(counting).compare(before, after, on_progress=lambda *at: told.append(at))
    assert sum(counting.spans) == 2 * 3 * GRID_BYTES
    assert found.read_bytes == 3 * GRID_BYTES
    assert told == [(done * GRID_BYTES, 3 * GRID_BYTES) for done in (1, 2, 3)]
    (embed,) = found.leaves
    assert embed.amount is not None
    assert_alike(embed.amount, amount_of(before["embed"], after["embed"]))
    assert embed.amount.changed == 3


def test_names_alone_read_no_pack(counting: Counting) -> None:
    before, after = sparse(random.Random(1))
    before["small"] = after["small"] = floats(1, 2)
    before["other"], after["other"] = floats(1), floats(2)
    found = Series(counting).compare(before, after, values=False)
    assert counting.spans == []
    assert found.read_bytes == 0
    assert {one.name: one.kind for one in found.leaves} == {
        "embed": "changed", "small": "may have changed", "other": "may have changed"
    }  # fmt: skip


def test_of_identical_states_nothing_is_read(counting: Counting) -> None:
    series = Series(counting)
    state = {"a": floats(1, 2, 3)}
    one = series.take(state, step=1, metrics={"loss": 0.5}, environment={"torch": "2.6"})
    two = series.take(state, step=2, metrics={"loss": 0.25}, environment={"torch": "2.7"})
    counting.others.clear()
    found = compare(series.chain, one, series.chain, two)
    assert (counting.others, counting.spans) == ([], [])
    assert found.identical
    assert [(one.path, one.before, one.after) for one in found.metrics] == [("loss", 0.5, 0.25)]
    assert [str(one) for one in found.environment] == ["torch 2.6 -> 2.7"]


def test_small_leaves_that_share_chunks_have_them_read_once(counting: Counting) -> None:
    rng = random.Random(2)
    before = {f"leaf{number}": random_tensor(rng, "float32", 100) for number in range(200)}
    after = {name: altered(one, 5) for name, one in before.items()}
    found = Series(counting).compare(before, after)
    assert len(found.leaves) == 200
    manifest_bytes = 200 * 448
    assert sum(counting.spans) <= 2 * (manifest_bytes + GRID_BYTES)


def test_leaves_in_another_order_are_read_hardly_more_often(counting: Counting) -> None:
    """Some became frozen, and lie elsewhere: two streams run through the chunks of the other side."""
    rng = random.Random(2)
    before = {f"leaf{number}": random_tensor(rng, "float32", 100) for number in range(200)}
    after = {
        name: Tensor(one.dtype, one.shape, altered(one, 1).data, "frozen" if number % 2 else "moving")
        for number, (name, one) in enumerate(before.items())
    }
    found = Series(counting).compare(before, after)
    assert {name: change.amount and change.amount.changed for name, change in by_name(found).items()} == (
        dict.fromkeys(before, 1)
    )
    assert sum(counting.spans) <= 2 * 2 * 200 * 448


def test_a_chunk_that_is_wanted_again_does_not_go(counting: Counting) -> None:
    """Others come and go between the leaves that share it."""
    rng = random.Random(2)
    before: State = {}
    after: State = {}
    for number in range(12):
        before[f"often{number}"] = random_tensor(rng, "uint8", 64)
        before[f"once{number}"] = random_tensor(rng, "uint8", 2 * GRID_BYTES - 64)
    for name, one in before.items():
        kin = "buffer" if name.startswith("often") else "moving"
        after[name] = Tensor(one.dtype, one.shape, altered(one, 7).data, kin)
    found = Series(counting).compare(before, after)
    assert len(found.leaves) == 24
    assert sum(counting.spans) <= 2 * 12 * 2 * GRID_BYTES + 3 * GRID_BYTES


class Counted(mmap.mmap):
    """Memory that says how much of it there is."""

    live = peak = 0

    def __new__(cls, *arguments: Any, **named: Any) -> Counted:
        made = super().__new__(cls, *arguments, **named)
        Counted.live += len(made)
        Counted.peak = max(Counted.peak, Counted.live)
        return made

    def __del__(self) -> None:
        Counted.live -= len(self)


@pytest.mark.slow
def test_memory_does_not_grow_with_a_leaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = 64 * 1024
    monkeypatch.setattr(comparing, "AHEAD_BYTES", 4 * grid)
    monkeypatch.setattr(comparing, "NEAR_BYTES", 6 * grid)
    rng = random.Random(1)
    large = random_tensor(rng, "bfloat16", 12_000_000)
    series = Series(LocalStore(tmp_path), grid_bytes=grid)
    one = series.take({"large": large})
    two = series.take({"large": Tensor(large.dtype, large.shape, large.data[::-1])})
    series._arenas.clear()
    monkeypatch.setattr(mmap, "mmap", Counted)
    Counted.live = Counted.peak = 0
    tracemalloc.start()
    try:
        found = compare(series.chain, one, series.chain, two)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.read_bytes == 24_000_000
    assert 0 < Counted.peak < 12_000_000
    assert peak < 24_000_000  # What is made of a block of elements, and manifests.


# -- encodings and damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", Encoding)
def test_encoded_chunks(encoding: Encoding) -> None:
    rng = random.Random(7)
    series = Series(encoding=encoding)
    states: list[State] = [
        {"w": Tensor("float32", (20_000,), np.linspace(0, 1, 20_000, dtype="f4").tobytes())}
    ]
    for _ in range(3):
        states.append({"w": altered(states[-1]["w"], *rng.sample(range(20_000), 2000))})
    snapshots = [series.take(one) for one in states]
    used = {place.encoding for one in snapshots for place in series.chain.manifest(one).places}
    assert encoding in used
    found = compare(series.chain, snapshots[0], series.chain, snapshots[3])
    assert_alike(found.leaves[0].amount, amount_of(states[0]["w"], states[3]["w"]))


def test_damage_names_the_leaf(tmp_path: Path) -> None:
    rng = random.Random(8)
    series = Series(LocalStore(tmp_path))
    before = {"left": random_tensor(rng, "uint8", 20_000), "right": random_tensor(rng, "uint8", 20_000)}
    one = series.take(before)
    two = series.take({name: altered(tensor, *range(0, 20_000, 100)) for name, tensor in before.items()})
    manifest = series.chain.manifest(two)
    leaf = manifest.by_name["right"]
    chunk = manifest.regions[leaf.slices[0].region].chunks[2]
    place = manifest.places[chunk]
    path = tmp_path / keys.pack(place.pack)
    data = bytearray(path.read_bytes())
    data[place.offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged, match=f"leaf right of snapshot {two.short} cannot be read: chunk ") as caught:
        compare(series.chain, one, series.chain, two)
    assert caught.value.key == keys.pack(place.pack)
    path.unlink()
    with pytest.raises(Damaged, match=r"leaf (left|right) of snapshot .* is missing"):
        compare(series.chain, one, series.chain, two)
    compare(series.chain, one, series.chain, two, values=False)


def test_damage_that_touches_nothing_is_told(tmp_path: Path) -> None:
    series = Series(LocalStore(tmp_path))
    one, two = series.take({"a": floats(1, 2)}), series.take({"a": floats(1, 3)})
    (name,) = series.chain.manifest(one).packs
    path = tmp_path / keys.pack(name)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = compare(series.chain, one, series.chain, two)
    assert found.leaves[0].amount is not None
    assert len(found.remarks) == 1
    assert keys.pack(name) in found.remarks[0]


def test_a_snapshot_that_is_pruned_meanwhile_is_not_called_damaged() -> None:
    store = MemoryStore()
    series = Series(store)
    one, two = series.take({"a": floats(1, 2)}), series.take({"a": floats(1, 3)})
    manifest = series.chain.manifest(one)

    class Pruned(Chain):
        def manifest(self, snapshot: Snapshot) -> Any:
            found = super().manifest(snapshot)
            if snapshot.id == one.id:
                store.delete(keys.snapshot(one.id))
                store.delete(keys.pack(next(iter(manifest.packs))))
            return found

    chain = Pruned(store)
    with pytest.raises(NotFound, match=f"snapshot {one.short} of memory://memory was pruned"):
        compare(chain, one, chain, two)


def test_a_leaf_of_several_slices_is_compared_slice_by_slice() -> None:
    series = Series()
    one, two = series.take({"a": floats(1, 2, 3, 4)}), series.take({"a": floats(1, 2, 3, 5)})

    class Spread(Chain):
        def manifest(self, snapshot: Snapshot) -> Any:
            found = super().manifest(snapshot)
            (leaf,) = found.leaves
            halves = StoredSlice((0,), (2,), 0, 0), StoredSlice((2,), (2,), 0, 8)
            return msgspec.structs.replace(found, leaves=(msgspec.structs.replace(leaf, slices=halves),))

    for chains in ((Spread, Spread), (Spread, Chain), (Chain, Spread)):
        before, after = (kind(series.chain.store) for kind in chains)
        (leaf,) = compare(before, one, after, two).leaves
        assert leaf.amount is not None
        assert (leaf.kind, leaf.amount.changed, leaf.amount.max_abs) == ("changed", 1, 1.0)
        assert compare(before, one, after, one).identical


# -- values ------------------------------------------------------------------------------------------------


def a_tree(lr: float, drawn: int, delivered: int) -> dict[str, Any]:
    return {
        "objects": {"optimizer": {"param_groups": [{"lr": lr}], "state": {0: {"m": Leaf("optimizer/m")}}}},
        "run": {
            "progress": {"step": delivered},
            "rng": {"python": (3, Leaf("run/rng/python/1"), None), "numpy": {"pos": drawn}},
            "data": {
                "kind": "map", "epoch": 0, "delivered": delivered, "mark": b"%d" % delivered,
                "carried": {"generators": Leaf("run/data/carried/generators")},
            },
            "config": {"lr": lr},
        },
    }  # fmt: skip


def test_values_are_told_and_states_summed_up() -> None:
    series = Series()

    def state(seed: int) -> State:
        rng = random.Random(seed)
        names = ("optimizer/m", "run/rng/python/1", "run/data/carried/generators")
        return {name: random_tensor(rng, "uint8", 30) for name in names}

    one = series.take(state(1), a_tree(0.1, 4, 10))
    two = series.take(state(2), a_tree(0.2, 5, 20))
    found = compare(series.chain, one, series.chain, two)
    assert {change.path: (change.before, change.after) for change in found.values} == {
        "optimizer/param_groups/0/lr": (0.1, 0.2),
        "run/progress/step": (10, 20),
        "run/data/delivered": (10, 20),
        "run/config/lr": (0.1, 0.2),
    }
    assert found.states == ("run/data", "run/rng/numpy", "run/rng/python")
    assert [change.name for change in found.leaves] == ["optimizer/m"]
    unread = compare(series.chain, one, series.chain, two, values=False)
    assert unread.values == found.values
    assert {change.kind for change in unread.leaves} == {"may have changed"}
