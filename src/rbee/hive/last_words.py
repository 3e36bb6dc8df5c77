"""What a worker said last, and the one line that tells how it ended."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from msgspec import Struct

from rbee.contracts.engine_settings import EngineSettings
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


class LastWords(Struct, frozen=True):
    """What a worker and its engine said last.

    Attributes:
        lines: The last lines of both files.
        failure: The sentence in which the worker said what it failed with; empty when it said none.
    """

    lines: list[str] = []
    failure: str = ""


def last_words(sources: list[Source], engine: EngineSettings | None = None) -> LastWords:
    """Return the last of a worker's files, of what is already read and what is still to be read.

    What the worker says it failed with is among the lines, however much its engine said meanwhile; what the engine
    says is never taken for it.

    Args:
        sources: The files.
        engine: What the configuration says of its engine, whose `env` may hold secrets.
    """
    tails = [(source, _tail(source, engine)) for source in sources]
    lines = [line for _, tail in tails for line in tail]
    own = [line for source, tail in tails if source.is_narration for line in tail]
    failures = [line for line in own if line.startswith(_FAILURE)][-1:]
    kept = lines[-LAST_LINES:]
    if not failures:
        return LastWords(kept)
    return LastWords(kept if failures[0] in kept else [*kept[1:], *failures], failures[0].removeprefix(_FAILURE))


def _tail(source: Source, engine: EngineSettings | None) -> list[str]:
    raw = source.follower.tail(TAIL_BYTES).split(b"\n")
    unread = [shown_line(line, is_narration=source.is_narration) for line in raw]
    lines = [line for line in [*source.last_lines, *unread] if line][-LAST_LINES:]
    return lines if engine is None else [engine.without_values(line) for line in lines]


def say_exit(
    worker_id: str, model: str | None, status: ExitStatus, words: LastWords, sizes: dict[str, int]
) -> bool:
    """Tell how a worker ended, and the sizes its files must be read to before that counts.

    Returns:
        Whether it stands: on a full disk it has to be told again.
    """
    fields: dict[str, Any] = msgspec.to_builtins(status)
    known = {name: value for name, value in fields.items() if value is not None and value is not False}
    with scope(job_id=None, correlation_id=None, worker_id=worker_id, model=model):
        line = compose(
            "worker_exit",
            f"The worker {status.describe()}. {words.failure}".rstrip(),
            level="info" if status.exit_code == 0 else "error",
            **known,
            last_lines=fitting(words.lines),
            sources=sizes,
        )
    return emit(line)


async def say_exit_surely(
    worker_id: str, model: str | None, status: ExitStatus, words: LastWords, sizes: dict[str, int]
) -> None:
    """Tell it again until it stands."""
    while not say_exit(worker_id, model, status, words, sizes):  # noqa: ASYNC110  # a disk tells nobody
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
