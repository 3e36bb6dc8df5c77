"""Conversations by OpenAI's own Python client: `/v1/chat/completions`."""

from __future__ import annotations

import asyncio
from typing import Literal

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

from rbee.testing import LocalStack
from tests.e2e.reading import MODEL, actions, assert_whole, first

pytestmark = pytest.mark.asyncio(loop_scope="module")

WITHIN_S = 2.0
STORY: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Tell a long story about a river."}]
ALIAS = "my/fast:one"


class Weather(BaseModel):
    """What an answer by a schema is parsed as."""

    sky: Literal["clear", "cloudy"]
    is_cold: bool


async def assert_stopped(stack: LocalStack, job_id: str) -> None:
    """Check that a job was cancelled, and its slot free, within the promised time."""
    async with asyncio.timeout(3 * WITHIN_S):
        events = await stack.log(job_id)
        async with stack.client() as client:
            used = [worker.slots_used for worker in await client.workers() if worker.purpose == "generate"]
    assert_whole(events)
    assert (events[-1]["state"], events[-1]["reason"]) == ("cancelled", "user")
    assert used == [0]


async def test_call_is_answered_whole_and_is_a_job(
    api_stack: LocalStack, openai_client: openai.AsyncOpenAI
) -> None:
    """One answer with its usage and headers; a job behind it whose log has not a word of it."""
    raw = await openai_client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Repeat: canaryq"}],
        max_tokens=8,
        extra_headers={"x-correlation-id": "c-1"},
    )
    completion = raw.parse()
    assert completion.model == MODEL
    assert completion.choices[0].message.content
    assert completion.usage is not None
    assert 0 < completion.usage.completion_tokens <= 8
    assert raw.headers["x-correlation-id"] == "c-1"
    assert raw.headers["x-request-id"] == raw.headers["x-job-id"] == completion._request_id
    events = await api_stack.log(raw.headers["x-job-id"])
    assert_whole(events)
    assert actions(events)[-2:] == ["worker_inference", "queen_complete"]
    assert all(event["kind"] != "token" for event in events)
    assert "canaryq" not in str(events)
    assert {event["correlation_id"] for event in events} == {"c-1"}


async def test_call_is_streamed_with_usage(openai_client: openai.AsyncOpenAI) -> None:
    """Pieces as they are made, one finish, and the usage last when it is asked for."""
    stream = await openai_client.chat.completions.create(
        model=MODEL,
        messages=STORY,
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
    assert chunks[-1].usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.model for chunk in chunks} == {MODEL}


async def test_stream_can_be_read_as_raw_lines(openai_client: openai.AsyncOpenAI) -> None:
    """`with_streaming_response` gives headers before the body, and a body that ends with `[DONE]`."""
    async with openai_client.chat.completions.with_streaming_response.create(
        model=MODEL, messages=STORY, max_tokens=3, stream=True
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-job-id"] == response.headers["x-request-id"]
        lines = [line async for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"


async def test_stream_helper_puts_the_answer_together(openai_client: openai.AsyncOpenAI) -> None:
    """The client's own accumulation ends with a whole completion."""
    async with openai_client.chat.completions.stream(
        model=MODEL, messages=STORY, max_tokens=400, temperature=0, stop=["."]
    ) as stream:
        kinds = [event.type async for event in stream]
        completion = await stream.get_final_completion()
    assert kinds.count("content.done") == 1
    assert completion.choices[0].message.content
    assert completion.choices[0].finish_reason == "stop"


async def test_two_answers_to_one_prompt(openai_client: openai.AsyncOpenAI) -> None:
    """`n=2`, whole and streamed: two choices, one usage that counts both, in the stream told once and last."""
    whole = await openai_client.chat.completions.create(
        model=MODEL, messages=STORY, max_tokens=4, n=2, temperature=1
    )
    stream = await openai_client.chat.completions.create(
        model=MODEL,
        messages=STORY,
        max_tokens=4,
        n=2,
        temperature=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8
    assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1}
    [usage] = [chunk.usage for chunk in chunks if chunk.usage]
    assert chunks[-1].usage == usage
    assert (usage.completion_tokens, usage.prompt_tokens) == (8, whole.usage.prompt_tokens)
    assert usage.total_tokens == usage.prompt_tokens + 8


async def test_seed_makes_an_answer_repeatable(openai_client: openai.AsyncOpenAI) -> None:
    """The same seed gives the same words, at a temperature at which others would come."""

    async def ask(seed: int) -> str | None:
        completion = await openai_client.chat.completions.create(
            model=MODEL,
            messages=STORY,
            max_tokens=12,
            temperature=1.5,
            seed=seed,
            extra_body={"cache_prompt": False},
        )
        return completion.choices[0].message.content

    assert await ask(11) == await ask(11)


async def test_stop_words_end_the_answer_before_them(openai_client: openai.AsyncOpenAI) -> None:
    """What comes before the word is what would have come without it; the word itself does not come."""

    async def ask(stop: list[str] | None) -> tuple[str, str]:
        completion = await openai_client.chat.completions.create(
            model=MODEL,
            messages=STORY,
            max_tokens=24,
            temperature=0,
            stop=stop,
            extra_body={"cache_prompt": False},
        )
        [choice] = completion.choices
        return choice.message.content or "", choice.finish_reason

    text, _ = await ask(None)
    word = text.split()[4]
    assert await ask([word]) == (text.partition(word)[0], "stop")


async def test_logprobs_are_told_for_every_token(openai_client: openai.AsyncOpenAI) -> None:
    """Whole and streamed, with the alternatives that were asked for."""
    whole = await openai_client.chat.completions.create(
        model=MODEL, messages=STORY, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    stream = await openai_client.chat.completions.create(
        model=MODEL, messages=STORY, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2, stream=True
    )
    streamed = [
        token
        async for chunk in stream
        for choice in chunk.choices
        if choice.logprobs is not None
        for token in choice.logprobs.content or []
    ]
    assert whole.choices[0].logprobs is not None
    for tokens in (whole.choices[0].logprobs.content, streamed):
        assert tokens is not None
        assert len(tokens) == 3
        assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens)
    assert "".join(token.token for token in streamed) == whole.choices[0].message.content


async def test_answer_by_a_schema_is_parsed(openai_client: openai.AsyncOpenAI) -> None:
    """`response_format` with a JSON schema: the client's `parse` gets an object of the caller's own class."""
    completion = await openai_client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "How is the weather?"}],
        response_format=Weather,
        max_tokens=60,
    )
    assert isinstance(completion.choices[0].message.parsed, Weather)


async def test_tools_that_the_template_has_no_place_for_are_told_of(
    api_stack: LocalStack, openai_client: openai.AsyncOpenAI
) -> None:
    """The demo model never hears of tools: it answers in words, and the job's log warns."""
    raw = await openai_client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": "How is the weather in Rome?"}],
        max_tokens=8,
        tools=[{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}],
    )
    message = raw.parse().choices[0].message
    events = await api_stack.log(raw.headers["x-job-id"])
    warning = first(events, "worker_ignore_tools")
    assert message.tool_calls is None
    assert message.content
    assert (warning["level"], warning["attempt"]) == ("warning", 1)
    assert events[-1]["state"] == "completed"


async def test_alias_is_answered_by_its_model_under_its_own_name(
    api_stack: LocalStack, openai_client: openai.AsyncOpenAI
) -> None:
    """The answer repeats the name that was asked with; the job names the model, and what its settings changed."""
    raw = await openai_client.chat.completions.with_raw_response.create(
        model=ALIAS, messages=STORY, max_tokens=2, logit_bias={"1": -100}
    )
    stream = await openai_client.chat.completions.create(
        model=ALIAS, messages=STORY, max_tokens=2, stream=True, extra_body={"min_p": 0.2}
    )
    assert {chunk.model async for chunk in stream} == {ALIAS}
    assert raw.parse().model == ALIAS
    async with api_stack.client() as client:
        assert (await client.job(raw.headers["x-job-id"])).model == MODEL
    told = first(await api_stack.log(raw.headers["x-job-id"]), "queen_parameters")
    assert told["message"] == f"The settings of {MODEL} filled in min_p and took out logit_bias."
    assert told["fields"] == {"filled": ["min_p"], "forced": [], "stripped": ["logit_bias"]}
    overruled = await api_stack.log(stream.response.headers["x-job-id"])
    assert "queen_parameters" not in actions(overruled)


async def test_caller_that_leaves_a_stream_cancels_its_job(
    api_stack: LocalStack, openai_client: openai.AsyncOpenAI
) -> None:
    """Closing the stream stops the engine; the slot is free within two seconds."""
    stream = await openai_client.chat.completions.create(
        model=MODEL, messages=STORY, max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    async for _ in stream:
        break
    await stream.close()
    await assert_stopped(api_stack, stream.response.headers["x-job-id"])


async def test_caller_that_gives_up_on_a_whole_answer_cancels_its_job(
    api_stack: LocalStack, openai_client: openai.AsyncOpenAI
) -> None:
    """Without a stream too: the client's own time-out leaves no engine running."""
    await openai_client.chat.completions.create(model=MODEL, messages=STORY, max_tokens=1)
    with pytest.raises(openai.APITimeoutError):
        await openai_client.chat.completions.create(
            model=MODEL,
            messages=STORY,
            max_tokens=3000,
            extra_body={"ignore_eos": True},
            extra_headers={"x-correlation-id": "given-up"},
            timeout=1.0,
        )
    async with api_stack.client() as jobs:
        [given_up] = (await jobs.jobs(correlation_id="given-up")).data
    await assert_stopped(api_stack, given_up.job_id)


async def test_stream_whose_job_is_cancelled_raises_in_the_client(
    api_stack: LocalStack, openai_client: openai.AsyncOpenAI
) -> None:
    """An error in a stream that has begun is no end of the answer: the client raises it."""
    stream = await openai_client.chat.completions.create(
        model=MODEL, messages=STORY, max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    job_id = stream.response.headers["x-job-id"]
    with pytest.raises(openai.APIError) as told:
        async for _ in stream:
            async with api_stack.client() as client:
                await client.cancel(job_id)
    assert told.value.code == "cancelled"
    await assert_stopped(api_stack, job_id)


async def test_errors_are_those_the_client_expects(openai_client: openai.AsyncOpenAI) -> None:
    """Bad calls raise the client's own types, with the code, the field and the request's id."""
    create = openai_client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as unknown:
        await create(model="gtp-4", messages=STORY)
    with pytest.raises(openai.BadRequestError) as empty:
        await create(model=MODEL, messages=[])
    with pytest.raises(openai.BadRequestError) as too_long:
        await create(model=MODEL, messages=[{"role": "user", "content": "word " * 6000}])
    with pytest.raises(openai.BadRequestError) as hot:
        await create(model=MODEL, messages=STORY, extra_body={"temperature": "hot"})
    assert (unknown.value.code, unknown.value.type) == ("model_not_found", "invalid_request_error")
    assert (empty.value.code, empty.value.param) == ("invalid", "messages")
    assert too_long.value.code == "context_length_exceeded"
    assert "4096" in str(too_long.value)
    assert hot.value.code == "invalid"
    for refused in (unknown, empty, too_long, hot):
        headers = refused.value.response.headers
        assert refused.value.request_id == headers["x-request-id"]
        assert headers["x-should-retry"] == "false"
    for no_job in (unknown, empty):
        assert "x-job-id" not in no_job.value.response.headers
    for job in (too_long, hot):
        assert job.value.request_id == job.value.response.headers["x-job-id"]


async def test_deadline_that_passes_is_an_error_of_the_server(openai_client: openai.AsyncOpenAI) -> None:
    """A call's own `timeout_s` ends it with 504 and the reason as its code; the client does not repeat it."""
    with pytest.raises(openai.InternalServerError) as late:
        await openai_client.chat.completions.create(
            model=MODEL, messages=STORY, max_tokens=3000, extra_body={"ignore_eos": True, "timeout_s": 0.5}
        )
    assert (late.value.status_code, late.value.code, late.value.type) == (504, "timeout", "timeout_error")
    assert late.value.response.headers["x-should-retry"] == "false"


async def test_blocking_client_is_answered_as_well(api_stack: LocalStack) -> None:
    """The client without async, in a thread: whole and streamed."""

    def ask() -> tuple[str | None, str]:
        with openai.OpenAI(base_url=f"{api_stack.url}/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(model=MODEL, messages=STORY, max_tokens=3)
            stream = client.chat.completions.create(model=MODEL, messages=STORY, max_tokens=3, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
            return whole.choices[0].message.content, text

    whole, streamed = await asyncio.to_thread(ask)
    assert whole
    assert streamed


async def test_many_streams_at_once_all_end(openai_client: openai.AsyncOpenAI) -> None:
    """More calls than slots: each waits its turn, none is refused or lost."""

    async def call(number: int) -> str:
        stream = await openai_client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": f"Count to {number}."}], max_tokens=16, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    answers = await asyncio.gather(*(call(number) for number in range(10)))
    assert all(answers)
