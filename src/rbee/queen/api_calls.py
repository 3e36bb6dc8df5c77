"""Calls of the public API: what their bodies ask of us, and what is left of them for the engine. All pure."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from msgspec import Struct

from rbee.contracts.model_settings import ModelTable
from rbee.contracts.operations import (
    AnyApiCall,
    ApiCall,
    ChatCompletion,
    Completion,
    Embedding,
    MessagesCall,
    Rerank,
    ResponseCall,
    TokenCount,
    operation_name,
)
from rbee.contracts.strict import decode_strict
from rbee.errors import InvalidRequestError
from rbee.queen.parameters import Change, apply_settings

# What is for us and none of the engine's.
OURS = (
    *("timeout_s", "queue_timeout_s", "first_token_timeout_s", "idle_timeout_s"),
    *("keep_alive", "priority"),
)
_NEEDED: dict[type[ApiCall], tuple[str, ...]] = {
    ChatCompletion: ("messages",),
    Completion: ("prompt",),
    ResponseCall: ("input",),
    MessagesCall: ("messages",),
    TokenCount: ("messages",),
    Embedding: ("input",),
    Rerank: ("query", "documents"),
}
_LONGEST_S = 1e12  # longer than any that is accepted
_UNIT_S = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_NUMBER = r"\d{1,12}(?:\.\d{1,12})?"
_PART = re.compile(rf"({_NUMBER})(h|ms|us|µs|ns|m|s)")
_DURATION = re.compile(rf"(-)?({_NUMBER}|(?:{_PART.pattern})+)")


class Read(Struct, frozen=True):
    """A call that was read.

    Attributes:
        operation: What it asks, without what it asks about.
        body: What the engine is asked; `model` is the name that the caller used, which the answer repeats.
        change: What the model's settings changed of it.
    """

    operation: AnyApiCall
    body: dict[str, Any]
    change: Change


def read_api_call(kind: type[AnyApiCall], body: bytes, models: ModelTable, default_model: str) -> Read:
    """Read the body of a call; what is unknown in it goes to the engine.

    Args:
        kind: Which call it is.
        body: Its body.
        models: What the configuration says of models.
        default_model: The model of a call that names none.

    Raises:
        InvalidRequestError: It is no JSON object, lacks what it is about, or the model or a field of ours is of
            the wrong form.
    """
    call = _object(body)
    _check_needed(kind, call)
    name = _model(call) or default_model
    change = apply_settings(models.of(name), call, limit=_limit_of(kind))
    ours = {field: call.pop(field) for field in OURS if field in call}
    told = _operation(kind, {field: value for field, value in ours.items() if value is not None})
    call["model"] = name
    parameters = {field: value for field, value in call.items() if _is_wordless(value)}
    options = call.get("stream_options")
    if isinstance(options, dict):
        parameters["stream_options"] = {field: value for field, value in options.items() if _is_wordless(value)}
    parameters["model"] = name
    return Read(msgspec.structs.replace(told, model=name, parameters=parameters), call, change)


def _is_wordless(value: Any) -> bool:
    """Tell whether a value is a number or a switch: any other may hold what is asked about, or a key."""
    return value is None or isinstance(value, (bool, int, float))


def read_keep_alive(value: Any) -> float:
    """Read how long a worker is to be kept: seconds, or a duration such as `5m` or `1h30m`; -1 for ever.

    Raises:
        InvalidRequestError: It is neither.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return -1.0 if value < 0 else float(min(value, _LONGEST_S))
    found = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise InvalidRequestError(
            '`keep_alive` must be seconds or a duration such as "5m", or -1 to keep the worker for ever.',
            param="keep_alive",
        )
    if found[1]:
        return -1.0
    parts = _PART.findall(found[2])
    return sum(float(number) * _UNIT_S[unit] for number, unit in parts) if parts else float(found[2])


def _object(body: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"The body is no JSON object: {error}.") from None


def _check_needed(kind: type[ApiCall], call: dict[str, Any]) -> None:
    for field in _NEEDED[kind]:
        value = call.get(field)
        if field == "messages" and not (isinstance(value, list) and value):
            raise InvalidRequestError("`messages` must be a list with at least one message.", param="messages")
        if value is None or value == []:
            raise InvalidRequestError(f"`{field}` is needed, and must not be empty.", param=field)


def _model(call: dict[str, Any]) -> str | None:
    model = call.get("model")
    if model is not None and (not isinstance(model, str) or not 0 < len(model) <= 1024):
        raise InvalidRequestError("`model` must be a model's name.", param="model")
    return model


def _limit_of(kind: type[ApiCall]) -> str:
    return "max_output_tokens" if kind is ResponseCall else "max_tokens"


def _operation(kind: type[AnyApiCall], ours: dict[str, Any]) -> AnyApiCall:
    if "keep_alive" in ours:
        ours["keep_alive"] = read_keep_alive(ours["keep_alive"])
    return decode_strict(msgspec.json.encode({"operation": operation_name(kind), **ours}), (kind,))
