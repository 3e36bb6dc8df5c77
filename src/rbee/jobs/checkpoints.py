"""Keeping SQLite's write-ahead log short without holding writes up.

A thread with a connection of its own copies what was committed into the file while writes go on. As they are
always a little ahead, the log would never begin anew; so the writer copies the small rest, between two commits.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable

CHECKPOINT_BYTES = 4 * 1024 * 1024
COMMIT_BYTES = 16 * 1024
BUSY_MS = 10_000
IDLE_S = 2.0
"""How long nothing may be written until the log is emptied."""


class Checkpoints:
    """The thread, and how much was committed since it last ran. The writer's thread calls all methods.

    Args:
        connect: Opens another connection to the file.
    """

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connection = connect()
        self._pending_bytes = 0
        self._is_wanted = threading.Event()
        self._is_done = threading.Event()
        self._is_asked = False
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="rbee-checkpoints", daemon=True)
        self._thread.start()

    @property
    def is_log_empty(self) -> bool:
        """Tell whether nothing was committed since the log was emptied."""
        return self._pending_bytes < 0

    def committed(self, connection: sqlite3.Connection, size_bytes: int) -> None:
        """Take note of a commit of the writer, about so large; have copied what is due."""
        self._pending_bytes = max(0, self._pending_bytes) + COMMIT_BYTES + size_bytes
        if self._is_done.is_set():
            self._is_done.clear()
            self._is_asked = False
            self._pending_bytes = 0
            _checkpoint(connection, "PASSIVE")  # the rest: with it the next commit begins the log anew
        elif self._pending_bytes >= CHECKPOINT_BYTES and not self._is_asked:
            self._is_asked = True
            self._is_wanted.set()

    def empty(self, connection: sqlite3.Connection) -> bool:
        """Empty the log; false when somebody reads it just now."""
        connection.execute("PRAGMA busy_timeout=0")  # whoever reads it may read for long
        is_empty = _checkpoint(connection, "TRUNCATE")
        connection.execute(f"PRAGMA busy_timeout={BUSY_MS}")
        self._pending_bytes = -1 if is_empty else max(0, self._pending_bytes)
        return is_empty

    def close(self) -> None:
        """End the thread."""
        self._is_closed = True
        self._is_wanted.set()
        self._thread.join()
        self._connection.close()

    def _work(self) -> None:
        while True:
            self._is_wanted.wait()
            self._is_wanted.clear()
            if self._is_closed:  # said before it was wanted the last time
                return
            _checkpoint(self._connection, "PASSIVE")
            self._is_done.set()


def _checkpoint(connection: sqlite3.Connection, mode: str) -> bool:
    """Copy what can be copied; false when not all could. A full disk is told by the next write."""
    with contextlib.suppress(sqlite3.Error):
        is_busy, _, _ = connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
        return not is_busy
    return False
