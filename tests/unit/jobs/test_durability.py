"""What was acknowledged survives a kill, and a full or read-only disk costs nothing but the writes it refuses."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rbee.contracts.states import JobState
from rbee.errors import StorageError, StorageFullError
from rbee.jobs import JobFilter, JobRegistry
from rbee.jobs.sqlite_store import SqliteStore
from rbee.jobs.sqlite_writer import Transaction
from tests.unit.jobs.job_stage import assert_dense, end, kinds, new_job, told, whole_log

_WRITER = """
import asyncio, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.unit.jobs.job_stage import end, new_job, told
from rbee.jobs import JobRegistry

async def life(registry, name):
    while True:
        record = await new_job(registry)
        say(f"created {record.job_id}")
        for number in range(5):
            await registry.append(record.job_id, [told(str(number))])
            say(f"appended {record.job_id} {number}")
        await registry.start(record.job_id, owner="b")
        await end(registry, record.job_id)
        say(f"ended {record.job_id}")

def say(line):
    os.write(1, line.encode() + b"\\n")

async def main():
    registry = JobRegistry.open(Path(sys.argv[1]))
    await asyncio.gather(*(life(registry, name) for name in range(4)))

asyncio.run(main())
"""


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_killed_in_the_middle_of_writes_nothing_acknowledged_is_lost(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "jobs.db"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _WRITER, str(path), str(Path(__file__).parents[3])), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    wanted = random.Random(seed).randint(50, 400)
    lines = [(await process.stdout.readline()).decode() for _ in range(wanted)]
    process.kill()
    lines += (await process.stdout.read()).decode().splitlines()
    await process.wait()

    registry = JobRegistry.open(path)
    for line in lines:
        word, job_id, *rest = line.split()
        events = await whole_log(registry, job_id)
        assert_dense(events)
        record = await registry.get(job_id)
        if word == "appended":
            assert json.loads(events[1 + int(rest[0])])["message"] == rest[0]
        if word == "ended":
            assert record.state is JobState.COMPLETED
        assert (kinds(events)[-1] == "end") == record.is_ended
    assert len(await registry.find(JobFilter(limit=500))) >= sum(line.startswith("created") for line in lines)
    await new_job(registry)
    await registry.close()


async def test_commit_is_on_disk_and_not_only_with_the_kernel(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "jobs.db")

    def ask(tx: Transaction) -> list[object]:
        return [tx.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")]

    assert await store._writer.write(ask) == [2, "wal"]  # 2: FULL, an fsync at each commit
    await store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


async def test_full_disk_refuses_and_the_registry_goes_on_once_there_is_room(small_disk: Path) -> None:
    registry = JobRegistry.open(small_disk / "jobs.db")
    record = await new_job(registry)
    (small_disk / "ballast").write_bytes(b"x" * 400_000)
    written = 0
    with pytest.raises(StorageFullError) as caught:
        while True:
            await registry.append(record.job_id, [told(f"{written} " + "x" * 30_000)])
            written += 1
    assert (caught.value.status, caught.value.retryable) == (507, True)
    with pytest.raises(StorageFullError):
        await new_job(registry, events=[told("x" * 300_000)])
    assert len(await whole_log(registry, record.job_id)) == 1 + written
    (small_disk / "ballast").unlink()
    results = await asyncio.gather(*(registry.append(record.job_id, [told(str(index))]) for index in range(5)))
    assert results == [True] * 5
    await end(registry, record.job_id, JobState.CANCELLED)
    events = await whole_log(registry, record.job_id)
    assert len(events) == 1 + written + 5 + 1
    assert_dense(events)
    await registry.close()


async def test_file_that_can_no_longer_be_written_refuses_and_still_answers(tmp_path: Path) -> None:
    registry = JobRegistry.open(tmp_path / "jobs.db")
    record = await new_job(registry)
    reader = await registry.follow(record.job_id)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        with pytest.raises(StorageError, match="cannot be read or written"):
            await registry.append(record.job_id, [told("x")])
        assert await registry.get(record.job_id) == record
        assert kinds(await reader.next(5)) == ["queued"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert await registry.append(record.job_id, [told("x")])
    reader.close()
    await registry.close()
