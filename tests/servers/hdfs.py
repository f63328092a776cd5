"""A real HDFS of one machine on the loopback: a NameNode and some DataNodes, each a process. Needs no root.

`make servers` fetches what it is made of (see `install.sh`): Hadoop 2.7, which runs on Java 17.
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from xml.sax.saxutils import escape

from .running import free_ports, listens, process, wait_for
from .small import missing as missing_packages

REPLICAS = 3

_SERVER = "org.apache.hadoop.hdfs.server"
_OPENED = (
    "java.lang", "java.lang.reflect", "java.io", "java.net", "java.nio", "sun.nio.ch", "java.util",
    "java.util.concurrent", "sun.security.action", "jdk.internal.ref",
)  # fmt: skip
_ASK_S = 10


def cache() -> Path:
    """Where `make servers` puts what no package of the system has."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "everstep-servers"


def _home() -> Path:
    return cache() / "hadoop"


def missing() -> list[str]:
    """What is not installed of it."""
    lacking = [] if shutil.which("java") else ["java"]
    lacking += [] if (_home() / "complete").exists() else ["Hadoop"]
    return [*lacking, *missing_packages("hdfs_native")]


class HDFS:
    """`url`: what a chain's begins with."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory = directory
        self._stack = stack
        ports = free_ports(2 + 3 * REPLICAS)
        self.port, self._web = ports[:2]
        self._node_ports = [ports[2 + 3 * number : 5 + 3 * number] for number in range(REPLICAS)]
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self.url = f"hdfs://127.0.0.1:{self.port}"
        self.conf = directory / "conf"
        self.conf.mkdir()
        _write(self.conf / "core-site.xml", {"fs.defaultFS": self.url, "hadoop.tmp.dir": directory / "data"})
        _write(self.conf / "hdfs-site.xml", _settings(self._web))
        (self.conf / "log4j.properties").write_text(_LOGGING)

    def variables(self) -> dict[str, str]:
        """What a user of it has in the environment."""
        return {"HADOOP_CONF_DIR": str(self.conf), "HADOOP_USER_NAME": getpass.getuser()}

    def start(self) -> None:
        self._run("namenode.NameNode", "-format", "-force", "-nonInteractive")
        log = self._directory / "namenode.log"
        namenode = self._stack.enter_context(process(self._command("namenode.NameNode"), log))
        for number in range(REPLICAS):
            self.start_node(number)
        wait_for(lambda: self.live_nodes() == REPLICAS, namenode, log)

    def start_node(self, number: int) -> None:
        """One of the DataNodes, with what it had; returns before it is there."""
        address, http, ipc = self._node_ports[number]
        command = self._command(
            "datanode.DataNode",
            f"-Ddfs.datanode.data.dir=file://{self._directory}/node{number}",
            f"-Ddfs.datanode.address=127.0.0.1:{address}",
            f"-Ddfs.datanode.http.address=127.0.0.1:{http}",
            f"-Ddfs.datanode.ipc.address=127.0.0.1:{ipc}",
        )
        log = self._directory / f"node{number}.log"
        self._nodes[number] = self._stack.enter_context(process(command, log))

    def kill_node(self, number: int) -> None:
        """As a power cut ends it: at once. Returns when it is gone."""
        self._nodes[number].send_signal(signal.SIGKILL)
        self._nodes[number].wait(60)

    def revive_node(self, number: int) -> None:
        """Start one that was killed; returns when it takes blocks again."""
        self.start_node(number)
        wait_for(
            lambda: self.live_nodes() == REPLICAS and listens(self._node_ports[number][0]),
            self._nodes[number],
            self._directory / f"node{number}.log",
        )

    def live_nodes(self) -> int:
        """As the NameNode sees it, which takes its time to believe in a death."""
        query = "jmx?qry=Hadoop:service=NameNode,name=FSNamesystemState"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._web}/{query}", timeout=_ASK_S) as answer:
                beans = json.load(answer)["beans"]
        except (OSError, ValueError):
            return -1
        return int(beans[0]["NumLiveDataNodes"]) if beans else -1

    def _run(self, name: str, *arguments: str) -> None:
        done = subprocess.run(
            self._command(name, *arguments), capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")

    def _command(self, name: str, *arguments: str) -> list[str]:
        classes = [self.conf, _home() / "webroot", *(_home() / part / "*" for part in ("jars", "more"))]
        opened = [f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in _OPENED]
        kerberos = "java.security.jgss/sun.security.krb5=ALL-UNNAMED"
        return [
            "java", "-Xmx128m", "-Xss512k", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto",
            "-Djava.net.preferIPv4Stack=true", f"-Dhadoop.home.dir={self._directory}",
            f"-Dhadoop.log.dir={self._directory}", *opened, f"--add-opens={kerberos}",
            f"--add-exports={kerberos}", "-cp", ":".join(map(str, classes)), f"{_SERVER}.{name}", *arguments,
        ]  # fmt: skip


@contextmanager
def running(directory: Path) -> Iterator[HDFS]:
    """All its nodes, ready; they end with the block. Takes some seconds to start.

    Args:
        directory: an empty one of its own.
    """
    with ExitStack() as stack:
        server = HDFS(directory, stack)
        server.start()
        yield server


def _settings(web: int) -> Mapping[str, object]:
    return {
        "dfs.replication": REPLICAS,
        # Who has started the NameNode may do anything, others may not.
        "dfs.permissions.enabled": "true",
        "dfs.namenode.http-address": f"127.0.0.1:{web}",
        "dfs.namenode.datanode.registration.ip-hostname-check": "false",
        "dfs.namenode.safemode.extension": 0,
        "dfs.datanode.hostname": "127.0.0.1",
        "dfs.webhdfs.enabled": "true",
        # A silent node is not given to writers after 3 s, and dead after 12; by default after ten minutes.
        "dfs.heartbeat.interval": 1,
        "dfs.namenode.heartbeat.recheck-interval": 1000,
        "dfs.namenode.stale.datanode.interval": 3000,
        "dfs.namenode.avoid.write.stale.datanode": "true",
        # Little disk is asked for, and no time is spent on what a cluster of many needs.
        "dfs.datanode.du.reserved": 0,
        "dfs.namenode.resource.du.reserved": 1 << 20,
        "dfs.namenode.handler.count": 8,
        "dfs.datanode.handler.count": 4,
        "dfs.blockreport.initialDelay": 0,
        "dfs.datanode.scan.period.hours": -1,
    }


def _write(path: Path, values: Mapping[str, object]) -> None:
    lines = [
        f"<property><name>{name}</name><value>{escape(str(value))}</value></property>"
        for name, value in values.items()
    ]
    path.write_text("<configuration>" + "\n".join(lines) + "</configuration>\n")


_LOGGING = """log4j.rootLogger=WARN,A
log4j.appender.A=org.apache.log4j.ConsoleAppender
log4j.appender.A.layout=org.apache.log4j.PatternLayout
log4j.appender.A.layout.ConversionPattern=%d %p %c: %m%n
"""
