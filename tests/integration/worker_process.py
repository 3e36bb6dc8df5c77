"""A real worker process: the console script, the real engine, and two files for what it says."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from rbee.testing.stack import console_script

TOKEN = "integration-token"
WORKER_ID = "worker-00000000000000000000000001"
HIVE_ID = "hive-00000000000000000000000001"
WAIT_S = 60.0
CHAT = "/v1/chat/completions"


class WorkerProcess:
    """Starts one worker in a home of its own; `close` ends it whatever happened."""

    def __init__(self, home: Path, *flags: str, environ: Mapping[str, str] | None = None) -> None:
        """Start the program."""
        directory = home / "workers" / WORKER_ID
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory = directory
        self.stdout, self.stderr = directory / "stdout", directory / "stderr"
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
        named = {"RBEE_HOME": str(home), "RBEE_WORKER_ID": WORKER_ID, "RBEE_WORKER_TOKEN": TOKEN}
        with self.stdout.open("ab") as stdout, self.stderr.open("ab") as stderr:
            self.process = subprocess.Popen(
                [console_script("llama-worker-rbee"), *flags],
                env={**inherited, **named, **(environ or {})},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )

    def close(self) -> None:
        """End the process, if it still runs."""
        self.process.kill()
        self.process.wait(WAIT_S)

    def lines(self) -> list[dict[str, Any]]:
        """Read every whole line of stdout; each must be an event."""
        whole = self.stdout.read_bytes().rpartition(b"\n")[0]
        return [msgspec.json.decode(line) for line in whole.splitlines()]

    def said(self, action: str) -> list[dict[str, Any]]:
        """Read what was said under an action word."""
        return [line for line in self.lines() if line.get("action") == action]

    def about(self, job_id: str) -> list[dict[str, Any]]:
        """Read what was said about a job."""
        return [line for line in self.lines() if line.get("job_id") == job_id]

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait, within a bound, until something stands in the files, or the process has ended."""
        async with asyncio.timeout(WAIT_S):
            while not is_so():  # noqa: ASYNC110  # what is waited for stands in a file
                await asyncio.sleep(0.005)

    async def has_begun(self, job_id: str) -> None:
        """Wait until the worker has said something about a job."""
        await self.until(lambda: bool(self.about(job_id)))

    async def closing(self, job_id: str) -> dict[str, Any]:
        """Wait for the one closing line of a job."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self.about(job_id) if line.get("action") == "worker_inference"]

        await self.until(lambda: bool(found()) or self.process.poll() is not None)
        (line,) = found()
        return line

    async def ready(self) -> str:
        """Wait until the worker is ready and return its address."""
        await self.until(lambda: bool(self.said("worker_ready")) or self.process.poll() is not None)
        assert self.process.poll() is None, self.stderr.read_text()
        return str(self.said("worker_ready")[0]["fields"]["url"])

    async def end(self) -> int:
        """Wait for the end and return the exit code."""
        return await asyncio.to_thread(self.process.wait, WAIT_S)

    async def session(self) -> aiohttp.ClientSession:
        """Make a client session with the worker's token."""
        return aiohttp.ClientSession(await self.ready(), headers={"authorization": f"Bearer {TOKEN}"})
