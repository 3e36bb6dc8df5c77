"""Errors as answers: one shape for every status of 400 and more."""

from __future__ import annotations

import math

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from rbee.contracts.views import ErrorAnswer
from rbee.errors import InternalError, InvalidRequestError, MethodNotAllowedError, NotFoundError, RbeeError
from rbee.jobs.runner import error_body
from rbee.narration import current_scope


def error_response(error: RbeeError, *, job_id: str | None = None) -> Response:
    """Make the answer that tells a caller of an error."""
    answer = ErrorAnswer(
        error=error_body(error),
        job_id=job_id or error.details.get("job_id"),
        correlation_id=current_scope().correlation_id,
    )
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if "allow" in error.details:
        headers["allow"] = error.details["allow"]
    return Response(
        msgspec.json.encode(answer), status_code=error.status, headers=headers, media_type="application/json"
    )


def translate_http_exception(error: HTTPException, path: str) -> RbeeError:
    """Say in the house's words what the router refused."""
    if error.status_code == 404:
        return NotFoundError(f"There is nothing at {path}.", remedy="See /openapi.json for what there is.")
    if error.status_code == 405:
        return MethodNotAllowedError()
    if error.status_code < 500:
        return InvalidRequestError(error.detail)
    return InternalError(error.detail)
