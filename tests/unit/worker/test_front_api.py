"""What the front does for the clients of each API: names, counted tokens, errors in a stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.worker.worker_stage import ASKED, CHAT, DONE, FINISH, MODEL, Script, chat, data, stage

MESSAGES, COUNT, RESPONSES = "/v1/messages", "/v1/messages/count_tokens", "/v1/responses"
JSON = "application/json"
FAILURE = {"code": 500, "message": "no memory", "type": "server_error"}
FAILS = data({"error": FAILURE})
BARE = b"event: error\n" + data(FAILURE)  # as llama.cpp has it at Anthropic's route


@pytest.mark.parametrize(
    ("path", "fails", "start"),
    [
        (MESSAGES, FAILS, b'event: error\ndata: {"type":"error","error":{'),
        (MESSAGES, BARE, b'event: error\ndata: {"type":"error","error":{'),
        (CHAT, FAILS, b'data: {"error":{'),
    ],
)
async def test_error_in_a_stream_is_shaped_for_whoever_reads_it(
    tmp_path: Path, path: str, fails: bytes, start: bytes
) -> None:
    """In whichever form the engine tells of it; once, and with its reason."""
    begun = b'event: message_start\ndata: {"type":"message_start","message":{}}\n\n'
    async with stage(tmp_path, Script(parts=[begun, fails])) as worker:
        async with worker.session.post(path, json={**ASKED, "stream": True}) as response:
            assert response.status == 200
            received = await response.read()
        closing = await worker.closing()
    assert received.startswith(begun + start)
    assert received.endswith(b"}\n\n")
    assert received.count(b"no memory") == 1
    assert closing["fields"]["outcome"] == "failed"


async def test_refusal_before_a_stream_is_told_in_the_queens_own_shape(tmp_path: Path) -> None:
    """She reads it, and shapes it for her caller."""
    refused = Script(parts=[b'{"error":{"code":400,"message":"no","type":"invalid_request_error"}}'], status=400)
    async with stage(tmp_path, refused) as worker, worker.session.post(MESSAGES, json=ASKED) as response:
        told = await response.json()
    assert (response.status, told["error"]["code"], told["error"]["message"]) == (400, "invalid", "no")
    assert "type" not in told


async def test_name_that_was_asked_with_is_the_answers_and_the_engine_hears_its_own(tmp_path: Path) -> None:
    """Streamed, put together, and kept alike."""
    parts: list[Any] = [chat("a", model=MODEL), FINISH, DONE]
    asked = {**ASKED, "model": "my/fast:one"}
    async with stage(tmp_path, *(Script(parts=parts) for _ in range(3))) as worker:
        async with worker.session.post(CHAT, json={**asked, "stream": True}) as response:
            assert await response.read() == chat("a", model="my/fast:one") + FINISH + DONE
        async with worker.session.post(CHAT, json=asked) as response:
            assert (await response.json())["model"] == "my/fast:one"
        headers = {"x-request-id": "job-a.1", "x-job-id": "job-a", "x-rbee-keep": "chunk"}
        async with worker.session.post(CHAT, json=asked, headers=headers) as response:
            assert response.status == 202
        await worker.until(lambda: len(worker.closings()) == 3)
        assert worker.tokens()[0]["chunk"]["model"] == "my/fast:one"
        assert [one["model"] for one in worker.engine.asked] == [MODEL] * 3


async def test_counted_tokens_are_passed_on_and_stand_in_the_closing_line(tmp_path: Path) -> None:
    """It takes a slot and has its line, as every request of a job."""
    counted = b'{"input_tokens":31}'
    async with stage(tmp_path, Script(parts=[counted], media=JSON)) as worker:
        async with worker.session.post(COUNT, json=ASKED) as response:
            assert await response.read() == counted
        fields = (await worker.closing())["fields"]
    assert (fields["outcome"], fields["prompt_tokens"], fields["completion_tokens"]) == ("completed", 31, None)


async def test_kept_events_of_a_response_are_numbered(tmp_path: Path) -> None:
    """So that the stream that is made of the log is what the client's own reader takes."""
    said = [{"type": "response.created", "response": {}}, {"type": "response.completed", "response": {}}]
    frames = [b"event: " + one["type"].encode() + b"\n" + data(one) for one in said]  # type: ignore[attr-defined]
    headers = {"x-request-id": "job-a.1", "x-job-id": "job-a", "x-rbee-keep": "chunk"}
    async with stage(tmp_path, Script(parts=frames)) as worker:
        async with worker.session.post(RESPONSES, json={"input": "a"}, headers=headers) as response:
            assert response.status == 202
        await worker.closing()
        chunks = [line["chunk"] for line in worker.tokens()]
    assert [chunk["sequence_number"] for chunk in chunks] == [0, 1]


async def test_vectors_are_asked_as_numbers_where_they_are_shortened(tmp_path: Path) -> None:
    """And given in the encoding that the caller asked for."""
    answer = b'{"data":[{"embedding":[3.0,4.0,12.0],"index":0}],"usage":{"prompt_tokens":2}}'
    asked = {"input": "a", "dimensions": 2, "encoding_format": "base64"}
    async with stage(tmp_path, Script(parts=[answer], media=JSON), purpose="embed") as worker:
        async with worker.session.post("/v1/embeddings", json=asked) as response:
            told = msgspec.json.decode(await response.read())
        assert worker.engine.asked == [{**asked, "encoding_format": "float"}]
    assert told["data"] == [{"embedding": "mpkZP83MTD8=", "index": 0}]
