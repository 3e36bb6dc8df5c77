"""A hive killed at any write, send, punch or removal: at the queen nothing is lost and nothing is there twice."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rbee.contracts.home import Home
from rbee.contracts.ids import new_id
from tests.chaos.conftest import Size
from tests.chaos.strace_stage import LIMIT_S, ROOT, Point, counted, module, require_strace, traced
from tests.unit.hive.small_queen import SmallQueen, small_queen

CALLS = ("fallocate", "write", "sendto", "sendmsg", "unlink", "unlinkat", "rmdir")
KILLS_OF_ONE_HOME = 3


class Left:
    """A home as a hive left it that was killed: files of two workers and of an earlier boot."""

    def __init__(self, root: Path, queen: SmallQueen, choice: random.Random) -> None:
        self.home = Home.at(root)
        self.queen = queen
        self.log = root.parent / "strace.log"
        earlier = f"{queen.hive_id}/boot-{root.name}"
        self.written: dict[str, bytes] = {earlier: _said(choice)}
        (self.home.hive / f"boot-{root.name}").write_bytes(self.written[earlier])
        for _ in range(2):
            worker_id = new_id("worker")
            (self.home.workers / worker_id).mkdir()
            for stream in ("stdout", "stderr"):
                self.written[f"{worker_id}/{stream}"] = _said(choice)
                (self.home.workers / worker_id / stream).write_bytes(self.written[f"{worker_id}/{stream}"])

    async def deliver(self, inject: str | None) -> bool:
        """Let a hive deliver; tell whether it came to its end."""
        command = module("hive_life", str(self.home.root), self.queen.url, self.queen.hive_id)
        if inject is not None:
            command = _only(CALLS, traced(self.log, inject, [], command))
        process = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}, stderr=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(LIMIT_S):
            _, errors = await process.communicate()
        assert b"Traceback" not in errors, errors.decode()
        return process.returncode == 0

    def check(self) -> None:
        """Compare what the queen has with what was written."""
        assert self.queen.losses == []
        assert {name: self.queen.taken[name] for name in self.written} == self.written
        for name, data in self.queen.taken.items():
            if name.startswith(self.queen.hive_id) and "/boot-" not in name:  # what the hives said, in whole lines
                assert [json.loads(line)["actor"] for line in data.splitlines()]
        assert list(self.home.workers.iterdir()) == []


def _only(calls: Sequence[str], command: list[str]) -> list[str]:
    return [*command[:1], "-e", f"trace={','.join(calls)}", *command[1:]]


def _said(choice: random.Random) -> bytes:
    lines = [b"%0*d" % (choice.choice([10, 100, 20_000]), number) for number in range(choice.randint(5, 60))]
    return b"\n".join(lines) + choice.choice([b"\n", b"\nunfinished"])


@pytest.mark.timeout(600)
async def test_hive_killed_while_it_delivers_loses_nothing_and_brings_nothing_twice(
    tmp_path: Path, size: Size, seed: int, figure: Callable[[str, object], None]
) -> None:
    require_strace()
    choice = random.Random(seed)
    kills = 0
    async with small_queen() as (queen, _):
        left = Left(tmp_path / "counting", queen, choice)
        assert await left.deliver(f"{','.join(CALLS)}:signal=KILL:when=60000")
        left.check()
        points = counted(left.log, CALLS)
        chosen = points if size.is_full else choice.sample(points, min(6, len(points)))
        for start in range(0, len(chosen), KILLS_OF_ONE_HOME):
            left = Left(tmp_path / str(start), queen, choice)
            for point in chosen[start : start + KILLS_OF_ONE_HOME]:
                kills += not await left.deliver(_kill(point))
            assert await left.deliver(None)
            left.check()
    figure("points of a delivery", len(points))
    figure("kills survived", kills)
    figure("bytes lost or brought twice", sum(header.lost_bytes for header in queen.losses))


def _kill(point: Point) -> str:
    return f"{point.call}:signal=KILL:when={point.number}"
