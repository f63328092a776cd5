"""Where a keeper process is found: a directory of the user's own for each, with a socket, a lock and a log.

The lock is held by the living keeper: what lies in a directory whose lock is free was left by a dead one.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from everstep.chain.history import MAIN, Chain
from everstep.errors import Unsupported
from everstep.format.chunk import digest
from everstep.store.base import Addressed, Store
from everstep.store.files import SystemFiles
from everstep.store.local import LocalStore

NAME_DIGITS = 16
CONNECT_S = 10.0
"""A living keeper takes a connection at once; the system may make one wait where too many come."""

_NAME = re.compile(f"[0-9a-f]{{{NAME_DIGITS}}}")
_BACKLOG = 64


@dataclass(frozen=True)
class Place:
    """The directory of one keeper."""

    path: Path

    @property
    def socket_file(self) -> Path:
        return self.path / "socket"

    @property
    def lock_file(self) -> Path:
        return self.path / "lock"

    @property
    def log_file(self) -> Path:
        return self.path / "log"

    def is_taken(self) -> bool:
        """Whether a process lives that is the keeper here, or is about to be or to end."""
        try:
            descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def connect(self) -> socket.socket | None:
        """A connection to the keeper that lives here; None where none listens."""
        sock = _socket()
        try:
            with _named(self.path, "socket") as name:
                sock.settimeout(CONNECT_S)
                sock.connect(name)
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError, TimeoutError):
            sock.close()
            return None
        except BaseException:
            sock.close()
            raise
        return sock

    def listen(self) -> socket.socket:
        """Take connections here; only for who holds the lock."""
        self.socket_file.unlink(missing_ok=True)
        sock = _socket()
        try:
            with _named(self.path, "socket") as name:
                sock.bind(name)
            self.socket_file.chmod(0o600)
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
        return sock


class Lock:
    """The right to be the keeper at a place, from `take` until `release` or the end of the process."""

    def __init__(self, place: Place, descriptor: int) -> None:
        self._place = place
        self._descriptor = descriptor

    @classmethod
    def take(cls, place: Place) -> Lock | None:
        """None: another process has it."""
        while True:
            with suppress(FileExistsError):
                place.path.mkdir(mode=0o700)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            try:
                descriptor = os.open(place.lock_file, flags, 0o600)
            except FileNotFoundError:
                continue  # Somebody has just tidied up here.
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(descriptor, place.lock_file):
                    return cls(place, descriptor)
            except BlockingIOError:
                os.close(descriptor)
                return None
            # It was taken away between being opened and being locked: the next one is another file.
            os.close(descriptor)

    def release(self) -> None:
        """Leave nothing behind."""
        for path in (self._place.socket_file, self._place.log_file, self._place.lock_file):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # Somebody else has come meanwhile.
            self._place.path.rmdir()
        os.close(self._descriptor)


def runtime_directory() -> Path:
    """Where this user's keepers are found; made where there is none.

    Raises:
        Unsupported: what is there is not a directory of this user alone.
    """
    path = _candidates()[0]
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise Unsupported(f"no directory can be made for a keeper's socket ({error})") from error
    if not _is_ours(path):
        raise Unsupported(
            f"{path} is not a directory of this user alone, as a keeper's socket needs",
            kept="nothing was touched",
            next=f"chmod 700 {path}, if it is yours; or set TMPDIR to a directory that is",
        )
    return path


def places(chain: Chain, branch: str = MAIN) -> list[Place]:
    """Where the keeper of a branch of a chain is found: in the first if it is started now, in the others if
    it was started in another environment.

    Raises:
        Unsupported: the chain is of a kind that another process cannot open, or the system is.
    """
    name = digest(f"{chain.about.chain} {branch} {address(chain)}".encode())[:NAME_DIGITS]
    first = runtime_directory()
    others = [path for path in _candidates() if path != first and _is_ours(path)]
    return [Place(path / name) for path in (first, *others)]


def living_places() -> list[Place]:
    """All places where a keeper of this user may live."""
    found = []
    for directory in filter(_is_ours, _candidates()):
        found += [Place(path) for path in sorted(directory.iterdir()) if _NAME.fullmatch(path.name)]
    return found


def sweep(directory: Path) -> None:
    """Take away what dead keepers have left."""
    for path in directory.iterdir():
        if _NAME.fullmatch(path.name) and path.is_dir():
            with suppress(OSError):
                lock = Lock.take(Place(path))
                if lock is not None:
                    lock.release()


def address(chain: Chain) -> str:
    """What every process opens this chain by, in this one's environment. Raises Unsupported."""
    store = chain.store
    if type(store) is LocalStore and type(store._files) is SystemFiles:
        found = os.path.realpath(store.root)
    elif isinstance(store, Addressed):
        found = store.address
    else:
        raise Unsupported(f"{store.url} is a store of this process, which no other can open")
    if not _lends_memory():
        raise Unsupported("this system cannot lend memory to another process by a descriptor, or forbids it")
    return found


def environment(chain: Chain) -> Mapping[str, str]:
    """What a process that opens the chain by its address needs besides this one's variables."""
    return chain.store.environment if isinstance(chain.store, Addressed) else {}


def environments(stores: Iterable[Store]) -> Mapping[str, str]:
    """The same for stores that it opens besides."""
    found: dict[str, str] = {}
    for store in stores:
        found |= store.environment if isinstance(store, Addressed) else {}
    return found


def _lends_memory() -> bool:
    """Whether the calls that a keeper needs are there, and no sandbox forbids them."""
    if not all(hasattr(os, name) for name in ("memfd_create", "pidfd_open")):
        return False
    try:
        os.close(os.memfd_create("everstep-probe", os.MFD_CLOEXEC))
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def _candidates() -> list[Path]:
    """Directories of keepers, whether they are there or not, the best first."""
    user = os.geteuid()
    found = [Path(tempfile.gettempdir()) / f"everstep-{user}"]
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(session) and _is_ours(Path(session)):
        found.insert(0, Path(session) / "everstep")
    return found


def _is_ours(path: Path) -> bool:
    """Whether it is a real directory that only this user can look into."""
    try:
        facts = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o077


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)


@contextmanager
def _named(directory: Path, name: str) -> Iterator[str]:
    """A name for a file in a directory that is short enough for a socket, wherever the directory is."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)
