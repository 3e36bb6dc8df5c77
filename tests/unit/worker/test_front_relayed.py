"""Relayed requests: the engine's frames as they are, and the engine stopped when nobody listens."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from rbee.worker import relay
from tests.unit.worker.worker_stage import ASKED, CHAT, DONE, FINISH, HELLO, Script, chat, data, stage

STREAM = {**ASKED, "stream": True}
IDS = {"x-request-id": "job-a.3", "x-job-id": "job-a", "x-correlation-id": "corr-1"}


async def test_stream_passes_byte_for_byte_without_the_engines_headers(tmp_path: Path) -> None:
    """However the engine cuts it, the caller gets the same bytes, and the ids of its request."""
    whole = b"".join(HELLO)
    async with stage(tmp_path, Script(parts=[whole[:7], whole[7:50], whole[50:]])) as worker:
        async with worker.session.post(CHAT, json=STREAM, headers=IDS) as response:
            assert await response.read() == whole
        assert {name: response.headers[name] for name in IDS} == IDS
        assert response.content_type == "text/event-stream"
        assert not {"server", "access-control-allow-origin"} & {name.lower() for name in response.headers}
        assert worker.engine.asked == [STREAM]


async def test_frame_is_sent_as_soon_as_it_is_whole(tmp_path: Path) -> None:
    """The engine goes on only after the caller has had the first frame, and half of the second has not come."""
    go_on = asyncio.Event()
    first, second = chat("a"), chat("b")
    script = Script(parts=[first + second[:9], go_on, second[9:], FINISH, DONE])
    async with stage(tmp_path, script) as worker, worker.session.post(CHAT, json=STREAM) as response:
        assert await response.content.readany() == first
        go_on.set()
        assert await response.content.read() == second + FINISH + DONE


async def test_closing_line_stands_before_the_last_bytes(tmp_path: Path) -> None:
    """Whoever has read `[DONE]` finds the closing line written, with the engine's numbers and the caller's ids."""
    never = asyncio.Event()
    async with (
        stage(tmp_path, Script(parts=[*HELLO, never])) as worker,
        worker.session.post(CHAT, json=STREAM, headers=IDS) as response,
        asyncio.timeout(10),
    ):
        while DONE.strip() != (await response.content.readline()).strip():
            pass
        (line,) = worker.closings()
    assert (line["job_id"], line["correlation_id"], line["attempt"]) == ("job-a", "corr-1", 3)
    fields = line["fields"]
    assert fields.pop("time_to_first_token_s") >= 0
    assert fields == {
        "request_id": "job-a.3",
        "outcome": "completed",
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "tokens_per_s": 50.0,
        "finish_reason": "stop",
    }


async def test_error_in_the_stream_is_translated(tmp_path: Path) -> None:
    """What was whole before is sent; the engine's error comes in the house's shape, last."""
    failure = data({"error": {"code": 500, "message": "boom", "type": "server_error"}})
    async with stage(tmp_path, Script(parts=[chat("a") + failure])) as worker:
        async with worker.session.post(CHAT, json=STREAM) as response:
            body = await response.read()
        line = await worker.closing()
    assert body.startswith(chat("a"))
    error = msgspec.json.decode(body[len(chat("a")) :].removeprefix(b"data: "))["error"]
    assert (error["code"], error["message"], error["retryable"]) == (
        "worker_failed",
        "The engine failed: boom",
        True,
    )
    assert (line["fields"]["outcome"], line["fields"]["error"]["code"]) == ("failed", "worker_failed")


async def test_stream_that_breaks_off_is_no_success(tmp_path: Path) -> None:
    """Without its last frame an answer is not whole."""
    async with stage(tmp_path, Script(parts=[chat("a")])) as worker:
        async with worker.session.post(CHAT, json=STREAM) as response:
            body = await response.read()
        line = await worker.closing()
    assert b"The engine broke off its answer." in body
    assert line["fields"]["outcome"] == "failed"


async def test_text_that_looks_like_a_frame_is_text(tmp_path: Path) -> None:
    """An answer may say anything; only real frames count."""
    text = 'data: [DONE]\n\ndata: {"error":{}} "usage":{"finish_reason":"x"}'
    async with stage(tmp_path, Script(parts=[chat(text), FINISH, DONE])) as worker:
        async with worker.session.post(CHAT, json=STREAM) as response:
            assert await response.read() == chat(text) + FINISH + DONE
        line = await worker.closing()
    assert (line["fields"]["outcome"], line["fields"]["finish_reason"]) == ("completed", "stop")


async def test_call_without_stream_is_asked_as_a_stream(tmp_path: Path) -> None:
    """The caller gets one JSON answer; the engine was asked so that it can be stopped."""
    asked = {**ASKED, "stream": False, "stream_options": {"include_usage": True}, "max_tokens": 2}
    async with stage(tmp_path, Script(parts=list(HELLO))) as worker:
        async with worker.session.post(CHAT, json=asked) as response:
            answer = await response.json()
            assert len(worker.closings()) == 1
        assert worker.engine.asked == [{**ASKED, "stream": True, "max_tokens": 2}]
    assert answer["choices"][0]["message"]["content"] == "Hello"
    assert answer["usage"]["completion_tokens"] == 2


async def test_call_without_stream_shows_by_a_blank_that_its_answer_comes(tmp_path: Path) -> None:
    """The engine goes on only when the caller has had it; what follows is the answer, told to be JSON."""
    go_on = asyncio.Event()
    script = Script(parts=[chat("Hel"), go_on, chat("lo"), FINISH, DONE])
    async with stage(tmp_path, script) as worker, worker.session.post(CHAT, json=ASKED) as response:
        assert (response.status, response.content_type) == (200, "application/json")
        assert await response.content.readexactly(1) == b" "
        go_on.set()
        answer = msgspec.json.decode(await response.content.read())
    assert answer["choices"][0]["message"]["content"] == "Hello"


@pytest.mark.parametrize(("every_s", "blanks"), [(3600.0, 1), (0.0, 3)])
async def test_blanks_are_for_pieces_and_not_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_s: float, blanks: int
) -> None:
    """One for each piece at most, none for a comment, and none sooner than `BLANK_EVERY_S` after the last."""
    monkeypatch.setattr(relay, "BLANK_EVERY_S", every_s)
    pieces = [chat("a"), b": nothing new\n\n", chat("b"), chat("c")]
    gates = [asyncio.Event() for _ in pieces]
    parts = [part for pair in zip(pieces, gates, strict=True) for part in pair]
    script = Script(parts=[*parts, FINISH + DONE])
    async with stage(tmp_path, script) as worker, worker.session.post(CHAT, json=ASKED) as response:
        read = b""
        for number, gate in enumerate(gates):
            if pieces[number].startswith(b"data") and len(read) < blanks:
                read += await response.content.readexactly(1)
            gate.set()
        read += await response.content.read()
    assert len(read) - len(read.lstrip(b" ")) == blanks


async def test_call_without_stream_that_breaks_off_tells_its_status_behind_the_blank(tmp_path: Path) -> None:
    """Half an answer is an error, never an answer; the head is gone by then."""
    async with (
        stage(tmp_path, Script(parts=[chat("a")])) as worker,
        worker.session.post(CHAT, json=ASKED) as response,
    ):
        body = await response.read()
    assert body.startswith(b" 502 {")
    assert msgspec.json.decode(body.removeprefix(b" 502 "))["error"]["code"] == "worker_failed"


async def test_call_without_stream_that_is_stopped_in_its_midst_says_so(tmp_path: Path) -> None:
    """As the answer would have, had it not begun."""
    never = asyncio.Event()
    async with (
        stage(tmp_path, Script(parts=[chat("a"), never])) as worker,
        worker.session.post(CHAT, json=ASKED, headers=IDS) as response,
    ):
        await response.content.readexactly(1)
        async with worker.session.delete("/requests/job-a.3") as deleted:
            assert deleted.status == 202
        body = await response.content.read()
    assert body.startswith(b"400 {")
    assert msgspec.json.decode(body.removeprefix(b"400 "))["error"]["code"] == "cancelled"


async def test_chunk_of_unknown_form_is_a_502(tmp_path: Path) -> None:
    """An engine's fault is told as one, and the worker lives on."""
    async with stage(tmp_path, Script(parts=[data({"choices": [7]})]), Script(parts=list(HELLO))) as worker:
        async with worker.session.post(CHAT, json=ASKED) as response:
            assert response.status == 502
        async with worker.session.post(CHAT, json=ASKED) as response:
            assert response.status == 200


async def test_caller_that_leaves_a_stream_stops_the_engine(tmp_path: Path) -> None:
    """The engine's connection is closed, the slot is free, and the end is told as cancelled."""
    never = asyncio.Event()
    async with stage(tmp_path, Script(parts=[chat("a"), never]), Script(parts=list(HELLO))) as worker:
        async with worker.session.post(CHAT, json=STREAM, headers=IDS) as response:
            await response.content.readany()
            response.close()
        async with asyncio.timeout(10):
            await worker.engine.left.wait()
        line = await worker.closing()
        assert (line["job_id"], line["fields"]["outcome"]) == ("job-a", "cancelled")
        async with worker.session.post(CHAT, json=STREAM) as response:
            assert response.status == 200


async def test_caller_that_leaves_a_call_without_stream_stops_the_engine(tmp_path: Path) -> None:
    """The same, before the first byte of the answer was sent."""
    never = asyncio.Event()
    async with stage(tmp_path, Script(parts=[chat("a"), never])) as worker:
        asking = asyncio.ensure_future(worker.session.post(CHAT, json=ASKED))
        async with asyncio.timeout(10):
            await worker.engine.got_request.wait()
            asking.cancel()
            await worker.engine.left.wait()
        assert (await worker.closing())["fields"]["outcome"] == "cancelled"
        await worker.until(lambda: worker.desk.slots_used == 0)


async def test_delete_stops_a_stream_and_tells_its_caller(tmp_path: Path) -> None:
    """The last frame says that it was cancelled."""
    never = asyncio.Event()
    async with stage(tmp_path, Script(parts=[chat("a"), never])) as worker:
        async with worker.session.post(CHAT, json=STREAM, headers=IDS) as response:
            await response.content.readany()
            async with worker.session.delete("/requests/job-a.3") as deleted:
                assert deleted.status == 202
            last = (await response.content.read()).removeprefix(b"data: ")
        assert msgspec.json.decode(last)["error"]["code"] == "cancelled"
        assert (await worker.closing())["fields"]["outcome"] == "cancelled"


async def test_delete_before_the_request_stops_it_at_once(tmp_path: Path) -> None:
    """The engine is never asked, and the end is told all the same."""
    async with stage(tmp_path) as worker:
        for _ in range(2):
            async with worker.session.delete("/requests/job-a.3") as deleted:
                assert deleted.status == 202
        async with worker.session.post(CHAT, json=STREAM, headers=IDS) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (400, "cancelled")
        assert (await worker.closing())["fields"]["outcome"] == "cancelled"
        assert worker.engine.asked == []


async def test_context_exceeded_is_a_400_with_both_numbers(tmp_path: Path) -> None:
    """A refusal before the stream began is a plain answer."""
    refusal = {"type": "exceed_context_size_error", "code": 400, "n_prompt_tokens": 9, "n_ctx": 4, "message": "x"}
    script = Script(parts=[msgspec.json.encode({"error": refusal})], status=400, media="application/json")
    async with stage(tmp_path, script) as worker:
        async with worker.session.post(CHAT, json=STREAM, headers=IDS) as response:
            body = await response.json()
        line = await worker.closing()
    assert (response.status, body["job_id"], body["correlation_id"]) == (400, "job-a", "corr-1")
    assert body["error"]["code"] == "context_length_exceeded"
    assert body["error"]["message"] == "The prompt has 9 tokens; the context holds 4."
    assert line["fields"]["error"]["message"] == body["error"]["message"]


async def test_engine_that_is_gone_is_a_502(tmp_path: Path) -> None:
    """Nobody answers on the socket."""
    async with stage(tmp_path) as worker:
        (tmp_path / "e.sock").unlink()
        async with worker.session.post(CHAT, json=STREAM) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (502, "worker_failed")


async def test_embeddings_pass_as_they_are(tmp_path: Path) -> None:
    """One plain answer, counted by its usage."""
    answer = msgspec.json.encode({"data": [], "usage": {"prompt_tokens": 4, "total_tokens": 4}})
    async with stage(tmp_path, Script(parts=[answer], media="application/json"), purpose="embed") as worker:
        async with worker.session.post("/v1/embeddings", json={"input": "a"}) as response:
            assert await response.read() == answer
        assert (await worker.closing())["fields"]["prompt_tokens"] == 4


async def test_narration_has_no_prompt(tmp_path: Path) -> None:
    """Not in the sentence, not in a field, not when the engine quotes it in an error."""
    said = "parse error; last read: 'the-prompt-canary'"
    refusal = {"error": {"type": "invalid_request_error", "code": 400, "message": said}}
    script = Script(parts=[msgspec.json.encode(refusal)], status=400, media="application/json")
    async with stage(tmp_path, script, Script(parts=list(HELLO))) as worker:
        async with worker.session.post(CHAT, json=ASKED) as response:
            assert (await response.json())["error"]["message"] == said
        async with worker.session.post(CHAT, json=ASKED) as response:
            assert response.status == 200
        assert [line["fields"]["outcome"] for line in worker.closings()] == ["failed", "completed"]
        assert b"canary" not in worker.output.read_bytes()
