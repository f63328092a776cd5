"""The manifest: what one rank's part of a snapshot consists of and where its chunks lie."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import cached_property
from operator import add, ge
from typing import Annotated, TypeAlias, TypeVar

import msgspec
import zstandard
from blake3 import blake3

from everstep.errors import Damaged, Unsupported
from everstep.format.chunk import (
    ALIGNMENT_BYTES,
    MAX_CHUNK_BYTES,
    MAX_STORED_CHUNK_BYTES,
    MAX_XOR_DEPTH,
    Buffer,
    Encoding,
    decompress,
)
from everstep.format.layout import Box, item_bytes
from everstep.format.values import Value, varint
from everstep.format.values import decode as decode_values

FORMAT = 1
"""What is written, unless it says what a reader of this format could misread."""

RELOCATED, SEVERAL = 2, 3
"""What has relocation records, and the fences that go before them; what has several ranks, or slices."""

NEWEST_FORMAT = SEVERAL
"""What is read."""

OWN = "~rank/"
"""Names of leaves that only one rank can make sense of begin so, and with its number."""

OBJECTS, RUN = "objects", "run"
"""The two parts of the values tree: what the user handed over by name, and what the run itself keeps."""

CONFIG = "config"
"""In the latter: plain values of the user's own that no step depends on, kept to be compared."""

FILES = "files"
"""In the same: small files that came along with an imported state, their bytes by their names."""

MAX_STORED_BYTES = 64 * 1024 * 1024
MAX_MANIFEST_BYTES = 512 * 1024 * 1024
MAX_COMMAS = 1 << 24
"""In a manifest's JSON. Each item takes memory when it is decoded, up to forty times what its text takes:
this bounds them before they are."""

MAX_DIMENSIONS = 64
MAX_NAME_CHARACTERS = 4096
MAX_DTYPE_CHARACTERS = 64
MAX_SALT_CHARACTERS = 64
MAX_COUNT = 1 << 62
MAX_RANKS = 1 << 15

Digest: TypeAlias = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$", max_length=64)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
Shape: TypeAlias = Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]


# Rows hold no rings, and a joined manifest has hundreds of thousands: the collector need not look at them.


class StoredSlice(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A slice of a leaf and the place of its bytes: `offset` in region number `region`."""

    at: Shape
    extent: Shape
    region: Count
    offset: Count

    @property
    def box(self) -> Box:
        return self.at, self.extent


class StoredLeaf(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A leaf: `shape` is the whole tensor's, over all ranks."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARACTERS)]
    dtype: Annotated[str, msgspec.Meta(max_length=MAX_DTYPE_CHARACTERS)]
    shape: Shape
    slices: tuple[StoredSlice, ...]

    def size_bytes(self, part: StoredSlice) -> int:
        return math.prod(part.extent) * item_bytes(self.dtype)

    @property
    def whole(self) -> StoredSlice | None:
        """The one slice that is all of the leaf; None where it is in several."""
        part = self.slices[0]
        return part if len(self.slices) == 1 and part.extent == self.shape else None


class StoredRegion(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Contiguous bytes: the numbers of its chunks, in order."""

    size_bytes: Count
    chunks: tuple[Count, ...]


class StoredChunk(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A chunk's name and raw size."""

    digest: Digest
    size_bytes: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHUNK_BYTES)]


class Place(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a chunk is stored. `base` is the digest of the chunk that an xor encoding builds on, or ""."""

    pack: Digest
    offset: Count
    stored_bytes: Annotated[int, msgspec.Meta(ge=1, le=MAX_STORED_CHUNK_BYTES)]
    encoding: Annotated[int, msgspec.Meta(ge=0, le=255)] = int(Encoding.RAW)
    base: str = ""


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True, dict=True):
    """One rank's part of a snapshot, or all of it: one rank's is, and what `joining.join` makes of several,
    which is never stored. `chunks[i]` lies at `places[i]`; `packs` gives each pack's size in
    bytes. `values` is the encoded tree of plain values in which a `Leaf` stands for each tensor.

    `state` is the state digest of this part. `salt` is empty, unless an object with this manifest's name
    was found damaged: then it makes another name.
    """

    format: int
    grid_bytes: Annotated[int, msgspec.Meta(ge=ALIGNMENT_BYTES, le=MAX_CHUNK_BYTES)]
    leaves: tuple[StoredLeaf, ...]
    regions: tuple[StoredRegion, ...]
    chunks: tuple[StoredChunk, ...]
    places: tuple[Place, ...]
    packs: dict[Digest, Count]
    values: bytes
    state: Digest
    rank: Count = 0
    ranks: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANKS)] = 1
    salt: Annotated[str, msgspec.Meta(max_length=MAX_SALT_CHARACTERS)] = ""

    @cached_property
    def tree(self) -> Value:
        """The values, decoded."""
        return decode_values(self.values)

    @cached_property
    def by_name(self) -> dict[str, StoredLeaf]:
        return {leaf.name: leaf for leaf in self.leaves}

    @cached_property
    def place_of(self) -> dict[str, tuple[StoredChunk, Place]]:
        return {chunk.digest: (chunk, place) for chunk, place in zip(self.chunks, self.places, strict=True)}


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Manifest)


def encode(manifest: Manifest) -> bytes:
    """The stored bytes of a manifest: one zstd frame of JSON.

    Raises:
        Unsupported: something in it is larger than `decode` takes; what could not be read back is not
            written.
    """
    for leaf in manifest.leaves:
        if not 1 <= len(leaf.name) <= MAX_NAME_CHARACTERS or len(leaf.shape) > MAX_DIMENSIONS:
            raise Unsupported(
                f"leaf {leaf.name[:60]!r} cannot be stored: its name has {len(leaf.name)} characters "
                f"({MAX_NAME_CHARACTERS} can be) and its shape {len(leaf.shape)} dimensions "
                f"({MAX_DIMENSIONS} can be)"
            )
    text = _ENCODER.encode(manifest)
    stored = zstandard.ZstdCompressor(level=3).compress(text)
    commas = text.count(b",")
    if len(text) > MAX_MANIFEST_BYTES or len(stored) > MAX_STORED_BYTES or commas > MAX_COMMAS:
        raise Unsupported(
            f"a manifest of {len(text)} bytes, {len(stored)} compressed, with {commas} commas, is larger "
            f"than the {MAX_MANIFEST_BYTES}, {MAX_STORED_BYTES} and {MAX_COMMAS} allowed",
            next="keep large arrays as tensors or numpy arrays, not as lists of numbers",
        )
    return stored


def decode(stored: Buffer) -> Manifest:
    """The manifest that `stored` holds, with every number in it checked against the others.

    Raises:
        Damaged: it is none, or contradicts itself.
        Unsupported: a newer format wrote it.
    """
    if len(stored) > MAX_STORED_BYTES:
        raise Damaged(f"a manifest of {len(stored)} bytes is larger than the {MAX_STORED_BYTES} allowed")
    try:
        size_bytes = zstandard.get_frame_parameters(stored).content_size
    except (zstandard.ZstdError, ValueError) as error:
        raise Damaged(f"a manifest is not a zstd frame: {error}") from error
    if size_bytes > MAX_MANIFEST_BYTES:
        raise Damaged(f"a manifest claims {size_bytes} bytes, more than the {MAX_MANIFEST_BYTES} allowed")
    return decode_text(decompress(stored, size_bytes))


def decode_text(text: bytes) -> Manifest:
    """The manifest that the JSON `text` is; raises what `decode` raises."""
    if text.count(b",") > MAX_COMMAS:
        raise Damaged(f"a manifest holds more items than {MAX_COMMAS} commas divide")
    try:
        refuse_newer(text, "manifest")
        manifest = _DECODER.decode(text)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise Damaged(f"a manifest cannot be read: {error}") from error
    _check(manifest)
    return manifest


def decode_packs(stored: Buffer) -> dict[str, int]:
    """The packs that a manifest names, and their sizes in bytes; much faster than all of it, of which nothing
    else is looked at: only for one whose bytes are known to be those that were written.

    Raises what `decode` raises.
    """
    return _decode_part(stored, _Packs).packs


def decode_places(stored: Buffer) -> dict[str, array[int]]:
    """Where the chunks of a manifest lie: by pack, offset and stored size in bytes of each, in turn. As
    `decode_packs`, for who needs more of it than that."""
    found: dict[str, array[int]] = {}
    for place in _decode_part(stored, _Places).places:
        found.setdefault(place.pack, array("Q")).extend((place.offset, place.stored_bytes))
    return found


def _decode_part(stored: Buffer, kind: type[Part]) -> Part:
    try:
        size_bytes = zstandard.get_frame_parameters(stored).content_size
        if len(stored) > MAX_STORED_BYTES or size_bytes > MAX_MANIFEST_BYTES:
            raise Damaged("a manifest is larger than allowed")
        text = decompress(stored, size_bytes)
        refuse_newer(text, "manifest")
        return msgspec.json.decode(text, type=kind)
    except (zstandard.ZstdError, msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise Damaged(f"a manifest cannot be read: {error}") from error


class _Packs(msgspec.Struct):
    packs: dict[Digest, Count]


class _Places(msgspec.Struct):
    places: tuple[Place, ...]


Part = TypeVar("Part", _Packs, _Places)


class _Format(msgspec.Struct):
    format: int


def refuse_newer(text: Buffer, what: str) -> None:
    """Raises Unsupported when the JSON object `text` was written by a newer format."""
    number = msgspec.json.decode(text, type=_Format).format
    if number > NEWEST_FORMAT:
        raise Unsupported(
            f"a {what} has format {number}; this Everstep reads up to format {NEWEST_FORMAT}",
            kept="nothing was touched",
            next="pip install -U everstep",
        )
    if number < 1:
        raise Damaged(f"a {what} has format {number}")


def _check(manifest: Manifest) -> None:
    several = manifest.format >= SEVERAL
    if manifest.rank >= manifest.ranks or (manifest.ranks > 1 and not several):
        raise Damaged(
            f"a manifest of format {manifest.format} is of rank {manifest.rank} of {manifest.ranks}"
        )
    if len(manifest.places) != len(manifest.chunks):
        raise Damaged("a manifest has chunks without a place")
    if len(manifest.place_of) != len(manifest.chunks):
        raise Damaged("a manifest names a chunk twice")
    if len(manifest.by_name) != len(manifest.leaves):
        raise Damaged("a manifest names a leaf twice")
    for chunk, place in zip(manifest.chunks, manifest.places, strict=True):
        _check_place(manifest, chunk, place)
    for region in manifest.regions:
        _check_region(manifest, region)
    own = f"{OWN}{manifest.rank}/"
    for leaf in manifest.leaves:
        if not leaf.slices or not (several or leaf.whole):
            raise Damaged(f"leaf {leaf.name!r} has {len(leaf.slices)} slices, or one that is not all of it")
        if leaf.name.startswith(OWN) and not leaf.name.startswith(own):
            raise Damaged(f"leaf {leaf.name!r} is in the manifest of rank {manifest.rank}")
        _check_slices(manifest, leaf)


def _check_place(manifest: Manifest, chunk: StoredChunk, place: Place) -> None:
    pack_bytes = manifest.packs.get(place.pack)
    if pack_bytes is None or place.offset + place.stored_bytes > pack_bytes:
        raise Damaged(f"chunk {chunk.digest[:12]} lies outside its pack")
    if place.offset % ALIGNMENT_BYTES:
        raise Damaged(f"chunk {chunk.digest[:12]} strays from the alignment")
    if place.base and place.base not in manifest.place_of:
        raise Damaged(f"chunk {chunk.digest[:12]} builds on a chunk that the manifest does not place")
    base, depth = place.base, 0
    while base:
        depth += 1
        below = manifest.place_of.get(base)
        if below is None or depth > MAX_XOR_DEPTH:
            raise Damaged(f"chunk {chunk.digest[:12]} builds on chunks without an end")
        base = below[1].base


def _check_region(manifest: Manifest, region: StoredRegion) -> None:
    left = region.size_bytes
    for number in region.chunks:
        if number >= len(manifest.chunks):
            raise Damaged(f"a region names chunk {number} of {len(manifest.chunks)}")
        if manifest.chunks[number].size_bytes != min(manifest.grid_bytes, left):
            raise Damaged("a region's chunks do not lie on the grid")
        left -= manifest.chunks[number].size_bytes
    if left:
        raise Damaged("a region's chunks do not fill it")


def _check_slices(manifest: Manifest, leaf: StoredLeaf) -> None:
    shape, item = leaf.shape, item_bytes(leaf.dtype)
    before: Box | None = None
    for part in leaf.slices:
        at, extent = part.at, part.extent
        # A manifest may have hundreds of thousands: no Python for each dimension.
        if not len(shape) == len(at) == len(extent) or not all(map(ge, shape, map(add, at, extent))):
            raise Damaged(f"a slice of leaf {leaf.name!r} lies outside it")
        if part.region >= len(manifest.regions):
            raise Damaged(f"leaf {leaf.name!r} lies in region {part.region} of {len(manifest.regions)}")
        if part.offset + math.prod(extent) * item > manifest.regions[part.region].size_bytes:
            raise Damaged(f"leaf {leaf.name!r} lies outside its region")
        if before is not None and before >= (at, extent):
            raise Damaged(f"the slices of leaf {leaf.name!r} are not in order")
        before = at, extent


SliceDigests: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], Sequence[str]]
"""(at, extent, the digests of the slice's own bytes cut on the grid)."""


def state_digest(
    leaves: Sequence[tuple[str, str, tuple[int, ...], Sequence[SliceDigests]]], encoded_values: bytes
) -> str:
    """The digest of a state: equal digests are the same state, bit for bit (FORMAT.md, "State digest").

    Args:
        leaves: (name, dtype, shape, slices) in any order.
        encoded_values: the values tree, encoded.
    """
    hasher = state_hasher(len(leaves))
    for name, dtype, shape, slices in sorted(leaves, key=lambda leaf: leaf[0].encode()):
        hasher.update(leaf_head(name, dtype, shape, len(slices)))
        for at, extent, digests in slices:
            hasher.update(slice_head(at, extent, len(digests)) + bytes.fromhex("".join(digests)))
    hasher.update(encoded_values)
    return hasher.hexdigest()


def state_of_parts(states: Sequence[str]) -> str:
    """The state digest of a snapshot out of those of its parts, in the order of the ranks."""
    if len(states) == 1:
        return states[0]
    head = b"everstep state 2\n" + varint(len(states))
    return blake3(head + bytes.fromhex("".join(states))).hexdigest()


def state_hasher(leaves: int) -> blake3:
    """A hasher at the beginning of a state digest's input, for a state of so many leaves."""
    return blake3(b"everstep state 1\n" + varint(leaves))


def leaf_head(name: str, dtype: str, shape: tuple[int, ...], slices: int) -> bytes:
    """What the input of a state digest says of a leaf before its slices."""
    return _text(name) + _text(dtype) + _numbers(shape) + varint(slices)


def slice_head(at: tuple[int, ...], extent: tuple[int, ...], chunks: int) -> bytes:
    """What it says of a slice before the digests of its chunks."""
    return _numbers(at) + _numbers(extent) + varint(chunks)


def _text(text: str) -> bytes:
    data = text.encode()
    return varint(len(data)) + data


def _numbers(numbers: Sequence[int]) -> bytes:
    return varint(len(numbers)) + b"".join(map(varint, numbers))
