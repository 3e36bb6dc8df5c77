"""What the registry is compared with: its rows, written by plain sqlite3 with group commit."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from rbee.contracts.ids import new_correlation_id, new_id
from rbee.contracts.operations import QueenCheck, operation_name

REQUEST = b'{"operation":"queen_check","lines":0}'
EVENT = b"id: 1\nevent: state\ndata: " + b"x" * 230 + b"\n\n"
_JOB = (
    "INSERT INTO jobs (job_id, operation, state, phase, priority, attempt, attempts, principal, correlation_id, "
    "created_at, is_cancel_requested, is_stored, is_kept, labels) "
    "VALUES (?, ?, 'queued', 'queued', 0, 0, 2, 'local', ?, ?, 0, 1, 1, '{}')"
)
_START = (
    "UPDATE jobs SET state = 'running', owner = 'bench', attempt = 1, started_at = ?, phase = NULL "
    "WHERE job_id = ?"
)
_END = (
    "UPDATE jobs SET state = 'completed', reason = 'ok', message = 'Done.', phase = NULL, ended_at = ? "
    "WHERE job_id = ?"
)
_COUNT = "UPDATE counts SET jobs = jobs + ? WHERE state = ?"


def lives_per_s(database: Path, jobs: int, in_flight: int) -> float:
    """Write lives into a registry's empty file, `in_flight` jobs to each commit; returns lives a second."""
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("PRAGMA synchronous=FULL")
    began = time.perf_counter()
    for _ in range(jobs // in_flight):
        ids = [new_id("job") for _ in range(in_flight)]
        for statements in (_created, _started, _updated, _ended):
            connection.execute("BEGIN IMMEDIATE")
            for sql, rows in statements(ids, time.time()):
                connection.executemany(sql, rows)
            connection.execute("COMMIT")
    took_s = time.perf_counter() - began
    connection.close()
    return jobs / took_s


Statements = Iterator[tuple[str, list[tuple[object, ...]]]]


def _created(ids: list[str], now: float) -> Statements:
    name = operation_name(QueenCheck())
    yield _JOB, [(job_id, name, new_correlation_id(), now) for job_id in ids]
    yield "INSERT INTO requests VALUES (?, ?)", [(job_id, REQUEST) for job_id in ids]
    yield from _told(ids, 1)
    yield _COUNT, [(len(ids), "queued")]


def _started(ids: list[str], now: float) -> Statements:
    yield _START, [(now, job_id) for job_id in ids]
    yield from _told(ids, 2)
    yield _COUNT, [(-len(ids), "queued"), (len(ids), "running")]


def _updated(ids: list[str], now: float) -> Statements:
    yield "UPDATE jobs SET phase = 'generating' WHERE job_id = ?", [(job_id,) for job_id in ids]


def _ended(ids: list[str], now: float) -> Statements:
    yield _END, [(now, job_id) for job_id in ids]
    yield from _told(ids, 3)
    yield _COUNT, [(-len(ids), "running"), (len(ids), "completed")]


def _told(ids: list[str], seq: int) -> Statements:
    """Write one event and the log's head for each job."""
    yield "INSERT INTO log_rows VALUES (?, ?, ?)", [(job_id, seq, EVENT) for job_id in ids]
    heads: list[tuple[object, ...]] = [(job_id, seq, seq * len(EVENT), seq == 3) for job_id in ids]
    yield "INSERT OR REPLACE INTO log_heads VALUES (?, 1, ?, ?, ?)", heads
