"""The vectors of several ranks: the library makes and reads them, and so does who only has the document."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
import zstandard
from blake3 import blake3
from rank_vectors import VECTORS as PATH
from rank_vectors import made, tree

from everstep.errors import Damaged
from everstep.format import keys, manifest, record, values
from everstep.format.joining import join
from everstep.format.record import HeadRecord, PartRecord, SnapshotRecord

VECTORS: dict[str, Any] = json.loads(PATH.read_text())


def test_the_library_makes_what_is_written_down() -> None:
    """But for the zstd frames, which look as their compressor likes, and what is named by them."""
    ours = made()
    assert ours.keys() == VECTORS.keys()
    for what in ("packs", "joined", "key"):
        assert ours[what] == VECTORS[what]
    for mine, written in zip(ours["manifests"], VECTORS["manifests"], strict=True):
        assert (mine["json"], mine["state"]) == (written["json"], written["state"])


def test_the_library_reads_them() -> None:
    snapshot = record.decode(VECTORS["snapshot"]["bytes"].encode(), SnapshotRecord)
    parts = [manifest.decode(bytes.fromhex(one["stored"])) for one in VECTORS["manifests"]]
    joined = join(parts)
    assert joined.state == snapshot.state == VECTORS["joined"]["state"]
    assert joined.values.hex() == VECTORS["joined"]["values"]
    assert [part.tree for part in parts] == [tree(0), tree(1)]
    assert set(joined.by_name) == set(VECTORS["joined"]["leaves"])
    for key, sealed in VECTORS["sealed"].items():
        kind = PartRecord if key.startswith(keys.PARTS) else HeadRecord
        one = record.unseal(sealed.encode(), kind, key)
        assert one.format == 3
    first = manifest.decode(bytes.fromhex(VECTORS["manifests"][0]["stored"]))
    with pytest.raises(Damaged):
        join([first])
    with pytest.raises(Damaged):
        join(parts[::-1])


def varint(number: int) -> bytes:
    assert number < 128
    return bytes([number])


def test_another_client_reads_the_snapshot() -> None:
    """By the document alone: head, snapshot, manifests, state, leaves."""
    sealed = {key: json.loads(one)["record"] for key, one in VECTORS["sealed"].items()}
    head = sealed["heads/main/fffffffffffffffe"]
    raw = VECTORS["snapshot"]["bytes"].encode()
    assert blake3(raw).hexdigest() == head["snapshot"]
    snapshot = json.loads(raw)
    assert (snapshot["format"], len(snapshot["manifests"])) == (3, 2)
    parts = []
    for rank, (name, one) in enumerate(zip(snapshot["manifests"], VECTORS["manifests"], strict=True)):
        frame = bytes.fromhex(one["stored"])
        assert blake3(frame).hexdigest() == name
        part = json.loads(zstandard.ZstdDecompressor().decompress(frame))
        assert (part["format"], part.get("rank", 0), part["ranks"]) == (3, rank, 2)
        told = sealed[f"parts/main/{1:016x}/{3:016x}/{rank:016x}"]
        assert (told["manifest"], told["state"], told["ranks"]) == (name, part["state"], 2)
        parts.append(part)
    states = b"".join(bytes.fromhex(part["state"]) for part in parts)
    assert blake3(b"everstep state 2\n" + varint(2) + states).hexdigest() == snapshot["state"]
    assert read(parts) == {name: bytes.fromhex(data) for name, data in VECTORS["joined"]["leaves"].items()}


def read(parts: list[Any]) -> dict[str, bytes]:
    """Of leaves that are cut by rows, if at all: each row of bytes where a slice says."""
    packs = {name: bytes.fromhex(data) for name, data in VECTORS["packs"].items()}
    found: dict[str, dict[tuple[int, ...], bytes]] = {}
    for part in parts:
        for name, _, _, slices in part["leaves"]:
            for at, _, region, offset in slices:
                size, (number,) = part["regions"][region]
                pack, start, stored = part["places"][number][:3]
                raw = packs[pack][start : start + stored]
                assert blake3(raw).hexdigest() == part["chunks"][number][0]
                found.setdefault(name, {})[tuple(at)] = raw[offset:size]
    return {name: b"".join(rows[at] for at in sorted(rows)) for name, rows in found.items()}


def test_another_client_merges_the_values() -> None:
    first, second = (json.loads(one["json"]) for one in VECTORS["manifests"])
    trees = [values.decode(base64.b64decode(one["values"])) for one in (first, second)]
    merged = values.decode(bytes.fromhex(VECTORS["joined"]["values"]))
    assert merged["run"] == trees[0]["run"]
    assert merged["objects"]["ema"] == trees[1]["objects"]["ema"]
    assert list(merged["objects"]["model"]) == ["weight", "bias", "scale"]
