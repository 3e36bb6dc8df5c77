"""Errors as answers: one for every status of 400 or more, in the shape that the route's callers know."""

from __future__ import annotations

import contextvars
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from rbee.contracts.views import AnthropicErrorAnswer, ErrorAnswer
from rbee.errors import InternalError, InvalidRequestError, MethodNotAllowedError, NotFoundError, RbeeError
from rbee.jobs.runner import error_body
from rbee.narration import current_scope

ErrorShape = Literal["openai", "anthropic"]

_shape: contextvars.ContextVar[ErrorShape] = contextvars.ContextVar("rbee_error_shape", default="openai")

# Where nobody knows better.
RETRY_AFTER_S = 1.0

# Deadlines that only a caller sets: whether there is more time is for them to say, not for their client's retries.
_CALLERS_OWN = frozenset({"timeout", "queue_timeout"})
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


@contextmanager
def errors_shaped(shape: ErrorShape) -> Iterator[None]:
    """Have every error inside, and in the tasks made inside, told in one shape."""
    token = _shape.set(shape)
    try:
        yield
    finally:
        _shape.reset(token)


def error_response(error: RbeeError, *, job_id: str | None = None) -> Response:
    """Make the answer that tells a caller of an error."""
    is_worth_it = error.retryable and error.code not in _CALLERS_OWN
    headers = {"x-should-retry": "true" if is_worth_it else "false"}
    retry_after_s = error.retry_after_s
    if retry_after_s is None and error.status in (429, 503) and is_worth_it:
        retry_after_s = RETRY_AFTER_S
    if retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(retry_after_s))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if "allow" in error.details:
        headers["allow"] = error.details["allow"]
    body = msgspec.json.encode(_answer(error, job_id, _shape.get()))
    return Response(body, status_code=error.status, headers=headers, media_type="application/json")


def error_frame(error: RbeeError, *, job_id: str | None = None, shape: ErrorShape | None = None) -> bytes:
    """Make the last frame of an event stream that has begun and fails.

    Args:
        error: What it fails with.
        job_id: The job it is about.
        shape: Whose clients read it; by default that of the route.
    """
    shape = shape or _shape.get()
    data = msgspec.json.encode(_answer(error, job_id, shape))
    return (b"event: error\n" if shape == "anthropic" else b"") + b"data: " + data + b"\n\n"


def _answer(error: RbeeError, job_id: str | None, shape: ErrorShape) -> ErrorAnswer | AnthropicErrorAnswer:
    body = error_body(error)
    job_id = job_id or error.details.get("job_id")
    correlation_id = current_scope().correlation_id
    if shape == "openai":
        return ErrorAnswer(error=body, job_id=job_id, correlation_id=correlation_id)
    return AnthropicErrorAnswer(
        error=msgspec.structs.replace(body, type=anthropic_type(error.status)),
        job_id=job_id,
        correlation_id=correlation_id,
        request_id=job_id or correlation_id,
    )


def anthropic_type(status: int) -> str:
    """Return Anthropic's word for errors of a status.

    Source: the section on errors of Anthropic's API reference.
    """
    return _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def translate_http_exception(error: HTTPException, path: str) -> RbeeError:
    """Say in the house's words what the router refused."""
    if error.status_code == 404:
        return NotFoundError(f"There is nothing at {path}.", remedy="See /openapi.json for what there is.")
    if error.status_code == 405:
        return MethodNotAllowedError()
    if error.status_code < 500:
        return InvalidRequestError(error.detail)
    return InternalError(error.detail)
