"""What a job's log holds of its answer so far, over all its attempts."""

from __future__ import annotations

from typing import Any

import msgspec

from rbee.contracts.events import seq_and_kind
from rbee.jobs import JobRegistry


class Said:
    """The pieces of an answer, taken event by event.

    Attributes:
        text: What was answered, in order.
        frames: How many token lines each attempt has.
        tokens: How many tokens each attempt generated.
        finish_reason: Why the engine stopped, where the last piece said so.
        prompt_tokens: How many tokens the prompt has, where an attempt said so before anything was answered.
        has_reasoning: Some of it is no answer but thinking.
        has_more: Some of it is neither: a call of a tool, or another answer beside the first.
        has_gap: Some of it was lost on the way.
        begun_in: The attempt that said the first of it; 0 before that.
        first_ns: When the first piece was said, in nanoseconds since 1970; 0 before it.
    """

    def __init__(self) -> None:
        self._parts: list[str] = []
        self.frames: dict[int, int] = {}
        self.tokens: dict[int, int] = {}
        self.finish_reason: str | None = None
        self.prompt_tokens: int | None = None
        self.has_reasoning = False
        self.has_more = False
        self.has_gap = False
        self.first_ns = 0
        self.begun_in = 0

    @property
    def text(self) -> str:
        """What was answered so far."""
        return "".join(self._parts)

    @property
    def all_tokens(self) -> int:
        """How many tokens were generated, over all attempts."""
        return sum(self.tokens.values())

    def recount(self, tokens: int) -> None:
        """Take how many tokens a tokenizer finds in the text, where that is more than was told."""
        missing = tokens - self.all_tokens
        if missing > 0:
            self.tokens[max(self.tokens)] += missing

    def take(self, event: dict[str, Any]) -> None:
        """Take one piece."""
        attempt, text = int(event.get("attempt") or 0), event.get("text") or ""
        self.frames[attempt] = self.frames.get(attempt, 0) + 1
        self.tokens[attempt] = int(event.get("tokens") or 0)
        self.finish_reason = event.get("finish_reason")
        if self.prompt_tokens is None and not self._parts:  # later ones hold what was said already
            self.prompt_tokens = event.get("prompt_tokens")
        self.has_more |= _is_more(event.get("chunk"))
        if not text:
            return
        self.begun_in = self.begun_in or attempt
        self.first_ns = self.first_ns or int(event["ts"])
        if event.get("channel") == "answer":
            self._parts.append(text)
        else:
            self.has_reasoning = True


def _is_more(chunk: Any) -> bool:
    """Tell whether a chunk says anything that is no text of the one answer."""
    choices = chunk.get("choices") if isinstance(chunk, dict) else None
    for choice in choices or ():
        delta = choice.get("delta") or {}
        if choice.get("index") or delta.get("tool_calls") or delta.get("function_call"):
            return True
    return False


async def read_said(registry: JobRegistry, job_id: str, *, before_attempt: int | None = None) -> Said:
    """Read a job's answer back from its log.

    Args:
        registry: Where the log is.
        job_id: The job.
        before_attempt: Leave out what this attempt, and later ones, said.
    """
    said, after = Said(), 0
    while True:
        page = await registry.read(job_id, after)
        if not page.frames:
            return said
        after = page.last_seq
        for line in page.events:
            kind = seq_and_kind(line)[1]
            if kind == "token":
                event = msgspec.json.decode(line)
                if before_attempt is None or int(event.get("attempt") or 0) < before_attempt:
                    said.take(event)
            elif kind == "gap":
                said.has_gap |= _may_hold_pieces(msgspec.json.decode(line))


def _may_hold_pieces(gap: dict[str, Any]) -> bool:
    """Tell whether pieces of an answer may be missing: they stand on a worker's stdout."""
    source = gap.get("source") or ""
    return gap.get("reason") == "log_full" or (source.startswith("worker-") and source.endswith("/stdout"))
