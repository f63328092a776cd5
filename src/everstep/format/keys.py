"""The names of a chain's objects (FORMAT.md, "Keys")."""

from __future__ import annotations

import re

from everstep.errors import Mismatch

CHAIN = "everstep.json"
PACKS = "packs/"
MANIFESTS = "manifests/"
SNAPSHOTS = "snapshots/"
HEADS = "heads/"
TAGS = "tags/"
LEASES = "leases/"
PARTS = "parts/"
PRUNES = "prunes/"
REPLICAS = "replicas/"
STEPLOG = "steplog/"
RELOCATIONS = "relocations/"

_LAST = 0xFFFF_FFFF_FFFF_FFFF
MAX_NAME_CHARACTERS = 100
_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{MAX_NAME_CHARACTERS - 1}}}")


def pack(name: str) -> str:
    return f"{PACKS}{name[:2]}/{name}"


def manifest(name: str) -> str:
    return MANIFESTS + name


def snapshot(name: str) -> str:
    return SNAPSHOTS + name


def numbered(prefix: str, number: int) -> str:
    """The key of record `number` (1, 2, ...): it counts down, so that the newest sorts first."""
    return f"{prefix}{_LAST - number:016x}"


def number_of(key: str) -> int | None:
    """The number of a numbered key, or None where the key has none."""
    last = key.rpartition("/")[2]
    return _LAST - int(last, 16) if re.fullmatch("[0-9a-f]{16}", last) else None


def head(branch: str) -> str:
    """The prefix of a branch's head records."""
    return f"{HEADS}{checked(branch, 'branch')}/"


def tag(name: str) -> str:
    """The prefix of a tag's records."""
    return f"{TAGS}{checked(name, 'tag')}/"


def lease(branch: str) -> str:
    """The prefix of a branch's lease records. Version 0.2 kept one lease for all branches, right under
    `LEASES`."""
    return f"{LEASES}{checked(branch, 'branch')}/"


def steplog(branch: str) -> str:
    """The prefix of a branch's step log segments."""
    return f"{STEPLOG}{checked(branch, 'branch')}/"


def segment(branch: str, writer: int, step: int) -> str:
    """The key of the segment whose first record is of `step`; these count up."""
    return f"{steplog(branch)}{writer:016x}/{step:016x}"


def parts(branch: str, writer: int | None = None, take: int | None = None) -> str:
    """The prefix of the part records of a branch, of one writer of it, or of one take of that."""
    prefix = f"{PARTS}{checked(branch, 'branch')}/"
    for number in (writer, take):
        if number is None:
            return prefix
        prefix += f"{number:016x}/"
    return prefix


def part(branch: str, writer: int, take: int, rank: int) -> str:
    """The key of the part record of a rank; these count up."""
    return f"{PARTS}{branch}/{writer:016x}/{take:016x}/{rank:016x}"


def can_name(name: str) -> bool:
    """Whether `name` can name a branch or tag."""
    return _NAME.fullmatch(name) is not None


def checked(name: str, what: str) -> str:
    """Raises Mismatch when `name` cannot name a branch or tag."""
    if not can_name(name):
        raise Mismatch(
            f"{name!r} cannot name a {what}: up to {MAX_NAME_CHARACTERS} letters, digits, '.', '_' and '-' "
            "can, the first of them none of '.' and '-'",
            kept="nothing was touched",
        )
    return name
