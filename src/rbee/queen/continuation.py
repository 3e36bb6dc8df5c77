"""What comes after an answer that its worker did not end: pure decisions.

An answer that has not begun is asked for again; one that has is continued from the text so far, which the engine
takes as the beginning of the assistant's message; one that only lacks its closing line is whole. What cannot be
continued faithfully is not invented.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from rbee.contracts.operations import Infer
from rbee.errors import RbeeError, WorkerLostError
from rbee.queen.said import Said

_PASSED_ON = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos", "response_format")


class Whole(Struct, frozen=True):
    """Nothing of the answer is missing."""

    finish_reason: str


class Again(Struct, frozen=True):
    """Place the job again."""


class GiveUp(Struct, frozen=True):
    """End the job with this error."""

    error: RbeeError


def after_loss(operation: Infer, said: Said, error: RbeeError, *, used: int) -> Whole | Again | GiveUp:
    """Decide what to do when a worker, or the start of one, was lost.

    Args:
        operation: What was asked.
        said: The answer so far.
        error: How it was lost.
        used: How many of the job's attempts that makes.
    """
    if said.finish_reason is not None and not said.has_gap:
        return Whole(said.finish_reason)
    if operation.max_tokens is not None and 0 < operation.max_tokens <= sum(said.tokens.values()):
        return Whole("length")
    if used >= operation.attempts:
        return GiveUp(error)
    why = why_not(operation, said)
    return GiveUp(_not_continued(error, why)) if why else Again()


def why_not(operation: Infer, said: Said) -> str:
    """Say why an answer cannot be continued faithfully; empty where it can, and where it has not begun."""
    if said.has_gap:
        return "a part of it is lost"
    if said.has_reasoning:
        return "it holds reasoning, which an engine does not take back"
    last = operation.messages[-1] if operation.messages else None
    if not said.text or last is None or last.role != "assistant":
        return ""
    is_text = isinstance(last.content, str) and not last.tool_calls and not last.reasoning_content
    return "" if is_text else "the conversation ends in an assistant's message that is more than text"


def _not_continued(error: RbeeError, why: str) -> RbeeError:
    return WorkerLostError(
        f"{error.message} The answer cannot be continued on another worker: {why}.", details=error.details
    )


def chat_body(operation: Infer, said: Said) -> dict[str, Any]:
    """Make the engine's request: what is absent stays the engine's choice, what was said is gone on from."""
    messages: list[Any] = []
    if operation.system is not None:
        messages.append({"role": "system", "content": operation.system})
    if operation.messages is not None:
        messages.extend(operation.messages)
    else:
        messages.append({"role": "user", "content": operation.prompt})
    body: dict[str, Any] = {"messages": messages, "stream": True}
    for name in _PASSED_ON:
        value = getattr(operation, name)
        if value is not None:
            body[name] = value
    if said.text:
        _go_on_from(body, operation, said)
    return body


def _go_on_from(body: dict[str, Any], operation: Infer, said: Said) -> None:
    messages = body["messages"]
    begun = ""
    if operation.messages and operation.messages[-1].role == "assistant":  # the caller's own beginning
        begun = str(messages.pop().content)
    messages.append({"role": "assistant", "content": begun + said.text})
    if operation.max_tokens is not None:
        body["max_tokens"] = operation.max_tokens - sum(said.tokens.values())
