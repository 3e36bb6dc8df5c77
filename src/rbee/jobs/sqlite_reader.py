"""One reading thread for one SQLite file: an executor's overhead would be three times what a small read costs."""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from rbee.jobs.sqlite_writer import translated
from rbee.jobs.store import StoreClosedError

T = TypeVar("T")


class _Question:
    __slots__ = ("answer", "error", "function", "future")

    def __init__(self, function: Callable[[sqlite3.Connection], Any], future: asyncio.Future[Any]) -> None:
        self.function = function
        self.future = future
        self.answer: Any = None
        self.error: BaseException | None = None

    def run(self, connection: sqlite3.Connection) -> None:
        """Find the answer, in the file as it is at one moment."""
        try:
            connection.execute("BEGIN")
            try:
                self.answer = self.function(connection)
            finally:
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            self.error = translated(error)
        except Exception as error:  # noqa: BLE001  # goes to whoever asked
            self.error = error

    def settle(self) -> None:
        """Tell whoever asked, unless they have gone."""
        if self.future.done():
            return
        if self.error is None:
            self.future.set_result(self.answer)
        else:
            self.future.set_exception(self.error)


class SqliteReader:
    """Runs reads one after the other in a thread of its own."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="rbee-reader", daemon=True)
        self._thread.start()

    async def read(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Run `function` on the file as it is now."""
        if self._is_closed:
            raise StoreClosedError
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.put(_Question(function, future))
        return await future

    async def close(self) -> None:
        """Answer what was asked, then end the thread and close the file."""
        self._is_closed = True
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        self._connection.close()

    def _work(self) -> None:
        while (question := self._queue.get()) is not None:
            question.run(self._connection)
            self._loop.call_soon_threadsafe(question.settle)
