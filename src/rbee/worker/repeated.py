"""Take out of an engine's words what they repeat of a request: narration must not have it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# What a request is about; all else in it is parameters.
_ABOUT = frozenset(
    {"messages", "prompt", "input", "system", "instructions", "tools", "functions", "suffix", "prediction"}
    | {"query", "documents", "input_prefix", "input_suffix", "input_extra"}
)
# Words of the form, within.
_FORM = frozenset({"role", "type"})
# A piece so long that stands in both was repeated; a shorter text only as a whole.
PIECE_CHARS = 8
_WHOLE_CHARS = 4
# In more than this, pieces are not looked for: nothing of the engine's words is narrated.
TEXT_CHARS_MAX = 256 * 1024
HIDDEN = "…"


def without_repeated(words: str, asked: Mapping[str, Any]) -> str:
    """Return an engine's words with `…` for each piece that stands in what a request is about.

    Args:
        words: What the engine said, at most some hundred characters.
        asked: The request's body.
    """
    texts = [text for key in _ABOUT & asked.keys() for text in _texts(asked[key])]
    if sum(map(len, texts)) > TEXT_CHARS_MAX:
        return HIDDEN
    for text in sorted((text for text in texts if _WHOLE_CHARS <= len(text) < PIECE_CHARS), key=len, reverse=True):
        words = words.replace(text, HIDDEN)
    return _without_pieces(words, "\n".join(texts))


def _texts(value: Any) -> Iterator[str]:
    """Return all text within a value, without the words of its form."""
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            pending += [inner for key, inner in one.items() if key not in _FORM]
        elif isinstance(one, list):
            pending += one


def _without_pieces(words: str, text: str) -> str:
    kept: list[str] = []
    at = 0
    while at < len(words):
        end = at + PIECE_CHARS
        if end > len(words) or words[at:end] not in text:
            kept.append(words[at])
            at += 1
            continue
        while end < len(words) and words[at : end + 1] in text:
            end += 1
        kept.append(HIDDEN)
        at = end
    return "".join(kept)
