"""The engine of a simulated worker, and the one right answer to each prompt."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from rbee.testing.virtual_process import Process
from rbee.worker.engines import EngineTraits

PIECE_CHARS = 3
DONE = b"data: [DONE]\n\n"


def prompt_of(first: int, count: int) -> str:
    """Return a prompt that asks for `count` numbers from `first` on."""
    return f"Count {first} {count}"


def answer_to(prompt: str, max_tokens: int | None = None) -> str:
    """Return the whole answer to a prompt: numbers, counted up; each token is `PIECE_CHARS` of it."""
    _, first, count = prompt.split()
    text = "".join(f"{number}, " for number in range(int(first), int(first) + int(count)))
    return text if max_tokens is None else text[: max_tokens * PIECE_CHARS]


class CountingEngine:
    """Answers as llama.cpp does: an assistant's message at the end is gone on with, not repeated.

    Args:
        process: The worker it runs in.
        token_s: How long one token takes.
    """

    traits = EngineTraits()

    def __init__(self, process: Process, token_s: float) -> None:
        self._process = process
        self._token_s = token_s

    async def ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """Say which model there is."""
        return b'{"data":[]}'

    @asynccontextmanager
    async def stream(self, path: str, body: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
        """Answer one request."""
        yield self._frames(json.loads(body))

    async def _frames(self, asked: dict[str, Any]) -> AsyncIterator[bytes]:
        text, reason = _rest(asked)
        chance = self._process.chance
        yield _frame({"role": "assistant", "content": None}, None, 0)
        pieces = [text[at : at + PIECE_CHARS] for at in range(0, len(text), PIECE_CHARS)]
        for number, piece in enumerate(pieces, 1):
            await asyncio.sleep(self._token_s * chance.uniform(0.2, 1.8))
            yield _frame({"content": piece}, None, number)
        yield _frame({}, reason, len(pieces)) + DONE


def _rest(asked: dict[str, Any]) -> tuple[str, str]:
    """Return what is still to be said, and why it ends."""
    messages = asked["messages"]
    prefix = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
    prompt = next(message["content"] for message in messages if message["role"] == "user")
    whole = answer_to(prompt)
    if not whole.startswith(prefix):
        return f"<{prefix!r} is no beginning of the answer>", "stop"
    rest = whole[len(prefix) :]
    limit = asked.get("max_tokens")
    if limit is not None and len(rest) > limit * PIECE_CHARS:
        return rest[: limit * PIECE_CHARS], "length"
    return rest, "stop"


def _frame(delta: dict[str, Any], reason: str | None, number: int) -> bytes:
    chunk = {
        "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
        "timings": {"cache_n": 0, "prompt_n": 5, "predicted_n": number, "predicted_per_second": 50.0},
    }
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"
