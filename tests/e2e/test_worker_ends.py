"""How workers end: in order, crashed before an answer, crashed in the middle of one."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

from rbee.testing import LocalStack
from tests.e2e.reading import MODEL, actions, assert_whole, first, infer


async def test_stopped_worker_exits_with_zero_and_leaves_nothing(rbee_stack: LocalStack) -> None:
    """A worker that is stopped says goodbye, ends with 0, and is gone."""
    served = await rbee_stack.run_job(infer())
    ready = first(served, "worker_ready")
    worker_id, pid = ready["worker_id"], ready["fields"]["pid"]
    stopped = await rbee_stack.keeper("workers", "stop", worker_id)
    assert stopped.exit_code == 0, stopped.stderr
    assert pid not in rbee_stack.processes()
    exit_event = await _exit_of(rbee_stack, worker_id)
    assert exit_event["fields"]["exit_code"] == 0
    assert exit_event["actor"] == "hive"
    async with rbee_stack.client() as client:
        assert await client.workers() == []


async def test_worker_killed_in_the_last_attempt_fails_the_job_and_the_next_is_served(
    rbee_stack: LocalStack,
) -> None:
    """A crash in mid-answer: what was said stays, the end tells the signal and the last lines."""
    events: list[dict[str, Any]] = []
    async with asyncio.timeout(60), rbee_stack.client() as client:
        job_id = (await client.submit(infer(max_tokens=2000, ignore_eos=True, attempts=1))).job_id
        async for event in client.follow(job_id):
            events.append(event)
            if event["kind"] == "token" and event["tokens"] == 5:
                os.kill(first(events, "worker_ready")["fields"]["pid"], signal.SIGKILL)
    assert_whole(events)
    end = events[-1]
    assert (end["state"], end["reason"]) == ("failed", "worker_lost")
    assert end["error"]["signal"] == "SIGKILL"
    assert end["error"]["worker_id"] == first(events, "worker_ready")["worker_id"]
    assert end["error"]["last_lines"]
    assert first(events, "worker_exit")["fields"]["signal"] == "SIGKILL"
    assert actions(events)[-1] == "queen_failed"
    assert sum(event["kind"] == "token" for event in events) >= 5
    following = await rbee_stack.run_job(infer())
    assert following[-1]["state"] == "completed"


async def test_worker_killed_while_loading_fails_the_job_and_the_next_is_served(rbee_stack: LocalStack) -> None:
    """A crash before the answer: reported with its signal, and a new worker serves the next job."""
    events: list[dict[str, Any]] = []
    async with asyncio.timeout(60), rbee_stack.client() as client:
        job_id = (await client.submit(infer(attempts=1))).job_id
        async for event in client.follow(job_id):
            events.append(event)
            if event.get("action") == "worker_load_model":
                for pid in _worker_pids(rbee_stack):
                    os.kill(pid, signal.SIGKILL)
    assert_whole(events)
    end = events[-1]
    assert (end["state"], end["reason"]) == ("failed", "worker_failed")
    assert end["error"]["signal"] == "SIGKILL"
    assert first(events, "worker_exit")["fields"]["signal"] == "SIGKILL"
    following = await rbee_stack.run_job(infer())
    assert following[-1]["state"] == "completed"


async def test_worker_killed_while_loading_is_replaced(rbee_stack: LocalStack) -> None:
    """A crash before the answer begins: the job is placed again, and its log tells both starts."""
    killed = False
    events: list[dict[str, Any]] = []
    async with asyncio.timeout(60), rbee_stack.client() as client:
        job_id = (await client.submit(infer())).job_id
        async for event in client.follow(job_id):
            events.append(event)
            if event.get("action") == "worker_load_model" and not killed:
                killed = True
                for pid in _worker_pids(rbee_stack):
                    os.kill(pid, signal.SIGKILL)
    assert_whole(events)
    assert events[-1]["state"] == "completed"
    assert actions(events).count("worker_startup") == 2
    assert actions(events).count("worker_exit") == 1


async def test_corrupt_model_fails_the_job_with_the_cause(rbee_stack: LocalStack, tmp_path: Path) -> None:
    """A file that is no model: the job says so, and nothing is left running."""
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + b"\xff" * 5000)
    events = await rbee_stack.run_job(infer(model=str(path)))
    assert_whole(events)
    end = events[-1]
    assert (end["state"], end["reason"]) == ("failed", "model_invalid")
    assert end["error"]["retryable"] is False
    async with rbee_stack.client() as client:
        assert await client.workers() == []


async def test_missing_model_file_fails_the_job_with_the_path(rbee_stack: LocalStack) -> None:
    """A path with nothing there is told by its name."""
    events = await rbee_stack.run_job(infer(model="/nowhere/at/all.gguf"))
    end = events[-1]
    assert (end["state"], end["reason"]) == ("failed", "model_not_found")
    assert "/nowhere/at/all.gguf" in end["error"]["message"]


async def test_model_that_is_not_pulled_is_spawned_from_a_local_file(
    rbee_stack: LocalStack, rbee_models: Path
) -> None:
    """A path of a real model file is used in place."""
    path = next(rbee_models.glob("*/model.gguf"))
    events = await rbee_stack.run_job(infer(model=str(path), max_tokens=2))
    assert events[-1]["state"] == "completed"
    assert path.exists()
    spawned = await rbee_stack.keeper("workers", "spawn", MODEL)
    assert spawned.exit_code == 0, spawned.stderr


async def test_worker_is_stopped_when_its_last_job_no_longer_wants_it(rbee_stack: LocalStack) -> None:
    """A job's `keep_alive` of 0: the worker goes when the answer is given, in order."""
    served = await rbee_stack.run_job(infer(keep_alive=0))
    exit_event = await _exit_of(rbee_stack, first(served, "worker_ready")["worker_id"])
    assert exit_event["fields"]["exit_code"] == 0


async def test_device_that_is_not_there_is_named(rbee_stack: LocalStack) -> None:
    """A worker wanted on a device the hive does not have: refused, with those it has."""
    events = await rbee_stack.run_job({"operation": "worker_spawn", "model": MODEL, "device": "cuda:99"})
    assert (events[-1]["state"], events[-1]["reason"]) == ("failed", "invalid")
    assert "cpu" in events[-1]["error"]["message"]


async def _exit_of(stack: LocalStack, worker_id: str) -> dict[str, Any]:
    async with asyncio.timeout(30), stack.client() as client:
        async for event in client.follow_log(f"/v1/workers/{worker_id}/stream"):
            if event.get("action") == "worker_exit":
                return event
    raise AssertionError("the log ended")


def _worker_pids(stack: LocalStack) -> list[int]:
    found = []
    for pid in stack.processes():
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"llama-worker-rbee" in command:
            found.append(pid)
    return found
