"""What the tests of the registry share: quick jobs, quick events, and reading a log to its end."""

from __future__ import annotations

import json
from typing import Any

from rbee.contracts.events import NewEvent, new_event
from rbee.contracts.operations import QueenCheck
from rbee.contracts.states import JobState, Reason
from rbee.jobs import JobRecord, JobRegistry
from rbee.jobs.event_log import LogReader
from rbee.jobs.records import Entry, LogHead, SourceBatch
from rbee.jobs.store import JobStore

SECONDS = 20.0


def told(text: str) -> NewEvent:
    """Make an event that says something."""
    return new_event("narration", {"ts": 1, "actor": "test", "action": "test_say", "message": text})


def captured(start: int, stop: int, log_id: str = "worker-1", source: str = "worker-1/stdout") -> SourceBatch:
    """Make a batch of captured lines, one a byte, that go to the worker's own log where theirs has ended."""
    entries = [
        Entry(log_id, told(str(number)), ("worker-1", told(f"late {number}"))) for number in range(start, stop)
    ]
    return SourceBatch(source, start, stop, 0, entries)


async def new_job(registry: JobRegistry, **values: Any) -> JobRecord:
    """Create a job that asks for nothing in particular."""
    operation = QueenCheck(store=values.pop("store", True), priority=values.pop("priority", 0))
    return await registry.create(operation, correlation_id="c-1", **values)


async def end(registry: JobRegistry, job_id: str, to: JobState = JobState.COMPLETED, **values: Any) -> JobRecord:
    """End a job."""
    return await registry.end(job_id, to, reason=values.pop("reason", Reason.OK), message="Over.", **values)


async def whole_log(registry: JobRegistry, log_id: str) -> list[bytes]:
    """Read a log off the store, page by page."""
    events: list[bytes] = []
    while page := (await registry.read(log_id, len(events))).events:
        events += page
    return events


async def read_to_end(reader: LogReader) -> list[bytes]:
    """Read until the log ends; close the reader."""
    events: list[bytes] = []
    try:
        while not reader.is_ended:
            found = await reader.next(SECONDS)
            assert found, "the log went silent"
            events += found
    finally:
        reader.close()
    return events


def kinds(events: list[bytes]) -> list[str]:
    """Return each event's kind, states with their state."""
    decoded = [json.loads(event) for event in events]
    return [event["kind"] if event["kind"] != "state" else event["state"] for event in decoded]


def assert_dense(events: list[bytes], first: int = 1) -> None:
    """Check that the numbers of events are `first`, `first` + 1, …."""
    assert [json.loads(event)["seq"] for event in events] == list(range(first, first + len(events)))


async def head_of(store: JobStore, log_id: str) -> LogHead | None:
    """Return where a log begins and ends; None when there is none."""
    page = await store.read_log(log_id, 0, 1)
    return page.head if page is not None else None
