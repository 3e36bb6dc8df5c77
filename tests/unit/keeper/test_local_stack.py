"""Finding the queen, and starting one: never by trying a port, one per home."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rbee.contracts.home import Home, write_ready_file
from rbee.contracts.views import ReadyFile
from rbee.errors import StartError, UnavailableError
from rbee.keeper.local_stack import (
    console_script,
    ensure_queen,
    find_queen,
    last_lines,
    require_queen,
    start_in_background,
)
from rbee.keeper.render import Screen
from rbee.keeper.settings import KeeperSettings
from rbee.processes import find_marked

_UP = """#!{python}
import json, os, pathlib, signal, sys
sys.path[:0] = {path!r}
from rbee.processes.locks import FileLock
home = pathlib.Path(os.environ["RBEE_HOME"])
with open(home / "starts", "a") as starts:
    starts.write(" ".join(sys.argv[1:]) + "\\n")
print("hello", flush=True)
if {fails!r}:
    sys.exit(3)
lock = FileLock(home / "run" / "rbee.lock")
assert lock.acquire()
whole = home / "run" / "whole"
whole.write_text(json.dumps(dict(url="http://127.0.0.1:7", pid=os.getpid())))
whole.rename(home / "run" / "rbee.json")
signal.pause()
"""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """Make a home, and end what was started in it."""
    home = Home.at(tmp_path / "home")
    yield home
    for pid, _ in find_marked("RBEE_HOME", str(home.root)):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def install_up(directory: Path, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> None:
    """Put a small `rbee` beside this Python."""
    directory.mkdir()
    script = directory / "rbee"
    source = str(Path(__file__).parents[3] / "src")
    script.write_text(_UP.format(python=sys.executable, path=[source], fails=fails))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(directory / "python"))


def settings(home: Home, url: str | None = None) -> KeeperSettings:
    """Make settings."""
    return KeeperSettings(home=home.root, queen_url=url)


def screen() -> tuple[Screen, io.StringIO]:
    """Make a screen, and what is drawn on its stderr."""
    err = io.StringIO()
    return Screen(io.StringIO(), err), err


def test_named_queen_is_taken_before_the_homes_own(home: Home) -> None:
    """Whatever the run file says."""
    write_ready_file(home.ready_file("queen-rbee"), ReadyFile(url="http://home", pid=os.getpid()))
    assert find_queen(settings(home, "http://named")) == "http://named"
    assert find_queen(settings(home)) == "http://home"


def test_run_file_of_a_dead_queen_is_no_queen(home: Home) -> None:
    """Its process is looked for."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    write_ready_file(home.ready_file("queen-rbee"), ReadyFile(url="http://home", pid=pid))
    assert find_queen(settings(home)) is None
    with pytest.raises(UnavailableError, match="No queen runs in"):
        require_queen(settings(home))


async def test_named_queen_is_never_replaced_by_one_started_here(home: Home) -> None:
    """Nothing is started, nothing is said."""
    drawn, err = screen()
    assert await ensure_queen(settings(home, "http://named"), drawn) == "http://named"
    assert err.getvalue() == ""


async def test_queen_without_a_stack_is_used(home: Home) -> None:
    """Somebody runs `queen-rbee` alone."""
    write_ready_file(home.ready_file("queen-rbee"), ReadyFile(url="http://home", pid=os.getpid()))
    assert await ensure_queen(settings(home), screen()[0]) == "http://home"


async def test_two_keepers_at_once_start_one_stack(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both get it; each says what it does."""
    install_up(tmp_path / "bin", monkeypatch)
    (one, said_one), (two, said_two) = screen(), screen()
    first, second = await asyncio.gather(start_in_background(home, one), start_in_background(home, two))
    assert first == second
    assert (home.root / "starts").read_text() == "up\n"
    assert "keeper_start: No queen runs here" in said_one.getvalue()
    assert "keeper_wait: Somebody else is starting" in said_two.getvalue()
    third, said = screen()
    assert (await start_in_background(home, third), said.getvalue()) == (first, "")


async def test_flags_are_handed_on(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `rbee up -d --queen-port 0`."""
    install_up(tmp_path / "bin", monkeypatch)
    await start_in_background(home, screen()[0], ("--queen-port=0",))
    assert (home.root / "starts").read_text() == "up --queen-port=0\n"


async def test_stack_that_dies_before_it_is_ready_is_told(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 3, its last lines, and where the whole log is."""
    install_up(tmp_path / "bin", monkeypatch, fails=True)
    (home.logs / "up.log").write_text("of an earlier start\n")
    with pytest.raises(StartError, match="`rbee up` ended with exit code 3 before it was ready") as raised:
        await start_in_background(home, screen()[0])
    assert raised.value.details["last_lines"] == ["hello"]
    assert str(home.logs / "up.log") in raised.value.remedy
    assert raised.value.exit_code == 3


def test_console_script_is_looked_for_beside_this_python_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then on the PATH; without one, that is said."""
    install_up(tmp_path / "bin", monkeypatch)
    monkeypatch.setenv("PATH", "/nowhere")
    assert console_script("rbee") == str(tmp_path / "bin" / "rbee")
    with pytest.raises(StartError, match="queen-rbee is not installed"):
        console_script("queen-rbee")


def test_last_lines_begin_where_this_start_did(tmp_path: Path) -> None:
    """At most twenty; none of a file that is not there."""
    log = tmp_path / "log"
    log.write_text("old\n" + "".join(f"{number}\n" for number in range(30)))
    assert last_lines(log, 4) == [str(number) for number in range(10, 30)]
    assert last_lines(log, log.stat().st_size) == []
    assert last_lines(tmp_path / "none") == []


async def test_keeper_that_leaves_during_the_start_says_what_goes_on(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next keeper gets a stack, whichever of the two that were started it is."""
    install_up(tmp_path / "bin", monkeypatch)
    drawn, err = screen()
    starting = asyncio.ensure_future(start_in_background(home, drawn))
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert "keeper_leave: Queen and hive go on starting" in err.getvalue()
    ready = await start_in_background(home, screen()[0])
    assert ready.url == "http://127.0.0.1:7"
