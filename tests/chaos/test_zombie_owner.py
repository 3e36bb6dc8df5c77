"""A hive that was given up and comes back finds its jobs elsewhere; nothing it says of them is believed."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Literal

import pytest

from rbee.client import JobClient
from rbee.testing import LocalStack
from rbee.testing.counting import Behaviour, Count, behave
from rbee.testing.oracles import assert_all
from rbee.testing.reader import LogReader
from tests.chaos.conftest import Size
from tests.chaos.counting_stack import another_hive, counting_stack, infer, model, told
from tests.chaos.crowd import speaker

Figure = Callable[[str, object], None]
Way = Literal["as it was", "as a new process", "to a new queen"]

WAYS: list[Way] = ["as it was", "as a new process", "to a new queen"]
SETTINGS = {"hive_stale_s": 1.5, "hive_lost_s": 3, "slots": 16}
JOBS = 8
TOKENS = 400
SLOW, FAST = Behaviour(rate=15), Behaviour(rate=150)
WITHIN_S = 60.0
STOPPED_WITHIN_S = 9.0


@pytest.mark.timeout(3600)
async def test_what_a_hive_given_up_says_later_is_refused_and_what_it_does_stopped(
    tmp_path: Path, size: Size, figure: Figure
) -> None:
    """It stands still until its jobs go on elsewhere; then it goes on, is started anew, or finds another queen."""
    path = model(tmp_path)
    stopped_s: dict[Way, float] = {}
    moved_s: list[float] = []
    async with (
        counting_stack(tmp_path, **SETTINGS) as first,
        another_hive(tmp_path, first, **SETTINGS) as second,
        first.client() as client,
    ):
        homes = {(home.home / "hive.id").read_text("ascii").strip(): home for home in (first, second)}
        numbers = itertools.count(1)
        for way in WAYS * size.of(1, 7):
            await _until_live(client, 2)
            counts = [Count(first=10_000 * next(numbers)) for _ in range(JOBS)]
            async with asyncio.TaskGroup() as group:
                readers = await _answered(client, group, path, counts)
                worker_id = speaker(readers[0])
                hive_id = (await client.job(readers[0].job_id)).hive_id
                moved = [reader for reader in readers if speaker(reader) == worker_id]
                for reader in readers:
                    if reader not in moved:
                        await client.cancel(reader.job_id)
                since_ns = time.time_ns()
                await _given_up(homes[str(hive_id)], moved)
                moved_s.append((time.time_ns() - since_ns) / 1e9)
                await _come_back(homes[str(hive_id)], first, way)
                took_s = await _stopped(client, worker_id, since_ns, len(moved))
                stopped_s[way] = max(took_s, stopped_s.get(way, 0.0))
            ended = [
                await told(client, reader.job_id, count, max_tokens=TOKENS)
                for reader, count in zip(readers, counts, strict=True)
            ]
            assert_all(ended, readers)
            on_it = [one.view for one, reader in zip(ended, readers, strict=True) if reader in moved]
            assert {(view.state, view.attempt) for view in on_it} == {("completed", 2)}
    figure(f"answers go on elsewhere, max, lost after {SETTINGS['hive_lost_s']} s", f"{max(moved_s):.2f} s")
    for way, took_s in stopped_s.items():
        figure(f"answers stopped of a hive that comes back {way}, max", f"{took_s:.2f} s")


async def _answered(
    client: JobClient, group: asyncio.TaskGroup, path: Path, counts: Sequence[Count]
) -> list[LogReader]:
    """Ask for all, slowly, and wait until each is being answered; what is asked for later is answered fast."""
    behave(path, SLOW)
    asked = [await client.submit(infer(path, count, max_tokens=TOKENS)) for count in counts]
    readers = [LogReader(job.job_id) for job in asked]
    for reader in readers:
        group.create_task(reader.follow(client.base_url))
    await LocalStack.until(lambda: all(reader.last_token for reader in readers))
    behave(path, FAST)
    return readers


async def _until_live(client: JobClient, count: int) -> None:
    async with asyncio.timeout(WITHIN_S):
        while [str(hive.state) for hive in await client.hives()].count("live") < count:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def _given_up(home: LocalStack, readers: Sequence[LogReader]) -> None:
    """Have a hive stand still until each of its answers goes on elsewhere."""
    assert home.hive is not None
    home.hive.signal(signal.SIGSTOP)
    await home.until(lambda: all(_is_continued(reader) for reader in readers))


def _is_continued(reader: LogReader) -> bool:
    return any(b'"action":"queen_continue"' in event for event in reader.events.values())


async def _come_back(home: LocalStack, queen: LocalStack, way: Way) -> None:
    assert home.hive is not None and queen.queen is not None
    if way == "to a new queen":
        await queen.queen.kill()
        await queen.restart_queen()
    if way == "as a new process":
        await home.hive.kill()
        await home.start_hive(queen.url)
    else:
        home.hive.signal(signal.SIGCONT)


async def _stopped(client: JobClient, worker_id: str, since_ns: int, answers: int) -> float:
    """Wait until a worker that was given up has ended its answers, which was not believed either.

    Returns how long it took. Left alone, it would count on for a good while.
    """
    started_s, closed, tokens = time.monotonic(), 0, 0
    events = client.follow_log(f"/v1/workers/{worker_id}/stream")
    async with asyncio.timeout(STOPPED_WITHIN_S), aclosing(events):
        async for event in events:
            if event.get("action") == "queen_refuse_line" and event["ts"] > since_ns:
                closed += event["fields"]["action"] == "worker_inference"
                tokens += event["fields"]["kind"] == "token"
            if closed == answers:
                break
    assert tokens > 0
    return time.monotonic() - started_s
