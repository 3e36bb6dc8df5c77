"""One real worker with the demo model: every way in which it answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from rbee.contracts.ids import new_id
from rbee.hive.models import ModelStore
from tests.integration.worker_process import CHAT, WorkerProcess

CONTEXT_TOKENS = 512
SLOTS = 2
HELLO = [{"role": "user", "content": "Tell a long story about a river."}]


@pytest.fixture(scope="module")
def worker(rbee_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """Run one worker for all tests here."""
    flags = ("--slots", str(SLOTS), "--context-tokens", str(CONTEXT_TOKENS), "--alias", "smollm2:135m")
    process = WorkerProcess(tmp_path_factory.mktemp("home"), "--model", str(demo_model(rbee_models)), *flags)
    yield process
    process.close()


def demo_model(models: Path) -> Path:
    """Return the demo model's file."""
    model = ModelStore(models).find("smollm2:135m")
    assert model is not None
    return Path(model.path)


@pytest.fixture
async def session(worker: WorkerProcess) -> AsyncIterator[aiohttp.ClientSession]:
    """Ask the worker, with its token."""
    async with await worker.session() as session:
        yield session


def ids(**more: str) -> tuple[str, dict[str, str]]:
    """Make the headers of a new job's first attempt."""
    job_id = new_id("job")
    return job_id, {"x-job-id": job_id, "x-request-id": f"{job_id}.1", **more}


async def ask(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Post and return the JSON answer of a success."""
    async with session.post(path, json=body) as response:
        answer: dict[str, Any] = await response.json()
        assert response.status == 200, answer
        return answer


async def test_stream_ends_whole_and_is_counted(worker: WorkerProcess, session: aiohttp.ClientSession) -> None:
    """So many tokens as were asked for, in the stream and in the closing line; the file's path nowhere."""
    job_id, headers = ids()
    body = {"messages": HELLO, "stream": True, "max_tokens": 7, "ignore_eos": True}
    async with session.post(CHAT, json=body, headers=headers) as response:
        frames = (await response.read()).split(b"\n\n")
        (closing,) = [line for line in worker.about(job_id) if line["action"] == "worker_inference"]
    assert frames[-2:] == [b"data: [DONE]", b""]
    chunks = [msgspec.json.decode(frame.removeprefix(b"data: ")) for frame in frames[:-2]]
    assert {chunk["model"] for chunk in chunks} == {"smollm2:135m"}
    assert chunks[-1]["timings"]["predicted_n"] == 7
    fields = closing["fields"]
    assert (fields["outcome"], fields["completion_tokens"], fields["finish_reason"]) == ("completed", 7, "length")
    assert fields["prompt_tokens"] > 7
    assert fields["time_to_first_token_s"] > 0
    assert fields["tokens_per_s"] > 0


@pytest.mark.parametrize("choices", [1, 2])
async def test_chat_without_stream_is_one_answer(session: aiohttp.ClientSession, choices: int) -> None:
    """Put together from the stream, with the usage of every choice."""
    body = {"messages": HELLO, "max_tokens": 6, "ignore_eos": True, "n": choices, "logprobs": True}
    answer = await ask(session, CHAT, body)
    assert (answer["object"], answer["model"]) == ("chat.completion", "smollm2:135m")
    assert [choice["index"] for choice in answer["choices"]] == list(range(choices))
    for choice in answer["choices"]:
        assert (choice["finish_reason"], choice["message"]["role"]) == ("length", "assistant")
        assert choice["message"]["content"]
        assert "".join(one["token"] for one in choice["logprobs"]["content"]) == choice["message"]["content"]
    usage = answer["usage"]
    assert usage["completion_tokens"] == 6 * choices
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def test_completion_without_stream_is_one_answer(session: aiohttp.ClientSession) -> None:
    """Two prompts make two choices."""
    body = {"prompt": ["Once", "Twice"], "max_tokens": 4, "ignore_eos": True}
    answer = await ask(session, "/v1/completions", body)
    assert [bool(choice["text"]) for choice in answer["choices"]] == [True, True]
    assert answer["usage"]["completion_tokens"] == 8


async def test_response_without_stream_is_one_answer(session: aiohttp.ClientSession) -> None:
    """The Responses API."""
    answer = await ask(
        session, "/v1/responses", {"input": "Tell a long story about a river.", "max_output_tokens": 5}
    )
    assert (answer["object"], answer["status"]) == ("response", "completed")
    assert answer["output"][0]["content"][0]["text"]
    assert answer["usage"]["output_tokens"] == 5


async def test_message_without_stream_is_one_answer(session: aiohttp.ClientSession) -> None:
    """Anthropic's messages."""
    answer = await ask(session, "/v1/messages", {"messages": HELLO, "max_tokens": 5})
    assert (answer["type"], answer["role"], answer["stop_reason"]) == ("message", "assistant", "max_tokens")
    assert answer["content"][0]["text"]
    assert answer["usage"]["output_tokens"] == 5


async def test_kept_answer_is_narrated(worker: WorkerProcess, session: aiohttp.ClientSession) -> None:
    """Accepted at once; the token lines count up to what was asked for, and then it is told once."""
    job_id, headers = ids(**{"x-rbee-keep": "1", "x-correlation-id": "corr-1"})
    body = {"messages": HELLO, "max_tokens": 9, "ignore_eos": True}
    for _ in range(2):
        async with session.post(CHAT, json=body, headers=headers) as response:
            assert (response.status, await response.json()) == (202, {"request_id": f"{job_id}.1"})
    closing = await worker.closing(job_id)
    lines = worker.about(job_id)
    tokens = lines[:-1]
    assert lines[-1] == closing
    assert {line["kind"] for line in tokens} == {"token"}
    assert {line["correlation_id"] for line in lines} == {"corr-1"}
    counts = [line["tokens"] for line in tokens]
    assert (counts, counts[-1]) == (sorted(counts), 9)
    assert "".join(line["text"] for line in tokens)
    assert (closing["fields"]["completion_tokens"], closing["fields"]["frames"]) == (9, len(tokens))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/messages"])
async def test_answers_of_every_form_can_be_kept(
    worker: WorkerProcess, session: aiohttp.ClientSession, path: str
) -> None:
    """With the engine's JSON beside the text."""
    job_id, headers = ids(**{"x-rbee-keep": "chunk"})
    body = {
        "prompt": "Once",
        "input": "Tell a long story about a river.",
        "messages": HELLO,
        "max_tokens": 5,
        "max_output_tokens": 5,
    }
    async with session.post(path, json=body, headers=headers) as response:
        assert response.status == 202
    closing = await worker.closing(job_id)
    tokens = worker.about(job_id)[:-1]
    assert "".join(line["text"] for line in tokens)
    assert all(isinstance(line["chunk"], dict) for line in tokens)
    assert (closing["fields"]["outcome"], closing["fields"]["completion_tokens"]) == ("completed", 5)


async def test_delete_stops_a_kept_answer_and_frees_its_slot(
    worker: WorkerProcess, session: aiohttp.ClientSession
) -> None:
    """The engine stops too: all slots answer again, long before the answer would have ended."""
    for _ in range(2 * SLOTS):
        job_id, headers = ids(**{"x-rbee-keep": "1"})
        body = {"messages": HELLO, "max_tokens": 400, "ignore_eos": True}
        async with session.post(CHAT, json=body, headers=headers) as response:
            assert response.status == 202
        await worker.has_begun(job_id)
        async with session.delete(f"/requests/{job_id}.1") as response:
            assert response.status == 202
        fields = (await worker.closing(job_id))["fields"]
        assert fields["outcome"] == "cancelled"
        assert 0 < fields["completion_tokens"] < 400
    await both_slots_answer(session)


@pytest.mark.parametrize("is_streaming", [True, False])
async def test_caller_that_leaves_frees_its_slot(
    worker: WorkerProcess, session: aiohttp.ClientSession, is_streaming: bool
) -> None:
    """Streaming or not, the engine stops when nobody waits for the answer."""
    for _ in range(SLOTS):
        job_id, headers = ids()
        body = {"messages": HELLO, "max_tokens": 400, "ignore_eos": True, "stream": is_streaming}
        asking = asyncio.ensure_future(session.post(CHAT, json=body, headers=headers))
        await until_slots_used(session, 1)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        if not asking.cancelled():
            asking.result().close()
        assert (await worker.closing(job_id))["fields"]["outcome"] == "cancelled"
    await until_slots_used(session, 0)
    await both_slots_answer(session)


async def until_slots_used(session: aiohttp.ClientSession, count: int) -> None:
    """Wait until so many slots are in use."""
    async with asyncio.timeout(30):
        while True:
            async with session.get("/readyz") as response:
                if (await response.json())["slots_used"] == count:
                    return


async def both_slots_answer(session: aiohttp.ClientSession) -> None:
    """Ask as much as the worker takes at once."""
    body = {"messages": HELLO, "max_tokens": 2}
    answers = await asyncio.gather(*[ask(session, CHAT, body) for _ in range(SLOTS)])
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [2] * SLOTS


@pytest.mark.parametrize("is_streaming", [True, False])
async def test_prompt_too_long_names_both_numbers(session: aiohttp.ClientSession, is_streaming: bool) -> None:
    """The context is that of one request, not that of all slots together."""
    body = {"messages": [{"role": "user", "content": "hi " * 1000}], "stream": is_streaming}
    async with session.post(CHAT, json=body) as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"]) == (400, "context_length_exceeded")
    assert error["message"].startswith("The prompt has 10")
    assert error["message"].endswith(f" tokens; the context holds {CONTEXT_TOKENS}.")


async def test_answers_end_where_their_own_context_does(session: aiohttp.ClientSession) -> None:
    """Prompt and answer together have the tokens of one request, however many others are being answered."""
    body = {"messages": [{"role": "user", "content": "hi " * 400}], "max_tokens": 500, "ignore_eos": True}
    for answer in await asyncio.gather(*[ask(session, CHAT, body) for _ in range(SLOTS)]):
        assert answer["usage"]["total_tokens"] == CONTEXT_TOKENS
        assert answer["choices"][0]["finish_reason"] == "length"


async def test_wrong_type_is_a_400_in_the_engines_words(session: aiohttp.ClientSession) -> None:
    """The field is named."""
    async with session.post(CHAT, json={"messages": HELLO, "temperature": "warm"}) as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"], error["type"]) == (400, "invalid", "invalid_request_error")
    assert "temperature" in error["message"]


async def test_embeddings_of_a_worker_for_answers_are_a_400(session: aiohttp.ClientSession) -> None:
    """It was not started for that."""
    async with session.post("/v1/embeddings", json={"input": "a"}) as response:
        assert response.status == 400
        assert (await response.json())["error"]["message"] == (
            "This worker was not started for embeddings, but for answers."
        )


async def test_small_routes_answer(session: aiohttp.ClientSession) -> None:
    """Models under the name they are shown by, tokens, and the template."""
    async with session.get("/v1/models") as response:
        assert [model["id"] for model in (await response.json())["data"]] == ["smollm2:135m"]
    assert len((await ask(session, "/tokenize", {"content": "hi there"}))["tokens"]) == 2
    assert (
        "Tell a long story about a river."
        in (await ask(session, "/apply-template", {"messages": HELLO}))["prompt"]
    )


async def test_engine_asks_for_its_own_key(worker: WorkerProcess, session: aiohttp.ClientSession) -> None:
    """The worker's directory is the user's alone, and the socket in it wants a key that nobody else has."""
    assert worker.directory.stat().st_mode & 0o777 == 0o700
    connector = aiohttp.UnixConnector(path=str(worker.directory / "engine.sock"))
    async with (
        aiohttp.ClientSession("http://engine", connector=connector) as stranger,
        stranger.post(CHAT, json={"messages": HELLO}) as response,
    ):
        assert response.status == 401


async def test_nothing_but_events_stands_on_stdout(worker: WorkerProcess, session: aiohttp.ClientSession) -> None:
    """Each line is one; no prompt is in any narration."""
    await ask(session, CHAT, {"messages": [{"role": "user", "content": "canary-7f3a"}], "max_tokens": 1})
    lines = worker.lines()
    assert {line["kind"] for line in lines} <= {"narration", "token"}
    narrated = [line for line in lines if line["kind"] == "narration"]
    assert "canary-7f3a" not in msgspec.json.encode(narrated).decode()
    assert "canary-7f3a" not in worker.stderr.read_text()
