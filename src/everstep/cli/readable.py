"""Any object of a chain in a form that a person can read."""

from __future__ import annotations

import json
import pprint
from collections.abc import Mapping
from typing import Any

import msgspec

from everstep.chain.steplog import JOURNAL, read_journal
from everstep.cli import output
from everstep.errors import Damaged, EverstepError, NotFound, Unsupported
from everstep.format import keys, manifest, pack, record
from everstep.format.chunk import Buffer, Encoding, digest
from everstep.format.record import (
    SEALED_KINDS,
    SnapshotRecord,
    StepRecord,
)
from everstep.store.base import Store, checked

_LOOK_BYTES = 256


def dump(store: Store, key: str, as_json: bool) -> None:
    """Print an object of the store; of one that is damaged the first bytes, and then Damaged is raised.

    Raises:
        NotFound: there is no such object.
        Damaged: its bytes are not the ones that were written.
    """
    size_bytes = _size(store, key)
    try:
        _print(store, key, size_bytes, as_json)
    except (Damaged, Unsupported) as error:
        error.key = error.key or key
        if not as_json:
            _look(store, key, size_bytes)
        raise


def _size(store: Store, key: str) -> int:
    absent = NotFound(
        f"{store.url} has no object {key}", next=f"find {store.url} -type f  # what it has", key=key
    )
    try:
        checked(key)
    except ValueError:
        raise absent from None
    for entry in store.list(key, limit=1):
        if entry.key == key:
            return entry.size_bytes
    raise absent


def _print(store: Store, key: str, size_bytes: int, as_json: bool) -> None:
    if key.startswith(keys.PACKS):
        _pack(store, key, size_bytes, as_json)
        return
    data = store.get(key)
    if key.startswith(keys.MANIFESTS):
        _manifest(key, data, as_json)
    elif key.startswith(keys.STEPLOG):
        _steps(record.unseal_segment(data), as_json)
    elif key.startswith(JOURNAL + "/"):
        _steps(read_journal(data), as_json)
    elif key.startswith(keys.SNAPSHOTS):
        _check_name(key, data)
        output.document(msgspec.to_builtins(record.decode(data, SnapshotRecord)))
    else:
        kind = next((kind for prefix, kind in SEALED_KINDS.items() if key.startswith(prefix)), None)
        if kind is None:
            raise Unsupported(f"{key} is none of a chain's objects", key=key)
        output.document(msgspec.to_builtins(record.unseal(data, kind, key)))


def _check_name(key: str, data: Buffer) -> None:
    if digest(data) != key.rpartition("/")[2]:
        raise Damaged(f"{key} does not match its digest", key=key)


def _manifest(key: str, data: Buffer, as_json: bool) -> None:
    _check_name(key, data)
    decoded = manifest.decode(data)
    tree = decoded.tree
    rest = {name: item for name, item in _builtins(decoded).items() if name != "values"}
    if as_json:
        print(_lines({**rest, "values": repr(tree)}))
    else:
        print(_lines(rest))
        print("values = " + pprint.pformat(tree, width=110, compact=True, sort_dicts=False))


def _builtins(decoded: manifest.Manifest) -> Mapping[str, Any]:
    found = msgspec.to_builtins(decoded)
    assert isinstance(found, dict)
    return found


def _lines(content: Mapping[str, Any]) -> str:
    """JSON with a line for each item of a list: a manifest has thousands."""
    parts = []
    for name, item in content.items():
        text = json.dumps(item)
        if isinstance(item, list | tuple) and item:
            text = "[\n    " + ",\n    ".join(map(json.dumps, item)) + "\n  ]"
        parts.append(f"  {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}"


def _pack(store: Store, key: str, size_bytes: int, as_json: bool) -> None:
    """Only the end is read: a pack may be large."""
    start = max(size_bytes - pack.TRAILER_BYTES, 0)
    trailer = pack.decode_trailer(store.get(key, start), size_bytes)
    tail = store.get(key, trailer.footer_offset)
    footer = pack.decode_tail(tail, size_bytes, key.rpartition("/")[2])
    rows = [
        {
            "digest": one.digest,
            "offset": one.offset,
            "stored_bytes": one.stored_bytes,
            "size_bytes": one.size_bytes,
            "encoding": _encoding(one.encoding),
            "check": one.check.hex(),
            "base": one.base,
        }
        for one in footer.entries
    ]
    if as_json:
        output.document({"size_bytes": size_bytes, "salt": footer.salt.hex(), "chunks": rows})
        return
    columns = ("digest", "offset>", "stored_bytes>", "size_bytes>", "encoding", "check", "base")
    output.table(columns, [tuple(row.values()) for row in rows])


def _encoding(number: int) -> str:
    return Encoding(number).name.lower() if number in list(Encoding) else str(number)


def _steps(steps: list[StepRecord], as_json: bool) -> None:
    rows = [
        {
            "step": one.step,
            "epoch": one.epoch,
            "delivered": one.delivered,
            "metrics": {name: _number(bits) for name, bits in one.metrics.items()},
            "lr": [_number(bits) for bits in one.lr],
            "rng": one.rng,
        }
        for one in steps
    ]
    if as_json:
        output.document({"steps": rows})
        return
    for row in rows:
        metrics = " ".join(f"{name}={value}" for name, value in row["metrics"].items())  # type: ignore[attr-defined]
        rates = ",".join(map(str, row["lr"]))  # type: ignore[call-overload]
        place = f"step {row['step']}  epoch {row['epoch']}  batch {row['delivered']}"
        print(output.clean(f"{place}  lr {rates or '-'}  {metrics}  rng {row['rng'] or '-'}"))


def _number(bits: str) -> float | str:
    """A float as Python writes it; nan and inf, which JSON lacks, as texts."""
    try:
        return record.number(float.fromhex(bits))
    except (ValueError, OverflowError):
        raise Damaged(f"a step record holds {bits[:40]!r} where the bits of a float belong") from None


def _look(store: Store, key: str, size_bytes: int) -> None:
    """What cannot be decoded can still be looked at."""
    try:
        data = bytes(store.get(key, 0, _LOOK_BYTES))
    except EverstepError:
        return
    print(f"{key}: {size_bytes} bytes, of which the first {len(data)} are")
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        text = "".join(chr(one) if 32 <= one < 127 else "." for one in row)
        print(f"{at:08x}  {row.hex(' '):<47}  {text}")
