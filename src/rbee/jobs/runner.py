"""Running jobs: one task a job, with its deadline, its cancellation and its one end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from rbee.contracts.events import NewEvent
from rbee.contracts.operations import AnyOperation
from rbee.contracts.states import JobState, Phase
from rbee.errors import (
    ConflictError,
    GoneError,
    RbeeError,
    UnavailableError,
)
from rbee.jobs.endings import (
    USER_STOP,
    Ending,
    Stop,
    closing_line,
    completed,
    failed,
    incident,
    queue_timeout_of,
    stopped,
    timeout_of,
    until_written,
)
from rbee.jobs.endings import error_body as error_body
from rbee.jobs.records import Fence, JobRecord
from rbee.jobs.registry import JobRegistry
from rbee.narration import scope
from rbee.narration.emit import compose, emit
from rbee.narration.emit import narration_event as narration_event

Handler = Callable[["RunningJob"], Awaitable[dict[str, Any] | None]]


class RunningJob:
    """A job in the hands of its handler.

    Attributes:
        record: The job as last seen by this process.
        operation: What it asks for.
        error: What the job failed with.
        wanted_phase: The phase to be told next; whoever brings the job there sets it.
        facts: What the closing sentence shall carry as fields; handlers add to it.
        queue_deadline: Ends it, unless it is started before.
        is_resumed: An earlier boot of this program had begun it.
        is_begun: Its task runs, so that cancelling reaches the handler.
        is_ending: How it ends is settled; a stop comes too late.
        made: Its acceptance, which may still be on its way to the disk.
    """

    def __init__(
        self,
        runner: JobRunner,
        record: JobRecord,
        operation: AnyOperation,
        made: asyncio.Future[JobRecord] | None = None,
    ) -> None:
        self.record = record
        self.operation = operation
        self.facts: dict[str, Any] = {}
        self.stop: Stop | None = None
        self.error: RbeeError | None = None
        self.wanted_phase: Phase | None = None
        self.task: asyncio.Task[None] | None = None
        self.queue_deadline: asyncio.TimerHandle | None = None
        self.is_resumed = False
        self.is_begun = False
        self.is_ending = False
        self.made = made
        self._runner = runner

    async def refusal(self) -> RbeeError | None:
        """Wait until it is on disk; returns why it never will be."""
        if self.made is None:
            return None
        await asyncio.wait({self.made})
        error = self.made.exception()
        return error if error is None or isinstance(error, RbeeError) else incident(error)

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
        message: str | None = None,
        events: list[NewEvent] | None = None,
    ) -> None:
        """Make the job `running`, this process its owner; `events` are said in the same transaction."""
        if self.queue_deadline is not None:
            self.queue_deadline.cancel()
        self.record = await self._runner.registry.start(
            self.job_id,
            owner=self._runner.owner,
            hive_id=hive_id,
            worker_id=worker_id,
            phase=phase,
            message=message,
            events=events,
        )

    async def take_over(self, events: list[NewEvent] | None = None) -> None:
        """Make this process the owner of a job that an earlier boot ran; its attempt goes on."""
        self.record = await self._runner.registry.take_over(
            self.job_id, owner=self._runner.owner, events=events or []
        )
        self.is_resumed = True

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
    An end that cannot be written (a full disk) is tried again every second until it can.

    Args:
        actor: The program, first word of the closing sentence's action (`queen_complete`).
        owner: This process's boot id.
        handlers: By operation type.
        is_known: Whoever hears this program speak knows its jobs. Else its closing sentence names the job in a
            field: `<actor>_job_id`.

    Attributes:
        is_closing: Nobody would wait for what is launched now.
    """

    def __init__(
        self,
        registry: JobRegistry,
        *,
        actor: str,
        owner: str,
        handlers: Mapping[type[Any], Handler],
        is_known: bool = True,
    ) -> None:
        self.registry = registry
        self.actor = actor
        self._is_known = is_known
        self.owner = owner
        self._handlers = dict(handlers)
        self._jobs: dict[str, RunningJob] = {}
        self.is_closing = False

    @property
    def running(self) -> Mapping[str, RunningJob]:
        """The jobs that have a task here."""
        return self._jobs

    def launch(
        self,
        record: JobRecord,
        operation: AnyOperation,
        handler: Handler | None = None,
        made: asyncio.Future[JobRecord] | None = None,
    ) -> RunningJob:
        """Begin to run an accepted job; the runner owns its task until `close`.

        Args:
            made: Its acceptance, where that is still on its way; where it is refused, there is no such job.
        """
        existing = self._jobs.get(record.job_id)
        if existing is not None:
            return existing
        handler = handler or self._handlers[type(operation)]
        job = RunningJob(self, record, operation, made)
        self._jobs[record.job_id] = job
        job.task = asyncio.get_running_loop().create_task(self._run(job, handler), name=record.job_id)
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
            record = await self._end(record, stopped(USER_STOP))
        if job is not None:
            self._stop(job, USER_STOP)
        return record

    def _stop(self, job: RunningJob, stop: Stop) -> None:
        if job.stop is not None or job.is_ending:
            return
        job.stop = stop
        if job.is_begun and job.task is not None:
            job.task.cancel()

    async def close(self, grace_s: float = 0.0) -> None:
        """Give running jobs `grace_s` seconds, then interrupt them; they stay on disk as they are."""
        self.is_closing = True
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        if not tasks:
            return
        _, pending = await asyncio.wait(tasks, timeout=grace_s)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)

    async def _run(self, job: RunningJob, handler: Handler) -> None:
        deadlines = self._watch_deadlines(job)
        job.is_begun = True
        record = job.record
        try:
            with scope(job_id=record.job_id, correlation_id=record.correlation_id, model=record.model):
                await self._finish(job, handler)
        finally:
            for deadline in deadlines:
                deadline.cancel()
            del self._jobs[record.job_id]

    def _watch_deadlines(self, job: RunningJob) -> list[asyncio.TimerHandle]:
        """Stop the job at the first of its deadlines; at once where one has passed while nobody ran it."""
        record, watched = job.record, []
        if record.deadline_at is not None:
            watched.append(self._stop_at(record.deadline_at, job, timeout_of(record)))
        if record.queue_deadline_at is not None and record.state is JobState.QUEUED:
            job.queue_deadline = self._stop_at(record.queue_deadline_at, job, queue_timeout_of(record))
            watched.append(job.queue_deadline)
        return watched

    def _stop_at(self, deadline_at: float, job: RunningJob, stop: Stop) -> asyncio.TimerHandle:
        left_s = deadline_at - self.registry.now()
        if left_s <= 0 and job.record.state is JobState.QUEUED:  # its handler has nothing to clear up
            self._stop(job, stop)
        return asyncio.get_running_loop().call_later(left_s, self._stop, job, stop)

    async def _finish(self, job: RunningJob, handler: Handler) -> None:
        ending = await self._outcome(job, handler)
        job.is_ending = True
        job.error = await job.refusal()
        if job.error is not None:
            return
        job.error = ending.error
        try:
            await self._end_surely(job.record, ending, job.facts)
        except Exception as error:  # noqa: BLE001  # the result or the facts cannot be written down
            job.error = incident(error)
            await self._end_surely(job.record, failed(job.error), {})

    async def _outcome(self, job: RunningJob, handler: Handler) -> Ending:
        """Run the handler and say how the job ends; the program's own end raises `CancelledError`."""
        if job.stop is not None:
            return stopped(job.stop)
        failure: RbeeError
        try:
            result = await handler(job)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if job.stop is None and task is not None and task.cancelling():
                raise
            failure = UnavailableError() if job.stop else incident(error)
        except ConflictError as error:
            failure = error
            if job.stop is None and await self._is_cancelled(job.job_id):  # marked, and about to be told so
                return stopped(USER_STOP)
        except RbeeError as error:
            failure = error
        except Exception as error:  # noqa: BLE001  # a fault of ours: told with a number, kept in stderr
            failure = incident(error)
        else:
            return completed(result)
        return stopped(job.stop) if job.stop else failed(failure)

    async def _is_cancelled(self, job_id: str) -> bool:
        return (await self.registry.get(job_id)).is_cancel_requested

    async def _end_surely(self, record: JobRecord, ending: Ending, facts: dict[str, Any]) -> None:
        await until_written(record.job_id, lambda: self._end(record, ending, facts))

    async def _end(self, record: JobRecord, ending: Ending, facts: dict[str, Any] | None = None) -> JobRecord:
        fields = facts or {}
        with scope(job_id=record.job_id, correlation_id=record.correlation_id, model=record.model):
            line = closing_line(ending, self.actor, **fields)
        try:
            after = await self.registry.end(
                record.job_id,
                ending.state,
                reason=ending.reason,
                message=ending.message,
                result=ending.result,
                error=error_body(ending.error) if ending.error else None,
                fence=Fence(self.owner, record.attempt) if record.state is JobState.RUNNING else None,
                events=[narration_event(line)],
            )
        except GoneError:
            return record  # somebody else ended it, and it was forgotten since
        except ConflictError:
            other = await self.registry.get(record.job_id)
            if other.state is JobState.QUEUED:  # its handler never started it, so it cannot be complete
                raise
            if other.state is JobState.RUNNING and other.owner == self.owner and other.attempt > record.attempt:
                return await self._end(other, ending, facts)  # it was placed again while its handler was stopped
            return other  # it has ended meanwhile, or is someone else's: that stands
        if not self._is_known:
            with scope(job_id=None, correlation_id=record.correlation_id, model=record.model):
                line = closing_line(ending, self.actor, **fields, **{f"{self.actor}_job_id": record.job_id})
        emit(line)
        return after
