"""Where an object store is, and obstore's clients for it: its address, its settings.

obstore is imported when the first request is made: what never makes one starts fast.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from everstep.errors import Mismatch, Unsupported
from everstep.store.base import MAX_KEY_CHARACTERS, is_key
from everstep.store.patience import Patience

SCHEMES = ("s3", "gs", "az")
UNSAFE_SINGLE_WRITER = "EVERSTEP_UNSAFE_SINGLE_WRITER"

CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, and the bucket's policy",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, and the bucket's roles",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY, and the container's roles",
}
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}")


@dataclass(frozen=True)
class Address:
    """`bucket` is the container of Azure; `prefix` is a key, or "" for the whole bucket."""

    scheme: str
    bucket: str
    prefix: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """From `s3://bucket/prefix`. Raises Mismatch."""
        scheme, _, rest = url.partition("://")
        bucket, _, prefix = rest.partition("/")
        prefix = prefix.rstrip("/")
        if "@" in bucket:
            raise Mismatch(
                f"credentials do not belong into an address ({scheme}://...@...)",
                kept="nothing was touched",
                next=f"set {CREDENTIALS[scheme].partition(', and')[0]}",
            )
        if not _BUCKET.fullmatch(bucket) or (prefix and not is_key(prefix)):
            raise Mismatch(
                f"{url!r} is no address of a chain: the bucket's name, then parts of letters, digits, '.', "
                f"'_' and '-' with '/' between them, {MAX_KEY_CHARACTERS} characters at most",
                kept="nothing was touched",
                next=f"{scheme}://BUCKET/runs/NAME",
            )
        return cls(scheme, bucket, prefix)

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")


def refuse_without_obstore() -> None:
    """Raises Unsupported where the package is not installed."""
    if importlib.util.find_spec("obstore") is None:
        raise Unsupported(
            "object stores need the package obstore, which is not installed",
            kept="nothing was touched",
            next="pip install obstore",
        )


def client(
    address: Address, patience: Patience, retries: int, environment: Mapping[str, str] = os.environ
) -> Any:
    """obstore's object for a place. Credentials, region and endpoint are taken from the environment, by the
    names that the tools of each store use. `retries`: so often a request is repeated by obstore itself."""
    store: Any = importlib.import_module("obstore.store")
    options: dict[str, Any] = {
        "timeout": f"{patience.request_s * 1e3:.0f}ms",
        "connect_timeout": f"{patience.connect_s * 1e3:.0f}ms",
    }
    more: dict[str, Any] = {"prefix": address.prefix or None, "retry_config": _retrying(patience, retries)}
    if address.scheme == "gs":
        return store.GCSStore(address.bucket, client_options=options, **more)
    if address.scheme == "az":
        options["allow_http"] = bool(environment.get("AZURE_STORAGE_USE_EMULATOR"))
        return store.AzureStore(address.bucket, client_options=options, **more)
    config: dict[str, Any] = {
        # What is stored is held against digests when it is read; signing its bytes too is a third of the CPU.
        "unsigned_payload": True,
        "conditional_put": "etag",
    }
    endpoint = next((environment[name] for name in _ENDPOINTS if environment.get(name)), "")
    if endpoint:
        config["endpoint"] = endpoint
        options["allow_http"] = endpoint.startswith("http://")
    return store.S3Store(address.bucket, config=config, client_options=options, **more)


def _retrying(patience: Patience, retries: int) -> dict[str, Any]:
    return {
        "max_retries": retries,
        "retry_timeout": timedelta(seconds=patience.deadline_s),
        "backoff": {
            "init_backoff": timedelta(seconds=patience.first_wait_s),
            "max_backoff": timedelta(seconds=patience.longest_wait_s),
            "base": 2.0,
        },
    }
