"""Servers that are broken, strange or no queen at all: the client waits, goes on or says so, and never hangs."""

from __future__ import annotations

import asyncio
import gc
import gzip
import socket
from typing import Any

import pytest
from aiohttp import web

from rbee.client import JobClient
from rbee.errors import (
    AuthenticationError,
    GoneError,
    InternalError,
    NotFoundError,
    RbeeError,
    UnavailableError,
)
from tests.unit.client.raw_server import CLOSING, SSE_HEAD, Answer, raw_server, repeats, says
from tests.unit.client.scripted_queen import answer, frame, refusal, scripted_queen, stream

WAIT_S = 60.0
HEAD = frame(1) + frame(2)
END = frame(3, "end", state="completed", reason="ok")
WHOLE = says(CLOSING + HEAD + END)
REST = says(CLOSING + END)
BOMB = gzip.compress(b"\0" * 100_000_000)


async def numbers(url: str, **options: Any) -> list[int]:
    """Follow a job to its end."""
    async with asyncio.timeout(WAIT_S), JobClient(url, **{"idle_s": 0.5, **options}) as client:
        return [event["seq"] async for event in client.follow("job-1")]


@pytest.mark.parametrize(
    "strange",
    [
        says(b"", then_holds=True),
        says(b""),
        says(SSE_HEAD[:20], then_holds=True),
        says(SSE_HEAD, then_holds=True),
        says(SSE_HEAD),
        says(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9),
        says(b"SSH-2.0-OpenSSH_9.6\r\n", then_holds=True),
        says(b"HTTP/1.1 2OO OK\r\n\r\n"),
        says(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 1_000_000 + b"\r\n\r\n"),
        repeats(b"HTTP/1.1 200 OK\r\nx: y\r\n"),
        says(SSE_HEAD + b"transfer-encoding: chunked\r\n\r\nXYZ\r\nhello\r\n", then_holds=True),
        says(SSE_HEAD + b"content-length: 5000\r\n\r\n: hello\n\n"),
        says(SSE_HEAD + b"content-encoding: gzip\r\nconnection: close\r\n\r\n" + HEAD),
        says(CLOSING + b"id: 1\nevent: narration\ndata: {", then_holds=True),
        says(CLOSING + b"event: bye\ndata: {}\n\n", then_holds=True),
        says(CLOSING),
        says(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 2\r\n\r\nno"),
        says(b"HTTP/1.1 503 Busy\r\ncontent-length: 500\r\n\r\n{", then_holds=True),
    ],
    ids=lambda strange: None,
)
async def test_log_is_read_in_spite_of_a_connection_that_made_no_sense(strange: Answer) -> None:
    """The next connection brings it, from the first event on."""
    async with raw_server(strange, WHOLE) as server:
        assert await numbers(server.url) == [1, 2, 3]
        assert len(server.heads) == 2
        assert b"last-event-id" not in server.heads[1].lower()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_redirect_is_an_error_and_nobody_else_is_asked(status: int) -> None:
    """Neither the credential nor the log's place goes anywhere else."""
    async with scripted_queen(stream(HEAD, END)) as elsewhere:
        turn = answer(status, headers={"Location": elsewhere.url + "/v1/jobs/job-1/stream"})
        async with scripted_queen(turn) as queen:
            with pytest.raises(InternalError, match=f"answered {status}"):
                await numbers(queen.url, api_key="k")
    assert elsewhere.requests == []


@pytest.mark.parametrize(
    "media", [b"text/html", b"application/json", b"text/event-stream-not", b"application/octet-stream"]
)
async def test_answer_of_another_kind_is_an_error(media: bytes) -> None:
    """It is not read as a log, whatever it says."""
    head = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: " + media + b"\r\n\r\n"
    async with raw_server(says(head + HEAD + END)) as server:
        with pytest.raises(InternalError, match="not a stream"):
            await numbers(server.url)


async def test_log_that_was_compressed_unasked_is_read() -> None:
    """A proxy may do that; it is asked not to."""
    data = gzip.compress(HEAD + END)
    async with raw_server(
        says(SSE_HEAD + b"content-encoding: gzip\r\nconnection: close\r\n\r\n" + data)
    ) as server:
        assert await numbers(server.url) == [1, 2, 3]
        assert b"accept-encoding: identity" in server.heads[0].lower()


async def test_event_without_bound_is_refused() -> None:
    """It does not fill the memory."""
    head = says(CLOSING + b"id: 1\ndata: " + b"x" * (9 * 1024 * 1024))
    async with raw_server(head) as server:
        with pytest.raises(InternalError, match="more than 8388608 bytes"):
            await numbers(server.url)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"id: 1\nevent: token\ndata: [1]\n\n", "Event 1 of .* cannot be read"),
        (b"id: 1\nevent: token\ndata: " + b'{"a":' * 100_000 + b"\n\n", "Event 1 of .* cannot be read"),
        (b'id: 1\nevent: token\ndata: {"a":"\xff"}\n\n', "Event 1 of .* cannot be read"),
        (b"id: " + b"9" * 5000 + b"\nevent: token\ndata: {}\n\n", "without a number"),
        (b"id: -1\nevent: token\ndata: {}\n\n", "without a number"),
        (b"id: \xd9\xa1\nevent: token\ndata: {}\n\n", "without a number"),
        (b"event: token\ndata: {}\n\n", "without a number"),
        (b"id: 2\nevent: token\ndata: {}\n\n", "has a hole: event 2 came after event 0"),
    ],
    ids=["array", "deep", "no utf-8", "long id", "negative id", "other digits", "no id", "jump"],
)
async def test_event_that_cannot_be_is_an_error(said: bytes, message: str) -> None:
    """Told as one of ours, with where it happened."""
    async with raw_server(says(CLOSING + said)) as server:
        with pytest.raises(InternalError, match=message):
            await numbers(server.url)


async def test_log_that_jumps_in_the_middle_hands_out_what_came_before() -> None:
    """And repeated events are passed over on the way."""
    async with scripted_queen(stream(frame(1), frame(1), frame(2), frame(1), frame(4))) as queen:
        seen: list[int] = []
        async with JobClient(queen.url) as client:
            with pytest.raises(InternalError, match="event 4 came after event 2"):
                async for event in client.follow("job-1"):
                    seen.append(event["seq"])
    assert seen == [1, 2]


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [(410, "gone", GoneError), (404, "not_found", NotFoundError), (401, "invalid_api_key", AuthenticationError)],
)
async def test_refusal_in_the_middle_comes_behind_what_was_seen(
    status: int, code: str, expected: type[RbeeError]
) -> None:
    """The log was forgotten, or the credential changed, between two connections."""
    async with scripted_queen(stream(HEAD, cut=True), refusal(status, code)) as queen:
        seen: list[int] = []
        async with JobClient(queen.url) as client:
            with pytest.raises(expected):
                async for event in client.follow("job-1"):
                    seen.append(event["seq"])
    assert (seen, queen.cursors) == ([1, 2], [None, "2"])


@pytest.mark.parametrize("status", [429, 503])
async def test_server_that_asks_to_be_left_alone_is(status: int) -> None:
    """For as long as `Retry-After` says, and then the log goes on."""
    busy = answer(status, headers={"Retry-After": "1"})
    loop = asyncio.get_running_loop()
    async with scripted_queen(stream(HEAD, cut=True), busy, stream(END)) as queen:
        begun = loop.time()
        assert await numbers(queen.url) == [1, 2, 3]
        assert loop.time() - begun >= 1.0
    assert queen.cursors == [None, "2", "2"]


async def test_server_that_asks_to_be_left_alone_for_ever_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server decides how long somebody waits."""
    monkeypatch.setattr("rbee.client.retry.CAP_S", 0.2)
    busy = answer(503, headers={"Retry-After": "31536000"})
    async with scripted_queen(busy, stream(HEAD, END)) as queen:
        assert await numbers(queen.url) == [1, 2, 3]


async def test_stream_that_ends_again_and_again_is_not_asked_without_a_pause() -> None:
    """A comment is a sign of life and no progress: the waits grow, though the server says `retry: 0`."""
    async with scripted_queen(stream(b"retry: 0\n\n: hello\n\n")) as queen:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5), JobClient(queen.url) as client:
                async for _ in client.follow("job-1"):
                    pass
    assert 2 <= len(queen.requests) <= 12


async def test_one_who_was_busy_for_longer_than_it_gives_a_server_is_not_told_that_it_was_silent() -> None:
    """The time runs from the first failure: a stopped or slow program goes on where it was."""
    asked_again = asyncio.Event()

    async def cut_then_note(request: web.Request) -> web.StreamResponse:
        asked_again.set()
        return await stream(END)(request)

    async with (
        scripted_queen(stream(HEAD, cut=True), cut_then_note) as queen,
        JobClient(queen.url, give_up_s=0.3) as client,
    ):
        events = client.follow("job-1")
        seen = [(await anext(events))["seq"]]
        await asyncio.sleep(0.6)  # twice as long as it bears with silence
        assert not asked_again.is_set()
        seen += [event["seq"] async for event in events]
    assert seen == [1, 2, 3]


async def test_reader_looks_elsewhere_where_connecting_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is gone refuses nothing: its address is silent."""
    monkeypatch.setattr("rbee.client.follow.CONNECT_S", 0.2)
    with socket.socket() as full:  # a backlog that is full drops what else comes
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        async with scripted_queen(stream(HEAD, END)) as queen:
            assert await numbers(f"http://127.0.0.1:{address[1]}", find_url=lambda: queen.url) == [1, 2, 3]
        for filler in fillers:
            filler.close()


@pytest.mark.parametrize(
    "strange",
    [
        says(b"", then_holds=True),
        says(b"HTTP/1.1 200 OK\r\ncontent-le", then_holds=True),
        says(b"\x16\x03\x01" * 9),
        says(b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\n{"),
        says(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 9\r\n\r\n{}{}{}{}{"),
        repeats(b"HTTP/1.1 200 OK\r\nx: y\r\n"),
    ],
    ids=["silent", "half head", "garbage", "half body", "no gzip", "endless head"],
)
async def test_call_to_what_is_no_server_is_unavailable(strange: Answer) -> None:
    """Within the silence that is borne with."""
    async with raw_server(strange) as server, JobClient(server.url, idle_s=0.5) as client:
        async with asyncio.timeout(WAIT_S):
            with pytest.raises(UnavailableError, match=f"The queen at {server.url} cannot be reached"):
                await client.status()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (b"204 No Content\r\n\r\n", InternalError),
        (b"200 OK\r\ncontent-length: 6\r\n\r\n[1, 2]", InternalError),
        (b"200 OK\r\ncontent-length: 4\r\n\r\n\xff\xfe\xfd\xfc", InternalError),
        (b"200 OK\r\ncontent-length: 200000\r\n\r\n" + b"[" * 200_000, InternalError),
        (b"404 No\r\ncontent-length: 200000\r\n\r\n" + b"[" * 200_000, NotFoundError),
        (b"307 There\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n", InternalError),
        (b"200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(BOMB) + BOMB, InternalError),
    ],
    ids=["204", "array", "no utf-8", "deep", "deep refusal", "redirect", "bomb"],
)
async def test_call_that_is_answered_with_something_else_says_so(said: bytes, expected: type[RbeeError]) -> None:
    """As an error of ours, bounded in memory."""
    async with raw_server(says(b"HTTP/1.1 " + said)) as server, JobClient(server.url) as client:
        with pytest.raises(expected):
            await client.job("job-1")


async def test_generator_that_is_forgotten_ends_its_connection() -> None:
    """Collected by the garbage collector, unfinished."""
    left = asyncio.Event()

    async def held(request: web.Request) -> web.StreamResponse:
        try:
            return await stream(HEAD, hold=True)(request)
        finally:
            left.set()

    async with scripted_queen(held) as queen, JobClient(queen.url) as client, asyncio.timeout(WAIT_S):
        events = client.follow("job-1")
        assert (await anext(events))["seq"] == 1
        circle: list[object] = [events]
        circle.append(circle)
        del circle, events
        gc.collect()
        await left.wait()
