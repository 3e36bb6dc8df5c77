"""What an earlier boot of this queen left: jobs that ran are lost, jobs that waited are placed again."""

from __future__ import annotations

import asyncio

from msgspec import Struct

from rbee.contracts.states import JobState, Reason
from rbee.errors import GoneError, QueenLostError
from rbee.jobs import JobFilter, JobRegistry, JobRunner
from rbee.jobs.records import JobRecord
from rbee.jobs.runner import error_body, narration_event
from rbee.narration import scope
from rbee.narration.emit import compose, emit
from rbee.queen.answering import Answering
from rbee.queen.dispatch import Dispatcher
from rbee.queen.hives import HiveBook
from rbee.queen.workers import Placement, WorkerBook

PAGE = 500


class _Orphan(Struct, frozen=True):
    """A request that a worker may still be answering although its job has ended."""

    placement: Placement
    correlation_id: str


class Leftovers:
    """Takes up what an earlier boot left, once, at start."""

    def __init__(
        self,
        registry: JobRegistry,
        runner: JobRunner,
        book: HiveBook,
        workers: WorkerBook,
        dispatcher: Dispatcher,
        answering: Answering,
        *,
        wait_s: float,
    ) -> None:
        """Take what is needed; `wait_s` is how long a hive may take to be heard of."""
        self._registry = registry
        self._runner = runner
        self._book = book
        self._workers = workers
        self._dispatcher = dispatcher
        self._answering = answering
        self._wait_s = wait_s
        self._orphans: list[_Orphan] = []

    async def take_up(self) -> None:
        """End what ran, tell the ends of workers that were not told yet, and place again what waited."""
        await self._workers.load()
        for record in await self._all(JobState.RUNNING):
            await self._end_lost(record, "The queen ended while this job was running.")
            if record.worker_id is not None and record.hive_id is not None and record.is_kept:
                self._remember(record, record.worker_id, record.hive_id)
        await self._workers.settle()
        for record in sorted(await self._all(JobState.QUEUED), key=lambda record: record.created_at):
            await self._place_again(record)

    def _remember(self, record: JobRecord, worker_id: str, hive_id: str) -> None:
        """Count the slot as taken until the worker has stopped answering."""
        placement = self._workers.place(record.job_id, worker_id, hive_id, record.attempt)
        self._orphans.append(_Orphan(placement, record.correlation_id))

    async def stop_orphans(self) -> None:
        """Have the workers stop what nobody waits for any more."""
        async with asyncio.TaskGroup() as group:
            for orphan in self._orphans:
                group.create_task(self._stop(orphan))

    async def _stop(self, orphan: _Orphan) -> None:
        placement = orphan.placement
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._wait_s
        try:
            while loop.time() < deadline and not placement.closing.done():
                if self._book.has_ready(placement.worker_id, placement.hive_id):
                    await self._answering.stop(placement, orphan.correlation_id)
                    return
                await self._book.changed(0.5)
        finally:
            self._dispatcher.release(placement)

    async def _all(self, state: JobState) -> list[JobRecord]:
        found: list[JobRecord] = []
        before: str | None = None
        while True:
            page = await self._registry.store.find(JobFilter(state=state, before=before, limit=PAGE))
            found.extend(page)
            if len(page) < PAGE:
                return found
            before = page[-1].job_id

    async def _place_again(self, record: JobRecord) -> None:
        if record.hive_id is not None:  # it may be speaking of this job already
            self._workers.hand(record.hive_id, record.job_id)
        if not record.is_kept:
            await self._end_lost(record, "The queen ended before this call was answered.")
            return
        try:
            operation = await self._registry.operation(record.job_id)
        except GoneError:
            await self._end_lost(record, "The queen ended, and this job's request is no longer kept.")
            return
        self._runner.launch(record, operation)

    async def _end_lost(self, record: JobRecord, message: str) -> None:
        with scope(job_id=record.job_id, correlation_id=record.correlation_id, model=record.model):
            line = compose("queen_failed", message, level="error", code=QueenLostError.code)
        await self._registry.end(
            record.job_id,
            JobState.FAILED,
            reason=Reason.QUEEN_LOST,
            message=message,
            error=error_body(QueenLostError(message)),
            events=[narration_event(line)],
        )
        emit(line)
