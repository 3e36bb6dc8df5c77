"""A job whose log is full fails with that reason, and its answer is stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from rbee.jobs import sqlite_store
from tests.unit.queen.queen_stage import token
from tests.unit.queen.scripted_hive import queen_of, until


async def test_job_whose_log_is_full_fails_as_overloaded_and_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "JOB_LOG_BYTES_MAX", 5000)
    async with queen_of(tmp_path) as queen:
        hive = await queen.live_hive()
        worker_id = hive.has_worker()
        job_id = await queen.infer()
        await until(lambda: len(hive.asked) == 1)
        for _ in range(2):
            await hive.say(f"{worker_id}/stdout", *[token(job_id)] * 50)
        end = await queen.end(job_id)
        said = await queen.said(job_id)

    assert (end["state"], end["reason"]) == ("failed", "overloaded")
    assert said.count("token") == 50
    assert said.count("gap") == 1
    assert hive.stopped == [f"{job_id}.1"]
