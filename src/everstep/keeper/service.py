"""The keeper process: one for each chain and host, beside the trainer. Imports no torch.

It takes what a trainer hands over and makes it durable, whatever becomes of the trainer. When that is killed,
the keeper finishes what it was given, keeps the newest snapshot in memory for a while, in case the trainer is
started again, and leaves. After a clean end it leaves at once, and nothing of it stays.

Where a run has many ranks, all trainers of this machine have the same keeper, and a seat each: what becomes
of one of them is nothing to the others.
"""

from __future__ import annotations

import faulthandler
import io
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from everstep.chain.history import Chain, now
from everstep.chain.siblings import Siblings
from everstep.errors import Conflict, Damaged, EverstepError, Unsupported
from everstep.keeper import memory, protocol
from everstep.keeper.following import Following
from everstep.keeper.places import Lock, Place, sweep
from everstep.keeper.protocol import Connection, Identify, Message
from everstep.keeper.reading import Range, Reading
from everstep.keeper.seat import Caller, Seat
from everstep.keeper.start import LISTENING, TAKEN
from everstep.keeper.work import Work

NICE = 10
"""The trainer comes first; the system gives its I/O a lower priority accordingly. EVERSTEP_KEEPER_NICE."""

OOM_SCORE = 500
"""What Linux adds to its reasons to end this process when memory runs out, of 1000."""

LINGER_S = 300.0
"""So long the newest snapshot of a killed trainer stays in memory. EVERSTEP_KEEPER_LINGER."""

START_S = 60.0
"""So long a keeper waits for who has started it; and for the other ranks, once one of a run is back."""

LOG_BYTES = 1024 * 1024
MAX_CALLERS = 256
MAX_UNSENT_BYTES = 1024 * 1024
"""Who asks and does not listen is let go; a trainer may be stopped for as long as it likes."""

_ENDS = (signal.SIGTERM, signal.SIGHUP)


class Service:
    """Listens, and gives each trainer's messages to its seat. Runs in one thread and never blocks it.

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
        self._callers: list[Caller] = []
        self._ranks = 1
        """Of the run whose seats these are."""
        self._seats: dict[int, Seat] = {}
        """By rank: those that have a trainer, or something of one that is gone."""
        self._siblings = Siblings()
        self._reading = Reading(chain.store)
        self._before: Following | None = None
        """What followed for an earlier run, and was stopped."""
        self._hurried = False
        """Whether to leave without waiting for replicas."""
        self._due = clock() + START_S
        """So long somebody may come."""
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
        """Serve the trainers that are there to their end; then go, whatever replicas lack."""
        self._hurried = True
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
        if any(seat.at_work for seat in self._seats.values()):
            return False
        if self._hurried:
            return True
        lingers = self._clock() < self._due or any(seat.lingers() for seat in self._seats.values())
        return not lingers and not self._heirs()

    def _heirs(self) -> bool:
        """Whether anybody may want to be the next trainer."""
        return any(caller.heir for caller in self._callers)

    def _patience(self) -> float | None:
        """So long nothing but a message, a job's end, or what was sent, changes anything."""
        if self._heirs():
            return None
        resting = [seat.patience_s() for seat in self._seats.values() if not seat.at_work]
        if len(resting) == len(self._seats):
            return max([self._due - self._clock(), 0.0, *resting])
        return min(resting, default=None)

    def _look_around(self) -> None:
        for caller in list(self._callers):
            self._watch_sending(caller)
        heirs = self._heirs()
        if not heirs:
            # All have restored what they wanted.
            self._reading.forget()
        for seat in list(self._seats.values()):
            seat.look_around(self._hurried)
            if not seat.at_work and not seat.lingers() and not heirs:
                self._clear(seat)
        for caller in self._callers:
            if caller.waits and not any(seat.at_work for seat in self._before_it(caller)):
                self._answer_settle(caller)

    def _clear(self, seat: Seat) -> None:
        """Nobody comes for what it holds."""
        del self._seats[seat.rank]
        self._stop_following(seat.close())

    def _stop_following(self, following: Following | None) -> None:
        if following is not None:
            following.stop()
            self._before = following

    def _close(self) -> None:
        self._selector.unregister(self._listener)
        self._listener.close()
        for caller in list(self._callers):
            self._part(caller)
        self._reading.close()
        for seat in self._seats.values():
            following = seat.close()
            if following is not None:
                following.close()
        if self._before is not None:
            self._before.close()
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
        if who.uid != os.geteuid() or len(self._callers) >= MAX_CALLERS:
            sock.close()
            return
        caller = Caller(Connection(sock, protocol.TO_KEEPER, protocol.MAX_GREETING_BYTES), who.pid)
        self._callers.append(caller)
        self._selector.register(sock, selectors.EVENT_READ, partial(self._hear, caller))

    def _wake_up(self) -> None:
        with suppress(BlockingIOError):
            self._woken.recv(4096)

    def _watch_sending(self, caller: Caller) -> None:
        """Be told when a socket takes more, where something waits for that."""
        unsent = caller.connection.unsent_bytes
        if unsent > MAX_UNSENT_BYTES and self._seat_of(caller) is None:
            self._part(caller)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if unsent else 0)
        key = self._selector.get_key(caller.connection)
        if key.events != events:
            self._selector.modify(caller.connection, events, key.data)

    def _hear(self, caller: Caller) -> None:
        """Something has come of a process, or it takes more."""
        if caller not in self._callers:
            return
        caller.connection.flush()
        try:
            for message, descriptors in caller.connection.receive():
                caller.unclaimed += descriptors
                self._act(caller, message)
        except EverstepError as error:
            log(f"process {caller.pid}: {error}")
            caller.tell(protocol.Refused(protocol.Problem.of(error)))
            self._part(caller)
            return
        if caller.connection.ended:
            self._part(caller)

    def _part(self, caller: Caller) -> None:
        """A process is gone, or is let go."""
        if caller not in self._callers:
            return
        self._callers.remove(caller)
        self._selector.unregister(caller.connection)
        if caller.life is not None:
            self._selector.unregister(caller.life)
            os.close(caller.life)
        caller.connection.close()
        while caller.unclaimed:
            os.close(caller.unclaimed.pop())
        seat = self._seat_of(caller)
        if seat is not None:
            seat.let_go(died=True)
        elif caller.heir:
            # It goes without having begun: the time counts anew.
            for seat in self._before_it(caller):
                if not seat.at_work:
                    seat.linger_anew()

    def _watch_life(self, caller: Caller) -> None:
        """Notice the death of a process although its forked children still have the socket."""
        with suppress(OSError):  # It is dead already, or of another world: the socket will tell.
            caller.life = os.pidfd_open(caller.pid)
            self._selector.register(caller.life, selectors.EVENT_READ, partial(self._bury, caller))

    def _bury(self, caller: Caller) -> None:
        """A process is dead: what it has sent is heard to the end, then it is gone."""
        before = -1
        while caller in self._callers and caller.connection.received_bytes != before:
            before = caller.connection.received_bytes
            self._hear(caller)
        self._part(caller)

    # -- seats ----------------------------------------------------------------------------------------------

    def _seat_of(self, trainer: Caller) -> Seat | None:
        """The one that a process has."""
        return next((seat for seat in self._seats.values() if seat.trainer is trainer), None)

    def _before_it(self, heir: Caller) -> list[Seat]:
        """The seats in which all is to be done before this process may begin: its rank's own; or all, where
        there were more ranks, or fewer."""
        if heir.ranks != self._ranks:
            return list(self._seats.values())
        return [self._seats[heir.rank]] if heir.rank in self._seats else []

    def _refuse_taken(self, heir: Caller) -> None:
        """Raises Conflict where another process is the trainer of this rank, or of a run of other ranks."""
        for seat in self._before_it(heir):
            if seat.trainer is not None and seat.trainer is not heir:
                of = f" as rank {seat.rank} of {self._ranks}" if self._ranks > 1 else ""
                raise Conflict(
                    f"{self._chain.url} is being written by process {seat.trainer.pid} on this machine{of}",
                    kept="nothing was touched",
                    next=f"kill {seat.trainer.pid}  # it takes a last snapshot",
                )

    # -- what is said ---------------------------------------------------------------------------------------

    def _act(self, caller: Caller, message: Message) -> None:
        match message:
            case protocol.Hello():
                self._greet(caller, message)
                return
            case protocol.Leave():
                self.leave()
                return
            case protocol.Ask():
                caller.tell(self._status())
                return
            case _ if not caller.greeted:
                raise Unsupported(f"this keeper is of version {protocol.VERSION}")
            case protocol.Settle():
                self._settle(caller, message)
                return
            case protocol.Read():
                self._read(caller, message)
                return
            case protocol.Begin():
                self._begin(caller, message)
                return
        seat = self._seat_of(caller)
        if seat is None:
            raise Damaged(f"{type(message).__name__} is for a trainer to say")
        if isinstance(message, protocol.Goodbye):
            seat.let_go(died=False)
            return
        self._pass_on(seat.work, message, caller.unclaimed)

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

    def _trainer(self) -> int:
        """A process that this keeper works for, 0 for none."""
        return next((seat.trainer.pid for seat in self._in_order() if seat.trainer is not None), 0)

    def _in_order(self) -> list[Seat]:
        return [seat for _, seat in sorted(self._seats.items())]

    def _greet(self, caller: Caller, hello: protocol.Hello) -> None:
        caller.tell(protocol.Welcome(protocol.VERSION, os.getpid(), self._trainer()))
        if hello.version == protocol.VERSION and hello.chain in ("", self._chain.about.chain):
            caller.greeted = True
            caller.connection.limit_bytes = protocol.MAX_FRAME_BYTES

    def _settle(self, caller: Caller, message: protocol.Settle) -> None:
        caller.rank, caller.ranks = message.rank, message.ranks
        self._refuse_taken(caller)
        self._due = self._clock()
        caller.heir = caller.waits = True
        if caller.life is None:
            self._watch_life(caller)
        before = self._before_it(caller)
        for seat in before:
            seat.hurry()
        if any(seat.at_work for seat in before):
            steps = [step for seat in before if (step := seat.work.next_step)]
            caller.tell(protocol.Busy(min(steps, default=0)))

    def _read(self, caller: Caller, message: protocol.Read) -> None:
        wanted = Range(message.key, message.start, message.size_bytes)
        if not caller.heir or not wanted.shareable:
            raise Damaged(f"process {caller.pid} is not one to read {message.key[:80]!r} for")
        self._reading.ask(wanted, partial(self._give, caller, message.number))

    def _give(self, caller: Caller, number: int, descriptor: int | None) -> None:
        """From any thread."""
        descriptors = () if descriptor is None else (descriptor,)
        caller.connection.send(protocol.Got(number, descriptor is not None), descriptors)
        if caller.connection.unsent_bytes:
            self.wake()

    def _answer_settle(self, caller: Caller) -> None:
        caller.waits = False
        seat = self._seats.get(caller.rank) if caller.ranks == self._ranks else None
        caller.tell(*(seat.settled() if seat is not None else (protocol.Settled(""), ())))

    def _begin(self, caller: Caller, message: protocol.Begin) -> None:
        terms = message.terms()
        before = self._before_it(caller)
        if not caller.heir or caller.waits or any(seat.at_work for seat in before):
            raise Conflict(f"the keeper of {self._chain.url} is at work for another process")
        if (terms.rank, terms.ranks) != (caller.rank, caller.ranks):
            raise Damaged(f"rank {terms.rank} of {terms.ranks} has asked as another")
        for seat in before:
            if terms.ranks != self._ranks:
                self._clear(seat)
        caller.heir = False
        self._ranks = terms.ranks
        self._hurried = False
        earlier = self._seats.get(terms.rank)
        if earlier is not None:
            self._stop_following(earlier.work.following)
        after, self._before = (self._before, None) if terms.rank == 0 else (None, self._before)
        self._seats[terms.rank] = Seat(
            self._chain,
            caller,
            terms,
            self._siblings,
            self.wake,
            self._linger_s,
            self._clock,
            earlier,
            after,
        )
        for seat in self._seats.values():
            if not seat.at_work:
                seat.linger_at_most(START_S)

    def _status(self) -> protocol.Status:
        seats = [seat.status() for seat in self._in_order()]
        followings = [seat.work.following for seat in self._in_order() if seat.work.following is not None]
        return protocol.Status(
            version=protocol.VERSION,
            pid=os.getpid(),
            chain=self._chain.url,
            since=self._since,
            trainer=self._trainer(),
            jobs=tuple(job for seat in seats for job in seat.jobs),
            arenas=tuple(arena for seat in seats for arena in seat.arenas),
            held=next((name for seat in seats for name in seat.held), ""),
            nice=os.nice(0),
            memory_bytes=memory.peak_private_bytes(),
            torch_imported=protocol.torch_is_imported(),
            unsent={name: count for one in followings for name, count in one.behind().items()},
            ranks=self._ranks,
            seats=tuple(seats),
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
