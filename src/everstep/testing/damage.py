"""Damage of every kind to the files of a chain: for who tests that it is found and repaired."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

HOW = ("flip", "cut", "delete")


def files_of(root: Path) -> dict[str, bytes]:
    """The bytes of every object, by key."""
    found = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def damage(root: Path, key: str, how: str, rng: random.Random) -> None:
    """Flip a bit of an object, cut it short, or take it away."""
    path = root / key
    data = bytearray(path.read_bytes())
    path.unlink()
    if how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    if how == "cut":
        del data[rng.randrange(len(data)) :]
    if how != "delete":
        path.write_bytes(data)


def damage_some(roots: Sequence[Path], rng: random.Random, most: int) -> dict[str, tuple[Path, str]]:
    """Damage up to `most` objects, each in one of the copies only. Returns what was done to which."""
    keys = sorted(files_of(roots[0]))
    done = {}
    for key in rng.sample(keys, rng.randrange(1, most + 1)):
        root, how = rng.choice(roots), rng.choice(HOW)
        damage(root, key, how, rng)
        done[key] = root, how
    return done
