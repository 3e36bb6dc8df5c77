"""The registry's storage in one SQLite file (WAL, `synchronous=FULL`), or in memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from rbee.contracts.events import CapturedRun, NewEvent, encode_json, frames_from, frames_of, new_event
from rbee.contracts.ids import new_boot_id
from rbee.contracts.states import JobState
from rbee.errors import ConflictError, OverloadedError, RbeeError, StartError
from rbee.jobs.checkpoints import BUSY_MS, Checkpoints
from rbee.jobs.records import (
    Changed,
    Committed,
    Entry,
    Forgotten,
    JobFilter,
    JobRecord,
    LogHead,
    LogPage,
    Run,
    SourceBatch,
    Standing,
    WorkerRecord,
)
from rbee.jobs.sqlite_forgetting import forget_logs, forget_slice, missing
from rbee.jobs.sqlite_lists import select_jobs
from rbee.jobs.sqlite_reader import SqliteReader
from rbee.jobs.sqlite_writer import JOB_COLUMNS, SqliteWriter, TakenError, Transaction
from rbee.jobs.store import Decide, OnCommit, Why

T = TypeVar("T")
Part = NewEvent | CapturedRun
NEARLY_FULL_BYTES = 64 * 1024
PAGE_BYTES_MAX = 1024 * 1024
DUE_MAX = 100
REQUEST_REMEMBERED_BYTES = 1024
SYSTEM_LOG_BYTES_MAX = 64 * 1024 * 1024
JOB_LOG_BYTES_MAX = 256 * 1024 * 1024
NEW_LOG = LogHead(1, 0, 0, False)
_NAMES = ", ".join(JOB_COLUMNS)
_SELECT = f"SELECT {_NAMES} FROM jobs"
_JSON = frozenset({"progress", "error", "labels"})


class SqliteStore:
    """See `rbee.jobs.store.JobStore`, whose contract this keeps."""

    def __init__(self, path: Path | None) -> None:
        """Open the file and bring its tables up to date.

        Args:
            path: The file; None keeps everything in memory.

        Raises:
            StartError: The file cannot be used.
        """
        self._target = str(path) if path else ":memory:"
        self._is_memory = path is None
        self.on_commit: OnCommit = lambda committed: None
        try:
            if path is not None:
                _make_private(path)
            connection = self._connect()
            _migrate(connection)
            self.store_id = _store_id(connection)
            # A database in memory belongs to one connection, so there the writer's thread reads as well.
            self._reader = None if self._is_memory else SqliteReader(self._connect())
            checkpoints = None if self._is_memory else Checkpoints(self._connect)
        except (OSError, sqlite3.Error) as error:
            raise StartError(
                f"The registry {self._target} cannot be opened: {error}{_disk(path)}.",
                remedy="See that the file can be written to and is whole, or move it away to start a new one.",
            ) from error
        self._writer = SqliteWriter(connection, lambda committed: self.on_commit(committed), checkpoints)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._target, isolation_level=None, check_same_thread=False, timeout=BUSY_MS / 1000
        )
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA wal_autocheckpoint=0")  # see `Checkpoints`
        connection.execute("PRAGMA secure_delete=ON")  # what is erased is overwritten
        return connection

    async def close(self) -> None:
        """Commit what was asked for, then close."""
        await self._writer.close()
        if self._reader is not None:
            await self._reader.close()

    async def _read(self, function: Callable[[sqlite3.Connection], T]) -> T:
        if self._reader is None:
            return await self._writer.write(lambda tx: function(tx.settled()))
        return await self._reader.read(function)

    # Jobs

    async def create(
        self, record: JobRecord, request: bytes, events: list[NewEvent], *, queued_max: int
    ) -> JobRecord:
        """Keep a new job, or return the one that its idempotency key already made."""

        def run(tx: Transaction) -> JobRecord:
            existing = _by_key(tx, record)
            if existing is not None:
                return existing
            queued = _queued(tx)
            if queued >= queued_max:
                raise OverloadedError(
                    f"{queued} jobs are waiting already, as many as may ({queued_max}).", retry_after_s=5
                )
            if record.job_id in tx.known.jobs:
                raise TakenError
            tx.pending.create(record, _row(record), request)
            tx.known.queued = queued + 1
            tx.known.jobs[record.job_id] = record
            tx.known.heads[record.job_id] = NEW_LOG
            if len(request) <= REQUEST_REMEMBERED_BYTES:
                tx.known.requests[record.job_id] = request
            _append(tx, record.job_id, events, is_end=False)
            return record

        try:
            return await self._writer.write(run)
        except TakenError as error:
            raise ConflictError(f"There is a job {record.job_id} already.") from error

    async def change(self, job_id: str, decide: Decide) -> JobRecord:
        """Apply a pure decider to a job under its lock."""

        def run(tx: Transaction) -> JobRecord:
            before = tx.known.jobs.get(job_id) or _get(tx.settled(), job_id)
            if before is None:
                raise missing(tx.connection, job_id)
            return _apply(tx, before, decide(before))

        return await self._writer.write(run)

    async def claim(
        self, operations: Collection[str], now: float, limit: int, decide: Decide
    ) -> list[tuple[JobRecord, bytes]]:
        """Apply a decider to the jobs whose turn it is."""
        names = sorted(operations)

        def run(tx: Transaction) -> list[tuple[JobRecord, bytes]]:
            found: list[tuple[JobRecord, bytes]] = []
            for before in _due(tx, names, now):
                _apply(tx, before, decide(before))
            while len(found) < limit:
                turn = _next_in_turn(tx, names, now, limit - len(found))
                if not turn:
                    break
                after = [_apply(tx, before, decide(before)) for before in turn]
                running = [record for record in after if record.state is JobState.RUNNING]
                found += [(record, _known_request(tx, record.job_id)) for record in running]
            return found

        return await self._writer.write(run)

    async def forget(self, why: Why) -> Forgotten:
        """Forget jobs that have ended, in one short transaction."""
        return await self._writer.write(lambda tx: forget_slice(tx, why))

    async def forget_logs(self, before: float) -> bool:
        """Forget logs of workers that have gone, in one short transaction."""
        return await self._writer.write(lambda tx: forget_logs(tx, before))

    async def missing(self, log_id: str) -> RbeeError:
        """Return the error that tells why there is no such job or log."""
        return await self._read(lambda connection: missing(connection, log_id))

    async def get(self, job_id: str) -> JobRecord | None:
        """Return a job."""
        return await self._read(lambda connection: _get(connection, job_id))

    async def request(self, job_id: str) -> bytes | None:
        """Return a job's request, or None when it was erased."""

        return await self._read(lambda connection: _request(connection, job_id))

    async def find(self, query: JobFilter) -> list[JobRecord]:
        """Return jobs, newest first."""
        return await self._read(
            lambda connection: [_record(row) for row in select_jobs(connection, _NAMES, query)]
        )

    async def counts(self) -> dict[str, int]:
        """Return how many jobs are in each state."""

        def run(connection: sqlite3.Connection) -> dict[str, int]:
            return dict(connection.execute("SELECT state, jobs FROM counts").fetchall())

        return await self._read(run)

    async def standing(self, records: Sequence[JobRecord]) -> list[Standing]:
        """Return where jobs stand, in one look."""

        def run(connection: sqlite3.Connection) -> list[Standing]:
            found = []
            for record in records:
                head = _head(connection, record.job_id)
                position = _queue_position(connection, record) if record.state is JobState.QUEUED else None
                found.append(Standing(head.last_seq if head else 0, position))
            return found

        return await self._read(run)

    # Logs

    async def append(self, log_id: str, events: list[NewEvent]) -> bool:
        """Append to a log; false when the log has ended."""
        return await self._writer.write(lambda tx: _append(tx, log_id, events, is_end=False))

    async def ingest(self, batches: list[SourceBatch]) -> dict[str, int]:
        """Commit captured events together with the cursors of their files."""

        def run(tx: Transaction) -> dict[str, int]:
            return _ingest(tx, batches)

        return await self._writer.write(run)

    async def cursors(self, sources: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Return cursor and part of those sources that are known."""
        names = tuple(sources)
        sql = f"SELECT source, cursor, part FROM cursors WHERE source IN ({', '.join('?' * len(names))})"

        def run(connection: sqlite3.Connection) -> dict[str, tuple[int, int]]:
            return {source: (cursor, part) for source, cursor, part in connection.execute(sql, names)}

        return await self._read(run)

    async def read_log(self, log_id: str, after: int, limit: int) -> LogPage | None:
        """Return events with numbers above `after`."""

        def run(connection: sqlite3.Connection) -> LogPage | None:
            head = _head(connection, log_id)
            if head is None:
                return None
            if after >= head.last_seq:
                return LogPage(b"", after, head)
            return _page(connection, log_id, max(after + 1, head.first_seq), limit, head)

        return await self._read(run)

    # Workers

    async def put_worker(self, worker: WorkerRecord) -> None:
        """Keep what is known of a worker."""
        await self._writer.write(lambda tx: _put_worker(tx, worker))

    async def workers(self) -> list[WorkerRecord]:
        """Return all workers that have not been forgotten."""
        sql = "SELECT worker_id, hive_id, model, job_id, exit_line FROM workers"
        return await self._read(lambda connection: [WorkerRecord(*row) for row in connection.execute(sql)])

    async def forget_worker(self, worker_id: str) -> None:
        """Forget a worker whose end was told."""
        await self._writer.write(
            lambda tx: tx.execute("DELETE FROM workers WHERE worker_id = ?", (worker_id,)) and None
        )


def _disk(path: Path | None) -> str:
    """Say that the disk is full where it is: SQLite has other words for that when it opens a file."""
    with contextlib.suppress(OSError):
        if path is not None and shutil.disk_usage(path.parent).free < NEARLY_FULL_BYTES:
            return " (No space left on device)"
    return ""


def _make_private(path: Path) -> None:
    """Let nobody else read the file, nor those that SQLite makes beside it, which take its mode."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)


def _migrate(connection: sqlite3.Connection) -> None:
    """Apply the numbered migrations that the file does not have yet, each in one transaction.

    Raises:
        StartError: The file was written by a later version.
    """
    connection.create_function("frames_of_lines", 2, _frames_of_lines, deterministic=True)
    folder = resources.files("rbee.jobs") / "migrations"
    scripts = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".sql")), key=lambda e: e.name)
    for script in scripts:
        number = int(script.name[:4])
        if number > _version(connection):
            _migrate_to(connection, number, script.read_text("utf-8"))
    if _version(connection) > len(scripts):
        raise StartError(
            "The registry was written by a later version of rbee.", remedy="Update rbee, or use another RBEE_HOME."
        )


def _migrate_to(connection: sqlite3.Connection, number: int, sql: str) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        if number > _version(connection):  # else another process was quicker
            for statement in _statements(sql):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
        connection.execute("COMMIT")
    except sqlite3.Error:
        connection.rollback()
        raise


def _statements(sql: str) -> Iterator[str]:
    statement = ""
    for line in sql.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _frames_of_lines(body: bytes, last_seq: int) -> bytes:
    """Frame a row of the first form: events joined by newlines."""
    events = body.split(b"\n")
    return frames_of(events, last_seq - len(events) + 1)


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _store_id(connection: sqlite3.Connection) -> str:
    connection.execute("INSERT OR IGNORE INTO meta VALUES ('store_id', ?)", (new_boot_id(),))
    return str(connection.execute("SELECT value FROM meta WHERE key = 'store_id'").fetchone()[0])


def _row(record: JobRecord) -> tuple[Any, ...]:
    return tuple(
        [_stored(name, value) for name, value in zip(JOB_COLUMNS, msgspec.structs.astuple(record), strict=True)]
    )


def _stored(name: str, value: Any) -> Any:
    return encode_json(value) if name in _JSON and value is not None else value


def _record(row: tuple[Any, ...]) -> JobRecord:
    values = {
        name: msgspec.json.decode(value) if name in _JSON and value is not None else value
        for name, value in zip(JOB_COLUMNS, row, strict=True)
    }
    result = values.pop("result")
    record = msgspec.convert(values, JobRecord, strict=False)
    return msgspec.structs.replace(record, result=result)


def _get(connection: sqlite3.Connection, job_id: str) -> JobRecord | None:
    row = connection.execute(f"{_SELECT} WHERE job_id = ?", (job_id,)).fetchone()
    return _record(row) if row else None


def _request(connection: sqlite3.Connection, job_id: str) -> bytes | None:
    row = connection.execute("SELECT body FROM requests WHERE job_id = ?", (job_id,)).fetchone()
    return row[0] if row else None


def _by_key(tx: Transaction, record: JobRecord) -> JobRecord | None:
    if record.idempotency_key is None:
        return None
    made = tx.pending.made_by(record.principal, record.idempotency_key)
    if made is not None:
        existing = tx.known.jobs.get(made) or _get(tx.settled(), made)
    else:
        existing = _stored_by_key(tx, record)
    if existing is not None and existing.body_hash != record.body_hash:
        raise ConflictError(
            "This Idempotency-Key was used with another body.", remedy="Use a new key for a new request."
        )
    return existing


def _stored_by_key(tx: Transaction, record: JobRecord) -> JobRecord | None:
    row = tx.connection.execute(
        f"{_SELECT} WHERE principal = ? AND idempotency_key = ?", (record.principal, record.idempotency_key)
    ).fetchone()
    return _record(row) if row else None


def _apply(tx: Transaction, before: JobRecord, changed: Changed) -> JobRecord:
    """Write what became of a job; returns the record after."""
    after = changed.record
    names = _columns_changed(before, after)
    if names:
        values = [_stored(name, getattr(after, name)) for name in names]
        tx.pending.update(tx.connection, after.job_id, names, tuple(values))
    if after.is_ended:  # nobody changes it any more
        tx.known.jobs.pop(after.job_id, None)
    else:
        tx.known.jobs[after.job_id] = after
    if after.state is not before.state:
        tx.pending.move(before.state, after.state)
        if tx.known.queued is not None and before.state is JobState.QUEUED:
            tx.known.queued -= 1
    is_end = after.is_ended and not before.is_ended
    if changed.events:
        _append(tx, after.job_id, changed.events, is_end=is_end)
    if is_end:
        tx.committed[-1].ended = after
    if after.is_ended and not after.is_stored and (is_end or before.is_stored):
        _erase(tx, after.job_id)
    return after


def _due(tx: Transaction, operations: list[str], now: float) -> list[JobRecord]:
    """Return queued jobs that have a deadline which has passed."""
    first = "min(coalesce(queue_deadline_at, deadline_at), coalesce(deadline_at, queue_deadline_at))"
    marks = ", ".join("?" * len(operations))
    return _found(
        tx,
        "SELECT job_id FROM jobs INDEXED BY jobs_due WHERE state = 'queued' "
        f"AND coalesce(queue_deadline_at, deadline_at) IS NOT NULL AND {first} <= ? "
        f"AND operation IN ({marks}) LIMIT {DUE_MAX}",
        (now, *operations),
    )


def _next_in_turn(tx: Transaction, operations: list[str], now: float, limit: int) -> list[JobRecord]:
    marks = ", ".join("?" * len(operations))
    leased = _found(
        tx,
        f"SELECT job_id FROM jobs INDEXED BY jobs_leased WHERE lease_until <= ? AND operation IN ({marks}) "
        "ORDER BY lease_until LIMIT ?",
        (now, *operations, limit),
    )
    if leased:
        return leased
    each = [
        "SELECT * FROM (SELECT job_id, priority FROM jobs INDEXED BY jobs_waiting "
        f"WHERE state = 'queued' AND operation = ?{at} ORDER BY priority DESC, job_id LIMIT ?1)"
        for at, _ in enumerate(operations, 2)
    ]
    order = " ORDER BY priority DESC, job_id LIMIT ?1"
    return _found(tx, " UNION ALL ".join(each) + order, (limit, *operations))


def _found(tx: Transaction, sql: str, values: tuple[Any, ...]) -> list[JobRecord]:
    """Return the jobs whose ids a statement finds: in one row, for each costs two changes of threads."""
    (ids,) = tx.execute(f"SELECT json_group_array(job_id) FROM ({sql})", values).fetchone()
    records = [tx.known.jobs.get(job_id) or _get(tx.connection, job_id) for job_id in msgspec.json.decode(ids)]
    return [record for record in records if record is not None]


def _columns_changed(before: JobRecord, after: JobRecord) -> tuple[str, ...]:
    pairs = zip(JOB_COLUMNS, msgspec.structs.astuple(before), msgspec.structs.astuple(after), strict=True)
    return tuple([name for name, old, new in pairs if new is not old and new != old])


def _queued(tx: Transaction) -> int:
    if tx.known.queued is None:
        row = tx.execute("SELECT jobs FROM counts WHERE state = 'queued'").fetchone()
        tx.known.queued = int(row[0])
    return tx.known.queued


def _known_request(tx: Transaction, job_id: str) -> bytes:
    known = tx.known.requests.pop(job_id, None)
    return _request(tx.settled(), job_id) or b"" if known is None else known


def _erase(tx: Transaction, job_id: str) -> None:
    tx.has_erased = True
    tx.known.heads.pop(job_id, None)
    tx.known.requests.pop(job_id, None)
    tx.execute("DELETE FROM requests WHERE job_id = ?", (job_id,))
    tx.execute("DELETE FROM log_rows WHERE log_id = ?", (job_id,))
    tx.execute("UPDATE log_heads SET first_seq = last_seq + 1, size_bytes = 0 WHERE log_id = ?", (job_id,))


def _queue_position(connection: sqlite3.Connection, record: JobRecord) -> int:
    sql = (
        "SELECT count(*) FROM jobs INDEXED BY jobs_waiting WHERE state = 'queued' AND "
        "(priority > ?1 OR (priority = ?1 AND job_id < ?2))"
    )
    return int(connection.execute(sql, (record.priority, record.job_id)).fetchone()[0]) + 1


def _head(connection: sqlite3.Connection, log_id: str) -> LogHead | None:
    row = connection.execute(
        "SELECT first_seq, last_seq, size_bytes, is_ended FROM log_heads WHERE log_id = ?", (log_id,)
    ).fetchone()
    return LogHead(row[0], row[1], row[2], bool(row[3])) if row else None


def _known_head(tx: Transaction, log_id: str) -> LogHead | None:
    """Return a head as this transaction sees it, from memory where it was used lately, as all that waits was."""
    head = tx.known.heads.get(log_id) or _head(tx.connection, log_id)
    if head is not None:
        tx.known.heads[log_id] = head
    return head


def _append(tx: Transaction, log_id: str, events: Sequence[Part], *, is_end: bool) -> bool:
    """Number the events and write them as one row; false when the log has ended, or its job was forgotten."""
    head = _known_head(tx, log_id)
    if head is None and log_id.startswith("job-"):
        return False
    head = head or NEW_LOG
    if head.is_ended or not events:
        return not head.is_ended
    frames: list[bytes] = []
    for event in events:
        frames += event.frames(head.last_seq + 1 + len(frames))
    last_seq = head.last_seq + len(frames)
    body = b"".join(frames)
    first_seq, size = head.first_seq, head.size_bytes + len(body)
    if size > SYSTEM_LOG_BYTES_MAX and not log_id.startswith("job-"):
        first_seq, size = _forget_oldest(tx, log_id, first_seq, size)
    tx.known.heads[log_id] = LogHead(first_seq, last_seq, size, is_end)
    tx.pending.append(log_id, body, tx.known.heads[log_id])
    tx.committed.append(Committed(log_id, head.last_seq + 1, last_seq, body, is_end))
    return True


def _forget_oldest(tx: Transaction, log_id: str, first_seq: int, size: int) -> tuple[int, int]:
    """Drop the oldest rows of a worker's or hive's log until it fits again; returns first_seq and size."""
    rows = tx.execute(
        "SELECT last_seq, length(body) FROM log_rows WHERE log_id = ? ORDER BY last_seq", (log_id,)
    ).fetchall()
    for last_seq, length in rows:
        if size <= SYSTEM_LOG_BYTES_MAX * 3 // 4:
            break
        size, first_seq = size - length, last_seq + 1
    tx.execute("DELETE FROM log_rows WHERE log_id = ? AND last_seq < ?", (log_id, first_seq))
    return first_seq, size


def _page(connection: sqlite3.Connection, log_id: str, first_seq: int, limit: int, head: LogHead) -> LogPage:
    """Read from the event `first_seq` on, at most `limit`."""
    rows = connection.execute(
        "SELECT last_seq, body FROM log_rows WHERE log_id = ? AND last_seq >= ? ORDER BY last_seq",
        (log_id, first_seq),
    )
    found: list[bytes] = []
    size, last_seq, limit_seq = 0, first_seq - 1, first_seq - 1 + limit
    with contextlib.closing(rows):
        for last_seq, body in rows:
            found.append(body if found else frames_from(body, first_seq))
            size += len(body)
            if last_seq >= limit_seq or size >= PAGE_BYTES_MAX:
                break
    frames = b"".join(found)
    if last_seq > limit_seq:
        last_seq, frames = limit_seq, frames[: -len(frames_from(frames, limit_seq + 1))]
    return LogPage(frames, last_seq, head)


def _put_worker(tx: Transaction, worker: WorkerRecord) -> None:
    tx.execute("INSERT OR REPLACE INTO workers VALUES (?, ?, ?, ?, ?)", msgspec.structs.astuple(worker))
    # A worker that has said nothing yet has an empty log, not none.
    tx.execute("INSERT OR IGNORE INTO log_heads VALUES (?, 1, 0, 0, 0)", (worker.worker_id,))


def _ingest(tx: Transaction, batches: list[SourceBatch]) -> dict[str, int]:
    """Take those batches that begin at their cursors: one row for each log, whatever files its lines came from."""
    cursors: dict[str, int] = {}
    by_log: dict[str, list[Part]] = {}
    for batch in batches:
        cursor = cursors.get(batch.source)
        if cursor is None:
            row = tx.connection.execute("SELECT cursor FROM cursors WHERE source = ?", (batch.source,)).fetchone()
            cursor = cursors[batch.source] = row[0] if row is not None else batch.cursor
        if cursor != batch.cursor:
            continue
        cursors[batch.source] = batch.next_cursor
        for entry in batch.entries:
            _sort_in(tx, entry, by_log)
        for worker in batch.ended_workers:
            _put_worker(tx, worker)
        tx.connection.execute(
            "INSERT OR REPLACE INTO cursors VALUES (?, ?, ?)", (batch.source, batch.next_cursor, batch.next_part)
        )
    for log_id, parts in by_log.items():
        head = _known_head(tx, log_id)
        if head is not None and head.size_bytes >= JOB_LOG_BYTES_MAX and log_id.startswith("job-"):
            if _append(tx, log_id, [_lost(parts)], is_end=False):
                tx.committed[-1].is_full = True
        else:
            _append(tx, log_id, parts, is_end=False)
    return cursors


def _lost(parts: Sequence[Part]) -> NewEvent:
    """Tell of captured lines that a log is too full for."""
    runs = [part.lines if isinstance(part, CapturedRun) else [part.tail] for part in parts]
    return new_event(
        "gap",
        {
            "ts": time.time_ns(),
            "reason": "log_full",
            "lost_bytes": sum(len(line) for lines in runs for line in lines),
            "lost_lines": sum(map(len, runs)),
        },
    )


def _sort_in(tx: Transaction, entry: Entry | Run, by_log: dict[str, list[Part]]) -> None:
    """Put an entry where it belongs, or where else it may go when that log has ended."""
    is_open = entry.log_id in by_log or entry.otherwise is None or _is_open(tx, entry.log_id)
    if isinstance(entry, Run):
        if is_open:
            by_log.setdefault(entry.log_id, []).append(entry.lines)
        else:
            by_log.setdefault(entry.otherwise_log_id, []).extend(entry.otherwise(entry.lines))
    elif is_open or entry.otherwise is None:
        by_log.setdefault(entry.log_id, []).append(entry.event)
    else:
        log_id, event = entry.otherwise
        by_log.setdefault(log_id, []).append(event)


def _is_open(tx: Transaction, log_id: str) -> bool:
    head = _known_head(tx, log_id)
    return head is not None and not head.is_ended
