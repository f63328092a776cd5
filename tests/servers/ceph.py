"""A real Ceph object gateway of one node on the loopback: a monitor, one store, the gateway. Needs no root.

Debian's packages radosgw, ceph-mon, ceph-osd and ceph-common have what it needs (`make servers`); they start
nothing by themselves.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .running import S3, answers, free_ports, process, wait_for

PROGRAMS = ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool")
ACCESS_KEY, SECRET_KEY = "everstep-access", "everstep-secret"

_ASK_S = 30


def missing() -> list[str]:
    """What is not installed of it."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextmanager
def running(directory: Path, kind: str = "memstore", size_bytes: int = 6 << 30) -> Iterator[S3]:
    """The gateway, ready; it ends with the block. Takes some seconds to start.

    Args:
        directory: an empty one of its own, with a short path.
        kind: `memstore`, which forgets, or `bluestore`, which survives a kill.
        size_bytes: how much it holds at most.
    """
    gateway, monitor = free_ports(2)
    cluster = _Cluster(directory, kind, size_bytes, gateway, monitor)
    with ExitStack() as stack:
        cluster.prepare()
        cluster.start_monitor(stack)
        cluster.start_store(stack)
        yield cluster.start_gateway(stack)


class _Cluster:
    def __init__(self, directory: Path, kind: str, size_bytes: int, gateway: int, monitor: int) -> None:
        self.directory = directory
        self.fsid = str(uuid.uuid4())
        self.gateway = gateway
        self.monitor = f"[v2:127.0.0.1:{monitor}]"
        self.settings = directory / "ceph.conf"
        self.log = directory / "log"
        for name in ("mon", "osd", "rgw", "run"):
            (directory / name).mkdir(parents=True)
        self.settings.write_text(_settings(directory, self.fsid, self.monitor, kind, size_bytes, gateway))
        self.environment = {**os.environ, "CEPH_CONF": str(self.settings)}

    def do(self, *command: str) -> str:
        """Run a program of Ceph's to its end."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=120, check=False
        )
        with self.log.open("a") as log:
            log.write(done.stderr)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
        return done.stdout

    def prepare(self) -> None:
        keyring, map = str(self.directory / "keyring"), str(self.directory / "monmap")
        everything = ("--cap", "osd", "allow *", "--cap", "mgr", "allow *")
        self.do(
            "ceph-authtool", keyring, "--create-keyring", "--gen-key", "-n", "mon.", "--cap", "mon", "allow *"
        )
        self.do(
            "ceph-authtool",
            keyring,
            "--gen-key",
            "-n",
            "client.admin",
            "--cap",
            "mon",
            "allow *",
            *everything,
        )
        self.do(
            "ceph-authtool",
            keyring,
            "--gen-key",
            "-n",
            "osd.0",
            "--cap",
            "mon",
            "allow profile osd",
            *everything,
        )
        self.do("monmaptool", "--create", "--clobber", "--addv", "a", self.monitor, "--fsid", self.fsid, map)
        self.do("ceph-mon", "--mkfs", "-i", "a", "--monmap", map, "--keyring", keyring)

    def start_monitor(self, stack: ExitStack) -> None:
        stack.enter_context(process(["ceph-mon", "-i", "a", "-f"], self.log, self.environment))

    def start_store(self, stack: ExitStack) -> None:
        name = str(uuid.uuid4())
        # The monitor is ready when it answers this.
        self.do("ceph", "--connect-timeout", str(_ASK_S), "osd", "new", name)
        self.do("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", name)
        child = stack.enter_context(process(["ceph-osd", "-i", "0", "-f"], self.log, self.environment))
        wait_for(lambda: "1 up" in self.do("ceph", "osd", "stat"), child, self.log)

    def start_gateway(self, stack: ExitStack) -> S3:
        user = ("--uid=everstep", "--display-name=everstep")
        keys = (f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}")
        self.do("radosgw-admin", "user", "create", *user, *keys)
        child = stack.enter_context(
            process(
                ["radosgw", "-n", "client.admin", "--keyring", str(self.directory / "keyring"), "-f"],
                self.log,
                self.environment,
            )
        )
        endpoint = f"http://127.0.0.1:{self.gateway}"
        wait_for(lambda: answers(endpoint), child, self.log)
        return S3(endpoint, ACCESS_KEY, SECRET_KEY)


def _settings(directory: Path, fsid: str, monitor: str, kind: str, size_bytes: int, port: int) -> str:
    values = {
        "fsid": fsid,
        "mon_host": monitor,
        "mon_initial_members": "a",
        "ms_bind_msgr1": "false",
        "public_network": "127.0.0.0/8",
        "cluster_network": "127.0.0.0/8",
        "auth_allow_insecure_global_id_reclaim": "false",
        "keyring": directory / "keyring",
        "run_dir": directory / "run",
        "admin_socket": directory / "run" / "$name.asok",
        "pid_file": directory / "run" / "$name.pid",
        "log_file": directory / "$name.log",
        "mon_cluster_log_file": directory / "cluster.log",
        "crash_dir": directory,
        "mon_data": directory / "mon",
        "osd_data": directory / "osd",
        "rgw_data": directory / "rgw",
        "osd_objectstore": kind,
        "memstore_device_bytes": size_bytes,
        "bluestore_block_size": size_bytes,
        # One node keeps one copy.
        "osd_pool_default_size": 1,
        "osd_pool_default_min_size": 1,
        "osd_pool_default_pg_num": 8,
        "osd_pool_default_pgp_num": 8,
        "osd_pool_default_pg_autoscale_mode": "off",
        "osd_crush_chooseleaf_type": 0,
        "mon_allow_pool_size_one": "true",
        "mon_max_pg_per_osd": 1000,
        "mon_data_avail_crit": 1,
        "osd_memory_target": 1 << 30,
        "osd_class_load_list": "*",
        "osd_class_default_list": "*",
        "rgw_frontends": f"beast endpoint=127.0.0.1:{port} tcp_nodelay=1",
        "rgw_thread_pool_size": 64,
        # What a cluster of many has, and what makes the start of one slow.
        "rgw_run_sync_thread": "false",
        "rgw_dynamic_resharding": "false",
        "rgw_override_bucket_index_max_shards": 1,
        "rgw_gc_max_objs": 1,
        "rgw_lc_max_objs": 1,
        "rgw_usage_max_shards": 1,
        "rgw_data_log_num_shards": 1,
        "rgw_md_log_max_shards": 1,
        "rgw_num_control_oids": 1,
        "rgw_objexp_hints_num_shards": 1,
        "rgw_reshard_num_logs": 1,
        "rgw_rados_pool_pg_num_min": 4,
        "paxos_propose_interval": 0.02,
        "paxos_min_wait": 0.01,
        "mon_tick_interval": 1,
        "osd_heartbeat_interval": 1,
        "mon_warn_on_pool_no_redundancy": "false",
    }
    return "[global]\n" + "".join(f"{name} = {value}\n" for name, value in values.items())
