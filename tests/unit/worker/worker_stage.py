"""A front with a scripted engine behind it: a real server on a real unix socket that answers what it is told."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from msgspec import Struct

from rbee.contracts.heartbeats import Purpose
from rbee.http.serve import bind, serving, url_of
from rbee.narration import FileSink, configure
from rbee.narration.testing import captured_narration
from rbee.worker.desk import Desk
from rbee.worker.engine_client import EngineClient
from rbee.worker.engines import EngineAddress, EngineTraits
from rbee.worker.front import Front, front_app

TOKEN = "the-token"
MODEL = "m"
WORKER_ID = "worker-00000000000000000000000000"
WAIT_S = 10.0
CHAT = "/v1/chat/completions"
ASKED = {"messages": [{"role": "user", "content": "the-prompt-canary"}]}
BUILT_IN = EngineTraits()
OTHER = EngineTraits(name="cook", is_built_in=False, model_name="cooks-name")
TIMINGS = {"cache_n": 1, "prompt_n": 2, "predicted_n": 2, "predicted_per_second": 50.0}


def data(value: Any) -> bytes:
    """Frame a chunk."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def chat(text: str, **more: Any) -> bytes:
    """Frame a piece of a chat answer."""
    return data({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}], **more})


FINISH = data({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "timings": TIMINGS})
DONE = b"data: [DONE]\n\n"
HELLO = [chat("Hel"), chat("lo"), FINISH, DONE]


class Script(Struct, kw_only=True):
    """One answer: parts are sent one after the other; at an event the engine waits until it is set."""

    parts: list[bytes | asyncio.Event]
    status: int = 200
    media: str = "text/event-stream"


class ScriptedEngine:
    """Plays its scripts in order, one a request, and closes each connection as llama.cpp does."""

    def __init__(self, scripts: list[Script]) -> None:
        self.scripts = deque(scripts)
        self.asked: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        self.got_request = asyncio.Event()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            lengths = (line for line in head.splitlines() if line.lower().startswith("content-length:"))
            length = next(lengths, ":0")  # a question without a body
            body = await reader.readexactly(int(length.partition(":")[2]))
            self.asked.append(msgspec.json.decode(body or b"{}"))
            self.got_request.set()
            async with asyncio.TaskGroup() as group:
                playing = group.create_task(self._play(self.scripts.popleft(), writer))
                watching = group.create_task(self._watch(reader, playing))
                playing.add_done_callback(lambda _: watching.cancel())
        finally:
            writer.close()

    async def _play(self, script: Script, writer: asyncio.StreamWriter) -> None:
        writer.write(
            f"HTTP/1.1 {script.status} X\r\nServer: llama.cpp\r\nAccess-Control-Allow-Origin: *\r\n"
            f"Connection: keep-alive\r\nContent-Type: {script.media}\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        for part in script.parts:
            if isinstance(part, asyncio.Event):
                await part.wait()
            else:
                writer.write(b"%x\r\n%b\r\n" % (len(part), part))
                await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async def _watch(self, reader: asyncio.StreamReader, playing: asyncio.Task[None]) -> None:
        await reader.read()
        self.left.set()
        playing.cancel()


class Stage(Struct, kw_only=True):
    """What a test acts with."""

    engine: ScriptedEngine
    desk: Desk
    session: aiohttp.ClientSession
    output: Path

    def lines(self) -> list[dict[str, Any]]:
        """Read what the worker has written to its stdout."""
        return [msgspec.json.decode(line) for line in self.output.read_bytes().splitlines()]

    def tokens(self) -> list[dict[str, Any]]:
        """Read the token lines."""
        return [line for line in self.lines() if line["kind"] == "token"]

    def closings(self) -> list[dict[str, Any]]:
        """Read the closing lines."""
        return [line for line in self.lines() if line.get("action") == "worker_inference"]

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait, within a bound, until something can be seen."""
        async with asyncio.timeout(WAIT_S):
            while not is_so():  # noqa: ASYNC110  # what is waited for stands in a file
                await asyncio.sleep(0.002)

    async def closing(self) -> dict[str, Any]:
        """Wait for the one closing line."""
        await self.until(lambda: bool(self.closings()))
        (line,) = self.closings()
        return line


@asynccontextmanager
async def stage(
    tmp_path: Path,
    *scripts: Script,
    slots: int = 1,
    sink_path: str | None = None,
    traits: EngineTraits = BUILT_IN,
    purpose: Purpose = "generate",
) -> AsyncIterator[Stage]:
    """Serve a front before an engine that plays `scripts`; token lines go to `sink_path` where it is given.

    An engine that is not built in listens on a port.
    """
    engine, output = ScriptedEngine(list(scripts)), tmp_path / "stdout"
    server, address = await _listen(engine, tmp_path / "e.sock", traits)
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    token_fd = os.open(sink_path, os.O_WRONLY) if sink_path else fd
    client, desk = EngineClient(address), Desk(slots)
    sock = bind("127.0.0.1", 0, is_port_asked_for=True)
    headers = {"authorization": f"Bearer {TOKEN}"}
    try:
        with captured_narration():
            configure(actor="worker", sink=FileSink(fd), worker_id=WORKER_ID)
            async with asyncio.TaskGroup() as kept:
                front = Front(
                    engine=client,
                    desk=desk,
                    kept=kept,
                    sink=FileSink(token_fd),
                    worker_id=WORKER_ID,
                    model=MODEL,
                    purpose=purpose,
                )
                async with (
                    serving(front_app(front, TOKEN), sock, stop_grace_s=5),
                    aiohttp.ClientSession(url_of(sock), headers=headers) as session,
                ):
                    yield Stage(engine=engine, desk=desk, session=session, output=output)
                    async with asyncio.timeout(WAIT_S):
                        await desk.drain(0.0)
    finally:
        await client.close()
        server.close()
        for one in {fd, token_fd}:
            os.close(one)


async def _listen(
    engine: ScriptedEngine, socket_path: Path, traits: EngineTraits
) -> tuple[asyncio.Server, EngineAddress]:
    if traits.is_built_in:
        server = await asyncio.start_unix_server(engine.handle, socket_path)
        return server, EngineAddress(str(socket_path), "engine-key")
    server = await asyncio.start_server(engine.handle, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    return server, EngineAddress("", "engine-key", f"http://{host}:{port}", traits)
