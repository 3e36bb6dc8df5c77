"""Two models on a hive that may run one worker: the idle one makes room for the other, and nobody starves."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rbee.hive.models import ModelStore
from rbee.testing import LocalStack
from tests.e2e.reading import MODEL, actions, assert_whole, first, infer


@pytest.fixture
async def stack(rbee_models: Path) -> AsyncIterator[LocalStack]:
    """Return a stack whose hive may run one worker."""
    async with LocalStack(models=rbee_models, env={"RBEE_WORKERS_MAX": "1"}) as made:
        yield made


@pytest.fixture
def copy(rbee_models: Path, tmp_path: Path) -> str:
    """Return another model: a copy of the demo model's file, named by its path."""
    found = ModelStore(rbee_models).find(MODEL)
    assert found is not None
    return shutil.copyfile(found.path, tmp_path / "copy.gguf").as_posix()


async def test_idle_worker_makes_room_for_another_model_and_the_log_says_so(stack: LocalStack, copy: str) -> None:
    """The second job's log tells which worker went for it, and what it was."""
    before = await stack.run_job(infer())
    after = await stack.run_job(infer(model=copy))
    shown = await stack.keeper("jobs", "show", after[0]["job_id"])
    async with stack.client() as client:
        workers = await client.workers()
        stops = await client.jobs(operation="worker_stop")
    gone = first(before, "worker_ready")["worker_id"]
    assert_whole(after)
    assert after[-1]["state"] == "completed"
    assert actions(after)[:3] == ["queen_receive", "queen_evict", "queen_forward"]
    evict = first(after, "queen_evict")
    assert evict["fields"]["worker_id"] == gone
    assert f"stops {gone} (model {MODEL}, idle for" in evict["message"]
    assert evict["message"].endswith(f"to make room for {copy}.")
    assert f"room was made by stopping {gone}" in first(after, "queen_forward")["message"]
    assert first(after, "queen_forward")["message"] in shown.stdout
    assert [worker.model for worker in workers] == [copy]
    assert [(job.principal, job.state) for job in stops.data] == [("queen", "completed")]


async def test_jobs_for_both_models_at_once_all_end(stack: LocalStack, copy: str) -> None:
    """Each has its turn, whoever was there first, and no worker goes before it has answered."""
    models = [MODEL, copy] * 3
    logs = await asyncio.gather(*(stack.run_job(infer(model=model)) for model in models))
    assert [log[-1]["state"] for log in logs] == ["completed"] * len(models)
    for log in logs:
        assert_whole(log)
    assert sum("worker_ready" in actions(log) for log in logs) <= len(models)


async def test_reason_of_a_placement_stands_in_what_the_keeper_shows_of_a_job_that_runs(stack: LocalStack) -> None:
    """A running job's message is where it was placed and why."""
    async with stack.client() as client:
        job_id = (await client.submit(infer(max_tokens=3000, ignore_eos=True))).job_id
        async with asyncio.timeout(60):
            async for event in client.follow(job_id):
                if event["kind"] == "token":
                    break
        shown = await stack.keeper("jobs", "show", job_id)
        await client.cancel(job_id)
    assert shown.exit_code == 0
    assert f"which starts a worker: no worker has {MODEL} loaded, and hive-" in shown.stdout
