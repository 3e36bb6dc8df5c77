"""What comes after an answer that its worker did not end: pure decisions.

An answer that has not begun is asked for again; one that has is continued from the text so far, which the engine
takes as the beginning of the assistant's message; one that only lacks its closing line is whole. What cannot be
continued faithfully is not invented.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from rbee.contracts.operations import ApiCall, ChatCompletion, Completion, Generation, Infer
from rbee.errors import RbeeError, WorkerLostError
from rbee.queen.said import Said

_PASSED_ON = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos", "response_format")
# The others answer in events that nobody but their engine makes.
_CONTINUED = (ChatCompletion.path, Completion.path)
_LIMITS = ("max_tokens", "max_completion_tokens", "n_predict")
# Of a call that is kept, these are asked of the queen; no engine knows them.
_QUEENS = frozenset({"store", "background"})
_TOLD_APART = ("logprobs", "top_logprobs", "n_probs")
_SEVERAL = ("n", "best_of", "n_cmpl")
_TOOLS = ("tools", "functions")
# What an engine applies to a completion from its first token on, not from that of the prompt's last part.
_FROM_THE_FIRST_TOKEN = ("grammar", "json_schema", "response_format")


class Asked(Struct, frozen=True, kw_only=True):
    """What an engine is asked for.

    Attributes:
        path: The route.
        body: As the first attempt has it.
        attempts: How often the answer may be placed.
    """

    path: str
    body: dict[str, Any]
    attempts: int


class Whole(Struct, frozen=True):
    """Nothing of the answer is missing."""

    finish_reason: str


class Again(Struct, frozen=True):
    """Place the job again."""


class GiveUp(Struct, frozen=True):
    """End the job with this error."""

    error: RbeeError


def asked_of(operation: Generation, model: str | None) -> Asked:
    """Return what the engine is asked for a kept answer; what is absent stays the engine's choice."""
    if isinstance(operation, Infer):
        return Asked(path=ChatCompletion.path, body=_infer_body(operation), attempts=operation.attempts)
    assert isinstance(operation, ApiCall)
    assert operation.request is not None, "a kept call has its whole body"
    body = {key: value for key, value in operation.request.items() if key not in _QUEENS}
    if model is not None:
        body.setdefault("model", model)
    if body.get("stream") is not True:
        body.pop("stream_options", None)
    return Asked(path=operation.path, body=body, attempts=operation.attempts)


def _infer_body(operation: Infer) -> dict[str, Any]:
    messages: list[Any] = []
    if operation.system is not None:
        messages.append({"role": "system", "content": operation.system})
    if operation.messages is not None:
        messages.extend(msgspec.to_builtins(operation.messages))
    else:
        messages.append({"role": "user", "content": operation.prompt})
    body: dict[str, Any] = {"messages": messages, "stream": True}
    for name in _PASSED_ON:
        value = getattr(operation, name)
        if value is not None:
            body[name] = value
    return body


def after_loss(asked: Asked, said: Said, error: RbeeError, *, used: int) -> Whole | Again | GiveUp:
    """Decide what to do when a worker, or the start of one, was lost.

    Args:
        asked: What was asked.
        said: The answer so far.
        error: How it was lost.
        used: How many of the job's attempts that makes.
    """
    if not said.has_gap and not _is_of_several(asked):
        if said.finish_reason is not None:
            return Whole(said.finish_reason)
        if asked.path in _CONTINUED and has_all_tokens(asked, said):
            return Whole("length")
    if used >= asked.attempts:
        return GiveUp(error)
    why = why_not(asked, said)
    return GiveUp(not_continued(error, why)) if why else Again()


def has_all_tokens(asked: Asked, said: Said) -> bool:
    """Tell whether as much is said as may be."""
    limits = [asked.body[name] for name in _LIMITS if _is_limit(asked.body.get(name))]
    return bool(limits) and min(limits) <= said.all_tokens


def _is_of_several(asked: Asked) -> bool:
    return any(_is_limit(asked.body.get(name)) and asked.body[name] > 1 for name in _SEVERAL)


def _is_limit(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def why_not(asked: Asked, said: Said) -> str:
    """Say why an answer cannot be continued faithfully; empty where it can, and where it has not begun."""
    if said.has_gap:
        return "a part of it is lost"
    if said.has_reasoning:
        return "it holds reasoning, which an engine does not take back"
    if said.has_more:
        return "it holds more than text"
    if asked.path not in _CONTINUED:
        return "its events cannot be gone on with" if any(said.frames.values()) else ""
    if not said.text:
        return ""
    return _why_not_by_body(asked)


def _why_not_by_body(asked: Asked) -> str:
    body = asked.body
    if _is_of_several(asked):
        return "it is one of several"
    if any(body.get(name) for name in _TOLD_APART):
        return "how likely its tokens were was asked for"
    if any(body.get(name) for name in _TOOLS):
        return "it may call tools"
    if asked.path == Completion.path:
        is_plain = isinstance(body.get("prompt"), str) and not body.get("echo") and not body.get("suffix")
        if not is_plain:
            return "its prompt is more than one text that the answer goes on from"
        return "its grammar would begin anew" if any(body.get(name) for name in _FROM_THE_FIRST_TOKEN) else ""
    if body.get("grammar"):
        return "its grammar would begin anew"
    return _why_not_by_last_message(body.get("messages"))


def _why_not_by_last_message(messages: Any) -> str:
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        return ""
    more = last.get("tool_calls") or last.get("reasoning_content")
    is_text = isinstance(last.get("content"), str) and not more
    return "" if is_text else "the conversation ends in an assistant's message that is more than text"


def not_continued(error: RbeeError, why: str) -> RbeeError:
    """Make the error of an answer that was lost and is not gone on with."""
    return WorkerLostError(
        f"{error.message} The answer cannot be continued on another worker: {why}.", details=error.details
    )


def body_after(asked: Asked, said: Said) -> dict[str, Any]:
    """Make the engine's request: what was said is gone on from, at least one token of it."""
    body = dict(asked.body)
    if not said.text:
        return body
    if asked.path == Completion.path:
        body["prompt"] = body["prompt"] + said.text
    else:
        body["messages"] = _messages_after(body["messages"], said.text)
    for name in _LIMITS:
        if _is_limit(body.get(name)):
            body[name] = max(1, body[name] - said.all_tokens)
    return body


def _messages_after(messages: list[Any], text: str) -> list[Any]:
    last = messages[-1] if messages else None
    if isinstance(last, dict) and last.get("role") == "assistant":  # the caller's own beginning
        return [*messages[:-1], {"role": "assistant", "content": last["content"] + text}]
    return [*messages, {"role": "assistant", "content": text}]
