"""Reading a log while it grows: replay from the store, then live, without a gap or a repeat."""

from __future__ import annotations

import asyncio
from collections import deque

from rbee.errors import GoneError, InvalidRequestError, NotFoundError
from rbee.jobs.records import Committed, LogPage
from rbee.jobs.store import JobStore

PAGE_EVENTS = 500
QUEUE_BYTES_MAX = 1024 * 1024
EVENT_OVERHEAD_BYTES = 64


class LogHub:
    """Hands what was committed to the readers of each log."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._readers: dict[str, set[LogReader]] = {}
        self.is_closing = False

    def close(self) -> None:
        """Wake every reader, so that streams can say goodbye."""
        self.is_closing = True
        for readers in self._readers.values():
            for reader in readers:
                reader._changed.set()

    def publish(self, committed: list[Committed]) -> None:
        """Hand events on that are on disk."""
        for batch in committed:
            for reader in self._readers.get(batch.log_id, ()):
                reader._offer(batch)

    async def reader(self, log_id: str, after: int = 0) -> LogReader:
        """Begin to read a log behind the number `after`; close the reader when done.

        Raises:
            NotFoundError: There is no such log.
            GoneError: The events behind `after` were forgotten.
            InvalidRequestError: The log does not reach to `after` yet.
        """
        reader = LogReader(self, log_id, after)
        self._readers.setdefault(log_id, set()).add(reader)
        try:
            head = await self._store.head(log_id)
            if head is None:
                raise NotFoundError(f"There is no log of {log_id}.")
            if after > head.last_seq and not head.is_ended:
                raise InvalidRequestError(f"The log of {log_id} ends at {head.last_seq}; {after} is past it.")
            if after + 1 < head.first_seq:
                raise GoneError(f"The events of {log_id} before {head.first_seq} are no longer kept.")
            reader.is_ended = head.is_ended and after >= head.last_seq
        except BaseException:
            reader.close()
            raise
        return reader

    def forget(self, reader: LogReader) -> None:
        """Stop handing events to a reader."""
        readers = self._readers.get(reader.log_id)
        if readers is not None:
            readers.discard(reader)
            if not readers:
                del self._readers[reader.log_id]

    async def page(self, log_id: str, after: int) -> LogPage:
        """Read the next events from the store."""
        page = await self._store.read_log(log_id, after, PAGE_EVENTS)
        if page is None:
            raise NotFoundError(f"There is no log of {log_id}.")
        return page


class LogReader:
    """One reader of one log; keeps a bounded queue of live events, and reads the store when it fell behind."""

    def __init__(self, hub: LogHub, log_id: str, after: int) -> None:
        self.log_id = log_id
        self.position = after
        self.is_ended = False
        self._hub = hub
        self._live: deque[Committed] = deque()
        self._live_bytes = 0
        self._changed = asyncio.Event()
        self._is_caught_up = False
        self._has_overflowed = False

    @property
    def is_closing(self) -> bool:
        """Tell whether the program is about to stop, so that nothing more will come."""
        return self._hub.is_closing

    def _offer(self, batch: Committed) -> None:
        self._live.append(batch)
        self._live_bytes += _size(batch)
        if self._live_bytes > QUEUE_BYTES_MAX and not batch.is_end:
            self._live.clear()
            self._live_bytes = 0
            self._is_caught_up = False
            self._has_overflowed = True
        self._changed.set()

    async def next(self, timeout_s: float) -> list[bytes]:
        """Wait for the next events, at most `timeout_s`; empty when there were none, or at the end."""
        while not self.is_ended and not self.is_closing:
            found = self._take_live() if self._is_caught_up else await self._take_stored()
            if found or self.is_ended:
                return found
            if self._live or not self._is_caught_up or self.is_closing:
                continue
            self._changed.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
            except TimeoutError:
                return []
        return []

    def _take_live(self) -> list[bytes]:
        while self._live:
            batch = self._live[0]
            if batch.first_seq > self.position + 1:
                self._is_caught_up = False
                return []
            self._live.popleft()
            self._live_bytes -= _size(batch)
            self.is_ended = batch.is_end
            fresh = batch.events[self.position + 1 - batch.first_seq :]
            if fresh:
                self.position = batch.last_seq
                return fresh
        return []

    async def _take_stored(self) -> list[bytes]:
        self._has_overflowed = False
        page = await self._hub.page(self.log_id, self.position)
        if self.position + 1 < page.head.first_seq and not self._has_next_live():
            raise GoneError(f"The events of {self.log_id} before {page.head.first_seq} are no longer kept.")
        if page.events and self.position + 1 >= page.head.first_seq:
            self.position += len(page.events)
            self.is_ended = page.head.is_ended and self.position == page.head.last_seq
            return page.events
        self._is_caught_up = not self._has_overflowed  # what overflowed meanwhile is in the store by now
        return []

    def _has_next_live(self) -> bool:
        """Tell whether what is next came live: of a log that is erased at its end, only that is left."""
        return bool(self._live) and self._live[0].first_seq <= self.position + 1

    def close(self) -> None:
        """Stop reading."""
        self._hub.forget(self)


def _size(batch: Committed) -> int:
    return sum(map(len, batch.events)) + EVENT_OVERHEAD_BYTES * len(batch.events)
