"""Say an engine's errors in the house's words, once, at the border."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from rbee.errors import (
    ContextExceededError,
    InvalidRequestError,
    NotFoundError,
    RbeeError,
    UnavailableError,
    WorkerError,
)
from rbee.worker.repeated import without_repeated

RETRY_AFTER_S = 1.0
_MAX_MESSAGE_CHARS = 2000
_MAX_NARRATED_CHARS = 500
_PLAIN_TEXT_BYTES = 1000
_NO_SUCH_ROUTE = re.compile(r"(?:file |page |404 |route )*(?:not found|method not allowed)\W*", re.IGNORECASE)
_TOO_LARGE = re.compile(r"input \((\d+) tokens\) is too large to process\b.*batch size: (\d+)")
_NOT_TAKEN = re.compile(r"\b(image|audio|video) input is not supported")
_TEMPLATE = re.compile(r"\bparser for this template\b.*\nError: (?:Jinja Exception: )?([^\n]*)", re.DOTALL)
_NOT_STARTED_FOR = re.compile(r"does not support (\w+)")
# What an engine quotes may be a piece of the prompt; narration must not have it.
_QUOTED = re.compile(r"last read: .*|'[^']{25,}'|\"[^\"]{25,}\"", re.DOTALL)


def translate(status: int, body: bytes) -> RbeeError:
    """Make the error a caller gets of an engine's answer with a status of 400 or more."""
    return translate_error(_error_in(body), status)


def no_route(status: int, body: bytes, path: str, engine: str) -> RbeeError:
    """Make the error of an answer with status 404 or 405: often enough the engine has no such route."""
    error = _error_in(body)
    message = str(error.get("message") or "")
    if message and not _NO_SUCH_ROUTE.fullmatch(message):
        return translate_error(error, status)
    return NotFoundError(
        f"The engine {engine} does not offer {path}.",
        remedy="Ask one of the routes that it has, or run the model on another engine.",
    )


def error_in(answer: Any) -> dict[str, Any] | None:
    """Find what tells of an error in a decoded answer, in any of the forms that servers have for it."""
    if not isinstance(answer, dict):
        return None
    if answer.get("type") == "error" and answer.get("message"):  # as the Responses API has it
        return answer
    error = answer.get("error")
    if isinstance(error, dict):
        return error
    if isinstance(error, str) and error:
        return {"message": error}
    kind = str(answer.get("type"))
    is_named = kind.endswith("_error") or (kind == "error" and bool(answer.get("message")))
    if answer.get("object") == "error" or is_named:
        return answer
    return {"message": _detail(answer["detail"])} if answer.get("detail") and "choices" not in answer else None


def _error_in(body: bytes) -> dict[str, Any]:
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {"message": _plain_text(body)}
    return error_in(answer) or {}


def _plain_text(body: bytes) -> str:
    """Return a short text as it is; of a page, or of what is no text, nothing."""
    text = body.decode("utf-8", "replace").strip() if len(body) <= _PLAIN_TEXT_BYTES else ""
    return "" if text.startswith("<") or not text.isprintable() or "\ufffd" in text else text


def _detail(detail: Any) -> str:
    """Say what is wrong with which field; what was given there may be a piece of the prompt, and is left out."""
    if isinstance(detail, str):
        return detail
    parts = [part for part in detail if isinstance(part, dict)] if isinstance(detail, list) else []
    places = (".".join(map(str, part.get("loc") or ())) for part in parts)
    return "; ".join(f"{place}: {part.get('msg')}" for place, part in zip(places, parts, strict=True))


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
    refused = _TEMPLATE.search(message)
    if refused:
        return _template_refused(refused[1])
    if kind == "not_supported_error":
        missing = _NOT_STARTED_FOR.search(message)
        return InvalidRequestError(f"This worker was not started for {missing[1] if missing else 'this'}.")
    if status == 503:
        return UnavailableError("The engine is not ready yet.", retry_after_s=RETRY_AFTER_S)
    if status == 429:
        return UnavailableError("The engine takes no more requests now.", retry_after_s=RETRY_AFTER_S)
    narrated = {"narrated": _QUOTED.sub("…", message)}
    if kind == "invalid_request_error" or (400 <= status < 500 and status not in {401, 403}):
        return InvalidRequestError(message or None, details=narrated)
    if not message:
        return WorkerError(f"The engine answered with status {status} and no reason.")
    return WorkerError(f"The engine failed: {message}", details=narrated)


def _template_refused(why: str) -> InvalidRequestError:
    """Say that the model's template does not take these messages; what it says may quote them."""
    sentence = "The model's chat template does not take these messages"
    return InvalidRequestError(
        f"{sentence}: {why.strip()}",
        remedy="Send messages of the form it takes, or ask /v1/completions with a prompt of your own.",
        details={"narrated": f"{sentence}."},
    )


def narrated_message(error: RbeeError, asked: Mapping[str, Any]) -> str:
    """Return an error's sentence as narration may have it: without anything the engine quoted or repeated.

    Args:
        error: What the request fails with.
        asked: The request's body.
    """
    if "narrated" not in error.details:
        return error.message[:_MAX_NARRATED_CHARS]
    return without_repeated(str(error.details["narrated"])[:_MAX_NARRATED_CHARS], asked)


def _too_long(prompt_tokens: Any, context_tokens: Any) -> ContextExceededError:
    return ContextExceededError(f"The prompt has {prompt_tokens} tokens; the context holds {context_tokens}.")
