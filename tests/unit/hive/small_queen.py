"""A queen that takes batches and heartbeats, and keeps every byte it acknowledged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from rbee.contracts.heartbeats import Heartbeat, SourceHeader
from rbee.contracts.ids import new_id
from rbee.hive.queen_link import QueenLink
from rbee.queen.ingest import parse_batch

WAIT_S = 10.0


class SmallQueen:
    """Commits like a queen: from the cursor on, and answers the cursors.

    Attributes:
        taken: What of each source was committed; a lost stretch counts as as many `?`.
        cursors: How far each source was committed.
        batches: The headers of every batch, in order.
        losses: The headers of the lost stretches that were committed.
        failures: So many next batches are committed, but not acknowledged.
        carried_bytes_max: What is larger does not get through to her.
        refusal: What everything is answered with instead of being taken, when it is set.
        heartbeats: What was told.
    """

    def __init__(self) -> None:
        self.taken: dict[str, bytes] = {}
        self.cursors: dict[str, int] = {}
        self.batches: list[list[SourceHeader]] = []
        self.losses: list[SourceHeader] = []
        self.failures = 0
        self.carried_bytes_max: int | None = None
        self.refusal: web.Response | None = None
        self.heartbeats: list[Heartbeat] = []
        self.hive_id = new_id("hive")
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """Where it is, or was."""
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Answer, on the same port as before."""
        app = web.Application(client_max_size=8 * 1024 * 1024)
        app.router.add_post("/v1/hives/{hive_id}/events", self._events)
        app.router.add_post("/v1/hives/{hive_id}/heartbeat", self._heartbeat)
        self._runner = web.AppRunner(app, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Be gone."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def forget(self, source: str, cursor: int) -> None:
        """Have the memory of an older store: know a source only up to `cursor`."""
        self.cursors[source] = cursor
        self.taken[source] = self.taken[source][:cursor]

    async def _events(self, request: web.Request) -> web.Response:
        if self.refusal is not None:
            return self.refusal
        if self.carried_bytes_max is not None and (request.content_length or 0) > self.carried_bytes_max:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        stretches = list(parse_batch(await request.read()))
        self.batches.append([stretch.header for stretch in stretches])
        cursors = {}
        for stretch in stretches:
            self._take(stretch.header, stretch.data, stretch.end)
            cursors[stretch.header.source] = self.cursors[stretch.header.source]
        if self.failures:
            self.failures -= 1
            raise web.HTTPInternalServerError
        return web.json_response({"cursors": cursors})

    def _take(self, header: SourceHeader, data: bytes, end: int) -> None:
        cursor = self.cursors.setdefault(header.source, header.offset)
        taken = self.taken.setdefault(header.source, b"?" * header.offset)
        if not header.offset <= cursor < end:
            return
        if header.lost_bytes:
            self.losses.append(header)
            data = b"?" * header.lost_bytes
        self.taken[header.source] = taken + data[cursor - header.offset :]
        self.cursors[header.source] = end

    async def _heartbeat(self, request: web.Request) -> web.Response:
        if self.refusal is not None:
            return self.refusal
        self.heartbeats.append(msgspec.json.decode(await request.read(), type=Heartbeat))
        answer: dict[str, Any] = {"lease_s": 3.0, "queen_boot_id": "b", "store_id": "s", "cursors": {}}
        return web.json_response(answer)


@asynccontextmanager
async def small_queen() -> AsyncIterator[tuple[SmallQueen, QueenLink]]:
    """Give a queen that answers, and a link to her."""
    queen = SmallQueen()
    await queen.start()
    try:
        async with aiohttp.ClientSession() as session:
            link = QueenLink(session, queen.url, queen.hive_id, None)
            try:
                yield queen, link
            finally:
                link.close()
    finally:
        await queen.stop()


async def until(condition: Callable[[], bool]) -> None:
    """Let everything else go on until a condition holds, `WAIT_S` at most."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  # a condition is no event
            await asyncio.sleep(0.002)
