"""The servers as fixtures: each once in a session of each process, and a fresh bucket for each who asks.

What is not installed is skipped with a line that says so; `EVERSTEP_REQUIRE_SERVERS=1` makes it a failure.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from . import azure as emulator
from . import ceph as gateway
from . import hdfs as hadoop
from . import small, swift
from .running import S3

REQUIRED = os.environ.get("EVERSTEP_REQUIRE_SERVERS", "0") not in ("", "0")
"""Looked at when this is imported: the tests themselves see no setting from outside."""

_buckets = itertools.count(1)


def need(server: str, missing: list[str]) -> None:
    """Skip, or fail where servers are required."""
    if not missing:
        return
    text = f"{server} is not installed (no {', '.join(missing)}): make servers"
    if REQUIRED:
        pytest.fail(text)
    pytest.skip(text)


@pytest.fixture(scope="session")
def ceph() -> Iterator[S3]:
    need("the Ceph object gateway", [*gateway.missing(), *small.missing("boto3")])
    # Its sockets need a short path.
    directory = Path(tempfile.mkdtemp(prefix="ceph-", dir="/tmp"))
    try:
        with gateway.running(directory) as server:
            yield server
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def hdfs() -> Iterator[hadoop.HDFS]:
    """A NameNode and three DataNodes. What they hold lies in memory where it can: each of their many syncs
    would wait for the disk that all tests share."""
    need("HDFS", hadoop.missing())
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="everstep-hdfs-", dir=where) as directory,
        hadoop.running(Path(directory)) as server,
    ):
        yield server


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    need("moto", small.missing(*small.MOTO))
    with small.moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[emulator.Azure]:
    need("Azurite", emulator.missing())
    with emulator.running(tmp_path_factory.mktemp("azurite")) as server:
        yield server


@pytest.fixture
def container(azurite: emulator.Azure, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh one of Azure's, with the environment set for it; its URL."""
    for name, value in azurite.variables().items():
        monkeypatch.setenv(name, value)
    return f"az://{azurite.make_container(f'c{os.getpid()}-{next(_buckets)}')}"


@pytest.fixture(scope="session")
def liar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """It overwrites although it was asked not to."""
    need("rclone", [] if small.rclone_program() else ["rclone"])
    with small.rclone(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture(scope="session")
def refuser() -> Iterator[S3]:
    """A Swift that answers 501 to a condition."""
    need("Swift", swift.missing(swift.REFUSES))
    with swift.running(swift.REFUSES) as server:
        yield server


@pytest.fixture(scope="session")
def peeker() -> Iterator[S3]:
    """A Swift that looks whether there is an object and writes then: two of several may win."""
    need("Swift", swift.missing(swift.LOOKS_FIRST))
    with swift.running(swift.LOOKS_FIRST) as server:
        yield server


Bucket = Callable[[S3], str]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """Makes a fresh bucket on a server, with the environment set for it; returns the URL."""

    def make(server: S3) -> str:
        for name, value in server.variables().items():
            monkeypatch.setenv(name, value)
        return f"s3://{server.make_bucket(f'b{os.getpid()}-{next(_buckets)}')}"

    return make


Directory = Callable[[], str]


@pytest.fixture
def directory(hdfs: hadoop.HDFS, monkeypatch: pytest.MonkeyPatch) -> Directory:
    """Names a fresh directory on HDFS, with the environment set for it; returns the URL."""
    for name, value in hdfs.variables().items():
        monkeypatch.setenv(name, value)
    return lambda: f"{hdfs.url}/tests/{os.getpid()}-{next(_buckets)}"
