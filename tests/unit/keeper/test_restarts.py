"""`rbee up` gives a server that died its life back, until that is of no use."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from rbee.contracts.home import read_ready_file
from rbee.keeper.strays import servers_of
from tests.unit.keeper.fake_servers import install_fakes
from tests.unit.keeper.running_stack import WAIT_S, RunningStack, running

BOTH = pytest.mark.parametrize("program", ["queen-rbee", "rbee-hive"])


@pytest.fixture(autouse=True)
def _fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(install_fakes(tmp_path / "bin")))


def assert_nothing_left(stack: RunningStack) -> None:
    """Check that neither a process nor a run file remains."""
    assert servers_of(stack.home) == []
    assert [path.name for path in stack.home.run.iterdir()] == ["rbee.lock"]


@BOTH
@pytest.mark.parametrize(
    ("how", "told"), [("/die", "ended with exit code 9"), ("/kill", "was ended by SIGKILL")], ids=["exit", "kill"]
)
async def test_server_that_died_is_started_again_on_its_socket(
    how: str, told: str, program: str, tmp_path: Path
) -> None:
    """In one sentence, with exit code or signal; address, run files and environment stay as they were."""
    async with running(tmp_path) as stack:
        await stack.until_ready()
        url, first = stack.url(program), stack.pid(program)
        announced = read_ready_file(stack.home.ready_file("rbee"))
        await stack.end(program, how)
        assert await stack.get(program) == 200
        ready = read_ready_file(stack.home.ready_file(program))
        assert ready is not None
        assert (ready.url, ready.pid == first) == (url, False)
        assert read_ready_file(stack.home.ready_file("rbee")) == announced
        queen_url = stack.url("queen-rbee") if program == "rbee-hive" else "-"
        assert stack.story.count(f"{program} queen_url={queen_url}") == 2
        stack.stop.set()
        assert await stack.task == 0
    said = [line for line in stack.err.getvalue().splitlines() if "keeper_restart" in line]
    assert said == [f"[keeper    ] keeper_restart: {program} {told}; starting it again in 0.1 s."]
    assert stack.story[-2:] == ["queen-rbee stops", "rbee-hive stops"]
    assert_nothing_left(stack)


async def test_connection_made_meanwhile_waits_for_the_next_life(tmp_path: Path) -> None:
    """`rbee up` holds the socket: nobody is refused."""
    async with running(tmp_path) as stack:
        await stack.until_ready()
        stack.in_next_life("queen-rbee", "held")
        await stack.end("queen-rbee")
        await stack.until_said("keeper_restart")
        reading, writing = await asyncio.open_connection("127.0.0.1", int(stack.url("queen-rbee").split(":")[-1]))
        writing.write(b"GET / HTTP/1.0\r\n\r\n")
        await writing.drain()
        assert stack.pid("queen-rbee") == 0
        (stack.home.root / "go").touch()
        async with asyncio.timeout(WAIT_S):
            assert (await reading.readline()).split()[1] == b"200"
        writing.close()
        await writing.wait_closed()


@BOTH
async def test_storm_of_deaths_ends_the_stack(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five times it is started again; then its last lines, the other stopped, exit code 1."""
    monkeypatch.setattr("rbee.keeper.restart_policy.FIRST_DELAY_S", 0.01)
    async with running(tmp_path) as stack:
        await stack.until_ready()
        stack.in_next_life(program, "1")
        await stack.end(program)
        assert await stack.task == 1
    told = stack.err.getvalue()
    assert told.count("keeper_restart") == 5
    assert (
        f"rbee: {program} ended with exit code 1: that is more than 5 failures within 60 s, so it is not "
        f"started again; stopping the rest.\n    | {program} says hello\n"
    ) in told
    other = "rbee-hive" if program == "queen-rbee" else "queen-rbee"
    assert stack.story[-1] == f"{other} stops"
    assert_nothing_left(stack)
    assert not stack.ready_file.exists()


@BOTH
@pytest.mark.parametrize(("code", "why"), [(2, "its settings cannot be used"), (3, "it cannot get ready")])
async def test_server_that_says_so_is_not_started_again(code: int, why: str, program: str, tmp_path: Path) -> None:
    """Exit code 2 or 3 is final, and becomes ours."""
    async with running(tmp_path) as stack:
        await stack.until_ready()
        stack.in_next_life(program, str(code))
        await stack.end(program)
        assert await stack.task == code
    told = stack.err.getvalue()
    assert told.count("keeper_restart") == 1
    assert f"rbee: {program} ended with exit code {code}: {why} as" in told
    assert_nothing_left(stack)


async def test_server_that_never_gets_ready_again_ends_the_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its time, which is shortened here."""
    async with running(tmp_path) as stack:
        await stack.until_ready()
        monkeypatch.setattr("rbee.keeper.server._READY_S", 0.3)
        stack.in_next_life("rbee-hive", "held")
        await stack.end("rbee-hive")
        assert await stack.task == 1
    assert "rbee: rbee-hive was not ready within 0.3 s; stopping the rest.\n" in stack.err.getvalue()
    assert_nothing_left(stack)


@BOTH
async def test_stop_while_a_restart_is_pending_leaves_nothing(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The delay is not waited for."""
    monkeypatch.setattr("rbee.keeper.restart_policy.FIRST_DELAY_S", 3600.0)
    monkeypatch.setattr("rbee.keeper.restart_policy.DELAY_S_MAX", 3600.0)
    async with running(tmp_path) as stack:
        await stack.until_ready()
        await stack.end(program)
        await stack.until_said("starting it again in 3600 s")
        stack.stop.set()
        async with asyncio.timeout(WAIT_S):
            assert await stack.task == 0
    assert_nothing_left(stack)


async def test_stop_while_a_restarted_server_gets_ready_leaves_nothing(tmp_path: Path) -> None:
    """Both of them at that."""
    async with running(tmp_path) as stack:
        await stack.until_ready()
        for program in ("queen-rbee", "rbee-hive"):
            stack.in_next_life(program, "held")
            await stack.end(program)
        await stack.until_said("keeper_restart", times=2)
        stack.stop.set()
        async with asyncio.timeout(WAIT_S):
            assert await stack.task == 0
    assert_nothing_left(stack)


async def test_last_lines_are_those_of_the_last_life_also_when_drawn(tmp_path: Path) -> None:
    """What earlier lives said is no part of it."""
    async with running(tmp_path, is_drawn=True) as stack:
        await stack.until_ready()
        stack.in_next_life("rbee-hive", "fails")
        await stack.end("rbee-hive")
        assert await stack.task == 3
    told = stack.err.getvalue()
    assert "[hive      ] hive_dies: Alas.\n" in told
    assert told.partition("stopping the rest.\n")[2].startswith("    | rbee-hive says hello\n    | the reason\n")
