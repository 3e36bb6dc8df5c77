"""The registry, in memory and in a file: the same promises in both."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import stat
import sys
from collections.abc import AsyncIterator
from importlib import resources
from pathlib import Path

import pytest

from rbee.contracts.events import frames_of
from rbee.contracts.operations import Infer, QueenCheck
from rbee.contracts.states import JobState, Phase, Reason
from rbee.contracts.views import Progress
from rbee.errors import (
    ConflictError,
    GoneError,
    NotFoundError,
    OverloadedError,
    RbeeError,
    StartError,
    UnavailableError,
    WorkerLostError,
)
from rbee.jobs import Fence, JobFilter, JobRecord, JobRegistry
from rbee.jobs.endings import error_body
from rbee.jobs.records import LogHead
from rbee.jobs.sqlite_store import SqliteStore, _migrate
from tests.unit.jobs.job_stage import assert_dense, end, kinds, new_job, told, whole_log


@pytest.fixture(params=["memory", "file"])
async def registry(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[JobRegistry]:
    opened = JobRegistry.open(None if request.param == "memory" else tmp_path / "jobs.db", queued_max=100)
    yield opened
    await opened.close()


async def test_create_job_is_queued_and_its_log_begins_with_that(registry: JobRegistry) -> None:
    record = await new_job(registry, events=[told("a"), told("b")], model="m", parent_job_id="job-0")
    assert record == await registry.get(record.job_id)
    events = await whole_log(registry, record.job_id)
    assert kinds(events) == ["queued", "narration", "narration"]
    assert_dense(events)
    view = await registry.view(record.job_id)
    assert (view.state, view.queue_position, view.last_seq, view.model) == ("queued", 1, 3, "m")


async def test_create_keeps_the_request_word_for_word(registry: JobRegistry) -> None:
    operation = Infer(prompt="Why?\x00 é", labels={"null": "null", "1": "true"}, timeout_s=3)
    record = await registry.create(operation, correlation_id="null", principal="1", model="null")
    assert await registry.operation(record.job_id) == operation
    kept = await registry.get(record.job_id)
    assert kept == record
    assert (kept.labels, kept.model, kept.principal) == ({"null": "null", "1": "true"}, "null", "1")
    assert kept.deadline_at == pytest.approx(kept.created_at + 3)


async def test_create_under_an_id_that_is_taken_is_refused_and_changes_nothing(registry: JobRegistry) -> None:
    record = await new_job(registry, store=False)
    ended = await end(registry, record.job_id, JobState.CANCELLED)
    with pytest.raises(ConflictError, match="There is a job job-"):
        await new_job(registry, job_id=record.job_id)
    assert await registry.get(record.job_id) == ended


async def test_every_field_of_a_job_comes_back(registry: JobRegistry) -> None:
    record = await new_job(registry)
    await registry.start(record.job_id, owner="b", hive_id="hive-1", worker_id="worker-1", phase=Phase.GENERATING)
    progress = Progress(done=1, total=None, unit="bytes")
    updated = await registry.update(record.job_id, message="m", progress=progress, events=[told("u")])
    assert updated == await registry.get(record.job_id)
    assert (updated.progress, updated.message, updated.phase) == (progress, "m", Phase.GENERATING)
    error = error_body(WorkerLostError("m", details={"exit_code": 0}))
    ended = await end(registry, record.job_id, JobState.FAILED, error=error, result={"text": "é"})
    assert ended == await registry.get(record.job_id)
    assert (await registry.view(record.job_id)).result == {"text": "é"}
    assert kinds(await whole_log(registry, record.job_id)) == ["queued", "running", "narration", "end"]


async def test_unknown_job_is_not_found(registry: JobRegistry) -> None:
    for call in (
        registry.get("job-x"),
        registry.view("job-x"),
        registry.request_cancel("job-x"),
        registry.start("job-x", owner="b"),
        registry.read("job-x", 0),
        registry.follow("job-x"),
    ):
        with pytest.raises(NotFoundError):
            await call
    with pytest.raises(GoneError):
        await registry.operation("job-x")


async def test_ended_job_absorbs_every_late_signal(registry: JobRegistry) -> None:
    record = await new_job(registry)
    await registry.start(record.job_id, owner="b")
    ended = await end(registry, record.job_id)
    log = await whole_log(registry, record.job_id)
    for state in (JobState.FAILED, JobState.CANCELLED, JobState.COMPLETED):
        with pytest.raises(ConflictError):
            await end(registry, record.job_id, state)
    with pytest.raises(ConflictError):
        await registry.start(record.job_id, owner="b")
    assert await registry.request_cancel(record.job_id) == ended
    assert await registry.update(record.job_id, message="late", events=[told("late")]) == ended
    assert await registry.append(record.job_id, [told("late")]) is False
    assert await registry.append(record.job_id, []) is False
    assert await whole_log(registry, record.job_id) == log


async def test_end_by_an_owner_of_an_older_attempt_is_fenced_off(registry: JobRegistry) -> None:
    record = await new_job(registry)
    first = await registry.start(record.job_id, owner="boot-1")
    second = await registry.start(record.job_id, owner="boot-1")
    with pytest.raises(ConflictError, match=r"Attempt 1 .* no longer holds it"):
        await end(registry, record.job_id, fence=Fence("boot-1", first.attempt))
    assert (await end(registry, record.job_id, fence=Fence("boot-1", second.attempt))).state is JobState.COMPLETED


async def test_refused_transition_writes_neither_state_nor_event(registry: JobRegistry) -> None:
    record = await new_job(registry)
    with pytest.raises(ConflictError):
        await end(registry, record.job_id, JobState.COMPLETED, events=[told("never")])
    assert kinds(await whole_log(registry, record.job_id)) == ["queued"]
    assert await registry.get(record.job_id) == record


async def test_queue_takes_as_many_as_may_wait_and_no_more(registry: JobRegistry) -> None:
    made = await asyncio.gather(*(new_job(registry) for _ in range(130)), return_exceptions=True)
    refused = [error for error in made if isinstance(error, OverloadedError)]
    assert len(refused) == 30
    assert {(error.status, error.retryable, error.retry_after_s) for error in refused} == {(429, True, 5)}
    assert (await registry.store.counts())["queued"] == 100
    (waiting, *_) = await registry.store.find(JobFilter(limit=1))
    await end(registry, waiting.job_id, JobState.CANCELLED)
    await new_job(registry)


async def test_same_key_and_body_fifty_times_at_once_is_one_job(registry: JobRegistry) -> None:
    made = await asyncio.gather(*(new_job(registry, idempotency_key="k", events=[told("x")]) for _ in range(50)))
    assert len({record.job_id for record in made}) == 1
    assert (await registry.store.counts())["queued"] == 1
    assert kinds(await whole_log(registry, made[0].job_id)) == ["queued", "narration"]


async def test_key_used_with_another_body_is_refused(registry: JobRegistry) -> None:
    await registry.create(QueenCheck(lines=1), correlation_id="c", idempotency_key="k")
    with pytest.raises(ConflictError, match="Idempotency-Key"):
        await registry.create(QueenCheck(lines=2), correlation_id="c", idempotency_key="k")


async def test_key_of_another_caller_is_another_key(registry: JobRegistry) -> None:
    made = [await new_job(registry, idempotency_key="k", principal=name) for name in ("a", "b")]
    assert made[0].job_id != made[1].job_id


async def test_key_still_means_its_job_after_the_end_and_past_a_full_queue(registry: JobRegistry) -> None:
    record = await new_job(registry, idempotency_key="k")
    ended = await end(registry, record.job_id, JobState.CANCELLED)
    await asyncio.gather(*(new_job(registry) for _ in range(100)))
    assert await new_job(registry, idempotency_key="k") == ended


async def test_list_filters_and_pages_newest_first(registry: JobRegistry) -> None:
    made = [await new_job(registry, model=f"m{number % 2}", job_id=f"job-{number:02}") for number in range(10)]
    await end(registry, "job-03", JobState.CANCELLED)
    seen: list[str] = []
    before = None
    while page := await registry.find(JobFilter(before=before, limit=3)):
        seen += [view.job_id for view in page]
        before = seen[-1]
    assert seen == [record.job_id for record in reversed(made)]
    odd = await registry.find(JobFilter(model="m1", state=JobState.QUEUED))
    assert [view.job_id for view in odd] == ["job-09", "job-07", "job-05", "job-01"]
    assert await registry.find(JobFilter(since=made[-1].created_at + 1)) == []
    assert len(await registry.find(JobFilter(until=made[-1].created_at + 1, correlation_id="c-1"))) == 10
    assert await registry.find(JobFilter(operation="infer")) == []


async def test_queue_position_counts_priority_before_age(registry: JobRegistry) -> None:
    for name, priority in (("job-1", 0), ("job-2", 5), ("job-3", 0), ("job-4", -1)):
        await new_job(registry, job_id=name, priority=priority)
    views = await registry.find(JobFilter())
    assert {view.job_id: view.queue_position for view in views} == {"job-2": 1, "job-1": 2, "job-3": 3, "job-4": 4}
    await registry.start("job-1", owner="b")
    assert (await registry.view("job-1")).queue_position is None
    assert (await registry.view("job-3")).queue_position == 2


async def test_concurrent_appends_leave_a_dense_log_in_the_order_of_their_writer(registry: JobRegistry) -> None:
    record = await new_job(registry)

    async def speak(number: int) -> None:
        for index in range(25):
            await registry.append(record.job_id, [told(f"{number} {index}.{part}") for part in range(2)])

    await asyncio.gather(*(speak(number) for number in range(8)))
    events = await whole_log(registry, record.job_id)
    assert_dense(events)
    assert len(events) == 1 + 8 * 25 * 2
    said = [json.loads(event)["message"] for event in events[1:]]
    for number in range(8):
        mine = [message.split()[1] for message in said if message.startswith(f"{number} ")]
        assert mine == [f"{index}.{part}" for index in range(25) for part in range(2)]


async def test_append_of_nothing_writes_nothing(registry: JobRegistry) -> None:
    record = await new_job(registry)
    assert await registry.append(record.job_id, []) is True
    assert await registry.append(record.job_id, []) is True
    assert (await registry.read(record.job_id, 0)).head.last_seq == 1


async def test_long_log_is_paged_from_any_number(registry: JobRegistry) -> None:
    record = await new_job(registry)
    for block in range(10):
        await registry.append(record.job_id, [told(f"{block}.{index}") for index in range(1000)])
    events = await whole_log(registry, record.job_id)
    assert len(events) == 10_001
    assert_dense(events)
    for after in (0, 1, 499, 500, 1000, 1001, 9_990, 10_000):
        page = await registry.read(record.job_id, after, 500)
        assert page.events == events[after : after + 500]
        assert (page.head.first_seq, page.head.last_seq) == (1, 10_001)
    assert (await registry.read(record.job_id, 10_001)).events == []
    assert (await registry.read(record.job_id, 99_999)).events == []


async def test_page_of_large_events_is_bounded_by_bytes(registry: JobRegistry) -> None:
    record = await new_job(registry)
    for _ in range(12):
        await registry.append(record.job_id, [told("x" * 250_000)])
    page = await registry.read(record.job_id, 0)
    assert len(page.events) == 6  # the first event, and what makes the mebibyte full
    assert_dense(await whole_log(registry, record.job_id))


async def test_job_that_is_not_stored_is_erased_when_it_ends(registry: JobRegistry) -> None:
    record = await new_job(registry, store=False)
    await registry.start(record.job_id, owner="b")
    await end(registry, record.job_id, result={"text": "secret", "n": 1})
    view = await registry.view(record.job_id)
    assert (view.state, view.result, view.last_seq) == ("completed", {"n": 1}, 3)
    for call in (registry.read(record.job_id, 0), registry.read(record.job_id, 2), registry.follow(record.job_id)):
        with pytest.raises(GoneError) as caught:
            await call
        assert caught.value.status == 410
    with pytest.raises(GoneError):
        await registry.operation(record.job_id)
    assert (await registry.follow(record.job_id, 3)).is_ended


async def test_log_of_a_worker_forgets_its_oldest_part(registry: JobRegistry) -> None:
    block = [told("x" * 60_000)] * 16
    for _ in range(80):
        await registry.append("worker-1", block)
    head = (await registry.store.head("worker-1")) or pytest.fail("no log")
    assert head.last_seq == 80 * 16
    assert 1 < head.first_seq < head.last_seq
    assert 32 * 1024 * 1024 < head.size_bytes <= 64 * 1024 * 1024
    with pytest.raises(GoneError, match=f"before {head.first_seq} are no longer kept"):
        await registry.read("worker-1", head.first_seq - 2)
    kept = await registry.read("worker-1", head.first_seq - 1)
    assert_dense(kept.events, head.first_seq)


async def test_closed_registry_refuses_and_closes_again_without_harm(registry: JobRegistry) -> None:
    record = await new_job(registry)
    await registry.close()
    await registry.close()
    for call in (registry.get(record.job_id), registry.append(record.job_id, [told("x")])):
        with pytest.raises(UnavailableError, match="closed"):
            await call


# What only a file has


async def test_file_keeps_everything_over_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    records: list[JobRecord] = []
    logs: list[list[bytes]] = []
    ids: set[str] = set()
    for round_number in range(3):
        registry = JobRegistry.open(path)
        ids.add(registry.store.store_id)
        assert [await registry.get(record.job_id) for record in records] == records
        assert [await whole_log(registry, record.job_id) for record in records] == logs
        record = await new_job(registry, idempotency_key=str(round_number))
        records.append(await registry.start(record.job_id, owner="b", events=[told("x")]))
        logs.append(await whole_log(registry, record.job_id))
        await registry.close()
    assert len(ids) == 1


async def test_several_registries_on_one_file_see_what_each_committed(tmp_path: Path) -> None:
    first, second = (JobRegistry.open(tmp_path / "jobs.db") for _ in range(2))
    record = await new_job(first)

    async def speak(registry: JobRegistry) -> None:
        for index in range(30):
            await registry.append(record.job_id, [told(str(index))])

    await asyncio.gather(speak(first), speak(second), speak(first))
    assert await whole_log(first, record.job_id) == await whole_log(second, record.job_id)
    assert_dense(await whole_log(first, record.job_id))
    await second.close()
    assert len(await whole_log(first, record.job_id)) == 91
    await first.close()


async def test_many_processes_opening_a_new_file_at_once_all_succeed(tmp_path: Path) -> None:
    program = """
import asyncio, sys
from pathlib import Path
from rbee.jobs.sqlite_store import SqliteStore
async def main():
    store = SqliteStore(Path(sys.argv[1]))
    print(store.store_id)
    await store.close()
asyncio.run(main())
"""

    async def run() -> bytes:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, str(tmp_path / "jobs.db"), stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        assert process.returncode == 0
        return out

    assert len(set(await asyncio.gather(*(run() for _ in range(4))))) == 1


async def test_files_are_their_owners_alone(tmp_path: Path) -> None:
    (tmp_path / "loose.db").touch(0o644)
    for name in ("new.db", "loose.db"):
        registry = JobRegistry.open(tmp_path / name)
        await new_job(registry)
        files = list(tmp_path.glob(name + "*"))
        assert len(files) == 3
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
        await registry.close()


async def test_erased_job_leaves_no_trace_in_the_files(tmp_path: Path) -> None:
    registry = JobRegistry.open(tmp_path / "jobs.db")
    operation = Infer(prompt="canary-prompt " * 1000, store=False)
    record = await registry.create(operation, correlation_id="c")
    await registry.start(record.job_id, owner="b")
    await registry.append(record.job_id, [told("canary-answer " * 1000)])

    def traces() -> set[str]:
        return {file.name for file in tmp_path.iterdir() if b"canary" in file.read_bytes()}

    assert traces() != set()
    await end(registry, record.job_id, result={"text": "canary-result"})
    async with asyncio.timeout(20):
        while traces():  # the writer empties its log when it is idle
            await registry.view(record.job_id)
    await registry.close()
    assert traces() == set()


@pytest.mark.parametrize("content", [b"not a database " * 100, b"SQLite format 3\x00" + b"\xff" * 5000])
async def test_file_that_is_no_registry_is_refused_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "jobs.db").write_bytes(content)
    with pytest.raises(StartError, match=r"The registry .*jobs\.db cannot be opened: ") as caught:
        JobRegistry.open(tmp_path / "jobs.db")
    assert caught.value.exit_code == 3
    assert "move it away" in caught.value.remedy
    assert (tmp_path / "jobs.db").read_bytes() == content


async def test_file_in_a_missing_directory_or_of_a_later_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="cannot be opened"):
        JobRegistry.open(tmp_path / "none" / "jobs.db")
    store = SqliteStore(tmp_path / "jobs.db")
    await store._writer.write(lambda tx: tx.execute("PRAGMA user_version = 99") and None)
    await store.close()
    with pytest.raises(StartError, match="later version"):
        JobRegistry.open(tmp_path / "jobs.db")


def _of_the_first_form(path: Path, events: list[bytes]) -> None:
    """Make a file as the first version did, with a log of so many events, in two rows, and an empty one."""
    with contextlib.closing(sqlite3.connect(path)) as old:
        old.executescript((resources.files("rbee.jobs") / "migrations" / "0001_jobs.sql").read_text("utf-8"))
        heads = [("worker-1", 1, len(events), 1, 0), ("worker-2", 1, 0, 0, 0)]
        old.executemany("INSERT INTO log_heads VALUES (?, ?, ?, ?, ?)", heads)
        rows = [("worker-1", end, b"\n".join(events[end - count : end])) for end, count in ((2, 2), (5, 3))]
        old.executemany("INSERT INTO log_rows VALUES (?, ?, ?)", rows if events else [])
        old.execute("PRAGMA user_version = 1")
        old.commit()


@pytest.mark.parametrize("events", [[], [told(str(number)).numbered(number) for number in range(1, 6)]])
async def test_file_that_another_process_brings_up_to_date_meanwhile_is_not_changed_twice(
    tmp_path: Path, events: list[bytes]
) -> None:
    path = tmp_path / "jobs.db"
    _of_the_first_form(path, events)
    first, second = (sqlite3.connect(path, isolation_level=None) for _ in range(2))

    def overtake(statement: str) -> None:
        if statement.startswith("BEGIN"):
            first.set_trace_callback(None)
            _migrate(second)

    first.set_trace_callback(overtake)
    _migrate(first)
    first.close()
    second.close()
    registry = JobRegistry.open(path)
    assert await whole_log(registry, "worker-1") == events
    await registry.close()


async def test_logs_of_the_first_form_are_read_as_those_of_today(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    events = [told(str(number)).numbered(number) for number in range(1, 6)]
    _of_the_first_form(path, events)
    registry = JobRegistry.open(path)
    assert await whole_log(registry, "worker-1") == events
    assert (await registry.read("worker-1", 3)).events == events[3:]
    size_bytes = len(frames_of(events, 1))
    assert [await registry.store.head(f"worker-{number}") for number in (1, 2)] == [
        LogHead(1, 5, size_bytes, False),
        LogHead(1, 0, 0, False),
    ]
    assert await registry.append("worker-1", [told("6")])
    assert_dense(await whole_log(registry, "worker-1"))
    await registry.close()


async def test_errors_of_the_store_are_errors_of_the_house(tmp_path: Path) -> None:
    registry = JobRegistry.open(tmp_path / "jobs.db")
    record = await new_job(registry)
    with pytest.raises(RbeeError) as caught:
        await registry.store._writer.write(lambda tx: tx.execute("SELECT nonsense"))  # type: ignore[attr-defined]
    assert isinstance(caught.value, UnavailableError)
    assert await end(registry, record.job_id, JobState.CANCELLED, reason=Reason.USER)
    await registry.close()
