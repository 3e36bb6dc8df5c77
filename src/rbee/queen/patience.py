"""How long the queen waits for words that are still on their way, before a job ends without them."""

from __future__ import annotations

import asyncio

from rbee.contracts.events import new_event
from rbee.contracts.states import HiveState
from rbee.errors import NotFoundError
from rbee.jobs import JobRegistry
from rbee.queen.hives import HiveBook
from rbee.queen.workers import WorkerBook

UNMOVED_S = 4.0  # longer than a hive that was cut off takes to count as stale
WAIT_S_MAX = 30.0
LOOK_S = 0.25


class Patience:
    """Decides when to wait no longer: a live hive's stream has not moved for 4 s, or 30 s are over.

    While the hive is stale these times stand still; when it is lost, they are over.
    """

    def __init__(self, now: float) -> None:
        self._moved_at = now
        self._last = now + WAIT_S_MAX

    def is_over(self, now: float, state: HiveState, moved_at: float) -> bool:
        """Take what is known at `now`: the hive's state, and when its stream moved last."""
        match state:
            case HiveState.LOST:
                return True
            case HiveState.STALE:
                self._moved_at, self._last = now, now + WAIT_S_MAX
                return False
            case HiveState.LIVE:
                self._moved_at = max(self._moved_at, moved_at)
                return now - self._moved_at >= UNMOVED_S or now >= self._last


class Stories:
    """Waits for what a hive narrated about a command, which takes another road than the command's end."""

    def __init__(self, registry: JobRegistry, book: HiveBook, workers: WorkerBook) -> None:
        self._registry = registry
        self._book = book
        self._workers = workers

    async def arrived(self, job_id: str, hive_id: str, sources: dict[str, int]) -> None:
        """Return when the files of a hive were read to these sizes; what stays out is told as a `gap`."""
        loop = asyncio.get_running_loop()
        patience = Patience(loop.time())
        while missing := await self._missing(sources):
            try:
                state = self._book.state_of(self._book.hive(hive_id))
            except NotFoundError:
                state = HiveState.LOST
            if patience.is_over(loop.time(), state, self._workers.moved_at(hive_id)):
                await self._tell_gap(job_id, missing)
                return
            await self._workers.movement(LOOK_S)

    async def _missing(self, sources: dict[str, int]) -> dict[str, int]:
        cursors = await self._registry.store.cursors(sources)
        missing = {name: size - cursors.get(name, (0, 0))[0] for name, size in sources.items()}
        return {name: count for name, count in missing.items() if count > 0}

    async def _tell_gap(self, job_id: str, missing: dict[str, int]) -> None:
        ts = int(self._registry.now() * 1e9)
        gaps = [
            new_event(
                "gap",
                {
                    "ts": ts,
                    "job_id": job_id,
                    "reason": "late",
                    "source": name,
                    "lost_bytes": count,
                    "lost_lines": 0,
                },
            )
            for name, count in missing.items()
        ]
        await self._registry.append(job_id, gaps)
