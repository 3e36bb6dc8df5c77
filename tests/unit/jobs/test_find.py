"""Lists of jobs: they hold what the filter says, in stable pages, and no filter makes them read all jobs."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rbee.contracts.ids import first_id
from rbee.contracts.operations import QueenCheck, WorkerStop
from rbee.contracts.states import JobState
from rbee.jobs import JobFilter, JobRecord, JobRegistry
from rbee.jobs.sqlite_lists import CLOCK_SLACK_S, select_jobs, statement
from rbee.jobs.sqlite_store import SqliteStore
from tests.unit.jobs.job_stage import new_job

JOBS = 2_000
FIRST_AT = 1_700_000_000.0
EVERY_S = 10.0
LAST_AT = FIRST_AT + EVERY_S * JOBS
STEPS_MAX = 2_500
"""More than a page takes, and a tenth of what it takes to look at each job."""


class Times:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = FIRST_AT

    def __call__(self) -> float:
        return self.now_s


async def _fill(path: Path) -> None:
    """Make many jobs of one kind, and a few that are different."""
    times = Times()
    registry = JobRegistry(SqliteStore(path), queued_max=JOBS, clock=times)
    chance = random.Random(7)
    making = []
    for number in range(JOBS):
        times.now_s = FIRST_AT + EVERY_S * number
        is_rare = number % 400 == 17
        making.append(
            asyncio.ensure_future(
                registry.create(
                    WorkerStop(worker_id="worker-1") if is_rare else QueenCheck(),
                    job_id=first_id("job", times.now_s + chance.uniform(-CLOCK_SLACK_S, CLOCK_SLACK_S) / 2),
                    correlation_id="c-rare" if is_rare else "c-1",
                    model="m-rare" if is_rare else "m-1",
                    hive_id="hive-rare" if is_rare else "hive-1",
                )
            )
        )
        await asyncio.sleep(0)  # the job takes its time from the clock
    made = await asyncio.gather(*making)
    running = made[::400]
    await asyncio.gather(*(registry.start(record.job_id, owner="b", worker_id="worker-1") for record in running))
    await asyncio.gather(*(registry.cancel(record.job_id) for record in made if record not in running))
    await registry.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("lists") / "jobs.db"
    asyncio.run(_fill(made))
    return made


@pytest.fixture
def connection(path: Path) -> Iterator[sqlite3.Connection]:
    opened = sqlite3.connect(path)
    yield opened
    opened.close()


MIDDLE_AT = FIRST_AT + EVERY_S * JOBS / 2
ALONE: list[dict[str, Any]] = [
    {},
    *({"state": state} for state in JobState),
    {"operation": "queen_check"},
    {"operation": "worker_stop"},
    {"operation": "infer"},
    {"model": "m-1"},
    {"model": "m-rare"},
    {"model": "m-none"},
    {"hive_id": "hive-1"},
    {"hive_id": "hive-rare"},
    {"worker_id": "worker-1"},
    {"correlation_id": "c-1"},
    {"correlation_id": "c-rare"},
    {"since": MIDDLE_AT},
    {"since": LAST_AT},
    {"since": LAST_AT + 86_400},
    {"until": MIDDLE_AT},
    {"until": FIRST_AT - 86_400},
    {"until": -1.0},
    {"before": first_id("job", FIRST_AT + 300)},
    {"before": first_id("job", MIDDLE_AT)},
]
ONE_IS_RARE: list[dict[str, Any]] = [
    {"state": JobState.CANCELLED, "operation": "worker_stop"},
    {"state": JobState.RUNNING, "correlation_id": "c-1"},
    {"state": JobState.RUNNING, "model": "m-1", "until": MIDDLE_AT},
    {"state": JobState.CANCELLED, "worker_id": "worker-1"},
    {"state": JobState.CANCELLED, "model": "m-1", "since": MIDDLE_AT, "until": MIDDLE_AT + 50},
    {"operation": "queen_check", "hive_id": "hive-rare", "before": first_id("job", MIDDLE_AT)},
]
NONE_IS_RARE: list[dict[str, Any]] = [
    {"state": JobState.CANCELLED, "operation": "queen_check", "model": "m-1", "hive_id": "hive-1"},
    {"state": JobState.CANCELLED, "correlation_id": "c-1", "since": MIDDLE_AT},
]


@pytest.mark.parametrize("values", [*ALONE, *ONE_IS_RARE, *NONE_IS_RARE], ids=str)
def test_list_is_found_by_an_index_in_its_order(connection: sqlite3.Connection, values: dict[str, Any]) -> None:
    sql, bound = statement(connection, "job_id, message", JobFilter(limit=10, **values))
    plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", bound)]
    assert len(plan) == 1
    assert plan[0].startswith("SEARCH jobs USING ")
    assert plan[0].endswith("job_id>? AND job_id<?)")


@pytest.mark.parametrize("values", [*ALONE, *ONE_IS_RARE], ids=str)
def test_list_by_a_rare_value_or_by_one_filter_takes_few_steps(
    connection: sqlite3.Connection, values: dict[str, Any]
) -> None:
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1

    connection.set_progress_handler(step, 1)
    select_jobs(connection, "job_id, message", JobFilter(limit=10, **values))
    assert steps < STEPS_MAX


async def test_list_holds_what_each_filter_says(path: Path) -> None:
    every: list[JobRecord] = []
    async with JobRegistry.open(path) as registry:
        while page := await registry.store.find(JobFilter(before=every[-1].job_id if every else None, limit=500)):
            every += page
        assert len(every) == JOBS
        assert every == sorted(every, key=lambda record: record.job_id, reverse=True)
        for values in [*ALONE, *ONE_IS_RARE, *NONE_IS_RARE]:
            query = JobFilter(limit=JOBS, **values)
            wanted = [record for record in every if _passes(record, query)]
            assert await registry.store.find(query) == wanted, values


def _passes(record: JobRecord, query: JobFilter) -> bool:
    names = ("state", "operation", "model", "hive_id", "worker_id", "correlation_id")
    return (
        all(getattr(query, name) in (None, getattr(record, name)) for name in names)
        and (query.since is None or record.created_at >= query.since)
        and (query.until is None or record.created_at < query.until)
        and (query.before is None or record.job_id < query.before)
    )


async def test_pages_stay_as_they_are_while_jobs_are_added(tmp_path: Path) -> None:
    async with JobRegistry.open(tmp_path / "jobs.db") as registry:
        made = sorted([(await new_job(registry)).job_id for _ in range(20)], reverse=True)
        seen: list[str] = []
        before = None
        while page := await registry.find(JobFilter(before=before, limit=3)):
            seen += [view.job_id for view in page]
            before = seen[-1]
            await new_job(registry, job_id=first_id("job", registry.now() + 100 + len(seen)))
    assert seen == made
