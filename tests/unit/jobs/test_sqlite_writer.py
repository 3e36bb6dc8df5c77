"""The writer thread: one transaction for many writes, each of them alone with its errors."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from rbee.errors import ConflictError, StorageError, StorageFullError, UnavailableError
from rbee.jobs.records import Committed
from rbee.jobs.sqlite_writer import SqliteWriter, Transaction, translated


class Book:
    """A file with one table, its writer, and what was published."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute("CREATE TABLE t (n INTEGER PRIMARY KEY DEFERRABLE INITIALLY DEFERRED)")
        self.connection.execute("PRAGMA foreign_keys=ON")
        self.connection.execute("CREATE TABLE child (n REFERENCES t(n) DEFERRABLE INITIALLY DEFERRED)")
        self.published: list[str] = []
        self.transactions: list[str] = []
        self.connection.set_trace_callback(self.transactions.append)
        self.writer = SqliteWriter(self.connection, self.publish)

    def publish(self, committed: list[Committed]) -> None:
        self.published += [batch.log_id for batch in committed]

    def put(self, number: int, then: Callable[[], Any] = lambda: None) -> Callable[[Transaction], int]:
        def run(tx: Transaction) -> int:
            tx.execute("INSERT INTO t VALUES (?)", (number,))
            tx.committed.append(Committed(str(number), 1, 0, b"", False))
            then()
            return number

        return run

    async def blocked(self) -> Callable[[], None]:
        """Hold the writer up, so that what is asked for next shares one transaction; returns what frees it."""
        is_held, go_on = threading.Event(), threading.Event()

        def hold(tx: Transaction) -> None:
            is_held.set()
            assert go_on.wait(20)

        asyncio.get_running_loop().create_task(self.writer.write(hold))
        await asyncio.to_thread(is_held.wait)
        self.transactions.clear()
        return go_on.set

    def numbers(self) -> list[int]:
        return [row[0] for row in self.connection.execute("SELECT n FROM t ORDER BY n")]


@pytest.fixture
async def book(tmp_path: Path) -> AsyncIterator[Book]:
    made = Book(tmp_path / "book.db")
    yield made
    await made.writer.close()


def fail(error: Exception) -> Callable[[], Any]:
    def raise_it() -> None:
        raise error

    return raise_it


async def together(book: Book, *writes: Callable[[Transaction], Any]) -> list[Any]:
    free = await book.blocked()
    asked = [asyncio.ensure_future(book.writer.write(write)) for write in writes]
    await asyncio.sleep(0)  # they are in the queue now
    free()
    return await asyncio.gather(*asked, return_exceptions=True)


async def test_writes_that_come_together_share_one_commit(book: Book) -> None:
    assert await together(book, *(book.put(number) for number in range(50))) == list(range(50))
    assert [sql for sql in book.transactions if sql in {"COMMIT", "BEGIN IMMEDIATE"}] == [
        *("COMMIT", "BEGIN IMMEDIATE", "COMMIT")  # the first is that of the write they waited for
    ]


async def test_error_of_one_write_undoes_that_write_alone(book: Book) -> None:
    results = await together(
        book,
        book.put(1),
        book.put(2, fail(ConflictError("no"))),
        book.put(3, fail(ZeroDivisionError())),
        book.put(4, lambda: book.connection.execute("nonsense")),
        book.put(5),
    )
    assert [type(result) for result in results] == [int, ConflictError, ZeroDivisionError, UnavailableError, int]
    assert book.numbers() == [1, 5]
    assert book.published == ["1", "5"]


async def test_write_that_fails_the_commit_fails_alone_and_publishes_nothing(book: Book) -> None:
    orphan = book.put(2, lambda: book.connection.execute("INSERT INTO child VALUES (99)"))
    results = await together(book, book.put(1), orphan, book.put(3, fail(ConflictError())), book.put(4))
    assert [type(result) for result in results] == [int, UnavailableError, ConflictError, int]
    assert "FOREIGN KEY" in str(results[1])
    assert book.published == ["1", "4"]
    assert book.numbers() == [1, 4]


async def test_transaction_that_sqlite_itself_rolled_back_fails_who_was_in_it_alone(book: Book) -> None:
    results = await together(
        book, book.put(1), book.put(2, lambda: book.connection.execute("ROLLBACK")), book.put(3)
    )
    assert [type(result) for result in results] == [int, UnavailableError, int]
    assert book.published == ["1", "3"]
    assert book.numbers() == [1, 3]


async def test_write_that_builds_on_one_that_fails_publishes_nothing(book: Book) -> None:
    """At first both are made; when the first one fails the commit, the second one finds nothing to build on."""
    orphan = book.put(1, lambda: book.connection.execute("INSERT INTO child VALUES (99)"))

    def build(tx: Transaction) -> None:
        if tx.execute("SELECT n FROM t").fetchone() is None:
            raise ConflictError("There is nothing to build on.")
        tx.committed.append(Committed("built", 1, 1, b"", False))

    results = await together(book, orphan, build)
    assert [type(result) for result in results] == [UnavailableError, ConflictError]
    assert book.published == []


async def test_writes_that_come_together_wait_together_for_a_file_that_is_in_use(
    book: Book, tmp_path: Path
) -> None:
    is_waiting = threading.Event()

    def trace(statement: str) -> None:
        book.transactions.append(statement)
        is_waiting.set()

    with contextlib.closing(sqlite3.connect(tmp_path / "book.db", isolation_level=None)) as stranger:
        stranger.execute("BEGIN IMMEDIATE")
        book.connection.execute("PRAGMA busy_timeout=500")
        book.connection.set_trace_callback(trace)
        book.transactions.clear()
        first = asyncio.ensure_future(book.writer.write(book.put(0)))
        await asyncio.to_thread(is_waiting.wait)
        results = await asyncio.gather(
            first, *(book.writer.write(book.put(number)) for number in range(1, 20)), return_exceptions=True
        )
        stranger.execute("COMMIT")
    assert [type(result) for result in results] == [UnavailableError] * 20
    assert book.transactions == ["BEGIN IMMEDIATE"] * 2  # that of the first, and one for all that came meanwhile
    assert await book.writer.write(book.put(99)) == 99
    assert book.numbers() == [99]


async def test_publication_follows_the_order_of_asking_and_precedes_the_answer(book: Book) -> None:
    async def write(number: int) -> None:
        await book.writer.write(book.put(number))
        assert str(number) in book.published

    await asyncio.gather(*(write(number) for number in range(2000)))
    assert book.published == [str(number) for number in range(2000)]


async def test_waiter_that_was_cancelled_has_its_write_done_all_the_same(book: Book) -> None:
    free = await book.blocked()
    asked = [asyncio.ensure_future(book.writer.write(book.put(number))) for number in range(3)]
    await asyncio.sleep(0)
    asked[1].cancel()
    free()
    assert await asked[0] == 0
    assert await asked[2] == 2
    assert asked[1].cancelled()
    assert book.numbers() == [0, 1, 2]
    assert book.published == ["0", "1", "2"]


async def test_close_commits_what_was_asked_for_and_refuses_what_comes_after(tmp_path: Path) -> None:
    book = Book(tmp_path / "closing.db")
    free = await book.blocked()
    asked = [asyncio.ensure_future(book.writer.write(book.put(number))) for number in range(3)]
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(book.writer.close())
    await asyncio.sleep(0)
    with pytest.raises(UnavailableError, match="closed"):
        await book.writer.write(book.put(9))
    free()
    await closing
    assert await asyncio.gather(*asked) == [0, 1, 2]
    await book.writer.close()


async def test_listener_that_fails_does_not_leave_the_writers_waiting(
    book: Book, caplog: pytest.LogCaptureFixture
) -> None:
    book.writer._on_commit = lambda committed: fail(ZeroDivisionError())()
    assert await asyncio.wait_for(book.writer.write(book.put(1)), 20) == 1
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("code", "expected", "status", "remedy"),
    [
        (sqlite3.SQLITE_FULL, StorageFullError, 507, "Free space on the disk"),
        (
            sqlite3.SQLITE_IOERR_WRITE,
            StorageError,
            507,
            "See whether the disk that holds RBEE_HOME is full, read-only or failing",
        ),
        (sqlite3.SQLITE_READONLY_DBMOVED, StorageError, 507, "Make RBEE_HOME writable"),
        (sqlite3.SQLITE_BUSY, UnavailableError, 503, "Try again in a moment"),
        (None, UnavailableError, 503, "Try again in a moment"),
    ],
)
def test_errors_of_sqlite_are_told_as_ours_with_what_to_do(
    code: int | None, expected: type[Exception], status: int, remedy: str
) -> None:
    error = sqlite3.OperationalError("why")
    if code is not None:
        error.sqlite_errorcode = code
    told = translated(error)
    assert (type(told), told.status, told.retryable) == (expected, status, True)
    assert "why" in told.message
    assert told.remedy.startswith(remedy)
