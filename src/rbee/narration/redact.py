"""Take secrets out of a line before it is written."""

from __future__ import annotations

import re

MASK = b"***"


def _after(*words: bytes) -> bytes:
    """Match behind one of `words`, joined directly or by a dash or an underscore."""
    return b"(?:" + b"|".join(b"(?<=%b)|(?<=%b[_-])" % (word, word) for word in words) + b")"


# What makes a name's value a secret: a JSON field, one inside a sentence or a `repr`, `name='…'`, `name: …`.
_QUOTE = rb"(?:\\(?:\\\\){0,4}\"|')"  # an odd number of backslashes: with an even one the string would end here
_SIGN = rb"\s{0,4}[=:]\s{0,4}"
_WORD = rb"([^\s\"'&,;\\]{3,})"
_VALUE = (
    rb"(?:\"\s{0,4}:\s{0,4}\"([^\"\\]*+(?:\\.[^\"\\]*+)*+)\""
    rb"|" + _QUOTE + rb"\s{0,4}:\s{0,4}" + _QUOTE + rb"([^\"'\\]+)"
    rb"|" + _SIGN + _QUOTE + rb"([^\"'\\]+)"
    rb"|" + _SIGN + rb"(?!(?:bearer|basic)\b)" + _WORD + rb")"
)
_NAMED = rb"[\w-]{0,64}+" + _VALUE
_KEY = _after(b"api", b"access", b"private") + rb"key" + _NAMED
_TOKEN = _after(b"api", b"access", b"auth", b"refresh", b"session", b"worker", b"hf") + rb"token" + _NAMED
# A word begins behind an encoded newline or tab, too.
_START = rb"(?:\b|(?<=\\[bfnrt]))"
# "Time to first token: 0.31 s" is a sentence, "token: 8c4f91…" is not.
_ONLY_TOKEN = (
    rb"(?:(?<![\w-])|(?<=\\[bfnrt]))token(?!\s{0,4}+:\s{0,4}+(?:[0-9.]+\b|[^\s\"]{0,7}+(?:[\s\"]|$)))" + _VALUE
)
_KEY_FORMS = _START + rb"(?:sk[-_]([\w-]{8,})|(?:hf|gh[opsu])_([a-z0-9]{20,})|xox[abprs]-([\w-]{8,}))"


def _form(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.IGNORECASE | re.DOTALL)


# What a secret looks like at each word that gives one away (in lower case): the one group that matched. A form
# begins at its word and repeats without overlap, so a hostile line costs no more than a long one; no group holds
# a quotation mark or half an escape, so JSON stays JSON.
_FORMS = {
    b"passw": _form(rb"passw(?:or)?d" + _NAMED),
    b"passphrase": _form(rb"passphrase" + _NAMED),
    b"secret": _form(rb"secret" + _NAMED),
    b"credential": _form(rb"credential" + _NAMED),
    b"authorization": _form(rb"authorization" + _NAMED),
    b"key": _form(_KEY),
    b"token": _form(rb"(?:" + _TOKEN + rb"|" + _ONLY_TOKEN + rb")"),
    b"bearer": _form(rb"(?:" + _START + rb"bearer\s{1,4}+(?!bearer\b)([\w.~+/=-]{6,})|bearer" + _NAMED + rb")"),
    # "basic understanding" is a sentence; base 64 has digits or capitals in it.
    b"basic": _form(_START + rb"basic\s{1,4}(?=[a-z+/]*(?:[0-9=]|(?-i:[a-z][A-Z])))([\w+/=-]{8,})"),
    b"://": _form(rb"://([^\s/\"@]++)@"),
    **dict.fromkeys((b"sk-", b"sk_", b"hf_", b"gho_", b"ghp_", b"ghs_", b"ghu_", b"xox"), _form(_KEY_FORMS)),
}
_WORDS = re.compile(b"|".join(re.escape(word) for word in _FORMS))


def suspicious(name_end: str) -> str:
    """Return the pattern of what `redact` looks at closer, in lower case: more than it masks, never less.

    It finds words by their rarest letters, for most text has few of those, and searching costs less.

    Args:
        name_end: What a name that ends in `key` or `token` must be followed by.
    """
    end = r"[\w-]{0,64}+\s{0,4}" + name_end
    return (
        r"k(?:(?<=tok)en" + end + r"|ey" + end + r"|(?<=sk)[-_][\w-]{8})"
        r"|c(?:(?<=sec)ret|redential)|pass(?:w|phrase)|f(?<=hf)_|gh[opsu]_|b(?:earer|asic\s)"
        r"|//(?<=://)[^\s/\"@]+@|z(?<=authoriz)ation|xox"
    )


_find_suspicious = re.compile(suspicious(r"(?:['\\:=]|\"\s{0,4}:\s{0,4}\")").encode()).search


def redact(line: bytes) -> bytes:
    """Return an encoded line with bearer tokens, API keys and passwords in URLs replaced by `***`.

    Field values are masked by the name of the field, sentences by the form of the secret. The result is JSON
    where the line was.
    """
    lowered = line.lower()  # searching this is ten times faster than searching without regard to case
    if _find_suspicious(lowered) is None:
        return line
    parts: list[bytes] = []
    kept, position = 0, 0
    while (word := _WORDS.search(lowered, position)) is not None:
        found = _FORMS[word[0]].match(line, word.start())
        if found is None:
            position = word.end()
            continue
        start, position = found.span(found.lastindex or 0)
        parts += [line[kept:start], MASK]
        kept = position
    return b"".join([*parts, line[kept:]]) if parts else line
