"""The manifest of a state: what its layout says, and where its chunks went."""

from __future__ import annotations

from everstep.chain.packing import Draft, Extent
from everstep.format import manifest as manifests
from everstep.format.layout import Layout, Slice
from everstep.format.manifest import (
    Manifest,
    StoredChunk,
    StoredLeaf,
    StoredRegion,
    StoredSlice,
    leaf_head,
    slice_head,
    state_hasher,
)


class Described:
    """What all snapshots of one layout say alike, made once: thousands of leaves take their time.

    Attributes:
        shared: by region, the slices that are not all of it.
    """

    def __init__(self, layout: Layout, grid_bytes: int) -> None:
        self.layout = layout
        self.shared: dict[int, list[Extent]] = {}
        self._grid_bytes = grid_bytes
        self._heads: list[tuple[bytes, Extent]] = []
        """In the order of the state digest: its input before a slice's digests, and where the slice lies."""
        placed = list(zip(layout.slices, layout.places, strict=True))
        of_leaf: dict[str, list[tuple[Slice, tuple[int, int]]]] = {}
        for one, place in placed:
            of_leaf.setdefault(one.name, []).append((one, place))
            region, offset = place
            extent = (region, offset, one.size_bytes)
            if one.alias is None and extent != (region, 0, layout.regions[region].size_bytes):
                self.shared.setdefault(region, []).append(extent)
        for found in of_leaf.values():
            found.sort(key=lambda pair: pair[0].box)
        self._leaves = tuple(
            StoredLeaf(
                name,
                found[0][0].dtype,
                found[0][0].shape,
                tuple(StoredSlice(one.at, one.extent, *place) for one, place in found),
            )
            for name, found in of_leaf.items()
        )
        self._count = len(of_leaf)
        for name in sorted(of_leaf, key=str.encode):
            self._describe(of_leaf[name])

    def _describe(self, found: list[tuple[Slice, tuple[int, int]]]) -> None:
        first = found[0][0]
        head = leaf_head(first.name, first.dtype, first.shape, len(found))
        for one, (region, offset) in found:
            chunks = -(-one.size_bytes // self._grid_bytes)
            head += slice_head(one.at, one.extent, chunks)
            self._heads.append((head, (region, offset, one.size_bytes)))
            head = b""

    def manifest(self, draft: Draft, values: bytes, rank: int, ranks: int) -> Manifest:
        """That of a state of this layout whose chunks are stored."""
        numbers = {name: number for number, name in enumerate(draft.sizes)}
        several = ranks > 1 or not all(leaf.whole for leaf in self._leaves)
        return Manifest(
            format=manifests.SEVERAL if several else manifests.FORMAT,
            grid_bytes=self._grid_bytes,
            leaves=self._leaves,
            regions=tuple(
                StoredRegion(region.size_bytes, tuple(numbers[name] for name in names))
                for region, names in zip(draft.layout.regions, draft.digests, strict=True)
            ),
            chunks=tuple(StoredChunk(name, size) for name, size in draft.sizes.items()),
            places=tuple(draft.places[name] for name in draft.sizes),
            # In an order of their own: packs are put while others are found.
            packs=dict(sorted(draft.packs.items())),
            values=values,
            state=self._state_digest(draft, values),
            rank=rank,
            ranks=ranks,
        )

    def _state_digest(self, draft: Draft, values: bytes) -> str:
        hasher = state_hasher(self._count)
        for head, extent in self._heads:
            names = draft.slices[extent] if extent in draft.slices else draft.digests[extent[0]]
            hasher.update(head + bytes.fromhex("".join(names)))
        hasher.update(values)
        return hasher.hexdigest()
