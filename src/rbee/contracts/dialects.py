"""The four forms in which an engine streams an answer, and what each of their chunks says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from msgspec import Struct

from rbee.contracts.assembly import (
    AnthropicAssembler,
    Assembler,
    ChatAssembler,
    CompletionAssembler,
    ResponsesAssembler,
)

Channel = Literal["answer", "reasoning"]
Chunk = Mapping[str, Any]

DONE = b"[DONE]"
# An answer that does not stream shows by a blank that it grows: so many seconds after the last one at the soonest.
BLANK_EVERY_S = 1.0


class Delta(Struct, frozen=True):
    """The piece of text a chunk adds, '' when it adds none."""

    text: str = ""
    channel: Channel = "answer"


class Dialect(Struct, frozen=True, kw_only=True):
    """How one route streams.

    Attributes:
        path: The route.
        last_lines: What a line of the last frame begins with.
        last_types: The `type` of the last chunk, where the stream does not end in `[DONE]`.
        delta: Reads the text off a chunk.
        assembler: Makes what puts the chunks together to the answer of a call that does not stream.
        list_field: The field that must not be an empty list; the engine would answer to nothing.
    """

    path: str
    last_lines: tuple[bytes, ...]
    last_types: frozenset[str]
    delta: Callable[[Chunk], Delta]
    assembler: Callable[[], Assembler]
    list_field: str | None = None


def _first_choice(chunk: Chunk) -> Mapping[str, Any]:
    choices = chunk.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}


def _delta_of(answer: Any, reasoning: Any = None) -> Delta:
    if isinstance(answer, str) and answer:
        return Delta(answer)
    if isinstance(reasoning, str) and reasoning:
        return Delta(reasoning, "reasoning")
    return Delta()


def chat_delta(chunk: Chunk) -> Delta:
    """Read the text off a chunk of `/v1/chat/completions`."""
    delta = _first_choice(chunk).get("delta")
    if not isinstance(delta, dict):
        return Delta()
    return _delta_of(delta.get("content"), delta.get("reasoning_content") or delta.get("reasoning"))


def completion_delta(chunk: Chunk) -> Delta:
    """Read the text off a chunk of `/v1/completions`."""
    return _delta_of(_first_choice(chunk).get("text"))


def responses_delta(chunk: Chunk) -> Delta:
    """Read the text off an event of `/v1/responses`."""
    kind, delta = chunk.get("type"), chunk.get("delta")
    if kind == "response.output_text.delta":
        return _delta_of(delta)
    is_reasoning = kind in {"response.reasoning_text.delta", "response.reasoning_summary_text.delta"}
    return _delta_of(None, delta) if is_reasoning else Delta()


def messages_delta(chunk: Chunk) -> Delta:
    """Read the text off an event of `/v1/messages`."""
    delta = chunk.get("delta")
    if chunk.get("type") != "content_block_delta" or not isinstance(delta, dict):
        return Delta()
    return _delta_of(delta.get("text"), delta.get("thinking"))


DIALECTS: dict[str, Dialect] = {
    dialect.path: dialect
    for dialect in (
        Dialect(
            path="/v1/chat/completions",
            last_lines=(b"data: " + DONE,),
            last_types=frozenset(),
            delta=chat_delta,
            assembler=ChatAssembler,
            list_field="messages",
        ),
        Dialect(
            path="/v1/completions",
            last_lines=(b"data: " + DONE,),
            last_types=frozenset(),
            delta=completion_delta,
            assembler=CompletionAssembler,
            list_field="prompt",
        ),
        Dialect(
            path="/v1/responses",
            last_lines=(b"event: response.completed", b"event: response.incomplete", b"event: response.failed"),
            last_types=frozenset({"response.completed", "response.incomplete", "response.failed"}),
            delta=responses_delta,
            assembler=ResponsesAssembler,
            list_field="input",
        ),
        Dialect(
            path="/v1/messages",
            last_lines=(b"event: message_stop",),
            last_types=frozenset({"message_stop"}),
            delta=messages_delta,
            assembler=AnthropicAssembler,
            list_field="messages",
        ),
    )
}
