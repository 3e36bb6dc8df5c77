"""Take secrets out of a line before it is written."""

from __future__ import annotations

import re

from msgspec import Struct

_NAME = (
    rb"(?:(?:passw(?:or)?d|passphrase|secret|api[_-]?key|access[_-]?key|private[_-]?key"
    rb"|authorization|credential|bearer|(?:api|access|auth|refresh|session|worker|hf)[_-]?token)[\w-]{0,64})"
)
_NAMES = (b"pass", b"secret", b"key", b"auth", b"cred", b"bearer", b"token")
_WORD = rb"[^\s\"'&,;\\]{3,}"
_QUOTE = rb"(?:\\{1,8}\"|')"  # of JSON inside a sentence, or of a Python `repr`


class _Rule(Struct, frozen=True):
    """One form of secret. `hints`: a line in lower case that has none of them cannot have this form."""

    hints: tuple[bytes, ...]
    form: re.Pattern[bytes]
    masked: bytes


# Each form begins with letters of its own and repeats without overlap, so that a hostile line costs no more
# than a long one. None takes a quotation mark it does not give back: JSON stays JSON.
_RULES = (
    _Rule((b"bearer",), re.compile(rb"\b(bearer\s{1,4})[\w.~+/=-]{6,}", re.IGNORECASE), rb"\1***"),
    _Rule(
        (b"basic",),  # "basic understanding" is a sentence, base 64 has digits or capitals in it
        re.compile(rb"\b(basic\s{1,4})(?=[a-z+/]*(?:[0-9=]|(?-i:[a-z][A-Z])))[\w+/=-]{8,}", re.IGNORECASE),
        rb"\1***",
    ),
    _Rule(
        _NAMES,
        re.compile(
            rb"((?:" + _NAME + rb'|"token)"\s{0,4}:\s{0,4})"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.IGNORECASE | re.DOTALL
        ),
        rb'\1"***"',
    ),
    _Rule(
        _NAMES,
        re.compile(
            rb"((?:" + _NAME + rb"|(?<![\w-])token)"
            rb"(?:" + _QUOTE + rb"\s{0,4}:\s{0,4}" + _QUOTE + rb"|\s{0,4}[=:]\s{0,4}" + _QUOTE + rb"))[^\"'\\]+",
            re.IGNORECASE,
        ),
        rb"\1***",
    ),
    _Rule(
        _NAMES,
        re.compile(
            rb"(" + _NAME + rb"\s{0,4}[=:]\s{0,4})(?!(?:bearer|basic)\b)" + _WORD
            # "time to first token: 0.31 s" is a sentence, "token: 8c4f…" is not
            + rb"|((?<![\w-])token(?:\s{0,4}=\s{0,4}|:\s{0,4}(?=\S{8})(?![0-9.]+\b)))" + _WORD,
            re.IGNORECASE,
        ),
        rb"\1\2***",
    ),
    _Rule((b"://",), re.compile(rb'(://)[^\s/"@]+@'), rb"\1***@"),
    _Rule(
        (b"sk-", b"sk_", b"hf_", b"ghp_", b"gho_", b"xox"),
        re.compile(
            rb"\b(sk[-_])[\w-]{8,}|\b(hf_|gh[opsu]_)[A-Za-z0-9]{20,}|\b(xox[abprs]-)[\w-]{8,}", re.IGNORECASE
        ),
        rb"\1\2\3***",
    ),
)


def redact(line: bytes) -> bytes:
    """Return an encoded line with bearer tokens, API keys and passwords in URLs replaced by `***`.

    Field values are masked by the name of the field, sentences by the form of the secret. The result is JSON
    where the line was.
    """
    lowered = line.lower()
    for rule in _RULES:
        for hint in rule.hints:
            if hint in lowered:
                line = rule.form.sub(rule.masked, line)
                break
    return line
