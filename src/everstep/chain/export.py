"""A snapshot for other programs: its leaves under their names there, their bytes in pieces, and the file.

None of it needs torch. Memory stays bounded: of a state of any size one window is held at a time.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, TypeAlias

from everstep.chain.boxes import Window, gather, windows
from everstep.chain.history import Chain, Snapshot
from everstep.chain.reader import Reader, Target
from everstep.errors import EverstepError, Mismatch, NotFound, Unavailable
from everstep.format.layout import item_bytes
from everstep.format.manifest import OWN, Manifest, StoredLeaf, StoredSlice

WINDOW_BYTES = 32 * 1024 * 1024
"""So much is read at once; a window holds whole chunks, so that each is read and checked once."""

SPREAD_BYTES = 256 * 1024 * 1024
"""Of leaves in several slices, which are in as many chunks at once, up to so much: the more, the seldomer a
chunk is read again."""

OnProgress: TypeAlias = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

Memory: TypeAlias = tuple[object, ...]


@dataclass(frozen=True)
class Exported:
    """What an export wrote. `remarks` are sentences about what came out otherwise than it is in the
    snapshot; damage of the chain that does not touch the bytes asked for is among them."""

    size_bytes: int
    tensors: int
    aliases: int
    remarks: tuple[str, ...]


def manifest_of(chain: Chain, snapshot: Snapshot) -> Manifest:
    """What a snapshot consists of, over all ranks. Raises Damaged."""
    return chain.manifest(snapshot)


def chosen(manifest: Manifest, only: str = "") -> dict[str, StoredLeaf]:
    """The leaves by the dotted names that other programs know them by. What single ranks have for themselves
    is not among them, unless it is asked for.

    Args:
        only: take only the leaves under this name (`model`, `~rank/1`), without it in front.

    Raises:
        NotFound: there are none under `only`.
        Mismatch: two leaves would have the same name.
    """
    found: dict[str, StoredLeaf] = {}
    for leaf in manifest.leaves:
        if only and leaf.name != only and not leaf.name.startswith(only + "/"):
            continue
        if leaf.name.startswith(OWN) and not f"{only}/".startswith(OWN):
            continue
        rest = leaf.name.removeprefix(only).lstrip("/") if only else leaf.name
        name = dotted(rest or only)
        if name in found:
            raise Mismatch(
                f"the leaves {found[name].name} and {leaf.name} would both be called {name!r}",
                kept="nothing was written",
                next="--only NAME, to export the objects one by one",
            )
        found[name] = leaf
    if only and not found:
        raise lacking(manifest, only)
    return found


def lacking(manifest: Manifest, only: str) -> NotFound:
    """The error that says which names there are."""
    names = sorted({_first_part(leaf.name) for leaf in manifest.leaves})
    return NotFound(
        f"the snapshot has no tensors under {only!r}; it has some under {', '.join(names) or 'no name'}",
        kept="nothing was written",
        next=f"--only {names[0]}" if names else "everstep show REF --leaves",
    )


def _first_part(name: str) -> str:
    """What `only` can name that a leaf is under: an object, or a rank."""
    return "/".join(name.split("/")[: 2 if name.startswith(OWN) else 1])


def dotted(name: str) -> str:
    """A leaf's name with dots between its parts, as torch has them."""
    return ".".join(part_text(part) for part in name.split("/"))


def part_text(part: str) -> str:
    """One part of a leaf's name as it was before it became a part."""
    return "" if part == "~2" else part.replace("~1", "/").replace("~0", "~")


def memory(leaf: StoredLeaf) -> Memory:
    """What two leaves have in common exactly when they are the same bytes (tied weights)."""
    if not tensor_bytes(leaf):
        return (leaf.name,)
    places = tuple((part.at, part.region, part.offset) for part in leaf.slices)
    return (*places, leaf.dtype, leaf.shape)


def reading_order(leaf: StoredLeaf) -> tuple[int, int]:
    """Leaves sorted by this are read without going back."""
    part = leaf.slices[0]
    return part.region, part.offset


class Pieces:
    """The bytes of leaves in pieces, each checked against its digest.

    Args:
        order: the leaves in the order in which they will be asked for, where that is known: of those that
            are in several slices, many are then read at once.
    """

    def __init__(
        self,
        reader: Reader,
        manifest: Manifest,
        total_bytes: int,
        on_progress: OnProgress,
        order: Iterable[StoredLeaf] = (),
    ) -> None:
        self._remarks: set[str] = set()
        self._reader = reader
        self._manifest = manifest
        self._total_bytes = total_bytes
        self._on_progress = on_progress
        self._done_bytes = 0
        self._own = {leaf.name for leaf in manifest.leaves if leaf.name.startswith(OWN)}
        grid = manifest.grid_bytes
        self._window = memoryview(bytearray(max(WINDOW_BYTES // grid, 1) * grid))
        self._at: tuple[int, int] | None = None
        spread = [leaf for leaf in order if leaf.whole is None]
        self._next = {leaf.name: follower for leaf, follower in pairwise(spread)}
        self._ready: dict[str, memoryview] = {}

    @property
    def remarks(self) -> set[str]:
        """The reader's; and whether something was not asked for that single ranks have for themselves."""
        if not self._own:
            return set(self._remarks)
        count = len(self._own)
        what = (
            "tensor that a rank has for itself is"
            if count == 1
            else "tensors that ranks have for themselves are"
        )
        return {
            *self._remarks,
            f"{count} {what} left out: --only {_first_part(min(self._own))} takes a rank's",
        }

    def of(self, leaf: StoredLeaf) -> Iterator[memoryview]:
        """The leaf's bytes in order. A piece is valid until the next one is asked for. Blocks on I/O.

        Raises:
            Damaged: a chunk is missing or is not the one that was written.
        """
        self._own.discard(leaf.name)
        for piece in self._spread(leaf) if leaf.whole is None else self._together(leaf, leaf.whole):
            yield piece
            self._done_bytes += len(piece)
            self._on_progress(self._done_bytes, self._total_bytes)

    def _together(self, leaf: StoredLeaf, part: StoredSlice) -> Iterator[memoryview]:
        at, end = part.offset, part.offset + leaf.size_bytes(part)
        while at < end:
            start = at // len(self._window) * len(self._window)
            self._load(part.region, start)
            size = min(end, start + len(self._window)) - at
            yield self._window[at - start : at - start + size]
            at += size

    def _load(self, region: int, start: int) -> None:
        """Small leaves share a region: a window is kept until another is needed."""
        if self._at == (region, start):
            return
        self._at = None
        size = min(self._manifest.regions[region].size_bytes - start, len(self._window))
        self._remarks.update(self._reader.fill(self._manifest, [Target(region, start, self._window[:size])]))
        self._at = (region, start)

    def _spread(self, leaf: StoredLeaf) -> Iterator[memoryview]:
        """Of a leaf in several slices: from all of them at once, and with it what follows and fits."""
        if leaf.name not in self._ready:
            limit = self._limit(leaf)
            if tensor_bytes(leaf) > limit:
                yield from self._in_windows(leaf, limit)
                return
            self._read_ahead(leaf, limit)
        yield self._ready.pop(leaf.name)

    def _limit(self, leaf: StoredLeaf) -> int:
        """The more slices there are, the less of each chunk does a window take."""
        return min(max(len(leaf.slices) * self._manifest.grid_bytes, WINDOW_BYTES), SPREAD_BYTES)

    def _in_windows(self, leaf: StoredLeaf, limit: int) -> Iterator[memoryview]:
        item = item_bytes(leaf.dtype)
        buffer = memoryview(bytearray(limit))
        for box in windows(leaf.shape, item, limit):
            piece = buffer[: math.prod(box[1]) * item]
            self._remarks.update(gather(self._reader, self._manifest, [Window(leaf, box, piece)]))
            yield piece

    def _read_ahead(self, leaf: StoredLeaf, limit: int) -> None:
        self._ready.clear()
        wanted: list[Window] = []
        more: StoredLeaf | None = leaf
        while more is not None and (size := tensor_bytes(more)) <= limit and more.name not in self._ready:
            limit -= size
            self._ready[more.name] = memoryview(bytearray(size))
            wanted.append(Window(more, ((0,) * len(more.shape), more.shape), self._ready[more.name]))
            more = self._next.get(more.name)
        self._remarks.update(gather(self._reader, self._manifest, wanted))


def tensor_bytes(leaf: StoredLeaf) -> int:
    """Size of a leaf, and with it a check that its dtype is known. Raises Unsupported."""
    return math.prod(leaf.shape) * item_bytes(leaf.dtype)


# -- the file ----------------------------------------------------------------------------------------------


def check_free(path: Path, overwrite: bool) -> None:
    """Raises Mismatch where something at `path` must stay, NotFound where there is no directory for it."""
    if path.is_dir():
        raise Mismatch(f"{path} is a directory", kept="nothing was written", next="name a file")
    if os.path.lexists(path) and not overwrite:
        raise _taken(path)
    if not path.parent.is_dir():
        raise NotFound(
            f"there is no directory {path.parent}", kept="nothing was written", next=f"mkdir -p {path.parent}"
        )


@contextmanager
def new_file(path: Path, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A file that appears at `path` whole, durable and at once when the block ends, and else not at all.

    It is written beside its place under a name that begins with `.everstep-`.

    Raises:
        Mismatch: there is something already (unless `overwrite`).
        NotFound: there is no such directory.
        Unavailable: no room, no permission.
    """
    check_free(path, overwrite)
    temporary = path.parent / f".everstep-{secrets.token_hex(8)}"
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _place(temporary, path, overwrite)
        _sync_directory(path.parent)
    except OSError as error:
        raise _translated(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to put files into, which appears at `path` whole, durable and at once when the block ends, and
    else not at all. It is filled beside its place under a name that begins with `.everstep-`.

    Raises:
        Mismatch: there is something already, other than an empty folder.
        NotFound: there is no such directory.
        Unavailable: no room, no permission.
    """
    check_free_folder(path)
    temporary = path.parent / f".everstep-{secrets.token_hex(8)}"
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        _sync_directory(temporary)
        temporary.rename(path)  # Of what is there it replaces nothing but an empty folder.
        _sync_directory(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _folder_taken(path) from error
        raise _translated(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free_folder(path: Path) -> None:
    """Raises Mismatch where something at `path` must stay, NotFound where there is no directory for it."""
    if os.path.lexists(path) and (not path.is_dir() or path.is_symlink() or any(path.iterdir())):
        raise _folder_taken(path)
    if not path.parent.is_dir():
        raise NotFound(
            f"there is no directory {path.parent}", kept="nothing was written", next=f"mkdir -p {path.parent}"
        )


def _folder_taken(path: Path) -> Mismatch:
    what = "is not empty" if path.is_dir() and not path.is_symlink() else "exists already"
    return Mismatch(
        f"{path} {what}", kept="it was not touched", next="another name: a folder is not replaced"
    )


def _place(temporary: Path, path: Path, overwrite: bool) -> None:
    if overwrite:
        temporary.replace(path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise _taken(path) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        # No links here: between this look and the rename another file may come, and be replaced.
        check_free(path, overwrite)
        temporary.rename(path)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _taken(path: Path) -> Mismatch:
    return Mismatch(f"{path} exists already", kept="it was not touched", next="another name, or --force")


def _translated(error: OSError, path: Path) -> EverstepError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return Unavailable(
        f"{path} cannot be written ({reason})", kept="nothing was left behind", next=f"df -h {path.parent}"
    )
