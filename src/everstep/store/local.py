"""A store in a directory of a POSIX file system.

A put writes a temporary file, makes its bytes durable, links it to its final name (which fails where the
name is taken: that is the exclusive creation), makes the directory durable and takes the temporary name
away. So a final name never shows anything but a whole object, whatever instant the power goes. Nothing is
overwritten, no directory is renamed, and no lock is held.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from everstep.errors import Conflict, Damaged, EverstepError, NotFound, Unavailable, Unsupported
from everstep.store.base import Buffer, Entry, checked, is_key
from everstep.store.files import Files, SystemFiles
from everstep.store.reads import read

TEMPORARY = "tmp"
"""The directory of unfinished files, directly under the root; no key begins with it."""

_NO_OBJECT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class LocalStore:
    """Objects as files under `root`, which is created with the first put.

    Reads and writes large objects past the page cache where the file system allows it.
    """

    def __init__(self, root: str | os.PathLike[str], files: Files | None = None) -> None:
        self.root = Path(root).expanduser().absolute()
        self.url = str(root)
        self._files = files or SystemFiles()
        self._durable: set[Path] = set()

    def put(self, key: str, parts: Sequence[Buffer]) -> bool:
        final = self._path(key)
        try:
            try:
                return self._put_in_directory(final, parts)
            except FileNotFoundError:
                if final.parent.is_dir() and (self.root / TEMPORARY).is_dir():
                    raise
                # Somebody took away a directory that was made here before.
                self._durable.clear()
                return self._put_in_directory(final, parts)
        except OSError as error:
            raise self._translated(error, key, "write") from error

    def _put_in_directory(self, final: Path, parts: Sequence[Buffer]) -> bool:
        self._make_directories(final.parent)
        if final.exists():
            return self._taken(final)
        self._make_directories(self.root / TEMPORARY)
        return self._put(final, parts)

    def _put(self, final: Path, parts: Sequence[Buffer]) -> bool:
        temporary = str(self.root / TEMPORARY / f"{os.getpid()}-{secrets.token_hex(8)}")
        try:
            self._files.write(temporary, parts)
            self._files.sync(temporary)
            self._files.link(temporary, str(final))
            self._files.sync_directory(str(final.parent))
        except FileExistsError:
            return self._taken(final)
        finally:
            # There is none where the write did not come to it, or where a sweep was faster.
            with contextlib.suppress(FileNotFoundError):
                self._files.unlink(temporary)
        return True

    def _taken(self, final: Path) -> bool:
        """The answer of a put whose name is taken."""
        if final.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(final))
        # Its creator may not have come to this yet, and our caller will build on the object.
        self._files.sync_directory(str(final.parent))
        return False

    def _path(self, key: str) -> Path:
        return Path(self._file(key))

    def _file(self, key: str) -> str:
        """As text: to put paths together takes longer than to open a small file."""
        if checked(key).partition("/")[0] == TEMPORARY:
            raise ValueError(f"{key!r} lies where unfinished files do")
        return f"{self.root}/{key}"

    def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> Buffer:
        try:
            path = self._file(key)
            left = max(os.stat(path).st_size - start, 0)
            data = bytearray(left if size_bytes is None else min(size_bytes, left))
            count = read(path, start, [memoryview(data)])
            return data if count == len(data) else data[:count]
        except OSError as error:
            raise self._translated(error, key, "read") from error

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        try:
            return read(self._file(key), start, buffers)
        except OSError as error:
            raise self._translated(error, key, "read") from error

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[Entry]:
        directory, _, _ = prefix.rpartition("/")
        if not directory or is_key(directory):
            yield from itertools.islice(self._walk(directory, prefix), limit)

    def _walk(self, directory: str, prefix: str) -> Iterator[Entry]:
        """The objects with `prefix` in a directory and those below."""
        if directory.partition("/")[0] == TEMPORARY:
            return
        try:
            found = list(os.scandir(self.root / directory))
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise self._translated(error, directory, "list") from error
        # A directory sorts as its keys do: with the slash that follows its name.
        for item in sorted(found, key=lambda item: item.name + "/" * item.is_dir()):
            key = f"{directory}/{item.name}" if directory else item.name
            if not is_key(key):
                continue
            if item.is_dir():
                if f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                    yield from self._walk(key, prefix)
                continue
            if not key.startswith(prefix):
                continue
            try:
                facts = item.stat()
            except FileNotFoundError:
                continue
            yield Entry(key, facts.st_size, facts.st_mtime)

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            self._files.unlink(str(path))
            self._files.sync_directory(str(path.parent))
        except _NO_OBJECT:
            return
        except OSError as error:
            raise self._translated(error, key, "delete") from error

    def sweep(self) -> int:
        """Take away what killed writers left half-written; returns how many bytes that were.

        A writer at work whose temporary file is taken gets `Unavailable` and has changed nothing. Raises
        Unavailable where the directory cannot be read or changed.
        """
        freed = 0
        try:
            for item in list(os.scandir(self.root / TEMPORARY)):
                if item.is_dir(follow_symlinks=False):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    size_bytes = item.stat(follow_symlinks=False).st_size
                    self._files.unlink(item.path)
                    freed += size_bytes
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise self._translated(error, TEMPORARY, "sweep") from error
        return freed

    def _make_directories(self, path: Path) -> None:
        """Make a directory and those above it, durably.

        One that is there already may be a killed process's that never came to make it durable, so each is
        made so once by every store object.
        """
        if path in self._durable:
            return
        ours = path == self.root or self.root in path.parents
        if path.is_dir() and not ours:
            return
        self._make_directories(path.parent)
        if not path.is_dir():
            try:
                self._files.make_directory(str(path))
            except FileExistsError:
                if not path.is_dir():
                    raise
        try:
            self._files.sync_directory(str(path.parent))
        except PermissionError:
            # The directory above the root may be another's, to pass through and not to read.
            if path != self.root:
                raise
        self._durable.add(path)

    def _translated(self, error: OSError, key: str, verb: str) -> EverstepError:
        """The error as the one who catches it needs it."""
        where = f"{self.url}/{key}"
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno == errno.EIO and verb == "read":
            return Damaged(f"{where} cannot be read from its disk ({reason})", key=key)
        if error.errno in _NO_ROOM:
            return Unavailable(
                f"no room to write {where} ({reason})",
                kept="what was committed before is intact",
                next=f"df -h {self.root}",
                key=key,
            )
        if isinstance(error, _NO_OBJECT) and verb == "read":
            return NotFound(f"{self.url} has no object {key}", key=key)
        if isinstance(error, FileExistsError | NotADirectoryError):
            return Conflict(f"{where} cannot be written: a file stands where a directory belongs", key=key)
        if isinstance(error, IsADirectoryError):
            return Conflict(f"{where} cannot be written: a directory stands in its place", key=key)
        if error.errno in _NO_LINKS and verb == "write":
            return Unsupported(
                f"the file system of {self.root} cannot link files ({reason}), which a commit needs",
                kept="nothing was touched",
                next="everstep doctor DIRECTORY_ON_ANOTHER_DISK",
                key=key,
            )
        return Unavailable(
            f"cannot {verb} {where} ({reason})",
            kept="what was committed before is intact",
            next=f"ls -ld {self.root}",
            key=key,
        )
