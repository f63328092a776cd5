"""How a trainer comes by its keeper process: it finds the one that lives, or starts one."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from everstep.errors import Conflict, Unavailable, Unsupported
from everstep.keeper import protocol
from everstep.keeper.places import Place
from everstep.keeper.protocol import Connection, Identify, Message

START_S = 60.0
ANSWER_S = 60.0
RETRY_S = 0.02
MAX_KILLED = 3
"""So many that are killed while they start, one after the other: then it is not by accident."""

DEAD_S = 1.0
"""A process whose sockets are closed is dead within this, unless it goes on without us."""

LISTENING, TAKEN = "listening", "taken"
"""What a keeper that was started says: that it can be reached, or that another was faster."""

_QUOTED_CHARACTERS = 2000
_SAID_BYTES = 64 * 1024
_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[3])
from everstep.keeper.service import main
main(sys.argv[1], sys.argv[2])
"""
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Libraries that come with threads of their own have nothing to do there, but would start them."""


_starting = threading.Lock()
"""Held while a process is started, and while another thread forks: a loader's worker that is forked meanwhile
would have the far ends of the pipes that tell whether it could be started, and nothing would end them."""
os.register_at_fork(
    before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_starting.release
)


class Link:
    """A keeper process that was reached.

    Attributes:
        earlier: whether it was there before.
        begun: whether it works for this trainer.
        refusal: why it let go of it, if it said so.
    """

    def __init__(
        self, connection: Connection, place: Place, pid: int, child: subprocess.Popen[bytes] | None
    ) -> None:
        self.connection = connection
        self.place = place
        self.pid = pid
        self.earlier = child is None
        self.begun = False
        self.refusal = ""
        self._child = child
        self._life: int | None = None
        with suppress(OSError):  # It is dead already, which its socket will tell.
            self._life = os.pidfd_open(pid)

    def receive(self, woken: int, timeout_s: float | None = None) -> list[tuple[Message, list[int]]]:
        """Wait until something comes, or something is written to `woken`; send what was left unsent."""
        poll = select.poll()
        poll.register(woken, select.POLLIN)
        unsent = self.connection.unsent_bytes
        poll.register(self.connection, select.POLLIN | (select.POLLOUT if unsent else 0))
        poll.poll(None if timeout_s is None else max(timeout_s, 0) * 1e3)
        with suppress(BlockingIOError):
            os.read(woken, 4096)
        self.connection.flush()
        return self.connection.receive()

    def ask(self, question: Message, timeout_s: float | None) -> Message | None:
        """What it says next; None when it is gone. Raises Unavailable when it says nothing in time."""
        self.connection.send(question)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with _never() as never:
            while not self.connection.ended:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise Unavailable(f"the keeper, process {self.pid}, does not answer")
                for message, descriptors in self.receive(never, left):
                    for descriptor in descriptors:
                        os.close(descriptor)
                    return message
        return None

    def make_sure_it_is_dead(self) -> str:
        """Its socket is closed, and nobody may use its memory while it does: returns how it died."""
        if not self._gone(DEAD_S) and self._life is not None:
            # It has let go of us and goes on: another is to do its work.
            with suppress(OSError):
                signal.pidfd_send_signal(self._life, signal.SIGKILL)
            self._gone(None)
        how = self._reap()
        return f"{how}: {self.refusal}" if self.refusal else how

    def wait_until_gone(self, timeout_s: float) -> bool:
        """It was told that nothing more comes."""
        gone = self._gone(timeout_s)
        if gone:
            self._reap()
        return gone

    def _gone(self, timeout_s: float | None) -> bool:
        if self._life is None:
            return True
        poll = select.poll()
        poll.register(self._life, select.POLLIN)
        return bool(poll.poll(None if timeout_s is None else timeout_s * 1e3))

    def _reap(self) -> str:
        if self._child is None:
            return f"process {self.pid} is gone"
        status = self._child.wait()
        return f"signal {-status}" if status < 0 else f"status {status}"

    def last_words(self) -> str:
        """The end of its log."""
        try:
            return self.place.log_file.read_text(errors="replace")[-_QUOTED_CHARACTERS:].strip()
        except OSError:
            return ""

    def close(self) -> None:
        self.connection.close()
        if self._life is not None:
            os.close(self._life)
            self._life = None

    def disown(self) -> None:
        """In a forked child: close what it has of this."""
        self.connection.disown()
        if self._life is not None:
            os.close(self._life)


@contextmanager
def _never() -> Iterator[int]:
    """A descriptor that nothing is ever written to."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


class Starter:
    """Reaches the keeper of one chain.

    Args:
        chain: the chain's id.
        address: what another process opens it by.
        places: where to look; in the first a keeper is started.
        identify: who is at the other end of a socket.
        environment: what a keeper that is started needs besides this process's variables.
    """

    def __init__(
        self,
        chain: str,
        address: str,
        places: Sequence[Place],
        identify: Identify,
        environment: Mapping[str, str],
    ) -> None:
        self._chain = chain
        self._address = address
        self._places = places
        self._identify = identify
        self._environment = environment
        self._child: subprocess.Popen[bytes] | None = None
        self._killed = 0
        """How many were killed in a row while they started."""

    def reach(self, found: Callable[[bool], None]) -> Link:
        """A keeper of this version, for nobody else at work. Blocks while one is started, and as long as one
        of another version finishes what it has.

        Args:
            found: is told as soon as it is known whether one was there before.

        Raises:
            Conflict: it works for another trainer.
            Unavailable: none can be started; the message quotes why.
        """
        deadline = time.monotonic() + START_S
        while True:
            for place in self._places:
                link = self._connect(place, found)
                if link is not None:
                    return link
            if not any(place.is_taken() for place in self._places):
                found(False)
                self._start(self._places[0])
            elif time.monotonic() > deadline:
                raise Unavailable(f"another process has {self._places[0].lock_file} and does not answer")
            else:
                time.sleep(RETRY_S)  # It is about to listen, or about to end: nothing tells of that.

    def _connect(self, place: Place, found: Callable[[bool], None]) -> Link | None:
        sock = place.connect()
        if sock is None:
            return None
        who = self._identify(sock)
        if who.uid != os.geteuid():
            sock.close()
            raise Unsupported(f"{place.socket_file} is the socket of user {who.uid}, not of this one")
        child = self._child if self._child is not None and self._child.pid == who.pid else None
        found(child is None)
        link = Link(Connection(sock, protocol.TO_TRAINER), place, who.pid, child)
        try:
            if self._greet(link):
                return link
        except BaseException:
            link.close()
            raise
        link.close()
        return None

    def _greet(self, link: Link) -> bool:
        """False: it is gone, or about to be."""
        welcome = link.ask(protocol.Hello(protocol.VERSION, self._chain), ANSWER_S)
        if welcome is None:
            return False
        if not isinstance(welcome, protocol.Welcome):
            raise Unavailable(f"process {link.pid} at {link.place.socket_file} is no keeper")
        if welcome.version == protocol.VERSION:
            return True
        if welcome.trainer:
            raise Conflict(
                f"process {welcome.trainer} on this machine writes to this chain, with another version "
                f"of Everstep ({welcome.version})",
                kept="nothing was touched",
                next=f"kill {welcome.trainer}  # it takes a last snapshot",
            )
        link.ask(protocol.Leave(), None)
        return False

    def _start(self, place: Place) -> None:
        """Start a keeper and wait until it listens, or another does."""
        if not sys.executable:
            raise Unsupported("this program is no Python interpreter that could start a keeper")
        path = json.dumps([os.path.abspath(entry) for entry in sys.path])
        with _starting:
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-c", _PROGRAM, str(place.path), self._address, path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
                env={**os.environ, **_ONE_THREAD, **self._environment},
            )
        said = self._listen(self._child)
        if LISTENING in said.splitlines():
            self._killed = 0
            return
        status = self._child.wait()
        self._child = None
        self._killed = self._killed + 1 if status < 0 else 0
        if 0 < self._killed < MAX_KILLED:
            return  # By somebody else: whoever called finds nobody there, and has another started.
        if TAKEN not in said.splitlines():
            raise Unavailable(
                f"the keeper cannot be started (status {status}): {said.strip()[-_QUOTED_CHARACTERS:]}",
                kept="what was committed before is intact",
                next="EVERSTEP_KEEPER=thread, to do without a process of its own",
            )

    def _listen(self, child: subprocess.Popen[bytes]) -> str:
        """What a new keeper says until it listens or ends; one that does neither is ended."""
        assert child.stderr is not None
        deadline = time.monotonic() + START_S
        said = b""
        with child.stderr as pipe:
            poll = select.poll()
            poll.register(pipe, select.POLLIN)
            while f"{LISTENING}\n".encode() not in said and len(said) < _SAID_BYTES:
                if not poll.poll(max(deadline - time.monotonic(), 0) * 1e3):
                    child.kill()
                part = os.read(pipe.fileno(), 4096)
                if not part:
                    break
                said += part
        return said.decode(errors="replace")
