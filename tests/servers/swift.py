"""OpenStack Swift on the loopback, with its S3 interface: proxy, account, container and object server, one
device, one copy. Needs no root; `make servers` installs its Python packages, apart from all others.

Up to 2.35 its S3 interface answers 501 to a put with a condition. Since 2.36 it takes the condition; it looks
first then, and writes.
"""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .hdfs import cache
from .running import S3, answers, free_ports, listens, process, wait_for

REFUSES = "2.35.5"
LOOKS_FIRST = "2.38.3"

# The servers that store, and the modules they are.
_PARTS = {"account": "account", "container": "container", "object": "obj"}
_ACCESS_KEY, _SECRET_KEY = "everstep:writer", "everstep-secret"
_NOBODY = "127.0.0.1:9"
_METADATA_BYTES = 1000


def _home() -> Path:
    return cache() / "swift"


def missing(version: str) -> list[str]:
    """What is not installed of it."""
    there = (_home() / "complete").exists() and (_home() / version).exists()
    lacking = [] if there else [f"Swift {version}"]
    return lacking if _place() else [*lacking, "file system with extended attributes"]


def _place() -> str | None:
    """Where an object's metadata can lie beside it. In memory where it can: each put waits for many syncs."""
    return next(filter(_keeps_attributes, ("/dev/shm", "/tmp", str(Path.home()))), None)


def _keeps_attributes(where: str) -> bool:
    try:
        with tempfile.NamedTemporaryFile(dir=where) as file:
            os.setxattr(file.name, "user.swift.metadata", bytes(_METADATA_BYTES))
            return True
    except OSError:
        return False


@contextmanager
def running(version: str) -> Iterator[S3]:
    """The proxy, ready; all end with the block. Takes some seconds to start."""
    directory = Path(tempfile.mkdtemp(prefix="everstep-swift-", dir=_place()))
    try:
        with ExitStack() as stack:
            yield _Swift(directory, version, stack).start()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class _Swift:
    def __init__(self, directory: Path, version: str, stack: ExitStack) -> None:
        self.directory = directory
        self.log = directory / "log"
        self.stack = stack
        self.python = str(_home() / "bin" / "python")
        self.environment = {**os.environ, "PYTHONPATH": str(_home() / version)}
        *ports, self.port = free_ports(len(_PARTS) + 1)
        self.ports = dict(zip(_PARTS, ports, strict=True))
        (directory / "devices" / "one").mkdir(parents=True)
        (directory / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = everstep\n")

    def start(self) -> S3:
        self.make_rings()
        storage = {
            part: self.serve(part, port, _STORAGE.format(part=part)) for part, port in self.ports.items()
        }
        proxy = self.serve("proxy", self.port, _PROXY)
        for part, child in storage.items():
            wait_for(lambda part=part: listens(self.ports[part]), child, self.log)  # type: ignore[misc]
        endpoint = f"http://127.0.0.1:{self.port}"
        wait_for(lambda: answers(f"{endpoint}/healthcheck"), proxy, self.log)
        return S3(endpoint, _ACCESS_KEY, _SECRET_KEY)

    def make_rings(self) -> None:
        arguments = [str(self.directory), *(f"{part}:{port}" for part, port in self.ports.items())]
        done = subprocess.run(
            [self.python, "-c", _RINGS, *arguments], env=self.environment, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"rings of Swift: {done.stderr[-2000:]}")

    def serve(self, part: str, port: int, more: str) -> subprocess.Popen[bytes]:
        settings = self.directory / f"{part}-server.conf"
        settings.write_text(_settings(self.directory, port) + more)
        module = f"swift.{_PARTS.get(part, part)}.server"
        command = [self.python, "-c", _LAUNCH, str(self.directory), module, str(settings), "verbose"]
        return self.stack.enter_context(process(command, self.log, self.environment))


def _settings(directory: Path, port: int) -> str:
    values = {
        "bind_ip": "127.0.0.1",
        "bind_port": port,
        "workers": 0,
        "user": getpass.getuser(),
        "swift_dir": directory,
        "devices": directory / "devices",
        "mount_check": "false",
        "disable_fallocate": "true",
        "log_level": "WARNING",
        # A busy machine is no reason to leave a server out for a minute, or a container's list behind.
        "conn_timeout": 30,
        "node_timeout": 60,
        "container_update_timeout": 60,
        "error_suppression_limit": 1_000_000,
    }
    return "[DEFAULT]\n" + "".join(f"{name} = {value}\n" for name, value in values.items())


_STORAGE = """
[pipeline:main]
pipeline = {part}-server
[app:{part}-server]
use = egg:swift#{part}
"""

_RINGS = """
import sys
from swift.common.ring import RingBuilder
for part, _, port in (argument.partition(":") for argument in sys.argv[2:]):
    builder = RingBuilder(part_power=1, replicas=1, min_part_hours=0)
    builder.add_dev({
        "region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": "one", "weight": 1.0,
        "replication_ip": "127.0.0.1", "replication_port": int(port),
    })
    builder.rebalance()
    builder.get_ring().save(f"{sys.argv[1]}/{part}.ring.gz")
"""

# The programs that come with it know one place for swift.conf, of the system.
_LAUNCH = """
import importlib, sys
from swift.common.utils import set_swift_dir
set_swift_dir(sys.argv.pop(1))
importlib.import_module(sys.argv.pop(1)).main()
"""

# Its authentication wants a cache; that nobody is there only makes it look each time.
_PROXY = f"""
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache listing_formats bulk s3api tempauth slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:cache]
use = egg:swift#memcache
memcache_servers = {_NOBODY}
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:s3api]
use = egg:swift#s3api
[filter:tempauth]
use = egg:swift#tempauth
user_everstep_writer = {_SECRET_KEY} .admin
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""
