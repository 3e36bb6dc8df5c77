"""`rbee up` under test, with small real servers in the place of queen and hive."""

from __future__ import annotations

import asyncio
import io
import json
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from rbee.contracts.home import Home, read_ready_file
from rbee.keeper.render import Screen
from rbee.keeper.settings import KeeperSettings
from rbee.keeper.stack import run_stack

WAIT_S = 30.0


class Paper(io.StringIO):
    """A stream that can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._came = asyncio.Event()

    def write(self, text: str) -> int:
        """Take what is written."""
        self._came.set()
        return super().write(text)

    async def until(self, text: str, times: int = 1) -> None:
        """Wait until `text` stands there that often."""
        async with asyncio.timeout(WAIT_S):
            while self.getvalue().count(text) < times:
                self._came.clear()
                await self._came.wait()


class RunningStack:
    """A stack under test."""

    def __init__(self, root: Path, *, is_drawn: bool = False, queen_port: int | None = 0) -> None:
        self.home = Home.at(root / "home")
        self.ready_file = root / "ready.json"
        self.out, self.err = Paper(), Paper()
        self.stop = asyncio.Event()
        filled = KeeperSettings(home=self.home.root, queen_port=queen_port, hive_port=0)
        screen = Screen(self.out, self.err)
        self.task = asyncio.ensure_future(
            run_stack(filled, screen, self.stop, ready_file=self.ready_file, is_drawn=is_drawn)
        )

    async def until_ready(self) -> None:
        """Wait until it announces itself, or ends."""
        announced = asyncio.ensure_future(self.err.until("keeper_ready"))
        await asyncio.wait({announced, self.task}, return_when=asyncio.FIRST_COMPLETED)
        announced.cancel()
        assert not self.task.done(), self.err.getvalue()

    async def until_said(self, text: str, times: int = 1) -> None:
        """Wait until the keeper has said something that often."""
        await self.err.until(text, times)

    @property
    def story(self) -> list[str]:
        """What the servers noted."""
        return (self.home.root / "story").read_text().splitlines()

    def url(self, program: str) -> str:
        """Return where a server listens, whether it lives or not."""
        ready = json.loads(self.ready_file.read_text())
        return str(ready["url" if program == "queen-rbee" else "hive_url"])

    def pid(self, program: str) -> int:
        """Return the number of a server that is ready, else 0."""
        ready = read_ready_file(self.home.ready_file(program))
        return ready.pid if ready else 0

    def in_next_life(self, program: str, mode: str) -> None:
        """Say how a server behaves from its next start on."""
        (self.home.root / f"mode-{program}").write_text(mode)

    async def get(self, program: str, path: str = "/") -> int:
        """Ask a server something; returns the status."""
        return await asyncio.to_thread(_status_of, self.url(program) + path)

    async def end(self, program: str, how: str = "/die") -> None:
        """Have a server end itself: `/die` with exit code 9, `/kill` by SIGKILL."""
        try:
            await self.get(program, how)
        except OSError:
            return
        raise AssertionError(f"{program} lives on")


def _status_of(url: str) -> int:
    with urllib.request.urlopen(url, timeout=WAIT_S) as response:
        return int(response.status)


@asynccontextmanager
async def running(root: Path, *, is_drawn: bool = False, queen_port: int = 0) -> AsyncIterator[RunningStack]:
    """Run a stack, and stop it when the test forgets to."""
    stack = RunningStack(root, is_drawn=is_drawn, queen_port=queen_port)
    try:
        yield stack
    finally:
        stack.stop.set()
        await asyncio.gather(stack.task, return_exceptions=True)
