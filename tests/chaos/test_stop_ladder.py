"""Children that do not want to end: TERM, the grace, KILL, and nothing is left; nobody else is ever signalled."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rbee.processes import stop_tree
from tests.chaos.conftest import Size
from tests.chaos.strace_stage import ROOT, module
from tests.unit.processes.process_stage import LIMIT_S, Stage

GRACE_S = 0.5
PROMISE_S = GRACE_S + 1.0
FORKS_MAX = 50
IGNORE = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
WAIT = "while True: signal.pause()\n"
FORKING = (
    IGNORE + f"left = {FORKS_MAX}\n"
    "while left > 0:\n"
    "    left -= 1\n"
    "    if os.fork() != 0: os._exit(0)\n"
    "    time.sleep(0.02)\n"
    f"    if left == {FORKS_MAX - 5}: say('ready')\n"
)

# What a child does, and how many lines it has said when it is ready.
LADDER: dict[str, tuple[str, int]] = {
    "polite": ("say('ready')\n" + WAIT, 1),
    "deaf to TERM": (IGNORE + "say('ready')\n" + WAIT, 1),
    "stopped": ("say('ready')\nos.kill(os.getpid(), signal.SIGSTOP)\n" + WAIT, 1),
    "stopped and deaf": (IGNORE + "say('ready')\nos.kill(os.getpid(), signal.SIGSTOP)\n" + WAIT, 1),
    "double-forked": (
        IGNORE
        + "if os.fork() == 0:\n"
        + "    if os.fork() != 0: os._exit(0)\n"
        + "    say('ready')\n"
        + f"    {WAIT}"
        + "os.wait()\nsay('ready')\n"
        + WAIT,
        2,
    ),
    "in a session of its own": (IGNORE + "if os.fork() == 0: os.setsid()\nsay('ready')\n" + WAIT, 2),
    "ended, and left others behind": (
        IGNORE
        + "for _ in range(3):\n"
        + "    if os.fork() == 0:\n"
        + "        os.setsid()\n"
        + "        say('ready')\n"
        + f"        {WAIT}",
        3,
    ),
    "forking for ever": (FORKING + WAIT, 1),
    "ended, its children forking for ever": ("if os.fork() != 0: os._exit(0)\n" + FORKING + WAIT, 1),
    "ended, its children in a session of their own forking for ever": (
        "if os.fork() != 0: os._exit(0)\nos.setsid()\n" + FORKING + WAIT,
        1,
    ),
    "forking when told to end": (
        "def fork(*_):\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    for _ in range(5): os.fork()\n"
        "signal.signal(signal.SIGTERM, fork)\nsay('ready')\n" + WAIT,
        1,
    ),
    "ending between TERM and KILL": (
        "def end(*_):\n"
        "    time.sleep(0.3)\n"
        "    os._exit(3)\n"
        "signal.signal(signal.SIGTERM, end)\nsay('ready')\n" + WAIT,
        1,
    ),
    "listening on a port": (
        IGNORE + "import socket\nlistener = socket.create_server(('127.0.0.1', 0))\n"
        "os.fork()\nsay(listener.getsockname()[1])\n" + WAIT,
        2,
    ),
}

Figure = Callable[[str, object], None]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    for pid, _ in made.left():
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("kind", LADDER)
async def test_child_that_does_not_want_to_end_is_gone_after_the_grace(
    stage: Stage, tmp_path: Path, size: Size, kind: str, figure: Figure
) -> None:
    code, lines = LADDER[kind]
    took_most = 0.0
    for number in range(size.of(1, 100)):
        stage.stdout.unlink(missing_ok=True)
        with _alive(tmp_path / f"alive-{number}") as (path, is_anybody_alive):
            child = stage.python(f"alive = os.open({str(path)!r}, os.O_WRONLY)\n" + code)
            said = await stage.said(lines)
            if kind.startswith("ended"):
                await child.wait()
            assert is_anybody_alive()
            began = time.monotonic()
            report = await stop_tree(child, marker=stage.marker, grace_s=GRACE_S)
            took_most = max(took_most, time.monotonic() - began)
            assert not is_anybody_alive()
        assert child.status is not None
        assert took_most < 3 * PROMISE_S
        child.close()
        if kind == "listening on a port":
            socket.create_server(("127.0.0.1", int(said[0]))).close()
    figure(f"{kind}: gone after s, found, killed", (round(took_most, 2), report.found, report.killed))


@contextmanager
def _alive(path: Path) -> Iterator[tuple[Path, Callable[[], bool]]]:
    """Give a pipe that a child opens and its children inherit, and what tells whether any of them still has it."""
    os.mkfifo(path)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def is_anybody_alive() -> bool:
        try:
            return os.read(fd, 1) != b""
        except BlockingIOError:
            return True

    try:
        yield path, is_anybody_alive
    finally:
        os.close(fd)


def test_process_that_got_the_number_of_one_that_ended_is_never_signalled(size: Size, figure: Figure) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("only root can make a namespace in which it chooses the next process number")
    space = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*space, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no namespace of process numbers can be made here")
    done = subprocess.run(
        [*space, *module("reused_numbers", str(size.of(2, 50)))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figure("numbers used again, strangers signalled", (int(done.stdout), 0))


_READER = """
import asyncio, os, sys
from rbee.processes import CapturedLine, ProcessNarrationCapture

async def main():
    code = open(sys.argv[1]).read()
    command = [sys.executable, "-c", code, sys.argv[2], sys.argv[3]]
    async with await ProcessNarrationCapture().spawn(command) as process:
        expected = 0
        async for item in process.events():
            number, _, rest = item.text.partition(" ")
            assert (int(number), len(rest)) == (expected, 1000), item
            expected += 1
            if expected == 100:
                os.write(1, b"reading\\n")
        assert (await process.wait()).exit_code == 0
        os.write(1, b"%d\\n" % expected)

asyncio.run(main())
"""
_SPEAKER = """
import os, sys, time
seconds, rate = float(sys.argv[1]), 5 * 2**20
line, written, number, halves = b"x" * 1000 + b"\\n", 0, 0, []
began = time.monotonic()
while (now := time.monotonic() - began) < seconds:
    while written < rate * now:
        written += os.write(1, b"%d " % number + line)
        number += 1
    if len(halves) == 0 and now > seconds / 2: halves.append(written)
    time.sleep(0.01)
with open(sys.argv[2], "w") as file: file.write(f"{number} {written / (time.monotonic() - began) / 2**20:.2f}")
"""


async def test_reader_that_is_stopped_does_not_slow_its_child_and_misses_nothing(
    tmp_path: Path, size: Size, figure: Figure
) -> None:
    seconds = size.of(2, 10)
    speaker, figures = tmp_path / "speaker.py", tmp_path / "figures"
    speaker.write_text(_SPEAKER)
    command = [sys.executable, "-c", _READER, str(speaker), str(seconds), str(figures)]
    reader = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert reader.stdout is not None
    async with asyncio.timeout(LIMIT_S):
        assert await reader.stdout.readline() == b"reading\n"
        reader.send_signal(signal.SIGSTOP)
        while not figures.exists() or not figures.read_text():  # noqa: ASYNC110  # a file of a stranger
            await asyncio.sleep(0.05)
        reader.send_signal(signal.SIGCONT)
        assert await reader.wait() == 0
        read = int(await reader.stdout.read())
    written, rate = figures.read_text().split()
    assert read == int(written)
    figure("MiB/s of a child whose reader is stopped (5 asked)", rate)
    figure("lines read afterwards, in order", read)
