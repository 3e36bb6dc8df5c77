"""The keeper's own stack: started when it is needed, stopped to the last process, interrupted by Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rbee.processes import find_marked
from rbee.testing import LocalStack
from tests.e2e.reading import MODEL, assert_whole


@pytest.fixture
async def empty_home(rbee_models: Path) -> AsyncIterator[LocalStack]:
    """Give a home in which nothing runs."""
    async with LocalStack(models=rbee_models, with_hive=False, with_queen=False) as stack:
        yield stack


async def test_infer_starts_a_stack_and_down_stops_all_of_it(empty_home: LocalStack) -> None:
    """The first command of a new user: an answer, and a sentence about what was started."""
    ran = await empty_home.keeper(
        "infer", "-m", MODEL, "--max-tokens", "6", "Tell a long story about a river.", env=PORTS
    )
    assert ran.exit_code == 0, ran.stderr
    assert ran.stdout.strip()
    assert "rbee down" in ran.stderr
    status = await empty_home.keeper("status", "--json")
    assert len(json.loads(status.stdout)["hives"]) == 1
    assert empty_home.processes()
    down = await empty_home.keeper("down")
    assert down.exit_code == 0
    assert empty_home.processes() == []
    again = await empty_home.keeper("down")
    assert again.exit_code == 0


async def test_two_keepers_at_once_start_one_stack(empty_home: LocalStack) -> None:
    """A lock keeps two first commands from starting two stacks."""
    both = await asyncio.gather(
        *(empty_home.keeper("infer", "-m", MODEL, "--max-tokens", "2", "Hi", env=PORTS) for _ in range(2))
    )
    assert [ran.exit_code for ran in both] == [0, 0]
    names = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in empty_home.processes()]
    assert sum(b"queen-rbee" in name for name in names) == 1
    assert sum(b"rbee-hive" in name for name in names) == 1
    assert (await empty_home.keeper("down")).exit_code == 0


async def test_reading_commands_start_nothing(empty_home: LocalStack) -> None:
    """Looking is not starting: without a queen they say so."""
    for arguments in (["status"], ["jobs", "list"], ["workers", "list"], ["hives", "list"]):
        ran = await empty_home.keeper(*arguments)
        assert ran.exit_code == 1
        assert "rbee up" in ran.stderr
    assert empty_home.processes() == []


async def test_interrupted_infer_cancels_its_job(rbee_stack: LocalStack) -> None:
    """Ctrl-C: the job is cancelled, the keeper says so and exits 130."""
    arguments = ("infer", "--json", "-m", MODEL, "--max-tokens", "3000", "Tell a very long story.")
    async with rbee_stack.keeper_process(*arguments) as keeper:
        assert keeper.stdout is not None
        events = []
        async with asyncio.timeout(60):
            async for line in keeper.stdout:
                events.append(json.loads(line))
                if events[-1]["kind"] == "token" and events[-1]["tokens"] == 3:
                    keeper.send_signal(signal.SIGINT)
            await keeper.wait()
        assert keeper.stderr is not None
        said = (await keeper.stderr.read()).decode()
    assert keeper.returncode == 130
    assert "ancel" in said
    log = await rbee_stack.log(events[0]["job_id"])
    assert_whole(log)
    assert (log[-1]["state"], log[-1]["reason"]) == ("cancelled", "user")


async def test_killed_up_takes_its_stack_down(empty_home: LocalStack) -> None:
    """No process outlives a killed `rbee up`."""
    ready = empty_home.home / "up.json"
    up = await empty_home.start_up("--ready-file", str(ready))
    assert json.loads(ready.read_text())["url"]
    os.kill(up.pid, signal.SIGKILL)
    await up.wait()
    await empty_home.until(lambda: not empty_home.processes())


async def test_nothing_is_left_when_a_test_process_is_killed(tmp_path: Path) -> None:
    """SIGKILL to whoever started a stack: its guardian stops the programs and removes the home."""
    script = tmp_path / "starts_a_stack.py"
    script.write_text(
        "import asyncio\n"
        "from rbee.testing import LocalStack\n"
        "async def main():\n"
        "    async with LocalStack() as stack:\n"
        "        print(stack.home, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, str(script), stdout=subprocess.PIPE)
    assert process.stdout is not None
    home = (await process.stdout.readline()).decode().strip()
    assert len(find_marked("RBEE_HOME", home)) >= 2
    process.kill()
    await process.wait()
    await LocalStack.until(lambda: not find_marked("RBEE_HOME", home) and not Path(home).exists())


PORTS = {"QUEEN_PORT": "0", "HIVE_PORT": "0"}
