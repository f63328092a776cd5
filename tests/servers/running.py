"""Starting a server of another program for the tests: a free port, readiness by asking, an end always."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

READY_S = 120.0
ASK_S = 0.05
LEAVE_S = 20.0


@dataclass(frozen=True)
class S3:
    """A server that speaks S3, and who may talk to it."""

    endpoint: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    def variables(self) -> dict[str, str]:
        """What a user of it has in the environment."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
        }

    def at(self, endpoint: str) -> S3:
        """The same, reached by another way."""
        return S3(endpoint, self.access_key, self.secret_key, self.region)

    def make_bucket(self, name: str) -> str:
        """Returns its name. Blocks until it is there."""
        import boto3

        boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
        ).create_bucket(Bucket=name)
        return name


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@contextmanager
def process(
    command: Sequence[str], log: Path, environment: Mapping[str, str] = os.environ
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block, whatever happens there. What it says goes to `log`."""
    with log.open("ab") as out:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        yield child
    finally:
        _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is None:
            os.killpg(child.pid, number)
        try:
            child.wait(LEAVE_S)
            return
        except subprocess.TimeoutExpired:
            continue


def wait_for(ready: Callable[[], bool], child: subprocess.Popen[bytes], log: Path) -> None:
    """Ask until it answers. Raises RuntimeError with the end of its log when it died or takes too long."""
    end = time.monotonic() + READY_S
    while not ready():
        if child.poll() is not None or time.monotonic() > end:
            said = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{child.args} is not ready (status {child.poll()}): {said}")
        time.sleep(ASK_S)  # Nothing tells when another program listens.


def answers(endpoint: str) -> bool:
    """Whether something that speaks HTTP answers there, whatever it says."""
    try:
        with urllib.request.urlopen(endpoint, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def listens(port: int) -> bool:
    """Whether somebody takes connections on a port of the loopback."""
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
        return True
    except OSError:
        return False
