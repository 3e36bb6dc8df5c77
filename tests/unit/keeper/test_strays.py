"""Whose processes are a home's servers, and that `rbee down` stops them and nobody else."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rbee.contracts.home import Home, write_ready_file
from rbee.contracts.views import ReadyFile
from rbee.keeper.local_stack import up_lock
from rbee.keeper.render import Screen
from rbee.keeper.stopping import is_up, stop_home
from rbee.keeper.strays import HomeProcess, servers_of
from rbee.processes import FileLock
from rbee.processes.procfs import read_process

_SLEEPER = "import signal\nprint('here', flush=True)\nsignal.pause()\n"
_DEAF = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('here', flush=True)\nsignal.pause()\n"


class Zoo:
    """Starts small processes, and ends those that are left."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started: list[subprocess.Popen[bytes]] = []

    def start(
        self, name: str, *arguments: str, code: str = _SLEEPER, **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start a script of that name, and return when it runs."""
        script = self._directory / name
        script.write_text(code)
        process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        return process

    def end(self) -> None:
        """End everything that was started."""
        for process in self._started:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture
def zoo(tmp_path: Path) -> Iterator[Zoo]:
    """Give a test its processes."""
    zoo = Zoo(tmp_path)
    yield zoo
    zoo.end()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """Make a home."""
    return Home.at(tmp_path / "home")


def names(processes: list[HomeProcess]) -> list[tuple[str, int]]:
    """Return programs and numbers."""
    return [(process.program, process.pid) for process in processes]


async def down(home: Home) -> str:
    """Run `rbee down` and return what it said."""
    err = io.StringIO()
    assert await stop_home(home, Screen(io.StringIO(), err)) == 0
    return err.getvalue()


def test_servers_are_found_in_the_order_they_are_stopped(zoo: Zoo, home: Home) -> None:
    """A worker's own child counts by its worker's mark."""
    root = str(home.root)
    child = zoo.start("engine", RBEE_HOME=root, RBEE_WORKER_ID="worker-1")
    worker = zoo.start("llama-worker-rbee", RBEE_HOME=root, RBEE_WORKER_ID="worker-1")
    hive = zoo.start("rbee-hive", RBEE_HOME=root)
    queen = zoo.start("queen-rbee", RBEE_HOME=root)
    assert names(servers_of(home)) == [
        ("queen-rbee", queen.pid),
        ("rbee-hive", hive.pid),
        ("llama-worker-rbee", worker.pid),
        ("worker", child.pid),
    ]


def test_strangers_are_no_servers_of_the_home(zoo: Zoo, home: Home, tmp_path: Path) -> None:
    """Neither another home's, nor an editor or keeper that has the variable."""
    zoo.start("queen-rbee", RBEE_HOME=str(tmp_path / "other"))
    zoo.start("editor", RBEE_HOME=str(home.root))
    zoo.start("rbee", "infer", "hi", RBEE_HOME=str(home.root))
    assert servers_of(home) == []


async def test_down_stops_servers_without_a_stack_and_nobody_else(zoo: Zoo, home: Home) -> None:
    """Also one that does not listen to SIGTERM is gone in the end."""
    root = str(home.root)
    queen = zoo.start("queen-rbee", RBEE_HOME=root)
    worker = zoo.start("llama-worker-rbee", RBEE_HOME=root)
    editor = zoo.start("editor", RBEE_HOME=root)
    said = await down(home)
    assert said == (
        f"[keeper    ] keeper_down: Stopped queen-rbee (pid {queen.pid}), llama-worker-rbee (pid {worker.pid}).\n"
    )
    assert [read_process(process.pid) for process in (queen, worker)] == [None, None]
    assert editor.poll() is None


async def test_down_kills_what_does_not_listen(zoo: Zoo, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its time, which is shortened here."""
    monkeypatch.setattr("rbee.keeper.stopping.ALONE_S", 0.2)
    hive = zoo.start("rbee-hive", code=_DEAF, RBEE_HOME=str(home.root))
    await down(home)
    assert read_process(hive.pid) is None


async def test_down_stops_the_stack_that_holds_the_home(zoo: Zoo, home: Home) -> None:
    """Found by its run file, its lock and its command line."""
    lock_and_wait = (
        "import asyncio, signal, sys\nfrom pathlib import Path\nfrom rbee.processes.locks import FileLock\n"
        "lock = FileLock(Path(sys.argv[2]))\nassert lock.acquire()\n" + _SLEEPER
    )
    pythonpath = str(Path(__file__).parents[3] / "src")
    stack = zoo.start("rbee", "up", str(up_lock(home)), code=lock_and_wait, PYTHONPATH=pythonpath)
    write_ready_file(home.ready_file("rbee"), ReadyFile(url="http://127.0.0.1:1", pid=stack.pid))
    said = await down(home)
    assert said == f"[keeper    ] keeper_down: Stopped rbee up (pid {stack.pid}).\n"
    assert read_process(stack.pid) is None
    assert not home.ready_file("rbee").exists()


async def test_down_leaves_a_stranger_that_has_the_number_alone(zoo: Zoo, home: Home) -> None:
    """A run file that was left behind, and a number that went to another program."""
    stranger = zoo.start("editor")
    write_ready_file(home.ready_file("rbee"), ReadyFile(url="http://127.0.0.1:1", pid=stranger.pid))
    lock = FileLock(up_lock(home))
    assert lock.acquire()
    assert "Nothing runs" in await down(home)
    assert stranger.poll() is None
    lock.release()
    await down(home)
    assert not home.ready_file("rbee").exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/v/bin/python /v/bin/rbee up", True),
        ("python -m rbee up --queen-port 0", True),
        ("/v/bin/python /v/bin/rbee --home /x --queen=U up -d", True),
        ("/v/bin/python /v/bin/rbee infer up", False),
        ("/v/bin/python /v/bin/rbee --home up status", False),
        ("/bin/vi up", False),
        ("", False),
    ],
)
def test_stack_is_known_by_its_command_line(line: str, expected: bool) -> None:
    """A keeper that is busy with something else is none."""
    assert is_up(line.split()) is expected
