"""Ended jobs are forgotten by age, number and bytes, in short steps; who asks for one is told that it is gone."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rbee.contracts.ids import first_id, new_id
from rbee.contracts.operations import Infer, QueenCheck
from rbee.contracts.states import JobState, Reason
from rbee.errors import GoneError, NotFoundError
from rbee.jobs import JobFilter, JobRecord, JobRegistry
from rbee.jobs.records import Entry, Held, SourceBatch, WorkerRecord
from rbee.jobs.retention import DAY_S, Limits, Retention
from rbee.jobs.sqlite_forgetting import SLICE_BYTES
from rbee.jobs.sqlite_store import SqliteStore
from rbee.narration.emit import captured_narration
from tests.unit.jobs.job_stage import SECONDS, assert_dense, end, head_of, kinds, new_job, told, whole_log

START_AT = 1_700_000_000.0
ROW_BYTES = 100_000


class Times:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = START_AT

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def times() -> Times:
    return Times()


@pytest.fixture(params=["memory", "file"])
async def registry(request: pytest.FixtureRequest, tmp_path: Path, times: Times) -> AsyncIterator[JobRegistry]:
    path = None if request.param == "memory" else tmp_path / "jobs.db"
    opened = JobRegistry(SqliteStore(path), clock=times)
    yield opened
    await opened.close()


def retention(registry: JobRegistry, **limits: Any) -> Retention:
    """Keep everything but what the given limits say."""
    all_of_it = {"days": 1e5, "jobs": 10**9, "size_bytes": 2**50}
    return Retention(registry, Limits(**{**all_of_it, **limits}), actor="queen")


async def ended_job(registry: JobRegistry, **values: Any) -> JobRecord:
    record = await new_job(registry, **values)
    return await end(registry, record.job_id, JobState.CANCELLED, reason=Reason.USER)


async def long_job(registry: JobRegistry, rows: int) -> JobRecord:
    """End a job with a long log."""
    record = await new_job(registry)
    for _ in range(rows):
        await registry.append(record.job_id, [told("x" * ROW_BYTES)])
    return await end(registry, record.job_id, JobState.CANCELLED, reason=Reason.USER)


async def kept(registry: JobRegistry) -> set[str]:
    return {view.job_id for view in await registry.find(JobFilter(limit=500))}


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        (Held(ended_at=START_AT - 2 * DAY_S, ended_jobs=1, used_bytes=1), "days"),
        (Held(ended_at=START_AT - 2 * DAY_S + 1, ended_jobs=1, used_bytes=1), None),
        (Held(ended_at=START_AT, ended_jobs=4, used_bytes=1), "jobs"),
        (Held(ended_at=START_AT, ended_jobs=3, used_bytes=1000), None),
        (Held(ended_at=START_AT, ended_jobs=3, used_bytes=1001), "bytes"),
    ],
)
def test_reason_is_the_first_limit_that_is_passed(held: Held, reason: str | None) -> None:
    assert Limits(days=2, jobs=3, size_bytes=1000).reason(held, START_AT) == reason


async def test_jobs_that_ended_long_ago_are_forgotten_and_no_other(registry: JobRegistry, times: Times) -> None:
    queued, running, late = await new_job(registry), await new_job(registry), await new_job(registry)
    await registry.start(running.job_id, owner="b")
    early = [await ended_job(registry) for _ in range(3)]
    times.now_s += 10 * DAY_S
    await end(registry, late.job_id, JobState.CANCELLED, reason=Reason.USER)
    times.now_s += 20 * DAY_S
    assert await retention(registry, days=30).forget() == {"days": 3}
    assert await kept(registry) == {queued.job_id, running.job_id, late.job_id}
    counts = await registry.store.counts()
    assert counts == {"queued": 1, "running": 1, "completed": 0, "failed": 0, "cancelled": 1}
    assert [await head_of(registry.store, record.job_id) for record in early] == [None] * 3
    assert [await registry.store.request(record.job_id) for record in early] == [None] * 3
    assert await retention(registry, days=30).forget() == {}
    assert kinds(await whole_log(registry, late.job_id)) == ["queued", "end"]


@pytest.mark.parametrize("days", [1e9, 1e300, math.inf])
async def test_jobs_and_logs_are_kept_for_ever_where_that_is_wished(
    registry: JobRegistry, times: Times, days: float
) -> None:
    job = await ended_job(registry)
    worker_id = new_id("worker")
    await registry.append(worker_id, [told("x")])
    times.now_s += 1000 * 365 * DAY_S
    assert await retention(registry, days=days).forget() == {}
    assert await kept(registry) == {job.job_id}
    assert kinds(await whole_log(registry, worker_id)) == ["narration"]


async def test_jobs_beyond_the_number_are_forgotten_in_the_order_of_their_ends(
    registry: JobRegistry, times: Times
) -> None:
    waiting = await new_job(registry)
    made = [await new_job(registry) for _ in range(6)]
    for record in (made[index] for index in (3, 0, 5, 1, 4, 2)):
        times.now_s += 1
        await end(registry, record.job_id, JobState.CANCELLED, reason=Reason.USER)
    assert await retention(registry, jobs=2).forget() == {"jobs": 4}
    assert await kept(registry) == {waiting.job_id, made[4].job_id, made[2].job_id}


async def test_oldest_logs_are_forgotten_until_the_bytes_are_few_enough(registry: JobRegistry) -> None:
    first, second, third = [await long_job(registry, rows=40) for _ in range(3)]
    assert await retention(registry, size_bytes=70 * ROW_BYTES).forget() == {"bytes": 1}
    assert await kept(registry) == {second.job_id, third.job_id}
    with pytest.raises(GoneError):
        await registry.get(first.job_id)
    head = (await head_of(registry.store, second.job_id)) or pytest.fail("no log")
    assert 1 < head.first_seq < head.last_seq
    with pytest.raises(GoneError, match=f"before {head.first_seq} are no longer kept"):
        await registry.read(second.job_id, 0)
    rest = (await registry.read(second.job_id, head.first_seq - 1)).events
    assert_dense(rest, first=head.first_seq)
    assert len(await whole_log(registry, third.job_id)) == 42
    assert await retention(registry, size_bytes=1).forget() == {"bytes": 2}


async def test_bytes_of_jobs_that_have_not_ended_are_left_alone(registry: JobRegistry) -> None:
    running = await new_job(registry)
    await registry.append(running.job_id, [told("x" * ROW_BYTES)] * 10)
    await ended_job(registry)
    assert await retention(registry, size_bytes=1).forget() == {"bytes": 1}
    assert await kept(registry) == {running.job_id}


async def test_long_log_is_forgotten_in_steps_of_few_bytes_between_which_others_write(
    registry: JobRegistry, times: Times
) -> None:
    record = await long_job(registry, rows=60)
    log_bytes = 60 * ROW_BYTES
    times.now_s += 1
    left = [(await head_of(registry.store, record.job_id)) or pytest.fail("no log")]
    while (await registry.store.forget(lambda held: "days" if held.ended_at < times.now_s else None)).is_more:
        await ended_job(registry)
        if head := await head_of(registry.store, record.job_id):
            left.append(head)
    steps = [before.size_bytes - after.size_bytes for before, after in pairwise(left)]
    assert max(steps) <= SLICE_BYTES + ROW_BYTES
    assert len(steps) >= log_bytes // (SLICE_BYTES + ROW_BYTES)
    assert [head.first_seq for head in left] == sorted({head.first_seq for head in left})
    assert await head_of(registry.store, record.job_id) is None


async def test_logs_of_workers_that_have_gone_are_forgotten_by_age(registry: JobRegistry, times: Times) -> None:
    store = registry.store
    gone, living, young = (first_id("worker", START_AT + days * DAY_S) for days in (0, 1, 20))
    for worker_id in (gone, living, young):
        await store.put_worker(WorkerRecord(worker_id, "hive-1", "m"))
        for _ in range(3):
            line = Entry(worker_id, told("x" * ROW_BYTES))
            cursor = (await store.cursors([f"{worker_id}/stdout"])).get(f"{worker_id}/stdout", (0, 0))[0]
            await store.ingest([SourceBatch(f"{worker_id}/stdout", cursor, cursor + 1, 0, [line])])
    for worker_id in (gone, young):
        await store.forget_worker(worker_id)
    times.now_s += 31 * DAY_S
    assert await retention(registry, days=30).forget() == {}
    with pytest.raises(GoneError, match="no longer kept"):
        await registry.follow(gone)
    assert await store.cursors([f"{gone}/stdout"]) == {}
    for worker_id in (living, young):
        assert len(await whole_log(registry, worker_id)) == 3
    with pytest.raises(NotFoundError):
        await registry.follow(first_id("worker", START_AT + 40 * DAY_S))


async def test_reader_of_a_log_that_is_being_forgotten_is_told(registry: JobRegistry, times: Times) -> None:
    record = await long_job(registry, rows=30)
    reader = await registry.follow(record.job_id)
    assert await reader.next(SECONDS)
    assert not reader.is_ended
    position = reader.position
    times.now_s += 1
    while (await registry.store.forget(lambda held: "days")).is_more:
        head = await head_of(registry.store, record.job_id)
        if head is not None and position + 1 < head.first_seq:
            with pytest.raises(GoneError, match=f"before {head.first_seq} are no longer kept"):
                await registry.read(record.job_id, position)
    with pytest.raises(GoneError, match="is no longer kept"):
        await reader.next(SECONDS)
    with pytest.raises(GoneError, match="is no longer kept"):
        await registry.read(record.job_id, position)
    reader.close()


async def test_forgotten_job_is_gone_for_everybody_and_others_were_never_there(registry: JobRegistry) -> None:
    first = await ended_job(registry, job_id=first_id("job", START_AT))
    last = await ended_job(registry, job_id=first_id("job", START_AT + 1))
    await retention(registry, jobs=1).forget()
    await retention(registry, days=-1).forget()
    later = await new_job(registry)
    for job_id, error in (
        (first.job_id, GoneError),
        (last.job_id, GoneError),
        (first_id("job", START_AT + 0.5), GoneError),
        (first_id("job", START_AT + 2), NotFoundError),
        (new_id("job"), NotFoundError),
        ("job-1", NotFoundError),
        ("worker-1", NotFoundError),
    ):
        for asked in (
            registry.get(job_id),
            registry.view(job_id),
            registry.read(job_id, 0),
            registry.follow(job_id),
            registry.wait(job_id),
            registry.cancel(job_id),
            registry.update(job_id, message="x"),
        ):
            with pytest.raises(error):
                await asked
    with pytest.raises(GoneError):
        await registry.operation(first.job_id)
    assert (await registry.get(later.job_id)).state is JobState.QUEUED


async def test_key_of_a_forgotten_job_makes_a_new_one(registry: JobRegistry, times: Times) -> None:
    first = await ended_job(registry, idempotency_key="k")
    times.now_s += 1
    await retention(registry, days=1e-9).forget()
    second = await registry.create(QueenCheck(lines=1), idempotency_key="k")
    assert (second.job_id != first.job_id, second.state) == (True, JobState.QUEUED)


async def test_what_comes_late_for_a_forgotten_job_begins_no_log(registry: JobRegistry, times: Times) -> None:
    record = await ended_job(registry)
    times.now_s += 1
    await retention(registry, days=1e-9).forget()
    assert await registry.append(record.job_id, [told("late")]) is False
    assert await head_of(registry.store, record.job_id) is None


async def test_forgotten_job_leaves_no_trace_in_the_files(tmp_path: Path) -> None:
    registry = JobRegistry.open(tmp_path / "jobs.db")
    record = await registry.create(
        Infer(prompt="canary-prompt " * 1000), correlation_id="canary-id", idempotency_key="canary-key"
    )
    await registry.start(record.job_id, owner="b")
    await registry.append(record.job_id, [told("canary-answer " * 1000)])
    await end(registry, record.job_id, result={"text": "canary-result"})
    await retention(registry, jobs=1, size_bytes=1).forget()
    await registry.close()
    assert b"canary" not in (tmp_path / "jobs.db").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"jobs.db"}


async def test_jobs_that_another_process_ended_are_counted_and_forgotten(tmp_path: Path) -> None:
    one, other = JobRegistry.open(tmp_path / "jobs.db"), JobRegistry.open(tmp_path / "jobs.db")
    made = [await ended_job(registry) for registry in (one, other) * 3]
    assert await retention(one, jobs=4).forget() == {"jobs": 2}
    assert await retention(other, jobs=1).forget() == {"jobs": 3}
    with pytest.raises(GoneError):
        await one.cancel(made[2].job_id)
    assert (await one.store.counts())["cancelled"] == 1
    await one.close()
    await other.close()


async def test_what_was_forgotten_is_told_once_with_the_reason(registry: JobRegistry, times: Times) -> None:
    for _ in range(5):
        await ended_job(registry)
    times.now_s += DAY_S
    for _ in range(3):
        await ended_job(registry)
    with captured_narration() as said:
        await retention(registry, days=1, jobs=2).forget()
        await retention(registry, days=1, jobs=2).forget()
    (event,) = said.events
    assert (event["action"], event["fields"]) == ("queen_forget", {"jobs": 6, "why": {"days": 5, "jobs": 1}})
    assert event["message"] == (
        "Forgot jobs: 5 that ended more than 1 days ago, 1 that were beyond the 2 that are kept."
    )


@pytest.mark.parametrize(
    ("program", "file", "action"),
    [("queen-rbee", "queen.db", "queen_forget"), ("rbee-hive", "hive.db", "hive_forget")],
)
async def test_server_forgets_at_its_start(tmp_path: Path, program: str, file: str, action: str) -> None:
    tmp_path.chmod(0o700)
    registry = JobRegistry.open(tmp_path / file)
    made = sorted([(await ended_job(registry)).job_id for _ in range(3)])
    await registry.close()
    server = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name(program),
        *("--home", str(tmp_path), "--port", "0", "--retention-jobs", "1"),
        stdout=asyncio.subprocess.PIPE,
    )
    assert server.stdout is not None
    async with asyncio.timeout(SECONDS):
        while action.encode() not in (line := await server.stdout.readline()):
            assert line, "the server said nothing of it"
    server.terminate()
    assert await server.wait() == 0
    registry = JobRegistry.open(tmp_path / file)
    assert len(await kept(registry) & set(made)) == 1
    await registry.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("--retention-days", "0"),
        ("--retention-jobs", "0"),
        ("--retention-bytes", "-1"),
        ("--retention-days", "-2"),
    ],
)
@pytest.mark.parametrize("program", ["queen-rbee", "rbee-hive"])
async def test_server_refuses_to_keep_nothing(tmp_path: Path, program: str, name: str, value: str) -> None:
    server = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name(program),
        *("--home", str(tmp_path), f"--{name.replace('_', '-')}={value}"),
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await server.communicate()
    assert server.returncode == 2
    assert name in said.decode()
