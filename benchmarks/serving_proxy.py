"""The smallest HTTP proxy: a request is read whole, sent on over a connection of its own, and the bytes come back.

Run as a program with the port to listen on and the address of who answers. It is what a control plane is compared
with: it knows nothing of jobs, models or machines.
"""

from __future__ import annotations

import asyncio
import sys
from urllib.parse import urlsplit

import uvloop

from benchmarks.serving_request import RequestProtocol

BACKLOG = 512


class _Upstream(asyncio.Protocol):
    """The connection to who answers."""

    def __init__(self, down: asyncio.Transport, request: bytes) -> None:
        self._down = down
        self._request = request

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # TCP
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._down.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._down.close()


class _Downstream(RequestProtocol):
    """The connection of who asks."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__()
        self._upstream_at = host, port
        self._upstream: _Upstream | None = None
        self._connecting: asyncio.Task[None] | None = None

    def asked(self, method: str, path: str, body: bytes) -> None:
        host, port = self._upstream_at
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._connecting = asyncio.ensure_future(self._pass_on(head.encode() + body))

    async def _pass_on(self, request: bytes) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, self._upstream = await loop.create_connection(
                lambda: _Upstream(self.transport, request), *self._upstream_at
            )
        except OSError:
            self.transport.abort()

    def pause_writing(self) -> None:
        if self._upstream is not None:
            self._upstream.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._upstream is not None:
            self._upstream.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
        if self._upstream is not None:
            self._upstream.transport.abort()


async def _serve(port: int, upstream: str) -> None:
    parts = urlsplit(upstream)
    host, upstream_port = parts.hostname, parts.port
    assert host is not None
    assert upstream_port is not None
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Downstream(host, upstream_port), "127.0.0.1", port, backlog=BACKLOG)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), sys.argv[2]))
