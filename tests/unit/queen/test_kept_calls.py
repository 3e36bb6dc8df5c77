"""Kept API calls: their responses are made of their jobs' logs, whoever reads them and when."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from rbee.contracts.heartbeats import WorkerInfo
from rbee.jobs import JobRegistry
from rbee.queen import answering, patience
from tests.unit.queen.queen_stage import MODEL, closing, narration
from tests.unit.queen.scripted_engine import (
    ANSWER,
    DONE,
    PROMPT_TOKENS,
    frames_of,
    lines_of,
    message_frames,
    response_frames,
)
from tests.unit.queen.scripted_hive import Queen, ScriptedHive, queen_of, until

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "count"}]}
STREAM = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
KEEP = {"x-rbee-keep": "1"}
CHAT_PATH = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(answering, "ASK_AGAIN_S", 0.01)
    monkeypatch.setattr(patience, "UNMOVED_S", 0.1)


class _Told:
    """What a caller was answered."""

    def __init__(self, response: aiohttp.ClientResponse, body: bytes) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = body

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def job_id(self) -> str:
        return self.headers["x-job-id"]


async def _post(
    caller: aiohttp.ClientSession, url: str, call: dict[str, Any], headers: dict[str, str] | None = None
) -> _Told:
    async with caller.post(url, json=call, headers=headers) as response:
        return _Told(response, await response.read())


async def _get(caller: aiohttp.ClientSession, url: str, headers: dict[str, str] | None = None) -> _Told:
    async with caller.get(url, headers=headers) as response:
        return _Told(response, await response.read())


async def _asked(hive: ScriptedHive, times: int = 1) -> str:
    """Wait until a worker was asked; returns the job."""
    await until(lambda: len(hive.asked) == times)
    return hive.asked[-1][1]["x-job-id"]


async def _narrate(hive: ScriptedHive, job_id: str, frames: list[bytes], attempt: int = 1, **more: Any) -> None:
    """Have the newest worker narrate a whole answer."""
    lines = lines_of(frames, job_id, attempt)
    told = {"frames": len(lines), "prompt_tokens": PROMPT_TOKENS, "completion_tokens": len(ANSWER), **more}
    await hive.say(f"{hive.workers[-1].worker_id}/stdout", *lines, closing(job_id, attempt, **told))


def _frames(body: bytes) -> list[tuple[int | None, str | None, dict[str, Any]]]:
    """Read the frames of a stream: number, name, chunk; the last is checked to be [DONE], where there is one."""
    found = []
    for frame in body.removesuffix(DONE).split(b"\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in frame.decode().split("\n") if not line.startswith(":"))
        if fields:
            number = int(fields["id"]) if "id" in fields else None
            found.append((number, fields.get("event"), msgspec.json.decode(fields["data"])))
    return found


async def test_stream_of_a_kept_call_is_the_engines_with_the_logs_numbers(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """The engine's chunks come back one by one, under the job's own id, each with its number in the log."""
    call = asyncio.ensure_future(_post(caller, await whole_queen.url() + CHAT_PATH, STREAM, KEEP))
    job_id = await _asked(hive)
    body, headers = hive.asked[0]
    frames = frames_of(body)
    await _narrate(hive, job_id, frames)
    told = await call
    end = await whole_queen.end(job_id)

    assert (headers["x-rbee-keep"], body["messages"]) == ("chunk", CHAT["messages"])
    assert (told.status, told.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert told.body.endswith(DONE)
    shown = _frames(told.body)
    names = {"id": "chatcmpl-" + job_id.removeprefix("job-"), "model": MODEL, "created": shown[0][2]["created"]}
    sent = [msgspec.json.decode(frame.removeprefix(b"data: ")) | names for frame in frames[:-1]]
    assert [chunk for _, _, chunk in shown] == sent
    log = await whole_queen.log(job_id)
    assert [number for number, _, _ in shown] == [event["seq"] for event in log if event["kind"] == "token"]
    assert end["result"]["text"] == "".join(ANSWER)


async def test_kept_call_that_does_not_stream_is_put_together(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """One response with the whole text and what it took."""
    call = asyncio.ensure_future(_post(caller, await whole_queen.url() + CHAT_PATH, CHAT, KEEP))
    job_id = await _asked(hive)
    await _narrate(hive, job_id, frames_of(CHAT))
    told = await call

    assert (told.status, told.headers["x-job-id"]) == (200, job_id)
    whole = told.json
    assert whole["object"] == "chat.completion"
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "".join(ANSWER)}
    assert (whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"]) == (PROMPT_TOKENS, len(ANSWER))


async def test_caller_that_leaves_changes_nothing_and_reads_the_answer_later(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """The job goes on, and its response is there for whoever asks."""
    url = await whole_queen.url()
    call = asyncio.ensure_future(_post(caller, url + CHAT_PATH, STREAM, KEEP))
    job_id = await _asked(hive)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await _narrate(hive, job_id, frames_of(STREAM))
    end = await whole_queen.end(job_id)
    told = await _get(caller, f"{url}/v1/jobs/{job_id}/answer")

    assert (end["state"], hive.stopped) == ("completed", [])
    assert "".join(_words(told.body)) == "".join(ANSWER)


def _words(body: bytes) -> list[str]:
    parts = [part for _, _, chunk in _frames(body) for part in chunk["choices"]]
    return [part["delta"]["content"] for part in parts if part["delta"].get("content")]


async def test_response_read_from_any_number_is_the_rest_of_the_same_bytes(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """Last-Event-ID resumes behind any frame, and what follows is byte for byte what everybody gets."""
    url = await whole_queen.url()
    call = asyncio.ensure_future(_post(caller, url + CHAT_PATH, STREAM, KEEP))
    job_id = await _asked(hive)
    await _narrate(hive, job_id, frames_of(STREAM))
    whole = (await call).body
    frames = whole.split(b"\n\n")[:-1]
    for index, (number, _, _) in enumerate(_frames(whole), 1):
        told = await _get(caller, f"{url}/v1/jobs/{job_id}/answer", {"last-event-id": str(number)})
        assert told.body == b"".join(frame + b"\n\n" for frame in frames[index:])


async def test_kept_stream_whose_worker_dies_goes_on_as_one_response(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """Another worker goes on from the words in the log: one id, one role, one finish, counts added up."""
    first = hive.workers[0].worker_id
    call = asyncio.ensure_future(_post(caller, await whole_queen.url() + CHAT_PATH, STREAM, KEEP))
    job_id = await _asked(hive)
    await hive.kill(first, b"".join(lines_of(frames_of(STREAM)[:3], job_id)))
    await _asked(hive, 2)
    body = hive.asked[1][0]
    frames = frames_of(body)
    await _narrate(hive, job_id, frames, 2, completion_tokens=4)
    told = await call

    assert body["messages"][-1] == {"role": "assistant", "content": "One two"}
    chunks = [chunk for _, _, chunk in _frames(told.body)]
    assert "".join(_words(told.body)) == "".join(ANSWER)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    parts = [part for chunk in chunks for part in chunk["choices"]]
    assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["stop"]
    assert [part["delta"]["role"] for part in parts if "role" in part["delta"]] == ["assistant"]
    usage = chunks[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (10, 6, 16)
    assert "queen_continue" in await whole_queen.said(job_id)


@pytest.mark.parametrize("is_stream", [True, False])
async def test_answer_that_only_lacks_its_last_frames_is_given_them(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession, is_stream: bool
) -> None:
    """A worker that dies behind its last token leaves a whole answer: finish, usage and [DONE] are the queen's."""
    asked = (STREAM if is_stream else CHAT) | {"max_tokens": 4}
    call = asyncio.ensure_future(_post(caller, await whole_queen.url() + CHAT_PATH, asked, KEEP))
    job_id = await _asked(hive)
    frames = frames_of(STREAM | {"max_tokens": 4})
    await hive.kill(hive.workers[0].worker_id, b"".join(lines_of(frames[:5], job_id)))
    told = await call

    counts = {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}
    if is_stream:
        chunks = [chunk for _, _, chunk in _frames(told.body)]
        assert chunks[-2]["choices"][0]["finish_reason"] == "length"
        assert chunks[-1]["usage"] == counts
        assert told.body.endswith(DONE)
    else:
        assert told.json["choices"][0]["finish_reason"] == "length"
        assert told.json["usage"] == counts
    assert len(hive.asked) == 1


async def test_call_that_fails_before_its_first_token_has_the_errors_status(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """Until a frame was sent, a failure is a status, streaming or not."""
    error = {"code": "context_length_exceeded", "message": "The prompt has 9 tokens; the context holds 8."}
    calls: list[dict[str, Any]] = [STREAM, CHAT]
    for number, asked in enumerate(calls, 1):
        call = asyncio.ensure_future(_post(caller, await whole_queen.url() + CHAT_PATH, asked, KEEP))
        job_id = await _asked(hive, number)
        told = closing(job_id, outcome="failed", error=error)
        await hive.say(f"{hive.workers[0].worker_id}/stdout", told)
        answer = await call
        assert (answer.status, answer.json["error"]["code"]) == (400, "context_length_exceeded")
        assert (answer.job_id, answer.json["job_id"]) == (job_id, job_id)


async def test_stream_that_fails_in_mid_answer_ends_with_one_error_frame(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """Behind what was said comes one error frame and no [DONE]."""
    call = asyncio.ensure_future(_post(caller, await whole_queen.url() + CHAT_PATH, STREAM, KEEP))
    job_id = await _asked(hive)
    lines = lines_of(frames_of(STREAM)[:3], job_id)
    failed = closing(job_id, outcome="failed", error={"code": "worker_failed", "message": "The engine failed."})
    await hive.say(f"{hive.workers[0].worker_id}/stdout", *lines, failed)
    told = await call

    chunks = [chunk for _, _, chunk in _frames(told.body)]
    assert (len(chunks), chunks[-1]["error"]["code"]) == (4, "worker_failed")
    assert not told.body.endswith(DONE)


async def test_messages_are_told_under_one_name_with_their_events(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """Anthropic's frames have their event's name; a call that does not stream is the whole message."""
    url = await whole_queen.url() + "/v1/messages"
    for number, is_stream in enumerate((True, False), 1):
        call = asyncio.ensure_future(_post(caller, url, CHAT | {"stream": is_stream, "max_tokens": 9}, KEEP))
        job_id = await _asked(hive, number)
        await _narrate(hive, job_id, message_frames())
        told = await call
        own = "msg_" + job_id.removeprefix("job-")
        if is_stream:
            shown = _frames(told.body)
            assert [name for _, name, _ in shown] == [chunk["type"] for _, _, chunk in shown]
            assert (shown[0][2]["message"]["id"], shown[-1][1]) == (own, "message_stop")
        else:
            assert (told.json["id"], told.json["content"][0]["text"]) == (own, "".join(ANSWER))


async def test_kept_call_goes_on_with_the_next_queen(tmp_path: Path, caller: aiohttp.ClientSession) -> None:
    """A queen that ends in mid-answer loses nothing: the next one takes the call up, and tells its response."""
    registry = JobRegistry.open(None)
    async with queen_of(tmp_path, registry) as first:
        before = await first.live_hive()
        worker_id = before.has_worker()
        call = asyncio.ensure_future(_post(caller, await first.url() + CHAT_PATH, STREAM, KEEP))
        job_id = await _asked(before)
        lines = lines_of(frames_of(STREAM), job_id)
        await before.say(f"{worker_id}/stdout", *lines[:3])
    told = await asyncio.gather(call, return_exceptions=True)
    async with queen_of(tmp_path, JobRegistry(registry.store)) as queen:
        hive = await queen.hive()
        hive.hive_id, hive._offsets = before.hive_id, before._offsets
        hive.workers = [
            WorkerInfo(**{name: getattr(info, name) for name in info.__struct_fields__} | {"url": hive.url})
            for info in before.workers
        ]
        hive.beat()
        await _asked(hive)
        end_line = closing(job_id, frames=len(lines), completion_tokens=len(ANSWER))
        await hive.say(f"{worker_id}/stdout", *lines[3:], end_line)
        await queen.end(job_id)
        answer = await _get(caller, f"{await queen.url()}/v1/jobs/{job_id}/answer")
        said = await queen.said(job_id)
    await registry.close()

    assert "".join(_words(answer.body)) == "".join(ANSWER)
    assert "queen_resume" in said
    assert isinstance(told[0], aiohttp.ClientError)


async def test_stream_of_a_queen_that_stops_says_that_the_answer_goes_on(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """What was said is followed by one error frame that can be tried again; the worker is not told to stop."""
    call = asyncio.ensure_future(_post(caller, await whole_queen.url() + CHAT_PATH, STREAM, KEEP))
    job_id = await _asked(hive)
    await hive.say(f"{hive.workers[0].worker_id}/stdout", *lines_of(frames_of(STREAM)[:3], job_id))
    await whole_queen.service.close(0)
    told = await call

    chunks = [chunk for _, _, chunk in _frames(told.body)]
    error = chunks[-1]["error"]
    assert (error["code"], error["retryable"]) == ("unavailable", True)
    assert f"/v1/jobs/{job_id}/answer" in error["remedy"]
    assert hive.stopped == []


async def test_answer_of_a_job_that_is_no_kept_call_is_refused(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """An `infer` job, and a job that is not there, have no response of any API."""
    url = await whole_queen.url()
    job_id = await whole_queen.infer()
    told = await _get(caller, f"{url}/v1/jobs/{job_id}/answer")
    assert (told.status, told.json["error"]["code"]) == (404, "not_found")
    assert (await _get(caller, f"{url}/v1/jobs/job-00000000000000000000000000/answer")).status == 404


# Responses


RESPONSE: dict[str, Any] = {"model": MODEL, "input": "count", "metadata": {"a": "b"}}
BACKGROUND = RESPONSE | {"background": True}


async def _stored(
    queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession, call: dict[str, Any]
) -> tuple[str, str, _Told]:
    """Have a background response answered whole; returns the URL of responses, its id, and what came at once."""
    url = await queen.url() + "/v1/responses"
    told = await _post(caller, url, call)
    job_id = await _asked(hive, len(hive.asked) or 1)
    await _narrate(hive, job_id, response_frames())
    await queen.end(job_id)
    return url, "resp_" + job_id.removeprefix("job-"), told


async def test_background_response_is_answered_at_once_and_read_as_it_becomes(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """Queued when it is asked for, in progress while it is made, then the engine's object, all under one id."""
    url = await whole_queen.url() + "/v1/responses"
    told = await _post(caller, url, BACKGROUND)
    job_id = await _asked(hive)
    await until(lambda: whole_queen._place_of(job_id) is not None)
    during = await _get(caller, f"{url}/{told.json['id']}")
    await _narrate(hive, job_id, response_frames())
    await whole_queen.end(job_id)
    after = await _get(caller, f"{url}/{told.json['id']}")

    shown = {**told.json}
    assert shown["id"] == "resp_" + job_id.removeprefix("job-")
    assert (shown["status"], shown["object"], shown["background"], shown["output"]) == (
        "queued",
        "response",
        True,
        [],
    )
    assert told.job_id == job_id
    assert (during.json["status"], during.json["id"]) == ("in_progress", shown["id"])
    assert (after.json["status"], after.json["id"], after.json["model"]) == ("completed", shown["id"], "model")
    assert after.json["output"][0]["content"][0]["text"] == "".join(ANSWER)
    assert (after.json["usage"]["output_tokens"], after.json["metadata"]) == (len(ANSWER), {"a": "b"})
    body = hive.asked[0][0]
    assert ("background" in body, body["input"]) == (False, "count")


async def test_stored_responses_events_are_followed_from_any_number(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """`starting_after` and `Last-Event-ID` mean the same: the `sequence_number`, which is the log's."""
    url, response, _ = await _stored(whole_queen, hive, caller, BACKGROUND)
    whole = _frames((await _get(caller, f"{url}/{response}?stream=true")).body)
    assert [name for _, name, _ in whole][:2] == ["response.queued", "response.created"]
    assert {chunk["response"]["id"] for _, _, chunk in whole if "response" in chunk} == {response}
    numbers = [number for number, _, _ in whole]
    assert numbers == [chunk["sequence_number"] for _, _, chunk in whole]
    for index, number in enumerate(numbers, 1):
        by_query = await _get(caller, f"{url}/{response}?stream=true&starting_after={number}")
        by_header = await _get(caller, f"{url}/{response}?stream=true", {"last-event-id": str(number)})
        assert _frames(by_query.body) == whole[index:]
        assert by_header.body == by_query.body


async def test_response_is_cancelled_and_shown_as_cancelled(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """Cancelling stops the worker; again and again it changes nothing more."""
    url = await whole_queen.url() + "/v1/responses"
    response = (await _post(caller, url, BACKGROUND)).json["id"]
    job_id = await _asked(hive)
    cancelling = asyncio.ensure_future(_post(caller, f"{url}/{response}/cancel", {}))
    await until(lambda: hive.stopped == [f"{job_id}.1"])
    await hive.say(f"{hive.workers[0].worker_id}/stdout", closing(job_id, outcome="cancelled"))
    told = await cancelling

    assert (told.status, told.json["status"]) == (200, "cancelled")
    assert (await _post(caller, f"{url}/{response}/cancel", {})).json["status"] == "cancelled"
    assert (await _get(caller, f"{url}/{response}")).json["status"] == "cancelled"


async def test_response_that_failed_says_why(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """A failed response is shown with its error, and is no HTTP error."""
    url = await whole_queen.url() + "/v1/responses"
    response = (await _post(caller, url, BACKGROUND)).json["id"]
    job_id = await _asked(hive)
    failed = closing(job_id, outcome="failed", error={"code": "worker_failed", "message": "The engine failed."})
    await hive.say(f"{hive.workers[0].worker_id}/stdout", failed)
    await whole_queen.end(job_id)
    told = await _get(caller, f"{url}/{response}")

    assert (told.status, told.json["status"]) == (200, "failed")
    assert told.json["error"] == {"code": "worker_failed", "message": "The engine failed."}


async def test_deleted_response_is_gone_with_its_request_and_its_log(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """What was said and asked is erased; reading it again is 410."""
    url, response, _ = await _stored(whole_queen, hive, caller, BACKGROUND)
    async with caller.delete(f"{url}/{response}") as deleted:
        assert await deleted.json() == {"id": response, "object": "response", "deleted": True}

    assert (await _get(caller, f"{url}/{response}")).status == 410
    assert (await _get(caller, f"{url}/{response}?stream=true")).status == 410
    job_id = "job-" + response.removeprefix("resp_")
    assert "text" not in ((await whole_queen.registry.view(job_id)).result or {})


async def test_response_that_is_deleted_while_it_is_made_is_stopped_first(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """Deleting cancels."""
    url = await whole_queen.url() + "/v1/responses"
    response = (await _post(caller, url, BACKGROUND)).json["id"]
    job_id = await _asked(hive)
    deleting = asyncio.ensure_future(caller.delete(f"{url}/{response}"))
    await until(lambda: hive.stopped == [f"{job_id}.1"])
    await hive.say(f"{hive.workers[0].worker_id}/stdout", closing(job_id, outcome="cancelled"))
    async with await deleting as deleted:
        assert deleted.status == 200
    assert (await whole_queen.registry.view(job_id)).state == "cancelled"


@pytest.mark.parametrize("response", ["resp_x", "nothing", "resp_00000000000000000000000000"])
async def test_response_that_is_not_there_is_not_found(
    whole_queen: Queen, caller: aiohttp.ClientSession, response: str
) -> None:
    """An id of no response of ours is a 404, whatever its form."""
    url = await whole_queen.url() + "/v1/responses"
    assert (await _get(caller, f"{url}/{response}")).status == 404
    assert (await _post(caller, f"{url}/{response}/cancel", {})).status == 404


async def test_other_kept_calls_are_no_responses(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """A kept chat completion is not to be had at the Responses API."""
    url = await whole_queen.url()
    call = asyncio.ensure_future(_post(caller, url + CHAT_PATH, CHAT, KEEP))
    job_id = await _asked(hive)
    await _narrate(hive, job_id, frames_of(CHAT))
    await call
    assert (await _get(caller, f"{url}/v1/responses/resp_{job_id.removeprefix('job-')}")).status == 404


async def test_stored_response_that_streams_is_the_logs(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """`store: true` alone has a response kept; its own stream is the one that can be read again."""
    url = await whole_queen.url() + "/v1/responses"
    call = asyncio.ensure_future(_post(caller, url, RESPONSE | {"store": True, "stream": True}))
    job_id = await _asked(hive)
    await _narrate(hive, job_id, response_frames())
    told = await call
    again = await _get(caller, f"{url}/resp_{job_id.removeprefix('job-')}?stream=true")

    assert told.body == again.body
    assert _frames(told.body)[-1][1] == "response.completed"


async def test_failure_of_a_kept_message_is_told_in_its_own_form_also_later(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """Read again as a job's answer, Anthropic's stream ends with the event that its clients know."""
    url = await whole_queen.url()
    asked = {**CHAT, "max_tokens": 9, "stream": True}
    call = asyncio.ensure_future(_post(caller, url + "/v1/messages", asked, KEEP))
    job_id = await _asked(hive)
    lines = lines_of(message_frames()[:3], job_id)
    failure = {"code": "worker_failed", "message": "The engine failed."}
    told = closing(job_id, outcome="failed", frames=3, error=failure)
    await hive.say(f"{hive.workers[0].worker_id}/stdout", *lines, told)
    first = await call
    again = await _get(caller, f"{url}/v1/jobs/{job_id}/answer")

    assert _frames(first.body)[-1][1] == _frames(again.body)[-1][1] == "error"
    assert _frames(again.body)[-1][2]["error"]["type"] == "api_error"


@pytest.mark.parametrize("is_stream", [True, False])
async def test_head_of_an_answer_is_not_waited_for(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession, is_stream: bool
) -> None:
    """Nobody reads what would be followed to its end."""
    url = await whole_queen.url()
    call = asyncio.ensure_future(_post(caller, url + CHAT_PATH, CHAT | {"stream": is_stream}, KEEP))
    job_id = await _asked(hive)
    async with caller.head(f"{url}/v1/jobs/{job_id}/answer", timeout=aiohttp.ClientTimeout(5)) as head:
        assert (head.status, head.headers["x-job-id"]) == (200, job_id)
        assert head.content_type == ("text/event-stream" if is_stream else "application/json")
    call.cancel()


async def test_stream_that_was_cut_before_its_last_frame_gets_it(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """Whoever has the number of a chunk that the log's end stands for has not got [DONE] yet."""
    url = await whole_queen.url()
    call = asyncio.ensure_future(_post(caller, url + CHAT_PATH, STREAM, KEEP))
    job_id = await _asked(hive)
    lines = lines_of(frames_of(STREAM)[:-2], job_id)  # the usage is told by the end alone
    told = closing(job_id, frames=len(lines), prompt_tokens=PROMPT_TOKENS, completion_tokens=len(ANSWER))
    await hive.say(f"{hive.workers[0].worker_id}/stdout", *lines, told)
    body = (await call).body
    numbers = [number for number, _, _ in _frames(body) if number is not None]
    again = await _get(caller, f"{url}/v1/jobs/{job_id}/answer", {"last-event-id": str(numbers[-1])})

    assert body.endswith(DONE)
    assert again.body.endswith(DONE)


async def test_stream_that_is_had_to_its_end_has_no_more(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """As of a job's log: 204, so that browsers stop asking."""
    url = await whole_queen.url()
    call = asyncio.ensure_future(_post(caller, url + CHAT_PATH, STREAM, KEEP))
    job_id = await _asked(hive)
    await _narrate(hive, job_id, frames_of(STREAM))
    await call
    last = {"last-event-id": str((await whole_queen.end(job_id))["seq"])}
    again = await _get(caller, f"{url}/v1/jobs/{job_id}/answer", last)

    assert (again.status, again.body, again.job_id) == (204, b"", job_id)


# Narration


NARRATE = {"x-rbee-narrate": "1"}


@pytest.mark.parametrize("more", [{}, KEEP], ids=["relayed", "kept"])
async def test_chat_client_that_asks_for_it_is_told_what_it_waits_for(
    whole_queen: Queen, caller: aiohttp.ClientSession, more: dict[str, str]
) -> None:
    """The job's sentences come as thinking under the answer's own id, and end where the answer begins."""
    hive = await whole_queen.live_hive()
    hive.may_go_on.clear()
    call = asyncio.ensure_future(_post(caller, await whole_queen.url() + CHAT_PATH, STREAM, NARRATE | more))
    await until(lambda: len(hive.commands) == 1)
    [job_id] = whole_queen.service.runner.running
    await hive.say(f"{hive.hive_id}/boot", narration("hive_receive", "Starting a worker.", job_id=job_id))
    hive.may_go_on.set()
    await _asked(hive)
    frames = frames_of(STREAM)
    if more:
        await _narrate(hive, job_id, frames)
    else:
        for part in (*frames, None):
            hive.frames.put_nowait(part)
        told = closing(job_id, prompt_tokens=PROMPT_TOKENS, completion_tokens=len(ANSWER))
        await hive.say(f"{hive.workers[0].worker_id}/stdout", told)
    body = (await call).body
    late = narration("worker_say", "Too late.", job_id=job_id, attempt=1)
    await hive.say(f"{hive.workers[0].worker_id}/stdout", late)

    chunks = [chunk for _, _, chunk in _frames(body)]
    deltas = [part["delta"] for chunk in chunks for part in chunk["choices"]]
    story = [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta]
    assert story[0] == f"Accepted: {_described(whole_queen, job_id)}.\n"
    assert "Starting a worker.\n" in story
    assert [delta["role"] for delta in deltas if "role" in delta] == ["assistant"]
    assert "".join(_words(body)) == "".join(ANSWER)
    first_word = next(index for index, delta in enumerate(deltas) if delta.get("content"))
    assert all("reasoning_content" not in delta for delta in deltas[first_word:])
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[-1]["usage"]["total_tokens"] == PROMPT_TOKENS + len(ANSWER)
    assert body.endswith(DONE)


def _described(queen: Queen, job_id: str) -> str:
    """Return how the queen calls the job in its first sentence."""
    line = next(line for line in queen.sink.events if line["action"] == "queen_receive")
    return str(line["message"]).removeprefix("Accepted: ").removesuffix(".")


async def test_narrated_stream_that_fails_while_it_waits_ends_with_an_error_frame(
    whole_queen: Queen, caller: aiohttp.ClientSession
) -> None:
    """A stream that has begun has no status left to fail with."""
    asked = STREAM | {"queue_timeout_s": 0.3}
    told = await _post(caller, await whole_queen.url() + CHAT_PATH, asked, NARRATE)

    assert told.status == 200
    assert _frames(told.body)[-1][2]["error"]["code"] == "queue_timeout"
    assert not told.body.endswith(DONE)


async def test_narrated_stream_that_waits_when_the_queen_stops_is_not_flooded(
    whole_queen: Queen, caller: aiohttp.ClientSession
) -> None:
    """There is nothing more to be told: not even that it is still there, again and again."""
    url = await whole_queen.url() + CHAT_PATH
    async with caller.post(url, json=STREAM, headers=NARRATE) as response:
        body = await response.content.readany()
        [job_id] = whole_queen.service.runner.running
        whole_queen.registry.hub.close()
        await whole_queen.service.runner.cancel(job_id)
        body += await response.read()
    assert _frames(body)[-1][2]["error"]["code"] == "cancelled"
    assert b"still here" not in body


async def test_plain_stream_has_no_narration(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession
) -> None:
    """Who does not ask is told nothing but the answer."""
    call = asyncio.ensure_future(_post(caller, await whole_queen.url() + CHAT_PATH, STREAM, KEEP))
    job_id = await _asked(hive)
    await _narrate(hive, job_id, frames_of(STREAM))
    assert b"reasoning_content" not in (await call).body
