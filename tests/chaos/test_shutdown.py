"""A queen that is told to stop under load: quick, polite to every reader, and nothing is lost."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path

import aiohttp
import msgspec
import pytest

from rbee.client.sse import SseParser
from rbee.testing import LocalStack
from tests.chaos.conftest import Size
from tests.chaos.proxied import Event
from tests.e2e.reading import actions, assert_whole, infer

Figure = Callable[[str, object], None]
SECONDS = 110
EXIT_S = 10.0
STREAMS = 200


class Browser:
    """Reads a log as a browser's EventSource does: it obeys `retry:`, and sends the last number it saw.

    Attributes:
        events: What it saw.
        byes: How often the server said goodbye.
        retries_ms: What it was told to wait, by each connection.
        connected_at: When each connection that was answered was asked for.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.events: list[Event] = []
        self.byes = 0
        self.retries_ms: list[int] = []
        self.connected_at: list[float] = []
        self._session = session
        self._url = url

    async def read(self) -> None:
        """Read to the end of the log, across everything."""
        while not self.events or self.events[-1]["kind"] != "end":
            try:
                await self._connection()
            except aiohttp.ClientError:
                pass
            wait_ms = self.retries_ms[-1] if self.retries_ms else 100
            await asyncio.sleep(wait_ms / 1000)

    async def _connection(self) -> None:
        headers = {"Last-Event-ID": str(len(self.events))} if self.events else {}
        asked_at = asyncio.get_running_loop().time()
        async with self._session.get(self._url, headers=headers) as response:
            assert response.status == 200
            self.connected_at.append(asked_at)
            parser = SseParser()
            async for chunk in response.content.iter_any():
                for event in parser.feed(chunk):
                    if event.event == "bye":
                        self.byes += 1
                    else:
                        self.events.append(msgspec.json.decode(event.data))
            assert parser.retry_ms is not None
            self.retries_ms.append(parser.retry_ms)


@pytest.mark.timeout(300)
async def test_queen_stops_politely_under_load_and_everything_goes_on(
    rbee_models: Path, size: Size, figure: Figure
) -> None:
    """200 open streams, many answers in the middle: goodbye to each, out in time, and the next boot has it all."""
    loop = asyncio.get_running_loop()
    running = size.of(5, 20)
    env = {"RBEE_SLOTS": str(running), "RBEE_CONTEXT_TOKENS": "1024"}
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        LocalStack(models=rbee_models, env=env) as stack,
        aiohttp.ClientSession(connector=connector) as session,
        asyncio.timeout(size.of(SECONDS, 280)),
    ):
        assert stack.queen is not None
        async with stack.client() as client:
            await stack.run_job(infer())
            asked = infer(max_tokens=900, ignore_eos=True)
            jobs = [(await client.submit(asked)).job_id for _ in range(running)]
            browsers = [
                Browser(session, f"{stack.url}/v1/jobs/{jobs[number % running]}/stream")
                for number in range(STREAMS)
            ]
            async with asyncio.TaskGroup() as group:
                for browser in browsers:
                    group.create_task(browser.read())
                await stack.until(lambda: all(has_token(browser) for browser in browsers))
                port = int(stack.url.rpartition(":")[2])
                told_at = loop.time()
                stack.queen.signal(signal.SIGTERM)
                status = await stack.queen.wait()
                exit_s = loop.time() - told_at
                await stack.start_queen(port)
                await stack.until_hive_is_live()
                await stack.until(lambda: all(len(browser.connected_at) == 2 for browser in browsers))
                for job_id in jobs:
                    await client.cancel(job_id)
            ends = [await client.job(job_id) for job_id in jobs]
            stored = {job_id: await stack.log(job_id) for job_id in jobs}
    assert status.exit_code == 0
    assert exit_s <= 3 * EXIT_S
    assert {browser.byes for browser in browsers} == {1}
    assert {job.state for job in ends} == {"cancelled"}
    for number, browser in enumerate(browsers):
        assert_whole(browser.events)
        assert browser.events == stored[jobs[number % running]]
        assert "queen_resume" in actions(browser.events)
    waits_ms = [browser.retries_ms[0] for browser in browsers]
    assert min(waits_ms) >= 1000
    assert max(waits_ms) - min(waits_ms) >= 500
    assert len(set(waits_ms)) >= STREAMS / 4
    figure("seconds from SIGTERM to exit", round(exit_s, 2))
    figure("goodbyes", sum(browser.byes for browser in browsers))
    figure("reconnects spread over, ms", max(waits_ms) - min(waits_ms))
    figure("events of all streams", sum(len(browser.events) for browser in browsers))


def has_token(browser: Browser) -> bool:
    """Tell whether its answer has begun."""
    return any(event["kind"] == "token" for event in browser.events)
