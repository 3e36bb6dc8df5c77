"""A registry's file with very many ended jobs in it, made quickly: whole rows, no fsync, large transactions."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from rbee.contracts.ids import new_correlation_id
from rbee.contracts.operations import QueenCheck
from rbee.contracts.states import JobState, Reason
from rbee.jobs import JobRegistry

JOBS_A_COMMIT = 50_000
SECONDS_APART = 1.0
OPERATIONS = ("infer", "chat_completion", "queen_check", "hive_check")
STATES = ("completed",) * 17 + ("failed", "failed", "cancelled")
RARE = "of-the-oldest"
"""The model, hive, worker and correlation id that only some of the very oldest jobs have."""
RARE_JOBS = 60
CACHE_KIB = 512 * 1024
_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"
_JOB = (
    "INSERT INTO jobs (job_id, operation, state, reason, message, priority, attempt, attempts, owner, "
    "model, hive_id, worker_id, principal, correlation_id, created_at, started_at, ended_at, "
    "is_cancel_requested, is_stored, is_kept, labels) "
    "VALUES (?, ?, ?, ?, 'The job has ended.', 0, 1, 2, 'bench', ?, ?, ?, 'local', ?, ?, ?, ?, 0, 1, 1, '{}')"
)
_COUNTS = "UPDATE counts SET jobs = (SELECT count(*) FROM jobs WHERE jobs.state = counts.state)"


def job_id_at(second: float, number: int) -> str:
    """Return the id that a job made at that time could have; equal numbers make equal ids."""
    time_ms = int(second * 1000)
    return "job-" + "".join(_CROCKFORD[time_ms >> shift & 31] for shift in range(45, -1, -5)) + f"{number:016x}"


class Filled:
    """What was written into the file.

    Attributes:
        jobs: How many jobs.
        first_s: When the first was created; the next ones each `SECONDS_APART` later.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.first_s = time.time() - (jobs + 60) * SECONDS_APART

    def created_s(self, number: int) -> float:
        """Return when a job was created."""
        return self.first_s + number * SECONDS_APART

    def job_id(self, number: int) -> str:
        """Return a job's id."""
        return job_id_at(self.created_s(number), number)


async def fill(path: Path, jobs: int) -> Filled:
    """Make the file, with `jobs` ended jobs in it, each with its request and its log of three events."""
    job_id, frames = await _one_log()
    await JobRegistry.open(path).close()  # the tables, nothing in them
    filled = Filled(jobs)
    connection = sqlite3.connect(path, isolation_level=None)
    for pragma in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{CACHE_KIB}"):
        connection.execute(f"PRAGMA {pragma}")
    numbers = iter(range(jobs))
    while some := list(islice(numbers, JOBS_A_COMMIT)):
        connection.execute("BEGIN")
        _write(connection, filled, some, job_id, frames)
        connection.execute("COMMIT")
    connection.execute(_COUNTS)
    connection.close()
    with path.open("rb") as file:
        os.fsync(file.fileno())  # or the first commits that are measured wait for it
    return filled


async def _one_log() -> tuple[str, bytes]:
    """Live one job's life; returns its id and its log."""
    registry = JobRegistry.open(None)
    record = await registry.create(QueenCheck(lines=0), correlation_id=new_correlation_id())
    await registry.start(record.job_id, owner="bench")
    await registry.end(record.job_id, JobState.COMPLETED, reason=Reason.OK, message="The job has ended.")
    page = await registry.read(record.job_id, 0)
    await registry.close()
    return record.job_id, page.frames


def _write(connection: sqlite3.Connection, filled: Filled, numbers: list[int], like: str, frames: bytes) -> None:
    ids = [filled.job_id(number) for number in numbers]
    logs = [(job_id, frames.replace(like.encode(), job_id.encode())) for job_id in ids]
    connection.executemany(_JOB, _job_rows(filled, numbers, ids))
    connection.executemany(
        "INSERT INTO requests VALUES (?, ?)", [(job_id, b'{"operation":"queen_check"}') for job_id in ids]
    )
    connection.executemany("INSERT INTO log_rows VALUES (?, 3, ?)", logs)
    connection.executemany(
        "INSERT INTO log_heads VALUES (?, 1, 3, ?, 1)", [(job_id, len(body)) for job_id, body in logs]
    )


def _job_rows(filled: Filled, numbers: list[int], ids: list[str]) -> Iterator[tuple[object, ...]]:
    for number, job_id in zip(numbers, ids, strict=True):
        is_rare = number < RARE_JOBS
        state = STATES[number % len(STATES)]
        at = filled.created_s(number)
        yield (
            job_id,
            "model_delete" if is_rare else OPERATIONS[number % len(OPERATIONS)],
            state,
            {"completed": "ok", "failed": "worker_lost", "cancelled": "user"}[state],
            RARE if is_rare else f"model-{number % 7}",
            RARE if is_rare else f"hive-{number % 5}",
            RARE if is_rare else f"worker-{number // 1000}",
            RARE if is_rare else new_correlation_id(),
            at,
            at + 0.1,
            at + 0.9,
        )
