"""Say something: `narrate(action, message, **fields)`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rbee.contracts.events import Level
from rbee.narration.lines import Narration, encode_narration
from rbee.narration.scope import Scope, current_scope
from rbee.narration.sinks import FileSink, ListSink, Sink


class _Process:
    """Who this process is and where it speaks; set once at start, stdout until then."""

    actor = "process"
    sink: Sink = FileSink(1)
    names = Scope()


def configure(
    *, actor: str, sink: Sink | None = None, hive_id: str | None = None, worker_id: str | None = None
) -> None:
    """Say who speaks in this process and where to. Call once, at program start."""
    _Process.actor = actor
    _Process.sink = sink or FileSink(1)
    _Process.names = Scope(hive_id=hive_id, worker_id=worker_id)


def compose(
    action: str, message: str, /, *, level: Level = "info", attempt: int | None = None, **fields: Any
) -> bytes:
    """Make the line of an event in the scope of this moment, without writing it."""
    scope, names = current_scope(), _Process.names
    return encode_narration(
        Narration(
            v=1,
            kind="narration",
            ts=time.time_ns(),
            actor=scope.actor or _Process.actor,
            action=action,
            message=message,
            level=level,
            job_id=scope.job_id,
            correlation_id=scope.correlation_id,
            hive_id=scope.hive_id or names.hive_id,
            worker_id=scope.worker_id or names.worker_id,
            model=scope.model,
            attempt=attempt,
            fields=fields or None,
        )
    )


def narrate(
    action: str, message: str, /, *, level: Level = "info", attempt: int | None = None, **fields: Any
) -> None:
    """Say one sentence about what this process does; written when the call returns. Never raises.

    Args:
        action: A stable snake_case word that begins with the speaker, such as `worker_ready`.
        message: One plain sentence for a person.
        level: How much it matters.
        attempt: The attempt of the job it is about, where there is one.
        fields: What else belongs to it: anything JSON can hold; the rest is written as its `repr`.
    """
    emit(compose(action, message, level=level, attempt=attempt, **fields))


def emit(line: bytes) -> None:
    """Write a composed line to where this process speaks."""
    _Process.sink.write(line)


@contextmanager
def captured_narration(actor: str = "test") -> Iterator[ListSink]:
    """Collect what is narrated inside the `with` block in a `ListSink`: for tests, ours and yours."""
    before = (_Process.actor, _Process.sink, _Process.names)
    sink = ListSink()
    configure(actor=actor, sink=sink)
    try:
        yield sink
    finally:
        _Process.actor, _Process.sink, _Process.names = before
