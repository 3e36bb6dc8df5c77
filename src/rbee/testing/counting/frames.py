"""The frames of a chat answer, in the very form in which llama.cpp's server streams them."""

from __future__ import annotations

import secrets
import time
from typing import Any

import msgspec

from rbee.testing.counting.count import Piece


class ChatFrames:
    """Makes the frames of one answer.

    Args:
        model: The name the model is shown under.
        prompt_tokens: How many tokens the prompt has.
        timings: Every frame carries the timings, not the last one alone.
        usage: A last chunk tells the usage (`stream_options.include_usage`).
    """

    def __init__(self, model: str, prompt_tokens: int, *, timings: bool, usage: bool) -> None:
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._timings = timings
        self._usage = usage
        self._started_s = time.monotonic()
        self._has_begun = False
        self._head = {"created": int(time.time()), "id": f"chatcmpl-{secrets.token_hex(16)}"}

    def of(self, piece: Piece) -> bytes:
        """Return the frames of one piece: none where it is held back, and the role's before the first."""
        frames = b""
        if not self._has_begun:
            self._has_begun = True
            # It carries timings only where the first token's text was held back.
            held = piece if not piece.text and piece.finish_reason is None else None
            frames += self._chunk({"role": "assistant", "content": None}, held)
        if piece.text:
            frames += self._chunk({"content": piece.text}, piece)
        if piece.finish_reason is not None:
            frames += self._ending(piece)
        return frames

    def _ending(self, piece: Piece) -> bytes:
        last = self._chunk({}, piece, finish_reason=piece.finish_reason, is_last=not self._usage)
        return last + (self._usage_chunk(piece) if self._usage else b"") + b"data: [DONE]\n\n"

    def _chunk(
        self,
        delta: dict[str, Any],
        piece: Piece | None,
        *,
        finish_reason: str | None = None,
        is_last: bool = False,
    ) -> bytes:
        choice = {"finish_reason": finish_reason, "index": 0, "delta": delta}
        chunk = self._with_head({"choices": [choice]})
        if piece is not None and (self._timings or is_last):
            chunk["timings"] = self._timings_of(piece.tokens)
        return _frame(chunk)

    def _usage_chunk(self, piece: Piece) -> bytes:
        made, asked = piece.tokens, self._prompt_tokens
        usage = {"completion_tokens": made, "prompt_tokens": asked, "total_tokens": made + asked}
        return _frame({**self._with_head({"choices": []}), "usage": usage, "timings": self._timings_of(made)})

    def _with_head(self, chunk: dict[str, Any]) -> dict[str, Any]:
        more = {"model": self._model, "system_fingerprint": "counting", "object": "chat.completion.chunk"}
        return {**chunk, **self._head, **more}

    def _timings_of(self, made: int) -> dict[str, Any]:
        elapsed_s = max(time.monotonic() - self._started_s, 1e-6)
        return {
            "cache_n": 0,
            "prompt_n": self._prompt_tokens,
            "predicted_n": made,
            "predicted_ms": elapsed_s * 1000,
            "predicted_per_second": made / elapsed_s,
        }


def _frame(chunk: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"
