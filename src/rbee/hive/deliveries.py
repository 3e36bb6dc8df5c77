"""Carrying files whose writer is dead to their end, and the hive's tasks that nobody waits for one by one."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from rbee.hive.outbox import Outbox, Source


class Deliveries:
    """Owns tasks until they end or the hive does.

    Attributes:
        failure: Fails with what one of them failed with: a hive that no longer watches must end.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._tasks: set[asyncio.Task[None]] = set()
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def deliver_rest(
        self, place: Path, files: list[tuple[str, Path]], *, goes_first: bool = False
    ) -> list[Source]:
        """Carry files whose writer is dead to their end, then remove `place`, the file or directory of them."""
        sources = [self._outbox.add(name, path, goes_first=goes_first) for name, path in files]
        for source in sources:
            source.seal()
        self.own(self.remove_delivered(place, sources))
        return sources

    def own(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin a task."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not self.failure.done():
            self.failure.set_exception(error)

    async def remove_delivered(self, place: Path, sources: list[Source]) -> None:
        """Wait until the queen has all of some files, then remove `place`."""
        for source in sources:
            await source.delivered.wait()
            self._outbox.remove(source)
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)

    async def close(self) -> None:
        """End all tasks; files that could not be delivered wait on disk for the next start."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.failure.cancel()
