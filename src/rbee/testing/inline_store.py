"""The SQLite store without threads: its very transactions, made in the event loop a moment after the asking."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rbee.jobs import sqlite_store
from rbee.jobs.checkpoints import Checkpoints
from rbee.jobs.sqlite_reader import SqliteReader, _Question
from rbee.jobs.sqlite_store import SqliteStore
from rbee.jobs.sqlite_writer import BATCH_MAX, Pending, Remembered, SqliteWriter, Transaction, _Write
from rbee.jobs.store import OnCommit, StoreClosedError
from rbee.testing.virtual_process import Process, current, replaced

T = TypeVar("T")
COMMIT_S = (0.0001, 0.004)


class InlineWriter(SqliteWriter):
    """Stands in for the writer's thread: commits, and a step later tells; a process may be killed in between."""

    def __init__(
        self, connection: sqlite3.Connection, on_commit: OnCommit, checkpoints: Checkpoints | None = None
    ) -> None:
        self._connection = connection
        if checkpoints is not None:
            checkpoints.close()
        self._checkpoints = None  # they have a thread of their own, and change nothing that can be read
        self._known = Remembered()
        self._pending = Pending()
        self._version = None
        self._on_commit = on_commit
        self._loop = asyncio.get_running_loop()
        self._asked: deque[_Write] = deque()
        self._is_at_work = False
        self._is_closed = False
        self._has_erased = False

    async def write(self, function: Callable[[Transaction], T]) -> T:
        """See `SqliteWriter.write`."""
        if self._is_closed:
            raise StoreClosedError
        future: asyncio.Future[T] = self._loop.create_future()
        self._asked.append(_Write(function, future))
        self._begin()
        return await future

    def _begin(self) -> None:
        if self._asked and not self._is_at_work:
            self._is_at_work = True
            process = current()
            delay_s = process.chance.uniform(*COMMIT_S) if process else COMMIT_S[0]
            self._loop.call_later(delay_s, self._turn)

    def _turn(self) -> None:
        batch = [self._asked.popleft() for _ in range(min(BATCH_MAX, len(self._asked)))]
        self._commit(batch)
        self._is_at_work = False
        self._loop.call_soon(self._deliver, batch)
        self._begin()

    async def close(self) -> None:
        """See `SqliteWriter.close`."""
        if not self._is_closed:
            self._is_closed = True
            while self._asked or self._is_at_work:  # noqa: ASYNC110  # on virtual time it costs nothing
                await asyncio.sleep(COMMIT_S[1])
            self._connection.close()


class InlineReader(SqliteReader):
    """Stands in for the reader's thread: answers a step later."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._is_closed = False

    async def read(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """See `SqliteReader.read`."""
        if self._is_closed:
            raise StoreClosedError
        future: asyncio.Future[T] = self._loop.create_future()
        question = _Question(function, future)

        def answer() -> None:
            question.run(self._connection)
            question.settle()

        self._loop.call_soon(answer)
        return await future

    async def close(self) -> None:
        """See `SqliteReader.close`."""
        self._is_closed = True
        self._connection.close()


@contextlib.contextmanager
def inline_stores() -> Iterator[None]:
    """Let stores that are opened in the `with` block have no threads."""
    with (
        replaced(sqlite_store, "SqliteWriter", InlineWriter),
        replaced(sqlite_store, "SqliteReader", InlineReader),
    ):
        yield


def open_store(process: Process, path: Path, kind: type[SqliteStore] = SqliteStore) -> SqliteStore:
    """Open a store that loses what was not committed when its process is killed."""
    store = kind(path)

    def die() -> None:
        assert store._reader is not None
        for connection in (_connection_of(store), store._reader._connection):
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    process.on_death.append(die)
    return store


def _connection_of(store: SqliteStore) -> Any:
    return store._writer._connection
