"""A queen that goes away and comes back: what is asked again, where, and for how long."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack
from typing import Any

import pytest

from rbee.client import JobClient
from rbee.errors import NotFoundError, OverloadedError, UnavailableError
from tests.unit.client.scripted_queen import (
    Turn,
    answer,
    broken,
    frame,
    refusal,
    scripted_queen,
    stream,
)
from tests.unit.client.test_job_client import ACCEPTED, JOB

CHECK = {"operation": "queen_check"}
END = frame(4, "end", state="completed", reason="ok")
NOT_READY = refusal(503, "unavailable", retryable=True)


async def submitted(*turns: Turn, key: str | None = None, **options: Any) -> tuple[str, list[str], list[bytes]]:
    """Submit a job; return the answered job, and the keys and bodies that were sent."""
    async with scripted_queen(*turns) as queen, JobClient(queen.url, **options) as client:
        job_id = (await client.submit(CHECK, idempotency_key=key)).job_id
        return job_id, [request.headers["Idempotency-Key"] for request in queen.requests], queen.bodies


async def test_submit_is_repeated_with_the_key_it_made() -> None:
    """However often the connection breaks, the queen can tell that it is one job."""
    job_id, keys, bodies = await submitted(broken(), broken(), answer(202, ACCEPTED))
    assert job_id == "job-1"
    assert len(keys) == 3
    assert len(set(keys)) == 1
    assert len(keys[0]) == 36
    assert len(set(bodies)) == 1


async def test_two_submits_are_two_jobs() -> None:
    """Each has a key of its own."""
    async with scripted_queen(answer(202, ACCEPTED)) as queen, JobClient(queen.url) as client:
        await client.submit(CHECK)
        await client.submit(CHECK)
    first, second = (request.headers["Idempotency-Key"] for request in queen.requests)
    assert first != second


async def test_submit_keeps_a_key_that_was_given() -> None:
    """Across repetitions too."""
    _, keys, _ = await submitted(broken(), answer(202, ACCEPTED), key="mine")
    assert keys == ["mine", "mine"]


async def test_submit_whose_answer_breaks_off_is_repeated() -> None:
    """Half an answer is none."""
    half: Turn = stream(b'{"job_id":', cut=True)
    job_id, keys, _ = await submitted(half, answer(202, ACCEPTED))
    assert (job_id, len(keys)) == ("job-1", 2)


async def test_submit_to_a_silent_queen_is_repeated() -> None:
    """Silence breaks a connection."""
    _, keys, _ = await submitted(stream(hold=True), answer(202, ACCEPTED), idle_s=0.2)
    assert len(keys) == 2


async def test_queen_that_is_back_and_not_ready_is_waited_for() -> None:
    """Once the connection broke, 503 is part of the interruption, and both are told of once."""
    told: list[bool] = []
    turns = broken(), NOT_READY, answer(202, ACCEPTED)
    _, keys, _ = await submitted(*turns, on_contact=lambda is_there, why: told.append(is_there))
    assert len(set(keys)) == 1
    assert told == [False, True]


@pytest.mark.parametrize(
    ("status", "code", "expected"), [(429, "overloaded", OverloadedError), (404, "x", NotFoundError)]
)
async def test_refusal_after_an_interruption_is_no_interruption(
    status: int, code: str, expected: type[Exception]
) -> None:
    """She is there, and says no."""
    with pytest.raises(expected):
        await submitted(broken(), refusal(status, code), answer(202, ACCEPTED))


async def test_unavailable_queen_is_the_callers_business_at_first() -> None:
    """Nothing broke."""
    with pytest.raises(UnavailableError):
        await submitted(NOT_READY, answer(202, ACCEPTED))


async def test_submit_gives_up_in_the_end() -> None:
    """With the cause."""
    with pytest.raises(UnavailableError, match="cannot be reached"):
        await submitted(broken(), give_up_s=0.3)


async def test_submit_to_nobody_fails_at_once() -> None:
    """Nothing was sent, so nothing is in doubt; `give_up_s` would be two minutes."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with JobClient(f"http://127.0.0.1:{unused.getsockname()[1]}") as client, asyncio.timeout(30):
            with pytest.raises(UnavailableError, match="Connection refused"):
                await client.submit(CHECK)


async def test_cancel_is_repeated_and_reading_is_not() -> None:
    """Who reads can ask again, and the library below does so but once."""
    four_times = [broken()] * 4
    async with scripted_queen(*four_times, answer(202, JOB)) as queen, JobClient(queen.url) as client:
        assert (await client.cancel("job-1")).job_id == "job-1"
        assert [request.method for request in queen.requests] == ["DELETE"] * 5
    async with scripted_queen(*four_times, answer(200, JOB)) as queen, JobClient(queen.url) as client:
        with pytest.raises(UnavailableError):
            await client.job("job-1")


async def test_reader_goes_on_with_a_queen_that_restarted_on_the_same_port() -> None:
    """Nothing lost, nothing twice, though she was gone for a while."""
    told: list[bool] = []
    came_away = asyncio.Event()

    def on_contact(is_there: bool, why: str) -> None:
        told.append(is_there)
        came_away.set()

    async with AsyncExitStack() as lives:
        first = await lives.enter_async_context(scripted_queen(stream(frame(1), frame(2), hold=True)))
        port = int(first.url.rpartition(":")[2])
        async with JobClient(first.url, on_contact=on_contact) as client:
            events = client.follow("job-1")
            seen = [(await anext(events))["seq"], (await anext(events))["seq"]]
            rest = asyncio.ensure_future(_numbers(events))
            await lives.aclose()
            await came_away.wait()
            async with scripted_queen(stream(frame(3), END), port=port) as second:
                seen += await rest
                assert second.cursors == ["2"]
    assert seen == [1, 2, 3, 4]
    assert told == [False, True]


async def test_reader_follows_a_queen_that_moved() -> None:
    """Asked again and again until it is known where she is; the client remembers."""
    where: list[str | None] = [None, None]
    async with AsyncExitStack() as lives:
        first = await lives.enter_async_context(scripted_queen(stream(frame(1), frame(2), hold=True)))
        async with (
            scripted_queen(stream(frame(3), END)) as second,
            JobClient(first.url, find_url=lambda: where.pop(0) if where else second.url) as client,
        ):
            events = client.follow("job-1")
            seen = [(await anext(events))["seq"], (await anext(events))["seq"]]
            await lives.aclose()
            seen += await _numbers(events)
            assert client.base_url == second.url
    assert (seen, where) == ([1, 2, 3, 4], [])
    assert second.cursors == ["2"]


async def test_reader_does_not_look_elsewhere_while_somebody_listens() -> None:
    """A connection that breaks is no move."""
    asked: list[str] = []
    turns = stream(frame(1), frame(2), cut=True), NOT_READY, stream(frame(3), END)
    async with (
        scripted_queen(*turns) as queen,
        JobClient(queen.url, find_url=lambda: asked.append("asked")) as client,
    ):
        assert await _numbers(client.follow("job-1")) == [1, 2, 3, 4]
    assert asked == []


async def test_call_goes_where_the_queen_moved() -> None:
    """At once, and only where she is really elsewhere."""
    async with scripted_queen(answer(200, JOB)) as gone:
        old = gone.url
    async with scripted_queen(answer(200, JOB)) as queen:
        async with JobClient(old, find_url=lambda: queen.url + "/") as client:
            assert (await client.job("job-1")).job_id == "job-1"
            assert client.base_url == queen.url
        async with JobClient(old, find_url=lambda: old) as client:
            with pytest.raises(UnavailableError, match=old):
                await client.job("job-1")


async def _numbers(events: Any) -> list[int]:
    return [event["seq"] async for event in events]
