"""Seeded fuzzing of every decoder: whatever the bytes, only Damaged and Unsupported may come out.

    python -m bench.fuzz --inputs 100000 --seed 1
    python -m bench.fuzz --seed 1 --only 4711        # one input again, with its traceback

Each input is a sound object with one to four mutations, a function of (seed, number) alone. Objects that
carry a digest are also mutated *inside* and sealed again, so that mutations get past the digest. The process
runs under a limit of memory, and each call under a limit of time; a call that hangs ends the process with its
traceback. Exits 1 when anything but the two errors came out, when bytes that a digest covers were changed
unseen, or when a call took longer than it may.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import random
import resource
import struct
import sys
import time
import traceback
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import zstandard

from everstep.chain.steplog import read_journal
from everstep.errors import Damaged, Unsupported
from everstep.format import chunk, manifest, pack, record, values
from everstep.format.chunk import Encoding
from everstep.format.manifest import Manifest, Place, StoredChunk, StoredLeaf, StoredRegion, StoredSlice
from everstep.format.record import (
    ChainRecord,
    HeadRecord,
    LeaseRecord,
    Move,
    NewPack,
    Origin,
    PruneRecord,
    RelocationRecord,
    SealedRecord,
    SnapshotRecord,
    Spot,
    StepRecord,
    TagRecord,
)
from everstep.format.values import Leaf, Scalar, Symbol

MEMORY_BYTES = 2 << 30
CALL_LIMIT_S = 10.0
HANG_S = 60.0
ALLOWED = (Damaged, Unsupported)
AT = "2024-05-06T07:08:09.101112+00:00"
NONCE = "0123456789abcdef"


@dataclass(frozen=True)
class Target:
    """A decoder. `sealed`: whatever is not one of the seeds must be refused."""

    name: str
    seeds: Sequence[bytes]
    decode: Callable[[bytes], object]
    sealed: bool = False
    is_json: bool = False


@dataclass
class Report:
    """What came out, by target and outcome, and how long the slowest call of each target took."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    slowest_s: dict[str, tuple[float, int]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


# -- sound objects ----------------------------------------------------------------------------------------


def _tree() -> Any:
    counts: defaultdict[str, int] = defaultdict(int)
    counts["a"] = 3
    return {
        "objects": {
            "model": {"weight": Leaf("model/weight"), "bias": Leaf("model/bias")},
            "optimizer": {"state": {0: {"step": 3.0, "exp": Leaf("model/weight")}}, "groups": [{"lr": 1e-3}]},
            "set": {1, 2, "x", (1, 2), frozenset({3})},
            "deque": deque([1, deque(["y"])], maxlen=5),
        },
        "run": {
            "rng": (3, tuple(range(40)), None),
            "big": [2**70, -(2**70), 1 + 2j, b"bytes" * 9, True, False, ""],
            "ordered": OrderedDict(z=1, a=OrderedDict(b=2)),
            "counter": Counter("hello"),
            "default": counts,
            "dtype": Symbol("torch.dtype", "float32"),
            "scalar": Scalar("<f4", b"\0\0\0\0"),
        },
    }


def _pack(chunks: Sequence[tuple[bytes, Encoding]]) -> tuple[str, bytes, pack.Footer]:
    builder = pack.Builder()
    for raw, encoding in chunks:
        stored = chunk.encode(raw, encoding)
        builder.add(chunk.digest(raw), len(raw), stored, len(stored), encoding, "")
    name, parts = builder.finish()
    return name, b"".join(parts), pack.Footer(tuple(builder.entries))


def _manifest() -> Manifest:
    raws = [(bytes([number]) * 4096, Encoding.ZSTD if number % 2 else Encoding.RAW) for number in range(6)]
    name, data, footer = _pack([*raws, (b"rest" * 16, Encoding.RAW)])
    numbers = tuple(range(7))
    encoded = values.encode(_tree())
    leaves = (
        StoredLeaf("model/weight", "bfloat16", (6, 2048), (StoredSlice((0, 0), (6, 2048), 0, 0),)),
        StoredLeaf("model/bias", "float32", (16,), (StoredSlice((0,), (16,), 0, 6 * 4096),)),
        StoredLeaf("model/empty", "numpy:<U7", (0,), (StoredSlice((0,), (0,), 1, 0),)),
    )
    return Manifest(
        format=1,
        grid_bytes=4096,
        leaves=leaves,
        regions=(StoredRegion(6 * 4096 + 64, numbers), StoredRegion(0, ())),
        chunks=tuple(StoredChunk(one.digest, one.size_bytes) for one in footer.entries),
        places=tuple(
            Place(name, one.offset, one.stored_bytes, one.encoding, one.base) for one in footer.entries
        ),
        packs={name: len(data)},
        values=encoded,
        state="00" * 32,
        salt="salt",
    )


def _sealed() -> list[SealedRecord]:
    digest = chunk.digest(b"snapshot")
    return [
        ChainRecord(chain="ab" * 16, created_at=AT),
        HeadRecord(snapshot=digest, step=7, writer=1, nonce=NONCE, at=AT, branch="main", number=3),
        HeadRecord(digest, 7, 1, NONCE, AT, "main", 4, move=Move("rollback", "step:7")),
        TagRecord(snapshot=digest, nonce=NONCE, at=AT, name="best", number=2),
        LeaseRecord("host", "boot", pid=4242, started=99, nonce=NONCE, at=AT, number=1, branch="main"),
        PruneRecord(
            (digest,), (digest,), (digest,), "host", "boot", 4242, 99, nonce=NONCE, begun_at=AT, number=1
        ),
        RelocationRecord(
            (NewPack(digest, 1 << 20),),
            {digest: (Spot(0, 0, 4096), Spot(8192, 0, 0))},
            nonce=NONCE,
            at=AT,
            number=1,
        ),
    ]


def _snapshot() -> SnapshotRecord:
    digest = chunk.digest(b"snapshot")
    return SnapshotRecord(
        format=1,
        step=7,
        epoch=1,
        state=digest,
        manifests=(digest,),
        taken_at=AT,
        branch="main",
        writer=1,
        parents=(digest,),
        note="ä note",
        metrics={"loss": 0.5, "worst": "inf"},
        approximate=("a reason",),
        environment={"python": "3.12"},
        costs={"store": 1.5},
        origin=Origin("ab", "runs/old", digest, 7),
    )


def _steps() -> list[StepRecord]:
    return [
        StepRecord(
            step=number,
            epoch=0,
            delivered=number,
            metrics={"loss": (1 / number).hex()},
            lr=("0x1p-10",),
            rng="ff",
        )
        for number in range(1, 6)
    ]


def _journal(lines: Sequence[bytes]) -> bytes:
    return b"".join(chunk.digest(line)[:16].encode() + b" " + line + b"\n" for line in lines)


# -- targets ----------------------------------------------------------------------------------------------


def _open_manifest(made: Manifest) -> object:
    """As a reader goes on: the values, and where each leaf's bytes are."""
    sizes = [leaf.size_bytes(part) for leaf in made.leaves for part in leaf.slices]
    return sizes, made.by_name, made.place_of, made.tree


def _compressed(text: bytes) -> object:
    return _open_manifest(manifest.decode(zstandard.ZstdCompressor().compress(text)))


def _values_in_manifest(encoded: bytes) -> object:
    """Values as a reader meets them: in the JSON of a manifest."""
    whole = manifest.encode(msgspec.structs.replace(_manifest(), values=encoded))
    return _open_manifest(manifest.decode(whole))


def _named_tail(data: bytes) -> object:
    """A tail under the name of its own footer, wherever the trailer says that this is."""
    footer_bytes = int.from_bytes(data[-52:-48], "little")
    name = chunk.digest(data[:footer_bytes])
    return pack.decode_tail(data[:-40] + bytes.fromhex(name) + data[-8:], _tail_pack_bytes(data), name)


def _tail_pack_bytes(data: bytes) -> int:
    return len(data) + int.from_bytes(data[-48:-40], "little")


def _any_trailer(data: bytes) -> object:
    """The first eight bytes are the pack's size."""
    return pack.decode_trailer(data[8:], int.from_bytes(data[:8], "little"))


def _any_chunk(encoding: int, base: bytes, data: bytes) -> object:
    """The first eight bytes are the size that a manifest claims."""
    size_bytes = int.from_bytes(data[:8], "little", signed=True)
    return chunk.decode(data[8:], encoding, size_bytes, base=lambda: base)


def _resealed(kind: type[SealedRecord], key: str, body: bytes) -> object:
    sealed = b'{"blake3":"' + chunk.digest(body).encode() + b'","record":' + body + b"}\n"
    return record.unseal(sealed, kind, key)


def _resealed_segment(body: bytes) -> object:
    return _compare(record.unseal_segment(b'{"blake3":"' + chunk.digest(body).encode() + b'"}\n' + body))


def _rechecked_journal(data: bytes) -> object:
    return _compare(read_journal(_journal(data.split(b"\n"))))


def _compare(steps: list[StepRecord]) -> object:
    """As a resume does with them."""
    mine = StepRecord(step=1, epoch=0, metrics={"loss": "0x1p0"}, lr=("0x0p0",))
    return [mine.differences(one) + one.differences(mine) for one in steps]


def targets() -> list[Target]:
    """Every decoder, with sound objects to start from."""
    made, encoded = _manifest(), values.encode(_tree())
    name, data, footer = _pack([(b"first", Encoding.RAW), (b"second" * 900, Encoding.ZSTD)])
    footer_bytes = pack.encode_footer(footer)
    tail = data[pack.data_bytes(footer.entries) :]
    steps = _steps()
    lines = [record.encode(step) for step in steps]
    found = [
        Target("values.decode", [encoded, values.encode([1, "a"]), values.encode({})], values.decode),
        Target("values in a manifest", [encoded], _values_in_manifest),
        Target(
            "manifest.decode", [manifest.encode(made)], lambda data: _open_manifest(manifest.decode(data))
        ),
        Target("manifest JSON", [msgspec.json.encode(made)], _compressed, is_json=True),
        Target("pack.decode_footer", [footer_bytes, pack.encode_footer(pack.Footer(()))], pack.decode_footer),
        Target("pack.decode_trailer", [struct.pack("<Q", len(data)) + data[-64:]], _any_trailer),
        Target("pack.decode_tail", [tail], lambda it: pack.decode_tail(it, len(data), name), sealed=True),
        Target("pack.decode_tail, named anew", [tail], _named_tail),
        Target("record.unseal_segment", [record.seal_segment(steps)], record.unseal_segment, sealed=True),
        Target("step log segment, sealed anew", [b"\n".join(lines) + b"\n"], _resealed_segment, is_json=True),
        Target("read_journal", [_journal(lines)], lambda data: _compare(read_journal(data))),
        Target("journal, checked anew", [b"\n".join(lines)], _rechecked_journal, is_json=True),
        Target("record.decode_step", lines, lambda line: _compare([record.decode_step(line)]), is_json=True),
    ]
    for one in (*_sealed(), _snapshot()):
        decode = partial(_decode, type(one))
        found.append(
            Target(f"record.decode {type(one).__name__}", [record.encode(one)], decode, is_json=True)
        )
    for one in _sealed():
        kind, body = type(one), record.encode(one)
        unseal, resealed = partial(_unseal, kind, one.key), partial(_resealed, kind, one.key)
        found += [
            Target(f"record.unseal {kind.__name__}", [record.seal(one)], unseal, sealed=True),
            Target(f"{kind.__name__}, sealed anew", [body], resealed, is_json=True),
        ]
    raw = b"chunk of some words, all of them different; " * 40 + b"rest"
    for encoding in Encoding:
        base = bytes(reversed(raw))
        below = base if encoding is Encoding.XOR_SHUFFLE_ZSTD else None
        stored = chunk.encode(raw, encoding, base=below)
        seeds = [struct.pack("<q", len(raw)) + stored]
        found.append(Target(f"chunk.decode {encoding.name}", seeds, partial(_any_chunk, encoding, base)))
    return found


def _decode(kind: type[msgspec.Struct], data: bytes) -> object:
    return record.decode(data, kind)


def _unseal(kind: type[SealedRecord], key: str, data: bytes) -> object:
    return record.unseal(data, kind, key)


# -- mutations --------------------------------------------------------------------------------------------

Mutation = Callable[[random.Random, bytes, Sequence[bytes]], bytes]

EXTREMES = [
    b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff\xff", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80",
    b"\xff" * 8, b"\xff" * 7 + b"\x7f", bytes(7) + b"\x80", bytes(8), bytes(4), b"\xff" * 8 + b"\x01",
    b"\xff" * 8 + b"\x7f", b"\xff\xff\xff\xff\x0f", b"\x80" * 8 + b"\x00", b"\x80" * 12,
    struct.pack("<Q", 1 << 30), struct.pack("<I", 1 << 28), struct.pack("<Q", (1 << 26) + 1),
    struct.pack("<I", 65536),
]  # fmt: skip
"""Lengths and counts as an attacker would claim them, in fixed sizes and as varints."""

DEEP = 100_000
_DEEP_MARK = '"\u2603 deep"'
HOSTILE = [
    0, -1, 1, 2, 255, 256, 4095, 4097, 2**31, 2**32, 2**53 + 1, 2**62, 2**62 + 1, 2**63, 2**64, 10**400,
    -(2**63), 0.5, 1e308, -0.0, None, True, False, "", "x", "nan", "\x00", "ü\U0001f682", "x" * 5000,
    "0" * 64, "f" * 64, "F" * 64, "../../etc/passwd", "0x1p99999", "0x1p0", [], {}, [[]], [0] * 70, {"a": 1},
    "\u2603 deep", "float32", "numpy:<f8", "numpy:<U999999", "AAAA", "====", {"format": 3},
]  # fmt: skip


def _flip_bit(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _set_byte(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))]) + data[at + 1 :]


def _truncate(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] if rng.random() < 0.8 else data[at:]


def _splice(rng: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    other = rng.choice(seeds)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _duplicate(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[:end] + data[start:end] * rng.choice((1, 1, 2, 20)) + data[end:]


def _delete(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[:start] + data[end:]


def _swap(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    a, b, c = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def _put_extreme(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """A length field somewhere becomes an extreme one."""
    extreme = rng.choice(EXTREMES)
    at = rng.randrange(len(data) + 1)
    return data[:at] + extreme + data[at + (len(extreme) if rng.random() < 0.7 else rng.randrange(3)) :]


def _insert_random(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 2, 8, 100))) + data[at:]


def _random(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 8, 64, len(data))))


BYTES: list[Mutation] = [
    _flip_bit, _flip_bit, _set_byte, _truncate, _splice, _duplicate, _delete, _swap, _put_extreme,
    _put_extreme, _insert_random, _random,
]  # fmt: skip


def _mutate_json(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """Change nodes of a JSON text, or of one line of several, so that it stays JSON."""
    lines = data.split(b"\n")
    number = rng.randrange(len(lines))
    try:
        tree = [json.loads(lines[number])]
    except (ValueError, RecursionError):
        return data
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _mutate_node(rng, tree)
    text = json.dumps(tree[0], separators=(",", ":"), ensure_ascii=rng.random() < 0.2)
    nested = rng.choice(("[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "[" * DEEP))
    lines[number] = text.replace(_DEEP_MARK, nested).encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def _mutate_node(rng: random.Random, tree: list[Any]) -> None:
    """One node is replaced, taken away, doubled or swapped with another; `tree` holds the whole one."""
    spots: list[tuple[Any, Any]] = [(tree, 0)]
    for holder, key in spots:
        node = holder[key]
        if isinstance(node, dict):
            spots += [(node, name) for name in node]
        elif isinstance(node, list):
            spots += [(node, number) for number in range(len(node))]
    holder, key = rng.choice(spots)
    what = rng.randrange(6)
    if what == 0 and len(spots) > 1 and holder is not tree:
        holder.pop(key)
    elif what == 1 and isinstance(holder, list) and holder is not tree:
        holder[key:key] = [holder[key]] * rng.choice((1, 3, 100))
    elif what == 2:
        other, name = rng.choice(spots)
        holder[key] = json.loads(json.dumps(other[name]))
    elif what == 3 and isinstance(holder[key], int):
        holder[key] += rng.choice((-1, 1, 4096, -4096))
    elif what == 4 and isinstance(holder, dict):
        holder[rng.choice(("format", "extra", "ranks", "salt", ""))] = copy.deepcopy(rng.choice(HOSTILE))
    else:
        holder[key] = copy.deepcopy(rng.choice(HOSTILE))


def mutated(rng: random.Random, target: Target) -> bytes:
    data = rng.choice(target.seeds)
    if target.is_json and rng.random() < 0.8:
        data = _mutate_json(rng, data, target.seeds)
        if rng.random() < 0.8:
            return data
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(BYTES)(rng, data or b"\0", target.seeds)
    return data


# -- the run ----------------------------------------------------------------------------------------------


def made_input(found: Sequence[Target], seed: int, number: int) -> tuple[Target, bytes]:
    """Input `number`: a function of its arguments alone."""
    target = found[number % len(found)]
    return target, mutated(random.Random(f"{seed}/{number}"), target)


def outcome(target: Target, data: bytes) -> str:
    """What came out, in a word; raises what must not come out."""
    try:
        target.decode(data)
    except ALLOWED as error:
        return type(error).__name__
    if target.sealed and data not in target.seeds:
        raise AssertionError("bytes that a digest covers were changed, and nobody saw it")
    return "decoded"


def run(found: Sequence[Target], inputs: int, seed: int, call_limit_s: float = CALL_LIMIT_S) -> Report:
    """Decode `inputs` mutated inputs, one after the other."""
    report = Report()
    for number in range(inputs):
        target, data = made_input(found, seed, number)
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        begun = time.perf_counter()
        try:
            word = outcome(target, data)
        except Exception:
            word = "ESCAPED"
            report.failures.append(f"input {number} ({target.name}):\n{traceback.format_exc(limit=-6)}")
        took = time.perf_counter() - begun
        report.outcomes[target.name, word] += 1
        report.slowest_s[target.name] = max(report.slowest_s.get(target.name, (0.0, 0)), (took, number))
        if took > call_limit_s:
            report.failures.append(f"input {number} ({target.name}) took {took:.1f} s")
    faulthandler.cancel_dump_traceback_later()
    return report


def limit_memory(size_bytes: int) -> None:
    """Let this process have `size_bytes` more address space than it has now."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + size_bytes, hard))


def show(report: Report) -> None:
    words = sorted({word for _, word in report.outcomes})
    print(f"{'target':36}" + "".join(f"{word:>13}" for word in words) + "   slowest ms (input)")
    for name, (took, number) in report.slowest_s.items():
        counts = "".join(f"{report.outcomes[name, word]:13}" for word in words)
        print(f"{name:36}{counts}{took * 1e3:13.1f} ({number})")
    totals: Counter[str] = Counter()
    for (_, word), count in report.outcomes.items():
        totals[word] += count
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{totals.total()} inputs: " + ", ".join(f"{count} {word}" for word, count in totals.most_common()))
    print(f"peak memory {peak} MiB")
    for failure in report.failures[:20]:
        print(failure, file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="one input, by its number")
    parser.add_argument("--json", metavar="OUT", help="where the figures go, too")
    arguments = parser.parse_args()
    faulthandler.enable()
    found = targets()
    chunk.encode(bytes(64), Encoding.SHUFFLE_ZSTD)  # Imports numpy before memory is limited.
    limit_memory(MEMORY_BYTES)
    if arguments.only is not None:
        target, data = made_input(found, arguments.seed, arguments.only)
        print(f"{target.name}: {len(data)} bytes, {data[:400]!r}")
        print(outcome(target, data))
        return 0
    report = run(found, arguments.inputs, arguments.seed)
    show(report)
    if arguments.json:
        by_outcome: Counter[str] = Counter()
        for (_, name), count in report.outcomes.items():
            by_outcome[name] += count
        figures = {
            "inputs": arguments.inputs,
            "seed": arguments.seed,
            "outcomes": by_outcome,
            "slowest_s": max(slowest for slowest, _ in report.slowest_s.values()),
            "violations": len(report.failures),
        }
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
