"""Draw what a server prints, as it comes, and keep its last lines."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import msgspec

from rbee.keeper.local_stack import TAIL_LINES
from rbee.keeper.render import Screen
from rbee.narration.lines import format_bracket

_LINE_BYTES_MAX = 64 * 1024
_SETTLE_S = 1.0


class DrawnOutput:
    """The output of one process on a screen: events in the bracket form, everything else as it is.

    Args:
        program: Whose output it is.
        stream: Where it comes from; read to its end.
    """

    def __init__(self, program: str, stream: asyncio.StreamReader, screen: Screen) -> None:
        self._program = program
        self._stream = stream
        self._screen = screen
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._task = asyncio.create_task(self._draw())

    @property
    def last_lines(self) -> list[str]:
        """The last lines so far."""
        return list(self._tail)

    async def settle(self) -> None:
        """Let what an ended process said be drawn; somebody who inherited its pipe may hold it open for ever."""
        await asyncio.wait({self._task}, timeout=_SETTLE_S)

    async def close(self) -> None:
        """Draw the last of it, and read no more."""
        await self.settle()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _draw(self) -> None:
        rest = b""
        while data := await self._stream.read(_LINE_BYTES_MAX):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > _LINE_BYTES_MAX:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._draw_line(line)
        if rest:
            self._draw_line(rest)

    def _draw_line(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip("\r")
        self._tail.append(text)
        event = _event(line)
        self._screen.narrate(event or {"actor": self._program, "action": "output", "message": text})


def readable(line: str) -> str:
    """Return a line as a person reads it: an event in its bracket form, anything else as it is."""
    event = _event(line.encode())
    return format_bracket(event) if event else line


def _event(line: bytes) -> dict[str, Any] | None:
    """Return the event that a line is, if it is one."""
    try:
        event = msgspec.json.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return event if isinstance(event, dict) and "action" in event and "message" in event else None
