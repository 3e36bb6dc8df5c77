"""The network between hive, queen and readers: whatever it does, no event is lost, doubled or out of order."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from rbee.client import JobClient
from rbee.client.follow import CONNECT_S, IDLE_S, only_idle
from rbee.testing import LocalStack
from rbee.testing.fault_proxy import FaultProxy, Faults
from tests.chaos.conftest import Size
from tests.chaos.proxied import (
    Event,
    Proxied,
    assert_all_is_accounted_for,
    proxied_stack,
    said_by_hive,
    stored_log,
)
from tests.e2e.reading import answer, assert_whole, infer, states

Figure = Callable[[str, object], None]
SECONDS = 110
IDLE_TEST_S = 1.0
SSE_HEAD_BYTES = 2048
HIVE_LOST_S = 15.0


@pytest.fixture
async def network(seed: int) -> AsyncIterator[Proxied]:
    """Give a queen and a hive, no model."""
    async with proxied_stack(seed) as proxied:
        yield proxied


@pytest.fixture
async def network_with_model(seed: int, rbee_models: Path) -> AsyncIterator[Proxied]:
    """Give a queen and a hive that has the demo model."""
    async with proxied_stack(seed, models=rbee_models) as proxied:
        yield proxied


async def cut_off(way: FaultProxy, dice: random.Random, times: int, longest_s: float, done: asyncio.Event) -> int:
    """Partition a way again and again until `done`; returns how often."""
    count = 0
    while count < times and not done.is_set():
        way.pause()
        await asyncio.sleep(dice.uniform(1.0, longest_s))
        way.resume()
        count += 1
        try:
            async with asyncio.timeout(dice.uniform(0.2, 1.0)):
                await done.wait()
        except TimeoutError:
            pass
    return count


@pytest.mark.timeout(1800)
async def test_partitions_shorter_than_the_grace_cost_no_job(
    network_with_model: Proxied, size: Size, seed: int, figure: Figure
) -> None:
    """Hive and queen, and queen and reader, lose each other while answers are given."""
    network, dice, done = network_with_model, random.Random(seed), asyncio.Event()
    await network.stack.run_job(infer())
    tokens, jobs = size.of(120, 1500), size.of(2, 8)

    async def one() -> tuple[list[Event], list[Event]]:
        async with network.stack.client() as client:
            job_id = (await client.submit(infer(max_tokens=tokens, ignore_eos=True, attempts=1))).job_id
        return await network.read(job_id), await network.stored(job_id)

    async def all_jobs() -> list[tuple[list[Event], list[Event]]]:
        try:
            return [
                log for _ in range(size.of(1, 4)) for log in await asyncio.gather(*(one() for _ in range(jobs)))
            ]
        finally:
            done.set()

    async with asyncio.timeout(size.of(SECONDS, 1700)):
        logs, *partitions = await asyncio.gather(
            all_jobs(),
            cut_off(network.hive_way, dice, size.of(2, 30), size.of(2, 30), done),
            cut_off(network.client_way, dice, size.of(2, 30), size.of(2, 30), done),
        )
    for seen, stored in logs:
        assert_whole(seen)
        assert seen == stored
        assert states(seen) == ["queued", "running", "completed"]
        assert seen[-1]["result"]["usage"]["completion_tokens"] == tokens
        assert answer(seen) == seen[-1]["result"]["text"]
    figure("jobs", len(logs))
    figure("partitions hive-queen, reader-queen", partitions)
    figure("events", sum(len(seen) for seen, _ in logs))


async def test_cancel_during_a_partition_ends_the_answer_once(network_with_model: Proxied, figure: Figure) -> None:
    """Ten cancels at once, the hive cut off from the queen: one end, and the slot is free for the next job."""
    network, loop = network_with_model, asyncio.get_running_loop()
    async with asyncio.timeout(SECONDS), network.stack.client() as client:
        job_id = (await client.submit(infer(max_tokens=3000, ignore_eos=True))).job_id
        seen: list[Event] = []
        async for event in client.follow(job_id):
            seen.append(event)
            if event["kind"] == "token" and event["tokens"] == 5:
                network.hive_way.pause()
                cancelled_at = loop.time()
                views = await asyncio.gather(*(client.cancel(job_id) for _ in range(10)))
                assert {view.job_id for view in views} == {job_id}
                loop.call_later(1.0, network.hive_way.resume)
        ended_s = loop.time() - cancelled_at
        assert_whole(seen)
        assert states(seen) == ["queued", "running", "cancelled"]
        assert (await client.cancel(job_id)).state == "cancelled"
        assert seen == await network.stored(job_id)
        assert (await network.stack.run_job(infer()))[-1]["state"] == "completed"
        assert [worker.slots_used for worker in await client.workers()] == [0]
    figure("seconds from cancel to end", round(ended_s, 2))


async def test_one_submit_sent_a_hundred_times_over_torn_connections_is_one_job(
    network: Proxied, seed: int, figure: Figure
) -> None:
    """The key makes it one, whichever of its requests and answers arrive."""
    dice, done = random.Random(seed), asyncio.Event()

    async def tear() -> None:
        while not done.is_set():
            await asyncio.sleep(dice.uniform(0.01, 0.05))
            network.client_way.reset()

    tearing = asyncio.ensure_future(tear())
    try:
        async with asyncio.timeout(SECONDS), network.client() as client:
            operation = {"operation": "queen_check", "lines": 1}
            submits = [client.submit(operation, idempotency_key="once") for _ in range(100)]
            ids = {accepted.job_id for accepted in await asyncio.gather(*submits)}
    finally:
        done.set()
        await tearing
    async with network.stack.client() as client:
        assert {job.job_id for job in (await client.jobs()).data} == ids
    assert len(ids) == 1
    figure("requests for one job", network.client_way.accepted)


BAD_WAYS: dict[str, dict[str, Any]] = {
    "200±100 ms": {"latency_s": 0.2, "jitter_s": 0.1},
    "slices of 1 to 16 bytes": {"slice_bytes": (1, 16)},
    "4 KB a second": {"bytes_per_s": 4096},
}


@pytest.mark.timeout(900)
async def test_bad_ways_slow_a_log_down_and_lose_nothing_of_it(
    network: Proxied, size: Size, figure: Figure
) -> None:
    """Between hive and queen, and between queen and reader, both ways."""
    lines = size.of(20, 2000)
    for name, faults in BAD_WAYS.items():
        for way in (network.hive_way, network.client_way):
            way.toward_client, way.toward_server = Faults(**faults), Faults(**faults)
            way.reset()  # the connections that are open have the faults of before
        async with asyncio.timeout(size.of(SECONDS, 600)), network.client() as client:
            job_id = (await client.submit({"operation": "hive_check", "lines": lines})).job_id
            seen = [event async for event in client.follow(job_id)]
        assert_whole(seen)
        assert seen == await network.stored(job_id)
        assert states(seen) == ["queued", "running", "completed"]
        assert_all_is_accounted_for(seen, lines)
        figure(f"sentences that came, {name}", f"{len(said_by_hive(seen))} of {lines}")


@pytest.mark.timeout(600)
async def test_reset_connections_lose_and_double_nothing(
    network: Proxied, size: Size, seed: int, figure: Figure
) -> None:
    """RST at random moments on both ways, batches and streams in flight."""
    dice, done, lines, resets = random.Random(seed), asyncio.Event(), size.of(2000, 20_000), 0

    async def tear() -> None:
        nonlocal resets
        while not done.is_set():
            await asyncio.sleep(dice.uniform(0.005, 0.1))
            dice.choice((network.hive_way, network.client_way)).reset()
            resets += 1

    tearing = asyncio.ensure_future(tear())
    try:
        async with asyncio.timeout(size.of(SECONDS, 550)), network.client() as client:
            job_id = (await client.submit({"operation": "hive_check", "lines": lines})).job_id
            seen = [event async for event in client.follow(job_id)]
    finally:
        done.set()
        await tearing
    assert_whole(seen)
    assert seen == await network.stored(job_id)
    assert_all_is_accounted_for(seen, lines)
    figure("sentences that came", len(said_by_hive(seen)))
    figure("resets", resets)
    figure("connections of the hive", network.hive_way.accepted)


async def test_black_hole_is_noticed_by_the_silence_and_the_log_goes_on(figure: Figure) -> None:
    """No FIN, no RST: the reader's idle timeout finds out, and what it connects to next goes on."""
    loop = asyncio.get_running_loop()
    async with LocalStack(with_hive=False) as stack, asyncio.timeout(SECONDS), FaultProxy(stack.url) as way:
        async with stack.client() as direct, JobClient(way.url, idle_s=IDLE_TEST_S) as client:
            job_id = (await direct.submit(infer())).job_id
            events, seen = client.follow(job_id), []
            async for event in events:
                seen.append(event)
                if event.get("action") == "queen_wait":  # from here on its log is silent
                    break
            way.lose()
            swallowed_at = loop.time()
            await direct.cancel(job_id)
            seen.append(await anext(events))
            noticed_s = loop.time() - swallowed_at
            seen += [event async for event in events]
        assert_whole(seen)
        assert seen == await stored_log(stack.url, f"/v1/jobs/{job_id}")
        assert way.accepted == 2
    assert noticed_s < 3 * (IDLE_TEST_S + 2)
    figure(f"seconds until noticed (idle_s {IDLE_TEST_S:g})", round(noticed_s, 2))


def test_black_hole_is_noticed_within_thirty_seconds_by_default() -> None:
    """The default silence is the promise, on every request, and nothing limits the whole."""
    timeout = only_idle(IDLE_S)
    assert (timeout.total, timeout.sock_read, timeout.sock_connect) == (None, 30.0, CONNECT_S)
    assert CONNECT_S <= IDLE_S
    assert JobClient("http://127.0.0.1:1")._idle_s == IDLE_S


async def test_hive_in_a_black_hole_is_live_again_before_it_is_lost(network: Proxied, figure: Figure) -> None:
    """Every connection of the hive is swallowed once, and new ones work: no reason to call it lost."""
    loop = asyncio.get_running_loop()
    worst_s = 0.0
    async with asyncio.timeout(SECONDS), network.stack.client() as client:
        await network.stack.run_job({"operation": "hive_check", "lines": 5})
        network.hive_way.lose()
        swallowed_at = loop.time()
        while True:
            (hive,) = await client.hives()
            worst_s = max(worst_s, hive.last_heartbeat_s)
            if loop.time() - swallowed_at > 2.0 and hive.last_heartbeat_s < 0.5:
                break
            await asyncio.sleep(0.05)
    assert worst_s < HIVE_LOST_S
    seen = await network.stack.run_job({"operation": "hive_check", "lines": 5})
    assert_whole(seen)
    assert states(seen) == ["queued", "running", "completed"]
    figure("longest silence of the hive, s", round(worst_s, 1))


async def test_story_of_a_command_survives_a_partition_of_the_hives_way(network: Proxied) -> None:
    """The queen reaches the hive and not the other way round: what the hive says waits, and the end with it."""
    network.hive_way.pause()
    async with asyncio.timeout(SECONDS), network.stack.client() as client:
        job_id = (await client.submit({"operation": "hive_check", "lines": 50})).job_id
        await asyncio.sleep(4.5)  # longer than the queen waits for a live hive
        network.hive_way.resume()
        seen = await network.read(job_id)
    assert_whole(seen)
    assert said_by_hive(seen) == list(range(1, 51))


@pytest.mark.timeout(600)
async def test_reply_cut_at_any_byte_is_gone_on_with(
    network: Proxied, size: Size, seed: int, figure: Figure
) -> None:
    """By an end and by a reset, in status line, head, chunk sizes, frames: the log is the same."""
    log = await network.stack.run_job({"operation": "queen_check", "lines": 20})
    dice = random.Random(seed)
    offsets = list(range(SSE_HEAD_BYTES))
    offsets = sorted(dice.sample(offsets, size.of(48, SSE_HEAD_BYTES)))
    gate = asyncio.Semaphore(64)

    async def read_cut(offset: int) -> int:
        by: Literal["fin", "rst"] = "fin" if dice.random() < 0.5 else "rst"
        async with gate, FaultProxy(network.stack.url) as proxy, JobClient(proxy.url) as client:
            proxy.next_toward_client.append(Faults(cut_after_bytes=offset, cut_by=by))
            seen = [event async for event in client.follow(log[0]["job_id"])]
            assert seen == log, f"cut by {by} after {offset} bytes"
            return proxy.accepted

    async with asyncio.timeout(size.of(SECONDS, 550)):
        connections = await asyncio.gather(*(read_cut(offset) for offset in offsets))
    assert set(connections) == {2}
    figure("offsets cut at", len(offsets))
