"""What stands in our own stderr, where an engine says what it has to say; read back where that is a file."""

from __future__ import annotations

import os
import stat

_TAIL_BYTES = 16 * 1024


def stderr_size() -> int | None:
    """Return how much stands there now; None where it is no file."""
    found = os.fstat(2)
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def stderr_since(start: int | None) -> str:
    """Return the first 16 KiB that were written there since; nothing where it is no file that can be read."""
    return _read(start)


def stderr_end(start: int | None) -> str:
    """Return the last 16 KiB of what was written there since; nothing where it is no file that can be read."""
    size = stderr_size()
    return _read(start if start is None or size is None else max(start, size - _TAIL_BYTES))


def _read(start: int | None) -> str:
    if start is None:
        return ""
    try:
        with open("/proc/self/fd/2", "rb") as file:
            file.seek(start)
            return file.read(_TAIL_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
