"""How the answers of each route are read by the clients' own libraries, where an engine has them otherwise. Pure.

Each of these was met with llama.cpp's server; an engine that says it rightly is passed on as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from rbee.contracts.dialects import DONE

Chunk = Mapping[str, Any]

_IN_PART = re.compile(r"response\.(?:content_part|output_text|refusal|reasoning_text)\.")
_IN_SUMMARY = re.compile(r"response\.reasoning_summary_")

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class Form:
    """What one route's answers look like: these, as they are.

    Attributes:
        marks: Frames with one of these are mended; without any, all are passed on byte for byte.
    """

    marks: tuple[bytes, ...] = ()

    def frame(self, data: bytes) -> bytes:
        """Return the frame of one chunk; nothing where it has none."""
        chunk = _object(data)
        mended = self.chunk(chunk)
        if mended is None:
            return b""
        kind = mended.get("type")
        event = f"event: {kind}\n".encode() if isinstance(kind, str) else b""
        return event + _data_line(data if mended is chunk else _encode(mended))

    def chunk(self, chunk: Chunk) -> Chunk | None:
        """Return a chunk as it should be; None where it waits to be told last."""
        return chunk

    def rest(self) -> Chunk | None:
        """Return what is told last, once the engine has said all."""
        return None

    def answer(self, answer: Chunk) -> Chunk:
        """Return a whole answer as it should be."""
        return answer


def _object(data: bytes) -> Chunk:
    """Decode a chunk; what is none has nothing to be mended."""
    try:
        chunk = _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return chunk if isinstance(chunk, dict) else {}


def _data_line(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


class Completions(Form):
    """Leaves out the `null` where a choice has no first words, and tells logprobs in the lists of that API."""

    marks = (b"data: null", b'"logprobs":{')

    def __init__(self) -> None:
        self._lengths: dict[int, int] = {}

    def frame(self, data: bytes) -> bytes:
        """Return the frame of one chunk; nothing where it has none."""
        return b"" if data == b"null" else super().frame(data)

    def chunk(self, chunk: Chunk) -> Chunk:
        """Return a chunk as it should be."""
        choices = chunk.get("choices")
        if not isinstance(choices, list) or not any(_is_of_chat(one.get("logprobs")) for one in choices):
            return chunk
        return {**chunk, "choices": [self._choice(one) for one in choices]}

    def answer(self, answer: Chunk) -> Chunk:
        """Return a whole answer as it should be."""
        return self.chunk(answer)

    def _choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        if not _is_of_chat(choice.get("logprobs")):
            return choice
        told = choice["logprobs"]["content"]
        offset = self._lengths.get(choice.get("index", 0), 0)
        offsets = []
        for one in told:
            offsets.append(offset)
            offset += len(one.get("token", ""))
        self._lengths[choice.get("index", 0)] = offset
        logprobs = {
            "tokens": [one.get("token", "") for one in told],
            "token_logprobs": [one.get("logprob") for one in told],
            "top_logprobs": [_by_token(one.get("top_logprobs") or ()) for one in told],
            "text_offset": offsets,
        }
        return {**choice, "logprobs": logprobs}


def _by_token(tops: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {top.get("token", ""): top.get("logprob") for top in tops}


def _is_of_chat(logprobs: Any) -> bool:
    return isinstance(logprobs, dict) and isinstance(logprobs.get("content"), list) and "tokens" not in logprobs


class Messages(Form):
    """Says that it was a stop sequence that ended a message, where the engine names one but not as the reason."""

    marks = (b'"stop_sequence":"',)

    def chunk(self, chunk: Chunk) -> Chunk:
        """Return a chunk as it should be."""
        delta = chunk.get("delta")
        return {**chunk, "delta": self.answer(delta)} if isinstance(delta, dict) else chunk

    def answer(self, answer: Chunk) -> Chunk:
        """Return a whole answer as it should be."""
        if answer.get("stop_sequence") and answer.get("stop_reason") == "end_turn":
            return {**answer, "stop_reason": "stop_sequence"}
        return answer


class ManyChoices(Form):
    """Makes the usage of several choices, told for each of them, the one of them all, told last."""

    marks = (b"",)

    def __init__(self) -> None:
        self._last: Chunk | None = None
        self._completion_tokens = 0

    def frame(self, data: bytes) -> bytes:
        """Return the frame of one chunk; nothing where it has none."""
        if data == DONE:
            rest = self.rest()
            return (_data_line(_encode(rest)) if rest is not None else b"") + _data_line(DONE)
        chunk = _object(data) if b'"usage"' in data else {}
        return b"" if self.chunk(chunk) is None else _data_line(data)

    def chunk(self, chunk: Chunk) -> Chunk | None:
        """Return a chunk as it is; None of one that says nothing but a usage."""
        usage = chunk.get("usage")
        if chunk.get("choices") != [] or not isinstance(usage, dict):
            return chunk
        self._last = chunk
        self._completion_tokens += usage.get("completion_tokens") or 0
        return None

    def rest(self) -> Chunk | None:
        """Return the usage of all choices, where any was told."""
        if self._last is None:
            return None
        usage = dict(self._last["usage"])
        usage["completion_tokens"] = self._completion_tokens
        usage["total_tokens"] = (usage.get("prompt_tokens") or 0) + self._completion_tokens
        return {**self._last, "usage": usage}


class ResponseEvents(Form):
    """Numbers the events of the Responses API, their items and their parts, where the engine does not."""

    marks = (b"",)

    def __init__(self) -> None:
        self._number = 0
        self._items: dict[str, int] = {}
        self._parts: dict[str, int] = {}

    def chunk(self, chunk: Chunk) -> Chunk:
        """Return a chunk as it should be."""
        kind = chunk.get("type")
        if not isinstance(kind, str):
            return chunk
        added: dict[str, Any] = {"sequence_number": self._number}
        self._number += 1
        response = chunk.get("response")
        if isinstance(response, dict):
            added["response"] = {"output": [], **response}
        item = self._item_of(kind, chunk)
        if item is not None:
            added["output_index"] = self._items.get(item, max(0, len(self._items) - 1))
            if _IN_PART.match(kind):
                added["content_index"] = self._part_of(kind, item)
            elif _IN_SUMMARY.match(kind):
                added["summary_index"] = 0
        return {**added, **{key: value for key, value in chunk.items() if key != "response"}}

    def _item_of(self, kind: str, chunk: Chunk) -> str | None:
        held = chunk.get("item")
        named = (held.get("id") or held.get("call_id")) if isinstance(held, dict) else chunk.get("item_id")
        item = named if isinstance(named, str) else None
        if kind == "response.output_item.added" and item is not None:
            self._items.setdefault(item, len(self._items))
        return item

    def _part_of(self, kind: str, item: str) -> int:
        if kind == "response.content_part.added":
            self._parts[item] = self._parts.get(item, -1) + 1
        return max(0, self._parts.get(item, 0))
