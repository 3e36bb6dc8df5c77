"""One response of what several workers said: a chat completion, or a completion, chunk by chunk.

What the first worker says is passed on as it is. What another one says after it keeps the response's id, time and
model, has no second role, and counts what was said before: a reader cannot tell that it came from elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from rbee.contracts.dialects import DONE, Dialect
from rbee.contracts.frames import frames_data
from rbee.contracts.operations import ChatCompletion
from rbee.jobs.records import JobRecord
from rbee.queen.said import Said

_NAMES = ("id", "created", "model", "system_fingerprint")


class Splice:
    """Makes the chunks of one response.

    Attributes:
        said: The answer so far.
        is_full: As many tokens are said as may be: of the attempt that follows, only its end is wanted.
        is_done: The response has its last frame.
        is_usage_told: The response has told how many tokens it took.
    """

    def __init__(self, dialect: Dialect, names: Mapping[str, Any] | None = None) -> None:
        """Begin; `names` are `id`, `created` and `model` of every chunk, by default those of the first one."""
        self._dialect = dialect
        self._is_chat = dialect.path == ChatCompletion.path
        self._names = dict(names or {})
        self._roles: set[int] = set()
        self.said = Said()
        self.is_full = False
        self.is_done = False
        self.is_usage_told = False

    def hear(self, chunk: Any, attempt: int) -> dict[str, Any] | None:
        """Take the next chunk of an attempt as an engine streams it; see `take`."""
        delta = self._dialect.delta(chunk) if isinstance(chunk, dict) else None
        timings = (chunk.get("timings") if isinstance(chunk, dict) else None) or {}
        counted = self.said.tokens.get(attempt, 0) + bool(delta and delta.text)
        prompt = timings["cache_n"] + timings["prompt_n"] if {"cache_n", "prompt_n"} <= timings.keys() else None
        return self.take(
            {
                "ts": time.time_ns(),
                "attempt": attempt,
                "text": delta.text if delta else "",
                "channel": delta.channel if delta else "answer",
                "tokens": timings.get("predicted_n") or counted,
                "prompt_tokens": prompt,
                "finish_reason": _finish_of(chunk),
                "chunk": chunk,
            }
        )

    def take(self, piece: Mapping[str, Any]) -> dict[str, Any] | None:
        """Take the next piece, a `token` event with its `chunk`; returns the chunk that is sent for it, if any."""
        chunk, attempt = piece.get("chunk"), piece["attempt"]
        before = self._before(attempt)
        is_later = any(number != attempt for number in self.said.frames)
        finished = self.said.finish_reason
        piece = {**piece, "finish_reason": finished or piece.get("finish_reason")}
        if self.is_full:
            ending = finished or ("length" if piece["finish_reason"] else None)
            piece = {**piece, "text": "", "tokens": 0, "finish_reason": ending}
        self.said.take(piece)
        if not isinstance(chunk, dict):
            return None
        for name in _NAMES:
            if name in chunk:
                self._names.setdefault(name, chunk[name])
        made = {**chunk, **{name: value for name, value in self._names.items() if name in chunk}}
        if chunk.get("choices"):
            parts = [self._part(part, has_finished=finished is not None) for part in chunk["choices"]]
            made["choices"] = [part for part in parts if part is not None]
        if is_later:
            self._count(made, before)
        self.is_usage_told |= bool(made.get("usage"))
        says_nothing = bool(chunk.get("choices")) and not made["choices"] and not made.get("usage")
        return None if says_nothing else made

    def _part(self, part: dict[str, Any], *, has_finished: bool) -> dict[str, Any] | None:
        """Return a choice's part of a chunk; None when it would only say again what has been said."""
        delta, index, finish = part.get("delta"), part.get("index", 0), part.get("finish_reason")
        if self.is_full:
            if finish is None or has_finished:
                return None
            nothing: dict[str, Any] = {"text": ""} if delta is None else {"delta": {}}
            return {**part, **nothing, "finish_reason": "length"}
        if not isinstance(delta, dict) or "role" not in delta:
            return part
        if index not in self._roles:
            self._roles.add(index)
            return part
        more = {key: value for key, value in delta.items() if key != "role"}
        is_empty = finish is None and all(value is None for value in more.values())
        return None if is_empty else {**part, "delta": more}

    def _count(self, chunk: dict[str, Any], before: int) -> None:
        """Have a chunk of a later attempt count what was said before it, and that as no part of the prompt."""
        usage, timings = chunk.get("usage"), chunk.get("timings")
        if isinstance(usage, dict):
            prompt, completion = self._counts(usage["prompt_tokens"], usage["completion_tokens"], before)
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
            chunk["usage"] = usage_of(prompt, completion) | (
                {"prompt_tokens_details": {"cached_tokens": min(cached, prompt)}} if cached is not None else {}
            )
        if isinstance(timings, dict) and {"cache_n", "prompt_n", "predicted_n"} <= timings.keys():
            found = timings["cache_n"] + timings["prompt_n"]
            prompt, completion = self._counts(found, timings["predicted_n"], before)
            cached = min(timings["cache_n"], prompt)
            told = {"cache_n": cached, "prompt_n": prompt - cached, "predicted_n": completion}
            chunk["timings"] = {**timings, **told}

    def _counts(self, prompt: int, completion: int, before: int) -> tuple[int, int]:
        """Return the tokens of prompt and answer, of what the last attempt says of its own."""
        first = self.said.prompt_tokens
        return max(0, prompt - before) if first is None else first, before + (0 if self.is_full else completion)

    def counts(self, prompt: int | None, completion: int | None, attempt: int) -> dict[str, int | None]:
        """Return what the whole answer took, of what the closing line of its last attempt says."""
        before = self._before(attempt)
        if prompt is None or completion is None:
            return {"prompt_tokens": self.said.prompt_tokens, "completion_tokens": self.said.all_tokens}
        prompt, completion = self._counts(prompt, completion, before)
        return {"prompt_tokens": prompt, "completion_tokens": completion}

    def _before(self, attempt: int) -> int:
        return sum(tokens for number, tokens in self.said.tokens.items() if number != attempt)

    def story(self, text: str) -> dict[str, Any]:
        """Return a chunk that tells, as thinking, what a chat completion waits for."""
        delta: dict[str, Any] = {"reasoning_content": text}
        if not self._roles:
            self._roles.add(0)
            delta = {"role": "assistant", "content": None, **delta}
        return self._chunk([{"index": 0, "delta": delta, "finish_reason": None}])

    def rest(
        self, finish_reason: str, usage: Mapping[str, int | None], *, is_usage_asked: bool
    ) -> list[dict[str, Any]]:
        """Return the chunks that an answer still lacks which is whole otherwise."""
        chunks = []
        if self.said.finish_reason is None:
            part: dict[str, Any] = {"index": 0, "finish_reason": finish_reason}
            nothing: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": "", "logprobs": None}
            part |= nothing
            chunks.append(self._chunk([part]))
        if is_usage_asked and not self.is_usage_told:
            told = usage_of(usage.get("prompt_tokens"), usage.get("completion_tokens"))
            chunks.append(self._chunk([]) | {"usage": told})
        return chunks

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = "chat.completion.chunk" if self._is_chat else "text_completion"
        return {"choices": choices, **self._names, "object": name}


def replay(dialect: Dialect, frames: Iterable[bytes], attempt: int) -> Splice:
    """Read back what was passed on of a first attempt."""
    splice = Splice(dialect)
    for data in frames_data(b"".join(frames)):
        if data == DONE:
            splice.is_done = True
        else:
            splice.hear(msgspec.json.decode(data), attempt)
    return splice


def usage_of(prompt: int | None, completion: int | None) -> dict[str, Any]:
    """Tell what an answer took, as the API does."""
    total = None if prompt is None or completion is None else prompt + completion
    return {"completion_tokens": completion, "prompt_tokens": prompt, "total_tokens": total}


def _finish_of(chunk: Any) -> str | None:
    choices = chunk.get("choices") if isinstance(chunk, dict) else None
    found = choices[0].get("finish_reason") if choices else None
    return found if isinstance(found, str) else None


def names_of(record: JobRecord, model: str | None, prefix: str = "chatcmpl-") -> dict[str, Any]:
    """Return the id, time and model of a response that the queen names: the same whenever it is read."""
    ulid = record.job_id.partition("-")[2]
    return {"id": prefix + ulid, "created": int(record.created_at), "model": model or record.model}


def story_of(event: Mapping[str, Any]) -> str:
    """Return the sentence of a narration, as a line of its own."""
    return f"{event['message']}\n"
