"""Captured events and the cursor of their file, committed together: resent never twice, late never lost."""

from __future__ import annotations

import asyncio
import json
import random

from rbee.contracts.states import JobState
from rbee.jobs import JobRegistry
from rbee.jobs.records import SourceBatch, WorkerRecord
from tests.unit.jobs.job_stage import assert_dense, captured, end, kinds, new_job, whole_log


async def said(registry: JobRegistry, log_id: str) -> list[str]:
    events = [json.loads(event) for event in await whole_log(registry, log_id)]
    return [event["message"] for event in events if event["kind"] == "narration"]


async def test_batch_and_its_cursor_are_committed_together(registry: JobRegistry) -> None:
    record = await new_job(registry)
    assert await registry.store.ingest([captured(0, 3, record.job_id)]) == {"worker-1/stdout": 3}
    assert await registry.store.cursors(["worker-1/stdout", "worker-2/stdout"]) == {"worker-1/stdout": (3, 0)}
    assert await said(registry, record.job_id) == ["0", "1", "2"]


async def test_batch_that_is_not_at_the_cursor_is_left_out_and_told_where_it_is(registry: JobRegistry) -> None:
    record = await new_job(registry)
    await registry.store.ingest([captured(0, 3, record.job_id)])
    for wrong in (captured(0, 3, record.job_id), captured(1, 5, record.job_id), captured(4, 6, record.job_id)):
        assert await registry.store.ingest([wrong]) == {"worker-1/stdout": 3}
    assert await said(registry, record.job_id) == ["0", "1", "2"]
    assert await registry.store.ingest([captured(3, 4, record.job_id), captured(4, 5, record.job_id)]) == {
        "worker-1/stdout": 5
    }
    assert await said(registry, record.job_id) == ["0", "1", "2", "3", "4"]


async def test_unknown_source_is_taken_from_the_first_offset_offered(registry: JobRegistry) -> None:
    assert await registry.store.ingest([captured(7, 9)]) == {"worker-1/stdout": 9}


async def test_line_for_a_log_that_has_ended_goes_to_the_speakers_own(registry: JobRegistry) -> None:
    record = await new_job(registry)
    await registry.store.ingest([captured(0, 1, record.job_id)])
    await end(registry, record.job_id, JobState.CANCELLED)
    log = await whole_log(registry, record.job_id)
    await registry.store.ingest([captured(1, 3, record.job_id), captured(0, 1, "job-nobody", "worker-1/stderr")])
    assert await whole_log(registry, record.job_id) == log
    assert await said(registry, "worker-1") == ["late 1", "late 2", "late 0"]


async def test_line_and_end_at_the_same_time_never_leave_a_line_behind_the_end(registry: JobRegistry) -> None:
    for _ in range(20):
        record = await new_job(registry)
        source = f"{record.job_id}/stdout"
        await asyncio.gather(
            registry.store.ingest([captured(0, 2, record.job_id, source)]),
            end(registry, record.job_id, JobState.CANCELLED),
            registry.store.ingest([captured(2, 4, record.job_id, source)]),
        )
        events = await whole_log(registry, record.job_id)
        assert_dense(events)
        assert kinds(events)[-1] == "end"
        assert kinds(events).count("end") == 1


async def test_sender_that_forgets_what_was_acknowledged_loses_and_doubles_nothing(registry: JobRegistry) -> None:
    record, chance, position = await new_job(registry), random.Random(3), 0
    while position < 500:
        offered = captured(position, min(position + chance.randint(1, 40), 500), record.job_id)
        acknowledged = (await registry.store.ingest([offered]))["worker-1/stdout"]
        position = acknowledged if chance.random() < 0.7 else chance.randint(0, acknowledged)
    assert await said(registry, record.job_id) == [str(number) for number in range(500)]


async def test_end_of_a_worker_is_kept_with_the_batch_it_came_in_until_it_was_told(registry: JobRegistry) -> None:
    worker = WorkerRecord("worker-1", "hive-1", "m", "job-1")
    await registry.store.put_worker(worker)
    assert await registry.store.workers() == [worker]
    assert await whole_log(registry, "worker-1") == []  # empty, not unknown
    ended = WorkerRecord("worker-1", "hive-1", "m", "job-1", b"{}")
    await registry.store.ingest([SourceBatch("hive-1/b", 0, 5, 0, [], [ended])])
    assert await registry.store.workers() == [ended]
    await registry.store.forget_worker("worker-1")
    assert await registry.store.workers() == []
    assert await whole_log(registry, "worker-1") == []


async def test_cursors_of_many_sources_are_found_at_once(registry: JobRegistry) -> None:
    names = [f"worker-{number}/stdout" for number in range(1500)]
    await registry.store.ingest([SourceBatch(name, 0, 1, 0, []) for name in names])
    assert len(await registry.store.cursors(names)) == 1500
    assert await registry.store.cursors([]) == {}
