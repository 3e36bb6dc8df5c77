"""Reading a log while it grows: replay from the store, then live, without a gap or a repeat.

What is committed is kept for a while, once for all readers of its log, and each reader has its place in it. One
that fell behind what is kept reads the store until it has caught up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rbee.contracts.events import events_in, frames_from
from rbee.errors import GoneError, InvalidRequestError
from rbee.jobs.records import Committed, JobRecord, LogPage
from rbee.jobs.store import JobStore

T = TypeVar("T")

PAGE_EVENTS = 65_536  # more than the bytes of a page hold
RECENT_BYTES_MAX = 2 * 1024 * 1024
ALL_RECENT_BYTES_MAX = 32 * 1024 * 1024
TAKEN_BYTES_MAX = 256 * 1024


class _Recent:
    """What was committed to one log lately, who reads it, and the last number that is known of."""

    def __init__(self) -> None:
        self.last_seq = 0
        self.readers: dict[LogReader, None] = {}  # woken in the order in which they came
        self.batches: deque[Committed] = deque()
        self.size_bytes = 0

    def add(self, batch: Committed, limit_bytes: int) -> int:
        """Keep a batch within the limit; returns by how much the memory grew."""
        before = self.size_bytes
        if self.batches and self.batches[-1].last_seq + 1 != batch.first_seq:  # another process wrote in between
            self.batches.clear()
            self.size_bytes = 0
        self.last_seq = batch.last_seq
        self.batches.append(batch)
        self.size_bytes += len(batch.frames)
        self.trim(limit_bytes)
        return self.size_bytes - before

    def trim(self, limit_bytes: int) -> None:
        """Let go of the oldest; an end stays, for it may be on no disk any more."""
        while self.size_bytes > limit_bytes and not self.batches[0].is_end:
            self.size_bytes -= len(self.batches.popleft().frames)

    def behind(self, position: int) -> list[Committed]:
        """Return the next batches behind a position; none when they are not kept any more."""
        found: deque[Committed] = deque()
        for batch in reversed(self.batches):
            if batch.last_seq <= position:
                break
            found.appendleft(batch)
        return list(found) if found and found[0].first_seq <= position + 1 else []


class LogHub:
    """Hands what was committed to the readers of each log.

    Attributes:
        recent_bytes_max: How much of one log is kept in memory while somebody reads it.
        all_recent_bytes_max: How much of all logs together.
        on_full: Told of a job whose log takes nothing more of what was captured.
    """

    def __init__(self, store: JobStore) -> None:
        self.recent_bytes_max = RECENT_BYTES_MAX
        self.all_recent_bytes_max = ALL_RECENT_BYTES_MAX
        self.on_full: Callable[[str], None] = lambda log_id: None
        self._store = store
        self._readers: dict[str, _Recent] = {}
        self._recent_bytes = 0
        self._ends: dict[str, set[asyncio.Future[JobRecord]]] = {}
        self.is_closing = False

    def close(self) -> None:
        """Wake every reader, so that streams can say goodbye."""
        self.is_closing = True
        for recent in self._readers.values():
            for reader in recent.readers:
                reader.wake()

    @contextmanager
    def end_of(self, job_id: str) -> Iterator[asyncio.Future[JobRecord]]:
        """Give a future of the job as it has ended, if this process ends it."""
        future: asyncio.Future[JobRecord] = asyncio.get_running_loop().create_future()
        waiting = self._ends.setdefault(job_id, set())
        waiting.add(future)
        try:
            yield future
        finally:
            waiting.discard(future)
            if not waiting:
                self._ends.pop(job_id, None)

    def publish(self, committed: list[Committed]) -> None:
        """Hand events on that are on disk."""
        for batch in committed:
            if batch.ended is not None:
                for future in self._ends.get(batch.log_id, ()):
                    _resolve(future, batch.ended)
            if batch.is_full:
                self.on_full(batch.log_id)
            recent = self._readers.get(batch.log_id)
            if recent is None:
                continue
            self._recent_bytes += recent.add(batch, self.recent_bytes_max)
            if self._recent_bytes > self.all_recent_bytes_max:
                self._trim()
            for reader in recent.readers:
                reader.wake()

    def _trim(self) -> None:
        """Halve what is kept of the logs of which most is kept, until all is within its bound."""
        for recent in sorted(self._readers.values(), key=lambda recent: -recent.size_bytes):
            before = recent.size_bytes
            recent.trim(before // 2)
            self._recent_bytes += recent.size_bytes - before
            if self._recent_bytes <= self.all_recent_bytes_max:
                return

    async def reader(self, log_id: str, after: int = 0) -> LogReader:
        """Begin to read a log behind the number `after`; close the reader when done.

        Raises:
            NotFoundError: There is no such log.
            GoneError: The events behind `after` were forgotten.
            InvalidRequestError: The log does not reach to `after` yet.
        """
        recent = self._readers.setdefault(log_id, _Recent())
        reader = LogReader(self, log_id, after, recent)
        recent.readers[reader] = None
        try:
            page = await self.page(log_id, after)
            head = page.head
            if after > head.last_seq and not head.is_ended:
                raise InvalidRequestError(f"The log of {log_id} ends at {head.last_seq}; {after} is past it.")
            if after + 1 < head.first_seq:
                raise GoneError(f"The events of {log_id} before {head.first_seq} are no longer kept.")
            recent.last_seq = max(recent.last_seq, head.last_seq)
            reader.is_ended = head.is_ended and after >= head.last_seq
            reader.first = page
        except BaseException:
            reader.close()
            raise
        return reader

    def forget(self, reader: LogReader) -> None:
        """Stop handing events to a reader."""
        recent = self._readers.get(reader.log_id)
        if recent is not None:
            recent.readers.pop(reader, None)
            if not recent.readers:
                del self._readers[reader.log_id]
                self._recent_bytes -= recent.size_bytes

    async def page(self, log_id: str, after: int) -> LogPage:
        """Read the next events from the store."""
        page = await self._store.read_log(log_id, after, PAGE_EVENTS)
        if page is None:
            raise await self._store.missing(log_id)
        return page


class LogReader:
    """One reader of one log: its place in what is kept in memory, or in the store when it fell behind.

    Attributes:
        position: The number of the last event that was handed out.
        is_ended: All was handed out, and nothing more will come.
        first: The page that was read when the reading began, until it is handed out.
    """

    def __init__(self, hub: LogHub, log_id: str, after: int, recent: _Recent) -> None:
        self.log_id = log_id
        self.position = after
        self.is_ended = False
        self.first: LogPage | None = None
        self._hub = hub
        self._recent = recent
        self._waiter: asyncio.Future[bool] | None = None

    @property
    def is_closing(self) -> bool:
        """Tell whether the program is about to stop, so that nothing more will come."""
        return self._hub.is_closing

    def wake(self) -> None:
        """Have the reader look again."""
        if self._waiter is not None:
            _resolve(self._waiter, True)

    async def next(self, timeout_s: float) -> list[bytes]:
        """Wait for the next events, at most `timeout_s`; empty when there were none, or at the end."""
        return events_in(await self.next_frames(timeout_s))

    async def next_frames(self, timeout_s: float) -> bytes:
        """Wait for the next events as `next` does; returns them as frames of a stream."""
        while not (self.is_ended or self.is_closing):
            if frames := self.at_hand():
                return frames
            if self.position < self._recent.last_seq:
                if frames := self._take_page(await self._hub.page(self.log_id, self.position)):
                    return frames
            elif not await self._woken(timeout_s):  # another process may have written
                return self._take_page(await self._hub.page(self.log_id, self.position))
        return b""

    def at_hand(self) -> bytes:
        """Return the next frames that need not be waited for; nothing when there are none."""
        page, self.first = self.first, None
        return self._take_recent() or (self._take_page(page) if page is not None and page.frames else b"")

    async def _woken(self, timeout_s: float) -> bool:
        """Wait to be woken; false when nobody did in time."""
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_later(timeout_s, _resolve, self._waiter, False)
        try:
            return await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    def _take_recent(self) -> bytes:
        """Take what is next in memory, in portions; nothing when it is not there."""
        taken: list[bytes] = []
        taken_bytes = 0
        for batch in self._recent.behind(self.position):
            is_whole = batch.first_seq == self.position + 1
            taken.append(batch.frames if is_whole else frames_from(batch.frames, self.position + 1))
            self.position = batch.last_seq
            self.is_ended = batch.is_end
            taken_bytes += len(taken[-1])
            if taken_bytes >= TAKEN_BYTES_MAX:
                break
        return taken[0] if len(taken) == 1 else b"".join(taken)

    def _take_page(self, page: LogPage) -> bytes:
        if self.position + 1 < page.head.first_seq and not self._recent.behind(self.position):
            raise GoneError(f"The events of {self.log_id} before {page.head.first_seq} are no longer kept.")
        if not page.frames or self.position + 1 < page.head.first_seq:
            return b""
        self.position = page.last_seq
        self.is_ended = page.head.is_ended and self.position == page.head.last_seq
        return page.frames

    def close(self) -> None:
        """Stop reading."""
        self._hub.forget(self)


def _resolve(waiter: asyncio.Future[T], result: T) -> None:
    if not waiter.done():
        waiter.set_result(result)
