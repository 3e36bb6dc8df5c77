"""Relayed calls from their callers' side: what is asked, what was sent for it, and how the response ends."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Mapping

import msgspec
from msgspec import Struct
from starlette.types import Send

from rbee.contracts.dialects import DIALECTS, DONE, Dialect
from rbee.contracts.events import encode_json
from rbee.contracts.frames import frames_data
from rbee.contracts.operations import ApiCall, ChatCompletion, Completion
from rbee.errors import RbeeError
from rbee.http.errors import error_frame
from rbee.jobs.records import JobRecord
from rbee.queen.splice import Splice, names_of, replay

HELD_BYTES_MAX = 8 * 1024 * 1024  # of one answer: more than 30,000 tokens as the engine frames them
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",
}
COMMENT = b": still here\n\n"
DONE_FRAME = b"data: " + DONE + b"\n\n"


class _Named(Struct):
    """What of a call's body is looked at before there is a loss: the name that its answer repeats."""

    model: str | None = None


class Call(Struct, frozen=True, kw_only=True):
    """A relayed call.

    Attributes:
        body: What the engine is asked, as JSON.
        is_narrated: Its caller wants to be told what it waits for, in the answer's own stream.
    """

    record: JobRecord
    operation: ApiCall
    path: str
    body: bytes
    is_narrated: bool = False

    @property
    def is_stream(self) -> bool:
        """Tell whether its answer is a stream."""
        return self.operation.parameters.get("stream") is True

    @property
    def is_usage_asked(self) -> bool:
        """Tell whether the stream shall end with how many tokens it took."""
        options = self.operation.parameters.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True

    def caller(self, send: Send) -> Caller:
        """Return the side of the call that its response is sent to."""
        dialect = DIALECTS.get(self.path)
        is_narrated = self.is_narrated and self.is_stream and self.path == ChatCompletion.path
        splice = None
        if is_narrated:
            model = msgspec.json.decode(self.body, type=_Named).model
            splice = Splice(DIALECTS[self.path], names_of(self.record, model))
        can_continue = self.is_stream and self.path in (ChatCompletion.path, Completion.path)
        is_held = can_continue and self.operation.attempts > 1
        return Caller(send, self.record.job_id, dialect, is_held=is_held, splice=splice)


class Caller:
    """Sends one response.

    Attributes:
        is_started: Its head was sent.
        is_framed: It is a stream of events.
        has_answer: Some of the answer was sent.
        is_waited_for: It is being sent something, and takes its time.
        first_at: When it was sent the first of the answer, in seconds since 1970.
        splice: Makes its chunks; None while they are passed on as they come.
    """

    def __init__(
        self,
        send: Send,
        job_id: str,
        dialect: Dialect | None,
        *,
        is_held: bool = False,
        splice: Splice | None = None,
    ) -> None:
        """Take whom to send to.

        Args:
            dialect: How the answer is streamed, if it can be.
            is_held: Keep what is passed on, so that another worker can go on with it.
            splice: Makes the chunks from the first one on.
        """
        self._send = send
        self._job_id = job_id
        self._dialect = dialect
        self._held: list[bytes] | None = [] if is_held and splice is None else None
        self._held_bytes = 0
        self._sending_first = asyncio.Lock()
        self._unsent = b""
        self._in_full: tuple[RbeeError, RbeeError] | None = None
        self.splice = splice
        self.is_started = False
        self.is_framed = False
        self.has_answer = False
        self.is_waited_for = False
        self.first_at: float | None = None
        self.finished = asyncio.Event()

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Send the head of the response, once; behind what it was told while it waited."""
        async with self._sending_first:
            await self._start(status, headers)

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        if not self.is_started:
            raw = [(name.encode(), value.encode()) for name, value in headers.items()]
            raw += [(b"x-job-id", self._job_id.encode()), (b"x-request-id", self._job_id.encode())]
            self.is_framed = headers.get("content-type", "").startswith("text/event-stream")
            await self._send({"type": "http.response.start", "status": status, "headers": raw})
            self.is_started = True

    def take(self, frames: bytes, attempt: int) -> bytes:
        """Take some whole frames, or all of an answer that does not stream; returns what is sent for them."""
        if not self.has_answer:
            self.has_answer, self.first_at = True, time.time()
        if self.splice is not None:
            return _spliced(self.splice, frames, attempt)
        if self._held is not None:
            self._hold(frames)
        return frames

    def _hold(self, frames: bytes) -> None:
        assert self._held is not None
        self._held.append(frames)
        self._held_bytes += len(frames)
        if self._held_bytes > HELD_BYTES_MAX:
            self._held = None

    def spliced(self, attempt: int) -> Splice | None:
        """Have the next attempt's frames follow those of this one; None where these are not held (any more)."""
        if self.splice is None and self._held is not None and self._dialect is not None:
            self.splice = replay(self._dialect, self._held, attempt)
            self._held = None
        return self.splice

    async def tell(self, text: str) -> None:
        """Send, as thinking, what the answer waits for; nothing once it has begun."""
        async with self._sending_first:
            if self.splice is None or self.has_answer:
                return
            frame = chunk_frame(self.splice.story(text))
            await self._start(200, STREAM_HEADERS)
            await self.send(frame)

    async def comment(self) -> None:
        """Send something that says nothing, so that nobody thinks the stream is dead."""
        async with self._sending_first:
            if self.is_started and not self.has_answer:
                await self.send(COMMENT)

    async def send(self, chunk: bytes) -> None:
        """Send some bytes.

        Where the caller takes its time, the server waits before it takes any. What was waiting so when its worker
        was lost belongs to the answer all the same, and goes before what is sent next.
        """
        self._unsent += chunk
        self.is_waited_for = True
        try:
            await self._send({"type": "http.response.body", "body": self._unsent, "more_body": True})
        finally:
            self.is_waited_for = False
        self._unsent = b""

    def narrated(self, error: RbeeError, message: str) -> RbeeError:
        """Return an error with a sentence that may stand in a log; the caller is told the whole one."""
        told = copy.copy(error)
        told.message, told.args = message, (message,)
        self._in_full = told, error
        return told

    def in_full(self, error: RbeeError) -> RbeeError:
        """Return an error with the sentence that is for the caller alone, where it has one."""
        return self._in_full[1] if self._in_full is not None and self._in_full[0] is error else error

    async def finish(self) -> None:
        """End the response."""
        await self._send({"type": "http.response.body", "body": self._unsent, "more_body": False})
        self.finished.set()

    async def fail(self, error: RbeeError) -> None:
        """Tell a caller whose response has begun: one `error` frame, then the end without `[DONE]`.

        An answer that does not stream was sent as a whole, so that there is nothing to tell of it.
        """
        if self.is_framed:
            await self.send(error_frame(error, job_id=self._job_id))
        await self.finish()


def chunk_frame(chunk: object) -> bytes:
    """Frame a chunk of an answer."""
    return b"data: " + encode_json(chunk) + b"\n\n"


def _spliced(splice: Splice, frames: bytes, attempt: int) -> bytes:
    made = []
    for data in frames_data(frames):
        if data == DONE:
            splice.is_done = True
            made.append(DONE_FRAME)
            continue
        chunk = splice.hear(msgspec.json.decode(data), attempt)
        if chunk is not None:
            made.append(chunk_frame(chunk))
    return b"".join(made)
