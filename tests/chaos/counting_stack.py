"""Stacks whose workers count, and what is asked of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rbee.client import JobClient
from rbee.processes import find_marked
from rbee.testing import LocalStack
from rbee.testing.counting import Count, answer_of, write_model, write_programs
from rbee.testing.oracles import Told
from rbee.testing.reader import LogReader

WAIT_S = 60.0


@asynccontextmanager
async def counting_stack(directory: Path, **settings: object) -> AsyncIterator[LocalStack]:
    """Run a queen and a hive whose workers count; `settings` are settings of every program."""
    async with LocalStack(programs=programs(directory), env=environment(settings)) as stack:
        yield stack


@asynccontextmanager
async def another_hive(directory: Path, queen: LocalStack, **settings: object) -> AsyncIterator[LocalStack]:
    """Run one more hive, in a home of its own, for the queen of another."""
    home = LocalStack(with_queen=False, programs=programs(directory), env=environment(settings))
    async with home:
        await home.start_hive(queen.url)
        yield home


def programs(directory: Path) -> Path:
    """Write the programs, once for all hives of a test; returns where they are."""
    write_programs(directory / "bin")
    return directory / "bin"


def environment(settings: Mapping[str, object]) -> dict[str, str]:
    """Return settings as the environment names them."""
    return {f"RBEE_{name.upper()}": str(value) for name, value in settings.items()}


def model(directory: Path, name: str = "counting") -> Path:
    """Write a model file."""
    return Path(write_model(directory / f"{name}.gguf"))


def infer(path: Path, count: Count, **fields: Any) -> dict[str, Any]:
    """Make the operation that asks for a count."""
    return {"operation": "infer", "model": str(path), "prompt": str(count), **fields}


async def log_of(client: JobClient, job_id: str) -> list[bytes]:
    """Read a job's whole log again, from its first event."""
    reader = LogReader(job_id)
    async with asyncio.timeout(WAIT_S):
        await reader.follow(client.base_url)
    return [reader.events[seq] for seq in sorted(reader.events)]


async def told(client: JobClient, job_id: str, count: Count, max_tokens: int | None = None) -> Told:
    """Gather what the oracles look at."""
    right = answer_of(count, max_tokens=max_tokens)
    log = await log_of(client, job_id)
    return Told(right=right, canary=count.canary, view=await client.job(job_id), log=log)


async def worker_log(client: JobClient, worker_id: str) -> list[dict[str, Any]]:
    """Read a worker's log to the event that tells its end."""
    events: list[dict[str, Any]] = []
    async with asyncio.timeout(WAIT_S):
        async for event in client.follow_log(f"/v1/workers/{worker_id}/stream"):
            events.append(event)
            if event.get("action") == "worker_exit":
                break
    return events


def pid_of_worker(worker_id: str) -> int | None:
    """Return the number of a worker's own process, the oldest one of its tree; None when there is none."""
    found = [
        pid
        for pid, _ in sorted(find_marked("RBEE_WORKER_ID", worker_id), key=lambda one: one[1])
        if b"llama-worker-rbee" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return found[0] if found else None


def is_stopped(pid: int) -> bool:
    """Tell whether a process stands still."""
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1] == b"T"


def home_texts(home: Path) -> list[str]:
    """Return everything the programs of a home printed into its own logs."""
    return [path.read_text("utf-8", "replace") for path in (home / "test-logs").rglob("std*") if path.is_file()]
