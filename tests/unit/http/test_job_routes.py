"""The job routes over a real socket: submit, list, show, cancel, page."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from rbee.contracts.ids import new_id
from rbee.contracts.operations import QueenCheck
from rbee.contracts.states import JobState, Reason
from rbee.jobs import RunningJob
from tests.unit.http.http_stage import Stage
from tests.unit.jobs.job_stage import end, new_job, told, whole_log


async def submit(stage: Stage, body: Any, **headers: str) -> Any:
    return await stage.client.post(stage.url + "/v1/jobs", json=body, headers=headers)


async def test_submit_answers_202_with_where_to_look(stage: Stage) -> None:
    response = await submit(stage, {"operation": "queen_check"}, **{"x-correlation-id": "c-7"})
    answer = await response.json()
    job_id = answer["job_id"]
    assert response.status == 202
    assert answer == {
        "job_id": job_id,
        "state": "queued",
        "stream_url": f"/v1/jobs/{job_id}/stream",
        "correlation_id": "c-7",
    }
    assert (response.headers["x-job-id"], response.headers["location"]) == (job_id, f"/v1/jobs/{job_id}")


async def test_submit_again_with_the_same_key_is_the_same_job(stage: Stage) -> None:
    answers = [await submit(stage, {"operation": "queen_check"}, **{"idempotency-key": "k"}) for _ in range(2)]
    assert len({(await answer.json())["job_id"] for answer in answers}) == 1
    other = await submit(stage, {"operation": "queen_check", "lines": 9}, **{"idempotency-key": "k"})
    assert (other.status, (await other.json())["error"]["code"]) == (409, "conflict")


async def test_submit_to_a_full_queue_is_told_when_to_come_again(stage: Stage) -> None:
    stage.registry.queued_max = 1
    assert (await submit(stage, {"operation": "queen_check"})).status == 202
    refused = await submit(stage, {"operation": "queen_check"})
    error = (await refused.json())["error"]
    assert (refused.status, refused.headers["retry-after"]) == (429, "5")
    assert (error["code"], error["retryable"]) == ("overloaded", True)


async def test_submit_of_what_is_wrong_makes_no_job(stage: Stage) -> None:
    refused = await submit(stage, {"operation": "queen_chek"})
    assert (refused.status, (await refused.json())["error"]["param"]) == (400, "operation")
    assert await stage.registry.store.counts() == dict.fromkeys(JobState, 0)


async def test_job_is_shown_without_what_was_asked(stage: Stage) -> None:
    accepted = await (await submit(stage, {"operation": "infer", "prompt": "canary"})).json()
    async with stage.get(f"/v1/jobs/{accepted['job_id']}") as response:
        text = await response.text()
    assert "canary" not in text
    assert list(json.loads(text)) == [
        *("job_id", "operation", "state", "reason", "message", "phase", "queue_position", "progress", "attempt"),
        *("model", "hive_id", "worker_id", "principal", "parent_job_id", "correlation_id", "created_at"),
        *("started_at", "ended_at", "last_seq", "result", "error", "labels", "stream_url"),
    ]


async def test_cancel_is_200_for_queued_and_ended_jobs_and_202_for_running_ones(stage: Stage) -> None:
    queued, ended, running = [await new_job(stage.registry) for _ in range(3)]
    before = await end(stage.registry, ended.job_id, JobState.FAILED, reason=Reason.INVALID)
    begun = asyncio.Event()

    async def handler(job: RunningJob) -> None:
        await job.start()
        begun.set()
        await asyncio.Event().wait()

    task = stage.runner.launch(running, QueenCheck(), handler).task
    assert task is not None
    await begun.wait()
    states = []
    for record in (queued, ended, running):
        async with stage.client.delete(f"{stage.url}/v1/jobs/{record.job_id}") as response:
            states.append((response.status, (await response.json())["state"]))
    await task
    assert states == [(200, "cancelled"), (200, "failed"), (202, "running")]
    assert await stage.registry.get(ended.job_id) == before
    assert (await stage.registry.get(running.job_id)).state is JobState.CANCELLED
    async with stage.client.delete(f"{stage.url}/v1/jobs/job-x") as response:
        assert response.status == 404


async def test_list_pages_to_the_end_by_its_cursor(stage: Stage) -> None:
    made = [(await new_job(stage.registry, job_id=f"job-{number}")).job_id for number in range(5)]
    seen: list[str] = []
    params = {"limit": "2"}
    while True:
        async with stage.get("/v1/jobs", params=params) as response:
            page = await response.json()
        seen += [job["job_id"] for job in page["data"]]
        if page["next"] is None:
            break
        params["cursor"] = page["next"]
    assert seen == made[::-1]


async def test_list_filters_by_state_and_time(stage: Stage) -> None:
    ids = sorted(new_id("job") for _ in range(2))
    for job_id in ids:
        await new_job(stage.registry, job_id=job_id)
    await end(stage.registry, ids[0], JobState.CANCELLED)

    async def found(**params: str) -> list[str]:
        async with stage.get("/v1/jobs", params=params) as response:
            assert response.status == 200
            return [job["job_id"] for job in (await response.json())["data"]]

    assert await found(state="queued") == [ids[1]]
    assert await found(since="2020-01-01T00:00:00Z", until="2999-01-01T00:00:00+01:00") == ids[::-1]
    assert await found(since="2999-01-01T00:00:00Z") == []
    assert await found(correlation_id="nobody") == []


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stat": "queued"}, "Unknown filter `stat` (did you mean `state`?)."),
        ({"state": "done"}, "`state` must be one of queued, running, completed, failed, cancelled."),
        ({"limit": "0"}, "`limit` must be a whole number from 1 to 500."),
        ({"since": "yesterday"}, "`since` must be a time such as 2026-01-31T12:00:00Z."),
        ({"until": "2026-01-31T12:00:00"}, "`until` must be a time such as 2026-01-31T12:00:00Z."),
    ],
)
async def test_list_with_a_wrong_filter_is_refused(stage: Stage, params: dict[str, str], message: str) -> None:
    async with stage.get("/v1/jobs", params=params) as response:
        assert response.status == 400
        assert (await response.json())["error"]["message"] == message


async def test_log_is_paged_by_number(stage: Stage) -> None:
    record = await new_job(stage.registry, events=[told(str(number)) for number in range(9)])
    log = [json.loads(event) for event in await whole_log(stage.registry, record.job_id)]
    seen: list[Any] = []
    params = {"limit": "4"}
    while True:
        async with stage.get(f"/v1/jobs/{record.job_id}/events", params=params) as response:
            page = await response.json()
        seen += page["data"]
        if page["next"] is None:
            break
        params["after"] = page["next"]
    assert seen == log
    async with stage.get(f"/v1/jobs/{record.job_id}/events", headers={"last-event-id": "8"}) as response:
        assert (await response.json())["data"] == log[8:]


async def test_log_that_was_erased_is_gone_and_one_of_another_kind_is_not_found(stage: Stage) -> None:
    record = await new_job(stage.registry, store=False)
    await end(stage.registry, record.job_id, JobState.CANCELLED)
    await stage.registry.append("worker-1", [told("x")])
    for path, status in (
        (f"/v1/jobs/{record.job_id}/events", 410),
        (f"/v1/jobs/{record.job_id}/stream", 410),
        ("/v1/jobs/worker-1/events", 404),
        ("/v1/jobs/worker-1/stream", 404),
        ("/v1/workers/worker-2/stream", 404),
        (f"/v1/workers/{record.job_id}/events", 404),
        ("/v1/workers/worker-1/events", 200),
    ):
        async with stage.get(path) as response:
            assert (path, response.status) == (path, status)


async def test_forgotten_job_is_gone_and_one_that_never_was_is_not_found(stage: Stage) -> None:
    record = await new_job(stage.registry)
    await end(stage.registry, record.job_id, JobState.CANCELLED)
    assert (await stage.registry.store.forget(lambda held: "days")).jobs == {"days": 1}
    for job_id, status in ((record.job_id, 410), (f"job-{'7' * 26}", 404), ("job-1", 404)):
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events"), ("GET", "/stream")):
            async with stage.client.request(method, f"{stage.url}/v1/jobs/{job_id}{path}") as response:
                assert (job_id, path, response.status) == (job_id, path, status)
                error = (await response.json())["error"]
                assert ("is no longer kept." in error["message"]) == (status == 410)
