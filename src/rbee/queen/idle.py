"""Stopping workers that nobody has needed for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from rbee.contracts.model_settings import ModelTable
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
        models: What is configured for single models: a pinned or preloaded one's workers are kept.
        keep_alive_s: How long a worker may be idle unless its model's settings or its last job say otherwise;
            negative: for ever.
        stop: Stops one that has been idle for so long.
    """

    def __init__(
        self,
        book: HiveBook,
        workers: WorkerBook,
        *,
        models: ModelTable,
        keep_alive_s: float,
        stop: Callable[[str, float], Awaitable[None]],
    ) -> None:
        self._book = book
        self._workers = workers
        self._models = models
        self._keep_alive_s = keep_alive_s
        self._stop = stop
        self._busy_at: dict[str, float] = {}

    async def run(self) -> None:
        """Stop idle workers until cancelled."""
        while True:
            await self._workers.freed(self._look_s())
            for worker_id, idle_s in self.idle(asyncio.get_running_loop().time()).items():
                await self._stop(worker_id, idle_s)
            await asyncio.sleep(LOOK_MIN_S)

    def _look_s(self) -> float:
        """Return how long to wait for the next look: no longer than the shortest time there is."""
        times = [self._keep_alive_s]
        times += [settings.keep_alive_s for settings in self._models.models.values() if settings.keep_alive_s]
        return min([LOOK_S, *(max(LOOK_MIN_S, time_s) for time_s in times if time_s >= 0)])

    def _may_be_idle_s(self, worker_id: str, model: str) -> float:
        """Return how long a worker may be idle; negative: for ever."""
        settings = self._models.of(model)
        if settings.pinned or settings.preload:
            return -1.0
        default_s = self._keep_alive_s if settings.keep_alive_s is None else settings.keep_alive_s
        return self._workers.keep_alive_s(worker_id, default_s)

    def idle(self, now: float) -> dict[str, float]:
        """Return the workers that have been idle for too long at loop time `now`, with how long they may be.

        Each is returned once in that time.
        """
        present = {worker.worker_id: worker.info for worker in self._book.workers()}
        self._busy_at = {worker_id: self._busy_at.get(worker_id, now) for worker_id in present}
        found: dict[str, float] = {}
        for worker_id, info in present.items():
            keep_alive_s = self._may_be_idle_s(worker_id, info.model)
            is_busy = self._workers.slots_used(worker_id) or self._workers.is_starting(worker_id)
            if is_busy or info.state is not WorkerState.READY or self._workers.is_draining(worker_id):
                self._busy_at[worker_id] = now
            elif 0 <= keep_alive_s <= now - self._busy_at[worker_id]:
                self._busy_at[worker_id] = now
                found[worker_id] = keep_alive_s
        return found
