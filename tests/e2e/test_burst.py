"""A burst of calls on one small model: all of them end, in order, and the queen does not grow."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import psutil
import pytest

from rbee.testing import LocalStack
from tests.e2e.reading import MODEL

CALLS = 200
GROWTH_BYTES_MAX = 64 * 2**20
CONNECT_S = 60.0
END_S = 240.0


@pytest.mark.timeout(300)
async def test_burst_of_calls_ends_whole_in_order_and_in_bounded_memory(rbee_models: Path) -> None:
    """Two hundred callers at once on four slots: each is answered, none overtakes, no memory is kept of them."""
    async with LocalStack(models=rbee_models) as stack:
        assert stack.queen is not None
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=END_S, connect=CONNECT_S)
        async with aiohttp.ClientSession(stack.url, connector=connector, timeout=timeout) as session:
            await call(session, "warm up")
            queen = psutil.Process(stack.queen.pid)
            before = queen.memory_info().rss
            calls = [call(session, f"Count to {number}.") for number in range(CALLS)]
            answered = set(await asyncio.gather(*calls))
            growth = queen.memory_info().rss - before
        async with stack.client() as client:
            for running in (await client.jobs(state="running")).data:  # its last line is still on its way
                await stack.log(running.job_id)
            jobs = (await client.jobs(limit=500)).data
    burst = sorted((job for job in jobs if job.job_id in answered), key=lambda job: (job.created_at, job.job_id))
    assert len(burst) == CALLS
    assert [job.state for job in burst] == ["completed"] * CALLS
    started = [job.started_at for job in burst if job.started_at is not None]
    assert len(started) == CALLS
    assert started == sorted(started)
    assert growth < GROWTH_BYTES_MAX


async def call(session: aiohttp.ClientSession, prompt: str) -> str:
    """Ask for a few words; returns the call's job."""
    body = {"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": prompt}]}
    async with session.post("/v1/chat/completions", json=body) as answer:
        told = await answer.json()
        assert answer.status == 200, told
        assert told["choices"][0]["message"]["content"]
        return str(answer.headers["x-job-id"])
