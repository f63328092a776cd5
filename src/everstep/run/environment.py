"""What a run depends on besides its state: recorded with each snapshot, compared at resume."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

from everstep.chain.drift import EXACTNESS, drift
from everstep.format.chunk import digest

GIT_TIMEOUT_S = 2.0
"""A tree on a slow disk is not waited for: then the commit is not recorded."""

_SCRIPT_BYTES = 16 * 1024 * 1024
_DIGITS = 16


def here() -> dict[str, str]:
    """The facts of this process. Starts no accelerator. The first call may run git, for `GIT_TIMEOUT_S` at
    most; later ones take microseconds."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        **_lasting(),
        **(_cuda() if cuda else {}),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
        "arguments": " ".join(sys.argv),
    }


@cache
def _lasting() -> dict[str, str]:
    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "system": platform.platform(),
        **_program(),
    }


@cache
def _cuda() -> dict[str, str]:
    """Only where it is in use: on a CPU it decides about nothing."""
    versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]
    return {name: str(version) for name, version in versions.items() if version is not None}


def _program() -> dict[str, str]:
    """The digest of the script that was started, and the git commit that its directory is at."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if not script:
        return {}
    facts = {"script": script_digest(Path(script)), "commit": commit_of(Path(script).resolve().parent)}
    return {name: fact for name, fact in facts.items() if fact}


def script_digest(path: Path) -> str:
    """The first digits of a file's digest; "" where it cannot be read or is no script by its size."""
    try:
        with path.open("rb") as file:
            data = file.read(_SCRIPT_BYTES + 1)
    except OSError:
        return ""
    return digest(data)[:_DIGITS] if len(data) <= _SCRIPT_BYTES else ""


def commit_of(directory: Path, timeout_s: float = GIT_TIMEOUT_S) -> str:
    """The commit that a directory's working tree is at, with `-dirty` after it where tracked files have
    changes; "" where there is none, no git, or no answer in time. Locks and changes nothing."""
    command = ["git", "-C", str(directory), "-c", "core.fsmonitor=false", "status"]
    command += ["--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # A status that is cut off must not leave a lock behind in somebody's tree.
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            timeout=timeout_s,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    commit, dirty = "", False
    for line in done.stdout.decode(errors="replace").splitlines():
        if line.startswith("# branch.oid "):
            commit = line.split(" ")[2]
        dirty = dirty or not line.startswith("#")
    if not commit or commit == "(initial)":
        return ""
    return f"{commit}-dirty" if dirty else commit


def breaks_exactness(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Why steps may come out otherwise here than there; empty: no reason known."""
    return [str(one) for one in drift(before, now) if one.kind == EXACTNESS]
