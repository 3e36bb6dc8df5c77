"""`rbee up` with small real servers: ready, in order, and never leaving one behind."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import pytest

from rbee.contracts.home import Home, read_ready_file
from rbee.errors import StartError
from rbee.keeper.local_stack import last_lines, up_lock
from rbee.keeper.strays import servers_of
from rbee.processes import is_held
from tests.unit.keeper.fake_servers import install_fakes
from tests.unit.keeper.running_stack import RunningStack, running


@pytest.fixture(autouse=True)
def _fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(install_fakes(tmp_path / "bin")))


async def test_ready_stack_announces_itself(tmp_path: Path) -> None:
    """The base URL on stdout, both ready files, and the queen's address for the hive."""
    async with running(tmp_path) as stack:
        await stack.until_ready()
        ready = read_ready_file(stack.home.ready_file("rbee"))
        assert ready is not None
        assert json.loads(stack.ready_file.read_text()) == {
            "url": ready.url,
            "hive_url": ready.hive_url,
            "pid": os.getpid(),
        }
        assert stack.out.getvalue() == f"{ready.url}/v1\n"
        assert sorted(stack.story) == ["queen-rbee queen_url=-", f"rbee-hive queen_url={ready.url}"]
        assert is_held(up_lock(stack.home))


async def test_stop_ends_queen_then_hive_and_removes_run_files(tmp_path: Path) -> None:
    """Exit code 0, nothing left."""
    async with running(tmp_path) as stack:
        await stack.until_ready()
        stack.stop.set()
        assert await stack.task == 0
    assert stack.story[-2:] == ["queen-rbee stops", "rbee-hive stops"]
    assert servers_of(stack.home) == []
    assert [path.name for path in stack.home.run.iterdir()] == ["rbee.lock"]
    assert not stack.ready_file.exists()
    assert not is_held(up_lock(stack.home))


@pytest.mark.parametrize("program", ["queen-rbee", "rbee-hive"])
async def test_server_that_fails_before_ready_fails_the_start(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own last words, of this start alone; the other is stopped."""
    monkeypatch.setenv("FAKE_" + program.replace("-", "_").upper(), "fails")
    home = Home.at(tmp_path / "home")
    (home.logs / f"{program}.log").write_text("of an earlier start\n")
    async with running(tmp_path) as stack:
        with pytest.raises(StartError, match=f"{program} ended with exit code 3 before it was ready") as raised:
            await stack.task
    assert raised.value.exit_code == 3
    assert raised.value.details["last_lines"] == [f"{program} says hello", "the reason"]
    assert servers_of(stack.home) == []
    assert not stack.ready_file.exists()


async def test_server_that_ignores_term_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its time, which is shortened here."""
    monkeypatch.setenv("FAKE_RBEE_HIVE", "deaf")
    monkeypatch.setattr("rbee.keeper.stack.STOP_S", 0.2)
    async with running(tmp_path) as stack:
        await stack.until_ready()
        stack.stop.set()
        assert await stack.task == 0
    assert servers_of(stack.home) == []


async def test_stop_before_ready_is_an_interruption(tmp_path: Path) -> None:
    """Exit code 130; nothing was announced."""
    async with running(tmp_path) as stack:
        stack.stop.set()
        assert await stack.task == 130
    assert (stack.out.getvalue(), servers_of(stack.home)) == ("", [])


async def test_port_that_was_asked_for_and_is_taken_is_an_error(tmp_path: Path) -> None:
    """It is named."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with running(tmp_path, queen_port=port) as stack:
            with pytest.raises(StartError, match=f"port {port}: Address already in use"):
                await stack.task


async def test_default_port_that_is_taken_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that is said in one line."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr("rbee.keeper.stack.QUEEN_PORT", port)
        stack = RunningStack(tmp_path, queen_port=None)
        await stack.until_ready()
        stack.stop.set()
        await stack.task
    assert f"keeper_port: Port {port} is taken; the queen listens on port" in stack.err.getvalue()


async def test_second_stack_of_a_home_is_refused(tmp_path: Path) -> None:
    """The first goes on."""
    async with running(tmp_path) as first:
        await first.until_ready()
        second = RunningStack(tmp_path)
        with pytest.raises(StartError, match="runs already"):
            await second.task
        assert read_ready_file(first.home.ready_file("rbee")) is not None


async def test_output_is_drawn_where_it_is_wanted(tmp_path: Path) -> None:
    """And not written to the log as well."""
    async with running(tmp_path, is_drawn=True) as stack:
        await stack.until_ready()
        stack.stop.set()
        await stack.task
    assert "[queen-rbee] output: queen-rbee says hello\n" in stack.err.getvalue()
    assert (stack.home.logs / "queen-rbee.log").read_text() == ""


async def test_output_that_is_not_drawn_goes_to_private_logs(tmp_path: Path) -> None:
    """Appended, 0600."""
    async with running(tmp_path) as stack:
        await stack.until_ready()
    log = stack.home.logs / "rbee-hive.log"
    assert log.stat().st_mode & 0o777 == 0o600
    assert last_lines(log) == ["rbee-hive says hello"]
