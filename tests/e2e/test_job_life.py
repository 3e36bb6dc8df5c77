"""The life of a job through the real programs: cancel, timeout, queries, a queen that dies."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest

from rbee.errors import NotFoundError
from rbee.testing import LocalStack
from tests.e2e.reading import actions, answer, assert_whole, infer, states

LONG: dict[str, Any] = {"max_tokens": 3000, "ignore_eos": True}


async def test_running_job_is_cancelled_and_its_slot_is_free(rbee_stack: LocalStack) -> None:
    """A cancel stops the engine: the worker says so, the end follows, and the slot serves the next job."""
    events: list[dict[str, Any]] = []
    async with asyncio.timeout(60), rbee_stack.client() as client:
        job_id = (await client.submit(infer(**LONG))).job_id
        async for event in client.follow(job_id):
            events.append(event)
            if event["kind"] == "token" and event["tokens"] == 5:
                assert (await client.cancel(job_id)).state == "running"
        assert (await client.cancel(job_id)).state == "cancelled"
    assert_whole(events)
    assert states(events) == ["queued", "running", "cancelled"]
    assert events[-1]["reason"] == "user"
    assert actions(events)[-2:] == ["worker_inference", "queen_cancelled"]
    said = next(event for event in events if event.get("action") == "worker_inference")
    assert said["fields"]["outcome"] == "cancelled"
    async with rbee_stack.client() as client:
        assert [worker.slots_used for worker in await client.workers()] == [0]


async def test_queued_job_is_cancelled_at_once() -> None:
    """A job that waits for a hive is cancelled without ever running."""
    async with LocalStack(with_hive=False) as stack, stack.client() as client:
        job_id = (await client.submit(infer())).job_id
        view = await client.cancel(job_id)
        assert (view.state, view.reason) == ("cancelled", "user")
        events = await stack.log(job_id)
    assert_whole(events)
    assert states(events) == ["queued", "cancelled"]
    assert actions(events)[-1] == "queen_cancelled"


async def test_job_that_takes_too_long_fails_with_timeout(rbee_stack: LocalStack) -> None:
    """A deadline stops a running answer; what was said until then stays in the log."""
    await rbee_stack.run_job(infer())
    events = await rbee_stack.run_job(infer(timeout_s=1.0, **LONG))
    assert_whole(events)
    assert states(events) == ["queued", "running", "failed"]
    assert events[-1]["reason"] == "timeout"
    assert any(event["kind"] == "token" for event in events)


async def test_answer_survives_the_queen_that_was_killed_in_the_middle_of_it(rbee_stack: LocalStack) -> None:
    """The worker goes on, its file waits: the next queen has the whole answer, in the same attempt."""
    assert rbee_stack.queen is not None
    tokens = 300
    async with rbee_stack.client() as client:
        job_id = (await client.submit(infer(max_tokens=tokens, ignore_eos=True, temperature=0.9))).job_id
        async for event in client.follow(job_id):
            if event["kind"] == "token" and event["tokens"] == 20:
                break
    port = int(rbee_stack.url.rpartition(":")[2])
    rbee_stack.queen.signal(signal.SIGKILL)
    await rbee_stack.queen.wait()
    await rbee_stack.start_queen(port)
    events = await rbee_stack.log(job_id)
    assert_whole(events)
    assert states(events) == ["queued", "running", "completed"]
    assert actions(events)[-3:] == ["queen_resume", "worker_inference", "queen_complete"]
    assert events[-1]["result"]["usage"]["completion_tokens"] == tokens
    counted = [event["tokens"] for event in events if event["kind"] == "token"]
    assert counted == sorted(counted)
    assert counted[-1] == tokens
    offsets = [event["src"]["offset"] for event in events if event["kind"] == "token"]
    assert offsets == sorted(set(offsets))
    assert answer(events) == events[-1]["result"]["text"]
    following = await rbee_stack.run_job(infer())
    assert following[-1]["state"] == "completed"


async def test_answer_of_a_killed_queen_is_cancelled_by_the_next(rbee_stack: LocalStack) -> None:
    """A job taken over can be cancelled like any other: the worker stops and the slot is free."""
    assert rbee_stack.queen is not None
    async with rbee_stack.client() as client:
        job_id = (await client.submit(infer(**LONG))).job_id
        async for event in client.follow(job_id):
            if event["kind"] == "token":
                break
    port = int(rbee_stack.url.rpartition(":")[2])
    rbee_stack.queen.signal(signal.SIGKILL)
    await rbee_stack.queen.wait()
    await rbee_stack.start_queen(port)
    await rbee_stack.until_hive_is_live()
    async with rbee_stack.client() as client:
        await client.cancel(job_id)
    events = await rbee_stack.log(job_id)
    assert_whole(events)
    assert (events[-1]["state"], events[-1]["reason"]) == ("cancelled", "user")
    assert actions(events)[-2:] == ["worker_inference", "queen_cancelled"]


async def test_jobs_are_found_by_state_operation_and_page() -> None:
    """Lists are filtered and paged, newest first."""
    async with LocalStack(with_hive=False) as stack, stack.client() as client:
        checks = [(await client.submit({"operation": "queen_check", "lines": 1})).job_id for _ in range(5)]
        for job_id in checks:
            await stack.log(job_id)
        waiting = (await client.submit(infer())).job_id
        found = await client.jobs(state="completed", limit=3)
        assert [job.job_id for job in found.data] == checks[:1:-1]
        rest = await client.jobs(state="completed", limit=3, cursor=found.next)
        assert [job.job_id for job in rest.data] == checks[1::-1]
        assert rest.next is None
        queued = await client.jobs(operation="infer", state="queued")
        assert [job.job_id for job in queued.data] == [waiting]
        assert queued.data[0].queue_position == 1
        with pytest.raises(NotFoundError):
            await client.job("job-00000000000000000000000000")
