"""A crowd: many jobs at once, each with readers of every kind, for as long as it is wanted."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from rbee.client import JobClient
from rbee.testing.counting import Count
from rbee.testing.oracles import Told
from rbee.testing.reader import LogReader
from tests.chaos.counting_stack import infer, told

POLL_S = 0.02
MOVES_WITHIN_S = 90.0
JOB_WITHIN_S = 300.0


class Crowd:
    """Asks for counts, `width` at a time, until `jobs` were asked for and `leave` was called.

    Attributes:
        ended: The jobs that have ended, with what they were asked.
        readers: Everybody who has read.
        active: The readers, from the first event on, of the jobs that run, by job.
    """

    def __init__(
        self, url: str, models: Sequence[Path], choose: random.Random, *, jobs: int, width: int, tokens: range
    ) -> None:
        self._url = url
        self._models = models
        self._choose = choose
        self._jobs = jobs
        self._width = width
        self._tokens = tokens
        self._asked = 0
        self._is_leaving = False
        self.ended: dict[str, tuple[Count, int]] = {}
        self.readers: list[LogReader] = []
        self.active: dict[str, LogReader] = {}

    async def run(self) -> None:
        """Ask until everybody has left."""
        async with JobClient(self._url, give_up_s=MOVES_WITHIN_S) as client, asyncio.TaskGroup() as group:
            for _ in range(self._width):
                group.create_task(self._ask_on(client))

    def leave(self) -> None:
        """Ask for nothing more once all jobs were asked for."""
        self._is_leaving = True

    async def told(self) -> list[Told]:
        """Gather what is told of all that have ended, in peace."""
        async with JobClient(self._url) as client:
            return [await told(client, job_id, count, size) for job_id, (count, size) in self.ended.items()]

    async def _ask_on(self, client: JobClient) -> None:
        while not self._is_leaving or self._asked < self._jobs:
            self._asked += 1
            async with asyncio.timeout(JOB_WITHIN_S):
                await self._ask(client, self._asked)

    async def _ask(self, client: JobClient, number: int) -> None:
        size = self._choose.choice(self._tokens)
        count = Count(first=number * 10_000, canary=f"canary-{self._choose.getrandbits(64):016x}")
        asked = infer(self._choose.choice(self._models), count, max_tokens=size, attempts=100)
        job_id = (await client.submit(asked)).job_id
        first = self.active[job_id] = LogReader(job_id)
        late = LogReader(job_id, after=self._choose.choice([0, 3, 10]))
        torn = LogReader(job_id)
        self.readers += [first, late, torn]
        async with asyncio.TaskGroup() as group:
            group.create_task(first.follow(self._url))
            group.create_task(self._read_late(first, late))
            group.create_task(self._read_torn(torn))
        del self.active[job_id]
        self.ended[job_id] = count, size

    async def _read_late(self, first: LogReader, late: LogReader) -> None:
        """Come when another reader has seen some of it, and read from a place on."""
        comes_at = self._choose.randrange(late.after + 1, 40)
        while first.last_seq < comes_at and not first.is_ended:  # noqa: ASYNC110  # readers tell nobody
            await asyncio.sleep(POLL_S)
        await late.follow(self._url)

    async def _read_torn(self, reader: LogReader) -> None:
        """Break off again and again."""
        while not reader.is_ended:
            try:
                async with asyncio.timeout(self._choose.uniform(0.1, 3.0)):
                    await reader.follow(self._url)
            except TimeoutError:
                pass

    # Whom a fault hits

    def listened(self) -> list[LogReader]:
        """Return the readers of the jobs that are being answered just now, with a reader who hears it."""
        return [reader for reader in self.active.values() if reader.is_connected and reader.last_token]

    async def until_listened(self) -> LogReader:
        """Wait until some job is being answered to a reader; returns one of them."""
        async with asyncio.timeout(MOVES_WITHIN_S):
            while not (found := self.listened()):  # noqa: ASYNC110  # readers tell nobody
                await asyncio.sleep(POLL_S)
        return self._choose.choice(found)

    async def until_moved(self, readers: Sequence[LogReader], than: Sequence[int]) -> None:
        """Wait until each of these readers has come further than it was."""
        async with asyncio.timeout(MOVES_WITHIN_S):
            for reader, seq in zip(readers, than, strict=True):
                while reader.last_seq <= seq and not reader.is_ended:  # noqa: ASYNC110  # as above
                    await asyncio.sleep(POLL_S)


def speaker(reader: LogReader) -> str:
    """Return the worker that said the last token."""
    event: dict[str, Any] = msgspec.json.decode(reader.last_token)
    return str(event["worker_id"])
