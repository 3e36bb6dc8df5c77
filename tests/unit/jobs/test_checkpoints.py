"""The write-ahead log stays short under load, and is empty when nothing happens."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path

import pytest

from rbee.contracts.states import JobState
from rbee.jobs import JobRegistry, sqlite_writer
from rbee.jobs.checkpoints import CHECKPOINT_BYTES
from tests.unit.jobs.job_stage import end, new_job, told, whole_log

SECONDS = 20


async def test_log_of_writes_is_bounded_under_load(tmp_path: Path) -> None:
    registry = JobRegistry.open(tmp_path / "jobs.db")
    record = await new_job(registry)
    wal = tmp_path / "jobs.db-wal"
    for _ in range(100):  # 50 MB in all
        await registry.append(record.job_id, [told("x" * 10_000)] * 50)
        assert wal.stat().st_size <= 64 * 1024 * 1024
    assert len(await whole_log(registry, record.job_id)) == 5001
    await registry.close()


async def test_log_of_writes_begins_anew_under_load(tmp_path: Path) -> None:
    registry = JobRegistry.open(tmp_path / "jobs.db")
    record = await new_job(registry)
    written = 0
    async with asyncio.timeout(SECONDS):
        while (tmp_path / "jobs.db-wal").stat().st_size * 2 > written or written < 8 * CHECKPOINT_BYTES:
            await registry.append(record.job_id, [told("x" * 10_000)] * 20)
            written += 200_000
    await registry.close()


async def test_log_of_writes_is_emptied_when_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_writer, "IDLE_S", 0.05)
    registry = JobRegistry.open(tmp_path / "jobs.db")
    await new_job(registry)
    async with asyncio.timeout(SECONDS):
        while (tmp_path / "jobs.db-wal").stat().st_size:  # noqa: ASYNC110  # a file tells nobody
            await asyncio.sleep(0.01)
    await registry.close()


async def test_closing_during_a_checkpoint_ends(tmp_path: Path) -> None:
    for number in range(10):
        registry = JobRegistry.open(tmp_path / f"{number}.db")
        record = await new_job(registry)
        await registry.append(record.job_id, [told("x" * 10_000)] * (CHECKPOINT_BYTES // 10_000 + 1))
        async with asyncio.timeout(SECONDS):
            await registry.close()


async def test_somebody_who_reads_the_file_for_long_holds_no_write_up(tmp_path: Path) -> None:
    """An erasure has the log emptied, which has to wait for those who read it; writes do not."""
    path = tmp_path / "jobs.db"
    async with JobRegistry.open(path) as registry:
        await new_job(registry)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as stranger:
            stranger.execute("BEGIN")
            stranger.execute("SELECT count(*) FROM jobs").fetchone()
            async with asyncio.timeout(6):
                for _ in range(3):
                    record = await new_job(registry, store=False)
                    await end(registry, record.job_id, JobState.CANCELLED)
