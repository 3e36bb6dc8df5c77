"""Relayed streams whose worker dies: another goes on in the same response, wherever the cut is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from rbee.contracts.operations import ChatCompletion, Completion
from rbee.queen import answering, callers, patience
from rbee.queen.callers import Call, Caller
from tests.unit.queen.queen_stage import MODEL, closing, token
from tests.unit.queen.scripted_engine import ANSWER, DONE, PROMPT_TOKENS, frames_of, said_in
from tests.unit.queen.scripted_hive import Queen, ScriptedHive, queen_of, served, until

USER = {"role": "user", "content": "count"}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [USER], "stream": True}
USAGE = {"stream_options": {"include_usage": True}}
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "count> ", "stream": True}
CHAT_PATH = "/v1/chat/completions"
ENDED = "The worker ended."


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(answering, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(answering, "ASK_AGAIN_S", 0.01)
    monkeypatch.setattr(patience, "UNMOVED_S", 0.1)


@asynccontextmanager
async def _relaying(queen: Queen) -> AsyncIterator[str]:
    """Serve what accepts calls and relays their answers, whichever routes the queen has; gives its address."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        body = msgspec.json.decode(await Request(scope, receive).body())
        asked_about = ("messages", "prompt", "tools", "model")
        parameters = {key: value for key, value in body.items() if key not in asked_about}
        kind = ChatCompletion if scope["path"] == CHAT_PATH else Completion
        operation = kind(model=MODEL, parameters=parameters)
        record = await queen.service.accept(
            operation, correlation_id="c", is_correlation_id_replaced=False, principal="local", is_kept=False
        )
        response = queen.service.relay.response(record, operation, kind.path, msgspec.json.encode(body))
        await response(scope, receive, send)

    async with served(answer) as url:
        yield url


@pytest.fixture
async def url(whole_queen: Queen) -> AsyncIterator[str]:
    async with _relaying(whole_queen) as url:
        yield url


def _put(hive: ScriptedHive, *parts: bytes | Exception | None) -> None:
    for part in parts:
        hive.frames.put_nowait(part)


def _chunks(received: bytes) -> list[dict[str, Any]]:
    """Read a whole stream back, and check that it ends in order."""
    frames = [frame + b"\n\n" for frame in received.split(b"\n\n")[:-1]]
    assert frames.pop() == DONE
    assert DONE not in frames
    return [msgspec.json.decode(frame.removeprefix(b"data: ")) for frame in frames]


def _text(chunks: list[dict[str, Any]]) -> str:
    parts = [part for chunk in chunks for part in chunk["choices"]]
    return "".join(part.get("text") or (part.get("delta") or {}).get("content") or "" for part in parts)


def _finishes(chunks: list[dict[str, Any]]) -> list[str]:
    return [part["finish_reason"] for chunk in chunks for part in chunk["choices"] if part["finish_reason"]]


async def _cut(
    queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession, url: str, call: dict[str, Any], *cuts: int
) -> tuple[bytes, str, dict[str, Any]]:
    """Have a call answered by workers that die behind so many frames each; returns what came, the job, its end."""
    asked = len(hive.asked)
    path = CHAT_PATH if "messages" in call else "/v1/completions"
    calling = asyncio.ensure_future(_read(caller, url + path, call))
    for number, cut in enumerate(cuts, 1):
        await until(lambda number=number: len(hive.asked) == asked + number)  # type: ignore[misc]
        body, headers = hive.asked[-1]
        dying = await queen.until_running(headers["x-job-id"])
        _put(hive, *frames_of(body)[:cut], ConnectionError("the worker dies"))
        await until(hive.frames.empty)
        hive.has_worker()
        await hive.kill(dying)
    await until(lambda: len(hive.asked) == asked + len(cuts) + 1 or calling.done())
    if not calling.done():
        body, headers = hive.asked[-1]
        _put(hive, *frames_of(body), None)
    received, job_id = await calling
    if len(hive.asked) == asked + len(cuts) + 1:
        fields = {"prompt_tokens": PROMPT_TOKENS + len(said_in(hive.asked[-1][0])), "completion_tokens": 1}
        await hive.say(f"{hive.workers[-1].worker_id}/stdout", closing(job_id, len(cuts) + 1, **fields))
    return received, job_id, await queen.end(job_id)


async def _read(caller: aiohttp.ClientSession, url: str, call: dict[str, Any]) -> tuple[bytes, str]:
    async with caller.post(url, json=call) as response:
        assert response.status == 200, await response.text()
        return await response.read(), response.headers["x-job-id"]


async def _read_past(
    caller: aiohttp.ClientSession,
    url: str,
    call: dict[str, Any],
    frames: bytes,
    then: Callable[[], Awaitable[None]],
) -> tuple[bytes, str]:
    """Read what comes; `then` is done once these frames have come."""
    received = b""
    async with caller.post(url, json=call) as response:
        while len(received) < len(frames):
            received += await response.content.readany()
        await then()
        return received + await response.read(), response.headers["x-job-id"]


@pytest.mark.parametrize(
    "call",
    [
        CHAT,
        CHAT | USAGE,
        CHAT | {"max_tokens": 4},
        CHAT | USAGE | {"max_tokens": 4},
        CHAT | {"messages": [USER, {"role": "assistant", "content": "One two"}]},
    ],
)
async def test_stream_that_is_cut_anywhere_is_one_answer(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession, url: str, call: dict[str, Any]
) -> None:
    """Whichever frame is the last of the first worker: one id, one role, one finish, the same words and counts."""
    whole = _chunks(b"".join(frames_of(call)))
    for cut in range(len(frames_of(call)) + 1):
        received, job_id, end = await _cut(whole_queen, hive, caller, url, call, cut)
        chunks = _chunks(received)

        assert _text(chunks) == _text(whole), cut
        assert _finishes(chunks) == _finishes(whole), cut
        for name in ("id", "model", "created", "object"):
            assert len({chunk[name] for chunk in chunks}) == 1, (cut, name)
        roles = [part["delta"]["role"] for chunk in chunks for part in chunk["choices"] if "role" in part["delta"]]
        assert roles == ["assistant"], cut
        counts = [
            {name: count for name, count in chunk["usage"].items() if name != "prompt_tokens_details"}
            for chunk in [*chunks, *whole]
            if "usage" in chunk
        ]
        assert len(counts) == (2 if "stream_options" in call else 0), cut
        assert counts[:1] == counts[1:], cut
        assert (end["state"], end["reason"]) == ("completed", "ok"), cut
        has_begun = _text(_chunks(b"".join(frames_of(call)[:-1][:cut]) + DONE)) != ""
        is_gone_on_with = has_begun and cut < _needed(call)
        assert ("queen_continue" in await whole_queen.said(job_id)) == is_gone_on_with, cut


def _needed(call: dict[str, Any]) -> int:
    """Return how many frames a worker has to give so that no other one is needed."""
    frames = frames_of(call)
    is_counted = "max_tokens" in call and "stream_options" not in call
    return len(frames) - (2 if is_counted else 1)


async def test_answer_goes_on_from_its_words_with_the_seam_told(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession, url: str
) -> None:
    """The next worker is asked with the words so far and the tokens that are left; the log says who and why."""
    first = hive.workers[0].worker_id
    call = CHAT | USAGE | {"max_tokens": 5, "seed": 3}
    _, job_id, end = await _cut(whole_queen, hive, caller, url, call, 3)

    body = hive.asked[1][0]
    assert body["messages"] == [USER, {"role": "assistant", "content": "One two"}]
    assert (body["max_tokens"], body["seed"], body["model"]) == (3, 3, MODEL)
    log = await whole_queen.log(job_id)
    seam = next(event for event in log if event.get("action") == "queen_continue")
    second = hive.workers[0].worker_id
    assert seam["message"] == f"{second} goes on with the answer after 2 tokens. {ENDED}"
    assert seam["fields"] == {"worker_id": second, "after_tokens": 2, "lost_worker_id": first}
    assert [event["attempt"] for event in log if event["kind"] == "state"] == [0, 1, 2]
    assert end["result"]["attempts"] == 2
    assert end["result"]["usage"] == {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": 3}
    assert "One" not in str(log)


async def test_completion_goes_on_from_its_prompt(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession, url: str
) -> None:
    """A completion goes on with a longer prompt, wherever it is cut, and is the same text with the same counts."""
    whole = _chunks(b"".join(frames_of(COMPLETION)))
    for cut in range(1, len(ANSWER) + 1):
        received, _, _ = await _cut(whole_queen, hive, caller, url, COMPLETION, cut)
        chunks = _chunks(received)
        assert hive.asked[-1][0]["prompt"] == "count> " + "".join(ANSWER[:cut])
        assert _text(chunks) == _text(whole)
        assert _finishes(chunks) == ["stop"]
        assert len({chunk["id"] for chunk in chunks}) == 1
        usage = chunks[-1]["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (10, 6, 16)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (CHAT | {"tools": [{"type": "function", "function": {"name": "look"}}]}, "it may call tools"),
        (CHAT | {"n": 2}, "it is one of several"),
        (CHAT | {"logprobs": True}, "how likely its tokens were"),
        (CHAT | {"grammar": "root ::= [a-z]+"}, "its grammar would begin anew"),
        (COMPLETION | {"prompt": ["count> ", "count> "]}, "more than one text"),
        (COMPLETION | {"json_schema": {}, "response_format": {"type": "json_object"}}, "begin anew"),
    ],
)
async def test_what_cannot_be_gone_on_with_ends_in_one_error_frame(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession, url: str, call: dict[str, Any], why: str
) -> None:
    """Rather than invent, the stream ends with `worker_lost` behind whole frames, and no [DONE]."""
    frames = frames_of(CHAT if "messages" in call else COMPLETION)[:2]
    path = CHAT_PATH if "messages" in call else "/v1/completions"
    _put(hive, *frames)

    async def die() -> None:
        _put(hive, ConnectionError("the worker dies"))
        await hive.kill(hive.workers[0].worker_id)

    received, job_id = await _read_past(caller, url + path, call, b"".join(frames), die)

    assert received.startswith(b"".join(frames) + b'data: {"error":')
    error = msgspec.json.decode(received[len(b"".join(frames)) :].removeprefix(b"data: "))["error"]
    assert (error["code"], error["signal"], error["retryable"]) == ("worker_lost", "SIGKILL", True)
    assert why in error["message"]
    assert (await whole_queen.end(job_id))["reason"] == "worker_lost"
    assert len(hive.asked) == 1


async def test_answer_of_which_too_much_was_said_is_not_gone_on_with(
    whole_queen: Queen,
    hive: ScriptedHive,
    caller: aiohttp.ClientSession,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is held of an answer is bounded; beyond it a loss is the end."""
    monkeypatch.setattr(callers, "HELD_BYTES_MAX", 300)
    frames = frames_of(CHAT)[:3]
    _put(hive, *frames)

    async def die() -> None:
        _put(hive, ConnectionError("the worker dies"))
        await hive.kill(hive.workers[0].worker_id)

    received, _ = await _read_past(caller, url + CHAT_PATH, CHAT, b"".join(frames), die)

    assert b"longer than what is held" in received


async def test_last_attempts_loss_is_the_streams_end(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession, url: str
) -> None:
    """As many workers are tried as the call may be placed on, and no more."""
    calling = asyncio.ensure_future(_read(caller, url + CHAT_PATH, CHAT))
    for number, cut in ((1, 2), (2, 3)):
        await until(lambda number=number: len(hive.asked) == number)  # type: ignore[misc]
        body, headers = hive.asked[-1]
        dying = await whole_queen.until_running(headers["x-job-id"])
        _put(hive, *frames_of(body)[:cut], ConnectionError("the worker dies"))
        await until(hive.frames.empty)
        hive.has_worker()
        await hive.kill(dying)
    received, job_id = await calling

    frames = received.split(b"\n\n")[:-1]
    texts = [msgspec.json.decode(frame.removeprefix(b"data: ")) for frame in frames[:-1]]
    assert _text(texts) == "One two three"
    assert frames[-1].startswith(b'data: {"error":{"message":"The worker ended."')
    assert (await whole_queen.end(job_id))["reason"] == "worker_lost"


async def test_worker_that_is_stopped_in_mid_answer_is_gone_on_from(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession, url: str
) -> None:
    """A worker's last frame that tells of its end is not passed on; the answer goes on behind what it said."""
    first = hive.workers[0].worker_id
    told = b'data: {"error":{"message":"The worker was stopped.","code":"worker_lost","type":"server_error"}}\n\n'
    calling = asyncio.ensure_future(_read(caller, url + CHAT_PATH, CHAT))
    await until(lambda: len(hive.asked) == 1)
    job_id = hive.asked[0][1]["x-job-id"]
    error = {"code": "worker_lost", "message": "The worker was stopped."}
    _put(hive, b"".join(frames_of(CHAT)[:3]) + told, None)
    await hive.say(f"{first}/stdout", closing(job_id, outcome="failed", error=error))
    await hive.kill(first)
    await until(lambda: len(hive.asked) == 2)
    _put(hive, *frames_of(hive.asked[1][0]), None)
    received, _ = await calling

    assert _text(_chunks(received)) == "".join(ANSWER)


async def test_stream_that_ends_without_its_last_frame_is_gone_on_with(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession, url: str
) -> None:
    """A response that ends as if it were whole, but lacks its closing frames, is no whole answer."""
    calling = asyncio.ensure_future(_read(caller, url + CHAT_PATH, CHAT))
    await until(lambda: len(hive.asked) == 1)
    job_id = hive.asked[0][1]["x-job-id"]
    _put(hive, *frames_of(CHAT)[:3], None)
    await until(hive.frames.empty)
    error = {"code": "worker_lost", "message": "It was cut off."}
    await hive.say(f"{hive.workers[0].worker_id}/stdout", closing(job_id, outcome="failed", error=error))
    await until(lambda: len(hive.asked) == 2)
    _put(hive, *frames_of(hive.asked[1][0]), None)
    received, _ = await calling

    assert _text(_chunks(received)) == "".join(ANSWER)
    assert "queen_continue" in await whole_queen.said(job_id)


async def test_answer_of_a_lost_hive_goes_on_at_another_and_its_request_is_stopped_when_it_is_back(
    tmp_path: Path, caller: aiohttp.ClientSession
) -> None:
    """A hive that falls silent in mid-stream is its workers' death; what it still does is stopped later on."""
    async with queen_of(tmp_path, hive_stale_s=0.3, hive_lost_s=0.6) as queen, _relaying(queen) as url:
        lost = await queen.live_hive()
        lost.has_worker()
        calling = asyncio.ensure_future(_read(caller, url + CHAT_PATH, CHAT))
        await until(lambda: len(lost.asked) == 1)
        job_id = lost.asked[0][1]["x-job-id"]
        _put(lost, *frames_of(CHAT)[:3])
        other = await queen.hive()
        beating = asyncio.ensure_future(_beat(other))
        await until(lambda: len(other.asked) == 1)
        _put(other, *frames_of(other.asked[0][0]), None)
        received, _ = await calling
        lost.beat()
        await until(lambda: lost.stopped == [f"{job_id}.1"])
        beating.cancel()

    assert _text(_chunks(received)) == "".join(ANSWER)


async def _beat(hive: ScriptedHive) -> None:
    while True:
        hive.beat()
        await asyncio.sleep(0.05)


async def test_nothing_is_lost_of_what_a_slow_caller_was_just_being_sent(
    whole_queen: Queen, hive: ScriptedHive
) -> None:
    """A worker dies while its frames wait for a caller that takes its time: the next one follows behind them."""
    call = Call(
        record=await whole_queen.service.accept(
            operation := ChatCompletion(model=MODEL, parameters={"stream": True}),
            correlation_id="c",
            is_correlation_id_replaced=False,
            principal="local",
            is_kept=False,
        ),
        operation=operation,
        path=CHAT_PATH,
        body=msgspec.json.encode(CHAT),
    )
    slow = _SlowCaller()
    caller = call.caller(slow.send)
    relay, runner = whole_queen.service.relay, whole_queen.service.runner
    runner.launch(call.record, operation, partial(relay.answer, call=call, caller=caller))
    await until(lambda: len(hive.asked) == 1)
    frames = frames_of(CHAT)
    _put(hive, *frames[:2])
    await until(lambda: slow.received == b"".join(frames[:2]))
    slow.may_take.clear()
    _put(hive, frames[2])
    await until(lambda: caller.is_waited_for)
    hive.has_worker()
    await hive.kill(await whole_queen.until_running(call.record.job_id))
    await until(lambda: len(hive.asked) == 2)
    assert not caller.is_waited_for
    slow.may_take.set()
    _put(hive, *frames_of(hive.asked[1][0]), None)
    async with asyncio.timeout(10):
        await caller.finished.wait()

    assert _text(_chunks(slow.received)) == "".join(ANSWER)


class _SlowCaller:
    """Takes what it is sent when it may: like the server, it waits first and then takes all."""

    def __init__(self) -> None:
        self.received = b""
        self.may_take = asyncio.Event()
        self.may_take.set()

    async def send(self, message: Any) -> None:
        """Take one message."""
        await self.may_take.wait()
        self.received += message.get("body", b"")


@pytest.mark.parametrize("is_kept", [False, True])
async def test_worker_whose_engine_would_begin_anew_does_not_go_on(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession, url: str, is_kept: bool
) -> None:
    """An engine without prefill is not asked to continue: the answer is lost, and that is said."""
    first = hive.workers[0].worker_id
    second = hive.has_worker()
    hive.workers = [msgspec.structs.replace(info, has_prefill=info.worker_id != second) for info in hive.workers]
    hive.beat()
    if is_kept:
        job_id = await whole_queen.infer()
        await until(lambda: len(hive.asked) == 1)
        await hive.kill(first, token(job_id, text="One"))
    else:
        calling = asyncio.ensure_future(_read(caller, url + CHAT_PATH, CHAT))
        await until(lambda: len(hive.asked) == 1)
        job_id = hive.asked[0][1]["x-job-id"]
        _put(hive, *frames_of(CHAT)[:3], ConnectionError("the worker dies"))
        await until(hive.frames.empty)
        await hive.kill(first)
        await calling
    end = await whole_queen.end(job_id)

    assert (end["state"], end["reason"]) == ("failed", "worker_lost")
    assert end["error"]["message"] == (
        f"{ENDED} The answer cannot be continued on another worker: "
        f"the engine of {second} does not go on from a beginning."
    )
    assert len(hive.asked) == 1


async def test_piece_of_several_tokens_counts_as_many(
    whole_queen: Queen, hive: ScriptedHive, caller: aiohttp.ClientSession, url: str
) -> None:
    """An emoji is one piece of three tokens: the tokenizer is asked, so that `max_tokens` and the usage hold."""
    hive.several = "🙂"
    calling = asyncio.ensure_future(_read(caller, url + CHAT_PATH, CHAT | USAGE | {"max_tokens": 8}))
    await until(lambda: len(hive.asked) == 1)
    _put(hive, *frames_of(CHAT)[:5], ConnectionError("the worker dies"))
    await until(hive.frames.empty)
    await hive.kill(hive.workers[0].worker_id)
    await until(lambda: len(hive.asked) == 2)
    body = hive.asked[1][0]
    usage = {"prompt_tokens": PROMPT_TOKENS + 6, "completion_tokens": 2, "total_tokens": PROMPT_TOKENS + 8}
    chunk = msgspec.json.encode({"choices": [], "usage": usage})
    _put(hive, *frames_of(body)[:-2], b"data: " + chunk + b"\n\n", DONE, None)
    received, _ = await calling

    assert body["messages"][-1]["content"] == "One two three 🙂"
    assert body["max_tokens"] == 2
    told = _chunks(received)[-1]["usage"]
    assert told == {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": 8, "total_tokens": PROMPT_TOKENS + 8}


async def test_call_says_how_long_its_worker_is_kept(whole_queen: Queen, hive: ScriptedHive) -> None:
    """`keep_alive` of a call holds for its worker, relayed or kept."""
    worker_id = hive.workers[0].worker_id
    workers = whole_queen.service.workers
    for is_kept, keep_alive_s in ((False, 7.0), (True, 9.0)):
        operation = ChatCompletion(model=MODEL, keep_alive=keep_alive_s, request=CHAT if is_kept else None)
        record = await whole_queen.service.accept(
            operation, correlation_id="c", is_correlation_id_replaced=False, principal="local", is_kept=is_kept
        )
        if is_kept:
            whole_queen.service.launch(record, operation)
        else:
            caller = Caller(_discard, record.job_id, None)
            call = Call(record=record, operation=operation, path=CHAT_PATH, body=msgspec.json.encode(CHAT))
            relay = whole_queen.service.relay
            whole_queen.service.runner.launch(record, operation, partial(relay.answer, call=call, caller=caller))
        await until(lambda: workers.keep_alive_s(worker_id, 0.0) == keep_alive_s)  # noqa: B023


async def _discard(message: Any) -> None:
    """Send nothing."""
