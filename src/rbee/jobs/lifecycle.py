"""The life of a job as pure functions: which transition is allowed, and the events that tell it."""

from __future__ import annotations

from typing import Any

import msgspec

from rbee.contracts.events import NewEvent, encode_json, new_event
from rbee.contracts.states import TRANSITIONS, JobState, Phase, Reason
from rbee.contracts.views import ErrorBody
from rbee.errors import ConflictError
from rbee.jobs.records import Changed, Fence, JobRecord


def check_transition(record: JobRecord, to: JobState, fence: Fence | None = None) -> None:
    """Refuse a transition that the life cycle does not have, or that a late owner asks for.

    Raises:
        ConflictError: The job has ended, cannot go there from where it is, or is someone else's by now.
    """
    if to not in TRANSITIONS[record.state]:
        raise ConflictError(f"The job {record.job_id} is {record.state}; it cannot become {to}.")
    if fence is not None and (fence.owner, fence.attempt) != (record.owner, record.attempt):
        raise ConflictError(
            f"Attempt {fence.attempt} of the job {record.job_id} no longer holds it (attempt {record.attempt})."
        )


def state_event(record: JobRecord, now: float) -> NewEvent:
    """Make the event that tells a job's state."""
    return new_event(
        "state",
        {
            "ts": int(now * 1e9),
            "job_id": record.job_id,
            "correlation_id": record.correlation_id,
            "state": record.state,
            "reason": record.reason,
            "attempt": record.attempt,
        },
    )


def started(
    record: JobRecord,
    *,
    owner: str,
    now: float,
    hive_id: str | None,
    worker_id: str | None,
    phase: Phase | None,
    events: list[NewEvent],
    message: str | None = None,
    lease_until: float | None = None,
) -> Changed:
    """Give the job to an owner: `queued` (or an earlier attempt) to `running`, attempt raised."""
    check_transition(record, JobState.RUNNING)
    if record.is_cancel_requested:
        raise ConflictError(f"The job {record.job_id} is being cancelled.")
    after = msgspec.structs.replace(
        record,
        state=JobState.RUNNING,
        owner=owner,
        attempt=record.attempt + 1,
        started_at=record.started_at or now,
        hive_id=hive_id or record.hive_id,
        worker_id=worker_id or record.worker_id,
        phase=phase,
        message=message or record.message,
        lease_until=lease_until,
    )
    return Changed(after, [*events, state_event(after, now)])


def ended(
    record: JobRecord,
    to: JobState,
    *,
    reason: Reason,
    message: str,
    now: float,
    result: dict[str, Any] | None = None,
    error: ErrorBody | None = None,
    fence: Fence | None = None,
    events: list[NewEvent],
) -> Changed:
    """End the job: `events` (the closing sentence), then `end` as the last number of the log."""
    check_transition(record, to, fence)
    kept = _without_text(result) if result is not None and not record.is_stored else result
    after = msgspec.structs.replace(
        record,
        state=to,
        reason=reason,
        message=message,
        phase=None,
        lease_until=None,
        ended_at=now,
        result=None if kept is None else encode_json(kept),
        error=error,
    )
    end = new_event(
        "end",
        {
            "ts": int(now * 1e9),
            "job_id": record.job_id,
            "correlation_id": record.correlation_id,
            "state": to,
            "reason": reason,
            "message": message,
            "result": result,
            "error": error,
        },
    )
    return Changed(after, [*events, end])


def erased(record: JobRecord) -> Changed:
    """Keep of an ended job no request, no log and no text.

    Raises:
        ConflictError: It has not ended.
    """
    if not record.is_ended:
        raise ConflictError(f"The job {record.job_id} is {record.state}; it can be erased once it has ended.")
    result = None if record.result is None else encode_json(_without_text(msgspec.json.decode(record.result)))
    return Changed(msgspec.structs.replace(record, is_stored=False, result=result), [])


def _without_text(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "text"}


def cancel_requested(record: JobRecord) -> Changed:
    """Mark a running job as to be cancelled; an ended one stays as it is."""
    if record.is_ended or record.is_cancel_requested:
        return Changed(record, [])
    return Changed(msgspec.structs.replace(record, is_cancel_requested=True, phase=Phase.STOPPING), [])


def taken_over(record: JobRecord, owner: str, events: list[NewEvent]) -> Changed:
    """Give a running job to a later boot of its owner; the attempt goes on as it is.

    Raises:
        ConflictError: It does not run.
    """
    if record.state is not JobState.RUNNING:
        raise ConflictError(f"The job {record.job_id} is {record.state}; it cannot be taken over.")
    return Changed(msgspec.structs.replace(record, owner=owner), events)


def renewed(record: JobRecord, fence: Fence, until: float) -> Changed:
    """Let an owner hold a running job for longer.

    Raises:
        ConflictError: The job has ended, or is someone else's by now.
    """
    check_transition(record, JobState.RUNNING, fence)
    return Changed(msgspec.structs.replace(record, lease_until=until), [])


def released(
    record: JobRecord, fence: Fence, until: float, *, is_counted: bool, events: list[NewEvent]
) -> Changed:
    """Let go of a running job: from `until` on anybody may begin the next attempt.

    Args:
        is_counted: The attempt counts as one of those that are allowed.

    Raises:
        ConflictError: The job has ended, or is someone else's by now.
    """
    check_transition(record, JobState.RUNNING, fence)
    attempts = record.attempts if is_counted else record.attempts + 1
    return Changed(msgspec.structs.replace(record, owner=None, lease_until=until, attempts=attempts), events)
