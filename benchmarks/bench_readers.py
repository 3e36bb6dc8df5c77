"""One job's stream to very many readers at once."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec

from benchmarks.pipeline_stage import Program, Stage, free_port, memory_bytes, reachable
from benchmarks.report import Row, main

TITLE = "One job's stream to many readers"
KIB = 1024


async def _ours(readers: int, rate: int, count: int) -> tuple[dict[str, Any], float]:
    """Return what the crowd saw of a real job, and how much memory the queen took for each reader."""
    async with Stage(workers=1, slots=1) as stage:
        stage.carry()
        placed = await stage.place(1)
        (job_id,) = [job_id for jobs in placed.values() for job_id in jobs]
        address = urlsplit(stage.url)
        before = memory_bytes(stage.queen_pid)
        path = f"/v1/jobs/{job_id}/stream"
        crowd = await Program.start(
            "pipeline_crowd", str(address.hostname), str(address.port), path, str(readers), str(count)
        )
        await crowd.line()
        grown = memory_bytes(stage.queen_pid) - before
        emitters = await stage.emit(placed, count, rate)
        heard = msgspec.json.decode(await crowd.line())
        for program in (*emitters, crowd):
            await program.stop()
        return heard, grown / readers


async def _naive(readers: int, rate: int, count: int) -> dict[str, Any]:
    """Return what the crowd saw of a program that frames each event for each reader."""
    port = free_port()
    server = await Program.start("pipeline_naive", str(port), str(count), str(rate))
    await reachable(port)
    crowd = await Program.start("pipeline_crowd", "127.0.0.1", str(port), "/stream", str(readers), str(count))
    await crowd.line()
    server.tell(b"go\n")
    heard: dict[str, Any] = msgspec.json.decode(await crowd.line())
    await crowd.stop()
    await server.stop()
    return heard


def measure(is_small: bool) -> Sequence[Row]:
    """Measure; ends the program with 1 when a reader got less than all."""
    readers, rate, count = (20, 200, 200) if is_small else (1000, 1000, 10_000)
    ours, each_bytes = asyncio.run(_ours(readers, rate, count))
    naive = asyncio.run(_naive(readers, rate, count if is_small else count // 10))
    if ours["short"]:
        sys.exit(f"{ours['short']} readers did not get all frames.")
    ours_per_s, naive_per_s = ours["frames"] / ours["took_s"], naive["frames"] / naive["took_s"]
    wanted = ("", "") if is_small else (">= 500,000/s", "p99 <= 150 ms")
    against = f"a frame a reader: {naive_per_s:,.0f}/s"
    return [
        Row(f"{readers} readers, {rate} events/s", f"{ours_per_s:,.0f} frames/s", against, None, wanted[0]),
        Row(
            "how late, p50 / p99",
            f"{ours['p50_ms']:.1f} / {ours['p99_ms']:.1f} ms",
            f"{naive['p50_ms']:.1f} / {naive['p99_ms']:.1f} ms",
            None,
            wanted[1],
        ),
        Row("memory of the queen for each reader", f"{each_bytes / KIB:.1f} KiB"),
    ]


if __name__ == "__main__":
    main(TITLE, measure)
