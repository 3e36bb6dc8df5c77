"""Queen and hive on two hosts with a real, bad cable between them: the kernel's own TCP, not a proxy's."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from rbee.testing import LocalStack
from tests.chaos.conftest import Size
from tests.chaos.namespaces import LEFT, RIGHT, TwoHosts, two_hosts
from tests.chaos.proxied import Event, assert_all_is_accounted_for
from tests.e2e.reading import assert_whole, states

Figure = Callable[[str, object], None]
SECONDS = 110
KEY = "a-key-for-two-hosts"
CONFIG = f'[queen]\nhost = "{LEFT}"\n[hive]\nhost = "{RIGHT}"\n'
READER = """
import json, os, sys, threading
from concurrent.futures import ThreadPoolExecutor
from rbee.client import SyncJobClient
url, operations = sys.argv[1], json.loads(sys.argv[2])
with SyncJobClient(url, api_key=os.environ["RBEE_API_KEY"]) as client:
    while not any(hive.state == "live" for hive in client.hives()):
        threading.Event().wait(0.05)
    def log(operation):
        return list(client.follow(client.submit(operation).job_id))
    print("begun", flush=True)
    with ThreadPoolExecutor(8) as pool:
        print(json.dumps(list(pool.map(log, operations))))
"""


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    """Give two hosts, where the machine can make them."""
    with two_hosts() as hosts:
        yield hosts


@asynccontextmanager
async def spread_stack(hosts: TwoHosts) -> AsyncIterator[LocalStack]:
    """Start a queen on the left host, a hive on the right one."""
    prefixes = {"queen-rbee": hosts.left.prefix, "rbee-hive": hosts.right.prefix}
    env = {"RBEE_API_KEY": KEY}
    async with LocalStack(with_hive=False, config=CONFIG, env=env, prefixes=prefixes) as stack:
        await stack.start_hive()
        yield stack


async def logs_across(
    hosts: TwoHosts, stack: LocalStack, operations: Sequence[Mapping[str, Any]], begun: asyncio.Event
) -> list[list[Event]]:
    """Submit jobs from the hive's host, across the cable, and read each to its end there; checks all of them."""
    process = await asyncio.create_subprocess_exec(
        *hosts.right.prefix,
        sys.executable,
        "-c",
        READER,
        stack.url,
        json.dumps(operations),
        stdout=subprocess.PIPE,
        env=stack.env,
    )
    assert process.stdout is not None
    try:
        assert await process.stdout.readline() == b"begun\n"
        begun.set()
        out = await process.stdout.read()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    logs: list[list[Event]] = json.loads(out)
    for operation, log in zip(operations, logs, strict=True):
        assert_whole(log)
        assert states(log) == ["queued", "running", "completed"]
        if operation["operation"] == "queen_check":
            said = [event["fields"]["number"] for event in log if event.get("action") == "queen_check"]
            assert said == list(range(1, operation["lines"] + 1))
        else:
            assert_all_is_accounted_for(log, operation["lines"])
    return logs


def checks(lines: int, each: int) -> list[dict[str, Any]]:
    """Make so many checks of the hive and of the queen."""
    return [{"operation": kind, "lines": lines} for kind in ("hive_check", "queen_check")] * each


async def test_cable_that_is_pulled_out_again_and_again_costs_no_job(
    hosts: TwoHosts, size: Size, seed: int, figure: Figure
) -> None:
    """No FIN and no RST; the kernel sends again what was lost, and everybody goes on."""
    dice, pulls, begun = random.Random(seed), 0, asyncio.Event()
    operations = checks(size.of(100, 2000), size.of(3, 100))
    async with spread_stack(hosts) as stack, asyncio.timeout(size.of(SECONDS, 900)):
        reading = asyncio.ensure_future(logs_across(hosts, stack, operations, begun))
        try:
            await begun.wait()
            while pulls < size.of(1, 30) and not reading.done():
                hosts.unplug()
                await asyncio.sleep(dice.uniform(1.0, size.of(2, 10)))
                hosts.plug()
                pulls += 1
                await asyncio.wait({reading}, timeout=dice.uniform(0.3, 1.5))
            logs = await reading
        finally:
            hosts.plug()
            reading.cancel()
    figure("cable pulled, times", pulls)
    figure("jobs", len(logs))


@pytest.mark.parametrize(
    "cable",
    [
        ("netem", "delay", "200ms", "100ms", "loss", "5%"),
        ("tbf", "rate", "400kbit", "burst", "4kb", "latency", "200ms"),
    ],
    ids=lambda cable: " ".join(cable),
)
async def test_bad_cable_loses_nothing(
    hosts: TwoHosts, size: Size, figure: Figure, cable: tuple[str, ...]
) -> None:
    """Packets late, lost and out of order; or a thin line that drops what does not fit."""
    lines = size.of(20, 500)
    hosts.shape(*cable)
    operations = checks(lines, size.of(1, 20))
    async with spread_stack(hosts) as stack, asyncio.timeout(size.of(SECONDS, 900)):
        logs = await logs_across(hosts, stack, operations, asyncio.Event())
    figure("events", sum(len(log) for log in logs))


def test_hosts_leave_nothing_behind() -> None:
    """Neither a process nor anything in the machine's own network."""
    before = os.listdir("/sys/class/net")
    with two_hosts() as hosts:
        pids = (hosts.left.pid, hosts.right.pid)
        hosts.left.run("ip", "route", "get", RIGHT)
        assert os.listdir("/sys/class/net") == before
    assert os.listdir("/sys/class/net") == before
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
