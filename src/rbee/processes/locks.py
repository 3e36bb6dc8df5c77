"""Say by a file that one process alone is at work: a lock that ends with its holder, however that ends."""

from __future__ import annotations

import asyncio
import errno
import os
import struct
import sys
from pathlib import Path

from rbee.processes.linux import require_linux

if sys.platform == "linux":
    import fcntl

# Locks of the open file, not of the process: closing another descriptor of the same file loses nothing.
_F_OFD_GETLK = 36
_F_OFD_SETLK = 37
_FLOCK = struct.Struct("hhqqi4x")
_POLL_S = 0.05


class FileLock:
    """A write lock on a whole file. The file stays when the lock goes; never remove it."""

    def __init__(self, path: Path) -> None:
        """Name the file; it is made (0600) when the lock is first asked for."""
        require_linux()
        self.path = path
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        """Tell whether this object holds the lock."""
        return self._fd is not None

    def acquire(self) -> bool:
        """Take the lock if it is free, and tell whether it is ours now. Does not wait.

        Raises:
            OSError: The file cannot be opened, or its file system has no locks.
        """
        if self._fd is not None:
            return True
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.fcntl(fd, _F_OFD_SETLK, _whole_file(fcntl.F_WRLCK))
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        self._fd = fd
        return True

    async def acquire_blocking(self, timeout_s: float) -> bool:
        """Take the lock as soon as it is free; tell whether that was within `timeout_s`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while not self.acquire():
            left_s = deadline - loop.time()
            if left_s <= 0:
                return False
            await asyncio.sleep(min(_POLL_S, left_s))
        return True

    def release(self) -> None:
        """Give the lock back. Not holding it is fine."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def is_held(path: Path) -> bool:
    """Tell whether somebody holds the write lock on a file, without ever taking it; False without the file.

    Raises:
        OSError: The file is there but cannot be asked about.
    """
    require_linux()
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        answer = fcntl.fcntl(fd, _F_OFD_GETLK, _whole_file(fcntl.F_WRLCK))
    finally:
        os.close(fd)
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def _whole_file(kind: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0)
