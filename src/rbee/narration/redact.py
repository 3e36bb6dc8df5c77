"""Take secrets out of a line before it is written."""

from __future__ import annotations

import re

MASK = b"***"

_VALUE = rb'(?:[^"\\]|\\.)*'
_NAMES = (
    rb"[\w-]*(?:password|passwd|secret|api[_-]?key|access[_-]?key"
    rb"|authorization|credential|auth[_-]?token|bearer)[\w-]*"
)
_SECRET = re.compile(
    rb'(?P<field>"(?:' + _NAMES + rb'|token)"\s*:\s*)"' + _VALUE + rb'"'
    rb"|(?P<scheme>\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{6,}"
    rb"|(?P<url>[a-z][a-z0-9+.-]*://)[^\s/\"@]+@"
    rb"|(?P<pair>\b(?:" + _NAMES + rb"|token)\s*[=:]\s*)(?!\s*(?:bearer|basic)\b)[^\s\"&,;\\]{3,}"
    rb"|\b(?P<key>sk|hf|ghp|gho|xox[bp]|pk|rk)[-_][A-Za-z0-9_-]{8,}",
    re.IGNORECASE,
)
# What every pattern above has in it; one cheap look spares most lines the whole search.
_HINT = re.compile(
    rb"pass|secret|key|auth|cred|bearer|basic|token|://|sk[-_]|hf_|gh[po]_|xox|[pr]k[-_]", re.IGNORECASE
)


def redact(line: bytes) -> bytes:
    """Return an encoded line with bearer tokens, API keys and passwords in URLs replaced by `***`.

    Field values are masked by the name of the field, sentences by the form of the secret. The result is JSON
    where the line was.
    """
    if _HINT.search(line) is None:
        return line
    return _SECRET.sub(_masked, line)


def _masked(found: re.Match[bytes]) -> bytes:
    if found["field"] is not None:
        return found["field"] + b'"' + MASK + b'"'
    if found["scheme"] is not None:
        return found["scheme"] + MASK
    if found["url"] is not None:
        return found["url"] + MASK + b"@"
    if found["pair"] is not None:
        return found["pair"] + MASK
    return found["key"] + b"-" + MASK
