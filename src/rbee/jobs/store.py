"""What a registry needs of its storage. SQLite is the first; each must pass the same contract tests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

from rbee.contracts.events import NewEvent
from rbee.contracts.states import JobState
from rbee.errors import RbeeError, UnavailableError
from rbee.jobs.records import (
    Changed,
    Committed,
    Forgotten,
    Held,
    JobFilter,
    JobRecord,
    LogPage,
    SourceBatch,
    Standing,
    WorkerRecord,
)

Decide = Callable[[JobRecord], Changed]
Why = Callable[[Held], str | None]
OnCommit = Callable[[list[Committed]], None]


class StoreClosedError(UnavailableError):
    """The registry is closed."""

    retryable = False
    remedy = "Open the registry again."


class JobStore(Protocol):
    """Durable storage of jobs and logs.

    Every method that writes returns when its transaction is on disk, and is atomic: all of it or nothing.
    What was committed is handed to `on_commit`, in commit order, before the method returns. Methods raise
    `StorageError` when the disk refuses (`StorageFullError` when it is full), and leave everything as it was;
    `StoreClosedError` after `close`.
    """

    store_id: str
    on_commit: OnCommit

    async def create(
        self, record: JobRecord, request: bytes, events: list[NewEvent], *, queued_max: int
    ) -> JobRecord:
        """Keep a new job, or return the one that its idempotency key already made.

        Raises:
            OverloadedError: `queued_max` jobs are waiting.
            ConflictError: The key was used with another body.
        """

    async def change(self, job_id: str, decide: Decide) -> JobRecord:
        """Apply a pure decider to a job under its lock; what the decider raises changes nothing.

        Raises:
            NotFoundError: There is no such job.
            GoneError: It was forgotten.
        """

    async def claim(
        self, operations: Collection[str], now: float, limit: int, decide: Decide
    ) -> list[tuple[JobRecord, bytes]]:
        """Apply a pure decider to the jobs whose turn it is, in one transaction.

        Queued ones with a deadline that has passed are decided about in any case. Then come running ones whose
        lease was over at `now`, the longest first, and queued ones by priority and order of arrival. Those that
        the decider ends are not counted.

        Args:
            operations: Which.
            now: The time, in seconds since 1970.
            limit: How many at most.
            decide: Has a job run, or ends it.

        Returns:
            Those that run by it, each with its request.
        """

    async def append(self, log_id: str, events: list[NewEvent]) -> bool:
        """Append to a log; false when the log has ended and nothing was written."""

    async def ingest(self, batches: list[SourceBatch]) -> dict[str, int]:
        """Commit captured events together with the cursors of their files; returns all cursors concerned.

        A batch whose cursor is not the stored one is left out whole.
        """

    async def forget(self, why: Why) -> Forgotten:
        """Forget jobs that have ended, for as long as a pure decider gives a reason; in one short transaction.

        The one that ended before all others goes first: its log, a part at a time where it is long, and then the
        job, its request and its idempotency key. A job that has not ended is never forgotten.
        """

    async def forget_logs(self, before: float) -> bool:
        """Forget logs of workers that were made before a time (seconds since 1970) and whose end is told.

        In one short transaction; returns whether there are more.
        """

    async def missing(self, log_id: str) -> RbeeError:
        """Return the error that tells why there is no such job or log.

        That is a `GoneError` when a job of that id may have been forgotten, else a `NotFoundError`.
        """

    async def cursors(self, sources: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Return cursor and part of those sources that are known."""

    async def get(self, job_id: str) -> JobRecord | None:
        """Return a job."""

    async def request(self, job_id: str) -> bytes | None:
        """Return a job's request, or None when it was erased."""

    async def find(self, query: JobFilter) -> list[JobRecord]:
        """Return jobs, newest first, at most `query.limit`."""

    async def counts(self) -> dict[str, int]:
        """Return how many jobs are in each state."""

    async def standing(self, records: Sequence[JobRecord]) -> list[Standing]:
        """Return where each of these jobs stands."""

    async def read_log(self, log_id: str, after: int, limit: int) -> LogPage | None:
        """Return events with numbers above `after`, at most `limit`; None when there is no such log."""

    async def put_worker(self, worker: WorkerRecord) -> None:
        """Keep what is known of a worker."""

    async def workers(self) -> list[WorkerRecord]:
        """Return all workers that have not been forgotten."""

    async def forget_worker(self, worker_id: str) -> None:
        """Forget a worker whose end was told; its log stays."""

    async def close(self) -> None:
        """Finish what was begun and close."""


PAGE = 500


async def all_jobs(store: JobStore, *states: JobState) -> list[JobRecord]:
    """Return every job in one of these states, newest first within a state."""
    found: list[JobRecord] = []
    for state in states:
        before: str | None = None
        while True:
            page = await store.find(JobFilter(state=state, before=before, limit=PAGE))
            found.extend(page)
            if len(page) < PAGE:
                break
            before = page[-1].job_id
    return found
