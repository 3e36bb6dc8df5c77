"""API calls whose worker is killed in mid-answer, read by the real OpenAI client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from rbee.testing import LocalStack
from tests.e2e.reading import MODEL, actions, assert_whole, first

PROMPT = [{"role": "user", "content": "Tell a long story about a river."}]


@pytest.fixture
async def client(rbee_stack: LocalStack) -> AsyncIterator[openai.AsyncOpenAI]:
    """Return an OpenAI client of the stack."""
    async with openai.AsyncOpenAI(base_url=f"{rbee_stack.url}/v1", api_key="none", max_retries=0) as made:
        yield made


async def _kill_workers(stack: LocalStack) -> None:
    """Kill every worker there is, by its number."""
    async with stack.client() as jobs:
        for worker in await jobs.workers():
            if worker.pid is not None:
                os.kill(worker.pid, signal.SIGKILL)


async def _read(stack: LocalStack, stream: Any, *, kill_at: int | None) -> list[Any]:
    """Read a stream to its end; the worker is killed when so many pieces of text have come."""
    chunks, pieces = [], 0
    async with asyncio.timeout(90):
        async for chunk in stream:
            chunks.append(chunk)
            pieces += bool(chunk.choices and chunk.choices[0].delta.content)
            if pieces == kill_at:
                kill_at = None
                await _kill_workers(stack)
    return chunks


def _pieces(chunks: list[Any]) -> list[str]:
    return [text for chunk in chunks if chunk.choices and (text := chunk.choices[0].delta.content)]


def _text(chunks: list[Any]) -> str:
    return "".join(_pieces(chunks))


async def test_stream_goes_on_when_its_worker_is_killed(
    rbee_stack: LocalStack, client: openai.AsyncOpenAI
) -> None:
    """kill -9 in mid-stream: one answer of exactly as many tokens, its beginning untouched, the seam told."""
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": PROMPT,
        "max_tokens": 200,
        "temperature": 0,
        "seed": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        "extra_body": {"ignore_eos": True},
    }
    whole = await _read(rbee_stack, await client.chat.completions.create(**asked), kill_at=None)
    stream = await client.chat.completions.create(**asked)
    chunks = await _read(rbee_stack, stream, kill_at=20)

    log = await rbee_stack.log(stream.response.headers["x-job-id"])
    assert_whole(log)
    seam = first(log, "queen_continue")
    said = seam["fields"]["after_tokens"]
    assert 20 <= said < 200
    assert _pieces(chunks)[:said] == _pieces(whole)[:said]
    assert [reason for chunk in chunks for c in chunk.choices if (reason := c.finish_reason)] == ["length"]
    assert [c.delta.role for chunk in chunks for c in chunk.choices if c.delta.role] == ["assistant"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert len({chunk.model for chunk in chunks}) == 1
    usage, usual = chunks[-1].usage, whole[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (usual.prompt_tokens, 200)
    assert usage.total_tokens == usage.prompt_tokens + 200
    end = log[-1]
    assert (end["state"], end["result"]["attempts"]) == ("completed", 2)
    assert end["result"]["usage"] == {"prompt_tokens": usual.prompt_tokens, "completion_tokens": 200}
    assert actions(log).count("worker_exit") == 1
    assert all(event["kind"] != "token" for event in log)


async def test_json_of_a_killed_worker_goes_on_to_be_what_the_schema_says(
    rbee_stack: LocalStack, client: openai.AsyncOpenAI
) -> None:
    """A schema holds over the seam: what both workers said is one document of it."""
    words = {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 25, "maxItems": 30}
    schema = {"type": "object", "properties": {"words": words}, "required": ["words"]}
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "List words as JSON."}],
        "temperature": 0,
        "stream": True,
        "response_format": {"type": "json_schema", "json_schema": {"name": "words", "schema": schema}},
    }
    stream = await client.chat.completions.create(**asked)
    chunks = await _read(rbee_stack, stream, kill_at=15)

    assert "queen_continue" in actions(await rbee_stack.log(stream.response.headers["x-job-id"]))
    assert 25 <= len(json.loads(_text(chunks))["words"]) <= 30


async def test_call_with_tools_whose_worker_is_killed_ends_in_an_error(
    rbee_stack: LocalStack, client: openai.AsyncOpenAI
) -> None:
    """What cannot be gone on with raises the client's own error, and is no whole answer."""
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": PROMPT,
        "max_tokens": 200,
        "stream": True,
        "tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}],
        "extra_body": {"ignore_eos": True},
    }
    stream = await client.chat.completions.create(**asked)
    with pytest.raises(openai.APIError, match="cannot be continued on another worker: it may call tools") as error:
        await _read(rbee_stack, stream, kill_at=10)

    assert error.value.code == "worker_lost"
    assert (await rbee_stack.log(stream.response.headers["x-job-id"]))[-1]["reason"] == "worker_lost"
