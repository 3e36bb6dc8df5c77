from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from rbee.contracts.heartbeats import Heartbeat, MachineInfo
from rbee.errors import AuthenticationError, RbeeError, UnavailableError
from rbee.hive.queen_link import BACKOFF_S, QueenLink, backoff_s
from tests.unit.hive.small_queen import SmallQueen, small_queen

BEAT = Heartbeat(
    boot_id="boot",
    store_id="store",
    url="http://127.0.0.1:9",
    version="0",
    machine=MachineInfo(hostname="h", cpus=1, memory_bytes=1, memory_free_bytes=1, disk_free_bytes=1),
    devices=[],
    models=[],
    workers=[],
)


@pytest.fixture
async def both() -> AsyncIterator[tuple[SmallQueen, QueenLink]]:
    async with small_queen() as made:
        yield made


async def test_heartbeat_arrives_as_it_was_told(both: tuple[SmallQueen, QueenLink]) -> None:
    queen, link = both

    answer = await link.heartbeat(BEAT)

    assert queen.heartbeats == [BEAT]
    assert answer.lease_s == 3.0


async def test_batch_is_answered_with_the_cursors(both: tuple[SmallQueen, QueenLink]) -> None:
    _, link = both

    assert await link.events([b'{"source":"s","offset":0,"bytes":4}\n', b"one\n"]) == {"s": 4}


async def test_long_answer_is_read_to_its_end(both: tuple[SmallQueen, QueenLink]) -> None:
    queen, link = both
    cursors = {f"source-{number}": number for number in range(20_000)}
    queen.refusal = web.json_response({"cursors": cursors})

    assert await link.events([b""]) == cursors


@pytest.mark.parametrize(
    "answer",
    [
        web.Response(text="<html>a router's login page</html>"),
        web.Response(body=b"\xff\xfe"),
        web.json_response({"cursors": {"s": "four"}}),
        web.Response(status=302, headers={"location": "http://127.0.0.1:1/"}),
        web.Response(status=502, text="bad gateway"),
    ],
    ids=["a page", "no text", "another form", "a redirect", "a proxy"],
)
async def test_stranger_at_the_queens_address_is_an_error_that_the_hive_survives(
    both: tuple[SmallQueen, QueenLink], answer: web.Response
) -> None:
    queen, link = both
    queen.refusal = answer

    with pytest.raises(RbeeError):
        await link.heartbeat(BEAT)


async def test_refusal_is_raised_as_what_it_is(both: tuple[SmallQueen, QueenLink]) -> None:
    queen, link = both
    body = {"error": {"message": "A key is needed.", "type": "authentication_error", "code": "invalid_api_key"}}
    queen.refusal = web.json_response(body, status=401)

    with pytest.raises(AuthenticationError, match=r"A key is needed\."):
        await link.heartbeat(BEAT)


async def test_queen_that_is_not_there_is_said_to_be_away_and_why() -> None:
    async with aiohttp.ClientSession() as session:
        link = QueenLink(session, "http://127.0.0.1:1", "hive-x", "key")

        with pytest.raises(UnavailableError, match=r"The queen at http://127\.0\.0\.1:1 cannot be reached"):
            await link.heartbeat(BEAT)


async def test_key_is_shown_to_the_queen() -> None:
    seen: list[str | None] = []

    async def take(request: web.Request) -> web.Response:
        seen.append(request.headers.get("authorization"))
        return web.json_response({"cursors": {}})

    app = web.Application()
    app.router.add_post("/v1/hives/hive-x/events", take)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with aiohttp.ClientSession() as session:
        await QueenLink(session, f"http://127.0.0.1:{runner.addresses[0][1]}/", "hive-x", "key").events([])
    await runner.cleanup()

    assert seen == ["Bearer key"]


def test_waits_between_attempts_grow_to_a_bound() -> None:
    for attempt in range(20):
        base = BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)]
        assert 0.75 * base <= backoff_s(attempt) <= 1.25 * base
