"""Small programs to play with, for the tests of processes."""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from pathlib import Path

from rbee.processes import Child, FileWatch, ProcessSpec, find_marked, spawn

LIMIT_S = 60.0
PRELUDE = """
import os, signal, sys, time
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # print() would need two writes
"""


class Stage:
    """Starts small Python programs whose every process carries one marker, and waits for what they say."""

    def __init__(self, directory: Path) -> None:
        self.marker = ("RBEE_TEST_STAGE", uuid.uuid4().hex)
        self.stdout = directory / "stage.stdout"
        self.stderr = directory / "stage.stderr"

    def spec(self, *command: str, cwd: Path | None = None) -> ProcessSpec:
        env = {"PATH": os.environ["PATH"], "PYTHONUNBUFFERED": "1", self.marker[0]: self.marker[1]}
        return ProcessSpec(command=command, env=env, stdout=self.stdout, stderr=self.stderr, cwd=cwd)

    def python(self, code: str) -> Child:
        return spawn(self.spec(sys.executable, "-c", PRELUDE + code))

    async def said(self, lines: int) -> list[str]:
        """Wait until the program has printed so many lines and return them."""
        async with asyncio.timeout(LIMIT_S):
            with FileWatch() as watch:
                watch.add(self.stdout)
                while (text := self.stdout.read_text()).count("\n") < lines:
                    await watch.wait(LIMIT_S)
        return text.splitlines()

    def await_end(self, child: Child, states: int = os.WEXITED) -> None:
        """Block until the program ended (or stopped, with WSTOPPED), and leave its exit status to be taken."""
        os.waitid(os.P_PID, child.pid, states | os.WNOWAIT)

    def take_status(self, child: Child) -> None:
        """Take the exit status of a program that ended, so that its owner cannot."""
        os.waitpid(child.pid, 0)

    def left(self) -> list[tuple[int, int]]:
        return find_marked(*self.marker)
