"""A cancel reaches the engine, whoever is killed before it has done so."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from rbee.client import JobClient
from rbee.processes import find_marked
from rbee.testing import LocalStack
from rbee.testing.counting import Count, answer_of, write_model, write_programs
from rbee.testing.oracles import Told, assert_all
from rbee.testing.reader import LogReader
from tests.e2e.reading import MODEL, actions, assert_whole, first, infer, states

WITHIN_S = 2.0
PROMPT_WORDS = 1800  # four batches of the engine
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@pytest.fixture
async def counting(tmp_path: Path) -> AsyncIterator[LocalStack]:
    """Return a stack whose workers count, one answer at a time."""
    write_programs(tmp_path / "bin")
    async with LocalStack(programs=tmp_path / "bin", env={"RBEE_SLOTS": "1"}) as stack:
        yield stack


@pytest.fixture
def count_model(tmp_path: Path) -> str:
    """Return a model of the counting workers."""
    return str(write_model(tmp_path / "counting.gguf"))


def count(model: str, counted: Count, **fields: Any) -> dict[str, Any]:
    """Make the operation that asks for a count."""
    return {"operation": "infer", "model": model, "prompt": str(counted), **fields}


async def has_said(client: JobClient, job_id: str, tokens: int) -> str:
    """Wait until so many tokens of an answer are there; returns its worker."""
    async with asyncio.timeout(60):
        async for event in client.follow(job_id):
            if event["kind"] == "token" and event["tokens"] >= tokens:
                break
    worker_id = (await client.job(job_id)).worker_id
    assert worker_id is not None
    return worker_id


def worker_process(worker_id: str) -> int:
    """Return the number of a worker's own process: the oldest one that is its program."""
    found = [
        pid
        for pid, _ in sorted(find_marked("RBEE_WORKER_ID", worker_id), key=lambda one: one[1])
        if b"llama-worker-rbee" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return found[0]


def computed_s(pid: int) -> float:
    """Return how long a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


async def assert_slots_are_free(stack: LocalStack) -> None:
    """Check that nothing is placed on any worker."""
    async with stack.client() as client:
        assert [worker.slots_used for worker in await client.workers()] == [0]


async def test_cancel_reaches_the_engine_within_one_token(counting: LocalStack, count_model: str) -> None:
    """At five tokens a second the answer stops at once, and its slot is free when its log ends."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(60), counting.client() as client:
        job_id = (await client.submit(count(count_model, Count(rate=5)))).job_id
        events, cancelled_at = [], 0.0
        async for event in client.follow(job_id):
            events.append(event)
            if event["kind"] == "token" and event["tokens"] == 3:
                cancelled_at = loop.time()
                await client.cancel(job_id)
        took_s = loop.time() - cancelled_at
        await assert_slots_are_free(counting)
        ended = await client.cancel(job_id)
    assert_whole(events)
    assert (events[-1]["state"], ended.state) == ("cancelled", "cancelled")
    assert took_s < WITHIN_S
    assert len([event for event in events if event["kind"] == "token"]) <= 4


async def test_cancel_in_a_long_prompt_reaches_the_engine_within_one_batch(rbee_stack: LocalStack) -> None:
    """The one slot answers the next job long before the prompt would have been read."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(240), rbee_stack.client() as client:
        spawned = await rbee_stack.run_job({"operation": "worker_spawn", "model": MODEL, "slots": 1})
        pid = worker_process(spawned[-1]["result"]["worker_id"])
        before_s = computed_s(pid)
        job_id = (await client.submit(infer("other " * PROMPT_WORDS))).job_id
        await rbee_stack.until(lambda: computed_s(pid) > before_s + 0.5)
        cancelled_at = loop.time()
        await client.cancel(job_id)
        events = await rbee_stack.log(job_id)
        ended_s = loop.time() - cancelled_at
        next_one = await rbee_stack.run_job(infer("Hi", max_tokens=1))
        next_s = loop.time() - cancelled_at
        whole_at = loop.time()
        whole = await rbee_stack.run_job(infer("word " * PROMPT_WORDS, max_tokens=1))
        whole_s = loop.time() - whole_at
    assert states(events) == ["queued", "running", "cancelled"]
    assert first(events, "worker_inference")["fields"]["outcome"] == "cancelled"
    assert ended_s < WITHIN_S
    assert (next_one[-1]["state"], whole[-1]["state"]) == ("completed", "completed")
    assert next_s < whole_s / 2


async def test_cancel_that_nobody_carried_out_before_the_queen_was_killed_is_carried_out_by_the_next(
    counting: LocalStack, count_model: str
) -> None:
    """The worker stands still and cannot hear; the mark is on disk, and the next queen has its one slot freed."""
    assert counting.queen is not None
    async with asyncio.timeout(60), counting.client() as client:
        job_id = (await client.submit(count(count_model, Count(rate=20)))).job_id
        pid = worker_process(await has_said(client, job_id, 3))
        os.kill(pid, signal.SIGSTOP)
        assert (await client.cancel(job_id)).state == "running"
        counting.queen.signal(signal.SIGKILL)
        await counting.queen.wait()
        os.kill(pid, signal.SIGCONT)
        await counting.restart_queen()
        events = await counting.log(job_id)
        following = await counting.run_job(count(count_model, Count(last=5)))
        await assert_slots_are_free(counting)
        assert worker_process((await client.job(following[0]["job_id"])).worker_id or "") == pid
    assert_whole(events)
    assert states(events) == ["queued", "running", "cancelled"]
    assert "queen_resume" in actions(events)
    assert actions(events)[-1] == "queen_cancelled"
    assert following[-1]["state"] == "completed"


async def test_cancel_while_the_hive_is_dead_stops_the_worker_and_its_slot_serves_the_next_job(
    counting: LocalStack, count_model: str
) -> None:
    """Nobody waits for a hive that cannot bring the last line; the worker was told by the queen herself."""
    assert counting.hive is not None
    async with asyncio.timeout(90), counting.client() as client:
        job_id = (await client.submit(count(count_model, Count(rate=20)))).job_id
        worker_id = await has_said(client, job_id, 3)
        counting.hive.signal(signal.SIGKILL)
        await counting.hive.wait()
        await client.cancel(job_id)
        events = await counting.log(job_id)
        await counting.start_hive()
        following = await counting.run_job(count(count_model, Count(last=5)))
        assert first(following, "worker_inference")["worker_id"] == worker_id
        await assert_slots_are_free(counting)
    assert_whole(events)
    assert states(events) == ["queued", "running", "cancelled"]
    assert following[-1]["result"]["text"] == answer_of(Count(last=5))


async def test_cancel_and_end_at_the_same_time_are_one_end(counting: LocalStack, count_model: str) -> None:
    """Twenty answers of twenty tokens, each cancelled somewhere about its end: log, view and answer agree."""
    dice = random.Random(7)
    asked = Count(last=20, rate=100)
    async with asyncio.timeout(90), counting.client() as client:

        async def race() -> Told:
            job_id = (await client.submit(count(count_model, asked))).job_id
            await has_said(client, job_id, dice.randrange(15, 21))
            views = await asyncio.gather(*(client.cancel(job_id) for _ in range(3)))
            reader = LogReader(job_id)
            await reader.follow(client.base_url)
            told = [reader.events[seq] for seq in sorted(reader.events)]
            view = await client.job(job_id)
            assert {one.state for one in views} <= {"running", view.state}
            return Told(right=answer_of(asked), canary="", view=view, log=told)

        await counting.run_job(count(count_model, Count(last=1)))
        told = await asyncio.gather(*(race() for _ in range(20)))
        await assert_slots_are_free(counting)
    assert_all(told, [])
    assert {one.view.state for one in told} == {"completed", "cancelled"}


async def test_call_that_does_not_stream_is_stopped_by_the_cancel_of_its_job(rbee_stack: LocalStack) -> None:
    """The engine stops, the slot is free, and the client is told in a way that it does not call again."""
    loop = asyncio.get_running_loop()
    await rbee_stack.run_job(infer(max_tokens=1))
    async with (
        asyncio.timeout(60),
        rbee_stack.client() as client,
        openai.AsyncOpenAI(base_url=f"{rbee_stack.url}/v1", api_key="none") as caller,
    ):
        calling = asyncio.ensure_future(
            caller.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Tell a long story."}],
                max_tokens=3000,
                extra_body={"ignore_eos": True},
            )
        )
        while not (running := (await client.jobs(operation="chat_completion", state="running")).data):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        cancelled_at = loop.time()
        await client.cancel(running[0].job_id)
        events = await rbee_stack.log(running[0].job_id)
        ended_s = loop.time() - cancelled_at
        with pytest.raises(openai.BadRequestError) as refused:
            await calling
        calls = (await client.jobs(operation="chat_completion")).data
        await assert_slots_are_free(rbee_stack)
    assert refused.value.code == "cancelled"
    assert len(calls) == 1
    assert states(events) == ["queued", "running", "cancelled"]
    assert first(events, "worker_inference")["fields"]["outcome"] == "cancelled"
    assert ended_s < WITHIN_S
