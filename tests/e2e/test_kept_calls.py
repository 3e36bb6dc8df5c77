"""Kept API calls and stored responses, by the real OpenAI client."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest

from rbee.testing import LocalStack
from tests.e2e.reading import MODEL, actions, assert_whole

LONG: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell a long story about a river."}],
    "max_tokens": 200,
    "temperature": 0,
    "stream": True,
    "stream_options": {"include_usage": True},
    "extra_body": {"ignore_eos": True},
}
KEEP = {"x-rbee-keep": "1"}


@pytest.fixture
async def client(rbee_stack: LocalStack) -> AsyncIterator[openai.AsyncOpenAI]:
    """Return an OpenAI client of the stack."""
    async with openai.AsyncOpenAI(base_url=f"{rbee_stack.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def _pieces(chunks: list[Any]) -> list[str]:
    return [text for chunk in chunks if chunk.choices and (text := chunk.choices[0].delta.content)]


async def _frames(stack: LocalStack, job_id: str, after: int = 0) -> bytes:
    """Read a kept call's response again."""
    headers = {"last-event-id": str(after)}
    url = f"{stack.url}/v1/jobs/{job_id}/answer"
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as response:
        assert response.status == 200, await response.text()
        return await response.read()


async def test_kept_stream_is_what_a_plain_one_is_and_can_be_read_again(
    rbee_stack: LocalStack, client: openai.AsyncOpenAI
) -> None:
    """The same greedy answer, relayed and kept: the same pieces and counts; read again, the same bytes."""
    plain = [chunk async for chunk in await client.chat.completions.create(**LONG)]
    stream = await client.chat.completions.create(**LONG, extra_headers=KEEP)
    kept = [chunk async for chunk in stream]
    job_id = stream.response.headers["x-job-id"]

    assert _pieces(kept) == _pieces(plain)
    assert kept[-1].usage.completion_tokens == plain[-1].usage.completion_tokens == 200
    assert {chunk.id for chunk in kept} == {"chatcmpl-" + job_id.removeprefix("job-")}
    whole = await _frames(rbee_stack, job_id)
    assert whole == await _frames(rbee_stack, job_id)
    half = whole.split(b"\n\n")[99]
    number = int(half.split(b"\n")[0].removeprefix(b"id: "))
    assert whole.endswith(half + b"\n\n" + await _frames(rbee_stack, job_id, number))


async def test_kept_call_that_does_not_stream_is_whole(rbee_stack: LocalStack, client: openai.AsyncOpenAI) -> None:
    """One response, its text in the job as well."""
    raw = await client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=8,
        extra_headers=KEEP,
    )
    completion = raw.parse()
    log = await rbee_stack.log(raw.headers["x-job-id"])
    assert completion.choices[0].message.content == log[-1]["result"]["text"]
    assert completion.usage is not None
    assert completion.usage.completion_tokens == log[-1]["result"]["usage"]["completion_tokens"]


async def test_kept_stream_outlives_its_caller_its_worker_and_its_queen(
    rbee_stack: LocalStack, client: openai.AsyncOpenAI
) -> None:
    """The worker is killed, then the queen, and the caller is gone: the answer is whole all the same, and one."""
    await client.chat.completions.create(model=MODEL, messages=LONG["messages"], max_tokens=1)
    asked = LONG | {"max_tokens": 300}
    stream = await client.chat.completions.create(**asked, extra_headers=KEEP)
    job_id = stream.response.headers["x-job-id"]
    before: list[Any] = []
    with pytest.raises(openai.APIConnectionError):
        async with asyncio.timeout(90):
            async for chunk in stream:
                before.append(chunk)
                if len(before) == 20:
                    await _kill_workers(rbee_stack)
                if len(before) == 120:
                    assert rbee_stack.queen is not None
                    await rbee_stack.queen.kill()
    await stream.close()
    await rbee_stack.restart_queen()
    log = await rbee_stack.log(job_id)
    frames = await _frames(rbee_stack, job_id)

    assert_whole(log)
    assert (log[-1]["state"], log[-1]["result"]["usage"]["completion_tokens"]) == ("completed", 300)
    assert {"queen_continue", "queen_resume"} <= set(actions(log))
    told = [event["text"] for event in log if event["kind"] == "token" and event["text"]]
    assert told[: len(_pieces(before))] == _pieces(before)
    assert frames.count(b'"finish_reason":"length"') == 1
    assert frames.count(b'"role":"assistant"') == 1
    assert frames.endswith(b"data: [DONE]\n\n")


async def _kill_workers(stack: LocalStack) -> None:
    """Kill every worker there is, by its number."""
    async with stack.client() as jobs:
        for worker in await jobs.workers():
            if worker.pid is not None:
                os.kill(worker.pid, signal.SIGKILL)


# Responses


async def test_background_response_is_polled_and_its_events_are_followed_from_the_middle(
    rbee_stack: LocalStack, client: openai.AsyncOpenAI
) -> None:
    """What OpenAI's client does with a background response: create, retrieve, stream from a number, delete."""
    response = await client.responses.create(
        model=MODEL, input="Tell a story.", background=True, max_output_tokens=60, temperature=0
    )
    assert response.status == "queued"
    seen = [event async for event in await client.responses.retrieve(response.id, stream=True, starting_after=0)]
    assert [event.type for event in seen][:2] == ["response.queued", "response.created"]
    assert seen[-1].type == "response.completed"
    middle = seen[len(seen) // 2].sequence_number
    rest = [
        event async for event in await client.responses.retrieve(response.id, stream=True, starting_after=middle)
    ]
    assert rest == seen[len(seen) // 2 + 1 :]
    whole = await client.responses.retrieve(response.id)
    assert (whole.status, whole.id) == ("completed", response.id)
    assert whole.output_text == "".join(e.delta for e in seen if e.type == "response.output_text.delta")
    await client.responses.delete(response.id)
    with pytest.raises(openai.APIStatusError) as gone:
        await client.responses.retrieve(response.id)
    assert gone.value.status_code == 410


async def test_background_response_is_cancelled(rbee_stack: LocalStack, client: openai.AsyncOpenAI) -> None:
    """A cancelled response has stopped its engine."""
    response = await client.responses.create(
        model=MODEL,
        input="Tell a long story.",
        background=True,
        extra_body={"ignore_eos": True},
        max_output_tokens=3000,
    )
    async for event in await client.responses.retrieve(response.id, stream=True, starting_after=0):
        if event.type == "response.output_text.delta":
            break
    cancelled = await client.responses.cancel(response.id)
    assert cancelled.status == "cancelled"
    log = await rbee_stack.log("job-" + response.id.removeprefix("resp_"))
    assert log[-1]["state"] == "cancelled"
    async with rbee_stack.client() as jobs:
        assert [worker.slots_used for worker in await jobs.workers()] == [0]


async def test_response_that_goes_on_from_an_earlier_one_is_refused(client: openai.AsyncOpenAI) -> None:
    """Earlier responses are no conversation here, and that is said."""
    with pytest.raises(openai.BadRequestError, match="does not go on from an earlier response") as refused:
        await client.responses.create(model=MODEL, input="And then?", previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"


# Narration


async def test_plain_chat_client_sees_why_it_waits(rbee_stack: LocalStack, client: openai.AsyncOpenAI) -> None:
    """The first call of a model: its start is told as thinking, then the answer comes, under one id."""
    asked = LONG | {"max_tokens": 8}
    stream = await client.chat.completions.create(**asked, extra_headers={"x-rbee-narrate": "1"})
    chunks = [chunk async for chunk in stream]
    log = await rbee_stack.log(stream.response.headers["x-job-id"])

    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    story = [text for delta in deltas if (text := getattr(delta, "reasoning_content", None))]
    told = [event["message"] + "\n" for event in log if event["kind"] == "narration"]
    assert story == told[: len(story)]
    assert any("Loading" in text for text in story)
    assert [delta.role for delta in deltas if delta.role] == ["assistant"]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert len(_pieces(chunks)) == 8
    assert chunks[-1].usage.completion_tokens == 8
