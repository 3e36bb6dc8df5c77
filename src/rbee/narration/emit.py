"""Say something: `narrate(action, message, **fields)`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import time_ns
from typing import Any

from msgspec import Struct

from rbee.contracts.events import NARRATION_PREFIX, Level, NewEvent
from rbee.narration.lines import Narration, encode_narration
from rbee.narration.quick import prepare, quick_line
from rbee.narration.scope import Scope, current_place
from rbee.narration.sinks import FileSink, ListSink, Sink


class _Speaker(Struct, frozen=True, eq=False):
    """Who this process is, and where it speaks."""

    actor: str
    sink: Sink
    names: Scope


class _Process:
    """Set once at start; stdout until then."""

    speaker = _Speaker("process", FileSink(1), Scope())


def configure(
    *, actor: str, sink: Sink | None = None, hive_id: str | None = None, worker_id: str | None = None
) -> None:
    """Say who speaks in this process and where to. Call once, at program start."""
    names = Scope(hive_id=hive_id, worker_id=worker_id)
    _Process.speaker = _Speaker(actor, sink or FileSink(1), names)


def compose(
    action: str, message: str, /, *, level: Level = "info", attempt: int | None = None, **fields: Any
) -> bytes:
    """Make the line of an event in the scope of this moment, without writing it."""
    speaker = _Process.speaker
    line = quick_line(speaker, action, message, attempt, fields) if level == "info" else None
    return line or _line(speaker, action, message, level, attempt, fields)


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
    speaker = _Process.speaker
    line = quick_line(speaker, action, message, attempt, fields) if level == "info" else None
    speaker.sink.write(line or _line(speaker, action, message, level, attempt, fields))


def _line(
    speaker: _Speaker, action: str, message: str, level: Level, attempt: int | None, fields: dict[str, Any]
) -> bytes:
    """Make a line with all care, and the way free for the next ones in this scope to be quick."""
    place = current_place()
    names = _names(speaker, place.scope)
    if place.prepared is None or place.prepared.speaker is not speaker:
        place.prepared = prepare(speaker, place.scope.actor or speaker.actor, names)
        if level == "info" and (line := quick_line(speaker, action, message, attempt, fields)) is not None:
            return line
    return encode_narration(
        Narration(
            v=1,
            kind="narration",
            ts=time_ns(),
            actor=place.scope.actor or speaker.actor,
            action=action,
            message=message,
            level=level,
            attempt=attempt,
            fields=fields or None,
            **names,
        )
    )


def _names(speaker: _Speaker, scope: Scope) -> dict[str, str | None]:
    """Return what an event says about whom, in the order of the line."""
    return {
        "job_id": scope.job_id,
        "correlation_id": scope.correlation_id,
        "hive_id": scope.hive_id or speaker.names.hive_id,
        "worker_id": scope.worker_id or speaker.names.worker_id,
        "model": scope.model,
    }


def narration_event(line: bytes) -> NewEvent:
    """Make a log's event of a line that `compose` made in this process."""
    return NewEvent("narration", line[len(NARRATION_PREFIX) :])


def emit(line: bytes) -> bool:
    """Write a composed line to where this process speaks; tells whether it went through whole."""
    return _Process.speaker.sink.write(line)


@contextmanager
def captured_narration(actor: str = "test") -> Iterator[ListSink]:
    """Collect what is narrated inside the `with` block in a `ListSink`: for tests, ours and yours."""
    before = _Process.speaker
    sink = ListSink()
    configure(actor=actor, sink=sink)
    try:
        yield sink
    finally:
        _Process.speaker = before
