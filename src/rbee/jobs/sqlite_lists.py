"""Finding jobs in a SQLite file: by the index that has the fewest of them, so that no list reads all."""

from __future__ import annotations

import sqlite3
from typing import Any

from rbee.contracts.ids import first_id
from rbee.jobs.records import JobFilter

CLOCK_SLACK_S = 60.0
"""How far the time in a job's id may be from its `created_at`. Many jobs in that time make lists by time slow."""
_INDEXES = {  # the one that usually tells most is the first
    "correlation_id": "jobs_by_correlation",
    "worker_id": "jobs_by_worker",
    "model": "jobs_by_model",
    "hive_id": "jobs_by_hive",
    "operation": "jobs_by_operation",
    "state": "jobs_by_state",
}
_FEW = (256, 4_096, 32_768)
_RANGE = "job_id >= :low AND job_id < :high"


def select_jobs(connection: sqlite3.Connection, columns: str, query: JobFilter) -> list[tuple[Any, ...]]:
    """Return the rows of the jobs that a filter wants, newest first, at most `query.limit`."""
    sql, values = statement(connection, columns, query)
    return connection.execute(sql, values).fetchall()


def statement(connection: sqlite3.Connection, columns: str, query: JobFilter) -> tuple[str, dict[str, Any]]:
    """Make the statement that finds jobs, and its values."""
    equal = {name: value for name in _INDEXES if (value := getattr(query, name)) is not None}
    low, high = _range(query)
    values = {**equal, "low": low, "high": high, "since": query.since, "until": query.until, "limit": query.limit}
    wanted = [_RANGE, *(f"{name} = :{name}" for name in equal)]
    if query.since is not None:
        wanted.append("created_at >= :since")
    if query.until is not None:
        wanted.append("created_at < :until")
    index = f"INDEXED BY {_INDEXES[_rarest(connection, list(equal), values)]}" if equal else ""
    where = " AND ".join(wanted)
    return f"SELECT {columns} FROM jobs {index} WHERE {where} ORDER BY job_id DESC LIMIT :limit", values


def _range(query: JobFilter) -> tuple[str, str]:
    """Return the first id that may be found, and the first one behind those."""
    low, high = "job-", "job."
    if query.since is not None:
        low = first_id("job", query.since - CLOCK_SLACK_S)
    if query.until is not None:
        high = first_id("job", query.until + CLOCK_SLACK_S)
    if query.before is not None:
        high = min(high, query.before)
    return low, high


def _rarest(connection: sqlite3.Connection, names: list[str], values: dict[str, Any]) -> str:
    """Return the filter that the fewest jobs pass, or the first when all of them let many pass."""
    if len(names) > 1:
        for few in _FEW:
            counts = {name: _count(connection, name, values, few) for name in names}
            rarest = min(counts, key=lambda name: counts[name])
            if counts[rarest] < few:
                return rarest
    return names[0]


def _count(connection: sqlite3.Connection, name: str, values: dict[str, Any], limit: int) -> int:
    """Return how many jobs pass one filter, or `limit` where those are more."""
    some = f"SELECT 1 FROM jobs INDEXED BY {_INDEXES[name]} WHERE {name} = :{name} AND {_RANGE} LIMIT :few"
    return int(connection.execute(f"SELECT count(*) FROM ({some})", {**values, "few": limit}).fetchone()[0])
