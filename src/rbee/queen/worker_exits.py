"""How a worker ended: its hive's `worker_exit` line, kept until all that the worker said has arrived."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from rbee.contracts.events import NARRATION_PREFIX, NewEvent, captured_event
from rbee.contracts.ids import is_id
from rbee.errors import WorkerLostError

LAST_LINES_MAX = 20


class _Fields(Struct, frozen=True):
    exit_code: int | None = None
    signal: str | None = None
    unknown: bool = False
    last_lines: list[str] = []
    sources: dict[str, Annotated[int, Meta(ge=0, lt=2**62)]] = {}


class _Line(Struct, frozen=True):
    action: Literal["worker_exit"]
    worker_id: str
    message: str
    fields: _Fields = _Fields()


_decoder = msgspec.json.Decoder(_Line)


class WorkerExit(Struct, frozen=True):
    """How a worker ended, as its hive said.

    Attributes:
        is_unknown: Nobody was told its exit code.
        sources: The final sizes of its files in bytes.
    """

    worker_id: str
    message: str
    exit_code: int | None
    signal: str | None
    is_unknown: bool
    last_lines: list[str]
    sources: dict[str, int]

    def error(self) -> WorkerLostError:
        """Make the error that ends the jobs on it."""
        return WorkerLostError(
            self.message,
            details={
                "worker_id": self.worker_id,
                "exit_code": self.exit_code,
                "signal": self.signal,
                "last_lines": self.last_lines[-LAST_LINES_MAX:],
            },
        )


def read_exit(line: bytes) -> WorkerExit | None:
    """Read a `worker_exit` line; None when it is none, or names files that are not the worker's."""
    try:
        said = _decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    own = {f"{said.worker_id}/stdout", f"{said.worker_id}/stderr"}
    if not is_id("worker", said.worker_id) or not own.issuperset(said.fields.sources):
        return None
    fields = said.fields
    return WorkerExit(
        worker_id=said.worker_id,
        message=said.message,
        exit_code=fields.exit_code,
        signal=fields.signal,
        is_unknown=fields.unknown,
        last_lines=fields.last_lines,
        sources=fields.sources,
    )


def kept_exit(line: bytes, *, source: str, offset: int, observed_ts: int) -> bytes:
    """Return a `worker_exit` line as it is kept: with where it was read, still a line that can be read."""
    return NARRATION_PREFIX + captured_event(line, source=source, offset=offset, observed_ts=observed_ts).tail


def exit_event(kept: bytes) -> NewEvent:
    """Make the event of a line that `kept_exit` made."""
    return NewEvent("narration", kept[len(NARRATION_PREFIX) :])
