"""A keeper process whose file system has a fault, for tests that need one at a known place.

Run as `python odd_keeper.py PLACE CHAIN FAULT [ARGUMENT ...]`; it is a keeper as any other but for that. Run
without arguments it forks such a keeper for each line of them on its standard input, and says how it ended:
where a test needs many, they are imported once.

    dies NUMBER         SIGKILL to itself right after its file operation of this number, counted from 0
    waits FIFO FIFO     before the first file is written it opens the first FIFO to write and the second to
                        read: the test learns that it is there, and lets it go on
    full FILE           no room on the disk as long as FILE exists
    little BYTES        there is no more memory than this
    version VERSION     it says that it is of another version
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from everstep.chain.history import Chain
from everstep.keeper import memory, protocol
from everstep.keeper.places import Lock, Place
from everstep.keeper.service import Service
from everstep.store.files import Buffer, SystemFiles
from everstep.store.local import LocalStore


class Counted(SystemFiles):
    """Tells of each operation before and after it."""

    def __init__(self) -> None:
        self.count = 0

    def before(self, number: int, verb: str) -> None: ...

    def after(self, number: int) -> None: ...

    def _begin(self, verb: str) -> int:
        number, self.count = self.count, self.count + 1
        self.before(number, verb)
        return number

    def make_directory(self, path: str) -> None:
        number = self._begin("make_directory")
        super().make_directory(path)
        self.after(number)

    def write(self, path: str, parts: Sequence[Buffer]) -> None:
        number = self._begin("write")
        super().write(path, parts)
        self.after(number)

    def sync(self, path: str) -> None:
        number = self._begin("sync")
        super().sync(path)
        self.after(number)

    def link(self, path: str, to: str) -> None:
        number = self._begin("link")
        super().link(path, to)
        self.after(number)

    def unlink(self, path: str) -> None:
        number = self._begin("unlink")
        super().unlink(path)
        self.after(number)

    def sync_directory(self, path: str) -> None:
        number = self._begin("sync_directory")
        super().sync_directory(path)
        self.after(number)


class Dying(Counted):
    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = int(at)

    def after(self, number: int) -> None:
        if number == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


class Waiting(Counted):
    def __init__(self, there: str, go_on: str) -> None:
        super().__init__()
        self.there, self.go_on = there, go_on
        self.waited = False

    def before(self, number: int, verb: str) -> None:
        if verb == "write" and not self.waited:
            self.waited = True
            Path(self.there).write_text("there")
            Path(self.go_on).read_text()


class Full(Counted):
    def __init__(self, while_there: str) -> None:
        super().__init__()
        self.while_there = Path(while_there)

    def before(self, number: int, verb: str) -> None:
        if verb == "write" and self.while_there.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAULTS = {"dies": Dying, "waits": Waiting, "full": Full}


def main(place: str, path: str, fault: str, *arguments: str) -> None:
    files = SystemFiles()
    if fault == "version":
        protocol.VERSION = arguments[0]
    elif fault == "little":
        memory.available_bytes = lambda: int(arguments[0])
    else:
        files = FAULTS[fault](*arguments)
    here = Place(Path(place))
    lock = Lock.take(here)
    assert lock is not None
    linger_s = float(os.environ.get("EVERSTEP_KEEPER_LINGER", "300"))
    service = Service(Chain(LocalStore(path, files)), here.listen(), linger_s=linger_s)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: service.leave())
    print("listening", flush=True)
    service.run()
    lock.release()


def fork_each() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            main(*line.split())
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:]) if sys.argv[1:] else fork_each()
