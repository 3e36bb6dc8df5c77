"""The road of batches: one HTTP connection to the queen, one request on it at a time, and little else.

A general client costs more than half of what the whole hive spends on a small batch. Source: RFC 9112.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools
from msgspec import Struct

ANSWER_BYTES_MAX = 4 * 1024 * 1024


class Answer(Struct, frozen=True):
    """What came back."""

    status: int
    body: bytes
    retry_after: str | None = None


class Road(Protocol):
    """Brings bodies to one address."""

    async def post(self, body: bytes, timeout_s: float) -> Answer:
        """Send a body and return the whole answer.

        Raises:
            TimeoutError: None came in time.
            OSError: The connection could not be made, broke, or brought what is no HTTP.
        """

    def close(self) -> None:
        """Close the connection."""


class BatchRoad:
    """A connection that is kept, and made anew when it was closed. For one task at a time."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        """Take the address, and what every request says besides its length."""
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        told = {"Host": parts.netloc.rpartition("@")[2], "Accept": "application/json", **headers}
        lines = [f"POST {parts.path or '/'} HTTP/1.1", *(f"{name}: {value}" for name, value in told.items())]
        self._head = "\r\n".join(lines).encode("latin-1") + b"\r\nContent-Length: "
        self._exchange: _Exchange | None = None

    async def post(self, body: bytes, timeout_s: float) -> Answer:
        """Send a body; see `Road`. What was sent on a connection that had just been closed is sent once more."""
        async with asyncio.timeout(timeout_s):
            kept = self._exchange
            request = b"%b%d\r\n\r\n%b" % (self._head, len(body), body)
            try:
                if kept is not None and kept.is_open:
                    return await kept.ask(request)
            except ConnectionResetError:
                if kept is None or kept.has_heard:
                    raise
            self.close()
            loop = asyncio.get_running_loop()
            _, self._exchange = await loop.create_connection(_Exchange, self._host, self._port, ssl=self._tls)
            return await self._exchange.ask(request)

    def close(self) -> None:
        """Close the connection; the next request makes another."""
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None


class _Exchange(asyncio.Protocol):
    """One connection: a request out, an answer in.

    Attributes:
        has_heard: Something of the answer has come.
    """

    def __init__(self) -> None:
        self.has_heard = False
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[Answer] | None = None
        self._body: list[bytes] = []
        self._size = 0
        self._retry_after: str | None = None

    @property
    def is_open(self) -> bool:
        """Tell whether another request may be sent."""
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes) -> Answer:
        """Send a request and wait for its answer; given up, it takes the connection with it."""
        assert self._transport is not None
        self.has_heard, self._body, self._size, self._retry_after = False, [], 0, None
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._waiter
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._waiter = None

    def close(self) -> None:
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        """Read on in the answer."""
        self.has_heard = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"what answers there speaks no HTTP ({error})"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever waits."""
        self._fail(ConnectionResetError("the connection was closed"))

    def _fail(self, error: OSError) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)
        self.close()

    # What the parser calls

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take note of the one header that is acted on."""
        if name.lower() == b"retry-after":
            self._retry_after = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        """Keep a part of the answer."""
        self._size += len(body)
        if self._size > ANSWER_BYTES_MAX:
            self._fail(ConnectionError(f"it answered with more than {ANSWER_BYTES_MAX} bytes"))
        else:
            self._body.append(body)

    def on_message_complete(self) -> None:
        """Hand the answer over."""
        answer = Answer(self._parser.get_status_code(), b"".join(self._body), self._retry_after)
        if not self._parser.should_keep_alive():
            self.close()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(answer)
