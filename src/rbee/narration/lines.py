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
    job_id: str | None = None
    correlation_id: str | None = None
    hive_id: str | None = None
    worker_id: str | None = None
    model: str | None = None
    action: str
    message: str
    level: Level = "info"
    attempt: int | None = None
    fields: dict[str, Any] | None = None


_encoder = msgspec.json.Encoder(enc_hook=repr)
# The words of an event, and how many characters of each are left when it is too long.
_WORDS = {
    "actor": 64,
    "action": 128,
    "message": 2048,
    "job_id": 128,
    "correlation_id": 128,
    "hive_id": 128,
    "worker_id": 128,
    "model": 512,
}


def encode_narration(narration: Narration) -> bytes:
    """Encode an event as one line without a newline, redacted, at most 16 KiB. Never raises."""
    try:
        line = _encoder.encode(narration)
    except Exception:  # noqa: BLE001  # a field's own `__repr__` may raise anything
        line = _encoder.encode(_plain(narration))
    size = len(line)
    if size < MAX_LINE_BYTES:
        line = redact(line)
        if len(line) < MAX_LINE_BYTES:  # a mask may be longer than what it hides
            return line
    return redact(_encoder.encode(_shortened(narration, size)))


def _plain(narration: Narration) -> Narration:
    """Keep the words and what can be encoded; turn the rest into text."""
    words = {name: _cut(value, None) for name in _WORDS if (value := getattr(narration, name)) is not None}
    fields = {_text(key): _encodable(value) for key, value in (narration.fields or {}).items()}
    return msgspec.structs.replace(narration, fields=fields or None, **words)


def _text(value: str) -> str:
    return value.encode("utf-8", "replace").decode()


def _encodable(value: object) -> object:
    try:
        return msgspec.Raw(_encoder.encode(value))
    except Exception:  # noqa: BLE001  # as above
        return _text_of(value)


def _text_of(value: object) -> str:
    try:
        return _text(repr(value))[:500]
    except Exception:  # noqa: BLE001  # as above
        return f"<{type(value).__name__}>"


def _shortened(narration: Narration, size: int) -> Narration:
    """Cut the words and drop the fields of an event that is too long, and say so in it."""
    words = {
        name: _CONTROL.sub("?", _cut(value, limit))  # so that no character takes more than 4 bytes
        for name, limit in _WORDS.items()
        if (value := getattr(narration, name)) is not None
    }
    return msgspec.structs.replace(narration, fields={"shortened_from_bytes": size}, **words)


def _cut(value: object, limit: int | None) -> str:
    return _text(value[:limit]) if isinstance(value, str) else _text_of(value)


def plain_text(text: str) -> str:
    """Return text without control characters (but tab and newline) and escape sequences, safe to draw."""
    return _CONTROL.sub("", text)


def format_bracket(event: dict[str, Any]) -> str:
    """Draw an event for a person: `[worker    ] worker_ready: Model loaded`."""
    actor, action, message = (
        plain_text(str(event.get(name) or "")).replace("\n", " ") for name in ("actor", "action", "message")
    )
    return f"[{actor:<10}] {action}: {message}"


def parse_bracket(line: bytes) -> tuple[str, str, str] | None:
    """Read actor, action and message off the bracket form; None when the line is something else."""
    found = _BRACKET.fullmatch(line.strip())
    if found is None:
        return None
    actor, action, message = (part.decode("utf-8", "replace") for part in found.groups())
    return actor, action, message
