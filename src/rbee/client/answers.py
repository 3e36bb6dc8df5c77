"""Turn what a server answered, or failed to answer, into the error that a caller should see."""

from __future__ import annotations

import os

import msgspec
from aiohttp import ClientResponse
from msgspec import Struct

from rbee.errors import (
    AuthenticationError,
    ForbiddenError,
    GoneError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PayloadTooLargeError,
    RbeeError,
    UnavailableError,
    error_classes,
)

MAX_ERROR_BYTES = 1024 * 1024
_BY_STATUS: dict[int, type[RbeeError]] = {
    cls.status: cls
    for cls in (
        InvalidRequestError,
        AuthenticationError,
        ForbiddenError,
        NotFoundError,
        GoneError,
        PayloadTooLargeError,
        OverloadedError,
    )
} | {502: UnavailableError, 503: UnavailableError, 504: UnavailableError}


class _Said(Struct):
    """What of `ErrorBody` the client uses; a server of another version may say less."""

    message: str
    code: str = ""
    param: str | None = None
    retryable: bool = False
    remedy: str = ""


class _Answer(Struct):
    error: _Said
    job_id: str | None = None
    correlation_id: str | None = None


_decoder = msgspec.json.Decoder(_Answer)


async def error_of(response: ClientResponse) -> RbeeError:
    """Read an answer with a status of 400 or more as the error it stands for."""
    body = await read_bounded(response, MAX_ERROR_BYTES)
    return error_from(
        response.status, body, url=str(response.url), retry_after=response.headers.get("Retry-After")
    )


async def read_bounded(response: ClientResponse, limit_bytes: int) -> bytes:
    """Read a whole body.

    Raises:
        InternalError: It is longer than `limit_bytes`.
    """
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > limit_bytes:
            raise InternalError(f"{response.url} answered with more than {limit_bytes} bytes.")
        parts.append(part)
    return b"".join(parts)


def error_from(status: int, body: bytes, *, url: str, retry_after: str | None = None) -> RbeeError:
    """Make the error that a status and a body stand for, also when the body is not one of ours."""
    retry_after_s = float(retry_after) if retry_after and retry_after.isdecimal() else None
    try:
        answer = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _stranger(status, url, retry_after_s)
    said = answer.error
    cls = error_classes().get(said.code) or _BY_STATUS.get(status, InternalError)
    error = cls(
        said.message,
        remedy=said.remedy or None,
        param=said.param,
        retry_after_s=retry_after_s,
        code=said.code or None,
        details={
            key: value
            for key, value in (("job_id", answer.job_id), ("correlation_id", answer.correlation_id))
            if value
        },
    )
    error.retryable = said.retryable  # type: ignore[misc]  # the server knows better than the class
    return error


def _stranger(status: int, url: str, retry_after_s: float | None) -> RbeeError:
    """Make the error of an answer that no rbee server wrote: a proxy's, or another program's."""
    cls = _BY_STATUS.get(status, InternalError)
    return cls(
        f"{url} answered {status}, without saying why.",
        remedy=None if cls is UnavailableError else "See whether a queen listens there (rbee status).",
        retry_after_s=retry_after_s,
    )


def unreachable(url: str, why: BaseException) -> UnavailableError:
    """Make the error of a server that could not be asked at all."""
    return UnavailableError(
        f"The queen at {url} cannot be reached: {reason_of(why)}.",
        remedy="Start it (rbee up), or name another with --queen or RBEE_QUEEN_URL.",
    )


def reason_of(error: BaseException) -> str:
    """Say in a few words why a connection failed."""
    cause = getattr(error, "os_error", None) or error
    if isinstance(cause, TimeoutError):
        return "it did not answer in time"
    if isinstance(cause, OSError) and cause.strerror:
        return os.strerror(cause.errno) if cause.errno and cause.errno > 0 else str(cause.strerror)
    return str(error) or type(error).__name__
