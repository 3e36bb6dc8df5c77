"""A queen, a hive and keepers as real processes on free ports, in a home of their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from msgspec import Struct

from rbee.client import JobClient
from rbee.contracts.home import read_ready_file
from rbee.contracts.operations import Operation
from rbee.errors import StartError
from rbee.processes import (
    CapturedEvent,
    CapturedProcess,
    ExitStatus,
    ProcessNarrationCapture,
    find_marked,
    stop_tree,
)

READY_S = 30.0
FINISH_S = 90.0
GRACE_S = 10.0
POLL_S = 0.02
ONE_THREAD = "[worker]\nthreads = 1\n"
LOG_TAIL_BYTES = 20_000
PASSED_ON = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "PIP_",
    "SSL_",
    "COVERAGE_",
)


class Finished(Struct, frozen=True):
    """A keeper that ran to its end."""

    exit_code: int
    stdout: str
    stderr: str


class Running:
    """A program of the stack that runs: its process, where it listens, what it printed."""

    def __init__(self, name: str, process: CapturedProcess, directory: Path, url: str = "") -> None:
        self.name = name
        self.process = process
        self.directory = directory
        self.url = url

    @property
    def pid(self) -> int:
        """The process's number."""
        return self.process.child.pid

    def signal(self, number: int) -> None:
        """Send a signal to this very process."""
        self.process.child.send_signal(number)

    async def kill(self) -> None:
        """Kill this very process, and wait until it is dead; what it started lives on."""
        self.signal(signal.SIGKILL)
        await self.wait()

    async def wait(self) -> ExitStatus:
        """Wait for its end."""
        return await self.process.wait()

    def printed(self) -> str:
        """Return the end of what it printed, both streams."""
        parts = []
        for stream in ("stdout", "stderr"):
            data = (self.directory / stream).read_bytes()[-LOG_TAIL_BYTES:]
            parts.append(f"--- {self.name} {stream}\n{data.decode('utf-8', 'replace')}")
        return "\n".join(parts)


class LocalStack:
    """Starts the installed console scripts and leaves nothing behind.

    Use it as an asynchronous context manager. However the test process ends, a guardian process stops what it
    started and removes the home.

    Args:
        models: Directory of model files to share (RBEE_MODELS); the home's own when None.
        env: More environment for every program of the stack, such as settings (`RBEE_HIVE_TIMEOUT_S`).
        with_queen: Start a queen; without one, the home is empty.
        with_hive: Start a hive as well.
        config: What the home's rbee.toml says. By default workers compute with one thread, so that several
            stacks can run beside each other.
        prefixes: Words before a program's command, by program, such as those that enter a network namespace.
        programs: A directory with programs to use instead of the installed ones of the same name.

    Example:
        ```python
        async with LocalStack() as stack:
            events = await stack.run_job({"operation": "queen_check"})
            assert events[-1]["state"] == "completed"
        ```
    """

    def __init__(
        self,
        *,
        models: Path | None = None,
        env: Mapping[str, str] | None = None,
        with_queen: bool = True,
        with_hive: bool = True,
        config: str = ONE_THREAD,
        prefixes: Mapping[str, Sequence[str]] | None = None,
        programs: Path | None = None,
    ) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="rbee-test-"))
        (self.home / "rbee.toml").write_text(config, "utf-8")
        self.env = self._environment(models, env or {})
        self.with_queen = with_queen
        self.with_hive = with_hive
        self._prefixes = prefixes or {}
        self._own_programs = programs
        self.queen: Running | None = None
        self.hive: Running | None = None
        self._programs: list[Running] = []
        self._guardian: subprocess.Popen[bytes] | None = None

    def _environment(self, models: Path | None, env: Mapping[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        kept["PYTHONUNBUFFERED"] = "1"
        kept["RBEE_HOME"] = str(self.home)
        if models is not None:
            kept["RBEE_MODELS"] = str(models)
        return {**kept, **env}

    @property
    def url(self) -> str:
        """The queen's address."""
        assert self.queen is not None
        return self.queen.url

    async def __aenter__(self) -> Self:
        """Start the programs; ready when this returns."""
        self._guardian = _start_guardian(self.home)
        try:
            if self.with_queen:
                await self.start_queen()
            if self.with_queen and self.with_hive:
                await self.start_hive()
                await self.until_hive_is_live()
        except BaseException as error:
            error.add_note(self.logs())
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop everything; a failure's error gets the programs' logs as a note."""
        if error is not None:
            error.add_note(self.logs())
        await self.close()

    async def start_queen(self, port: int = 0) -> Running:
        """Start a queen; again on the same port when `port` says so."""
        self.queen = await self._start("queen-rbee", ["--port", str(port)], "queen_ready")
        return self.queen

    async def restart_queen(self) -> Running:
        """Start a queen where the last one was, who has to be dead."""
        return await self.start_queen(int(self.url.rpartition(":")[2]))

    async def start_hive(self, queen_url: str | None = None) -> Running:
        """Start a hive for the queen, or for one of another home."""
        arguments = ["--port", "0", "--queen-url", queen_url or self.url]
        self.hive = await self._start("rbee-hive", arguments, "hive_ready")
        return self.hive

    async def start_up(self, *arguments: str) -> Running:
        """Start `rbee up` in the foreground, on free ports; ready when this returns."""
        ports = ["--queen-port", "0", "--hive-port", "0"]
        up = await self._start("rbee", ["up", *ports, *arguments], "keeper_ready")
        ready = read_ready_file(self.home / "run" / "rbee.json")
        assert ready is not None
        up.url = ready.url
        return up

    async def _start(self, program: str, arguments: Sequence[str], ready_action: str) -> Running:
        directory = self.home / "test-logs" / f"{program}-{len(self._programs)}"
        capture = ProcessNarrationCapture(directory=directory, env=self.env, marker=("RBEE_HOME", str(self.home)))
        process = await capture.spawn([*self._prefixes.get(program, ()), self._script(program), *arguments])
        running = Running(program, process, directory)
        self._programs.append(running)
        async with asyncio.timeout(READY_S):
            async for item in process.events():
                if isinstance(item, CapturedEvent) and item.event["action"] == ready_action:
                    running.url = item.event.get("fields", {}).get("url", "")
                    return running
        raise StartError(f"{program} ended before it was ready.\n{running.printed()}")

    def _script(self, program: str) -> str:
        own = self._own_programs / program if self._own_programs is not None else None
        return str(own) if own is not None and own.exists() else console_script(program)

    async def until_hive_is_live(self) -> str:
        """Wait until the queen lists a live hive; returns its id."""
        async with asyncio.timeout(READY_S), self.client() as client:
            while True:
                live = [hive for hive in await client.hives() if hive.state == "live"]
                if live:
                    return live[0].hive_id
                await asyncio.sleep(POLL_S)

    @staticmethod
    async def until(holds: Callable[[], bool]) -> None:
        """Look again and again until something holds that nobody announces, such as the end of strangers.

        Raises:
            TimeoutError: It does not hold after 30 s.
        """
        async with asyncio.timeout(READY_S):
            while not holds():  # noqa: ASYNC110  # /proc tells nobody
                await asyncio.sleep(POLL_S)

    def client(self, correlation_id: str | None = None) -> JobClient:
        """Return a client of the queen; use it as a context manager."""
        return JobClient(self.url, api_key=self.env.get("RBEE_API_KEY"), correlation_id=correlation_id)

    async def run_job(self, operation: Operation | Mapping[str, Any]) -> list[dict[str, Any]]:
        """Submit a job and return its whole log."""
        async with self.client() as client:
            job_id = (await client.submit(operation)).job_id
            return await self.log(job_id)

    async def log(self, job_id: str) -> list[dict[str, Any]]:
        """Follow a job to its end and return its whole log."""
        async with asyncio.timeout(FINISH_S), self.client() as client:
            return [event async for event in client.follow(job_id)]

    async def keeper(
        self, *arguments: str, stdin: str | None = None, env: Mapping[str, str] | None = None
    ) -> Finished:
        """Run `rbee` with these arguments to its end."""
        has_stdin = stdin is not None
        async with self.keeper_process(*arguments, has_stdin=has_stdin, env=env) as process:
            return await _finish(process, stdin)

    async def program(self, name: str, *arguments: str) -> Finished:
        """Run another program of rbee to its end."""
        async with self._process(name, arguments, self.env, has_stdin=False) as process:
            return await _finish(process, None)

    @contextlib.asynccontextmanager
    async def keeper_process(
        self, *arguments: str, has_stdin: bool = False, env: Mapping[str, str] | None = None
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        """Run `rbee` with these arguments, its streams as pipes; killed when the block is left early."""
        given = {**self.env, **(env or {})}
        if self.queen is not None:
            given.setdefault("RBEE_QUEEN_URL", self.url)
        async with self._process("rbee", arguments, given, has_stdin=has_stdin) as process:
            yield process

    @contextlib.asynccontextmanager
    async def _process(
        self, name: str, arguments: Sequence[str], env: Mapping[str, str], *, has_stdin: bool
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        process = await asyncio.create_subprocess_exec(
            console_script(name),
            *arguments,
            stdin=subprocess.PIPE if has_stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    def processes(self) -> list[int]:
        """Return the numbers of all processes of this home, workers and strays included."""
        return [pid for pid, _ in find_marked("RBEE_HOME", str(self.home))]

    def logs(self) -> str:
        """Return what every program printed, for a failure's report."""
        return "\n".join(running.printed() for running in self._programs)

    async def close(self) -> None:
        """Stop the hive, then the queen, as a person would; then whatever is left."""
        for running in reversed(self._programs):
            await running.process.stop(GRACE_S)
            await running.process.aclose(0)
        await stop_tree(None, marker=("RBEE_HOME", str(self.home)), grace_s=GRACE_S)
        if self._guardian is not None and self._guardian.stdin is not None:
            self._guardian.stdin.close()
            await asyncio.to_thread(self._guardian.wait)


async def _finish(process: asyncio.subprocess.Process, stdin: str | None) -> Finished:
    async with asyncio.timeout(FINISH_S):
        out, err = await process.communicate(None if stdin is None else stdin.encode())
    assert process.returncode is not None
    return Finished(process.returncode, out.decode(), err.decode())


def _start_guardian(home: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "rbee.testing.guardian", str(home)], stdin=subprocess.PIPE, start_new_session=True
    )


def console_script(name: str) -> str:
    """Return the path of an installed program of this environment.

    Raises:
        StartError: rbee is not installed here, only importable.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise StartError(
            f"{name} is not installed next to {sys.executable}.", remedy="Install rbee (pip install)."
        )
    return str(path)
