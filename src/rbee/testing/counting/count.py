"""What a prompt asks a counting engine for, and the answer to it: a pure function."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from msgspec import Struct

LAST = 10**9

Act = Literal[
    "sigkill", "abort", "segfault", "exit", "exception", "orphan", "freeze", "silence", "chatter", "forge"
]

_FROM_TO = re.compile(r"Count from (\d+) to (\d+)\.")
_RATE = re.compile(r"\brate=([\d.]+)")
_CLAIMS = re.compile(r"\bclaims=(job-\w+)")
_ACT = re.compile(r"\bdo=([a-z]+)@(\d+)")


class Count(Struct, frozen=True, kw_only=True):
    """One count: its prompt is `str(count)`, and what it must be answered with is `answer_of(count)`.

    Attributes:
        first: The number it begins with.
        last: The last number; without a lower limit of tokens the answer ends by itself there.
        rate: Tokens a second; the worker's own rate when None.
        acts: What the worker does once the token of a number is written: die (`sigkill abort segfault exit
            exception orphan`), stop itself (`freeze`), make no more tokens (`silence`), print what is no event
            (`chatter`), claim what is not its own (`forge`). Each happens at its number only, so an answer that
            is continued behind it goes on.
        claims: The job that is spoken of by who claims what is not its own.
        canary: A word that must be found in no log.
    """

    first: int = 1
    last: int = LAST
    rate: float | None = None
    acts: dict[int, Act] = {}
    claims: str = ""
    canary: str = ""

    def __str__(self) -> str:
        """Return the prompt."""
        words = [f"Count from {self.first} to {self.last}."]
        if self.rate is not None:
            words.append(f"rate={self.rate:g}")
        words += [f"do={act}@{number}" for number, act in self.acts.items()]
        words += [f"claims={self.claims}"] if self.claims else []
        return " ".join([*words, self.canary]).strip()

    @classmethod
    def read(cls, prompt: str) -> Count:
        """Read a prompt; one of another kind asks to count from 1."""
        span, rate, claims = _FROM_TO.search(prompt), _RATE.search(prompt), _CLAIMS.search(prompt)
        return cls(
            first=int(span[1]) if span else 1,
            last=int(span[2]) if span else LAST,
            rate=float(rate[1]) if rate else None,
            acts={int(number): act for act, number in _ACT.findall(prompt) if act in get_args(Act)},
            claims=claims[1] if claims else "",
        )

    def token(self, number: int) -> str:
        """Return the token of a number: its digits, and a space before all but the first."""
        return str(number) if number == self.first else f" {number}"


class Piece(Struct, frozen=True):
    """What one step of the engine says: its text, '' when it is held back, and the tokens made so far."""

    text: str
    tokens: int
    finish_reason: Literal["stop", "length"] | None = None


def pieces(
    count: Count, *, said: str = "", max_tokens: int | None = None, stop: Sequence[str] = ()
) -> Iterator[Piece]:
    """Yield what the engine makes, token by token, as llama.cpp does.

    Text that a stop word may begin with is held back; a stop word ends the answer and is no part of it. The last
    piece has a finish reason and no text. At least one token is made, also where none was asked for.

    Args:
        said: What an earlier worker said already (the assistant's prefill).

    Raises:
        ValueError: `said` is not made of this count's first tokens.
    """
    numbers = iter(range(_next_number(count, said), count.last + 1))
    limit = LAST if max_tokens is None or max_tokens < 0 else max(1, max_tokens)
    text, sent, made = "", 0, 0
    for number in numbers:
        text += count.token(number)
        made += 1
        found = min((at for at in (text.find(word, sent) for word in stop) if at >= 0), default=None)
        if found is not None:
            yield Piece(text[sent:found], made)
            yield Piece("", made, "stop")
            return
        is_held = made < limit and number < count.last and _may_stop(text[sent:], stop)
        yield Piece("" if is_held else text[sent:], made)
        sent = sent if is_held else len(text)
        if made == limit:
            yield Piece("", made, "length")
            return
    yield Piece("", made, "stop")


def answer_of(count: Count, *, max_tokens: int | None = None, stop: Sequence[str] = ()) -> str:
    """Return the one right answer."""
    return "".join(piece.text for piece in pieces(count, max_tokens=max_tokens, stop=stop))


def _next_number(count: Count, said: str) -> int:
    number, rest = count.first, said
    while rest:
        token = count.token(number)
        if not rest.startswith(token):
            raise ValueError("The prefill is not made of the first tokens of this count.")
        rest, number = rest[len(token) :], number + 1
    return number


def _may_stop(text: str, stop: Sequence[str]) -> bool:
    """Tell whether the end of `text` is the beginning of a stop word."""
    return any(text.endswith(word[:size]) for word in stop for size in range(1, len(word)))
