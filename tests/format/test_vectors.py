"""docs/FORMAT.md and its vectors say what the code does: neither can change without the other."""

from __future__ import annotations

import base64
import importlib
import json
import re
import struct
from typing import Any

import format_vectors
import msgspec
import pytest
import zstandard
from blake3 import blake3

from everstep.chain.steplog import read_journal
from everstep.format import chunk, keys, manifest, pack, record, values
from everstep.format.record import SnapshotRecord, StepRecord

VECTORS: dict[str, Any] = json.loads(format_vectors.VECTORS.read_text())
TEXT = format_vectors.DOCUMENT.read_text()


# -- the code makes what is written -----------------------------------------------------------------------


def test_the_code_makes_the_vectors() -> None:
    made = format_vectors.made()
    assert made.keys() == VECTORS.keys()
    for what, vectors in VECTORS.items():
        assert made[what] == vectors, what


@pytest.mark.parametrize("name", ["pack", "head"])
def test_the_hexdumps_are_what_the_code_makes(name: str) -> None:
    shown = format_vectors.block(name).search(TEXT)
    assert shown is not None
    assert shown[2] == format_vectors.dumps(format_vectors.made())[name]


def test_a_hexdump_says_all() -> None:
    """The dump can be turned back into the bytes: nothing is lost in a star."""
    shown = format_vectors.block("pack").search(TEXT)
    assert shown is not None
    data = bytearray()
    row = b""
    for line in shown[2].splitlines():
        if line == "*":
            continue
        at = int(line[:8], 16)
        while row and len(data) < at:
            data += row
        row = bytes.fromhex(line[10:58])
        data += row
    assert bytes(data).hex() == VECTORS["pack"]["bytes"]


def test_the_bounds_are_the_codes() -> None:
    rows = re.findall(r"^\| [^|]+ \| (\d+) \| `([a-z.]+)\.([A-Z_]+)` \|$", TEXT, re.MULTILINE)
    assert len(rows) >= 28
    for number, module, name in rows:
        assert getattr(importlib.import_module(module), name) == int(number), f"{module}.{name}"


def test_every_bound_of_the_code_is_written() -> None:
    for module in (chunk, manifest, pack, record, values):
        for name in vars(module):
            if name.startswith("MAX_"):
                assert f".{name}`" in TEXT, f"{module.__name__}.{name}"


def test_every_field_of_the_code_is_written() -> None:
    kinds = [type(one) for one in format_vectors.sealed_records("0" * 64).values()]
    for kind in {*kinds, SnapshotRecord, StepRecord, manifest.Manifest}:
        for name in kind.__struct_fields__:
            assert f"`{name}`" in TEXT, f"{kind.__name__}.{name}"


# -- the code reads what is written -----------------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS["digests"])
def test_digests(vector: dict[str, str]) -> None:
    assert chunk.digest(bytes.fromhex(vector["bytes"])) == vector["digest"]


@pytest.mark.parametrize("vector", VECTORS["values"], ids=lambda vector: vector["value"])
def test_values(vector: dict[str, str]) -> None:
    expected = format_vectors.values_cases()[vector["value"]]
    decoded = values.decode(bytes.fromhex(vector["bytes"]))
    assert type(decoded) is type(expected)
    assert decoded == expected or decoded != decoded
    assert values.encode(decoded).hex() == vector["bytes"]


def test_every_tag_has_a_vector() -> None:
    used = {bytes.fromhex(vector["bytes"])[0] for vector in VECTORS["values"]}
    section = TEXT[TEXT.index("## Values") : TEXT.index("## Manifests")]
    written = {int(tag, 16) for tag in re.findall(r"^\| (\d\d) \|", section, re.MULTILINE)}
    assert used == written
    assert len(used) == 20


@pytest.mark.parametrize("vector", VECTORS["chunks"], ids=lambda vector: f"encoding {vector['encoding']}")
def test_chunks(vector: dict[str, Any]) -> None:
    raw = bytes.fromhex(vector["raw"])
    base = bytes.fromhex(vector["base"])
    decoded = chunk.decode(bytes.fromhex(vector["stored"]), vector["encoding"], len(raw), base=lambda: base)
    assert bytes(decoded) == raw
    assert chunk.digest(raw) == vector["digest"]


def test_the_pack() -> None:
    data, name = bytes.fromhex(VECTORS["pack"]["bytes"]), VECTORS["pack"]["name"]
    trailer = pack.decode_trailer(data[-64:], len(data))
    footer = pack.decode_tail(data[trailer.footer_offset :], len(data), name)
    assert [one.digest for one in footer.entries] == [
        chunk.digest(format_vectors.FLOATS),
        chunk.digest(format_vectors.BIAS),
    ]


def test_the_footer() -> None:
    footer = bytes.fromhex(VECTORS["footer"])
    entries = pack.decode_footer(footer).entries
    assert pack.encode_footer(pack.Footer(entries)) == footer
    assert [(one.digest, one.encoding) for one in entries] == [
        (vector["digest"], vector["encoding"]) for vector in VECTORS["chunks"]
    ]


def test_the_manifest() -> None:
    stored = bytes.fromhex(VECTORS["manifest"]["stored"])
    assert chunk.digest(stored) == VECTORS["manifest"]["name"]
    decoded = manifest.decode(stored)
    assert decoded == format_vectors.a_manifest()
    assert json.loads(VECTORS["manifest"]["json"]) == json.loads(msgspec.json.encode(decoded))
    assert decoded.state == VECTORS["manifest"]["state"]


def test_the_snapshot() -> None:
    data = VECTORS["snapshot"]["bytes"].encode()
    assert chunk.digest(data) == VECTORS["snapshot"]["name"]
    assert record.decode(data, SnapshotRecord) == format_vectors.a_snapshot(VECTORS["manifest"]["name"])


@pytest.mark.parametrize("key", VECTORS["sealed"])
def test_sealed_records(key: str) -> None:
    expected = format_vectors.sealed_records(VECTORS["snapshot"]["name"])[key]
    assert expected.key == key
    assert record.unseal(VECTORS["sealed"][key].encode(), type(expected), key) == expected


def test_the_step_log() -> None:
    assert record.unseal_segment(VECTORS["segment"]["bytes"].encode()) == format_vectors.steps()
    assert read_journal(VECTORS["journal"]["bytes"].encode()) == format_vectors.steps()


# -- another client, from the document alone --------------------------------------------------------------


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number % 128 + 128]) + varint(number // 128)


def text(of: str) -> bytes:
    return varint(len(of.encode())) + of.encode()


def numbers(of: list[int]) -> bytes:
    return varint(len(of)) + b"".join(map(varint, of))


@pytest.mark.parametrize("vector", VECTORS["varints"])
def test_varints(vector: dict[str, Any]) -> None:
    assert varint(vector["number"]).hex() == values.varint(vector["number"]).hex() == vector["bytes"]


def test_another_client_restores_the_state() -> None:
    """Nothing of the library here: the five steps of the document, from the head's bytes to the floats."""
    store: dict[str, bytes] = {
        VECTORS["keys"][5]["key"]: bytes.fromhex(VECTORS["pack"]["bytes"]),
        VECTORS["keys"][6]["key"]: bytes.fromhex(VECTORS["manifest"]["stored"]),
        VECTORS["keys"][7]["key"]: VECTORS["snapshot"]["bytes"].encode(),
        **{key: sealed.encode() for key, sealed in VECTORS["sealed"].items()},
    }

    def unseal(data: bytes) -> Any:
        body = data[86:-2]
        assert data == b'{"blake3":"' + blake3(body).hexdigest().encode() + b'","record":' + body + b"}\n"
        return json.loads(body)

    about = unseal(store["everstep.json"])
    newest = min(key for key in store if key.startswith("heads/main/"))
    head = unseal(store[newest])
    assert f"heads/{head['branch']}/{0xFFFF_FFFF_FFFF_FFFF - head['number']:016x}" == newest
    id = head["snapshot"]
    snapshot = store[f"snapshots/{id}"]
    assert blake3(snapshot).hexdigest() == id
    frame = store[f"manifests/{json.loads(snapshot)['manifests'][0]}"]
    assert blake3(frame).hexdigest() == json.loads(snapshot)["manifests"][0]
    made = json.loads(zstandard.ZstdDecompressor().decompress(frame))
    assert made["grid_bytes"] == about["grid_bytes"]

    def region(number: int) -> bytes:
        parts = []
        for one in made["regions"][number][1]:
            digest, size = made["chunks"][one]
            name, offset, stored, encoding, _base = made["places"][one]
            assert encoding == 0
            assert stored == size
            parts.append(store[f"packs/{name[:2]}/{name}"][offset : offset + stored])
            assert blake3(parts[-1]).hexdigest() == digest
        return b"".join(parts)

    found = {}
    state = blake3(b"everstep state 1\n" + varint(len(made["leaves"])))
    for name, dtype, shape, slices in sorted(made["leaves"], key=lambda leaf: leaf[0].encode()):
        (at, extent, number, offset) = slices[0]
        size = 4
        for one in extent:
            size *= one
        raw = region(number)[offset : offset + size]
        found[name] = struct.unpack(f"<{size // 4}f", raw)
        grid = [raw[start : start + about["grid_bytes"]] for start in range(0, size, about["grid_bytes"])]
        state.update(text(name) + text(dtype) + numbers(shape) + varint(1) + numbers(at) + numbers(extent))
        state.update(varint(len(grid)) + b"".join(blake3(part).digest() for part in grid))
    state.update(base64.b64decode(made["values"]))
    assert state.hexdigest() == made["state"] == json.loads(snapshot)["state"]
    assert found["model/bias"] == (0.25, -0.75)
    assert found["model/tied"] == found["model/weight"]
    assert found["model/weight"][:4] == (1.0, -2.0, 0.5, 0.0)


def test_another_client_walks_the_pack() -> None:
    data = bytes.fromhex(VECTORS["pack"]["bytes"])
    magic, version, flags, size, offset, digest = struct.unpack("<8sHHIQ32s8x", data[-64:])
    assert (magic, version, flags, data[-8:]) == (b"EVSTPACK", 1, 0, bytes(8))
    footer = data[offset : offset + size]
    assert blake3(footer).digest() == digest == bytes.fromhex(VECTORS["pack"]["name"])
    assert not any(data[offset + size : -64])
    head, salt, count = struct.unpack("<8s16sI4x", footer[:32])
    assert (head, salt) == (b"EVSTFOOT", bytes(16))
    assert size == 32 + 88 * count
    end = 0
    for number in range(count):
        row = footer[32 + 88 * number :][:88]
        name, base, at, stored, raw, encoding, check = struct.unpack("<32s32sQIIB7s", row)
        assert at == -(-end // 4096) * 4096
        assert not any(data[end:at])
        assert (base, stored, encoding, check) == (bytes(32), raw, 0, bytes(7))
        assert blake3(data[at : at + stored]).digest() == name
        end = at + stored
    assert offset == -(-end // 4096) * 4096


def test_another_client_reads_the_footer() -> None:
    footer = bytes.fromhex(VECTORS["footer"])
    magic, salt, count = struct.unpack("<8s16sI4x", footer[:32])
    assert (magic, salt, count, len(footer)) == (b"EVSTFOOT", bytes(16), 5, 32 + 88 * 5)
    end = 0
    for number, vector in enumerate(VECTORS["chunks"]):
        row = struct.unpack("<32s32sQIIB7s", footer[32 + 88 * number :][:88])
        bytes_of = {name: bytes.fromhex(vector[name]) for name in ("raw", "base", "stored")}
        base = blake3(bytes_of["base"]).digest() if vector["base"] else bytes(32)
        sizes = (len(bytes_of["stored"]), len(bytes_of["raw"]))
        check = blake3(bytes_of["stored"]).digest()[:7] if vector["encoding"] else bytes(7)
        assert row == (blake3(bytes_of["raw"]).digest(), base, end, *sizes, vector["encoding"], check)
        end += -(-sizes[0] // 4096) * 4096


def test_keys_in_the_document() -> None:
    """The two numbers that the text itself gives."""
    assert "record 1 is `fffffffffffffffe`, record 2 is `fffffffffffffffd`" in TEXT.replace("\n", " ")
    assert keys.numbered("", 1) == "fffffffffffffffe"
    assert keys.numbered("", 2) == "fffffffffffffffd"
