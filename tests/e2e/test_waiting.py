"""Waiting for a slot: how many go first is told, and nobody waits longer than was asked for."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from rbee.testing import LocalStack
from rbee.testing.counting import Count, write_model, write_programs
from tests.e2e.reading import Event, actions, assert_whole, first, states


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[LocalStack]:
    """Return a stack whose workers count, one answer at a time."""
    write_programs(tmp_path / "bin")
    settings = {"RBEE_SLOTS": "1", "RBEE_QUEUED_MAX": "3", "RBEE_STOP_GRACE_S": "1"}
    async with LocalStack(programs=tmp_path / "bin", env=settings) as made:
        yield made


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Return a model of the counting workers."""
    return str(write_model(tmp_path / "counting.gguf"))


def count(model: str, last: int, *, rate: float = 1000, **fields: Any) -> dict[str, Any]:
    """Make the operation that asks for a count."""
    return {"operation": "infer", "model": model, "prompt": str(Count(last=last, rate=rate)), **fields}


async def follow_until(stack: LocalStack, job_id: str, action: str) -> None:
    """Wait until a job's log says something."""
    async with asyncio.timeout(60), stack.client() as client:
        async for event in client.follow(job_id):
            if action in (event["kind"], event.get("action")):
                return


def told(events: list[Event]) -> list[tuple[str, int]]:
    """Return what a log says about its wait, and the positions."""
    return [
        (event["message"], event["fields"]["queue_position"])
        for event in events
        if event.get("action") == "queen_wait"
    ]


async def test_job_is_told_how_many_go_first_until_its_turn_comes(stack: LocalStack, model: str) -> None:
    """The keeper shows it; the log says each number once; the view says the same."""
    async with stack.client() as client:
        blocking = (await client.submit(count(model, 10**6, rate=10))).job_id
        await follow_until(stack, blocking, "token")
        following = (await client.submit(count(model, 10**6, rate=10))).job_id
        await follow_until(stack, following, "queen_wait")
        prompt = str(Count(last=5, rate=1000))
        async with stack.keeper_process("infer", "--model", model, prompt) as keeper:
            assert keeper.stderr is not None
            lines: list[str] = []
            async with asyncio.timeout(60):
                async for line in keeper.stderr:
                    lines.append(line.decode())
                    if "1 job goes first." in lines[-1]:
                        waiting = (await client.jobs(state="queued")).data
                        await client.cancel(blocking)
                    elif "this job is next" in lines[-1]:
                        await client.cancel(following)
                await keeper.wait()
        events = await stack.log(waiting[0].job_id)
    assert [job.queue_position for job in waiting] == [2, 1]
    assert keeper.returncode == 0
    worker_id = first(events, "worker_inference")["worker_id"]
    assert told(events) == [
        (f"Waiting for {model}: 1 job goes first.", 2),
        (f"Waiting for {model}: this job is next; the one slot of {worker_id} is taken.", 1),
    ]
    assert_whole(events)


async def test_job_that_waits_too_long_ends_with_queue_timeout_also_when_no_queen_was_there(
    stack: LocalStack, model: str
) -> None:
    """The keeper is told and exits with 1; the next queen ends what passed its time while there was none."""
    assert stack.queen is not None
    async with stack.client() as client:
        blocking = (await client.submit(count(model, 10**6, rate=10))).job_id
        await follow_until(stack, blocking, "token")
        ran = await stack.keeper("infer", "--model", model, "--queue-timeout", "0.5", "Count from 1 to 2.")
        assert ran.exit_code == 1
        assert "The job still waited for its place after 0.5 s." in ran.stderr
        late = (await client.submit(count(model, 2, queue_timeout_s=1.0))).job_id
        ended_at = (await client.job(late)).created_at.timestamp() + 1.0
        stack.queen.signal(signal.SIGKILL)
        await stack.queen.wait()
        await stack.until(lambda: time.time() > ended_at)
        await stack.restart_queen()
        events = await stack.log(late)
        assert (await client.cancel(blocking)).state == "running"
    assert states(events) == ["queued", "failed"]
    assert (events[-1]["reason"], events[-1]["error"]["code"]) == ("queue_timeout", "queue_timeout")


async def test_full_queue_refuses_and_says_how_many_wait(stack: LocalStack, model: str) -> None:
    """The keeper shows the queen's sentence and exits with 1."""
    async with stack.client() as client:
        blocking = (await client.submit(count(model, 10**6, rate=10))).job_id
        await follow_until(stack, blocking, "token")
        for _ in range(3):
            await client.submit(count(model, 2))
        ran = await stack.keeper("infer", "--model", model, "Count from 1 to 2.")
        await client.cancel(blocking)
    assert ran.exit_code == 1
    assert "3 jobs are waiting already, as many as may (3)." in ran.stderr


async def test_answer_that_stands_still_ends_as_stalled_and_frees_its_slot(stack: LocalStack, model: str) -> None:
    """The engine is stopped: its one slot serves the next job."""
    silent = count(model, 100, idle_timeout_s=0.5) | {"prompt": str(Count(rate=1000, acts={3: "silence"}))}
    stalled = await stack.run_job(silent)
    after = await stack.run_job(count(model, 3))
    assert actions(stalled)[-2:] == ["worker_inference", "queen_failed"]
    assert (stalled[-1]["reason"], stalled[-1]["message"]) == (
        "stalled",
        "The worker said no further token for 0.5 s.",
    )
    assert after[-1]["state"] == "completed"


async def test_call_that_does_not_stream_and_stands_still_is_answered_as_stalled(
    stack: LocalStack, model: str
) -> None:
    """An engine says nothing more: its caller hears of it, and the slot serves an answer that is only slow."""
    url = f"{stack.url}/v1/chat/completions"
    async with asyncio.timeout(60), aiohttp.ClientSession() as session:
        asked = {"model": model, "idle_timeout_s": 0.5}
        prompt = str(Count(rate=1000, acts={3: "silence"}))
        async with session.post(url, json=asked | {"messages": [{"role": "user", "content": prompt}]}) as response:
            error = (await response.json())["error"]
        slow = str(Count(last=15, rate=5))
        async with session.post(url, json=asked | {"messages": [{"role": "user", "content": slow}]}) as response:
            answer = await response.json()
    assert (error["code"], error["message"]) == ("stalled", "The worker said no further token for 0.5 s.")
    assert answer["choices"][0]["message"]["content"] == " ".join(map(str, range(1, 16)))


async def test_answer_of_a_worker_that_stands_still_fails_for_want_of_its_first_token(
    stack: LocalStack, model: str
) -> None:
    """It does not even take the request, and is replaced for the next job."""
    await stack.run_job(count(model, 3))
    async with stack.client() as client:
        [worker] = await client.workers()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)
    late = await stack.run_job(count(model, 100, first_token_timeout_s=0.5))
    after = await stack.run_job(count(model, 3))
    assert states(late) == ["queued", "running", "failed"]
    assert (late[-1]["reason"], late[-1]["message"]) == (
        "first_token_timeout",
        "The worker said no first token within 0.5 s.",
    )
    assert after[-1]["state"] == "completed"
    assert first(after, "worker_inference")["worker_id"] != worker.worker_id
