"""The client's end of the network in memory: as much of an `aiohttp.ClientSession` as rbee uses."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import IO, Any, cast
from urllib.parse import urlsplit

import aiohttp
from aiohttp.client_reqrep import ConnectionKey
from multidict import CIMultiDict

from rbee.testing.memory_network import Asked, Body, Connection, End, Item, Network, Reset, Start
from rbee.testing.virtual_process import Process

_NONE = aiohttp.ClientTimeout(total=300)


def memory_session(network: Network, process: Process) -> aiohttp.ClientSession:
    """Return a session through which a simulated process asks others."""
    return cast(aiohttp.ClientSession, MemorySession(network, process))


class MemorySession:
    """See `memory_session`."""

    def __init__(self, network: Network, process: Process) -> None:
        self._network = network
        self._process = process

    def request(self, method: str, url: str, **how: Any) -> _Exchange:
        """Prepare a request; it is sent by `async with`."""
        return _Exchange(self._network, self._process, method, url, **how)

    def get(self, url: str, **how: Any) -> _Exchange:
        """Prepare a GET."""
        return self.request("GET", url, **how)

    def post(self, url: str, **how: Any) -> _Exchange:
        """Prepare a POST."""
        return self.request("POST", url, **how)

    def delete(self, url: str, **how: Any) -> _Exchange:
        """Prepare a DELETE."""
        return self.request("DELETE", url, **how)

    async def close(self) -> None:
        """Do nothing: connections end with their requests."""


class _Exchange:
    def __init__(
        self,
        network: Network,
        process: Process,
        method: str,
        url: str,
        *,
        data: bytes | IO[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: aiohttp.ClientTimeout = _NONE,
        allow_redirects: bool = True,
    ) -> None:
        self._network = network
        self._process = process
        self._url = url
        self._timeout = timeout
        parts = urlsplit(url)
        self._place = (parts.hostname or "", parts.port or 80)
        body = data if isinstance(data, bytes) else b"" if data is None else data.read()
        sent = [(b"host", f"{parts.hostname}:{parts.port}".encode())]
        sent += [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        if data is not None:
            sent.append((b"content-length", str(len(body)).encode()))
        self._asked = Asked(method, parts.path, parts.query, sent, body)
        self._connection: Connection | None = None

    async def __aenter__(self) -> MemoryResponse:
        self._connection = self._network.connect(self._process, *self._place, self._asked)
        response = MemoryResponse(self._connection, self._url, self._timeout, self._process.loop.time())
        try:
            await response.begin()
        except BaseException:
            self._connection.leave()
            raise
        return response

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._connection is not None
        self._connection.leave()


class MemoryResponse:
    """An answer that is being read."""

    def __init__(self, connection: Connection, url: str, timeout: aiohttp.ClientTimeout, began_s: float) -> None:
        self._connection = connection
        self._timeout = timeout
        self._until_s = None if timeout.total is None else began_s + timeout.total
        self._began_s = began_s
        self.url = url
        self.status = 0
        self.headers: CIMultiDict[str] = CIMultiDict()
        self.content = self

    @property
    def content_type(self) -> str:
        """The answer's media type."""
        return self.headers.get("content-type", "application/octet-stream").partition(";")[0].strip()

    def close(self) -> None:
        """Do nothing: leaving the `async with` closes."""

    async def begin(self) -> None:
        """Wait for the answer's head."""
        item = await self._next()
        assert isinstance(item, Start), item
        self.status = item.status
        self.headers.extend((name.decode("latin-1"), value.decode("latin-1")) for name, value in item.headers)

    async def iter_any(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes."""
        while True:
            item = await self._next()
            if isinstance(item, End):
                return
            assert isinstance(item, Body), item
            self._connection.taken(item.data)
            yield item.data

    async def _next(self) -> Item:
        connection = self._connection
        waited_from_s = asyncio.get_running_loop().time()
        while not connection.items:
            connection.arrived.clear()
            await self._wait(waited_from_s)
        item = connection.items.popleft()
        if isinstance(item, Reset):
            raise self._broken(item)
        return item

    async def _wait(self, waited_from_s: float) -> None:
        timeout = self._timeout
        limits: list[tuple[float, Exception]] = []
        if self._until_s is not None:
            limits.append((self._until_s, TimeoutError()))
        if not self._connection.is_connected and timeout.sock_connect is not None:
            error = aiohttp.ConnectionTimeoutError(f"Connection timeout to host {self.url}")
            limits.append((self._began_s + timeout.sock_connect, error))
        elif timeout.sock_read is not None:
            limits.append(
                (waited_from_s + timeout.sock_read, aiohttp.SocketTimeoutError("Timeout on reading data"))
            )
        if not limits:
            await self._connection.arrived.wait()
            return
        at_s, error_then = min(limits, key=lambda limit: limit[0])
        try:
            async with asyncio.timeout_at(at_s):
                await self._connection.arrived.wait()
        except TimeoutError:
            if not (self._connection.is_connected and isinstance(error_then, aiohttp.ConnectionTimeoutError)):
                raise error_then from None

    def _broken(self, reset: Reset) -> Exception:
        if reset.refused:
            parts = urlsplit(self.url)
            key = ConnectionKey(parts.hostname or "", parts.port, False, True, None, None, None)
            return aiohttp.ClientConnectorError(key, OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED)))
        if self.status:
            return aiohttp.ClientPayloadError("Response payload is not completed")
        return aiohttp.ServerDisconnectedError()
