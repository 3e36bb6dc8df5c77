"""Live only as long as somebody else does: a thread that asks for a lock which a live owner holds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from rbee.processes.locks import is_held

_JOIN_S = 5.0


class Lease:
    """Decides when a lease is over: the lock was free for longer than `lease_s` without a break."""

    def __init__(self, lease_s: float) -> None:
        """Take the length of the lease in seconds."""
        self.lease_s = lease_s
        self._missed_at_s: float | None = None

    def is_lost(self, *, held: bool, now_s: float) -> bool:
        """Take one answer and tell whether the lease is over, counted from the first poll that missed the lock."""
        if held:
            self._missed_at_s = None
            return False
        if self._missed_at_s is None:
            self._missed_at_s = now_s
        return now_s - self._missed_at_s > self.lease_s


class LeaseThread:
    """Calls `on_lost` once, from a daemon thread of its own, when the owner of a lock has been gone too long.

    A thread of its own, so that neither a long computation nor a blocked event loop keeps a process alive that
    nobody owns. A lock that cannot be asked about counts as missed.
    """

    def __init__(self, path: Path, lease_s: float, on_lost: Callable[[], None], poll_s: float = 1.0) -> None:
        """Take the lock's file, the lease and the time between two questions in seconds; `start` begins."""
        self._path = path
        self._lease = Lease(lease_s)
        self._on_lost = on_lost
        self._poll_s = poll_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rbee-lease", daemon=True)

    def start(self) -> None:
        """Begin to ask; once."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more, and wait for the thread unless this is called from `on_lost`."""
        self._stopped.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=_JOIN_S)

    def _run(self) -> None:
        while not self._stopped.is_set():
            if self._lease.is_lost(held=self._ask(), now_s=time.monotonic()):
                self._on_lost()
                return
            self._stopped.wait(self._poll_s)

    def _ask(self) -> bool:
        try:
            return is_held(self._path)
        except OSError:
            return False
