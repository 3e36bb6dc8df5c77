"""How a request is put to an engine, and what of its answer is for us alone.

The built-in engine takes its callers' words as they are. To any other one, the model is named as it knows it, and
the usage is asked for, which nothing else would tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from rbee.contracts.dialects import Chunk, Dialect
from rbee.errors import WorkerLostError
from rbee.worker.engines import EngineTraits

# The routes whose streams tell the usage only when they are asked to.
_USAGE_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})

_encode = msgspec.json.Encoder().encode


def named(body: Mapping[str, Any], traits: EngineTraits) -> dict[str, Any]:
    """Return a request that names the model as the engine knows it."""
    return dict(body) if traits.model_name is None else {**body, "model": traits.model_name}


def as_stream(body: Mapping[str, Any], dialect: Dialect, traits: EngineTraits) -> dict[str, Any]:
    """Return a request for a stream that tells what it used."""
    kept = {key: value for key, value in body.items() if key != "stream_options"}
    asked = {**named(kept, traits), "stream": True}
    if traits.is_built_in or dialect.path not in _USAGE_PATHS:
        return asked
    return {**asked, "stream_options": {**_stream_options(body), "include_usage": True}}


def check_continuation(body: Mapping[str, Any], traits: EngineTraits) -> None:
    """Refuse to go on with an answer that another worker began, where the engine would begin anew.

    Raises:
        WorkerLostError: The engine takes nothing as the beginning of its answer.
    """
    messages = body.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not traits.has_prefill and isinstance(last, dict) and last.get("role") == "assistant":
        raise WorkerLostError(
            f"The answer cannot be continued here: the engine {traits.name} does not go on from what was said."
        )


def wants_usage(body: Mapping[str, Any]) -> bool:
    """Tell whether a caller asked for a last chunk with the usage."""
    return _stream_options(body).get("include_usage") is True


def is_usage_alone(chunk: Chunk) -> bool:
    """Tell whether a chunk says nothing but the usage."""
    return chunk.get("choices") == [] and isinstance(chunk.get("usage"), dict)


def canonical_frame(data: bytes, chunk: Chunk, dialect: Dialect) -> bytes:
    """Frame a chunk: its event's name where the dialect has one, and its data on one line."""
    line = _encode(chunk) if b"\n" in data else data
    name = chunk.get("type")
    event = b"event: %b\n" % name.encode() if dialect.last_types and isinstance(name, str) else b""
    return b"%bdata: %b\n\n" % (event, line)


def _stream_options(body: Mapping[str, Any]) -> dict[str, Any]:
    given = body.get("stream_options")
    return given if isinstance(given, dict) else {}
