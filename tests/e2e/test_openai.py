"""The OpenAI-compatible routes, by the real OpenAI client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest

from rbee.testing import LocalStack
from tests.e2e.reading import MODEL, actions, assert_whole


@pytest.fixture
async def client(rbee_stack: LocalStack) -> AsyncIterator[openai.AsyncOpenAI]:
    """Return an OpenAI client of the stack."""
    async with openai.AsyncOpenAI(base_url=f"{rbee_stack.url}/v1", api_key="none", max_retries=0) as made:
        yield made


async def test_chat_completion_is_answered_whole(rbee_stack: LocalStack, client: openai.AsyncOpenAI) -> None:
    """A plain call: one answer, a job behind it, its log without a word of it."""
    raw = await client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Repeat: canaryq"}],
        max_tokens=8,
        extra_headers={"x-correlation-id": "c-1"},
    )
    completion = raw.parse()
    assert completion.model == MODEL
    assert completion.choices[0].message.content
    assert completion.usage is not None
    assert completion.usage.completion_tokens <= 8
    assert raw.headers["x-correlation-id"] == "c-1"
    events = await rbee_stack.log(raw.headers["x-job-id"])
    assert_whole(events)
    assert actions(events)[-2:] == ["worker_inference", "queen_complete"]
    assert all(event["kind"] != "token" for event in events)
    assert "canaryq" not in str(events)
    assert {event["correlation_id"] for event in events} == {"c-1"}


async def test_chat_completion_is_streamed_with_usage(rbee_stack: LocalStack, client: openai.AsyncOpenAI) -> None:
    """A streamed call: pieces as they are made, one finish, usage when asked for."""
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Tell a long story about a river."}],
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    finishes = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert text
    assert [reason for reason in finishes if reason] == ["length"]
    assert chunks[-1].usage is not None
    assert {chunk.model for chunk in chunks} == {MODEL}


async def test_caller_that_leaves_cancels_its_job(rbee_stack: LocalStack, client: openai.AsyncOpenAI) -> None:
    """Closing the connection stops the engine and ends the job as cancelled."""
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Tell a long story."}],
        max_tokens=3000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    job_id = stream.response.headers["x-job-id"]
    async for _ in stream:
        break
    await stream.close()
    events = await rbee_stack.log(job_id)
    assert_whole(events)
    assert (events[-1]["state"], events[-1]["reason"]) == ("cancelled", "user")


async def test_call_that_does_not_stream_is_cancelled_when_its_caller_leaves(rbee_stack: LocalStack) -> None:
    """Without streaming too: a caller who gives up does not leave the engine running."""
    async with openai.AsyncOpenAI(base_url=f"{rbee_stack.url}/v1", api_key="none", max_retries=0) as client:
        await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=1
        )
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Tell a long story."}],
                max_tokens=3000,
                extra_body={"ignore_eos": True},
                timeout=1.0,
            )
    async with rbee_stack.client() as jobs:
        newest = (await jobs.jobs(limit=1)).data[0]
    events = await rbee_stack.log(newest.job_id)
    assert events[-1]["state"] == "cancelled"


async def test_errors_are_those_the_client_expects(rbee_stack: LocalStack, client: openai.AsyncOpenAI) -> None:
    """Bad calls raise the client's own exception types, with codes and a remedy."""
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.chat.completions.create(model="gtp-4", messages=[{"role": "user", "content": "Hi"}])
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(model=MODEL, messages=[])
    with pytest.raises(openai.BadRequestError) as too_long:
        await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 6000}])
    assert too_long.value.code == "context_length_exceeded"
    assert "4096" in str(too_long.value)
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], extra_body={"temperature": "hot"}
        )


async def test_models_are_listed_with_their_state(rbee_stack: LocalStack, client: openai.AsyncOpenAI) -> None:
    """The list names the demo model, available before its first use and loaded after."""
    before = {model.id: model.model_dump()["state"] async for model in client.models.list()}
    assert before[MODEL] == "available"
    await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=1)
    after = {model.id: model.model_dump()["state"] async for model in client.models.list()}
    assert after[MODEL] == "loaded"


async def test_many_streams_at_once_all_end(rbee_stack: LocalStack, client: openai.AsyncOpenAI) -> None:
    """More calls than slots: each waits its turn, none is refused or lost."""

    async def call(number: int) -> str:
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": f"Count to {number}."}], max_tokens=16, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    answers = await asyncio.gather(*(call(number) for number in range(10)))
    assert all(answers)
