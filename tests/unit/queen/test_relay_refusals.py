"""Relayed calls and workers that refuse, cannot be reached, break off or stand still."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from rbee.contracts.operations import QueenCheck, WorkerSpawn, WorkerStop
from rbee.contracts.states import JobState
from rbee.errors import ConflictError, InvalidRequestError, OverloadedError, UnavailableError
from rbee.jobs import JobFilter
from rbee.queen import answering, passing, patience
from tests.unit.client.raw_server import raw_server, says
from tests.unit.queen.queen_stage import MODEL, closing, worker_info
from tests.unit.queen.scripted_engine import ANSWER, DONE, frames_of
from tests.unit.queen.scripted_hive import Queen, ScriptedHive, queen_of, until

CALL: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "count"}], "stream": True}


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(answering, "ASK_AGAIN_S", 0.01)
    monkeypatch.setattr(passing, "AGAIN_S", 0.01)
    monkeypatch.setattr(patience, "UNMOVED_S", 0.1)


async def _call(queen: Queen, caller: aiohttp.ClientSession, **more: Any) -> tuple[int, bytes, str]:
    async with caller.post(await queen.url() + "/v1/chat/completions", json=CALL | more) as response:
        return response.status, await response.read(), response.headers["x-job-id"]


def _put(hive: ScriptedHive, *parts: bytes | Exception | None) -> None:
    for part in parts:
        hive.frames.put_nowait(part)


def _text(body: bytes) -> str:
    chunks = [msgspec.json.decode(frame.removeprefix(b"data: ")) for frame in body.split(b"\n\n")[:-2]]
    return "".join(part["delta"].get("content") or "" for chunk in chunks for part in chunk["choices"])


@pytest.mark.parametrize("refusal", [OverloadedError, UnavailableError])
async def test_worker_that_is_busy_or_not_ready_yet_is_asked_again(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession, refusal: Any
) -> None:
    """A slot that is just being freed, or an engine that still loads, is no refusal and no attempt."""
    hive.refusals = [refusal("Not now.") for _ in range(5)]
    _put(hive, *frames_of(CALL), None)
    status, body, job_id = await _call(whole_queen, caller)
    await hive.say(f"{hive.workers[0].worker_id}/stdout", closing(job_id))
    end = await whole_queen.end(job_id)

    assert (status, _text(body)) == (200, "".join(ANSWER))
    assert [headers["x-request-id"] for _, headers in hive.asked] == [f"{job_id}.1"] * 6
    assert end["result"]["attempts"] == 1


async def test_what_a_refusal_quotes_is_for_the_caller_alone(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """An engine may quote the prompt in its sentence; the job, its log and the queen's own output do not."""
    hive.refusals = [InvalidRequestError("It cannot be read; last read: 'the secret plan'.", param="messages")]
    call = asyncio.ensure_future(_call(whole_queen, caller))
    await until(lambda: len(hive.asked) == 1)
    told = {"code": "invalid", "message": "It cannot be read; …"}
    job_id = hive.asked[0][1]["x-job-id"]
    await hive.say(f"{hive.workers[0].worker_id}/stdout", closing(job_id, outcome="failed", error=told))
    status, body, _ = await call
    end = await whole_queen.end(job_id)
    view = await whole_queen.registry.view(job_id)

    error = msgspec.json.decode(body)["error"]
    assert (status, error["param"]) == (400, "messages")
    assert error["message"] == "It cannot be read; last read: 'the secret plan'."
    assert (end["reason"], end["error"]["message"], end["error"]["param"]) == (
        "invalid",
        told["message"],
        "messages",
    )
    for shown in (await whole_queen.log(job_id), view, whole_queen.sink.events):
        assert "secret" not in str(shown)


async def test_worker_that_cannot_be_reached_and_has_died_is_replaced(
    whole_queen: Queen, caller: aiohttp.ClientSession
) -> None:
    """A port that refuses, of a worker whose end is told a little later: another answers."""
    hive = await whole_queen.live_hive()
    hive.workers.append(worker_info("worker-00000000000000000000000000", url="http://127.0.0.1:9"))
    hive.beat()
    call = asyncio.ensure_future(_call(whole_queen, caller))
    await until(lambda: len(whole_queen.service.runner.running) == 1)
    [job_id] = whole_queen.service.runner.running
    dead = await whole_queen.until_running(job_id)
    await hive.kill(dead)
    await until(lambda: len(hive.asked) == 1)
    _put(hive, *frames_of(CALL), None)
    status, body, _ = await call

    assert (status, _text(body)) == (200, "".join(ANSWER))
    assert [type(command) for command in hive.commands] == [WorkerSpawn]


async def test_request_that_was_cut_off_before_its_first_byte_is_placed_anew(
    whole_queen: Queen, caller: aiohttp.ClientSession
) -> None:
    """A worker that took a request on whose connection broke knows it already; it is asked as another attempt."""
    told = b'{"error":{"message":"It was taken on before.","code":"conflict"}}'
    head = b"HTTP/1.1 %b\r\ncontent-type: %b\r\nconnection: close\r\n\r\n"
    stream = head % (b"200 OK", b"text/event-stream") + b"".join(frames_of(CALL))
    hive = await whole_queen.live_hive()
    async with raw_server(
        says(b""), says(head % (b"409 Conflict", b"application/json") + told), says(stream)
    ) as worker:
        hive.workers.append(worker_info("worker-00000000000000000000000000", url=worker.url))
        hive.beat()
        call = asyncio.ensure_future(_call(whole_queen, caller))
        await until(lambda: len(worker.heads) == 2)
        [job_id] = whole_queen.service.runner.running
        await hive.say(f"{hive.workers[0].worker_id}/stdout", closing(job_id, outcome="cancelled"))
        status, body, _ = await call
        ids = [head.split(b"x-request-id: ")[1].split(b"\r\n")[0].decode() for head in worker.heads]

    assert (status, _text(body)) == (200, "".join(ANSWER))
    assert ids == [f"{job_id}.1", f"{job_id}.1", f"{job_id}.2"]


async def test_answer_whose_connection_breaks_goes_on_though_its_worker_lives(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker says that its caller left; the answer goes on as another attempt, on whichever worker is free."""
    call = asyncio.ensure_future(_call(whole_queen, caller))
    await until(lambda: len(hive.asked) == 1)
    job_id = hive.asked[0][1]["x-job-id"]
    _put(hive, *frames_of(CALL)[:3], ConnectionError("the connection breaks"))
    await until(hive.frames.empty)
    await hive.say(f"{hive.workers[0].worker_id}/stdout", closing(job_id, outcome="cancelled"))
    await until(lambda: len(hive.asked) == 2)
    _put(hive, *frames_of(hive.asked[1][0]), None)
    _, body, _ = await call

    assert (_text(body), body.endswith(DONE)) == ("".join(ANSWER), True)
    assert hive.commands == []


async def test_worker_that_stands_still_and_does_not_stop_is_stopped_and_its_slot_is_free(
    tmp_path: Path, caller: aiohttp.ClientSession
) -> None:
    """A stalled answer is told to stop; a worker that hears and does nothing is stopped itself."""
    async with queen_of(tmp_path, stop_grace_s=0.1) as queen:
        hive = await queen.live_hive()
        stuck = hive.has_worker()
        _put(hive, *frames_of(CALL)[:2])
        _, body, job_id = await _call(queen, caller, idle_timeout_s=0.1)
        end = await queen.end(job_id)
        await until(lambda: len(hive.commands) == 1)
        slots_used = queen.service.workers.slots_used(stuck)

    last = msgspec.json.decode(body.split(b"\n\n")[-2].removeprefix(b"data: "))
    assert (last["error"]["code"], end["reason"]) == ("stalled", "stalled")
    assert hive.stopped == [f"{job_id}.1"]
    assert isinstance(hive.commands[0], WorkerStop)
    assert slots_used == 0


async def test_engine_that_fails_in_mid_answer_ends_the_stream_with_one_error_frame(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """The worker's last frame is told in the house's words, once, and no other worker is asked."""
    told = b'data: {"error":{"message":"The engine failed.","code":"worker_failed","type":"server_error"}}\n\n'
    _put(hive, frames_of(CALL)[0] + told, None)
    call = asyncio.ensure_future(_call(whole_queen, caller))
    await until(lambda: len(hive.asked) == 1)
    job_id = hive.asked[0][1]["x-job-id"]
    error = {"code": "worker_failed", "message": "The engine failed."}
    await hive.say(f"{hive.workers[0].worker_id}/stdout", closing(job_id, outcome="failed", error=error))
    _, body, _ = await call

    frames = body.split(b"\n\n")[:-1]
    assert len(frames) == 2
    last = msgspec.json.decode(frames[1].removeprefix(b"data: "))
    assert (last["error"]["code"], last["job_id"]) == ("worker_failed", job_id)
    assert (await whole_queen.end(job_id))["reason"] == "worker_failed"
    assert len(hive.asked) == 1


async def test_response_stream_that_breaks_off_ends_with_an_error_and_says_that_it_cannot_go_on(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """Events of the Responses API are not gone on with: what came is followed by one error."""
    first = b'event: response.created\ndata: {"type":"response.created","response":{"status":"in_progress"}}\n\n'
    _put(hive, first)
    call = {"model": MODEL, "input": "count", "stream": True}
    error = {"code": "worker_lost", "message": "The worker was stopped."}
    async with caller.post(await whole_queen.url() + "/v1/responses", json=call) as response:
        job_id, body = response.headers["x-job-id"], b""
        while len(body) < len(first):
            body += await response.content.readany()
        _put(hive, None)
        await hive.say(f"{hive.workers[0].worker_id}/stdout", closing(job_id, outcome="failed", error=error))
        body += await response.read()

    assert body.startswith(first + b'data: {"error":{"message":"The worker was stopped. The answer cannot be')
    assert b"its events cannot be gone on with" in body
    assert (await whole_queen.end(job_id))["reason"] == "worker_lost"


async def test_call_that_is_refused_while_its_worker_is_asked_is_no_job_and_takes_no_slot(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """Accepting is on its way while the worker reads the prompt; no answer reaches the caller before."""
    registry = whole_queen.registry
    waiting = await registry.create(QueenCheck())
    registry.queued_max = 1
    _put(hive, *frames_of(CALL), None)
    async with caller.post(await whole_queen.url() + "/v1/chat/completions", json=CALL) as response:
        body = msgspec.json.decode(await response.read())
        assert (response.status, response.headers["retry-after"]) == (429, "5")
        assert "x-job-id" not in response.headers
    assert body["error"]["code"] == "overloaded"
    worker_id = hive.workers[0].worker_id
    await until(lambda: not whole_queen.service.workers.slots_used(worker_id))
    assert [view.job_id for view in await registry.find(JobFilter())] == [waiting.job_id]
    assert not whole_queen.service.runner.running


async def test_worker_is_asked_while_its_job_is_written_down_and_nothing_reaches_the_caller_before(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """The prompt is read meanwhile; a job that is on no disk yet has no answer."""
    disk = threading.Event()
    store: Any = whole_queen.registry.store
    holding = asyncio.ensure_future(store._writer.write(lambda tx: disk.wait(30)))
    posting = asyncio.ensure_future(caller.post(await whole_queen.url() + "/v1/chat/completions", json=CALL))
    try:
        await until(lambda: len(hive.asked) == 1)
        _put(hive, *frames_of(CALL), None)
        begun, _ = await asyncio.wait({posting}, timeout=1)
        assert not begun
    finally:
        disk.set()
    assert await holding
    async with asyncio.timeout(10), await posting as response:
        job_id = response.headers["x-job-id"]
        assert (await whole_queen.registry.get(job_id)).state is JobState.RUNNING
        await hive.say(f"{hive.workers[0].worker_id}/stdout", closing(job_id))
        body = await response.read()
    assert _text(body) == "".join(ANSWER)


@pytest.mark.parametrize(("refused", "status"), [(1, 200), (2, 503)])
async def test_engine_that_is_not_ready_is_another_attempt(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession, refused: int, status: int
) -> None:
    """Its worker had taken the request on, and knows it already; in the end the caller is told to come again."""
    again = [UnavailableError("The engine is not ready yet."), ConflictError("It was taken on before.")]
    hive.refusals = again * refused
    _put(hive, *frames_of(CALL), None)
    got, body, job_id = await _call(whole_queen, caller)

    assert got == status
    assert [headers["x-request-id"] for _, headers in hive.asked] == [
        f"{job_id}.{number}" for number in (1, 1, 2, 2)[: 3 if refused == 1 else 4]
    ]
    if status == 503:
        assert msgspec.json.decode(body)["error"]["message"] == "The engine is not ready yet."
    else:
        await hive.say(f"{hive.workers[0].worker_id}/stdout", closing(job_id, attempt=2))
        assert _text(body) == "".join(ANSWER)
