"""A kill at every system call that writes: what was acknowledged is there, and nothing is there by half."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rbee.client import JobClient
from rbee.errors import RbeeError
from rbee.jobs import JobRegistry
from rbee.testing.stack import Running
from tests.chaos.conftest import Size
from tests.chaos.job_life import CANARY, snapshot
from tests.chaos.registry_life import Life
from tests.chaos.strace_stage import Point, counted, require_strace
from tests.chaos.traced_stack import TracedStack

WRITES = ("pwrite64", "write", "fsync", "fdatasync", "rename", "ftruncate", "fallocate", "unlink")
ERASED_AFTER = 17  # so many steps, the last of which ends the job with `store: false`


@pytest.fixture
def life(tmp_path: Path) -> Life:
    require_strace()
    return Life(tmp_path)


async def _reopened(path: Path) -> Any:
    """Open the registry as its next owner does, and return what it holds."""
    registry = JobRegistry.open(path)
    try:
        return json.loads(json.dumps(await snapshot(registry)))
    finally:
        await registry.close()


def _check(life: Life, point: Point, acknowledged: int) -> int:
    """Compare what is there with what was acknowledged; returns 1 when one more step had become durable."""
    held = asyncio.run(_reopened(life.path))
    after = [number for number in (acknowledged, acknowledged + 1) if life.held[number : number + 1] == [held]]
    assert after, f"{point}: after {acknowledged} steps the registry holds neither that nor the next one"
    return after[0] - acknowledged


def test_registry_killed_at_any_write_holds_every_acknowledged_step_and_no_half_one(
    life: Life, size: Size, seed: int, figure: Callable[[str, object], None]
) -> None:
    life.prepare()
    points = life.points(WRITES)
    chosen = points if size.is_full else random.Random(seed).sample(points, min(14, len(points)))
    killed = ahead = 0
    for point in chosen:
        life.prepare()
        acknowledged = life.live(f"{point.call}:signal=KILL:when={point.number}")
        killed += "killed by SIGKILL" in life.log.read_text("utf-8", "replace")
        ahead += _check(life, point, acknowledged)
    assert killed == len(chosen)
    figure("points of a life", len(points))
    figure("kills survived", killed)
    figure("steps durable, not yet acknowledged", ahead)


def test_registry_killed_at_any_write_while_it_is_made_is_made_whole_by_the_next_one(
    life: Life, size: Size, seed: int, figure: Callable[[str, object], None]
) -> None:
    log = life.log
    life.points(WRITES)
    first = log.read_text("utf-8", "replace").split(" ", 1)[0]  # the main thread: it opens the file
    opening = life.directory / "opening.log"
    opening.write_text("".join(line + "\n" for line in log.read_text().splitlines() if line.startswith(first)))
    points = counted(opening, WRITES)
    chosen = points if size.is_full else random.Random(seed).sample(points, 4)
    for point in chosen:
        life.clear()
        acknowledged = life.live(f"{point.call}:signal=KILL:when={point.number}")
        _check(life, point, acknowledged)
    figure("points of the making", len(points))
    figure("kills survived", len(chosen))


async def _is_erased(life: Life) -> bool:
    """Open the registry anew, use it, and tell whether what was erased before is in no file of it."""
    registry = JobRegistry.open(life.path)
    try:
        for _ in range(20):  # its writer clears up between two writes
            await registry.append("hive-after", [])
            if all(CANARY.encode() not in path.read_bytes() for path in life.files()):
                return True
        return False
    finally:
        await registry.close()


@pytest.mark.xfail(strict=True, reason="a registry that is opened does not clear up behind one that was killed")
def test_text_that_was_erased_is_in_no_file_after_a_kill_and_a_new_start(
    life: Life, size: Size, seed: int, figure: Callable[[str, object], None]
) -> None:
    """Killed when the job's end was durable and its traces were still in the log of past writes."""
    life.prepare()
    points = [point for point in life.points(["pwrite64"]) if point.number > 190]
    random.Random(seed).shuffle(points)
    found = 0
    for point in points:
        life.prepare()
        acknowledged = life.live(f"{point.call}:signal=KILL:when={point.number}")
        if acknowledged >= ERASED_AFTER:
            found += 1
            assert asyncio.run(_is_erased(life)), f"{point} after {acknowledged} steps"
            if found >= size.of(1, 1000):
                break
    figure("kills after an erasure", found)


async def _asked_until_killed(stack: TracedStack, queen: Running | None) -> dict[str, list[dict[str, Any]]]:
    """Submit jobs, one after the other, until the queen is gone; returns what was read of those she accepted."""
    accepted: dict[str, list[dict[str, Any]]] = {}
    if queen is None:
        return accepted
    async with asyncio.timeout(60):
        while True:
            try:
                async with JobClient(stack.url, give_up_s=0) as client:
                    job_id = (await client.submit({"operation": "queen_check"})).job_id
                    accepted[job_id] = []
                    async for event in client.follow(job_id):
                        accepted[job_id].append(event)
            except RbeeError:
                await queen.wait()
                return accepted


async def test_queen_killed_at_a_write_brings_every_accepted_job_to_its_end_at_the_next_start(
    size: Size, seed: int, figure: Callable[[str, object], None]
) -> None:
    require_strace()
    choice = random.Random(seed)
    accepted: dict[str, list[dict[str, Any]]] = {}
    cases = size.of(2, 100)
    async with TracedStack(with_queen=False) as stack:
        for _ in range(cases):
            point = choice.choice(
                [Point("pwrite64", choice.randint(20, 250)), Point("fdatasync", choice.randint(5, 50))]
            )
            queen = await stack.start_traced_queen(f"{point.call}:signal=KILL:when={point.number}")
            accepted |= await _asked_until_killed(stack, queen)
            await stack.start_queen()
            for job_id, read in accepted.items():
                log = await stack.log(job_id)
                assert log[: len(read)] == read
                assert [event["seq"] for event in log] == list(range(1, len(log) + 1))
                assert [event["kind"] for event in log].count("end") == 1
                assert log[-1]["kind"] == "end"
            assert stack.queen is not None
            stack.queen.signal(signal.SIGTERM)
            await stack.queen.wait()
    figure("kills of a queen", cases)
    figure("jobs accepted before one", len(accepted))
