from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import msgspec
import pytest

from rbee.errors import ContextExceededError, UnavailableError
from rbee.queen import answering, patience
from rbee.queen.callers import Caller
from tests.unit.queen.queen_stage import MODEL, closing, worker_exit
from tests.unit.queen.scripted_engine import message_frames
from tests.unit.queen.scripted_hive import Queen, ScriptedHive, until

FRAME = b'data: {"choices":[{"delta":{"content":"%d"}}]}\n\n'
CALL = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "stream": True}


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "ASK_AGAIN_S", 0.01)
    monkeypatch.setattr(patience, "UNMOVED_S", 0.1)


async def _close(hive: ScriptedHive, job_id: str, **fields: Any) -> None:
    await hive.say(f"{hive.workers[0].worker_id}/stdout", closing(job_id, **fields))


async def test_frames_are_passed_on_byte_for_byte_and_the_job_ends_with_the_closing_line(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    sent = FRAME % 1 + FRAME % 2 + b"data: [DONE]\n\n"
    for part in (sent[:10], sent[10:70], sent[70:], None):
        hive.frames.put_nowait(part)

    async with caller.post(await whole_queen.url() + "/v1/chat/completions", json=CALL) as response:
        received = await response.read()
    job_id = response.headers["x-job-id"]
    await _close(hive, job_id, prompt_tokens=3, completion_tokens=2)
    end = await whole_queen.end(job_id)

    assert (response.status, response.content_type) == (200, "text/event-stream")
    assert received == sent
    assert end["result"]["usage"] == {"prompt_tokens": 3, "completion_tokens": 2}
    assert "hello" not in str(await whole_queen.log(job_id))


async def test_caller_that_leaves_stops_the_worker_and_cancels_the_job(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    hive.frames.put_nowait(FRAME % 1)
    response = await caller.post(await whole_queen.url() + "/v1/chat/completions", json=CALL)
    job_id = response.headers["x-job-id"]
    assert await response.content.readany() == FRAME % 1

    response.close()
    async with asyncio.timeout(5):
        await hive.left.wait()
    await _close(hive, job_id, outcome="cancelled")
    end = await whole_queen.end(job_id)

    assert end["state"] == "cancelled"
    assert (await whole_queen.said(job_id))[-3:] == ["worker_inference", "queen_cancelled", "end"]
    assert whole_queen.service.workers.slots_used(hive.workers[0].worker_id) == 0


async def test_caller_that_leaves_while_it_waits_leaves_no_job_behind(
    whole_queen: Queen, caller: aiohttp.ClientSession
) -> None:
    call = asyncio.ensure_future(caller.post(await whole_queen.url() + "/v1/chat/completions", json=CALL))
    await until(lambda: len(whole_queen.service.dispatcher._tickets) == 1)
    [job_id] = whole_queen.service.runner.running

    call.cancel()

    assert (await whole_queen.end(job_id))["state"] == "cancelled"
    await until(lambda: not whole_queen.service.dispatcher._tickets)


async def _asked_whole(queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession, **values: Any) -> Any:
    """Ask for an answer that does not stream and does not end; returns the call and its job."""
    hive.media = "application/json"
    body = {**CALL, "stream": False, **values}
    call = asyncio.ensure_future(caller.post(await queen.url() + "/v1/chat/completions", json=body))
    await until(lambda: len(hive.asked) == 1)
    return call, hive.asked[0][1]["x-job-id"]


async def _left(hive: ScriptedHive) -> None:
    async with asyncio.timeout(5):
        await hive.left.wait()


async def test_caller_that_leaves_a_call_without_stream_stops_the_worker_and_cancels_the_job(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    call, job_id = await _asked_whole(whole_queen, hive, caller)

    call.cancel()
    await _left(hive)
    await _close(hive, job_id, outcome="cancelled")

    assert (await whole_queen.end(job_id))["state"] == "cancelled"
    assert whole_queen.service.workers.slots_used(hive.workers[0].worker_id) == 0


async def test_call_without_stream_that_is_cancelled_stops_the_worker_and_is_not_to_be_sent_again(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    call, job_id = await _asked_whole(whole_queen, hive, caller)

    async with caller.delete(await whole_queen.url() + f"/v1/jobs/{job_id}") as deleted:
        assert deleted.status == 202
    await _left(hive)
    await _close(hive, job_id, outcome="cancelled")

    async with await call as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"], error["retryable"]) == (400, "cancelled", False)
    assert (await whole_queen.end(job_id))["state"] == "cancelled"


async def test_stream_that_is_cancelled_ends_with_a_frame_that_says_so(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    hive.frames.put_nowait(FRAME % 1)
    response = await caller.post(await whole_queen.url() + "/v1/chat/completions", json=CALL)
    job_id = response.headers["x-job-id"]
    assert await response.content.readany() == FRAME % 1

    async with caller.delete(await whole_queen.url() + f"/v1/jobs/{job_id}") as deleted:
        assert deleted.status == 202
    await _left(hive)
    await _close(hive, job_id, outcome="cancelled")

    rest = await response.content.read()
    assert msgspec.json.decode(rest.removeprefix(b"data: "))["error"]["code"] == "cancelled"


@pytest.mark.parametrize(
    ("deadline", "reason"),
    [
        ({"timeout_s": 0.3}, "timeout"),
        ({"first_token_timeout_s": 0.05}, "first_token_timeout"),
    ],
)
async def test_deadline_of_a_call_is_its_status_and_goes_no_further_than_the_queen(
    whole_queen: Queen,
    hive: ScriptedHive,
    caller: aiohttp.ClientSession,
    deadline: dict[str, float],
    reason: str,
) -> None:
    call, job_id = await _asked_whole(whole_queen, hive, caller, **deadline)
    await _left(hive)
    await _close(hive, job_id, outcome="cancelled")

    async with await call as response:
        error = (await response.json())["error"]
    assert (response.status, error["type"], error["code"]) == (504, "timeout_error", reason)
    assert (await whole_queen.end(job_id))["reason"] == reason
    assert hive.asked[0][0] == {**CALL, "stream": False}


async def test_call_that_waits_too_long_for_its_slot_fails_with_queue_timeout(
    whole_queen: Queen, caller: aiohttp.ClientSession
) -> None:
    body = {**CALL, "queue_timeout_s": 0.05}
    async with caller.post(await whole_queen.url() + "/v1/chat/completions", json=body) as response:
        error = (await response.json())["error"]

    assert (response.status, error["code"]) == (504, "queue_timeout")


async def test_stream_that_stands_still_is_ended_as_stalled(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    hive.frames.put_nowait(FRAME % 1)
    body = {**CALL, "idle_timeout_s": 0.05}
    response = await caller.post(await whole_queen.url() + "/v1/chat/completions", json=body)
    assert await response.content.readany() == FRAME % 1
    await _left(hive)
    await _close(hive, response.headers["x-job-id"], outcome="cancelled")

    rest = await response.content.read()
    assert msgspec.json.decode(rest.removeprefix(b"data: "))["error"]["code"] == "stalled"
    assert (await whole_queen.end(response.headers["x-job-id"]))["reason"] == "stalled"


async def test_answer_without_stream_that_stands_still_is_ended_as_stalled(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """A blank tells that it has begun, so that a stuck worker is not given the time of a long prompt."""
    hive.frames.put_nowait(b" ")
    call, job_id = await _asked_whole(whole_queen, hive, caller, idle_timeout_s=0.05)
    await _left(hive)
    await _close(hive, job_id, outcome="cancelled")

    async with await call as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"]) == (504, "stalled")
    assert (await whole_queen.end(job_id))["reason"] == "stalled"


async def test_answer_without_stream_goes_on_for_as_long_as_blanks_come(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """It takes longer than its first token may; its caller gets it without a blank."""
    call, job_id = await _asked_whole(whole_queen, hive, caller, first_token_timeout_s=2, idle_timeout_s=30)
    [placement] = whole_queen.service.workers._placements[hive.workers[0].worker_id].values()
    hive.frames.put_nowait(b" ")
    await until(lambda: placement.heard_at > 0)
    placement.heard_at = placement.moved_at = placement.heard_at - 4
    for part in (b" ", b' {"object"', b':" "}', None):
        hive.frames.put_nowait(part)
    await _close(hive, job_id)

    async with await call as response:
        assert await response.read() == b'{"object":" "}'
    assert (await whole_queen.end(job_id))["state"] == "completed"


async def test_answer_without_stream_that_fails_after_its_head_has_its_proper_status(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """The status and the error stand where the answer would have."""
    told = {"message": "Too much.", "code": "invalid", "param": "stop", "retryable": False, "remedy": "Less."}
    for part in (b" ", b" 40", b"0 " + msgspec.json.encode({"error": told}), None):
        hive.frames.put_nowait(part)
    call, job_id = await _asked_whole(whole_queen, hive, caller)
    await _close(hive, job_id, outcome="failed", error=told)

    async with await call as response:
        error = (await response.json())["error"]
    assert response.status == 400
    assert {name: error[name] for name in told} == told
    assert (await whole_queen.end(job_id))["reason"] == "invalid"
    assert len(hive.asked) == 1


async def test_stream_of_anthropics_that_fails_in_its_midst_ends_with_one_error(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """What the worker told of it is not told twice."""
    frames = message_frames()[:3]
    told = {"type": "api_error", "message": "The engine failed.", "code": "worker_failed"}
    failure = b"event: error\ndata: " + msgspec.json.encode({"type": "error", "error": told}) + b"\n\n"
    for part in (*frames, failure, None):
        hive.frames.put_nowait(part)
    response = await caller.post(await whole_queen.url() + "/v1/messages", json=CALL)
    await _close(hive, response.headers["x-job-id"], outcome="failed", error=told)
    received = await response.read()

    assert received.startswith(
        b"".join(frames) + b'event: error\ndata: {"type":"error","error":{"message":"The engine'
    )
    assert received.count(b"event: error") == 1
    assert (await whole_queen.end(response.headers["x-job-id"]))["error"]["code"] == "worker_failed"


async def test_stream_of_anthropics_that_fails_before_it_begins_has_a_status(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """As at the other routes."""
    told = {"type": "invalid_request_error", "message": "No.", "code": "invalid"}
    hive.frames.put_nowait(
        b"event: error\ndata: " + msgspec.json.encode({"type": "error", "error": told}) + b"\n\n"
    )
    hive.frames.put_nowait(None)
    calling = asyncio.ensure_future(caller.post(await whole_queen.url() + "/v1/messages", json=CALL))
    await until(lambda: len(hive.asked) == 1)
    await _close(hive, hive.asked[0][1]["x-job-id"], outcome="failed", error=told)
    response = await calling
    body = await response.json()

    assert (response.status, body["type"], body["error"]["message"]) == (400, "error", "No.")


async def test_answer_whose_last_bytes_never_come_is_ended_as_stalled(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """Its closing line has come: the bytes that were under way are waited for like any others."""
    hive.frames.put_nowait(FRAME % 1)
    body = {**CALL, "idle_timeout_s": 0.05}
    response = await caller.post(await whole_queen.url() + "/v1/chat/completions", json=body)
    assert await response.content.readany() == FRAME % 1
    await _close(hive, response.headers["x-job-id"])
    rest = await response.content.read()

    assert msgspec.json.decode(rest.removeprefix(b"data: "))["error"]["code"] == "stalled"
    assert (await whole_queen.end(response.headers["x-job-id"]))["reason"] == "stalled"
    assert whole_queen.service.workers.slots_used(hive.workers[0].worker_id) == 0


@pytest.mark.parametrize("deadline", [{"timeout_s": 0}, {"idle_timeout_s": "soon"}])
async def test_deadline_of_the_wrong_form_is_refused_by_name(
    whole_queen: Queen, caller: aiohttp.ClientSession, deadline: dict[str, Any]
) -> None:
    url = await whole_queen.url() + "/v1/chat/completions"
    async with caller.post(url, json={**CALL, **deadline}) as response:
        error = (await response.json())["error"]

    assert (response.status, error["param"]) == (400, next(iter(deadline)))


async def test_worker_that_dies_in_mid_answer_gives_an_error_frame_behind_whole_frames(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    worker_id = hive.workers[0].worker_id
    hive.frames.put_nowait(FRAME % 1 + b'data: {"half')
    tools = [{"type": "function", "function": {"name": "look"}}]
    response = await caller.post(await whole_queen.url() + "/v1/chat/completions", json={**CALL, "tools": tools})
    assert await response.content.readany() == FRAME % 1

    hive.frames.put_nowait(ConnectionError("the worker dies"))
    await hive.say(f"{hive.hive_id}/boot", worker_exit(worker_id, {}, exit_code=None, signal="SIGSEGV"))
    rest = await response.content.read()
    end = await whole_queen.end(response.headers["x-job-id"])

    assert rest.startswith(b'data: {"error":{"message":"The worker ended. The answer cannot be continued')
    assert rest.endswith(b"}\n\n")
    assert (end["reason"], end["error"]["signal"]) == ("worker_lost", "SIGSEGV")


async def test_answer_that_is_no_stream_is_passed_on_whole(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    hive.media = "application/json"
    for part in (b'{"object":', b'"chat.completion"}', None):
        hive.frames.put_nowait(part)

    async with caller.post(await whole_queen.url() + "/v1/chat/completions", json=CALL) as response:
        answer = await response.json()
    await _close(hive, response.headers["x-job-id"])

    assert answer == {"object": "chat.completion"}


async def test_call_whose_worker_dies_before_its_first_byte_is_answered_by_another(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    hive.media = "application/json"
    hive.frames.put_nowait(b'{"object":')
    call = asyncio.ensure_future(caller.post(await whole_queen.url() + "/v1/chat/completions", json=CALL))
    await until(lambda: len(hive.asked) == 1)
    dead = hive.workers.pop()
    hive.beat()
    hive.frames.put_nowait(ConnectionError("the worker dies"))
    await hive.say(f"{hive.hive_id}/boot", worker_exit(dead.worker_id, {}))
    await until(lambda: len(hive.asked) == 2)
    hive.frames.put_nowait(b'{"object":"chat.completion"}')
    hive.frames.put_nowait(None)

    async with await call as response:
        assert (response.status, await response.json()) == (200, {"object": "chat.completion"})
        job_id = response.headers["x-job-id"]
    await hive.say(f"{hive.workers[0].worker_id}/stdout", closing(job_id, 2))
    assert (await whole_queen.end(job_id))["result"]["attempts"] == 2


async def test_call_whose_last_worker_dies_before_its_first_byte_is_an_error_status(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    hive.media = "application/json"
    call = asyncio.ensure_future(caller.post(await whole_queen.url() + "/v1/chat/completions", json=CALL))
    for attempt in (1, 2):
        hive.frames.put_nowait(b'{"object":')
        await until(lambda attempt=attempt: len(hive.asked) == attempt)  # type: ignore[misc]
        dead = hive.workers.pop()
        hive.beat()
        hive.frames.put_nowait(ConnectionError("the worker dies"))
        await hive.say(f"{hive.hive_id}/boot", worker_exit(dead.worker_id, {}))

    async with await call as response:
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "worker_lost"


async def test_call_that_a_worker_about_to_stop_did_not_take_is_placed_again(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    hive.media = "application/json"
    stopping = hive.workers.pop()
    second = hive.has_worker()
    hive.workers.insert(0, stopping)
    hive.beat()
    hive.on_asked = lambda: hive.drains(stopping.worker_id)
    hive.refusals = [UnavailableError("This worker is being stopped.")]
    hive.frames.put_nowait(b'{"object":"chat.completion"}')
    hive.frames.put_nowait(None)
    async with caller.post(await whole_queen.url() + "/v1/chat/completions", json=CALL) as response:
        assert response.status == 200
        job_id = response.headers["x-job-id"]
        await response.read()
    await hive.say(f"{second}/stdout", closing(job_id, 2))

    assert (await whole_queen.end(job_id))["result"]["attempts"] == 2


async def test_refused_call_is_answered_with_the_workers_status(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    hive.refusals = [ContextExceededError("The prompt has 9 tokens, and the context 8.")]

    async with caller.post(await whole_queen.url() + "/v1/chat/completions", json=CALL) as response:
        told = await response.json()
    end = await whole_queen.end(response.headers["x-job-id"])

    assert response.status == 400
    assert told["error"]["code"] == "context_length_exceeded"
    assert (end["state"], end["reason"]) == ("failed", "invalid")


async def test_call_whose_closing_line_stays_out_is_completed_without_its_numbers(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    for part in (FRAME % 1 + b"data: [DONE]\n\n", None):
        hive.frames.put_nowait(part)

    async with caller.post(await whole_queen.url() + "/v1/chat/completions", json=CALL) as response:
        await response.read()
    end = await whole_queen.end(response.headers["x-job-id"])

    assert (end["state"], end["result"]) == ("completed", {"usage": None})


async def test_queen_that_stops_ends_a_waiting_call_with_unavailable(
    whole_queen: Queen, caller: aiohttp.ClientSession
) -> None:
    call = asyncio.ensure_future(caller.post(await whole_queen.url() + "/v1/chat/completions", json=CALL))
    await until(lambda: len(whole_queen.service.dispatcher._tickets) == 1)

    await whole_queen.service.close(0)

    async with await call as response:
        assert response.status == 503


async def test_failure_behind_a_whole_answer_adds_nothing_to_it() -> None:
    """A queen that stops between an answer and its end leaves the JSON as it is."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    caller = Caller(send, "job-1", None)
    await caller.start(200, {"content-type": "application/json"})
    await caller.send(caller.take(b'{"choices":[]}', 1))

    await caller.fail(UnavailableError("The queen is stopping."))

    assert b"".join(message.get("body", b"") for message in sent) == b'{"choices":[]}'
    assert caller.finished.is_set()


async def test_call_that_was_accepted_just_before_the_queen_stops_is_refused_and_not_begun(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    url = await whole_queen.url()
    whole_queen.service.runner.is_closing = True
    timeout = aiohttp.ClientTimeout(total=5)

    async with caller.post(url + "/v1/chat/completions", json=CALL, timeout=timeout) as response:
        body = await response.json()

    assert (response.status, body["error"]["message"]) == (503, "The queen is stopping.")
    assert not whole_queen.service.runner.running
