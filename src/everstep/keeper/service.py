"""The keeper process: one for each chain and host, beside the trainer. Imports no torch.

It takes what a trainer hands over and makes it durable, whatever becomes of the trainer. When that is killed,
the keeper finishes what it was given, keeps the newest snapshot in memory for a while, in case the trainer is
started again, and leaves. After a clean end it leaves at once, and nothing of it stays.
"""

from __future__ import annotations

import faulthandler
import io
import os
import select
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from everstep.chain.history import Chain, now
from everstep.errors import Conflict, Damaged, EverstepError, Unsupported
from everstep.keeper import memory, protocol
from everstep.keeper.arena import Arena
from everstep.keeper.following import Following
from everstep.keeper.places import Lock, Place, sweep
from everstep.keeper.protocol import Connection, Identify, Message
from everstep.keeper.start import LISTENING, TAKEN
from everstep.keeper.work import Work

NICE = 10
"""The trainer comes first; the system gives its I/O a lower priority accordingly. EVERSTEP_KEEPER_NICE."""

OOM_SCORE = 500
"""What Linux adds to its reasons to end this process when memory runs out, of 1000."""

LINGER_S = 300.0
"""So long the newest snapshot of a killed trainer stays in memory. EVERSTEP_KEEPER_LINGER."""

START_S = 60.0
"""So long a keeper waits for who has started it."""

LOG_BYTES = 1024 * 1024
MAX_PEERS = 64
MAX_UNSENT_BYTES = 1024 * 1024
"""Who asks and does not listen is let go; a trainer may be stopped for as long as it likes."""

_ENDS = (signal.SIGTERM, signal.SIGHUP)


class _Peer:
    """A process that has connected.

    Attributes:
        life: a descriptor that tells of its death.
        greeted: whether it is of this version.
        heir: whether it has asked what is held, and so may want to be the next trainer.
        waits: whether it was not told yet.
        unclaimed: descriptors that came with its messages and that nobody has taken.
    """

    def __init__(self, connection: Connection, pid: int) -> None:
        self.connection = connection
        self.pid = pid
        self.life: int | None = None
        self.greeted = self.heir = self.waits = False
        self.unclaimed: list[int] = []

    def tell(self, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        """Only in the thread that serves."""
        self.connection.send(message, descriptors)


@dataclass(frozen=True)
class _Telling:
    """How the threads of a `Work` reach its trainer: what the socket does not take at once is left to the
    service, which watches it."""

    peer: _Peer
    wake: Callable[[], None]

    @property
    def lives(self) -> bool:
        if self.peer.life is None:
            return not self.peer.connection.ended
        poll = select.poll()
        poll.register(self.peer.life, select.POLLIN)
        return not poll.poll(0)

    def tell(self, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        self.peer.connection.send(message, descriptors)
        if self.peer.connection.unsent_bytes:
            self.wake()

    def drain(self) -> None:
        self.peer.connection.drain()


class Service:
    """Listens, and gives each trainer's messages to its `Work`. Runs in one thread and never blocks it.

    Args:
        chain: where to.
        listener: where to take connections.
        identify: who is at the other end of a socket.
        linger_s: how long to wait for the next trainer after one was killed.
        clock: in seconds.
    """

    def __init__(
        self,
        chain: Chain,
        listener: socket.socket,
        *,
        identify: Identify = protocol.peer,
        linger_s: float = LINGER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._chain = chain
        self._listener = listener
        self._identify = identify
        self._linger_s = linger_s
        self._clock = clock
        self._since = now()
        self._peers: list[_Peer] = []
        self._trainer: _Peer | None = None
        self._work: Work | None = None
        self._finished = True
        """Whether nothing more is to be done for the last trainer's work."""
        self._leaving = False
        self._hurried = False
        """Whether to leave without waiting for replicas."""
        self._due = clock() + START_S
        self._given_up_at = 0.0
        """When nothing has been sent to a replica for so long that it is left to the next run."""
        self._progress = 0
        self._selector = selectors.DefaultSelector()
        self._woken, self._waking = socket.socketpair()
        for sock in (listener, self._woken, self._waking):
            sock.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._woken, selectors.EVENT_READ, self._wake_up)

    def wake(self) -> None:
        """Look around. From any thread, and after the end too."""
        with suppress(OSError):
            self._waking.send(b"\0")

    def leave(self) -> None:
        """Serve the trainer that is there to its end, if there is one; then go, whatever replicas lack."""
        self._leaving = self._hurried = True
        self.wake()

    def run(self) -> None:
        """Serve until nothing is left to be done. All that was handed over is durable then, or has failed."""
        while not self._over():
            for key, _ in self._selector.select(self._patience()):
                key.data()
            self._look_around()
        self._close()

    # -- when to leave --------------------------------------------------------------------------------------

    def _over(self) -> bool:
        if self._trainer is not None or not self._finished:
            return False
        if self._hurried:
            return True
        heirs = any(peer.heir for peer in self._peers)
        return not heirs and (self._leaving or self._clock() >= self._due) and not self._sends()

    def _sends(self) -> bool:
        """Whether a replica still gets something: as long as it takes, but not while nothing can be sent."""
        following = self._work.following if self._work is not None else None
        if following is None or not following.sending:
            return False
        if following.progress != self._progress:
            self._progress = following.progress
            self._given_up_at = self._clock() + self._linger_s
        return self._clock() < self._given_up_at

    def _patience(self) -> float | None:
        """So long nothing but a message, a job's end, or what was sent, changes anything."""
        if self._trainer is not None or not self._finished:
            return None
        now = self._clock()
        if self._sends():
            return max(self._given_up_at - now, 0.0)
        return max(self._due - now, 0.0) if not any(peer.heir for peer in self._peers) else None

    def _look_around(self) -> None:
        for peer in list(self._peers):
            self._watch_sending(peer)
        work = self._work
        if work is not None and work.idle and self._trainer is None and not self._finished:
            self._finish(work)
        if self._finished:
            for peer in self._peers:
                if peer.waits:
                    self._answer_settle(peer)

    def _finish(self, work: Work) -> None:
        """All that a trainer, which is gone, had handed over is done."""
        self._finished = True
        work.rest(keep=not self._leaving)
        if work.following is not None:
            self._given_up_at = self._clock() + self._linger_s
            work.following.finish()
        self._linger_anew()

    def _close(self) -> None:
        self._selector.unregister(self._listener)
        self._listener.close()
        for peer in list(self._peers):
            self._part(peer)
        if self._work is not None:
            if self._work.following is not None:
                self._work.following.close()
            arena = self._work.close()
            if arena is not None:
                arena.close()
        self._selector.close()
        self._woken.close()
        self._waking.close()

    # -- connections ----------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        who = self._identify(sock)
        if who.uid != os.geteuid() or len(self._peers) >= MAX_PEERS:
            sock.close()
            return
        peer = _Peer(Connection(sock, protocol.TO_KEEPER, protocol.MAX_GREETING_BYTES), who.pid)
        self._peers.append(peer)
        self._selector.register(sock, selectors.EVENT_READ, partial(self._hear, peer))

    def _wake_up(self) -> None:
        with suppress(BlockingIOError):
            self._woken.recv(4096)

    def _watch_sending(self, peer: _Peer) -> None:
        """Be told when a socket takes more, where something waits for that."""
        unsent = peer.connection.unsent_bytes
        if unsent > MAX_UNSENT_BYTES and peer is not self._trainer:
            self._part(peer)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if unsent else 0)
        key = self._selector.get_key(peer.connection)
        if key.events != events:
            self._selector.modify(peer.connection, events, key.data)

    def _hear(self, peer: _Peer) -> None:
        """Something has come of a peer, or it takes more."""
        if peer not in self._peers:
            return
        peer.connection.flush()
        try:
            for message, descriptors in peer.connection.receive():
                peer.unclaimed += descriptors
                self._act(peer, message)
        except EverstepError as error:
            log(f"process {peer.pid}: {error}")
            peer.tell(protocol.Refused(protocol.Problem.of(error)))
            self._part(peer)
            return
        if peer.connection.ended:
            self._part(peer)

    def _part(self, peer: _Peer) -> None:
        """A peer is gone, or is let go."""
        if peer not in self._peers:
            return
        self._peers.remove(peer)
        self._selector.unregister(peer.connection)
        if peer.life is not None:
            self._selector.unregister(peer.life)
            os.close(peer.life)
        peer.connection.close()
        while peer.unclaimed:
            os.close(peer.unclaimed.pop())
        if peer is self._trainer:
            self._let_go()
        elif peer.heir and self._trainer is None and self._finished:
            self._linger_anew()

    def _let_go(self) -> None:
        """The trainer is gone, or has all it wanted."""
        self._trainer = None
        if self._work is not None:
            self._finished = False
            self._work.orphan()

    def _linger_anew(self) -> None:
        useful = self._work is not None and (self._work.newest is not None or self._work.unfinished)
        self._due = self._clock() + (self._linger_s if useful else 0.0)

    def _watch_life(self, peer: _Peer) -> None:
        """Notice the death of a process although its forked children still have the socket."""
        with suppress(OSError):  # It is dead already, or of another world: the socket will tell.
            peer.life = os.pidfd_open(peer.pid)
            self._selector.register(peer.life, selectors.EVENT_READ, partial(self._bury, peer))

    def _bury(self, peer: _Peer) -> None:
        """A peer is dead: what it has sent is heard to the end, then it is gone."""
        before = -1
        while peer in self._peers and peer.connection.received_bytes != before:
            before = peer.connection.received_bytes
            self._hear(peer)
        self._part(peer)

    # -- what is said ---------------------------------------------------------------------------------------

    def _act(self, peer: _Peer, message: Message) -> None:
        match message:
            case protocol.Hello():
                self._greet(peer, message)
            case protocol.Leave():
                self.leave()
            case protocol.Ask():
                peer.tell(self._status())
            case _ if not peer.greeted:
                raise Unsupported(f"this keeper is of version {protocol.VERSION}")
            case protocol.Settle():
                self._settle(peer)
            case protocol.Begin():
                self._begin(peer, message)
            case _ if peer is not self._trainer or self._work is None:
                raise Damaged(f"{type(message).__name__} is for a trainer to say")
            case protocol.Goodbye():
                self._leaving = True
                peer.heir = False
                self._let_go()
            case _:
                self._pass_on(self._work, message, peer.unclaimed)

    def _pass_on(self, work: Work, message: Message, descriptors: list[int]) -> None:
        match message:
            case protocol.Prepare():
                work.prepare(message)
            case protocol.Bring():
                work.bring(message.arena, descriptors.pop())
            case protocol.Discard():
                work.discard(message.arena)
            case protocol.Submit():
                work.submit(message)
            case protocol.Fill():
                work.fill(message)
            case protocol.Arrived():
                work.arrived(message)
            case protocol.End():
                work.end(message)
            case protocol.Drop():
                work.drop(message.job)
            case protocol.Tidy():
                work.tidy(message)

    def _greet(self, peer: _Peer, hello: protocol.Hello) -> None:
        trainer = self._trainer.pid if self._trainer is not None else 0
        peer.tell(protocol.Welcome(protocol.VERSION, os.getpid(), trainer))
        if hello.version == protocol.VERSION and hello.chain in ("", self._chain.about.chain):
            peer.greeted = True
            peer.connection.limit_bytes = protocol.MAX_FRAME_BYTES

    def _settle(self, peer: _Peer) -> None:
        if self._trainer is not None and self._trainer is not peer:
            raise Conflict(
                f"{self._chain.url} is being written by process {self._trainer.pid} on this machine",
                kept="nothing was touched",
                next=f"kill {self._trainer.pid}  # it takes a last snapshot",
            )
        peer.heir = peer.waits = True
        if peer.life is None:
            self._watch_life(peer)
        if self._finished and self._work is not None and self._work.unfinished:
            self._finished = False
            self._work.try_again()
        if not self._finished and self._work is not None:
            peer.tell(protocol.Busy(self._work.next_step))

    def _answer_settle(self, peer: _Peer) -> None:
        peer.waits = False
        newest = self._work.newest if self._work is not None else None
        if newest is None or newest[1].descriptor is None:
            peer.tell(protocol.Settled(""))
        else:
            peer.tell(protocol.Settled(newest[0]), (newest[1].descriptor,))

    def _begin(self, peer: _Peer, message: protocol.Begin) -> None:
        if not peer.heir or peer.waits or self._trainer is not None or not self._finished:
            raise Conflict(f"the keeper of {self._chain.url} is at work for another process")
        spare: Arena | None = None
        before: Following | None = None
        if self._work is not None:
            spare, before = self._work.close(), self._work.following
        if before is not None:
            before.stop()
        self._trainer = peer
        self._finished = False
        self._leaving = self._hurried = False
        terms = message.terms()
        self._work = Work(self._chain, terms, _Telling(peer, self.wake), self.wake, spare, before)

    def _status(self) -> protocol.Status:
        work = self._work
        newest = work.newest if work is not None and self._finished else None
        return protocol.Status(
            version=protocol.VERSION,
            pid=os.getpid(),
            chain=self._chain.url,
            since=self._since,
            trainer=self._trainer.pid if self._trainer is not None else 0,
            jobs=work.jobs() if work is not None else (),
            arenas=work.arena_bytes() if work is not None else (),
            held=newest[0] if newest is not None else "",
            nice=os.nice(0),
            memory_bytes=memory.peak_private_bytes(),
            torch_imported=protocol.torch_is_imported(),
            unsent=work.following.behind() if work is not None and work.following is not None else {},
        )


# -- the process -------------------------------------------------------------------------------------------


def main(place: str, chain: str, environment: Mapping[str, str] = os.environ) -> None:
    """Be the keeper of the chain at `chain`, a directory or a URL, found at the directory `place`.

    Standard error is at first who has started it: it reads `LISTENING`, or `TAKEN`, or what is wrong.
    """
    _ignore_signals()
    os.umask(0o077)
    os.chdir("/")
    _be_first_to_go()
    _be_nice(int(environment.get("EVERSTEP_KEEPER_NICE", NICE)))
    here = Place(Path(place))
    lock = Lock.take(here)
    if lock is None:
        sys.stderr.write(f"{TAKEN}\n")
        return
    try:
        linger_s = float(environment.get("EVERSTEP_KEEPER_LINGER", LINGER_S))
        service = Service(Chain(chain), here.listen(), linger_s=linger_s)
    except (EverstepError, OSError, ValueError) as error:
        lock.release()
        raise SystemExit(str(error)) from error
    for number in _ENDS:
        signal.signal(number, lambda *_: service.leave())
    sys.stderr.write(f"{LISTENING}\n")
    sys.stderr.flush()
    _log_to(here.log_file)
    sweep(here.path.parent)
    # Where this raises, all is left as it is, with the reason in the log: the next keeper tidies up.
    service.run()
    lock.release()


def _ignore_signals() -> None:
    """Until there is something to be finished. An interrupt is always meant for the trainer."""
    for number in (signal.SIGINT, *_ENDS):
        signal.signal(number, signal.SIG_IGN)
    # The thread that has started this may have had them blocked.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _be_first_to_go() -> None:
    """Where memory runs out, this process goes before the trainer: another can take its place. Left alone the
    kernel would choose wrongly, as it does not count memory that is shared by descriptors."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))


def _be_nice(nice: int) -> None:
    os.nice(nice)
    # A session of its own may be a scheduling group of its own, whose niceness is what counts then.
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(nice))


def _log_to(path: Path) -> None:
    """From now on what is wrong is written to a file, which the trainer quotes if this process dies."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o600)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    sys.stdout = sys.stderr = Log(2)
    faulthandler.enable(2)


class Log(io.TextIOBase):
    """A text file that is begun anew when it has grown too large."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, text: str) -> int:
        with suppress(OSError):  # A full disk stops nothing.
            if os.fstat(self._descriptor).st_size > LOG_BYTES:
                os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, text.encode(errors="replace"))
        return len(text)


def log(text: str) -> None:
    """A line for whoever wonders what happened."""
    sys.stderr.write(f"{now()} {text}\n")
