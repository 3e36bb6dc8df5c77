"""A real outbox before the real ingest of a queen next door: files on one side, logs on the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rbee.errors import UnavailableError
from rbee.hive.outbox import Outbox
from rbee.hive.queen_link import QueenLink
from rbee.jobs import JobRegistry
from rbee.narration.emit import captured_narration
from tests.unit.queen.queen_stage import Parts


class NextDoor(QueenLink):
    """The way to a queen in this process; while `is_away`, she cannot be reached."""

    def __init__(self, queen: Parts) -> None:
        self.queen = queen
        self.is_away = False
        self.batches = 0

    async def events(self, parts: Sequence[bytes]) -> dict[str, int]:
        """Bring a batch."""
        if self.is_away:
            raise UnavailableError("The queen cannot be reached.")
        self.batches += 1
        return await self.queen.ingest.take(self.queen.hive_id, b"".join(parts))


class Carrying:
    """The parts, while the outbox runs."""

    def __init__(self, queen: Parts, link: NextDoor, outbox: Outbox) -> None:
        self.queen = queen
        self.link = link
        self.outbox = outbox

    async def events_of(self, source: str, *log_ids: str) -> list[dict[str, Any]]:
        """Return every event of these logs that was read off a file."""
        logs = [await self.queen.log(log_id) for log_id in log_ids]
        return [event for log in logs for event in log if event.get("src", {}).get("id") == source]


@asynccontextmanager
async def carrying(registry_path: Path, *, capture_bytes_max: int = 2**28) -> AsyncIterator[Carrying]:
    """Carry files to a queen with a registry on disk."""
    registry = JobRegistry.open(registry_path)
    queen = Parts(registry)
    link = NextDoor(queen)
    with captured_narration("hive"):
        outbox = Outbox(link, capture_bytes_max=capture_bytes_max)
        running = asyncio.ensure_future(outbox.run())
        try:
            yield Carrying(queen, link, outbox)
        finally:
            running.cancel()
            (result,) = await asyncio.gather(running, return_exceptions=True)
            outbox.close()
            await registry.close()
            assert isinstance(result, asyncio.CancelledError), result
