"""The hives a queen knows, by their heartbeats: who is live, and which workers there are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

from msgspec import Struct

from rbee.contracts.heartbeats import Heartbeat, WorkerInfo
from rbee.contracts.states import HiveState, WorkerState
from rbee.contracts.views import HiveView, WorkerView
from rbee.errors import NotFoundError
from rbee.queen.workers import WorkerBook

GONE_MAX = 4096


class Hive(Struct, frozen=True):
    """A hive as its last heartbeat told it; `heard_at` is monotonic seconds."""

    hive_id: str
    heartbeat: Heartbeat
    heard_at: float


class Worker(Struct, frozen=True):
    """A worker, with the hive it is on."""

    hive: Hive
    info: WorkerInfo

    @property
    def worker_id(self) -> str:
        """The worker's id."""
        return self.info.worker_id


class HiveBook:
    """Keeps the last heartbeat of each hive. One event loop owns it."""

    def __init__(self, *, stale_s: float, lost_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stale_s = stale_s
        self._lost_s = lost_s
        self._clock = clock
        self._hives: dict[str, Hive] = {}
        self._gone: dict[str, None] = {}
        self._listeners: list[Callable[[str], None]] = []
        self._changed = asyncio.Event()
        self._news: dict[str, int] = {}

    def listen(self, listener: Callable[[str], None]) -> None:
        """Have a function called with the hive after every heartbeat and every end of a worker."""
        self._listeners.append(listener)

    def now(self) -> float:
        """Return the time by the clock of `heard_at`."""
        return self._clock()

    def live_until(self, hive: Hive) -> float:
        """Return when a hive's lease ends unless it is heard again."""
        return hive.heard_at + self._stale_s

    def beat(self, hive_id: str, heartbeat: Heartbeat) -> None:
        """Take a heartbeat; the first one is the registration."""
        self._hives[hive_id] = Hive(hive_id, heartbeat, self._clock())
        self._wake()
        self._tell(hive_id)

    def worker_gone(self, worker_id: str) -> None:
        """Leave a worker out, also where a heartbeat that was long under way still names it."""
        self._gone[worker_id] = None
        if len(self._gone) > GONE_MAX:
            del self._gone[next(iter(self._gone))]
        self._wake()
        for hive in list(self._hives.values()):
            if any(info.worker_id == worker_id for info in hive.heartbeat.workers):
                self._tell(hive.hive_id)

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _tell(self, hive_id: str) -> None:
        self._news[hive_id] = self._news.get(hive_id, 0) + 1
        for listener in self._listeners:
            listener(hive_id)

    async def changed(self, timeout_s: float) -> None:
        """Wait until something is heard, at most `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def news_of(self, hive_id: str, timeout_s: float) -> None:
        """Wait until one hive is heard, or tells of a worker's end, at most `timeout_s`."""
        before = self._news.get(hive_id, 0)
        try:
            async with asyncio.timeout(timeout_s):
                while self._news.get(hive_id, 0) == before:
                    await self._changed.wait()
        except TimeoutError:
            pass

    def state_of(self, hive: Hive) -> HiveState:
        """Tell whether a hive's lease holds."""
        silent_s = self.silent_s(hive)
        if silent_s < self._stale_s:
            return HiveState.LIVE
        return HiveState.STALE if silent_s < self._lost_s else HiveState.LOST

    def silent_s(self, hive: Hive) -> float:
        """Return how long a hive has been silent."""
        return self._clock() - hive.heard_at

    def hives(self) -> list[Hive]:
        """Return all hives, oldest id first."""
        return [self._hives[hive_id] for hive_id in sorted(self._hives)]

    def hive(self, hive_id: str) -> Hive:
        """Return one hive.

        Raises:
            NotFoundError: No hive of that id has registered.
        """
        if hive_id not in self._hives:
            raise NotFoundError(f"There is no hive {hive_id}.", param="hive_id")
        return self._hives[hive_id]

    def workers(self) -> Iterator[Worker]:
        """Return the workers of all hives that are not lost."""
        for hive in self.hives():
            if self.state_of(hive) is not HiveState.LOST:
                yield from self.workers_of(hive)

    def _workers_on(self, hive_id: str) -> Iterator[Worker]:
        """Return the workers of one hive; none where it is lost, or was never heard of."""
        hive = self._hives.get(hive_id)
        is_there = hive is not None and self.state_of(hive) is not HiveState.LOST
        return self.workers_of(hive) if hive is not None and is_there else iter(())

    def workers_of(self, hive: Hive) -> Iterator[Worker]:
        """Return the workers of a hive, without those whose end was told."""
        return (Worker(hive, info) for info in hive.heartbeat.workers if info.worker_id not in self._gone)

    def worker(self, worker_id: str, hive_id: str | None = None) -> Worker:
        """Return one worker, of that hive where one is named.

        Raises:
            NotFoundError: No hive has it.
        """
        for worker in self.workers() if hive_id is None else self._workers_on(hive_id):
            if worker.worker_id == worker_id:
                return worker
        raise NotFoundError(f"There is no worker {worker_id}.", param="worker_id")

    def lists(self, worker_id: str, hive_id: str) -> bool:
        """Tell whether a hive has a worker, in whatever state."""
        return any(worker.worker_id == worker_id for worker in self._workers_on(hive_id))

    def has_prefill(self, worker_id: str) -> bool:
        """Tell whether a worker goes on from the beginning of an answer; one that is not known is taken to."""
        return all(worker.info.has_prefill for worker in self.workers() if worker.worker_id == worker_id)

    def has_ready(self, worker_id: str, hive_id: str) -> bool:
        """Tell whether a worker can be asked."""
        return any(
            worker.worker_id == worker_id and worker.info.state is WorkerState.READY
            for worker in self._workers_on(hive_id)
        )


def worker_view(worker: Worker, workers: WorkerBook) -> WorkerView:
    """Show a worker; `slots_used` is what this queen has placed on it."""
    info = worker.info
    is_draining = info.state is WorkerState.READY and workers.is_draining(info.worker_id)
    return WorkerView(
        worker_id=info.worker_id,
        hive_id=worker.hive.hive_id,
        model=info.model,
        state=WorkerState.DRAINING if is_draining else info.state,
        purpose=info.purpose,
        slots=info.slots,
        slots_used=workers.slots_used(info.worker_id),
        pid=info.pid,
    )


def hive_view(book: HiveBook, hive: Hive, workers: WorkerBook) -> HiveView:
    """Show a hive with its workers."""
    beat = hive.heartbeat
    values: dict[str, Any] = {
        "hive_id": hive.hive_id,
        "state": book.state_of(hive),
        "url": beat.url,
        "version": beat.version,
        "machine": beat.machine,
        "devices": beat.devices,
        "models": beat.models,
        "workers": [
            worker_view(worker, workers)
            for worker in (book.workers_of(hive) if book.state_of(hive) is not HiveState.LOST else ())
        ],
        "last_heartbeat_s": round(book.silent_s(hive), 3),
        "engines": beat.engines,
        "downloads": beat.downloads,
        "unusable_models": beat.unusable_models,
        "workers_max": beat.workers_max,
    }
    return HiveView(**values)
