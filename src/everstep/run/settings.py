"""The settings of a run: what the code says, unless the environment says otherwise."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from everstep.chain.retention import Keep
from everstep.errors import Mismatch
from everstep.format.keys import checked
from everstep.keeper.memory import available_bytes
from everstep.run import triggers
from everstep.store.base import Store

_TRUE = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


_KEEPER_NUMBERS: dict[str, tuple[Callable[[str], float], float]] = {
    "EVERSTEP_KEEPER_NICE": (int, 19),
    "EVERSTEP_KEEPER_LINGER": (float, 1e6),
}
"""What a keeper process reads for itself when it starts: how, and the most that it can be; the least is 0."""


@dataclass(frozen=True)
class Settings:
    """See `everstep.open` for what each means. The variable of `every` is `EVERSTEP_EVERY`, and so on."""

    repo: str | Store
    every: str | Sequence[str] | None = "10m"
    keep: str = "last 3"
    resume: str = "auto"
    branch: str = "main"
    strict: bool = True
    overlap: bool = True
    max_arena_bytes: int | str | None = None
    start: str = ""
    unsafe_single_writer: bool = False
    replicas: Sequence[str | Store] | str = ()
    scrub: str | None = None
    approximate_data: bool = False
    replica_wait: float = 60.0
    """For so many seconds `close` waits for replicas; only the environment says so."""
    ranks_wait: float = 600.0
    """For so many seconds ranks wait for each other when a run is opened; only the environment says so, as it
    does for the next two."""
    ranks_hold: float = 2.0
    """A rank waits no longer than this, at the end of a step, to hear which step is taken."""
    ranks_parts: float = 600.0
    """For so many seconds a snapshot waits for the parts of all ranks."""
    keeper: str = "process"
    """`process`, or `thread`; only the environment says so: it is for debuggers and sandboxes."""
    paranoid: bool = False
    """Compare every capture with the state; only the environment says so."""

    def overridden(self, environment: Mapping[str, str] | None = None) -> Settings:
        """These settings with those of the environment on top.

        Raises:
            Mismatch: a setting is not understood; nothing was touched.
        """
        found = os.environ if environment is None else environment
        names = ("repo", "every", "keep", "resume", "branch", "max_arena_bytes", "start", "scrub", "keeper")
        changes: dict[str, object] = {
            name: found[f"EVERSTEP_{name.upper()}"] for name in names if found.get(f"EVERSTEP_{name.upper()}")
        }
        for name in ("strict", "overlap", "unsafe_single_writer", "approximate_data", "paranoid"):
            variable = f"EVERSTEP_{name.upper()}"
            if found.get(variable):
                changes[name] = truth(variable, found[variable])
        if found.get("EVERSTEP_REPLICAS"):
            changes["replicas"] = found["EVERSTEP_REPLICAS"]
        for name in ("replica_wait", "ranks_wait", "ranks_hold", "ranks_parts"):
            variable = f"EVERSTEP_{name.upper()}"
            if found.get(variable):
                _check_number(variable, found[variable], float, 1e6)
                changes[name] = float(found[variable])
        for variable, (read, most) in _KEEPER_NUMBERS.items():
            if found.get(variable):
                _check_number(variable, found[variable], read, most)
        settings = replace(self, **changes)  # type: ignore[arg-type]
        settings.check()
        return settings

    def check(self) -> None:
        """Raises Mismatch when a setting is not understood."""
        if not self.repo:
            raise Mismatch(
                "no place for the chain was given",
                kept="nothing was touched",
                next="everstep.open('runs/NAME', ...) or EVERSTEP_REPO=runs/NAME",
            )
        triggers.parse(self.every)
        Keep.parse(self.keep)
        checked(self.branch, "branch")
        self._asked_bytes()
        _ = self.scrub_bytes_per_s
        if self.start and self.resume not in ("auto", "must", "never"):
            raise Mismatch(
                f"start={self.start!r} and resume={self.resume!r} both name a snapshot",
                kept="nothing was touched",
                next="start= for where a new branch begins, resume= to go back on the branch itself",
            )
        if self.keeper not in ("process", "thread"):
            raise Mismatch(
                f"EVERSTEP_KEEPER={self.keeper!r} is neither process nor thread",
                kept="nothing was touched",
                next="EVERSTEP_KEEPER=process",
            )

    @property
    def replica_list(self) -> tuple[str | Store, ...]:
        """Those of a text have commas between them."""
        if not isinstance(self.replicas, str):
            return tuple(self.replicas)
        return tuple(one.strip() for one in self.replicas.split(",") if one.strip())

    @property
    def scrub_bytes_per_s(self) -> int:
        """0: the keeper does not scrub."""
        return 0 if self.scrub is None else rate_in_bytes(self.scrub)

    def arena_limit_bytes(self) -> int:
        """What all arenas together may take: where nothing was asked for, most of the memory that is free
        now."""
        asked = self._asked_bytes()
        return available_bytes() * 3 // 4 if asked is None else asked

    def _asked_bytes(self) -> int | None:
        asked = self.max_arena_bytes
        return size_in_bytes(asked) if isinstance(asked, str) else asked

    @property
    def every_text(self) -> str:
        return ", ".join(map(str, triggers.parse(self.every))) or "never by itself"


def disabled(environment: Mapping[str, str] | None = None) -> bool:
    """Whether `EVERSTEP_DISABLE` turns everything into a no-op."""
    found = os.environ if environment is None else environment
    return bool(found.get("EVERSTEP_DISABLE")) and truth("EVERSTEP_DISABLE", found["EVERSTEP_DISABLE"])


def _check_number(variable: str, text: str, read: Callable[[str], float], most: float) -> None:
    try:
        fits = 0 <= read(text) <= most
    except ValueError:
        fits = False
    if not fits:
        raise Mismatch(
            f"{variable}={text!r} is no number from 0 to {most:.0f}",
            kept="nothing was touched",
            next=f"unset {variable}",
        )


def truth(name: str, text: str) -> bool:
    """Raises Mismatch when `text` is neither yes nor no."""
    if text.lower() not in _TRUE:
        raise Mismatch(f"{name}={text!r} is neither 1 nor 0", kept="nothing was touched", next=f"{name}=1")
    return _TRUE[text.lower()]


_UNITS = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]?i?)B?")


def size_in_bytes(text: str) -> int:
    """From `"20GB"`, `"512MiB"` or `"1000000"`. Raises Mismatch."""
    match = _SIZE.fullmatch(text.strip())
    unit = match[2].replace("K", "k").replace("ki", "Ki") if match else ""
    if not match or unit not in _UNITS:
        raise Mismatch(f"{text!r} is no size", kept="nothing was touched", next="max_arena_bytes='20GB'")
    return int(float(match[1]) * _UNITS[unit])


MAX_RATE = 10**12
"""Bytes a second; faster is as good as unbounded."""


def rate_in_bytes(text: str) -> int:
    """From `"20MB/s"`, per second. Raises Mismatch."""
    try:
        return min(size_in_bytes(text.strip().removesuffix("/s")), MAX_RATE)
    except (Mismatch, OverflowError) as error:
        raise Mismatch(
            f"scrub={text!r} is no rate", kept="nothing was touched", next="scrub='20MB/s'"
        ) from error
