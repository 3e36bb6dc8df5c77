"""Our side of the no-op job: the library in one process, and a queen over HTTP.

A job is finished when its end is on disk. Both run on uvloop, as rbee's programs do.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from benchmarks.jobs_peers import SMALL_ALONE, SMALL_SHARE, Measured
from rbee.client import JobClient
from rbee.contracts.operations import QueenCheck
from rbee.jobs import JobRegistry, Operation
from rbee.testing import LocalStack

IN_FLIGHT = 64
WARM = 256
ALONE = 200
LIBRARY_JOBS = 25_600
HTTP_JOBS = 6_400

RunJob = Callable[[], Awaitable[None]]


async def _measured(run_job: RunJob, jobs: int, alone: int) -> Measured:
    await _burst(run_job, WARM)
    began = time.perf_counter()
    await _burst(run_job, jobs)
    per_s = jobs / (time.perf_counter() - began)
    alone_ms = []
    for _ in range(alone):
        began = time.perf_counter()
        await run_job()
        alone_ms.append((time.perf_counter() - began) * 1e3)
    return Measured(per_s, alone_ms)


async def _burst(run_job: RunJob, jobs: int) -> None:
    async def lane() -> None:
        for _ in range(jobs // IN_FLIGHT):
            await run_job()

    async with asyncio.TaskGroup() as group:
        for _ in range(IN_FLIGHT):
            group.create_task(lane())


class Noop(Operation, tag="noop", frozen=True):
    """Nothing to do."""


async def _work(registry: JobRegistry) -> None:
    """Be a worker: one of as many loops as jobs are in flight."""
    async for job in registry.claim(Noop):
        async with job:
            pass


async def measure_library(is_small: bool) -> Measured:
    """Run jobs in a registry of this process; ends the program when one of them is not completed."""
    operation = Noop()
    jobs, alone = (LIBRARY_JOBS // SMALL_SHARE, SMALL_ALONE) if is_small else (LIBRARY_JOBS, ALONE)
    with tempfile.TemporaryDirectory(prefix="rbee-bench-") as name:
        async with JobRegistry.open(Path(name) / "jobs.db", operations=[Noop]) as registry:

            async def run_job() -> None:
                await registry.wait((await registry.create(operation)).job_id)

            working = [asyncio.create_task(_work(registry)) for _ in range(IN_FLIGHT)]
            measured = await _measured(run_job, jobs, alone)
            counts = await registry.store.counts()
            for task in working:
                task.cancel()
            await asyncio.gather(*working, return_exceptions=True)
    if counts["completed"] != WARM + jobs + alone:
        sys.exit(f"Not all jobs were completed: {counts}.")
    return measured


async def measure_http(is_small: bool) -> Measured:
    """Submit checks to a queen and follow each to its end; ends the program when one is not completed."""
    operation = QueenCheck(lines=0)
    jobs, alone = (HTTP_JOBS // SMALL_SHARE, SMALL_ALONE) if is_small else (HTTP_JOBS, ALONE)
    async with LocalStack(with_hive=False) as stack, stack.client() as client:

        async def run_job() -> None:
            await _follow(client, (await client.submit(operation)).job_id)

        return await _measured(run_job, jobs, alone)


async def _follow(client: JobClient, job_id: str) -> None:
    async for event in client.follow(job_id):
        last = event
    if last["state"] != "completed":
        sys.exit(f"The job {job_id} ended {last['state']}: {last['message']}")
