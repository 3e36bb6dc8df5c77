"""How soon rbee is there and how little it takes: cold start, idle memory, a model's launch to its first token."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.demo_model import models_directory
from benchmarks.report import Row, main, median
from rbee.client import JobClient
from rbee.contracts.models import DEFAULT_MODEL
from rbee.testing.stack import LocalStack

ROUNDS = 5
SMALL_ROUNDS = 1
DEADLINE_S = 60.0
START_S = 1.0
FIRST_TOKEN_S = 1.5
IDLE_MB = 90


def pss_mb(pid: int) -> float:
    """Return a process's share of memory in megabytes: its own pages, and its part of the shared ones."""
    found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text("utf-8"), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def programs(stack: LocalStack) -> dict[str, int]:
    """Return the processes of a home by the name of their console script."""
    named = {}
    for pid in stack.processes():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        for word in words[:3]:
            name = word.rsplit(b"/", 1)[-1].decode()
            if name in ("rbee", "queen-rbee", "rbee-hive"):
                named[name] = pid
    return named


async def first_token_s(client: JobClient) -> float:
    """Return the seconds from asking, with no worker there, to the first words of the answer."""
    started_s = time.monotonic()
    asked = {"operation": "infer", "model": DEFAULT_MODEL, "prompt": "Say hello.", "max_tokens": 8}
    job_id = (await client.submit({**asked, "ignore_eos": True})).job_id
    first_s = None
    async with asyncio.timeout(DEADLINE_S):
        async for event in client.follow(job_id):
            if first_s is None and event["kind"] == "token" and event["text"]:
                first_s = time.monotonic() - started_s
    if first_s is None:
        sys.exit(f"The job ended without a token: {event}")
    return first_s


async def one_round() -> tuple[float, float, dict[str, float], float]:
    """Start all, ask one thing: seconds to ready, seconds of CPU, megabytes by program, seconds to first token."""
    async with LocalStack(models=await models_directory(), with_queen=False, config="") as stack:
        started_s = time.monotonic()
        up = await stack.start_up()
        ready_s = time.monotonic() - started_s
        found = programs(stack)
        cpu_s = sum(_cpu_s(pid) for pid in found.values())
        memory = {name: pss_mb(pid) for name, pid in found.items()}
        async with JobClient(up.url) as client:
            return ready_s, cpu_s, memory, await first_token_s(client)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


async def run(rounds: int) -> Sequence[Row]:
    """Start and stop everything several times; the first round only warms the disk's cache."""
    await one_round()
    taken = [await one_round() for _ in range(rounds)]
    ready_s, cpu_s = median([one[0] for one in taken]), median([one[1] for one in taken])
    memory = {name: median([one[2][name] for one in taken]) for name in taken[0][2]}
    both = memory["queen-rbee"] + memory["rbee-hive"]
    apart = ", ".join(f"{name} {share:.0f}" for name, share in sorted(memory.items()))
    return [
        Row("rbee up → queen and hive ready", f"{ready_s:.2f} s", wanted=f"≤ {START_S} s"),
        Row("CPU time of that, all programs", f"{cpu_s:.2f} s"),
        Row("idle queen + hive (PSS)", f"{both:.0f} MB", wanted=f"≤ {IDLE_MB} MB"),
        Row("idle, each program (PSS)", f"{apart} MB"),
        Row("infer without a worker → first token", f"{median([one[3] for one in taken]):.2f} s",
            wanted=f"≤ {FIRST_TOKEN_S} s"),
    ]  # fmt: skip


def measure(is_small: bool) -> Sequence[Row]:
    """Run it in one of its two sizes."""
    return asyncio.run(run(SMALL_ROUNDS if is_small else ROUNDS))


if __name__ == "__main__":
    main("Cold start, idle memory, first token", measure)
