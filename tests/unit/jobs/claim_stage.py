"""Worker loops for tests.

As a program, `python -m tests.unit.jobs.claim_stage FILE [hold]`, one in a process of its own, which says what it
was given: `JOB ATTEMPT`. `hold` has it hold its first job for ever.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from rbee.contracts.operations import Operation
from rbee.jobs import ClaimedJob, JobRegistry, claim
from rbee.jobs.sqlite_store import SqliteStore

BEGAN_S = 1_000_000_000.0
LEASE_S = 0.3
"""Of loops whose lease is to run out in a test: in real time, as it does between processes."""


class Paint(Operation, tag="paint", frozen=True):
    """Something to do."""

    colour: str = "red"


class Sweep(Operation, tag="sweep", frozen=True):
    """Something else to do."""


OPERATIONS: list[type[Operation]] = [Paint, Sweep]


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now_s = BEGAN_S

    def __call__(self) -> float:
        return self.now_s


def opened(path: Path | None, clock: Clock | None = None, **more: Any) -> JobRegistry:
    """Open a registry whose jobs are `Paint` and `Sweep`."""
    if clock is None:
        return JobRegistry.open(path, operations=OPERATIONS, **more)
    return JobRegistry(SqliteStore(path), operations=OPERATIONS, clock=clock, **more)


async def work(
    registry: JobRegistry, do: Callable[[ClaimedJob], Awaitable[Any]], *, count: int | None = None, **more: Any
) -> None:
    """Do so many jobs (None: all that come), one after the other."""
    async for job in registry.claim(Paint, name="painter", **more):
        async with job:
            job.result = await do(job)
        count = count and count - 1
        if count == 0:
            break


async def _main(path: Path, *words: str) -> None:
    async def do(job: ClaimedJob) -> dict[str, Any]:
        print(job.job_id, job.record.attempt, flush=True)
        if "hold" in words:
            await asyncio.Event().wait()
        return {"by": "process"}

    async with opened(path) as registry:
        await work(registry, do, lease_s=LEASE_S if "hold" in words else claim.LEASE_S)


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), *sys.argv[2:]))
