"""The client's calls: what is sent, what is made of the answers."""

from __future__ import annotations

import socket
from typing import Any

import msgspec
import pytest

from rbee.client import JobClient
from rbee.contracts.operations import Infer
from rbee.errors import (
    ConfigurationError,
    ContextExceededError,
    InternalError,
    ModelNotFoundError,
    OverloadedError,
    RbeeError,
    UnavailableError,
)
from tests.unit.client.scripted_queen import Turn, answer, frame, refusal, scripted_queen, stream

ACCEPTED = {
    "job_id": "job-1",
    "state": "queued",
    "stream_url": "/v1/jobs/job-1/stream",
    "correlation_id": "c-1",
}
JOB: dict[str, Any] = {
    **dict.fromkeys(("reason", "message", "phase", "queue_position", "progress", "model", "error")),
    **dict.fromkeys(("hive_id", "worker_id", "parent_job_id", "started_at", "ended_at", "result")),
    "job_id": "job-1",
    "operation": "infer",
    "state": "queued",
    "attempt": 0,
    "principal": "local",
    "correlation_id": "c-1",
    "created_at": "2026-01-01T00:00:00Z",
    "last_seq": 1,
    "labels": {},
    "stream_url": "/v1/jobs/job-1/stream",
}


async def test_submit_sends_operation_ids_and_credential() -> None:
    """A struct goes out as the wire has it, with its headers."""
    async with (
        scripted_queen(answer(202, ACCEPTED)) as queen,
        JobClient(queen.url + "/", api_key="k", correlation_id="c-1") as client,
    ):
        accepted = await client.submit(Infer(prompt="hi", max_tokens=3), idempotency_key="once")
    request = queen.requests[0]
    assert accepted.job_id == "job-1"
    assert (request.method, request.path) == ("POST", "/v1/jobs")
    assert msgspec.json.decode(queen.bodies[0]) == {"operation": "infer", "prompt": "hi", "max_tokens": 3}
    assert {
        name: request.headers[name]
        for name in ("authorization", "x-correlation-id", "idempotency-key", "content-type")
    } == {
        "authorization": "Bearer k",
        "x-correlation-id": "c-1",
        "idempotency-key": "once",
        "content-type": "application/json",
    }


async def test_submit_takes_a_plain_mapping() -> None:
    """Whoever has JSON already need not build a struct."""
    async with scripted_queen(answer(202, ACCEPTED)) as queen, JobClient(queen.url) as client:
        await client.submit({"operation": "queen_check", "lines": 1})
    assert msgspec.json.decode(queen.bodies[0]) == {"operation": "queen_check", "lines": 1}


async def test_follow_yields_a_jobs_events() -> None:
    """Across a cut connection, to the end."""
    turns = stream(frame(1), cut=True), stream(frame(2, "end", state="completed"))
    async with scripted_queen(*turns) as queen, JobClient(queen.url) as client:
        seen = [event["seq"] async for event in client.follow("job-1")]
    assert seen == [1, 2]
    assert [request.path for request in queen.requests] == ["/v1/jobs/job-1/stream"] * 2


async def test_jobs_sends_the_filters_that_are_given() -> None:
    """What is None is left out."""
    async with (
        scripted_queen(answer(200, {"data": [JOB], "next": "n"})) as queen,
        JobClient(queen.url) as client,
    ):
        page = await client.jobs(state="queued", model=None, limit=5)
    assert queen.requests[0].query_string == "state=queued&limit=5"
    assert (page.data[0].job_id, page.next) == ("job-1", "n")


async def test_cancel_deletes_the_job() -> None:
    """The view comes back, whichever status it has."""
    async with scripted_queen(answer(202, JOB | {"state": "running"})) as queen, JobClient(queen.url) as client:
        job = await client.cancel("job-1")
    assert (queen.requests[0].method, queen.requests[0].path, job.state) == (
        "DELETE",
        "/v1/jobs/job-1",
        "running",
    )


async def test_job_id_from_a_person_stays_one_segment() -> None:
    """Slashes and dots do not lead to another route."""
    async with scripted_queen(answer(200, JOB)) as queen, JobClient(queen.url) as client:
        await client.job("../status?x")
    assert queen.requests[0].raw_path == "/v1/jobs/..%2Fstatus%3Fx"


@pytest.mark.parametrize(
    ("turn", "expected", "message"),
    [
        (refusal(404, "model_not_found", "Unknown."), ModelNotFoundError, "Unknown."),
        (refusal(400, "context_length_exceeded", "Long."), ContextExceededError, "Long."),
        (refusal(429, "of_a_later_version", "Full."), OverloadedError, "Full."),
        (refusal(500, "of_a_later_version", "Odd."), InternalError, "Odd."),
        (answer(502), UnavailableError, "answered 502, without saying why"),
        (answer(307, headers={"Location": "/elsewhere"}), InternalError, "answered 307"),
        (answer(200, {"no": "job"}), InternalError, "something else than was expected"),
    ],
)
async def test_refusal_becomes_the_error_of_its_code(turn: Turn, expected: type[RbeeError], message: str) -> None:
    """Code first, then status; what is not ours is said to be so."""
    async with scripted_queen(turn) as queen, JobClient(queen.url) as client:
        with pytest.raises(expected, match=message) as raised:
            await client.job("job-1")
    assert type(raised.value) is expected


async def test_error_keeps_what_the_server_said_with_it() -> None:
    """Remedy, parameter, code, retryable, Retry-After and ids."""
    error = {
        "message": "Full.",
        "type": "rate_limit_error",
        "code": "overloaded",
        "param": "model",
        "retryable": True,
        "remedy": "Wait.",
    }
    turn = answer(429, {"error": error, "job_id": "job-9", "correlation_id": "c"}, {"Retry-After": "7"})
    async with scripted_queen(turn) as queen, JobClient(queen.url) as client:
        with pytest.raises(OverloadedError) as raised:
            await client.status()
    said = raised.value
    assert (said.message, said.remedy, said.param, said.code) == ("Full.", "Wait.", "model", "overloaded")
    assert (said.retryable, said.retry_after_s) == (True, 7.0)
    assert said.details == {"job_id": "job-9", "correlation_id": "c"}


async def test_refused_connection_names_the_address() -> None:
    """Nobody listens there."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        async with JobClient(url) as client:
            with pytest.raises(UnavailableError, match=f"at {url} cannot be reached: Connection refused"):
                await client.status()


async def test_silent_server_is_unavailable() -> None:
    """Only silence is a timeout."""
    async with scripted_queen(stream(hold=True)) as queen, JobClient(queen.url, idle_s=0.2) as client:
        with pytest.raises(UnavailableError, match="did not answer in time"):
            await client.status()


@pytest.mark.parametrize("url", ["", "127.0.0.1:8500", "ftp://x", "http://", "http://x:99999", "http://x:y"])
def test_address_that_is_none_is_refused(url: str) -> None:
    """With the form it should have."""
    with pytest.raises(ConfigurationError, match="not the address of a queen"):
        JobClient(url)


async def test_client_outside_its_context_says_so() -> None:
    """There is no session yet."""
    with pytest.raises(InternalError, match="async with"):
        await JobClient("http://127.0.0.1:1").status()
