"""The registry: which transition is allowed, and what its file outlives. For its storage see `tests.contracts`."""

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
from rbee.contracts.operations import Infer
from rbee.contracts.states import JobState, Reason
from rbee.errors import (
    ConflictError,
    GoneError,
    NotFoundError,
    RbeeError,
    StartError,
    UnavailableError,
)
from rbee.jobs import Fence, JobRecord, JobRegistry, sqlite_store
from rbee.jobs.records import Entry, LogHead, SourceBatch
from rbee.jobs.sqlite_store import SqliteStore, _migrate
from tests.unit.jobs.job_stage import assert_dense, captured, end, head_of, kinds, new_job, told, whole_log


@pytest.fixture
async def registry() -> AsyncIterator[JobRegistry]:
    async with JobRegistry.open(None) as opened:
        yield opened


async def test_create_job_is_queued_and_its_log_begins_with_that(registry: JobRegistry) -> None:
    record = await new_job(registry, events=[told("a"), told("b")], model="m", parent_job_id="job-0")
    assert record == await registry.get(record.job_id)
    events = await whole_log(registry, record.job_id)
    assert kinds(events) == ["queued", "narration", "narration"]
    assert_dense(events)
    view = await registry.view(record.job_id)
    assert (view.state, view.queue_position, view.last_seq, view.model) == ("queued", 1, 3, "m")


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


@pytest.mark.parametrize("is_erased_later", [False, True])
async def test_erased_job_leaves_no_trace_in_the_files(tmp_path: Path, is_erased_later: bool) -> None:
    registry = JobRegistry.open(tmp_path / "jobs.db")
    operation = Infer(prompt="canary-prompt " * 1000, store=is_erased_later)
    record = await registry.create(operation, correlation_id="c")
    await registry.start(record.job_id, owner="b")
    await registry.append(record.job_id, [told("canary-answer " * 1000)])

    def traces() -> set[str]:
        return {file.name for file in tmp_path.iterdir() if b"canary" in file.read_bytes()}

    assert traces() != set()
    await end(registry, record.job_id, result={"text": "canary-result", "n": 1})
    if is_erased_later:
        assert traces() != set()
        assert (await registry.erase(record.job_id)).result == b'{"n":1}'
        assert (await registry.erase(record.job_id)).state is JobState.COMPLETED
    with pytest.raises(GoneError):
        await registry.operation(record.job_id)
    with pytest.raises(GoneError):
        await registry.read(record.job_id, 0)
    async with asyncio.timeout(20):
        while traces():  # the writer empties its log when it is idle
            await registry.view(record.job_id)
    await registry.close()
    assert traces() == set()


async def test_job_that_has_not_ended_is_not_erased(tmp_path: Path) -> None:
    async with JobRegistry.open(None) as registry:
        record = await registry.create(Infer(prompt="x"), correlation_id="c")
        with pytest.raises(ConflictError, match="it can be erased once it has ended"):
            await registry.erase(record.job_id)
        assert (await registry.operation(record.job_id)).prompt == "x"


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
    assert [await head_of(registry.store, f"worker-{number}") for number in (1, 2)] == [
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


async def test_cursors_survive_a_restart(tmp_path: Path) -> None:
    for start in range(0, 30, 10):
        store = SqliteStore(tmp_path / "jobs.db")
        known = await store.cursors(["worker-1/stdout"])
        assert known == ({"worker-1/stdout": (start, 2)} if start else {})
        await store.ingest([SourceBatch("worker-1/stdout", start, start + 10, 2, [Entry("worker-1", told("x"))])])
        await store.close()


async def test_full_log_of_a_job_takes_no_more_lines_counts_them_and_still_ends(
    registry: JobRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "JOB_LOG_BYTES_MAX", 1000)
    full: list[str] = []
    registry.hub.on_full = full.append
    record = await new_job(registry)
    assert await registry.store.ingest([captured(0, 20, record.job_id)]) == {"worker-1/stdout": 20}
    assert full == []
    assert await registry.store.ingest([captured(20, 27, record.job_id)]) == {"worker-1/stdout": 27}
    assert full == [record.job_id]
    await end(registry, record.job_id, JobState.CANCELLED)
    events = await whole_log(registry, record.job_id)
    assert_dense(events)
    assert kinds(events) == ["queued", *["narration"] * 20, "gap", "end"]
    gap = json.loads(events[-2])
    assert (gap["reason"], gap["lost_lines"]) == ("log_full", 7)
