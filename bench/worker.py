"""A function of the benchmark in a process of its own: nothing that ran before is in its memory."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from bench.processes import Tree
from bench.trainer import ROOT


def start(tree: Tree, module: str, function: str, *arguments: object) -> subprocess.Popen[str]:
    """Start `module.function(*arguments)`: plain values in, plain values out.

    A function that yields gets no further after a value until it is sent a line: it can be killed there.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "bench.worker", module, function, json.dumps(arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=tree.environment(),
        cwd=ROOT,
        text=True,
    )


def value_of(process: subprocess.Popen[str]) -> Any:
    """What the function returned or yielded next. Raises RuntimeError when it raised or died; what it had to
    say is on the error output."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"bench.worker ended with {process.wait()}")
    return json.loads(line)


def call(tree: Tree, module: str, function: str, *arguments: object) -> Any:
    """Start it and wait for what it returns and for its end."""
    with start(tree, module, function, *arguments) as process:
        return value_of(process)


def main() -> int:
    os.environ["EVERSTEP_LOG"] = "quiet"
    warnings.simplefilter("ignore")
    module, function, arguments = sys.argv[1:]
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        result = getattr(importlib.import_module(module), function)(*json.loads(arguments))
        for value in result if isinstance(result, Iterator) else [result]:
            print(json.dumps(value), file=answers, flush=True)
            if isinstance(result, Iterator):
                sys.stdin.readline()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
