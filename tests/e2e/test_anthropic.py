"""Conversations by Anthropic's own Python client: `/v1/messages`."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
import pytest
from anthropic.types import MessageParam

from rbee.testing import LocalStack
from tests.e2e.reading import MODEL, actions, assert_whole, first

pytestmark = pytest.mark.asyncio(loop_scope="module")

ALIAS = "my/fast:one"
WITHIN_S = 2.0
STORY: list[MessageParam] = [{"role": "user", "content": "Tell a long story about a river."}]
ENDLESS = {"ignore_eos": True}


async def assert_stopped(stack: LocalStack, job_id: str) -> None:
    """Check that a job was cancelled, and its slot free, within the promised time."""
    async with asyncio.timeout(3 * WITHIN_S):
        events = await stack.log(job_id)
        async with stack.client() as client:
            used = [worker.slots_used for worker in await client.workers()]
    assert_whole(events)
    assert (events[-1]["state"], events[-1]["reason"]) == ("cancelled", "user")
    assert used == [0]


async def test_message_is_answered_whole_and_is_a_job(
    api_stack: LocalStack, anthropic_client: anthropic.AsyncAnthropic
) -> None:
    """Content, usage and the stop's reason as that API has them; a job whose log has not a word of it."""
    raw = await anthropic_client.messages.with_raw_response.create(
        model=ALIAS, max_tokens=6, system="Be brief.", messages=[{"role": "user", "content": "Repeat: canaryq"}]
    )
    message = await raw.parse()
    events = await api_stack.log(raw.headers["x-job-id"])
    [block] = message.content
    assert block.type == "text"
    assert block.text
    assert (message.model, message.role, message.type) == (ALIAS, "assistant", "message")
    assert message.usage.input_tokens > 0
    assert 0 < message.usage.output_tokens <= 6
    assert message._request_id == raw.headers["request-id"] == raw.headers["x-job-id"]
    assert_whole(events)
    assert actions(events)[-2:] == ["worker_inference", "queen_complete"]
    assert "canaryq" not in str(events)


async def test_message_is_streamed_as_events(anthropic_client: anthropic.AsyncAnthropic) -> None:
    """From `message_start` to `message_stop`, the text in pieces between."""
    stream = await anthropic_client.messages.create(model=ALIAS, max_tokens=6, messages=STORY, stream=True)
    events = [event async for event in stream]
    kinds = [event.type for event in events]
    start = events[0]
    assert start.type == "message_start"
    assert start.message.model == ALIAS
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 1
    assert "content_block_delta" in kinds


async def test_stream_helper_puts_the_message_together(anthropic_client: anthropic.AsyncAnthropic) -> None:
    """The client's own accumulation: text as it comes, and the whole message at the end."""
    async with anthropic_client.messages.stream(model=MODEL, max_tokens=6, messages=STORY) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        message = await stream.get_final_message()
    [block] = message.content
    assert block.type == "text"
    assert block.text == text != ""
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 6


async def test_stop_sequence_ends_the_message_before_it(anthropic_client: anthropic.AsyncAnthropic) -> None:
    """Whole and streamed: it does not come itself, and is told to be what ended the message."""

    async with anthropic_client.messages.stream(
        model=MODEL, max_tokens=200, messages=STORY, stop_sequences=["e"]
    ) as stream:
        streamed = await stream.get_final_message()
    whole = await anthropic_client.messages.create(
        model=MODEL, max_tokens=200, messages=STORY, stop_sequences=["e"]
    )
    for message in (whole, streamed):
        text = "".join(block.text for block in message.content if block.type == "text")
        assert "e" not in text
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "e")


async def test_tokens_are_counted_by_a_job_of_their_own(
    api_stack: LocalStack, anthropic_client: anthropic.AsyncAnthropic
) -> None:
    """`count_tokens` says what the same call's usage says."""
    raw = await anthropic_client.messages.with_raw_response.count_tokens(model=MODEL, messages=STORY)
    counted = (await raw.parse()).input_tokens
    used = (await anthropic_client.messages.create(model=MODEL, max_tokens=1, messages=STORY)).usage
    assert counted == used.input_tokens + (used.cache_read_input_tokens or 0)
    await api_stack.log(raw.headers["x-job-id"])
    async with api_stack.client() as client:
        job = await client.job(raw.headers["x-job-id"])
    assert (job.operation, job.state) == ("token_count", "completed")
    assert job.result is not None
    assert job.result["usage"]["prompt_tokens"] == counted


async def test_tools_that_the_template_has_no_place_for_are_told_of(
    api_stack: LocalStack, anthropic_client: anthropic.AsyncAnthropic
) -> None:
    """The demo model never hears of tools: it answers in words, and the job's log warns."""
    raw = await anthropic_client.messages.with_raw_response.create(
        model=MODEL,
        max_tokens=6,
        messages=STORY,
        tools=[{"name": "get_weather", "input_schema": {"type": "object", "properties": {}}}],
    )
    message = await raw.parse()
    assert [block.type for block in message.content] == ["text"]
    assert first(await api_stack.log(raw.headers["x-job-id"]), "worker_ignore_tools")["level"] == "warning"


async def test_errors_are_those_the_client_expects(anthropic_client: anthropic.AsyncAnthropic) -> None:
    """Bad calls raise the client's own types, with that API's words, ours beside, and the request's id."""
    create = anthropic_client.messages.create
    with pytest.raises(anthropic.NotFoundError) as unknown:
        await create(model="claude-9", max_tokens=1, messages=STORY)
    with pytest.raises(anthropic.BadRequestError) as empty:
        await create(model=MODEL, max_tokens=1, messages=[])
    with pytest.raises(anthropic.BadRequestError) as too_long:
        await create(model=MODEL, max_tokens=1, messages=[{"role": "user", "content": "word " * 6000}])
    with pytest.raises(anthropic.BadRequestError) as by_schema:
        await create(
            model=MODEL,
            max_tokens=1,
            messages=STORY,
            output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}},
        )
    assert unknown.value.type == "not_found_error"
    codes = []
    for refused in (unknown, empty, too_long, by_schema):
        body: Any = refused.value.body
        assert body["type"] == "error"
        assert body["error"]["remedy"]
        assert refused.value.request_id == body["request_id"]
        assert refused.value.response.headers["x-should-retry"] == "false"
        codes.append(body["error"]["code"])
    assert codes == ["model_not_found", "invalid", "context_length_exceeded", "invalid"]
    for invalid in (empty, too_long, by_schema):
        assert invalid.value.type == "invalid_request_error"


async def test_stream_whose_job_is_cancelled_raises_in_the_client(
    api_stack: LocalStack, anthropic_client: anthropic.AsyncAnthropic
) -> None:
    """An error in a stream that has begun comes as that API's `error` event, which the client raises."""
    stream = await anthropic_client.messages.create(
        model=MODEL, max_tokens=3000, messages=STORY, stream=True, extra_body=ENDLESS
    )
    job_id = stream.response.headers["x-job-id"]
    with pytest.raises(anthropic.APIStatusError) as told:
        async for _ in stream:
            async with api_stack.client() as client:
                await client.cancel(job_id)
    body: Any = told.value.body
    assert (body["type"], body["error"]["code"], body["request_id"]) == ("error", "cancelled", job_id)
    await assert_stopped(api_stack, job_id)


async def test_caller_that_leaves_a_stream_cancels_its_job(
    api_stack: LocalStack, anthropic_client: anthropic.AsyncAnthropic
) -> None:
    """Leaving the block early stops the engine; the slot is free within two seconds."""
    async with anthropic_client.messages.stream(
        model=MODEL, max_tokens=3000, messages=STORY, extra_body=ENDLESS
    ) as stream:
        job_id = stream.response.headers["x-job-id"]
        async for _ in stream.text_stream:
            break
    await assert_stopped(api_stack, job_id)


async def test_caller_that_gives_up_on_a_whole_message_cancels_its_job(
    api_stack: LocalStack, anthropic_client: anthropic.AsyncAnthropic
) -> None:
    """Without a stream too: the client's own time-out leaves no engine running."""
    await anthropic_client.messages.create(model=MODEL, max_tokens=1, messages=STORY)
    with pytest.raises(anthropic.APITimeoutError):
        await anthropic_client.messages.create(
            model=MODEL,
            max_tokens=3000,
            messages=STORY,
            extra_body=ENDLESS,
            extra_headers={"x-correlation-id": "given-up"},
            timeout=1.0,
        )
    async with api_stack.client() as jobs:
        [given_up] = (await jobs.jobs(correlation_id="given-up")).data
    await assert_stopped(api_stack, given_up.job_id)


async def test_models_are_listed_as_that_api_has_them(anthropic_client: anthropic.AsyncAnthropic) -> None:
    """The list pages to its end; each has a name to show, and an alias says what it stands for."""
    listed = {model.id: model async for model in anthropic_client.models.list()}
    one = await anthropic_client.models.retrieve(ALIAS)
    assert set(listed) == {MODEL, ALIAS}
    assert all(model.type == "model" and model.display_name == name for name, model in listed.items())
    assert (one.id, one.model_dump()["alias_of"], one.created_at.year) == (ALIAS, MODEL, 1970)


async def test_blocking_client_is_answered_as_well(api_stack: LocalStack) -> None:
    """The client without async, in a thread: whole and streamed."""

    def ask() -> tuple[str, str]:
        with anthropic.Anthropic(base_url=api_stack.url, api_key="none", max_retries=0) as client:
            whole = client.messages.create(model=MODEL, max_tokens=3, messages=STORY)
            with client.messages.stream(model=MODEL, max_tokens=3, messages=STORY) as stream:
                streamed = "".join(stream.text_stream)
            return "".join(block.text for block in whole.content if block.type == "text"), streamed

    whole, streamed = await asyncio.to_thread(ask)
    assert whole
    assert streamed
