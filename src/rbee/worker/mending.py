"""What an engine is asked, and what it says, where that is not what the clients' own libraries mean. All pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from rbee.contracts.frames import frames_data
from rbee.errors import InvalidRequestError
from rbee.worker.forms import Chunk, Completions, Form, ManyChoices, Messages, ResponseEvents

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"

_CREATED = re.compile(rb'"created":\s?(\d+)')

_encode = msgspec.json.Encoder().encode


def prepare(path: str, asked: dict[str, Any], own_model: str) -> dict[str, Any]:
    """Return what the engine is asked: `asked` itself where there is nothing to say otherwise.

    The engine gets its own name for the model, and a schema of the Responses API by the name that it heeds.
    """
    changes: dict[str, Any] = {}
    if asked.get("model", own_model) != own_model:
        changes["model"] = own_model
    if path == RESPONSES:
        schema = _format_of(asked.get("text"))
        if schema is not None and "response_format" not in asked:
            changes["response_format"] = schema
    return {**asked, **changes} if changes else asked


def unheeded(path: str, asked: dict[str, Any]) -> InvalidRequestError | None:
    """Return how to refuse what llama.cpp would leave unheeded without a word; None for what it does heed."""
    if path == MESSAGES and _format_of(asked.get("output_config")) is not None:
        return InvalidRequestError(
            "Answers by a schema are not to be had on /v1/messages.",
            param="output_config",
            remedy="Ask /v1/chat/completions with `response_format`, or /v1/responses with `text.format`.",
        )
    best_of = asked.get("best_of")
    is_best = isinstance(best_of, int) and best_of > 1
    wanted = {"echo": asked.get("echo"), "suffix": asked.get("suffix"), "best_of": is_best}
    for name in wanted if path == COMPLETIONS else ():
        if wanted[name]:
            return InvalidRequestError(
                f"`{name}` is not to be had with this model's engine.", param=name, remedy="Leave it out."
            )
    return None


def _format_of(holder: Any) -> dict[str, Any] | None:
    """Return the schema that an answer is asked by, as `response_format` has it; None for free text."""
    found = holder.get("format") if isinstance(holder, dict) else None
    if not isinstance(found, dict) or found.get("type") in (None, "text"):
        return None
    if found["type"] != "json_schema":
        return found
    return {"type": "json_schema", "json_schema": {key: value for key, value in found.items() if key != "type"}}


class Mender:
    """Mends what the engine says of one request."""

    def __init__(self, path: str, asked: Mapping[str, Any], own_model: str) -> None:
        """Take what was asked.

        Args:
            path: The route.
            asked: The request's body; the answer repeats its `model`.
            own_model: What the engine calls the model.
        """
        name = asked.get("model")
        self.model = name if isinstance(name, str) else own_model
        self._own: re.Pattern[bytes] = re.compile(rb'"model":\s?' + re.escape(_encode(own_model)))
        self._named = b'"model":' + _encode(self.model)
        self._is_renamed = self.model != own_model
        self._form = _form_of(path, asked)
        self._is_dated = path in (CHAT, COMPLETIONS)
        self._created = b""

    def frames(self, whole: bytes) -> bytes:
        """Mend some whole frames of a stream."""
        if any(mark in whole for mark in self._form.marks):
            whole = b"".join(self._form.frame(data) for data in frames_data(whole))
        return self._dated(self.named(whole))

    def chunk(self, chunk: Chunk) -> Chunk | None:
        """Mend one chunk; None where it waits for `rest`."""
        mended = self._form.chunk(chunk)
        return None if mended is None else self._with_date(self._with_name(mended))

    def rest(self) -> Chunk | None:
        """Return the chunk that is told last, behind all those of the engine; None where there is none."""
        rest = self._form.rest()
        return None if rest is None else self._with_date(self._with_name(rest))

    def whole(self, answer: Chunk) -> Chunk:
        """Mend an answer that is put together."""
        return self._with_name(self._form.answer(answer))

    def _with_name(self, told: Chunk) -> Chunk:
        renamed: dict[str, Any] = {} if told.get("model", self.model) == self.model else {"model": self.model}
        for key in ("response", "message"):
            inner = told.get(key)
            if isinstance(inner, dict) and inner.get("model", self.model) != self.model:
                renamed[key] = {**inner, "model": self.model}
        return {**told, **renamed} if renamed else told

    def _dated(self, whole: bytes) -> bytes:
        """Give every chunk the time of the first one: the engine gives each its own, in seconds."""
        if not self._is_dated:
            return whole
        if not self._created:
            found = _CREATED.search(whole)
            self._created = found[0] if found is not None else b""
        if not self._created or whole.count(self._created) == whole.count(b'"created":'):
            return whole
        return _CREATED.sub(self._created, whole)

    def _with_date(self, told: Chunk) -> Chunk:
        created = told.get("created")
        if not self._is_dated or not isinstance(created, int):
            return told
        self._created = self._created or b'"created":%d' % created
        first = int(self._created.rpartition(b":")[2])
        return told if created == first else {**told, "created": first}

    def named(self, data: bytes) -> bytes:
        """Put the model's name into JSON; in the text of an answer these quotes would be escaped."""
        if not self._is_renamed:
            return data
        mended: bytes = self._own.sub(lambda _: self._named, data)
        return mended


def _form_of(path: str, asked: Mapping[str, Any]) -> Form:
    choices = asked.get("n")
    if path == RESPONSES:
        return ResponseEvents()
    if path == COMPLETIONS:
        return Completions()
    if path == MESSAGES:
        return Messages()
    if path == CHAT and isinstance(choices, int) and choices > 1:
        return ManyChoices()
    return Form()
