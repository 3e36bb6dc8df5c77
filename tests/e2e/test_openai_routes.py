"""The other routes by OpenAI's own Python client: embeddings, completions, responses, models, rankings."""

from __future__ import annotations

import asyncio
import math
from typing import Any, Literal

import aiohttp
import openai
import pytest
from pydantic import BaseModel

from rbee.testing import LocalStack
from tests.e2e.reading import MODEL, actions, assert_whole

pytestmark = pytest.mark.asyncio(loop_scope="module")

ALIAS = "my/fast:one"
WIDTH = 576  # of the demo model's vectors
TEXTS = ["the river runs to the sea", "a stone"]


class Weather(BaseModel):
    """What an answer by a schema is parsed as."""

    sky: Literal["clear", "cloudy"]
    is_cold: bool


def length(vector: list[float]) -> float:
    """Return how long a vector is."""
    return math.sqrt(sum(number * number for number in vector))


async def test_texts_become_vectors_on_a_worker_that_embeds(
    api_stack: LocalStack, openai_client: openai.AsyncOpenAI
) -> None:
    """A list of texts, as base64, which the client asks for by itself; a worker beside the one that talks."""
    await openai_client.completions.create(model=MODEL, prompt="Hello", max_tokens=1)
    raw = await openai_client.embeddings.with_raw_response.create(model=MODEL, input=TEXTS)
    answer = raw.parse()
    events = await api_stack.log(raw.headers["x-job-id"])
    async with api_stack.client() as client:
        purposes = sorted(worker.purpose for worker in await client.workers())
        job = await client.job(raw.headers["x-job-id"])
    assert [one.index for one in answer.data] == [0, 1]
    assert all(len(one.embedding) == WIDTH for one in answer.data)
    assert all(abs(length(one.embedding) - 1) < 1e-3 for one in answer.data)
    assert answer.model == MODEL
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    assert purposes == ["embed", "generate"]
    assert_whole(events)
    assert job.operation == "embedding"
    assert job.result is not None
    assert job.result["usage"]["prompt_tokens"] == answer.usage.prompt_tokens
    assert "stone" not in str(events)


async def test_vectors_are_the_same_in_either_encoding_and_shortened_to_length_one(
    openai_client: openai.AsyncOpenAI,
) -> None:
    """`encoding_format` float or base64; `dimensions` keeps the first numbers, more than there are is refused."""
    floats = await openai_client.embeddings.create(model=MODEL, input=TEXTS[0], encoding_format="float")
    packed = await openai_client.embeddings.create(model=MODEL, input=TEXTS[0])
    short = await openai_client.embeddings.create(model=MODEL, input=TEXTS, dimensions=8)
    short_floats = await openai_client.embeddings.create(
        model=MODEL, input=TEXTS[0], dimensions=8, encoding_format="float"
    )
    with pytest.raises(openai.BadRequestError) as too_many:
        await openai_client.embeddings.create(model=MODEL, input=TEXTS, dimensions=WIDTH + 1)
    whole = floats.data[0].embedding
    assert packed.data[0].embedding == pytest.approx(whole, abs=1e-3)
    assert [len(one.embedding) for one in short.data] == [8, 8]
    assert all(abs(length(one.embedding) - 1) < 1e-3 for one in short.data)
    shrunk = [number / length(whole[:8]) for number in whole[:8]]
    for one in (short.data[0], short_floats.data[0]):
        assert one.embedding == pytest.approx(shrunk, abs=1e-3)
    assert too_many.value.param == "dimensions"


async def test_vector_of_a_text_does_not_depend_on_what_is_embedded_with_it(
    openai_client: openai.AsyncOpenAI,
) -> None:
    """Alone, among others of one call, and beside other calls: the same to a thousandth."""
    texts = [*TEXTS, "one two three four five six seven eight nine ten", "x"]
    alone = [(await openai_client.embeddings.create(model=MODEL, input=text)).data[0].embedding for text in texts]
    together = await openai_client.embeddings.create(model=MODEL, input=texts)
    beside = await asyncio.gather(
        *(openai_client.embeddings.create(model=MODEL, input=text) for text in [*texts, *texts])
    )
    for number, vector in enumerate(alone):
        assert together.data[number].embedding == pytest.approx(vector, abs=1e-3)
        for again in (beside[number], beside[number + len(texts)]):
            assert again.data[0].embedding == pytest.approx(vector, abs=1e-3)


async def test_embedding_of_nothing_is_refused_without_a_job(openai_client: openai.AsyncOpenAI) -> None:
    """An empty list is the caller's error, told at once; an empty text is told by the engine."""
    with pytest.raises(openai.BadRequestError) as nothing:
        await openai_client.embeddings.create(model=MODEL, input=[])
    with pytest.raises(openai.BadRequestError) as empty:
        await openai_client.embeddings.create(model=MODEL, input="")
    assert nothing.value.param == "input"
    assert "x-job-id" not in nothing.value.response.headers
    assert "x-job-id" in empty.value.response.headers


async def test_documents_are_ranked_by_a_worker_that_ranks(api_stack: LocalStack) -> None:
    """`/v1/rerank`, which no client of OpenAI's knows: the best first, by index and score."""
    body = {"model": MODEL, "query": "a river", "documents": ["a stone", "the river"], "top_n": 2}
    async with (
        aiohttp.ClientSession(api_stack.url) as session,
        session.post("/v1/rerank", json=body) as response,
    ):
        answer: dict[str, Any] = await response.json()
        job_id = response.headers["x-job-id"]
    scores = [result["relevance_score"] for result in answer["results"]]
    assert response.status == 200
    assert answer["model"] == MODEL
    assert sorted(result["index"] for result in answer["results"]) == [0, 1]
    assert scores == sorted(scores, reverse=True)
    async with api_stack.client() as client:
        job = await client.job(job_id)
        [ranking] = [worker for worker in await client.workers() if worker.purpose == "rerank"]
    assert (job.operation, job.worker_id) == ("rerank", ranking.worker_id)


async def test_prompt_is_gone_on_from(api_stack: LocalStack, openai_client: openai.AsyncOpenAI) -> None:
    """`/v1/completions` whole: the text and its usage, and no word of either in the job's log."""
    raw = await openai_client.completions.with_raw_response.create(
        model=ALIAS, prompt="Once upon a canaryq", max_tokens=5, logprobs=2
    )
    answer = raw.parse()
    events = await api_stack.log(raw.headers["x-job-id"])
    [choice] = answer.choices
    assert (choice.finish_reason, answer.model, answer.object) == ("length", ALIAS, "text_completion")
    assert choice.text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or []) == choice.text
    assert len(choice.logprobs.token_logprobs or []) == len(choice.logprobs.top_logprobs or []) == 5
    assert "canaryq" not in str(events)


async def test_several_prompts_are_gone_on_from_as_one_stream(openai_client: openai.AsyncOpenAI) -> None:
    """A list of prompts, whole and streamed: a choice for each, and every chunk is one."""
    whole = await openai_client.completions.create(model=MODEL, prompt=["One", "Two"], max_tokens=3)
    stream = await openai_client.completions.create(model=MODEL, prompt=["One", "Two"], max_tokens=3, stream=True)
    chunks = [chunk async for chunk in stream]
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert None not in chunks
    for index in (0, 1):
        ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert [reason for reason in ends if reason] == ["length"]


async def test_what_the_engine_would_not_heed_is_refused_by_name(openai_client: openai.AsyncOpenAI) -> None:
    """`echo` and its like: an answer without them would pass for one with them."""
    with pytest.raises(openai.BadRequestError) as echo:
        await openai_client.completions.create(model=MODEL, prompt="One", max_tokens=1, echo=True)
    with pytest.raises(openai.BadRequestError) as suffix:
        await openai_client.completions.create(model=MODEL, prompt="One", max_tokens=1, suffix="the end")
    unasked = await openai_client.completions.create(
        model=MODEL, prompt="One", max_tokens=1, echo=False, best_of=1
    )
    assert (echo.value.param, suffix.value.param) == ("echo", "suffix")
    assert unasked.choices[0].text


async def test_response_is_created_whole(api_stack: LocalStack, openai_client: openai.AsyncOpenAI) -> None:
    """`/v1/responses` without a stream."""
    raw = await openai_client.responses.with_raw_response.create(
        model=ALIAS, instructions="Be brief.", input="Name a canaryq.", max_output_tokens=6, temperature=0
    )
    response = raw.parse()
    events = await api_stack.log(raw.headers["x-job-id"])
    assert (response.status, response.model) == ("completed", ALIAS)
    assert response.output_text
    assert response.usage is not None
    assert 0 < response.usage.output_tokens <= 6
    assert actions(events)[-2:] == ["worker_inference", "queen_complete"]
    assert "canaryq" not in str(events)


async def test_response_is_streamed_as_events(openai_client: openai.AsyncOpenAI) -> None:
    """Numbered from 0 without a hole, with the place of each piece; `response.completed` repeats the whole."""
    stream = await openai_client.responses.create(
        model=ALIAS, input="Tell a story.", max_output_tokens=6, stream=True
    )
    events = [event async for event in stream]
    pieces = [event for event in events if event.type == "response.output_text.delta"]
    last = events[-1]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert all((piece.output_index, piece.content_index) == (0, 0) for piece in pieces)
    assert last.type == "response.completed"
    assert last.response.output_text == "".join(piece.delta for piece in pieces)
    assert last.response.model == ALIAS


async def test_response_stream_helper_puts_the_answer_together(openai_client: openai.AsyncOpenAI) -> None:
    """The client's own accumulation ends with the whole response."""
    async with openai_client.responses.stream(model=MODEL, input="Tell a story.", max_output_tokens=6) as stream:
        text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
        response = await stream.get_final_response()
    assert text
    assert response.output_text == text


async def test_response_whose_job_is_cancelled_raises_in_the_client(
    api_stack: LocalStack, openai_client: openai.AsyncOpenAI
) -> None:
    """An error in a stream of events that has begun is raised as well."""
    stream = await openai_client.responses.create(
        model=MODEL, input="Tell a story.", stream=True, extra_body={"ignore_eos": True}
    )
    with pytest.raises(openai.APIError) as told:
        async for event in stream:
            if event.type == "response.output_text.delta":
                async with api_stack.client() as client:
                    await client.cancel(stream.response.headers["x-job-id"])
    assert told.value.code == "cancelled"


async def test_response_by_a_schema_is_parsed(openai_client: openai.AsyncOpenAI) -> None:
    """`text.format`, as `responses.parse` sends it: an object of the caller's own class."""
    response = await openai_client.responses.parse(
        model=MODEL, input="How is the weather?", text_format=Weather, max_output_tokens=60
    )
    assert isinstance(response.output_parsed, Weather)


async def test_models_are_listed_with_their_state_and_aliases(openai_client: openai.AsyncOpenAI) -> None:
    """The list pages to its end, names what an alias stands for, and says what is loaded."""
    await openai_client.completions.create(model=MODEL, prompt="Hello", max_tokens=1)
    listed = {model.id: model async for model in openai_client.models.list()}
    assert set(listed) == {MODEL, ALIAS}
    for model in listed.values():
        assert (model.object, model.owned_by, model.created) == ("model", "rbee", 0)
        assert model.model_dump()["state"] == "loaded"
    assert listed[ALIAS].model_dump()["alias_of"] == MODEL
    assert "alias_of" not in listed[MODEL].model_dump()


async def test_one_model_is_retrieved_by_names_with_slashes_and_colons(openai_client: openai.AsyncOpenAI) -> None:
    """A name, an alias, and a reference that no hive has yet; a name that no source takes raises NotFoundError."""
    for name in (MODEL, ALIAS, "hf:org/repo:Q4_K_M"):
        assert (await openai_client.models.retrieve(name)).id == name
    with pytest.raises(openai.NotFoundError) as unknown:
        await openai_client.models.retrieve("gpt-4")
    assert unknown.value.code == "model_not_found"
    assert unknown.value.request_id
