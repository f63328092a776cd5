"""Azurite, Azure's own emulator of its blobs, on the loopback. Needs no root; `make servers` fetches it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

from .hdfs import cache
from .running import answers, free_ports, process, wait_for

VERSION = "3.37.0"
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Every emulator's; it is no secret."""

_API = "2021-08-06"


def _program() -> Path:
    return cache() / f"azurite-{VERSION}" / "node_modules" / ".bin" / "azurite-blob"


def missing() -> list[str]:
    """What is not installed of it."""
    lacking = [] if shutil.which("node") else ["node"]
    return lacking if _program().exists() else [*lacking, "azurite"]


@dataclass(frozen=True)
class Azure:
    endpoint: str

    def variables(self) -> dict[str, str]:
        """What a user of it has in the environment."""
        return {
            "AZURE_STORAGE_USE_EMULATOR": "1",
            "AZURITE_BLOB_STORAGE_URL": self.endpoint,
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
        }

    def make_container(self, name: str) -> str:
        """Returns its name. Blocks until it is there."""
        date = formatdate(usegmt=True)
        headers = f"x-ms-date:{date}\nx-ms-version:{_API}\n"
        # The account is in the path of an emulator, too.
        resource = f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
        signed = hmac.new(
            base64.b64decode(KEY), ("PUT" + "\n" * 12 + headers + resource).encode(), hashlib.sha256
        )
        request = urllib.request.Request(
            f"{self.endpoint}/{ACCOUNT}/{name}?restype=container",
            method="PUT",
            headers={
                "x-ms-date": date,
                "x-ms-version": _API,
                "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(signed.digest()).decode()}",
            },
        )
        with urllib.request.urlopen(request, timeout=60):
            return name


@contextmanager
def running(directory: Path) -> Iterator[Azure]:
    """Ready; it ends with the block."""
    (port,) = free_ports(1)
    log = directory / "azurite.log"
    command = [
        str(_program()), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--silent",
        "--skipApiVersionCheck", "--inMemoryPersistence", "--disableTelemetry",
    ]  # fmt: skip
    with process(command, log) as child:
        endpoint = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(endpoint), child, log)
        yield Azure(endpoint)
