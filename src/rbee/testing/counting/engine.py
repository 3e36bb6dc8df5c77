"""The counting engine: an HTTP server on the worker's unix socket, in a thread of the worker's own process."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import signal
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from rbee.errors import ModelInvalidError
from rbee.testing.counting.acts import Acts
from rbee.testing.counting.behaviour import Behaviour, behaviour_of, note_load
from rbee.testing.counting.count import Count, pieces
from rbee.testing.counting.frames import ChatFrames
from rbee.worker.engines import EngineAddress

SOCKET_NAME = "engine.sock"
FOR_EVER_S = 3600.0
_CONTENT_LENGTH = re.compile(r"^content-length: *(\d+)", re.I | re.M)


class CountingOptions(Struct, frozen=True, kw_only=True):
    """What is loaded and where; see the worker's settings."""

    model: Path
    alias: str
    directory: Path
    context_tokens: int


class CountingEngine:
    """Counts, as the engine of a worker; `acts` carries out what a prompt asks for besides."""

    name = "counting"
    version = "1"
    holds_threads = True

    def __init__(self, options: CountingOptions, behaviour: Behaviour, acts: Acts) -> None:
        self._options = options
        self._behaviour = behaviour
        self._acts = acts
        self._key = secrets.token_hex(16)
        self._directory_fd = -1

    def load(self) -> EngineAddress:
        """Behave as the model's file of behaviour says, then listen."""
        before = note_load(self._options.model)
        time.sleep(self._behaviour.load_s)
        if self._behaviour.failures < 0 or before < self._behaviour.failures:
            self._fail()
        self._options.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory_fd = os.open(self._options.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        path = f"/proc/self/fd/{self._directory_fd}/{SOCKET_NAME}"
        listening = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve(path, listening)), daemon=True).start()
        listening.wait()
        return EngineAddress(path, self._key)

    def kill(self) -> None:
        """Do nothing: it runs in this process."""

    def _fail(self) -> None:
        match self._behaviour.load:
            case "fail":
                raise ModelInvalidError("This model was told not to load.")
            case "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(FOR_EVER_S)

    async def _serve(self, path: str, listening: threading.Event) -> None:
        server = await asyncio.start_unix_server(self._handle, path)
        listening.set()
        await server.serve_forever()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, and stop when its caller leaves."""
        try:
            method, path, body = await self._read(reader)
            answering = asyncio.ensure_future(self._answer(method, path, body, writer))
            leaving = asyncio.ensure_future(reader.read())
            await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> tuple[str, str, bytes]:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        method, path, _ = head.split(" ", 2)
        size = _CONTENT_LENGTH.search(head)
        return method, path, await reader.readexactly(int(size[1]) if size else 0)

    async def _answer(self, method: str, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if (method, path) == ("GET", "/v1/models"):
            meta = {"n_ctx": self._options.context_tokens}
            data = [{"id": self._options.alias, "object": "model", "meta": meta}]
            _whole(writer, 200, {"object": "list", "data": data})
        elif (method, path) == ("POST", "/v1/chat/completions"):
            await self._chat(msgspec.json.decode(body), writer)
        else:
            _whole(writer, 404, _error(404, "not_found_error", "File Not Found"))
        await writer.drain()

    async def _chat(self, asked: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        messages = asked["messages"]
        said = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        prompt = next(message["content"] for message in reversed(messages) if message["role"] == "user")
        count = Count.read(prompt)
        limit = self._options.context_tokens - (prompt_tokens := len(prompt.split()))
        max_tokens = min(asked.get("max_tokens") or limit, limit)
        stop = [given] if isinstance(given := asked.get("stop") or [], str) else given
        frames = ChatFrames(
            self._options.alias,
            prompt_tokens,
            timings=asked.get("timings_per_token") is True,
            usage=(asked.get("stream_options") or {}).get("include_usage") is True,
        )
        try:
            made = list(pieces(count, said=said, max_tokens=max_tokens, stop=stop))
        except ValueError as error:
            _whole(writer, 400, _error(400, "invalid_request_error", str(error)))
            return
        writer.write(_STREAM_HEAD)
        started_s, step_s = time.monotonic(), 1 / (count.rate or behaviour_of(self._options.model).rate)
        for number, piece in enumerate(made):
            if piece.finish_reason is None:
                await asyncio.sleep(max(0.0, started_s + number * step_s - time.monotonic()))
            self._acts.arm(count, piece.text)
            data = frames.of(piece)
            if data:
                writer.write(b"%x\r\n%b\r\n" % (len(data), data))
                await writer.drain()
            if self._acts.silences(count, piece.text):
                await asyncio.sleep(FOR_EVER_S)
        writer.write(b"0\r\n\r\n")


_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nServer: counting\r\nContent-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
)


def _whole(writer: asyncio.StreamWriter, status: int, value: dict[str, Any]) -> None:
    data = msgspec.json.encode(value)
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + data)


def _error(code: int, kind: str, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "type": kind}}
