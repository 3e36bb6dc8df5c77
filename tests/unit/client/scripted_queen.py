"""A real HTTP server that answers each request with the next turn of a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiohttp import web

Turn = Callable[[web.Request], Awaitable[web.StreamResponse]]


def event(seq: int, kind: str = "narration", **fields: Any) -> dict[str, Any]:
    """Make an event as a log holds it."""
    return {"v": 1, "kind": kind, "seq": seq, "ts": seq, **fields}


def frame(seq: int, kind: str = "narration", **fields: Any) -> bytes:
    """Write an event as the wire has it."""
    data = msgspec.json.encode(event(seq, kind, **fields))
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (seq, kind.encode(), data)


def stream(*pieces: bytes, hold: bool = False, cut: bool = False) -> Turn:
    """Send pieces as an event stream, then end it, hold it open in silence, or cut the connection."""

    async def turn(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        if hold:
            await asyncio.Event().wait()
        if cut and request.transport is not None:
            request.transport.abort()
        return response

    return turn


def answer(status: int, body: Any = None, headers: dict[str, str] | None = None) -> Turn:
    """Answer with a status and a JSON body."""

    async def turn(request: web.Request) -> web.StreamResponse:
        data = b"" if body is None else msgspec.json.encode(body)
        return web.Response(status=status, body=data, content_type="application/json", headers=headers)

    return turn


def refusal(status: int, code: str, message: str = "No.", **fields: Any) -> Turn:
    """Answer with an error as every rbee server writes it."""
    error = {"message": message, "type": "server_error", "code": code, "retryable": False, **fields}
    return answer(status, {"error": error, "correlation_id": "c-1"})


class ScriptedQueen:
    """Plays its turns in order, the last one again and again; keeps what it was asked."""

    def __init__(self, turns: list[Turn]) -> None:
        self.turns = turns
        self.requests: list[web.Request] = []
        self.bodies: list[bytes] = []
        self.url = ""

    @property
    def cursors(self) -> list[str | None]:
        """The Last-Event-ID of each request."""
        return [request.headers.get("Last-Event-ID") for request in self.requests]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Play the next turn."""
        self.requests.append(request)
        self.bodies.append(await request.read())
        turn = self.turns.pop(0) if len(self.turns) > 1 else self.turns[0]
        return await turn(request)


def broken() -> Turn:
    """Break the connection off where the answer should be."""

    async def turn(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    return turn


@asynccontextmanager
async def scripted_queen(*turns: Turn, port: int = 0) -> AsyncIterator[ScriptedQueen]:
    """Run the script on a port of its own, or on one that was somebody's before."""
    queen = ScriptedQueen(list(turns))
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", queen.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, reuse_address=True)
    await site.start()
    host, port = runner.addresses[0][:2]
    queen.url = f"http://{host}:{port}"
    try:
        yield queen
    finally:
        await runner.cleanup()
