"""Where narrated lines go. A sink takes a whole line, never raises and never waits for a reader."""

from __future__ import annotations

import os
import stat
import threading
from os import write
from typing import Any, Protocol

import msgspec


class Sink(Protocol):
    """Takes lines. Returns at once; a line that cannot be written is counted, not raised."""

    def write(self, line: bytes) -> bool:
        """Take one line without its newline; tells whether it went through whole."""


class FileSink:
    """Writes each line with one `write` to a file descriptor.

    After a short or failed write the next line begins with a newline, so that what was cut off spoils one
    line and no more; `lost_lines` counts what did not get through whole. A descriptor that blocks when it is
    full makes the speaker wait: see `unblocked`.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.lost_lines = 0
        self._torn = False
        lock = threading.RLock()  # a signal handler or finalizer may speak in the middle of a write
        self._acquire, self._release = lock.acquire, lock.release  # a third quicker than `with`

    def write(self, line: bytes) -> bool:
        """Write one line; see the class for what happens when that fails."""
        self._acquire()
        try:
            data = b"\n" + line + b"\n" if self._torn else line + b"\n"
            written = write(self.fd, data)
            self._torn = written != len(data)
            if self._torn:
                self.lost_lines += 1
            return not self._torn
        except OSError:
            self.lost_lines += 1
            return False
        finally:
            self._release()


class ListSink:
    """Keeps every event in memory, decoded: for tests."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def write(self, line: bytes) -> bool:
        """Keep one line."""
        self.events.append(msgspec.json.decode(line))
        return True

    @property
    def actions(self) -> list[str]:
        """The action words said so far, in order."""
        return [event["action"] for event in self.events]


class TeeSink:
    """Hands every line to several sinks in order; the first tells whether it stands."""

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = sinks

    def write(self, line: bytes) -> bool:
        """Hand one line on."""
        first, *_ = [sink.write(line) for sink in self.sinks]
        return first


class TerminalSink:
    """Draws every line for a person: what a server says when its stdout is a terminal."""

    def __init__(self, fd: int) -> None:
        self._file = FileSink(fd)

    def write(self, line: bytes) -> bool:
        """Draw one line."""
        from rbee.narration.lines import format_bracket

        return self._file.write(format_bracket(msgspec.json.decode(line)).encode("utf-8", "replace"))


def unblocked(fd: int) -> int:
    """Return a descriptor of the same pipe or terminal on which a write never waits for the reader.

    The file is opened anew, because the flag that says so is shared with every process that has `fd`. What
    cannot be opened anew (a socket) and what never waits (a file) is returned as it is.
    """
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        return fd
    try:
        return os.open(f"/dev/fd/{fd}", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return fd


def server_sink(fd: int = 1) -> Sink:
    """Return where a server speaks: stdout, as JSON lines, drawn when it is a terminal. A full one loses lines."""
    free = unblocked(fd)
    return TerminalSink(free) if os.isatty(fd) else FileSink(free)
