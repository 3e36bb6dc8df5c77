"""Stopping workers that nobody has needed for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from rbee.contracts.states import WorkerState
from rbee.queen.hives import HiveBook
from rbee.queen.workers import WorkerBook

LOOK_S = 5.0
LOOK_MIN_S = 0.1


class IdleWorkers:
    """Watches how long each worker has had nothing to do.

    Args:
        book: Which workers there are.
        workers: What is placed on them.
        keep_alive_s: How long a worker may be idle unless its last job said otherwise; negative: for ever.
        stop: Stops one.
    """

    def __init__(
        self,
        book: HiveBook,
        workers: WorkerBook,
        *,
        keep_alive_s: float,
        stop: Callable[[str], Awaitable[None]],
    ) -> None:
        self._book = book
        self._workers = workers
        self._keep_alive_s = keep_alive_s
        self._stop = stop
        self._busy_at: dict[str, float] = {}

    async def run(self) -> None:
        """Stop idle workers until cancelled."""
        look_s = LOOK_S if self._keep_alive_s < 0 else min(LOOK_S, max(LOOK_MIN_S, self._keep_alive_s))
        while True:
            await asyncio.sleep(look_s)
            for worker_id in self.idle(asyncio.get_running_loop().time()):
                await self._stop(worker_id)

    def idle(self, now: float) -> list[str]:
        """Return the workers that have been idle for too long at loop time `now`, each once in that time."""
        present = {worker.worker_id: worker.info for worker in self._book.workers()}
        self._busy_at = {worker_id: self._busy_at.get(worker_id, now) for worker_id in present}
        found: list[str] = []
        for worker_id, info in present.items():
            keep_alive_s = self._workers.keep_alive_s(worker_id, self._keep_alive_s)
            is_idle = info.state is WorkerState.READY and not self._workers.slots_used(worker_id)
            if not is_idle or self._workers.is_draining(worker_id):
                self._busy_at[worker_id] = now
            elif 0 <= keep_alive_s <= now - self._busy_at[worker_id]:
                self._busy_at[worker_id] = now
                found.append(worker_id)
        return found
