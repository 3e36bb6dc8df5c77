"""What a request to the worker says of itself, beside its body."""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec
from msgspec import Struct
from starlette.datastructures import Headers

from rbee.contracts.dialects import Dialect
from rbee.contracts.ids import new_boot_id
from rbee.errors import InvalidRequestError
from rbee.narration import current_scope

_ID = re.compile(r"[A-Za-z0-9._:-]{1,200}")

Keep = Literal["no", "text", "chunk"]


class Call(Struct, frozen=True, kw_only=True):
    """One request by its headers.

    Attributes:
        request_id: What it is remembered and stopped by: `<job id>.<attempt>`.
        keep: Whether the answer is narrated instead of sent, and with the engine's JSON beside the text.
    """

    request_id: str
    job_id: str | None
    correlation_id: str | None
    attempt: int
    keep: Keep

    def echoed(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that tell the caller which request was answered."""
        headers = [(b"x-request-id", self.request_id.encode())]
        return [*headers, (b"x-job-id", self.job_id.encode())] if self.job_id else headers


def read_call(headers: Headers) -> Call:
    """Read a request's identity; the correlation id is the scope's.

    Raises:
        InvalidRequestError: An id or `x-rbee-keep` is not of its form.
    """
    job_id = _id(headers, "x-job-id")
    request_id = _id(headers, "x-request-id") or f"{job_id or new_boot_id()}.1"
    attempt = request_id.rpartition(".")[2]
    return Call(
        request_id=request_id,
        job_id=job_id,
        correlation_id=current_scope().correlation_id,
        attempt=int(attempt) if attempt.isdecimal() and len(attempt) <= 6 else 1,
        keep=_keep(headers.get("x-rbee-keep")),
    )


def _id(headers: Headers, name: str) -> str | None:
    value = headers.get(name)
    if value is None or _ID.fullmatch(value):
        return value
    raise InvalidRequestError(f"The header {name} is no id.", param=name)


def _keep(value: str | None) -> Keep:
    known: dict[str | None, Keep] = {None: "no", "0": "no", "1": "text", "chunk": "chunk"}
    if value not in known:
        raise InvalidRequestError("The header x-rbee-keep must be 0, 1 or chunk.", param="x-rbee-keep")
    return known[value]


def read_object(body: bytes) -> dict[str, Any]:
    """Decode a JSON object.

    Raises:
        InvalidRequestError: It is none.
    """
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"The body is not JSON: {error}.") from None
    except RecursionError:
        raise InvalidRequestError("The body is nested too deeply.") from None
    if not isinstance(value, dict):
        raise InvalidRequestError("The body must be a JSON object.")
    return value


def check_body(body: dict[str, Any], dialect: Dialect) -> None:
    """Refuse what the engine would answer although there is nothing to answer to.

    Raises:
        InvalidRequestError: The list that holds the prompt is empty.
    """
    field = dialect.list_field
    if field is not None and body.get(field) == []:
        raise InvalidRequestError(f"`{field}` must not be empty.", param=field)
