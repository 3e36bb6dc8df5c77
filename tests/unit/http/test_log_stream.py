"""A log as server-sent events, over a real socket: resumable, polite, and cut off where nobody reads."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from rbee.contracts.events import captured_event, decode_source_line, frames_of
from rbee.contracts.states import JobState
from tests.unit.http.http_stage import SECONDS, Stage, http_stage, small_buffers
from tests.unit.jobs.job_stage import end, new_job, told, whole_log


async def blocks(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yield what stands between blank lines, as it comes."""
    rest = b""
    async for chunk, _ in response.content.iter_chunks():
        *whole, rest = (rest + chunk).split(b"\n\n")
        for block in whole:
            yield block
    assert rest == b""


async def events(response: aiohttp.ClientResponse) -> list[bytes]:
    """Read a stream to its end; return its events, check its beginning."""
    first, *others = [block + b"\n\n" async for block in blocks(response)]
    assert re.fullmatch(rb"retry: 1\d\d\d\n\n", first)
    return others


async def until(condition: Any) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110  # the other side of a connection tells nobody
            await asyncio.sleep(0.001)  # the server's side of a connection tells nobody


async def test_stream_is_the_log_in_frames_and_ends_with_it(stage: Stage) -> None:
    record = await new_job(stage.registry)
    async with stage.get(f"/v1/jobs/{record.job_id}/stream") as response:
        reading = asyncio.create_task(events(response))
        for number in range(20):
            await stage.registry.append(record.job_id, [told(str(number))])
        await end(stage.registry, record.job_id, JobState.CANCELLED)
        frames = await reading
    assert response.status == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-encoding" not in response.headers
    log = await whole_log(stage.registry, record.job_id)
    assert b"".join(frames) == frames_of(log, 1)
    assert frames[0].startswith(b"id: 1\nevent: state\ndata: {")
    assert frames[-1].startswith(b"id: 22\nevent: end\ndata: {")


@pytest.mark.parametrize(
    ("query", "headers", "after"),
    [
        ("", {}, 0),
        ("?after=0", {}, 0),
        ("?after=3", {}, 3),
        ("?after=3", {"last-event-id": "5"}, 5),
        ("?after=5", {"last-event-id": "0"}, 0),
        ("?after=3", {"last-event-id": ""}, 3),
    ],
)
async def test_stream_begins_behind_what_the_reader_has(
    stage: Stage, query: str, headers: dict[str, str], after: int
) -> None:
    record = await new_job(stage.registry, events=[told(str(number)) for number in range(6)])
    await end(stage.registry, record.job_id, JobState.CANCELLED)
    async with stage.get(f"/v1/jobs/{record.job_id}/stream{query}", headers=headers) as response:
        frames = await events(response)
    log = await whole_log(stage.registry, record.job_id)
    assert b"".join(frames) == frames_of(log[after:], after + 1)


@pytest.mark.parametrize("where", ["last-event-id", "after"])
async def test_stream_from_what_is_no_number_or_past_a_live_log_is_refused(stage: Stage, where: str) -> None:
    record = await new_job(stage.registry)
    for given in ("x", "-1", "1.5", "٣", "1 2", "9" * 19, "2"):
        values = {"params": {where: given}} if where == "after" else {"headers": {where: given}}
        async with stage.get(f"/v1/jobs/{record.job_id}/stream", **values) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (400, "invalid")


async def test_stream_at_or_past_the_end_of_an_ended_log_has_nothing(stage: Stage) -> None:
    record = await new_job(stage.registry, store=False)
    await end(stage.registry, record.job_id, JobState.CANCELLED)
    for after in ("2", "3", "999"):
        async with stage.get(f"/v1/jobs/{record.job_id}/stream", headers={"last-event-id": after}) as response:
            assert (response.status, await response.read()) == (204, b"")
    for after in ("0", "1"):
        async with stage.get(f"/v1/jobs/{record.job_id}/stream", params={"after": after}) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (410, "gone")


async def test_quiet_stream_is_kept_alive_by_comments(stage: Stage) -> None:
    await stage.registry.append("worker-1", [told("x")])
    async with stage.get("/v1/brisk") as response:
        found = [block async for block in _first(blocks(response), 4)]
    assert [block.split(b":")[0] for block in found] == [b"retry", b"id", b"", b""]
    assert found[2] == b": still here"


async def test_closing_server_says_goodbye_without_a_number() -> None:
    async with http_stage() as stage:
        record = await new_job(stage.registry)
        response = await stage.client.get(f"{stage.url}/v1/jobs/{record.job_id}/stream")
        reading = asyncio.create_task(events(response))
        await until(lambda: stage.registry.hub._readers)
    *_, last = await reading
    assert last == b"event: bye\ndata: {}\n\n"


async def test_readers_that_leave_are_forgotten(stage: Stage) -> None:
    record = await new_job(stage.registry)
    path = f"/v1/jobs/{record.job_id}/stream"
    tasks_before = len(asyncio.all_tasks())

    async def look() -> None:
        async with stage.get(path) as response:
            async for _ in response.content.iter_chunks():
                break
            response.close()

    for _ in range(10):
        await asyncio.gather(*(look() for _ in range(20)))
    await until(lambda: stage.registry.hub._readers == {})
    await until(lambda: len(asyncio.all_tasks()) <= tasks_before)


async def test_reader_that_takes_nothing_is_cut_off_and_nobody_else_waits(stage: Stage) -> None:
    await stage.registry.append("worker-1", [told("begin")])
    sock = await asyncio.to_thread(small_buffers, stage.address)
    sock.sendall(b"GET /v1/brisk HTTP/1.1\r\nhost: localhost\r\n\r\n")
    await until(lambda: stage.registry.hub._readers)
    for _ in range(100):  # far more than the buffers between hold
        await stage.registry.append("worker-1", [told("x" * 100_000)])
    async with stage.get("/v1/workers/worker-1/stream?after=100") as other:
        assert [block[:8] async for block in _first(blocks(other), 2)][1] == b"id: 101\n"
    await until(lambda: stage.registry.hub._readers == {})

    def rest() -> bytes:
        sock.settimeout(SECONDS)
        parts = []
        while part := sock.recv(1 << 20):
            parts.append(part)
        sock.close()
        return b"".join(parts)

    cut = await asyncio.to_thread(rest)
    assert not cut.endswith(b"0\r\n\r\n")  # an end that was not meant is no end


async def test_head_of_a_stream_does_not_wait_for_its_end(stage: Stage) -> None:
    record = await new_job(stage.registry)
    async with stage.client.head(f"{stage.url}/v1/jobs/{record.job_id}/stream") as response:
        assert (response.status, response.content_type) == (200, "text/event-stream")
    assert stage.registry.hub._readers == {}


async def test_line_ends_inside_a_captured_line_do_not_break_the_frames(stage: Stage) -> None:
    line = b'{"v":1,"kind":"narration",\r"ts":1,"actor":"a",\r"action":"b","message":"c"}\r'
    assert decode_source_line(line) is not None
    record = await new_job(
        stage.registry, events=[captured_event(line, source="worker-1/stdout", offset=0, observed_ts=1)]
    )
    await end(stage.registry, record.job_id, JobState.CANCELLED)
    async with stage.get(f"/v1/jobs/{record.job_id}/stream?after=1") as response:
        body = await response.read()
    datas = [part[6:] for part in re.split(rb"\r\n|\r|\n", body) if part.startswith(b"data: ")]
    assert [json.loads(data)["seq"] for data in datas] == [2, 3]


async def _first(found: AsyncIterator[bytes], count: int) -> AsyncIterator[bytes]:
    async for block in found:
        yield block
        count -= 1
        if count == 0:
            return
