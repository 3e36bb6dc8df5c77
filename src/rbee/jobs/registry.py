"""The one job registry, in every program and every test: jobs, their transitions and their logs."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from rbee.contracts.events import NewEvent, encode_json
from rbee.contracts.ids import new_correlation_id, new_id
from rbee.contracts.operations import OPERATIONS, Operation, operation_name
from rbee.contracts.states import JobState, Phase, Reason
from rbee.contracts.views import ErrorBody, JobView, Progress
from rbee.errors import GoneError, InvalidRequestError
from rbee.jobs.claim import LEASE_S, LOOK_S, ClaimedJob, Claims, closing
from rbee.jobs.endings import USER_STOP, stopped
from rbee.jobs.event_log import PAGE_EVENTS, LogHub, LogReader
from rbee.jobs.lifecycle import cancel_requested, ended, erased, started, state_event, taken_over
from rbee.jobs.records import Changed, Fence, JobFilter, JobRecord, LogPage, view_of
from rbee.jobs.sqlite_store import SqliteStore
from rbee.jobs.store import JobStore

QUEUED_MAX = 512


class JobRegistry:
    """Jobs in force and on disk.

    Every transition is a compare-and-set that is committed together with its event; when a method returns,
    it is on disk and readers of the log have been told. Ended jobs absorb: a late transition raises
    `ConflictError` and changes nothing.

    Attributes:
        positions: Tells the turns of queued jobs, where they are not by priority and then arrival.
    """

    def __init__(
        self,
        store: JobStore,
        *,
        queued_max: int = QUEUED_MAX,
        clock: Callable[[], float] = time.time,
        operations: Sequence[type[Operation]] = OPERATIONS,
    ) -> None:
        self.store = store
        self.hub = LogHub(store)
        self.queued_max = queued_max
        self._clock = clock
        self._requests = msgspec.json.Decoder(reduce(or_, operations))
        self._claims = Claims(self)
        self.positions: Callable[[], Mapping[str, int]] = dict
        store.on_commit = self.hub.publish

    @classmethod
    def open(
        cls,
        path: Path | None,
        *,
        queued_max: int = QUEUED_MAX,
        operations: Sequence[type[Operation]] = OPERATIONS,
    ) -> JobRegistry:
        """Open the registry in a SQLite file (None: in memory). Needs a running event loop.

        Args:
            path: The file; its directory must be there.
            queued_max: How many jobs may wait.
            operations: What its jobs may ask for.

        Raises:
            StartError: The file cannot be used.
        """
        return cls(SqliteStore(path), queued_max=queued_max, operations=operations)

    async def __aenter__(self) -> Self:
        """Use it in an `async with` block."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        await self.close()

    def now(self) -> float:
        """Return the time by this registry's clock, in seconds since 1970."""
        return self._clock()

    async def close(self) -> None:
        """Commit what was asked for, then close the store."""
        await self.store.close()

    async def create(
        self,
        operation: Operation,
        *,
        correlation_id: str | None = None,
        job_id: str | None = None,
        principal: str = "local",
        model: str | None = None,
        hive_id: str | None = None,
        parent_job_id: str | None = None,
        idempotency_key: str | None = None,
        is_kept: bool = True,
        queued_max: int | None = None,
        events: list[NewEvent] | None = None,
    ) -> JobRecord:
        """Accept a job: it is `queued`, and its log begins with that.

        Args:
            operation: What to do; kept as the job's request.
            queued_max: How many jobs may wait; as many as of all others by default.
            events: What to say straight behind the first event, in the same transaction.

        Raises:
            OverloadedError: As many jobs wait as may.
            ConflictError: The idempotency key was used with another body.
        """
        record = self.draft(
            operation,
            correlation_id=correlation_id,
            job_id=job_id,
            principal=principal,
            model=model,
            hive_id=hive_id,
            parent_job_id=parent_job_id,
            idempotency_key=idempotency_key,
            is_kept=is_kept,
        )
        return await self.put(record, operation, queued_max=queued_max, events=events)

    async def put(
        self,
        record: JobRecord,
        operation: Operation,
        *,
        queued_max: int | None = None,
        events: list[NewEvent] | None = None,
    ) -> JobRecord:
        """Accept a job as `draft` made it; what is asked of this registry afterwards finds it. See `create`."""
        told = [state_event(record, record.created_at), *(events or [])]
        limit = queued_max or self.queued_max
        made = await self.store.create(record, encode_json(operation), told, queued_max=limit)
        self._claims.queued(made.operation)
        return made

    def draft(
        self,
        operation: Operation,
        *,
        correlation_id: str | None = None,
        job_id: str | None = None,
        principal: str = "local",
        model: str | None = None,
        hive_id: str | None = None,
        parent_job_id: str | None = None,
        idempotency_key: str | None = None,
        is_kept: bool = True,
    ) -> JobRecord:
        """Return what a job will be once it is accepted; nothing is written."""
        now = self._clock()
        body_hash = hashlib.sha256(encode_json(operation)).hexdigest() if idempotency_key else None
        return JobRecord(
            job_id=job_id or new_id("job"),
            operation=operation_name(operation),
            state=JobState.QUEUED,
            phase=Phase.QUEUED,
            priority=operation.priority,
            attempts=operation.attempts,
            model=model,
            hive_id=hive_id,
            principal=principal,
            parent_job_id=parent_job_id,
            correlation_id=correlation_id or new_correlation_id(),
            idempotency_key=idempotency_key,
            body_hash=body_hash,
            created_at=now,
            deadline_at=now + operation.timeout_s if operation.timeout_s else None,
            queue_deadline_at=now + operation.queue_timeout_s if operation.queue_timeout_s else None,
            is_stored=operation.store,
            is_kept=is_kept,
            labels=operation.labels,
        )

    async def start(
        self,
        job_id: str,
        *,
        owner: str,
        hive_id: str | None = None,
        worker_id: str | None = None,
        phase: Phase | None = None,
        message: str | None = None,
        events: list[NewEvent] | None = None,
    ) -> JobRecord:
        """Make a job `running` for an owner, its attempt raised by one.

        Raises:
            ConflictError: It has ended, or is being cancelled.
        """
        now = self._clock()

        def decide(record: JobRecord) -> Changed:
            return started(
                record,
                owner=owner,
                now=now,
                hive_id=hive_id,
                worker_id=worker_id,
                phase=phase,
                message=message,
                events=events or [],
            )

        return await self.store.change(job_id, decide)

    async def end(
        self,
        job_id: str,
        to: JobState,
        *,
        reason: Reason,
        message: str,
        result: dict[str, Any] | None = None,
        error: ErrorBody | None = None,
        fence: Fence | None = None,
        events: list[NewEvent] | None = None,
    ) -> JobRecord:
        """End a job; its log ends with it.

        Raises:
            ConflictError: It has ended already, or `fence` is no longer its owner.
        """
        now = self._clock()

        def decide(record: JobRecord) -> Changed:
            return ended(
                record,
                to,
                reason=reason,
                message=message,
                now=now,
                result=result,
                error=error,
                fence=fence,
                events=events or [],
            )

        return await self.store.change(job_id, decide)

    def claim(
        self, *kinds: type[Operation], name: str = "worker", lease_s: float = LEASE_S
    ) -> AsyncGenerator[ClaimedJob, None]:
        """Work on jobs: `async for job in registry.claim(Resize): async with job: …`. Waits for jobs for ever.

        Loops may run beside each other, also in other processes on the same file. A job is held by a lease that is
        renewed while its block runs; when its holder dies, the next attempt begins once the lease is over.

        Args:
            kinds: What to work on.
            name: Who works, as the jobs' logs tell it: `worker_complete`.
            lease_s: How long a job is held without a sign of life.

        Raises:
            InvalidRequestError: `lease_s` is not above 0.
        """
        if not lease_s > 0:
            raise InvalidRequestError(f"`lease_s` must be more than 0, not {lease_s}.", param="lease_s")
        return self._claims.jobs(kinds, name=name, lease_s=lease_s)

    async def cancel(self, job_id: str) -> JobRecord:
        """Cancel a job: one that nobody works on ends now, another as soon as its worker hears of it.

        Raises:
            NotFoundError: There is no such job.
        """
        now = self._clock()

        def decide(record: JobRecord) -> Changed:
            if record.is_ended or record.owner is not None:
                return cancel_requested(record)
            ending = stopped(USER_STOP)
            events = [closing(record, ending, "registry")]
            return ended(
                record, ending.state, reason=ending.reason, message=ending.message, now=now, events=events
            )

        record = await self.store.change(job_id, decide)
        self._claims.stop(job_id, USER_STOP)
        return record

    async def take_over(self, job_id: str, *, owner: str, events: list[NewEvent]) -> JobRecord:
        """Give a running job of an earlier boot to this one; its attempt goes on.

        Raises:
            ConflictError: It does not run.
        """
        return await self.store.change(job_id, lambda record: taken_over(record, owner, events))

    async def request_cancel(self, job_id: str) -> JobRecord:
        """Mark a job as to be cancelled; whoever runs it sees to the rest. Again and again without harm."""
        return await self.store.change(job_id, cancel_requested)

    async def erase(self, job_id: str) -> JobRecord:
        """Erase request, log and text of a job that has ended; again and again without harm.

        Raises:
            ConflictError: It has not ended.
        """
        return await self.store.change(job_id, erased)

    async def update(
        self,
        job_id: str,
        *,
        phase: Phase | None = None,
        message: str | None = None,
        progress: Progress | None = None,
        hive_id: str | None = None,
        worker_id: str | None = None,
        events: list[NewEvent] | None = None,
    ) -> JobRecord:
        """Say how far a job is; nothing changes once it has ended."""
        values = {
            name: value
            for name, value in (
                ("phase", phase),
                ("message", message),
                ("progress", progress),
                ("hive_id", hive_id),
                ("worker_id", worker_id),
            )
            if value is not None
        }

        def decide(record: JobRecord) -> Changed:
            if record.is_ended:
                return Changed(record, [])
            return Changed(msgspec.structs.replace(record, **values), events or [])

        return await self.store.change(job_id, decide)

    async def append(self, log_id: str, events: list[NewEvent]) -> bool:
        """Append to a log; false when it has ended, and nothing was written."""
        return await self.store.append(log_id, events)

    # Questions

    async def get(self, job_id: str) -> JobRecord:
        """Return a job.

        Raises:
            NotFoundError: There is none of that id.
            GoneError: It was forgotten.
        """
        record = await self.store.get(job_id)
        if record is None:
            raise await self.store.missing(job_id)
        return record

    async def operation(self, job_id: str) -> Any:
        """Return what a job asks for.

        Raises:
            GoneError: The request was erased.
            InvalidRequestError: It is of no form that is known here.
        """
        body = await self.store.request(job_id)
        if body is None:
            raise GoneError(f"The request of {job_id} is no longer kept.")
        return self.load(body)

    def load(self, request: bytes) -> Any:
        """Read a kept request back as the operation it is.

        Raises:
            InvalidRequestError: It is of no form that is known here.
        """
        try:
            return self._requests.decode(request)
        except msgspec.DecodeError as error:
            raise InvalidRequestError(f"The request cannot be read: {error}.") from error

    async def view(self, job_id: str) -> JobView:
        """Return a job as everybody may see it."""
        return (await self._views([await self.get(job_id)]))[0]

    async def find(self, query: JobFilter) -> list[JobView]:
        """Return a page of jobs, newest first."""
        return await self._views(await self.store.find(query))

    async def _views(self, records: list[JobRecord]) -> list[JobView]:
        standing = await self.store.standing(records) if records else []
        turns = self.positions()
        return [
            view_of(
                record,
                stands.last_seq,
                queue_position=stands.queue_position and turns.get(record.job_id, stands.queue_position),
            )
            for record, stands in zip(records, standing, strict=True)
        ]

    async def read(self, log_id: str, after: int, limit: int = PAGE_EVENTS) -> LogPage:
        """Return a page of a log.

        Raises:
            NotFoundError: There is no such log.
            GoneError: The events behind `after` were forgotten, or the job with all of them.
        """
        page = await self.store.read_log(log_id, after, limit)
        if page is None:
            raise await self.store.missing(log_id)
        if after + 1 < page.head.first_seq:
            raise GoneError(f"The events of {log_id} before {page.head.first_seq} are no longer kept.")
        return page

    async def wait(self, job_id: str) -> JobRecord:
        """Wait until a job has ended; returns it.

        Raises:
            NotFoundError: There is none of that id.
        """
        while True:
            with self.hub.end_of(job_id) as end:
                record = await self.get(job_id)
                if record.is_ended:
                    return record
                with contextlib.suppress(TimeoutError):  # another process may end it: then it is in the file
                    async with asyncio.timeout(LOOK_S):
                        return await end

    async def follow(self, log_id: str, after: int = 0) -> LogReader:
        """Begin to read a log as it grows; see `LogReader`."""
        return await self.hub.reader(log_id, after)
