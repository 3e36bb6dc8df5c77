"""A model file while it is being written: its bytes, its digest so far, and the room it needs."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, ParamSpec, Self, TypeVar

from rbee.errors import DownloadFailedError

P = ParamSpec("P")
T = TypeVar("T")

CHUNK_BYTES = 1024 * 1024
SPARE_BYTES = 64 * 1024 * 1024

_FULL = {errno.ENOSPC, errno.EDQUOT}


class PartialFile:
    """Writes one file front to back, in threads, and knows its SHA-256 at the end.

    Use as an async context manager: leaving it closes the file. It is the caller who removes it, and who puts what
    a disk refuses (OSError) into words.

    Attributes:
        path: The file.
        work_directory: An empty directory in the same file system, for whatever a source needs beside the file.
        models_directory: Where models are kept, for the sentences of errors.
        size_bytes: What was written so far.
    """

    def __init__(self, path: Path, work_directory: Path, models_directory: Path) -> None:
        self.path = path
        self.work_directory = work_directory
        self.models_directory = models_directory
        self.size_bytes = 0
        self._hash = hashlib.sha256()
        self._file: BinaryIO | None = None

    async def __aenter__(self) -> Self:
        """Create the file."""
        self._file = await finish_in_thread(self.path.open, "xb", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        if self._file is not None:
            await finish_in_thread(self._file.close)

    def reserve(self, size_bytes: int) -> None:
        """Check that the disk has room for `size_bytes` more.

        Raises:
            DownloadFailedError: It has not; the message names both numbers.
        """
        free = shutil.disk_usage(self.path.parent).free
        if size_bytes + SPARE_BYTES > free:
            raise DownloadFailedError(
                f"There is no space for the model: it needs {size_bytes:,} bytes and {SPARE_BYTES:,} to spare, "
                f"and {free:,} are free in {self.models_directory}.",
                remedy=_FREE_SPACE,
            )

    async def append(self, data: bytes) -> None:
        """Write `data` behind what is there."""
        await finish_in_thread(self._write, data)

    async def restart(self) -> None:
        """Throw away what was written, to begin again."""
        await finish_in_thread(self._truncate)

    async def finish(self) -> str:
        """Bring everything to the disk and return the SHA-256 of the whole file, in hexadecimal."""
        await finish_in_thread(os.fsync, self._opened().fileno())
        return self._hash.hexdigest()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = self._opened().write(view) or 0
            self._hash.update(view[:written])
            self.size_bytes += written
            view = view[written:]

    def _truncate(self) -> None:
        file = self._opened()
        file.seek(0)
        file.truncate()
        self.size_bytes = 0
        self._hash = hashlib.sha256()

    def _opened(self) -> BinaryIO:
        if self._file is None:
            raise RuntimeError("a PartialFile is written inside its `async with` block")
        return self._file


_FREE_SPACE = "Free space on that disk, or name another directory for models with RBEE_MODELS, then try again."


@contextmanager
def translated_disk_errors(directory: Path) -> Iterator[None]:
    """Turn what the disk of `directory` refuses into a DownloadFailedError that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DownloadFailedError(
                f"There is no space left on the disk of {directory}.", remedy=_FREE_SPACE
            ) from error
        raise DownloadFailedError(
            f"{error.filename or directory} cannot be written: {error.strerror or error}.",
            remedy="See that RBEE_MODELS names a directory you may write to.",
        ) from error


async def finish_in_thread(step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run one short blocking step in a thread, and see its end even when cancelled meanwhile.

    Cancellation: waits for the step, then is passed on, so that nothing is closed or removed under a running step.
    """
    running = asyncio.get_running_loop().run_in_executor(None, partial(step, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            try:
                await asyncio.wait([running])
            except asyncio.CancelledError:
                continue
        if not running.cancelled():
            running.exception()  # looked at, so that it is not reported as forgotten
        raise
