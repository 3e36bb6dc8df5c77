"""Say an engine's errors in the house's words, once, at the border."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from rbee.errors import ContextExceededError, InvalidRequestError, RbeeError, UnavailableError, WorkerError

RETRY_AFTER_S = 1.0
_MAX_MESSAGE_CHARS = 2000
_TOO_LARGE = re.compile(r"input \((\d+) tokens\) is too large to process\b.*batch size: (\d+)")
_NOT_TAKEN = re.compile(r"\b(image|audio|video) input is not supported")
_NOT_STARTED_FOR = re.compile(r"does not support (\w+)")
# What an engine quotes may be a piece of the prompt; narration must not have it.
_QUOTED = re.compile(r"last read: .*|'[^']{25,}'|\"[^\"]{25,}\"", re.DOTALL)


def translate(status: int, body: bytes) -> RbeeError:
    """Make the error a caller gets of an engine's answer with a status of 400 or more."""
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        answer = None
    error = answer.get("error") if isinstance(answer, dict) else None
    return translate_error(error if isinstance(error, dict) else {}, status)


def translate_error(error: dict[str, Any], status: int = 500) -> RbeeError:
    """Make the error a caller gets of an engine's `error` object."""
    kind, message = error.get("type"), str(error.get("message") or "")[:_MAX_MESSAGE_CHARS]
    status = error["code"] if isinstance(error.get("code"), int) else status
    if kind == "exceed_context_size_error":
        return _too_long(error.get("n_prompt_tokens"), error.get("n_ctx"))
    too_large = _TOO_LARGE.search(message)
    if too_large:
        return _too_long(too_large[1], too_large[2])
    not_taken = _NOT_TAKEN.search(message)
    if not_taken:
        return InvalidRequestError(
            f"This model takes no {not_taken[1]}.", remedy="Leave it out, or ask a model that takes it."
        )
    if kind == "not_supported_error":
        missing = _NOT_STARTED_FOR.search(message)
        return InvalidRequestError(f"This worker was not started for {missing[1] if missing else 'this'}.")
    if status == 503:
        return UnavailableError("The engine is not ready yet.", retry_after_s=RETRY_AFTER_S)
    narrated = {"narrated": _QUOTED.sub("…", message)}
    if kind == "invalid_request_error" or (400 <= status < 500 and status not in {401, 403}):
        return InvalidRequestError(message or None, details=narrated)
    if not message:
        return WorkerError(f"The engine answered with status {status} and no reason.")
    return WorkerError(f"The engine failed: {message}", details=narrated)


def narrated_message(error: RbeeError) -> str:
    """Return an error's sentence as narration may have it: without anything the engine quoted."""
    return str(error.details.get("narrated") or error.message)[:500]


def _too_long(prompt_tokens: Any, context_tokens: Any) -> ContextExceededError:
    return ContextExceededError(f"The prompt has {prompt_tokens} tokens; the context holds {context_tokens}.")
