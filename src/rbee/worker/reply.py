"""One HTTP response, as far as it has been sent."""

from __future__ import annotations

import asyncio

from starlette.types import Send

from rbee.errors import RbeeError
from rbee.http.errors import ErrorShape, error_frame, error_response

# A reader that takes nothing for so long is cut off, for it holds a slot.
SEND_TIMEOUT_S = 30.0

_JSON = [(b"content-type", b"application/json")]
_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]

Headers = list[tuple[bytes, bytes]]


class Reply:
    """Sends a response in its parts. Every send raises `TimeoutError` when the caller does not read."""

    def __init__(self, send: Send, headers: Headers, frames: ErrorShape = "openai") -> None:
        """Take what every answer to this request has.

        Args:
            send: Sends its parts.
            headers: The headers of every answer.
            frames: Whose clients read its stream: an error in it goes to them as it is.
        """
        self._send = send
        self._headers = headers
        self._frames = frames
        self._is_awaited = False
        self.is_started = False
        self.is_ended = False

    async def start_stream(self) -> None:
        """Begin an event stream."""
        await self._start(200, _STREAM)

    async def write(self, data: bytes) -> None:
        """Send some whole frames at once."""
        await self._body(data, more=True)

    async def end(self, data: bytes = b"") -> None:
        """Send the last of the stream."""
        await self._body(data, more=False)

    async def blank(self) -> None:
        """Show that a JSON answer is being made: by a blank, as many of which may stand before it."""
        if not self.is_started:
            self._is_awaited = True
            await self._start(200, _JSON)
        await self._body(b" ", more=True)

    async def whole(self, body: bytes, status: int = 200) -> None:
        """Send a JSON answer in one piece, behind the blanks where it was awaited with some."""
        if self._is_awaited:
            await self.end(body)
            return
        await self._start(status, [*_JSON, (b"content-length", str(len(body)).encode())])
        await self._body(body, more=False)

    async def error(self, error: RbeeError, job_id: str | None = None) -> None:
        """Tell of an error: as the answer, or as the last frame of a stream that has begun.

        Behind the blanks of an awaited answer stand the status and the body that it would have had.
        """
        if self.is_ended:
            return
        if self.is_started and not self._is_awaited:
            await self.end(error_frame(error, job_id=job_id, shape=self._frames))
            return
        answer = error_response(error, job_id=job_id)
        if self._is_awaited:
            await self.end(b"%d %b" % (answer.status_code, bytes(answer.body)))
            return
        await self._start(answer.status_code, list(answer.raw_headers))
        await self._body(bytes(answer.body), more=False)

    async def _start(self, status: int, headers: Headers) -> None:
        self.is_started = True
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *self._headers]})

    async def _body(self, data: bytes, *, more: bool) -> None:
        self.is_ended = not more
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await self._send({"type": "http.response.body", "body": data, "more_body": more})
