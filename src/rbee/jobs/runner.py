"""Running jobs: one task a job, with its deadline, its cancellation and its one end."""

from __future__ import annotations

import asyncio
import sys
import traceback
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from msgspec import Struct

from rbee.contracts.events import NARRATION_PREFIX, NewEvent
from rbee.contracts.operations import AnyOperation
from rbee.contracts.states import JobState, Phase, Reason
from rbee.contracts.views import ErrorBody
from rbee.errors import ConflictError, DeadlineExceededError, InternalError, RbeeError
from rbee.jobs.records import Fence, JobRecord
from rbee.jobs.registry import JobRegistry
from rbee.narration import scope
from rbee.narration.emit import compose, emit

Handler = Callable[["RunningJob"], Awaitable[dict[str, Any] | None]]


class Stop(Struct, frozen=True):
    """Why a running job is to stop."""

    state: JobState
    reason: Reason
    message: str
    error: RbeeError | None = None


USER_STOP = Stop(JobState.CANCELLED, Reason.USER, "Cancelled by the caller.")


def narration_event(line: bytes) -> NewEvent:
    """Make a log's event of a line that `compose` made in this process."""
    return NewEvent("narration", line[len(NARRATION_PREFIX) :])


def error_body(error: RbeeError) -> ErrorBody:
    """Show an error as servers answer it and logs keep it."""
    known = {
        key: error.details[key]
        for key in ("worker_id", "exit_code", "signal", "last_lines")
        if error.details.get(key) is not None
    }
    return ErrorBody(
        message=error.message,
        type=error.type,
        code=error.code,
        param=error.param,
        retryable=error.retryable,
        remedy=error.remedy,
        **known,
    )


class RunningJob:
    """A job in the hands of its handler.

    Attributes:
        record: The job as last seen by this process.
        operation: What it asks for.
        error: What the job failed with.
        wanted_phase: The phase to be told next; whoever brings the job there sets it.
        facts: What the closing sentence shall carry as fields; handlers add to it.
    """

    def __init__(self, runner: JobRunner, record: JobRecord, operation: AnyOperation) -> None:
        self.record = record
        self.operation = operation
        self.facts: dict[str, Any] = {}
        self.stop: Stop | None = None
        self.error: RbeeError | None = None
        self.wanted_phase: Phase | None = None
        self.task: asyncio.Task[None] | None = None
        self._runner = runner

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.record.job_id

    async def start(
        self,
        *,
        hive_id: str | None = None,
        worker_id: str | None = None,
        phase: Phase | None = None,
        events: list[NewEvent] | None = None,
    ) -> None:
        """Make the job `running`, this process its owner; `events` are said in the same transaction."""
        self.record = await self._runner.registry.start(
            self.job_id,
            owner=self._runner.owner,
            hive_id=hive_id,
            worker_id=worker_id,
            phase=phase,
            events=events,
        )

    async def update(self, **values: Any) -> None:
        """Say how far the job is (see `JobRegistry.update`)."""
        self.record = await self._runner.registry.update(self.job_id, **values)

    async def narrate(self, action: str, message: str, **fields: Any) -> None:
        """Say one sentence into the job's log, and on this process's own stdout; on disk when it returns."""
        line = compose(action, message, **fields)
        await self._runner.registry.append(self.job_id, [narration_event(line)])
        emit(line)


class JobRunner:
    """Runs each job's handler in a task of its own and writes the job's one end.

    The end follows from how the handler leaves: its result completes the job; an `RbeeError` fails it with
    that error's reason; a stop (cancel, deadline) ends it as the stop says, after the handler has cleaned up
    behind its `CancelledError`. A handler interrupted by the program's own end leaves the job as it is on disk.

    Args:
        actor: The program, first word of the closing sentence's action (`queen_complete`).
        owner: This process's boot id.
        handlers: By operation type.
    """

    def __init__(
        self, registry: JobRegistry, *, actor: str, owner: str, handlers: Mapping[type[Any], Handler]
    ) -> None:
        self.registry = registry
        self.actor = actor
        self.owner = owner
        self._handlers = dict(handlers)
        self._jobs: dict[str, RunningJob] = {}

    @property
    def running(self) -> Mapping[str, RunningJob]:
        """The jobs that have a task here."""
        return self._jobs

    def launch(self, record: JobRecord, operation: AnyOperation, handler: Handler | None = None) -> RunningJob:
        """Begin to run an accepted job; the runner owns its task until `close`."""
        existing = self._jobs.get(record.job_id)
        if existing is not None:
            return existing
        job = RunningJob(self, record, operation)
        self._jobs[record.job_id] = job
        job.task = asyncio.get_running_loop().create_task(
            self._run(job, handler or self._handlers[type(operation)]), name=record.job_id
        )
        return job

    async def cancel(self, job_id: str) -> JobRecord:
        """Cancel a job: a queued one ends now, a running one as soon as its handler has stopped it.

        Raises:
            NotFoundError: There is no such job.
        """
        record = await self.registry.request_cancel(job_id)
        if record.is_ended:
            return record
        job = self._jobs.get(job_id)
        if record.state is JobState.QUEUED:
            record = await self._end_stopped(record, USER_STOP)
        if job is not None:
            self._stop(job, USER_STOP)
        return record

    def _stop(self, job: RunningJob, stop: Stop) -> None:
        if job.stop is None and job.task is not None:
            job.stop = stop
            job.task.cancel()

    async def close(self, grace_s: float = 0.0) -> None:
        """Give running jobs `grace_s` seconds, then interrupt them; they stay on disk as they are."""
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        if not tasks:
            return
        _, pending = await asyncio.wait(tasks, timeout=grace_s)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)

    async def _run(self, job: RunningJob, handler: Handler) -> None:
        deadline = self._watch_deadline(job)
        record = job.record
        try:
            with scope(job_id=record.job_id, correlation_id=record.correlation_id, model=record.model):
                await self._finish(job, handler)
        finally:
            if deadline is not None:
                deadline.cancel()
            del self._jobs[record.job_id]

    def _watch_deadline(self, job: RunningJob) -> asyncio.TimerHandle | None:
        if job.record.deadline_at is None:
            return None
        left_s = max(0.0, job.record.deadline_at - self.registry.now())
        allowed_s = job.record.deadline_at - job.record.created_at
        message = f"The job did not end within its {allowed_s:g} s."
        stop = Stop(JobState.FAILED, Reason.TIMEOUT, message, DeadlineExceededError(message))
        return asyncio.get_running_loop().call_later(left_s, self._stop, job, stop)

    async def _finish(self, job: RunningJob, handler: Handler) -> None:
        try:
            result = await handler(job)
        except asyncio.CancelledError:
            if job.stop is None:
                raise
            job.error = job.stop.error
            await self._end_stopped(job.record, job.stop, job.facts)
        except RbeeError as error:
            await self._end_failed(job, error)
        except Exception as error:  # noqa: BLE001  # a fault of ours: told with a number, kept in stderr
            await self._end_failed(job, _incident(error))
        else:
            await self._end_completed(job, result)

    async def _end_completed(self, job: RunningJob, result: dict[str, Any] | None) -> None:
        line = compose(f"{self.actor}_complete", "The job is complete.", **job.facts)
        await self._end(job.record, JobState.COMPLETED, Reason.OK, "The job is complete.", line, result=result)

    async def _end_failed(self, job: RunningJob, error: RbeeError) -> None:
        job.error = error
        line = compose(f"{self.actor}_failed", error.message, level="error", code=error.code, **job.facts)
        await self._end(
            job.record, JobState.FAILED, Reason(error.reason), error.message, line, error=error_body(error)
        )

    async def _end_stopped(self, record: JobRecord, stop: Stop, facts: dict[str, Any] | None = None) -> JobRecord:
        word = "cancelled" if stop.state is JobState.CANCELLED else "failed"
        with scope(job_id=record.job_id, correlation_id=record.correlation_id, model=record.model):
            line = compose(f"{self.actor}_{word}", stop.message, level="warning", **(facts or {}))
        error = error_body(stop.error) if stop.error else None
        return await self._end(record, stop.state, stop.reason, stop.message, line, error=error)

    async def _end(
        self,
        record: JobRecord,
        to: JobState,
        reason: Reason,
        message: str,
        line: bytes,
        *,
        result: dict[str, Any] | None = None,
        error: ErrorBody | None = None,
    ) -> JobRecord:
        fence = Fence(self.owner, record.attempt) if record.state is JobState.RUNNING else None
        try:
            after = await self.registry.end(
                record.job_id,
                to,
                reason=reason,
                message=message,
                result=result,
                error=error,
                fence=fence,
                events=[narration_event(line)],
            )
        except ConflictError:  # it has ended meanwhile: the first end stands
            return await self.registry.get(record.job_id)
        emit(line)
        return after


def _incident(error: Exception) -> InternalError:
    number = uuid.uuid4().hex[:12]
    print(f"incident {number}:", file=sys.stderr)  # noqa: T201  # the program's own stderr is its fault log
    traceback.print_exception(error)
    return InternalError(
        f"Something went wrong inside rbee ({type(error).__name__}, incident {number}).",
        remedy=f"Report it with the lines behind 'incident {number}' in the server's log.",
    )
