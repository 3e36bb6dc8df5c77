"""Stopping idle workers so that another model fits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from rbee.narration.emit import compose
from rbee.queen.decisions import Start
from rbee.queen.fleet import Fleet
from rbee.queen.hives import HiveBook
from rbee.queen.reasons import what_it_was, why_stopped
from rbee.queen.workers import WorkerBook

HEARD_S = 10.0
LOOK_S = 0.5

Stops = list[asyncio.Task[None]]
Evict = Callable[[str, str], Awaitable[bool]]
"""Stops a worker, for the reason given as a sentence; tells whether it is gone."""


class RoomMaker:
    """Does what a decision to evict asks for. From `reserve` on nothing more is placed on those workers."""

    def __init__(self, book: HiveBook, workers: WorkerBook, fleet: Fleet, evict: Evict) -> None:
        self._book = book
        self._workers = workers
        self._fleet = fleet
        self._evict = evict
        self._stops: set[asyncio.Task[None]] = set()

    def reserve(self, start: Start) -> None:
        """Have nothing more placed on the workers that are to go."""
        for worker in start.evict:
            self._workers.drain(worker.worker_id)

    def let_be(self, start: Start) -> None:
        """Let them be placed on again: nobody needs the room any more."""
        for worker in start.evict:
            self._workers.undrain(worker.worker_id)

    def lines(self, start: Start, model: str) -> list[bytes]:
        """Compose what the log is told of the job that it is done for."""
        return [
            compose(
                "queen_evict",
                self._sentence(start, index, model),
                hive_id=start.hive_id,
                worker_id=worker.worker_id,
                evicted_model=worker.kind.model,
            )
            for index, worker in enumerate(start.evict)
        ]

    def told(self, start: Start) -> str:
        """Say afterwards what was done, as part of a reason."""
        return f"room was made by stopping {why_stopped(start.evict, self._book.now())}"

    def begin(self, start: Start, model: str) -> Stops:
        """Begin to stop the workers. It goes on whatever becomes of the job that it is done for."""
        loop = asyncio.get_running_loop()
        stops = [
            loop.create_task(self._stop(worker.worker_id, self._sentence(start, index, model)))
            for index, worker in enumerate(start.evict)
        ]
        for stop in stops:
            self._stops.add(stop)
            stop.add_done_callback(self._stops.discard)
        return stops

    async def finish(self, start: Start, stops: Stops) -> None:
        """Wait until the workers are gone, and their hive has said what that leaves free."""
        await asyncio.wait(stops)
        for stop in stops:
            stop.result()
        deadline = self._book.now() + HEARD_S
        while self._is_listed(start) and self._book.now() < deadline:
            await self._book.news_of(start.hive_id, LOOK_S)

    async def close(self) -> None:
        """Wait for no stop any more; those that are accepted are on disk."""
        stops = list(self._stops)
        for stop in stops:
            stop.cancel()
        await asyncio.gather(*stops, return_exceptions=True)

    async def _stop(self, worker_id: str, sentence: str) -> None:
        """Stop a worker; one that stays is left alone for a while."""
        is_gone = False
        try:
            is_gone = await self._evict(worker_id, sentence)
        finally:
            if not is_gone:
                self._workers.undrain(worker_id)
                self._fleet.spare(worker_id)

    def _is_listed(self, start: Start) -> bool:
        """Tell whether the hive's last heartbeat was from before the workers' end."""
        listed = {info.worker_id for info in self._book.hive(start.hive_id).heartbeat.workers}
        return any(worker.worker_id in listed for worker in start.evict)

    def _sentence(self, start: Start, index: int, model: str) -> str:
        worker = start.evict[index]
        was = what_it_was(worker, self._book.now())
        return f"{start.hive_id} stops {worker.worker_id} ({was}) to make room for {model}."
