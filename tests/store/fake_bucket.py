"""A stand-in for obstore and a bucket behind it: it does what it is told to, request by request."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import pytest

from everstep.store import cloud
from everstep.store.patience import Clock


class BaseError(Exception):
    """The base of obstore's exceptions, by its name."""


class GenericError(BaseError):
    pass


class NotFoundError(BaseError):
    pass


class AlreadyExistsError(BaseError):
    pass


class PermissionDeniedError(BaseError):
    pass


def status(number: int, code: str = "", more: str = "") -> BaseError:
    """An answer as obstore tells it."""
    kind = {404: NotFoundError, 403: PermissionDeniedError, 412: AlreadyExistsError}.get(number, GenericError)
    body = f"<Error><Code>{code}</Code>{more}</Error>" if code else ""
    return kind(f"Error performing PUT http://x - Server returned non-2xx status code: {number} No: {body}")


def no_answer(text: str = "connection reset by peer") -> BaseError:
    return GenericError(f"Generic S3 error: HTTP error: error sending request: {text}")


@dataclass(frozen=True)
class Fate:
    """What happens to one request: `error` is raised, after it was carried out where `done`."""

    error: Exception | None = None
    done: bool = False


@dataclass
class Bucket:
    """`fates` are those of the next requests, one after the other; then all goes well. `verbs` are the
    requests made."""

    objects: dict[str, bytes] = field(default_factory=dict)
    fates: list[Fate] = field(default_factory=list)
    verbs: list[str] = field(default_factory=list)
    conditional: bool = True
    backwards: bool = False
    retries: list[int] = field(default_factory=list)

    def client(self, address: cloud.Address, patience: object, retries: int) -> Bucket:
        self.retries.append(retries)
        return self

    def _meet(self, verb: str, work: Callable[[], Any]) -> Any:
        self.verbs.append(verb)
        fate = self.fates.pop(0) if self.fates else Fate()
        if fate.error is not None and not fate.done:
            raise fate.error
        done = work()
        if fate.error is not None:
            raise fate.error
        return done

    def put(self, key: str, data: bytes, create: bool) -> None:
        if create and self.conditional and key in self.objects:
            raise status(412, "PreconditionFailed")
        self.objects[key] = data

    def found(self, key: str) -> bytes:
        if key not in self.objects:
            raise status(404, "NoSuchKey")
        return self.objects[key]


class Got:
    def __init__(self, data: bytes, total: int) -> None:
        self._data = data
        self.meta = {"size": total}

    def bytes(self) -> bytes:
        return self._data


def _put(bucket: Bucket, key: str, file: Any, *, mode: str = "overwrite", **how: Any) -> None:
    data = file if isinstance(file, bytes) else b"".join(map(bytes, file))
    bucket._meet(
        "put parts" if how.get("use_multipart") else "put", lambda: bucket.put(key, data, mode == "create")
    )


def _get(bucket: Bucket, key: str, *, options: dict[str, Any]) -> Got:
    def work() -> Got:
        data = bucket.found(key)
        start, end = options["range"]
        if start >= len(data):
            raise status(416, "InvalidRange")
        return Got(data[start:end], len(data))

    return bucket._meet("get", work)  # type: ignore[no-any-return]


def _head(bucket: Bucket, key: str) -> dict[str, int]:
    return bucket._meet("head", lambda: {"size": len(bucket.found(key))})  # type: ignore[no-any-return]


def _list(
    bucket: Bucket, prefix: str | None, *, offset: str | None, chunk_size: int
) -> Iterator[list[dict[str, Any]]]:
    def work() -> list[dict[str, Any]]:
        keys = [key for key in bucket.objects if key.startswith(f"{prefix}/" if prefix else "")]
        keys.sort(reverse=bucket.backwards)
        when = datetime.now(timezone.utc)
        return [
            {"path": key, "size": len(bucket.objects[key]), "last_modified": when}
            for key in keys
            if key > (offset or "")
        ][:chunk_size]

    found = bucket._meet("list", work)
    return iter([found] if found else [])


def _delete(bucket: Bucket, which: str | list[str]) -> None:
    def work() -> None:
        for key in [which] if isinstance(which, str) else which:
            bucket.objects.pop(key, None)

    bucket._meet("delete", work)


def install(bucket: Bucket, patch: pytest.MonkeyPatch) -> Bucket:
    """From now on obstore is this one, and every client is the bucket's."""
    fake: Any = types.ModuleType("obstore")
    fake.put, fake.get, fake.head, fake.list, fake.delete = _put, _get, _head, _list, _delete
    patch.setitem(sys.modules, "obstore", fake)
    patch.setattr(cloud, "client", bucket.client)
    patch.setattr(cloud, "refuse_without_obstore", lambda: None)
    return bucket


class OwnTime:
    """A clock that stands still but for what is slept. `pauses`: those that were."""

    def __init__(self) -> None:
        self.at = 0.0
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.at += seconds

    def clock(self, share: float = 1.0) -> Clock:
        return Clock(lambda: self.at, self.sleep, lambda: share)
