"""Damage of every kind to a chain that is kept twice, and its repair; and what parity costs.

    python -m bench.repair --damages 1000 --seed 1

Rounds of up to twelve damages, each to an object of one of the two copies: a flipped bit, a cut end, a
missing object. Each copy is then repaired from the other. Exits 1 where one is not found, or not repaired
byte for byte, where anything else was touched, or where a chain does not verify afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from everstep.chain.encoding import Always
from everstep.chain.history import Chain
from everstep.chain.lease import Lease
from everstep.chain.repair import consider, execute
from everstep.chain.verify import verify
from everstep.chain.writer import Captured, Facts, Writer
from everstep.format import keys, values
from everstep.format.chunk import Encoding
from everstep.format.layout import Slice, lay_out
from everstep.store.local import LocalStore
from everstep.store.parity import ParityStore
from everstep.store.shards import Shape, Whole, cut
from everstep.testing.damage import damage_some, files_of

GRID_BYTES = 64 * 1024
LAYOUT = lay_out(
    [
        Slice("dense", "float32", (50_000,), (0,), (50_000,)),
        Slice("moment", "float32", (30_000,), (0,), (30_000,)),
        Slice("small", "float32", (100,), (0,), (100,)),
        Slice("frozen", "uint8", (150_000,), (0,), (150_000,), "frozen"),
    ]
)


def make(root: Path) -> None:
    """Six snapshots, in every encoding."""
    chain = Chain.create(str(root), GRID_BYTES)
    writer = Writer(chain, Lease.take(chain.store))
    rng = random.Random(0)
    arena = bytearray(LAYOUT.arena_bytes)
    for step in range(1, 7):
        for one, (number, offset) in zip(LAYOUT.slices, LAYOUT.places, strict=True):
            start = LAYOUT.regions[number].offset + offset
            if step == 1 or one.name == "small" or (one.name == "dense" and step % 2):
                arena[start : start + one.size_bytes] = bytes(rng.choices(range(20), k=one.size_bytes))
        writer.encodings = Always(list(Encoding)[step % 4])
        captured = Captured.whole(LAYOUT, memoryview(bytearray(arena)), values.encode({"step": step}))
        writer.write(captured, Facts(step=step))
    writer.lease.release()


def run(damages: int, seed: int) -> dict[str, object]:
    """Figures of all rounds."""
    found = repaired = wrong = done = rounds = 0
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="everstep-repair-") as place:
        sound = Path(place, "sound")
        make(sound)
        before = files_of(sound)
        while done < damages:
            rng = random.Random(f"{seed}/{rounds}")
            roots = [Path(place, name) for name in ("a", "b")]
            for root in roots:
                shutil.copytree(sound, root)
            hit = damage_some(roots, rng, min(12, damages - done))
            for here, there in ((roots[0], roots[1]), (roots[1], roots[0])):
                plan = consider(LocalStore(here), [LocalStore(there)])
                outcome = execute(plan)
                named = {step.key for step in plan.steps} & before.keys()
                found += len(named & {key for key, (root, _) in hit.items() if root == here})
                wrong += len(named - {key for key, (root, _) in hit.items() if root == here}) + len(
                    outcome.left
                )
            for root in roots:
                after = files_of(root)
                same = {key for key, data in before.items() if after.get(key) == data}
                repaired += len(same & {key for key, (where, _) in hit.items() if where == root})
                more = [key for key in after if key not in before]
                wrong += len(before) - len(same)
                wrong += sum(not key.startswith((keys.HEADS, keys.LEASES)) for key in more)
                wrong += len(verify(Chain(LocalStore(root))).findings)
                shutil.rmtree(root)
            done, rounds = done + len(hit), rounds + 1
    return {
        "damages": done,
        "rounds": rounds,
        "found": found,
        "repaired": repaired,
        "wrong": wrong,
        "seconds": round(time.perf_counter() - began, 1),
    }


def parity(repeats: int = 5) -> dict[str, object]:
    """MB/s of a 32 MiB pack in 4+2: cut alone, put to and read from six directories, read with two of them
    missing; beside one directory."""
    data = os.urandom(32 * 1024 * 1024)
    shape = Shape(4, 2)
    figures: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        began = time.perf_counter()
        work()
        figures.setdefault(name, []).append(len(data) / 1e6 / (time.perf_counter() - began))

    with tempfile.TemporaryDirectory(prefix="everstep-parity-", dir=".") as place:
        for number in range(repeats):
            key = f"packs/00/{number:064x}"
            timed("cut", lambda key=key: cut(key, shape, Whole([data])))  # type: ignore[misc]
            roots = [Path(place, f"{number}-{name}") for name in "abcdef"]
            store = ParityStore(shape, [LocalStore(root) for root in roots])
            plain = LocalStore(Path(place, f"{number}-plain"))
            timed("put, one directory", lambda key=key, plain=plain: plain.put(key, [data]))  # type: ignore[misc]
            timed("put", lambda key=key, store=store: store.put(key, [data]))  # type: ignore[misc]
            timed("get, one directory", lambda key=key, plain=plain: plain.get(key))  # type: ignore[misc]
            timed("get", lambda key=key, store=store: store.get(key))  # type: ignore[misc]
            for root in roots[:2]:
                shutil.rmtree(root)
            again = ParityStore(shape, store.members)
            timed("get, two members lost", lambda key=key, again=again: again.get(key))  # type: ignore[misc]
            stored = sum(entry.size_bytes for one in store.members for entry in one.list())
            for root in (*roots[2:], plain.root):
                shutil.rmtree(root)
    medians = {f"{name}, MB/s": round(statistics.median(found)) for name, found in figures.items()}
    return {**medians, "stored of four members / data": round(stored / len(data), 4)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.repair", description=__doc__.partition("\n")[0])
    parser.add_argument("--damages", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="OUT", help="where the figures go, too")
    arguments = parser.parse_args()
    figures = run(arguments.damages, arguments.seed)
    figures["parity"] = parity()
    print(json.dumps(figures, indent=1))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")
    right = figures["found"] == figures["repaired"] == figures["damages"] and not figures["wrong"]
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
