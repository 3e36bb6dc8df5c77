"""What the clients of OpenAI and Anthropic meet at the edges: a cold start, a closed door, a full queue."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import anthropic
import openai
import pytest

from rbee.testing import LocalStack
from rbee.testing.stack import ONE_THREAD
from tests.e2e.reading import MAIN_PATH, MODEL, actions, first

KEY = "a-long-and-secret-key"
SOON_S = 1.0


async def test_cold_call_tells_the_whole_story_and_says_how_long_its_worker_stays(rbee_stack: LocalStack) -> None:
    """The log of an embedding is as an `infer` job's; `keep_alive` stops its worker, `priority` is the job's."""
    async with openai.AsyncOpenAI(base_url=f"{rbee_stack.url}/v1", api_key="none", max_retries=0) as client:
        before = {model.id: model.model_dump()["state"] async for model in client.models.list()}
        raw = await client.embeddings.with_raw_response.create(
            model=MODEL, input=["a", "b"], extra_body={"keep_alive": "1s", "priority": 3}
        )
        job_id = raw.headers["x-job-id"]
        events = await rbee_stack.log(job_id)
        async with rbee_stack.client() as jobs, asyncio.timeout(30):
            worker_id = (await jobs.job(job_id)).worker_id
            async for event in jobs.follow_log(f"/v1/workers/{worker_id}/stream"):
                if event.get("action") == "worker_exit":
                    break
        after = (await client.models.retrieve(MODEL)).model_dump()["state"]
    assert before == {MODEL: "available"}
    assert actions(events) == MAIN_PATH
    assert first(events, "queen_receive")["message"] == f"Accepted: /v1/embeddings of {MODEL}."
    assert after == "available"


async def test_key_is_taken_in_the_header_that_each_client_sends() -> None:
    """OpenAI's sends it as bearer, Anthropic's as `x-api-key`; a wrong one raises each client's own type."""
    async with LocalStack(with_hive=False, env={"RBEE_API_KEY": KEY}) as stack:
        url = f"{stack.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as let_in:
            assert [model.id async for model in let_in.models.list()] == [MODEL]
        async with openai.AsyncOpenAI(base_url=url, api_key="wrong", max_retries=0) as stranger:
            with pytest.raises(openai.AuthenticationError) as refused:
                await stranger.models.list()
        async with anthropic.AsyncAnthropic(base_url=stack.url, api_key=KEY, max_retries=0) as let_in_too:
            assert [model.id async for model in let_in_too.models.list()] == [MODEL]
        async with anthropic.AsyncAnthropic(base_url=stack.url, api_key="wrong", max_retries=0) as stranger_too:
            with pytest.raises(anthropic.AuthenticationError) as refused_too:
                await stranger_too.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": "Hi"}])
        assert KEY not in stack.logs()
    assert refused.value.code == "invalid_api_key"
    assert refused_too.value.type == "authentication_error"
    assert refused_too.value.request_id


async def test_full_queue_is_told_with_the_time_to_wait_and_tried_again_by_the_client() -> None:
    """429 with `Retry-After`: RateLimitError in each client, after as many tries as it was allowed."""
    async with (
        LocalStack(with_hive=False, env={"RBEE_QUEUED_MAX": "1"}) as stack,
        stack.client() as jobs,
        openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client,
        anthropic.AsyncAnthropic(base_url=stack.url, api_key="none", max_retries=1) as patient,
    ):
        waiting = await jobs.submit({"operation": "infer", "model": MODEL, "prompt": "Hi"})
        with pytest.raises(openai.RateLimitError) as full:
            await client.completions.create(model=MODEL, prompt="Hi")
        began_s = time.monotonic()
        with pytest.raises(anthropic.RateLimitError) as still_full:
            await patient.messages.create(model=MODEL, max_tokens=1, messages=[{"role": "user", "content": "Hi"}])
        waited_s = time.monotonic() - began_s
        await jobs.cancel(waiting.job_id)
    headers = full.value.response.headers
    assert (full.value.code, headers["x-should-retry"]) == ("overloaded", "true")
    assert still_full.value.type == "rate_limit_error"
    assert waited_s >= float(still_full.value.response.headers["retry-after"])
    assert int(headers["retry-after"]) >= 1


async def test_call_that_waits_for_a_hive_too_long_has_its_own_code() -> None:
    """`queue_timeout_s` ends a call that nobody takes: 504 `queue_timeout`, shaped for whoever asked."""
    async with LocalStack(with_hive=False) as stack:
        async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError) as late:
                await client.responses.create(model=MODEL, input="Hi", extra_body={"queue_timeout_s": SOON_S})
        async with anthropic.AsyncAnthropic(base_url=stack.url, api_key="none", max_retries=0) as client_too:
            with pytest.raises(anthropic.InternalServerError) as late_too:
                await client_too.messages.create(
                    model=MODEL,
                    max_tokens=1,
                    messages=[{"role": "user", "content": "Hi"}],
                    extra_body={"queue_timeout_s": SOON_S},
                )
    assert (late.value.status_code, late.value.code) == (504, "queue_timeout")
    assert (late_too.value.status_code, late_too.value.type) == (504, "timeout_error")
    assert late_too.value.request_id == late_too.value.response.headers["x-job-id"]


async def test_settings_of_a_model_hold_on_every_way_to_it(rbee_models: Path) -> None:
    """A limit that is forced holds for calls of each API and for `infer` jobs; each log says so once."""
    config = f'{ONE_THREAD}[aliases]\nfast = "{MODEL}"\n[models."{MODEL}"]\nforced = {{ max_tokens = 3 }}\n'
    said = f"The settings of {MODEL} forced max_tokens."
    async with LocalStack(models=rbee_models, config=config) as stack:
        async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
            chat = await client.chat.completions.with_raw_response.create(
                model="fast",
                messages=[{"role": "user", "content": "Tell a long story."}],
                max_completion_tokens=900,
            )
            response = await client.responses.with_raw_response.create(model="fast", input="Tell a long story.")
        async with anthropic.AsyncAnthropic(base_url=stack.url, api_key="none", max_retries=0) as client_too:
            message = await client_too.messages.create(
                model="fast", max_tokens=900, messages=[{"role": "user", "content": "Tell a long story."}]
            )
        job = await stack.run_job({"operation": "infer", "model": "fast", "prompt": "Tell a long story."})
        logs = [await stack.log(raw.headers["x-job-id"]) for raw in (chat, response)]
    usages = (chat.parse().usage, response.parse().usage)
    assert usages[0] is not None
    assert usages[1] is not None
    tokens = [usages[0].completion_tokens, usages[1].output_tokens, message.usage.output_tokens]
    assert tokens == [3, 3, 3]
    assert job[-1]["result"]["usage"]["completion_tokens"] == 3
    assert [[event["message"] for event in log if event.get("action") == "queen_parameters"] for log in logs] == [
        [said],
        ["The settings of smollm2:135m forced max_output_tokens."],
    ]
    assert first(job, "queen_parameters")["message"] == said
