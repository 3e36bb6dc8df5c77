"""What a worker said last, and the one line that tells how it ended."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from rbee.hive.outbox import LAST_LINES, Source
from rbee.hive.shown_line import shown_line
from rbee.narration import scope
from rbee.narration.emit import compose, emit
from rbee.processes import ExitStatus

TAIL_BYTES = 16 * 1024
LINE_CHARS_MAX = 400
AGAIN_S = 0.5
# All of them together, so that the line that carries them is never cut.
LINES_BYTES_MAX = 8 * 1024
_FAILURE = "worker_failed: "


def last_lines(sources: list[Source]) -> list[str]:
    """Return the last lines of a worker's files, those already read and those still to be read.

    What the worker says it failed with is among them, however much its engine said meanwhile.
    """
    lines = [line for source in sources for line in _tail(source)]
    failures = [line for line in lines if line.startswith(_FAILURE)][-1:]
    kept = lines[-LAST_LINES:]
    return kept if not failures or failures[0] in kept else [*kept[1:], *failures]


def _tail(source: Source) -> list[str]:
    unread = [shown_line(line) for line in source.follower.tail(TAIL_BYTES).split(b"\n")]
    return [line for line in [*source.last_lines, *unread] if line][-LAST_LINES:]


def last_failure(lines: list[str]) -> str:
    """Return the sentence in which a worker said what it failed with; empty when it said none."""
    for line in reversed(lines):
        if line.startswith(_FAILURE):
            return line.removeprefix(_FAILURE)
    return ""


def say_exit(
    worker_id: str, model: str | None, status: ExitStatus, lines: list[str], sizes: dict[str, int]
) -> bool:
    """Tell how a worker ended, and the sizes its files must be read to before that counts.

    Returns:
        Whether it stands: on a full disk it has to be told again.
    """
    fields: dict[str, Any] = msgspec.to_builtins(status)
    said = last_failure(lines)
    known = {name: value for name, value in fields.items() if value is not None and value is not False}
    with scope(job_id=None, correlation_id=None, worker_id=worker_id, model=model):
        line = compose(
            "worker_exit",
            f"The worker {status.describe()}. {said}".rstrip(),
            level="info" if status.exit_code == 0 else "error",
            **known,
            last_lines=fitting(lines),
            sources=sizes,
        )
    return emit(line)


async def say_exit_surely(
    worker_id: str, model: str | None, status: ExitStatus, lines: list[str], sizes: dict[str, int]
) -> None:
    """Tell it again until it stands."""
    while not say_exit(worker_id, model, status, lines, sizes):  # noqa: ASYNC110  # a disk tells nobody
        await asyncio.sleep(AGAIN_S)


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
