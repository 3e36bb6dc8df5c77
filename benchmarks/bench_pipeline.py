"""From a worker's file through hive and queen, durable, to a reader that decodes every event."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.pipeline_limits import committed_per_s, forwarded_per_s
from benchmarks.pipeline_stage import Program, Stage, cpu_s
from benchmarks.report import Row, main

TITLE = "Worker's file -> hive -> queen (durable) -> SSE reader: four processes"
BATCH_BYTES = 256 * 1024


class Run:
    """What one run of the pipeline came to."""

    def __init__(self, heard: dict[str, Any], began_ns: int, spent_s: dict[str, float]) -> None:
        self.events = heard["events"]
        self.p50_ms = heard["p50_ms"]
        self.p99_ms = heard["p99_ms"]
        self.per_s = self.events / ((heard["last_ns"] - began_ns) / 1e9)
        self.spent_s = {**spent_s, "reader": heard["cpu_s"]}
        self.wrong: list[str] = heard["wrong"]

    def cpu_row(self, name: str) -> Row:
        """Return what a million events cost each process."""
        per_million = {who: spent * 1e6 / self.events for who, spent in self.spent_s.items()}
        told = " ".join(f"{who} {seconds:.2f}" for who, seconds in per_million.items())
        return Row(f"{name}: CPU-s per million", told)


async def run(count: int, *, files: int, jobs: int, rate: float | None, is_backlog: bool = False) -> Run:
    """Have `count` lines said of each job and read; a backlog is written before the hive begins."""
    async with Stage(workers=files, slots=-(-jobs // files)) as stage:
        placed = await stage.place(jobs)
        named = [job_id for there in placed.values() for job_id in there]
        if not is_backlog:
            stage.carry()
        reader = await Program.start("pipeline_reader", stage.url, str(count), *named)
        await reader.line()
        began_ns = time.time_ns()
        emitters = await stage.emit(placed, count, rate)
        if is_backlog:
            for emitter in emitters:
                await emitter.rest()
            began_ns = time.time_ns()
            stage.carry()
        before = {"queen": cpu_s(stage.queen_pid), "hive": cpu_s(stage.hive.pid)}
        heard = msgspec.json.decode(await reader.line())
        spent = {"queen": cpu_s(stage.queen_pid), "hive": cpu_s(stage.hive.pid)}
        for emitter in emitters:
            told = msgspec.json.decode(await emitter.rest()) if not is_backlog else None
            if told is not None:
                began_ns = max(began_ns, told["began_ns"])
            await emitter.stop()
        await reader.stop()
        found = Run(heard, began_ns, {who: spent[who] - before[who] for who in spent})
        found.wrong += await stage.close_answers(placed, count)
        return found


async def _measure(is_small: bool) -> tuple[list[Row], list[str]]:
    lines, seconds = (6_000, 1.0) if is_small else (400_000, 10.0)
    wanted = "" if is_small else ">= 200,000/s"
    backlog = await run(lines, files=1, jobs=1, rate=None, is_backlog=True)
    live = await run(lines, files=1, jobs=1, rate=None)
    spread = await run(lines // 16, files=4, jobs=16, rate=None)
    slow = await run(int(100 * seconds), files=1, jobs=1, rate=100)
    brisk = await run(int(10_000 * seconds), files=1, jobs=1, rate=10_000)
    forwarded, alone = await asyncio.to_thread(_limits, lines)
    rows = [
        _rate_row("drain a backlog", backlog, f"bytes {forwarded:,.0f}/s", forwarded, wanted),
        Row("SQLite alone, 256 KiB a commit", f"{alone:,.0f}/s"),
        _rate_row("live, flat out, 1 file", live, f"SQLite {alone:,.0f}/s", alone, wanted),
        Row("live, flat out, 4 files, 16 jobs", f"{spread.per_s:,.0f}/s", wanted=wanted),
        Row("100/s, p50 / p99", f"{slow.p50_ms:.2f} / {slow.p99_ms:.2f} ms", wanted="<= 2 / <= 4 ms"),
        Row("10,000/s, p50 / p99", f"{brisk.p50_ms:.2f} / {brisk.p99_ms:.2f} ms", wanted="<= 1.5 / <= 5 ms"),
        backlog.cpu_row("backlog"),
        live.cpu_row("live"),
        brisk.cpu_row("10,000/s"),
    ]
    return rows, [wrong for found in (backlog, live, spread, slow, brisk) for wrong in found.wrong]


def _rate_row(name: str, found: Run, against: str, limit: float, wanted: str) -> Row:
    return Row(name, f"{found.per_s:,.0f}/s", against, found.per_s / limit, wanted)


def _limits(lines: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory(prefix="rbee-bench-") as name:
        path = Path(name) / "lines"
        with path.open("wb") as file:
            for number in range(lines):
                file.write(b'{"v":1,"kind":"token","seq":%d,"text":"%b"}\n' % (number, b"x" * 270))
        return forwarded_per_s(path), committed_per_s(path, Path(name) / "alone.db", BATCH_BYTES)


def measure(is_small: bool) -> Sequence[Row]:
    """Measure all; ends the program with 1 when an event was lost or came twice."""
    rows, wrong = asyncio.run(_measure(is_small))
    if wrong:
        sys.exit("Lost or repeated: " + "; ".join(wrong))
    return rows


if __name__ == "__main__":
    main(TITLE, measure)
