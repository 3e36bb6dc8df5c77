"""A queen of this home that comes back on another port is found again; one that was named is not looked for."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from rbee.contracts.home import Home, write_ready_file
from rbee.contracts.views import ReadyFile
from rbee.errors import UnavailableError
from rbee.keeper.answering import client_of, draw_log
from rbee.keeper.local_stack import find_queen, up_lock
from rbee.keeper.render import Screen
from rbee.keeper.settings import KeeperSettings
from rbee.processes import FileLock
from tests.unit.client.scripted_queen import ScriptedQueen, answer, frame, scripted_queen, stream
from tests.unit.keeper.running_stack import Paper

HEL = frame(1, "token", text="Hel", channel="answer")
LO = frame(2, "token", text="lo", channel="answer")
END = frame(3, "end", state="completed")


def announce(home: Home, queen: ScriptedQueen) -> None:
    """Leave a queen's address where she leaves it."""
    write_ready_file(home.ready_file("queen-rbee"), ReadyFile(url=queen.url, pid=os.getpid()))


async def test_log_goes_on_where_the_run_file_says(tmp_path: Path) -> None:
    """Each piece is drawn once, and then the end."""
    home = Home.at(tmp_path)
    settings = KeeperSettings(home=home.root)
    out, err = Paper(), Paper()
    async with AsyncExitStack() as lives, scripted_queen(stream(LO, END)) as second:
        first = await lives.enter_async_context(scripted_queen(stream(HEL, hold=True)))
        announce(home, first)
        url = find_queen(settings)
        assert url == first.url
        screen = Screen(out, err)
        async with client_of(settings, url, screen) as client, asyncio.timeout(30):
            drawing = asyncio.ensure_future(draw_log(client, "job-1", screen))
            await out.until("Hel")
            home.ready_file("queen-rbee").unlink()
            await lives.aclose()
            await err.until("keeper_wait: The queen cannot be reached")
            announce(home, second)
            end = await drawing
    assert (end["state"], out.getvalue(), second.cursors) == ("completed", "Hello\n", ["1"])
    assert "keeper_back: The queen is back; going on where it was." in err.getvalue()


async def test_named_queen_is_not_looked_for_in_the_home(tmp_path: Path) -> None:
    """It may be anybody's."""
    home = Home.at(tmp_path)
    async with scripted_queen(answer(200, {})) as gone:
        named = gone.url
    async with scripted_queen(answer(200, {})) as queen:
        announce(home, queen)
        settings = KeeperSettings(home=home.root, queen_url=named)
        async with client_of(settings, named, Screen(Paper(), Paper())) as client:
            with pytest.raises(UnavailableError, match=named):
                await client.job("job-1")
    assert queen.requests == []


def test_queen_between_two_lives_is_where_rbee_up_holds_her_socket(tmp_path: Path) -> None:
    """Only while it lives."""
    home = Home.at(tmp_path)
    settings = KeeperSettings(home=home.root)
    write_ready_file(home.ready_file("rbee"), ReadyFile(url="http://held", pid=os.getpid()))
    assert find_queen(settings) is None
    lock = FileLock(up_lock(home))
    assert lock.acquire()
    try:
        assert find_queen(settings) == "http://held"
    finally:
        lock.release()
