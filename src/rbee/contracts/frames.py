"""Cut an engine's event stream into whole frames, however the bytes come in.

Source: the event stream format of the HTML standard (section 9.2); lines may end in LF or CRLF.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rbee.errors import WorkerError

# The Responses API repeats the whole answer in its last frames.
MAX_FRAME_BYTES = 8 * 1024 * 1024

# How the frame of an error begins: of every route, and of Anthropic's.
_FAILURE_LINES = (b"event: error", b'data: {"error":')

_BLANK_LINE = re.compile(rb"\n\r?\n")


class FrameSplitter:
    """Hands on what is whole and keeps the unfinished rest, which is at most `max_bytes` long."""

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        """Begin at the start of a stream."""
        self._max_bytes = max_bytes
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """Take some bytes and return all frames that are whole now, as they stand in the stream.

        Raises:
            WorkerError: A frame is longer than `max_bytes`.
        """
        if not self._rest and data.endswith(b"\n\n"):
            return data
        held = self._rest + data if self._rest else data
        end = max(held.rfind(b"\n\n") + 2, held.rfind(b"\n\r\n") + 3)
        if end <= 2:  # neither was found
            end = 0
        self._rest = held[end:]
        if len(self._rest) > self._max_bytes:
            raise WorkerError(f"The engine sent a frame of more than {self._max_bytes} bytes.")
        return held[:end]


def frames_data(whole: bytes) -> Iterator[bytes]:
    """Return the data of each frame of some whole ones; comments and frames without data are left out."""
    start = 0
    for blank in _BLANK_LINE.finditer(whole):
        data = _frame_data(whole[start : blank.end()])
        start = blank.end()
        if data is not None:
            yield data


def line_start(whole: bytes, text: bytes) -> int:
    """Return where a line of some whole frames begins with `text`, -1 when none does.

    Inside JSON no line ever begins, so what an answer says cannot be mistaken for the frames around it.
    """
    if whole.startswith(text):
        return 0
    found = whole.find(b"\n" + text)
    return found + 1 if found >= 0 else -1


def failure_start(whole: bytes) -> int:
    """Return where the frame of an error begins among some whole ones, -1 when none does."""
    return min((at for line in _FAILURE_LINES if (at := line_start(whole, line)) >= 0), default=-1)


def _frame_data(frame: bytes) -> bytes | None:
    if frame.startswith(b"data: ") and frame.find(b"\n") == len(frame) - 2 and b"\r" not in frame:
        return frame[6:-2]  # one line, as nearly every token's frame
    lines = [line[5:] for line in frame.splitlines() if line.startswith(b"data:")]
    if not lines:
        return None
    return b"\n".join(line[1:] if line.startswith(b" ") else line for line in lines)
