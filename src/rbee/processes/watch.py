"""Wait until one of many files was written to: inotify, without a dependency."""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from pathlib import Path
from types import TracebackType

from rbee.errors import ConfigurationError
from rbee.processes.linux import checked, libc, require_linux

_IN_MODIFY = 0x0002
_IN_IGNORED = 0x8000
_IN_Q_OVERFLOW = 0x4000
_EVENT = struct.Struct("iIII")
_READ_BYTES = 64 * 1024


class FileWatch:
    """Tells when watched files were written to. One task waits; every file is looked at by that task.

    The kernel keeps what happened until it is asked, so nothing that is written between a look at a file and
    the next `wait` is missed. Add a file first, then look at it, then wait.
    """

    def __init__(self) -> None:
        """Open one inotify instance.

        Raises:
            ConfigurationError: This is not Linux, or the user has used up what the kernel allows.
        """
        require_linux()
        self._paths: dict[int, Path] = {}
        self._woken = False
        self._waiter: asyncio.Future[None] | None = None
        try:
            self._fd = checked(libc().inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as error:
            raise _used_up(error, "fs.inotify.max_user_instances") from error

    def add(self, path: Path) -> None:
        """Watch a file that exists.

        Raises:
            OSError: The file cannot be watched (FileNotFoundError when it is missing).
            ConfigurationError: The user has used up the watches the kernel allows.
        """
        try:
            watch = checked(libc().inotify_add_watch(self._fd, os.fsencode(path), _IN_MODIFY), str(path))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise _used_up(error, "fs.inotify.max_user_watches") from error
            raise
        self._paths[watch] = path

    def remove(self, path: Path) -> None:
        """Stop watching a file; one that is not watched, or is gone, is fine."""
        for watch in [watch for watch, watched in self._paths.items() if watched == path]:
            del self._paths[watch]
            libc().inotify_rm_watch(self._fd, watch)  # fails only where the file went first

    def wake(self) -> None:
        """Make the wait of now, or the next one, return at once. Call it on the loop's thread."""
        self._woken = True
        self._resolve()

    async def wait(self, timeout_s: float) -> frozenset[Path]:
        """Wait until a watched file was written to and return which; nothing after `timeout_s` or `wake`.

        When the kernel's queue ran over, every watched file counts as written to. Other tasks run at least
        once during each call.
        """
        if self._waiter is not None:
            raise RuntimeError("FileWatch.wait() is for one task at a time.")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        await asyncio.sleep(0)
        while not (changed := self._drain()) and not self._woken:
            left_s = deadline - loop.time()
            if left_s <= 0:
                break
            await self._readable(left_s)
        self._woken = False
        return changed

    async def _readable(self, timeout_s: float) -> None:
        """Wait for the kernel's queue; its reader is armed only meanwhile, so a busy file costs no wake-ups."""
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        loop.add_reader(self._fd, self._resolve)
        try:
            await asyncio.wait([self._waiter], timeout=timeout_s)
        finally:
            loop.remove_reader(self._fd)
            self._waiter = None

    def _resolve(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _drain(self) -> frozenset[Path]:
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return frozenset()
        return frozenset(self._changed(data))

    def _changed(self, data: bytes) -> set[Path]:
        changed: set[Path] = set()
        position = 0
        while position < len(data):
            watch, mask, _, name_bytes = _EVENT.unpack_from(data, position)
            position += _EVENT.size + name_bytes
            if mask & _IN_Q_OVERFLOW:
                changed.update(self._paths.values())
            elif mask & _IN_IGNORED:
                self._paths.pop(watch, None)
            elif watch in self._paths:
                changed.add(self._paths[watch])
        return changed

    def close(self) -> None:
        """Give the inotify instance back. A second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._paths.clear()

    def __enter__(self) -> FileWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _used_up(error: OSError, setting: str) -> ConfigurationError:
    return ConfigurationError(
        f"The kernel gives this user nothing more to watch files with: {error.strerror}.",
        remedy=f"Raise {setting} with sysctl, or end other programs that watch files.",
    )
