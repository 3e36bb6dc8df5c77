"""How many jobs the registry takes through their lives in a second, and what a page of a long list costs."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import uvloop

from benchmarks.registry_filled import RARE, RARE_JOBS, Filled, fill
from benchmarks.registry_limit import lives_per_s
from benchmarks.report import Row, main, median, percentile
from rbee.contracts.events import new_event
from rbee.contracts.ids import new_correlation_id
from rbee.contracts.operations import QueenCheck
from rbee.contracts.states import TERMINAL_STATES, JobState, Phase, Reason
from rbee.jobs import JobFilter, JobRegistry
from rbee.jobs.retention import Limits, Retention
from rbee.narration.emit import captured_narration

TITLE = "The registry: jobs, each transition durable"
IN_FLIGHT = {1: 2_000, 64: 25_600, 256: 25_600}
"""How many jobs are lived at once, and how many in all."""
MAIN_IN_FLIGHT = 64
JOBS_PER_S = 8_000
LIFE_MS = 6.0
PAGE_MS = 20.0
PAGE_CALLS = 20
WAITING_JOBS = 500
APPEND_EACH_S = 0.005
FORGOTTEN_SHARE = 50
PAUSE_MS = 50.0
QUIET_S = 2.0
PAGES_BESIDE = 10
PAGE_JOBS_MAX = 500
LOG_ID = "hive-of-the-bench"
FILLED_JOBS = 1_000_000
FILLED_SMALL_JOBS = 20_000
ROUNDS = 3
SMALL_ROUNDS = 1

T = TypeVar("T")


async def _life(registry: JobRegistry) -> None:
    record = await registry.create(QueenCheck(lines=0), correlation_id=new_correlation_id())
    await registry.start(record.job_id, owner="bench")
    await registry.update(record.job_id, phase=Phase.GENERATING)
    await registry.end(record.job_id, JobState.COMPLETED, reason=Reason.OK, message="Done.")


async def _lives(path: Path, jobs: int, in_flight: int) -> tuple[float, list[float]]:
    """Live so many lives in a new file; returns lives a second and the milliseconds of each."""
    registry = JobRegistry.open(path)
    taken_ms: list[float] = []

    async def lane() -> None:
        for _ in range(jobs // in_flight):
            began = time.perf_counter()
            await _life(registry)
            taken_ms.append((time.perf_counter() - began) * 1e3)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(lane())
    per_s = len(taken_ms) / (time.perf_counter() - began)
    counts = await registry.store.counts()
    await registry.close()
    if counts["completed"] != len(taken_ms):
        sys.exit(f"Of {len(taken_ms)} jobs that were completed the registry has {counts}.")
    return per_s, taken_ms


async def _limit(path: Path, jobs: int, in_flight: int) -> float:
    await JobRegistry.open(path).close()  # its tables
    return await asyncio.to_thread(lives_per_s, path, jobs, in_flight)


async def _lives_rows(directory: Path, in_flight: int, jobs: int, rounds: int) -> list[Row]:
    """Measure the registry and its limit in turn."""
    rates, limits, taken_ms = [], [], []
    for number in range(rounds):
        name = f"{in_flight}-{number}"
        limits.append(await _limit(directory / f"limit-{name}.db", jobs, in_flight))
        per_s, lives_ms = await _lives(directory / f"registry-{name}.db", jobs, in_flight)
        rates.append(per_s)
        taken_ms += lives_ms
    is_main = in_flight == MAIN_IN_FLIGHT
    return [
        Row(
            f"create, start, update, end: {in_flight} in flight",
            f"{median(rates):,.0f} jobs/s",
            f"plain sqlite3, {in_flight} to a commit: {median(limits):,.0f}/s",
            median([rate / limit for rate, limit in zip(rates, limits, strict=True)]),
            f">= {JOBS_PER_S:,} jobs/s" if is_main else "",
        ),
        Row(
            "a life, p50 / p99",
            f"{median(taken_ms):.2f} / {percentile(taken_ms, 99):.2f} ms",
            wanted=f"p50 <= {LIFE_MS:.0f} ms" if is_main else "",
        ),
    ]


def _filters(filled: Filled) -> dict[str, JobFilter]:
    middle, old = filled.created_s(filled.jobs // 2), filled.job_id(RARE_JOBS)
    return {
        "no filter": JobFilter(),
        "state: waiting": JobFilter(state=JobState.QUEUED),
        "state: some of all": JobFilter(state=JobState.CANCELLED),
        "state: none": JobFilter(state=JobState.RUNNING),
        "operation: a quarter of all": JobFilter(operation="infer"),
        "operation: the oldest": JobFilter(operation="model_delete"),
        "model: a seventh of all": JobFilter(model="model-3"),
        "model: the oldest": JobFilter(model=RARE),
        "hive_id: the oldest": JobFilter(hive_id=RARE),
        "worker_id: the oldest": JobFilter(worker_id=RARE),
        "correlation_id: the oldest": JobFilter(correlation_id=RARE),
        "since the middle": JobFilter(since=middle),
        "until the middle": JobFilter(until=middle),
        "since and until in the middle": JobFilter(since=middle, until=middle + 600),
        "behind an old cursor": JobFilter(before=old),
    }


async def _page_rows(registry: JobRegistry, filled: Filled) -> list[Row]:
    wanted = f"< {PAGE_MS:.0f} ms"
    rows = []
    for name, query in _filters(filled).items():
        views_ms, found = await _timed(partial(registry.find, query))
        records_ms, _ = await _timed(partial(registry.store.find, query))
        expected = 0 if query.state is JobState.RUNNING else query.limit
        if len(found) != expected:
            sys.exit(f"{name}: a page of {len(found)} jobs, not of {expected}.")
        against = f"the records alone: {records_ms:.2f} ms"
        rows.append(Row(f"first page, {name}", f"{views_ms:.2f} ms", against, wanted=wanted))
    counts_ms, counts = await _timed(registry.store.counts)
    if sum(counts.values()) != filled.jobs + WAITING_JOBS:
        sys.exit(f"The counts are wrong: {counts}.")
    return [*rows, Row("how many are in each state", f"{counts_ms:.2f} ms", wanted=wanted)]


async def _timed(call: Callable[[], Awaitable[T]]) -> tuple[float, T]:
    """Call several times; returns the median of the milliseconds, and what the last call returned."""
    taken_ms = []
    for _ in range(PAGE_CALLS):
        began = time.perf_counter()
        found = await call()
        taken_ms.append((time.perf_counter() - began) * 1e3)
    return median(taken_ms), found


async def _pause_row(name: str, registry: JobRegistry, work: Coroutine[None, None, object]) -> Row:
    """Say what a writer saw while something else was done, and while nothing was."""
    quiet_ms = await _appends_ms(registry, asyncio.sleep(QUIET_S))
    beside_ms = await _appends_ms(registry, work)
    return Row(
        f"an append beside {name}, p50 / longest",
        _middle_and_longest(beside_ms),
        f"beside nothing: {_middle_and_longest(quiet_ms)}",
        wanted=f"none over {PAUSE_MS:.0f} ms",
    )


async def _appends_ms(registry: JobRegistry, work: Coroutine[None, None, object]) -> list[float]:
    """Append a line every few milliseconds until `work` is done; returns the milliseconds of each append."""
    beside = asyncio.create_task(work)
    taken_ms = []
    while not beside.done():
        began = time.perf_counter()
        await registry.append(LOG_ID, [new_event("narration", {"ts": time.time_ns(), "message": "Still there."})])
        took_s = time.perf_counter() - began
        taken_ms.append(took_s * 1e3)
        await asyncio.sleep(max(0.0, APPEND_EACH_S - took_s))
    await beside
    return taken_ms


def _middle_and_longest(taken_ms: Sequence[float]) -> str:
    return f"{median(taken_ms):.2f} / {max(taken_ms):.2f} ms"


async def _read_pages(registry: JobRegistry) -> None:
    for _ in range(PAGES_BESIDE):
        await registry.find(JobFilter(limit=PAGE_JOBS_MAX))


async def _forget(registry: JobRegistry, jobs: int) -> None:
    """Forget a share of all jobs, the oldest ends first."""
    wanted = jobs // FORGOTTEN_SHARE
    ended = sum(count for state, count in (await registry.store.counts()).items() if state in TERMINAL_STATES)
    limits = Limits(days=1e6, jobs=ended - wanted, size_bytes=2**60)
    with captured_narration():
        forgotten = await Retention(registry, limits, actor="bench").forget()
    if forgotten != {"jobs": wanted}:
        sys.exit(f"Forgot {forgotten}, not {wanted} jobs.")


async def _wait_in_line(registry: JobRegistry) -> None:
    """Have some jobs wait, so that their places in line have to be counted."""
    operation = QueenCheck(lines=0)
    async with asyncio.TaskGroup() as group:
        for _ in range(WAITING_JOBS):
            group.create_task(registry.create(operation, correlation_id=new_correlation_id()))


async def _filled_rows(path: Path, jobs: int) -> list[Row]:
    filled = await fill(path, jobs)
    registry = JobRegistry.open(path)
    await _wait_in_line(registry)
    rows = [
        Row("jobs in the file", f"{jobs:,}", f"{path.stat().st_size / 1e6:,.0f} MB"),
        *await _page_rows(registry, filled),
        await _pause_row("the reading of long pages", registry, _read_pages(registry)),
        await _pause_row(f"the forgetting of {jobs // FORGOTTEN_SHARE:,} jobs", registry, _forget(registry, jobs)),
    ]
    await registry.close()
    return rows


async def _measure(is_small: bool) -> list[Row]:
    rounds, size = (SMALL_ROUNDS, 20) if is_small else (ROUNDS, 1)
    rows = []
    with tempfile.TemporaryDirectory(prefix="rbee-bench-") as name:
        for in_flight, jobs in IN_FLIGHT.items():
            rows += await _lives_rows(Path(name), in_flight, jobs // size, rounds)
        rows += await _filled_rows(Path(name) / "filled.db", FILLED_SMALL_JOBS if is_small else FILLED_JOBS)
    return rows


def measure(is_small: bool) -> Sequence[Row]:
    """Run it in one of its two sizes; ends the program with 1 where the registry has not what it should."""
    return uvloop.run(_measure(is_small))


if __name__ == "__main__":
    main(TITLE, measure)
