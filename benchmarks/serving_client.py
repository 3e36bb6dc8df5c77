"""The client by which all sides of the serving benchmark are asked: a connection a request, streamed answers."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

PATIENCE_S = 120.0
BEGIN_S = 10.0
POLL_S = 0.01
STATUS_LINE = 64
SAID_BYTES = 500
FLOOD_PROMPT = "Say something for a while."
PROMPT = "Write a very long story about a bee."
_CONTENT = re.compile(rb'"content": ?"[^"]')
_OK = re.compile(rb"HTTP/1\.[01] 200 ")
_FRAME = b"data: "


class SideFailedError(Exception):
    """A side did not do what it was asked for."""


class Answer(Struct, frozen=True):
    """A streamed answer: seconds from before the connection to its first words, and how many pieces it has."""

    first_s: float
    tokens: int


class Flood(Struct, frozen=True):
    """What many streams brought in a stretch of time.

    Attributes:
        chunks: Pieces of answers.
        spent_s: CPU seconds that passing them on took, by program.
        seconds: How long that was.
        begun: How many of the streams had begun.
    """

    chunks: int
    spent_s: dict[str, float]
    seconds: float
    begun: int

    @property
    def per_million_s(self) -> float:
        """CPU seconds for a million pieces, of all programs."""
        return sum(self.spent_s.values()) * 1e6 / self.chunks

    @property
    def per_s(self) -> float:
        """Pieces a second."""
        return self.chunks / self.seconds


class Target(Struct, frozen=True):
    """Where to ask: an address without path, the path, and the name of the model there."""

    url: str
    model: str
    path: str = "/v1/chat/completions"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port

    def request(self, prompt: str, max_tokens: int) -> bytes:
        """Return the bytes of a request for a stream."""
        asked = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
        }
        return _request("POST", self.path, self.url, msgspec.json.encode(asked))


class _Exchange(asyncio.Protocol):
    """One request; `ended` is set when the server has closed the connection."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.began_s = time.perf_counter()
        self.first_s: float | None = None
        self.data = bytearray()
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.WriteTransport) -> None:  # type: ignore[override]  # TCP
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.data += data
        if self.first_s is None and _CONTENT.search(self.data):
            self.first_s = time.perf_counter() - self.began_s

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():  # else nobody waits any more
            self.ended.set_result(error)


async def ask(target: Target, max_tokens: int) -> Answer:
    """Ask for an answer and read all of it.

    Raises:
        SideFailedError: The answer is none, or not whole.
        TimeoutError: It took longer than `PATIENCE_S`.
    """
    exchange = await _exchange(target, target.request(PROMPT, max_tokens))
    data = bytes(exchange.data)
    if exchange.first_s is None or not _OK.match(data) or b"data: [DONE]" not in data:
        raise SideFailedError(f"No whole answer: {data[-SAID_BYTES:].decode('utf-8', 'replace')}")
    return Answer(exchange.first_s, len(_CONTENT.findall(data)))


async def tokens_per_s(target: Target, streams: int, answers: int, max_tokens: int) -> float:
    """Have so many askers ask at once, each so many times in turn; returns the tokens a second of all."""
    tokens = 0

    async def asker() -> None:
        nonlocal tokens
        for _ in range(answers):
            answer = await ask(target, max_tokens)
            tokens += answer.tokens

    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(asker())
    return tokens / (time.perf_counter() - began_s)


async def until_ready(url: str, path: str, is_alive: Callable[[], bool], status: str = "200") -> None:
    """Ask again and again until a path answers with this status.

    Raises:
        SideFailedError: The program has ended, or `PATIENCE_S` are over.
    """
    target = Target(url, "", path)
    request = _request("GET", path, url)
    try:
        async with asyncio.timeout(PATIENCE_S):
            while is_alive():
                try:
                    answer = bytes((await _exchange(target, request)).data[:STATUS_LINE])
                    if answer.split(b" ")[1:2] == [status.encode()]:
                        return
                except OSError:
                    pass
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise SideFailedError(f"It was not ready after {PATIENCE_S:g} s.") from None
    raise SideFailedError("It ended before it was ready.")


async def post(url: str, path: str, value: object) -> bytes:
    """Send a JSON value and return the response's body, as it came.

    Raises:
        SideFailedError: The status is not 200.
    """
    exchange = await _exchange(Target(url, "", path), _request("POST", path, url, msgspec.json.encode(value)))
    data = bytes(exchange.data)
    if not _OK.match(data):
        raise SideFailedError(f"{path} answered {data[:SAID_BYTES].decode('utf-8', 'replace')}")
    return data.partition(b"\r\n\r\n")[2]


async def _exchange(target: Target, request: bytes) -> _Exchange:
    loop = asyncio.get_running_loop()
    transport, exchange = await loop.create_connection(lambda: _Exchange(request), *target.address)
    try:
        async with asyncio.timeout(PATIENCE_S):
            await exchange.ended
    finally:
        transport.abort()
    return exchange


def _request(method: str, path: str, url: str, body: bytes = b"") -> bytes:
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class _Counting(asyncio.Protocol):
    """One of many streams: only counts."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._tail = b""
        self.chunks = 0
        self.said = b""
        self.begun = asyncio.get_running_loop().create_future()
        self.is_lost = False

    def connection_made(self, transport: asyncio.WriteTransport) -> None:  # type: ignore[override]  # TCP
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.chunks += (self._tail + data).count(_FRAME)
        self._tail = data[1 - len(_FRAME) :]
        self.said = data
        if self.chunks and not self.begun.done():
            self.begun.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True
        if not self.begun.done():
            self.begun.set_result(None)


async def flood(target: Target, streams: int, seconds: float, cpu_s: Callable[[], dict[str, float]]) -> Flood:
    """Open many streams that do not end, and count for a while what they bring.

    Args:
        cpu_s: Returns the CPU seconds that whoever passes the streams on has used, by program.

    Raises:
        SideFailedError: A stream ended.
    """
    loop = asyncio.get_running_loop()
    request = target.request(FLOOD_PROMPT, 1_000_000)
    opened: list[_Counting] = []
    try:
        for _ in range(streams):
            opened.append((await loop.create_connection(lambda: _Counting(request), *target.address))[1])
        # Whoever is too slow for the streams that have begun may never come to the others.
        await asyncio.wait([one.begun for one in opened], timeout=BEGIN_S)
        before, before_s, began_s = sum(one.chunks for one in opened), cpu_s(), time.perf_counter()
        await asyncio.sleep(seconds)
        chunks = sum(one.chunks for one in opened) - before
        spent_s = {name: used_s - before_s[name] for name, used_s in cpu_s().items()}
        took_s = time.perf_counter() - began_s
        for one in opened:
            if one.is_lost:
                raise SideFailedError(f"A stream ended: {one.said[-SAID_BYTES:].decode('utf-8', 'replace')}")
        if not chunks:
            raise SideFailedError("No stream brought anything.")
        return Flood(chunks, spent_s, took_s, sum(one.begun.done() for one in opened))
    finally:
        for one in opened:
            one.transport.abort()
