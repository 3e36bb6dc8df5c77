"""Jobs of one's own, kept in a file: submit one, work on it, read what happened. Run it with a file's name."""

import asyncio
import sys
from pathlib import Path

from rbee.jobs import JobRegistry, Operation


class Resize(Operation, tag="resize", frozen=True):
    path: str
    width: int


async def work(registry: JobRegistry) -> None:
    async for job in registry.claim(Resize, name="resizer"):
        async with job:  # held while this block runs; an error in it fails the job
            await job.say("resizer_begin", f"{job.operation.path} becomes {job.operation.width} pixels wide.")
            job.result = {"bytes": job.operation.width * 10}


async def main(file: Path) -> None:
    async with JobRegistry.open(file, operations=[Resize]) as registry, asyncio.TaskGroup() as group:
        worker = group.create_task(work(registry))
        job = await registry.wait((await registry.create(Resize(path="cat.png", width=100))).job_id)
        print(
            job.state,
            job.result,
            *(event.decode() for event in (await registry.read(job.job_id, 0)).events),
            sep="\n",
        )
        worker.cancel()


asyncio.run(main(Path(sys.argv[1])))
