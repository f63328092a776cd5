"""Packs to and from an HDFS of three DataNodes, beside bare hdfs-native with the same files: what the
temporary name, the limits of time and reading into given memory cost. Both sync what they write.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from tests.servers import hdfs

from bench.objects import Packs, rounds
from bench.setting import Setting
from everstep.store.hdfs import HdfsStore


def measure(setting: Setting) -> dict[str, Any]:
    missing = hdfs.missing()
    if missing:
        return {"not measured": f"HDFS is not installed (no {', '.join(missing)}): make servers"}
    count, pack_bytes = (8, 64 << 20) if setting.is_full else (2, 36 << 20)
    before = dict(os.environ)
    # In memory where it can be: it is the clients that are compared, not the disk of all four.
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    try:
        with (
            tempfile.TemporaryDirectory(prefix="everstep-hdfs-", dir=where) as directory,
            hdfs.running(Path(directory)) as server,
        ):
            os.environ.update(server.variables())
            with _Directory(HdfsStore(f"{server.url}/packs"), count, pack_bytes) as packs:
                return rounds(setting, "hdfs", packs)
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Directory(Packs):
    bare = "hdfs-native"

    def __init__(self, store: HdfsStore, count: int, pack_bytes: int) -> None:
        from hdfs_native import Client

        super().__init__(store, count, pack_bytes)
        self._client = Client()

    def put_bare(self, name: str) -> None:
        from hdfs_native import WriteOptions

        writer = self._client.create(f"/packs/{name}", WriteOptions(overwrite=False))
        # It wants bytes, and takes them with one call.
        writer.write(self.source[:])
        writer.hsync()
        writer.close()

    def get_bare(self, name: str) -> int:
        reader = self._client.read(f"/packs/{name}")
        return len(reader.read_range(0, len(reader)))
