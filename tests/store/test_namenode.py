"""Addresses of HDFS, what its answers mean, and the limit of a request's time; the real one is in
`test_hdfs_server`."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from everstep.errors import Mismatch, Unsupported
from everstep.store import namenode
from everstep.store.answers import MISSING, PASSING, REFUSED, TAKEN, UNABLE
from everstep.store.namenode import OBSTRUCTED, Address, understood, within
from everstep.store.urls import open_store


@pytest.mark.parametrize(
    ("url", "address", "again"),
    [
        ("hdfs://nn:8020/runs/gpt", Address("nn:8020", "/runs/gpt"), "hdfs://nn:8020/runs/gpt"),
        ("hdfs://service/runs/gpt/", Address("service", "/runs/gpt"), "hdfs://service/runs/gpt"),
        ("hdfs:///user/me/run=1", Address("", "/user/me/run=1"), "hdfs:///user/me/run=1"),
        ("hdfs://nn:8020", Address("nn:8020", ""), "hdfs://nn:8020/"),
        ("hdfs://nn:8020/", Address("nn:8020", ""), "hdfs://nn:8020/"),
    ],
)
def test_addresses(url: str, address: Address, again: str) -> None:
    assert Address.parse(url) == address
    assert address.url == again
    assert Address.parse(again) == address


@pytest.mark.parametrize(
    "url",
    [
        "hdfs://nn:port/a",
        "hdfs://-nn/a",
        "hdfs://nn/a/../b",
        "hdfs://nn/a//b",
        "hdfs://nn/a:b",
        "hdfs://nn/a\n",
    ],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(Mismatch, match="is no address of a chain"):
        open_store(url)


def test_users_do_not_belong_into_an_address() -> None:
    with pytest.raises(Mismatch, match="set HADOOP_USER_NAME") as caught:
        open_store("hdfs://me:secret@nn:8020/a")
    assert "secret" not in str(caught.value)


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namenode.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match=r"Next: pip install 'everstep\[hdfs\]'"):
        open_store("hdfs://nn:8020/a")


def test_opening_imports_nothing_of_it() -> None:
    code = (
        "import sys; from everstep.store.urls import open_store; from everstep.store.hdfs import HdfsStore; "
        "open_store('runs/gpt'); sys.exit('hdfs_native' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def rpc(name: str, message: str = "no") -> RuntimeError:
    return RuntimeError(f'RPCError("{name}", "{message}\\n\\tat org.apache.hadoop...")')


class PanicException(BaseException):
    """As hdfs-native's threads fail."""


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (FileNotFoundError("/a"), MISSING, ""),
        (IsADirectoryError("/a"), MISSING, ""),
        (FileExistsError("/a already exists"), TAKEN, "there is one"),
        (FileExistsError("Parent path is not a directory: /a"), OBSTRUCTED, "a file stands"),
        (NotImplementedError("File encryption"), UNABLE, "File encryption"),
        (rpc("org.apache.hadoop.security.AccessControlException"), REFUSED, "permission denied"),
        (rpc("org.apache.hadoop.hdfs.server.namenode.SafeModeException"), PASSING, "safe mode"),
        (rpc("org.apache.hadoop.hdfs.protocol.DSQuotaExceededException"), REFUSED, "quota of space"),
        (rpc("org.apache.hadoop.fs.ParentNotDirectoryException"), OBSTRUCTED, "a file stands"),
        (rpc("org.apache.hadoop.fs.PathIsNotEmptyDirectoryException"), MISSING, ""),
        (rpc("java.io.IOException", "could only be replicated to 0 nodes"), PASSING, "too few"),
        (rpc("org.example.NobodyKnowsException"), REFUSED, "NobodyKnowsException"),
        (RuntimeError('DataTransferError("All nodes failed for write")'), PASSING, "no DataNode took"),
        (RuntimeError('InvalidArgument("No NameNode hosts found")'), REFUSED, "no NameNode is"),
        (RuntimeError("NoSASLMechanism"), REFUSED, "who asks"),
        (RuntimeError('GSSAPIError(GSS_S_NO_CRED, 0, "No credentials")'), REFUSED, "no valid ticket"),
        (OSError("Connection refused (os error 111)"), PASSING, "the connection was refused"),
        (OSError("No data received for 2000ms"), PASSING, "no answer in time"),
        (TimeoutError("timed out"), PASSING, "no answer in time"),
        (PanicException("Cannot read past end of the file"), PASSING, "no answer"),
    ],
)  # fmt: skip
def test_what_an_answer_means(error: BaseException, kind: str, reason: str) -> None:
    answer = understood(error)
    assert answer is not None
    assert answer.kind == kind
    assert reason in answer.reason
    assert "\n" not in answer.reason


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), TypeError("x")])
def test_bugs_are_no_answers(error: BaseException) -> None:
    assert understood(error) is None


def test_a_request_has_a_limit_of_time() -> None:
    forever = threading.Event()
    with pytest.raises(TimeoutError):
        within(0.01, forever.wait)
    forever.set()
    assert within(60, lambda: "done") == "done"
    with pytest.raises(KeyError):
        within(60, lambda: {}["missing"])
