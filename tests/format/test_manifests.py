"""Manifests: they come back as they were, and contradict neither themselves nor their bounds."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import zstandard
from format_vectors import a_manifest
from hostile import bit_flips, is_refused, nested, same_every_time, truncations
from hypothesis import given
from hypothesis import strategies as st

from everstep.errors import Damaged, Unsupported
from everstep.format import chunk, manifest, values
from everstep.format.layout import item_bytes
from everstep.format.manifest import (
    MAX_RANKS,
    Manifest,
    Place,
    StoredChunk,
    StoredLeaf,
    StoredRegion,
    StoredSlice,
)

GRID_BYTES = 4096
PACK = chunk.digest(b"a pack")


def compressed(text: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(text)


def as_json(made: Manifest) -> Any:
    return json.loads(msgspec.json.encode(made))


def from_json(tree: Any) -> Manifest:
    return manifest.decode(compressed(json.dumps(tree).encode()))


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
dtypes = st.sampled_from(["float32", "bfloat16", "bool", "complex128", "numpy:<U3", "numpy:|S5", "numpy:>i2"])


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Leaves in regions of their own or shared, chunks in several packs, some stored against a base."""
    leaves: list[StoredLeaf] = []
    sizes: list[int] = []
    for name in draw(st.lists(names, max_size=6, unique=True)):
        dtype, shape = draw(dtypes), draw(shapes)
        size = item_bytes(dtype)
        for extent in shape:
            size *= extent
        shared = draw(st.booleans()) and bool(sizes)
        if not shared:
            sizes.append(0)
        offset = sizes[-1]
        sizes[-1] += size + draw(st.integers(0, 64))
        whole = StoredSlice((0,) * len(shape), shape, len(sizes) - 1, offset)
        leaves.append(StoredLeaf(name, dtype, shape, (whole,)))
    chunks: list[StoredChunk] = []
    regions = []
    for size in sizes:
        pieces = chunk.grid(size, GRID_BYTES)
        regions.append(StoredRegion(size, tuple(range(len(chunks), len(chunks) + len(pieces)))))
        chunks += [StoredChunk(chunk.digest(str((len(chunks), at)).encode()), piece) for at, piece in pieces]
    places, packs = [], {}
    for number in range(len(chunks)):
        pack = chunk.digest(str(draw(st.integers(0, 2))).encode())
        offset, stored = 4096 * draw(st.integers(0, 1000)), draw(st.integers(1, 9000))
        packs[pack] = max(packs.get(pack, 0), offset + stored)
        base = chunks[number - 1].digest if number % 5 and draw(st.booleans()) else ""
        places.append(Place(pack, offset, stored, draw(st.integers(0, 255)), base))
    return Manifest(
        format=1,
        grid_bytes=GRID_BYTES,
        leaves=tuple(leaves),
        regions=tuple(regions),
        chunks=tuple(chunks),
        places=tuple(places),
        packs=packs,
        values=draw(st.binary(max_size=200)),
        state=chunk.digest(b"state"),
        salt=draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=20)),
    )


@same_every_time
@given(manifests())
def test_every_manifest_comes_back(made: Manifest) -> None:
    stored = manifest.encode(made)
    assert manifest.decode(stored) == made
    assert manifest.encode(manifest.decode(stored)) == stored


def test_the_tree_is_decoded() -> None:
    assert a_manifest().tree == values.decode(a_manifest().values)
    assert manifest.decode(manifest.encode(a_manifest())).tree["run"] == {"step": 7}


def test_white_space_order_and_unknown_fields_mean_nothing() -> None:
    tree = as_json(a_manifest())
    tree = {"newer": {"nested": [1]}, **dict(reversed(tree.items())), "also": None}
    for rows in ("leaves", "regions", "chunks", "places"):
        tree[rows] = [[*row, "a later item", {"more": 1}] for row in tree[rows]]
    stored = compressed(json.dumps(tree, indent=3).encode())
    assert manifest.decode(stored) == a_manifest()


def test_defaults_may_be_left_out() -> None:
    tree = as_json(a_manifest())
    tree["places"] = [row[:3] for row in tree["places"]]
    assert from_json(tree) == a_manifest()
    assert from_json({**tree, "rank": 0, "ranks": 1, "salt": ""}) == a_manifest()


# -- versions and ranks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [4, 5, 1000, 2**62, 2**100])
def test_a_newer_format_is_unsupported(number: int) -> None:
    """Whatever else is in it."""
    for tree in (
        {**as_json(a_manifest()), "format": number},
        {"format": number},
        {"format": number, "leaves": 7},
    ):
        with pytest.raises(Unsupported, match="pip install"):
            from_json(tree)


@pytest.mark.parametrize("number", [0, -1, -(2**62)])
def test_no_format(number: int) -> None:
    with pytest.raises(Damaged):
        from_json({**as_json(a_manifest()), "format": number})


@pytest.mark.parametrize("changed", [{"ranks": 2}, {"rank": 1, "ranks": 2}, {"rank": 1}])
def test_below_format_3_there_is_one_rank(changed: dict[str, int]) -> None:
    for number in (1, 2):
        with pytest.raises(Damaged, match="rank"):
            from_json({**as_json(a_manifest()), **changed, "format": number})


def test_a_manifest_of_one_of_several_ranks() -> None:
    read = from_json({**as_json(a_manifest()), "format": 3, "rank": 1, "ranks": 2})
    assert (read.rank, read.ranks) == (1, 2)
    for changed in ({"rank": 2, "ranks": 2}, {"rank": 1}, {"ranks": MAX_RANKS + 1}, {"ranks": 0}):
        with pytest.raises(Damaged):
            from_json({**as_json(a_manifest()), "format": 3, "ranks": 1, **changed})


def test_slices_of_a_leaf() -> None:
    tree = {**as_json(a_manifest()), "format": 3}
    (leaf, *others) = tree["leaves"]
    (name, dtype, shape, [[at, extent, region, offset]]) = leaf
    first = [[0, *at[1:]], [1, *extent[1:]], region, offset]
    second = [[1, *at[1:]], [1, *extent[1:]], region, offset]

    def sliced(slices: list[Any], number: int = 3, name: str = name) -> Any:
        return from_json({**tree, "format": number, "leaves": [[name, dtype, shape, slices], *others]})

    assert sliced([first, second]).leaves[0].whole is None
    assert sliced([first]).leaves[0].slices[0].extent[0] == 1, "the others may be another rank's"
    for wrong in ([], [second, first], [first, first]):
        with pytest.raises(Damaged):
            sliced(wrong)
    for number in (1, 2):
        with pytest.raises(Damaged, match="slices"):
            sliced([first, second], number)
    assert sliced([first], name="~rank/0/generator")
    with pytest.raises(Damaged, match="of rank 0"):
        sliced([first], name="~rank/1/generator")


def test_an_unknown_dtype_is_unsupported() -> None:
    tree = as_json(a_manifest())
    tree["leaves"][0][1] = "float4_e2m1fn_x2"
    with pytest.raises(Unsupported, match="float4"):
        from_json(tree)


# -- contradictions ---------------------------------------------------------------------------------------


def set_at(*path: Any) -> Callable[[Any], None]:
    """Sets the last of `path` at the place that the others lead to."""

    def change(tree: Any) -> None:
        for step in path[:-2]:
            tree = tree[step]
        tree[path[-2]] = path[-1]

    return change


def base_cycle(tree: Any) -> None:
    for place, other in zip(tree["places"], reversed(tree["chunks"]), strict=True):
        place[4] = other[0]


def base_chain(depth: int) -> Callable[[Any], None]:
    def change(tree: Any) -> None:
        tree["chunks"] += [[chunk.digest(bytes([number])), 8] for number in range(depth)]
        first = tree["chunks"][2][0] if depth else ""
        tree["places"][1][4] = first
        for number in range(depth):
            base = tree["chunks"][3 + number][0] if number < depth - 1 else ""
            tree["places"].append([next(iter(tree["packs"])), 0, 8, 0, base])

    return change


CONTRADICTIONS: dict[str, Callable[[Any], None]] = {
    "a chunk without a place": lambda tree: tree["places"].pop(),
    "a place without a chunk": lambda tree: tree["places"].append(tree["places"][0]),
    "a chunk twice": set_at("chunks", 1, 0, as_json(a_manifest())["chunks"][0][0]),
    "a leaf twice": set_at("leaves", 1, 0, "model/weight"),
    "a leaf without a name": set_at("leaves", 1, 0, ""),
    "an unknown pack": set_at("places", 0, 0, "ab" * 32),
    "no packs": set_at("packs", {}),
    "past the end of the pack": set_at("places", 1, 2, 8193),
    "far past the end of the pack": set_at("places", 1, 1, 2**62),
    "a place that strays from the alignment": set_at("places", 1, 1, 64),
    "nothing stored": set_at("places", 1, 2, 0),
    "a negative offset": set_at("places", 1, 1, -4096),
    "an encoding that is no byte": set_at("places", 0, 3, 256),
    "an unknown base": set_at("places", 0, 4, "ab" * 32),
    "a base that is no digest": set_at("places", 0, 4, "../x"),
    "a chunk that builds on itself": set_at("places", 0, 4, as_json(a_manifest())["chunks"][0][0]),
    "chunks that build on each other": base_cycle,
    "chunks that build on nine": base_chain(9),
    "a chunk that is no number": set_at("regions", 0, 1, 0, "0"),
    "a chunk that is not there": set_at("regions", 0, 1, 0, 2),
    "a chunk before the first": set_at("regions", 0, 1, 0, -1),
    "a region with too few chunks": set_at("regions", 0, 1, []),
    "a region with too many chunks": set_at("regions", 0, 1, [0, 0]),
    "a region larger than its chunks": set_at("regions", 0, 0, 33),
    "a region smaller than its chunks": set_at("regions", 0, 0, 31),
    "a region of a huge size": set_at("regions", 0, 0, 2**62),
    "chunks that stray from the grid": set_at("chunks", 0, 1, 31),
    "a chunk of no size": set_at("chunks", 0, 1, 0),
    "a chunk larger than may be": set_at("chunks", 0, 1, chunk.MAX_CHUNK_BYTES + 1),
    "a slice of a region that is not there": set_at("leaves", 0, 3, 0, 2, 2),
    "a slice past its region": set_at("leaves", 0, 3, 0, 3, 4),
    "a slice far past its region": set_at("leaves", 0, 3, 0, 3, 2**62),
    "a slice before its leaf": set_at("leaves", 0, 3, 0, 0, [-1, 0]),
    "a slice past its leaf": set_at("leaves", 0, 3, 0, 0, [1, 0]),
    "a slice of other dimensions": set_at("leaves", 0, 3, 0, 0, [0]),
    "a leaf of other dimensions": set_at("leaves", 0, 2, [8]),
    "a leaf of a huge shape": lambda tree: (
        set_at("leaves", 0, 2, [2**62] * 64)(tree),
        set_at("leaves", 0, 3, 0, 0, [0] * 64)(tree),
        set_at("leaves", 0, 3, 0, 1, [2**62] * 64)(tree),
    ),
    "too many dimensions": lambda tree: (
        set_at("leaves", 0, 2, [1] * 65)(tree),
        set_at("leaves", 0, 3, 0, 0, [0] * 65)(tree),
        set_at("leaves", 0, 3, 0, 1, [1] * 65)(tree),
    ),
    "a dtype that fills more": set_at("leaves", 0, 1, "float64"),
    "a name longer than may be": set_at("leaves", 0, 0, "x" * 4097),
    "a dtype longer than may be": set_at("leaves", 0, 1, "x" * 65),
    "a salt longer than may be": set_at("salt", "x" * 65),
    "a grid of nothing": set_at("grid_bytes", 0),
    "a grid larger than a chunk may be": set_at("grid_bytes", chunk.MAX_CHUNK_BYTES + 1),
    "a grid smaller than a block": set_at("grid_bytes", 4095),
    "upper-case digits": set_at("state", "AB" * 32),
    "a digest with a line feed": set_at("state", "ab" * 32 + "\n"),
    "a short digest": set_at("state", "ab" * 31),
    "values that are no base64": set_at("values", "not base64!"),
    "values without padding": set_at("values", "AAA"),
    "values as numbers": set_at("values", [1, 2]),
    "no values": lambda tree: tree.pop("values"),
    "no format": lambda tree: tree.pop("format"),
    "a fraction": set_at("regions", 0, 0, 32.5),
    "a number as a text": set_at("regions", 0, 0, "32"),
    "a pack's size as a text": lambda tree: tree["packs"].update(dict.fromkeys(tree["packs"], "12288")),
    "a pack without a digest": lambda tree: tree["packs"].update({"name": 1}),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_contradictions_are_damage(what: str) -> None:
    tree = as_json(a_manifest())
    assert from_json(tree) == a_manifest()
    CONTRADICTIONS[what](tree)
    with pytest.raises(Damaged):
        from_json(tree)


def test_eight_chunks_below_a_chunk_are_allowed() -> None:
    tree = as_json(a_manifest())
    base_chain(8)(tree)
    assert len(from_json(tree).chunks) == 10


# -- what could not be read back is not written -----------------------------------------------------------


@pytest.mark.parametrize("name", ["x" * 4096, "ü" * 4096, "🚆" * 4096])
def test_the_longest_name(name: str) -> None:
    made = msgspec.structs.replace(
        a_manifest(), leaves=(StoredLeaf(name, "float32", (0,), (StoredSlice((0,), (0,), 0, 0),)),)
    )
    assert manifest.decode(manifest.encode(made)) == made


@pytest.mark.parametrize(
    "leaf",
    [
        StoredLeaf("x" * 4097, "float32", (), ()),
        StoredLeaf("", "float32", (), ()),
        StoredLeaf("x", "int8", (1,) * 65, ()),
    ],
    ids=["long name", "no name", "dimensions"],
)
def test_leaves_that_could_not_be_read(leaf: StoredLeaf) -> None:
    with pytest.raises(Unsupported, match="cannot be stored"):
        manifest.encode(msgspec.structs.replace(a_manifest(), leaves=(leaf,)))


@pytest.mark.parametrize("bound", ["MAX_MANIFEST_BYTES", "MAX_STORED_BYTES", "MAX_COMMAS"])
def test_manifests_that_are_too_large(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, bound, 20)
    with pytest.raises(Unsupported, match="larger than"):
        manifest.encode(a_manifest())


# -- hostile bytes ----------------------------------------------------------------------------------------

STORED = manifest.encode(a_manifest())
TEXT = msgspec.json.encode(a_manifest())


def test_every_truncation_is_refused() -> None:
    assert all(is_refused(manifest.decode, short) for short in truncations(STORED))
    assert all(is_refused(manifest.decode, compressed(short)) for short in truncations(TEXT))


def test_every_flipped_bit_of_the_frame() -> None:
    """The manifest's name is a digest: no flip gets this far. Here it must only do no harm."""
    for flipped in bit_flips(STORED):
        is_refused(manifest.decode, flipped)


def test_every_flipped_bit_of_the_text_is_refused_or_another_manifest() -> None:
    refused = 0
    for flipped in bit_flips(TEXT):
        if is_refused(manifest.decode_text, flipped):
            refused += 1
    assert refused > 5 * len(TEXT)


@pytest.mark.parametrize(
    "text", [b"", b"null", b"[]", b"7", b'"format"', b"{}", b'{"format":1}', b"{", b"\xff\xfe{}"]
)
def test_no_manifests(text: bytes) -> None:
    with pytest.raises(Damaged):
        manifest.decode(compressed(text))


@pytest.mark.parametrize(
    "before", [b'{"format":1,"x":', b'{"format":1,"leaves":', b'{"x":', b"", b'{"format":']
)
@pytest.mark.parametrize("deep", [nested("[", "]"), nested('{"a":', "}", "1"), nested("[", "")], ids=range(3))
def test_nesting_without_end(before: bytes, deep: bytes) -> None:
    for after in (b"", b"}", b',"format":1}'):
        with pytest.raises(Damaged):
            manifest.decode(compressed(before + deep + after))


def test_bytes_that_are_no_frame() -> None:
    for data in (b"", b"\x28\xb5\x2f\xfd", TEXT, bytes(1000)):
        with pytest.raises(Damaged):
            manifest.decode(data)


@pytest.mark.parametrize(
    "content_bytes", [manifest.MAX_MANIFEST_BYTES + 1, 1 << 40, (1 << 64) - 3, (1 << 64) - 1]
)
def test_a_claimed_size_gets_no_memory(content_bytes: int) -> None:
    frame = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", content_bytes) + b"\x01\0\0"
    tracemalloc.start()
    try:
        with pytest.raises(Damaged):
            manifest.decode(frame)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_more_bytes_than_the_bound_are_not_even_looked_at() -> None:
    class Long(bytes):
        def __len__(self) -> int:
            return manifest.MAX_STORED_BYTES + 1

    with pytest.raises(Damaged, match="larger than"):
        manifest.decode(Long(STORED))


def test_a_small_frame_of_many_items_gets_no_memory() -> None:
    """A few kilobytes stand for hundreds of megabytes of text, and that for gigabytes of objects."""
    rows = b"[0,[]]," * (manifest.MAX_COMMAS // 2 + 1)
    bomb = compressed(TEXT.replace(b'"regions":[', b'"regions":[' + rows))
    assert len(bomb) < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(Damaged, match="commas"):
            manifest.decode(bomb)
        assert tracemalloc.get_traced_memory()[1] < len(rows) + 1_000_000
    finally:
        tracemalloc.stop()


def test_a_large_manifest_takes_no_time() -> None:
    """A hundred thousand chunks, as of a state of a terabyte: far below a minute."""
    count = 100_000
    made = Manifest(
        format=1,
        grid_bytes=4096,
        leaves=(StoredLeaf("x", "uint8", (4096 * count,), (StoredSlice((0,), (4096 * count,), 0, 0),)),),
        regions=(StoredRegion(4096 * count, tuple(range(count))),),
        chunks=tuple(StoredChunk(chunk.digest(str(number).encode()), 4096) for number in range(count)),
        places=tuple(Place(PACK, 4096 * number, 4096) for number in range(count)),
        packs={PACK: 4096 * count},
        values=b"\0",
        state=PACK,
    )
    assert manifest.decode(manifest.encode(made)) == made


# -- state digest -----------------------------------------------------------------------------------------

LEAVES: list[tuple[str, str, tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...], list[str]]]]] = [
    ("b", "float32", (2, 3), [((0, 0), (2, 3), [PACK])]),
    ("a", "int8", (), [((), (), [chunk.digest(b"x")])]),
    ("ü", "bool", (0,), [((0,), (0,), [])]),
]


def test_the_order_of_leaves_means_nothing() -> None:
    one = manifest.state_digest(LEAVES, b"\0")
    assert manifest.state_digest(LEAVES[::-1], b"\0") == one
    assert manifest.state_digest([LEAVES[1], LEAVES[0], LEAVES[2]], b"\0") == one


def test_everything_else_is_in_the_state_digest() -> None:
    changes: list[Callable[[list[Any]], None]] = [
        lambda leaf: leaf.__setitem__(0, "c"),
        lambda leaf: leaf.__setitem__(1, "int32"),
        lambda leaf: leaf.__setitem__(2, (3, 2)),
        lambda leaf: leaf.__setitem__(2, (6,)),
        lambda leaf: leaf.__setitem__(3, []),
        lambda leaf: leaf.__setitem__(3, [((0, 1), (2, 3), [PACK])]),
        lambda leaf: leaf.__setitem__(3, [((0, 0), (2, 2), [PACK])]),
        lambda leaf: leaf.__setitem__(3, [((0, 0), (2, 3), [chunk.digest(b"y")])]),
        lambda leaf: leaf.__setitem__(3, [((0, 0), (2, 3), [PACK, PACK])]),
    ]
    found = {manifest.state_digest(LEAVES, b"\0"), manifest.state_digest(LEAVES, b"\x01")}
    found.add(manifest.state_digest(LEAVES[:2], b"\0"))
    for change in changes:
        leaf: list[Any] = list(LEAVES[0])
        change(leaf)
        found.add(manifest.state_digest([tuple(leaf), *LEAVES[1:]], b"\0"))  # type: ignore[list-item]
    assert len(found) == len(changes) + 3
