"""A reader of a job's log that keeps every byte it saw, and what connections did to it meanwhile."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp
import msgspec

from rbee.client.contact import BROKEN
from rbee.client.follow import only_idle
from rbee.client.sse import SseParser

RETRY_S = 0.05
IDLE_S = 15.0


class LogReader:
    """Follows one log from number `after + 1` to its end, across as many connections as that takes.

    Unlike the client it forgives nothing and hides nothing: repeats are counted, holes are kept.

    Attributes:
        events: What came, by the number it came under.
        order: The numbers in the order in which they came.
        arrived_s: When each number came first, on the monotonic clock.
        connections: How often the stream was opened.
        last_token: The last piece of the answer that came, as bytes.
        is_ended: The `end` event has come.
    """

    def __init__(self, job_id: str, *, after: int = 0) -> None:
        self.job_id = job_id
        self.after = after
        self.events: dict[int, bytes] = {}
        self.order: list[int] = []
        self.arrived_s: dict[int, float] = {}
        self.connections = 0
        self.last_token = b""
        self.is_ended = False
        self.is_connected = False

    @property
    def last_seq(self) -> int:
        """The highest number that came."""
        return max(self.events, default=self.after)

    @property
    def repeats(self) -> int:
        """How many events came more than once."""
        return len(self.order) - len(self.events)

    async def follow(self, base_url: str) -> LogReader:
        """Read to the end; cancel it to stop earlier."""
        async with aiohttp.ClientSession(timeout=only_idle(IDLE_S)) as session:
            while not self.is_ended:
                try:
                    await self._connect(session, f"{base_url}/v1/jobs/{self.job_id}/stream")
                except BROKEN:
                    pass
                finally:
                    self.is_connected = False
                if not self.is_ended:
                    await asyncio.sleep(RETRY_S)
        return self

    async def _connect(self, session: aiohttp.ClientSession, url: str) -> None:
        parser = SseParser()
        self.connections += 1
        headers = {"Last-Event-ID": str(self.last_seq)} if self.last_seq else {}
        async with session.get(url, headers=headers) as response:
            if response.status == 204:
                self.is_ended = True
                return
            if response.status >= 500:
                return
            assert response.status == 200, f"{url} answered {response.status}"
            self.is_connected = True
            async for part in response.content.iter_any():
                for event in parser.feed(part):
                    if event.event == "bye":
                        return
                    self._take(int(event.id), event.event, event.data)

    def _take(self, seq: int, kind: str, data: bytes) -> None:
        before = self.events.setdefault(seq, data)
        assert before == data, f"event {seq} of {self.job_id} came again with other bytes"
        self.order.append(seq)
        self.arrived_s.setdefault(seq, time.monotonic())
        self.last_token = data if kind == "token" else self.last_token
        self.is_ended = self.is_ended or kind == "end"

    def decoded(self) -> list[dict[str, Any]]:
        """Return what came, decoded, by number."""
        return [msgspec.json.decode(self.events[seq]) for seq in sorted(self.events)]
