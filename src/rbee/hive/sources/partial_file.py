"""A model file while it is being written: its bytes, its digest so far, and the room it needs."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, ParamSpec, Self, TypeVar

import msgspec

from rbee.errors import DownloadFailedError
from rbee.hive.sources.part import PART_FILE, Part, read_part, write_part
from rbee.processes import machine_boot_id

P = ParamSpec("P")
T = TypeVar("T")

CHUNK_BYTES = 1024 * 1024
KEPT_CHUNK_BYTES = 8 * 1024 * 1024
SPARE_BYTES = 64 * 1024 * 1024

_FULL = {errno.ENOSPC, errno.EDQUOT}


MakeRoom = Callable[[int], Awaitable[None]]
"""Called with the size that a model will have, before it is written."""


async def _has_room(size_bytes: int) -> None:
    """Take no notice: nothing limits what models may use."""


class PartialFile:
    """Writes one file front to back, in threads, and knows its SHA-256 at the end.

    Use as an async context manager: leaving it closes the file. It is the caller who removes it, and who puts what
    a disk refuses (OSError) into words. A source begins with `take_up` or with `restart`.

    Attributes:
        path: The file.
        ref: The model's reference.
        work_directory: An empty directory in the same file system, for whatever a source needs beside the file.
        models_directory: Where models are kept, for the sentences of errors.
        size_bytes: What was written so far.
        part: What it is a part of, where a later download may go on with it.
    """

    def __init__(
        self,
        path: Path,
        ref: str,
        *,
        work_directory: Path,
        models_directory: Path,
        make_room: MakeRoom = _has_room,
    ) -> None:
        self.path = path
        self.ref = ref
        self.work_directory = work_directory
        self.models_directory = models_directory
        self.size_bytes = 0
        self.part: Part | None = None
        self._make_room = make_room
        self._hash = hashlib.sha256()
        self._file: BinaryIO | None = None

    async def __aenter__(self) -> Self:
        """Open the file, with what an earlier download left in it."""
        self._file = await finish_in_thread(self._open)
        return self

    def _open(self) -> BinaryIO:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return open(descriptor, "r+b", buffering=0)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        if self._file is not None:
            await finish_in_thread(self._file.close)

    async def take_up(self, part: Part, progress: Callable[[int, int | None], None]) -> None:
        """Say what the file will be, and go on with what is there of it; anything else there is thrown away.

        What is there is read once more for its digest, in threads, telling `progress`.
        """
        kept = await finish_in_thread(read_part, self._part_path)
        part = msgspec.structs.replace(part, machine_boot_id=machine_boot_id())
        size = await finish_in_thread(self._opened().seek, 0, os.SEEK_END)
        is_part = kept is not None and part.can_go_on(kept) and size <= (part.size_bytes or size)
        if kept is None or not is_part:
            await self.restart()
            await self._note(part)
            return
        self.part = kept
        self._opened().seek(0)
        while self.size_bytes < size and await finish_in_thread(self._read_kept):
            progress(self.size_bytes, part.size_bytes)

    async def note_etag(self, etag: str | None) -> None:
        """Write down the server's word for the version that is being written."""
        if self.part is not None and self.part.etag != etag:
            await self._note(msgspec.structs.replace(self.part, etag=etag))

    async def _note(self, part: Part) -> None:
        await finish_in_thread(write_part, self._part_path, part)
        self.part = part

    @property
    def _part_path(self) -> Path:
        return self.path.with_name(PART_FILE)

    @property
    def is_worth_keeping(self) -> bool:
        """Tell whether a later download can go on with what is there."""
        return read_part(self._part_path) is not None and self.path.stat().st_size > 0

    async def reserve(self, size_bytes: int, beside_bytes: int = 0) -> None:
        """See that there is room for a model of `size_bytes`, and for what is needed beside it meanwhile.

        Raises:
            DownloadFailedError: There is none; the message names the numbers.
        """
        await self._make_room(size_bytes)
        needed = size_bytes - self.size_bytes + beside_bytes
        free = shutil.disk_usage(self.path.parent).free
        if needed + SPARE_BYTES > free:
            raise DownloadFailedError(
                f"There is no space for the model: it needs {needed:,} bytes and {SPARE_BYTES:,} to spare, "
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

    def _read_kept(self) -> bool:
        data = self._opened().read(KEPT_CHUNK_BYTES)
        self._hash.update(data)
        self.size_bytes += len(data)
        return bool(data)

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
