"""From what a user types to a store."""

from __future__ import annotations

import os

from everstep.errors import Unsupported
from everstep.store.base import Store
from everstep.store.local import LocalStore
from everstep.store.patience import Patience


def open_store(
    url: str | os.PathLike[str] | Store,
    *,
    unsafe_single_writer: bool = False,
    patience: Patience | None = None,
) -> Store:
    """A store for a path or a URL, or `url` itself when it is a store. Touches nothing yet.

    Args:
        unsafe_single_writer: use a store that cannot refuse to overwrite; `EVERSTEP_UNSAFE_SINGLE_WRITER=1`
            says the same.
        patience: how long one over a network is tried; by default for minutes.

    Raises:
        Unsupported: the scheme is not one of this version's, or a package is missing.
        Mismatch: it is no address of that scheme.
    """
    if not isinstance(url, str | os.PathLike):
        return url
    path = os.fspath(url)
    if path.startswith("parity:"):
        from everstep.store import parity

        shape, places = parity.parse(path)
        members = [_open(place, unsafe_single_writer, parity.PATIENCE) for place in places]
        return parity.AddressedParityStore(shape, members, url=path)
    return _open(path, unsafe_single_writer)


def _open(path: str, unsafe_single_writer: bool, patience: Patience | None = None) -> Store:
    scheme, separator, rest = path.partition("://")
    if not separator:
        return LocalStore(path)
    if scheme == "file":
        return LocalStore(rest)
    # Looked up here, so that a chain on a disk needs nothing of it.
    from everstep.store import cloud, hdfs, namenode, objects

    if scheme in cloud.SCHEMES:
        insisted = unsafe_single_writer or os.environ.get(cloud.UNSAFE_SINGLE_WRITER, "0") not in ("", "0")
        return objects.ObjectStore(path, unsafe_single_writer=insisted, patience=patience)
    if scheme == namenode.SCHEME:
        return hdfs.HdfsStore(path, patience=patience)
    known = ", ".join(f"{name}://" for name in (*cloud.SCHEMES, namenode.SCHEME))
    raise Unsupported(
        f"stores of the kind {scheme}:// are not in this version of Everstep; "
        f"local directories and {known} are, and parity:K+M:... over several of them",
        kept="nothing was touched",
        next="a directory, such as runs/NAME, or s3://BUCKET/runs/NAME",
    )
