"""Carrying what captured files say to the queen: the files are the spool, her cursors the memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from pathlib import Path

from rbee.contracts.events import TOKEN_PREFIX, encode_json
from rbee.contracts.heartbeats import SourceHeader
from rbee.errors import RbeeError
from rbee.hive.queen_link import QueenLink, backoff_s
from rbee.narration import narrate
from rbee.processes import FileFollower, FileWatch

BATCH_BYTES_MAX = 1024 * 1024
SOURCE_BYTES_MAX = 64 * 1024
LOOK_AGAIN_S = 5.0
LAST_LINES = 20


class Source:
    """One captured file on its way to the queen.

    Attributes:
        keep_from: Blocks behind this offset are not given back yet, because somebody here still reads them.
        last_lines: The last lines that were read and are no pieces of an answer, for a crash report.
        delivered: Set once its writer is dead and the queen has all of it.
    """

    def __init__(self, name: str, follower: FileFollower) -> None:
        self.name = name
        self.follower = follower
        self.keep_from: Callable[[], int] | None = None
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self.delivered = asyncio.Event()
        self.cursor = 0
        self.is_sealed = False

    def seal(self) -> int:
        """Say that the writer is dead; returns the file's size."""
        self.is_sealed = True
        return self.follower.seal()

    def read(self) -> list[bytes]:
        """Return the next stretch with its header; empty when there is nothing new."""
        self.follower.skip_hole()
        stretch = self.follower.read(SOURCE_BYTES_MAX)
        if not stretch.data:
            return []
        self._remember(stretch.data)
        header = SourceHeader(source=self.name, offset=stretch.offset, bytes=len(stretch.data))
        return [encode_json(header) + b"\n", stretch.data]

    def _remember(self, data: bytes) -> None:
        for line in data.rsplit(b"\n", LAST_LINES + 1)[-LAST_LINES - 1 :]:
            if line.strip() and not line.startswith(TOKEN_PREFIX):
                self.last_lines.append(line[:2000].decode("utf-8", "replace"))

    def acknowledge(self, cursor: int) -> None:
        """Take the queen's cursor: give back what she has, go back to what she has not."""
        if cursor < self.follower.position:
            self.follower.rewind(cursor)
        self.cursor = cursor
        limit = cursor if self.keep_from is None else min(cursor, self.keep_from())
        if limit == cursor:
            self.follower.acknowledge(cursor, part=self.follower.part)
        self.check_delivered()

    def check_delivered(self) -> None:
        """Take note when nothing more can come and all has arrived."""
        if self.is_sealed and self.cursor >= self.follower.size:
            self.delivered.set()


class Outbox:
    """Reads all sources and keeps one batch in flight. One task runs it."""

    def __init__(self, link: QueenLink) -> None:
        self._link = link
        self._watch = FileWatch()
        self._sources: dict[str, Source] = {}
        self._is_away = False
        self._moved = asyncio.Event()

    def add(self, name: str, path: Path) -> Source:
        """Carry a file from now on; the hive's own file is added first and so goes first in each batch."""
        source = Source(name, FileFollower(path))
        self._sources[name] = source
        self._watch.add(path)
        self._watch.wake()
        return source

    def remove(self, source: Source) -> None:
        """Carry a file no longer."""
        self._sources.pop(source.name, None)
        self._watch.remove(source.follower.path)
        source.follower.close()

    def wake(self) -> None:
        """Look at all files again now."""
        self._watch.wake()

    async def run(self) -> None:
        """Carry until cancelled."""
        while True:
            batch = self._collect()
            if batch:
                await self._deliver(batch)
            else:
                await self._watch.wait(LOOK_AGAIN_S)

    async def flush(self, timeout_s: float, *sources: Source) -> bool:
        """Wait until what was written so far has arrived; false when nothing moved for `timeout_s`.

        Args:
            timeout_s: How long nothing may move.
            sources: Of which files; all by default.
        """
        wanted = {source: source.follower.size for source in sources or tuple(self._sources.values())}
        self.wake()
        while any(source.cursor < size and source.name in self._sources for source, size in wanted.items()):
            self._moved.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._moved.wait()
            except TimeoutError:
                return False
        return True

    def close(self) -> None:
        """Close all files."""
        for source in list(self._sources.values()):
            self.remove(source)
        self._watch.close()

    def _collect(self) -> list[bytes]:
        """Take of each source in turn at most 64 KiB or one line, up to a full batch."""
        batch: list[bytes] = []
        size = 0
        for source in list(self._sources.values()):
            if size >= BATCH_BYTES_MAX:
                break
            part = source.read()
            batch.extend(part)
            size += sum(len(piece) for piece in part)
            source.check_delivered()
        return batch

    async def _deliver(self, batch: list[bytes]) -> None:
        attempt = 0
        while True:
            try:
                cursors = await self._link.events(batch)
                break
            except RbeeError as error:
                self._say_away(error)
                await asyncio.sleep(backoff_s(attempt))
                attempt += 1
        if self._is_away:
            self._is_away = False
            narrate("hive_queen_back", "The queen takes events again.")
        for name, cursor in cursors.items():
            source = self._sources.get(name)
            if source is not None:
                source.acknowledge(cursor)
        self._moved.set()

    def _say_away(self, error: RbeeError) -> None:
        if not self._is_away:
            self._is_away = True
            narrate("hive_queen_away", f"Events wait on disk: {error.message}", level="warning")
