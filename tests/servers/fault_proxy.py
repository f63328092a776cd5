"""A proxy between a client and a server that speaks HTTP, with the moods of a network: it drops, delays,
cuts, answers 5xx, hangs, and is away for a while. What it does is drawn from a seeded generator, one draw a
request.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from dataclasses import dataclass

DROPPED, FAILED, CUT, DELAYED, PASSED, AWAY = "dropped", "failed", "cut", "delayed", "passed", "away"

_SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code></Error>"
_NOBODY = {204, 304}
_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Moods:
    """The shares of requests, from 0 to 1, that are dropped before they reach the server; answered with 503;
    carried out, and their answers cut off; delayed by `delay_s` seconds."""

    drop: float = 0.0
    fail: float = 0.0
    cut: float = 0.0
    delay: float = 0.0
    delay_s: float = 0.01

    def draw(self, chance: random.Random) -> str:
        kinds = [DROPPED, FAILED, CUT, DELAYED]
        shares = [self.drop, self.fail, self.cut, self.delay]
        return chance.choices([*kinds, PASSED], [*shares, 1 - sum(shares)])[0]


@dataclass(frozen=True)
class _Message:
    head: bytes
    body: bytes

    @property
    def first_line(self) -> list[str]:
        return self.head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")

    def header(self, name: str) -> str | None:
        for line in self.head.decode("latin-1").split("\r\n")[1:]:
            key, _, value = line.partition(":")
            if key.strip().lower() == name:
                return value.strip()
        return None


class FaultProxy:
    """Works in a thread of its own from `with` to its end.

    Args:
        port: where on the loopback the server listens.
        moods, seed: what happens to requests.

    Attributes:
        endpoint: where a client goes.
        done: how many requests met with which fate.
        log: their methods and targets, in the order in which they came.
    """

    def __init__(self, port: int, moods: Moods | None = None, seed: int = 0) -> None:
        self.moods = moods or Moods()
        self.done: Counter[str] = Counter()
        self.log: list[str] = []
        self.endpoint = ""
        self._port = port
        self._chance = random.Random(seed)
        self._away = 0
        self._answers = asyncio.Event()
        self._answers.set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)

    def go_away(self, connections: int) -> None:
        """Close so many connections, and what is asked over those that are there, before it is back."""
        self._away = connections

    def come_back(self) -> None:
        """Now, however many it was to turn away."""
        self._away = 0

    def hang(self) -> None:
        """Take what is asked, and answer nothing until `go_on`."""
        self._loop.call_soon_threadsafe(self._answers.clear)

    def go_on(self) -> None:
        """Answer all that was asked meanwhile."""
        self._loop.call_soon_threadsafe(self._answers.set)

    @property
    def is_away(self) -> bool:
        return self._away > 0

    # -- in its thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._talk, "127.0.0.1", 0, limit=_LINE_BYTES)
        self.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while True:
                if self._is_turned_away():
                    return
                request = await _request(reader)
                if self._is_turned_away():
                    return
                self.log.append(" ".join(request.first_line[:2]))
                await self._answers.wait()
                mood = self.moods.draw(self._chance)
                self.done[mood] += 1
                if mood == DROPPED:
                    return
                if mood == FAILED:
                    writer.write(_error(503, _SLOW_DOWN))
                    await writer.drain()
                    continue
                if mood == DELAYED:
                    await asyncio.sleep(self.moods.delay_s)
                if server is None:
                    server = await asyncio.open_connection("127.0.0.1", self._port, limit=_LINE_BYTES)
                server[1].write(request.head + request.body)
                await server[1].drain()
                answer = await _answer(server[0], request.first_line[0])
                if mood == CUT:
                    return
                writer.write(answer.head + answer.body)
                await writer.drain()
                if "close" in (answer.header("connection") or "").lower():
                    return
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            return
        finally:
            writer.close()
            if server is not None:
                server[1].close()

    def _is_turned_away(self) -> bool:
        if self._away == 0:
            return False
        self._away -= 1
        self.done[AWAY] += 1
        return True


async def _request(reader: asyncio.StreamReader) -> _Message:
    head = _Message(await reader.readuntil(b"\r\n\r\n"), b"")
    return _Message(head.head, await reader.readexactly(int(head.header("content-length") or 0)))


async def _answer(reader: asyncio.StreamReader, method: str) -> _Message:
    head = _Message(await reader.readuntil(b"\r\n\r\n"), b"")
    if method == "HEAD" or int(head.first_line[1]) in _NOBODY:
        return head
    if (head.header("transfer-encoding") or "").lower() == "chunked":
        return _Message(head.head, await _chunks(reader))
    return _Message(head.head, await reader.readexactly(int(head.header("content-length") or 0)))


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    """As they are, sizes included."""
    found = b""
    while True:
        size = await reader.readuntil(b"\r\n")
        part = await reader.readexactly(int(size.split(b";")[0], 16) + 2)
        found += size + part
        if int(size.split(b";")[0], 16) == 0:
            return found


def _error(status: int, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status} No\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
