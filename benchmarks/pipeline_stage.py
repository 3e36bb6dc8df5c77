"""The stage of the pipeline's benchmarks: a real queen, the measuring hive, emitters and readers as processes."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from benchmarks.pipeline_emitter import closing_line, tokens_of
from rbee.client import JobClient
from rbee.contracts.views import JobView
from rbee.testing import LocalStack

PATIENCE_S = 120.0
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def memory_bytes(pid: int, kind: str = "Pss") -> int:
    """Return a process's share of the memory."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    return 0


class Program:
    """One process of the stage, spoken to by lines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    @classmethod
    async def start(cls, module: str, *arguments: str, says: int = subprocess.DEVNULL) -> Program:
        """Start a module of the benchmarks; `says` is what becomes of its stderr."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", f"benchmarks.{module}", *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if says == subprocess.DEVNULL else subprocess.DEVNULL,
            stderr=None if says == subprocess.DEVNULL else says,
            cwd=Path(__file__).parent.parent,
            limit=2**24,
        )
        return cls(process)

    def tell(self, data: bytes, *, is_all: bool = False) -> None:
        """Write to its stdin."""
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        if is_all:
            self._process.stdin.close()

    async def line(self) -> bytes:
        """Return the next line it says."""
        stream = self._process.stdout or self._process.stderr
        assert stream is not None
        async with asyncio.timeout(PATIENCE_S):
            line = await stream.readline()
        if not line:
            raise SystemExit("A part of the benchmark ended early.")
        return line

    async def rest(self) -> bytes:
        """Return all that it says until its end."""
        assert self._process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            return await self._process.stdout.read()

    async def stop(self) -> None:
        """End it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(10):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


class Stage:
    """A queen (her real program, her real file) and a hive whose workers are files.

    Args:
        workers: How many files.
        slots: How many jobs each worker has at once.
    """

    def __init__(self, *, workers: int, slots: int) -> None:
        self._workers, self._slots = workers, slots
        self._stack = LocalStack(with_hive=False)
        self._directory = Path(tempfile.mkdtemp(prefix="rbee-bench-"))
        self.files: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        """Start both."""
        await self._stack.__aenter__()
        counts = ["--workers", str(self._workers), "--slots", str(self._slots)]
        self.hive = await Program.start(
            "pipeline_hive", self._stack.url, str(self._directory), *counts, says=subprocess.PIPE
        )
        self.files = msgspec.json.decode(await self.hive.line())["workers"]
        self.client = await self._stack.client().__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop everything."""
        await self.client.__aexit__(None, None, None)
        await self.hive.stop()
        await self._stack.__aexit__(kind, error, trace)
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def url(self) -> str:
        """The queen's address."""
        return self._stack.url

    @property
    def queen_pid(self) -> int:
        """The queen's process."""
        assert self._stack.queen is not None
        return self._stack.queen.pid

    @property
    def database(self) -> Path:
        """The queen's file."""
        return self._stack.home / "queen.db"

    def carry(self) -> None:
        """Let the hive bring what stands in the files."""
        self.hive.tell(b"go\n")

    async def place(self, jobs: int) -> dict[str, dict[str, str]]:
        """Have so many answers asked of the workers; returns the jobs of each, with their correlation ids."""
        placed: dict[str, dict[str, str]] = {worker_id: {} for worker_id in self.files}
        accepted = [await self.client.submit({"operation": "infer", "prompt": "x"}) for _ in range(jobs)]
        for one in accepted:
            view = await self._running(self.client, one.job_id)
            placed[view[0]][one.job_id] = view[1]
        return placed

    async def _running(self, client: JobClient, job_id: str) -> tuple[str, str]:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                view = await client.job(job_id)
                if view.state == "running" and view.worker_id is not None:
                    return view.worker_id, view.correlation_id
                if view.ended_at is not None:
                    raise SystemExit(f"The job {job_id} ended: {view.message}")
                await asyncio.sleep(0.01)

    async def emit(self, placed: dict[str, dict[str, str]], count: int, rate: float | None) -> list[Program]:
        """Start an emitter for each file; `rate` is that of all lines together."""
        emitters = []
        speaking = {worker_id: jobs for worker_id, jobs in placed.items() if jobs}
        for worker_id, jobs in speaking.items():
            wanted: dict[str, Any] = {
                "path": self.files[worker_id],
                "worker_id": worker_id,
                "jobs": jobs,
                "count": count,
                "rate": rate / len(speaking) if rate else None,
            }
            emitter = await Program.start("pipeline_emitter")
            emitter.tell(msgspec.json.encode(wanted), is_all=True)
            emitters.append(emitter)
        return emitters

    async def close_answers(self, placed: dict[str, dict[str, str]], count: int) -> list[str]:
        """Write the closing lines; returns what is wrong with the ends: the queen counts the pieces herself."""
        for worker_id, jobs in placed.items():
            lines = [
                closing_line(job_id, correlation_id, worker_id, tokens_of(count))
                for job_id, correlation_id in jobs.items()
            ]
            await asyncio.to_thread(_append, Path(self.files[worker_id]), b"".join(lines))
        wrong = []
        for job_id in [job_id for jobs in placed.values() for job_id in jobs]:
            view = await self._ended(job_id)
            if view.state != "completed":
                wrong.append(f"{job_id} ended {view.state}: {view.message}")
        return wrong

    async def _ended(self, job_id: str) -> JobView:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                view = await self.client.job(job_id)
                if view.ended_at is not None:
                    return view
                await asyncio.sleep(0.05)


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def free_port() -> int:
    """Return a port that is free just now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


async def reachable(port: int) -> None:
    """Wait until somebody listens on a port."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return
