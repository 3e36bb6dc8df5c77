"""Engines that are not built in: whatever form their answers have, callers get OpenAI's."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rbee.worker.engines import EngineTraits
from tests.unit.worker.worker_stage import ASKED, BUILT_IN, CHAT, OTHER, Script, Stage, chat, data, stage

STREAM = {**ASKED, "stream": True}
KEEP = {"x-request-id": "job-a.1", "x-job-id": "job-a", "x-rbee-keep": "1"}
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
FINISH = data({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": None})
USAGE_FRAME = data({"choices": [], "usage": USAGE})
DONE = b"data: [DONE]\n\n"
ANSWER = [chat("Hel"), chat("lo"), FINISH, USAGE_FRAME, DONE]
MESSAGE = [
    b'event: message_start\r\ndata: {"type":"message_start","message":{"id":"m","content":[]}}\r\n\r\n',
    b'event: message_stop\r\ndata: {"type":"message_stop"}\r\n\r\n',
]


def crlf(frame: bytes) -> bytes:
    """Write a frame with the other line end, without the space, and with a comment before it."""
    return b": ping\r\n\r\n" + frame.replace(b"data: ", b"data:").replace(b"\n", b"\r\n")


async def asked(worker: Stage, body: dict[str, Any], path: str = CHAT) -> tuple[int, dict[str, Any]]:
    """Post and return status and answer."""
    async with worker.session.post(path, json=body) as response:
        return response.status, await response.json()


async def streamed(worker: Stage, body: dict[str, Any] = STREAM, path: str = CHAT) -> bytes:
    """Post and return the whole stream."""
    async with worker.session.post(path, json=body) as response:
        return await response.read()


async def test_model_is_named_as_the_engine_knows_it_and_usage_is_asked_for(tmp_path: Path) -> None:
    """The engine hears its own name of the model, and is asked for what nothing else would tell."""
    async with stage(tmp_path, Script(parts=list(ANSWER)), traits=OTHER) as worker:
        await streamed(worker, {**STREAM, "model": "smollm2:135m"})
        assert worker.engine.asked == [
            {**STREAM, "model": "cooks-name", "stream_options": {"include_usage": True}}
        ]
        fields = (await worker.closing())["fields"]
    assert (fields["prompt_tokens"], fields["completion_tokens"], fields["finish_reason"]) == (7, 3, "stop")
    assert fields["outcome"] == "completed"


async def test_frames_of_every_form_become_one(tmp_path: Path) -> None:
    """Other line ends, no space, comments, cut anywhere: the caller reads the same bytes; no usage, unasked."""
    raw = b"".join(map(crlf, ANSWER))
    parts: list[bytes | asyncio.Event] = [raw[at : at + 7] for at in range(0, len(raw), 7)]
    async with stage(tmp_path, Script(parts=parts), traits=OTHER) as worker:
        assert await streamed(worker) == b"".join([chat("Hel"), chat("lo"), FINISH, DONE])


async def test_usage_is_passed_on_to_who_asked_for_it(tmp_path: Path) -> None:
    """Where the caller asked, it is his."""
    async with stage(tmp_path, Script(parts=list(ANSWER)), traits=OTHER) as worker:
        body = {**STREAM, "stream_options": {"include_usage": True}}
        assert await streamed(worker, body) == b"".join(ANSWER)


async def test_frame_is_sent_as_soon_as_it_is_whole(tmp_path: Path) -> None:
    """Nothing waits for the next frame."""
    go_on = asyncio.Event()
    script = Script(parts=[chat("Hel"), go_on, *ANSWER[1:]])
    async with (
        stage(tmp_path, script, traits=OTHER) as worker,
        worker.session.post(CHAT, json=STREAM) as response,
    ):
        assert await response.content.readuntil(b"\n\n") == chat("Hel")
        go_on.set()
        assert (await response.read()).endswith(DONE)


async def test_whole_answer_has_the_usage_the_engine_told(tmp_path: Path) -> None:
    """A call that does not stream is put together."""
    async with stage(tmp_path, Script(parts=list(ANSWER)), traits=OTHER) as worker:
        status, answer = await asked(worker, ASKED)
    assert (status, answer["usage"]) == (200, USAGE)
    assert answer["choices"][0]["message"]["content"] == "Hello"


async def test_kept_answer_has_no_line_for_the_usage(tmp_path: Path) -> None:
    """Its lines are the answer's pieces; the closing line has the numbers."""
    async with stage(tmp_path, Script(parts=list(ANSWER)), traits=OTHER) as worker:
        async with worker.session.post(CHAT, json=ASKED, headers=KEEP) as response:
            assert response.status == 202
        fields = (await worker.closing())["fields"]
        assert [line["text"] for line in worker.tokens()] == ["Hel", "lo", ""]
        assert "timings_per_token" not in worker.engine.asked[0]
    assert (fields["frames"], fields["prompt_tokens"], fields["completion_tokens"]) == (3, 7, 3)


@pytest.mark.parametrize("ending", [[FINISH], [FINISH, DONE.rstrip()], [crlf(FINISH).rstrip()]])
async def test_answer_with_a_finish_reason_is_whole(tmp_path: Path, ending: list[bytes]) -> None:
    """Some servers send no last frame, or do not finish it."""
    async with stage(tmp_path, Script(parts=[chat("Hello"), *ending]), traits=OTHER) as worker:
        assert await streamed(worker) == chat("Hello") + FINISH + DONE
        assert (await worker.closing())["fields"]["outcome"] == "completed"


@pytest.mark.parametrize("last", [chat("lo"), chat("lo")[:9]])
async def test_answer_without_its_end_is_a_failure(tmp_path: Path, last: bytes) -> None:
    """Closed between two frames or within one: what was whole is passed on, then the error."""
    async with stage(tmp_path, Script(parts=[chat("Hel"), last]), traits=OTHER) as worker:
        got = await streamed(worker)
        fields = (await worker.closing())["fields"]
    assert got.startswith(chat("Hel"))
    assert DONE not in got
    assert fields["outcome"] == "failed"
    assert fields["error"]["code"] == "worker_failed"


async def test_messages_keep_the_names_of_their_events(tmp_path: Path) -> None:
    """Anthropic's clients read them."""
    async with stage(tmp_path, Script(parts=list(MESSAGE)), traits=OTHER) as worker:
        got = await streamed(worker, {**STREAM, "max_tokens": 5}, "/v1/messages")
        assert "stream_options" not in worker.engine.asked[0]
    assert got == b"".join(MESSAGE).replace(b"\r\n", b"\n")


@pytest.mark.parametrize(
    "chunk",
    [
        {"error": "out of memory"},
        {"error": {"message": "out of memory"}},
        {"object": "error", "message": "out of memory", "code": 500},
        {"detail": "out of memory"},
    ],
)
async def test_error_within_a_stream_is_read(tmp_path: Path, chunk: dict[str, Any]) -> None:
    """In whatever form: it ends the answer, and is told in the house's."""
    async with stage(tmp_path, Script(parts=[chat("Hel"), data(chunk), DONE]), traits=OTHER) as worker:
        got = await streamed(worker)
        fields = (await worker.closing())["fields"]
    assert got.startswith(chat("Hel"))
    assert msgspec.json.decode(got.split(b"\n\n")[1][6:])["error"]["message"] == "The engine failed: out of memory"
    assert fields["outcome"] == "failed"


@pytest.mark.parametrize(
    ("script", "status", "said"),
    [
        (
            Script(status=404, media="application/json", parts=[b'{"detail":"Not Found"}']),
            404,
            f"not offer {CHAT}",
        ),
        (Script(status=405, media="text/plain", parts=[b"Method Not Allowed"]), 404, "The engine cook does not"),
        (Script(status=400, media="application/json", parts=[b'{"error":"too warm"}']), 400, "too warm"),
        (Script(status=422, media="application/json", parts=[b'{"detail":"too warm"}']), 400, "too warm"),
        (Script(status=500, media="text/plain", parts=[b"out of memory"]), 502, "failed: out of memory"),
        (Script(status=502, media="text/html", parts=[b"<html>Bad</html>"]), 502, "with status 502 and no reason"),
        (Script(status=503, media="text/html", parts=[b"<html>Wait</html>"]), 503, "The engine is not ready yet."),
        (Script(media="text/html", parts=[b"<html>Hello</html>"]), 502, "with text/html, not with a stream"),
        (Script(media="application/json", parts=[b'{"choices":[]}']), 502, "with application/json, not with a"),
        (Script(parts=[b"data: <html>\n\n"]), 502, "a chunk that is not JSON"),
        (Script(parts=[b"\x00\xff\xfe garbage " * 100]), 502, "broke off its answer"),
        (Script(parts=[b'data: {"choices":[]}\n\n', DONE]), 502, "without a choice"),
        (Script(parts=[b'data: {"choices":[1]}\n\n', DONE]), 502, "a chunk of an unknown form"),
    ],
)
async def test_what_is_no_answer_is_a_clear_error(tmp_path: Path, script: Script, status: int, said: str) -> None:
    """Nothing an engine sends is taken for granted."""
    async with stage(tmp_path, script, traits=OTHER) as worker:
        got = await asked(worker, ASKED)
        assert (await worker.closing())["fields"]["outcome"] == "failed"
    assert got[0] == status, got
    assert said in got[1]["error"]["message"]


async def test_frame_without_end_is_bounded(tmp_path: Path) -> None:
    """At 8 MiB the engine is left."""
    megabyte = b"data: " + b"a" * 1_000_000
    async with stage(tmp_path, Script(parts=[megabyte] * 12), traits=OTHER) as worker:
        status, answer = await asked(worker, ASKED)
    assert status == 502
    assert answer["error"]["message"].startswith("The engine sent a frame of more than")


@pytest.mark.parametrize(("prefill", "attempt", "status"), [(False, 2, 502), (True, 2, 202), (False, 1, 202)])
async def test_answer_is_not_begun_anew_in_the_name_of_going_on(
    tmp_path: Path, prefill: bool, attempt: int, status: int
) -> None:
    """What another worker began is continued by an engine that can, and refused by one that cannot."""
    traits = msgspec.structs.replace(OTHER, has_prefill=prefill)
    body = {"messages": [*ASKED["messages"], {"role": "assistant", "content": "Hel"}]}
    headers = {**KEEP, "x-request-id": f"job-a.{attempt}"}
    async with stage(tmp_path, Script(parts=list(ANSWER)), traits=traits) as worker:
        async with worker.session.post(CHAT, json=body, headers=headers) as response:
            answer = await response.json()
        assert response.status == status
        fields = (await worker.closing())["fields"]
    if status == 502:
        assert answer["error"]["code"] == fields["error"]["code"] == "worker_lost"
        assert "the engine cook does not go on from what was said" in answer["error"]["message"]
    else:
        assert fields["outcome"] == "completed"


async def test_engine_that_never_answers_is_left_and_its_slot_is_free(tmp_path: Path) -> None:
    """It took the request and is silent: when the request is stopped, its connection is closed."""
    silent = Script(parts=[asyncio.Event()])
    async with stage(tmp_path, silent, Script(parts=list(ANSWER)), traits=OTHER) as worker:
        async with worker.session.post(CHAT, json=ASKED, headers=KEEP) as response:
            assert response.status == 202
        async with asyncio.timeout(10):
            await worker.engine.got_request.wait()
            async with worker.session.delete("/requests/job-a.1"):
                pass
            await worker.engine.left.wait()
        assert (await worker.closing())["fields"]["outcome"] == "cancelled"
        assert (await asked(worker, ASKED))[0] == 200


@pytest.mark.parametrize(
    ("purpose", "path", "said"),
    [
        ("generate", "/v1/embeddings", "This worker was not started for embeddings, but for answers."),
        ("embed", CHAT, "This worker was not started for answers, but for embeddings."),
        ("rerank", "/v1/embeddings", "This worker was not started for embeddings, but for rankings."),
    ],
)
async def test_worker_for_something_else_says_so(tmp_path: Path, purpose: Any, path: str, said: str) -> None:
    """The engine is not even asked."""
    async with stage(tmp_path, traits=OTHER, purpose=purpose) as worker:
        status, answer = await asked(worker, {**ASKED, "input": "a"}, path)
        assert worker.engine.asked == []
    assert (status, answer["error"]["message"]) == (400, said)


async def test_embeddings_are_asked_of_the_model_the_engine_knows(tmp_path: Path) -> None:
    """The answer passes as it is."""
    made = b'{"data":[],"usage":{"prompt_tokens":4,"total_tokens":4}}'
    script = Script(media="application/json", parts=[made])
    async with stage(tmp_path, script, traits=OTHER, purpose="embed") as worker:
        async with worker.session.post("/v1/embeddings", json={"input": "a", "model": "m"}) as response:
            assert await response.read() == made
        assert worker.engine.asked == [{"input": "a", "model": "cooks-name"}]


@pytest.mark.parametrize("nothing", [b"data: null\n\n", b"data: [1]\n\n", b"data: {}\n\n"])
async def test_frame_that_says_nothing_is_not_passed_on(tmp_path: Path, nothing: bytes) -> None:
    """Clients would hand it on as a piece of the answer."""
    parts: list[bytes | asyncio.Event] = [nothing, *ANSWER]
    async with stage(tmp_path, Script(parts=parts), traits=OTHER) as worker:
        body = {"prompt": "a", "stream": True}
        assert await streamed(worker, body, "/v1/completions") == b"".join([chat("Hel"), chat("lo"), FINISH, DONE])


def used(prompt: int, completion: int) -> bytes:
    """Frame the usage of a choice."""
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return data({"choices": [], "usage": usage})


MANY = {**STREAM, "n": 2, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize("traits", [OTHER, BUILT_IN])
async def test_usage_of_several_choices_is_told_once_and_last(tmp_path: Path, traits: EngineTraits) -> None:
    """By any engine, streamed as it comes and kept alike."""
    parts: list[bytes | asyncio.Event] = [chat("a"), used(7, 1), chat("b"), used(7, 2), FINISH, DONE]
    async with stage(tmp_path, Script(parts=parts), Script(parts=list(parts)), traits=traits) as worker:
        assert await streamed(worker, MANY) == b"".join([chat("a"), chat("b"), FINISH, used(7, 3), DONE])
        async with worker.session.post(CHAT, json=MANY, headers={**KEEP, "x-rbee-keep": "chunk"}):
            pass
        await worker.until(lambda: len(worker.closings()) == 2)
        kept = [data(line["chunk"]) for line in worker.tokens()]
    assert kept == [chat("a"), chat("b"), FINISH, used(7, 3)]
    assert worker.closings()[1]["fields"]["frames"] == 4


async def test_answer_of_no_tokens_is_counted_as_that(tmp_path: Path) -> None:
    """None is what nobody told, zero what the engine said."""
    parts: list[bytes | asyncio.Event] = [FINISH, used(7, 0), DONE]
    async with stage(tmp_path, Script(parts=parts), traits=OTHER) as worker:
        await streamed(worker)
        fields = (await worker.closing())["fields"]
    assert (fields["prompt_tokens"], fields["completion_tokens"]) == (7, 0)


async def test_engine_that_is_too_busy_is_asked_again_elsewhere(tmp_path: Path) -> None:
    """It is no fault of the request."""
    busy = Script(status=429, media="application/json", parts=[b'{"error":{"message":"too many requests"}}'])
    async with stage(tmp_path, busy, traits=OTHER) as worker, worker.session.post(CHAT, json=ASKED) as response:
        error = (await response.json())["error"]
        assert response.status == 503
        assert response.headers["retry-after"] == "1"
    assert (error["code"], error["retryable"]) == ("unavailable", True)


async def test_answer_without_usage_is_an_answer(tmp_path: Path) -> None:
    """Vectors that nobody counted are vectors all the same."""
    made = b'{"data":[{"index":0,"embedding":[1.0]}],"usage":null}'
    script = Script(media="application/json", parts=[made])
    async with stage(tmp_path, script, traits=OTHER, purpose="embed") as worker:
        async with worker.session.post("/v1/embeddings", json={"input": "a"}) as response:
            assert (response.status, await response.read()) == (200, made)
        assert (await worker.closing())["fields"]["prompt_tokens"] is None


async def test_frame_that_breaks_off_is_the_engines_end(tmp_path: Path) -> None:
    """Not a frame of bad JSON: what the engine died of is what counts."""
    script = Script(parts=[chat("Hel"), chat("lo")[:9]])
    async with stage(tmp_path, script, traits=OTHER) as worker:
        await streamed(worker)
        message = (await worker.closing())["fields"]["error"]["message"]
    assert message == "The engine broke off its answer."


async def test_error_event_of_the_responses_api_is_read(tmp_path: Path) -> None:
    """It has its words beside its type."""
    said = data({"type": "error", "code": "server_error", "message": "out of memory", "sequence_number": 0})
    async with stage(tmp_path, Script(parts=[said]), traits=OTHER) as worker:
        status, answer = await asked(worker, {"input": "a", "stream": True}, "/v1/responses")
    assert (status, answer["error"]["message"]) == (502, "The engine failed: out of memory")


PIN = "my pin is 4711"


@pytest.mark.parametrize(
    "said",
    [
        f"Bad prompt: {PIN}",
        f"[{{'type': 'string', 'input': '{PIN}'}}]",
        f'cannot parse {{"role": "user", "content": "{PIN}"}}',
        f"Bad prompt: {PIN[:11]}...",
    ],
)
@pytest.mark.parametrize("keep", [{}, KEEP])
async def test_narration_has_nothing_of_a_prompt_that_an_engine_repeats(
    tmp_path: Path, said: str, keep: dict[str, str]
) -> None:
    """In whatever quotes, or none, and cut; the caller reads all of it."""
    script = Script(status=400, media="application/json", parts=[msgspec.json.encode({"error": said})])
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": PIN}]}]}
    async with stage(tmp_path, script, traits=OTHER) as worker:
        async with worker.session.post(CHAT, json=body, headers=keep) as response:
            answer = await response.json()
        assert keep or answer["error"]["message"] == said
        await worker.closing()
        written = worker.output.read_text()
    assert "my pin" not in written
    assert "4711" not in written


async def test_narration_of_a_refusal_still_says_what_is_wrong(tmp_path: Path) -> None:
    """What does not stand in the request is kept, and so are the words of its form."""
    said = "Conversation roles must alternate user/assistant; `max_tokens` is too large"
    script = Script(status=400, media="application/json", parts=[msgspec.json.encode({"error": said})])
    body = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "max"}]}
    async with stage(tmp_path, script, traits=OTHER) as worker:
        await asked(worker, body)
        assert (await worker.closing())["fields"]["error"]["message"] == said


async def test_engine_that_cannot_tell_of_itself_yet_is_asked_again(tmp_path: Path) -> None:
    """Then it tells that the model hears of no tools; that is told by the name the model is shown under."""
    props = b'{"build_info":"b1","chat_template_caps":{"supports_tools":false}}'
    scripts = [
        Script(status=503, media="application/json", parts=[b"{}"]),
        Script(parts=list(ANSWER)),
        Script(media="application/json", parts=[props]),
        Script(parts=list(ANSWER)),
        Script(parts=list(ANSWER)),
    ]
    async with stage(tmp_path, *scripts, traits=OTHER) as worker:
        for _ in range(3):
            assert (await asked(worker, {**ASKED, "tools": [{"type": "function"}]}))[0] == 200
        said = [line["message"] for line in worker.lines() if line["action"] == "worker_ignore_tools"]
    assert said == ["The chat template of m has no place for tools: the model is not told of them."] * 2
