"""How ranks reach each other: through the TCPStore that their job has anyway, on connections of their own.

Nothing of the job's own communication is touched: no process group, no collective. Each thread has a
connection, for a store's client serves one call after the other.
"""

from __future__ import annotations

import os
import queue
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import msgspec
import torch
import torch.distributed as dist
import zstandard

from everstep.errors import Mismatch, Unavailable, Unsupported
from everstep.run.ranks import messages
from everstep.run.ranks.hub import Hub, named
from everstep.run.ranks.messages import End, Late, Lost, Message, Request

WAIT_S = 600.0
"""So long ranks wait for each other when a run is opened. EVERSTEP_RANKS_WAIT."""

FOREVER = timedelta(days=20)
"""Who listens waits as long as it takes (no more fits into torch's milliseconds); that the store is gone is
noticed all the same."""

STUCK_S = 10.0
"""A request that was begun and not finished for so long is of a rank that is dead."""

MAX_SHARED_BYTES = 1 << 30
"""What all ranks share together, where it differs."""

END_S = 10.0
"""A thread that a process ends while it waits for a store may take the process with it: so threads are waited
for where they can end."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.001, 0.05
"""Between two looks of rank 0 for ranks that come."""

BEHIND = 64
"""So many of the hub's last messages stay in the store, for ranks that are slow to hear them."""


class KeyStore(Protocol):
    """What is needed of torch's `Store`."""

    def set(self, key: str, value: bytes) -> None: ...
    def get(self, key: str) -> bytes: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...
    def add(self, key: str, amount: int) -> int: ...
    def check(self, keys: list[str]) -> bool: ...
    def wait(self, keys: list[str], timeout: timedelta) -> None: ...
    def delete_key(self, key: str) -> bool: ...


@dataclass(frozen=True)
class Job:
    """This process's place among the ranks of its job. `connect` gives a new connection to what they share.

    Attributes:
        rank, ranks: which of how many.
    """

    rank: int
    ranks: int
    connect: Callable[[], KeyStore]


def job_of_many(environment: Mapping[str, str] | None = None) -> Job | None:
    """The job of several ranks that this process is one of; None where it is alone.

    The process group's store is used where there is one, else that of `torchrun`'s agent. Does not wait for
    other ranks.

    Raises:
        Mismatch: there are several ranks, and no way to reach them yet.
    """
    found = os.environ if environment is None else environment
    if dist.is_available() and dist.is_initialized():
        if dist.get_world_size() == 1:
            return None
        store: Any = dist.distributed_c10d._get_default_store()
        if not hasattr(store, "clone"):
            raise Unsupported(
                f"torch {torch.__version__} cannot be asked for a second connection to its store",
                kept="nothing was touched",
                next="pip install -U torch, or start the ranks by torchrun and open before "
                "init_process_group()",
            )
        return Job(dist.get_rank(), dist.get_world_size(), store.clone)
    ranks = found.get("WORLD_SIZE", "")
    if ranks in ("", "1"):
        return None
    host, port = found.get("MASTER_ADDR", ""), found.get("MASTER_PORT", "")
    if found.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not host or not port.isdigit():
        raise Mismatch(
            f"this is one of {ranks} processes of a job, and they cannot reach each other yet",
            kept="nothing was touched",
            next="torch.distributed.init_process_group() before everstep.open(), or start them by torchrun",
        )

    def connect() -> KeyStore:
        wait = timedelta(seconds=WAIT_S)
        made = torch._C._distributed_c10d.TCPStore(host, int(port), None, False, wait, False)
        prefixed: Any = torch._C._distributed_c10d.PrefixStore("everstep", made)
        return prefixed  # type: ignore[no-any-return]

    return Job(int(found["RANK"]), int(ranks), connect)


class Link:
    """What one rank says to all and hears of all, in one run, once they have met. Numbers its words, so that
    several runs of a job, one after the other or at once, are kept apart.

    Args:
        job: the rank's.
        name: the run's: the same on all ranks, and on no other run.
        wait_s: how long ranks wait for each other.
    """

    def __init__(self, job: Job, name: str, wait_s: float = WAIT_S) -> None:
        self.rank, self.ranks = job.rank, job.ranks
        self.wait_s = wait_s
        self._job = job
        self._name = name
        self._store = job.connect()
        self._met = ""
        """What the keys of these ranks, and of no ranks before them, begin with."""
        self._shared: Counter[str] = Counter()
        self._told = 0

    def _key(self, *parts: object) -> str:
        assert self._met, "they have not met"
        return "/".join(map(str, (self._met, *parts)))

    # -- while the run is opened and closed -----------------------------------------------------------------

    def meet(self) -> None:
        """Find the ranks that were started together with this one. Blocks until all have come here.

        The store may hold what ranks of an earlier start have said: `torchrun` keeps it when it starts its
        ranks again. So each rank says a random word, and rank 0, which may hear an old one first, answers
        every word it hears with one of its own; only who is there now hears an answer to its own word, and
        all that follows is under rank 0's.

        Raises:
            Unavailable: some did not come for `wait_s` seconds; they are named.
        """
        place = f"everstep/{self._name}"
        word = secrets.token_hex(8)
        hellos = [f"{place}/hello/{rank}" for rank in range(1, self.ranks)]
        try:
            if self.rank == 0:
                self._met = f"{place}/{word}"
                self._welcome(place, hellos)
                return
            answer = f"{place}/welcome/{word}"
            self._store.set(hellos[self.rank - 1], word.encode())
            self._store.wait([answer], timedelta(seconds=self.wait_s))
            self._met = self._store.get(answer).decode()
            self._store.delete_key(answer)
            self._store.set(self._key("met", self.rank), b"")
            self._store.add(self._key("met"), 1)
        except (RuntimeError, ConnectionError) as error:
            met = [f"{place}/{word}/met/{rank}" for rank in range(1, self.ranks)]
            came = self.rank == 0 and all(map(self._is_there, hellos))
            raise self._silent(["", *(met if came else hellos)], "opening", self.wait_s) from error

    def _welcome(self, place: str, hellos: list[str]) -> None:
        """Raises RuntimeError where not all came in time."""
        until = time.monotonic() + self.wait_s
        self._store.wait(hellos, timedelta(seconds=self.wait_s))
        answered: list[bytes] = []
        pause_s = FIRST_PAUSE_S
        while True:
            words = self._store.multi_get(hellos)
            for word in set(words).difference(answered):
                self._store.set(f"{place}/welcome/{word.decode()}", self._met.encode())
            answered = words
            if self._store.add(self._key("met"), 0) == self.ranks - 1:
                return
            if time.monotonic() > until:
                raise RuntimeError("not all ranks have come")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def share(self, what: str, mine: bytes, wait_s: float | None = None) -> list[bytes]:
        """What each rank gives, in the order of ranks. Blocks until all have given something for the same
        `what`, for the same time since the run was opened.

        Raises:
            Unavailable: some did not for `wait_s` seconds; they are named.
        """
        wait_s = self.wait_s if wait_s is None else wait_s
        self._shared[what] += 1
        keys = [self._key("s", what, self._shared[what], rank) for rank in range(self.ranks)]
        all = self._key("s", what, self._shared[what], "all")
        try:
            self._store.set(keys[self.rank], b"+" + mine)
            if self.rank == 0:
                self._store.wait(keys, timedelta(seconds=wait_s))
                self._store.set(all, _together([data[1:] for data in self._store.multi_get(keys)]))
            self._store.wait([all], timedelta(seconds=wait_s))
            return _apart(self._store.get(all))
        except (RuntimeError, ConnectionError) as error:
            raise self._silent(keys, what, wait_s) from error

    def tell(self, data: bytes) -> None:
        """Rank 0 says something to all others."""
        self._told += 1
        self._store.set(self._key("t", self._told), data)

    def told(self) -> bytes:
        """What rank 0 says next. Blocks until it does. Raises Unavailable where it does not in time."""
        self._told += 1
        key = self._key("t", self._told)
        try:
            self._store.wait([key], timedelta(seconds=self.wait_s))
            return self._store.get(key)
        except (RuntimeError, ConnectionError) as error:
            raise self._silent([key], "going on", self.wait_s) from error

    def _silent(self, keys: list[str], what: str, wait_s: float) -> Unavailable:
        silent = [rank for rank, key in enumerate(keys) if rank != self.rank and not self._is_there(key)]
        return Unavailable(
            f"{named(silent)} of {self.ranks} did not answer for {wait_s:.0f} s, for which {what!r} waits",
            kept="nothing was touched; the snapshots of the chain are intact",
            next="look at what those processes say; EVERSTEP_RANKS_WAIT sets another time",
        )

    def _is_there(self, key: str) -> bool:
        try:
            return self._store.check([key])
        except (RuntimeError, ConnectionError):
            return False

    # -- while it trains ------------------------------------------------------------------------------------

    def talk(
        self, round: int, hear: Callable[[Message], None], broken: Callable[[str], None], late_s: float
    ) -> Talk:
        """Talk with the hub, which is rank 0's, for the `round`th time, from its `begin` on. `hear` and
        `broken` are called in a thread."""
        return Talk(self._job, self._key("h", round), hear, broken, late_s)


class Talk:
    """The threads that carry requests to the hub and its messages to all ranks; rank 0 has the hub.

    A thread that waits for a message cannot be woken but by one: so all end when rank 0 says `End`, or with
    the process.

    Args:
        hear: is told what the hub says, in the order in which it says it.
        broken: is told, once, why nothing more can be heard.
        late_s: for so long the hub waits for promises.
    """

    def __init__(
        self,
        job: Job,
        prefix: str,
        hear: Callable[[Message], None],
        broken: Callable[[str], None],
        late_s: float,
    ) -> None:
        self._prefix = prefix
        self._hear = hear
        self._broken = broken
        self._late_s = late_s
        self._ended = threading.Event()
        self._requests: queue.SimpleQueue[Request | tuple[str, bytes] | None] = queue.SimpleQueue()
        self._gathering: KeyStore | None = None
        self._job = job
        self._hub = Hub(job.ranks) if job.rank == 0 else None
        self._serving = 0
        """The number of the request that the hub waits for."""
        self._said = 0
        """The number of rank 0's own newest request."""
        self._watched = False
        """Whether somebody looks whether the hub comes to that."""
        self._watching = threading.Lock()
        targets: list[tuple[str, Callable[[KeyStore], None]]] = [
            ("say", self._say_all),
            ("hear", self._hear_all),
            *([("hub", self._serve)] if self._hub is not None else []),
        ]
        self._threads = [
            threading.Thread(
                target=self._run, args=(target, job.connect()), name=f"everstep-{name}", daemon=True
            )
            for name, target in targets
        ]

    def begin(self) -> None:
        """Say and hear. `hear` may be called before this returns, and may post."""
        for thread in self._threads:
            thread.start()

    def post(self, request: Request) -> None:
        """Does not block."""
        self._requests.put(request)

    def give(self, number: int, mine: bytes) -> None:
        """Say something of take `number` that rank 0 gathers. Does not block."""
        self._requests.put((f"{self._prefix}/g/{number}/{self._job.rank}", b"+" + mine))

    def gather(self, number: int, mine: bytes, wait_s: float) -> list[bytes]:
        """What all ranks have given of take `number`, in order; this one, rank 0, gives it now. Blocks.

        Raises:
            Unavailable: some have not in time.
        """
        keys = [f"{self._prefix}/g/{number}/{rank}" for rank in range(1, self._job.ranks)]
        if self._gathering is None:
            self._gathering = self._job.connect()
        store = self._gathering
        try:
            store.wait(keys, timedelta(seconds=wait_s))
            given = [data[1:] for data in store.multi_get(keys)]
            for key in keys:
                store.delete_key(key)
        except (RuntimeError, ConnectionError) as error:
            self._gathering = None
            raise Unavailable(
                f"not all ranks said within {wait_s:.0f} s what they have captured",
                kept="the snapshots before it are intact",
                next="nothing: the next snapshot is taken as usual",
            ) from error
        return [mine, *given]

    def end(self, wait_s: float = END_S) -> None:
        """Nobody is heard any more. Blocks until rank 0 has ended all; no longer than `wait_s`, for there
        may be no rank 0 any more."""
        if self._hub is not None:
            self.post(End())
        self._requests.put(None)
        until = time.monotonic() + wait_s
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0.0))
        self._ended.set()

    def _run(self, target: Callable[[KeyStore], None], store: KeyStore) -> None:
        try:
            target(store)
        except (RuntimeError, ConnectionError, OSError) as error:
            # The store is gone: with rank 0, or with torchrun's agent, and soon with this process.
            if not self._ended.is_set():
                self._ended.set()
                self._broken(str(error).splitlines()[0] if str(error) else type(error).__name__)

    def _say_all(self, store: KeyStore) -> None:
        while (request := self._requests.get()) is not None:
            if isinstance(request, tuple):
                store.set(*request)
                continue
            number = store.add(f"{self._prefix}/n", 1)
            store.set(f"{self._prefix}/r/{number}", messages.encode(request))
            if self._hub is not None:
                self._watch(number)

    def _hear_all(self, store: KeyStore) -> None:
        number = 0
        while True:
            number += 1
            key = f"{self._prefix}/m/{number}"
            store.wait([key], FOREVER)
            message = messages.message(store.get(key))
            if isinstance(message, End):
                self._ended.set()
                return
            self._hear(message)

    # -- rank 0 ---------------------------------------------------------------------------------------------

    def _serve(self, store: KeyStore) -> None:
        hub = self._hub
        assert hub is not None
        said = 0
        while True:
            self._serving += 1
            key = f"{self._prefix}/r/{self._serving}"
            store.wait([key], FOREVER)
            request = messages.request(store.get(key))
            store.delete_key(key)
            began = hub.number
            gathered = hub.gathers
            for message in hub.hear(request):
                said += 1
                store.set(f"{self._prefix}/m/{said}", messages.encode(message))
                if said > BEHIND:
                    store.delete_key(f"{self._prefix}/m/{said - BEHIND}")
            if hub.gathers and (not gathered or hub.number != began):
                self._set_alarm(hub.number)
            if isinstance(request, End):
                return

    def _set_alarm(self, number: int) -> None:
        _later(self._late_s, lambda: self.post(Late(number)))

    def _watch(self, number: int) -> None:
        """A rank that died between taking a number for its request and making it has left a gap, at which the
        hub would wait for ever. That the hub does not come to rank 0's own requests, this one, tells of it.
        One timer looks after all of them."""
        with self._watching:
            self._said = number
            if not self._watched:
                self._watched = True
                _later(STUCK_S, partial(self._look, -1))

    def _look(self, before: int) -> None:
        """`before` is what the hub waited for at the last look."""
        with self._watching:
            at = self._serving
            self._watched = at <= self._said and not self._ended.is_set()
            if not self._watched:
                return
        if at == before:
            self._fill_gap(at)
        _later(STUCK_S, partial(self._look, at))

    def _fill_gap(self, at: int) -> None:
        with suppress(RuntimeError, ConnectionError):
            store = self._job.connect()
            key = f"{self._prefix}/r/{at}"
            if not store.check([key]):
                store.set(key, messages.encode(Lost()))


def _later(seconds: float, action: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.name = "everstep-late"
    timer.start()


def _together(each: list[bytes]) -> bytes:
    """What each rank gave, as one; what many gave is in it once."""
    different = list(dict.fromkeys(each))
    number = {one: at for at, one in enumerate(different)}
    data = msgspec.msgpack.encode((different, [number[one] for one in each]))
    return zstandard.ZstdCompressor(level=3).compress(data)


def _apart(data: bytes) -> list[bytes]:
    raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=MAX_SHARED_BYTES)
    different, numbers = msgspec.msgpack.decode(raw, type=tuple[list[bytes], list[int]])
    return [different[number] for number in numbers]


def unique(name: str, opened: dict[str, int]) -> str:
    """A name for a run of this process that the other ranks come to, too: they open the same ones in the same
    order."""
    opened[name] = opened.get(name, 0) + 1
    return f"{name}#{opened[name]}"


OPENED: dict[str, int] = {}
"""How many runs of a name this process has opened."""
