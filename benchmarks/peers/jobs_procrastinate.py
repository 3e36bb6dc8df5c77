"""Procrastinate on PostgreSQL, as its worker and the driver load it."""

from __future__ import annotations

import asyncio
import atexit
import os
from importlib import import_module
from typing import Any

from jobs_body import ran  # type: ignore[import-not-found]  # this directory is where the program runs

IN_FLIGHT = 64
CONNECTIONS = 16

_module: Any = import_module("procrastinate")
app = _module.App(
    connector=_module.PsycopgConnector(conninfo=os.environ["BENCH_URL"], min_size=1, max_size=CONNECTIONS)
)
noop = app.task(ran, name="noop")
_loop = asyncio.new_event_loop()  # of the driver


def submit(count: int) -> None:
    """Defer so many jobs, many at once."""
    _loop.run_until_complete(_submit(count))


@atexit.register
def _close() -> None:
    _loop.run_until_complete(app.close_async())


async def _submit(count: int) -> None:
    await app.open_async()  # the first time; it stays open to the end
    numbers = iter(range(count))

    async def lane() -> None:
        for _ in numbers:
            await noop.defer_async()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(count, IN_FLIGHT)):
            group.create_task(lane())
