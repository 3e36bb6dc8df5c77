"""What an engine says otherwise than the clients' own libraries take it, put right on the way. All pure.

Each of these was met with llama.cpp's server; an engine that says it rightly is passed on as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from rbee.errors import InvalidRequestError
from rbee.worker.dialects import DONE
from rbee.worker.frames import frames_data

Chunk = Mapping[str, Any]

CHAT, COMPLETIONS, RESPONSES, MESSAGES = (
    *("/v1/chat/completions", "/v1/completions"),
    *("/v1/responses", "/v1/messages"),
)
_IN_PART = re.compile(r"response\.(?:content_part|output_text|refusal|reasoning_text)\.")
_IN_SUMMARY = re.compile(r"response\.reasoning_summary_")

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


def prepare(path: str, asked: dict[str, Any], own_model: str) -> dict[str, Any]:
    """Return what the engine is asked: `asked` itself where there is nothing to say otherwise.

    The engine gets its own name for the model, and a schema of the Responses API by the name that it heeds.

    Raises:
        InvalidRequestError: A schema is asked for where the engine would answer without heeding it.
    """
    changes: dict[str, Any] = {}
    if asked.get("model", own_model) != own_model:
        changes["model"] = own_model
    if path == RESPONSES:
        schema = _format_of(asked.get("text"))
        if schema is not None and "response_format" not in asked:
            changes["response_format"] = schema
    elif path == MESSAGES and _format_of(asked.get("output_config")) is not None:
        raise InvalidRequestError(
            "Answers by a schema are not to be had on /v1/messages.",
            param="output_config",
            remedy="Ask /v1/chat/completions with `response_format`, or /v1/responses with `text.format`.",
        )
    return {**asked, **changes} if changes else asked


def _format_of(holder: Any) -> dict[str, Any] | None:
    """Return the schema that an answer is asked by, as `response_format` has it; None for free text."""
    found = holder.get("format") if isinstance(holder, dict) else None
    if not isinstance(found, dict) or found.get("type") in (None, "text"):
        return None
    if found["type"] != "json_schema":
        return found
    return {"type": "json_schema", "json_schema": {key: value for key, value in found.items() if key != "type"}}


class Mender:
    """Mends what the engine says of one request."""

    def __init__(self, path: str, asked: Mapping[str, Any], own_model: str) -> None:
        """Take what was asked.

        Args:
            path: The route.
            asked: The request's body; the answer repeats its `model`.
            own_model: What the engine calls the model.
        """
        name = asked.get("model")
        self.model = name if isinstance(name, str) else own_model
        self._own: re.Pattern[bytes] = re.compile(rb'"model":\s?' + re.escape(_encode(own_model)))
        self._named = b'"model":' + _encode(self.model)
        self._is_renamed = self.model != own_model
        self._chunks = _chunks_of(path, asked)

    def frames(self, whole: bytes) -> bytes:
        """Mend some whole frames of a stream."""
        if self._chunks is not None and self._chunks.mark in whole:
            whole = b"".join(self._chunks.frame(data) for data in frames_data(whole))
        return self.named(whole)

    def chunk(self, chunk: Chunk) -> Chunk:
        """Mend one chunk of an answer that is kept, of which each has its line."""
        mended = self._chunks.chunk(chunk) if isinstance(self._chunks, _ResponseEvents) else chunk
        if self._is_renamed or isinstance(self._chunks, _StopSequence):
            return self.whole(mended)
        return mended

    def whole(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        """Mend an answer that is whole, or a chunk: the model's name wherever it has one, and why it stopped."""
        named = {"model": self.model} if "model" in answer else {}
        inner = {
            key: {**answer[key], "model": self.model}
            for key in ("response", "message")
            if isinstance(answer.get(key), dict) and "model" in answer[key]
        }
        return _rightly_stopped({**answer, **named, **inner})

    def named(self, data: bytes) -> bytes:
        """Put the model's name into JSON; in the text of an answer these quotes would be escaped."""
        if not self._is_renamed:
            return data
        mended: bytes = self._own.sub(lambda _: self._named, data)
        return mended


class _Chunks(Protocol):
    """Mends the chunks of frames that hold `mark`."""

    mark: bytes

    def frame(self, data: bytes) -> bytes:
        """Return the frame of one chunk; nothing where it has none."""


def _chunks_of(path: str, asked: Mapping[str, Any]) -> _Chunks | None:
    choices = asked.get("n")
    if path == RESPONSES:
        return _ResponseEvents()
    if path == COMPLETIONS:
        return _NoNulls()
    if path == MESSAGES:
        return _StopSequence()
    if path == CHAT and isinstance(choices, int) and choices > 1:
        return _OneUsage()
    return None


class _NoNulls:
    """Leaves out the `null` that stands where a choice has no first words."""

    mark = b"data: null"

    def frame(self, data: bytes) -> bytes:
        return b"" if data == b"null" else b"data: " + data + b"\n\n"


class _StopSequence:
    """Says that it was a stop sequence that ended a message, where the engine names one but not as the reason."""

    mark = b'"stop_sequence":"'

    def frame(self, data: bytes) -> bytes:
        chunk = _decode(data)
        kind = chunk.get("type") if isinstance(chunk, dict) else None
        if isinstance(chunk, dict) and _is_wrongly_stopped(chunk.get("delta")):
            data = _encode(_rightly_stopped(chunk))
        return (b"event: " + kind.encode() + b"\n" if isinstance(kind, str) else b"") + b"data: " + data + b"\n\n"


def _is_wrongly_stopped(told: Any) -> bool:
    return isinstance(told, dict) and bool(told.get("stop_sequence")) and told.get("stop_reason") == "end_turn"


def _rightly_stopped(answer: dict[str, Any]) -> dict[str, Any]:
    """Return an answer or its last delta with the reason it has."""
    delta = answer.get("delta")
    if _is_wrongly_stopped(delta):
        answer = {**answer, "delta": {**answer["delta"], "stop_reason": "stop_sequence"}}
    return {**answer, "stop_reason": "stop_sequence"} if _is_wrongly_stopped(answer) else answer


class _OneUsage:
    """Makes the usage of several choices, told for each of them, the one of them all, told last."""

    mark = b""

    def __init__(self) -> None:
        self._last: dict[str, Any] | None = None
        self._completion_tokens = 0

    def frame(self, data: bytes) -> bytes:
        if data == DONE:
            return self._total() + b"data: [DONE]\n\n"
        chunk = _decode(data) if b'"usage"' in data else None
        if not isinstance(chunk, dict) or chunk.get("choices") != [] or not isinstance(chunk.get("usage"), dict):
            return b"data: " + data + b"\n\n"
        self._last = chunk
        self._completion_tokens += chunk["usage"].get("completion_tokens") or 0
        return b""

    def _total(self) -> bytes:
        if self._last is None:
            return b""
        usage = dict(self._last["usage"])
        usage["completion_tokens"] = self._completion_tokens
        usage["total_tokens"] = (usage.get("prompt_tokens") or 0) + self._completion_tokens
        told: bytes = _encode({**self._last, "usage": usage})
        return b"data: " + told + b"\n\n"


class _ResponseEvents:
    """Numbers the events of the Responses API, their items and their parts, where the engine does not."""

    mark = b""

    def __init__(self) -> None:
        self._number = 0
        self._items: dict[str, int] = {}
        self._parts: dict[str, int] = {}

    def frame(self, data: bytes) -> bytes:
        chunk = _decode(data)
        if not isinstance(chunk, dict) or not isinstance(chunk.get("type"), str):
            return b"data: " + data + b"\n\n"
        kind: str = chunk["type"]
        return b"event: " + kind.encode() + b"\ndata: " + _encode(self.chunk(chunk)) + b"\n\n"

    def chunk(self, chunk: Chunk) -> Chunk:
        kind = str(chunk.get("type"))
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
