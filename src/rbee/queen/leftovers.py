"""What an earlier boot of this queen left: kept answers go on, queued jobs are placed again, calls are lost."""

from __future__ import annotations

from typing import Any

import msgspec

from rbee.contracts.events import NARRATION_PREFIX, encode_json
from rbee.contracts.operations import AnyApiCall, Infer, purpose_of
from rbee.contracts.states import JobState
from rbee.errors import GoneError, InvalidRequestError, QueenLostError, WorkerLostError
from rbee.jobs import JobRegistry, JobRunner
from rbee.jobs.endings import USER_STOP, error_body, failed, stopped
from rbee.jobs.records import JobRecord
from rbee.jobs.runner import narration_event
from rbee.jobs.store import all_jobs
from rbee.narration import scope
from rbee.narration.emit import compose, emit
from rbee.queen.infer import KeptAnswers
from rbee.queen.worker_exits import read_exit
from rbee.queen.workers import Placement, WorkerBook


class Leftovers:
    """Takes up what an earlier boot left, once, at start."""

    def __init__(
        self,
        registry: JobRegistry,
        runner: JobRunner,
        workers: WorkerBook,
        kept: KeptAnswers,
    ) -> None:
        """Take what is needed."""
        self._registry = registry
        self._runner = runner
        self._workers = workers
        self._kept = kept

    async def take_up(self) -> None:
        """End what ran, tell the ends of workers that were not told yet, and place again what waited."""
        await self._workers.load()
        for record in await all_jobs(self._registry.store, JobState.RUNNING):
            if not await self._go_on(record):
                await self._end_lost(record, "The queen ended while this job was running.")
        await self._workers.settle()
        for record in sorted(
            await all_jobs(self._registry.store, JobState.QUEUED), key=lambda record: record.created_at
        ):
            await self._place_again(record)

    async def _go_on(self, record: JobRecord) -> bool:
        """Take over a kept answer that a worker is giving; false for what cannot go on."""
        if record.worker_id is None or record.hive_id is None or not record.is_kept:
            return False
        try:
            operation = await self._registry.operation(record.job_id)
        except (GoneError, InvalidRequestError):
            return False
        if not isinstance(operation, Infer | AnyApiCall):
            return False
        # Before the first hive is heard: from here on the worker may speak of the job again.
        placement = self._workers.place(
            record.job_id,
            record.worker_id,
            record.hive_id,
            record.attempt,
            record.model or "",
            purpose_of(operation),
        )
        self._workers.hand(record.hive_id, record.job_id)
        await self._hear_again(placement)
        with scope(job_id=record.job_id, correlation_id=record.correlation_id, model=record.model):
            line = compose(
                "queen_resume",
                f"The queen is back; the answer of {record.worker_id} goes on.",
                worker_id=record.worker_id,
                attempt=record.attempt,
            )
        record = await self._registry.take_over(
            record.job_id, owner=self._runner.owner, events=[narration_event(line)]
        )
        emit(line)
        self._runner.launch(record, operation, lambda job: self._kept.resume(job, placement))
        if record.is_cancel_requested:
            await self._runner.cancel(record.job_id)
        return True

    async def _hear_again(self, placement: Placement) -> None:
        """Act on what the log has heard of the attempt already: its closing line, or its worker's end."""
        after = 0
        while True:
            page = await self._registry.read(placement.job_id, after)
            if not page.frames:
                return
            after = page.last_seq
            for event in page.events:
                if event.startswith(NARRATION_PREFIX):
                    self._hear(placement, msgspec.json.decode(event))

    def _hear(self, placement: Placement, event: dict[str, Any]) -> None:
        if event.get("worker_id") != placement.worker_id or placement.closing.done():
            return
        if event["action"] == "worker_inference" and event.get("attempt") == placement.attempt:
            placement.closing.set_result(event.get("fields") or {})
        elif event["action"] == "worker_exit":
            ended = read_exit(encode_json(event))
            placement.fail(ended.error() if ended is not None else WorkerLostError(str(event["message"])))

    async def _place_again(self, record: JobRecord) -> None:
        if record.hive_id is not None:  # it may be speaking of this job already
            self._workers.hand(record.hive_id, record.job_id)
        if not record.is_kept:
            await self._end_lost(record, "The queen ended before this call was answered.")
            return
        try:
            operation = await self._registry.operation(record.job_id)
        except (GoneError, InvalidRequestError) as error:
            await self._end_lost(record, f"The queen ended, and this job cannot be placed again: {error.message}")
            return
        self._runner.launch(record, operation)
        if record.is_cancel_requested:
            await self._runner.cancel(record.job_id)

    async def _end_lost(self, record: JobRecord, message: str) -> None:
        """End what cannot go on: as cancelled where that was asked for, else as lost with its queen."""
        ending = stopped(USER_STOP) if record.is_cancel_requested else failed(QueenLostError(message))
        code: dict[str, Any] = {"code": ending.error.code} if ending.error else {}
        with scope(job_id=record.job_id, correlation_id=record.correlation_id, model=record.model):
            line = compose(f"queen_{ending.word}", ending.message, level=ending.level, **code)
        await self._registry.end(
            record.job_id,
            ending.state,
            reason=ending.reason,
            message=ending.message,
            error=error_body(ending.error) if ending.error else None,
            events=[narration_event(line)],
        )
        emit(line)
