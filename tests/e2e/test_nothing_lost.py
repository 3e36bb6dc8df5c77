"""Answers go on when the hive, a worker or the whole stack around them dies, with the real model."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from rbee.testing import LocalStack
from tests.e2e.reading import actions, answer, assert_whole, first, infer

Do = Callable[[list[dict[str, Any]]], Awaitable[None]]
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "place",
        "schema": {
            "type": "object",
            "properties": {name: {"type": "string", "maxLength": 40} for name in ("river", "city", "country")},
            "required": ["river", "city", "country"],
        },
    },
}


async def disturbed(stack: LocalStack, operation: dict[str, Any], at: int, do: Do) -> list[dict[str, Any]]:
    """Run a job, disturb it once after so many pieces of its answer, and return its whole log."""
    events: list[dict[str, Any]] = []
    pieces = 0
    async with asyncio.timeout(90), stack.client() as client:
        job_id = (await client.submit(operation)).job_id
        async for event in client.follow(job_id):
            events.append(event)
            pieces += event["kind"] == "token"
            if pieces == at and event["kind"] == "token":
                await do(events)
    assert_whole(events)
    return events


async def test_killed_hive_adopts_its_worker_and_the_answer_goes_on_byte_for_byte(rbee_stack: LocalStack) -> None:
    """At temperature 0.9: one attempt, every piece once, the same process, which can be stopped afterwards."""

    async def kill_hive(events: list[dict[str, Any]]) -> None:
        assert rbee_stack.hive is not None
        rbee_stack.hive.signal(signal.SIGKILL)
        await rbee_stack.hive.wait()
        await rbee_stack.start_hive()

    operation = infer(max_tokens=300, ignore_eos=True, temperature=0.9)
    events = await disturbed(rbee_stack, operation, 40, kill_hive)

    end, closing = events[-1], first(events, "worker_inference")
    offsets = [event["src"]["offset"] for event in events if event["kind"] == "token"]
    assert (end["state"], end["result"]["attempts"]) == ("completed", 1)
    assert end["result"]["usage"]["completion_tokens"] == 300
    assert len(offsets) == closing["fields"]["frames"]
    assert offsets == sorted(set(offsets))
    assert end["result"]["text"] == answer(events)
    async with rbee_stack.client() as client:
        [worker] = await client.workers()
        hive_log = [e async for e in _until(client.follow_log(f"/v1/hives/{worker.hive_id}/stream"), "hive_adopt")]
    assert worker.pid == first(events, "worker_ready")["fields"]["pid"]
    assert hive_log[-1]["worker_id"] == worker.worker_id
    stopped = await rbee_stack.keeper("workers", "stop", worker.worker_id)
    assert stopped.exit_code == 0, stopped.stderr
    assert worker.pid not in rbee_stack.processes()


async def test_answer_whose_worker_is_killed_goes_on_on_another_in_the_same_log(rbee_stack: LocalStack) -> None:
    """The seam is told; tokens and prompt are counted once; what was said stays."""

    async def kill_worker(events: list[dict[str, Any]]) -> None:
        os.kill(first(events, "worker_ready")["fields"]["pid"], signal.SIGKILL)

    events = await disturbed(rbee_stack, infer(max_tokens=120, ignore_eos=True), 30, kill_worker)

    end, seam = events[-1], first(events, "queen_continue")
    assert (end["state"], end["result"]["attempts"]) == ("completed", 2)
    assert end["result"]["usage"]["completion_tokens"] == 120
    assert end["result"]["usage"]["prompt_tokens"] < 60
    assert end["result"]["text"] == answer(events)
    assert seam["fields"]["after_tokens"] >= 29  # the first piece has no text
    order = [name for name in actions(events) if name in ("worker_exit", "queen_continue", "worker_inference")]
    assert order == ["worker_exit", "queen_continue", "worker_inference"]
    assert {event["attempt"] for event in events if event["kind"] == "token"} == {1, 2}


async def test_answer_by_a_json_schema_is_still_one_after_its_worker_was_killed(rbee_stack: LocalStack) -> None:
    """The grammar goes on from the text so far."""

    async def kill_worker(events: list[dict[str, Any]]) -> None:
        os.kill(first(events, "worker_ready")["fields"]["pid"], signal.SIGKILL)

    operation = infer("Name a river, and a city on it.", max_tokens=200, response_format=SCHEMA, temperature=0)
    events = await disturbed(rbee_stack, operation, 12, kill_worker)

    assert events[-1]["result"]["attempts"] == 2
    assert set(json.loads(events[-1]["result"]["text"])) == {"river", "city", "country"}


async def test_job_whose_hive_dies_while_its_worker_loads_goes_on_with_that_worker(rbee_stack: LocalStack) -> None:
    """The hive's command goes on: one start, told once."""
    events: list[dict[str, Any]] = []
    async with asyncio.timeout(90), rbee_stack.client() as client:
        job_id = (await client.submit(infer())).job_id
        async for event in client.follow(job_id):
            events.append(event)
            if event.get("action") == "worker_load_model":
                assert rbee_stack.hive is not None
                rbee_stack.hive.signal(signal.SIGKILL)
                await rbee_stack.hive.wait()
                await rbee_stack.start_hive()
    assert_whole(events)
    assert events[-1]["state"] == "completed"
    assert events[-1]["result"]["attempts"] == 1
    assert actions(events).count("worker_startup") == 1


async def _until(events: Any, action: str) -> Any:
    async for event in events:
        yield event
        if event.get("action") == action:
            return
