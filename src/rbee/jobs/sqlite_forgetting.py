"""Forgetting ended jobs in a SQLite file: the oldest end first, a slice of the work in each transaction.

What is erased is overwritten, so a slice is bounded by its bytes; and by its time, for what it touches may have to
be read from a slow disk first.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter

from rbee.contracts.ids import Kind, first_id, is_id
from rbee.contracts.states import TERMINAL_STATES
from rbee.errors import GoneError, NotFoundError, RbeeError
from rbee.jobs.records import Forgotten, Held
from rbee.jobs.sqlite_writer import Transaction
from rbee.jobs.store import Why

SLICE_S = 0.015
SLICE_BYTES = 1024 * 1024
JOB_BYTES = 32 * 1024
"""About how much is written to forget a small job: its rows and its entries in indexes are on different pages."""
ROWS = 64
_OLDEST = (
    "SELECT job_id, state, ended_at, coalesce(length(result), 0) FROM jobs INDEXED BY jobs_ended "
    "WHERE ended_at IS NOT NULL ORDER BY ended_at, job_id LIMIT 1"
)
_REMEMBER = "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = max(value, excluded.value)"
_UP_TO: dict[Kind, str] = {"job": "forgotten_up_to", "worker": "forgotten_workers_up_to"}


def forget_slice(tx: Transaction, why: Why) -> Forgotten:
    """Forget jobs for as long as there is a reason to, the slice is not full and its time not over."""
    jobs: Counter[str] = Counter()
    until = time.monotonic() + SLICE_S
    while oldest := tx.execute(_OLDEST).fetchone():
        job_id, state, ended_at, result_bytes = oldest
        reason = why(_held(tx, ended_at))
        if reason is None:
            break
        if tx.erased_bytes >= SLICE_BYTES or time.monotonic() >= until:
            return Forgotten(jobs, is_more=True)
        if not _forget_events(tx, job_id):
            tx.erased_bytes += JOB_BYTES + result_bytes
            _forget_job(tx, job_id, state)
            jobs[reason] += 1
    tx.has_erased = bool(jobs)
    return Forgotten(jobs, is_more=False)


def forget_logs(tx: Transaction, before: float) -> bool:
    """Forget logs of workers that were made before a time and whose end is told; tells whether there are more."""
    until = time.monotonic() + SLICE_S
    oldest = (
        "SELECT log_id FROM log_heads WHERE log_id BETWEEN 'worker-' AND ? "
        "AND log_id NOT IN (SELECT worker_id FROM workers) ORDER BY log_id LIMIT 1"
    )
    while found := tx.execute(oldest, (first_id("worker", before),)).fetchone():
        if tx.erased_bytes >= SLICE_BYTES or time.monotonic() >= until:
            return True
        (log_id,) = found
        if not _forget_events(tx, log_id):
            tx.erased_bytes += JOB_BYTES
            tx.execute("DELETE FROM log_heads WHERE log_id = ?", (log_id,))
            tx.execute("DELETE FROM cursors WHERE source BETWEEN ? AND ?", (f"{log_id}/", f"{log_id}/~"))
            tx.execute(_REMEMBER, (_UP_TO["worker"], log_id))
            tx.known.heads.pop(log_id, None)
    return False


def missing(connection: sqlite3.Connection, log_id: str) -> RbeeError:
    """Return the error that tells why there is no such job or log."""
    kind = next((kind for kind in _UP_TO if is_id(kind, log_id)), None)
    row = kind and connection.execute("SELECT value FROM meta WHERE key = ?", (_UP_TO[kind],)).fetchone()
    if row is None or log_id > row[0]:
        if kind == "job":
            return NotFoundError(f"There is no job {log_id}.", param="job_id")
        return NotFoundError(f"There is no log of {log_id}.")
    return GoneError(
        f"The {kind} {log_id} is no longer kept.",
        remedy="Keep jobs for longer: retention_days, retention_jobs and retention_bytes in the settings.",
    )


def _held(tx: Transaction, ended_at: float) -> Held:
    counts = Counter(dict(tx.execute("SELECT state, jobs FROM counts").fetchall()))
    pages = _pragma(tx, "page_count") - _pragma(tx, "freelist_count")
    return Held(
        ended_at=ended_at,
        ended_jobs=sum(counts[state] for state in TERMINAL_STATES),
        used_bytes=pages * _pragma(tx, "page_size"),
    )


def _pragma(tx: Transaction, name: str) -> int:
    return int(tx.execute(f"PRAGMA {name}").fetchone()[0])


def _forget_events(tx: Transaction, job_id: str) -> bool:
    """Forget the next events of a job's log; false when there are none left."""
    rows = tx.execute(
        "SELECT last_seq, length(body) FROM log_rows WHERE log_id = ? ORDER BY last_seq LIMIT ?", (job_id, ROWS)
    ).fetchall()
    erased_seq = size_bytes = 0
    for last_seq, length in rows:
        erased_seq, size_bytes = last_seq, size_bytes + length
        if size_bytes >= SLICE_BYTES:
            break
    if rows:
        tx.erased_bytes += size_bytes
        tx.known.heads.pop(job_id, None)
        tx.execute("DELETE FROM log_rows WHERE log_id = ? AND last_seq <= ?", (job_id, erased_seq))
        tx.execute(
            "UPDATE log_heads SET first_seq = ?, size_bytes = size_bytes - ? WHERE log_id = ?",
            (erased_seq + 1, size_bytes, job_id),
        )
    return bool(rows)


def _forget_job(tx: Transaction, job_id: str, state: str) -> None:
    """Forget a job whose events are forgotten, and remember that it was there."""
    request = tx.execute("SELECT length(body) FROM requests WHERE job_id = ?", (job_id,)).fetchone()
    tx.erased_bytes += request[0] if request else 0
    tx.execute("DELETE FROM requests WHERE job_id = ?", (job_id,))
    tx.execute("DELETE FROM log_heads WHERE log_id = ?", (job_id,))
    tx.execute("DELETE FROM jobs WHERE job_id = ?", (job_id,))
    tx.execute(_REMEMBER, (_UP_TO["job"], job_id))
    tx.known.heads.pop(job_id, None)
    tx.known.jobs.pop(job_id, None)
    tx.known.requests.pop(job_id, None)
    tx.pending.leave(state)
