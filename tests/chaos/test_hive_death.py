"""A hive that is killed finds its workers again; one that is gone for good is not outlived by them for long."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rbee.client import JobClient
from rbee.testing import LocalStack
from rbee.testing.counting import Behaviour, Count, behave, loads_of
from rbee.testing.oracles import assert_all
from rbee.testing.reader import LogReader
from tests.chaos.conftest import Size
from tests.chaos.counting_stack import counting_stack, infer, model, pid_of_worker, told
from tests.chaos.crowd import Crowd, speaker
from tests.chaos.faults import Faults

Figure = Callable[[str, object], None]
LEASE_S = 2.0
LEASE_AND_MORE_S = LEASE_S + 2
HIVE_TIMEOUT_S = 9.0


@pytest.mark.timeout(3600)
async def test_workers_of_a_killed_hive_are_adopted_and_none_is_started_again(
    tmp_path: Path, size: Size, seed: int, figure: Figure
) -> None:
    """Killed under answers, and once while a worker is loading: every answer is right, every model loaded once."""
    choose, kills = random.Random(seed), size.of(3, 200)
    models = [model(tmp_path, name) for name in ("one", "two")]
    slow = model(tmp_path, "slow")
    behave(slow, Behaviour(load_s=3.0))
    async with counting_stack(tmp_path, slots=8) as stack, stack.client() as client:
        crowd = Crowd(stack.url, models, choose, jobs=16, width=8, tokens=range(60, 120))
        faults = Faults(stack, crowd, choose, (1.0, 1.0))
        async with asyncio.TaskGroup() as group:
            crowding = group.create_task(crowd.run())
            await crowd.until_listened()
            loading = group.create_task(_ask(client, slow, Count(first=7, last=20)))
            await stack.until(lambda: loads_of(slow) == 1)
            await faults.all(["kill hive"] * kills)
            crowd.leave()
            await asyncio.gather(crowding, loading)
        answered = await crowd.told()
        assert_all(answered, crowd.readers)
        assert {(one.view.state, one.view.attempt) for one in answered} == {("completed", 1)}
        assert [loads_of(path) for path in (*models, slow)] == [1, 1, 1]
        times_s = sorted(faults.times_s["hive started again and adopted"])
        figure("hives killed under answers", faults.done["kill hive"])
        figure("jobs answered rightly", len(answered))
        figure(
            "hive started again and adopted, p50 / max", f"{times_s[len(times_s) // 2]:.2f} / {times_s[-1]:.2f} s"
        )


async def _ask(client: JobClient, path: Path, count: Count) -> None:
    job_id = (await client.submit(infer(path, count))).job_id
    one = await told(client, job_id, count)
    assert_all([one], [])
    assert one.view.state == "completed"


async def test_workers_of_a_hive_that_is_gone_for_good_end_with_their_lease(
    tmp_path: Path, figure: Figure
) -> None:
    """One that answers, one that loads, one that will not hear SIGTERM: gone; the job ends, and says why."""
    busy, loading, deaf = (model(tmp_path, name) for name in ("busy", "loading", "deaf"))
    behave(loading, Behaviour(load_s=600))
    behave(deaf, Behaviour(ignores_term=True))
    async with counting_stack(
        tmp_path, worker_lease_s=LEASE_S, hive_lost_s=5, hive_timeout_s=HIVE_TIMEOUT_S
    ) as stack:
        assert stack.hive is not None
        async with stack.client() as client:
            await _ask(client, deaf, Count(first=1, last=3))
            answered = await client.submit(infer(busy, Count(first=1, rate=5), max_tokens=1000))
            waiting = await client.submit(infer(loading, Count()))
            reader = LogReader(answered.job_id)
            following = asyncio.ensure_future(reader.follow(stack.url))
            await stack.until(lambda: bool(reader.last_token) and loads_of(loading) == 1)
            assert pid_of_worker(speaker(reader)) is not None
            await stack.hive.kill()
            gone_s = await _until_workers_are_gone(stack)
            figure("workers gone after their hive", f"{gone_s:.2f} s with a lease of {LEASE_S:g} s")
            assert gone_s < 3 * LEASE_AND_MORE_S
            async with asyncio.timeout(3 * HIVE_TIMEOUT_S):
                await following
                ended = [
                    await told(client, job.job_id, Count(first=1), max_tokens=1000) for job in (answered, waiting)
                ]
        assert_all(ended, [reader])
        assert [(one.view.state, one.view.reason) for one in ended] == [("failed", "hive_lost")] * 2


async def _until_workers_are_gone(stack: LocalStack) -> float:
    """Wait until nothing but the queen is left of a home; returns how long that took."""
    assert stack.queen is not None
    queen_pid, started_s = stack.queen.pid, time.monotonic()
    await stack.until(lambda: stack.processes() == [queen_pid])
    return time.monotonic() - started_s
