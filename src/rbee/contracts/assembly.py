"""Put a streamed answer together to the one response of a call that did not ask for a stream.

An engine stops when the reader of a stream leaves, but not when the reader of a single response does; so it is
always asked for a stream.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from rbee.errors import WorkerError

MAX_CHOICES = 256

_GROWING = frozenset({"text", "thinking", "signature", "partial_json"})


class Assembler(Protocol):
    """Takes the chunks of one answer in order."""

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Take the next chunk."""

    def result(self) -> dict[str, Any]:
        """Return the whole answer.

        Raises:
            WorkerError: The chunks do not make one.
        """


class _Choices:
    """What `/v1/chat/completions` and `/v1/completions` have in common: choices by index, and usage."""

    object_name = ""

    def __init__(self) -> None:
        self._envelope: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._timings: dict[int, Mapping[str, Any]] = {}
        self._told_usage: Mapping[str, Any] | None = None
        self._lone_usage: Mapping[str, Any] | None = None

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Take the next chunk."""
        for key, value in chunk.items():
            if key not in {"choices", "usage", "timings"}:
                self._envelope.setdefault(key, value)
        self._note_usage(chunk)
        for part in chunk.get("choices") or ():
            index = part.get("index", 0)
            if index not in self._choices and len(self._choices) >= MAX_CHOICES:
                raise WorkerError("The engine sent more choices than can be put together.")
            choice = self._choices.setdefault(index, self._new_choice(index))
            self._add_part(choice, part)
            if part.get("logprobs"):
                choice["logprobs"] = _joined_logprobs(choice.get("logprobs"), part["logprobs"])
            if part.get("finish_reason") is not None:
                choice["finish_reason"] = part["finish_reason"]
            if chunk.get("timings"):
                self._timings[index] = chunk["timings"]

    def result(self) -> dict[str, Any]:
        """Return the whole answer."""
        if not self._choices:
            raise WorkerError("The engine sent an answer without a choice.")
        choices = [self._choices[index] for index in sorted(self._choices)]
        answer = {**self._envelope, "object": self.object_name, "choices": [self._whole(one) for one in choices]}
        if self._timings:
            answer["usage"] = self._usage()
            answer["timings"] = self._timings[min(self._timings)]
        elif usage := self._lone_usage or self._told_usage:
            answer["usage"] = usage
        return answer

    def _note_usage(self, chunk: Mapping[str, Any]) -> None:
        """Note a usage; those told by themselves are each of one choice, and of one prompt."""
        usage, before = chunk.get("usage"), self._lone_usage
        if not usage or chunk.get("choices") != []:
            self._told_usage = usage or self._told_usage
            return
        if before is not None:
            completion = before.get("completion_tokens", 0) + usage.get("completion_tokens", 0)
            usage = {**usage, "completion_tokens": completion}
            usage["total_tokens"] = usage.get("prompt_tokens", 0) + completion
        self._lone_usage = usage

    def _usage(self) -> dict[str, Any]:
        """Count as OpenAI does: the prompt once, every choice's answer."""
        first = self._timings[min(self._timings)]
        cached = int(first.get("cache_n", 0))
        prompt = cached + int(first.get("prompt_n", 0))
        completion = sum(int(timings.get("predicted_n", 0)) for timings in self._timings.values())
        return {
            "completion_tokens": completion,
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _new_choice(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def _add_part(self, choice: dict[str, Any], part: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _whole(self, choice: dict[str, Any]) -> dict[str, Any]:
        return choice


class ChatAssembler(_Choices):
    """Puts together `/v1/chat/completions`: content, reasoning and tool calls."""

    object_name = "chat.completion"

    def _new_choice(self, index: int) -> dict[str, Any]:
        return {"finish_reason": None, "index": index, "message": {"role": "assistant", "content": []}}

    def _add_part(self, choice: dict[str, Any], part: Mapping[str, Any]) -> None:
        message = choice["message"]
        for key, value in (part.get("delta") or {}).items():
            if key == "tool_calls":
                _add_tool_calls(message.setdefault("tool_calls", {}), value)
            elif key == "role":
                message["role"] = value
            elif isinstance(value, str):
                message.setdefault(key, []).append(value)
            elif value is not None:
                message[key] = value

    def _whole(self, choice: dict[str, Any]) -> dict[str, Any]:
        message: dict[str, Any] = {
            key: "".join(value) if isinstance(value, list) else value for key, value in choice["message"].items()
        }
        if "tool_calls" in message:
            calls = message["tool_calls"]
            message["tool_calls"] = [_whole_call(calls[index]) for index in sorted(calls)]
            message["content"] = message["content"] or None
        return {**choice, "message": message}


class CompletionAssembler(_Choices):
    """Puts together `/v1/completions`."""

    object_name = "text_completion"

    def _new_choice(self, index: int) -> dict[str, Any]:
        return {"text": [], "index": index, "logprobs": None, "finish_reason": None}

    def _add_part(self, choice: dict[str, Any], part: Mapping[str, Any]) -> None:
        choice["text"].append(part.get("text") or "")

    def _whole(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**choice, "text": "".join(choice["text"])}


class ResponsesAssembler:
    """Puts together `/v1/responses`, whose last event repeats the whole answer."""

    def __init__(self) -> None:
        self._response: dict[str, Any] | None = None

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Take the next event."""
        if chunk.get("type") in {"response.completed", "response.incomplete", "response.failed"}:
            self._response = chunk.get("response")

    def result(self) -> dict[str, Any]:
        """Return the whole answer."""
        if self._response is None:
            raise WorkerError("The engine broke off its answer.")
        return self._response


def _message_without_start() -> dict[str, Any]:
    """Begin a message whose `message_start` the engine left out.

    It does so when the answer's first token is only a part of a character, such as an emoji's first bytes. How
    many tokens the prompt has is then told nowhere.
    """
    usage = {"input_tokens": None, "output_tokens": 0}
    return {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": None,
        "usage": usage,
    }


class AnthropicAssembler:
    """Puts together `/v1/messages`."""

    def __init__(self) -> None:
        self._message: dict[str, Any] | None = None
        self._blocks: dict[int, dict[str, Any]] = {}
        self._parts: dict[int, dict[str, list[str]]] = {}

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Take the next event."""
        kind = chunk.get("type")
        if kind == "message_start":
            self._message = dict(chunk["message"])
        elif kind == "content_block_start":
            if self._message is None:
                self._message = _message_without_start()
            if len(self._blocks) >= MAX_CHOICES:
                raise WorkerError("The engine sent more content blocks than can be put together.")
            self._blocks[chunk["index"]] = dict(chunk["content_block"])
        elif kind == "content_block_delta":
            parts = self._parts.setdefault(chunk["index"], {})
            for key in _GROWING & chunk["delta"].keys():
                parts.setdefault(key, []).append(chunk["delta"][key])
        elif kind == "message_delta" and self._message is not None:
            self._message |= chunk["delta"]
            self._message["usage"] = {**self._message.get("usage", {}), **chunk.get("usage", {})}

    def result(self) -> dict[str, Any]:
        """Return the whole answer."""
        if self._message is None:
            raise WorkerError("The engine broke off its answer.")
        return {**self._message, "content": [self._whole(index) for index in sorted(self._blocks)]}

    def _whole(self, index: int) -> dict[str, Any]:
        block = dict(self._blocks[index])
        for key, parts in self._parts.get(index, {}).items():
            if key == "partial_json":
                block["input"] = _parsed("".join(parts))
            else:
                block[key] = block.get(key, "") + "".join(parts)
        return block


def _parsed(text: str) -> Any:
    """Read a tool's input; an answer cut off by its limit leaves it unfinished, and so empty."""
    try:
        return msgspec.json.decode(text) if text else {}
    except msgspec.DecodeError:
        return {}


def _joined_logprobs(before: dict[str, Any] | None, more: Mapping[str, Any]) -> dict[str, Any]:
    joined = before if before is not None else {}
    for key, value in more.items():
        if isinstance(value, list):
            joined.setdefault(key, []).extend(value)
        else:
            joined[key] = value
    return joined


def _add_tool_calls(calls: dict[int, dict[str, Any]], deltas: list[dict[str, Any]]) -> None:
    """Grow tool calls by their deltas: arguments come in pieces, everything else whole."""
    for delta in deltas:
        index = delta.get("index", len(calls))
        if index not in calls and len(calls) >= MAX_CHOICES:
            raise WorkerError("The engine sent more tool calls than can be put together.")
        call = calls.setdefault(index, {"type": "function", "function": {}, "arguments": []})
        function = delta.get("function") or {}
        call["arguments"].append(function.get("arguments") or "")
        call["function"] |= {key: value for key, value in function.items() if value is not None}
        call |= {key: value for key, value in delta.items() if key in {"id", "type"} and value is not None}


def _whole_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = {**call["function"], "arguments": "".join(call["arguments"])}
    return {**{key: value for key, value in call.items() if key != "arguments"}, "function": function}
