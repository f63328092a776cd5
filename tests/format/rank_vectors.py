"""What the test vectors of several ranks are made of, and the making of them.

    python tests/format/rank_vectors.py --write

writes docs/vectors/format-3.json anew. The format is frozen: the only reason to do that is a new version of
it, or more vectors.
"""

from __future__ import annotations

import json
import struct
import sys
from typing import Any

import msgspec
from format_vectors import AT, NONCE, ROOT

from everstep.format import chunk, keys, manifest, pack, record, values
from everstep.format.chunk import Encoding
from everstep.format.joining import join
from everstep.format.manifest import Manifest, Place, StoredChunk, StoredLeaf, StoredRegion, StoredSlice
from everstep.format.record import HeadRecord, PartRecord, SnapshotRecord
from everstep.format.values import Leaf

VECTORS = ROOT / "docs" / "vectors" / "format-3.json"
GRID_BYTES = 4096
ROWS = [(1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0)]
BIAS = (0.25, -0.75)
RANKS = 2


def tree(rank: int) -> Any:
    """Rank 1 has an object of its own, and both have a generator."""
    objects: dict[str, Any] = {"model": {"weight": Leaf("model/weight"), "bias": Leaf("model/bias")}}
    if rank:
        objects["model"]["scale"] = 2.0
        objects["ema"] = {"decay": 0.999}
    return {"objects": objects, "run": {"rng": Leaf(f"~rank/{rank}/run/rng")}}


def a_part(rank: int) -> tuple[Manifest, str, bytes]:
    """A rank's manifest, and the name and the bytes of its pack: a row of the weight, all of the bias, and
    what it has for itself."""
    chunks = [struct.pack("<4f", *ROWS[rank]), struct.pack("<2f", *BIAS), bytes([rank] * 4)]
    builder = pack.Builder()
    for raw in chunks:
        builder.add(chunk.digest(raw), len(raw), raw, len(raw), Encoding.RAW, "")
    name, parts = builder.finish()
    data = b"".join(bytes(part) for part in parts)
    names = [chunk.digest(raw) for raw in chunks]
    own = f"~rank/{rank}/run/rng"
    encoded = values.encode(tree(rank))
    state = manifest.state_digest(
        [
            ("model/weight", "float32", (2, 4), [((rank, 0), (1, 4), names[:1])]),
            ("model/bias", "float32", (2,), [((0,), (2,), names[1:2])]),
            (own, "uint8", (4,), [((0,), (4,), names[2:])]),
        ],
        encoded,
    )
    made = Manifest(
        format=manifest.SEVERAL,
        grid_bytes=GRID_BYTES,
        leaves=(
            StoredLeaf("model/weight", "float32", (2, 4), (StoredSlice((rank, 0), (1, 4), 0, 0),)),
            StoredLeaf("model/bias", "float32", (2,), (StoredSlice((0,), (2,), 1, 0),)),
            StoredLeaf(own, "uint8", (4,), (StoredSlice((0,), (4,), 2, 0),)),
        ),
        regions=tuple(StoredRegion(len(raw), (number,)) for number, raw in enumerate(chunks)),
        chunks=tuple(StoredChunk(one, len(raw)) for one, raw in zip(names, chunks, strict=True)),
        places=tuple(Place(name, 4096 * number, len(raw)) for number, raw in enumerate(chunks)),
        packs={name: len(data)},
        values=encoded,
        state=state,
        rank=rank,
        ranks=RANKS,
    )
    return made, name, data


def made() -> dict[str, Any]:
    parts = [a_part(rank) for rank in range(RANKS)]
    manifests = [one for one, _, _ in parts]
    stored = [manifest.encode(one) for one in manifests]
    names = [chunk.digest(one) for one in stored]
    joined = join(manifests)
    snapshot = record.encode(
        SnapshotRecord(
            format=manifest.SEVERAL,
            step=7,
            epoch=1,
            state=joined.state,
            manifests=tuple(names),
            taken_at=AT,
            branch="main",
            writer=1,
        )
    )
    head = HeadRecord(chunk.digest(snapshot), 7, 1, NONCE, AT, "main", number=1, format=manifest.SEVERAL)
    told = [
        PartRecord("main", 1, 3, rank, RANKS, names[rank], manifests[rank].state, NONCE, AT, "", 28, 28, size)
        for rank, size in enumerate(len(data) for _, _, data in parts)
    ]
    gone = PartRecord("main", 1, 4, 1, RANKS, "", "", NONCE, AT, withdrawn="No space left on device")
    return {
        "about": "a snapshot of two ranks, for docs/FORMAT.md; bytes are in hexadecimal",
        "packs": {name: data.hex() for _, name, data in parts},
        "manifests": [
            {
                "name": name,
                "stored": frame.hex(),
                "json": msgspec.json.encode(one).decode(),
                "state": one.state,
            }
            for name, frame, one in zip(names, stored, manifests, strict=True)
        ],
        "snapshot": {"name": chunk.digest(snapshot), "bytes": snapshot.decode()},
        "sealed": {one.key: record.seal(one).decode() for one in (head, *told, gone)},
        "key": {"what": "part of rank 17, take 5, writer 2, branch main", "key": keys.part("main", 2, 5, 17)},
        "joined": {
            "state": joined.state,
            "values": joined.values.hex(),
            "leaves": {
                "model/weight": struct.pack("<8f", *ROWS[0], *ROWS[1]).hex(),
                "model/bias": struct.pack("<2f", *BIAS).hex(),
                "~rank/0/run/rng": "00000000",
                "~rank/1/run/rng": "01010101",
            },
        },
    }


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    VECTORS.write_text(json.dumps(made(), indent=1) + "\n")
