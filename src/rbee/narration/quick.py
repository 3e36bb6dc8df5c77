"""The quick way to a line: its constant parts are prepared once, and what may hold a secret is left to others.

It gives the very bytes that `encode_narration` gives, or None, and then that one has to be asked. It counts every
step: what stands here was measured against its alternatives (`benchmarks/bench_narrate.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from time import time_ns
from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from rbee.contracts.events import MAX_LINE_BYTES
from rbee.narration.redact import redact, suspicious
from rbee.narration.scope import current_place

MAX_PLAIN_WORDS = 4096
MAX_PREPARED_BYTES = 4096

_encode = msgspec.json.Encoder().encode
_find_suspicious = re.compile(suspicious(r"[\"'\\:=]"), re.ASCII).search


class _Line(Struct, frozen=True):
    """An event with what is already encoded of it: `actor` goes on with whom the event is about."""

    v: int
    kind: str
    ts: int
    actor: Raw
    action: str
    message: str
    attempt: int | UnsetType
    fields: dict[str, Any] | UnsetType


class Prepared(Struct, frozen=True):
    """What all lines of one speaker in one scope have in common.

    Attributes:
        speaker: For whom this was prepared.
        actor: The actor and whom it is about, encoded; None when there is something in it to mask or to cut.
    """

    speaker: object
    actor: Raw | None


def prepare(speaker: object, actor: str, names: dict[str, str | None]) -> Prepared:
    """Encode what stays the same within a scope. Never raises."""
    try:
        given = {"actor": actor, **{key: name for key, name in names.items() if name is not None}}
        encoded = _encode(given)
        is_plain = all(type(name) is str for name in given.values()) and redact(encoded) == encoded
    except Exception:  # noqa: BLE001  # names that are no text: `encode_narration` knows what to do
        return Prepared(speaker, None)
    is_plain = is_plain and len(encoded) < MAX_PREPARED_BYTES
    return Prepared(speaker, Raw(encoded[len(b'{"actor":') : -1]) if is_plain else None)


class _Plain:
    """Actions and names of fields that were looked at and can neither be a secret nor announce one."""

    words: ClassVar[set[str]] = set()


_are_plain = _Plain.words.issuperset


def _learn(words: Iterable[str]) -> bool:
    """Look at words that may be new; tells whether all of them are plain. At its bound it forgets what it knew."""
    for word in words:
        example = b'{"%b":"an example"}' % word.encode()
        if not (word.isascii() and word.isidentifier() and len(word) < 128 and redact(example) == example):
            return False
        if len(_Plain.words) >= MAX_PLAIN_WORDS:
            _Plain.words.clear()
        _Plain.words.add(word)
    return True


def quick_line(
    speaker: object, action: str, message: str, attempt: int | None, fields: dict[str, Any]
) -> bytes | None:
    """Return the line of an ordinary event of level info; None when it has to be made with more care."""
    prepared: Prepared | None = current_place().prepared
    if prepared is None or prepared.speaker is not speaker or prepared.actor is None:
        return None
    try:
        if not (action in _Plain.words and _are_plain(fields)) and not _learn((action, *fields)):
            return None
        words = message
        for value in fields.values():
            kind = type(value)
            if kind is str:
                words += value
            elif kind is not int and kind is not float and kind is not bool and value is not None:
                return None
        # Without one of these signs no secret is recognized, but behind `bearer` and `basic`.
        if (
            ":" in words or "=" in words or "-" in words or "_" in words or "'" in words or '"' in words
            or "\\" in words or "b" in words or "B" in words
        ) and _find_suspicious(words.lower()) is not None:  # fmt: skip
            return None
        if type(message) is not str or (attempt is not None and type(attempt) is not int):
            return None
        line = _encode(
            _Line(
                1,
                "narration",
                time_ns(),
                prepared.actor,
                action,
                message,
                UNSET if attempt is None else attempt,
                fields or UNSET,
            )
        )
    except Exception:  # noqa: BLE001  # what JSON cannot hold; the other way makes something of it
        return None
    return line if len(line) < MAX_LINE_BYTES else None
