"""A stack whose hive and readers reach the queen through fault proxies."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from rbee.client import JobClient
from rbee.testing import LocalStack
from rbee.testing.fault_proxy import FaultProxy

Event = dict[str, Any]


class Proxied:
    """A real queen and hive, with a proxy on each way to the queen.

    Attributes:
        hive_way: Between hive and queen.
        client_way: Between readers and queen.
    """

    def __init__(self, stack: LocalStack, hive_way: FaultProxy, client_way: FaultProxy) -> None:
        self.stack = stack
        self.hive_way = hive_way
        self.client_way = client_way

    def client(self, **options: Any) -> JobClient:
        """Return a client behind the proxy."""
        return JobClient(self.client_way.url, **options)

    async def read(self, job_id: str, **options: Any) -> list[Event]:
        """Follow a job to its end through the proxy."""
        async with self.client(**options) as client:
            return [event async for event in client.follow(job_id)]

    async def stored(self, job_id: str) -> list[Event]:
        """Return a job's log by pages, past all proxies."""
        return await stored_log(self.stack.url, f"/v1/jobs/{job_id}")


async def stored_log(url: str, path: str, after: int = 0) -> list[Event]:
    """Read a log by pages."""
    events: list[Event] = []
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"{url}{path}/events", params={"after": after}) as response:
                response.raise_for_status()
                page = await response.json()
            events += page["data"]
            if page["next"] is None:
                return events
            after = int(page["next"])


@asynccontextmanager
async def proxied_stack(seed: int, **options: Any) -> AsyncIterator[Proxied]:
    """Start a queen, and a hive that knows her only through the proxy."""
    async with (
        LocalStack(with_hive=False, **options) as stack,
        FaultProxy(stack.url, seed=seed) as hive_way,
        FaultProxy(stack.url, seed=seed + 1) as client_way,
    ):
        await stack.start_hive(hive_way.url)
        await stack.until_hive_is_live()
        try:
            yield Proxied(stack, hive_way, client_way)
        except BaseException as error:
            error.add_note(stack.logs())
            raise
        finally:
            for way in (hive_way, client_way):
                way.resume()


def said_by_hive(events: Sequence[Event]) -> list[int]:
    """Return the numbers of the sentences that a `hive_check` said, in the order of the log."""
    return [event["fields"]["number"] for event in events if event.get("action") == "hive_check"]


def assert_all_is_accounted_for(events: Sequence[Event], lines: int) -> None:
    """Check that each sentence of a `hive_check` is in the log, once and in order, or the log tells of a gap."""
    said = said_by_hive(events)
    assert said == sorted(set(said))
    assert (len(said) < lines) == any(event["kind"] == "gap" for event in events)
