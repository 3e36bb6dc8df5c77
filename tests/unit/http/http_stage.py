"""A server with the job routes and a few of its own, on a real socket, asked by a real client."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from rbee.contracts.operations import parse_operation
from rbee.http.auth import Door
from rbee.http.job_routes import JobRoutes, log_events_endpoint, log_stream_endpoint
from rbee.http.routes import Route, build_app, query_int, read_body, read_bytes
from rbee.http.serve import bind, serving, url_of
from rbee.http.sse import LogResponse
from rbee.jobs import JobRecord, JobRegistry, JobRunner

SECONDS = 20.0
BODY_MAX = 1000


class Asked(Struct, forbid_unknown_fields=True):
    """A body."""

    words: str


class Stage:
    """What a test holds of a running server."""

    def __init__(self, registry: JobRegistry, runner: JobRunner, url: str, client: aiohttp.ClientSession) -> None:
        self.registry = registry
        self.runner = runner
        self.url = url
        self.client = client

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def get(self, path: str, **values: Any) -> Any:
        """Ask for a path; use as a context manager."""
        return self.client.get(self.url + path, **values)

    async def raw(self, request: bytes) -> bytes:
        """Send bytes on a connection of their own, return what comes back until the server closes it."""
        reader, writer = await asyncio.open_connection(*self.address)
        writer.write(request)
        async with asyncio.timeout(SECONDS):
            answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer


def table(registry: JobRegistry, runner: JobRunner) -> list[Route]:
    """Return the rows of the test's server."""

    async def submit(request: Request) -> JobRecord:
        operation = parse_operation(await read_body(request))
        return await registry.create(
            operation,
            correlation_id=request.state.correlation_id,
            principal=request.state.principal,
            idempotency_key=request.headers.get("idempotency-key"),
        )

    async def livez(request: Request) -> dict[str, str]:
        return {"status": "ok"}

    async def whoami(request: Request) -> dict[str, str]:
        return {"principal": request.state.principal}

    async def echo(request: Request) -> dict[str, int]:
        return {"bytes": len(await read_body(request, BODY_MAX))}

    async def take(request: Request) -> dict[str, int]:
        return {"bytes": len(await read_bytes(request, BODY_MAX))}

    async def count(request: Request) -> dict[str, int]:
        return {"n": query_int(request, "n", 7, low=1, high=500)}

    async def crash(request: Request) -> None:
        raise KeyError("canary")

    async def brisk(request: Request) -> Response:
        reader = await registry.follow("worker-1")
        return LogResponse(reader, comment_every_s=0.02, send_timeout_s=0.2)

    def row(method: str, path: str, endpoint: Any, **values: Any) -> Route:
        return Route(method=method, path=path, endpoint=endpoint, summary=f"{method} {path}", **values)

    return [
        *JobRoutes(registry, runner, submit).table(),
        row("GET", "/livez", livez, result=dict[str, str]),
        row("GET", "/v1/me", whoami, result=dict[str, str]),
        row("POST", "/v1/me", echo, body=Asked, result=dict[str, int]),
        row("PUT", "/v1/bytes", take),
        row("GET", "/v1/count", count),
        row("GET", "/v1/crash", crash),
        row("GET", "/v1/brisk", brisk, media="text/event-stream"),
        row("GET", "/v1/workers/{worker_id}/stream", log_stream_endpoint(registry, "worker")),
        row("GET", "/v1/workers/{worker_id}/events", log_events_endpoint(registry, "worker")),
        row("GET", "/v1/workers/{worker_id}/files/{rest:path}", whoami),
    ]


def application(registry: JobRegistry, runner: JobRunner, door: Door) -> ASGIApp:
    """Make the application."""
    return build_app(table(registry, runner), door, title="test")


@asynccontextmanager
async def http_stage(door: Door | None = None, *, stop_grace_s: int = 1) -> AsyncIterator[Stage]:
    """Serve on loopback until the block is left; then say goodbye to readers, as programs do."""
    registry = JobRegistry.open(None)
    runner = JobRunner(registry, actor="queen", owner="boot-1", handlers={})
    sock = bind("127.0.0.1", 0, is_port_asked_for=True)
    app = application(registry, runner, door or Door())
    timeout = aiohttp.ClientTimeout(total=SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as client, serving(app, sock, stop_grace_s=stop_grace_s):
        yield Stage(registry, runner, url_of(sock), client)
        registry.hub.close()
    await runner.close()
    await registry.close()


def small_buffers(address: tuple[str, int]) -> socket.socket:
    """Connect with as little room for what is sent as there can be."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.connect(address)
    return sock
