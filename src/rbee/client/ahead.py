"""Read a stream of events a little ahead of whoever takes them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

AHEAD_MAX = 64


class ReadAhead:
    """Events that a task of its own reads, at most `AHEAD_MAX` of them before they are taken.

    Make it inside the event loop, and close it there.
    """

    def __init__(self, source: AsyncGenerator[dict[str, Any], None]) -> None:
        self._events: deque[dict[str, Any]] = deque()
        self._came = asyncio.Event()
        self._has_room = asyncio.Event()
        self._task = asyncio.create_task(self._read(source))
        self._task.add_done_callback(lambda _: self._came.set())

    async def take(self) -> list[dict[str, Any]]:
        """Return the next events, as many as are there; none at the end.

        Raises:
            Exception: What reading failed with, once all that came before it was taken.
        """
        await self._came.wait()
        batch = list(self._events)
        self._events.clear()
        self._has_room.set()
        if not batch:
            self._task.result()
        elif not self._task.done():
            self._came.clear()
        return batch

    async def close(self) -> None:
        """End reading; returns when it has ended."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self, source: AsyncGenerator[dict[str, Any], None]) -> None:
        async with aclosing(source) as events:
            async for event in events:
                self._events.append(event)
                self._came.set()
                if len(self._events) >= AHEAD_MAX:
                    self._has_room.clear()
                    await self._has_room.wait()
