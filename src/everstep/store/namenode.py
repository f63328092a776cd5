"""Where an HDFS is, hdfs-native's client for it, and what its answers mean.

hdfs-native is imported when the first request is made. It has no limit of time for what a NameNode is asked,
so requests get theirs here; what it asks DataNodes has one.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from everstep.errors import Mismatch, Unsupported
from everstep.store.answers import MISSING, PASSING, REFUSED, TAKEN, UNABLE, Answer
from everstep.store.base import MAX_KEY_CHARACTERS
from everstep.store.patience import Patience

SCHEME = "hdfs"
ACCESS = "HADOOP_CONF_DIR, HADOOP_USER_NAME or the Kerberos ticket (klist), and the directory's permissions"
OBSTRUCTED = "obstructed"
"""One more kind of answer: a file stands where a directory belongs."""

_AUTHORITY = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*(:[0-9]{1,5})?)?")
_PART = re.compile(r"[^/:\x00-\x1f\x7f]+")
_CLASS = re.compile(r'RPCError\("([\w.$]+)"')

_OBSTRUCTED = "a file stands where a directory belongs"
_KINDS = {
    "FileNotFoundException": MISSING,
    "PathIsNotEmptyDirectoryException": MISSING,  # To delete a directory that holds something.
    "FileAlreadyExistsException": TAKEN,
    "ParentNotDirectoryException": OBSTRUCTED,
    "IllegalStateException": OBSTRUCTED,
    # What a cluster says that starts, changes over, or has too few DataNodes just now.
    "IOException": PASSING,
    "SafeModeException": PASSING,
    "StandbyException": PASSING,
    "ObserverRetryOnActiveException": PASSING,
    "RetriableException": PASSING,
    "RetryStartFileException": PASSING,
    "NotReplicatedYetException": PASSING,
    "LeaseExpiredException": PASSING,
    "RecoveryInProgressException": PASSING,
    "RpcServerException": PASSING,
    "ServerNotRunningYetException": PASSING,
    "CallQueueOverflowException": PASSING,
    "NoRouteToHostException": PASSING,
    "ConnectException": PASSING,
    "SocketTimeoutException": PASSING,
    "UnsupportedOperationException": UNABLE,
}  # fmt: skip
"""The classes of a NameNode's exceptions; all others refuse."""

_REASONS = {
    "ParentNotDirectoryException": _OBSTRUCTED,
    "IllegalStateException": _OBSTRUCTED,
    "AccessControlException": "permission denied",
    "AuthorizationException": "permission denied",
    "SafeModeException": "the NameNode is in safe mode",
    "DSQuotaExceededException": "the directory's quota of space is used up",
    "NSQuotaExceededException": "the directory's quota of names is used up",
    "QuotaExceededException": "the directory's quota is used up",
    "DataTransferError": "no DataNode took or gave the bytes",
    "BlocksNotFound": "no DataNode has the bytes",
    "OperationFailed": "no DataNode has reported the bytes",
    "No NameNode hosts found": "no NameNode is known by that name: give HOST:PORT, or HADOOP_CONF_DIR",
    "XmlParseError": "the files in HADOOP_CONF_DIR are no XML",
    "GSSAPI": "Kerberos: no valid ticket",
    "SASL": "the NameNode wants to know better who asks",
    "could only be replicated": "too few DataNodes have room",
    "could only be written": "too few DataNodes have room",
    "failed to lookup": "its name is not known",
    "connection refused": "the connection was refused",
    "connection reset": "the connection was reset",
    "broken pipe": "the connection was cut",
    "disconnected": "the connection was cut",
    "closed": "the connection was cut",
    "timed out": "no answer in time",
    "no data received": "no answer in time",
}
_OURS = (
    "InvalidArgument",
    "InvalidPath",
    "UrlParseError",
    "XmlParseError",
    "SASL",
    "GSSAPI",
    "FatalRPCError",
)
"""Signs of errors that waiting does not help against."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Address:
    """`authority` is HOST:PORT, the name of a name service, or "" for the configuration's default; `path`
    begins with '/' and ends with none, or is "" for the root."""

    authority: str
    path: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """From `hdfs://authority/path`. Raises Mismatch."""
        authority, _, path = url.partition("://")[2].partition("/")
        path = path.rstrip("/")
        if "@" in authority:
            raise Mismatch(
                "users do not belong into an address (hdfs://...@...)",
                kept="nothing was touched",
                next="set HADOOP_USER_NAME",
            )
        parts = path.split("/") if path else []
        if (
            not _AUTHORITY.fullmatch(authority)
            or not all(_PART.fullmatch(part) and part not in (".", "..") for part in parts)
            or len(path) > MAX_KEY_CHARACTERS
        ):
            raise Mismatch(
                f"{url!r} is no address of a chain: HOST:PORT, the name of a name service, or nothing for "
                "the default; then a path without ':', '.' and '..'",
                kept="nothing was touched",
                next="hdfs://HOST:8020/runs/NAME",
            )
        return cls(authority, f"/{path}" if path else "")

    @property
    def url(self) -> str:
        return f"{SCHEME}://{self.authority}{self.path or '/'}"


def refuse_without_package() -> None:
    """Raises Unsupported where hdfs-native is not installed."""
    if importlib.util.find_spec("hdfs_native") is None:
        raise Unsupported(
            "hdfs:// needs the package hdfs-native, which is not installed",
            kept="nothing was touched",
            next="pip install 'everstep[hdfs]'",
        )


def client(address: Address, patience: Patience) -> Any:
    """hdfs-native's object for a place. NameNodes, user and tickets are taken from where Hadoop's own tools
    find them: HADOOP_CONF_DIR (or HADOOP_HOME), HADOOP_USER_NAME, HADOOP_PROXY_USER, Kerberos.

    Its own tries are few: enough to find the active one of several NameNodes.
    """
    native: Any = importlib.import_module("hdfs_native")
    settings = {
        "dfs.client.failover.max.attempts": "3",
        "dfs.client.failover.sleep.base.millis": "100",
        "dfs.client.failover.sleep.max.millis": "1000",
        # So long a DataNode may be silent; a write that waits for one that died has time for another then.
        "dfs.client.socket-timeout": f"{patience.request_s / 2 * 1e3:.0f}",
    }
    return native.Client(f"{SCHEME}://{address.authority}" if address.authority else None, settings)


def options(size_bytes: int, copies: int | None) -> Any:
    """How a new file of this size is written: as one block, so that one sync makes all of it durable."""
    native: Any = importlib.import_module("hdfs_native")
    block_bytes = max(_BLOCK_BYTES, -(-size_bytes // _MIB) * _MIB)
    return native.WriteOptions(
        block_size=block_bytes, replication=copies, overwrite=False, create_parent=True
    )


_MIB = 1024 * 1024
_BLOCK_BYTES = 128 * _MIB


def within(seconds: float, work: Callable[[], Result]) -> Result:
    """What `work` returns or raises; TimeoutError when it takes longer. It goes on then, in a thread that
    nobody waits for, so it must use nothing that its caller takes back."""
    done: list[Result] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="everstep-hdfs", daemon=True)
    thread.start()
    thread.join(seconds)
    # Taken out of the list: an error that it holds would hold this frame, and that the memory of all callers.
    if failed:
        raise failed.pop()
    if not done:
        raise TimeoutError("timed out")
    return done.pop()


def understood(error: BaseException) -> Answer | None:
    """What an exception of hdfs-native means; None for one that is no answer, but a bug."""
    if isinstance(error, FileNotFoundError | IsADirectoryError):
        return Answer(MISSING, "")
    if isinstance(error, FileExistsError):
        obstructed = "not a directory" in str(error)
        return Answer(OBSTRUCTED, _OBSTRUCTED) if obstructed else Answer(TAKEN, "there is one")
    if isinstance(error, NotImplementedError):
        return Answer(UNABLE, str(error).partition("\n")[0][:100])
    # A thread of hdfs-native's that fails for a reason of its own tells it by an exception that is none.
    if not isinstance(error, OSError | RuntimeError) and type(error).__name__ != "PanicException":
        return None
    text = str(error)
    name = match[1].rpartition(".")[2] if (match := _CLASS.search(text)) else ""
    if text.startswith("RPCError"):
        return Answer(_KINDS.get(name, REFUSED), _spoken(name, text) or name or "refused")
    ours = any(sign in text for sign in _OURS)
    return Answer(REFUSED if ours else PASSING, _spoken(name, text) or "no answer")


def _spoken(name: str, text: str) -> str:
    low = text.lower()
    found = next((reason for sign, reason in _REASONS.items() if sign.lower() in low), "")
    return _REASONS.get(name, found or name)
