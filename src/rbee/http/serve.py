"""Run an application on a socket until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from starlette.types import ASGIApp

from rbee.errors import StartError
from rbee.http.auth import is_loopback

STALLED_MS = 30_000


def bind(host: str, port: int, *, is_port_asked_for: bool) -> socket.socket:
    """Bind a listening socket; a default port that is taken gives way to a free one.

    Raises:
        StartError: The address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        try:
            sock.bind((host, port))
            sock.listen(1024)
        except OSError:
            if is_port_asked_for or port == 0:
                raise
            sock.close()
            return bind(host, 0, is_port_asked_for=True)
    except OSError as error:
        sock.close()
        raise StartError(
            f"Cannot listen on {host} port {port}: {error.strerror or error}.",
            remedy="Choose another port, or 0 for any free one.",
        ) from error
    return sock


def listening_socket(host: str, port: int | None, default_port: int, listen_fd: int | None) -> socket.socket:
    """Return the socket to serve on: one handed down by a parent, else a newly bound one."""
    if listen_fd is not None:
        try:
            return socket.socket(fileno=listen_fd)
        except OSError as error:
            raise StartError(f"The file descriptor {listen_fd} is no socket: {error.strerror}.") from error
    return bind(host, default_port if port is None else port, is_port_asked_for=port is not None)


def url_of(sock: socket.socket) -> str:
    """Return the URL under which a bound socket is reached from this machine."""
    host, port = sock.getsockname()[:2]
    if host in {"0.0.0.0", "::"}:  # bound everywhere: loopback is one of the ways
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback_url(url: str) -> bool:
    """Tell whether a URL stays on this machine."""
    from urllib.parse import urlsplit

    return is_loopback(urlsplit(url).hostname or "")


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the program."""
        yield


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, sock: socket.socket, *, stop_grace_s: int) -> AsyncIterator[None]:
    """Serve `app` on `sock` inside the `async with` block; leaving it gives open requests `stop_grace_s`.

    A connection whose other end takes nothing for `STALLED_MS` is closed, whatever is still to be sent on it.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT") and sock.family in {socket.AF_INET, socket.AF_INET6}:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_MS)  # its connections inherit it
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=stop_grace_s,
        backlog=1024,
    )
    server = _Server(config)
    task = asyncio.ensure_future(server.serve(sockets=[sock]))
    try:
        while not server.started:
            if task.done():
                raise StartError("The HTTP server could not be started.")
            await asyncio.sleep(0.002)
        yield
    finally:
        server.should_exit = True
        await task


def stop_signal() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set, instead of ending the process."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    return event
