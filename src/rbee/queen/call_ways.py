"""Which way an API call is answered: relayed or kept, and told what it waits for or not. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rbee.contracts.dialects import DIALECTS
from rbee.contracts.operations import ApiCall, ResponseCall
from rbee.errors import InvalidRequestError

KEEP_HEADER = "x-rbee-keep"
NARRATE_HEADER = "x-rbee-narrate"


def is_kept(kind: type[ApiCall], body: Mapping[str, Any], headers: Mapping[str, str]) -> bool:
    """Tell whether the answer of a call is to be kept: by the header, or by `store` or `background` of a response.

    Raises:
        InvalidRequestError: What is asked cannot be done: there is nothing to be kept, the header is neither 0 nor
            1, an answer that is to be kept is not to be stored, or the call goes on from an earlier response.
    """
    is_asked = _is_on(headers, KEEP_HEADER)
    if kind.path not in DIALECTS:
        if is_asked:
            raise InvalidRequestError(f"{kind.path} has no answer that could be kept.", param=KEEP_HEADER)
        return False
    if is_asked and body.get("store") is False:
        raise InvalidRequestError(
            f"An answer cannot be kept that is not to be stored: {KEEP_HEADER} is 1 and `store` is false.",
            param="store",
        )
    if not issubclass(kind, ResponseCall):
        return is_asked
    if body.get("previous_response_id") is not None:
        raise InvalidRequestError(
            "An answer does not go on from an earlier response here.",
            param="previous_response_id",
            remedy="Send the whole conversation as `input`.",
        )
    is_background = body.get("background") is True
    if is_background and body.get("store") is False:
        raise InvalidRequestError("A background response has to be stored.", param="store")
    return is_asked or is_background or body.get("store") is True


def is_narrated(headers: Mapping[str, str]) -> bool:
    """Tell whether a call's own stream is to say what it waits for; that of a chat completion can.

    Raises:
        InvalidRequestError: The header is neither 0 nor 1.
    """
    return _is_on(headers, NARRATE_HEADER)


def _is_on(headers: Mapping[str, str], name: str) -> bool:
    value = headers.get(name, "0")
    if value not in ("0", "1"):
        raise InvalidRequestError(f"The header {name} must be 0 or 1.", param=name)
    return value == "1"
