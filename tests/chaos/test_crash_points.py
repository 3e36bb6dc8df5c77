"""A kill at every system call that writes: what was acknowledged is there, and nothing is there by half."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rbee.jobs import JobRegistry
from tests.chaos.conftest import Size
from tests.chaos.job_life import CANARY, ERASED, STEPS, snapshot
from tests.chaos.strace_stage import Point, counted, module, require_strace, run, traced

WRITES = ("pwrite64", "write", "fsync", "fdatasync", "rename", "ftruncate", "fallocate", "unlink")
ERASED_FROM = 16  # the step that ends the job with `store: false`


class Life:
    """The registry's file, and what it holds after each step of a run without a fault."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "jobs.db"
        recorded = run(module("job_life", str(self.path), "record")).stdout.splitlines()
        said = [json.loads(line) for line in recorded]
        self.held: list[Any] = [line["snapshot"] for line in said if "snapshot" in line]
        assert len(self.held) == len(STEPS) + 1
        self.clear()

    def clear(self) -> None:
        """Remove the registry."""
        for path in self.files():
            path.unlink()

    def files(self) -> list[Path]:
        """Return the registry's files."""
        return sorted(self.directory.glob("jobs.db*"))

    def prepare(self) -> None:
        """Make an empty registry, so that opening it writes next to nothing."""
        self.clear()

        async def make() -> None:
            await JobRegistry.open(self.path).close()

        asyncio.run(make())

    def live(self, log: Path, inject: str) -> int:
        """Live under a fault; returns how many steps were acknowledged."""
        names = [self.path, *(Path(f"{self.path}{end}") for end in ("-wal", "-shm", "-journal"))]
        done = run(traced(log, inject, names, module("job_life", str(self.path), "live")))
        acknowledged = done.stdout.count('{"acknowledged"')
        assert "Error" not in done.stderr, done.stderr
        return acknowledged

    def points(self, log: Path) -> list[Point]:
        """Count the points of one life from here on."""
        assert self.live(log, f"{','.join(WRITES)}:signal=KILL:when=60000") == len(STEPS)
        return counted(log, WRITES)


@pytest.fixture
def life(tmp_path: Path) -> Life:
    require_strace()
    return Life(tmp_path)


async def _reopened(life: Life) -> tuple[Any, bool]:
    """Open the registry as its next owner does; returns what it holds, and whether its files hold what it erased."""
    registry = JobRegistry.open(life.path)
    try:
        held = json.loads(json.dumps(await snapshot(registry)))
        await registry.append("hive-after", [])  # the writer has cleared up when it takes the next write
        return held, any(CANARY.encode() in path.read_bytes() for path in life.files())
    finally:
        await registry.close()


def _check(life: Life, point: Point, acknowledged: int) -> int:
    """Compare what is there with what was acknowledged; returns 1 when one more step had become durable."""
    held, is_there = asyncio.run(_reopened(life))
    after = [number for number in (acknowledged, acknowledged + 1) if life.held[number : number + 1] == [held]]
    assert after, f"{point}: after {acknowledged} steps the registry holds neither that nor the next one"
    if after[0] >= ERASED_FROM + 1:
        assert held["logs"][ERASED]["said"] == []
        assert not is_there, f"{point}: what `store: false` erased is still in the files"
    return after[0] - acknowledged


def test_registry_killed_at_any_write_holds_every_acknowledged_step_and_no_half_one(
    life: Life, size: Size, seed: int, figure: Callable[[str, object], None]
) -> None:
    life.prepare()
    log = life.directory / "strace.log"
    points = life.points(log)
    chosen = points if size.is_full else random.Random(seed).sample(points, min(24, len(points)))
    killed = ahead = 0
    for point in chosen:
        life.prepare()
        acknowledged = life.live(log, f"{point.call}:signal=KILL:when={point.number}")
        killed += "killed by SIGKILL" in log.read_text("utf-8", "replace")
        ahead += _check(life, point, acknowledged)
    assert killed == len(chosen)
    figure("points of a life", len(points))
    figure("kills survived", killed)
    figure("steps durable, not yet acknowledged", ahead)


def test_registry_killed_at_any_write_while_it_is_made_is_made_whole_by_the_next_one(
    life: Life, size: Size, seed: int, figure: Callable[[str, object], None]
) -> None:
    log = life.directory / "strace.log"
    life.live(log, f"{','.join(WRITES)}:signal=KILL:when=60000")
    first = log.read_text("utf-8", "replace").split(" ", 1)[0]  # the main thread: it opens the file
    opening = life.directory / "opening.log"
    opening.write_text("".join(line + "\n" for line in log.read_text().splitlines() if line.startswith(first)))
    points = counted(opening, WRITES)
    chosen = points if size.is_full else random.Random(seed).sample(points, 6)
    for point in chosen:
        life.clear()
        acknowledged = life.live(log, f"{point.call}:signal=KILL:when={point.number}")
        _check(life, point, acknowledged)
    figure("points of the making", len(points))
    figure("kills survived", len(chosen))
