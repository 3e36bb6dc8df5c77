"""An incremental parser of server-sent events: bytes in any pieces, whole events out.

Source: the HTML standard, "Server-sent events" (parsing and interpreting an event stream).
"""

from __future__ import annotations

import re
from functools import partial
from typing import NamedTuple

from rbee.errors import InternalError

MAX_EVENT_BYTES = 8 * 1024 * 1024
TAIL_BYTES_MAX = 64 * 1024

_BOM = b"\xef\xbb\xbf"
# The frames that rbee's servers send, each whole: what is not of this form is read line by line.
_FRAME = re.compile(rb"id: ([0-9]+)\nevent: ([a-z]+)\ndata: (.*)\n\n")
_LF = 0x0A
_CR = 0x0D


class SseEvent(NamedTuple):
    """One event: the last id seen, its name (`message` when it has none), its data without the last newline."""

    id: str
    event: str
    data: bytes


_event_of = partial(tuple.__new__, SseEvent)


class SseParser:
    """Turns the bytes of one response into events.

    An event counts once its blank line has come; what a broken connection leaves half-said is never handed
    out. Make a new parser for each response.

    Bounds: an unfinished event, its unfinished line included, is at most `max_event_bytes`.
    """

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self.retry_ms: int | None = None
        self._max_event_bytes = max_event_bytes
        self._tail = b""
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
        if b"\r" in chunk or not self._is_between:
            data, self._tail = self._tail + chunk, b""
            return self._read(data)
        data = self._tail + chunk
        end = data.rfind(b"\n\n") + 2
        events = [] if end < 2 else self._frames(data[:end]) or self._read(data[:end])
        self._tail = data[end:] if end > 1 else data
        if len(self._tail) >= min(TAIL_BYTES_MAX, self._max_event_bytes // 2):
            data, self._tail = self._tail, b""
            events += self._read(data)
        return events

    @property
    def _is_between(self) -> bool:
        """Tell whether no line was begun, so that the next bytes (behind the tail) may be whole frames."""
        return not (self._open_line or self._data or self._event or self._after_cr)

    def _frames(self, data: bytes) -> list[SseEvent]:
        """Read whole frames at once; nothing when there is anything else among them."""
        parts = _FRAME.split(data)
        if self._at_start or any(parts[::4]):
            return []
        ids = [number.decode("ascii") for number in parts[1::4]]
        names = [name.decode("ascii") for name in parts[2::4]]
        self._id = ids[-1]
        return list(map(_event_of, zip(ids, names, parts[3::4], strict=True)))

    def _read(self, chunk: bytes) -> list[SseEvent]:
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
