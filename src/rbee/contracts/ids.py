"""Identifiers: `<kind>-<ULID in lower case>`, and the correlation id that ties a job together."""

from __future__ import annotations

import os
import re
import time
import uuid
from typing import Literal
from uuid import UUID

Kind = Literal["job", "hive", "worker"]

_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"
_PAIRS = [high + low for high in _CROCKFORD for low in _CROCKFORD]
_ID = re.compile(r"(job|hive|worker)-[0-7][0-9a-hjkmnp-tv-z]{25}")
_CORRELATION = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def new_id(kind: Kind) -> str:
    """Return a new identifier whose ULID sorts by the nanosecond it was made in.

    Source: the ULID specification (48 bits of milliseconds, 80 of randomness, Crockford's base 32); the first
    20 bits of the randomness are the rest of the time, as RFC 9562 has it in its section 6.2, method 3.
    """
    milliseconds, rest_ns = divmod(time.time_ns(), 1_000_000)
    number = milliseconds << 80 | rest_ns << 60 | (int.from_bytes(os.urandom(8)) >> 4)
    return f"{kind}-{_text_of(number)}"


def first_id(kind: Kind, at_s: float) -> str:
    """Return the least identifier that can be made at a time, in seconds since 1970 (before that: at 0)."""
    return f"{kind}-{_text_of(int(max(0.0, at_s) * 1000) << 80)}"


def _text_of(number: int) -> str:
    return "".join([_PAIRS[number >> shift & 1023] for shift in range(120, -1, -10)])


def is_id(kind: Kind, text: str) -> bool:
    """Tell whether `text` is an identifier of that kind."""
    return bool(_ID.fullmatch(text)) and text.startswith(kind + "-")


def new_boot_id() -> str:
    """Return a random name for one start of one process."""
    return uuid.uuid4().hex


def new_correlation_id() -> str:
    """Return a new correlation id: a UUID that sorts by the millisecond it was made in, so that an index of them
    grows at its end.

    Source: RFC 9562, UUID version 7.
    """
    chance = int.from_bytes(os.urandom(10))
    number = (
        (time.time_ns() // 1_000_000) << 80 | 7 << 76 | (chance >> 66) << 64 | 2 << 62 | chance & (1 << 62) - 1
    )
    return str(UUID(int=number))


def is_correlation_id(text: str) -> bool:
    """Tell whether a caller's correlation id can be taken as it is."""
    return bool(_CORRELATION.fullmatch(text))
