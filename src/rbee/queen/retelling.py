"""The response of a kept call, made of its job's log, event by event: the same whoever reads it, and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from rbee.contracts.dialects import DIALECTS, Dialect
from rbee.contracts.events import encode_json
from rbee.contracts.operations import ApiCall, ChatCompletion, Completion, MessagesCall, ResponseCall
from rbee.contracts.states import JobState
from rbee.contracts.views import ErrorBody
from rbee.errors import InvalidRequestError, RbeeError, error_classes
from rbee.jobs.records import JobRecord
from rbee.queen.responses import response_id, response_object
from rbee.queen.splice import Splice, names_of, story_of, usage_of

_PREFIXES: dict[str, str] = {
    ChatCompletion.path: "chatcmpl-",
    Completion.path: "cmpl-",
    MessagesCall.path: "msg_",
}


class Form(Protocol):
    """One API's form of an answer. Each method returns the chunks that stand for an event."""

    def token(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        """Take a piece of the answer."""

    def waits(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        """Take an event that comes before the answer."""

    def completed(self, result: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Take the end of a whole answer."""


class Retelling:
    """Makes the frames of a kept call's response.

    Attributes:
        error: What the call failed with, once its log has ended so.
        usage: What the answer took, once it has ended whole; None where that is told in its own form.
        is_ended: Its log has ended.
    """

    def __init__(self, record: JobRecord, operation: ApiCall, *, is_narrated: bool = False) -> None:
        """Begin at the start of the log.

        Args:
            record: The job.
            operation: What it asks, with its whole request.
            is_narrated: Tell as thinking, in a chat completion, what the answer waits for.
        """
        self.dialect = DIALECTS[operation.path]
        self.error: RbeeError | None = None
        self.usage: dict[str, Any] | None = None
        self.is_ended = False
        self._has_answer = False
        self._form = _form_of(record, operation, self.dialect, is_narrated=is_narrated)

    def take(self, event: bytes) -> list[dict[str, Any]]:
        """Take the next event of the log; returns the chunks that stand for it."""
        decoded: dict[str, Any] = msgspec.json.decode(event)
        match decoded["kind"]:
            case "token":
                self._has_answer = True
                return self._form.token(decoded)
            case "end":
                self.is_ended = True
                if decoded["state"] == JobState.COMPLETED:
                    return self._completed(decoded.get("result") or {})
                self.error = _error_of(decoded)
                return []
            case _:
                return [] if self._has_answer else self._form.waits(decoded)

    def _completed(self, result: Mapping[str, Any]) -> list[dict[str, Any]]:
        counts = result.get("usage") or {}
        if isinstance(self._form, _Chunks):
            self.usage = usage_of(counts.get("prompt_tokens"), counts.get("completion_tokens"))
        return self._form.completed(result)

    def frames(self, event: bytes, seq: int) -> bytes:
        """Take the next event; returns the frames that stand for it, the last of them with the event's number."""
        chunks = self.take(event)
        frames = [_frame(chunk) for chunk in chunks]
        if self.is_ended and self.error is None and not self.dialect.last_types:
            frames.append(b"data: [DONE]\n\n")
        if frames:
            frames[-1] = b"id: %d\n%b" % (seq, frames[-1])
        return b"".join(frames)


def _frame(chunk: dict[str, Any]) -> bytes:
    kind = chunk.get("type")
    name = b"event: %b\n" % kind.encode() if isinstance(kind, str) else b""
    return name + b"data: " + encode_json(chunk) + b"\n\n"


def _form_of(record: JobRecord, operation: ApiCall, dialect: Dialect, *, is_narrated: bool) -> Form:
    request = operation.request or {}
    if operation.path == ResponseCall.path:
        return _Events(record, request)
    names = names_of(record, request.get("model"), _PREFIXES[operation.path])
    if operation.path == MessagesCall.path:
        return _Messages(names)
    options = request.get("stream_options")
    is_usage_asked = isinstance(options, dict) and options.get("include_usage") is True
    is_told = is_narrated and operation.path == ChatCompletion.path and request.get("stream") is True
    return _Chunks(Splice(dialect, names), is_usage_asked=is_usage_asked, is_narrated=is_told)


class _Chunks:
    """Chat completions, and completions."""

    def __init__(self, splice: Splice, *, is_usage_asked: bool, is_narrated: bool) -> None:
        self._splice = splice
        self._is_usage_asked = is_usage_asked
        self._is_narrated = is_narrated

    def token(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        chunk = self._splice.take(event)
        return [] if chunk is None else [chunk]

    def waits(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        is_told = self._is_narrated and event["kind"] == "narration"
        return [self._splice.story(story_of(event))] if is_told else []

    def completed(self, result: Mapping[str, Any]) -> list[dict[str, Any]]:
        usage = result.get("usage") or {}
        reason = result.get("finish_reason") or "stop"
        return self._splice.rest(reason, usage, is_usage_asked=self._is_usage_asked)


class _Messages:
    """Anthropic's messages."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        self._names = {name: names[name] for name in ("id", "model")}
        self._last = ""

    def token(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        chunk = event.get("chunk")
        if not isinstance(chunk, dict):
            return []
        self._last = str(chunk.get("type"))
        message = chunk.get("message")
        return [{**chunk, "message": {**message, **self._names}} if isinstance(message, dict) else chunk]

    def waits(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        return []

    def completed(self, result: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [] if self._last == "message_stop" else [{"type": "message_stop"}]


class _Events:
    """Events of the Responses API: numbered as the log is, under the response's own id."""

    def __init__(self, record: JobRecord, request: Mapping[str, Any]) -> None:
        self._record = record
        self._request = request

    def token(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        chunk = event.get("chunk")
        if not isinstance(chunk, dict):
            return []
        made = {**chunk, "sequence_number": event["seq"]}
        response = chunk.get("response")
        if isinstance(response, dict):
            told = {**response, "id": response_id(self._record.job_id)}
            made["response"] = response_object(self._record, self._request, str(response.get("status")), told)
        return [made]

    def waits(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        if event["kind"] != "state" or event["seq"] != 1 or self._request.get("background") is not True:
            return []
        response = response_object(self._record, self._request, "queued")
        return [{"type": "response.queued", "sequence_number": event["seq"], "response": response}]

    def completed(self, result: Mapping[str, Any]) -> list[dict[str, Any]]:
        return []


def _error_of(end: dict[str, Any]) -> RbeeError:
    """Make the error that a job ended with, of its log's last event."""
    if end["state"] == JobState.CANCELLED:
        return InvalidRequestError(end["message"], code="cancelled", remedy="Send it again if it is wanted.")
    body = msgspec.convert(end["error"], ErrorBody)
    cls = error_classes().get(body.code, RbeeError)
    details = {"worker_id": body.worker_id, "exit_code": body.exit_code, "signal": body.signal}
    return cls(
        body.message,
        remedy=body.remedy,
        param=body.param,
        code=body.code,
        details={**details, "last_lines": body.last_lines},
    )
