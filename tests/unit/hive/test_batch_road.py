"""The road of batches against servers that say anything, in any pieces, and close when they like."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from rbee.hive.batch_road import ANSWER_BYTES_MAX, Answer, BatchRoad

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
WAIT_S = 10.0


class Server:
    """Takes connections; each request read is kept with its body."""

    def __init__(self) -> None:
        self.connections = 0
        self.requests: list[bytes] = []

    async def request(self, reader: asyncio.StreamReader) -> None:
        """Read one request."""
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        self.requests.append(head + await reader.readexactly(size))


@asynccontextmanager
async def road_to(
    serve: Callable[[Server, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[tuple[Server, BatchRoad]]:
    """Give a road to a server that does so with each connection."""
    server = Server()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.connections += 1
        try:
            await serve(server, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(connected, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    road = BatchRoad(f"http://127.0.0.1:{port}/v1/x", {"authorization": "Bearer k"})
    try:
        yield server, road
    finally:
        road.close()
        listening.close()
        await listening.wait_closed()


async def answer_all(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await server.request(reader)
        writer.write(OK)


async def test_requests_share_a_connection_and_say_who_asks() -> None:
    async with road_to(answer_all) as (server, road):
        answers = [await road.post(body, WAIT_S) for body in (b"one", b"", b"x" * 2_000_000)]

    assert answers == [Answer(200, b"ok")] * 3
    assert server.connections == 1
    assert server.requests[0].startswith(b"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nauthorization: Bearer k\r\n" in server.requests[0]
    assert [request.partition(b"\r\n\r\n")[2] for request in server.requests] == [b"one", b"", b"x" * 2_000_000]


@pytest.mark.parametrize("chunk", [1, 7, 4096])
async def test_answer_is_whole_however_it_is_cut(chunk: int) -> None:
    head = b"HTTP/1.1 429 Too Many\r\nRetry-After: 3\r\nTransfer-Encoding: chunked\r\n\r\n"
    whole = head + b"2\r\nsl\r\n3\r\now!\r\n0\r\n\r\n"

    async def serve(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        for start in range(0, len(whole), chunk):
            writer.write(whole[start : start + chunk])
            await writer.drain()

    async with road_to(serve) as (_, road):
        assert await road.post(b"x", WAIT_S) == Answer(429, b"slow!", "3")


async def test_connection_that_was_closed_meanwhile_is_made_anew_without_a_word() -> None:
    async def once(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(OK)

    async with road_to(once) as (server, road):
        for _ in range(3):
            assert (await road.post(b"x", WAIT_S)).status == 200
        assert server.connections == 3


async def test_answer_that_breaks_off_is_an_error_and_the_next_request_has_its_own_connection() -> None:
    async def broken(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(OK[:-1] if server.connections == 1 else OK)

    async with road_to(broken) as (_, road):
        with pytest.raises(ConnectionError):
            await road.post(b"x", WAIT_S)
        assert (await road.post(b"x", WAIT_S)).body == b"ok"


async def test_what_is_no_http_is_a_connection_error() -> None:
    async def strange(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(b"SSH-2.0-hello\r\n\r\n")

    async with road_to(strange) as (_, road):
        with pytest.raises(ConnectionError, match="speaks no HTTP"):
            await road.post(b"x", WAIT_S)


async def test_silence_ends_with_the_time_and_takes_the_connection_with_it() -> None:
    async def silent(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        if server.connections > 1:
            writer.write(OK)
        await reader.read()

    async with road_to(silent) as (server, road):
        with pytest.raises(TimeoutError):
            await road.post(b"x", 0.05)
        assert (await road.post(b"y", WAIT_S)).body == b"ok"
        assert server.connections == 2


async def test_answer_without_an_end_is_cut_off() -> None:
    async def endless(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    async with road_to(endless) as (_, road):
        with pytest.raises(ConnectionError, match=f"more than {ANSWER_BYTES_MAX} bytes"):
            await road.post(b"x", WAIT_S)


async def test_nobody_there_is_an_error_at_once() -> None:
    with pytest.raises(ConnectionRefusedError):
        await BatchRoad("http://127.0.0.1:1/v1/x", {}).post(b"x", WAIT_S)
