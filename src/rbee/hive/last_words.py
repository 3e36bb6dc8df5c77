"""What a worker said last, and the one line that tells how it ended."""

from __future__ import annotations

from typing import Any

import msgspec

from rbee.contracts.events import decode_source_line
from rbee.hive.outbox import LAST_LINES, Source
from rbee.narration import narrate, scope
from rbee.processes import ExitStatus

TAIL_BYTES = 16 * 1024
LINE_CHARS_MAX = 400
# All of them together, so that the line that carries them is never cut.
LINES_BYTES_MAX = 8 * 1024


def last_lines(sources: list[Source]) -> list[str]:
    """Return the last lines of a worker's files, those already read and those still to be read."""
    return [line for source in sources for line in _tail(source)][-LAST_LINES:]


def _tail(source: Source) -> list[str]:
    rest = source.follower.tail(TAIL_BYTES).replace(b"\0", b"")  # where it was given back, it is zeros
    unread = rest.decode("utf-8", "replace").splitlines()
    shown = (_shown(line) for line in [*source.last_lines, *unread] if line.strip())
    return [line for line in shown if line][-LAST_LINES:]


def _shown(line: str) -> str:
    """Show a narrated line as its sentence, another one as it is; '' for what is about one request.

    The last lines are told to every job on the worker, and none may hear of another's request.
    """
    if '"kind":"token"' in line[:40]:
        return ""
    decoded = decode_source_line(line.encode())
    if decoded is None:
        return line[:2000]
    if decoded.attempt is not None:
        return ""
    return f"{decoded.action}: {decoded.message}" if decoded.action else line[:2000]


def last_failure(lines: list[str]) -> str:
    """Return the sentence in which a worker said what it failed with; empty when it said none."""
    for line in reversed(lines):
        if line.startswith("worker_failed: "):
            return line.removeprefix("worker_failed: ")
    return ""


def say_exit(
    worker_id: str, model: str | None, status: ExitStatus, lines: list[str], sizes: dict[str, int]
) -> None:
    """Tell how a worker ended, and the sizes its files must be read to before that counts."""
    fields: dict[str, Any] = msgspec.to_builtins(status)
    known = {name: value for name, value in fields.items() if value is not None and value is not False}
    with scope(job_id=None, correlation_id=None, worker_id=worker_id, model=model):
        narrate(
            "worker_exit",
            f"The worker {status.describe()}.",
            level="info" if status.exit_code == 0 else "error",
            **known,
            last_lines=fitting(lines),
            sources=sizes,
        )


def fitting(lines: list[str]) -> list[str]:
    """Shorten lines, and leave out the oldest, until they fit into an event."""
    kept: list[str] = []
    left = LINES_BYTES_MAX
    for line in reversed([line[:LINE_CHARS_MAX] for line in lines]):
        left -= len(msgspec.json.encode(line))
        if left < 0:
            break
        kept.insert(0, line)
    return kept
