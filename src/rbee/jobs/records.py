"""What a registry keeps: jobs as frozen values, and the questions that can be asked about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import Struct

from rbee.contracts.events import CapturedRun, NewEvent, events_in
from rbee.contracts.states import TERMINAL_STATES, JobState, Phase, Reason
from rbee.contracts.views import ErrorBody, JobView, Progress


class JobRecord(Struct, frozen=True, kw_only=True):
    """A job as it stands; times are seconds since 1970.

    Attributes:
        owner: The boot id of the process that runs it.
        deadline_at: When it fails with `timeout`.
        queue_deadline_at: When it fails with `queue_timeout`, if it is still queued then.
        lease_until: When a running job may be taken by another owner, unless this one renews its hold; None:
            its owner keeps it for as long as it lives.
        is_kept: Its answer is narrated into its log (as every `infer`), not relayed.
        result: JSON.
    """

    job_id: str
    operation: str
    state: JobState
    reason: Reason | None = None
    message: str | None = None
    phase: Phase | None = None
    priority: int = 0
    attempt: int = 0
    attempts: int = 1
    owner: str | None = None
    model: str | None = None
    hive_id: str | None = None
    worker_id: str | None = None
    principal: str = "local"
    parent_job_id: str | None = None
    correlation_id: str
    idempotency_key: str | None = None
    body_hash: str | None = None
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    deadline_at: float | None = None
    is_cancel_requested: bool = False
    is_stored: bool = True
    is_kept: bool = True
    progress: Progress | None = None
    result: bytes | None = None
    error: ErrorBody | None = None
    labels: dict[str, str] = {}
    queue_deadline_at: float | None = None
    lease_until: float | None = None

    @property
    def is_ended(self) -> bool:
        """Tell whether the job is in a terminal state."""
        return self.state in TERMINAL_STATES


class Fence(Struct, frozen=True):
    """Who claims to speak for a running job; a late one, of an older attempt or another boot, is refused."""

    owner: str
    attempt: int


class JobFilter(Struct, frozen=True, kw_only=True):
    """Which jobs a list holds.

    Attributes:
        since: Those that were created then or later, in seconds since 1970.
        until: Those that were created before.
        before: The cursor of the page: only those older than that one.
    """

    state: JobState | None = None
    operation: str | None = None
    model: str | None = None
    hive_id: str | None = None
    worker_id: str | None = None
    correlation_id: str | None = None
    since: float | None = None
    until: float | None = None
    before: str | None = None
    limit: int = 50


class Changed(Struct, frozen=True):
    """What a decider makes of a record: the record after, and the events that tell it."""

    record: JobRecord
    events: list[NewEvent]


class LogHead(Struct, frozen=True):
    """Where a log begins and ends. `first_seq` above 1 means that older events were forgotten."""

    first_seq: int
    last_seq: int
    size_bytes: int
    is_ended: bool


class Committed(Struct, gc=False):
    """Events that were committed to one log in one transaction.

    Attributes:
        first_seq: The number of the first.
        last_seq: The number of the last.
        frames: They, as frames of a stream.
        is_full: The log took nothing more of what was captured; they tell how much was lost.
        ended: The job that ended with them.
    """

    log_id: str
    first_seq: int
    last_seq: int
    frames: bytes
    is_end: bool
    is_full: bool = False
    ended: JobRecord | None = None


class Standing(Struct, frozen=True):
    """Where a job stands.

    Attributes:
        last_seq: The number of its log's last event.
        queue_position: How many queued jobs go before it, plus 1; None when it is not queued.
    """

    last_seq: int
    queue_position: int | None


class LogPage(Struct, frozen=True):
    """Some events of a log, as frames of a stream, and the log's head at the time they were read.

    Attributes:
        last_seq: The number of the last of them; where there are none, the one they were asked for behind.
    """

    frames: bytes
    last_seq: int
    head: LogHead

    @property
    def events(self) -> list[bytes]:
        """The events themselves, as they stand in the log."""
        return events_in(self.frames)


class Entry(Struct, frozen=True):
    """One captured event on its way into a log.

    Attributes:
        log_id: Where it belongs.
        event: The event.
        otherwise: What to write, and where, when that log has ended meanwhile.
    """

    log_id: str
    event: NewEvent
    otherwise: tuple[str, NewEvent] | None = None


class Run(Struct, frozen=True, gc=False):
    """Many captured lines on their way into one log, as they stand.

    Attributes:
        log_id: Where they belong.
        lines: The lines.
        otherwise_log_id: Where to tell of them when that log has ended meanwhile.
        otherwise: Makes of them what is told there.
    """

    log_id: str
    lines: CapturedRun
    otherwise_log_id: str
    otherwise: Callable[[CapturedRun], list[NewEvent]]


class Held(Struct, frozen=True):
    """What a registry holds, as far as it matters for how long.

    Attributes:
        ended_at: When the job ended that ended before all others.
        ended_jobs: How many have ended.
        used_bytes: How much of the disk is used, by these and everything else.
    """

    ended_at: float
    ended_jobs: int
    used_bytes: int


class Forgotten(Struct, frozen=True):
    """How many jobs were forgotten, by the reason for it; and whether there is more to forget."""

    jobs: Mapping[str, int]
    is_more: bool


class WorkerRecord(Struct, frozen=True):
    """A worker the queen asked a hive for, and the job it was started for."""

    worker_id: str
    hive_id: str
    model: str
    job_id: str | None = None
    exit_line: bytes | None = None


class SourceBatch(Struct, frozen=True):
    """What was read off one captured file: from its cursor to the next one.

    Attributes:
        ended_workers: Workers whose end stood in it; kept until it can be told.
    """

    source: str
    cursor: int
    next_cursor: int
    next_part: int
    entries: Sequence[Entry | Run]
    ended_workers: list[WorkerRecord] = []


def view_of(record: JobRecord, last_seq: int, *, queue_position: int | None = None) -> JobView:
    """Show a job as everybody may see it."""
    return JobView(
        job_id=record.job_id,
        operation=record.operation,
        state=record.state,
        reason=record.reason,
        message=record.message,
        phase=record.phase,
        queue_position=queue_position,
        progress=record.progress,
        attempt=record.attempt,
        model=record.model,
        hive_id=record.hive_id,
        worker_id=record.worker_id,
        principal=record.principal,
        parent_job_id=record.parent_job_id,
        correlation_id=record.correlation_id,
        created_at=_utc(record.created_at),
        started_at=_utc_or_none(record.started_at),
        ended_at=_utc_or_none(record.ended_at),
        last_seq=last_seq,
        result=_json_or_none(record.result),
        error=record.error,
        labels=record.labels,
        stream_url=f"/v1/jobs/{record.job_id}/stream",
    )


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _utc_or_none(seconds: float | None) -> datetime | None:
    return None if seconds is None else _utc(seconds)


def _json_or_none(data: bytes | None) -> dict[str, Any] | None:
    return None if data is None else msgspec.json.decode(data)
