"""What a crowd of readers is compared with: a queue for each reader, each event framed anew for each.

Arguments: port, how many events, how many a second. It begins to speak when stdin says so.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from rbee.contracts.events import encode_json


class _Hub:
    def __init__(self) -> None:
        self.readers: set[asyncio.Queue[dict[str, Any]]] = set()

    async def stream(self, request: Request) -> StreamingResponse:
        """Answer with what is said from now on."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.readers.add(queue)

        async def frames() -> AsyncIterator[bytes]:
            yield b": welcome\n\n"
            while True:
                event = await queue.get()
                yield b"id: %d\nevent: token\ndata: %b\n\n" % (event["seq"], encode_json(event))

        return StreamingResponse(frames(), media_type="text/event-stream")

    async def speak(self, count: int, rate: float) -> None:
        """Say so many events."""
        due = time.perf_counter()
        for seq in range(1, count + 1):
            due += 1 / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            said = {
                "v": 1,
                "kind": "token",
                "seq": seq,
                "ts": time.time_ns(),
                "actor": "worker",
                "text": "x" * 240,
            }
            for queue in self.readers:
                queue.put_nowait(said)


async def _run(port: int, count: int, rate: float) -> None:
    hub = _Hub()
    app = Starlette(routes=[Route("/stream", hub.stream)])
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, timeout_graceful_shutdown=1))
    serving = asyncio.ensure_future(server.serve())
    await asyncio.to_thread(sys.stdin.readline)
    speaking = asyncio.ensure_future(hub.speak(count, rate))
    await asyncio.to_thread(sys.stdin.read)
    speaking.cancel()
    server.should_exit = True
    await serving


if __name__ == "__main__":
    asyncio.run(_run(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
