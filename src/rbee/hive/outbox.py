"""Carrying what captured files say to the queen: the files are the spool, her cursors the memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from pathlib import Path

from rbee.contracts.events import encode_json
from rbee.contracts.heartbeats import SourceHeader
from rbee.errors import RbeeError
from rbee.hive.batches import cut_off, stretch_bytes
from rbee.hive.queen_link import QueenLink, backoff_s
from rbee.hive.shown_line import shown_line
from rbee.narration import narrate
from rbee.processes import FileFollower, FileWatch

BATCH_BYTES_MAX = 1024 * 1024
SOURCE_BYTES_MAX = 64 * 1024
PIECE_BYTES_MAX = 4 * 1024 * 1024  # more than any batch
PIECE_BYTES_MIN = 4 * 1024
CAPTURE_BYTES_MAX = 256 * 1024 * 1024
LOOK_AGAIN_S = 5.0
LAST_LINES = 20


class Source:
    """One captured file on its way to the queen.

    Attributes:
        keep_from: Blocks behind this offset are not given back yet, because somebody here still reads them.
        last_lines: The last lines that were read, as everybody may see them, for a crash report.
        delivered: Set once its writer is dead and the queen has all of it.
        cursor: How much of it the queen has.
        goes_first: It is the hive's own file, the first of every batch.
        is_narration: Its lines are events; a worker's stderr has what its engine says, whatever it looks like.
    """

    def __init__(self, name: str, follower: FileFollower, *, goes_first: bool = False) -> None:
        self.name = name
        self.follower = follower
        self.goes_first = goes_first
        self.is_narration = not name.endswith("/stderr")
        self.keep_from: Callable[[], int] | None = None
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self.delivered = asyncio.Event()
        self.cursor = 0
        self.is_sealed = False
        self._forgotten: SourceHeader | None = None

    def seal(self) -> int:
        """Say that the writer is dead; returns the file's size."""
        self.is_sealed = True
        return self.follower.seal()

    def read(self) -> list[bytes]:
        """Return the next stretch with its header; empty when there is nothing new.

        What was given back already, to a queen that has an older memory now, is a stretch that is lost.
        """
        if self._forgotten is not None:
            header, self._forgotten = self._forgotten, None
            return [encode_json(header) + b"\n"]
        position = self.follower.position
        if lost_bytes := self.follower.skip_hole():
            return [encode_json(SourceHeader(source=self.name, offset=position, lost_bytes=lost_bytes)) + b"\n"]
        stretch = self.follower.read(SOURCE_BYTES_MAX)
        if not stretch.data:
            return []
        self._remember(stretch.data, is_cut=not self.follower.begins_line(stretch.offset))
        header = SourceHeader(source=self.name, offset=stretch.offset, bytes=len(stretch.data))
        return [encode_json(header) + b"\n", stretch.data]

    def _remember(self, data: bytes, *, is_cut: bool) -> None:
        """Keep the last lines; where the first is the rest of one, that may be of a piece of an answer."""
        if is_cut:
            data = data.partition(b"\n")[2]
        for line in data.rsplit(b"\n", LAST_LINES + 1)[-LAST_LINES - 1 :]:
            if shown := shown_line(line, is_narration=self.is_narration):
                self.last_lines.append(shown)

    def bound(self, max_bytes: int) -> None:
        """Throw away the oldest part of what no batch holds yet, where the file takes more than `max_bytes`."""
        known = self.cursor  # on a file system without holes, what was forgotten still takes its blocks
        if self._forgotten is not None:
            known = self._forgotten.offset + self._forgotten.lost_bytes
        taken = min(self.follower.allocated_bytes, self.follower.size - known)
        if taken <= max_bytes or self.keep_from is not None:
            return
        start = self.follower.position
        loss = self.follower.forget(start, min(start + taken - max_bytes * 7 // 8, self.follower.size))
        before = self._forgotten
        if loss.lost_bytes:
            self._forgotten = SourceHeader(
                source=self.name,
                offset=before.offset if before else start,
                lost_bytes=loss.lost_bytes + (before.lost_bytes if before else 0),
                lost_lines=loss.lost_lines + (before.lost_lines if before else 0),
            )

    def acknowledge(self, cursor: int) -> None:
        """Take the queen's cursor: give back what she has, go back to what she has not."""
        sent = self._forgotten.offset if self._forgotten is not None else self.follower.position
        if cursor < sent:
            self._forgotten = None
            self.follower.rewind(cursor)
        self.cursor = cursor
        limit = cursor if self.keep_from is None else min(cursor, self.keep_from())
        if limit == cursor and self._forgotten is None:
            self.follower.acknowledge(cursor)
        self.check_delivered()

    def check_delivered(self) -> None:
        """Take note when nothing more can come and all has arrived."""
        if self.is_sealed and self.cursor >= self.follower.size:
            self.delivered.set()


class Outbox:
    """Reads all sources and keeps one batch in flight. One task runs it."""

    def __init__(self, link: QueenLink, *, capture_bytes_max: int = CAPTURE_BYTES_MAX) -> None:
        """Take the way to the queen, and how much of a file may wait for her on disk."""
        self._link = link
        self._capture_bytes_max = capture_bytes_max
        self._watch = FileWatch()
        self._sources: dict[str, Source] = {}
        self._is_away = False
        self._piece_bytes = PIECE_BYTES_MAX
        self._moved = asyncio.Event()

    def add(self, name: str, path: Path, *, goes_first: bool = False) -> Source:
        """Carry a file from now on."""
        source = Source(name, FileFollower(path), goes_first=goes_first)
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

    async def flush(self, timeout_s: float) -> bool:
        """Wait until what was written so far has arrived; false when nothing moves for `timeout_s`.

        A queen that cannot be reached is not waited for.
        """
        wanted = {source: source.follower.size for source in self._sources.values()}
        self.wake()
        while any(source.cursor < size and source.name in self._sources for source, size in wanted.items()):
            if self._is_away:
                return False
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
        """Take of each source in turn at most 64 KiB or one line, again and again, up to a full batch."""
        batch: list[bytes] = []
        room = BATCH_BYTES_MAX - SOURCE_BYTES_MAX
        turn = self._in_turn()
        while turn and room >= 0:
            again: list[Source] = []
            for source in turn:
                if room < 0:
                    break
                source.bound(self._capture_bytes_max)
                part = source.read()
                source.check_delivered()
                if part:
                    self._sources[source.name] = self._sources.pop(source.name)  # next time others come before it
                    again.append(source)
                batch.extend(part)
                room -= sum(map(len, part))
            turn = again
        return batch

    def _in_turn(self) -> list[Source]:
        """Return the hive's own files, so that a cause stands before its effect, then who has waited longest.

        Those of its earlier starts come before that of this one.
        """
        return sorted(self._sources.values(), key=lambda source: (not source.goes_first, not source.is_sealed))

    async def _deliver(self, batch: list[bytes]) -> None:
        """Bring a batch to the queen, in pieces where the way to her does not carry it in one.

        Every failure halves what is sent at once, every success doubles it again.
        """
        attempt = 0
        cursors: dict[str, int] = {}
        rest = batch
        while rest:
            part, following = cut_off(rest, self._piece_bytes)
            try:
                cursors |= await self._link.events(part)
            except RbeeError as error:
                self._say_away(error)
                for source in self._sources.values():
                    source.bound(self._capture_bytes_max)
                self._piece_bytes = max(PIECE_BYTES_MIN, min(self._piece_bytes, stretch_bytes(part)) // 2)
                await asyncio.sleep(backoff_s(attempt))
                attempt += 1
            else:
                rest, attempt = following, 0
                self._piece_bytes = min(PIECE_BYTES_MAX, self._piece_bytes * 2)
                self._say_back()
        for name, cursor in cursors.items():
            if name in self._sources:
                self._sources[name].acknowledge(cursor)
        self._moved.set()

    def _say_back(self) -> None:
        self._moved.set()
        if self._is_away:
            self._is_away = False
            narrate("hive_queen_back", "The queen takes events again.")

    def _say_away(self, error: RbeeError) -> None:
        if not self._is_away:
            self._is_away = True
            self._moved.set()
            narrate("hive_queen_away", f"Events wait on disk: {error.message}", level="warning")
