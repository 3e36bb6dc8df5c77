"""Faults, one at a time, each while a job is being answered to a reader; and how long it took to be noticed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Literal

from rbee.client import JobClient
from rbee.errors import RbeeError
from rbee.testing import LocalStack
from rbee.testing.reader import LogReader
from tests.chaos.counting_stack import pid_of_worker
from tests.chaos.crowd import POLL_S, Crowd, speaker

Fault = Literal["kill queen", "kill hive", "kill worker", "stop queen", "stop hive", "stop worker"]
NOTICED_WITHIN_S = 60.0


class Faults:
    """Does to a stack what a schedule says, and counts.

    Attributes:
        done: How many of each kind hit a job that was being answered to a reader.
        times_s: How long it took, by what.
    """

    def __init__(
        self, stack: LocalStack, crowd: Crowd, choose: random.Random, stop_s: tuple[float, float]
    ) -> None:
        self._stack = stack
        self._crowd = crowd
        self._choose = choose
        self._stop_s = stop_s
        self.done: Counter[str] = Counter()
        self.times_s: defaultdict[str, list[float]] = defaultdict(list)

    async def all(self, schedule: Sequence[Fault]) -> None:
        """Do one after the other; each has to be recovered from before the next."""
        for fault in schedule:
            victim, pid = await self._victim()
            listened = self._crowd.listened()
            before = [reader.last_seq for reader in listened]
            started_s = time.monotonic()
            await self._do(fault, victim, pid)
            self.done[fault] += 1
            await self._crowd.until_moved(listened, before)
            self.times_s[f"{fault}: all readers go on"].append(time.monotonic() - started_s)

    async def _victim(self) -> tuple[LogReader, int]:
        """Wait for a reader whose answer a live worker is giving; returns that worker's number too."""
        async with asyncio.timeout(NOTICED_WITHIN_S):
            while True:
                victim = await self._crowd.until_listened()
                pid = pid_of_worker(speaker(victim))
                if pid is not None:
                    return victim, pid
                await asyncio.sleep(POLL_S)

    async def _do(self, fault: Fault, victim: LogReader, pid: int) -> None:
        what, _, whom = fault.partition(" ")
        if whom == "worker":
            await (self._kill_worker(pid, victim) if what == "kill" else self._stop(pid))
        elif whom == "queen":
            assert self._stack.queen is not None
            await (self._kill_queen() if what == "kill" else self._stop(self._stack.queen.pid))
        else:
            assert self._stack.hive is not None
            await (self._kill_hive() if what == "kill" else self._stop_hive(self._stack.hive.pid))

    async def _kill_queen(self) -> None:
        assert self._stack.queen is not None
        await self._stack.queen.kill()
        started_s = time.monotonic()
        await self._stack.restart_queen()
        self.times_s["queen started again"].append(time.monotonic() - started_s)

    async def _kill_hive(self) -> None:
        assert self._stack.hive is not None
        await self._stack.hive.kill()
        started_s = time.monotonic()
        hive = await self._stack.start_hive()
        await self._until(lambda: '"hive_adopt"' in hive.printed())
        self.times_s["hive started again and adopted"].append(time.monotonic() - started_s)

    async def _kill_worker(self, pid: int, victim: LogReader) -> None:
        seen, started_s = victim.last_seq, time.monotonic()
        os.kill(pid, signal.SIGKILL)
        await self._until(lambda: victim.is_ended or _is_exit_told(victim, seen))
        self.times_s["worker's exit told"].append(time.monotonic() - started_s)

    async def _stop(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(self._choose.uniform(*self._stop_s))
        os.kill(pid, signal.SIGCONT)

    async def _stop_hive(self, pid: int) -> None:
        """Stop the hive, and see when the queen takes note, if she has to."""
        stop_s = self._choose.uniform(*self._stop_s)
        started_s = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        async with JobClient(self._stack.url) as client:
            while (left_s := started_s + stop_s - time.monotonic()) > 0:
                if "hive stale" not in self.times_s or len(self.times_s["hive stale"]) <= self.done["stop hive"]:
                    state = await _state_of_hive(client)
                    if state == "stale":
                        self.times_s["hive stale"].append(time.monotonic() - started_s)
                await asyncio.sleep(min(POLL_S, left_s))
        os.kill(pid, signal.SIGCONT)

    @staticmethod
    async def _until(holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(NOTICED_WITHIN_S):
            while not holds():  # noqa: ASYNC110  # nobody announces it to a test
                await asyncio.sleep(POLL_S)


async def _state_of_hive(client: JobClient) -> str:
    try:
        hives = await client.hives()
    except RbeeError:
        return "unknown"
    return str(hives[0].state) if hives else "unknown"  # a new queen has not heard of it yet


def _is_exit_told(reader: LogReader, after: int) -> bool:
    return any(b'"action":"worker_exit"' in reader.events[seq] for seq in range(after + 1, reader.last_seq + 1))
