"""Hold on to one process, and to nothing else, by a pidfd: wait for its end, signal it, adopt it."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import time

from msgspec import Struct

from rbee.processes.linux import require_linux
from rbee.processes.procfs import machine_boot_id, read_process

_TRACED_RETRY_S = 0.05


class ExitStatus(Struct, frozen=True):
    """How a process ended: with an exit code, by a signal (its name), or in a way nobody told us."""

    exit_code: int | None = None
    signal: str | None = None
    unknown: bool = False

    def describe(self) -> str:
        """Return it as the end of a sentence that begins with the process."""
        if self.unknown:
            return "ended in an unknown way (another process was told its exit code)"
        if self.signal is not None:
            return f"was ended by {self.signal}"
        return f"ended with exit code {self.exit_code}"


class Child:
    """One process, told apart by its number and start time from any later one of that number.

    Our own children have an exit code; an adopted process has an unknown one. Somebody must `wait` (or `poll`)
    for a child of ours in the end, or it stays a zombie for as long as we live. The pidfd is kept until `close`,
    also when the process has ended: its group may outlive it. For one event loop.
    """

    def __init__(self, pid: int, start_time: int, pidfd: int) -> None:
        """Take over `pidfd`, which refers to the process; use `spawn` or `adopt` to get a Child."""
        self.pid = pid
        self.start_time = start_time
        self.ended_ticks: int | None = None
        """When the end was seen, in the clock ticks of `start_time`."""
        self._status: ExitStatus | None = None
        self._pidfd = pidfd
        self._futures: list[asyncio.Future[ExitStatus]] = []

    @property
    def status(self) -> ExitStatus | None:
        """How the process ended, once that was seen by `wait` or `poll`."""
        return self._status

    def poll(self) -> ExitStatus | None:
        """Return how the process ended, or None while it lives. Does not wait."""
        if self._status is None and self._pidfd >= 0:
            poller = select.poll()
            poller.register(self._pidfd, select.POLLIN)
            if poller.poll(0):
                self._reap()
        return self._status

    async def wait(self) -> ExitStatus:
        """Wait for the process to end and return how. Any number of tasks may wait; cancelling one is fine."""
        return await self.exit_future()

    def exit_future(self) -> asyncio.Future[ExitStatus]:
        """Return a future of its own for the end of the process; cancel it when it is no longer wanted."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ExitStatus] = loop.create_future()
        if status := self.poll():
            future.set_result(status)
            return future
        if self._pidfd < 0:
            raise RuntimeError(f"The handle of process {self.pid} was closed.")
        self._futures.append(future)
        future.add_done_callback(self._drop)
        if len(self._futures) == 1:
            loop.add_reader(self._pidfd, self._on_exit)
        return future

    def _drop(self, future: asyncio.Future[ExitStatus]) -> None:
        if future in self._futures:
            self._futures.remove(future)
            if not self._futures and self._pidfd >= 0:
                future.get_loop().remove_reader(self._pidfd)

    def _on_exit(self) -> None:
        loop = self._futures[0].get_loop()
        loop.remove_reader(self._pidfd)
        if not self._reap():
            loop.call_later(_TRACED_RETRY_S, self._watch_again, loop)

    def _watch_again(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._futures and self._pidfd >= 0:
            loop.add_reader(self._pidfd, self._on_exit)

    def _reap(self) -> bool:
        """Take the exit status of a process that ended; False when a tracer has to take it first."""
        ended_ticks = boot_ticks()
        try:
            result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:  # not our child, or somebody else took its status
            status = ExitStatus(unknown=True)
        else:
            if result is None:
                return False
            status = _exit_status(result)
        self._status, self.ended_ticks = status, ended_ticks
        futures, self._futures = self._futures, []
        for future in futures:
            if not future.done():
                future.set_result(status)
        return True

    def send_signal(self, number: int) -> bool:
        """Send a signal to this very process; False when it has ended.

        Raises:
            PermissionError: It runs as another user.
        """
        if self._pidfd < 0 or self._status is not None:
            return False
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return False
        return True

    def held(self) -> int | None:
        """Return a pidfd of the process for somebody else to close; None when this one was closed."""
        return os.dup(self._pidfd) if self._pidfd >= 0 else None

    def close(self) -> None:
        """Let go of the process, which goes on; waits for it are cancelled. A second call does nothing."""
        if self._futures and self._pidfd >= 0:
            self._futures[0].get_loop().remove_reader(self._pidfd)
        futures, self._futures = self._futures, []
        for future in futures:
            future.cancel()
        self._close_pidfd()

    def __del__(self) -> None:
        """Close the pidfd of a child that was forgotten."""
        self._close_pidfd()

    def _close_pidfd(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def boot_ticks() -> int:
    """Return the time of now in the unit of a process's start time: clock ticks since the machine started."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def _exit_status(result: os.waitid_result) -> ExitStatus:
    if result.si_code == os.CLD_EXITED:
        return ExitStatus(exit_code=result.si_status)
    try:
        return ExitStatus(signal=signal.Signals(result.si_status).name)
    except ValueError:  # a real-time signal between the two that have names
        return ExitStatus(signal=f"SIG{result.si_status}")


def adopt(pid: int, start_time: int, *, boot_id: str | None = None) -> Child | None:
    """Hold on to a process that somebody else started; None when it is not there any more.

    Args:
        pid: Its number.
        start_time: Its start time, as `Child.start_time` gave it.
        boot_id: What `machine_boot_id()` said when that was noted; start times of another boot never match.
    """
    require_linux()
    if boot_id is not None and boot_id != machine_boot_id():
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    # Compared after the pidfd was opened: had the number passed on in between, the time would differ.
    entry = read_process(pid)
    if entry is None or entry.is_gone or entry.start_time != start_time:
        os.close(pidfd)
        return None
    return Child(pid, start_time, pidfd)
