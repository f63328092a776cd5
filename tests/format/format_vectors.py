"""What the test vectors of docs/FORMAT.md are made of, and the making of them.

    python tests/format/format_vectors.py --write

writes docs/vectors/format-1.json and the hexdumps in docs/FORMAT.md anew. The format is frozen: the only
good reason to run it is a new vector. What a zstd frame looks like is the compressor's business, so frames
are kept as they are once written, and only have to decode.
"""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import msgspec

from everstep.format import chunk, keys, manifest, pack, record, values
from everstep.format.chunk import Encoding
from everstep.format.manifest import Manifest, Place, StoredChunk, StoredLeaf, StoredRegion, StoredSlice
from everstep.format.record import (
    ChainRecord,
    HeadRecord,
    LeaseRecord,
    NewPack,
    PartRecord,
    PruneRecord,
    RelocationRecord,
    SealedRecord,
    SnapshotRecord,
    Spot,
    StepRecord,
    TagRecord,
)
from everstep.format.values import Leaf, Scalar, Symbol

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "FORMAT.md"
VECTORS = ROOT / "docs" / "vectors" / "format-1.json"

AT = "2024-05-06T07:08:09.101112+00:00"
NONCE = "0123456789abcdef"

FLOATS = struct.pack("<8f", *[1.0, -2.0, 0.5, 0.0, 3.25, -0.0, 1e-3, 65504.0])
"""The bytes of a leaf of eight float32."""
BIAS = struct.pack("<2f", 0.25, -0.75)


def values_cases() -> dict[str, Any]:
    """Values by a name in words. Where the name repeats the type, there is one of every kind of node."""
    counted: defaultdict[str, int] = defaultdict(int)
    counted["a"] = 1
    return {
        "None": None,
        "False": False,
        "True": True,
        "0": 0,
        "1": 1,
        "-1": -1,
        "127": 127,
        "128": 128,
        "-128": -128,
        "-129": -129,
        "2**64": 2**64,
        "1.5": 1.5,
        "-0.0": -0.0,
        "inf": math.inf,
        "nan": math.nan,
        "2-0.5j": 2 - 0.5j,
        "text": "text",
        "empty text": "",
        "text beyond ASCII": "Zürich 🚆",
        "bytes": b"\x00\xff",
        "130 bytes": bytes(130),
        "list": [1, "a", None],
        "tuple": (1, 2),
        "nested": [[], [()], {"a": {"b": [1]}}],
        "set, sorted by encoding": {3, 1, "b", "a", -1},
        "frozenset": frozenset({b"x"}),
        "dict, in its own order": {"b": 1, "a": 2, 3: None, (1, 2): "tuple"},
        "deque with a limit": deque([1, 2], maxlen=4),
        "deque without": deque(["a"]),
        "OrderedDict": OrderedDict([("z", 1), ("a", 2)]),
        "Counter": Counter({"a": 3, "b": 1}),
        "defaultdict of int": counted,
        "defaultdict without a factory": defaultdict(None, {"a": 1}),
        "leaf": Leaf("model/weight"),
        "symbol": Symbol("torch.dtype", "bfloat16"),
        "symbol of a tuple": Symbol("torch.Size", (2, 3)),
        "numpy scalar": Scalar("<f4", struct.pack("<f", 1.5)),
    }


def a_pack() -> tuple[str, bytes]:
    """Two chunks, stored as they are: (name, bytes)."""
    builder = pack.Builder()
    for raw in (FLOATS, BIAS):
        builder.add(chunk.digest(raw), len(raw), raw, len(raw), Encoding.RAW, "")
    name, parts = builder.finish()
    return name, b"".join(parts)


def a_manifest() -> Manifest:
    """Two leaves in two regions, the second of them tied to a third name."""
    name, data = a_pack()
    entries = pack.decode_tail(data[8192:], len(data), name).entries
    tree = {
        "objects": {"model": {"weight": Leaf("model/weight"), "bias": Leaf("model/bias")}},
        "run": {"step": 7},
    }
    encoded = values.encode(tree)
    leaves = (
        StoredLeaf("model/weight", "float32", (2, 4), (StoredSlice((0, 0), (2, 4), 0, 0),)),
        StoredLeaf("model/bias", "float32", (2,), (StoredSlice((0,), (2,), 1, 0),)),
        StoredLeaf("model/tied", "float32", (2, 4), (StoredSlice((0, 0), (2, 4), 0, 0),)),
    )
    digests = {"model/weight": FLOATS, "model/tied": FLOATS, "model/bias": BIAS}
    described = [
        (one.name, one.dtype, one.shape, [(part.at, part.extent, [chunk.digest(digests[one.name])])])
        for one in leaves
        for part in one.slices
    ]
    return Manifest(
        format=1,
        grid_bytes=4096,
        leaves=leaves,
        regions=(StoredRegion(len(FLOATS), (0,)), StoredRegion(len(BIAS), (1,))),
        chunks=tuple(StoredChunk(one.digest, one.size_bytes) for one in entries),
        places=tuple(Place(name, one.offset, one.stored_bytes, one.encoding, one.base) for one in entries),
        packs={name: len(data)},
        values=encoded,
        state=manifest.state_digest(described, encoded),
    )


def a_snapshot(manifest_name: str) -> SnapshotRecord:
    return SnapshotRecord(
        format=1,
        step=7,
        epoch=0,
        state=a_manifest().state,
        manifests=(manifest_name,),
        taken_at=AT,
        branch="main",
        writer=1,
        trigger="every",
        logical_bytes=40,
        new_bytes=40,
        stored_bytes=12288,
        metrics={"loss": 0.5, "worst": record.number(math.inf)},
        environment={"python": "3.12"},
        costs={"store": 1.25},
    )


def a_part() -> PartRecord:
    return PartRecord(
        branch="main",
        writer=3,
        take=7,
        rank=1,
        ranks=2,
        manifest="ab" * 32,
        state="cd" * 32,
        nonce="0123456789abcdef",
        at=AT,
        logical_bytes=40,
        new_bytes=32,
        stored_bytes=8192,
        approximate=("a loader that cannot be resumed",),
        relies=("ef" * 32,),
    )


def sealed_records(snapshot: str) -> dict[str, SealedRecord]:
    """One record of each sealed kind, by its key."""
    return {
        keys.CHAIN: ChainRecord(chain="00112233445566778899aabbccddeeff", created_at=AT, grid_bytes=4096),
        keys.numbered(keys.head("main"), 1): HeadRecord(
            snapshot, step=7, writer=1, nonce=NONCE, at=AT, branch="main", number=1
        ),
        keys.numbered(keys.tag("best"), 1): TagRecord(snapshot, nonce=NONCE, at=AT, name="best", number=1),
        keys.numbered(keys.tag("best"), 2): TagRecord("", nonce=NONCE, at=AT, name="best", number=2),
        keys.numbered(keys.LEASES, 1): LeaseRecord(
            "host", "boot", pid=4242, started=99, nonce=NONCE, at=AT, number=1
        ),
        keys.numbered(keys.lease("main"), 2): LeaseRecord(
            "host", "boot", pid=4243, started=100, nonce=NONCE, at=AT, number=2, branch="main"
        ),
        keys.numbered(keys.PRUNES, 1): PruneRecord(
            (snapshot,), (), ("ab" * 32,), "host", "boot", 4243, 100, nonce=NONCE, begun_at=AT, number=1
        ),
        keys.numbered(keys.head("main"), 2): HeadRecord(
            snapshot, step=7, writer=2, nonce=NONCE, at=AT, branch="main", number=2, fence=True
        ),
        keys.numbered(keys.head("main"), 3): HeadRecord(
            snapshot,
            step=7,
            writer=2,
            nonce=NONCE,
            at=AT,
            branch="main",
            number=3,
            format=2,
            fence=True,
        ),
        keys.numbered(keys.RELOCATIONS, 1): RelocationRecord(
            (NewPack("cd" * 32, 3 * 4096),),
            {a_pack()[0]: (Spot(0, 0, 4096), Spot(4096, 0, 0))},
            nonce=NONCE,
            at=AT,
            number=1,
        ),
    }


def steps() -> list[StepRecord]:
    return [
        StepRecord(
            step=6, epoch=0, delivered=6, metrics={"loss": (0.75).hex()}, lr=((0.1).hex(),), rng="00ff"
        ),
        StepRecord(
            step=7, epoch=0, delivered=7, metrics={"loss": math.nan.hex()}, lr=((0.1).hex(),), rng="01ff"
        ),
    ]


def chunk_cases() -> list[dict[str, Any]]:
    """Chunks in every encoding, with the words of several sizes and a rest that is no word."""
    raw = FLOATS * 8 + b"rest"
    base = bytes(reversed(raw))
    cases: list[tuple[Encoding, int, bytes]] = [
        (Encoding.RAW, 1, b""),
        (Encoding.ZSTD, 1, b""),
        (Encoding.SHUFFLE_ZSTD, 4, b""),
        (Encoding.SHUFFLE_ZSTD, 7, b""),
        (Encoding.XOR_SHUFFLE_ZSTD, 2, base),
    ]
    return [
        {
            "encoding": int(encoding),
            "raw": raw.hex(),
            "digest": chunk.digest(raw),
            "base": below.hex(),
            "stored": chunk.encode(raw, encoding, word_bytes=word, base=below or None).hex(),
        }
        for encoding, word, below in cases
    ]


def a_footer(cases: list[dict[str, Any]]) -> bytes:
    """The footer of a pack that holds these chunks; the base of one is named, and lies elsewhere."""
    builder = pack.Builder()
    for case in cases:
        stored, base = bytes.fromhex(case["stored"]), bytes.fromhex(case["base"])
        size = len(bytes.fromhex(case["raw"]))
        below = chunk.digest(base) if base else ""
        builder.add(case["digest"], size, stored, len(stored), case["encoding"], below)
    return pack.encode_footer(pack.Footer(tuple(builder.entries)))


def made() -> dict[str, Any]:
    """All vectors, as the code makes them now."""
    pack_name, pack_bytes = a_pack()
    frame = manifest.encode(a_manifest())
    kept = json.loads(VECTORS.read_text()) if VECTORS.exists() else {}
    if kept and manifest.decode(bytes.fromhex(kept["manifest"]["stored"])) == a_manifest():
        frame = bytes.fromhex(kept["manifest"]["stored"])
    snapshot = record.encode(a_snapshot(chunk.digest(frame)))
    snapshot_name = chunk.digest(snapshot)
    chunks = kept.get("chunks") or chunk_cases()
    return {
        "digests": [
            {"bytes": data.hex(), "digest": chunk.digest(data)} for data in (b"", b"everstep", FLOATS, BIAS)
        ],
        "varints": [
            {"number": number, "bytes": values.varint(number).hex()}
            for number in (0, 1, 127, 128, 300, 16383, 16384, 2**32, 2**62)
        ],
        "values": [
            {"value": name, "bytes": values.encode(value).hex()} for name, value in values_cases().items()
        ],
        "keys": [
            {"what": "the first record of branch main", "key": keys.numbered(keys.head("main"), 1)},
            {"what": "the second record of branch main", "key": keys.numbered(keys.head("main"), 2)},
            {"what": "record 1000000 of tag v1.0-rc", "key": keys.numbered(keys.tag("v1.0-rc"), 1_000_000)},
            {"what": "lease 3 of version 0.2", "key": keys.numbered(keys.LEASES, 3)},
            {
                "what": "the segment of branch main, writer 3, from step 501",
                "key": keys.segment("main", 3, 501),
            },
            {"what": "the pack below", "key": keys.pack(pack_name)},
            {"what": "the manifest below", "key": keys.manifest(chunk.digest(frame))},
            {"what": "the snapshot below", "key": keys.snapshot(snapshot_name)},
            {"what": "lease 3 of branch main", "key": keys.numbered(keys.lease("main"), 3)},
            {"what": "prune 2", "key": keys.numbered(keys.PRUNES, 2)},
            {"what": "relocation 2", "key": keys.numbered(keys.RELOCATIONS, 2)},
        ],
        "chunks": chunks,
        "footer": a_footer(chunks).hex(),
        "pack": {"name": pack_name, "bytes": pack_bytes.hex()},
        "manifest": {
            "name": chunk.digest(frame),
            "stored": frame.hex(),
            "json": msgspec.json.encode(a_manifest()).decode(),
            "state": a_manifest().state,
        },
        "snapshot": {"name": snapshot_name, "bytes": snapshot.decode()},
        "sealed": {key: record.seal(one).decode() for key, one in sealed_records(snapshot_name).items()},
        "segment": {"key": keys.segment("main", 1, 6), "bytes": record.seal_segment(steps()).decode()},
        "journal": {
            "file": f"journal/main-{1:016x}-{6:016x}",
            "bytes": "".join(
                f"{chunk.digest(line)[:16]} {line.decode()}\n" for line in map(record.encode, steps())
            ),
        },
    }


def hexdump(data: bytes) -> str:
    """As `hexdump -C` prints it: a line that repeats the one before becomes a star."""
    lines, previous, starred = [], b"", False
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        if row == previous and at + 16 < len(data):
            if not starred:
                lines.append("*")
            starred = True
            continue
        previous, starred = row, False
        digits = (
            " ".join(f"{byte:02x}" for byte in row[:8]) + "  " + " ".join(f"{byte:02x}" for byte in row[8:])
        )
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{at:08x}  {digits:<48}  |{text}|")
    return "\n".join([*lines, f"{len(data):08x}"])


def dumps(vectors: dict[str, Any]) -> dict[str, str]:
    """The hexdumps of the document, by name."""
    head = keys.numbered(keys.head("main"), 1)
    return {
        "pack": hexdump(bytes.fromhex(vectors["pack"]["bytes"])),
        "head": hexdump(vectors["sealed"][head].encode()),
    }


def block(name: str) -> re.Pattern[str]:
    """Where the hexdump `name` stands in the document."""
    return re.compile(rf"(<!-- hexdump: {name} -->\n```\n)((?:(?!```).)*?)(\n```)", re.DOTALL)


def write() -> None:
    vectors = made()
    VECTORS.parent.mkdir(parents=True, exist_ok=True)
    VECTORS.write_text(json.dumps(vectors, indent=1, ensure_ascii=False) + "\n")
    text = DOCUMENT.read_text()
    for name, dump in dumps(vectors).items():
        text = block(name).sub(lambda found, dump=dump: found[1] + dump + found[3], text)  # type: ignore[misc]
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    write()
