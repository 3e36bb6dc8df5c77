"""Following a log: nothing lost, nothing twice, whatever the connection does."""

from __future__ import annotations

import socket
from typing import Any

import aiohttp
import pytest

from rbee.client.follow import LogFollower
from rbee.errors import AuthenticationError, GoneError, InternalError, NotFoundError, RbeeError, UnavailableError
from tests.unit.client.scripted_queen import Turn, answer, frame, refusal, scripted_queen, stream

END = frame(4, "end", state="completed", reason="ok")
HEAD = frame(1) + frame(2)


async def followed(*turns: Turn, **options: Any) -> tuple[list[int], list[str | None]]:
    """Follow a scripted log to its end; return the numbers seen and the cursors sent."""
    async with scripted_queen(*turns) as queen, aiohttp.ClientSession() as session:
        follower = LogFollower(session, queen.url + "/log", **{"give_up_s": 5.0, **options})
        seen = [event["seq"] async for event in follower.events()]
        return seen, queen.cursors


async def test_log_that_comes_whole_is_read_to_its_end() -> None:
    """One connection, no cursor, ends on `end`."""
    assert await followed(stream(HEAD, frame(3), END, hold=True)) == ([1, 2, 3, 4], [None])


@pytest.mark.parametrize(
    "broken",
    [
        stream(HEAD),
        stream(HEAD, cut=True),
        stream(HEAD, frame(3)[:-1], cut=True),
        stream(HEAD, b"retry: 1\nevent: bye\ndata: {}\n\n", hold=True),
    ],
    ids=["ended", "cut", "cut inside an event", "bye"],
)
async def test_broken_stream_goes_on_behind_the_last_whole_event(broken: Turn) -> None:
    """The cursor names the last event that was handed out."""
    seen, cursors = await followed(broken, stream(frame(3), END))
    assert seen == [1, 2, 3, 4]
    assert cursors == [None, "2"]


async def test_events_sent_again_are_not_repeated() -> None:
    """A server that begins anew is read over."""
    seen, _ = await followed(stream(HEAD, cut=True), stream(HEAD, frame(3), END))
    assert seen == [1, 2, 3, 4]


async def test_hole_in_the_numbers_is_an_error() -> None:
    """A log is dense: a missing number is never passed over."""
    with pytest.raises(InternalError, match="event 3 came after event 1"):
        await followed(stream(frame(1), frame(3), END))


async def test_first_event_of_a_log_that_forgets_may_have_any_number() -> None:
    """But after it the numbers are dense."""
    assert await followed(stream(frame(3), END), from_oldest=True) == ([3, 4], [None])
    with pytest.raises(InternalError, match="event 9 came after event 7"):
        await followed(stream(frame(7), frame(9)), from_oldest=True)


async def test_follow_from_a_number_sends_it_and_takes_what_follows() -> None:
    """`after` is the first cursor."""
    assert await followed(stream(frame(3), END), after=2) == ([3, 4], ["2"])


async def test_204_ends_the_log() -> None:
    """At the end of an ended job there is nothing more."""
    assert await followed(answer(204), after=4) == ([], ["4"])


async def test_silent_connection_is_given_up_and_made_again() -> None:
    """The watchdog takes silence for a dead connection."""
    seen, cursors = await followed(stream(HEAD, hold=True), stream(frame(3), END), idle_s=0.2)
    assert (seen, cursors) == ([1, 2, 3, 4], [None, "2"])


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (401, "invalid_api_key", AuthenticationError),
        (404, "not_found", NotFoundError),
        (410, "gone", GoneError),
    ],
)
async def test_refusal_is_raised_as_the_error_it_names(status: int, code: str, expected: type[RbeeError]) -> None:
    """What asking again cannot mend is not asked again."""
    with pytest.raises(expected, match="No way"):
        await followed(refusal(status, code, "No way."))


async def test_server_that_is_not_ready_is_asked_again() -> None:
    """503 while it starts is no end."""
    seen, _ = await followed(refusal(503, "unavailable", retryable=True), stream(HEAD, frame(3), END))
    assert seen == [1, 2, 3, 4]


async def test_answer_that_is_no_stream_is_an_error() -> None:
    """Another program listens there."""
    with pytest.raises(InternalError, match="not a stream"):
        await followed(answer(200, {"hello": 1}))


async def test_event_that_is_no_json_is_an_error() -> None:
    """Nothing is passed over in silence."""
    with pytest.raises(InternalError, match="Event 1 of"):
        await followed(stream(b"id: 1\nevent: token\ndata: {nope\n\n"))


async def test_server_that_is_gone_is_told_about_then_given_up() -> None:
    """The error names the address and the cause; the listener hears of it once."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        told: list[tuple[bool, str]] = []
        async with aiohttp.ClientSession() as session:
            follower = LogFollower(session, url, give_up_s=0.6, on_contact=lambda *said: told.append(said))
            with pytest.raises(UnavailableError, match=f"{url} for 0.6 s: Connection refused"):
                async for _ in follower.events():
                    pass
    assert told == [(False, "Connection refused")]


async def test_listener_hears_when_the_server_is_away_and_when_it_is_back() -> None:
    """Away after the second failure in a row, back with the first byte."""
    told: list[bool] = []
    busy = refusal(503, "unavailable", retryable=True)
    await followed(
        stream(HEAD, cut=True),
        busy,
        busy,
        stream(frame(3), END),
        on_contact=lambda there, why: told.append(there),
    )
    assert told == [False, True]
