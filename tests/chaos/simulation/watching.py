"""What inotify is to a hive, in memory: no run depends on how many files this machine lets anybody watch."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rbee.narration import FileSink
from rbee.processes import FileWatch


class Files:
    """The files of one machine that somebody watches."""

    def __init__(self) -> None:
        self._watches: dict[Path, dict[MemoryWatch, None]] = {}

    def watch(self) -> MemoryWatch:
        """Make a watch."""
        return MemoryWatch(self)

    def add(self, path: Path, watch: MemoryWatch) -> None:
        """Have a watch told of a file."""
        self._watches.setdefault(path, {})[watch] = None

    def remove(self, path: Path, watch: MemoryWatch) -> None:
        """Tell a watch no more."""
        self._watches.get(path, {}).pop(watch, None)

    def written(self, path: Path) -> None:
        """Tell that a file was written to."""
        for watch in self._watches.get(path, ()):
            watch.note(path)


class MemoryWatch(FileWatch):
    """See `FileWatch`, whose contract this keeps."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._added: dict[Path, None] = {}
        self._written: dict[Path, None] = {}
        self._woken = False
        self._waiter: asyncio.Future[None] | None = None

    def add(self, path: Path) -> None:
        """Watch a file that exists."""
        path.stat()
        self._added[path] = None
        self._files.add(path, self)

    def remove(self, path: Path) -> None:
        """Stop watching a file."""
        self._added.pop(path, None)
        self._files.remove(path, self)

    def note(self, path: Path) -> None:
        """Take note that a file was written to."""
        self._written[path] = None
        self._resolve()

    async def _readable(self, timeout_s: float) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait([self._waiter], timeout=timeout_s)
        finally:
            self._waiter = None

    def _drain(self) -> frozenset[Path]:
        written, self._written = self._written, {}
        return frozenset(written)

    def close(self) -> None:
        """Watch nothing any more."""
        for path in list(self._added):
            self.remove(path)


class WatchedSink(FileSink):
    """Writes to a file that somebody may watch."""

    def __init__(self, fd: int, path: Path, files: Files) -> None:
        super().__init__(fd)
        self._path = path
        self._files = files

    def write(self, line: bytes) -> bool:
        """Write one line."""
        is_whole = super().write(line)
        self._files.written(self._path)
        return is_whole
