"""Readers that come and go by the thousand leave nothing behind in the queen."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Callable
from socket import SO_LINGER, SOL_SOCKET

import pytest

from rbee.testing import LocalStack
from tests.chaos.conftest import Size
from tests.chaos.process_facts import ProcessFacts
from tests.chaos.speaking_hive import SpeakingHive
from tests.unit.http.http_stage import http_stage
from tests.unit.jobs.job_stage import new_job

Figure = Callable[[str, object], None]
SECONDS = 110
AT_ONCE = 50
NEAR = 5
RSS_GROWN_MAX_BYTES = 4 * 2**20
_RESET = struct.pack("ii", 1, 0)


async def come_and_go(url: str, path: str, dice: random.Random) -> None:
    """Ask for a stream and leave it: before the answer, in its head or in its body, politely or by a reset."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
    wanted = dice.choice((0, 1, 100, 400))
    if wanted:
        await reader.readexactly(wanted)
    if dice.random() < 0.5:
        writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, _RESET)
        writer.transport.abort()
    else:
        writer.close()


async def visit(url: str, path: str, count: int, dice: random.Random) -> None:
    """Let so many readers come and go, some at once."""
    for begun in range(0, count, AT_ONCE):
        await asyncio.gather(*(come_and_go(url, path, dice) for _ in range(min(AT_ONCE, count - begun))))


@pytest.mark.timeout(3600)
async def test_readers_that_come_and_go_leave_no_descriptor_thread_or_memory(
    size: Size, seed: int, figure: Figure
) -> None:
    """A live log, a silent one and an ended one; the queen is as small afterwards as before."""
    dice, visits = random.Random(seed), size.of(500, 100_000)
    async with (
        asyncio.timeout(size.of(SECONDS, 3500)),
        LocalStack(with_hive=False) as stack,
        SpeakingHive(stack.url) as hive,
    ):
        assert stack.queen is not None
        await hive.say(*[b"x" * 100] * 100)
        ended = (await stack.run_job({"operation": "queen_check", "lines": 50}))[0]["job_id"]
        paths = [hive.path + "/stream", f"/v1/jobs/{ended}/stream"]
        for path in paths:  # what is made once is no leak
            await visit(stack.url, path, 200, dice)
        facts = ProcessFacts(stack.queen.pid)
        before = facts.now()
        for path in paths:
            await visit(stack.url, path, visits, dice)
            await hive.say(b"still here")
        await stack.until(lambda: facts.now().descriptors <= before.descriptors + NEAR)
        after = facts.now()
        assert (await stack.run_job({"operation": "queen_check"}))[-1]["state"] == "completed"
    assert after.threads <= before.threads + NEAR
    assert after.rss_bytes - before.rss_bytes <= RSS_GROWN_MAX_BYTES
    figure("streams", visits * len(paths))
    figure("descriptors before, after", (before.descriptors, after.descriptors))
    figure("RSS grew by, KiB", (after.rss_bytes - before.rss_bytes) // 1024)


async def test_readers_that_come_and_go_leave_no_task(size: Size, seed: int, figure: Figure) -> None:
    """The same server in this very process, where its tasks can be counted."""
    dice, visits = random.Random(seed), size.of(500, 10_000)
    async with http_stage() as stage, asyncio.timeout(SECONDS):
        record = await new_job(stage.registry)
        path = f"/v1/jobs/{record.job_id}/stream"
        before = len(asyncio.all_tasks())
        await visit(stage.url, path, visits, dice)
        await LocalStack.until(lambda: len(asyncio.all_tasks()) <= before)
        assert stage.registry.hub._readers == {}
    figure("streams", visits)
    figure("tasks before", before)
