"""`rbee up` gives a queen or hive that died its life back, with the real programs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from rbee.client import JobClient
from rbee.contracts.home import Home, read_ready_file
from rbee.keeper.strays import servers_of
from rbee.processes import ExitStatus
from rbee.testing import LocalStack
from rbee.testing.stack import Running
from tests.e2e.reading import actions, assert_whole

WAIT_S = 60.0
LONG_CHECK = {"operation": "queen_check", "lines": 5000}


@pytest.fixture
async def stack() -> AsyncIterator[LocalStack]:
    """Give an empty home."""
    async with LocalStack(with_queen=False) as stack:
        yield stack


def pid_of(stack: LocalStack, program: str) -> int:
    """Return the number of a program that is ready, else 0."""
    ready = read_ready_file(stack.home / "run" / f"{program}.json")
    return ready.pid if ready else 0


async def kill(stack: LocalStack, program: str) -> int:
    """Kill a program that is ready and wait for its end; returns the number it had."""
    pid = pid_of(stack, program)
    os.kill(pid, signal.SIGKILL)
    await stack.until(lambda: pid_of(stack, program) != pid)
    return pid


async def restarted(stack: LocalStack, program: str, before: int) -> int:
    """Wait until a program is ready again; returns its new number."""
    await stack.until(lambda: pid_of(stack, program) not in (0, before))
    return pid_of(stack, program)


async def ended(up: Running) -> ExitStatus:
    """Wait for the end of `rbee up`."""
    async with asyncio.timeout(WAIT_S):
        return await up.wait()


def assert_nothing_left(stack: LocalStack) -> None:
    """Check that no process and no run file remains."""
    assert stack.processes() == []
    assert [path.name for path in (stack.home / "run").iterdir()] == ["rbee.lock"]


def said(up: Running, text: str, times: int = 1) -> Callable[[], bool]:
    """Return whether `rbee up` has said something that often."""
    return lambda: up.printed().count(text) >= times


async def test_killed_queen_answers_again_at_the_same_address(stack: LocalStack) -> None:
    """Whoever connects meanwhile waits; readers go on without loss or repeats; run files are right again."""
    up = await stack.start_up()
    announced = (stack.home / "run" / "rbee.json").read_bytes()
    async with asyncio.timeout(WAIT_S), JobClient(up.url) as client:
        boot_id = (await client.status()).boot_id
        job_id = (await client.submit(LONG_CHECK)).job_id
        read = []
        async for event in client.follow(job_id):
            read.append(event)
            if len(read) == 100:
                pid = await kill(stack, "queen-rbee")
                assert (await client.status()).boot_id != boot_id
        again = [event async for event in client.follow(job_id)]
    assert read == again
    assert_whole(read)
    assert await restarted(stack, "queen-rbee", pid) != pid
    assert (stack.home / "run" / "rbee.json").read_bytes() == announced
    assert "keeper_restart: queen-rbee was ended by SIGKILL; starting it again in 0.1 s." in up.printed()


async def test_keeper_follows_across_a_killed_queen(stack: LocalStack) -> None:
    """`rbee jobs follow` writes every event once."""
    up = await stack.start_up()
    async with JobClient(up.url) as client:
        job_id = (await client.submit(LONG_CHECK)).job_id
        written = []
        async with asyncio.timeout(WAIT_S), stack.keeper_process("jobs", "follow", "--json", job_id) as keeper:
            assert keeper.stdout is not None
            async for line in keeper.stdout:
                written.append(json.loads(line))
                if len(written) == 100:
                    await kill(stack, "queen-rbee")
            await keeper.wait()
        assert written == [event async for event in client.follow(job_id)]
    assert_whole(written)


async def test_killed_hive_is_live_again_under_its_id(stack: LocalStack) -> None:
    """And does what the queen asks of it."""
    up = await stack.start_up()
    async with asyncio.timeout(WAIT_S), JobClient(up.url) as client:
        (before,) = await client.hives()
        pid = await kill(stack, "rbee-hive")
        await restarted(stack, "rbee-hive", pid)
        check = {"operation": "hive_check", "hive_id": before.hive_id, "lines": 2}
        events = [event async for event in client.follow((await client.submit(check)).job_id)]
        (after,) = await client.hives()
    assert (after.hive_id, after.state, after.url) == (before.hive_id, "live", before.url)
    assert_whole(events)
    assert events[-1]["state"] == "completed"
    assert actions(events).count("hive_check") == 2
    assert "keeper_restart: rbee-hive was ended by SIGKILL; starting it again in 0.1 s." in up.printed()


async def test_server_that_was_told_to_stop_by_somebody_else_is_started_again(stack: LocalStack) -> None:
    """Only `rbee up` and `rbee down` are asked; any other end is a death."""
    up = await stack.start_up()
    pid = pid_of(stack, "rbee-hive")
    os.kill(pid, signal.SIGTERM)
    await restarted(stack, "rbee-hive", pid)
    assert "keeper_restart: rbee-hive ended with exit code 0; starting it again in 0.1 s." in up.printed()
    assert (await stack.keeper("down")).exit_code == 0
    assert (await ended(up)).exit_code == 0
    assert_nothing_left(stack)


async def test_storm_of_deaths_ends_the_stack(stack: LocalStack) -> None:
    """After five restarts within a minute it says so, stops the rest and exits 1."""
    up = await stack.start_up()
    home = Home(stack.home)
    killed: set[int] = set()
    async with asyncio.timeout(WAIT_S):
        while len(killed) < 6:
            for server in servers_of(home):
                if server.program == "rbee-hive" and server.pid not in killed:
                    killed.add(server.pid)
                    os.kill(server.pid, signal.SIGKILL)
            await asyncio.sleep(0.02)
    assert (await ended(up)).exit_code == 1
    told = up.printed()
    assert told.count("keeper_restart") == 5
    assert "rbee: rbee-hive was ended by SIGKILL: that is more than 5 failures within 60 s" in told
    assert_nothing_left(stack)


@pytest.mark.parametrize("program", ["queen-rbee", "rbee-hive"])
async def test_server_that_cannot_use_its_settings_is_not_started_again(stack: LocalStack, program: str) -> None:
    """Its own sentence is told, and its exit code 2 is ours."""
    up = await stack.start_up()
    (stack.home / "rbee.toml").write_text("[queen]\nprot = 1\n[hive]\nprot = 1\n")
    await kill(stack, program)
    assert (await ended(up)).exit_code == 2
    told = up.printed()
    assert told.count("keeper_restart") == 1
    assert f"rbee: {program} ended with exit code 2: its settings cannot be used as they are" in told
    assert "Unknown key `" in told
    assert_nothing_left(stack)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_during_a_restart_leaves_nothing(stack: LocalStack, number: signal.Signals) -> None:
    """Both servers are on their way back when it comes."""
    up = await stack.start_up()
    await kill(stack, "queen-rbee")
    await kill(stack, "rbee-hive")
    await stack.until(said(up, "keeper_restart", times=2))
    up.signal(number)
    assert (await ended(up)).exit_code == 0
    assert_nothing_left(stack)


async def test_killed_up_takes_restarted_servers_down(stack: LocalStack) -> None:
    """Each life of a server ends with `rbee up`, not the first alone."""
    up = await stack.start_up()
    for program in ("queen-rbee", "rbee-hive"):
        await restarted(stack, program, await kill(stack, program))
    up.signal(signal.SIGKILL)
    await ended(up)
    await stack.until(lambda: not stack.processes())


async def test_hive_that_cannot_get_ready_again_ends_the_stack(stack: LocalStack) -> None:
    """Where a directory of the home became a file, nothing is tried for ever."""
    up = await stack.start_up()
    (stack.home / "workers").rmdir()
    (stack.home / "workers").write_text("no directory")
    await kill(stack, "rbee-hive")
    assert (await ended(up)).exit_code == 2
    assert f"RBEE_HOME {Path(stack.home)} cannot be used" in up.printed()
    assert_nothing_left(stack)
