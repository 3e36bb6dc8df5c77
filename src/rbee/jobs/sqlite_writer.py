"""One writer thread for one SQLite file: many callers' writes share a transaction and one fsync."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import msgspec

from rbee.errors import ConflictError, RbeeError, StorageError, StorageFullError, UnavailableError
from rbee.jobs.checkpoints import IDLE_S, Checkpoints
from rbee.jobs.records import Committed, JobRecord, LogHead
from rbee.jobs.store import OnCommit, StoreClosedError

T = TypeVar("T")
Row = tuple[Any, ...]
JOB_COLUMNS = JobRecord.__struct_fields__
ROWS_TOGETHER = (64, 16, 4, 1)
BATCH_MAX = 512
REMEMBERED_MAX = 4096
_TAKEN = (sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY, sqlite3.SQLITE_CONSTRAINT_UNIQUE)


class TakenError(ConflictError):
    """There is a row of that name already."""


class Remembered:
    """What the file holds, as far as it was used lately; what is missing here has to be read."""

    def __init__(self) -> None:
        self.heads: dict[str, LogHead] = {}
        self.jobs: dict[str, JobRecord] = {}
        self.requests: dict[str, bytes] = {}
        self.queued: int | None = None

    def clear(self) -> None:
        """Forget all."""
        for known in (self.heads, self.jobs, self.requests):
            known.clear()
        self.queued = None

    def bound(self) -> None:
        """Forget what has become too much."""
        for known in (self.heads, self.jobs, self.requests):
            if len(known) > REMEMBERED_MAX:
                known.clear()


class Pending:
    """What a transaction writes at its end, many rows with each statement.

    A statement, and each row that one is run for, costs two changes of threads, which is more than its work.

    Attributes:
        changes: How often something was put here.
    """

    def __init__(self) -> None:
        self.changes = 0
        self._jobs: list[Row] = []
        self._by_key: dict[tuple[str, str], str] = {}
        self._updates: dict[tuple[str, ...], list[Row]] = {}
        self._updated: set[str] = set()
        self._requests: list[Row] = []
        self._rows: list[Row] = []
        self._heads: dict[str, LogHead] = {}
        self._counts: Counter[str] = Counter()

    def create(self, record: JobRecord, row: Row, request: bytes) -> None:
        """Add a job; `row` has its columns in order."""
        self.changes += 1
        self._jobs.append(row)
        self._requests.append((record.job_id, request))
        self._counts[record.state] += 1
        if record.idempotency_key is not None:
            self._by_key[record.principal, record.idempotency_key] = record.job_id

    def made_by(self, principal: str, key: str) -> str | None:
        """Return the id of the new job of an idempotency key."""
        return self._by_key.get((principal, key))

    def update(self, connection: sqlite3.Connection, job_id: str, names: tuple[str, ...], values: Row) -> None:
        """Change columns of a job; its earlier changes are written first."""
        self.changes += 1
        if job_id in self._updated:
            self.write(connection)
        self._updated.add(job_id)
        self._updates.setdefault(names, []).append((job_id, *values))

    def move(self, before: str, after: str) -> None:
        """Count a job in another state."""
        self._counts[before] -= 1
        self._counts[after] += 1

    def leave(self, state: str) -> None:
        """Count a job no more."""
        self.changes += 1
        self._counts[state] -= 1

    def append(self, log_id: str, body: bytes, head: LogHead) -> None:
        """Add a row to a log, which ends at `head` then."""
        self.changes += 1
        self._rows.append((log_id, head.last_seq, body))
        self._heads[log_id] = head

    def write(self, connection: sqlite3.Connection) -> None:
        """Write what waits."""
        if self._jobs:
            _write_rows(connection, f"INSERT INTO jobs ({', '.join(JOB_COLUMNS)}) VALUES", self._jobs)
        for names, values in self._updates.items():
            columns = ", ".join(f"{name} = new.column{at}" for at, name in enumerate(names, 2))
            end = ") AS new WHERE jobs.job_id = new.column1"
            _write_rows(connection, f"UPDATE jobs SET {columns} FROM (VALUES", values, end)
        if self._requests:
            _write_rows(connection, "INSERT INTO requests VALUES", self._requests)
        if self._rows:
            _write_rows(connection, "INSERT INTO log_rows VALUES", self._rows)
        if self._heads:
            heads = [(log_id, *msgspec.structs.astuple(head)) for log_id, head in self._heads.items()]
            _write_rows(connection, "INSERT OR REPLACE INTO log_heads VALUES", heads)
        for state, change in self._counts.items():
            if change:
                connection.execute("UPDATE counts SET jobs = jobs + ? WHERE state = ?", (change, state))
        self.clear()

    def clear(self) -> None:
        """Drop what waits."""
        for waiting in (
            self._jobs,
            self._by_key,
            self._updates,
            self._updated,
            self._requests,
            self._rows,
            self._heads,
            self._counts,
        ):
            waiting.clear()


def _write_rows(connection: sqlite3.Connection, begin: str, rows: list[Row], end: str = "") -> None:
    """Run a statement for rows, in few sizes, so that SQLite has seen each before."""
    at = 0
    while at < len(rows):
        count = next(size for size in ROWS_TOGETHER if at + size <= len(rows))
        values = [value for row in rows[at : at + count] for value in row]
        connection.execute(_statement(begin, len(rows[0]), count, end), values)
        at += count


@cache
def _statement(begin: str, width: int, count: int, end: str) -> str:
    row = f"({', '.join('?' * width)})"
    return f"{begin} {', '.join([row] * count)}{end}"


class Transaction:
    """The open transaction, as a write sees it.

    Attributes:
        connection: The file, without what waits for the commit.
        committed: What is to be published on commit.
        has_erased: Something was deleted that nobody may find in the file afterwards.
        erased_bytes: About how much is written only to erase, where that is much.
        known: Jobs, and where logs end, as this transaction sees them.
        pending: What is written at the end of the transaction, with what other writes put there.
    """

    def __init__(self, connection: sqlite3.Connection, known: Remembered, pending: Pending) -> None:
        self.connection = connection
        self.known = known
        self.pending = pending
        self.committed: list[Committed] = []
        self.has_erased = False
        self.erased_bytes = 0
        self._began = self._changes

    @property
    def _changes(self) -> tuple[int, int]:
        return self.connection.total_changes, self.pending.changes

    @property
    def has_changed(self) -> bool:
        """Tell whether this write has changed something."""
        return self._changes != self._began

    def execute(self, sql: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """Run one statement, behind all that waits."""
        return self.settled().execute(sql, values)

    def settled(self) -> sqlite3.Connection:
        """Return the file with all that waited."""
        is_unchanged = not self.has_changed
        self.pending.write(self.connection)
        if is_unchanged:  # what was written now were others' changes
            self._began = self._changes
        return self.connection


class _Write:
    __slots__ = ("erased_bytes", "error", "function", "future", "published", "result")

    def __init__(self, function: Callable[[Transaction], Any], future: asyncio.Future[Any]) -> None:
        self.function = function
        self.future = future
        self.result: Any = None
        self.error: BaseException | None = None
        self.published: list[Committed] = []
        self.erased_bytes = 0

    def fail(self, error: BaseException) -> None:
        """Take note that it was not made, whatever an earlier try of it came to."""
        self.error = error
        self.published = []

    def settle(self) -> None:
        """Tell whoever asked, unless they have gone."""
        if self.future.done():
            return
        if self.error is None:
            self.future.set_result(self.result)
        else:
            self.future.set_exception(self.error)


class SqliteWriter:
    """Runs writes one after the other in a thread of its own, as many to a commit as have come in meanwhile."""

    def __init__(
        self, connection: sqlite3.Connection, on_commit: OnCommit, checkpoints: Checkpoints | None = None
    ) -> None:
        self._connection = connection
        self._checkpoints = checkpoints
        self._known = Remembered()
        self._pending = Pending()
        self._version: int | None = None
        self._on_commit = on_commit
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="rbee-writer", daemon=True)
        self._is_closed = False
        self._has_erased = True  # by an earlier start, which may have been killed before it cleared up
        self._empty_wal()
        self._thread.start()

    async def write(self, function: Callable[[Transaction], T]) -> T:
        """Run `function` in a transaction; returns its result once that is on disk.

        An error it raises undoes what it did and nothing else.
        """
        if self._is_closed:
            raise StoreClosedError
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.put(_Write(function, future))
        return await future

    async def close(self) -> None:
        """Commit what was asked for, then end the thread and close the file."""
        if self._is_closed:
            return
        self._is_closed = True
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        if self._checkpoints is not None:
            await asyncio.to_thread(self._checkpoints.close)
        self._connection.close()

    def _work(self) -> None:
        is_last = False
        while not is_last:
            if self._has_erased and self._queue.empty():
                self._empty_wal()
            try:
                first = self._queue.get(timeout=self._idle_s())
            except queue.Empty:
                self._empty_wal()
                continue
            if first is None:
                return
            batch, is_last = self._gather(first)
            self._commit(batch)
            self._loop.call_soon_threadsafe(self._deliver, batch)
            self._care_for_wal(batch)

    def _gather(self, first: _Write) -> tuple[list[_Write], bool]:
        batch = [first]
        while len(batch) < BATCH_MAX:
            try:
                write = self._queue.get_nowait()
            except queue.Empty:
                break
            if write is None:
                return batch, True
            batch.append(write)
        return batch, False

    def _commit(self, batch: list[_Write]) -> None:
        """Make writes in one transaction; where that fails, each of them in one of its own."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:  # the file is in use, for each of them
            for write in batch:
                write.fail(translated(error))
            return
        try:
            self._transact(batch)
        except Exception as error:  # noqa: BLE001  # goes to whoever asked for it
            self._roll_back()
            if len(batch) > 1:
                for write in batch:
                    self._commit([write])
            else:
                batch[0].fail(translated(error) if isinstance(error, sqlite3.Error) else error)

    def _transact(self, batch: list[_Write]) -> None:
        connection = self._connection
        self._look_for_strangers()
        for write in batch:
            write.error = None
            transaction = Transaction(connection, self._known, self._pending)
            try:
                self._apply(write, transaction)
            except sqlite3.Error:
                raise
            except Exception as error:  # goes to whoever asked for this write
                if transaction.has_changed:
                    raise  # it has to be undone
                write.fail(error)
            if not connection.in_transaction:
                raise sqlite3.OperationalError("the transaction was rolled back")
        self._pending.write(connection)
        connection.execute("COMMIT")

    def _roll_back(self) -> None:
        self._known.clear()
        self._pending.clear()
        with contextlib.suppress(sqlite3.Error):  # there may be nothing left to roll back
            self._connection.execute("ROLLBACK")

    def _look_for_strangers(self) -> None:
        """Forget what is known by heart when another connection wrote to the file."""
        version = self._connection.execute("PRAGMA data_version").fetchone()[0]
        if version != self._version:
            self._version = version
            self._known.clear()

    def _apply(self, write: _Write, transaction: Transaction) -> None:
        write.result = write.function(transaction)
        write.published = transaction.committed
        write.erased_bytes = transaction.erased_bytes
        self._has_erased |= transaction.has_erased

    def _empty_wal(self) -> None:
        """Take what was written, and what was erased, out of the log of past writes too.

        Where that cannot be done now (it is in use, the disk is full), it is tried again after the next write.
        """
        if self._checkpoints is None or self._checkpoints.empty(self._connection):
            self._has_erased = False

    def _idle_s(self) -> float | None:
        """Return how long to wait for a write until the log of past ones is emptied; None when it is."""
        is_empty = self._checkpoints is None or self._checkpoints.is_log_empty
        return None if is_empty else IDLE_S

    def _care_for_wal(self, batch: list[_Write]) -> None:
        self._known.bound()
        if self._checkpoints is not None:
            size_bytes = sum(len(told.frames) for write in batch for told in write.published)
            size_bytes += sum(write.erased_bytes for write in batch)
            self._checkpoints.committed(self._connection, size_bytes)

    def _deliver(self, batch: list[_Write]) -> None:
        published = [committed for write in batch for committed in write.published]
        try:
            if published:
                self._on_commit(published)
        finally:
            for write in batch:
                write.settle()


def translated(error: sqlite3.Error) -> RbeeError:
    """Say in the house's words what SQLite refused."""
    code = getattr(error, "sqlite_errorcode", None)
    primary = code & 0xFF if isinstance(code, int) else None
    if code in _TAKEN:
        return TakenError(f"There is that already: {error}.")
    if primary == sqlite3.SQLITE_FULL:
        return StorageFullError(f"The registry cannot be written to: {error}.")
    if primary == sqlite3.SQLITE_IOERR:
        return StorageError(f"The registry cannot be read or written: {error}.")
    if primary == sqlite3.SQLITE_READONLY:
        return StorageError(
            f"The registry cannot be written to: {error}.", remedy="Make RBEE_HOME writable, then try again."
        )
    return UnavailableError(f"The registry cannot be used: {error}.")
