"""Threads of one write: some work ahead of where their results are wanted, one puts what is ready.

All of them end with the write. Where there is little to do, or the interpreter is about to end and starts no
threads any more, the calling thread does it all.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Generic, TypeVar

from everstep.format.pack import Builder

Result = TypeVar("Result")

MAX_LANES = 4
"""Four cores digest faster than any disk of today writes."""

AT_ONCE = 2
"""So many packs are put at a time: while one is made durable, the disk or network has another to take."""

SMALL_BYTES = 1024 * 1024
"""A pack below this size is put in less time than a thread takes to start beside a busy trainer."""


def idle_cores(ours: int = 0) -> int:
    """How many cores nobody else keeps busy at this instant, this thread's own included: 1 at least. `ours`:
    so many more threads that may be running now are not somebody else."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/proc/loadavg") as file:
            running = int(file.read().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        # Another system: then half of them are as good a guess as any.
        running = 1 + cores // 2
    return max(1, cores - max(running - 1 - ours, 0))


class _Task(Generic[Result]):
    def __init__(self, call: Callable[[], Result]) -> None:
        self._call: Callable[[], Result] | None = call
        self._results: list[Result] = []
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self._call is None

    def run(self) -> None:
        assert self._call is not None
        try:
            self._results.append(self._call())
        except BaseException as error:
            self._error = error
        # What was called holds memory that may have to be given back.
        self._call = None

    def result(self) -> Result:
        if self._error is not None:
            raise self._error
        return self._results.pop()


class Lanes:
    """Makes calls ahead, a few at a time, and gives their results in the order of the calls.

    Args:
        limit: in so many threads at most, the calling one included.
        hungry: asked before a thread is started: whether the results are waited for.
    """

    def __init__(self, limit: int, hungry: Callable[[], bool]) -> None:
        self.limit = min(limit, MAX_LANES)
        self.cpu_s = 0.0
        """CPU time of the threads that have ended, the calling one not included."""
        self._hungry = hungry
        self._waiting: deque[_Task[object]] = deque()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def results(self, calls: Iterable[Callable[[], Result]]) -> Iterator[Result]:
        """The results of all calls; the first error is raised in its place."""
        ahead: deque[_Task[Result]] = deque()
        for call in calls:
            task = _Task(call)
            ahead.append(task)
            with self._changed:
                self._waiting.append(task)  # type: ignore[arg-type]
                self._changed.notify()
            if len(ahead) > 2 * self.limit:
                yield self._result(ahead.popleft())
        while ahead:
            yield self._result(ahead.popleft())

    def _result(self, task: _Task[Result]) -> Result:
        if len(self._threads) + 1 < self.limit and len(self._waiting) > 1 and self._hungry():
            self._start()
        while not task.done:
            with self._changed:
                if not self._waiting:
                    self._changed.wait_for(lambda: task.done)
                    break
                other = self._waiting.popleft()
            other.run()
        return task.result()

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name="everstep-digest", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            self.limit = 1
        else:
            self._threads.append(thread)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    self.cpu_s += time.thread_time()
                    return
                task = self._waiting.popleft()
            task.run()
            with self._changed:
                self._changed.notify_all()

    def close(self) -> None:
        """End the threads; calls that nobody has begun are not made."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()


class Air:
    """The packs that are being put into one store, by one writer or by several that are to share it.

    Args:
        clock: in seconds.
        limit: so many are put at a time.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, limit: int = AT_ONCE) -> None:
        self._clock = clock
        self._room = threading.Semaphore(limit)
        self._lock = threading.Lock()
        self._packs = 0
        self._shared_s = self._since = 0.0
        """The share of one pack that had been put all the time, up to `_since`."""

    def put(self, put: Callable[[], None]) -> float:
        """Put a pack. Blocks until it is put, and before that while there is no room.

        Returns:
            Its share of the time, in seconds: half of that in which two were put.
        """
        with self._room:
            begun = self._count(1)
            try:
                put()
            finally:
                share_s = self._count(-1) - begun
        return share_s

    def _count(self, change: int) -> float:
        """So many more are being put; returns the share up to now."""
        with self._lock:
            now = self._clock()
            if self._packs:
                self._shared_s += (now - self._since) / self._packs
            self._since = now
            self._packs += change
            return self._shared_s


class Putter:
    """Puts packs, in threads of its own where that pays: a few at a time, and one more may wait.

    Args:
        put: stores a pack. Its error comes out of the next `put` or `drain`, and what waits is not put.
        took: is told of each pack how many bytes it had, and its share of the time, in seconds.
        air: where they are put.
    """

    def __init__(
        self,
        put: Callable[[Builder], None],
        clock: Callable[[], float],
        took: Callable[[int, float], None],
        air: Air,
    ) -> None:
        self.busy_s = 0.0
        """Time in which a pack was being put."""
        self.cpu_s = 0.0
        """CPU time of the threads that have ended."""
        self._put = put
        self._clock = clock
        self._took = took
        self._air = air
        self._waiting: Builder | None = None
        self._putting = 0
        self._since = 0.0
        self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    @property
    def idle(self) -> bool:
        """Whether nothing is left to put."""
        return self._waiting is None and not self._putting

    def put(self, builder: Builder, last: bool = False) -> None:
        """Have a pack put. Blocks while another waits; until it is put where no thread is worth it: for small
        ones, and for the `last` where there is none yet."""
        if not self._threads and (last or builder.end < SMALL_BYTES or not self._start()):
            with self._changed:
                self._count(1)
            try:
                self._put_now(builder)
            finally:
                with self._changed:
                    self._count(-1)
            return
        with self._changed:
            if self._putting == len(self._threads) < AT_ONCE:
                self._start()
            self._changed.wait_for(lambda: self._waiting is None)
            self._raise()
            self._waiting = builder
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until all is put."""
        with self._changed:
            self._changed.wait_for(lambda: self.idle)
        self._raise()

    def close(self) -> None:
        """End the threads; what waits is not put."""
        with self._changed:
            self._closed = True
            self._waiting = None
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _start(self) -> bool:
        thread = threading.Thread(target=self._work, name="everstep-put", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return False
        self._threads.append(thread)
        return True

    def _put_now(self, builder: Builder) -> None:
        self._took(builder.end, self._air.put(partial(self._put, builder)))

    def _count(self, change: int) -> None:
        """So many more are being put. Under the lock."""
        now = self._clock()
        if self._putting:
            self.busy_s += now - self._since
        self._since = now
        self._putting += change
        self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                builder, self._waiting = self._waiting, None
                if builder is None:
                    self.cpu_s += time.thread_time()
                    return
                self._count(1)
            try:
                if self._error is None:
                    self._put_now(builder)
            except BaseException as error:
                self._error = self._error or error
            # It may hold memory that is given back when all is put.
            builder = None
            with self._changed:
                self._count(-1)
