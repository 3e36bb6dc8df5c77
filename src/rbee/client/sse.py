"""An incremental parser of server-sent events: bytes in any pieces, whole events out.

Source: the HTML standard, "Server-sent events" (parsing and interpreting an event stream).
"""

from __future__ import annotations

from typing import NamedTuple

from rbee.errors import InternalError

MAX_EVENT_BYTES = 8 * 1024 * 1024

_BOM = b"\xef\xbb\xbf"
_LF = 0x0A
_CR = 0x0D


class SseEvent(NamedTuple):
    """One event: the last id seen, its name (`message` when it has none), its data without the last newline."""

    id: str
    event: str
    data: bytes


class SseParser:
    """Turns the bytes of one response into events.

    An event counts once its blank line has come; what a broken connection leaves half-said is never handed
    out. Make a new parser for each response.

    Bounds: an unfinished event, its unfinished line included, is at most `max_event_bytes`.
    """

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self.retry_ms: int | None = None
        self._max_event_bytes = max_event_bytes
        self._open_line: list[bytes] = []
        self._open_bytes = 0
        self._after_cr = False
        self._at_start = True
        self._id = ""
        self._event = ""
        self._data: list[bytes] = []
        self._data_bytes = 0

    def feed(self, chunk: bytes) -> list[SseEvent]:
        """Take the next bytes, return the events they complete.

        Raises:
            InternalError: An event is larger than the bound.
        """
        if self._after_cr and chunk:
            self._after_cr = False
            if chunk[0] == _LF:
                chunk = chunk[1:]
        if not chunk:
            return []
        if b"\n" in chunk or b"\r" in chunk:
            events = self._lines(chunk)
        else:
            self._open_line.append(chunk)
            self._open_bytes += len(chunk)
            events = []
        if self._open_bytes + self._data_bytes > self._max_event_bytes:
            raise InternalError(f"The stream holds an event of more than {self._max_event_bytes} bytes.")
        return events

    def _lines(self, chunk: bytes) -> list[SseEvent]:
        """Read the lines that `chunk` completes; keep what follows its last line end."""
        if self._open_line:
            self._open_line.append(chunk)
            chunk = b"".join(self._open_line)
        lines = chunk.splitlines()
        last = chunk[-1]
        self._after_cr = last == _CR
        self._open_line = [] if last in (_LF, _CR) else [lines.pop()]
        self._open_bytes = len(self._open_line[0]) if self._open_line else 0
        if self._at_start and lines:
            self._at_start = False
            lines[0] = lines[0].removeprefix(_BOM)
        events: list[SseEvent] = []
        for line in lines:
            if line:
                self._field(line)
            else:
                self._dispatch(events)
        return events

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if value[:1] == b" ":
            value = value[1:]
        if name == b"data":
            self._data.append(value)
            self._data_bytes += len(value) + 1
        elif name == b"id":
            if b"\0" not in value:
                self._id = value.decode("utf-8", "replace")
        elif name == b"event":
            self._event = value.decode("utf-8", "replace")
        elif name == b"retry" and value.isdigit() and len(value) < 10:
            self.retry_ms = int(value)

    def _dispatch(self, events: list[SseEvent]) -> None:
        if self._data:
            events.append(SseEvent(self._id, self._event or "message", b"\n".join(self._data)))
            self._data = []
            self._data_bytes = 0
        self._event = ""
