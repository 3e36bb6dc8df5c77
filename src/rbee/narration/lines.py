"""The two written forms of an event: the JSON line for programs, the bracket form for people."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from msgspec import Struct

from rbee.contracts.events import MAX_LINE_BYTES, Level
from rbee.narration.redact import redact

_BRACKET = re.compile(
    rb"\[(?P<actor>[A-Za-z][A-Za-z0-9_.-]{0,63}) *\] +"
    rb"(?P<action>[A-Za-z][A-Za-z0-9_.-]{0,63}) *: ?(?P<message>.*)",
    re.DOTALL,
)
_CONTROL = re.compile(
    r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


class Narration(Struct, kw_only=True, frozen=True, omit_defaults=True):
    """One event as its speaker writes it; `ts` is the speaker's clock in nanoseconds since 1970."""

    v: int
    kind: str
    ts: int
    actor: str
    action: str
    message: str
    level: Level = "info"
    job_id: str | None = None
    correlation_id: str | None = None
    hive_id: str | None = None
    worker_id: str | None = None
    model: str | None = None
    attempt: int | None = None
    fields: dict[str, Any] | None = None


_encoder = msgspec.json.Encoder(enc_hook=repr)


def encode_narration(narration: Narration) -> bytes:
    """Encode an event as one line without a newline, redacted, at most 16 KiB. Never raises."""
    try:
        line = _encoder.encode(narration)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError, OverflowError):
        line = _encoder.encode(_plain(narration))
    line = redact(line)
    return line if len(line) < MAX_LINE_BYTES else _shortened(narration, len(line))


def _plain(narration: Narration) -> Narration:
    """Keep the words, turn what cannot be encoded into text."""
    fields = {_text(key): _text_of(value) for key, value in (narration.fields or {}).items()}
    words = {
        name: _text(value)
        for name in (
            "actor",
            "action",
            "message",
            "job_id",
            "correlation_id",
            "hive_id",
            "worker_id",
            "model",
        )
        if isinstance(value := getattr(narration, name), str)
    }
    return msgspec.structs.replace(narration, fields=fields or None, **words)


def _text(value: object) -> str:
    return str(value).encode("utf-8", "replace").decode()


def _text_of(value: object) -> str:
    try:
        return _text(repr(value))[:500]
    except Exception:  # noqa: BLE001  # somebody's __repr__; narration never raises
        return f"<{type(value).__name__}>"


def _shortened(narration: Narration, size: int) -> bytes:
    """Cut the sentence and drop the fields of an event that is too long, and say so in it."""
    room = MAX_LINE_BYTES // 8
    short = msgspec.structs.replace(
        narration,
        actor=_text(narration.actor)[:64],
        action=_text(narration.action)[:128],
        message=_text(narration.message)[:room],
        job_id=_cut(narration.job_id),
        correlation_id=_cut(narration.correlation_id),
        hive_id=_cut(narration.hive_id),
        worker_id=_cut(narration.worker_id),
        model=_cut(narration.model),
        fields={"shortened_from_bytes": size},
    )
    return redact(_encoder.encode(short))


def _cut(text: str | None) -> str | None:
    return text if text is None else _text(text)[:256]


def plain_text(text: str) -> str:
    """Return text without control characters and escape sequences, safe to draw on a terminal."""
    return _CONTROL.sub("", text)


def format_bracket(event: dict[str, Any]) -> str:
    """Draw an event for a person: `[worker    ] worker_ready: Model loaded`."""
    message = plain_text(str(event.get("message", ""))).replace("\n", " ")
    return f"[{plain_text(str(event.get('actor', ''))):<10}] {plain_text(str(event.get('action', '')))}: {message}"


def parse_bracket(line: bytes) -> tuple[str, str, str] | None:
    """Read actor, action and message off the bracket form; None when the line is something else."""
    found = _BRACKET.fullmatch(line.strip())
    if found is None:
        return None
    actor, action, message = (part.decode("utf-8", "replace") for part in found.groups())
    return actor, action, message
