"""The life of a job, every transition of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rbee.contracts.states import TERMINAL_STATES, TRANSITIONS, JobState, Phase, Reason
from rbee.errors import ConflictError, WorkerLostError
from rbee.jobs.endings import error_body
from rbee.jobs.lifecycle import cancel_requested, check_transition, ended, released, renewed, started
from rbee.jobs.records import Changed, Fence, JobRecord

LIFE = {
    ("queued", "running"),
    ("queued", "failed"),
    ("queued", "cancelled"),
    ("running", "running"),
    ("running", "completed"),
    ("running", "failed"),
    ("running", "cancelled"),
}


def job(state: JobState = JobState.RUNNING, **values: Any) -> JobRecord:
    whole = {"owner": "boot-1", "attempt": 1, **values}
    return JobRecord(job_id="job-1", operation="infer", state=state, correlation_id="c", created_at=1.0, **whole)


def start(record: JobRecord) -> Changed:
    return started(record, owner="boot-2", now=5.0, hive_id=None, worker_id="worker-1", phase=None, events=[])


def finish(record: JobRecord, to: JobState = JobState.COMPLETED, **values: Any) -> Changed:
    return ended(record, to, reason=Reason.OK, message="m", now=6.0, events=[], **values)


def last_event(changed: Changed) -> Any:
    return json.loads(changed.events[-1].numbered(9))


@pytest.mark.parametrize("before", JobState)
@pytest.mark.parametrize("after", JobState)
def test_transition_is_allowed_exactly_where_the_life_has_it(before: JobState, after: JobState) -> None:
    if (before, after) in LIFE:
        check_transition(job(before), after)
    else:
        with pytest.raises(ConflictError, match=f"job-1 is {before}; it cannot become {after}"):
            check_transition(job(before), after)


def test_terminal_states_absorb() -> None:
    assert {state for state in JobState if not TRANSITIONS[state]} == TERMINAL_STATES


@pytest.mark.parametrize("fence", [Fence("boot-1", 0), Fence("boot-1", 2), Fence("boot-2", 1)])
def test_end_by_a_late_owner_is_refused(fence: Fence) -> None:
    with pytest.raises(ConflictError, match="no longer holds it"):
        finish(job(), fence=fence)
    assert finish(job(), fence=Fence("boot-1", 1)).record.state is JobState.COMPLETED


def test_start_raises_the_attempt_and_keeps_the_first_beginning() -> None:
    first = start(job(JobState.QUEUED, attempt=0, owner=None, hive_id="hive-1")).record
    assert (first.state, first.attempt, first.owner, first.started_at) == (JobState.RUNNING, 1, "boot-2", 5.0)
    assert (first.hive_id, first.worker_id) == ("hive-1", "worker-1")
    again = start(job(attempt=1, started_at=2.0))
    assert (again.record.attempt, again.record.started_at) == (2, 2.0)
    assert last_event(again)["attempt"] == 2


def test_start_of_a_job_that_is_being_cancelled_is_refused() -> None:
    with pytest.raises(ConflictError, match="is being cancelled"):
        start(cancel_requested(job(JobState.QUEUED)).record)


def test_end_is_the_last_event_and_tells_everything() -> None:
    error = error_body(WorkerLostError("m", details={"last_lines": ["x"]}))
    changed = finish(job(phase=Phase.GENERATING), JobState.FAILED, error=error, result={"text": "t"})
    told = last_event(changed)
    assert told.pop("error").items() >= {"message": "m", "code": "worker_lost", "last_lines": ["x"]}.items()
    assert told == {
        "v": 1,
        "kind": "end",
        "seq": 9,
        "ts": 6_000_000_000,
        "job_id": "job-1",
        "correlation_id": "c",
        "state": "failed",
        "reason": "ok",
        "message": "m",
        "result": {"text": "t"},
    }
    assert (changed.record.phase, changed.record.ended_at, changed.record.error) == (None, 6.0, error)


def test_end_of_a_job_that_is_not_stored_tells_the_text_and_keeps_the_rest() -> None:
    changed = finish(job(is_stored=False), result={"text": "secret", "n": 1})
    assert last_event(changed)["result"] == {"text": "secret", "n": 1}
    assert changed.record.result == b'{"n":1}'


@pytest.mark.parametrize("state", JobState)
def test_cancel_request_marks_a_live_job_once_and_an_ended_one_never(state: JobState) -> None:
    once = cancel_requested(job(state)).record
    assert once.is_cancel_requested == (state not in TERMINAL_STATES)
    assert cancel_requested(once).record == once
    assert cancel_requested(once).events == []


@pytest.mark.parametrize("state", sorted(TERMINAL_STATES))
def test_job_that_has_ended_is_neither_renewed_nor_released(state: JobState) -> None:
    with pytest.raises(ConflictError, match="it cannot become running"):
        renewed(job(state), Fence("boot-1", 1), 9.0)
    with pytest.raises(ConflictError, match="it cannot become running"):
        released(job(state), Fence("boot-1", 1), 9.0, is_counted=False, events=[])


@pytest.mark.parametrize("fence", [Fence("boot-1", 0), Fence("boot-1", 2), Fence("boot-2", 1)])
def test_job_of_another_owner_is_neither_renewed_nor_released(fence: Fence) -> None:
    with pytest.raises(ConflictError, match="no longer holds it"):
        renewed(job(), fence, 9.0)
    with pytest.raises(ConflictError, match="no longer holds it"):
        released(job(), fence, 9.0, is_counted=True, events=[])


@pytest.mark.parametrize(("is_counted", "attempts"), [(True, 2), (False, 3)])
def test_release_leaves_a_job_without_an_owner_until_its_next_attempt(is_counted: bool, attempts: int) -> None:
    held = job(lease_until=5.0, attempts=2)
    after = released(held, Fence("boot-1", 1), 9.0, is_counted=is_counted, events=[]).record
    assert (after.owner, after.lease_until, after.attempts, after.state) == (None, 9.0, attempts, "running")
